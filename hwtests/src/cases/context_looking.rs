//! Hand-made calls of the switch stubs, which look at the registers when they are back.

use super::context_scene::Side;
use cfi_stack::probe::Slot;
use std::arch::naked_asm;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

unsafe extern "C" {
    fn cfi_stack_resume();
    fn cfi_stack_suspend();
}

/// What a hand-made call found in registers when it went on, by [`Register`].
type Registers = [AtomicU64; 4];

/// A register that is looked at.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    /// x29, rbp.
    FramePointer,
    /// x19, rbx.
    CalleeSaved,
    /// d8.
    #[cfg(target_arch = "aarch64")]
    Vector,
    /// FPCR, MXCSR.
    Control,
}

/// What the stack that was suspended last found when it went on.
static OWN_FOUND: Registers = [const { AtomicU64::new(0) }; 4];
/// What who waited found.
static RESUMER_FOUND: Registers = [const { AtomicU64::new(0) }; 4];

thread_local! {
    static LOOKING: Cell<bool> = const { Cell::new(false) };
    static SEEN: Cell<[[u64; 4]; 2]> = const { Cell::new([[0; 4]; 2]) };
}

/// Keeps what the registers hold at the end of the next resume, or of the one under way.
pub fn look_at_registers() {
    LOOKING.set(true);
}

/// To be called at the end of each resume.
pub fn resumed() {
    if LOOKING.take() {
        SEEN.set([&OWN_FOUND, &RESUMER_FOUND].map(|found| std::array::from_fn(|index| found[index].load(Relaxed))));
    }
}

/// What was kept.
pub fn seen(side: Side, register: Register) -> u64 {
    SEEN.get()[side as usize][register as usize]
}

/// What a stub returns.
#[repr(C)]
pub struct Two {
    /// The word passed.
    pub value: usize,
    /// 1 when the entry function returned it.
    pub kind: usize,
}

/// A function that calls a stub and looks at the registers when it is back. All copies have the same frame.
#[cfg(target_arch = "x86_64")]
macro_rules! looking_call {
    ($name:ident, $stub:ident, $found:ident) => {
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize) -> Two {
            naked_asm!(
                "endbr64",
                "push rbp",
                "push rbx",
                "push r12",
                "push r13",
                "push r14",
                "push r15",
                "sub rsp, 8",
                "mov ebx, 0x1919",
                "call {stub}",
                "endbr64",
                "lea rcx, [rip + {found}]",
                "mov [rcx], rbp",
                "mov [rcx + 8], rbx",
                "stmxcsr [rcx + 16]",
                "ldmxcsr [rip + {control}]",
                "add rsp, 8",
                "pop r15",
                "pop r14",
                "pop r13",
                "pop r12",
                "pop rbx",
                "pop rbp",
                "ret",
                stub = sym $stub,
                found = sym $found,
                control = sym CONTROL,
            )
        }
    };
}

/// MXCSR as a program starts with it.
#[cfg(target_arch = "x86_64")]
static CONTROL: u32 = 0x1f80;

/// A function that calls a stub and looks at the registers when it is back. All copies have the same frame.
#[cfg(target_arch = "aarch64")]
macro_rules! looking_call {
    ($name:ident, $stub:ident, $found:ident) => {
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize) -> Two {
            naked_asm!(
                "hint #34", // bti c
                "stp x29, x30, [sp, #-160]!",
                "stp x19, x20, [sp, #16]",
                "stp x21, x22, [sp, #32]",
                "stp x23, x24, [sp, #48]",
                "stp x25, x26, [sp, #64]",
                "stp x27, x28, [sp, #80]",
                "stp d8, d9, [sp, #96]",
                "stp d10, d11, [sp, #112]",
                "stp d12, d13, [sp, #128]",
                "stp d14, d15, [sp, #144]",
                "mov x19, #0x1919",
                "fmov d8, x19",
                "bl {stub}",
                "hint #36", // bti j
                "adrp x9, {found}",
                "add x9, x9, :lo12:{found}",
                "str x29, [x9]",
                "str x19, [x9, #8]",
                "str d8, [x9, #16]",
                "mrs x10, fpcr",
                "str x10, [x9, #24]",
                "msr fpcr, xzr",
                "ldp x19, x20, [sp, #16]",
                "ldp x21, x22, [sp, #32]",
                "ldp x23, x24, [sp, #48]",
                "ldp x25, x26, [sp, #64]",
                "ldp x27, x28, [sp, #80]",
                "ldp d8, d9, [sp, #96]",
                "ldp d10, d11, [sp, #112]",
                "ldp d12, d13, [sp, #128]",
                "ldp d14, d15, [sp, #144]",
                "ldp x29, x30, [sp], #160",
                "ret",
                stub = sym $stub,
                found = sym $found,
            )
        }
    };
}

looking_call!(resume_looking, cfi_stack_resume, RESUMER_FOUND);
looking_call!(suspend_here, cfi_stack_suspend, OWN_FOUND);
looking_call!(suspend_there, cfi_stack_suspend, OWN_FOUND);
