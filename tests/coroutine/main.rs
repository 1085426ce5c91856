//! The coroutine face: what its peers do, in one place, and what nobody may do.
#![cfg(any(all(target_arch = "x86_64", target_os = "linux"), target_arch = "aarch64"))]

mod faces;
mod programs;
mod stacks;
mod unwinding;

use std::cell::Cell;
use std::rc::Rc;

/// The address of a local variable of the caller's, more or less.
#[inline(never)]
fn here() -> usize {
    let local = std::hint::black_box(0_u8);
    (&raw const local).addr()
}

/// Counts how often it is dropped.
struct Counts(Rc<Cell<u32>>);
impl Drop for Counts {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}
