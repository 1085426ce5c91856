//! The two ends of a coroutine's stack: where its function lies before it runs, and what calls it.
//!
//! ```text
//!   top  +--------------------+
//!        | what `prepare` has |  HEAD bytes
//!        +--------------------+
//!        | place              |  the function, later what it returned; not there when both fit into a word
//!        +--------------------+ 16-byte aligned
//!        | frames             |  of `run`, called by `below` with the stack pointer at the place
//! ```

use super::stack::{MIN_STACK_SIZE, STACK_ALIGNMENT};
use super::yielder::Yielder;
use super::{crossing, word};
use crate::abi::{Slot, slot_state};
use crate::error::Error;
use crate::switch::Entry;
use std::any::Any;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// Bytes below the top that `prepare` and the way to `run` use (asm/*_switch.S: the base record and a saved frame).
const HEAD: usize = if cfg!(target_arch = "x86_64") { 96 } else { 192 };

/// Bytes below the place that `run` needs at the least, so that a coroutine can begin at all.
const LEAST_ROOM: usize = MIN_STACK_SIZE / 4;

/// The payload that unwinds a coroutine that is no longer wanted.
#[derive(Debug)]
pub(super) struct ForcedUnwind;

/// The function, and then what it returned.
union Place<F, Return> {
    function: ManuallyDrop<F>,
    returned: ManuallyDrop<Return>,
}

const fn needs_place<F, Return>() -> bool {
    !word::fits::<F>() || !word::fits::<Return>()
}

/// Leaves `function` for the stack of `slot` to find. Returns what `prepare` is told.
///
/// # Safety
/// The slot is leased, nothing is on its stack, and the caller alone uses it.
#[inline(always)]
pub(super) unsafe fn leave<Input, Yield, Return, F>(slot: NonNull<Slot>, function: F) -> Result<(Entry, usize), Error>
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    if !needs_place::<F, Return>() {
        return Ok((run::<Input, Yield, Return, F>, word::send(&ManuallyDrop::new(function))));
    }
    let slot = slot.as_ptr();
    // SAFETY: the slot is the caller's.
    let (base, top) = unsafe { ((*slot).base, (*slot).top) };
    let align = const {
        if align_of::<Place<F, Return>>() > STACK_ALIGNMENT { align_of::<Place<F, Return>>() } else { STACK_ALIGNMENT }
    };
    let bytes = HEAD + size_of::<Place<F, Return>>();
    let place = top.wrapping_sub(bytes) & !(align - 1);
    if bytes > top - base || place < base + LEAST_ROOM {
        return Err(Error::Size {
            bytes: top - base,
            rule: "a stack has room for the coroutine's function and for what it returns",
        });
    }
    // SAFETY: between base and top, aligned, and nothing is there.
    unsafe { std::ptr::with_exposed_provenance_mut::<F>(place).write(function) };
    Ok((below::<Input, Yield, Return, F>, place))
}

/// Calls `run` with the stack pointer at the place, which is `data`. It keeps a frame pointer, so that unwinders need not know how far it went.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn below<Input, Yield, Return, F>(arg: usize, data: usize, slot: *mut Slot) -> usize
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    std::arch::naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "mov rsp, rsi",
        "call {run}",
        "leave",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
        run = sym run::<Input, Yield, Return, F>,
    )
}

/// Calls `run` with the stack pointer at the place, which is `data`. It keeps a frame pointer, so that unwinders need not know how far it went.
/// The hints sign the return address where the CPU authenticates, and are landing pads.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn below<Input, Yield, Return, F>(arg: usize, data: usize, slot: *mut Slot) -> usize
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    std::arch::naked_asm!(
        ".cfi_startproc",
        "hint #25", // paciasp
        ".cfi_negate_ra_state",
        "stp x29, x30, [sp, #-16]!",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset x29, -16",
        ".cfi_offset x30, -8",
        "mov x29, sp",
        ".cfi_def_cfa x29, 16",
        "mov sp, x1",
        "bl {run}",
        "mov sp, x29",
        ".cfi_def_cfa sp, 16",
        "ldp x29, x30, [sp], #16",
        ".cfi_def_cfa_offset 0",
        ".cfi_restore x29",
        ".cfi_restore x30",
        "hint #29", // autiasp
        ".cfi_negate_ra_state",
        "ret",
        ".cfi_endproc",
        run = sym run::<Input, Yield, Return, F>,
    )
}

/// The oldest Rust frame of a coroutine. Nothing unwinds out of it. What it returns is the word of what the function returned; or, with
/// [`slot_state::DONE`] in the slot, a boxed payload.
unsafe extern "C" fn run<Input, Yield, Return, F>(arg: usize, data: usize, slot: *mut Slot) -> usize
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    // SAFETY: `first` passes the slot that was prepared.
    let slot = unsafe { NonNull::new_unchecked(slot) };
    // SAFETY: the slot outlives what runs on it; the field is atomic.
    let state = unsafe { &(*slot.as_ptr()).state };
    let place = std::ptr::with_exposed_provenance_mut::<Place<F, Return>>(data);
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `leave` put it there, or made the word of it, and nobody else has taken it.
        let function = unsafe {
            if needs_place::<F, Return>() {
                ManuallyDrop::into_inner((&raw const (*place).function).read())
            } else {
                word::receive::<F>(data)
            }
        };
        if state.load(Ordering::Relaxed) == slot_state::UNWINDING {
            // It never began: there is no input.
            drop(function);
            return None;
        }
        state.store(crossing::running_state(), Ordering::Relaxed);
        // SAFETY: the first resume sent it.
        let input = unsafe { word::receive::<Input>(arg) };
        Some(function(&Yielder::of(slot), input))
    }));
    let payload = match result {
        Ok(Some(returned)) if needs_place::<F, Return>() => {
            // SAFETY: the function is gone from there, and there is room.
            return unsafe {
                let returned_at = &raw mut (*place).returned;
                returned_at.write(ManuallyDrop::new(returned));
                word::send(&*returned_at)
            };
        }
        Ok(Some(returned)) => return word::send(&ManuallyDrop::new(returned)),
        Ok(None) => Box::new(ForcedUnwind) as Box<dyn Any + Send>,
        Err(payload) => payload,
    };
    state.store(slot_state::DONE, Ordering::Relaxed);
    Box::into_raw(Box::new(payload)).expose_provenance()
}
