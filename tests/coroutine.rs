//! The coroutine face: what its peers do, in one place, and what nobody may do.
#![cfg(any(all(target_arch = "x86_64", target_os = "linux"), target_arch = "aarch64"))]

use cfi_stack::Error;
use cfi_stack::coroutine::stack::{DefaultStack, MIN_STACK_SIZE, Stack, StackPointer};
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder, on_stack};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;

/// The address of a local variable of the caller's, more or less.
#[inline(never)]
fn here() -> usize {
    let local = std::hint::black_box(0_u8);
    (&raw const local).addr()
}

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
        panic_any(17_u64);
    });
    coroutine.resume(());
    let payload = catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&17_u64));
    assert!(coroutine.done());
    assert_eq!(coroutine.try_resume(()), Err(cfi_stack::Error::Finished));
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

#[test]
fn a_hundred_thousand_rounds_leak_nothing() {
    fn mappings() -> usize {
        std::fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count())
    }
    let round = |index: u32| {
        let mut coroutine = Coroutine::new(move |yielder: &Yielder<u32, u32>, input: u32| {
            let text = String::from("on the heap");
            let input = yielder.suspend(input);
            text.len() as u32 + input
        });
        assert_eq!(coroutine.resume(index), CoroutineResult::Yield(index));
        // One in eight is unwound.
        if !index.is_multiple_of(8) {
            assert_eq!(coroutine.resume(1), CoroutineResult::Return(12));
        }
    };
    (0..1000).for_each(round);
    let before = mappings();
    (0..100_000).for_each(round);
    assert!(mappings() <= before + 20, "{} mappings, then {}", before, mappings());
}

#[test]
fn what_is_forgotten_is_listed_with_its_place() {
    let line = line!() + 1;
    let mut forgotten = Coroutine::new(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
    forgotten.resume(());
    std::mem::forget(forgotten);
    let created_there = |leak: &cfi_stack::pool::Leak| {
        leak.created.is_some_and(|place| place.file().ends_with("tests/coroutine.rs") && place.line() == line)
    };
    let leaks = cfi_stack::pool::leaks();
    let found: Vec<_> = leaks.iter().filter(|leak| created_there(leak)).collect();
    assert!(matches!(found[..], [leak] if leak.suspended), "{found:?}");
}

/// Memory of the test's own, with a guard that nobody comes to.
struct Own(Box<[u128]>, usize);
// SAFETY: the box stays where it is; tests do not overflow it.
unsafe impl Stack for Own {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.0.as_ptr_range().end.addr() - self.1).unwrap()
    }
    fn limit(&self) -> StackPointer {
        StackPointer::new(self.0.as_ptr().addr()).unwrap()
    }
}

fn own(bytes: usize, off: usize) -> Own {
    Own(vec![0_u128; bytes / 16].into_boxed_slice(), off)
}

#[test]
fn memory_of_the_programs_own_serves() {
    let mut stack = own(256 << 10, 0);
    for _ in 0..50 {
        let mut coroutine = Coroutine::with_stack(stack, |yielder: &Yielder<(), usize>, ()| {
            yielder.suspend(here());
        });
        let local = coroutine.resume(()).as_yield().unwrap();
        coroutine.resume(());
        stack = coroutine.into_stack();
        assert!((stack.limit().get()..stack.base().get()).contains(&local));
    }
    let mut dropped = Coroutine::with_stack(stack, |yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
    dropped.resume(());
}

#[test]
fn impossible_stacks_are_typed_errors() {
    let body = |_: &Yielder<(), ()>, ()| ();
    assert!(matches!(Coroutine::try_with_stack(own(1024, 0), body), Err(Error::Size { .. })));
    assert!(matches!(Coroutine::try_with_stack(own(1 << 16, 8), body), Err(Error::Size { .. })));
    assert!(matches!(DefaultStack::try_new(usize::MAX), Err(Error::Size { .. })));
    assert!(matches!(DefaultStack::try_new(1 << 60), Err(Error::Size { .. } | Error::Memory { .. })));
    let refused = DefaultStack::new(usize::MAX).unwrap_err();
    assert!(refused.get_ref().unwrap().is::<Error>());
    assert!(DefaultStack::new(0).unwrap().base().get() > 0, "less than the least is the least");
    let large = [1_u8; 64 << 10];
    let stack = DefaultStack::new(MIN_STACK_SIZE).unwrap();
    let refused = Coroutine::try_with_stack(stack, move |_: &Yielder<(), ()>, ()| large);
    assert!(matches!(refused, Err(Error::Size { .. })));
}

#[test]
fn a_stack_is_lent_and_comes_back() {
    let mut stack = DefaultStack::new(16 << 10).unwrap();
    let mut total = 0;
    for round in 0..100 {
        let coroutine = ScopedCoroutine::with_stack(&mut stack, |yielder: &Yielder<u32, ()>, input| {
            total += input;
            total += yielder.suspend(());
        });
        coroutine.scope(|mut coroutine| {
            coroutine.as_mut().resume(round);
            if round % 2 == 0 {
                coroutine.as_mut().resume(1000);
            }
        });
    }
    assert_eq!(total, 4950 + 50_000);
    let taken = Coroutine::with_stack(stack, |_: &Yielder<(), ()>, ()| ());
    assert!(catch_unwind(AssertUnwindSafe(|| taken.into_stack())).is_err(), "not before it is finished");
}

#[cfg(target_os = "linux")]
mod overflow {
    use super::*;
    use std::ptr::null_mut;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static LIMIT: AtomicUsize = AtomicUsize::new(0);

    /// Ends the process with 77 if the fault lies within a guard's reach below the stack.
    extern "C" fn on_fault(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel's for a SIGSEGV.
        let address = unsafe { (*info).si_addr() }.addr();
        let limit = LIMIT.load(Ordering::Relaxed);
        let code = if (limit.wrapping_sub(64 << 10)..limit).contains(&address) { 77 } else { 78 };
        // SAFETY: ends the process, which is the test's child.
        unsafe { libc::_exit(code) };
    }

    #[expect(unconditional_recursion, reason = "that is what overflows")]
    #[inline(never)]
    fn recurses(depth: u64) -> u64 {
        let local = std::hint::black_box([depth; 32]);
        recurses(depth + 1) + std::hint::black_box(&local)[3]
    }

    #[test]
    fn an_overflow_ends_in_the_guard() {
        // SAFETY: the child touches nothing that another thread of the parent may have locked, but the pools' lists of its own thread.
        let child = unsafe {
            let stack = DefaultStack::new(16 << 10).unwrap();
            LIMIT.store(stack.limit().get(), Ordering::Relaxed);
            let mut coroutine = Coroutine::with_stack(stack, |_: &Yielder<(), u64>, ()| recurses(0));
            let child = libc::fork();
            if child == 0 {
                let alternate = libc::mmap(null_mut(), 1 << 16, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
                let stack = libc::stack_t { ss_sp: alternate, ss_flags: 0, ss_size: 1 << 16 };
                libc::sigaltstack(&stack, null_mut());
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(libc::SIGSEGV, &action, null_mut());
                coroutine.resume(());
                libc::_exit(79);
            }
            child
        };
        let mut status = 0;
        // SAFETY: the child is this function's own.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 77);
    }
}

/// Random programs over a few coroutines, against a plain model.
mod programs {
    use super::*;
    use quickcheck::{Arbitrary, Gen, QuickCheck, TestResult};

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Create { place: usize, length: u32, panics: bool, large: bool },
        Resume { place: usize, input: u32 },
        Unwind { place: usize },
        Drop { place: usize },
        Nest { place: usize, into: usize, input: u32 },
    }

    const PLACES: usize = 6;

    impl Arbitrary for Step {
        fn arbitrary(gen_: &mut Gen) -> Self {
            let place = usize::arbitrary(gen_) % PLACES;
            let input = u32::arbitrary(gen_) % 1000;
            match u8::arbitrary(gen_) % 10 {
                0..=2 => Step::Create {
                    place,
                    length: input % 6,
                    panics: u8::arbitrary(gen_).is_multiple_of(4),
                    large: bool::arbitrary(gen_),
                },
                3..=6 => Step::Resume { place, input },
                7 => Step::Unwind { place },
                8 => Step::Drop { place },
                _ => Step::Nest { place, into: usize::arbitrary(gen_) % PLACES, input },
            }
        }
    }

    /// Yields running sums `length` times; counts its own end.
    fn make(length: u32, panics: bool, large: bool, ended: &Rc<Cell<u32>>) -> Coroutine<u32, u32, u64> {
        let counts = Counts(ended.clone());
        let ballast = [length; 40];
        let body = move |yielder: &Yielder<u32, u32>, mut input: u32| {
            let _counts = &counts;
            let mut sum = 0;
            for _ in 0..length {
                sum += input;
                input = yielder.suspend(sum);
            }
            if panics {
                panic_any(sum + input);
            }
            u64::from(sum + input)
        };
        match large {
            true => Coroutine::new(move |yielder, input| body(yielder, input) + u64::from(ballast[7] - length)),
            // A panic on it: the unwinder of arm64 wants more than 16 KiB when it is used first.
            false => Coroutine::with_stack(DefaultStack::new(64 << 10).unwrap(), body),
        }
    }

    type Place = (Coroutine<u32, u32, u64>, Model);

    #[derive(Clone, Copy)]
    struct Model {
        left: u32,
        sum: u32,
        panics: bool,
        done: bool,
    }

    #[derive(Debug, PartialEq)]
    enum Seen {
        Yield(u32),
        Return(u64),
        Panic(u32),
        Finished,
    }

    impl Model {
        fn resume(&mut self, input: u32) -> Seen {
            if self.done {
                return Seen::Finished;
            }
            self.sum += input;
            if self.left > 0 {
                self.left -= 1;
                return Seen::Yield(self.sum);
            }
            self.done = true;
            if self.panics { Seen::Panic(self.sum) } else { Seen::Return(u64::from(self.sum)) }
        }
    }

    fn resume(coroutine: &mut Coroutine<u32, u32, u64>, input: u32) -> Seen {
        match catch_unwind(AssertUnwindSafe(|| coroutine.try_resume(input))) {
            Ok(Ok(CoroutineResult::Yield(value))) => Seen::Yield(value),
            Ok(Ok(CoroutineResult::Return(value))) => Seen::Return(value),
            Ok(Err(error)) => {
                assert_eq!(error, Error::Finished);
                Seen::Finished
            }
            Err(payload) => Seen::Panic(*payload.downcast_ref().unwrap()),
        }
    }

    fn behaves(steps: Vec<Step>) -> TestResult {
        let ended = Rc::new(Cell::new(0));
        let (mut made, mut gone) = (0, 0);
        let mut places: [Option<Place>; PLACES] = Default::default();
        for step in steps {
            match step {
                Step::Create { place, length, panics, large } => {
                    gone += u32::from(places[place].as_ref().is_some_and(|(_, model)| !model.done));
                    let model = Model { left: length, sum: 0, panics, done: false };
                    places[place] = Some((make(length, panics, large, &ended), model));
                    made += 1;
                }
                Step::Resume { place, input } => {
                    let Some((coroutine, model)) = &mut places[place] else { continue };
                    let before = model.done;
                    assert_eq!(resume(coroutine, input), model.resume(input));
                    assert_eq!(coroutine.done(), model.done);
                    gone += u32::from(model.done && !before);
                }
                Step::Unwind { place } => {
                    let Some((coroutine, model)) = &mut places[place] else { continue };
                    coroutine.force_unwind();
                    gone += u32::from(!model.done);
                    model.done = true;
                    assert!(coroutine.done());
                }
                Step::Drop { place } => {
                    gone += u32::from(places[place].take().is_some_and(|(_, model)| !model.done));
                }
                Step::Nest { place, into, input } => {
                    // One coroutine resumes another, on a stack of its own, and passes on what it sees.
                    let Some((mut coroutine, mut model)) = places[place].take() else { continue };
                    let before = model.done;
                    let wanted = model.resume(input);
                    let mut outer = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
                        yielder.suspend(());
                        let seen = resume(&mut coroutine, input);
                        (coroutine, seen)
                    });
                    outer.resume(());
                    let (coroutine, seen) = outer.resume(()).as_return().unwrap();
                    assert_eq!(seen, wanted);
                    gone += u32::from(model.done && !before);
                    let replaced = places[into].replace((coroutine, model));
                    gone += u32::from(replaced.is_some_and(|(_, model)| !model.done));
                }
            }
            assert_eq!(ended.get(), gone);
        }
        drop(places);
        assert_eq!(ended.get(), made);
        TestResult::passed()
    }

    #[test]
    fn random_programs_behave_as_the_model() {
        let tests = if std::env::var_os("CFI_STACK_EMULATED").is_some() { 20 } else { 300 };
        QuickCheck::new().rng(Gen::new(300)).tests(tests).quickcheck(behaves as fn(Vec<Step>) -> TestResult);
    }
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
