//! The signer of the CPU that this runs on.

use super::Signer;
use crate::abi::{Rebinding, Record};
use crate::pac::{Modifier, RawPc, SignedPc, Signing, Tampered};
use crate::{arch, published};

/// The CPU. On x86-64, and on arm64 without pointer authentication, it signs nothing and enforces nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hardware;

impl Signer for Hardware {
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

    unsafe fn rebind(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        shadow: Option<&[u64]>,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        let verdict = unsafe { arch::rebind(source, destination, low, plan, shadow) };
        match verdict.reason {
            arch::Reason::Done => Ok(()),
            arch::Reason::Bounds => {
                Err(Tampered { evidence: "the plan names a place outside the span", slot: verdict.slot })
            }
            arch::Reason::Word => {
                Err(Tampered { evidence: "a return address is not the one planned with", slot: verdict.slot })
            }
        }
    }
}
