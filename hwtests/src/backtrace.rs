//! Walks of this thread's own stack: by the unwind tables, as debuggers and panics do it, and by frame records, as profilers do.

use crate::cpu;
use crate::memory::peek;
use std::ffi::c_void;

unsafe extern "C" {
    fn _Unwind_Backtrace(visit: extern "C" fn(*mut c_void, *mut c_void) -> i32, argument: *mut c_void) -> i32;
    fn _Unwind_GetIP(context: *mut c_void) -> usize;
    fn _Unwind_GetCFA(context: *mut c_void) -> usize;
}

/// A frame that a walk has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where it goes on.
    pub pc: usize,
    /// Its stack pointer there: the CFA of the frame that it called.
    pub sp: usize,
}

extern "C" fn visit(context: *mut c_void, frames: *mut c_void) -> i32 {
    // SAFETY: `by_tables` passes a live vector, and the unwinder its context.
    unsafe {
        let pc = cpu::strip(_Unwind_GetIP(context) as u64) as usize;
        // Where the tables say that there is no caller, one is announced that lies nowhere.
        if pc != 0 {
            (*frames.cast::<Vec<Frame>>()).push(Frame { pc, sp: _Unwind_GetCFA(context) });
        }
    }
    0
}

/// From the caller on outwards, as far as the tables lead.
pub fn by_tables() -> Vec<Frame> {
    let mut frames: Vec<Frame> = Vec::with_capacity(64);
    // SAFETY: walks this thread's stack and calls back.
    unsafe { _Unwind_Backtrace(visit, (&raw mut frames).cast()) };
    frames
}

/// The return addresses of the chain of frame records from `record` on, up to and with the first that is `last`.
///
/// # Safety
/// The chain is this thread's own, and every frame up to that one has a record.
pub unsafe fn by_records(mut record: usize, last: usize) -> Vec<usize> {
    /// More than there are.
    const FRAMES: usize = 4096;
    let mut found = Vec::new();
    while found.last() != Some(&last) && found.len() < FRAMES && record != 0 {
        // SAFETY: the caller's.
        let (next, word) = unsafe { (peek(record) as usize, peek(record + 8)) };
        found.push(cpu::strip(word) as usize);
        record = next;
    }
    found
}
