//! Shadow stacks (x86 SHSTK, arm64 GCS): mapped by the kernel with a token on top, and a guard below.
//!
//! ```text
//!  mapping                                            top
//!  | guard, no access | return addresses, grows down  |
//!                                       token at top − 8 while nothing runs on it
//! ```
//! Sources: Linux `Documentation/arch/x86/shstk.rst`, `Documentation/arch/arm64/gcs.rst`; Intel SDM vol. 1 ch. 17.2.

use crate::error::Error;

/// An owned shadow stack. Dropping it unmaps it.
#[derive(Debug)]
pub struct ShadowStack {
    mapping: usize,
    mapped: usize,
    guard: usize,
}

impl ShadowStack {
    /// Maps one with at least `room` bytes, and its guard.
    ///
    /// # Errors
    /// [`Error::Memory`] when the kernel refuses; nothing stays mapped. [`Error::Unsupported`] where there are none.
    pub fn map(room: usize) -> Result<ShadowStack, Error> {
        let page = crate::segment::page_size();
        let mapped = room
            .checked_next_multiple_of(page)
            .and_then(|room| room.checked_add(page))
            .ok_or(Error::Memory { what: "a shadow stack", bytes: room, errno: libc::ENOMEM })?;
        system::map(mapped, page).map(|mapping| ShadowStack { mapping, mapped, guard: page })
    }

    /// One past the highest word.
    pub(crate) fn top(&self) -> usize {
        self.mapping + self.mapped
    }

    /// Where the token lies while nothing runs on it.
    pub(crate) fn token(&self) -> usize {
        self.top() - 8
    }

    /// Bytes for return addresses and signal frames.
    pub(crate) fn room(&self) -> usize {
        self.mapped - self.guard
    }

    /// The words above the token at `token`, youngest first; `None` when there can be no token there.
    pub(crate) fn entries(&self, token: usize) -> Option<&[u64]> {
        let lowest = self.mapping + self.guard;
        if !token.is_multiple_of(8) || token < lowest || token >= self.top() {
            return None;
        }
        let first = token + 8;
        let words = (self.top() - first) / 8;
        // SAFETY: the words lie in the mapping, which self owns; ordinary code can read a shadow stack but not write
        // it, and nothing runs on this one while its token stands.
        Some(unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(first), words) })
    }
}

impl Drop for ShadowStack {
    fn drop(&mut self) {
        // SAFETY: the mapping is owned by self and nothing runs on it.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(self.mapping), self.mapped) };
    }
}

#[cfg(target_os = "linux")]
mod system {
    use crate::error::Error;

    /// `map_shadow_stack`, the same number on every architecture (Linux 6.6).
    const SYS_MAP_SHADOW_STACK: libc::c_long = 453;
    /// Put a token on top.
    const SHADOW_STACK_SET_TOKEN: libc::c_long = 1;
    /// `MADV_GUARD_INSTALL` (Linux 6.13).
    const MADV_GUARD_INSTALL: libc::c_int = 102;

    pub(super) fn map(mapped: usize, guard: usize) -> Result<usize, Error> {
        let failed = |what, bytes| Error::Memory {
            what,
            bytes,
            errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM),
        };
        // SAFETY: a mapping at an address of the kernel's choice touches no existing memory.
        let mapping = unsafe { libc::syscall(SYS_MAP_SHADOW_STACK, 0_usize, mapped, SHADOW_STACK_SET_TOKEN) };
        if mapping == -1 {
            return Err(failed("a shadow stack", mapped));
        }
        let mapping = mapping as usize;
        let lowest = std::ptr::with_exposed_provenance_mut::<libc::c_void>(mapping);
        // SAFETY: the page is the lowest of the mapping just made, on which nothing runs.
        if unsafe { libc::madvise(lowest, guard, MADV_GUARD_INSTALL) } == 0 {
            return Ok(mapping);
        }
        // Before 6.13: an inaccessible page in its place.
        // SAFETY: replaces that page, and nothing else.
        let replaced = unsafe {
            libc::mmap(
                lowest,
                guard,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if replaced == libc::MAP_FAILED {
            let error = failed("a shadow stack's guard", guard);
            // SAFETY: the mapping is ours and nothing runs on it.
            unsafe { libc::munmap(lowest, mapped) };
            return Err(error);
        }
        Ok(mapping)
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use crate::error::Error;

    pub(super) fn map(_: usize, _: usize) -> Result<usize, Error> {
        Err(Error::Unsupported("shadow stacks"))
    }
}
