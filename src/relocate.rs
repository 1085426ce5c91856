//! The move itself: copy the span, put the frame pointers right, re-bind the return addresses.
//!
//! Until the caller makes the destination current, the stack is the one that it was; a failure at any step leaves it so. Nothing in the
//! source is written, unless its pages were moved instead of copied: then a failure, which only a hook can bring about
//! that late, moves everything back.

use crate::abi::{Extent, Rebinding, Record};
use crate::codemap::Register;
use crate::error::Refusal;
use crate::pac::Tampered;
use crate::plan::Plan;
use crate::segment::remap::move_pages;
use crate::segment::{read_word, write_word};
use crate::signer::{Signer, Words};
use crate::steps::{Step, StepInfo, step};
use crate::walk::Bounds;

/// Moves the planned span of `bounds` to the same distance from `destination`'s top.
///
/// `spare` is the number of bytes that must stay free below the span in the destination. Returns the address that
/// the youngest frame record has now. A span of `pages` bytes or more moves by page tables where the system can: such segments
/// are two that `segment` has mapped.
///
/// # Errors
/// [`Refusal::Error`] when the destination does not fit, [`Refusal::Tampered`] when a word changed since the walk
/// or does not authenticate. With an error the source is as it was.
///
/// # Safety
/// `plan` was made for `bounds`, whose blocks of registers are mapped and loaded by their stubs afterwards; both segments are mapped, no other thread runs on or moves this stack, and the span is
/// not running managed code: its youngest frame is a stub's.
pub unsafe fn relocate<S: Signer>(
    signer: &S,
    plan: &mut Plan,
    bounds: &Bounds<'_>,
    destination: &Record,
    spare: usize,
    pages: usize,
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

    // SAFETY: the caller's: two segments of this stack, which does not run.
    let words = match bytes >= pages && unsafe { move_pages(source, destination, low) } {
        true => Words::Destination,
        false => Words::Source,
    };
    if words == Words::Source {
        // SAFETY: `fits` has shown that the two segments are disjoint and that the span fits in the destination, and that
        // it lies in the source; the two extents were looked at once and hold the span.
        unsafe { copy(low, low.wrapping_add(delta), bytes) };
    }
    plan.note_pages_moved(words == Words::Destination);
    let way = Way { from, to, delta, low, words };
    let mut done = Step::Copied;
    // SAFETY: the caller's; the span lies in the destination now.
    let moved = unsafe { put_right(signer, plan, bounds, destination, &way, &mut done) };
    #[cfg(feature = "steps")]
    if words == Words::Destination && matches!(moved, Err(Refusal::Error(_))) {
        // SAFETY: as above; the source is mapped, without what was moved.
        unsafe { take_back(signer, plan, bounds, destination, &way, done)? };
    }
    moved?;
    rebase_registers(plan, bounds, from, delta)?;
    Ok(low.wrapping_add(delta))
}

/// From where to where, looked at once: the records can be rewritten meanwhile.
struct Way {
    from: Extent,
    to: Extent,
    delta: usize,
    /// Lowest address of the span, in the source.
    low: usize,
    words: Words,
}

/// Makes the span in the destination what it must be there. `done` says how far that came.
///
/// # Safety
/// As for [`relocate`]; the span lies at its new place, as it was.
unsafe fn put_right<S: Signer>(
    signer: &S,
    plan: &mut Plan,
    bounds: &Bounds<'_>,
    destination: &Record,
    way: &Way,
    done: &mut Step,
) -> Result<(), Refusal> {
    let &Bounds { source, shadow, .. } = bounds;
    let &Way { from, to, delta, low, words } = way;
    step(Step::Copied, StepInfo::new(low, source, Some(destination), plan))?;

    rebase(plan, from, to, delta)?;
    *done = Step::Rebased;
    step(Step::Rebased, StepInfo::new(low, source, Some(destination), plan))?;

    // SAFETY: the caller's; the records are the stubs' own authority.
    unsafe {
        signer.rebind(source, destination, low, plan.rebindings(), plan.details(), shadow, words)?;
        if !plan.signed().is_empty() {
            signer.rebind_pointers(source, destination, low, plan.signed(), words)?;
        }
    }
    *done = Step::Rebound;
    step(Step::Rebound, StepInfo::new(low.wrapping_add(delta), source, Some(destination), plan))?;
    Ok(())
}

/// Moves a span back whose pages were moved, after the failure of the step that `done` names: as it came, by copying. The plan
/// is the way back afterwards.
///
/// # Errors
/// [`Refusal::Tampered`], as for [`relocate`].
///
/// # Safety
/// As for [`relocate`].
#[cfg(feature = "steps")]
unsafe fn take_back<S: Signer>(
    signer: &S,
    plan: &mut Plan,
    bounds: &Bounds<'_>,
    destination: &Record,
    way: &Way,
    done: Step,
) -> Result<(), Refusal> {
    let &Bounds { source, shadow, .. } = bounds;
    let &Way { from, to, delta, low, .. } = way;
    let moved = low.wrapping_add(delta);
    // SAFETY: the caller's; both extents hold the span.
    unsafe { copy(moved, low, from.top.wrapping_sub(low)) };
    if done == Step::Copied {
        return Ok(());
    }
    plan.turn_round(from, delta);
    rebase(plan, to, from, delta.wrapping_neg())?;
    if done == Step::Rebound {
        // SAFETY: the caller's; the records are the stubs' own authority.
        unsafe {
            signer.rebind(destination, source, moved, plan.rebindings(), plan.details(), shadow, Words::Destination)?;
            if !plan.signed().is_empty() {
                signer.rebind_pointers(destination, source, moved, plan.signed(), Words::Destination)?;
            }
        }
    }
    Ok(())
}

/// Copies a span.
///
/// # Safety
/// Both ranges are mapped, the second is writable and nobody uses it; they are disjoint.
unsafe fn copy(from: usize, to: usize, bytes: usize) {
    // SAFETY: the caller's.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::with_exposed_provenance::<u8>(from),
            std::ptr::with_exposed_provenance_mut::<u8>(to),
            bytes,
        );
    }
}

/// Puts saved frame pointers and slots that point into the stack right, in the destination.
///
/// The plan may have been rewritten, so every address taken from it is bounded by the destination again.
fn rebase(plan: &Plan, source: Extent, destination: Extent, delta: usize) -> Result<(), Tampered> {
    let entries = plan.rebindings();
    let mut done = 0;
    for link in plan.links() {
        let Some(run) = entries.get(done..=link.index) else {
            return Err(Tampered { evidence: "the plan's frames are not those that were walked", slot: link.slot });
        };
        done = link.index + 1;
        rebase_run(run, destination, delta)?;
        if link.slot != 0 {
            let moved = place(link.slot, destination, delta)?;
            let held = (link.value as usize) >= source.base && (link.value as usize) < source.top;
            // A frame pointer outside the segment is the entry frame's, on another stack: it stays.
            let value = if held { link.value.wrapping_add(delta as u64) } else { link.value };
            exchange(moved, link.value, value)?;
        }
    }
    // Every piece ends with a frame whose caller has no return address in the plan.
    if done != entries.len() {
        return Err(Tampered { evidence: "the plan's frames are not those that were walked", slot: done });
    }
    for &slot in plan.pointers() {
        let moved = place(slot, destination, delta)?;
        // SAFETY: `place` has shown that the word lies in the destination, which is mapped and not yet in use.
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

/// The frame pointers of a run of frames, all but the last's: each stands next to its return address and leads to the next
/// frame's, which stands so too.
#[inline]
fn rebase_run(run: &[Rebinding], destination: Extent, delta: usize) -> Result<(), Tampered> {
    let Some((first, older)) = run.split_first() else { return Ok(()) };
    let mut record = first.slot().wrapping_sub(8);
    for caller in older {
        let caller = caller.slot().wrapping_sub(8);
        let moved = place(record, destination, delta)?;
        exchange(moved, caller as u64, caller.wrapping_add(delta) as u64)?;
        record = caller;
    }
    Ok(())
}

/// Where a word of the source is in the destination.
#[inline]
fn place(address: usize, destination: Extent, delta: usize) -> Result<usize, Tampered> {
    let moved = address.wrapping_add(delta);
    if moved.is_multiple_of(8) && destination.holds(moved, 8) {
        Ok(moved)
    } else {
        Err(Tampered { evidence: "the plan names a place outside the destination", slot: address })
    }
}

/// Puts the word at `place`, which lies in the destination, from what it must hold to another.
#[inline]
fn exchange(place: usize, expected: u64, word: u64) -> Result<(), Tampered> {
    // SAFETY: the caller has shown that the word lies in the destination, which is mapped and not yet in use.
    unsafe {
        if read_word(place) != expected {
            return Err(Tampered { evidence: "a saved frame pointer changed during the move", slot: place });
        }
        write_word(place, word);
    }
    Ok(())
}

/// Puts what the stubs keep of callee-saved registers right, outside both segments. Nothing can be refused after that.
fn rebase_registers(plan: &Plan, bounds: &Bounds<'_>, source: Extent, delta: usize) -> Result<(), Tampered> {
    const BYTES: usize = Register::NAMES.len() * 8;
    let kept = |address: usize| {
        bounds.pieces.iter().any(|piece| piece.registers != 0 && address.wrapping_sub(piece.registers) <= BYTES - 8)
    };
    if let Some(&slot) = plan.registers().iter().find(|&&slot| !slot.is_multiple_of(8) || !kept(slot)) {
        return Err(Tampered { evidence: "the plan names a register that no stub keeps", slot });
    }
    for &slot in plan.registers() {
        // SAFETY: the word lies in a block where a stub keeps registers, which the caller of `relocate` vouches for.
        let value = unsafe { read_word(slot) } as usize;
        if value >= source.base && value < source.top {
            // SAFETY: as above; the stub loads it when the move is over.
            unsafe { write_word(slot, value.wrapping_add(delta) as u64) };
        }
    }
    Ok(())
}
