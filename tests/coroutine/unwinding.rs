//! Panics and destructors: each runs once, whatever the others do.

use crate::Counts;
use cfi_stack::Error;
use cfi_stack::coroutine::stack::DefaultStack;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;

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
        panic_any(17_u64);
    });
    coroutine.resume(());
    let payload = catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&17_u64));
    assert!(coroutine.done());
    assert_eq!(coroutine.try_resume(()), Err(cfi_stack::Error::Finished));
}

#[test]
fn closures_results_and_payloads_are_dropped_once() {
    let dropped = Rc::new(Cell::new(0));
    let make = |words: usize| (Counts(dropped.clone()), vec![0_u64; words], [words; 9]);
    let large = make(3);
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<Counts, Counts>, input: Counts| {
        let _large = &large;
        drop(yielder.suspend(input));
        yielder.suspend(Counts(large.0.0.clone()))
    });
    drop(coroutine.resume(Counts(dropped.clone())));
    assert_eq!(dropped.get(), 1);
    drop(coroutine.resume(Counts(dropped.clone())));
    assert_eq!(dropped.get(), 3);
    let result = coroutine.resume(Counts(dropped.clone())).as_return().unwrap();
    assert_eq!(dropped.get(), 4, "the closure went with the function");
    drop(result);
    drop(coroutine);
    assert_eq!(dropped.get(), 5);
    let mut finished = Coroutine::new(|_: &Yielder<Counts, ()>, input: Counts| drop(input));
    finished.resume(Counts(dropped.clone()));
    assert_eq!(finished.try_resume(Counts(dropped.clone())), Err(Error::Finished));
    assert!(catch_unwind(AssertUnwindSafe(|| finished.resume(Counts(dropped.clone())))).is_err());
    assert_eq!(dropped.get(), 8, "what nobody takes is dropped");
}

#[test]
fn destructors_run_from_the_youngest_to_the_oldest() {
    struct Says(u32, Rc<RefCell<Vec<u32>>>);
    impl Drop for Says {
        fn drop(&mut self) {
            self.1.borrow_mut().push(self.0);
        }
    }
    fn deep(yielder: &Yielder<(), ()>, level: u32, order: &Rc<RefCell<Vec<u32>>>) {
        let _says = Says(level, order.clone());
        if level == 9 { yielder.suspend(()) } else { deep(yielder, level + 1, order) }
    }
    let order = Rc::new(RefCell::new(Vec::new()));
    let (captured, shared) = (Says(100, order.clone()), order.clone());
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
        let _captured = &captured;
        deep(yielder, 0, &shared);
    });
    coroutine.resume(());
    coroutine.force_unwind();
    assert!(coroutine.done());
    assert_eq!(*order.borrow(), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 100]);
    coroutine.force_unwind();
}

#[test]
fn unwinding_that_is_caught_is_begun_again_until_the_function_returns() {
    let seen = Rc::new(Cell::new(0));
    let counts = seen.clone();
    let mut stubborn = Coroutine::new(move |yielder: &Yielder<(), u32>, ()| {
        for round in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| yielder.suspend(round)));
            assert!(caught.is_err());
            counts.set(counts.get() + 1);
        }
        7
    });
    stubborn.resume(());
    stubborn.force_unwind();
    assert_eq!((seen.get(), stubborn.done()), (3, true));
}

#[test]
fn another_panic_while_unwinding_is_raised_on_the_parent() {
    let make = || {
        let mut angry = Coroutine::new(|yielder: &Yielder<(), ()>, ()| {
            let _ = catch_unwind(AssertUnwindSafe(|| yielder.suspend(())));
            panic_any(11_u8);
        });
        angry.resume(());
        angry
    };
    let mut unwound = make();
    let payload = catch_unwind(AssertUnwindSafe(|| unwound.force_unwind())).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&11_u8));
    assert!(unwound.done());
    let dropped = make();
    assert_eq!(catch_unwind(AssertUnwindSafe(|| drop(dropped))).unwrap_err().downcast_ref(), Some(&11_u8));
}

#[test]
fn a_coroutine_dropped_by_a_panic_is_unwound_with_it() {
    let dropped = Rc::new(Cell::new(0));
    let counts = Counts(dropped.clone());
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
            let _counts = counts;
            yielder.suspend(());
        });
        coroutine.resume(());
        panic_any(1_u8);
    }));
    assert_eq!((caught.unwrap_err().downcast_ref(), dropped.get()), (Some(&1_u8), 1));
}

#[test]
fn resetting_runs_no_destructor_and_frees_the_stack() {
    let dropped = Rc::new(Cell::new(0));
    let mut stack = DefaultStack::new(16 << 10).unwrap();
    for started in [true, false, true] {
        let counts = Counts(dropped.clone());
        let mut coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            let _counts = counts;
            yielder.suspend(());
        });
        if started {
            coroutine.resume(());
        }
        // SAFETY: nothing relies on that destructor.
        unsafe { coroutine.force_reset() };
        assert!(coroutine.done());
        assert_eq!(coroutine.try_resume(()), Err(Error::Finished));
        stack = coroutine.into_stack();
    }
    assert_eq!(dropped.get(), 0);
}

#[test]
fn a_panic_goes_through_several_stacks() {
    fn nested(depth: u32, dropped: &Rc<Cell<u32>>) {
        let _counts = Counts(dropped.clone());
        if depth == 0 {
            panic_any(99_u32);
        }
        let dropped = dropped.clone();
        let mut coroutine = Coroutine::new(move |_: &Yielder<(), ()>, ()| nested(depth - 1, &dropped));
        coroutine.resume(());
    }
    let dropped = Rc::new(Cell::new(0));
    let payload = catch_unwind(AssertUnwindSafe(|| nested(20, &dropped))).unwrap_err();
    assert_eq!((payload.downcast_ref(), dropped.get()), (Some(&99_u32), 21));
}

#[test]
fn unwinding_a_chain_unwinds_each_of_its_stacks() {
    let dropped = Rc::new(Cell::new(0));
    let shared = dropped.clone();
    let mut outer = Coroutine::new(move |outer: &Yielder<(), ()>, ()| {
        let _outer = Counts(shared.clone());
        let inner = ScopedCoroutine::new(|_: &Yielder<(), ()>, ()| {
            let _inner = Counts(shared.clone());
            outer.suspend(());
        });
        inner.scope(|mut inner| inner.resume(()));
    });
    outer.resume(());
    drop(outer);
    assert_eq!(dropped.get(), 2);
}

/// Panics when it is dropped.
struct Loud(&'static Cell<u32>);

impl Drop for Loud {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
        std::panic::panic_any("dropped");
    }
}

#[test]
fn a_dropped_coroutine_is_unwound_to_its_end_whatever_panics_on_the_way() {
    let (drops, ended): (&'static Cell<u32>, &'static Cell<bool>) =
        (Box::leak(Box::default()), Box::leak(Box::default()));
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), Option<Loud>>, ()| {
        let _ = catch_unwind(AssertUnwindSafe(|| yielder.suspend(None)));
        for _ in 0..3 {
            let _ = catch_unwind(AssertUnwindSafe(|| yielder.suspend(Some(Loud(drops)))));
        }
        ended.set(true);
    });
    assert!(matches!(coroutine.resume(()), CoroutineResult::Yield(None)));
    let payload = catch_unwind(AssertUnwindSafe(|| drop(coroutine))).unwrap_err();
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"dropped"));
    assert!(ended.get(), "frames were left behind");
    assert_eq!(drops.get(), 3);
}
