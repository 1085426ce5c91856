//! The walk that strips: the same way as `walk`'s, without authenticating, and with an end instead of a refusal.

use super::{Cut, Frame, Mark, Owner, Pointer, Target};
use crate::abi::Extent;
use crate::codemap::table::Cursor;
use crate::codemap::{Found, FrameLayout, Register, Table};
use crate::error::Error;
use crate::pac::{RawPc, Signing};
use crate::segment::read_word;

/// Most frames of one picture.
const MOST_FRAMES: usize = 1 << 16;

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// The segment.
    pub extent: Extent,
    /// The policy's.
    pub smallest_frame: usize,
    /// Whether return addresses are authenticated here.
    pub authenticates: bool,
    /// Whether there is a shadow stack.
    pub shadow: bool,
    /// The bits that a signature can take.
    pub field: u64,
}

/// What the code map says of a frame, found by its callee's return address.
struct Known<'a> {
    layout: FrameLayout,
    at: Option<RawPc>,
    slots: &'a [i32],
    registers: u32,
}

/// Where a run of frames begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// Address of its youngest frame record.
    pub record: usize,
    /// Whose that is.
    pub owner: First,
}

/// What the oldest frame of a run returns to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bottom {
    pub pc: RawPc,
    /// Only where the frame ends at the segment's top: other frames may return there too.
    pub at_top: bool,
}

/// What the youngest frame of a run belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum First {
    /// A stub that signs so.
    Stub(Signing),
    /// The registered function that goes on there.
    Managed(RawPc),
}

/// What was seen of a segment so far.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    frames: Vec<Frame>,
    /// What the slots hold, for one frame after the other: until it is known where all frames are.
    held: Vec<usize>,
    /// Where the frames end.
    end: usize,
    /// Why there are no more.
    pub cut: Option<Cut>,
}

const NO_CODE: &str = "a return address lies in no registered code";

impl View {
    fn strip(&self, word: u64) -> usize {
        (word & !self.field) as usize
    }

    fn mark(&self, signing: Signing) -> Mark {
        match (signing, self.authenticates) {
            (Signing::A | Signing::B, true) => Mark::ReSigned(signing),
            _ if self.shadow => Mark::Compared,
            _ => Mark::Unsigned,
        }
    }

    fn obstacle(&self, layout: &FrameLayout, pc: RawPc) -> Option<Error> {
        if layout.signing == Signing::None && self.authenticates {
            return Some(Error::Unsigned(pc));
        }
        if layout.frame_bytes as usize + (layout.cfa_bytes as usize) < self.smallest_frame {
            return Some(Error::Layout { start: pc, rule: "the frame is below the policy's `smallest_frame`" });
        }
        layout.immovable.map(|reason| Error::Immovable { pc, reason })
    }

    /// Looks at one run of frames, from a youngest frame record to what the oldest of them returns to, and adds them to those seen before.
    /// Returns which of the bottoms that is, and where the frames end.
    ///
    /// # Safety
    /// Every word of the extent is mapped readable, whatever the start says.
    pub(crate) unsafe fn run(
        &self,
        start: Start,
        bottoms: &[Bottom],
        table: Option<&Table>,
        seen: &mut Seen,
    ) -> Option<(usize, usize)> {
        // SAFETY: the caller's.
        match unsafe { self.walk(start, bottoms, table, seen) } {
            Ok(end) => Some(end),
            Err(cut) => {
                seen.cut.get_or_insert(cut);
                None
            }
        }
    }

    /// # Safety
    /// As for [`View::run`].
    unsafe fn walk(
        &self,
        start: Start,
        bottoms: &[Bottom],
        table: Option<&Table>,
        seen: &mut Seen,
    ) -> Result<(usize, usize), Cut> {
        let cut = |at, why| Err(Cut { at, why });
        let mut map = table.map(Cursor::new);
        let mut record = start.record;
        let mut low = record;
        let (mut owner, mut known) = match start.owner {
            First::Stub(signing) => {
                (Owner::Stub, Known { layout: FrameLayout::new(0, signing), at: None, slots: &[][..], registers: 0 })
            }
            First::Managed(pc) => match map.as_mut().and_then(|map| map.find(pc)) {
                Some(&Found { layout, frame_bytes, slots, registers, .. }) => {
                    // Of a frame of varying size that is the least: what it called stands elsewhere.
                    low = record.saturating_sub(frame_bytes as usize);
                    (Owner::Managed(*layout), Known { layout: *layout, at: Some(pc), slots, registers })
                }
                None => return cut(record, NO_CODE),
            },
        };
        if low < seen.end {
            return cut(low, "an older run of frames begins below the end of a younger one");
        }
        loop {
            let layout = known.layout;
            let cfa = record.saturating_add(layout.cfa_bytes as usize);
            let end = cfa.saturating_add(layout.incoming as usize);
            let fits = record.is_multiple_of(8) && cfa.is_multiple_of(16) && record >= low;
            if !fits || low < self.extent.base || !self.extent.holds(record, end.saturating_sub(record)) {
                return cut(record, "a frame record lies outside the stack or is misaligned");
            }
            if seen.frames.len() == MOST_FRAMES || seen.frames.try_reserve(1).is_err() {
                return cut(record, "there are more frames than a picture shows");
            }
            // SAFETY: record and return address lie in the extent, below `end`, and are aligned.
            let (saved, word) = unsafe { (read_word(record), read_word(record + layout.return_offset())) };
            let (saved, pc) = (self.strip(saved), RawPc::new(self.strip(word)));
            // SAFETY: the slots that lie in the frame are read alone.
            let pointers = unsafe { self.pointers(known.slots, record, low..end, &mut seen.held) };
            let registers = (0..Register::NAMES.len()).filter(|index| known.registers & 1 << index != 0);
            seen.frames.push(Frame {
                owner,
                low,
                record,
                cfa,
                bytes: end - low,
                at: known.at,
                returns_to: Some(pc),
                mark: self.mark(layout.signing),
                pointers,
                registers: registers.filter_map(Register::new).collect(),
                obstacle: known.at.and_then(|at| self.obstacle(&layout, at)),
            });
            seen.end = end;
            let ends = |bottom: &Bottom| bottom.pc == pc && (!bottom.at_top || end == self.extent.top);
            if let Some(which) = bottoms.iter().position(ends) {
                return Ok((which, end));
            }
            let Some(&found) = map.as_mut().and_then(|map| map.find(pc)) else {
                return cut(record, NO_CODE);
            };
            let computed = end.saturating_add(found.frame_bytes as usize);
            if if found.layout.dynamic { saved < computed } else { saved != computed } {
                return cut(record, "a saved frame pointer is not where the layouts put it");
            }
            (low, record) = (end, saved);
            owner = Owner::Managed(*found.layout);
            known = Known { layout: *found.layout, at: Some(pc), slots: found.slots, registers: found.registers };
        }
    }

    /// The slots of a frame; what they hold goes to `held`.
    ///
    /// # Safety
    /// The frame's bytes are mapped readable.
    unsafe fn pointers(
        &self,
        slots: &[i32],
        record: usize,
        frame: std::ops::Range<usize>,
        held: &mut Vec<usize>,
    ) -> Vec<Pointer> {
        let inside = |&&offset: &&i32| {
            let slot = record.wrapping_add_signed(offset as isize);
            slot.is_multiple_of(8) && slot >= frame.start && slot < frame.end
        };
        let note = |&offset: &i32| {
            // SAFETY: the slot is aligned and lies in the frame.
            held.push(unsafe { read_word(record.wrapping_add_signed(offset as isize)) } as usize);
            Pointer { offset, target: Target::Null }
        };
        slots.iter().filter(inside).map(note).collect()
    }

    /// Says of each slot where it points. Where frames of the segment were not seen, a slot that leads there is said to lead to where no frame is.
    pub(crate) fn told(&self, seen: Seen) -> (Vec<Frame>, Option<Cut>) {
        let Seen { mut frames, held, cut, .. } = seen;
        let ends: Vec<(usize, usize)> = frames.iter().map(|frame| (frame.low, frame.low + frame.bytes)).collect();
        let mut held = held.iter();
        for (own, frame) in frames.iter_mut().enumerate() {
            for (pointer, &word) in frame.pointers.iter_mut().zip(&mut held) {
                let above = ends.partition_point(|&(low, _)| low <= word);
                let holder = above.checked_sub(1).filter(|&index| word < ends[index].1);
                pointer.target = match holder {
                    _ if word == 0 => Target::Null,
                    Some(index) if index == own => Target::Own,
                    Some(index) => Target::Frame(index),
                    None if word >= self.extent.base && word < self.extent.top => Target::Free,
                    None => Target::Elsewhere,
                };
            }
        }
        (frames, cut)
    }
}
