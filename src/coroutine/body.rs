//! The two ends of a coroutine's stack: where its function lies before it runs, and what calls it.
//!
//! ```text
//!   top  +--------------------+
//!        | what `prepare` has |  HEAD bytes, where the stubs switch
//!        +--------------------+
//!        | place              |  the function, later what it returned. Not there: for the stubs, when both fit into a word; inlined, when
//!        +--------------------+  the function has no bytes and what it returns fits. 16-byte aligned
//!        | frames             |  of `run`, with the stack pointer at the place when it is called
//! ```

use super::stack::{MIN_STACK_SIZE, STACK_ALIGNMENT};
use super::word;
use super::yielder::Yielder;
use crate::abi::{Slot, slot_state};
use crate::error::Error;
use crate::switch::{Entry, inlined};
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

/// Bytes of a place, and what its address is a multiple of: for the function, and then for what it returned.
const fn bounds_of_place<F, Return>() -> (usize, usize) {
    const fn larger(a: usize, b: usize) -> usize {
        if a > b { a } else { b }
    }
    (
        larger(size_of::<F>(), size_of::<Return>()),
        larger(larger(align_of::<F>(), align_of::<Return>()), STACK_ALIGNMENT),
    )
}

const fn needs_place<F, Return>() -> bool {
    !word::fits::<F>() || !word::fits::<Return>()
}

/// An address for a place, `head` bytes or more below the top of the slot's stack.
///
/// # Safety
/// The slot is leased.
#[inline(always)]
unsafe fn find_place<F, Return>(slot: NonNull<Slot>, head: usize) -> Result<usize, Error> {
    let (size, align) = const { bounds_of_place::<F, Return>() };
    // SAFETY: the bounds do not change while the slot is leased.
    let (base, top) = unsafe { ((*slot.as_ptr()).base, (*slot.as_ptr()).top) };
    let bytes = head + size;
    let place = top.wrapping_sub(bytes) & !(align - 1);
    // Every stack has that much room.
    let is_small = HEAD + size + align + LEAST_ROOM <= MIN_STACK_SIZE;
    if !is_small && (bytes > top - base || place < base + LEAST_ROOM) {
        return Err(Error::Size {
            bytes: top - base,
            rule: "a stack has room for the coroutine's function and for what it returns",
        });
    }
    Ok(place)
}

/// Leaves `function` for the stack of `slot` to find. Returns what the stubs' `prepare` is told.
///
/// # Safety
/// The slot is leased, nothing is on its stack, and the caller alone uses it.
#[inline(always)]
pub(super) unsafe fn leave_for_stubs<Input, Yield, Return, F>(
    slot: NonNull<Slot>,
    function: F,
) -> Result<(Entry, usize), Error>
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    if !needs_place::<F, Return>() {
        return Ok((run_word::<Input, Yield, Return, F>, word::send(&ManuallyDrop::new(function))));
    }
    // SAFETY: the caller's; the place lies between base and top, is aligned, and nothing is there.
    unsafe {
        let place = find_place::<F, Return>(slot, HEAD)?;
        std::ptr::with_exposed_provenance_mut::<F>(place).write(function);
        Ok((below::<Input, Yield, Return, F>, place))
    }
}

/// [`leave_for_stubs`] for the inlined switch. Returns the place.
///
/// # Safety
/// As [`leave_for_stubs`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn leave<Input, Yield, Return, F>(slot: NonNull<Slot>, function: F) -> Result<usize, Error>
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    // SAFETY: as in `leave_for_stubs`.
    unsafe {
        if size_of::<F>() == 0 && word::fits::<Return>() {
            std::mem::forget(function);
            return Ok((*slot.as_ptr()).top);
        }
        let place = find_place::<F, Return>(slot, 0)?;
        std::ptr::with_exposed_provenance_mut::<F>(place).write(function);
        Ok(place)
    }
}

/// Calls `run_placed` with the stack pointer at the place, which is `data`. It keeps a frame pointer, so that unwinders need not know how far it went.
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
        run = sym run_placed::<Input, Yield, Return, F>,
    )
}

/// Calls `run_placed` with the stack pointer at the place, which is `data`. It keeps a frame pointer, so that unwinders need not know how far it went.
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
        run = sym run_placed::<Input, Yield, Return, F>,
    )
}

/// The oldest frame of a coroutine that is switched inlined, see `switch::inlined`. What is resumed first lies [`inlined::AHEAD`] bytes behind
/// its beginning, where a C function lies that drops the coroutine's function at the address it is given.
///
/// ```text
///   in       called on the resumer's stack: rdi arg; rsi slot; rax 7 below the place
///   out      to the resumer, by return: rdi the word; rax R and, in its low bits, how it ended; rbp kept, all other registers lost
///   stack    resumer's: rbp, where the slot's word points then; own: calls run(arg, slot, place) with the stack pointer at the place
///   unwinds  to the resumer: pc, rbp and, below them, rbx
/// ```
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub(super) unsafe extern "C" fn first<Input, Yield, Return, F>()
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    std::arch::naked_asm!(
        ".cfi_startproc",
        ".cfi_signal_frame",
        "2:",
        "endbr64",
        "jmp {discard}",
        ".org 2b + {ahead}, 0xcc",
        ".cfi_offset rbx, -24",
        "endbr64",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov [rsi + 8], rsp",
        ".cfi_escape 0x0f, 5, 0x74, 8, 0x06, 0x23, 16", // CFA: breg4 (rsi) + 8, deref, plus_uconst 16
        "lea rsp, [rax + 7]",
        "lea rbp, [rsi + 8]",
        ".cfi_escape 0x0f, 5, 0x76, 0, 0x06, 0x23, 16", // the same by breg6 (rbp) + 0
        "mov rdx, rsp",
        "call {run}",
        "mov rdi, rax",
        "mov rax, [rbp]",
        ".cfi_def_cfa rax, 16",
        "mov qword ptr [rbp], 0", // nothing is on it
        "mov rsp, rax",
        ".cfi_def_cfa rsp, 16",
        "or rax, rdx",
        "pop rbp",
        ".cfi_def_cfa_offset 8",
        ".cfi_restore rbp",
        "ret",
        ".cfi_endproc",
        ahead = const inlined::AHEAD,
        discard = sym discard::<F>,
        run = sym run::<Input, Yield, Return, F>,
    )
}

/// Drops a function that never ran.
///
/// # Safety
/// It lies at `place`, and nobody else takes it.
#[cfg(target_arch = "x86_64")]
unsafe extern "C-unwind" fn discard<F>(place: *mut ()) {
    // SAFETY: the caller's.
    drop(unsafe { take(place.cast::<F>()) });
}

/// # Safety
/// A function lies at `place`, and nobody else takes it.
#[inline(always)]
unsafe fn take<F>(place: *mut F) -> F {
    // What has no bytes is wherever one looks.
    let place = if size_of::<F>() == 0 { std::ptr::dangling_mut() } else { place };
    // SAFETY: the caller's.
    unsafe { place.read() }
}

/// How a function ended.
#[repr(C)]
struct Ended {
    /// The word of what it returned, or the payload that it panicked with, boxed.
    value: usize,
    /// [`inlined::FINISHED`] or [`inlined::PANICKED`].
    how: usize,
}

/// The oldest Rust frame of a coroutine. Nothing unwinds out of it.
///
/// # Safety
/// The function lies at `place`, and nobody else takes it. There is room for what it returns, unless that fits into a word. `arg` is the word of its
/// input, and the caller runs on the slot's stack.
#[cfg_attr(target_arch = "x86_64", inline(never))]
unsafe extern "C" fn run<Input, Yield, Return, F>(arg: usize, slot: *mut Slot, place: *mut ()) -> Ended
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller's.
        let (slot, function, input) =
            unsafe { (NonNull::new_unchecked(slot), take(place.cast::<F>()), word::receive::<Input>(arg)) };
        function(&Yielder::of(slot), input)
    }));
    match result {
        Ok(returned) => {
            let returned = ManuallyDrop::new(returned);
            let value = if word::fits::<Return>() {
                word::send(&returned)
            } else {
                let place = place.cast::<ManuallyDrop<Return>>();
                // SAFETY: the function is gone from there, and there is room.
                unsafe {
                    place.write(returned);
                    word::send(&*place)
                }
            };
            Ended { value, how: inlined::FINISHED }
        }
        Err(payload) => Ended { value: boxed(payload), how: inlined::PANICKED },
    }
}

#[cold]
#[inline(never)]
fn boxed(payload: Box<dyn Any + Send>) -> usize {
    Box::into_raw(Box::new(payload)).expose_provenance()
}

/// What the stubs call first, where the function fits into a word, which is `data`.
unsafe extern "C" fn run_word<Input, Yield, Return, F>(arg: usize, data: usize, slot: *mut Slot) -> usize
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    // SAFETY: `leave_for_stubs` made the word, and nobody else has taken it. What the function returns fits into a word.
    unsafe {
        let mut function = ManuallyDrop::new(word::receive::<F>(data));
        run_by_stubs::<Input, Yield, Return, F>(arg, slot, (&raw mut function).cast())
    }
}

/// What is called first where the function lies at its place, which is `data`.
unsafe extern "C" fn run_placed<Input, Yield, Return, F>(arg: usize, data: usize, slot: *mut Slot) -> usize
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    // SAFETY: `leave_for_stubs` left it there, and nobody else has taken it. The place has room for what it returns.
    unsafe { run_by_stubs::<Input, Yield, Return, F>(arg, slot, std::ptr::with_exposed_provenance_mut(data)) }
}

/// Returns what [`run`] does, with [`slot_state::DONE`] in the slot for a payload. A coroutine that is to be unwound before it ever ran drops its
/// function.
///
/// # Safety
/// As [`run`]; there is no input for a coroutine that is to be unwound.
#[inline(always)]
unsafe fn run_by_stubs<Input, Yield, Return, F>(arg: usize, slot: *mut Slot, place: *mut ()) -> usize
where
    F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
{
    // SAFETY: the slot outlives what runs on it, and the field is atomic; the rest is the caller's.
    unsafe {
        let state = &(*slot).state;
        let ended = if state.load(Ordering::Relaxed) == slot_state::UNWINDING {
            let dropped = catch_unwind(AssertUnwindSafe(|| drop(take(place.cast::<F>()))));
            let payload = dropped.err().unwrap_or_else(|| Box::new(ForcedUnwind));
            Ended { value: boxed(payload), how: inlined::PANICKED }
        } else {
            run::<Input, Yield, Return, F>(arg, slot, place)
        };
        if ended.how == inlined::PANICKED {
            state.store(slot_state::DONE, Ordering::Relaxed);
        }
        ended.value
    }
}
