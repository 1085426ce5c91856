//! The switch between Rust code on two stacks, inlined where nothing has to be checked.
//!
//! The compiler saves what it needs around the switch and no more: a saved frame is three words, of which unwinders need two.
//! Inlining pays where no thread of the process has a shadow stack, on x86-64: nothing there can be believed, so nothing is sealed.
//! Everywhere else these are the stubs. Which of the two is decided by the read-only mode word, the same for the life of the process. The
//! floating-point control registers are not saved: Rust code must not change them.
//!
//! ```text
//!      data area of a suspended stack
//!      +---------------------------+ top
//!      | address in first_inlined  |
//!   B  | the link: resumer's R     |
//!      | frames                    |
//!      | rbx                       | the compiler may not spare it
//!      | pc                        |
//!   R  | rbp                       | <- own.sp
//!      +---------------------------+
//! ```

use super::{Entry, Passed};
use crate::abi::Slot;
#[cfg(target_arch = "x86_64")]
use crate::published;
use std::ptr::NonNull;

/// Whether nothing has to be checked.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn unchecked() -> bool {
    published::mode() & published::MODE_SHADOW == 0
}

/// [`super::prepare`] for the functions here.
///
/// # Safety
/// As [`super::prepare`]; the stack is switched by this module alone.
#[inline(always)]
pub(crate) unsafe fn prepare(slot: NonNull<Slot>, entry: Entry, data: usize) {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        unsafe extern "C" {
            fn cfi_stack_first_inlined();
            fn cfi_stack_base_return_inlined();
        }
        let pointer = slot.as_ptr();
        // SAFETY: the slot and the words below its top are the caller's alone; top is 16-byte aligned and a data area holds more than 64 bytes.
        unsafe {
            let top = std::ptr::with_exposed_provenance_mut::<usize>((*pointer).top);
            top.sub(1).write(cfi_stack_base_return_inlined as *const () as usize);
            top.sub(2).write(0);
            top.sub(3).write(pointer.expose_provenance());
            top.sub(4).write(data);
            top.sub(5).write(entry as *const () as usize);
            top.sub(6).write(cfi_stack_first_inlined as *const () as usize);
            top.sub(7).write(top.sub(2).addr());
            (*pointer).own.sp = top.sub(7).addr();
        }
        return;
    }
    // SAFETY: the caller's.
    unsafe { super::prepare(slot, entry, data) }
}

/// [`super::resume`], inlined where that is sound.
///
/// # Safety
/// As [`super::resume_without_fp_control`]; the stack was prepared here.
#[inline(always)]
pub(crate) unsafe fn resume(slot: NonNull<Slot>, arg: usize) -> Passed {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        let (value, finished): (usize, usize);
        // SAFETY: own.sp is where `prepare` or `suspend` left three words for just these instructions; what runs there keeps no register
        // but rbx and rbp for us, and all others are named as lost. It comes back to label 2 with rsp as it was after the pushes.
        unsafe {
            std::arch::asm!(
                "lea rcx, [rip + 2f]",
                "push rbx",
                "push rcx",
                "push rbp",
                "mov [rdx - 16], rsp", // the link
                "mov rsp, rax",
                "pop rbp",
                "pop rcx",
                "jmp rcx",
                "2:",
                "endbr64",
                "pop rbx",
                inlateout("rax") (*slot.as_ptr()).own.sp => _,
                inlateout("rdx") (*slot.as_ptr()).top => _,
                inlateout("rdi") arg => value,
                lateout("rsi") finished,
                lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
                clobber_abi("sysv64"),
            );
        }
        return Passed { value, finished: finished != 0 };
    }
    // SAFETY: the caller's.
    unsafe { super::resume_without_fp_control(slot, arg) }
}

/// [`super::suspend`], inlined where that is sound.
///
/// # Safety
/// The caller runs on `slot`'s stack, which was prepared and resumed here.
#[inline(always)]
pub(crate) unsafe fn suspend(slot: NonNull<Slot>, arg: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        let value: usize;
        // SAFETY: the link was written by the resume that this goes back to; it left three words there. As in `resume` for registers.
        unsafe {
            std::arch::asm!(
                "lea rcx, [rip + 2f]",
                "push rbx",
                "push rcx",
                "push rbp",
                "mov [rax], rsp", // own.sp
                "xor esi, esi",
                "mov rsp, [rdx - 16]",
                "pop rbp",
                "pop rcx",
                "jmp rcx",
                "2:",
                "endbr64",
                "pop rbx",
                inlateout("rax") &raw mut (*slot.as_ptr()).own.sp => _,
                inlateout("rdx") (*slot.as_ptr()).top => _,
                inlateout("rdi") arg => value,
                lateout("rsi") _,
                lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
                clobber_abi("sysv64"),
            );
        }
        return value;
    }
    // SAFETY: the caller's.
    unsafe { super::suspend_without_fp_control(slot, arg) }
}

/// [`super::cancel`] for a stack that was prepared here.
///
/// # Safety
/// As [`super::cancel`].
#[inline(always)]
pub(crate) unsafe fn cancel(slot: NonNull<Slot>) {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        // SAFETY: the slot is the caller's alone. There is no shadow stack to pop.
        unsafe { (*slot.as_ptr()).own.sp = 0 };
        return;
    }
    // SAFETY: the caller's.
    unsafe { super::cancel(slot) }
}
