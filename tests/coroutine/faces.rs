//! What passes between a coroutine and who resumes it, and from whose stack.

use crate::here;
use cfi_stack::coroutine::stack::{DefaultStack, MIN_STACK_SIZE, Stack};
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder, on_stack};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;

#[test]
fn values_go_both_ways() {
    let mut sums = Coroutine::new(|yielder: &Yielder<i32, i32>, first| {
        let mut sum = first;
        for _ in 0..3 {
            sum += yielder.suspend(sum);
        }
        sum * 1000
    });
    assert!(!sums.started() && !sums.done());
    assert_eq!(sums.resume(1), CoroutineResult::Yield(1));
    assert!(sums.started() && !sums.done());
    assert_eq!(sums.resume(2).as_yield(), Some(3));
    assert_eq!(sums.resume(3).as_return(), None);
    assert_eq!(sums.resume(4).as_return(), Some(10_000));
    assert!(sums.started() && sums.done());
}

#[test]
fn values_of_every_size_and_alignment_go_both_ways() {
    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(align(64))]
    struct Aligned([u64; 20]);
    #[track_caller]
    fn goes<T: Clone + PartialEq + std::fmt::Debug + 'static>(value: T) {
        let captured = value.clone();
        let mut echo = Coroutine::new(move |yielder: &Yielder<T, T>, first: T| {
            assert_eq!(first, captured);
            let second = yielder.suspend(first);
            assert_eq!(second, captured);
            (captured, second)
        });
        assert_eq!(echo.resume(value.clone()), CoroutineResult::Yield(value.clone()));
        assert_eq!(echo.resume(value.clone()), CoroutineResult::Return((value.clone(), value)));
    }
    goes(());
    goes([0_u128; 0]);
    goes(200_u8);
    goes((7_u8, 9_u32));
    goes(Some(1.5_f64));
    goes(Rc::new(5));
    goes("two words");
    goes(String::from("three words"));
    goes(Aligned([3; 20]));
    goes([9_u8; 5000]);
}

#[test]
fn on_parent_stack_runs_there() {
    let parent = here();
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), u8>, ()| {
        assert!(parent.abs_diff(yielder.on_parent_stack(here)) < 64 << 10);
        assert!(parent.abs_diff(here()) >= 64 << 10);
        yielder.suspend(1);
        let payload = catch_unwind(AssertUnwindSafe(|| yielder.on_parent_stack(|| panic_any(5_u8)))).unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&5_u8));
        yielder.suspend(2);
    });
    assert_eq!(coroutine.resume(()), CoroutineResult::Yield(1));
    assert_eq!(coroutine.resume(()), CoroutineResult::Yield(2));
    assert_eq!(coroutine.resume(()), CoroutineResult::Return(()));
}

#[test]
fn backtraces_reach_the_resumer() {
    #[inline(never)]
    fn the_outer_resumer() {
        let mut outer = Coroutine::new(|_: &Yielder<(), ()>, ()| the_inner_resumer());
        outer.resume(());
    }
    #[inline(never)]
    fn the_inner_resumer() {
        let long = [std::hint::black_box(1_usize); 20];
        let mut inner = Coroutine::new(move |_: &Yielder<(), ()>, ()| {
            std::hint::black_box(&long);
            Backtrace::force_capture().to_string()
        });
        let text = inner.resume(()).as_return().unwrap();
        for name in ["the_inner_resumer", "the_outer_resumer", "backtraces_reach_the_resumer"] {
            assert!(text.contains(name), "{name} in\n{text}");
        }
    }
    the_outer_resumer();
}

#[test]
fn on_stack_runs_there_and_panics_here() {
    let stack = DefaultStack::new(1 << 16).unwrap();
    let area = stack.limit().get()..stack.base().get();
    assert!(area.contains(&on_stack(stack, here)));
    let payload = catch_unwind(|| on_stack(DefaultStack::default(), || panic_any(5_u8))).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&5_u8));
    let mut borrowed = vec![1];
    let length = on_stack(DefaultStack::default(), || {
        borrowed.push(2);
        borrowed.len()
    });
    assert_eq!((length, borrowed), (2, vec![1, 2]));
}

/// A chain of coroutines, each of which passes on what the next gives.
fn chain(depth: u32) -> Coroutine<u32, u32, u32> {
    Coroutine::new(move |yielder: &Yielder<u32, u32>, mut input| {
        if depth == 0 {
            for _ in 0..5 {
                input = yielder.suspend(input + 1);
            }
            return input;
        }
        let mut next = chain(depth - 1);
        loop {
            match next.resume(input) {
                CoroutineResult::Yield(value) => input = yielder.suspend(value + 1),
                CoroutineResult::Return(value) => return value,
            }
        }
    })
}

#[test]
fn a_chain_of_64_resumes_through_and_unwinds_through() {
    let mut first = chain(63);
    for round in 0..5 {
        assert_eq!(first.resume(round), CoroutineResult::Yield(round + 64));
    }
    assert_eq!(first.resume(1000), CoroutineResult::Return(1000));
    let mut first = chain(63);
    first.resume(0);
    drop(first);
}

#[test]
fn the_outer_yielder_suspends_the_whole_chain() {
    let parent = Cell::new(0);
    let outer = ScopedCoroutine::new(|outer: &Yielder<u32, u32>, first: u32| {
        let middle = ScopedCoroutine::new(|_: &Yielder<(), u32>, ()| {
            let inner = ScopedCoroutine::new(|inner: &Yielder<(), u32>, ()| {
                let mut sum = first;
                for _ in 0..3 {
                    sum += outer.suspend(sum); // past inner and middle
                    inner.suspend(0);
                }
                on_stack(DefaultStack::default(), || sum + outer.suspend(500))
            });
            inner.scope(|mut inner| {
                while inner.resume(()).as_yield().is_some() {
                    parent.set(parent.get() + 1);
                }
            });
        });
        middle.scope(|mut middle| middle.resume(()).as_return().unwrap());
        first
    });
    outer.scope(|mut outer| {
        let passed: Vec<_> = [1, 10, 20, 30].map(|input| outer.resume(input).as_yield().unwrap()).to_vec();
        assert_eq!(passed, [1, 11, 31, 500]);
        assert_eq!(outer.resume(4).as_return(), Some(1));
    });
    assert_eq!(parent.get(), 3);
}

thread_local! {
    static SMUGGLED: Cell<*const Yielder<(), ()>> = const { Cell::new(std::ptr::null()) };
}

#[test]
fn a_yielder_whose_coroutine_does_not_run_panics() {
    fn suspend_smuggled() -> String {
        // SAFETY: the coroutine is alive, and this is its thread. Crates with scoped thread-local variables let safe code do this.
        let yielder = unsafe { &*SMUGGLED.get() };
        let payload = catch_unwind(AssertUnwindSafe(|| yielder.suspend(()))).unwrap_err();
        payload.downcast_ref::<&str>().unwrap().to_string()
    }
    let mut coroutine = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
        SMUGGLED.set(yielder);
        let said = yielder.on_parent_stack(suspend_smuggled);
        assert!(said.contains("does not run"), "{said}");
        yielder.suspend(());
    });
    coroutine.resume(());
    let said = suspend_smuggled();
    assert!(said.contains("does not run"), "{said}");
    let mut other = Coroutine::new(|_: &Yielder<(), ()>, ()| suspend_smuggled());
    assert!(other.resume(()).as_return().unwrap().contains("does not run"));
    assert_eq!(coroutine.resume(()), CoroutineResult::Return(()));
}

#[test]
fn a_hundred_thousand_generators_live_at_once() {
    let count =
        if cfg!(debug_assertions) && std::env::var_os("CFI_STACK_EMULATED").is_some() { 1000 } else { 100_000_u32 };
    let mut all: Vec<_> = (0..count)
        .map(|seed| {
            Coroutine::with_stack(
                DefaultStack::new(MIN_STACK_SIZE).unwrap(),
                move |yielder: &Yielder<u32, u32>, mut input| {
                    loop {
                        input = yielder.suspend(seed ^ input);
                    }
                },
            )
        })
        .collect();
    for input in 0..2 {
        for (seed, generator) in (0..).zip(&mut all) {
            let _: u32 =
                generator.resume(input).as_yield().map(|value: u32| assert_eq!(value, seed ^ input)).map_or(0, |()| 1);
        }
    }
    // The smallest stacks have no room for an unwinder on every ISA.
    for generator in &mut all {
        // SAFETY: nothing on the stack has a destructor.
        unsafe { generator.force_reset() };
    }
}
