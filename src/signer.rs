//! The signer: the only way from a signed word to a raw address and to a word signed for another place.
//!
//! It knows three verbs and no others, each for return addresses and for saved frame pointers:
//! - **authenticate** a word for look-up: the raw address comes back, or the process ends;
//! - **rebind** the words of a planned span: each is authenticated again and re-signed for its new place in one block;
//! - **exchange** planned words in their places: each is authenticated under its frame's own key and signed under one that threads
//!   share, or back.
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

/// Which way words are exchanged in their places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From their frames' own keys and modifiers to the shared key.
    Park,
    /// Back.
    Unpark,
}

/// The first verb: what a walk asks.
pub trait Authenticator {
    /// Whether a return address signed with `signing` is really checked here. A frame for which this says no,
    /// among frames for which it says yes, is refused.
    fn enforces(&self, signing: Signing) -> bool;

    /// Whether this signer authenticates anything at all. Where it does it authenticates frame pointers too.
    fn authenticates(&self) -> bool {
        self.enforces(Signing::A) || self.enforces(Signing::B)
    }

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
    /// As for [`Authenticator::authenticate`].
    fn authenticate_pointer(&self, word: SignedPointer, slot: usize, signing: PointerSigning) -> Result<u64, Tampered>;
}

/// All verbs. Implemented by the CPU (`hardware`) and, under cargo feature `model`, by the software model.
pub trait Signer: Authenticator {
    /// How the stubs sign that own the youngest record of each piece.
    #[cfg(cfi_stack_native)]
    fn stubs(&self) -> Signing;

    /// Authenticates a return address that is parked under `key`, for look-up. `signing` and `modifier` are those that it runs under.
    ///
    /// # Errors
    /// As for [`Authenticator::authenticate`].
    fn authenticate_parked(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
        key: Signing,
    ) -> Result<RawPc, Tampered>;

    /// Authenticates a saved frame pointer that is parked under the data key of `key`'s letter, for comparison.
    ///
    /// # Errors
    /// As for [`Authenticator::authenticate`].
    fn authenticate_parked_pointer(
        &self,
        word: SignedPointer,
        slot: usize,
        signing: PointerSigning,
        key: Signing,
    ) -> Result<u64, Tampered>;

    /// Re-binds every planned return address from `source` to `destination`: authenticate for the old place,
    /// compare with the planned address, sign for the new place, store there.
    ///
    /// `low` is the lowest address of the span; `details` has one element for each described entry of the plan, in its
    /// order; `shadow`, where a shadow stack is on, holds the span's return addresses, youngest first.
    ///
    /// # Errors
    /// As for [`Authenticator::authenticate`]; and, on hardware too, for an entry whose place lies outside the span or whose word
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

    /// Exchanges every planned return address in its place, between its frame's own key and `key`: authenticate under the one with its
    /// modifier, compare with the planned address, sign under the other, store.
    ///
    /// `low` is the lowest address that a word may have; the rest is as for [`Signer::rebind`].
    ///
    /// # Errors
    /// As for [`Signer::rebind`], with the segment in the place of the span.
    ///
    /// # Safety
    /// The record describes a mapped, writable segment of a stack that does not run, and nobody else moves or exchanges frames of that stack.
    #[allow(clippy::too_many_arguments, reason = "what a stub takes, in registers")]
    unsafe fn exchange(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        details: &[Detail],
        shadow: Option<&[u64]>,
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered>;

    /// Exchanges every planned frame pointer, between its frame's own data key and that of `key`'s letter.
    ///
    /// # Errors
    /// As for [`Signer::exchange`].
    ///
    /// # Safety
    /// As for [`Signer::exchange`].
    unsafe fn exchange_pointers(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered>;
}

/// What a walk over parked frames asks: as its signer, under the shared key.
#[derive(Clone, Copy, Debug)]
pub struct Parked<'a, S> {
    signer: &'a S,
    key: Signing,
}

impl<'a, S: Signer> Parked<'a, S> {
    /// For frames that are parked under `key`.
    pub fn new(signer: &'a S, key: Signing) -> Self {
        Parked { signer, key }
    }
}

impl<S: Signer> Authenticator for Parked<'_, S> {
    fn enforces(&self, signing: Signing) -> bool {
        self.signer.enforces(signing)
    }

    fn authenticate(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
    ) -> Result<RawPc, Tampered> {
        self.signer.authenticate_parked(word, slot, signing, modifier, self.key)
    }

    fn authenticate_pointer(&self, word: SignedPointer, slot: usize, signing: PointerSigning) -> Result<u64, Tampered> {
        self.signer.authenticate_parked_pointer(word, slot, signing, self.key)
    }
}
