//! The switch between Rust code on two stacks, inlined where nothing has to be checked.
//!
//! The compiler saves what it needs around the switch and no more. Inlining pays where no thread of the process has a shadow stack, on x86-64:
//! nothing there can be believed, so nothing is sealed. Everywhere else these are the stubs. The read-only mode word decides when a stack is
//! prepared, and its masks at each switch. The floating-point control registers are not saved: Rust code must not change them.
//!
//! ```text
//!      data area                        slot.own               ready, suspended           running
//!      +-----------------+ top          +------------+
//!      | place           |              | sp         |         rbp; ready: -              stale
//!      +-----------------+              | seal       |         the word: sp, bit 3 ---+   R, a multiple of 16 ---+
//!      | return address  |              | token      |         pc                     |   stale                  |
//!      | frames          |              | generation |         -                      |   -                      |
//!      | rbx             | <---+        +------------+                                |                          |
//!      +-----------------+     |                                                      |     resumer's stack      |
//!                              +------------------------------------------------------+     | frames          |  |
//!                                                                                           | pc              |  | pushed by the call
//!                                                                                        R  | rbp             | <+
//!                                                                                           | rbx             | in the red zone
//! ```
//! One word of the slot says where to go next, and by its bit 3 which of the two it is ([`coroutine_word`]): that makes a resume of what runs, and a
//! suspend of what does not, known before anything happens; and since the published masks have that bit only where nothing is checked, one
//! test asks for both. 0 stands there when nothing is on the stack, and [`BY_STUBS`] where the stubs switch it.
//!
//! While the stack runs, the word and the pc behind it lie like a frame record: the oldest frame's frame pointer names them, so walkers by frame
//! pointer go on to R. At its call the resumer's stack pointer is where the tables of its function say: gdb and lldb do not agree on what a
//! push would have made of it.
//!
//! A resume *calls* what its stack waits at and a suspend *returns* to it, so that both are predicted like any call; the stack pointer
//! changes behind the call and before the return. Passed in registers: rdi what is passed, rsi the slot; by a resume rax the word; by a suspend
//! rax R, in whose low bits it is told how the stack came back. [`AHEAD`] bytes before what a resume calls lies what is called to drop what is
//! on the stack instead: nothing has to be asked for that on the way.

use super::Entry;
#[cfg(target_arch = "x86_64")]
use crate::abi::coroutine_word;
use crate::abi::{Slot, slot_state};
#[cfg(target_arch = "x86_64")]
use crate::published;
use std::ptr::NonNull;
#[cfg(target_arch = "x86_64")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

/// How a resumed stack came back, and with which word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Came {
    pub value: usize,
    /// The low bits say how: [`SUSPENDED`], [`FINISHED`], [`ASKS`], [`REFUSED`] or [`PANICKED`].
    pub how: usize,
}

/// Bits of [`Came::how`] that count.
pub(crate) const HOW: usize = 7;
/// It suspended itself.
pub(crate) const SUSPENDED: usize = 0;
/// Its function returned.
pub(crate) const FINISHED: usize = 1;
/// It suspended itself to ask for something.
pub(crate) const ASKS: usize = 2;
/// It was not resumed: it cannot be.
pub(crate) const REFUSED: usize = 3;
/// Its function panicked.
pub(crate) const PANICKED: usize = 4;

/// In the word's place where the stubs switch: not 0, in which no mask would find a bit.
#[cfg(target_arch = "x86_64")]
const BY_STUBS: u64 = 1;

/// Bytes before what a resume calls: what is called instead to unwind the stack, or to drop the function that never ran.
#[cfg(target_arch = "x86_64")]
pub(crate) const AHEAD: usize = 16;

/// Whether stacks are prepared for the functions here rather than for the stubs.
#[inline(always)]
pub(crate) fn unchecked() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // A sanitizer is told by the stubs alone.
        if crate::sanitizer::is_told() {
            return false;
        }
        // In assembly, because the page's address is known relative to the code, which the compiler does not rely on for a symbol of another crate.
        // SAFETY: reads a word that is always mapped. That is no access to memory as the compiler sees it: no store of the program changes the
        // page, system calls do.
        unsafe {
            std::arch::asm!(
                "test byte ptr [rip + {page}], {shadow}",
                "jnz {checked}",
                page = sym published::cfi_stack_published,
                shadow = const published::MODE_SHADOW,
                checked = label { return false },
                options(nomem, nostack),
            )
        }
        true
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Says of a stack that nothing is on that it is the coroutines' from now on.
///
/// # Safety
/// The slot was leased just now.
#[inline(always)]
pub(crate) unsafe fn adopt(slot: NonNull<Slot>) {
    if unchecked() {
        // SAFETY: the slot is the caller's.
        unsafe { &(*slot.as_ptr()).state }.store(slot_state::INLINED, Ordering::Relaxed);
    }
}

/// Prepares a stack for the stubs.
///
/// # Safety
/// As [`super::prepare`].
pub(crate) unsafe fn prepare_by_stub(slot: NonNull<Slot>, entry: Entry, data: usize) {
    // SAFETY: the caller's.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        write(slot, BY_STUBS);
        (*slot.as_ptr()).next.store(std::ptr::null_mut(), Ordering::Relaxed);
        super::prepare(slot, entry, data)
    }
}

/// The word.
///
/// # Safety
/// The slot is leased and this thread's alone, or blank.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn read(slot: NonNull<Slot>) -> u64 {
    // SAFETY: the caller's; the other threads only read. Not as an atomic, whose value the compiler would not remember.
    unsafe { (&raw const (*slot.as_ptr()).own.seal).cast::<u64>().read() }
}

/// Writes the word, which other threads may read that list leaks.
///
/// # Safety
/// As [`read`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn write(slot: NonNull<Slot>, word: u64) {
    // SAFETY: the caller's.
    unsafe { AtomicU64::from_ptr((&raw mut (*slot.as_ptr()).own.seal).cast()) }.store(word, Ordering::Release);
}

/// Whether nothing is on a stack, or nothing that has run.
///
/// # Safety
/// [`unchecked`]; the slot is the caller's and [`adopt`]ed.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn is_free(slot: NonNull<Slot>) -> bool {
    /// Whether it never ran.
    #[cold]
    fn is_ready(word: u64) -> bool {
        word & coroutine_word::READY != 0
    }
    // SAFETY: the caller's.
    let word = unsafe { read(slot) };
    word == 0 || is_ready(word)
}

/// Prepares a stack: what is first resumed is `entry`, with the stack pointer below `place`, a multiple of 16.
///
/// # Safety
/// [`is_free`]. `entry` is what [`AHEAD`] and the contract of `body::first` ask for.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn prepare(slot: NonNull<Slot>, entry: usize, place: usize) {
    // SAFETY: the slot is the caller's alone.
    unsafe {
        (*slot.as_ptr()).own.token = entry;
        write(slot, (place - 8) as u64 + coroutine_word::READY);
    }
}

/// The word of a stack that is ready or suspended, if [`resume`] can be inlined for it.
///
/// # Safety
/// The slot is the caller's, or blank.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn waits_at(slot: NonNull<Slot>) -> Option<usize> {
    if crate::sanitizer::is_told() {
        return None;
    }
    // The mask decides, not the slot alone: whoever writes the slot would turn every check off. It is read anew each time, since a copy would lie in
    // writable memory. That it is tested by the compiler's own branch leaves it more freedom in loops than a branch of the assembly's.
    // SAFETY: the caller's; and as in `unchecked`.
    unsafe {
        let mask: u64;
        std::arch::asm!(
            "mov {mask}, [rip + {page} + {resumable}]",
            page = sym published::cfi_stack_published,
            resumable = const published::RESUMABLE,
            mask = out(reg) mask,
            options(nomem, nostack, preserves_flags),
        );
        let word = read(slot);
        (word & mask != 0).then_some(word as usize)
    }
}

/// Resumes a stack that [`waits_at`] says waits.
///
/// # Safety
/// As [`super::resume_without_fp_control`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn resume(slot: NonNull<Slot>, word: usize, arg: usize) -> Came {
    let (value, how): (usize, usize);
    // SAFETY: what is called finds its registers where `prepare` or `suspend` left them. It comes back behind the call with rsp as it was and rbp
    // kept. All other registers but rbx are named as lost. rbx waits in the red zone, below what the callee pushes: nobody runs on this stack
    // before that is popped.
    unsafe {
        std::arch::asm!(
            "mov [rsp - 24], rbx",
            "call [rsi + 16]",
            "mov rbx, [rsp - 24]",
            inlateout("rax") word => how,
            inlateout("rsi") slot.as_ptr() => _,
            inlateout("rdi") arg => value,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
    }
    Came { value, how }
}

/// Resumes a stack that is suspended so that it unwinds.
///
/// # Safety
/// As [`resume`], and it has run.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
pub(crate) unsafe fn resume_to_unwind(slot: NonNull<Slot>, word: usize) -> Came {
    let (value, how): (usize, usize);
    // SAFETY: as in `resume`. What `suspend` does behind its label is done here, and it goes on ahead of that.
    unsafe {
        std::arch::asm!(
            "mov [rsp - 24], rbx",
            "call 2f",
            "mov rbx, [rsp - 24]",
            "jmp 3f",
            "2:",
            "push rbp",
            "mov [rsi + 8], rsp",
            "mov rsp, rax",
            "mov rcx, [rsi + 16]",
            "sub rcx, {ahead}",
            "mov rbp, [rsi]",
            "pop rbx",
            "jmp rcx",
            "3:",
            ahead = const AHEAD,
            inlateout("rax") word => how,
            inlateout("rsi") slot.as_ptr() => _,
            lateout("rdi") value,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
    }
    Came { value, how }
}

/// A function that lies on a stack where it never ran.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Function {
    drop: unsafe extern "C-unwind" fn(*mut ()),
    place: *mut (),
}

#[cfg(target_arch = "x86_64")]
impl Function {
    /// Takes it from a stack that is ready: nothing is on the stack then, and whatever uses it next overwrites the function.
    ///
    /// # Safety
    /// As [`waits_at`].
    pub unsafe fn take(slot: NonNull<Slot>) -> Option<Function> {
        // SAFETY: the caller's. What lies ahead of the entry of a stack that is ready drops what is at its place.
        unsafe {
            let word = waits_at(slot)?;
            if word as u64 & coroutine_word::READY == 0 {
                return None;
            }
            write(slot, 0);
            let entry = std::ptr::with_exposed_provenance::<()>((*slot.as_ptr()).own.token - AHEAD);
            Some(Function {
                drop: std::mem::transmute::<*const (), unsafe extern "C-unwind" fn(*mut ())>(entry),
                place: std::ptr::with_exposed_provenance_mut(word + 8 - coroutine_word::READY as usize),
            })
        }
    }

    /// Drops it.
    pub fn drop(self) {
        // SAFETY: nobody else has taken it, and the stack was not used since.
        unsafe { (self.drop)(self.place) }
    }
}

/// The resumer's stack pointer, if the stack runs and [`suspend`] can be inlined for it.
///
/// # Safety
/// The slot is leased, and no other thread has its stack.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn resumer(slot: NonNull<Slot>) -> Option<usize> {
    if crate::sanitizer::is_told() {
        return None;
    }
    // SAFETY: as in `waits_at`.
    unsafe {
        let word = read(slot);
        std::arch::asm!(
            "test [rip + {page} + {careful}], {word}",
            "jnz {care}",
            page = sym published::cfi_stack_published,
            careful = const published::CAREFUL,
            word = in(reg) word,
            care = label { return None },
            options(nomem, nostack),
        );
        Some(word as usize)
    }
}

/// The resumer's stack pointer, if the stack runs.
///
/// # Safety
/// [`unchecked`]; as [`resumer`].
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn resumer_with_care(slot: NonNull<Slot>) -> Option<usize> {
    // SAFETY: the caller's.
    let word = unsafe { read(slot) };
    (word != 0 && word & coroutine_word::WAITS == 0).then_some(word as usize)
}

/// The stack pointer of whoever waits for a stack that runs.
///
/// # Safety
/// The slot is leased, and its stack runs on this thread.
pub(crate) unsafe fn waits_for(slot: NonNull<Slot>) -> usize {
    // SAFETY: the caller's.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if unchecked() {
            return read(slot) as usize;
        }
        (*slot.as_ptr()).resumer.sp
    }
}

/// What a stack that was suspended is resumed with.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Woken {
    pub value: usize,
    /// 0: it is to unwind.
    pub goes_on: usize,
}

/// Suspends the stack that runs: goes to its `resumer`.
///
/// # Safety
/// The caller runs on `slot`'s stack, or on one that was resumed from there and is suspended with it then. It was prepared and resumed here, and
/// `resumer` is what [`resumer`] says.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn suspend<const HOW: usize>(slot: NonNull<Slot>, resumer: usize, arg: usize) -> Woken {
    let (value, goes_on): (usize, usize);
    // SAFETY: the resumer's stack pointer is where this stack's last wake-up left rbp, below the pc of its call. As in `resume` for registers:
    // what the next resume calls is label 2, with the slot in rsi and in rax the word that is left there now. In front of the block the stack pointer
    // is a multiple of 16 (System V ABI x86-64 3.2.2), so behind one push its bit 3 is set and no lower one.
    // `resume_to_unwind` does what is done behind label 2 and goes to label 3, which lies AHEAD of it.
    unsafe {
        std::arch::asm!(
            "lea rcx, [rip + 2f]",
            "push rbx",
            "mov [rsi], rbp",
            "mov [rsi + 8], rsp",
            "mov [rsi + 16], rcx",
            "mov rsp, rax",
            ".if {how}",
            "or al, {how}",
            ".endif",
            "pop rbp",
            "ret",
            "3:",
            "endbr64",
            "xor eax, eax",
            "jmp 4f",
            ".org 3b + {ahead}, 0xcc",
            "2:",
            "endbr64",
            "push rbp",
            "mov [rsi + 8], rsp",
            "mov rsp, rax",
            "mov rbp, [rsi]",
            "pop rbx",
            "4:",
            how = const HOW,
            ahead = const AHEAD,
            inlateout("rax") resumer => goes_on,
            inlateout("rsi") slot.as_ptr() => _,
            inlateout("rdi") arg => value,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
    }
    Woken { value, goes_on }
}

/// [`super::cancel`] for a coroutine's stack.
///
/// # Safety
/// As [`super::cancel`].
pub(crate) unsafe fn cancel(slot: NonNull<Slot>) {
    // SAFETY: the caller's. Where nothing is checked there is no shadow stack to pop.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if unchecked() {
            return write(slot, 0);
        }
        super::cancel(slot);
        (*slot.as_ptr()).state.store(slot_state::DONE, Ordering::Relaxed);
    }
}
