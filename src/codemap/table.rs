//! The table that walks look frames up in: flat, sorted, in a mapping of its own that is read-only once built.
//!
//! ```text
//!  Header | Range × ranges, sorted by start | Site × sites, sorted by pc within a range | i32 × slots
//! ```
//! A new table is made from the old *table*, not from a writable master copy: what was published cannot be
//! changed by an attacker who waits for the next registration.

use super::{Found, FrameLayout, Function};
use crate::error::Error;
use crate::pac::{RawPc, Signing};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

#[repr(C)]
struct Header {
    /// Bytes of the mapping.
    mapped: usize,
    ranges: usize,
    sites: usize,
    slots: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: usize,
    end: usize,
    owner: u64,
    layout: FrameLayout,
    plain: bool,
    /// In the slots: pairs of a register's number and an offset.
    first_save: usize,
    saves: usize,
    first_site: usize,
    sites: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Site {
    pc: usize,
    frame_bytes: u32,
    registers: u32,
    first_slot: usize,
    slots: usize,
}

/// A finished table. Dropping it unmaps it.
#[derive(Debug)]
pub struct Table {
    header: NonNull<Header>,
}

// SAFETY: the mapping is never written after `build`.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// Builds a table of `kept`'s functions (those of the owners for which the filter says yes) and `added`.
    pub(super) fn build<'a>(
        kept: Option<(&Table, u64)>,
        added: impl Iterator<Item = &'a Function>,
        owner: u64,
    ) -> Result<Table, Error> {
        let mut ranges = Vec::new();
        let mut sites = Vec::new();
        let mut slots = Vec::new();
        if let Some((old, dropped)) = kept {
            for range in old.ranges().iter().filter(|range| range.owner != dropped) {
                let first_site = sites.len();
                for site in old.sites_of(range) {
                    sites.push(Site { first_slot: slots.len(), ..*site });
                    slots.extend_from_slice(old.slots_of(site));
                }
                let first_save = slots.len();
                slots.extend_from_slice(old.saves_of(range));
                ranges.push(Range { first_site, first_save, ..*range });
            }
        }
        for function in added {
            let first_site = sites.len();
            for (&pc, site) in &function.sites {
                let super::Site { frame_bytes, registers, .. } = *site;
                sites.push(Site { pc, frame_bytes, registers, first_slot: slots.len(), slots: site.slots.len() });
                slots.extend_from_slice(&site.slots);
            }
            let first_save = slots.len();
            slots.extend(function.saves.iter().flat_map(|&(register, offset)| [register.index() as i32, offset]));
            ranges.push(Range {
                start: function.start,
                end: function.end,
                owner,
                first_site,
                sites: function.sites.len(),
                layout: function.layout,
                plain: function.layout.is_plain() && function.saves.is_empty(),
                first_save,
                saves: slots.len() - first_save,
            });
        }
        ranges.sort_unstable_by_key(|range| range.start);
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(Error::Layout {
                start: RawPc::new(pair[1].start),
                rule: "the code range overlaps one that is published already",
            });
        }
        Table::write(&ranges, &sites, &slots)
    }

    fn write(ranges: &[Range], sites: &[Site], slots: &[i32]) -> Result<Table, Error> {
        let bytes = size_of::<Header>() + size_of_val(ranges) + size_of_val(sites) + size_of_val(slots);
        let mapped = bytes.next_multiple_of(crate::segment::page_size());
        let failed = |errno: nix::Error| Error::Memory { what: "the code map", bytes: mapped, errno: errno as i32 };
        let length = NonZeroUsize::new(mapped).ok_or(failed(nix::Error::EINVAL))?;
        // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
        let mapping = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .map_err(failed)?;
        let header = mapping.cast::<Header>();
        let table = Table { header };
        let head = Header { mapped, ranges: ranges.len(), sites: sites.len(), slots: slots.len() };
        // SAFETY: the mapping is fresh, writable, page-aligned and long enough for the four parts in this order;
        // each part's alignment divides the size of the part before it.
        unsafe {
            header.write(head);
            let at = header.add(1).cast::<Range>();
            at.copy_from_nonoverlapping(NonNull::from(ranges).cast(), ranges.len());
            let at = at.add(ranges.len()).cast::<Site>();
            at.copy_from_nonoverlapping(NonNull::from(sites).cast(), sites.len());
            let at = at.add(sites.len()).cast::<i32>();
            at.copy_from_nonoverlapping(NonNull::from(slots).cast(), slots.len());
            mprotect(mapping, mapped, ProtFlags::PROT_READ).map_err(failed)?;
        }
        Ok(table)
    }

    #[inline]
    fn header(&self) -> &Header {
        // SAFETY: `write` put a header there; the mapping lives as long as self and is read-only.
        unsafe { self.header.as_ref() }
    }

    #[inline]
    fn ranges(&self) -> &[Range] {
        // SAFETY: `write` put that many ranges behind the header; read-only for self's life.
        unsafe { std::slice::from_raw_parts(self.header.as_ptr().add(1).cast(), self.header().ranges) }
    }

    #[inline]
    fn sites(&self) -> &[Site] {
        // SAFETY: the sites follow the ranges; see `write`.
        unsafe { std::slice::from_raw_parts(self.ranges().as_ptr_range().end.cast(), self.header().sites) }
    }

    #[inline]
    fn slots(&self) -> &[i32] {
        // SAFETY: the slots follow the sites; see `write`.
        unsafe { std::slice::from_raw_parts(self.sites().as_ptr_range().end.cast(), self.header().slots) }
    }

    #[inline]
    fn sites_of(&self, range: &Range) -> &[Site] {
        self.sites().get(range.first_site..).and_then(|rest| rest.get(..range.sites)).unwrap_or_default()
    }

    #[inline]
    fn saves_of(&self, range: &Range) -> &[i32] {
        self.slots().get(range.first_save..).and_then(|rest| rest.get(..range.saves)).unwrap_or_default()
    }

    #[inline]
    fn slots_of(&self, site: &Site) -> &[i32] {
        self.slots().get(site.first_slot..).and_then(|rest| rest.get(..site.slots)).unwrap_or_default()
    }

    /// The function that a call with this return address stands in.
    pub fn find(&self, pc: RawPc) -> Option<Found<'_>> {
        Cursor::new(self).look_up(pc.address())
    }

    /// Whether the instruction at `pc` is managed code.
    pub fn runs(&self, pc: RawPc) -> bool {
        let ranges = self.ranges();
        let after = ranges.partition_point(|range| range.start <= pc.address());
        after.checked_sub(1).is_some_and(|index| pc.address() < ranges[index].end)
    }

    #[cfg(cfi_stack_native)]
    fn address(&self) -> usize {
        self.header.as_ptr().expose_provenance()
    }

    /// # Safety
    /// `address` is what [`Table::address`] said of a table that still lives.
    #[cfg(cfi_stack_native)]
    unsafe fn borrowed(address: usize) -> Option<std::mem::ManuallyDrop<Table>> {
        let header = NonNull::new(std::ptr::with_exposed_provenance_mut::<Header>(address))?;
        Some(std::mem::ManuallyDrop::new(Table { header }))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let mapped = self.header().mapped;
        // SAFETY: the mapping was made by `write` and is owned by self.
        let _ = unsafe { munmap(self.header.cast(), mapped) };
    }
}

/// How many return addresses a cursor remembers: a power of two.
const REMEMBERED: usize = 16;

/// Looks return addresses up, those that it has seen lately first: recursion comes back to the same calls.
pub struct Cursor<'a> {
    table: &'a Table,
    ranges: &'a [Range],
    /// By some of the return address' bits. A return address of 0 is nobody's.
    remembered: [(usize, Found<'a>); REMEMBERED],
}

impl<'a> Cursor<'a> {
    /// A cursor over `table`.
    pub fn new(table: &'a Table) -> Self {
        const NOTHING: &FrameLayout = &FrameLayout::new(0, Signing::None);
        let nothing = Found { layout: NOTHING, plain: false, frame_bytes: 0, registers: 0, slots: &[], saves: &[] };
        Cursor { table, ranges: table.ranges(), remembered: [(0, nothing); REMEMBERED] }
    }

    /// See [`Table::find`].
    #[inline]
    pub fn find(&mut self, pc: RawPc) -> Option<&Found<'a>> {
        let address = pc.address();
        // Neighbouring calls are a few instructions apart.
        let place = (address >> 2 ^ address >> 6) % REMEMBERED;
        if self.remembered[place].0 != address || address == 0 {
            self.remembered[place] = (address, self.look_up(address)?);
        }
        Some(&self.remembered[place].1)
    }

    #[cold]
    fn look_up(&self, address: usize) -> Option<Found<'a>> {
        let index = self.ranges.partition_point(|range| range.start < address).checked_sub(1)?;
        // A call can be a function's last instruction: a return address belongs to the range that it ends.
        let range = self.ranges.get(index).filter(|range| address <= range.end)?;
        let (layout, saves) = (&range.layout, self.table.saves_of(range));
        let sites = self.table.sites_of(range);
        let Ok(index) = sites.binary_search_by_key(&address, |site| site.pc) else {
            let frame_bytes = layout.frame_bytes;
            return Some(Found { layout, plain: range.plain, frame_bytes, registers: 0, slots: &[], saves });
        };
        let site = &sites[index];
        let Site { frame_bytes, registers, .. } = *site;
        let plain = range.plain && registers == 0;
        Some(Found { layout, plain, frame_bytes, registers, slots: self.table.slots_of(site), saves })
    }
}

#[cfg(cfi_stack_native)]
mod registry {
    use super::{Error, Function, Table};
    use crate::published;
    use std::sync::atomic::{AtomicUsize, Ordering, fence};
    use std::sync::{Mutex, PoisonError};

    struct Writer {
        next_owner: u64,
        /// Tables that a reader may still hold.
        retired: Vec<Table>,
    }

    static WRITER: Mutex<Writer> = Mutex::new(Writer { next_owner: 1, retired: Vec::new() });
    static READERS: AtomicUsize = AtomicUsize::new(0);

    /// Keeps the published table alive while it is read. Async-signal-safe.
    pub struct Reading(Option<std::mem::ManuallyDrop<Table>>);

    impl Reading {
        /// Counts a reader and reads the root.
        pub fn begin() -> Self {
            READERS.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            // SAFETY: the root holds 0 or the address of a live table: tables are retired only while no reader
            // is counted, and this reader was counted before the root was read.
            Reading(unsafe { Table::borrowed(published::root()) })
        }

        /// The published table, if anything was ever published.
        pub fn table(&self) -> Option<&Table> {
            self.0.as_deref()
        }
    }

    impl Drop for Reading {
        fn drop(&mut self) {
            READERS.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn replace(writer: &mut Writer, table: Table) -> Result<(), Error> {
        let old = published::root();
        published::set_root(table.address())?;
        std::mem::forget(table);
        fence(Ordering::SeqCst);
        // SAFETY: the old root is 0 or a live table that nobody can newly reach now.
        if let Some(old) = unsafe { Table::borrowed(old) } {
            writer.retired.push(std::mem::ManuallyDrop::into_inner(old));
        }
        if READERS.load(Ordering::SeqCst) == 0 {
            writer.retired.clear();
        }
        Ok(())
    }

    pub fn publish<'a>(added: impl Iterator<Item = &'a Function>) -> Result<u64, Error> {
        let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        let owner = writer.next_owner;
        let reading = Reading::begin();
        let built = Table::build(reading.table().map(|table| (table, 0)), added, owner);
        drop(reading);
        replace(&mut writer, built?)?;
        writer.next_owner += 1;
        Ok(owner)
    }

    pub fn withdraw(owner: u64) {
        let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = Reading::begin();
        let built = Table::build(reading.table().map(|table| (table, owner)), std::iter::empty(), owner);
        drop(reading);
        // Without memory for a smaller table the old one stays: the functions remain described, which is
        // harmless as long as their code is not reused; a later publication over the same range is refused.
        if let Ok(table) = built {
            let _ = replace(&mut writer, table);
        }
    }
}

#[cfg(cfi_stack_native)]
pub use registry::Reading;
#[cfg(cfi_stack_native)]
pub(super) use registry::{publish, withdraw};
