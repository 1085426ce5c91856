//! Coroutines and futures on every class, also around managed code.

use crate::attack::policy;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::coroutine::stack::DefaultStack;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, ScopedCoroutine, Yielder, on_stack};
use cfi_stack::engine::Activation;
use cfi_stack::future::{block_on, spawn_on_stack};
use cfi_stack::thread::{Thread, current_activation};
use cfi_stack::{Error, Exit, Policy, Stack};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// S23.
pub fn face(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("values, 10,000 rounds", &run(values), &[Code::C]);
    tally.attack("64 deep", &run(deep), &[Code::C]);
    tally.attack("panics and destructors", &run(panics), &[Code::C]);
    tally.attack("a chain suspended by its oldest yielder", &run(chains), &[Code::C]);
    tally.attack("on the parent's stack, on a lent one", &run(elsewhere), &[Code::C]);
    tally.attack("never begun, reset, reused", &run(ends), &[Code::C]);
    tally.report()
}

/// Done, or what was different.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:?}, not {wanted:?}")) }
}

fn values() -> Verdict {
    let ballast = [3_u64; 9];
    let mut sums = Coroutine::new(move |yielder: &Yielder<u64, [u64; 4]>, mut input| {
        let mut sum = 0;
        while input != 0 {
            sum += input * ballast[5];
            input = yielder.suspend([sum, input, 0, !sum]);
        }
        String::from("done")
    });
    let mut sum = 0;
    for round in 1..=10_000 {
        sum += round * 3;
        same("a sum", sums.resume(round), CoroutineResult::Yield([sum, round, 0, !sum]))?;
    }
    same("the end", sums.resume(0).as_return().as_deref(), Some("done"))?;
    same("after the end", sums.try_resume(1), Err(Error::Finished))?;
    Ok(Code::C)
}

/// A chain of coroutines, each of which passes on what the next gives.
fn chain(depth: u32) -> Coroutine<u32, u32, u32> {
    Coroutine::with_stack(small(), move |yielder: &Yielder<u32, u32>, mut input| {
        if depth == 0 {
            return yielder.suspend(input + 1);
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

fn small() -> DefaultStack {
    DefaultStack::new(64 << 10).expect("there is memory")
}

fn deep() -> Verdict {
    let mut first = chain(63);
    same("through 64", first.resume(1), CoroutineResult::Yield(65))?;
    same("back through 64", first.resume(1000), CoroutineResult::Return(1000))?;
    let mut unwound = chain(63);
    unwound.resume(1);
    unwound.force_unwind();
    same("unwound", unwound.done(), true)?;
    Ok(Code::C)
}

struct Counts(Rc<Cell<u32>>);
impl Drop for Counts {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

fn panics() -> Verdict {
    let dropped = Rc::new(Cell::new(0));
    let nested = |depth: u32| {
        fn go(depth: u32, dropped: &Rc<Cell<u32>>) {
            let _counts = Counts(dropped.clone());
            if depth == 0 {
                // No hook is to be told.
                resume_unwind(Box::new(99_u32));
            }
            let dropped = dropped.clone();
            Coroutine::with_stack(small(), move |_: &Yielder<(), ()>, ()| go(depth - 1, &dropped)).resume(());
        }
        catch_unwind(AssertUnwindSafe(|| go(depth, &dropped)))
    };
    let payload = nested(12).err().and_then(|payload| payload.downcast_ref::<u32>().copied());
    same("the payload", payload, Some(99))?;
    same("destructors of a panic", dropped.replace(0), 13)?;
    let counts = Counts(dropped.clone());
    let mut suspended = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
        let _counts = counts;
        yielder.suspend(());
    });
    suspended.resume(());
    drop(suspended);
    same("destructors of a drop", dropped.get(), 1)?;
    Ok(Code::C)
}

fn chains() -> Verdict {
    let dropped = Rc::new(Cell::new(0));
    let outer = ScopedCoroutine::with_stack(small(), |outer: &Yielder<u32, u32>, first: u32| {
        let inner = ScopedCoroutine::with_stack(small(), |inner: &Yielder<(), u32>, ()| {
            let _counts = Counts(dropped.clone());
            let mut sum = first;
            for _ in 0..100 {
                sum += outer.suspend(sum);
                inner.suspend(sum);
            }
            on_stack(small(), || outer.suspend(7))
        });
        inner.scope(|mut inner| while inner.resume(()).as_yield().is_some() {});
    });
    outer.scope(|mut outer| {
        for round in 0..100 {
            same("past the inner one", outer.resume(1), CoroutineResult::Yield(round + 1))?;
        }
        same("past a lent stack", outer.resume(1), CoroutineResult::Yield(7))
    })?;
    same("destructors of the chain", dropped.get(), 1)?;
    Ok(Code::C)
}

#[inline(never)]
fn here() -> usize {
    let local = std::hint::black_box(0_u8);
    (&raw const local).addr()
}

fn elsewhere() -> Verdict {
    let parent = here();
    let mut coroutine = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
        let near = parent.abs_diff(yielder.on_parent_stack(here)) < 16 << 10;
        let payload = catch_unwind(AssertUnwindSafe(|| yielder.on_parent_stack(|| resume_unwind(Box::new(5_u8)))));
        yielder.suspend(());
        (near, payload.err().and_then(|payload| payload.downcast_ref::<u8>().copied()))
    });
    coroutine.resume(());
    same("on the parent's stack", coroutine.resume(()).as_return(), Some((true, Some(5))))?;
    same("on a lent stack", on_stack(small(), here).abs_diff(parent) > 16 << 10, true)?;
    Ok(Code::C)
}

fn ends() -> Verdict {
    let dropped = Rc::new(Cell::new(0));
    let mut stack = small();
    for round in 0..300 {
        let counts = Counts(dropped.clone());
        let mut coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            let _counts = counts;
            yielder.suspend(());
        });
        match round % 3 {
            0 => coroutine.force_unwind(),
            1 => {
                coroutine.resume(());
                // SAFETY: nothing relies on that destructor.
                unsafe { coroutine.force_reset() };
            }
            _ => {
                coroutine.resume(());
                coroutine.resume(());
            }
        }
        stack = coroutine.into_stack();
    }
    same("destructors", dropped.get(), 200)?;
    Ok(Code::C)
}

/// What a native callee needs to suspend the coroutine that managed code runs in.
struct Callee<'a> {
    yielder: &'a Yielder<(), u32>,
    activation: &'a Activation,
    lost: Cell<u32>,
}

impl Callee<'_> {
    fn look(&self) {
        let ours = current_activation().is_some_and(|current| std::ptr::eq(current.as_ptr(), self.activation));
        self.lost.set(self.lost.get() + u32::from(!ours));
    }
}

extern "C" fn suspends(callee: usize, _: usize, _: usize) -> u64 {
    // SAFETY: `inside` passes a live `Callee` that nobody changes meanwhile.
    let callee = unsafe { &*std::ptr::with_exposed_provenance::<Callee<'_>>(callee) };
    callee.look();
    callee.yielder.suspend(1);
    callee.look();
    5
}

fn recurse(
    stack: &mut Stack,
    thread: &Thread,
    activation: &Activation,
    depth: usize,
    native: extern "C" fn(usize, usize, usize) -> u64,
    context: usize,
) -> Result<(), String> {
    let act = std::ptr::from_ref(activation).expose_provenance();
    let args = [act, depth, native as usize, context];
    // SAFETY: the hand-made functions follow the engine's rules; the thread is the caller's own.
    let result = unsafe { stack.enter(thread, activation, managed::recurse_a().start, args) };
    same("a recursion", result, Ok(Exit::Returned(managed::recursion_sum(depth as u64) + 5)))
}

/// Managed code in a coroutine, whose native callee suspends that, at more and more depth.
fn inside(always: bool, first: usize) -> Coroutine<(), u32, Result<u64, String>> {
    Coroutine::new(move |yielder: &Yielder<(), u32>, ()| {
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        let policy = Policy { relocate_always: always, ..policy() };
        let mut stack = Stack::new(&thread, policy).map_err(|error| error.to_string())?;
        let activation = Activation::new();
        let callee = Callee { yielder, activation: &activation, lost: Cell::new(0) };
        let context = (&raw const callee).expose_provenance();
        for round in 0..8 {
            recurse(&mut stack, &thread, &activation, first + round * 60, suspends, context)?;
            yielder.suspend(0);
        }
        same("activations that were not the current one", callee.lost.get(), 0)?;
        Ok(stack.stats().growths)
    })
}

/// S24.
pub fn around_managed_code(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for always in [false, true] {
        let what = if always { ", moving at every call" } else { "" };
        tally.attack(&format!("one{what}"), &run(|| interleave(1, always)), &[Code::C]);
        tally.attack(&format!("two interleaved{what}"), &run(|| interleave(2, always)), &[Code::C]);
        tally.attack(&format!("seven interleaved{what}"), &run(|| interleave(7, always)), &[Code::C]);
        tally.attack(&format!("from managed code{what}"), &run(|| from_managed(always)), &[Code::C]);
    }
    tally.report()
}

fn interleave(count: usize, always: bool) -> Verdict {
    let _code = managed::register();
    let mut all: Vec<_> = (0..count).map(|index| inside(always, index * 3)).collect();
    let mut left = count;
    let mut turn = 0;
    while left > 0 {
        // Not in the same order each time.
        turn += 1 + turn % 3;
        let coroutine = &mut all[turn % count];
        if coroutine.done() {
            turn += 1;
            let Some(other) = all.iter_mut().find(|coroutine| !coroutine.done()) else { break };
            if let CoroutineResult::Return(growths) = other.resume(()) {
                same("growth", growths? > 0, true)?;
                left -= 1;
            }
            continue;
        }
        if let CoroutineResult::Return(growths) = coroutine.resume(()) {
            same("growth", growths? > 0, true)?;
            left -= 1;
        }
        same("the current activation between them", current_activation(), None)?;
    }
    Ok(Code::C)
}

/// What a native callee of managed code on the thread's own stack resumes.
struct Resumed<'a> {
    coroutines: Vec<Coroutine<(), u32, Result<u64, String>>>,
    activation: &'a Activation,
    failed: Option<String>,
}

extern "C" fn resumes(resumed: usize, _: usize, _: usize) -> u64 {
    // SAFETY: `from_managed` passes a live `Resumed` that nobody else uses meanwhile.
    let resumed = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Resumed<'_>>(resumed) };
    for coroutine in &mut resumed.coroutines {
        if !coroutine.done()
            && let CoroutineResult::Return(Err(text)) = coroutine.resume(())
        {
            resumed.failed = Some(text);
        }
        if !current_activation().is_some_and(|current| std::ptr::eq(current.as_ptr(), resumed.activation)) {
            resumed.failed = Some("the outer activation is not the current one".into());
        }
    }
    5
}

/// Coroutines that are begun by a native callee of managed code, suspended there from managed code of their own, and resumed by another.
fn from_managed(always: bool) -> Verdict {
    let _code = managed::register();
    let thread = Thread::attach().map_err(|error| error.to_string())?;
    let mut stack = Stack::new(&thread, policy()).map_err(|error| error.to_string())?;
    let activation = Activation::new();
    let mut resumed =
        Resumed { coroutines: vec![inside(always, 2), inside(always, 9)], activation: &activation, failed: None };
    let place = (&raw mut resumed).expose_provenance();
    for depth in 0..20 {
        recurse(&mut stack, &thread, &activation, depth * 10, resumes, place)?;
    }
    same("finished", resumed.coroutines.iter().all(Coroutine::done), true)?;
    resumed.failed.map_or(Ok(Code::C), Err)
}

/// S25.
pub fn futures(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("a future's stack waits", &run(waits), &[Code::C]);
    tally.attack("managed code in it waits", &run(managed_waits), &[Code::C]);
    tally.report()
}

/// Pending so many times.
struct Pauses(u32);
impl Future for Pauses {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.0 == 0 {
            return Poll::Ready(());
        }
        self.0 -= 1;
        Poll::Pending
    }
}

/// Polls to the end. Returns how often.
fn polled<F: Future>(future: F) -> (F::Output, u32) {
    let mut future = pin!(future);
    for count in 1.. {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return (value, count);
        }
    }
    unreachable!("it is not pending for ever")
}

fn waits() -> Verdict {
    let nested = spawn_on_stack(|| {
        block_on(Pauses(3))?;
        block_on(spawn_on_stack(|| block_on(Pauses(4)).map(|()| 8)))?
    });
    same("polls", polled(nested), (Ok(8), 8))?;
    same("outside", block_on(Pauses(0)), Err(Error::NoStack))?;
    Ok(Code::C)
}

extern "C" fn blocks(pauses: usize, _: usize, _: usize) -> u64 {
    block_on(Pauses(pauses as u32)).map_or(1, |()| 5)
}

fn managed_waits() -> Verdict {
    let _code = managed::register();
    let task = |first: usize| {
        spawn_on_stack(move || -> Result<(), String> {
            let thread = Thread::attach().map_err(|error| error.to_string())?;
            let mut stack = Stack::new(&thread, policy()).map_err(|error| error.to_string())?;
            let activation = Activation::new();
            for round in 0..6 {
                recurse(&mut stack, &thread, &activation, first + round * 50, blocks, round)?;
            }
            Ok(())
        })
    };
    let mut tasks: Vec<_> = (0..5).map(|index| (task(index), false)).collect();
    for _ in 0..16 {
        for (task, ready) in tasks.iter_mut().filter(|(_, ready)| !ready) {
            if let Poll::Ready(result) = Pin::new(task).poll(&mut Context::from_waker(Waker::noop())) {
                result?;
                *ready = true;
            }
        }
    }
    same("ready", tasks.iter().all(|(_, ready)| *ready), true)?;
    Ok(Code::C)
}
