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
use crate::directory::{self, Bound, CLASS_BARE, CLASS_LARGE, CLASS_SHADOW, Entry, SLOT_SHIFT};
use crate::error::Error;
use crate::pac::Tampered;
use crate::{shadow, system, tamper};
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
/// Slots of a first chunk at most.
const FIRST_SLOTS: usize = 16;
/// Bytes of addresses that it takes, unless one slot takes more.
const FIRST_BYTES: usize = 4 << 20;
/// The largest guard: a function that touches its frame page by page, or whose frame is smaller than this, hits it.
const GUARD: usize = 64 << 10;
/// Bytes of a shadow stack for signal handlers, which run on another data stack but on the same shadow stack.
const HANDLERS: usize = 2 << 10;

const WHAT: &str = "stacks";

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
    /// [`Entry::class`]: 0 for the smallest slab class, one more for each one twice as large, and flags.
    pub class: u8,
}

/// The slab class of stacks with `1 << shift` usable bytes, without flags.
#[inline(always)]
pub(crate) fn class_of_shift(shift: u32) -> u8 {
    (shift - SMALLEST) as u8
}

/// Its usable bytes.
pub(crate) fn class_bytes(class: u8) -> usize {
    1 << (SMALLEST + u32::from(class & !CLASS_SHADOW))
}

impl Shape {
    /// Of a slab class.
    pub fn of_class(class: u8) -> Shape {
        let usable = class_bytes(class);
        let guard = if usable < system::page_size() { 0 } else { usable.min(GUARD) };
        Shape::new(usable, guard, class, class & CLASS_SHADOW != 0)
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
        let class = if shadow { class | CLASS_SHADOW } else { class };
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

    /// Of the stack that an entry speaks of.
    pub fn of(bound: &Bound) -> Shape {
        let shadow = bound.shadow_top != 0;
        match bound.class & !CLASS_SHADOW {
            CLASS_LARGE => Shape::large(bound.top - bound.base, shadow),
            CLASS_BARE => Shape::bare(bound.top - bound.base, shadow),
            _ => Shape::of_class(bound.class),
        }
    }

    /// What one stack of the shape can take of the machine at most: data, shadow and bookkeeping.
    pub fn cost(&self) -> usize {
        let data = if self.class & CLASS_BARE != 0 { 0 } else { self.usable };
        data + self.room + size_of::<Slot>()
    }

    /// Slots of the chunk that follows one of `count`; 0: of the first.
    fn next_slots(&self, count: usize) -> usize {
        match count {
            0 => (FIRST_BYTES >> self.data_shift()).clamp(1, FIRST_SLOTS),
            _ => (2 * count).min(CHUNK_SLOTS).min(CHUNK_BYTES >> self.data_shift()).max(1),
        }
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
    /// Maps the chunk that follows one of `before` slots (0: the first) and publishes it. Where there is no memory for so
    /// many stacks it tries fewer.
    ///
    /// # Errors
    /// [`Error::Memory`]: nothing stays mapped.
    pub fn map(shape: &Shape, before: usize) -> Result<Chunk, Error> {
        let mut count = shape.next_slots(before);
        loop {
            match Chunk::map_exactly(shape, count) {
                Err(Error::Memory { .. }) if count > 1 => count /= 2,
                result => return result,
            }
        }
    }

    fn map_exactly(shape: &Shape, count: usize) -> Result<Chunk, Error> {
        let page = system::page_size();
        // Without guards of their own the stacks have one below the lowest.
        let guard = if shape.guard == 0 { page } else { 0 };
        let bytes = ((count << shape.data_shift()) + guard).next_multiple_of(page);
        let mapping = system::map_stacks(WHAT, bytes)?;
        let publish = || {
            if guard != 0 {
                system::guard("a stack's guard", mapping, guard)?;
            }
            let shadow_base = match shape.room {
                0 => 0,
                _ => shadow::set_aside(count << shape.shadow_shift())?,
            };
            let slots = take_slots(count)?;
            let entry = Entry {
                slots_bytes: count << SLOT_SHIFT,
                slots_base: slots,
                ..shape.entry(mapping + guard, shadow_base, count)
            };
            directory::publish(entry).inspect_err(|_| give_slots(slots, count))
        };
        let index = publish().inspect_err(|_| system::unmap(mapping, bytes))?;
        Ok(Chunk { index, made: 0, count })
    }

    /// Makes the chunk's next stack, which is free. `None`: something else lies where its shadow stack belongs; the stack after it
    /// may be there.
    ///
    /// # Errors
    /// [`Error::Memory`]: the chunk is as it was.
    pub fn carve(&mut self, shape: &Shape) -> Result<Option<NonNull<Slot>>, Error> {
        let place = directory::place_of(self.index as usize);
        let Some(entry) =
            place.map(|place| place.entry()).filter(|entry| entry.class == shape.class && self.made < entry.count())
        else {
            tamper::end(Tampered { evidence: "a pool's bookkeeping was rewritten", slot: self.index as usize });
        };
        let Some(bound) = place.map(|place| place.bound(self.made)) else { return Ok(None) };
        let slot = entry.slot(self.made);
        // SAFETY: the directory says that there is a slot, whose memory is mapped for ever.
        let (state, identity) = unsafe { (slot.as_ref().state.load(Ordering::Acquire), slot.as_ref().identity) };
        if state != slot_state::FREE || identity != 0 {
            tamper::end(Tampered {
                evidence: "a stack that was made before was to be made again",
                slot: slot.addr().get(),
            });
        }
        if shape.guard != 0 {
            system::guard("a stack's guard", bound.base - shape.guard, shape.guard)?;
        }
        let mut taken = false;
        if shape.room != 0 {
            match shadow::map_at(bound.shadow_top - shape.shadow_span(), shape.room, shape.shadow_guard) {
                Err(Error::Memory { errno: libc::EEXIST, .. }) => taken = true,
                result => result?,
            }
        }
        // SAFETY: as above; nobody has had the slot.
        unsafe { initialise(slot, self.index, &bound) };
        self.made += 1;
        if taken {
            // SAFETY: as above. It stays out of every list.
            unsafe { slot.as_ref() }.state.store(slot_state::DONE, Ordering::Release);
            return Ok(None);
        }
        Ok(Some(slot))
    }
}

impl Shape {
    /// The entry of `count` stacks, without their slots.
    fn entry(&self, data_base: usize, shadow_base: usize, count: usize) -> Entry {
        Entry {
            data_base,
            data_span: self.data_span(),
            shadow_base,
            shadow_span: self.shadow_span(),
            data_shift: self.data_shift() as u8,
            shadow_shift: self.shadow_shift() as u8,
            class: self.class,
            guard: self.guard as u32,
            identity_base: IDENTITIES.fetch_add(count as u64, Ordering::Relaxed),
            ..Entry::default()
        }
    }
}

/// Makes a chunk of one stack: with a data area that there is, or else with one of its own. The stack is free.
///
/// # Errors
/// [`Error::Memory`]: nothing stays mapped.
pub(crate) fn map_single(shape: &Shape, base: Option<usize>) -> Result<NonNull<Slot>, Error> {
    let with_data = |data: usize| {
        let shadow_base = if shape.room == 0 { 0 } else { shadow::map_anywhere(shape.room, shape.shadow_guard)? };
        let with_shadow = || {
            if let Some(index) = directory::publish_again(shape.entry(data, shadow_base, 1))? {
                return Ok(index);
            }
            let slots_base = take_slots(1)?;
            let entry = Entry { slots_base, slots_bytes: 1 << SLOT_SHIFT, ..shape.entry(data, shadow_base, 1) };
            directory::publish(entry).inspect_err(|_| give_slots(slots_base, 1))
        };
        with_shadow().inspect_err(|_| {
            if shape.room != 0 {
                system::unmap_guarded(shadow_base, shape.shadow_span());
            }
        })
    };
    let index = match base {
        Some(base) => with_data(base),
        None => {
            let mapping = system::map_stacks(WHAT, shape.data_span())?;
            system::guard("a stack's guard", mapping, shape.guard)
                .inspect_err(|_| system::unmap(mapping, shape.data_span()))?;
            with_data(mapping).inspect_err(|_| system::unmap_guarded(mapping, shape.data_span()))
        }
    }?;
    let (Some(place), Some(entry)) = (directory::place_of(index as usize), directory::entry(index as usize)) else {
        return Err(Error::Slot("it was not published"));
    };
    let slot = entry.slot(0);
    // SAFETY: the directory knows the slot, and nobody else has it.
    unsafe { initialise(slot, index, &place.bound(0)) };
    Ok(slot)
}

/// Undoes [`map_single`]; the stack is free and on no list.
///
/// # Errors
/// [`Error::Memory`]: the stack is as it was.
pub(crate) fn unmap_single(index: u32) -> Result<(), Error> {
    let Some(entry) = directory::entry(index as usize) else { return Err(Error::Slot("it is not in the directory")) };
    directory::retire(index)?;
    if entry.shadow_span != 0 {
        system::unmap_guarded(entry.shadow_base, entry.shadow_span);
    }
    if entry.class & CLASS_LARGE != 0 {
        system::unmap_guarded(entry.data_base, entry.data_span);
    }
    Ok(())
}

/// Writes what the directory says of a slot into it. Its generations stay.
///
/// # Safety
/// The slot is one that the directory knows and is not in use.
unsafe fn initialise(slot: NonNull<Slot>, index: u32, bound: &Bound) {
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
/// What is mapped for slots at once, at least and at most.
const ARENA_BYTES: (usize, usize) = (64 << 10, 8 << 20);

/// Takes zeroed slots.
///
/// # Errors
/// [`Error::Memory`]
pub(crate) fn take_slots(count: usize) -> Result<usize, Error> {
    let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = count << SLOT_SHIFT;
    if arena.end - arena.next < bytes {
        let least = bytes.next_multiple_of(system::page_size());
        let mapped = (2 * arena.mapped).clamp(ARENA_BYTES.0, ARENA_BYTES.1).max(least);
        let next = system::map_stacks("stacks' bookkeeping", mapped)?;
        *arena = Arena { next, end: next + mapped, mapped };
    }
    let slots = arena.next;
    arena.next += bytes;
    Ok(slots)
}

/// Gives slots back that were never used, if none were taken since.
fn give_slots(slots: usize, count: usize) {
    let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    if slots + (count << SLOT_SHIFT) == arena.next {
        arena.next = slots;
    }
}
