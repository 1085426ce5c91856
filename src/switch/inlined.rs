//! The switch between Rust code on two stacks, inlined where nothing has to be checked.
//!
//! The compiler saves what it needs around the switch and no more. Inlining pays where no thread of the process has a shadow stack, on x86-64:
//! nothing there can be believed, so nothing is sealed. Everywhere else these are the stubs. The read-only mode word decides when a stack is
//! prepared. The floating-point control registers are not saved: Rust code must not change them.
//!
//! ```text
//!      data area                        slot.own               ready, suspended           running
//!      +-----------------+ top          +------------+
//!      | base_return     |              | sp         |         rbp                        stale
//!   B  | address of seal |              | seal       |         own stack pointer: --+     R, a multiple of 16 --+
//!      | frames          |              | token      |         pc   bit 3 is set    |     stale                |
//!      | rbx             | <---+        | generation |         -                    |                          |
//!      +-----------------+     |        +------------+                              |     resumer's stack      |
//!                              +----------------------------------------------------+     | frames          |  |
//!                                                                                         | pc              |  | pushed by the call
//!                                                                                      R  | rbp             | <+
//!                                                                                         | rbx             | in the red zone
//! ```
//! One word of the slot says where to go next, and by its bit 3 which of the two it is: that makes a resume of what runs, and a suspend of what
//! does not, known before anything happens. 0 stands there when nothing is on the stack, and where the stubs switch it.
//! Walkers by frame pointer go from B to the slot, where R and a pc lie like a record while the stack runs, and on to R.
//! At its call the resumer's stack pointer is where the tables of its function say: gdb and lldb do not agree on what a push would have made of it.
//!
//! A resume *calls* what its stack waits at and a suspend *returns* to it, so that both are predicted like any call; the stack pointer
//! changes behind the call and before the return. Passed in registers: rdi the word, rdx the slot; by a resume rax own.seal; by a suspend rax R,
//! in whose low bits it is told how the stack came back.

use super::Entry;
use crate::abi::Slot;
#[cfg(target_arch = "x86_64")]
use crate::published;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// How a resumed stack came back, and with which word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Came {
    pub value: usize,
    /// The low bits say how: [`SUSPENDED`], [`FINISHED`], [`ASKS`] or [`REFUSED`].
    pub how: usize,
}

/// Bits of [`Came::how`] that count.
pub(crate) const HOW: usize = 3;
/// It suspended itself.
pub(crate) const SUSPENDED: usize = 0;
/// Its entry function returned.
pub(crate) const FINISHED: usize = 1;
/// It suspended itself to ask for something.
pub(crate) const ASKS: usize = 2;
/// It was not resumed: it cannot be.
pub(crate) const REFUSED: usize = 3;

/// In a slot's own.seal: the stack is suspended or ready, and this is its stack pointer.
#[cfg(target_arch = "x86_64")]
const WAITS: usize = 8;

/// Runs a block unless the mode word has none of the bits. In assembly, because the word's address is known relative to the code, which the compiler does
/// not rely on for a symbol of another crate; and it is read anew each time, because a copy would lie in writable memory.
#[cfg(target_arch = "x86_64")]
macro_rules! unless_clear {
    ($bits:expr, $block:block) => {
        // A sanitizer is told by the stubs alone.
        if $crate::sanitizer::is_told() {
            $block
        }
        // SAFETY: reads a word that is always mapped.
        unsafe {
            std::arch::asm!(
                "test byte ptr [rip + {page}], {bits}",
                "jnz {other}",
                page = sym $crate::published::cfi_stack_published,
                bits = const $bits,
                other = label $block,
                options(readonly, nostack),
            )
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use unless_clear;

/// Whether stacks are prepared for the functions here rather than for the stubs.
#[inline(always)]
pub(crate) fn unchecked() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        unless_clear!(published::MODE_SHADOW, { return false });
        true
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Prepares a stack for the functions here.
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
            let record = std::ptr::with_exposed_provenance_mut::<usize>((*pointer).top).sub(2);
            record.write((&raw mut (*pointer).own.seal).expose_provenance());
            record.add(1).write(cfi_stack_base_return_inlined as *const () as usize);
            (*pointer).own.sp = entry as *const () as usize;
            (*pointer).own.seal = (record.addr() - WAITS) as u64;
            (*pointer).own.token = cfi_stack_first_inlined as *const () as usize;
            (*pointer).own.generation = data as u64;
        }
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        (*slot.as_ptr()).next.store(std::ptr::null_mut(), Ordering::Relaxed);
        super::prepare(slot, entry, data)
    }
}

/// The stack pointer of a stack that is ready or suspended, if [`resume`] can be inlined for it.
///
/// # Safety
/// The slot is the caller's and was prepared here.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn waits_at(slot: NonNull<Slot>) -> Option<usize> {
    // The mode decides, not the slot alone: whoever writes the slot would turn every check off.
    unless_clear!(published::MODE_SHADOW, { return None });
    // SAFETY: the caller's.
    let word = unsafe { (*slot.as_ptr()).own.seal } as usize;
    (word & WAITS != 0).then_some(word)
}

/// Resumes a stack that [`waits_at`] `sp`.
///
/// # Safety
/// As [`super::resume_without_fp_control`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn resume(slot: NonNull<Slot>, sp: usize, arg: usize) -> Came {
    let (value, how): (usize, usize);
    // SAFETY: what is called finds its registers where `prepare` or `suspend` left them. It comes back behind the call with rsp as it was and rbp
    // kept. All other registers but rbx are named as lost. rbx waits in the red zone, below what the callee pushes: nobody runs on this stack
    // before that is popped.
    unsafe {
        std::arch::asm!(
            "mov [rsp - 24], rbx",
            "call [rdx + 16]",
            "mov rbx, [rsp - 24]",
            inlateout("rax") sp => how,
            inlateout("rdx") slot.as_ptr() => _,
            inlateout("rdi") arg => value,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
    }
    Came { value, how }
}

/// The resumer's stack pointer, if the stack runs.
///
/// # Safety
/// [`unchecked`]; the slot is leased, and no other thread has its stack.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn resumer(slot: NonNull<Slot>) -> Option<usize> {
    // SAFETY: the caller's.
    let word = unsafe { (*slot.as_ptr()).own.seal } as usize;
    (word & WAITS == 0).then_some(word)
}

/// The stack pointer of whoever waits for a stack that runs.
///
/// # Safety
/// The slot is leased, and its stack runs on this thread.
pub(crate) unsafe fn waits_for(slot: NonNull<Slot>) -> usize {
    // SAFETY: the caller's.
    unsafe { if unchecked() { (*slot.as_ptr()).own.seal as usize } else { (*slot.as_ptr()).resumer.sp } }
}

/// Suspends the stack that runs: goes to its `resumer`. Returns what the next resume passes, and the slot.
///
/// # Safety
/// The caller runs on `slot`'s stack, or on one that was resumed from there and is suspended with it then. It was prepared and resumed here, and
/// `resumer` is what [`resumer`] says.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn suspend<const HOW: usize>(
    slot: NonNull<Slot>,
    resumer: usize,
    arg: usize,
) -> (usize, NonNull<Slot>) {
    let value: usize;
    let same: *mut Slot;
    // SAFETY: the resumer's stack pointer is where this stack's last wake-up left rbp, below the pc of its call. As in `resume` for registers:
    // what the next resume calls is label 2, with the slot in rdx and in rax the stack pointer that is left there now. In front of the block it
    // is a multiple of 16 (System V ABI x86-64 3.2.2), so behind one push its bit 3 is set.
    unsafe {
        std::arch::asm!(
            "lea rcx, [rip + 2f]",
            "push rbx",
            "mov [rdx], rbp",
            "mov [rdx + 8], rsp",
            "mov [rdx + 16], rcx",
            "mov rsp, rax",
            ".if {how}",
            "or al, {how}",
            ".endif",
            "pop rbp",
            "ret",
            "2:",
            "endbr64",
            "push rbp",
            "mov [rdx + 8], rsp",
            "mov rsp, rax",
            "mov rbp, [rdx]",
            "pop rbx",
            how = const HOW,
            inlateout("rax") resumer => _,
            inlateout("rdx") slot.as_ptr() => same,
            inlateout("rdi") arg => value,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
        (value, NonNull::new_unchecked(same))
    }
}

/// [`super::cancel`] for a stack that was prepared here.
///
/// # Safety
/// As [`super::cancel`].
pub(crate) unsafe fn cancel(slot: NonNull<Slot>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the slot is the caller's alone.
    if unsafe { waits_at(slot) }.is_some() {
        // SAFETY: as above. There is no shadow stack to pop.
        unsafe { (*slot.as_ptr()).own.seal = 0 };
        return;
    }
    // SAFETY: the caller's.
    unsafe { super::cancel(slot) }
}
