//! The two kinds of stacks, suspended.

use cfi_stack::Error;
use cfi_stack::coroutine::stack::DefaultStack;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, Yielder};
use cfi_stack::pool::{self, Lease};
use std::arch::asm;

/// Usable bytes of a guarded stack: the least that there is.
const GUARDED: usize = 4096;
/// Usable bytes of one without a guard.
const SMALL: usize = 1024;

/// A stack that has run, and waits.
pub trait Suspended: Sized {
    /// Makes one and runs it until it is suspended.
    fn new() -> Result<Self, Error>;
    /// Runs it until it is suspended again. Says how often it was resumed by now.
    fn resume(&mut self) -> usize;
}

/// A coroutine of a page with a guard below it.
pub struct Guarded(Coroutine<(), usize, ()>);

impl Suspended for Guarded {
    fn new() -> Result<Self, Error> {
        let stack = DefaultStack::try_new(GUARDED)?;
        let body = |yielder: &Yielder<(), usize>, ()| {
            for count in 1.. {
                yielder.suspend(count);
            }
        };
        let mut guarded = Guarded(Coroutine::try_with_stack(stack, body)?);
        guarded.resume();
        Ok(guarded)
    }

    fn resume(&mut self) -> usize {
        match self.0.resume(()) {
            CoroutineResult::Yield(count) => count,
            CoroutineResult::Return(()) => 0,
        }
    }
}

/// A leased stack that shares a page with others, switched by the library's stubs as its engine level does.
pub struct Small(Lease);

/// The library's bookkeeping of a stack, which is its own business.
type Slot = u8;

// The symbols are hidden: they can be named in the same program and in no other.
unsafe extern "C" {
    fn cfi_stack_prepare(slot: *mut Slot, entry: unsafe extern "C" fn(usize, usize, *mut Slot) -> usize, data: usize);
    fn cfi_stack_resume();
    fn cfi_stack_suspend();
}

/// Calls a stub of two slots (here always the same) and a word, which gives back a word.
macro_rules! switch {
    ($stub:ident, $slot:expr, $word:expr) => {{
        let word: usize;
        #[cfg(target_arch = "x86_64")]
        asm!(
            "call {stub}",
            "endbr64",
            stub = sym $stub,
            inlateout("rdi") $slot => _,
            inlateout("rsi") $slot => _,
            inlateout("rdx") $word => _,
            lateout("rax") word,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
        #[cfg(target_arch = "aarch64")]
        asm!(
            "bl {stub}",
            "hint #36", // bti j
            stub = sym $stub,
            inlateout("x0") $slot => word,
            inlateout("x1") $slot => _,
            inlateout("x2") $word => _,
            clobber_abi("C"),
        );
        word
    }};
}

unsafe extern "C" fn count(_: usize, _: usize, slot: *mut Slot) -> usize {
    for count in 1.. {
        // SAFETY: this function runs on the slot's stack.
        unsafe { switch!(cfi_stack_suspend, slot, count) };
    }
    0
}

impl Suspended for Small {
    fn new() -> Result<Self, Error> {
        let mut small = Small(pool::lease_small(SMALL)?);
        // SAFETY: just leased: nothing is on it.
        unsafe { cfi_stack_prepare(small.0.slot().as_ptr().cast(), count, 0) };
        small.resume();
        Ok(small)
    }

    fn resume(&mut self) -> usize {
        // SAFETY: prepared by `new`; it suspends itself whenever it is resumed.
        unsafe { switch!(cfi_stack_resume, self.0.slot().as_ptr().cast::<Slot>(), 0_usize) }
    }
}
