//! Chunks: many stacks of one size in one mapping, with their slots elsewhere and their shadow stacks in a run of adjacent areas.
//!
//! ```text
//!  data     | guard | usable 0 | guard | usable 1 | guard | usable 2 | ...      one mapping
//!  shadow   | guard | words  T | guard | words  T | guard | words  T | ...      one mapping, T = idle token
//!  slots    | 0 | 1 | 2 | ...                                                   128 bytes each
//! ```
//! Areas are made one after the other as they are wanted (`carve`). Guards are pages that the kernel refuses to fill, so they split no
//! mapping; `map_shadow_stack` at adjacent addresses extends the mapping that is there. Tokens are the kernel's: none is minted.
//! A chunk's addresses stay the chunk's as long as the process lives, except those of the chunks that hold one large stack.

use crate::abi::{Slot, slot_state};
use crate::directory::{self, Bound, CLASS_BARE, CLASS_LARGE, Entry, SLOT_SHIFT};
use crate::error::Error;
use crate::pac::Tampered;
use crate::{system, tamper};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Logarithm of the smallest class's bytes.
pub(crate) const SMALLEST: u32 = 9;
/// Logarithm of the largest slab class's bytes; stacks above have a mapping of their own.
pub(crate) const LARGEST: u32 = 20;
/// Slots that the largest chunk has.
const CHUNK_SLOTS: usize = 4096;
/// Bytes of addresses that the largest chunk takes, unless one slot takes more.
const CHUNK_BYTES: usize = 1 << 30;
/// Slots of a first chunk.
const FIRST_SLOTS: usize = 16;
/// The largest guard: a function that touches its frame page by page, or whose frame is smaller than this, hits it.
const GUARD: usize = 64 << 10;
/// Bytes of a shadow stack for signal handlers, which run on another data stack but on the same shadow stack.
const HANDLERS: usize = 2 << 10;

/// The measures of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Usable bytes of the data area.
    pub usable: usize,
    /// Inaccessible bytes below them, or 0.
    pub guard: usize,
    /// Bytes of the shadow area without its guard; 0 without shadow stacks.
    pub room: usize,
    /// Inaccessible bytes below those.
    pub shadow_guard: usize,
    /// [`Entry::class`]
    pub class: u8,
}

impl Shape {
    /// Of a slab class: `1 << class` usable bytes.
    pub fn of_class(class: u32, shadow: bool) -> Shape {
        let usable = 1 << class;
        Shape::new(usable, if usable < system::page_size() { 0 } else { usable.min(GUARD) }, class as u8, shadow)
    }

    /// Of a stack with a mapping of its own.
    pub fn large(usable: usize, shadow: bool) -> Shape {
        Shape::new(usable, GUARD, CLASS_LARGE, shadow)
    }

    /// Of a data area that the caller owns.
    pub fn bare(usable: usize, shadow: bool) -> Shape {
        Shape::new(usable, 0, CLASS_BARE, shadow)
    }

    fn new(usable: usize, guard: usize, class: u8, shadow: bool) -> Shape {
        let page = system::page_size();
        let (mut room, mut shadow_guard) = (0, 0);
        if shadow {
            // A native frame takes at least 16 bytes and leaves 8 there.
            room = (usable / 2 + HANDLERS).next_multiple_of(page);
            shadow_guard =
                if class & (CLASS_LARGE | CLASS_BARE) != 0 { page } else { (room + page).next_power_of_two() - room };
        }
        Shape { usable, guard, room, shadow_guard, class }
    }

    /// Bytes of one data area.
    pub fn data_span(&self) -> usize {
        self.usable + self.guard
    }

    /// Bytes of one shadow area.
    pub fn shadow_span(&self) -> usize {
        self.room + self.shadow_guard
    }

    fn data_shift(&self) -> u32 {
        self.data_span().next_power_of_two().trailing_zeros()
    }

    fn shadow_shift(&self) -> u32 {
        self.shadow_span().next_power_of_two().trailing_zeros()
    }

    /// What one stack of the shape can take of the machine: data, shadow and bookkeeping.
    pub fn cost(&self) -> usize {
        self.usable + self.room + size_of::<Slot>()
    }

    /// Slots of the first chunk.
    pub fn first_slots(&self) -> usize {
        ((4 << 20) >> self.data_shift()).clamp(1, FIRST_SLOTS)
    }

    /// Slots of the chunk that follows one of `count`.
    pub fn next_slots(&self, count: usize) -> usize {
        (2 * count).min(CHUNK_SLOTS).min((CHUNK_BYTES >> self.data_shift()).max(1))
    }
}

/// A chunk whose slots are being made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    /// Its index in the directory.
    pub index: u32,
    /// Slots made so far.
    pub made: usize,
    /// Slots it has room for.
    pub count: usize,
}

static IDENTITIES: AtomicU64 = AtomicU64::new(1);

impl Chunk {
    /// Maps a chunk for `count` stacks of a shape and publishes it. Where there is no memory for so many it tries fewer.
    ///
    /// # Errors
    /// [`Error::Memory`]: nothing stays mapped.
    pub fn map(shape: &Shape, count: usize) -> Result<Chunk, Error> {
        let mut count = count;
        loop {
            match Chunk::map_exactly(shape, count) {
                Err(Error::Memory { .. }) if count > 1 => count /= 2,
                result => return result,
            }
        }
    }

    fn map_exactly(shape: &Shape, count: usize) -> Result<Chunk, Error> {
        let slots = take_slots(count)?;
        map_areas(shape, count, slots).inspect_err(|_| give_slots(slots, count))
    }

    /// Makes the chunk's next stack.
    ///
    /// # Errors
    /// [`Error::Memory`]: the chunk is as it was.
    pub fn carve(&mut self, shape: &Shape) -> Result<NonNull<Slot>, Error> {
        let lost = || -> ! {
            tamper::end(Tampered { evidence: "the pools' bookkeeping was rewritten", slot: self.index as usize })
        };
        let Some(entry) = directory::entry(self.index as usize) else { lost() };
        if self.made >= entry.count() || entry.class != shape.class {
            lost();
        }
        let bound = entry.bound(self.made);
        let slot = entry.slot(self.made);
        // SAFETY: the directory says that there is a slot, whose memory is mapped for ever; nobody has had it.
        unsafe { idle_or_end(slot, slot_state::FREE) };
        if shape.guard != 0 {
            let guard = shape.guard;
            system::guard("a stack's guard", bound.base - guard, guard)?;
        }
        if shape.room != 0 {
            make_shadow(shape, bound.shadow_top - shape.shadow_span())?;
        }
        // SAFETY: as above.
        unsafe { initialise(slot, self.index, &bound) };
        self.made += 1;
        Ok(slot)
    }
}

/// Maps data areas and reserves shadow areas for slots that there are, and publishes them.
pub(crate) fn map_areas(shape: &Shape, count: usize, slots: usize) -> Result<Chunk, Error> {
    let page = system::page_size();
    let too_large = || Error::Memory { what: "stacks", bytes: usize::MAX, errno: libc::ENOMEM };
    // Without guards of its own a chunk has one, so that its lowest stack does not run out of it.
    let lowest = if shape.guard == 0 { page } else { 0 };
    let stride = |shift: u32, span: usize| if count == 1 { Some(span) } else { count.checked_mul(1 << shift) };
    let areas = stride(shape.data_shift(), shape.data_span()).ok_or_else(too_large)?.next_multiple_of(page);
    let bytes = areas.checked_add(lowest).ok_or_else(too_large)?;
    let mapping = system::map_stacks("stacks", bytes)?;
    let shadows = stride(shape.shadow_shift(), shape.shadow_span()).ok_or_else(too_large)?;
    let made = || -> Result<Chunk, Error> {
        if lowest != 0 {
            system::guard("a stack's guard", mapping, lowest)?;
        }
        let shadow_base = if shape.room == 0 { 0 } else { system::reserve("shadow stacks", shadows, 0)? };
        let entry = Entry {
            slots_base: slots,
            slots_bytes: count << SLOT_SHIFT,
            data_base: mapping + lowest,
            data_span: shape.data_span(),
            shadow_base,
            shadow_span: shape.shadow_span(),
            data_shift: shape.data_shift() as u8,
            shadow_shift: shape.shadow_shift() as u8,
            class: shape.class,
            guard_shift: if shape.guard == 0 { 0 } else { shape.guard.trailing_zeros() as u8 },
            rest: [0; 4],
            identity_base: IDENTITIES.fetch_add(count as u64, Ordering::Relaxed),
        };
        match directory::publish(entry) {
            Ok(index) => Ok(Chunk { index, made: 0, count }),
            Err(error) => {
                if shadows != 0 {
                    system::unmap(shadow_base, shadows);
                }
                Err(error)
            }
        }
    };
    made().inspect_err(|_| system::unmap(mapping, bytes))
}

/// Makes the shadow stack at `area`, a reserved range: a guard, then words, with the kernel's token on top.
fn make_shadow(shape: &Shape, area: usize) -> Result<(), Error> {
    const WHAT: &str = "a shadow stack";
    let span = shape.shadow_span();
    system::unmap(area, span);
    system::map_shadow(WHAT, area, span)?;
    system::guard("a shadow stack's guard", area, shape.shadow_guard).inspect_err(|_| system::unmap(area, span))
}

/// Ends the process unless the slot is in `state`.
///
/// # Safety
/// The slot is one that the directory knows.
unsafe fn idle_or_end(slot: NonNull<Slot>, state: u32) {
    // SAFETY: the caller's.
    if unsafe { slot.as_ref() }.state.load(Ordering::Acquire) != state {
        tamper::end(Tampered { evidence: "a stack that is in use stood among the idle ones", slot: slot.addr().get() });
    }
}

/// Writes what the directory says of a slot into it. Its generations stay.
///
/// # Safety
/// The slot is one that the directory knows and is not in use.
pub(crate) unsafe fn initialise(slot: NonNull<Slot>, index: u32, bound: &Bound) {
    let slot = slot.as_ptr();
    // SAFETY: the caller's.
    unsafe {
        (&raw mut (*slot).identity).write(bound.identity);
        (&raw mut (*slot).base).write(bound.base);
        (&raw mut (*slot).top).write(bound.top);
        (&raw mut (*slot).shadow_top).write(bound.shadow_top);
        (&raw mut (*slot).chunk).write(index);
    }
}

/// Memory for slots. It is never given back to the system: generations in it go on.
struct Arena {
    next: usize,
    end: usize,
    mapped: usize,
}

static ARENA: Mutex<Arena> = Mutex::new(Arena { next: 0, end: 0, mapped: 0 });

/// Takes zeroed slots.
pub(crate) fn take_slots(count: usize) -> Result<usize, Error> {
    let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = count << SLOT_SHIFT;
    if arena.end - arena.next < bytes {
        let mapped = (2 * arena.mapped).clamp(64 << 10, 8 << 20).max(bytes.next_multiple_of(system::page_size()));
        arena.next = system::map("stacks' bookkeeping", mapped)?;
        arena.end = arena.next + mapped;
        arena.mapped = mapped;
    }
    let slots = arena.next;
    arena.next += bytes;
    Ok(slots)
}

/// Gives the slots back that were taken last, and never used.
pub(crate) fn give_slots(slots: usize, count: usize) {
    let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    if slots + (count << SLOT_SHIFT) == arena.next {
        arena.next = slots;
    }
}

/// Binds a slot to a data area that there is.
pub(crate) fn bind(shape: &Shape, base: usize) -> Result<NonNull<Slot>, Error> {
    let slots = take_slots(1)?;
    let made = || {
        let span = shape.shadow_span();
        let shadow_base = if span == 0 { 0 } else { system::map_shadow("a shadow stack", 0, span)? };
        let bound = || {
            if span != 0 {
                system::guard("a shadow stack's guard", shadow_base, shape.shadow_guard)?;
            }
            directory::publish(Entry {
                slots_base: slots,
                slots_bytes: 1 << SLOT_SHIFT,
                data_base: base,
                data_span: shape.usable,
                shadow_base,
                shadow_span: span,
                class: shape.class,
                identity_base: IDENTITIES.fetch_add(1, Ordering::Relaxed),
                ..Entry::default()
            })
        };
        bound().inspect_err(|_| {
            if span != 0 {
                system::unmap(shadow_base, span);
            }
        })
    };
    let index = made().inspect_err(|_| give_slots(slots, 1))?;
    let entry = directory::entry(index as usize).unwrap_or_default();
    let slot = entry.slot(0);
    // SAFETY: the directory knows the slot, and nobody else has it.
    unsafe { initialise(slot, index, &entry.bound(0)) };
    Ok(slot)
}

/// Undoes [`bind`].
pub(crate) fn unbind(_slot: *mut Slot, index: u32, bound: &Bound) {
    let entry = directory::entry(index as usize).unwrap_or_default();
    if directory::retire(index).is_ok() && bound.shadow_top != 0 {
        system::unmap(entry.shadow_base, entry.shadow_span);
    }
}
