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
//! place. An entry is never removed; that of a released chunk is all zero and fits no slot.

use crate::abi::Slot;
use crate::error::Error;
use crate::pac::Tampered;
use crate::{published, system, tamper};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// Bytes of an entry.
pub(crate) const ENTRY: usize = size_of::<Entry>();
/// Entries that there is room for: 16 MiB of addresses.
const MAXIMUM: usize = 1 << 18;
/// [`Entry::class`] of a mapping of its own, larger than every slab class.
pub(crate) const CLASS_LARGE: u8 = 0x40;
/// [`Entry::class`] of a data area that belongs to the caller.
pub(crate) const CLASS_BARE: u8 = 0x80;

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
    /// Logarithm of the usable bytes of a slab class; [`CLASS_LARGE`] or [`CLASS_BARE`] else. The stubs do not look at it.
    pub class: u8,
    /// Logarithm of the guard's bytes; 0 without a guard. The stubs do not look at it.
    pub guard_shift: u8,
    pub rest: [u8; 4],
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

impl Entry {
    /// How many slots it has.
    pub fn count(&self) -> usize {
        self.slots_bytes >> SLOT_SHIFT
    }

    /// What belongs to slot `index`, which is below the count.
    #[inline]
    pub fn bound(&self, index: usize) -> Bound {
        let area = self.data_base + (index << self.data_shift);
        let guard = if self.guard_shift == 0 { 0 } else { 1 << self.guard_shift };
        let shadow_top = match self.shadow_span {
            0 => 0,
            span => self.shadow_base + (index << self.shadow_shift) + span,
        };
        Bound {
            base: area + guard,
            top: area + self.data_span,
            shadow_top,
            identity: self.identity_base + index as u64,
            class: self.class,
        }
    }

    /// Address of slot `index`.
    pub fn slot(&self, index: usize) -> NonNull<Slot> {
        let address = self.slots_base + (index << SLOT_SHIFT);
        NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
    }

    /// The index of the slot at `address`, if one begins there.
    #[inline]
    pub fn index_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.slots_base);
        (offset < self.slots_bytes && offset.is_multiple_of(1 << SLOT_SHIFT)).then_some(offset >> SLOT_SHIFT)
    }
}

/// Entry `index` as it is now, `None` beyond the directory's end.
#[inline]
pub(crate) fn entry(index: usize) -> Option<Entry> {
    let (base, entries) = published::directory();
    if index >= entries {
        return None;
    }
    // SAFETY: the page says that this many entries can be read at its address, for ever. Volatile: a page with new entries may take
    // its place meanwhile.
    Some(unsafe { std::ptr::with_exposed_provenance::<Entry>(base).add(index).read_volatile() })
}

/// What the directory says of the slot at `address` that names chunk `chunk`, `None` when it knows no such slot.
#[inline]
pub(crate) fn bound(address: usize, chunk: u32) -> Option<Bound> {
    let entry = entry(chunk as usize)?;
    entry.index_of(address).map(|index| entry.bound(index))
}

/// Finds the slot at an address of which nothing is known: looks at every entry, and at no memory of the slot.
pub(crate) fn find(address: usize) -> Option<(usize, usize)> {
    let (_, entries) = published::directory();
    (0..entries).find_map(|chunk| Some((chunk, entry(chunk)?.index_of(address)?)))
}

/// What is kept of the directory besides itself. An attacker who changes it makes updates go wrong, which [`place`] sees.
struct Growth {
    /// Address of the reserved range; 0 before the first entry.
    base: usize,
    /// Entries that the placed pages have.
    entries: usize,
    /// Entries ever given out.
    used: usize,
    /// Entries that were given back.
    retired: Vec<u32>,
}

static GROWTH: Mutex<Growth> = Mutex::new(Growth { base: 0, entries: 0, used: 0, retired: Vec::new() });

fn no_room(what: &'static str) -> Error {
    Error::Memory { what, bytes: ENTRY, errno: libc::ENOMEM }
}

/// Puts an entry into the directory and says at which index.
///
/// # Errors
/// [`Error::Memory`]: nothing was added.
pub(crate) fn publish(entry: Entry) -> Result<u32, Error> {
    let mut growth = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
    // Room to give the index back, so that this cannot fail later.
    let used = growth.used;
    if growth.retired.try_reserve(used + 1).is_err() {
        return Err(no_room("the chunk directory's bookkeeping"));
    }
    if let Some(&index) = growth.retired.last() {
        place(&mut growth, index as usize, entry)?;
        growth.retired.pop();
        return Ok(index);
    }
    if used == MAXIMUM {
        return Err(no_room("the chunk directory"));
    }
    place(&mut growth, used, entry)?;
    growth.used += 1;
    Ok(used as u32)
}

/// Makes an entry fit no slot. The chunk's memory can be unmapped after that.
///
/// # Errors
/// [`Error::Memory`]: the entry is as it was.
pub(crate) fn retire(index: u32) -> Result<(), Error> {
    let mut growth = GROWTH.lock().unwrap_or_else(PoisonError::into_inner);
    place(&mut growth, index as usize, Entry::default())?;
    growth.retired.push(index);
    Ok(())
}

/// Builds the page that holds entry `index` anew and puts it in place.
fn place(growth: &mut Growth, index: usize, entry: Entry) -> Result<(), Error> {
    const WHAT: &str = "the chunk directory";
    let page = system::page_size();
    if growth.base == 0 {
        growth.base = system::reserve(WHAT, MAXIMUM * ENTRY, 0)?;
    }
    let first = index & !(page / ENTRY - 1);
    let target = growth.base + first * ENTRY;
    let exists = first < growth.entries;
    let meant = |position: usize| match exists {
        _ if first + position == index => entry,
        // SAFETY: pages up to `entries` are in place and readable for ever; volatile, as in `entry`.
        true => unsafe { std::ptr::with_exposed_provenance::<Entry>(target).add(position).read_volatile() },
        false => Entry::default(),
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
    if !exists {
        let entries = first + page / ENTRY;
        // The page that was placed stays if this fails: nobody reads it, and the next attempt replaces it.
        published::set_directory(growth.base, entries)?;
        growth.entries = entries;
    }
    Ok(())
}
