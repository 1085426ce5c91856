//! The switch between Rust code on two stacks, inlined where nothing has to be checked.
//!
//! The compiler saves what it needs around the switch and no more: a saved frame is three words, of which unwinders need two.
//! Inlining pays where no thread of the process has a shadow stack, on x86-64: nothing there can be believed, so nothing is sealed.
//! Everywhere else these are the stubs. Which of the two is decided by the read-only mode word, the same for the life of the process. The
//! floating-point control registers are not saved: Rust code must not change them.
//!
//! A resume *calls* what its stack waits at and a suspend *returns* to it, so that both are predicted like any call; the stack pointer
//! changes behind the call and before the return.
//!
//! ```text
//!      data area of a suspended stack             resumer's stack while it waits
//!      +---------------------------+ top          | rbx          |
//!      | address in first_inlined  |              | pc           | pushed by the call
//!   B  | the link                  | -----------> | rbp          | R
//!      | frames                    |              +--------------+
//!      | rbp                       |
//!      | rbx                       | the compiler may not spare it
//!      | pc                        | <- own.sp
//!      +---------------------------+
//! ```
//! Passed in registers: rdi the word; by a resume rdx own.sp and r8 the address of the link; by a suspend rsi what own.sp is now, 0 when
//! nothing is left on the stack.

use super::{Entry, Passed};
use crate::abi::Slot;
#[cfg(target_arch = "x86_64")]
use crate::published;
use std::ptr::NonNull;

/// The link lies so many bytes below a stack's top.
#[cfg(target_arch = "x86_64")]
const LINK: usize = 16;

/// Whether nothing has to be checked.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn unchecked() -> bool {
    let mode: usize;
    // SAFETY: reads the mode word, which is set by now and stays. In assembly, because its address is known relative to the code, which the
    // compiler does not rely on for a symbol of another crate.
    unsafe {
        std::arch::asm!(
            "mov {mode}, [rip + {page}]",
            mode = out(reg) mode,
            page = sym published::cfi_stack_published,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    mode & published::MODE_SHADOW as usize == 0
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
            (*pointer).own.sp = top.sub(6).addr();
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
        let (value, sp): (usize, usize);
        // SAFETY: own.sp is where `prepare` or `suspend` left the pc of code that expects just these registers; it comes back behind the call
        // with rsp as it was and rbp kept. All other registers but rbx are named as lost.
        unsafe {
            std::arch::asm!(
                "push rbx",
                "call [rdx]",
                "pop rbx",
                inlateout("rdx") (*slot.as_ptr()).own.sp => _,
                inlateout("r8") (*slot.as_ptr()).top - LINK => _,
                inlateout("rdi") arg => value,
                lateout("rsi") sp,
                lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
                clobber_abi("sysv64"),
            );
            (*slot.as_ptr()).own.sp = sp;
        }
        return Passed { value, finished: sp == 0 };
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
        // SAFETY: the link names what this stack's last wake-up left on the resumer's stack: rbp, and the pc of its call. As in `resume` for registers.
        unsafe {
            std::arch::asm!(
                "lea rcx, [rip + 2f]",
                "push rbp",
                "push rbx",
                "push rcx",
                "mov rsi, rsp",
                "mov rsp, [rdx]",
                "pop rbp",
                "ret",
                "2:", // called by the next resume, on its stack
                "endbr64",
                "push rbp",
                "mov [r8], rsp",
                "lea rsp, [rdx + 8]",
                "pop rbx",
                "pop rbp",
                inlateout("rdx") (*slot.as_ptr()).top - LINK => _,
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
