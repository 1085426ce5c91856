//! Pooled stacks to attack, switched past the faces' checks.

use cfi_stack::pool::{self, Lease};
use cfi_stack::probe::{Passed, Slot, forced};
use cfi_stack::thread::Thread;
use std::ptr::NonNull;

/// Bytes of the stacks here.
pub const SIZE: usize = 16 << 10;

/// Attaches the thread.
///
/// # Errors
/// The library's.
pub fn attach() -> Result<Thread, String> {
    Thread::attach().map_err(|error| error.to_string())
}

/// Leases a stack, which must have a shadow stack where the thread has one.
///
/// # Errors
/// What is wrong.
pub fn lease(thread: &Thread) -> Result<Lease, String> {
    let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
    if thread.domain().shadow && !lease.has_shadow() {
        return Err("the thread has a shadow stack, the lease none".into());
    }
    Ok(lease)
}

/// What came back must be this.
///
/// # Errors
/// What it was instead.
pub fn expect(got: Passed, value: usize, finished: bool) -> Result<(), String> {
    if got == (Passed { value, finished }) { Ok(()) } else { Err(format!("{got:?}, not {value} {finished}")) }
}

/// The slot at an address.
pub fn slot_at(address: usize) -> NonNull<Slot> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
}

/// A lease's slot's address.
pub fn address(lease: &Lease) -> usize {
    lease.slot().as_ptr().expose_provenance()
}

/// Adds up what it is passed and suspends with the sum from `depth` calls further down, until it is passed 0.
///
/// # Safety
/// Runs on the slot's stack.
pub unsafe extern "C" fn sums(first: usize, depth: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    let mut sum = first;
    loop {
        match deep(slot, sum, depth) {
            0 => return sum,
            more => sum += more,
        }
    }
}

/// Suspends from `depth` calls further down.
#[inline(never)]
pub fn deep(slot: NonNull<Slot>, sum: usize, depth: usize) -> usize {
    if depth == 0 {
        // SAFETY: runs on the slot's stack.
        return unsafe { forced::suspend(slot, slot, sum) };
    }
    std::hint::black_box(deep(slot, sum, depth - 1))
}

/// A stack on which [`sums`] is suspended with the sum 1.
pub struct Suspended {
    /// Its lease.
    pub lease: Lease,
}

impl Suspended {
    /// Leases one and runs it that far.
    ///
    /// # Errors
    /// What is wrong.
    pub fn new(thread: &Thread, depth: usize) -> Result<Suspended, String> {
        let lease = lease(thread)?;
        // SAFETY: the lease is ours, its stack empty.
        unsafe {
            forced::prepare(lease.slot(), sums, depth);
            expect(forced::resume(lease.slot(), lease.slot(), 1), 1, false)?;
        }
        Ok(Suspended { lease })
    }

    /// Its slot.
    pub fn slot(&self) -> NonNull<Slot> {
        self.lease.slot()
    }

    /// Goes on twice and finishes.
    ///
    /// # Errors
    /// What is wrong.
    pub fn finish(self) -> Result<(), String> {
        let slot = self.slot();
        // SAFETY: it is suspended, and ours.
        unsafe {
            expect(forced::resume(slot, slot, 10), 11, false)?;
            expect(forced::resume(slot, slot, 20), 31, false)?;
            expect(forced::resume(slot, slot, 0), 31, true)
        }
    }
}
