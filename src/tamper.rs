//! The end for evidence of tampering: one line on stderr, then SIGABRT.

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
