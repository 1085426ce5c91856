//! The signer of the CPU that this runs on.

use super::{Authenticator, Signer, Way, Words};
use crate::abi::{Detail, Rebinding, Record};
use crate::pac::{Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing, Tampered};
use crate::{arch, published};

/// The CPU. On x86-64, and on arm64 without pointer authentication, it signs nothing and enforces nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hardware;

impl Authenticator for Hardware {
    fn enforces(&self, signing: Signing) -> bool {
        signing != Signing::None && published::mode() & published::MODE_PAC != 0
    }

    fn authenticate(
        &self,
        word: SignedPc,
        _slot: usize,
        signing: Signing,
        modifier: Modifier,
    ) -> Result<RawPc, Tampered> {
        if self.enforces(signing) {
            return Ok(arch::authenticate(word, signing, modifier));
        }
        Ok(RawPc::new(word.word() as usize))
    }

    fn authenticate_pointer(&self, word: SignedPointer, slot: usize, signing: PointerSigning) -> Result<u64, Tampered> {
        if signing != PointerSigning::None && self.authenticates() {
            return Ok(arch::authenticate_pointer(word, signing, slot));
        }
        Ok(word.word())
    }
}

impl Signer for Hardware {
    fn stubs(&self) -> Signing {
        arch::STUB_SIGNING
    }

    fn authenticate_parked(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
        key: Signing,
    ) -> Result<RawPc, Tampered> {
        if self.enforces(signing) {
            return Ok(arch::authenticate_parked(word, slot, signing, modifier, key));
        }
        Ok(RawPc::new(word.word() as usize))
    }

    fn authenticate_parked_pointer(
        &self,
        word: SignedPointer,
        slot: usize,
        signing: PointerSigning,
        key: Signing,
    ) -> Result<u64, Tampered> {
        if signing != PointerSigning::None && self.authenticates() {
            return Ok(arch::authenticate_parked_pointer(word, slot, signing, key));
        }
        Ok(word.word())
    }

    unsafe fn rebind(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        details: &[Detail],
        shadow: Option<&[u64]>,
        words: Words,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        let verdict = unsafe { arch::rebind(source, destination, low, plan, details, shadow, words) };
        answer(verdict, "a return address is not the one planned with")
    }

    unsafe fn rebind_pointers(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        words: Words,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        let verdict = unsafe { arch::rebind_pointers(source, destination, low, plan, words) };
        answer(verdict, "a frame pointer is not the one planned with")
    }

    unsafe fn exchange(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        details: &[Detail],
        shadow: Option<&[u64]>,
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's. Where nothing is signed each word moves to where it is: it is compared, no more.
        let verdict = unsafe {
            match self.authenticates() {
                true => arch::park(record, low, plan, details, shadow, key, way),
                false => arch::rebind(record, record, low, plan, details, shadow, Words::Source),
            }
        };
        answer(verdict, "a return address is not the one planned with")
    }

    unsafe fn exchange_pointers(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        let verdict = unsafe { arch::park_pointers(record, low, plan, key, way) };
        answer(verdict, "a frame pointer is not the one planned with")
    }
}

fn answer(verdict: arch::Verdict, other: &'static str) -> Result<(), Tampered> {
    let slot = verdict.slot;
    match verdict.reason {
        arch::Reason::Done => Ok(()),
        arch::Reason::Bounds => Err(Tampered { evidence: "the plan names a place outside the span", slot }),
        arch::Reason::Word => Err(Tampered { evidence: other, slot }),
    }
}
