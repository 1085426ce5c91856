//! The plan of a move: every word that changes, found and authenticated before anything is written.
//!
//! The plan lies in memory that the attacker writes. It is a list of places to look at again, not an authority:
//! the stub bounds each entry by the sealed records, authenticates the word anew, and derives delta and modifiers
//! in registers.

use crate::abi::{Rebinding, Record};
use crate::error::{Error, Refusal};
use crate::pac::Tampered;
use crate::signer::Signer;
use crate::walk::{Frame, Walk};

/// Everything that a move of one span changes.
#[derive(Debug, Default)]
pub struct Plan {
    rebindings: Vec<Rebinding>,
    /// Addresses in the source of slots that hold pointers into the stack.
    pointers: Vec<usize>,
    low: usize,
    /// For each piece how many frames it and the younger ones have, and what its oldest frame saved.
    pieces: Vec<(usize, u64)>,
}

impl Plan {
    /// An empty plan. Its buffers are kept from one move to the next, until the run ends.
    pub fn new() -> Self {
        Plan::default()
    }

    /// Walks and authenticates all frames, and notes what must change. Writes nothing but the plan itself.
    ///
    /// # Errors
    /// [`Refusal::Error`] for frames that cannot move and when memory for the plan runs out,
    /// [`Refusal::Tampered`] for evidence of tampering.
    pub fn make<S: Signer>(&mut self, walk: Walk<'_, S>) -> Result<(), Refusal> {
        self.rebindings.clear();
        self.pointers.clear();
        self.pieces.clear();
        let bounds = *walk.bounds();
        self.low = bounds.pieces.first().map_or(0, |piece| piece.youngest);
        let mut fps = bounds.pieces.iter().map(|piece| piece.base_fp);
        for frame in walk {
            let Frame { record, pc, signing, caller } = frame?;
            room(&mut self.rebindings, 1)?;
            self.rebindings.push(Rebinding { slot: record + 8, pc, signing: signing as u64 });
            if let Some((caller_record, slots)) = caller {
                room(&mut self.pointers, slots.len())?;
                self.pointers.extend(slots.iter().map(|&offset| caller_record.wrapping_add_signed(offset as isize)));
            } else if let Some(base_fp) = fps.next() {
                room(&mut self.pieces, 1)?;
                self.pieces.push((self.rebindings.len(), base_fp));
            }
        }
        Ok(())
    }

    /// Gives the buffers back.
    pub(crate) fn release(&mut self) {
        *self = Plan::default();
    }

    /// The return addresses, youngest first.
    pub fn rebindings(&self) -> &[Rebinding] {
        &self.rebindings
    }

    /// The same, to be tampered with by the attack battery.
    #[cfg(feature = "steps")]
    pub(crate) fn rebindings_mut(&mut self) -> &mut [Rebinding] {
        &mut self.rebindings
    }

    /// Every word of the plan, as an attacker finds them in memory.
    #[cfg(any(test, feature = "model"))]
    pub(crate) fn exposed(&mut self) -> Exposed<'_> {
        let Plan { rebindings, pointers, low, pieces } = self;
        Exposed { rebindings, pointers, low, pieces }
    }

    /// Slots that hold pointers into the stack.
    pub(crate) fn pointers(&self) -> &[usize] {
        &self.pointers
    }

    /// For each piece, youngest first: how many frames it and the younger ones have, and the frame pointer that its
    /// oldest frame saved.
    pub(crate) fn pieces(&self) -> &[(usize, u64)] {
        &self.pieces
    }

    /// Whether the span can go to `destination`, with `spare` bytes left below it. Returns its lowest address.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::Foreign`], [`Error::TooSmall`]; [`Refusal::Tampered`] when the span does not begin with
    /// the youngest record, or lies outside the source.
    pub(crate) fn fits(&self, source: &Record, destination: &Record, spare: usize) -> Result<usize, Refusal> {
        let low = self.low;
        if !source.holds(low, 16) || self.rebindings.first().map(Rebinding::record) != Some(low) {
            return Err(Tampered { evidence: "the planned span is not the one that was walked", slot: low }.into());
        }
        if source.overlaps(destination) {
            return Err(Error::Overlap.into());
        }
        if (source.identity, source.generation) != (destination.identity, destination.generation) {
            return Err(Error::Foreign.into());
        }
        let needed = source.top.saturating_sub(low).saturating_add(spare);
        if needed > destination.size() {
            return Err(Error::TooSmall { needed, room: destination.size() }.into());
        }
        Ok(low)
    }
}

/// A plan to be tampered with.
#[cfg(any(test, feature = "model"))]
pub(crate) struct Exposed<'a> {
    pub rebindings: &'a mut [Rebinding],
    pub pointers: &'a mut [usize],
    pub low: &'a mut usize,
    pub pieces: &'a mut [(usize, u64)],
}

fn room<T>(list: &mut Vec<T>, more: usize) -> Result<(), Refusal> {
    list.try_reserve(more).map_err(|_| {
        let bytes = (list.len() + more).saturating_mul(size_of::<T>());
        Refusal::Error(Error::Memory { what: "the plan of a move", bytes, errno: libc::ENOMEM })
    })
}
