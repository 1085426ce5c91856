//! The one page of this library that stubs and walks believe without a seal: it is read-only.
//!
//! It holds the mode word (what this CPU authenticates; a forged mode would turn the checks off), the root of the
//! code map, where the chunk directory lies, and the mode once more as masks for the inlined switch. It lies in the program's own zeroed data at a link-time address, so no
//! writable pointer leads to it. An update builds the new page elsewhere, takes write access away, looks whether it still says what was meant,
//! and puts it in place with `mremap`: at its own address the page is never writable after the first update.

use crate::abi::coroutine_word;
use crate::error::Error;
use crate::pac::Tampered;
#[cfg(target_os = "linux")]
use crate::system;
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
/// Mode bit: threads of this process may have a shadow stack; without it no stub asks.
pub(crate) const MODE_SHADOW: u64 = 4;
/// Mode bit: growable stacks, stacks of futures or continuations were made: a coroutine that suspends looks for what lies on its stacks.
pub(crate) const MODE_MANAGED: u64 = 8;
/// Mode bit: callee-saved registers are sealed with a context too.
pub(crate) const MODE_FULL_SEAL: u64 = 16;
/// Mode bit: the mode word was set.
pub(crate) const MODE_SET: u64 = 1 << 63;

/// The page. Its words are known to `asm/` by their offsets. Only [`place`] changes it, and never through these fields.
#[cfg_attr(target_arch = "x86_64", repr(C, align(4096)))]
#[cfg_attr(all(target_arch = "aarch64", not(target_vendor = "apple")), repr(C, align(65536)))]
#[cfg_attr(all(target_arch = "aarch64", target_vendor = "apple"), repr(C, align(16384)))]
pub(crate) struct Page {
    fields: Fields,
}

/// What it holds. A type of its own, since the page that is being made is aligned to the system's pages only.
#[repr(C)]
struct Fields {
    mode: AtomicU64,
    root: AtomicUsize,
    directory: AtomicUsize,
    entries: AtomicUsize,
    resumable: AtomicU64,
    careful: AtomicU64,
}

const _: () = {
    assert!(size_of::<Page>() == PAGE && std::mem::offset_of!(Page, fields) == 0);
    assert!(std::mem::offset_of!(Fields, mode) == 0);
    assert!(std::mem::offset_of!(Fields, directory) == 16 && std::mem::offset_of!(Fields, entries) == 24);
    assert!(std::mem::offset_of!(Fields, resumable) == RESUMABLE && std::mem::offset_of!(Fields, careful) == CAREFUL);
};

/// Offset of a mask: a coroutine is resumed inlined only when its word ([`coroutine_word`]) has a bit of it. 0 where threads may have
/// shadow stacks, and before the mode is set.
pub(crate) const RESUMABLE: usize = 32;
/// Offset of a mask: a coroutine suspends itself inlined only when its word has no bit of it. All bits where threads may have shadow stacks, and where
/// something may lie on its stacks that has to be looked for. Before the mode is set no coroutine runs.
pub(crate) const CAREFUL: usize = 40;

/// The two masks that go with a mode word: one test of a coroutine's word with a mask is a question about both.
fn masks(mode: u64) -> [u64; 2] {
    match mode & (MODE_SET | MODE_SHADOW | MODE_MANAGED) {
        MODE_SET => [coroutine_word::WAITS; 2],
        mode if mode & (MODE_SET | MODE_SHADOW) == MODE_SET => [coroutine_word::WAITS, u64::MAX],
        _ => [0, u64::MAX],
    }
}

#[unsafe(no_mangle)]
pub(crate) static cfi_stack_published: Page = Page {
    fields: Fields {
        mode: AtomicU64::new(0),
        root: AtomicUsize::new(0),
        directory: AtomicUsize::new(0),
        entries: AtomicUsize::new(0),
        resumable: AtomicU64::new(0),
        careful: AtomicU64::new(0),
    },
};

static UPDATE: Mutex<()> = Mutex::new(());

/// What the page says, or is meant to say.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Words {
    mode: u64,
    root: usize,
    directory: usize,
    entries: usize,
}

impl Fields {
    fn words(&self) -> Words {
        Words {
            mode: self.mode.load(Ordering::Relaxed),
            root: self.root.load(Ordering::Acquire),
            directory: self.directory.load(Ordering::Relaxed),
            entries: self.entries.load(Ordering::Relaxed),
        }
    }

    fn write(&self, words: Words) {
        self.mode.store(words.mode, Ordering::Relaxed);
        self.directory.store(words.directory, Ordering::Relaxed);
        self.entries.store(words.entries, Ordering::Relaxed);
        let [resumable, careful] = masks(words.mode);
        self.resumable.store(resumable, Ordering::Relaxed);
        self.careful.store(careful, Ordering::Relaxed);
        self.root.store(words.root, Ordering::Release);
    }
}

/// The root of the code map: a table's address, or 0.
pub(crate) fn root() -> usize {
    cfi_stack_published.fields.root.load(Ordering::Acquire)
}

/// The mode word, 0 before [`set_mode`].
#[inline]
pub(crate) fn mode() -> u64 {
    cfi_stack_published.fields.mode.load(Ordering::Relaxed)
}

/// The chunk directory: its address and how many entries can be read there; (0, 0) while there is none.
#[inline]
pub(crate) fn directory() -> (usize, usize) {
    // The count first: an address is in place before the first count is, and never changes.
    let entries = cfi_stack_published.fields.entries.load(Ordering::Acquire);
    (cfi_stack_published.fields.directory.load(Ordering::Relaxed), entries)
}

/// Puts a new root in place. On an error the old one stays.
pub(crate) fn set_root(root: usize) -> Result<(), Error> {
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    place::<true>(Words { root, ..cfi_stack_published.fields.words() })
}

/// Sets the mode word, once: later calls change nothing.
pub(crate) fn set_mode(mode: u64) -> Result<(), Error> {
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    if self::mode() & MODE_SET != 0 {
        return Ok(());
    }
    let words = cfi_stack_published.fields.words();
    place::<false>(Words { mode: words.mode | mode | MODE_SET, ..words })
}

/// Adds a bit to the mode word, for good: [`MODE_MANAGED`] or [`MODE_FULL_SEAL`].
pub(crate) fn add_mode(bit: u64) -> Result<(), Error> {
    if mode() & bit == bit {
        return Ok(());
    }
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    let words = cfi_stack_published.fields.words();
    place::<false>(Words { mode: words.mode | bit, ..words })
}

/// Says where the chunk directory lies and how many entries it has. On an error what stood there stays.
pub(crate) fn set_directory(directory: usize, entries: usize) -> Result<(), Error> {
    let _only_one = UPDATE.lock().unwrap_or_else(PoisonError::into_inner);
    place::<false>(Words { directory, entries, ..cfi_stack_published.fields.words() })
}

#[cfg(not(target_os = "linux"))]
fn failed(errno: nix::Error) -> Error {
    Error::Memory { what: "the published page", bytes: PAGE, errno: errno as i32 }
}

/// Whether `page` may take the place of what is in force. Both are read-only: what was meant stands in memory that can be rewritten.
/// Mode bits are never lost and the masks are theirs, the directory stays where it is and never becomes shorter, and the root changes on purpose alone.
#[inline(always)]
fn may_follow<const ROOT: bool>(page: &Fields, now: &Fields) -> bool {
    let lost = now.mode.load(Ordering::Relaxed) & !page.mode.load(Ordering::Relaxed);
    let shorter = page.entries.load(Ordering::Relaxed) < now.entries.load(Ordering::Relaxed);
    let directory = now.directory.load(Ordering::Relaxed);
    let elsewhere = directory != 0 && page.directory.load(Ordering::Relaxed) != directory;
    let rooted = ROOT || page.root.load(Ordering::Relaxed) == now.root.load(Ordering::Relaxed);
    let masked = [&page.resumable, &page.careful].map(|mask| mask.load(Ordering::Relaxed));
    lost == 0 && !shorter && !elsewhere && rooted && masked == masks(page.mode.load(Ordering::Relaxed))
}

/// Ends the process unless the page at `page`, which nobody can write any more, says what was meant and may follow `now`.
fn meant<const ROOT: bool>(page: &Fields, now: &Fields, words: Words) {
    if page.words() != words || !may_follow::<ROOT>(page, now) {
        tamper::end(Tampered {
            evidence: "the published page was rewritten while it was made",
            slot: std::ptr::from_ref(page).addr(),
        });
    }
}

#[cfg(target_os = "linux")]
fn place<const ROOT: bool>(words: Words) -> Result<(), Error> {
    const WHAT: &str = "the published page";
    let made = system::map(WHAT, PAGE)?;
    // SAFETY: the mapping is fresh, writable, aligned to the system's page and as long as a `Page`, whose fields are valid for any content.
    let page = unsafe { &*std::ptr::with_exposed_provenance::<Fields>(made) };
    page.write(words);
    system::seal(WHAT, made, PAGE)
        .and_then(|()| {
            meant::<ROOT>(page, &cfi_stack_published.fields, words);
            let target = std::ptr::from_ref(&cfi_stack_published).addr();
            // SAFETY: the static's size and alignment are whole pages, so that nothing else is replaced; its fields are atomics,
            // which nobody assumes to stay as they were.
            unsafe { system::replace(WHAT, made, PAGE, target) }
        })
        .inspect_err(|_| system::unmap(made, PAGE))
}

/// Where pages cannot be moved the page is writable between two `mprotect` calls.
#[cfg(not(target_os = "linux"))]
fn place<const ROOT: bool>(words: Words) -> Result<(), Error> {
    use nix::sys::mman::{ProtFlags, mprotect};
    use std::ptr::NonNull;

    let page = NonNull::from(&cfi_stack_published).cast();
    let old = cfi_stack_published.fields.words();
    // SAFETY: the page holds nothing but `Page`; every reader of it only reads.
    unsafe {
        mprotect(page, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).map_err(failed)?;
        cfi_stack_published.fields.write(words);
        if let Err(errno) = mprotect(page, PAGE, ProtFlags::PROT_READ) {
            cfi_stack_published.fields.write(old);
            return Err(failed(errno));
        }
    }
    meant::<ROOT>(&cfi_stack_published.fields, &cfi_stack_published.fields, words);
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_lost_something_may_not_follow() {
        let fields = |[mode, root, directory, entries]: [usize; 4]| Fields {
            mode: AtomicU64::new(mode as u64),
            root: AtomicUsize::new(root),
            directory: AtomicUsize::new(directory),
            entries: AtomicUsize::new(entries),
            resumable: AtomicU64::new(masks(mode as u64)[0]),
            careful: AtomicU64::new(masks(mode as u64)[1]),
        };
        let now = fields([7, 1, 2, 64]);
        let follows = |next| (may_follow::<false>(&fields(next), &now), may_follow::<true>(&fields(next), &now));
        assert_eq!(follows([15, 1, 2, 128]), (true, true));
        assert_eq!(follows([7, 9, 2, 64]), (false, true), "another root");
        for next in [[3, 1, 2, 64], [0, 1, 2, 64], [7, 1, 3, 64], [7, 1, 0, 64], [7, 1, 2, 63]] {
            assert_eq!(follows(next), (false, false), "{next:?}");
        }
        assert!(may_follow::<false>(&fields([1, 0, 5, 0]), &fields([1, 0, 0, 0])), "the first directory");
        for forged in [coroutine_word::WAITS, u64::MAX] {
            let next = fields([15, 1, 2, 128]);
            next.resumable.store(forged, Ordering::Relaxed);
            assert!(!may_follow::<true>(&next, &now), "the mode's masks alone");
        }
    }

    #[test]
    fn coroutines_are_not_inlined_under_shadow_stacks_nor_before_the_mode_is_set() {
        let set = |bits| masks(MODE_SET | bits);
        for mode in [0, MODE_MANAGED, MODE_SET | MODE_SHADOW, MODE_SET | MODE_SHADOW | MODE_MANAGED, u64::MAX] {
            assert_eq!(masks(mode), [0, u64::MAX], "{mode:#x}");
        }
        assert_eq!((set(0), set(MODE_FULL_SEAL)), ([coroutine_word::WAITS; 2], [coroutine_word::WAITS; 2]));
        assert_eq!(set(MODE_MANAGED), [coroutine_word::WAITS, u64::MAX]);
    }

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
