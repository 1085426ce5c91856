//! The one page of this library that stubs and walks believe without a seal: it is read-only.
//!
//! It holds the mode word (what this CPU authenticates; a forged mode would turn the checks off) and the root of
//! the code map. It lies in the program's own zeroed data at a link-time address, so no writable pointer
//! leads to it, and is writable only between the two `mprotect` calls of an update.

use crate::error::Error;
use nix::sys::mman::{ProtFlags, mprotect};
use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// The largest page size of the ISA: the page must share its protection with nothing else.
#[cfg(target_arch = "x86_64")]
pub(crate) const PAGE: usize = 4096;
/// The largest page size of the ISA: the page must share its protection with nothing else.
#[cfg(target_arch = "aarch64")]
pub(crate) const PAGE: usize = 65536;

/// Mode bit: address authentication (`pacia`, `autia`, …) is there and its instructions may be used.
pub(crate) const MODE_PAC: u64 = 1;
/// Mode bit: generic authentication (`pacga`) is there; records are sealed.
#[cfg(target_arch = "aarch64")]
pub(crate) const MODE_PACGA: u64 = 2;
/// Mode bit: the mode word was set.
pub(crate) const MODE_SET: u64 = 1 << 63;

/// The page. Its first two words are known to `asm/`.
#[cfg_attr(target_arch = "x86_64", repr(C, align(4096)))]
#[cfg_attr(target_arch = "aarch64", repr(C, align(65536)))]
struct Page {
    mode: UnsafeCell<u64>,
    root: UnsafeCell<usize>,
    rest: UnsafeCell<[u8; PAGE - 16]>,
}

// SAFETY: written only under `UPDATE`, read volatile.
unsafe impl Sync for Page {}

#[unsafe(no_mangle)]
static cfi_stack_published: Page =
    Page { mode: UnsafeCell::new(0), root: UnsafeCell::new(0), rest: UnsafeCell::new([0; PAGE - 16]) };

static UPDATE: Mutex<()> = Mutex::new(());

/// The root of the code map: a table's address, or 0.
pub(crate) fn root() -> usize {
    // SAFETY: an aligned word that is always mapped and readable.
    unsafe { cfi_stack_published.root.get().read_volatile() }
}

/// The mode word, 0 before [`set_mode`].
pub(crate) fn mode() -> u64 {
    // SAFETY: as in `root`.
    unsafe { cfi_stack_published.mode.get().read_volatile() }
}

fn update(write: impl FnOnce()) -> Result<(), Error> {
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    let page = NonNull::from(&cfi_stack_published).cast();
    let failed = |errno: nix::Error| Error::Memory { what: "the published page", bytes: PAGE, errno: errno as i32 };
    // SAFETY: the page holds nothing but `Page`; every reader of it only reads.
    unsafe { mprotect(page, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) }.map_err(failed)?;
    write();
    // SAFETY: as above.
    unsafe { mprotect(page, PAGE, ProtFlags::PROT_READ) }.map_err(failed)
}

pub(crate) fn set_root(root: usize) -> Result<(), Error> {
    // SAFETY: `update` has made the page writable and lets one writer in.
    update(|| unsafe { cfi_stack_published.root.get().write_volatile(root) })
}

/// Sets the mode word, once: later calls change nothing.
pub(crate) fn set_mode(mode: u64) -> Result<(), Error> {
    if self::mode() & MODE_SET != 0 {
        return Ok(());
    }
    // SAFETY: as in `set_root`.
    update(|| unsafe { cfi_stack_published.mode.get().write_volatile(mode | MODE_SET) })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_read_only_between_updates() {
        set_mode(0).unwrap();
        let address = NonNull::from(&cfi_stack_published).addr().get();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps
            .lines()
            .find(|line| {
                let (start, rest) = line.split_once('-').unwrap();
                let end = rest.split_once(' ').unwrap().0;
                let bound = |hex| usize::from_str_radix(hex, 16).unwrap();
                (bound(start)..bound(end)).contains(&address)
            })
            .unwrap();
        assert_eq!(line.split_whitespace().nth(1), Some("r--p"), "{line}");
    }
}
