//! The stacks below: lent, the program's own, impossible ones, forgotten ones and full ones.

use crate::here;
use cfi_stack::Error;
use cfi_stack::coroutine::stack::{DefaultStack, MIN_STACK_SIZE, Stack, StackPointer};
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder};
use std::panic::{AssertUnwindSafe, catch_unwind};

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
fn what_waits_is_listed_with_its_place_and_forgotten_or_not() {
    let line = line!() + 1;
    let make = || Coroutine::new(|yielder: &Yielder<(), ()>, ()| yielder.suspend(()));
    // Whether each of those that wait has run.
    let listed_of = |line: u32| {
        let here = |place: &std::panic::Location| place.file() == file!() && place.line() == line;
        let leaks = cfi_stack::pool::leaks().into_iter();
        leaks.filter(|leak| leak.created.is_some_and(here)).map(|leak| leak.suspended).collect::<Vec<_>>()
    };
    let listed = || listed_of(line);
    let mut ready = make();
    assert_eq!(listed(), [false]);
    ready.resume(());
    assert_eq!(listed(), [true]);
    ready.resume(());
    assert_eq!(listed(), []);
    let mut unwound = make();
    unwound.resume(());
    drop(unwound);
    drop(make());
    assert_eq!(listed(), []);
    let line_of_running = line!() + 1;
    let mut running = Coroutine::new(move |_: &Yielder<(), ()>, ()| listed_of(line_of_running));
    assert_eq!(listed_of(line_of_running), [false]);
    assert_eq!(running.resume(()).as_return(), Some(vec![]), "what runs does not wait");
    let mut forgotten = make();
    forgotten.resume(());
    std::mem::forget(forgotten);
    assert_eq!(listed(), [true]);
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
