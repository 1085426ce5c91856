//! The walk over a span: from a stub's frame record, which is the youngest, to what the oldest frame was entered by, piece by piece,
//! authenticating every return address and recomputing every saved frame pointer. It writes nothing.
//!
//! Frames are never inferred by content. Where a frame's caller lies follows from the code map: the caller's frame
//! pointer is the callee's CFA plus the caller's `frame_bytes`, and what the record holds must agree.

use crate::abi::Record;
use crate::codemap::Table;
use crate::codemap::table::Cursor;
use crate::error::{Error, Refusal};
use crate::pac::{Modifier, RawPc, SignedPc, Signing, Tampered};
use crate::segment::read_word;
use crate::signer::Signer;

/// A span, and what a walk over it must meet.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// The segment that the span lies in: from the first piece's youngest record to the segment's top.
    pub source: &'a Record,
    /// The span's pieces, youngest first; there is at least one.
    pub pieces: &'a [Piece],
    /// Whether the last piece is the stack's oldest: then the shadow stack must be used up.
    pub complete: bool,
    /// Smallest frame that the shadow stack was sized for, frame record included, in bytes.
    pub smallest_frame: usize,
    /// Return addresses on the shadow stack, youngest first, from the first piece's youngest entry, where one is on.
    pub shadow: Option<&'a [u64]>,
}

/// A run of managed frames between a stub's record, its youngest, and what its oldest frame returns to.
///
/// Stack arguments that the oldest frame was entered with lie above it, in the span: they move along and hold no
/// pointers into the stack.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Address of its stub's frame record.
    pub youngest: usize,
    /// How that stub signs.
    pub stub: Signing,
    /// Where its oldest frame returns to: behind the call in `enter` or in `link`.
    pub bottom: RawPc,
    /// The CFA of its oldest frame: the segment's top, or the youngest record of the piece before it in time, less
    /// `arguments`.
    pub base_cfa: usize,
    /// The frame pointer that its oldest frame saved: the entry frame's, on a native stack, or that of `link`'s record in the
    /// segment before.
    pub base_fp: u64,
    /// Bytes of stack arguments that its oldest frame was entered with.
    pub arguments: usize,
    /// Address of the block in which the stub keeps the callee-saved registers while the frames move and from which it
    /// loads them afterwards, in the order of [`crate::codemap`]; 0 when it keeps none.
    #[allow(dead_code)] // (g)
    pub registers: usize,
}

/// One frame record on the way.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Its address.
    pub record: usize,
    /// Where it returns to, authenticated.
    pub pc: RawPc,
    /// How the function that owns the record signs.
    pub signing: Signing,
    /// The caller's record and, relative to it, its slots that hold pointers into the stack. `None` for the
    /// oldest frame of a piece.
    pub caller: Option<(usize, &'a [i32])>,
}

/// The walk: an iterator over the frame records of a span, youngest first, from piece to piece. It ends after the first refusal.
pub struct Walk<'a, S> {
    signer: &'a S,
    map: Cursor<'a>,
    bounds: Bounds<'a>,
    /// The piece that the next record belongs to, and those behind it.
    piece: Piece,
    older: &'a [Piece],
    next: Option<(usize, Signing)>,
    seen: usize,
}

impl<'a, S: Signer> Walk<'a, S> {
    /// A walk that has not begun.
    pub fn new(signer: &'a S, map: &'a Table, bounds: Bounds<'a>) -> Self {
        // Without a piece the first step finds no record.
        let nothing = Piece {
            youngest: 0,
            stub: Signing::None,
            bottom: RawPc::new(0),
            base_cfa: 0,
            base_fp: 0,
            arguments: 0,
            registers: 0,
        };
        let (&piece, older) = bounds.pieces.split_first().unwrap_or((&nothing, &[]));
        let next = Some((piece.youngest, piece.stub));
        Walk { signer, map: Cursor::new(map), bounds, piece, older, next, seen: 0 }
    }

    /// What is walked.
    pub fn bounds(&self) -> &Bounds<'a> {
        &self.bounds
    }

    #[inline]
    fn step(&mut self, record: usize, signing: Signing) -> Result<Frame<'a>, Refusal> {
        let Bounds { source, shadow, .. } = self.bounds;
        let tampered = |evidence, slot| Err(Refusal::Tampered(Tampered { evidence, slot }));
        if !record.is_multiple_of(16) || !source.holds(record, 16) {
            return tampered("a frame record lies outside the stack or is misaligned", record);
        }
        let slot = record + 8;
        let cfa = record + 16;
        // SAFETY: the record lies within the source segment, which the caller keeps mapped; volatile, because
        // another thread may write there at any time.
        let (saved_fp, word) = unsafe { (read_word(record), read_word(slot)) };
        let pc = self.signer.authenticate(SignedPc::from_word(word), slot, signing, Modifier::new(cfa as u64))?;
        if let Some(shadow) = shadow
            && shadow.get(self.seen) != Some(&(pc.address() as u64))
        {
            return tampered("a return address differs from the shadow stack's", slot);
        }
        self.seen += 1;
        if pc == self.piece.bottom {
            if cfa != self.piece.base_cfa {
                return tampered("the oldest frame does not end where it was entered", record);
            }
            if saved_fp != self.piece.base_fp {
                return tampered("the oldest frame pointer is not the entry frame's", record);
            }
            let end = cfa.saturating_add(self.piece.arguments);
            self.next = self.older.split_first().map(|(&piece, older)| {
                (self.piece, self.older) = (piece, older);
                (piece.youngest, piece.stub)
            });
            match self.next {
                Some((youngest, _)) if youngest < end => {
                    return tampered("an older piece of the stack begins below the end of a younger one", youngest);
                }
                None if self.bounds.complete && shadow.is_some_and(|shadow| shadow.len() != self.seen) => {
                    return tampered("the shadow stack holds more return addresses than the stack", record);
                }
                _ => return Ok(Frame { record, pc, signing, caller: None }),
            }
        }
        let found = self.map.find(pc).ok_or(Error::UnknownCode(pc))?;
        if !found.layout.movable {
            return Err(Error::Immovable(pc).into());
        }
        if found.layout.signing == Signing::None && self.signer.authenticates() {
            return Err(Error::Unsigned(pc).into());
        }
        if (found.layout.frame_bytes as usize) + 16 < self.bounds.smallest_frame {
            return Err(Error::Layout { start: pc, rule: "the frame is below the policy's `smallest_frame`" }.into());
        }
        let caller = cfa.saturating_add(found.layout.frame_bytes as usize);
        if !source.holds(caller, 16) {
            // The address is authentic, so it is the layout that cannot be.
            return Err(Error::Layout { start: pc, rule: "the frame leaves its segment" }.into());
        }
        if saved_fp != caller as u64 {
            return tampered("a saved frame pointer is not where the layouts put it", record);
        }
        self.next = Some((caller, found.layout.signing));
        Ok(Frame { record, pc, signing, caller: Some((caller, found.slots)) })
    }
}

impl<'a, S: Signer> Iterator for Walk<'a, S> {
    type Item = Result<Frame<'a>, Refusal>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (record, signing) = self.next.take()?;
        Some(self.step(record, signing))
    }
}
