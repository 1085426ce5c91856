//! The end for evidence of tampering, and for unwinding that has come to a stub: one line on stderr, then SIGABRT.

use crate::pac::Tampered;

/// Ends the process. Allocates nothing and takes no lock: the process is under attack.
pub fn end(tampered: Tampered) -> ! {
    let mut line = Line { text: [0; 200], used: 0 };
    line.put(b"cfi-stack: tampering: ");
    line.put(tampered.evidence.as_bytes());
    line.put(b" (at 0x");
    for shift in (0..usize::BITS / 4).rev() {
        let digit = b"0123456789abcdef"[(tampered.slot >> (shift * 4)) & 15];
        line.put(&[digit]);
    }
    line.put(b")\n");
    // SAFETY: writes from a live buffer; the result does not matter any more. abort is always allowed.
    unsafe {
        libc::write(2, line.text.as_ptr().cast(), line.used);
        libc::abort()
    }
}

/// The personality routine of `enter` and `exit` (Itanium C++ ABI, "Exception Handling", 2.5.1): unwinders ask it in either phase, and in a forced
/// unwind, before they go past the stub's frame. Behind it lie frames of managed code, on another stack and another shadow stack, which
/// no unwinder can drop. `_Unwind_Backtrace` and debuggers do not ask.
#[cfg(cfi_stack_native)]
#[unsafe(no_mangle)]
extern "C" fn cfi_stack_no_unwind() -> ! {
    const LINE: &[u8] =
        b"cfi-stack: unwinding has come to a stub: callees of `exit` must not unwind, nor managed code\n";
    // SAFETY: writes from a live buffer; the result does not matter any more. abort is always allowed.
    unsafe {
        libc::write(2, LINE.as_ptr().cast(), LINE.len());
        libc::abort()
    }
}

struct Line {
    text: [u8; 200],
    used: usize,
}

impl Line {
    fn put(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if let Some(place) = self.text.get_mut(self.used) {
                *place = byte;
                self.used += 1;
            }
        }
    }
}
