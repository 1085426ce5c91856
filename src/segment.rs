//! Data segments: a block of stack memory with an inaccessible guard below it, and its sealed record.
//!
//! ```text
//!  mapping            base                                   top
//!  | guard, no access | usable, grows down from top          | a page that nobody touches |
//! ```
//! The oldest frame ends at the top. A debugger that goes by frame records reads the word behind each frame, and lldb takes one behind which
//! nothing can be read for no frame: hence the page. It takes addresses, not memory.

pub(crate) mod remap;

use crate::abi::Record;
use crate::error::Error;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::alloc::{Layout, alloc};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

/// Size of a page, in bytes.
pub fn page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// A value on the heap, where `Box::new` would end the process when there is no memory.
///
/// # Errors
/// [`Error::Memory`]; the value is dropped.
pub(crate) fn boxed<T>(what: &'static str, value: T) -> Result<Box<T>, Error> {
    const { assert!(size_of::<T>() != 0) };
    let layout = Layout::new::<T>();
    // SAFETY: the layout's size is not 0.
    let place = unsafe { alloc(layout) }.cast::<T>();
    if place.is_null() {
        return Err(Error::Memory { what, bytes: layout.size(), errno: libc::ENOMEM });
    }
    // SAFETY: the memory is fresh and has the value's layout, and the global allocator gave it, as a box's.
    unsafe {
        place.write(value);
        Ok(Box::from_raw(place))
    }
}

/// An owned data segment. Dropping it unmaps it.
#[derive(Debug)]
pub struct Segment {
    mapping: NonNull<u8>,
    mapped: usize,
    /// Down to where the system was asked for pages ahead; 0 where it is not asked for more.
    provided: usize,
    /// Boxed: the seal is bound to the record's address, and stubs hold pointers to it.
    record: Box<Record>,
}

impl Segment {
    /// Maps `size` usable bytes above `guard` inaccessible ones; both multiples of the page size.
    ///
    /// # Errors
    /// [`Error::Memory`] when the system refuses; nothing stays mapped.
    pub fn map(size: usize, guard: usize, identity: u64, generation: u64) -> Result<Segment, Error> {
        Segment::map_near(None, size, guard, identity, generation)
    }

    /// The same at an address above `floor`, where the system has one free among those that are tried.
    ///
    /// # Errors
    /// As [`Segment::map`], and when all are taken.
    #[cfg(cfi_stack_native)]
    pub(crate) fn map_above(
        size: usize,
        guard: usize,
        identity: u64,
        generation: u64,
        floor: usize,
    ) -> Result<Segment, Error> {
        /// The distances that are tried, as powers of two.
        const DISTANCES: std::ops::Range<u32> = 12..45;
        let mut refused = Error::Memory { what: "a data segment above another", bytes: size, errno: libc::ENOMEM };
        for distance in DISTANCES {
            let near = floor.saturating_add(1 << distance).next_multiple_of(page_size());
            match Segment::map_near(NonZeroUsize::new(near), size, guard, identity, generation) {
                Ok(segment) if segment.record.base >= floor => return Ok(segment),
                // The system has gone elsewhere.
                Ok(_) => {}
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    fn map_near(
        near: Option<NonZeroUsize>,
        size: usize,
        guard: usize,
        identity: u64,
        generation: u64,
    ) -> Result<Segment, Error> {
        let failed = |errno: nix::Error| Error::Memory { what: "a data segment", bytes: size, errno: errno as i32 };
        let page = page_size();
        let mapped =
            size.checked_add(guard).and_then(|bytes| bytes.checked_add(page)).ok_or(failed(nix::Error::ENOMEM))?;
        let length = NonZeroUsize::new(mapped).ok_or(failed(nix::Error::EINVAL))?;
        let record = boxed("a segment's record", Record::default())?;
        // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
        let mapping = unsafe {
            mmap_anonymous(near, length, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)
        }
        .map_err(failed)?
        .cast::<u8>();
        let base = mapping.as_ptr().expose_provenance() + guard;
        let mut segment = Segment { mapping, mapped, provided: 0, record };
        // SAFETY: the range is the upper part of the mapping made above, which nobody else knows yet.
        unsafe {
            // One protection for both is one mapping of the system's.
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            mprotect(mapping.add(guard).cast(), size + page, access).map_err(failed)?;
        }
        segment.seal(base, base + size, identity, generation);
        Ok(segment)
    }

    #[cfg(cfi_stack_native)]
    fn seal(&mut self, base: usize, top: usize, identity: u64, generation: u64) {
        crate::arch::seal_record(&mut self.record, base, top, identity, generation);
    }

    #[cfg(not(cfi_stack_native))]
    fn seal(&mut self, base: usize, top: usize, identity: u64, generation: u64) {
        *self.record = Record { base, top, identity, generation, ..Record::default() };
    }

    /// The sealed record.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// The record, for the words of it that are not sealed.
    #[cfg(cfi_stack_native)]
    pub(crate) fn record_mut(&mut self) -> &mut Record {
        &mut self.record
    }

    /// Seals the record anew for another generation.
    #[cfg(cfi_stack_native)]
    pub(crate) fn reseal(&mut self, generation: u64) {
        crate::arch::reseal_record(&mut self.record, generation);
    }

    /// Has the system provide the pages of the highest `bytes` at once.
    pub(crate) fn populate(&self, bytes: usize) {
        let begin = self.record.top.saturating_sub(bytes) & !(page_size() - 1);
        if bytes >= 4 * page_size() && begin >= self.record.base {
            remap::populate(begin, self.record.top);
        }
    }

    /// Takes all access away, so that a stale pointer into the segment faults.
    pub(crate) fn poison(&self) -> Result<(), Error> {
        // SAFETY: the mapping is owned by self; the caller has moved every frame out of it.
        unsafe { mprotect(self.mapping.cast(), self.mapped, ProtFlags::PROT_NONE) }.map_err(|errno| Error::Memory {
            what: "poisoning a segment",
            bytes: self.mapped,
            errno: errno as i32,
        })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map`, is owned by self, and no frame is left in it. The result is not
        // looked at: munmap of an own whole mapping fails for no other reason than a wrong address.
        let _ = unsafe { munmap(self.mapping.cast(), self.mapped) };
    }
}

/// A word of a stack, which another thread may be writing.
///
/// # Safety
/// `address` is 8-byte aligned and mapped readable.
pub(crate) unsafe fn read_word(address: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe { std::ptr::with_exposed_provenance::<u64>(address).read_volatile() }
}

/// Puts a word into a stack that is being made.
///
/// # Safety
/// `address` is 8-byte aligned, mapped writable and not referenced by Rust.
pub(crate) unsafe fn write_word(address: usize, word: u64) {
    // SAFETY: the caller's.
    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(word) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_writes_and_unmaps() {
        let page = page_size();
        let segment = Segment::map(page, page, 7, 1).unwrap();
        let record = segment.record();
        assert_eq!(record.size(), page);
        assert!(record.top.is_multiple_of(16));
        // SAFETY: the word lies in the segment just mapped.
        unsafe { std::ptr::with_exposed_provenance_mut::<u64>(record.top - 8).write_volatile(42) };
        assert!(record.holds(record.base, page));
        assert!(!record.holds(record.base, page + 1));
        assert!(!record.holds(record.base - 1, 1));
        assert!(!record.holds(record.top, 1));
        // SAFETY: the page above is part of the mapping.
        assert_eq!(unsafe { read_word(record.top) }, 0, "what debuggers read behind the oldest frame");
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for size in [usize::MAX & !4095, 1 << 60] {
            assert!(matches!(Segment::map(size, 4096, 1, 1), Err(Error::Memory { .. })));
        }
    }
}
