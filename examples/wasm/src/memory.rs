//! Linear memories: 8 GiB of reserved addresses each, of which the first pages are accessible.
//!
//! An address is base + 32-bit index + 32-bit offset, so no access leaves the reservation: bounds need no check, the
//! fault handler turns a fault inside the reservation into a trap. The base is a multiple of 4 GiB and never moves,
//! so it is a constant of the code, one instruction long.

use crate::error::Error;
use std::cell::Cell;
use std::ops::Range;
use std::ptr;

/// A WebAssembly page.
pub const PAGE: usize = 64 << 10;
/// Most pages of a 32-bit memory.
pub const MAX_PAGES: u64 = 65536;
const ALIGN: usize = 4 << 30;
/// Every index plus every offset plus the widest access.
const RESERVED: usize = (8 << 30) + PAGE;

/// One memory.
pub struct Memory {
    map: *mut u8,
    map_len: usize,
    base: *mut u8,
    pages: Cell<u64>,
    maximum: Option<u64>,
}

impl Memory {
    /// Reserves a memory of `minimum` pages that may grow to `maximum`.
    ///
    /// # Errors
    /// [`Error::System`] when the system refuses.
    pub fn new(minimum: u64, maximum: Option<u64>) -> Result<Memory, Error> {
        let map_len = RESERVED + ALIGN;
        // SAFETY: a fresh anonymous mapping at an address of the system's choice touches nothing that exists.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                map_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(Error::System(format!("no addresses for a memory ({map_len} bytes): {error}")));
        }
        let map = map.cast::<u8>();
        let base = map.wrapping_add(map.addr().wrapping_neg() % ALIGN);
        let memory = Memory { map, map_len, base, pages: Cell::new(0), maximum };
        match memory.grow(minimum) {
            Some(_) => Ok(memory),
            None => Err(Error::System(format!("no memory for {minimum} pages of 64 KiB"))),
        }
    }

    /// Address of the first byte.
    pub fn base(&self) -> usize {
        self.base.expose_provenance()
    }

    /// Where managed code reads the present number of pages.
    pub fn pages_address(&self) -> usize {
        ptr::from_ref(&self.pages).expose_provenance()
    }

    /// Present number of pages.
    pub fn pages(&self) -> u64 {
        self.pages.get()
    }

    /// Most pages.
    pub fn maximum(&self) -> Option<u64> {
        self.maximum
    }

    /// All addresses that an access through this memory can have.
    pub fn reservation(&self) -> Range<usize> {
        self.base.addr()..self.base.addr() + RESERVED
    }

    /// Adds pages; the former number of pages, or `None` when there may not be so many.
    pub fn grow(&self, by: u64) -> Option<u64> {
        let old = self.pages.get();
        let new = old.checked_add(by).filter(|new| *new <= self.maximum.unwrap_or(MAX_PAGES).min(MAX_PAGES))?;
        if by > 0 {
            let start = self.base.wrapping_add(old as usize * PAGE);
            // SAFETY: `new` pages lie inside the reservation, which this memory owns.
            let done = unsafe { libc::mprotect(start.cast(), by as usize * PAGE, libc::PROT_READ | libc::PROT_WRITE) };
            if done != 0 {
                return None;
            }
        }
        self.pages.set(new);
        Some(old)
    }

    /// The bytes at `start`, if they all exist.
    fn span(&self, start: u64, len: u64) -> Option<*mut u8> {
        let end = start.checked_add(len)?;
        (end <= self.pages.get() * PAGE as u64).then(|| self.base.wrapping_add(start as usize))
    }

    /// Copies bytes into the memory; `None` when they do not fit.
    pub fn write(&self, start: u64, bytes: &[u8]) -> Option<()> {
        let to = self.span(start, bytes.len() as u64)?;
        // SAFETY: `span` found the destination accessible; a slice of the host's cannot overlap the reservation.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Some(())
    }

    /// Copies bytes out of the memory; `None` when they do not exist.
    pub fn read(&self, start: u64, len: u64) -> Option<Vec<u8>> {
        let from = self.span(start, len)?;
        let mut bytes = vec![0; len as usize];
        // SAFETY: `span` found the source accessible; the fresh vector has `len` bytes.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Some(bytes)
    }

    /// Reads a little-endian word.
    pub fn read_u32(&self, start: u64) -> Option<u32> {
        let bytes = self.read(start, 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// `memory.fill`.
    pub fn fill(&self, start: u64, byte: u8, len: u64) -> Option<()> {
        let to = self.span(start, len)?;
        // SAFETY: `span` found the destination accessible.
        unsafe { ptr::write_bytes(to, byte, len as usize) };
        Some(())
    }

    /// `memory.copy`, from another memory or this one.
    pub fn copy(&self, start: u64, from: &Memory, source: u64, len: u64) -> Option<()> {
        let source = from.span(source, len)?;
        let to = self.span(start, len)?;
        // SAFETY: `span` found both accessible; `copy` allows them to overlap.
        unsafe { ptr::copy(source, to, len as usize) };
        Some(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this memory's own; code that has its address as a constant goes with the same store.
        unsafe { libc::munmap(self.map.cast(), self.map_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_maximum() {
        let memory = Memory::new(1, Some(2)).expect("addresses");
        assert_eq!(memory.base() % ALIGN, 0);
        assert_eq!(memory.grow(1), Some(1));
        assert_eq!(memory.grow(1), None);
        assert_eq!(memory.grow(u64::MAX), None);
        assert_eq!(memory.pages(), 2);
    }

    #[test]
    fn bounds_hold() {
        let memory = Memory::new(1, None).expect("addresses");
        let size = PAGE as u64;
        assert_eq!(memory.write(size - 2, &[1, 2]), Some(()));
        assert_eq!(memory.write(size - 1, &[1, 2]), None);
        assert_eq!(memory.write(u64::MAX, &[1]), None);
        assert_eq!(memory.fill(size, 0, 0), Some(()));
        assert_eq!(memory.copy(0, &memory, size - 2, 2), Some(()));
        assert_eq!(memory.read(0, 2), Some(vec![1, 2]));
        assert_eq!(memory.read(size, 1), None);
    }
}
