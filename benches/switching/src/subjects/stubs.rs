//! Our switch stubs, called as the library calls them: no state is looked at, nothing is inlined.

use super::Run;
use cfi_stack::pool::{self, Lease};
use cfi_stack::thread::Thread;
use std::hint::black_box;

/// The library's bookkeeping of one stack, which is its own business.
type Slot = u8;

type Entry = unsafe extern "C" fn(usize, usize, *mut Slot) -> usize;

// The symbols are hidden: they can be named in the same program and in no other.
unsafe extern "C" {
    fn cfi_stack_prepare(slot: *mut Slot, entry: Entry, data: usize);
    fn cfi_stack_resume();
    fn cfi_stack_suspend();
    fn cfi_stack_resume_without_fp_control();
    fn cfi_stack_suspend_without_fp_control();
}

/// Calls a stub of two slots (here always the same) and a word, which gives back a word.
macro_rules! switch {
    ($stub:ident, $slot:expr, $word:expr) => {{
        let word: usize;
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!(
            "call {stub}",
            "endbr64",
            stub = sym $stub,
            inlateout("rdi") $slot => _,
            inlateout("rsi") $slot => _,
            inlateout("rdx") $word => _,
            lateout("rax") word,
            clobber_abi("sysv64"),
        );
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!(
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

macro_rules! pair {
    ($(#[$doc:meta])* $module:ident: $prepare:ident, $resume:ident, $suspend:ident) => {
        $(#[$doc])*
        pub mod $module {
            use super::*;

            unsafe extern "C" fn echo(mut word: usize, _: usize, slot: *mut Slot) -> usize {
                loop {
                    // SAFETY: this function runs on the slot's stack.
                    word = unsafe { switch!($suspend, slot, word) };
                }
            }

            unsafe extern "C" fn next(word: usize, _: usize, _: *mut Slot) -> usize {
                word + 1
            }

            /// The round trip.
            pub fn stub() -> Run {
                let (thread, lease) = stack();
                let slot = lease.slot().as_ptr().cast::<Slot>();
                // SAFETY: leased, and nothing is on the stack.
                unsafe { $prepare(slot, echo, 0) };
                Box::new(move |rounds| {
                    let _held = (&thread, &lease);
                    for round in 0..rounds {
                        // SAFETY: prepared above, and suspended in each round by the other stub of the pair.
                        black_box(unsafe { switch!($resume, slot, black_box(round as usize)) });
                    }
                })
            }

            /// A new entry on the same stack each time, which returns.
            pub fn reused() -> Run {
                let (thread, lease) = stack();
                let slot = lease.slot().as_ptr().cast::<Slot>();
                Box::new(move |rounds| {
                    let _held = (&thread, &lease);
                    for round in 0..rounds {
                        // SAFETY: leased, and what ran on the stack has returned.
                        black_box(unsafe {
                            $prepare(slot, next, 0);
                            switch!($resume, slot, black_box(round as usize))
                        });
                    }
                })
            }
        }
    };
}

pair! {
    /// Keeping MXCSR and the x87 control word, or FPCR.
    kept: cfi_stack_prepare, cfi_stack_resume, cfi_stack_suspend
}
pair! {
    /// Not keeping MXCSR and the x87 control word. A stack that they run must not end: the way out loads what was not kept.
    #[expect(dead_code, reason = "so nothing is run to its end on it")]
    not_kept: cfi_stack_prepare, cfi_stack_resume_without_fp_control, cfi_stack_suspend_without_fp_control
}

fn stack() -> (Thread, Lease) {
    let thread = Thread::attach().expect("a thread can be attached");
    (thread, pool::lease(super::ROOM).expect("there is memory for a stack"))
}
