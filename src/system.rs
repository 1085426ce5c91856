//! What the pools ask of the operating system, call by call: each can be made to fail by a test.

use crate::error::Error;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// Size of a page, in bytes.
#[inline(always)]
pub(crate) fn page_size() -> usize {
    1 << page_shift()
}

/// Its logarithm.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[inline(always)]
pub(crate) fn page_shift() -> u32 {
    12
}

/// Its logarithm.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[inline(always)]
pub(crate) fn page_shift() -> u32 {
    use std::sync::atomic::AtomicU32;
    static SHIFT: AtomicU32 = AtomicU32::new(0);
    #[cold]
    fn ask() -> u32 {
        let shift = crate::segment::page_size().trailing_zeros();
        SHIFT.store(shift, Ordering::Relaxed);
        shift
    }
    match SHIFT.load(Ordering::Relaxed) {
        0 => ask(),
        shift => shift,
    }
}

/// Guards that have cost a mapping, because the kernel has no cheaper ones: no access, or a hole below a shadow stack.
pub(crate) static GUARD_MAPPINGS: AtomicUsize = AtomicUsize::new(0);
/// Whether the kernel has guards that split no mapping, as far as is known.
static CHEAP_GUARDS: AtomicU8 = AtomicU8::new(if cfg!(target_os = "linux") { UNKNOWN } else { NO });
const UNKNOWN: u8 = 0;
#[cfg(target_os = "linux")]
const YES: u8 = 1;
const NO: u8 = 2;

/// `MADV_GUARD_INSTALL` (Linux 6.13).
#[cfg(target_os = "linux")]
const MADV_GUARD_INSTALL: libc::c_int = 102;

/// Failures that a test asks for, on its own thread alone.
#[cfg(any(test, feature = "steps"))]
pub(crate) mod injection {
    use std::cell::Cell;
    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Makes every call fail from the `n`th on, counted from 0; `None`: none.
    pub(crate) fn fail_from(n: Option<usize>) {
        LEFT.set(n);
    }

    pub(super) fn fails() -> bool {
        let left = LEFT.get();
        LEFT.set(left.map(|left| left.saturating_sub(1)));
        left == Some(0)
    }
}

#[cfg(not(any(test, feature = "steps")))]
mod injection {
    #[inline(always)]
    pub(super) fn fails() -> bool {
        false
    }
}

fn refused(what: &'static str, bytes: usize) -> Error {
    Error::Memory { what, bytes, errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM) }
}

fn injected(what: &'static str, bytes: usize) -> Result<(), Error> {
    if injection::fails() { Err(Error::Memory { what, bytes, errno: libc::ENOMEM }) } else { Ok(()) }
}

#[cfg(target_os = "linux")]
const NORESERVE: libc::c_int = libc::MAP_NORESERVE;
#[cfg(not(target_os = "linux"))]
const NORESERVE: libc::c_int = 0;

fn map_as(what: &'static str, bytes: usize, protection: libc::c_int) -> Result<usize, Error> {
    injected(what, bytes)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | NORESERVE;
    // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
    let made = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if made == libc::MAP_FAILED { Err(refused(what, bytes)) } else { Ok(made.expose_provenance()) }
}

/// Maps writable zeroed memory, which is not there before it is touched.
pub(crate) fn map(what: &'static str, bytes: usize) -> Result<usize, Error> {
    map_as(what, bytes, libc::PROT_READ | libc::PROT_WRITE)
}

/// Maps writable memory for stacks and slots: one touched page must not bring 2 MiB with it.
pub(crate) fn map_stacks(what: &'static str, bytes: usize) -> Result<usize, Error> {
    let made = map(what, bytes)?;
    #[cfg(target_os = "linux")]
    // SAFETY: advice on the mapping just made. Kernels without huge pages refuse it, and need none.
    unsafe {
        libc::madvise(std::ptr::with_exposed_provenance_mut(made), bytes, libc::MADV_NOHUGEPAGE);
    }
    Ok(made)
}

/// Reserves addresses.
pub(crate) fn reserve(what: &'static str, bytes: usize) -> Result<usize, Error> {
    map_as(what, bytes, libc::PROT_NONE)
}

/// Whether nothing is mapped in a range.
#[cfg(target_os = "linux")]
pub(crate) fn is_free(address: usize, bytes: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let wanted = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: maps where nothing is, or not at all.
    let made = unsafe { libc::mmap(wanted, bytes, libc::PROT_NONE, flags, -1, 0) };
    if made == libc::MAP_FAILED {
        return false;
    }
    unmap(made.expose_provenance(), bytes);
    made == wanted
}

/// Gives a whole range of mappings back. It fails only where a mapping would have to be split and there are too many.
pub(crate) fn unmap(address: usize, bytes: usize) {
    // SAFETY: the callers own the range and have no more use for it.
    unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(address), bytes) };
}

/// Takes write access away.
pub(crate) fn seal(what: &'static str, address: usize, bytes: usize) -> Result<(), Error> {
    injected(what, bytes)?;
    // SAFETY: the callers own the range and write it no more.
    match unsafe { libc::mprotect(std::ptr::with_exposed_provenance_mut(address), bytes, libc::PROT_READ) } {
        0 => Ok(()),
        _ => Err(refused(what, bytes)),
    }
}

/// Moves the read-only mapping at `made` over `target`.
///
/// # Safety
/// `target` is the caller's, of whole pages, and whoever reads it expects the new content as well.
#[cfg(target_os = "linux")]
pub(crate) unsafe fn replace(what: &'static str, made: usize, bytes: usize, target: usize) -> Result<(), Error> {
    injected(what, bytes)?;
    // SAFETY: the caller's.
    let placed = unsafe {
        libc::mremap(
            std::ptr::with_exposed_provenance_mut(made),
            bytes,
            bytes,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            std::ptr::with_exposed_provenance_mut::<libc::c_void>(target),
        )
    };
    if placed == libc::MAP_FAILED { Err(refused(what, bytes)) } else { Ok(()) }
}

/// Where pages cannot be moved the target is writable between two calls.
///
/// # Safety
/// `target` is the caller's, of whole pages, and whoever reads it expects the new content as well.
#[cfg(not(target_os = "linux"))]
pub(crate) unsafe fn replace(what: &'static str, made: usize, bytes: usize, target: usize) -> Result<(), Error> {
    injected(what, bytes)?;
    let place = std::ptr::with_exposed_provenance_mut::<u8>(target);
    // SAFETY: the caller's.
    unsafe {
        if libc::mprotect(place.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) != 0 {
            return Err(refused(what, bytes));
        }
        std::ptr::copy_nonoverlapping(std::ptr::with_exposed_provenance::<u8>(made), place, bytes);
        if libc::mprotect(place.cast(), bytes, libc::PROT_READ) != 0 {
            return Err(refused(what, bytes));
        }
    }
    unmap(made, bytes);
    Ok(())
}

/// Makes part of a mapping inaccessible: without splitting it where the kernel can.
pub(crate) fn guard(what: &'static str, address: usize, bytes: usize) -> Result<(), Error> {
    if cheap_guard(what, address, bytes)? {
        return Ok(());
    }
    injected(what, bytes)?;
    // SAFETY: the callers own the range, and nothing is in it.
    match unsafe { libc::mprotect(std::ptr::with_exposed_provenance_mut(address), bytes, libc::PROT_NONE) } {
        0 => {
            GUARD_MAPPINGS.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        _ => Err(refused(what, bytes)),
    }
}

/// The same, only where it splits nothing; says whether it did.
#[cfg(target_os = "linux")]
pub(crate) fn cheap_guard(what: &'static str, address: usize, bytes: usize) -> Result<bool, Error> {
    injected(what, bytes)?;
    if !cheap_guards() {
        return Ok(false);
    }
    let place = std::ptr::with_exposed_provenance_mut::<libc::c_void>(address);
    // SAFETY: the callers own the range, and nothing is in it.
    if unsafe { libc::madvise(place, bytes, MADV_GUARD_INSTALL) } == 0 {
        if CHEAP_GUARDS.load(Ordering::Relaxed) == UNKNOWN {
            CHEAP_GUARDS.store(if refuses(place) { YES } else { NO }, Ordering::Relaxed);
        }
        return Ok(cheap_guards());
    }
    let error = refused(what, bytes);
    if !matches!(error, Error::Memory { errno: libc::EINVAL, .. }) {
        return Err(error);
    }
    // Where it has worked before, this one mapping refuses it: one that is locked (`mlockall`).
    if CHEAP_GUARDS.load(Ordering::Relaxed) == UNKNOWN {
        CHEAP_GUARDS.store(NO, Ordering::Relaxed);
    }
    Ok(false)
}

/// Whether a page is really a guard. QEMU's user mode takes advice that it does not know for done.
#[cfg(target_os = "linux")]
fn refuses(page: *mut libc::c_void) -> bool {
    /// `MADV_POPULATE_READ` (Linux 5.14): EFAULT at a guard.
    const MADV_POPULATE_READ: libc::c_int = 22;
    // SAFETY: the page is the caller's.
    unsafe { libc::madvise(page, page_size(), MADV_POPULATE_READ) != 0 }
}

/// There are none here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn cheap_guard(what: &'static str, _: usize, bytes: usize) -> Result<bool, Error> {
    injected(what, bytes).map(|()| false)
}

/// Whether guards cost no mapping, as far as is known.
pub(crate) fn cheap_guards() -> bool {
    CHEAP_GUARDS.load(Ordering::Relaxed) != NO
}

/// Unmaps what has one guard, and counts that guard no more where guards cost a mapping.
pub(crate) fn unmap_guarded(address: usize, bytes: usize) {
    unmap(address, bytes);
    if !cheap_guards() {
        // Every guard was counted then. One of a locked mapping, where others are cheap, stays counted.
        let _ = GUARD_MAPPINGS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
    }
}

/// Puts something inaccessible in the place of part of a mapping of any kind.
pub(crate) fn make_inaccessible(what: &'static str, address: usize, bytes: usize) -> Result<(), Error> {
    injected(what, bytes)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED | NORESERVE;
    let place = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the callers own the range, and nothing is in it.
    if unsafe { libc::mmap(place, bytes, libc::PROT_NONE, flags, -1, 0) } == libc::MAP_FAILED {
        return Err(refused(what, bytes));
    }
    GUARD_MAPPINGS.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Gives the memory behind a range back; it reads as zero afterwards. A hint: where it is refused the memory stays.
pub(crate) fn decommit(address: usize, bytes: usize) {
    #[cfg(target_os = "linux")]
    const GIVE_BACK: libc::c_int = libc::MADV_DONTNEED;
    #[cfg(not(target_os = "linux"))]
    const GIVE_BACK: libc::c_int = libc::MADV_FREE;
    // SAFETY: the callers own the range and keep nothing in it.
    unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(address), bytes, GIVE_BACK) };
}

/// Maps a shadow stack with a token on top, at `address` exactly unless that is 0.
#[cfg(target_os = "linux")]
pub(crate) fn map_shadow(what: &'static str, address: usize, bytes: usize) -> Result<usize, Error> {
    /// `map_shadow_stack`, the same number on every architecture (Linux 6.6).
    const SYS_MAP_SHADOW_STACK: libc::c_long = 453;
    /// Put a token on top.
    const SHADOW_STACK_SET_TOKEN: libc::c_long = 1;
    injected(what, bytes)?;
    // SAFETY: the kernel takes no address that is in use (it maps with MAP_FIXED_NOREPLACE).
    let made = unsafe { libc::syscall(SYS_MAP_SHADOW_STACK, address, bytes, SHADOW_STACK_SET_TOKEN) };
    if made == -1 { Err(refused(what, bytes)) } else { Ok(made as usize) }
}

/// There are none here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn map_shadow(_: &'static str, _: usize, _: usize) -> Result<usize, Error> {
    Err(Error::Unsupported("shadow stacks"))
}
