//! Coroutines where there is no memory and no budget for them: typed errors, what was passed in is dropped, nothing stays leased, counted or mapped,
//! and the coroutines that there are go on.
//!
//! A program of its own with one test: the budget, the mappings and the memory are the whole process's.
#![cfg(all(feature = "steps", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use cfi_stack::Error;
use cfi_stack::coroutine::stack::{DefaultStack, Stack, StackPointer};
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder};
use cfi_stack::pool;
use std::cell::Cell;
use std::rc::Rc;

/// Emulated CPUs go through fewer rounds (ci/test says so with this variable).
fn rounds() -> usize {
    if std::env::var_os("QUICKCHECK_TESTS").is_some() { 2_000 } else { 100_000 }
}

/// Mappings, and resident pages.
fn footprint() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    (maps, statm.split(' ').nth(1).unwrap().parse().unwrap())
}

fn leased() -> usize {
    pool::stats().classes.iter().map(|class| class.leased).sum()
}

/// Runs `body` with every call of the system failing from the `n`th on.
fn failing_from<T>(n: usize, body: impl FnOnce() -> T) -> T {
    pool::fail_calls_from(Some(n));
    let result = body();
    pool::fail_calls_from(None);
    result
}

/// Memory of the test's own. Nothing here runs deep.
struct Own(Box<[u128]>);

// SAFETY: the box stays where it is, and nothing comes to its low end.
unsafe impl Stack for Own {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.0.as_ptr_range().end.expose_provenance()).unwrap()
    }
    fn limit(&self) -> StackPointer {
        StackPointer::new(self.0.as_ptr().expose_provenance()).unwrap()
    }
}

/// Passes its inputs back. `kept` lives as long as the function.
fn echo(kept: Rc<Cell<u32>>) -> impl FnOnce(&Yielder<u32, u32>, u32) -> u32 {
    move |yielder, mut input| {
        while input != 0 {
            input = yielder.suspend(input);
        }
        kept.set(kept.get() + 1);
        7
    }
}

/// More calls than any stack makes.
const CALLS: usize = 24;
/// Of a mapping of its own, so that each asks the system.
const LARGE: usize = 4 << 20;

#[test]
fn nothing_stays_of_what_failed_and_the_others_go_on() {
    let kept = Rc::new(Cell::new(0));
    // What goes on all the while, and has memory of every kind.
    let mut pooled = Coroutine::with_stack(DefaultStack::new(64 << 10).unwrap(), echo(kept.clone()));
    let mut bare = Coroutine::with_stack(Own(vec![0; 4096].into()), echo(kept.clone()));
    assert_eq!((pooled.resume(1).as_yield(), bare.resume(1).as_yield()), (Some(1), Some(1)));
    drop(DefaultStack::new(LARGE).unwrap());
    pool::trim();
    // A budget that was set counts these two from then on.
    pool::set_budget(1);
    pool::set_budget(usize::MAX);
    let counted = pool::stats().counted_bytes;

    let (live, owners) = (leased(), Rc::strong_count(&kept));
    let mut area = Own(vec![0; 4096].into());
    let mut before = (0, 0);
    let (mut refused, mut ran) = (0_u32, 0_u32);
    let rounds = rounds();
    for round in 0..rounds {
        if round == rounds / 10 {
            before = footprint();
        }
        // Nothing is ever made at call 0; all of it at the last.
        let n = (round / 4) % CALLS;
        match round % 4 {
            0 => match failing_from(n, || DefaultStack::try_new(LARGE)) {
                Ok(stack) => {
                    ran += 1;
                    drop(Coroutine::with_stack(stack, echo(kept.clone())));
                }
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, Error::Memory { .. }), "{error}");
                }
            },
            // A coroutine that suspends while there is no memory needs none, and is unwound without.
            1 => failing_from(0, || {
                assert_eq!(pooled.resume(round as u32 + 1).as_yield(), Some(round as u32 + 1));
                assert_eq!(bare.resume(round as u32 + 1).as_yield(), Some(round as u32 + 1));
            }),
            2 => {
                let made = failing_from(n, || ScopedCoroutine::try_with_stack(&mut area, echo(kept.clone())));
                match made {
                    Ok(coroutine) => coroutine.scope(|mut coroutine| {
                        ran += 1;
                        assert_eq!(coroutine.resume(5), CoroutineResult::Yield(5));
                        assert_eq!(coroutine.resume(0), CoroutineResult::Return(7));
                    }),
                    Err(error) => {
                        refused += 1;
                        assert!(matches!(error, Error::Memory { .. }), "{error}");
                    }
                }
            }
            _ => {
                // So little that not even what lives already would fit.
                pool::set_budget(1);
                let large = DefaultStack::try_new(LARGE).unwrap_err();
                let default = Coroutine::try_new(echo(kept.clone())).unwrap_err();
                let own = ScopedCoroutine::try_with_stack(&mut area, echo(kept.clone())).map(drop).unwrap_err();
                pool::set_budget(usize::MAX);
                for error in [large, default, own] {
                    refused += 1;
                    assert!(matches!(error, Error::Budget { left: 0, .. }), "{error}");
                }
                let error = DefaultStack::new(usize::MAX).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
            }
        }
        pool::trim();
        if round.is_multiple_of(100) {
            assert_eq!((leased(), pool::stats().counted_bytes), (live, counted), "round {round}");
        }
        assert_eq!(Rc::strong_count(&kept), owners, "what a coroutine was made of is dropped");
    }
    let after = footprint();
    assert_eq!((leased(), pool::stats().counted_bytes), (live, counted));
    // Neighbours that the system has merged since count as one.
    assert!(after.0 <= before.0, "{before:?} {after:?} mappings");
    assert!(after.1 <= before.1 + 256, "{before:?} {after:?} resident pages");
    assert!(refused as usize > rounds / 2 && ran as usize > rounds / 100, "{refused} refused, {ran} ran");
    assert_eq!((pooled.resume(0).as_return(), bare.resume(0).as_return()), (Some(7), Some(7)));
}
