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
//!      +---------------------------+ top          | frames       |
//!      | address in first_inlined  |              | pc           | pushed by the call
//!   B  | the link                  | -----------> | rbp          | R
//!      | frames                    |              +--------------+
//!      | rbp                       |              | rbx          | in the red zone
//!      | rbx                       | the compiler may not spare it
//!      | pc                        | <- `at`
//!      +---------------------------+
//! ```
//! At its call the resumer's stack pointer is where the tables of its function say: gdb and lldb do not agree on what a push would have
//! made of it.
//!
//! Passed in registers: rdi the word; by a resume rdx where the stack waits and r8 the address of the link; by a suspend rsi where it waits
//! now. Whoever resumes a stack keeps that, so that it need not go through memory.

use super::Entry;
use crate::abi::{Slot, slot_state};
#[cfg(target_arch = "x86_64")]
use crate::published;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// Where a stack waits: an address that only this module looks at, or what is said of it below.
pub(crate) type At = usize;

/// Nothing is left on the stack.
pub(crate) const FINISHED: At = 1;
/// In an `At` of a stack that waits: set when it was suspended by [`suspend_asking`]. The bit of [`FINISHED`].
pub(crate) const ASKING: At = 1;
/// Where the stubs keep it, somewhere.
const KEPT: At = 8;

/// What a resumed stack left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    /// The word that it passed, or that its entry function returned.
    pub value: usize,
    /// Where it waits now.
    pub at: At,
}

/// The link lies so many bytes below a stack's top.
const LINK: usize = 16;

/// Address of a slot's link.
#[inline(always)]
pub(crate) fn link(slot: NonNull<Slot>) -> usize {
    // SAFETY: slots stay mapped; the word does not change while the slot is leased.
    unsafe { (&raw const (*slot.as_ptr()).top).read() }.wrapping_sub(LINK)
}

/// The mode word. In assembly, because its address is known relative to the code, which the compiler does not rely on for a symbol of
/// another crate; and read anew each time, because a copy would lie in writable memory.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn mode() -> usize {
    let mode: usize;
    // SAFETY: reads a word that is always mapped.
    unsafe {
        std::arch::asm!(
            "mov {mode}, [rip + {page}]",
            mode = out(reg) mode,
            page = sym published::cfi_stack_published,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    mode
}

/// Whether nothing has to be checked.
#[inline(always)]
fn unchecked() -> bool {
    #[cfg(target_arch = "x86_64")]
    return mode() & published::MODE_SHADOW as usize == 0;
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether nothing has to be checked, and no thread can have managed frames either.
#[inline(always)]
pub(crate) fn unchecked_and_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return mode() & (published::MODE_SHADOW | published::MODE_MANAGED) as usize == 0;
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// [`super::prepare`] for the functions here. Says where the stack waits.
///
/// # Safety
/// As [`super::prepare`]; the stack is switched by this module alone.
#[inline(always)]
pub(crate) unsafe fn prepare(slot: NonNull<Slot>, entry: Entry, data: usize) -> At {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        unsafe extern "C" {
            fn cfi_stack_first_inlined();
            fn cfi_stack_base_return_inlined();
        }
        // SAFETY: the words below the slot's top are the caller's alone; the link is 16-byte aligned and a data area holds more than 64 bytes.
        return unsafe {
            let link = std::ptr::with_exposed_provenance_mut::<usize>(link(slot));
            link.add(1).write(cfi_stack_base_return_inlined as *const () as usize);
            link.write(0);
            link.sub(1).write(slot.as_ptr().expose_provenance());
            link.sub(2).write(data);
            link.sub(3).write(entry as *const () as usize);
            link.sub(4).write(cfi_stack_first_inlined as *const () as usize);
            link.sub(4).addr()
        };
    }
    // SAFETY: the caller's.
    unsafe { super::prepare(slot, entry, data) };
    KEPT
}

/// [`super::resume`], inlined where that is sound.
///
/// # Safety
/// As [`super::resume_without_fp_control`]; the stack was prepared here, `at` is where it waits, and `link` its slot's [`link`].
#[inline(always)]
pub(crate) unsafe fn resume(slot: NonNull<Slot>, link: usize, at: At, arg: usize) -> Left {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        let (value, at_now): (usize, usize);
        // SAFETY: `at` is where `prepare` or `suspend` left the pc of code that expects just these registers; it comes back behind the call
        // with rsp as it was and rbp kept. All other registers but rbx are named as lost. rbx waits in the red zone, below what the callee
        // pushes: nobody runs on this stack before that is popped.
        unsafe {
            std::arch::asm!(
                "mov [rsp - 24], rbx",
                "call [rdx]",
                "mov rbx, [rsp - 24]",
                inlateout("rdx") at => _,
                inlateout("r8") link => _,
                inlateout("rdi") arg => value,
                lateout("rsi") at_now,
                lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
                clobber_abi("sysv64"),
            );
        }
        return Left { value, at: at_now };
    }
    let _ = (link, at);
    // SAFETY: the caller's.
    unsafe { checked_resume(slot, arg) }
}

/// # Safety
/// As [`resume`].
#[cold]
unsafe fn checked_resume(slot: NonNull<Slot>, arg: usize) -> Left {
    // SAFETY: the caller's.
    let passed = unsafe { super::resume_without_fp_control(slot, arg) };
    // SAFETY: slots stay mapped, and the field is atomic.
    let asking = unsafe { &(*slot.as_ptr()).state }.load(Ordering::Relaxed) == slot_state::ASKING;
    let at = match (passed.finished, asking) {
        (true, _) => FINISHED,
        (false, true) => KEPT | ASKING,
        (false, false) => KEPT,
    };
    Left { value: passed.value, at }
}

/// Suspends inlined. `$asking` is an instruction that marks rsi, or none.
#[cfg(target_arch = "x86_64")]
macro_rules! suspend {
    ($link:expr, $arg:expr, $asking:literal) => {{
        let value: usize;
        std::arch::asm!(
            "lea rcx, [rip + 2f]",
            "push rbp",
            "push rbx",
            "push rcx",
            "mov rsi, rsp",
            $asking,
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
            inlateout("rdx") $link => _,
            inlateout("rdi") $arg => value,
            lateout("rsi") _,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
        value
    }};
}

/// [`suspend`] where nothing has to be checked.
///
/// # Safety
/// [`unchecked_and_native`] says so. The caller runs on the stack of `slot`, or on one that was resumed from there, which is suspended with it then;
/// it was prepared and resumed here; `link` is its [`link`].
#[inline(always)]
pub(crate) unsafe fn suspend_unchecked(slot: NonNull<Slot>, link: usize, arg: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    let _ = slot;
    // SAFETY: as in `suspend`.
    #[cfg(target_arch = "x86_64")]
    return unsafe { suspend!(link, arg, "") };
    // SAFETY: the caller's.
    #[cfg(not(target_arch = "x86_64"))]
    unsafe {
        suspend(slot, link, arg)
    }
}

/// [`super::suspend`], inlined where that is sound.
///
/// # Safety
/// The caller runs on `slot`'s stack, which was prepared and resumed here; `link` is its [`link`].
#[inline(always)]
pub(crate) unsafe fn suspend(slot: NonNull<Slot>, link: usize, arg: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        // SAFETY: the link names what this stack's last wake-up left on the resumer's stack: rbp, and the pc of its call. As in `resume` for
        // registers.
        return unsafe { suspend!(link, arg, "") };
    }
    let _ = link;
    // SAFETY: the caller's.
    unsafe { super::suspend_without_fp_control(slot, arg) }
}

/// [`suspend`], marked with [`ASKING`].
///
/// # Safety
/// As [`suspend`]; the slot's state is [`slot_state::ASKING`].
pub(crate) unsafe fn suspend_asking(slot: NonNull<Slot>, link: usize, arg: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if unchecked() {
        // SAFETY: as in `suspend`.
        return unsafe { suspend!(link, arg, "or rsi, 1") };
    }
    // SAFETY: the caller's.
    unsafe { suspend(slot, link, arg) }
}

/// [`super::cancel`] for a stack that was prepared here.
///
/// # Safety
/// As [`super::cancel`].
#[inline(always)]
pub(crate) unsafe fn cancel(slot: NonNull<Slot>) {
    // Without a shadow stack there is nothing to pop.
    if !unchecked() {
        // SAFETY: the caller's.
        unsafe { super::cancel(slot) }
    }
}
