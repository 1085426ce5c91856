//! The walk over a span: from the stub's frame record, which is the youngest, to the entry frame, authenticating
//! every return address and recomputing every saved frame pointer. It writes nothing.
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

/// Where a walk begins and where it must end.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// The segment that the span lies in.
    pub source: &'a Record,
    /// Address of the youngest frame record: the stub's own.
    pub youngest: usize,
    /// How the stub signs.
    pub stub: Signing,
    /// The return address of the oldest managed frame: behind the call in `enter`.
    pub entry_return: RawPc,
    /// The frame pointer that the oldest managed frame saved: the entry frame's, on the native side.
    pub native_fp: u64,
    /// Smallest frame that the shadow stack was sized for, frame record included, in bytes.
    pub smallest_frame: usize,
    /// Return addresses on the shadow stack, youngest first, where one is on.
    pub shadow: Option<&'a [u64]>,
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
    /// oldest frame, which returns to the entry frame.
    pub caller: Option<(usize, &'a [i32])>,
}

/// The walk: an iterator over the frame records of a span, youngest first. It ends after the first refusal.
pub struct Walk<'a, S> {
    signer: &'a S,
    map: Cursor<'a>,
    bounds: Bounds<'a>,
    next: Option<(usize, Signing)>,
    seen: usize,
}

impl<'a, S: Signer> Walk<'a, S> {
    /// A walk that has not begun.
    pub fn new(signer: &'a S, map: &'a Table, bounds: Bounds<'a>) -> Self {
        let next = Some((bounds.youngest, bounds.stub));
        Walk { signer, map: Cursor::new(map), bounds, next, seen: 0 }
    }

    /// Address of the youngest record.
    pub fn youngest(&self) -> usize {
        self.bounds.youngest
    }

    /// The entry frame's frame pointer.
    pub fn native_fp(&self) -> u64 {
        self.bounds.native_fp
    }

    #[inline]
    fn step(&mut self, record: usize, signing: Signing) -> Result<Frame<'a>, Refusal> {
        let Bounds { source, entry_return, native_fp, shadow, .. } = self.bounds;
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
        if pc == entry_return {
            if cfa != source.top {
                return tampered("the oldest frame does not end at the segment's top", record);
            }
            if saved_fp != native_fp {
                return tampered("the oldest frame pointer is not the entry frame's", record);
            }
            if shadow.is_some_and(|shadow| shadow.len() != self.seen) {
                return tampered("the shadow stack holds more return addresses than the stack", record);
            }
            self.next = None;
            return Ok(Frame { record, pc, signing, caller: None });
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
