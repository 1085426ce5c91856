//! Three stacks deep, for a debugger to look at (`ci/debuggers`): `main` resumes `outer` through a resumer, that resumes `middle`, that
//! `innermost`, which calls `stop_here`. All three are suspended, resumed by another resumer, and `innermost` stops a second time. Then
//! `switched` stops on a stack that was switched to, `thrown` on top of it, and `main` in the end: five stops.
//!
//! Ends with status 0 when the words that were passed are right.

use cfi_stack::pool;
use cfi_stack::probe::{Passed, Slot, forced};
use cfi_stack::thread::Thread;
use cfi_start as _;
use std::error::Error;
use std::hint::black_box;
use std::ptr::NonNull;

/// What a debugger stops in.
#[inline(never)]
fn stop_here(word: usize) -> usize {
    black_box(word) + 1
}

fn slot_at(address: usize) -> NonNull<Slot> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
}

unsafe extern "C" fn innermost(first: usize, _: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    let passed = stop_here(first);
    // SAFETY: runs on the slot's stack.
    let second = unsafe { forced::suspend(slot, slot, passed) };
    black_box(stop_here(second))
}

unsafe extern "C" fn middle(first: usize, inner: usize, slot: *mut Slot) -> usize {
    relay::<10>(first, inner, slot)
}

unsafe extern "C" fn outer(first: usize, inner: usize, slot: *mut Slot) -> usize {
    relay::<1000>(first, inner, slot)
}

/// Resumes the stack `inner`, suspends its own with what that passed, and resumes the other again.
#[inline(always)]
fn relay<const MORE: usize>(first: usize, inner: usize, slot: *mut Slot) -> usize {
    let (slot, inner) = (slot_at(slot.expose_provenance()), slot_at(inner));
    // SAFETY: the inner stack is ready or suspended, and nobody else's; runs on the slot's stack.
    unsafe {
        let passed = forced::resume(inner, inner, first).value;
        let second = forced::suspend(slot, slot, passed + MORE);
        forced::resume(inner, inner, second).value + MORE
    }
}

#[inline(never)]
fn first_resumer(slot: NonNull<Slot>) -> Passed {
    // SAFETY: the stack is ready.
    black_box(unsafe { forced::resume(slot, slot, 100) })
}

#[inline(never)]
fn second_resumer(slot: NonNull<Slot>) -> Passed {
    // SAFETY: the stack is suspended.
    black_box(unsafe { forced::resume(slot, slot, 200) })
}

/// Runs `switched` in its stead.
unsafe extern "C" fn switches(arg: usize, to: usize, slot: *mut Slot) -> usize {
    // SAFETY: runs on the slot's stack; the other is ready.
    black_box(unsafe { forced::switch_to(slot_at(slot.expose_provenance()), slot_at(to), arg) })
}

unsafe extern "C" fn switched(arg: usize, _: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    let passed = stop_here(arg);
    // SAFETY: runs on the slot's stack.
    let value = unsafe { forced::suspend(slot, slot, passed) };
    // SAFETY: as above.
    black_box(unsafe { forced::suspend(slot, slot, value) })
}

unsafe extern "C-unwind" fn thrown(arg: usize) -> usize {
    black_box(stop_here(arg))
}

#[inline(never)]
fn third_resumer(slot: NonNull<Slot>) -> Passed {
    // SAFETY: the stack is ready.
    black_box(unsafe { forced::resume(slot, slot, 300) })
}

#[inline(never)]
fn thrower(slot: NonNull<Slot>) -> Passed {
    // SAFETY: the stack is suspended.
    black_box(unsafe { forced::throw(slot, slot, 400, thrown) })
}

fn main() -> Result<(), Box<dyn Error>> {
    const SIZE: usize = 16 << 10;
    let _thread = Thread::attach()?;
    let (a, b, c) = (pool::lease(SIZE)?, pool::lease(SIZE)?, pool::lease(SIZE)?);
    let mut passed = Vec::new();
    // SAFETY: the leases are ours, their stacks empty, and empty again when they are dropped.
    unsafe {
        forced::prepare(c.slot(), innermost, 0);
        forced::prepare(b.slot(), middle, c.slot().as_ptr().expose_provenance());
        forced::prepare(a.slot(), outer, b.slot().as_ptr().expose_provenance());
        passed.extend([first_resumer(a.slot()), second_resumer(a.slot())]);
        forced::prepare(b.slot(), switched, 0);
        forced::prepare(a.slot(), switches, b.slot().as_ptr().expose_provenance());
        passed.extend([third_resumer(a.slot()), thrower(b.slot())]);
        forced::cancel(a.slot());
        forced::cancel(b.slot());
    }
    stop_here(0);
    let passed: Vec<_> = passed.into_iter().map(|Passed { value, finished }| (value, finished)).collect();
    let expected = [(1111, false), (1211, true), (301, false), (401, false)];
    if passed == expected { Ok(()) } else { Err(format!("{passed:?}").into()) }
}
