//! x86-64: the trap flag. The kernel clears it for a handler and restores it when the handler returns.

use super::{Boundary, Verdict, shared, visit};
use crate::child::{self, End};
use std::sync::atomic::Ordering::SeqCst;

/// TF: the CPU traps after every instruction (Intel SDM vol. 3, ch. 19.3.1.4).
const TRAP_FLAG: i64 = 1 << 8;
/// si_code of a trap after an instruction.
const TRAP_TRACE: i32 = 2;
/// si_code of a debug exception for which DR6 has no reason, as a hypervisor leaves it now and then. A breakpoint instruction has SI_KERNEL
/// (Linux arch/x86/kernel/traps.c, `get_si_code`, `do_int3`).
const TRAP_BRKPT: i32 = 1;
/// si_code of a signal by `raise`.
const SI_TKILL: i32 = -6;

/// A handler that returns with the flag restored comes to a trap behind the instruction that it returns to.
pub(super) const TRAPS_AFTER: bool = true;

/// Why nothing can be stepped here, if so.
pub fn unavailable(_: &crate::class::Class) -> Option<&'static str> {
    None
}

pub(super) fn run(body: impl FnOnce() -> Verdict) -> End {
    child::run(body)
}

pub(super) fn boundary(context: &libc::ucontext_t) -> Boundary {
    let register = |index: i32| context.uc_mcontext.gregs[index as usize] as usize;
    Boundary {
        index: 0,
        number: 0,
        pc: register(libc::REG_RIP),
        fp: register(libc::REG_RBP),
        arguments: [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(register),
        slot: register(libc::REG_R13),
    }
}

extern "C" fn trapped(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: what the kernel passes to a SA_SIGINFO handler.
    let reason = unsafe { (*info).si_code };
    if ![TRAP_TRACE, TRAP_BRKPT, SI_TKILL].contains(&reason) {
        child::caught(signal, info, context);
    }
    // SAFETY: as above; nobody else looks at it until the handler returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let shared = shared();
    let flags = &mut context.uc_mcontext.gregs[libc::REG_EFL as usize];
    if shared.armed.load(SeqCst) == 0 {
        *flags &= !TRAP_FLAG;
    } else {
        *flags |= TRAP_FLAG;
        // A trap is a fault of the thread's own, which nobody holds back: what a profiler's signal would meet is what counts.
        // SAFETY: the mask that the kernel has saved.
        if unsafe { libc::sigismember(&context.uc_sigmask, libc::SIGPROF) } == 1 {
            if let Some(index) = shared.find(boundary(context).pc) {
                shared.held[index].fetch_add(1, SeqCst);
            }
        } else {
            visit(shared, context);
        }
    }
}

pub(super) fn arm() {
    child::handle(libc::SIGTRAP, trapped, libc::SA_ONSTACK);
    shared().armed.store(1, SeqCst);
    // SAFETY: a signal to this thread, which has a handler for it.
    unsafe { libc::raise(libc::SIGTRAP) };
}
