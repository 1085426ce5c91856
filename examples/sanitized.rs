//! Coroutines under AddressSanitizer (`ci/shell/steps.sh`, step `asan`).
//!
//! ```text
//! sanitized right      nothing is wrong here: no word from the sanitizer is wanted
//! sanitized overflow   writes past a local of a coroutine: the sanitizer ends it
//! sanitized returned   reads a local of a coroutine's function that has returned: so it does here
//! ```
//! Without the feature `asan`, `right` fails too: the sanitizer takes one stack's frames for another's.

use cfi_stack::coroutine::{Coroutine, CoroutineResult, Yielder};
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

const WORDS: usize = 64;

/// Makes a local that somebody else may look at. A function of its own: the sanitizer keeps the locals of functions with assembly in
/// them off its fake stacks, and `black_box` and a switch are such.
#[inline(never)]
fn shown(words: &mut [usize; WORDS]) -> *mut usize {
    black_box(words.as_mut_ptr())
}

#[inline(never)]
fn suspended(yielder: &Yielder<usize, usize>, value: usize) -> usize {
    yielder.suspend(value)
}

/// A local that is in use while the coroutine is suspended, and the sum of what it holds then.
#[inline(never)]
fn holds(yielder: &Yielder<usize, usize>, seed: usize) -> usize {
    let mut words = [seed; WORDS];
    shown(&mut words);
    for round in 0..8 {
        words[round] += suspended(yielder, words.iter().sum());
    }
    words.iter().sum()
}

/// Panics so many frames further down, whose locals have poison around them on the stack itself.
#[inline(never)]
fn panics(depth: usize) -> usize {
    let mut words = [depth; WORDS];
    black_box(&mut words);
    if depth == 0 {
        resume_unwind(Box::new("a panic"));
    }
    panics(depth - 1) + words[depth % WORDS]
}

#[inline(never)]
fn caught(depth: usize) {
    assert!(catch_unwind(AssertUnwindSafe(|| panics(depth))).is_err());
    // The standard library is not instrumented: its buffer lies where the frames were, and the C library's functions look at it.
    assert!(
        std::fs::metadata(
            "a name that nothing has, long enough to lie where several of those frames have been".repeat(3)
        )
        .is_err()
    );
}

/// Coroutines with locals in use while others panic, are unwound, dropped and made anew.
fn right() {
    for round in 0..10 {
        let mut held: Vec<_> = (0..20).map(|_| Coroutine::new(holds)).collect();
        for coroutine in &mut held {
            assert_eq!(coroutine.resume(round), CoroutineResult::Yield(round * WORDS));
        }
        caught(30);
        let mut panicking = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
            caught(30);
            yielder.suspend(());
            caught(30);
            yielder.on_parent_stack(|| caught(20));
            panics(30)
        });
        assert_eq!(panicking.resume(()), CoroutineResult::Yield(()));
        assert!(catch_unwind(AssertUnwindSafe(|| panicking.resume(()))).is_err());
        caught(30);
        for (number, coroutine) in held.iter_mut().enumerate().skip(1) {
            for more in 1..=8 {
                let sum = match coroutine.resume(more) {
                    CoroutineResult::Yield(sum) | CoroutineResult::Return(sum) => sum,
                };
                assert_eq!(sum, round * WORDS + (1..=more).sum::<usize>());
                if number % 3 == 0 && more == 4 {
                    break;
                }
            }
        }
        // The first of them, and every third, are unwound.
        drop(held);
    }
}

/// Writes one word past the end of a local.
fn overflow() {
    let mut coroutine = Coroutine::new(|yielder: &Yielder<usize, ()>, _: usize| {
        let mut words = [0_usize; WORDS];
        let place = shown(&mut words);
        let index = yielder.suspend(());
        // SAFETY: none. This is what the sanitizer must see.
        unsafe { place.add(index).write(1) };
        shown(&mut words);
    });
    coroutine.resume(0);
    coroutine.resume(black_box(WORDS));
}

#[inline(never)]
fn leaves() -> *const usize {
    let mut words = [1_usize; WORDS];
    shown(&mut words)
}

/// Reads a local of a function that has returned.
fn returned() {
    let mut coroutine = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
        let place = leaves();
        yielder.suspend(());
        // SAFETY: none, as above.
        black_box(unsafe { place.add(1).read_volatile() });
    });
    coroutine.resume(());
    coroutine.resume(());
}

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("right") => right(),
        Some("overflow") => overflow(),
        Some("returned") => returned(),
        _ => panic!("sanitized right, overflow or returned"),
    }
}
