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
/// Segments from this size on get pages ahead of the stack pointer.
const AHEAD_FROM: usize = 256 << 10;
/// How much ahead: one part of the stack in so many, within these bounds.
const AHEAD_PART: usize = 16;
const AHEAD_LEAST: usize = 64 << 10;
const AHEAD_MOST: usize = 1 << 20;
/// A segment not more than so many times as large as the span that comes to lie in it is one that the stack has grown to.
const LIKELY: usize = 16;

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
        let mut segment = Segment { mapping, mapped: length.get(), provided: 0, record };
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

#[cfg_attr(not(cfi_stack_native), allow(dead_code, reason = "there are no stacks here"))]
impl Segment {
    /// The lowest address that managed code may reach before it asks for more: pages are there, or come one by one.
    pub(crate) fn provided(&self) -> usize {
        self.record.base.max(self.provided)
    }

    /// Asks for pages ahead in a segment that frames have just been moved to: `span` bytes at its top are theirs and `needed` will be used now.
    pub(crate) fn provide_behind(&mut self, span: usize, needed: usize) {
        if cfg!(target_os = "linux") && self.record.size() >= AHEAD_FROM {
            self.provided = self.record.top.saturating_sub(span);
            self.provide(needed);
        }
    }

    /// Asks for pages ahead, a stretch at a time, if `needed` bytes below the top reach beyond what was provided. Says whether they do. A fault
    /// for each page would cost more; what lies unused is at most the stretch.
    pub(crate) fn provide(&mut self, needed: usize) -> bool {
        let (base, top) = (self.record.base, self.record.top);
        let lowest = top.saturating_sub(needed);
        if self.provided == 0 || lowest >= self.provided {
            return false;
        }
        let stretch = (needed / AHEAD_PART).clamp(AHEAD_LEAST, AHEAD_MOST);
        let begin = (lowest.saturating_sub(stretch) & !(page_size() - 1)).max(base);
        // Of a frame that is larger than that, the part which the next frames lie below.
        let end = self.provided.min(lowest.saturating_add(stretch)).next_multiple_of(page_size()).min(top);
        let more = begin > base && begin < end && populate(begin, end);
        self.provided = if more { begin } else { 0 };
        true
    }
}

/// Has the system provide the pages of a range of the caller's own memory at once, which is cheaper than a fault for each. A hint: where it
/// is refused (Linux before 5.14, no memory) they come one by one. Says whether it was followed.
pub(crate) fn populate(begin: usize, end: usize) -> bool {
    #[cfg(target_os = "linux")]
    {
        /// `MADV_POPULATE_WRITE`
        const POPULATE_WRITE: libc::c_int = 23;
        // SAFETY: the caller's memory; its contents stay as they are.
        unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(begin), end - begin, POPULATE_WRITE) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (begin, end);
        false
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

/// Whether the stub moves pages in this process: where records are sealed, or nothing is defended.
#[cfg(all(target_os = "linux", cfi_stack_native))]
pub(crate) fn moves_pages() -> bool {
    use crate::published;
    let mode = published::mode();
    #[cfg(target_arch = "aarch64")]
    let sealed = mode & published::MODE_PACGA != 0;
    #[cfg(not(target_arch = "aarch64"))]
    let sealed = false;
    sealed || mode & (published::MODE_PAC | published::MODE_SHADOW) == 0
}

/// Pages cannot move here.
#[cfg(all(not(target_os = "linux"), cfi_stack_native))]
pub(crate) fn moves_pages() -> bool {
    false
}

/// Signals whose handlers can wait, held back until this is dropped. While pages have moved and nothing leads to them yet, a handler that walks the
/// stack would find zeroes where frames were, and with FEAT_FPAC an unwinder that authenticates them faults.
#[cfg(all(target_os = "linux", cfi_stack_native))]
pub(crate) struct Held {
    before: libc::sigset_t,
}

#[cfg(all(target_os = "linux", cfi_stack_native))]
impl Held {
    pub(crate) fn new() -> Held {
        /// Faults are the thread's own: held back, they end the process without a word.
        const FAULTS: [libc::c_int; 7] =
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGTRAP, libc::SIGFPE, libc::SIGSYS, libc::SIGABRT];
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the first call fills `all`; the last reads it and fills `before`, for which zero is a valid value too. With these arguments
        // none of them fails.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            for fault in FAULTS {
                libc::sigdelset(all.as_mut_ptr(), fault);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
            Held { before: before.assume_init() }
        }
    }
}

#[cfg(all(target_os = "linux", cfi_stack_native))]
impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: sets what `new` has found.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) };
    }
}

/// No pages move here.
#[cfg(all(not(target_os = "linux"), cfi_stack_native))]
pub(crate) struct Held;

#[cfg(all(not(target_os = "linux"), cfi_stack_native))]
impl Held {
    pub(crate) fn new() -> Held {
        Held
    }
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Bytes of a segment that have pages.
    fn resident(segment: &Segment) -> usize {
        let (base, size, page) = (segment.record.base, segment.record.size(), page_size());
        let mut pages = vec![0_u8; size / page];
        // SAFETY: whole pages of the segment, and a byte for each.
        let result = unsafe { libc::mincore(std::ptr::with_exposed_provenance_mut(base), size, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|&&page| page & 1 == 1).count() * page
    }

    /// Without huge pages, of which a system that gives them unasked brings 2 MiB for each touch. One that has none refuses the hint.
    fn segment(size: usize) -> Segment {
        let segment = Segment::map(size, page_size(), 7, 1).unwrap();
        // SAFETY: whole pages of the segment; their contents stay as they are.
        unsafe {
            libc::madvise(std::ptr::with_exposed_provenance_mut(segment.record.base), size, libc::MADV_NOHUGEPAGE);
        }
        segment
    }

    #[test]
    fn no_more_than_a_stretch_lies_ahead() {
        let (span, bounds) = (600 << 10, AHEAD_LEAST..=AHEAD_LEAST + 2 * page_size());
        let mut grown = segment(4 << 20);
        grown.provide_behind(span, span + 1024);
        if grown.provided() == grown.record.base {
            return; // A system that cannot.
        }
        assert!(bounds.contains(&resident(&grown)), "{}", resident(&grown));
        let room = grown.record.top - grown.provided();
        assert!(!grown.provide(room));
        assert!(grown.provide(room + 16));
        assert!(grown.record.top - grown.provided() >= room + 16);
        assert!(resident(&grown) <= 2 * bounds.end());
        // A frame as large as half of the segment: what is above its lowest part may never be touched.
        let before = resident(&grown);
        assert!(grown.provide(3 << 20));
        assert!(grown.record.top - grown.provided() >= 3 << 20);
        assert!(resident(&grown) - before <= 2 * (3 << 20) / AHEAD_PART + 2 * page_size());
        // To the end: nothing is held back any more.
        let size = grown.record.size();
        assert!(grown.provide(size));
        assert_eq!(grown.provided(), grown.record.base);
        assert!(!grown.provide(size) && resident(&grown) < size);
    }

    #[test]
    fn small_segments_and_first_ones_get_none_ahead() {
        let mut small = segment(AHEAD_FROM / 2);
        small.provide_behind(AHEAD_FROM / 4, AHEAD_FROM / 4 + 1024);
        let mut first = segment(1 << 20);
        assert!(!first.provide(1 << 19));
        for segment in [small, first] {
            assert_eq!((segment.provided(), resident(&segment)), (segment.record.base, 0));
        }
    }
}
