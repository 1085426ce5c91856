//! The fault handler: turns the faults that compiled code means as traps into traps, and no others.
//!
//! It runs on the thread's alternate stack (the library saw to that). A fault is a trap when it happened at an
//! instruction that the compiler marked as trapping, with the signal that such an instruction raises and, for
//! memory, at an address of a memory. Everything else is told in one line and ends the process by the same signal:
//! an authentication failure, a shadow-stack violation, a stack's guard page, an error of native code.

use crate::context::Context;
use crate::error::Error;
use crate::trap::Trap;
use cfi_stack::engine::leave_from_signal;
use cfi_stack::thread::current_activation;
use std::ffi::c_void;
use std::ptr;

const SIGNALS: [(i32, &str); 5] = [
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGTRAP, "SIGTRAP"),
    (libc::SIGFPE, "SIGFPE"),
];

/// si_code of an address without a mapping, and of one without permission.
const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;

/// Installs the handler.
///
/// # Errors
/// [`Error::System`] when the system refuses.
pub fn install() -> Result<(), Error> {
    for (signal, name) in SIGNALS {
        // SAFETY: an all-zero `sigaction` is a valid one, with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` is initialised, and `handler` has the signature that SA_SIGINFO demands.
        if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::System(format!("cannot install a handler for {name}: {error}")));
        }
    }
    Ok(())
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo and ucontext to a SA_SIGINFO handler; for these signals `si_addr` is set.
    let (pc, code, address) = unsafe { (pc(context), (*info).si_code, (*info).si_addr().addr()) };
    let activation = current_activation();
    let managed = activation.is_some_and(|activation| {
        // SAFETY: every activation of this program is the first field of a context, which lives while a stack runs on it.
        let context = unsafe { activation.cast::<Context>().as_ref() };
        // SAFETY: the index changes only while no managed code runs (`with_code`).
        unsafe { &*context.shared.code.get() }.is_managed(pc)
    });
    if let (true, Some(activation)) = (managed, activation) {
        // SAFETY: as above.
        let index = unsafe { &*activation.cast::<Context>().as_ref().shared.code.get() };
        let trap = index.trap_at(pc).filter(|trap| match trap {
            Trap::MemoryOutOfBounds => {
                matches!(signal, libc::SIGSEGV | libc::SIGBUS)
                    && matches!(code, SEGV_MAPERR | SEGV_ACCERR)
                    && index.is_memory(address)
            }
            _ => matches!(signal, libc::SIGILL | libc::SIGTRAP | libc::SIGFPE),
        });
        if let Some(trap) = trap {
            // SAFETY: the kernel interrupted managed code of this activation at an instruction that only traps:
            // `context` is its ucontext, and no frame of the span owes anything.
            if unsafe { leave_from_signal(context, activation, trap.code()) }.is_ok() {
                return;
            }
        }
    }
    tell(signal, code, pc, address, managed);
    // SAFETY: restoring the default action is always allowed. Returning then repeats the fault, with its own code.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    if code <= 0 {
        // Sent, not caused by an instruction: nothing would repeat it.
        // SAFETY: raising a signal whose action is the default ends the process.
        unsafe { libc::raise(signal) };
    }
}

/// The interrupted instruction.
///
/// # Safety
/// `context` is the ucontext of a signal handler.
unsafe fn pc(context: *mut c_void) -> usize {
    // SAFETY: the caller's promise.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    #[cfg(target_arch = "x86_64")]
    return context.uc_mcontext.gregs[libc::REG_RIP as usize] as usize;
    #[cfg(target_arch = "aarch64")]
    return context.uc_mcontext.pc as usize;
}

/// One line about a fault that ends the process, written without allocation.
fn tell(signal: i32, code: i32, pc: usize, address: usize, managed: bool) {
    let name = SIGNALS.iter().find(|known| known.0 == signal).map_or("?", |known| known.1);
    let mut line = Line { bytes: [0; 256], len: 0 };
    line.text("wasm: fatal ").text(name).text(" si_code=").number(code as i64 as u64, code < 0, 10);
    line.text(" pc=0x").number(pc as u64, false, 16).text(" addr=0x").number(address as u64, false, 16);
    line.text(if managed { " in managed code" } else { " outside managed code" }).text("\n");
    // SAFETY: the buffer is initialised up to `len`; `write` is async-signal-safe.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
}

/// Text built in place.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn text(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
        self
    }

    fn number(&mut self, value: u64, negative: bool, radix: u64) -> &mut Self {
        let mut value = if negative { value.wrapping_neg() } else { value };
        let mut digits = [0u8; 24];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(value % radix) as usize];
            value /= radix;
            if value == 0 {
                break;
            }
        }
        if negative {
            self.text("-");
        }
        let text = std::str::from_utf8(&digits[at..]).unwrap_or("?");
        self.text(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_hold_numbers_and_end_at_the_buffer() {
        let mut line = Line { bytes: [0; 256], len: 0 };
        line.number(255, false, 16).text(" ").number(-6i64 as u64, true, 10).text(" ").number(0, false, 10);
        assert_eq!(&line.bytes[..line.len], b"ff -6 0");
        line.text(&"x".repeat(1000));
        assert_eq!(line.len, 256);
    }
}
