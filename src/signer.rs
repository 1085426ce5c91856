//! The signer: the only way from a signed word to a raw address and to a word signed for another place.
//!
//! It knows two verbs and no others, each for return addresses and for saved frame pointers:
//! - **authenticate** a word for look-up: the raw address comes back, or the process ends;
//! - **rebind** the words of a planned span: each is authenticated again and re-signed in one block.
//!
//! Nothing here signs a raw address, and nothing answers whether a signature was right.

#[cfg(cfi_stack_native)]
pub(crate) mod hardware;
#[cfg(any(test, feature = "model"))]
pub mod model;

use crate::abi::{Detail, Rebinding, Record};
use crate::pac::{Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing, Tampered};

/// Where the words that are re-bound lie, all under the modifiers of their old places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// In the source; the destination has a copy.
    Source,
    /// In the destination: their pages were moved there.
    Destination,
}

impl Words {
    /// Where the word is whose old place is `slot`.
    #[cfg(any(test, feature = "model"))]
    pub(crate) fn place(self, slot: usize, delta: usize) -> usize {
        match self {
            Words::Source => slot,
            Words::Destination => slot.wrapping_add(delta),
        }
    }
}

/// The two verbs. Implemented by the CPU (`hardware`) and, under cargo feature `model`, by the software model.
pub trait Signer {
    /// Whether a return address signed with `signing` is really checked here. A frame for which this says no,
    /// among frames for which it says yes, is refused.
    fn enforces(&self, signing: Signing) -> bool;

    /// Whether this signer authenticates anything at all. Where it does it authenticates frame pointers too.
    fn authenticates(&self) -> bool {
        self.enforces(Signing::A) || self.enforces(Signing::B)
    }

    /// How the stubs sign that own the youngest record of each piece.
    #[cfg(cfi_stack_native)]
    fn stubs(&self) -> Signing;

    /// Authenticates `word`, found at address `slot`, for look-up.
    ///
    /// # Errors
    /// The software model's verdict; on hardware a failure ends the process.
    fn authenticate(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
    ) -> Result<RawPc, Tampered>;

    /// Authenticates the saved frame pointer `word`, found at address `slot`, which is its modifier, for comparison.
    ///
    /// # Errors
    /// As for [`Signer::authenticate`].
    fn authenticate_pointer(&self, word: SignedPointer, slot: usize, signing: PointerSigning) -> Result<u64, Tampered>;

    /// Re-binds every planned return address from `source` to `destination`: authenticate for the old place,
    /// compare with the planned address, sign for the new place, store there.
    ///
    /// `low` is the lowest address of the span; `details` has one element for each described entry of the plan, in its
    /// order; `shadow`, where a shadow stack is on, holds the span's return addresses, youngest first.
    ///
    /// # Errors
    /// As for [`Signer::authenticate`]; and, on hardware too, for an entry whose place lies outside the span or whose word
    /// is not the planned one or the shadow stack's.
    ///
    /// # Safety
    /// Both records describe mapped, writable segments of one stack, and nobody else moves frames of that stack.
    #[allow(clippy::too_many_arguments, reason = "what a stub takes, in registers")]
    unsafe fn rebind(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        details: &[Detail],
        shadow: Option<&[u64]>,
        words: Words,
    ) -> Result<(), Tampered>;

    /// Re-binds every planned frame pointer: authenticate at the old place, compare with the planned one, add the distance
    /// between the segments where it points into the source, sign for the new place, store there.
    ///
    /// # Errors
    /// As for [`Signer::rebind`].
    ///
    /// # Safety
    /// As for [`Signer::rebind`].
    unsafe fn rebind_pointers(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        words: Words,
    ) -> Result<(), Tampered>;
}
