//! How a coroutine ends that does not come to its end by itself: unwound, and dropped.

use super::body::ForcedUnwind;
use super::{Coroutine, Ended, crossing, stack};
use crate::pac::Tampered;
#[cfg(target_arch = "x86_64")]
use crate::switch::inlined;
use crate::tamper;
use std::mem::{ManuallyDrop, forget};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

impl<Input, Yield, Return, Stack: stack::Stack> Drop for Coroutine<Input, Yield, Return, Stack> {
    #[inline]
    fn drop(&mut self) {
        if !self.done() {
            self.end();
        }
        // SAFETY: self is being dropped.
        unsafe { ManuallyDrop::drop(&mut self.stack) };
    }
}

impl<Input, Yield, Return, Stack: stack::Stack> Coroutine<Input, Yield, Return, Stack> {
    #[cold]
    pub(super) fn unwind(&mut self) {
        if cfg!(panic = "abort") && self.started() {
            panic!("a suspended coroutine cannot be unwound in a program whose panics abort");
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as in `cross`.
        if let Some(function) = unsafe { inlined::Function::take(self.slot) } {
            self.finish();
            return function.drop();
        }
        loop {
            // SAFETY: as in `cross`; the coroutine sees what it is resumed for and takes no input.
            let came = unsafe { crossing::resume_to_unwind(self.slot) };
            match self.settle(came) {
                Ended::Panicked(payload) if !payload.is::<ForcedUnwind>() => resume_unwind(payload),
                Ended::Refused => return,
                _ => {}
            }
        }
    }

    /// Unwinds a coroutine that is being dropped. When that panics its memory goes, and the panic goes on.
    #[cold]
    fn end(&mut self) {
        if cfg!(panic = "abort") && self.started() {
            if self.stack.slot(stack::Private(())).is_none() {
                eprintln!(
                    "cfi-stack: a suspended coroutine on memory of the program's own cannot be unwound where panics abort"
                );
                std::process::abort();
            }
            // Its pool does not take a suspended stack back.
            return;
        }
        // What is dropped on the way can panic too. The frames are gone when the coroutine is finished, not before.
        let mut first = None;
        while let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.unwind())) {
            match first {
                None => first = Some(payload),
                // Dropping it could panic again.
                Some(_) => forget(payload),
            }
        }
        if !self.done() {
            // It is being dropped, so it does not run; a slot that says so was rewritten, and its frames would lose their ground.
            tamper::end(Tampered {
                evidence: "a coroutine that is dropped says that it runs",
                slot: self.slot.addr().get(),
            });
        }
        if let Some(payload) = first {
            // SAFETY: `drop` does not come to do it.
            unsafe { ManuallyDrop::drop(&mut self.stack) };
            resume_unwind(payload);
        }
    }
}
