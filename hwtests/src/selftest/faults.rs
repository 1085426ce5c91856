//! A fault in managed code: the engine's handler sends it out by `leave`.

use crate::attack::{Scene, policy};
use crate::child::{Verdict, handle, run};
use crate::class::Class;
use crate::cpu;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::leave_from_signal;
use cfi_stack::{Error, Exit, Policy, thread};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// An address that nothing is ever mapped at.
const NOWHERE: usize = 16;
const LOAD: usize = 0;
const UNDEFINED: usize = 1;

static REFUSED: AtomicBool = AtomicBool::new(false);
static SEEN: AtomicU64 = AtomicU64::new(0);

extern "C" fn leave(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SEEN.fetch_add(1, Relaxed);
    let left = thread::current_activation().is_some_and(|activation| {
        // SAFETY: the context is this handler's, which runs on the alternate stack.
        unsafe { leave_from_signal(context, activation, 1000 + signal as u64) }.is_ok()
    });
    if !left {
        // SAFETY: async-signal-safe; the fault was not managed code's, and there is no way on.
        unsafe { libc::_exit(99) }
    }
}

/// S05.
pub fn leave_by_signal(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for always in [false, true] {
        for depth in [0, 1, 30, 100, 300, 2000] {
            let depth = if always { depth.min(200) } else { depth };
            for (what, kind, signal) in
                [("load", LOAD, libc::SIGSEGV), ("undefined instruction", UNDEFINED, libc::SIGILL)]
            {
                let end = run(|| fault(always, depth, kind, signal));
                let always = if always { ", moving at every call" } else { "" };
                tally.attack(&format!("{what} {depth} deep{always}"), &end, &[Code::C]);
            }
        }
    }
    tally.attack("a fault of native code is refused", &run(refused), &[Code::E]);
    tally.report()
}

fn fault(always: bool, depth: usize, kind: usize, signal: i32) -> Verdict {
    let mut scene = Scene::new(Policy { relocate_always: always, ..policy() })?;
    handle(libc::SIGSEGV, leave, libc::SA_ONSTACK);
    handle(libc::SIGILL, leave, libc::SA_ONSTACK);
    for _ in 0..3 {
        let before = cpu::shadow_pointer();
        let result = scene.enter(managed::fault(), depth, NOWHERE, kind);
        let after = cpu::shadow_pointer();
        if result != Ok(Exit::Left(1000 + signal as u64)) {
            return Err(format!("{result:x?}"));
        }
        if before != after {
            return Err(format!("the shadow-stack pointer was {before:#x} and is {after:#x}"));
        }
        scene.recurse_right(managed::recurse_a(), 300.min(depth))?;
    }
    Ok(Code::C)
}

extern "C" fn refuse(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if let Some(activation) = thread::current_activation() {
        // SAFETY: as in `leave`.
        let result = unsafe { leave_from_signal(context, activation, 1) };
        REFUSED.store(result == Err(Error::NotManaged), Relaxed);
    }
}

extern "C" fn raise(_: usize, _: usize, _: usize) -> u64 {
    // SAFETY: a signal to this thread, which has a handler for it.
    unsafe { libc::raise(libc::SIGUSR1) };
    0
}

fn refused() -> Verdict {
    let mut scene = Scene::new(policy())?;
    handle(libc::SIGUSR1, refuse, libc::SA_ONSTACK);
    let raise = raise as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let result = scene.enter(managed::recurse_a(), 100, raise, 0);
    if result != Ok(Exit::Returned(managed::recursion_sum(100))) {
        return Err(format!("{result:x?}"));
    }
    if REFUSED.load(Relaxed) { Ok(Code::E) } else { Err("it was not refused".into()) }
}
