//! The stubs that know keys: arm64's.

use super::{Reason, Verdict};
use crate::abi::{Detail, Rebinding, Record};
use crate::pac::{Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing};
use crate::signer::{Way, Words};

unsafe extern "C" {
    fn cfi_stack_rebind_pointers(
        source: *const Record,
        destination: *const Record,
        low: usize,
        plan: *const Rebinding,
        count: usize,
    ) -> u64;
    fn cfi_stack_rebind_pointers_in_place(
        source: *const Record,
        destination: *const Record,
        low: usize,
        plan: *const Rebinding,
        count: usize,
    ) -> u64;
    fn cfi_stack_authenticate_a(word: SignedPc, modifier: Modifier) -> RawPc;
    fn cfi_stack_authenticate_b(word: SignedPc, modifier: Modifier) -> RawPc;
    fn cfi_stack_authenticate_da(word: SignedPointer, slot: usize) -> u64;
    fn cfi_stack_authenticate_db(word: SignedPointer, slot: usize) -> u64;
    fn cfi_stack_authenticate_parked_a(word: SignedPc, modifier: Modifier, place: usize) -> RawPc;
    fn cfi_stack_authenticate_parked_b(word: SignedPc, modifier: Modifier, place: usize) -> RawPc;
    fn cfi_stack_authenticate_parked_da(word: SignedPointer, modifier: usize, place: usize) -> u64;
    fn cfi_stack_authenticate_parked_db(word: SignedPointer, modifier: usize, place: usize) -> u64;
    fn cfi_stack_park(
        record: *const Record,
        low: usize,
        plan: *const Rebinding,
        count: usize,
        shadow: *const u64,
        details: *const Detail,
        details_count: usize,
        way: usize,
    ) -> u64;
    fn cfi_stack_park_pointers(
        record: *const Record,
        low: usize,
        plan: *const Rebinding,
        count: usize,
        way: usize,
    ) -> u64;
    fn cfi_stack_pac_field() -> u64;
    #[cfg(target_os = "linux")]
    fn cfi_stack_id_isar1() -> u64;
    #[cfg(target_os = "linux")]
    fn cfi_stack_id_isar2() -> u64;
    fn cfi_stack_key_print(which: u64) -> u64;
}

/// Re-binds the planned frame pointers.
///
/// # Safety
/// See [`crate::signer::Signer::rebind_pointers`].
pub(crate) unsafe fn rebind_pointers(
    source: &Record,
    destination: &Record,
    low: usize,
    plan: &[Rebinding],
    words: Words,
) -> Verdict {
    let rebind = match words {
        Words::Source => cfi_stack_rebind_pointers,
        Words::Destination => cfi_stack_rebind_pointers_in_place,
    };
    // SAFETY: as in `rebind`.
    let verdict = unsafe { rebind(source, destination, low, plan.as_ptr(), plan.len()) };
    Verdict::of(verdict, low, plan)
}

/// What the stubs take of a way.
fn way_word(key: Signing, way: Way) -> usize {
    key as usize | if way == Way::Unpark { 4 } else { 0 }
}

/// Exchanges the planned return addresses between their own keys and `key`.
///
/// # Safety
/// See [`crate::signer::Signer::exchange`].
pub(crate) unsafe fn park(
    record: &Record,
    low: usize,
    plan: &[Rebinding],
    details: &[Detail],
    shadow: Option<&[u64]>,
    key: Signing,
    way: Way,
) -> Verdict {
    if shadow.is_some_and(|shadow| shadow.len() < plan.len()) {
        return Verdict { reason: Reason::Word, slot: low };
    }
    let shadow = shadow.map_or(std::ptr::null(), <[u64]>::as_ptr);
    let (entries, count, way) = (plan.as_ptr(), plan.len(), way_word(key, way));
    // SAFETY: the caller's for the segment; plan, details and shadow are live slices with at least that many elements.
    let verdict = unsafe { cfi_stack_park(record, low, entries, count, shadow, details.as_ptr(), details.len(), way) };
    Verdict::of(verdict, low, plan)
}

/// Exchanges the planned frame pointers between their own data keys and that of `key`'s letter.
///
/// # Safety
/// See [`crate::signer::Signer::exchange_pointers`].
pub(crate) unsafe fn park_pointers(record: &Record, low: usize, plan: &[Rebinding], key: Signing, way: Way) -> Verdict {
    // SAFETY: as in `park`.
    let verdict = unsafe { cfi_stack_park_pointers(record, low, plan.as_ptr(), plan.len(), way_word(key, way)) };
    Verdict::of(verdict, low, plan)
}

/// Authenticates `word` and returns the raw address; a failure ends the process in the stub.
pub(crate) fn authenticate(word: SignedPc, signing: Signing, modifier: Modifier) -> RawPc {
    // SAFETY: computes on registers; the caller has seen that the instructions are there (`Hardware::enforces`).
    unsafe {
        match signing {
            Signing::B => cfi_stack_authenticate_b(word, modifier),
            // The caller enforces, so it is A; anything else must not come back unauthenticated.
            Signing::A | Signing::None => cfi_stack_authenticate_a(word, modifier),
        }
    }
}

/// Authenticates a saved frame pointer and returns it raw; a failure ends the process in the stub.
pub(crate) fn authenticate_pointer(word: SignedPointer, signing: PointerSigning, slot: usize) -> u64 {
    // SAFETY: as in `authenticate`.
    unsafe {
        match signing {
            PointerSigning::B => cfi_stack_authenticate_db(word, slot),
            // The caller signs, so it is A; anything else must not come back unauthenticated.
            PointerSigning::A | PointerSigning::None => cfi_stack_authenticate_da(word, slot),
        }
    }
}

/// Authenticates a return address that is parked under `key`, and returns the raw address; a failure ends the process in the stub.
pub(crate) fn authenticate_parked(
    word: SignedPc,
    slot: usize,
    signing: Signing,
    modifier: Modifier,
    key: Signing,
) -> RawPc {
    let place = slot | signing as usize;
    // SAFETY: as in `authenticate`; nothing is parked without generic authentication.
    unsafe {
        match key {
            Signing::B => cfi_stack_authenticate_parked_b(word, modifier, place),
            // As in `authenticate`.
            Signing::A | Signing::None => cfi_stack_authenticate_parked_a(word, modifier, place),
        }
    }
}

/// Authenticates a saved frame pointer that is parked under the data key of `key`'s letter; a failure ends the process in the stub.
pub(crate) fn authenticate_parked_pointer(
    word: SignedPointer,
    slot: usize,
    signing: PointerSigning,
    key: Signing,
) -> u64 {
    let place = slot | signing as usize;
    // SAFETY: as in `authenticate_parked`.
    unsafe {
        match key {
            Signing::B => cfi_stack_authenticate_parked_db(word, slot, place),
            // As in `authenticate`.
            Signing::A | Signing::None => cfi_stack_authenticate_parked_da(word, slot, place),
        }
    }
}

/// What the CPU says of itself; only to be asked where the kernel lets user code read the ID registers.
#[cfg(target_os = "linux")]
pub(crate) fn id_registers() -> (u64, u64) {
    // SAFETY: the kernel emulates the reads (HWCAP_CPUID was seen by the caller).
    unsafe { (cfi_stack_id_isar1(), cfi_stack_id_isar2()) }
}

/// The bits that a signature may take in a code address.
pub(crate) fn pac_field() -> u64 {
    // SAFETY: computes on registers; the caller has seen HWCAP_PACA.
    unsafe { cfi_stack_pac_field() }
}

/// The number of the generic key among those that [`key_print`] knows.
#[cfg(target_os = "linux")]
pub(crate) const GENERIC_KEY: u64 = 4;

/// A fingerprint of one key of this thread, IA, IB, DA, DB, GA from 0 on. Made of constants that are no addresses; 0 for an address key that is turned off.
pub(crate) fn key_print(which: u64) -> u64 {
    // SAFETY: computes on registers; the caller has seen HWCAP_PACA and, for the generic key, HWCAP_PACG.
    unsafe { cfi_stack_key_print(which) }
}
