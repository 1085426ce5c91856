//! More than one stack, and the mistakes that a caller can make with them.

use crate::attack::{DEPTH, Scene, policy, zero_address};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack};

/// Enters `recurse` on a stack with an activation of its own.
fn recurse(
    stack: &mut Stack,
    thread: &Thread,
    activation: &Activation,
    depth: usize,
    native: usize,
    context: usize,
) -> Result<Exit, Error> {
    let act = std::ptr::from_ref(activation).expose_provenance();
    // SAFETY: the hand-made functions follow the engine's rules; the thread is the caller's own.
    unsafe { stack.enter(thread, activation, managed::recurse_a().start, [act, depth, native, context]) }
}

fn right(result: &Result<Exit, Error>, depth: usize, more: u64) -> Result<(), String> {
    if *result == Ok(Exit::Returned(managed::recursion_sum(depth as u64) + more)) {
        Ok(())
    } else {
        Err(format!("{depth} deep: {result:x?}"))
    }
}

/// S10.
pub fn threads(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("two at once", &run(two_threads), &[Code::C]);
    tally.report()
}

fn two_threads() -> Verdict {
    const ROUNDS: usize = 100;
    let _code = managed::register();
    let work = |always: bool| -> Result<(), String> {
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        let policy = Policy { relocate_always: always, ..policy() };
        for round in 0..ROUNDS {
            let mut stack = Stack::new(&thread, policy).map_err(|error| error.to_string())?;
            let activation = Activation::new();
            let depth = 20 + round;
            right(&recurse(&mut stack, &thread, &activation, depth, zero_address(), 0), depth, 0)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(move || work(false)), scope.spawn(move || work(true))];
        let results = threads.map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())));
        results.into_iter().collect::<Result<Vec<()>, String>>()
    })?;
    Ok(Code::C)
}

/// S11.
pub fn alternating(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("two stacks, one activation", &run(take_turns), &[Code::C]);
    tally.report()
}

fn take_turns() -> Verdict {
    let Scene { stack: mut first, activation, thread, _code } = Scene::new(policy())?;
    let mut second = Stack::new(&thread, policy()).map_err(|error| error.to_string())?;
    for round in 0..100 {
        let stack = if round % 2 == 0 { &mut first } else { &mut second };
        let depth = round * 7;
        right(&recurse(stack, &thread, &activation, depth, zero_address(), 0), depth, 0)?;
    }
    Ok(Code::C)
}

/// What a native callee needs to enter another stack.
struct Inner<'a> {
    stack: Stack,
    thread: &'a Thread,
    activation: Activation,
    outer: &'a Activation,
    failed: Option<String>,
}

extern "C" fn enter_inner(inner: usize, _: usize, _: usize) -> u64 {
    // SAFETY: `nest` passes a live `Inner` that nobody else uses meanwhile.
    let inner = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Inner<'_>>(inner) };
    let busy = recurse(&mut inner.stack, inner.thread, inner.outer, 1, zero_address(), 0);
    if busy != Err(Error::Busy) {
        inner.failed = Some(format!("the outer activation was taken twice: {busy:x?}"));
    }
    let result = recurse(&mut inner.stack, inner.thread, &inner.activation, DEPTH, zero_address(), 0);
    if let Err(text) = right(&result, DEPTH, 0) {
        inner.failed = Some(text);
    }
    5
}

/// S12.
pub fn nested(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for depth in [0, 5, 100, DEPTH] {
        for always in [false, true] {
            let what = if always { ", moving at every call" } else { "" };
            tally.attack(&format!("from {depth} deep{what}"), &run(|| nest(depth, always)), &[Code::C]);
        }
    }
    tally.report()
}

fn nest(depth: usize, always: bool) -> Verdict {
    let policy = Policy { relocate_always: always, ..policy() };
    let Scene { mut stack, activation, thread, _code } = Scene::new(policy)?;
    let mut inner = Inner {
        stack: Stack::new(&thread, policy).map_err(|error| error.to_string())?,
        thread: &thread,
        activation: Activation::new(),
        outer: &activation,
        failed: None,
    };
    let native = enter_inner as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let place = (&raw mut inner).expose_provenance();
    for _ in 0..3 {
        right(&recurse(&mut stack, &thread, &activation, depth, native, place), depth, 5)?;
    }
    match inner.failed {
        Some(text) => Err(text),
        None => Ok(Code::C),
    }
}

/// S13.
pub fn mistakes(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("policies", &run(impossible_policies), &[Code::E]);
    tally.report()
}

fn impossible_policies() -> Verdict {
    let mut scene = Scene::new(policy())?;
    let base = policy();
    let wrong = [
        Policy { initial: 0, ..base },
        Policy { initial: 1, ..base },
        Policy { initial: usize::MAX, ..base },
        Policy { maximum: 0, ..base },
        Policy { maximum: usize::MAX, ..base },
        Policy { guard: 0, ..base },
        Policy { guard: 1, ..base },
        Policy { reserve: 0, ..base },
        Policy { reserve: 4096, ..base },
        Policy { smallest_frame: 0, ..base },
        Policy { shadow_reserve: 0, ..base },
    ];
    for policy in wrong {
        match Stack::new(&scene.thread, policy) {
            Err(Error::Policy(_)) => {}
            result => return Err(format!("{policy:?}: {result:?}")),
        }
    }
    scene.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::E)
}
