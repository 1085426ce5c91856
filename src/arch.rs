//! The stubs' declarations: the only way from Rust into `asm/`, with what each asks for.
//!
//! The contracts (registers, both stacks, what is signed with which key and modifier) stand at each stub.

#[cfg(target_arch = "aarch64")]
#[path = "arch/keys.rs"]
mod keys;
#[cfg(not(target_arch = "aarch64"))]
#[path = "arch/no_keys.rs"]
mod keys;

pub(crate) use keys::*;

use crate::abi::{Control, Detail, Link, Rebinding, Record};
use crate::pac::{RawPc, Signing};
use crate::signer::Words;

/// How the library's own stubs sign their return address: key A where ELF unwinders expect it, key B where the
/// platform's ABI says so.
pub const STUB_SIGNING: Signing = if cfg!(target_arch = "x86_64") {
    Signing::None
} else if cfg!(target_vendor = "apple") {
    Signing::B
} else {
    Signing::A
};

/// Offset of the entry frame's frame pointer from the native stack pointer that `enter` leaves.
pub(crate) const ENTRY_FP_OFFSET: usize = if cfg!(target_arch = "x86_64") { 48 } else { 0 };

unsafe extern "C" {
    fn cfi_stack_enter(control: *mut Control, entry: RawPc, a0: usize, a1: usize, a2: usize, a3: usize) -> u64;
    fn cfi_stack_entry_return();
    fn cfi_stack_grow();
    fn cfi_stack_exit();
    fn cfi_stack_leave();
    fn cfi_stack_leave_from_signal();
    fn cfi_stack_suspend_managed();
    fn cfi_stack_resume_managed(control: *mut Control, value: u64, oldest: *const Record) -> u64;
    fn cfi_stack_discard(control: *mut Control);
    fn cfi_stack_move_link(
        link: *mut Link,
        control: *mut Control,
        source: *const Record,
        destination: *const Record,
    ) -> usize;
    fn cfi_stack_rebind(
        source: *const Record,
        destination: *const Record,
        low: usize,
        plan: *const Rebinding,
        count: usize,
        shadow: *const u64,
        #[cfg(target_arch = "aarch64")] details: *const Detail,
        #[cfg(target_arch = "aarch64")] details_count: usize,
    ) -> u64;
    #[cfg(target_arch = "aarch64")]
    fn cfi_stack_rebind_in_place(
        source: *const Record,
        destination: *const Record,
        low: usize,
        plan: *const Rebinding,
        count: usize,
        shadow: *const u64,
        details: *const Detail,
        details_count: usize,
    ) -> u64;
    #[cfg(target_os = "linux")]
    fn cfi_stack_remap(source: *const Record, destination: *const Record, low: usize, granule: usize) -> usize;
    fn cfi_stack_seal(record: *mut Record, base: usize, top: usize, identity: u64, generation: u64);
    fn cfi_stack_reseal(record: *mut Record, generation: u64);
    fn cfi_stack_link();
    fn cfi_stack_link_return();
    fn cfi_stack_link_idle(record: *mut Record, previous: *const Record);
    fn cfi_stack_link_lifted(record: *mut Record, previous: *const Record, fp: usize);
    fn cfi_stack_link_part(part: *mut Record, whole: *const Record, top: usize);
    fn cfi_stack_link_moved(record: *mut Record, source: *const Record);
    fn cfi_stack_link_shadow(record: *mut Record, token: usize);
    fn cfi_stack_shadow_pointer() -> usize;
    fn cfi_stack_fudge_call();
    fn cfi_stack_measured(f: unsafe extern "C" fn(usize) -> u64, data: usize, bytes: usize, used: *mut usize) -> u64;
}

/// Calls `entry` on the stack that `control` describes.
///
/// # Safety
/// `control` is idle and its segment, token and activation are this thread's to use; `entry` is managed code, or keeps
/// its frame rules.
pub(crate) unsafe fn enter(control: *mut Control, entry: RawPc, args: [usize; 4]) -> u64 {
    let [a0, a1, a2, a3] = args;
    // SAFETY: the caller's; the mode word is set because a `Thread` exists.
    unsafe { cfi_stack_enter(control, entry, a0, a1, a2, a3) }
}

/// Continues the suspended stack that `control` describes: its `suspend` returns `value`. Returns what [`enter`] would.
///
/// # Safety
/// As for [`enter`]; the stack is suspended, its frames are those that `suspend` left, the youngest in `control.segment`, the oldest in
/// `oldest`'s.
pub(crate) unsafe fn resume(control: *mut Control, value: u64, oldest: *const Record) -> u64 {
    // SAFETY: the caller's.
    unsafe { cfi_stack_resume_managed(control, value, oldest) }
}

/// Pops the shadow stack of a suspended stack to where it was at its entry.
///
/// # Safety
/// The stack that `control` describes is suspended and this thread's to use; its frames are never run again.
pub(crate) unsafe fn discard(control: *mut Control) {
    // SAFETY: the caller's.
    unsafe { cfi_stack_discard(control) }
}

/// Where managed code waits after its frames have moved from `source` to `destination`; `None` when that is no place in them, and nothing was
/// written. A seal that does not hold ends the process in the stub.
///
/// # Safety
/// `link` is the address of a link record of the stack that `control` describes; nobody else uses either.
pub(crate) unsafe fn move_link(
    link: usize,
    control: *mut Control,
    source: &Record,
    destination: &Record,
) -> Option<usize> {
    // SAFETY: the caller's; the stub reads the records and writes the link record alone.
    let moved =
        unsafe { cfi_stack_move_link(std::ptr::with_exposed_provenance_mut(link), control, source, destination) };
    (moved != 0).then_some(moved)
}

/// Address of the stub by which managed code suspends its stack.
pub(crate) fn suspend() -> RawPc {
    RawPc::new(cfi_stack_suspend_managed as *const () as usize)
}

/// Address behind the call in `enter`: what the oldest managed frame returns to.
pub(crate) fn entry_return() -> RawPc {
    RawPc::new(cfi_stack_entry_return as *const () as usize)
}

/// Address of the `grow` stub.
pub(crate) fn grow() -> RawPc {
    RawPc::new(cfi_stack_grow as *const () as usize)
}

/// Address of the `exit` stub.
pub(crate) fn exit() -> RawPc {
    RawPc::new(cfi_stack_exit as *const () as usize)
}

/// Address of the `leave` stub.
pub(crate) fn leave() -> RawPc {
    RawPc::new(cfi_stack_leave as *const () as usize)
}

/// Address of the stub that a rewritten signal context runs as `leave`.
pub(crate) fn leave_from_signal() -> RawPc {
    RawPc::new(cfi_stack_leave_from_signal as *const () as usize)
}

/// Address of the stub through which managed code calls native code on its own segment.
pub(crate) fn fudge_call() -> RawPc {
    RawPc::new(cfi_stack_fudge_call as *const () as usize)
}

/// Calls `f(data)` on a stack that is painted `bytes` deep, and says how many bytes it has touched.
///
/// # Safety
/// `f` is valid for `data` and does not unwind; `bytes`, a multiple of 8, lie below this call and can be written.
#[inline]
pub(crate) unsafe fn measured(f: unsafe extern "C" fn(usize) -> u64, data: usize, bytes: usize) -> (u64, usize) {
    let mut used = 0;
    // SAFETY: the caller's; `used` is a live word.
    let value = unsafe { cfi_stack_measured(f, data, bytes, &mut used) };
    (value, used)
}

/// Why `rebind` stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It did not: every entry is re-bound.
    Done,
    /// An entry names a place outside the span or the destination.
    Bounds,
    /// A word is not the one that was planned with, or not the shadow stack's.
    Word,
}

/// What `rebind` says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    pub reason: Reason,
    /// The slot that it stopped at.
    pub slot: usize,
}

/// Re-binds the planned return addresses.
///
/// # Safety
/// See [`crate::signer::Signer::rebind`].
pub(crate) unsafe fn rebind(
    source: &Record,
    destination: &Record,
    low: usize,
    plan: &[Rebinding],
    details: &[Detail],
    shadow: Option<&[u64]>,
    words: Words,
) -> Verdict {
    if shadow.is_some_and(|shadow| shadow.len() < plan.len()) {
        return Verdict { reason: Reason::Word, slot: low };
    }
    let shadow = shadow.map_or(std::ptr::null(), <[u64]>::as_ptr);
    // SAFETY: the caller's for the segments; plan, details and shadow are live slices with at least that many elements.
    #[cfg(target_arch = "aarch64")]
    let verdict = unsafe {
        let (details, described) = (details.as_ptr(), details.len());
        let rebind = match words {
            Words::Source => cfi_stack_rebind,
            Words::Destination => cfi_stack_rebind_in_place,
        };
        rebind(source, destination, low, plan.as_ptr(), plan.len(), shadow, details, described)
    };
    // SAFETY: as above. Nothing is described where nothing is signed, and the stub looks at the destination alone.
    #[cfg(not(target_arch = "aarch64"))]
    let verdict = unsafe {
        let _ = (details, words);
        cfi_stack_rebind(source, destination, low, plan.as_ptr(), plan.len(), shadow)
    };
    Verdict::of(verdict, low, plan)
}

/// Moves the pages of a span from segment to segment; says whether it did. `granule` is a power of two, at least a page.
///
/// # Safety
/// See [`crate::segment::remap::move_pages`].
#[cfg(target_os = "linux")]
pub(crate) unsafe fn remap(source: &Record, destination: &Record, low: usize, granule: usize) -> bool {
    // SAFETY: the caller's.
    unsafe { cfi_stack_remap(source, destination, low, granule) == 0 }
}

impl Verdict {
    /// `verdict` is 0, or the number of entries that were left times 2, plus 1 for bounds.
    fn of(verdict: u64, low: usize, plan: &[Rebinding]) -> Verdict {
        let left = (verdict >> 1) as usize;
        let slot = plan.len().checked_sub(left).and_then(|index| plan.get(index)).map_or(low, Rebinding::slot);
        let reason = match verdict {
            0 => Reason::Done,
            odd if odd & 1 == 1 => Reason::Bounds,
            _ => Reason::Word,
        };
        Verdict { reason, slot }
    }
}

/// Fills `record` and, where there is generic authentication, seals it from registers.
pub(crate) fn seal_record(record: &mut Record, base: usize, top: usize, identity: u64, generation: u64) {
    // SAFETY: the record is exclusively borrowed; the stub writes its five words.
    unsafe { cfi_stack_seal(record, base, top, identity, generation) }
}

/// Seals `record` for another generation; its present seal must hold, else the process ends in the stub.
pub(crate) fn reseal_record(record: &mut Record, generation: u64) {
    // SAFETY: the record is exclusively borrowed; the stub writes two of its words.
    unsafe { cfi_stack_reseal(record, generation) }
}

/// Address of the `link` stub.
pub(crate) fn link() -> RawPc {
    RawPc::new(cfi_stack_link as *const () as usize)
}

/// Address behind the call in `link`: what the oldest frame of a linked segment returns to.
pub(crate) fn link_return() -> RawPc {
    RawPc::new(cfi_stack_link_return as *const () as usize)
}

/// Says that nothing runs on `record`'s segment, which comes behind `previous`'. The seals of both must hold.
pub(crate) fn link_idle(record: &mut Record, previous: &Record) {
    // SAFETY: the record is exclusively borrowed; the stub writes its second part.
    unsafe { cfi_stack_link_idle(record, previous) }
}

/// Says that frames were lifted to `record`'s segment from `previous`', above the frame at `fp` there. The seals of both must hold.
pub(crate) fn link_lifted(record: &mut Record, previous: &Record, fp: usize) {
    // SAFETY: as in `link_idle`.
    unsafe { cfi_stack_link_lifted(record, previous, fp) }
}

/// Fills and seals a record of the lower part of `whole`'s segment, up to `top`. The seal of `whole` must hold.
pub(crate) fn link_part(part: &mut Record, whole: &Record, top: usize) {
    // SAFETY: the record is exclusively borrowed; the stub writes its first part.
    unsafe { cfi_stack_link_part(part, whole, top) }
}

/// Takes over how `source`'s segment was entered. Its seals must hold.
pub(crate) fn link_moved(record: &mut Record, source: &Record) {
    // SAFETY: as in `link_idle`.
    unsafe { cfi_stack_link_moved(record, source) }
}

/// Says that calls into `record`'s segment begin on the shadow segment whose token lies at `token`. Its seal must hold.
pub(crate) fn link_shadow(record: &mut Record, token: usize) {
    // SAFETY: as in `link_idle`; the stub writes the two words at the record's end.
    unsafe { cfi_stack_link_shadow(record, token) }
}

/// The shadow-stack pointer of this thread, 0 when it has none.
pub(crate) fn shadow_pointer() -> usize {
    // SAFETY: reads a register.
    unsafe { cfi_stack_shadow_pointer() }
}
