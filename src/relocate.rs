//! The move itself: copy the span, put the frame pointers right, re-bind the return addresses.
//!
//! Nothing in the source is written. Until the caller makes the destination current, the stack is the one that it
//! was; a failure at any step leaves it so.

use crate::abi::{Extent, Record};
use crate::error::Refusal;
use crate::pac::Tampered;
use crate::plan::Plan;
use crate::segment::{read_word, write_word};
use crate::signer::Signer;
use crate::steps::{Step, StepInfo, step};
use crate::walk::Bounds;

/// Moves the planned span of `bounds` to the same distance from `destination`'s top.
///
/// `spare` is the number of bytes that must stay free below the span in the destination. Returns the address that
/// the youngest frame record has now.
///
/// # Errors
/// [`Refusal::Error`] when the destination does not fit, [`Refusal::Tampered`] when a word changed since the walk
/// or does not authenticate. The source is untouched.
///
/// # Safety
/// `plan` was made for `bounds`; both segments are mapped, no other thread runs on or moves this stack, and the span is
/// not running managed code: its youngest frame is a stub's.
pub unsafe fn relocate<S: Signer>(
    signer: &S,
    plan: &mut Plan,
    bounds: &Bounds<'_>,
    destination: &Record,
    spare: usize,
) -> Result<usize, Refusal> {
    let &Bounds { source, shadow, complete, .. } = bounds;
    let low = plan.fits(source, destination, spare)?;
    let frames = plan.rebindings().len();
    if shadow.is_some_and(|shadow| shadow.len() < frames || complete && shadow.len() != frames) {
        return Err(Tampered { evidence: "the plan and the shadow stack count different frames", slot: low }.into());
    }
    let (from, to) = (source.extent(), destination.extent());
    let bytes = from.top.wrapping_sub(low);
    let delta = to.top.wrapping_sub(from.top);
    if !from.holds(low, bytes) || !to.holds(low.wrapping_add(delta), bytes) {
        return Err(Tampered { evidence: "a segment record changed during the move", slot: low }.into());
    }
    step(Step::Planned, StepInfo::new(low, source, Some(destination), plan))?;

    // SAFETY: `fits` has shown that the two segments are disjoint and that the span fits in the destination, and that
    // it lies in the source; the two extents were looked at once and hold the span.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::with_exposed_provenance::<u8>(low),
            std::ptr::with_exposed_provenance_mut::<u8>(low.wrapping_add(delta)),
            bytes,
        );
    }
    step(Step::Copied, StepInfo::new(low, source, Some(destination), plan))?;

    rebase(plan, from, to, delta)?;
    step(Step::Rebased, StepInfo::new(low, source, Some(destination), plan))?;

    // SAFETY: the caller's; the records are the stubs' own authority.
    unsafe { signer.rebind(source, destination, low, plan.rebindings(), shadow)? };
    let moved = low.wrapping_add(delta);
    step(Step::Rebound, StepInfo::new(moved, source, Some(destination), plan))?;
    Ok(moved)
}

/// Puts saved frame pointers and slots that point into the stack right, in the destination.
///
/// The plan may have been rewritten, so every address taken from it is bounded by the destination again.
fn rebase(plan: &Plan, source: Extent, destination: Extent, delta: usize) -> Result<(), Tampered> {
    let place = |address: usize| {
        let moved = address.wrapping_add(delta);
        if moved.is_multiple_of(8) && destination.holds(moved, 8) {
            Ok(moved)
        } else {
            Err(Tampered { evidence: "the plan names a place outside the destination", slot: address })
        }
    };
    let mut younger = 0;
    for &(end, base_fp) in plan.pieces() {
        let Some(frames) = plan.rebindings().get(younger..end) else {
            return Err(Tampered { evidence: "the plan's pieces are not those that were walked", slot: end });
        };
        younger = end;
        let mut frames = frames.iter().peekable();
        while let Some(frame) = frames.next() {
            let record = frame.record();
            let moved = place(record)?;
            let expected = frames.peek().map_or(base_fp, |caller| caller.record() as u64);
            // SAFETY: `place` has shown that the word lies in the destination, which is mapped and not yet in use.
            if unsafe { read_word(moved) } != expected {
                return Err(Tampered { evidence: "a saved frame pointer changed during the move", slot: record });
            }
            // A frame pointer outside the segment is the entry frame's, on another stack: it stays.
            if (expected as usize) >= source.base && (expected as usize) < source.top {
                // SAFETY: as above.
                unsafe { write_word(moved, expected.wrapping_add(delta as u64)) };
            }
        }
    }
    if younger != plan.rebindings().len() {
        return Err(Tampered { evidence: "the plan's pieces are not those that were walked", slot: younger });
    }
    for &slot in plan.pointers() {
        let moved = place(slot)?;
        // SAFETY: as above.
        let value = unsafe { read_word(moved) } as usize;
        // Null and pointers elsewhere stay. One past the top is elsewhere: the highest words are the oldest frame record, so
        // nothing in a frame ends there, and what begins there is another mapping.
        if value >= source.base && value < source.top {
            // SAFETY: as above.
            unsafe { write_word(moved, value.wrapping_add(delta) as u64) };
        }
    }
    Ok(())
}
