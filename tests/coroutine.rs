//! The coroutine face: what its peers do, in one place, and what nobody may do.
#![cfg(any(all(target_arch = "x86_64", target_os = "linux"), target_arch = "aarch64"))]

use cfi_stack::coroutine::stack::{DefaultStack, MIN_STACK_SIZE, Stack};
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder, on_stack};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
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

struct Counts(Rc<Cell<u32>>);
impl Drop for Counts {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn dropping_a_suspended_coroutine_runs_the_destructors_on_its_stack() {
    let dropped = Rc::new(Cell::new(0));
    let (in_function, on_stack) = (Counts(dropped.clone()), dropped.clone());
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
        let _moved = &in_function;
        let _local = Counts(on_stack);
        yielder.suspend(());
        unreachable!();
    });
    coroutine.resume(());
    assert_eq!(dropped.get(), 0);
    drop(coroutine);
    assert_eq!(dropped.get(), 2);
    let in_function = Counts(dropped.clone());
    drop(Coroutine::new(move |_: &Yielder<(), ()>, ()| drop(in_function)));
    assert_eq!(dropped.get(), 3, "the function of one that never ran is dropped");
}

#[test]
fn a_panic_is_raised_again_on_the_parent_with_its_payload() {
    let mut coroutine = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
        yielder.suspend(());
        std::panic::panic_any(17_u64);
    });
    coroutine.resume(());
    let payload = catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&17_u64));
    assert!(coroutine.done());
    assert_eq!(coroutine.try_resume(()), Err(cfi_stack::Error::Finished));
}

#[test]
fn on_parent_stack_runs_there() {
    let here = std::hint::black_box(0_u8);
    let here = (&raw const here).addr();
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), u8>, ()| {
        let there = yielder.on_parent_stack(|| {
            let local = std::hint::black_box(0_u8);
            (&raw const local).addr()
        });
        assert!(here.abs_diff(there) < 1 << 20);
        yielder.suspend(1);
        let payload =
            catch_unwind(AssertUnwindSafe(|| yielder.on_parent_stack(|| std::panic::panic_any(5_u8)))).unwrap_err();
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
    let (base, limit) = (stack.base().get(), stack.limit().get());
    let there = on_stack(stack, || {
        let local = std::hint::black_box(0_u8);
        (&raw const local).addr()
    });
    assert!((limit..base).contains(&there));
    let payload = catch_unwind(|| on_stack(DefaultStack::default(), || std::panic::panic_any(5_u8))).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&5_u8));
    let _ = (MIN_STACK_SIZE, RefCell::new(0), ScopedCoroutine::new(|_: &Yielder<(), ()>, ()| ()));
}
