//! What the pools hold, told for people and for collectors.

use crate::abi::{Slot, slot_state};
use crate::budget;
use crate::directory::{self, Bound, CLASS_BARE};
use crate::slab::Shape;
use crate::system::{self, GUARD_MAPPINGS};
use std::panic::Location;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// A stack that waits: suspended, or prepared and never run. Whoever could resume it may have forgotten it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Leak {
    /// Its bookkeeping.
    pub slot: NonNull<Slot>,
    /// Where the program made what waits on it, if that was noted.
    pub created: Option<&'static Location<'static>>,
    /// Its lease was dropped while it waited: nobody can give it back. Otherwise the lease is still held, or was forgotten
    /// (`std::mem::forget`), which cannot be told apart.
    pub abandoned: bool,
    /// It ran before; otherwise it was only prepared.
    pub suspended: bool,
    /// Usable bytes of its data area.
    pub bytes: usize,
}

// SAFETY: the slot's address is only a name here: dereferencing it is unsafe, and it stays mapped for ever.
unsafe impl Send for Leak {}

/// The stacks of one class. All counts are of the moment at which each stack was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClassStats {
    /// Usable bytes of each; 0: slots for data areas of the caller's.
    pub bytes: usize,
    /// They have an inaccessible guard.
    pub guarded: bool,
    /// They have a shadow stack.
    pub shadow: bool,
    /// Chunks.
    pub chunks: usize,
    /// Stacks that the chunks have room for.
    pub capacity: usize,
    /// Stacks in pools.
    pub idle: usize,
    /// Stacks in use: handed out, prepared, running or suspended.
    pub leased: usize,
    /// Of those: suspended.
    pub suspended: usize,
    /// Of those: prepared, never run.
    pub ready: usize,
    /// Of those: their lease was dropped while something was on them.
    pub abandoned: usize,
}

/// What the pools hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// By class, those that were ever used.
    pub classes: Vec<ClassStats>,
    /// Bytes of all leased stacks as a budget counts them: data, shadow and bookkeeping at their full size.
    pub leased_bytes: usize,
    /// Bytes counted against the budget; stacks leased while there is none are not.
    pub counted_bytes: usize,
    /// Bytes of addresses that data areas and shadow stacks take, guards included.
    pub addresses: usize,
    /// Guards that cost a mapping of the system's each, because the kernel has no cheaper ones (Linux before 6.13).
    pub guard_mappings: usize,
    /// Guards cost no mapping.
    pub cheap_guards: bool,
}

/// Every slot that was ever made, with what the directory says of it.
pub(super) fn slots() -> impl Iterator<Item = (NonNull<Slot>, Bound)> {
    directory::chunks().flat_map(|(chunk, entry)| {
        let place = directory::place_of(chunk as usize);
        (0..entry.count()).map_while(move |index| {
            let slot = entry.slot(index);
            // SAFETY: slots in the directory are mapped for ever. They are made in order: the first without identity ends them.
            let made = unsafe { (&raw const (*slot.as_ptr()).identity).read_volatile() } != 0;
            Some((slot, place?.bound(index))).filter(|_| made)
        })
    })
}

/// The stacks that are suspended now, for a collector that walks their frames: whoever calls it stops the threads that could resume them, and
/// finds in the slot where each one's registers lie.
pub fn suspended() -> impl Iterator<Item = NonNull<Slot>> {
    // SAFETY: slots in the directory are mapped for ever.
    slots().map(|(slot, _)| slot).filter(|slot| unsafe { slot.as_ref() }.standing() == slot_state::SUSPENDED)
}

/// All stacks that are suspended, or prepared and never run, and those that were left with something on them.
pub fn leaks() -> Vec<Leak> {
    let waits = |(slot, bound): (NonNull<Slot>, Bound)| {
        // SAFETY: slots in the directory are mapped for ever.
        let fields = unsafe { slot.as_ref() };
        let state = fields.standing();
        let abandoned =
            fields.owner.load(Ordering::Relaxed).addr() & budget::ABANDONED != 0 && state != slot_state::FREE;
        let suspended = state == slot_state::SUSPENDED;
        // SAFETY: null, or what a face has put there: a location of the program's text, which lives for ever.
        let created = unsafe { fields.created.load(Ordering::Acquire).as_ref() };
        let leak = Leak { slot, created, abandoned, suspended, bytes: bound.top - bound.base };
        (suspended || abandoned || state == slot_state::READY).then_some(leak)
    };
    slots().filter_map(waits).collect()
}

/// Counts everything. It looks at every slot there is.
pub fn stats() -> Stats {
    let mut stats = Stats {
        counted_bytes: budget::used(),
        guard_mappings: GUARD_MAPPINGS.load(Ordering::Relaxed),
        cheap_guards: system::cheap_guards(),
        ..Stats::default()
    };
    for (chunk, entry) in directory::chunks() {
        let Some(bound) = directory::place_of(chunk as usize).map(|place| place.bound(0)) else { continue };
        let shape = Shape::of(&bound);
        let class = stats.class(&shape);
        class.chunks += 1;
        class.capacity += entry.count();
        let data = if entry.class & CLASS_BARE != 0 { 0 } else { entry.count() * entry.data_span };
        stats.addresses += data + entry.count() * entry.shadow_span;
    }
    for (slot, bound) in slots() {
        // SAFETY: slots in the directory are mapped for ever.
        let fields = unsafe { slot.as_ref() };
        let state = fields.standing();
        let shape = Shape::of(&bound);
        let abandoned = fields.owner.load(Ordering::Relaxed).addr() & budget::ABANDONED != 0;
        let class = stats.class(&shape);
        if state == slot_state::FREE {
            class.idle += 1;
            continue;
        }
        class.leased += 1;
        class.suspended += usize::from(state == slot_state::SUSPENDED);
        class.ready += usize::from(state == slot_state::READY);
        class.abandoned += usize::from(abandoned);
        stats.leased_bytes += shape.cost();
    }
    stats
}

impl Stats {
    /// The place of a shape's class.
    fn class(&mut self, shape: &Shape) -> &mut ClassStats {
        let bytes = if shape.class & CLASS_BARE != 0 { 0 } else { shape.usable };
        let (guarded, shadow) = (shape.guard != 0, shape.room != 0);
        let same = |class: &ClassStats| (class.bytes, class.guarded, class.shadow) == (bytes, guarded, shadow);
        let position = self.classes.iter().position(same).unwrap_or_else(|| {
            self.classes.push(ClassStats { bytes, guarded, shadow, ..ClassStats::default() });
            self.classes.len() - 1
        });
        &mut self.classes[position]
    }
}
