//! The chunk directory: which slot has which data area and which shadow stack, in memory that nobody can write.
//!
//! ```text
//!  published page: address, entries
//!        |
//!        v        one page          one page
//!        | e0 e1 e2 ... | ... ... ... | reserved, no access ... |
//!           |
//!           +-- slots_base + i*128   data_base + (i << data_shift)   shadow_base + (i << shadow_shift)   identity_base + i
//! ```
//! Slots lie in writable memory; what a slot may say of its own stack is decided here. The stubs (x86 under SHSTK) and the
//! pools compute with an entry and believe no pointer. The directory lies at one reserved address for the life of the process and
//! grows page by page: the new page is built elsewhere, write access is taken away, it is looked at again, and `mremap` puts it in
//! place. An entry is never removed; that of a released chunk fits no slot.

use crate::abi::Slot;
use crate::error::Error;
use crate::pac::Tampered;
use crate::{published, system, tamper};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of an entry.
pub(crate) const ENTRY: usize = size_of::<Entry>();
/// Entries that there is room for: 16 MiB of addresses.
const MAXIMUM: usize = 1 << 18;
/// In [`Entry::class`]: the stacks have shadow stacks. Below it stands the slab class.
pub(crate) const CLASS_SHADOW: u8 = 0x10;
/// In [`Entry::class`]: a mapping of its own, larger than every slab class.
pub(crate) const CLASS_LARGE: u8 = 0x40;
/// In [`Entry::class`]: a data area that belongs to the caller.
pub(crate) const CLASS_BARE: u8 = 0x80;
/// [`Entry::class`] of a released chunk of one slot, whose slot can be bound again.
const CLASS_RETIRED: u8 = CLASS_LARGE | CLASS_BARE;

/// One chunk: `count` slots, data areas and shadow stacks, bound to each other by their index. Its layout is known to `asm/`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Address of slot 0.
    pub slots_base: usize,
    /// Bytes of all slots: the count times 128. 0: no chunk.
    pub slots_bytes: usize,
    /// Lowest address of data area 0, its guard included.
    pub data_base: usize,
    /// Bytes of one data area, its guard included.
    pub data_span: usize,
    /// Lowest address of shadow area 0, its guard included.
    pub shadow_base: usize,
    /// Bytes of one shadow area, its guard included; 0 without shadow stacks.
    pub shadow_span: usize,
    /// Data areas lie `1 << data_shift` bytes apart.
    pub data_shift: u8,
    /// Shadow areas lie `1 << shadow_shift` bytes apart.
    pub shadow_shift: u8,
    /// Which lists its stacks belong to (`slab::Shape`). The stubs do not look at it.
    pub class: u8,
    /// 0
    pub rest: u8,
    /// Bytes of the guard that each data area begins with. The stubs do not look at it.
    pub guard: u32,
    /// Identity of slot 0.
    pub identity_base: u64,
}

const _: () = {
    assert!(size_of::<Entry>() == 64 && size_of::<Slot>() == 1 << SLOT_SHIFT);
    assert!(std::mem::offset_of!(Entry, data_base) == 16);
    assert!(std::mem::offset_of!(Entry, shadow_base) == 32);
    assert!(std::mem::offset_of!(Entry, shadow_span) == 40);
    assert!(std::mem::offset_of!(Entry, data_shift) == 48);
    assert!(std::mem::offset_of!(Entry, shadow_shift) == 49);
    assert!(std::mem::offset_of!(Entry, identity_base) == 56);
};

/// Logarithm of a slot's size.
pub(crate) const SLOT_SHIFT: u32 = 7;

/// An entry where it lies. Every word of it is read once for each use: a page with new entries may take its page's place meanwhile.
#[repr(C)]
pub(crate) struct Place {
    slots_base: AtomicUsize,
    slots_bytes: AtomicUsize,
    data_base: AtomicUsize,
    data_span: AtomicUsize,
    shadow_base: AtomicUsize,
    shadow_span: AtomicUsize,
    data_shift: AtomicU8,
    shadow_shift: AtomicU8,
    class: AtomicU8,
    rest: AtomicU8,
    guard: AtomicU32,
    identity_base: AtomicU64,
}

const _: () = assert!(size_of::<Place>() == ENTRY && align_of::<Place>() == align_of::<Entry>());

/// What an entry says of one of its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    /// Lowest usable address of the data area.
    pub base: usize,
    /// One past its highest.
    pub top: usize,
    /// One past the shadow stack's highest word; 0 without one.
    pub shadow_top: usize,
    /// The slot's identity.
    pub identity: u64,
    /// [`Entry::class`]
    pub class: u8,
}

impl Place {
    /// All of it.
    pub fn entry(&self) -> Entry {
        Entry {
            slots_base: self.slots_base.load(Ordering::Relaxed),
            slots_bytes: self.slots_bytes.load(Ordering::Relaxed),
            data_base: self.data_base.load(Ordering::Relaxed),
            data_span: self.data_span.load(Ordering::Relaxed),
            shadow_base: self.shadow_base.load(Ordering::Relaxed),
            shadow_span: self.shadow_span.load(Ordering::Relaxed),
            data_shift: self.data_shift.load(Ordering::Relaxed),
            shadow_shift: self.shadow_shift.load(Ordering::Relaxed),
            class: self.class.load(Ordering::Relaxed),
            rest: self.rest.load(Ordering::Relaxed),
            guard: self.guard.load(Ordering::Relaxed),
            identity_base: self.identity_base.load(Ordering::Relaxed),
        }
    }

    /// The index of the slot at `address`, if one begins there.
    #[inline(always)]
    pub fn index_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.slots_base.load(Ordering::Relaxed));
        let known = offset < self.slots_bytes.load(Ordering::Relaxed) && offset.is_multiple_of(1 << SLOT_SHIFT);
        known.then_some(offset >> SLOT_SHIFT)
    }

    /// What belongs to slot `index`, which is below the count.
    #[inline(always)]
    pub fn bound(&self, index: usize) -> Bound {
        let area = self.data_base.load(Ordering::Relaxed) + (index << (self.data_shift.load(Ordering::Relaxed) & 63));
        let shadow_top = match self.shadow_span.load(Ordering::Relaxed) {
            0 => 0,
            span => {
                let distance = index << (self.shadow_shift.load(Ordering::Relaxed) & 63);
                self.shadow_base.load(Ordering::Relaxed) + distance + span
            }
        };
        Bound {
            base: area + self.guard.load(Ordering::Relaxed) as usize,
            top: area + self.data_span.load(Ordering::Relaxed),
            shadow_top,
            identity: self.identity_base.load(Ordering::Relaxed) + index as u64,
            class: self.class.load(Ordering::Relaxed),
        }
    }
}

impl Entry {
    /// How many slots it has.
    pub fn count(&self) -> usize {
        self.slots_bytes >> SLOT_SHIFT
    }

    /// Address of slot `index`.
    pub fn slot(&self, index: usize) -> NonNull<Slot> {
        let address = self.slots_base + (index << SLOT_SHIFT);
        NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
    }

    /// Whether the slots of the two share a byte. A released chunk's slot is still its own.
    fn shares_slots(&self, other: &Entry) -> bool {
        let end = |entry: &Entry| match entry.class {
            CLASS_RETIRED => entry.slots_base + size_of::<Slot>(),
            _ => entry.slots_base + entry.slots_bytes,
        };
        self.slots_base < end(other) && other.slots_base < end(self)
    }
}

/// Where entry `index` lies, `None` beyond the directory's end.
#[inline(always)]
pub(crate) fn place_of(index: usize) -> Option<&'static Place> {
    let (base, entries) = published::directory();
    // SAFETY: the read-only page says that this many entries can be read there, for the life of the process; atomics may change.
    (index < entries).then(|| unsafe { &*std::ptr::with_exposed_provenance::<Place>(base).add(index) })
}

/// Entry `index`, `None` beyond the directory's end.
pub(crate) fn entry(index: usize) -> Option<Entry> {
    place_of(index).map(Place::entry)
}

/// A slot that the directory knows.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    place: &'static Place,
    index: usize,
}

impl Known {
    /// [`Entry::class`]
    #[inline(always)]
    pub fn class(&self) -> u8 {
        self.place.class.load(Ordering::Relaxed)
    }

    /// Everything that belongs to it.
    #[inline(always)]
    pub fn bound(&self) -> Bound {
        self.place.bound(self.index)
    }
}

/// The slot at `address` that names chunk `chunk`, `None` when the directory knows no such slot.
#[inline(always)]
pub(crate) fn known(address: usize, chunk: u32) -> Option<Known> {
    let place = place_of(chunk as usize)?;
    place.index_of(address).map(|index| Known { place, index })
}

/// Finds the slot at an address of which nothing is known: looks at every entry, and at no memory of the slot.
pub(crate) fn find(address: usize) -> Option<Known> {
    chunks().find_map(|(chunk, _)| known(address, chunk))
}

/// Finds the slot whose data area an address lies in.
pub(crate) fn slot_of_stack(address: usize) -> Option<NonNull<Slot>> {
    chunks().find_map(|(_, entry)| {
        let offset = address.checked_sub(entry.data_base)?;
        let index = offset >> (entry.data_shift & 63);
        let inside = index < entry.count() && offset - (index << (entry.data_shift & 63)) < entry.data_span;
        inside.then(|| entry.slot(index))
    })
}

/// All chunks there are.
pub(crate) fn chunks() -> impl Iterator<Item = (u32, Entry)> {
    let (_, entries) = published::directory();
    (0..entries as u32)
        .filter_map(|index| Some((index, entry(index as usize)?)))
        .filter(|(_, entry)| entry.slots_bytes != 0)
}

/// What is kept of the directory besides itself. Whoever rewrites it makes an update meet an entry that it must not replace.
struct Growth {
    /// Entries ever given out.
    used: usize,
    /// Entries of released chunks. Its capacity suffices for all that were given out.
    retired: Vec<u32>,
}

static GROWTH: Mutex<Growth> = Mutex::new(Growth { used: 0, retired: Vec::new() });

const WHAT: &str = "the chunk directory";

fn no_room() -> Error {
    Error::Memory { what: WHAT, bytes: ENTRY, errno: libc::ENOMEM }
}

fn rewritten(index: usize) -> ! {
    tamper::end(Tampered { evidence: "the chunk directory's bookkeeping was rewritten", slot: index })
}

/// Puts the entry of a new chunk into the directory and says at which index.
///
/// # Errors
/// [`Error::Memory`]: nothing was added.
pub(crate) fn publish(entry: Entry) -> Result<u32, Error> {
    let mut growth = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
    let index = growth.used;
    // Giving the index back must not fail later.
    let more = (index + 1).saturating_sub(growth.retired.len());
    if index >= MAXIMUM || growth.retired.try_reserve(more).is_err() {
        return Err(no_room());
    }
    // No slot may belong to two chunks, whatever the slots' memory was taken from.
    if self::entry(index).is_some_and(|old| old != Entry::default())
        || chunks_ever().any(|other| other.shares_slots(&entry))
    {
        rewritten(index);
    }
    place(index, entry)?;
    growth.used += 1;
    Ok(index as u32)
}

/// All entries that ever were.
fn chunks_ever() -> impl Iterator<Item = Entry> {
    let (_, entries) = published::directory();
    (0..entries).filter_map(entry).filter(|entry| entry.slots_base != 0)
}

/// Binds the slot of a released chunk again, if there is one: the entry has all but its slot.
///
/// # Errors
/// [`Error::Memory`]: the slot stays with the released ones.
pub(crate) fn publish_again(entry: Entry) -> Result<Option<u32>, Error> {
    let mut growth = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(&index) = growth.retired.last() else { return Ok(None) };
    let Some(old) = self::entry(index as usize).filter(|old| old.class == CLASS_RETIRED && old.slots_bytes == 0) else {
        rewritten(index as usize)
    };
    place(index as usize, Entry { slots_base: old.slots_base, slots_bytes: 1 << SLOT_SHIFT, ..entry })?;
    growth.retired.pop();
    Ok(Some(index))
}

/// Makes the entry of a chunk of one slot fit no slot. The chunk's stacks can be unmapped after that; its slot is remembered.
///
/// # Errors
/// [`Error::Memory`]: the entry is as it was.
pub(crate) fn retire(index: u32) -> Result<(), Error> {
    let mut growth = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(old) = entry(index as usize).filter(|old| old.count() == 1) else { rewritten(index as usize) };
    place(index as usize, Entry { slots_base: old.slots_base, class: CLASS_RETIRED, ..Entry::default() })?;
    growth.retired.push(index);
    Ok(())
}

/// Builds the page that holds entry `index` anew and puts it in place.
fn place(index: usize, entry: Entry) -> Result<(), Error> {
    let page = system::page_size();
    let (mut base, entries) = published::directory();
    if base == 0 {
        base = system::reserve(WHAT, MAXIMUM * ENTRY)?;
        published::set_directory(base, 0).inspect_err(|_| system::unmap(base, MAXIMUM * ENTRY))?;
    }
    let first = index & !(page / ENTRY - 1);
    let target = base + first * ENTRY;
    let meant = |position: usize| match first + position {
        position if position == index => entry,
        // Nothing beyond the end: all zero.
        position => self::entry(position).unwrap_or_default(),
    };
    let made = system::map(WHAT, page)?;
    let words = std::ptr::with_exposed_provenance_mut::<Entry>(made);
    for position in 0..page / ENTRY {
        // SAFETY: the page was just mapped, is writable, and has room for this many entries.
        unsafe { words.add(position).write_volatile(meant(position)) };
    }
    system::seal(WHAT, made, page)
        .and_then(|()| {
            for position in 0..page / ENTRY {
                // SAFETY: as above; nobody can write the page any more.
                if unsafe { words.add(position).read_volatile() } != meant(position) {
                    tamper::end(Tampered {
                        evidence: "the chunk directory was rewritten while it was made",
                        slot: words.addr() + position * ENTRY,
                    });
                }
            }
            // SAFETY: the target is a page of the range reserved for this, and its readers expect either content.
            unsafe { system::replace(WHAT, made, page, target) }
        })
        .inspect_err(|_| system::unmap(made, page))?;
    if index >= entries {
        // The page that was placed stays if this fails: nobody reads it, and the next attempt replaces it.
        published::set_directory(base, first + page / ENTRY)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_binds_each_slot_to_its_own_areas() {
        let entry = Entry {
            slots_base: 0x10_0000,
            slots_bytes: 3 << SLOT_SHIFT,
            data_base: 0x20_0000,
            data_span: 0x2000,
            shadow_base: 0x30_0000,
            shadow_span: 0x2000,
            data_shift: 13,
            shadow_shift: 13,
            class: 12,
            rest: 0,
            guard: 1 << 12,
            identity_base: 7,
        };
        // SAFETY: the two have the same layout, and atomics may hold any value.
        let place = unsafe { &*std::ptr::from_ref(&entry).cast::<Place>() };
        assert_eq!(place.entry(), entry);
        assert_eq!(place.index_of(entry.slots_base + 256), Some(2));
        for address in [0, 0x10_0000 - 128, 0x10_0000 + 384, 0x10_0000 + 64, 0x10_0000 + 1, usize::MAX] {
            assert_eq!(place.index_of(address), None, "{address:#x}");
        }
        let bound = place.bound(2);
        assert_eq!((bound.base, bound.top), (0x20_5000, 0x20_6000));
        assert_eq!((bound.shadow_top, bound.identity), (0x30_6000, 9));
    }

    #[test]
    fn entries_are_read_only_and_a_released_slot_comes_back_as_another_identity() {
        let slots = crate::slab::take_slots(1).unwrap();
        let entry = Entry { slots_base: slots, slots_bytes: 1 << SLOT_SHIFT, identity_base: 1, ..Entry::default() };
        let index = publish(entry).unwrap();
        assert_eq!(self::entry(index as usize), Some(entry));
        assert_eq!(find(slots).unwrap().bound().identity, 1);
        assert!(find(slots + 64).is_none());
        let place = std::ptr::from_ref(place_of(index as usize).unwrap()).addr();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let line = maps.lines().find(|line| {
            let (start, rest) = line.split_once('-').unwrap();
            let bound = |hex| usize::from_str_radix(hex, 16).unwrap();
            (bound(start)..bound(rest.split_once(' ').unwrap().0)).contains(&place)
        });
        assert!(line.is_none_or(|line| line.contains(" r--p ")), "{line:?}");
        retire(index).unwrap();
        assert!(find(slots).is_none() && known(slots, index).is_none());
    }
}
