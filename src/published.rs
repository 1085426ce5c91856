//! The one page of this library that stubs and walks believe without a seal: it is read-only.
//!
//! It holds the mode word (what this CPU authenticates; a forged mode would turn the checks off) and the root of
//! the code map. It lies in the program's own zeroed data at a link-time address, so no writable pointer
//! leads to it. An update builds the new page elsewhere, takes write access away, looks whether it still says what was meant,
//! and puts it in place with `mremap`: at its own address the page is never writable after the first update.

use crate::error::Error;
use crate::pac::Tampered;
use crate::tamper;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The largest page size of the ISA and system: the page must share its protection with nothing else.
#[cfg(target_arch = "x86_64")]
pub(crate) const PAGE: usize = 4096;
/// The largest page size of the ISA and system: the page must share its protection with nothing else.
#[cfg(all(target_arch = "aarch64", not(target_vendor = "apple")))]
pub(crate) const PAGE: usize = 65536;
/// The largest page size of the ISA and system: the page must share its protection with nothing else.
#[cfg(all(target_arch = "aarch64", target_vendor = "apple"))]
pub(crate) const PAGE: usize = 16384;

/// Mode bit: address authentication (`pacia`, `autia`, …) is there and its instructions may be used.
pub(crate) const MODE_PAC: u64 = 1;
/// Mode bit: generic authentication (`pacga`) is there; records are sealed.
#[cfg(target_arch = "aarch64")]
pub(crate) const MODE_PACGA: u64 = 2;
/// Mode bit: the mode word was set.
pub(crate) const MODE_SET: u64 = 1 << 63;

/// The page. Its first word is known to `asm/`. Only [`place`] changes it, and never through these fields.
#[cfg_attr(target_arch = "x86_64", repr(C, align(4096)))]
#[cfg_attr(all(target_arch = "aarch64", not(target_vendor = "apple")), repr(C, align(65536)))]
#[cfg_attr(all(target_arch = "aarch64", target_vendor = "apple"), repr(C, align(16384)))]
struct Page {
    mode: AtomicU64,
    root: AtomicUsize,
}

const _: () = assert!(size_of::<Page>() == PAGE && std::mem::offset_of!(Page, mode) == 0);

#[unsafe(no_mangle)]
static cfi_stack_published: Page = Page { mode: AtomicU64::new(0), root: AtomicUsize::new(0) };

static UPDATE: Mutex<()> = Mutex::new(());

/// The root of the code map: a table's address, or 0.
pub(crate) fn root() -> usize {
    cfi_stack_published.root.load(Ordering::Acquire)
}

/// The mode word, 0 before [`set_mode`].
pub(crate) fn mode() -> u64 {
    cfi_stack_published.mode.load(Ordering::Relaxed)
}

/// Puts a new root in place. On an error the old one stays.
pub(crate) fn set_root(root: usize) -> Result<(), Error> {
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    place(mode(), root)
}

/// Sets the mode word, once: later calls change nothing.
pub(crate) fn set_mode(mode: u64) -> Result<(), Error> {
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    if self::mode() & MODE_SET != 0 {
        return Ok(());
    }
    place(mode | MODE_SET, root())
}

fn failed(errno: nix::Error) -> Error {
    Error::Memory { what: "the published page", bytes: PAGE, errno: errno as i32 }
}

/// Ends the process unless the page at `page`, which nobody can write any more, says what was meant.
fn meant(page: &Page, mode: u64, root: usize) {
    if page.mode.load(Ordering::Relaxed) != mode || page.root.load(Ordering::Relaxed) != root {
        tamper::end(Tampered {
            evidence: "the published page was rewritten while it was made",
            slot: std::ptr::from_ref(page).addr(),
        });
    }
}

#[cfg(target_os = "linux")]
fn place(mode: u64, root: usize) -> Result<(), Error> {
    use nix::sys::mman::{MRemapFlags, MapFlags, ProtFlags, mmap_anonymous, mprotect, mremap, munmap};
    use std::num::NonZeroUsize;
    use std::ptr::NonNull;

    let length = const { NonZeroUsize::new(PAGE).unwrap() };
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
    let made = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }.map_err(failed)?;
    // SAFETY: the mapping is fresh, writable, aligned to the system's page and as long as a `Page`; `Page` is valid for any
    // content. It is moved over the static, whose size and alignment are whole pages, so that nothing else is replaced; the
    // static's fields are atomics, which nobody assumes to stay as they were.
    unsafe {
        let page = made.cast::<Page>().as_ref();
        page.mode.store(mode, Ordering::Relaxed);
        page.root.store(root, Ordering::Relaxed);
        let placed = mprotect(made, PAGE, ProtFlags::PROT_READ).and_then(|()| {
            meant(page, mode, root);
            let target = NonNull::from(&cfi_stack_published).cast();
            mremap(made, PAGE, PAGE, MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED, Some(target))
        });
        if let Err(errno) = placed {
            let _ = munmap(made, PAGE);
            return Err(failed(errno));
        }
    }
    Ok(())
}

/// Where pages cannot be moved the page is writable between two `mprotect` calls.
#[cfg(not(target_os = "linux"))]
fn place(mode: u64, root: usize) -> Result<(), Error> {
    use nix::sys::mman::{ProtFlags, mprotect};
    use std::ptr::NonNull;

    let page = NonNull::from(&cfi_stack_published).cast();
    let (old_mode, old_root) = (self::mode(), self::root());
    let write = |mode, root| {
        cfi_stack_published.mode.store(mode, Ordering::Relaxed);
        cfi_stack_published.root.store(root, Ordering::Release);
    };
    // SAFETY: the page holds nothing but `Page`; every reader of it only reads.
    unsafe {
        mprotect(page, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map_err(failed)?;
        write(mode, root);
        if let Err(errno) = mprotect(page, PAGE, ProtFlags::PROT_READ) {
            write(old_mode, old_root);
            return Err(failed(errno));
        }
    }
    meant(&cfi_stack_published, mode, root);
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_read_only_between_updates() {
        set_mode(0).unwrap();
        let address = std::ptr::from_ref(&cfi_stack_published).addr();
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
