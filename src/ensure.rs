//! Room for native code: a function runs where it is when there is enough left of the stack, else on a further one.

use crate::coroutine::on_stack;
use crate::coroutine::stack::DefaultStack;
use crate::directory::slot_of_stack;
use crate::error::Error;
use std::cell::Cell;
use std::hint::black_box;
use std::ops::Range;

/// What lies between the top of a further stack and the function: the frames that switch to it and catch its panic, in bytes.
const FRAMES: usize = 4096;

/// Runs `f` with at least `bytes` of native stack: where the caller is when there is so much left, else on a further stack from the pool, which is
/// given back when `f` has ended. Data stack and shadow stack change together, and back. It nests, on whichever stack it is called; a coroutine
/// that suspends within `f` is suspended with it.
///
/// Native code that recurses calls itself through this at each level, or every few. What managed code calls through `exit` is native code too;
/// managed code itself has [`Stubs::link`](crate::engine::Stubs::link).
///
/// # Errors
/// [`Error::Memory`], [`Error::Budget`], [`Error::Size`], [`Error::Thread`] when there is no further stack; `f` has not run then, and is dropped.
///
/// # Panics
/// What `f` panics with is raised again here. A panic takes stack as well, on arm64 16 KiB at its first.
///
/// ```
/// fn depth(tree: &[Vec<usize>], node: usize) -> usize {
///     let deepest = |&child: &usize| cfi_stack::ensure(64 << 10, || depth(tree, child)).expect("memory for a stack");
///     tree[node].iter().map(deepest).max().unwrap_or(0) + 1
/// }
/// let chain: Vec<Vec<usize>> = (1..20_001).map(|next| if next < 20_000 { vec![next] } else { vec![] }).collect();
/// assert_eq!(depth(&chain, 0), 20_000);
/// ```
#[track_caller]
pub fn ensure<F, R>(bytes: usize, f: F) -> Result<R, Error>
where
    F: FnOnce() -> R,
{
    if left().is_some_and(|left| left >= bytes) {
        return Ok(f());
    }
    further(bytes, f)
}

/// On a further stack, of twice what is asked for and at least [`LEAST`]: whoever asks once asks again, deeper.
#[cold]
#[inline(never)]
#[track_caller]
fn further<F, R>(bytes: usize, f: F) -> Result<R, Error>
where
    F: FnOnce() -> R,
{
    /// The least that a further stack has, in bytes.
    const LEAST: usize = 512 << 10;
    let own = FRAMES.saturating_add(2 * size_of::<F>()).saturating_add(2 * size_of::<R>());
    let needed = bytes.saturating_add(own);
    let stack = match DefaultStack::try_new(needed.saturating_mul(2).max(LEAST)) {
        // As much as is needed may be there where twice as much is not.
        Err(_) => DefaultStack::try_new(needed)?,
        Ok(stack) => stack,
    };
    // Both stay here: what is passed to the further stack are references.
    let (mut f, mut result) = (Some(f), None);
    on_stack(stack, || result = f.take().map(|f| f()));
    match result {
        Some(result) => Ok(result),
        None => unreachable!("the function ran, or its panic was raised again"),
    }
}

/// Bytes left of the native stack that the caller runs on; `None` on one that is neither the thread's own nor a pool's, a signal handler's for instance.
fn left() -> Option<usize> {
    let mark = 0_u8;
    let here = (&raw const *black_box(&mark)).addr();
    let own = own();
    if own.contains(&here) {
        return Some(here - own.start);
    }
    let slot = slot_of_stack(here)?;
    // SAFETY: the bounds stay as they are while something runs on the stack.
    let (base, top) = unsafe { ((&raw const (*slot.as_ptr()).base).read(), (&raw const (*slot.as_ptr()).top).read()) };
    (base..top).contains(&here).then(|| here - base)
}

/// The thread's own stack; empty when the system does not say.
fn own() -> Range<usize> {
    thread_local! {
        static OWN: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
    }
    let (start, end) = OWN.get().unwrap_or_else(|| {
        let found = ask().unwrap_or((0, 0));
        OWN.set(Some(found));
        found
    });
    start..end
}

/// From above the guard to the top. The first thread's grows as far as its limit says.
#[cfg(target_os = "linux")]
fn ask() -> Option<(usize, usize)> {
    let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    let (mut start, mut size, mut guard) = (std::ptr::null_mut(), 0, 0);
    // SAFETY: the first call fills the attributes, which the last one gives back; the others read them.
    let told = unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return None;
        }
        let told = libc::pthread_attr_getstack(attributes.as_ptr(), &mut start, &mut size) == 0
            && libc::pthread_attr_getguardsize(attributes.as_ptr(), &mut guard) == 0;
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        told
    };
    // glibc counts the guard to the stack's size or not, by version: the cautious way is to.
    told.then(|| (start.addr().saturating_add(guard), start.addr().saturating_add(size)))
}

/// As above.
#[cfg(target_os = "macos")]
fn ask() -> Option<(usize, usize)> {
    // SAFETY: both read what the thread was made with.
    let (end, size) = unsafe {
        let thread = libc::pthread_self();
        (libc::pthread_get_stackaddr_np(thread).addr(), libc::pthread_get_stacksize_np(thread))
    };
    Some((end.saturating_sub(size), end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn what_is_there_suffices() {
        let before = left().unwrap();
        assert!(before > 4096);
        let within = ensure(1, left).unwrap().unwrap();
        assert!(before - within < 16384, "{before} {within}");
    }

    #[test]
    fn there_is_as_much_as_was_asked_for_and_it_nests() {
        for bytes in [64 << 10, 1 << 20, 16 << 20, 64 << 20] {
            let outer = left().unwrap();
            let (first, second) = ensure(outer + bytes, || {
                let first = left().unwrap();
                (first, ensure(first + bytes, || left().unwrap()).unwrap())
            })
            .unwrap();
            assert!(first >= outer + bytes, "{first} of {}", outer + bytes);
            assert!(second >= first + bytes, "{second} of {}", first + bytes);
        }
    }

    #[test]
    fn a_panic_is_raised_again_and_values_come_back() {
        let far = left().unwrap() + (1 << 20);
        let text = String::from("kept");
        let caught = catch_unwind(AssertUnwindSafe(|| ensure(far, || -> u8 { panic!("{text} and thrown") })));
        assert_eq!(caught.unwrap_err().downcast_ref::<String>().unwrap(), "kept and thrown");
        assert_eq!(ensure(far, || vec![7_u8; 3]).unwrap(), [7; 3]);
        let large = ensure(far, || [9_u64; 4096]).unwrap();
        assert_eq!(large.iter().sum::<u64>(), 9 * 4096);
    }

    #[test]
    fn too_much_is_an_error() {
        struct Noted<'a>(&'a Cell<bool>);
        impl Drop for Noted<'_> {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }
        let dropped = Cell::new(false);
        let note = Noted(&dropped);
        for bytes in [usize::MAX, usize::MAX / 2, 1 << 60] {
            assert!(matches!(ensure(bytes, || 0), Err(Error::Memory { .. } | Error::Size { .. })), "{bytes:#x}");
        }
        assert!(ensure(usize::MAX, move || drop(note)).is_err());
        assert!(dropped.get());
    }

    #[test]
    fn recursion_goes_on_as_deep_as_it_likes() {
        fn down(depth: usize) -> usize {
            let filler = black_box([depth; 64]);
            match depth {
                0 => filler[63],
                _ => ensure(32 << 10, || down(depth - 1)).unwrap() + filler[1] - depth + 1,
            }
        }
        let small = std::thread::Builder::new().stack_size(64 << 10).spawn(|| down(20_000)).unwrap();
        assert_eq!(small.join().unwrap(), 20_000);
    }
}
