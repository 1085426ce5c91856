//! Stacks of no slab class: those with a mapping of their own, and slots for data areas of the caller's.
//!
//! A few idle ones are kept as they are. Of the others the memory is unmapped; the slot is bound again to the next stack of
//! the kind, with the generations that it has and a new identity.

use super::{Lease, hand_out, verified};
use crate::abi::{Slot, slot_state};
use crate::directory::{self, Bound, CLASS_BARE, CLASS_LARGE, CLASS_SHADOW};
use crate::error::Error;
use crate::slab::{self, Shape};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Idle ones of a kind that are kept.
const KEPT: usize = 16;
/// Bytes of data areas that the kept ones may have.
const KEPT_BYTES: usize = 64 << 20;

/// Idle ones of a kind.
struct Idle {
    slots: [*mut Slot; KEPT],
    count: usize,
    bytes: usize,
    /// Those that could not be unmapped when they should, linked by [`Slot::next`].
    left: *mut Slot,
}

// SAFETY: free slots are bound to no thread.
unsafe impl Send for Idle {}

const NONE: Idle = Idle { slots: [null_mut(); KEPT], count: 0, bytes: 0, left: null_mut() };

static LARGE: Mutex<Idle> = Mutex::new(NONE);
static BARE: Mutex<Idle> = Mutex::new(NONE);

fn idle(class: u8) -> MutexGuard<'static, Idle> {
    let kind = if class & CLASS_LARGE != 0 { &LARGE } else { &BARE };
    kind.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the directory says of a slot that a list names.
fn known(slot: *mut Slot) -> Option<directory::Known> {
    // SAFETY: reads a word where a slot should be. An address that an attacker made up faults, or is not known.
    let chunk = unsafe { (&raw const (*slot).chunk).read_volatile() };
    directory::known(slot.addr(), chunk)
}

/// What a stack of a kind takes of the bytes that may be kept.
fn bytes_of(class: u8, bound: &Bound) -> usize {
    if class & CLASS_BARE != 0 { 0 } else { bound.top - bound.base }
}

impl Idle {
    /// Takes the youngest of a class whose bounds fit.
    fn take(&mut self, class: u8, fits: impl Fn(&Bound) -> bool) -> Option<NonNull<Slot>> {
        for position in (0..self.count.min(KEPT)).rev() {
            let slot = self.slots[position];
            let found = known(slot).filter(|known| known.class() == class).map(|known| known.bound());
            if let Some(bound) = found.filter(&fits) {
                verified(slot, class);
                self.slots.copy_within(position + 1..self.count.min(KEPT), position);
                self.count -= 1;
                self.bytes = self.bytes.saturating_sub(bytes_of(class, &bound));
                return NonNull::new(slot);
            }
        }
        None
    }
}

/// Leases a stack with a mapping of its own.
pub(super) fn lease_large(shape: &Shape) -> Result<Lease, Error> {
    lease(shape, None, |bound| bound.top - bound.base == shape.usable)
}

/// Leases a slot for the data area that begins at `base`.
pub(super) fn lease_bare(shape: &Shape, base: usize) -> Result<Lease, Error> {
    lease(shape, Some(base), |bound| bound.base == base && bound.top - base == shape.usable)
}

fn lease(shape: &Shape, base: Option<usize>, fits: impl Fn(&Bound) -> bool) -> Result<Lease, Error> {
    let kept = idle(shape.class).take(shape.class, fits);
    let slot = match kept {
        Some(slot) => slot,
        None => slab::map_single(shape, base)?,
    };
    Ok(hand_out(slot))
}

/// Gives such a stack back.
pub(super) fn give(slot: *mut Slot, class: u8) {
    let bytes = known(slot).map_or(0, |known| bytes_of(class, &known.bound()));
    // SAFETY: a lease's slot is mapped for ever.
    unsafe { &*slot }.state.store(slot_state::FREE, Ordering::Release);
    let mut idle = idle(class);
    let place = idle.count;
    if place < KEPT && idle.bytes.saturating_add(bytes) <= KEPT_BYTES {
        idle.slots[place] = slot;
        idle.count += 1;
        idle.bytes += bytes;
        return;
    }
    unmap(&mut idle, slot);
    // What could not be unmapped before may be now.
    let left = std::mem::replace(&mut idle.left, null_mut());
    unmap_all(&mut idle, left);
}

/// Unmaps a free stack, or remembers it as one that could not be.
fn unmap(idle: &mut Idle, slot: *mut Slot) {
    // SAFETY: it is free and was verified or is given back: the directory knows it.
    let fields = unsafe { &*slot };
    if slab::unmap_single(fields.chunk).is_err() {
        fields.next.store(idle.left, Ordering::Relaxed);
        idle.left = slot;
    }
}

/// The same for all that are linked to `slot`.
fn unmap_all(idle: &mut Idle, mut slot: *mut Slot) {
    while !slot.is_null() {
        let next = verified(slot, known(slot).map_or(0, |known| known.class()));
        unmap(idle, slot);
        slot = next;
    }
}

/// Unmaps all that are idle.
pub(super) fn trim() {
    for kind in [CLASS_LARGE, CLASS_BARE] {
        let mut idle = idle(kind);
        let left = std::mem::replace(&mut idle.left, null_mut());
        unmap_all(&mut idle, left);
        for class in [kind, kind | CLASS_SHADOW] {
            while let Some(slot) = idle.take(class, |_| true) {
                unmap(&mut idle, slot.as_ptr());
            }
        }
    }
}
