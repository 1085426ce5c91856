//! An ISA without keys: nothing is signed, nothing to authenticate.

use super::{Reason, Verdict};
use crate::abi::{Detail, Rebinding, Record};
use crate::pac::{Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing};
use crate::signer::{Way, Words};

/// There is nothing to re-bind on this ISA: no plan names a signed frame pointer.
///
/// # Safety
/// None.
pub(crate) unsafe fn rebind_pointers(_: &Record, _: &Record, low: usize, plan: &[Rebinding], _: Words) -> Verdict {
    Verdict { reason: if plan.is_empty() { Reason::Done } else { Reason::Bounds }, slot: low }
}

/// There is no key to exchange on this ISA.
///
/// # Safety
/// None.
pub(crate) unsafe fn park(
    _: &Record,
    low: usize,
    _: &[Rebinding],
    _: &[Detail],
    _: Option<&[u64]>,
    _: Signing,
    _: Way,
) -> Verdict {
    Verdict { reason: Reason::Bounds, slot: low }
}

/// There is nothing to exchange on this ISA: no plan names a signed frame pointer.
///
/// # Safety
/// None.
pub(crate) unsafe fn park_pointers(_: &Record, low: usize, plan: &[Rebinding], _: Signing, _: Way) -> Verdict {
    Verdict { reason: if plan.is_empty() { Reason::Done } else { Reason::Bounds }, slot: low }
}

/// There is nothing to authenticate on this ISA.
pub(crate) fn authenticate(word: SignedPc, _: Signing, _: Modifier) -> RawPc {
    RawPc::new(word.word() as usize)
}

/// There is nothing to authenticate on this ISA.
pub(crate) fn authenticate_pointer(word: SignedPointer, _: PointerSigning, _: usize) -> u64 {
    word.word()
}

/// Nothing is parked under a key on this ISA.
pub(crate) fn authenticate_parked(word: SignedPc, _: usize, _: Signing, _: Modifier, _: Signing) -> RawPc {
    RawPc::new(word.word() as usize)
}

/// Nothing is parked under a key on this ISA.
pub(crate) fn authenticate_parked_pointer(word: SignedPointer, _: usize, _: PointerSigning, _: Signing) -> u64 {
    word.word()
}
