//! The verbs that change stacks: what each asks for, and the stubs behind them.
//!
//! The contracts (registers, both stacks, what is sealed and checked, the drawing of each state) stand in `asm/*_switch.S`. Each passes one
//! word either way. None looks at a slot's state: that is the faces' business, who know what they hold.

pub(crate) mod inlined;

use crate::abi::Slot;
use crate::pac::Tampered;
use crate::{sanitizer, tamper};
use std::ptr::NonNull;

/// What a resumed stack gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// The word that it passed, or that its entry function returned.
    pub value: usize,
    /// Whether the entry function returned: nothing is left on the stack then.
    pub finished: bool,
}

/// What runs first on a stack: `entry(arg of the first resume, data, slot)`. It must not unwind.
pub type Entry = unsafe extern "C" fn(usize, usize, *mut Slot) -> usize;

#[allow(improper_ctypes, reason = "the stubs do not look at the one field of Slot that C cannot have")]
unsafe extern "C" {
    fn cfi_stack_prepare(slot: *mut Slot, entry: Entry, data: usize);
    fn cfi_stack_cancel(slot: *mut Slot);
    fn cfi_stack_resume();
    fn cfi_stack_resume_without_fp_control();
    fn cfi_stack_suspend();
    fn cfi_stack_suspend_without_fp_control();
    fn cfi_stack_switch_to();
    fn cfi_stack_throw();
}

/// Calls a stub with a landing pad behind the call, where it comes back by a jump.
#[cfg(target_arch = "x86_64")]
macro_rules! switch {
    ($stub:ident, $a:expr, $b:expr, $c:expr $(, $d:expr)?) => {{
        let (value, kind): (usize, usize);
        std::arch::asm!(
            "call {stub}",
            "endbr64",
            stub = sym $stub,
            inlateout("rdi") $a => _,
            inlateout("rsi") $b => _,
            inlateout("rdx") $c => kind,
            $(inlateout("rcx") $d => _,)?
            lateout("rax") value,
            clobber_abi("sysv64"),
        );
        Passed { value, finished: kind != 0 }
    }};
}

/// Calls a stub with a landing pad behind the call, where it comes back by a jump.
#[cfg(target_arch = "aarch64")]
macro_rules! switch {
    ($stub:ident, $a:expr, $b:expr, $c:expr $(, $d:expr)?) => {{
        let (value, kind): (usize, usize);
        std::arch::asm!(
            "bl {stub}",
            "hint #36", // bti j
            stub = sym $stub,
            inlateout("x0") $a => value,
            inlateout("x1") $b => kind,
            inlateout("x2") $c => _,
            $(inlateout("x3") $d => _,)?
            clobber_abi("C"),
        );
        Passed { value, finished: kind != 0 }
    }};
}

/// Makes a stack that runs `entry(arg, data, slot)` when it is first resumed.
///
/// # Safety
/// `slot` is leased, nothing is on its stack, and the caller alone uses it.
pub(crate) unsafe fn prepare(slot: NonNull<Slot>, entry: Entry, data: usize) {
    // SAFETY: the caller's; the stub writes the slot's own context and the top of its stack.
    unsafe {
        let (entry, data) = sanitizer::prepared(slot, entry, data);
        cfi_stack_prepare(slot.as_ptr(), entry, data)
    }
}

/// Resumes a stack: runs it until it suspends or finishes.
///
/// # Safety
/// `slot` was prepared, is ready or suspended, and the caller alone uses it; this thread belongs to the domain that it was prepared or
/// suspended in, and frames on it may run on this thread.
#[cfg(test)]
#[inline(always)]
pub(crate) unsafe fn resume(slot: NonNull<Slot>, arg: usize) -> Passed {
    // SAFETY: the caller's.
    unsafe { resume_through(slot, slot, arg) }
}

/// Resumes a chain: the stack `last`, whose resumers down to `first` are suspended with it.
///
/// # Safety
/// As [`resume`], for all stacks of the chain; it was suspended by [`suspend_through`] with these two.
#[inline(always)]
pub(crate) unsafe fn resume_through(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize) -> Passed {
    // SAFETY: the caller's; the stub keeps what the platform's C convention says.
    unsafe {
        let left = sanitizer::resumes(last);
        let passed = switch!(cfi_stack_resume, last.as_ptr(), first.as_ptr(), arg);
        sanitizer::is_back(left);
        passed
    }
}

/// [`resume`] for code that never changes the floating-point control registers.
///
/// # Safety
/// As [`resume`]; the stack is suspended by [`suspend_without_fp_control`] alone, and neither side changes MXCSR, the x87 control word or FPCR.
#[inline(always)]
pub(crate) unsafe fn resume_without_fp_control(slot: NonNull<Slot>, arg: usize) -> Passed {
    // SAFETY: the caller's.
    unsafe { resume_through_without_fp_control(slot, slot, arg) }
}

/// [`resume_through`] for code that never changes the floating-point control registers.
///
/// # Safety
/// As [`resume_through`] and [`resume_without_fp_control`].
#[inline(always)]
pub(crate) unsafe fn resume_through_without_fp_control(
    last: NonNull<Slot>,
    first: NonNull<Slot>,
    arg: usize,
) -> Passed {
    // SAFETY: the caller's.
    unsafe {
        if sanitizer::is_told() {
            return resume_through(last, first, arg);
        }
        switch!(cfi_stack_resume_without_fp_control, last.as_ptr(), first.as_ptr(), arg)
    }
}

/// Suspends the stack that runs and passes `arg` to its resumer. Returns what the next resume passes.
///
/// # Safety
/// The caller runs on `slot`'s stack.
#[inline(always)]
pub(crate) unsafe fn suspend(slot: NonNull<Slot>, arg: usize) -> usize {
    // SAFETY: the caller's.
    unsafe { suspend_through(slot, slot, arg) }
}

/// Suspends the stack that runs, `last`'s, and its resumers down to `first`; `arg` goes to `first`'s resumer.
///
/// # Safety
/// The caller runs on `last`'s stack, and `first` is reached from it by going from stack to resumer.
#[inline(always)]
pub(crate) unsafe fn suspend_through(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize) -> usize {
    // SAFETY: the caller's.
    unsafe {
        sanitizer::suspends(last, first);
        let passed = switch!(cfi_stack_suspend, last.as_ptr(), first.as_ptr(), arg);
        sanitizer::is_resumed(last, first);
        passed.value
    }
}

/// [`suspend`] for code that never changes the floating-point control registers.
///
/// # Safety
/// As [`suspend`] and [`resume_without_fp_control`].
#[inline(always)]
pub(crate) unsafe fn suspend_without_fp_control(slot: NonNull<Slot>, arg: usize) -> usize {
    // SAFETY: the caller's.
    unsafe { suspend_through_without_fp_control(slot, slot, arg) }
}

/// [`suspend_through`] for code that never changes the floating-point control registers.
///
/// # Safety
/// As [`suspend_through`] and [`resume_without_fp_control`].
#[inline(always)]
pub(crate) unsafe fn suspend_through_without_fp_control(
    last: NonNull<Slot>,
    first: NonNull<Slot>,
    arg: usize,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        if sanitizer::is_told() {
            return suspend_through(last, first, arg);
        }
        switch!(cfi_stack_suspend_without_fp_control, last.as_ptr(), first.as_ptr(), arg).value
    }
}

/// Suspends `from`, which runs, and runs `to` in its stead, for the same resumer.
///
/// # Safety
/// As [`suspend`] for `from` and [`resume`] for `to`; they are not the same.
#[inline(always)]
pub(crate) unsafe fn switch_to(from: NonNull<Slot>, to: NonNull<Slot>, arg: usize) -> usize {
    // SAFETY: the caller's.
    unsafe {
        sanitizer::switches(from, to);
        let passed = switch!(cfi_stack_switch_to, from.as_ptr(), to.as_ptr(), arg);
        sanitizer::is_resumed(from, from);
        passed.value
    }
}

/// What the stub `cfi_stack_throw` calls on a suspended stack.
pub type Thrown = unsafe extern "C-unwind" fn(usize) -> usize;

/// Resumes a suspended stack, or a chain, by calling `f(arg)` on it, as if what suspended it had called `f`: when `f` returns, that returns
/// its value.
///
/// # Safety
/// As [`resume_through`]; the stack has run before. `f` unwinds only where what suspended it may: what was suspended by the functions here may not,
/// since their assembly cannot be unwound.
#[cfg_attr(not(any(test, feature = "steps")), allow(dead_code, reason = "the battery and debuggers' programs use it"))]
#[inline(always)]
pub(crate) unsafe fn throw(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize, f: Thrown) -> Passed {
    // SAFETY: the caller's.
    unsafe {
        sanitizer::throws(last, first, arg, f, |arg, f| switch!(cfi_stack_throw, last.as_ptr(), first.as_ptr(), arg, f))
    }
}

/// Drops the frames of a suspended stack, or of one that never ran; nothing of them runs. Its shadow stack is empty afterwards.
///
/// # Safety
/// As [`resume`]; no frame on it owes a destructor that somebody relies on, and nothing points into them.
pub(crate) unsafe fn cancel(slot: NonNull<Slot>) {
    // SAFETY: the caller's.
    unsafe { cfi_stack_cancel(slot.as_ptr()) }
    sanitizer::cancelled(slot);
}

/// Called by the stubs when slot, stack pointer, token and generation do not belong together.
#[unsafe(no_mangle)]
extern "C" fn cfi_stack_unbound(slot: *mut Slot) -> ! {
    tamper::end(Tampered { evidence: "a suspended context does not belong to its stack", slot: slot.addr() })
}

#[cfg(test)]
mod tests;
