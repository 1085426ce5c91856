//! Large segments: mapped so that their pages can move by page tables, and moved so.
//!
//! A page that moves is neither faulted in nor copied. The source stays mapped, without pages, so that nobody else's mapping comes to
//! lie there before the segment goes (`MREMAP_DONTUNMAP`, Linux 5.7); where the kernel cannot, the bytes are copied.

use super::{Segment, boxed, page_size};
use crate::abi::Record;
use crate::error::Error;
use crate::policy::Policy;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
use std::num::NonZeroUsize;

/// What one entry of a page table's second level spans with pages of 4 KiB: what can be one page, or move as one.
const HUGE: usize = 2 << 20;
/// A segment not more than so many times as large as the span that comes to lie in it is one that the stack has grown to.
const LIKELY: usize = 8;

impl Segment {
    /// Maps a segment that a span of so many bytes moves to, as [`Segment::map`] does. From the policy's `huge_pages` on its top is aligned to
    /// what a huge page spans, and the kernel is asked for huge pages, if the span shows that as much of it will be used.
    ///
    /// # Errors
    /// [`Error::Memory`] when the system refuses; nothing stays mapped.
    pub(crate) fn map_for(
        span: usize,
        size: usize,
        policy: &Policy,
        identity: u64,
        generation: u64,
    ) -> Result<Segment, Error> {
        let guard = policy.guard;
        let used = span.saturating_mul(LIKELY) >= size;
        if !cfg!(target_os = "linux") || !used || size < policy.huge_pages.max(HUGE) {
            return Segment::map(size, guard, identity, generation);
        }
        let failed = |errno: nix::Error| Error::Memory { what: "a data segment", bytes: size, errno: errno as i32 };
        let page = page_size();
        let more = HUGE + page;
        let wanted = size.checked_add(guard).and_then(|bytes| bytes.checked_add(more)).and_then(NonZeroUsize::new);
        let length = wanted.ok_or(failed(nix::Error::ENOMEM))?;
        let record = boxed("a segment's record", Record::default())?;
        // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
        let mapping = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)
        }
        .map_err(failed)?
        .cast::<u8>();
        // What lies above the top, but for the page there, stays inaccessible, as the guard does.
        let top = (mapping.as_ptr().expose_provenance() + length.get() - page) & !(HUGE - 1);
        let base = top - size;
        let mut segment = Segment { mapping, mapped: length.get(), record };
        // SAFETY: the range lies in the mapping made above, which nobody else knows yet: at least the guard and at most that and
        // `HUGE` bytes above its beginning, and so is the page above the top.
        unsafe {
            let usable = mapping.add(base - mapping.addr().get());
            mprotect(usable.cast(), size + page, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map_err(failed)?;
        }
        advise_huge(base, size + page);
        segment.seal(base, top, identity, generation);
        Ok(segment)
    }
}

/// Asks for huge pages in a range of the caller's own memory. A hint: kernels without them refuse it.
pub(crate) fn advise_huge(address: usize, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let end = (address + bytes) & !(page_size() - 1);
        let begin = address.next_multiple_of(page_size());
        if begin < end {
            // SAFETY: whole pages of the caller's memory; their contents stay as they are.
            unsafe {
                libc::madvise(std::ptr::with_exposed_provenance_mut(begin), end - begin, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (address, bytes);
}

/// Moves the pages from `low` to the source's top into the destination, to the same distance from its top, and says whether it did: else
/// nothing has changed. What was in the destination there is gone; the source reads as zero.
///
/// # Safety
/// Both records describe segments of one stack that [`Segment::map`] or [`Segment::map_for`] made, mapped and writable, and
/// nobody else uses them.
#[cfg(all(target_os = "linux", cfi_stack_native))]
pub(crate) unsafe fn move_pages(source: &Record, destination: &Record, low: usize) -> bool {
    let (from, to) = (source.extent(), destination.extent());
    let whole = (from.top | to.top).is_multiple_of(HUGE) && low & !(HUGE - 1) >= from.base && low < from.top;
    let granule = if whole { HUGE } else { page_size() };
    // SAFETY: the caller's; the stub takes the addresses from the records and bounds them by those.
    unsafe { crate::arch::remap(source, destination, low, granule) }
}

/// Pages cannot move here.
///
/// # Safety
/// None is needed.
#[cfg(not(all(target_os = "linux", cfi_stack_native)))]
pub(crate) unsafe fn move_pages(_: &Record, _: &Record, _: usize) -> bool {
    false
}
