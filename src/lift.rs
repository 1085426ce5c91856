//! Lifting: of a deep stack only the youngest frames move, to the segment behind.
//!
//! The frame below the lifted ones takes its stack pointer back by itself, so that their return lands in the old segment by the return
//! address and the frame pointer alone, without a stub. The new segment lies above the old one: there the stack pointer is below the new
//! segment's limit, so the next check calls `grow`, which finds where the stack pointer is ([`Links::settle`]) and keeps the new
//! segment warm.

use crate::abi::Record;
use crate::arch;
use crate::codemap::Table;
use crate::error::Refusal;
use crate::link::Links;
use crate::pac::{PointerSigning, RawPc};
use crate::plan::Plan;
use crate::policy::Policy;
use crate::relocate::relocate;
use crate::segment::Segment;
use crate::signer::{Authenticator, Signer};
use crate::walk::{Bounds, Piece, Walk};

/// Where the frames to lift end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// The CFA of the oldest of them.
    edge: usize,
    /// Where that returns to.
    bottom: RawPc,
    /// The frame pointer that it saved: the record of the frame that stays.
    fp: u64,
}

/// Looks for the end of at least `least` bytes of frames, not much further than that. None where no frame there takes its stack pointer back,
/// or the frames cannot move: what to make of that is the relocation's business.
pub(crate) fn find<S: Authenticator>(walk: Walk<'_, S>, least: usize) -> Result<Option<Cut>, Refusal> {
    /// So many times `least` is looked at.
    const FURTHER: usize = 4;
    let low = walk.bounds().pieces.first().map_or(0, |piece| piece.youngest);
    for frame in walk {
        let frame = match frame {
            Ok(frame) => frame,
            Err(Refusal::Error(_)) => return Ok(None),
            Err(tampered) => return Err(tampered),
        };
        let (edge, layout) = (frame.owner.cfa(), frame.owner.layout);
        let lifted = edge.saturating_sub(low);
        let Some(caller) = frame.caller.filter(|_| lifted <= least.saturating_mul(FURTHER)) else {
            return Ok(None);
        };
        let ends_here = layout.incoming == 0 && layout.frame_pointer == PointerSigning::None;
        if lifted >= least && ends_here && caller.owner.layout.retakes_sp {
            return Ok(Some(Cut { edge, bottom: frame.pc, fp: frame.saved_fp }));
        }
    }
    Ok(None)
}

/// What is lifted, and by what numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lift<'a> {
    pub policy: &'a Policy,
    pub table: &'a Table,
    pub cut: Cut,
    /// The piece that the frames are the youngest of.
    pub piece: Piece,
    pub shadow: Option<&'a [u64]>,
    /// How large the segment may be that they go to: they stay on their shadow segment.
    pub most: usize,
    /// Bytes that must be free below them.
    pub spare: usize,
}

/// A lift that was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lifted {
    /// Where the youngest record is now.
    pub record: usize,
    /// Bytes that were copied.
    pub bytes: usize,
    /// Whether a segment was made for them.
    pub made: bool,
}

impl Lift<'_> {
    /// Moves the frames to the segment behind the current one and makes that the current one. `tell` is given the records of the two places, to say
    /// where managed code waits now. None where there is no memory above.
    pub(crate) fn carry_out<S: Signer>(
        self,
        signer: &S,
        links: &mut Links,
        current: &mut Segment,
        plan: &mut Plan,
        tell: impl FnOnce(&Record, &Record) -> Result<(), Refusal>,
    ) -> Result<Option<Lifted>, Refusal> {
        let Lift { policy, table, cut, piece, shadow, most, spare } = self;
        let (low, floor) = (piece.youngest, current.record().top);
        let bytes = cut.edge.saturating_sub(low);
        let need = bytes.saturating_add(spare);
        let warm = links.next().is_some_and(|next| next.record().size() >= need && next.record().base >= floor);
        if !warm {
            let Record { identity, generation, .. } = *current.record();
            let map = |size| Segment::map_above(size, policy.guard, identity, generation, floor);
            if links.append(current, policy, most, low, need, map).is_err() {
                return Ok(None);
            }
        }
        let Some(next) = links.next() else { return Ok(None) };
        // Its top is the edge: so the way from top to top, which the stub derives from sealed records, is that of the frames.
        let mut part = Record::default();
        arch::link_part(&mut part, current.record(), cut.edge);
        let piece = Piece { bottom: cut.bottom, base_cfa: cut.edge, base_fp: cut.fp, arguments: 0, ..piece };
        let smallest_frame = policy.smallest_frame;
        let bounds =
            Bounds { source: &part, pieces: &[piece], complete: false, smallest_frame, shadow, in_place: false };
        plan.make(signer, Walk::new(signer, table, bounds))?;
        // SAFETY: the plan was just made for `bounds`; both segments are owned by the stack; the youngest frame is grow's, which runs on the
        // native stack now.
        let record = unsafe { relocate(signer, plan, &bounds, next.record(), spare, usize::MAX)? };
        tell(&part, next.record())?;
        links.lifted(current, cut.fp as usize, cut.bottom);
        Ok(Some(Lifted { record, bytes, made: !warm }))
    }
}
