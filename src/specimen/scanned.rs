//! A specimen whose memory and pieces are anybody's: what looks at it believes nothing of them, reads nothing beyond the segment, writes nothing, and
//! comes to an end.

use super::{Room, Seen, Specimen};
use crate::abi::Extent;
use crate::inspect::look::{self, Bottom, First, Start, View};
use crate::inspect::{Cut, Frame};
use crate::plan::Plan;
use crate::signer::model;
use crate::walk::{Piece, Walk};

/// What is put in a word of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// This.
    Word(u64),
    /// The address so many bytes above the segment's base, counted around a little more than its size.
    Inside(usize),
    /// The return address of a frame, by its number, not signed.
    Return(usize),
}

/// What is said of a piece, over what is true of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The piece, by its number.
    pub piece: usize,
    /// Which word is claimed: where it begins, where it ends, the frame pointer or the bytes of arguments there; in that order.
    pub what: usize,
    /// What it is said to be.
    pub put: Put,
}

impl Put {
    fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Put {
        match pick(4) {
            0 => Put::Word(pick(u64::MAX)),
            1 => Put::Return(pick(256) as usize),
            _ => Put::Inside(pick(1 << 16) as usize),
        }
    }
}

impl Specimen {
    /// Writes and claims made of decisions, as [`Design::choose`](super::Design::choose) makes its own, then a look at the result: the walk, the plan, and a
    /// picture.
    ///
    /// # Panics
    /// When a law is broken.
    pub fn scan(&mut self, pick: &mut dyn FnMut(u64) -> u64) {
        for _ in 0..pick(24) {
            let (frame, place) = (pick(256) as usize % self.frames.len(), pick(1 << 16) as usize);
            let address = match pick(4) {
                0 => self.frames[frame].record,
                1 => self.frames[frame].slot(),
                _ => self.source.record.base + place % self.source.words() * 8,
            };
            let word = self.value(Put::choose(pick));
            self.source.write(address, word);
        }
        let mut pieces = self.pieces.clone();
        for _ in 0..pick(4) {
            let claim = Claim { piece: pick(8) as usize, what: pick(4) as usize, put: Put::choose(pick) };
            self.claim(&mut pieces, claim);
        }
        self.check_scan(&pieces);
    }

    fn value(&self, put: Put) -> u64 {
        let record = &self.source.record;
        match put {
            Put::Word(word) => word,
            Put::Inside(offset) => (record.base + offset % (record.size() + 64)) as u64,
            Put::Return(frame) => self.frames[frame % self.frames.len()].pc.address() as u64,
        }
    }

    fn claim(&self, pieces: &mut [Piece], claim: Claim) {
        let value = self.value(claim.put);
        let count = pieces.len();
        let piece = &mut pieces[claim.piece % count];
        match claim.what {
            0 => piece.youngest = value as usize,
            1 => piece.base_cfa = value as usize,
            2 => piece.base_fp = value,
            _ => piece.arguments = value as usize,
        }
    }

    /// The walk, the plan and the picture agree on these pieces, stay inside, and write nothing.
    pub(super) fn check_scan(&self, pieces: &[Piece]) {
        let rooms = [&self.source, &self.destination, &self.registers];
        let before = rooms.map(Room::image);
        let walked = self.walk(&self.source, pieces);
        let mut plan = Plan::new();
        let made = plan.make(&self.model, Walk::new(&self.model, &self.table, self.bounds(&self.source, pieces)));
        assert_eq!(made.as_ref().err(), walked.as_ref().err(), "the plan and the walk disagree");
        if let Ok(frames) = walked {
            self.check_frames(&frames);
            assert_eq!(plan.rebindings().len(), frames.len(), "the plan has other frames than the walk");
        }
        let (frames, cut) = self.seen(pieces);
        let mut low = 0;
        for frame in &frames {
            assert!(frame.low >= low && frame.record >= frame.low && frame.cfa > frame.record, "{frame:x?}");
            low = frame.low + frame.bytes;
            assert!(frame.low >= self.source.record.base && low <= self.source.record.top, "{frame:x?}");
        }
        assert!(cut.is_some() || !frames.is_empty(), "a picture without frames says why");
        assert_eq!(rooms.map(Room::image), before, "looking has written");
    }

    /// What a walk takes for frames lies in the segment, upwards.
    fn check_frames(&self, frames: &[Seen]) {
        let mut end = self.source.record.base;
        for frame in frames {
            assert!(frame.record >= end && frame.cfa() > frame.slot(), "{frame:x?}");
            end = frame.cfa();
            assert!(end <= self.source.record.top, "{frame:x?}");
        }
    }

    /// What `inspect` sees of the pieces.
    pub(super) fn seen(&self, pieces: &[Piece]) -> (Vec<Frame>, Option<Cut>) {
        let record = &self.source.record;
        let view = View {
            extent: Extent { base: record.base, top: record.top },
            smallest_frame: 16,
            authenticates: self.authenticates(),
            shadow: self.shadow.is_some(),
            field: if self.authenticates() { model::FIELD } else { 0 },
        };
        let mut seen = look::Seen::default();
        for piece in pieces {
            let start = Start { record: piece.youngest, owner: First::Stub(piece.stub) };
            // SAFETY: the source is owned by self and mapped.
            let Some((_, end)) = (unsafe {
                view.run(start, &[Bottom { pc: piece.bottom, at_top: false }], Some(&self.table), &mut seen)
            }) else {
                break;
            };
            if end != piece.base_cfa && end != piece.base_cfa.wrapping_add(piece.arguments) {
                seen.cut = Some(Cut { at: end, why: "the oldest frame does not end where it was entered" });
                break;
            }
        }
        view.told(seen)
    }
}
