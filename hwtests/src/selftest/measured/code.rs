//! Managed code that calls native code on its own segment, and native code of known hunger.

use crate::managed::{self, Function};
use cfi_stack::codemap::{Registered, Registration};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::{engine, fudge};
use std::arch::global_asm;
use std::sync::Once;

// u64 measured_recurse(act, n, f, a0): n calls deep, then fudge_call(act, f, a0, act, n); each frame adds 1. The oldest words of
// the frame that calls hold its frame pointer, and must do so afterwards: else it traps. frame_bytes = 48.
// u64 measured_hog(n, ..): touches the byte n bytes below its stack pointer, none for 0; returns n.
// u64 measured_leave(code, act, ..): leaves.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".bss",
    ".balign 8",
    "measured_stubs: .skip 24", // grow, fudge_call, leave
    ".globl measured_stubs",
    ".text",
    ".macro MEASURED name",
    ".globl \\name",
    ".type \\name, @function",
    ".balign 16",
    "\\name:",
    ".cfi_startproc",
    "endbr64",
    ".endm",
    ".macro MEASURED_END name",
    ".cfi_endproc",
    ".size \\name, . - \\name",
    ".globl \\name\\()_end",
    "\\name\\()_end:",
    ".endm",
    "MEASURED measured_recurse",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "sub rsp, 48",
    "cmp rsp, [rdi]",
    "jb 3f",
    "1: test rsi, rsi",
    "jz 2f",
    "dec rsi",
    "call measured_recurse",
    "add rax, 1",
    "leave",
    ".cfi_remember_state",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_restore_state",
    "2: mov [rsp], rbp",
    "mov [rsp + 8], rbp",
    "mov [rsp + 40], rbp",
    "mov r8, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov rcx, rdi",
    "call [rip + measured_stubs + 8]",
    ".globl measured_site",
    "measured_site:",
    "cmp [rsp], rbp",
    "jne 4f",
    "cmp [rsp + 8], rbp",
    "jne 4f",
    "cmp [rsp + 40], rbp",
    "jne 4f",
    "add rax, 1",
    "leave",
    ".cfi_remember_state",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_restore_state",
    "3: mov [rbp - 8], rsi",
    "xor esi, esi",
    "call [rip + measured_stubs]",
    "mov rsi, [rbp - 8]",
    "jmp 1b",
    "4: ud2",
    "MEASURED_END measured_recurse",
    "MEASURED measured_hog",
    "mov rax, rsp",
    "sub rax, rdi",
    "cmp rax, rsp",
    "je 2f",
    "mov byte ptr [rax], 0x5a",
    "2: mov rax, rdi",
    "ret",
    "MEASURED_END measured_hog",
    "MEASURED measured_leave",
    "xchg rdi, rsi",
    "sub rsp, 8",
    ".cfi_adjust_cfa_offset 8",
    "call [rip + measured_stubs + 16]",
    "ud2",
    "MEASURED_END measured_leave",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".bss",
    ".balign 8",
    "measured_stubs: .skip 24", // grow, fudge_call, leave
    ".globl measured_stubs",
    ".text",
    ".macro MEASURED name",
    ".globl \\name",
    ".type \\name, %function",
    ".balign 16",
    "\\name:",
    ".cfi_startproc",
    ".endm",
    ".macro MEASURED_END name",
    ".cfi_endproc",
    ".size \\name, . - \\name",
    ".globl \\name\\()_end",
    "\\name\\()_end:",
    ".endm",
    ".macro MEASURED_STUB offset",
    "adrp x9, measured_stubs",
    "add x9, x9, #:lo12:measured_stubs",
    "ldr x9, [x9, #\\offset]",
    ".endm",
    ".macro MEASURED_PROLOGUE",
    "hint #25", // paciasp
    ".cfi_negate_ra_state",
    "stp x29, x30, [sp, #-16]!",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset x29, -16",
    ".cfi_offset x30, -8",
    "mov x29, sp",
    ".cfi_def_cfa x29, 16",
    ".endm",
    "MEASURED measured_recurse",
    "MEASURED_PROLOGUE",
    "sub sp, sp, #48",
    "ldr x9, [x0]",
    "mov x10, sp",
    "cmp x10, x9",
    "b.lo 3f",
    "1: cbz x1, 2f",
    "sub x1, x1, #1",
    "bl measured_recurse",
    "b 5f",
    "2: str x29, [sp]",
    "str x29, [sp, #8]",
    "str x29, [sp, #40]",
    "mov x4, x1",
    "mov x1, x2",
    "mov x2, x3",
    "mov x3, x0",
    "MEASURED_STUB 8",
    "blr x9",
    ".globl measured_site",
    "measured_site:",
    "ldr x9, [sp]",
    "cmp x9, x29",
    "b.ne 4f",
    "ldr x9, [sp, #8]",
    "cmp x9, x29",
    "b.ne 4f",
    "ldr x9, [sp, #40]",
    "cmp x9, x29",
    "b.ne 4f",
    "5: add x0, x0, #1",
    "mov sp, x29",
    "ldp x29, x30, [sp], #16",
    ".cfi_remember_state",
    ".cfi_def_cfa sp, 0",
    ".cfi_restore x29",
    ".cfi_restore x30",
    "hint #29", // autiasp
    ".cfi_negate_ra_state",
    "ret",
    ".cfi_restore_state",
    "3: stp x0, x1, [sp]",
    "stp x2, x3, [sp, #16]",
    "mov x1, #0",
    "MEASURED_STUB 0",
    "blr x9",
    "ldp x0, x1, [sp]",
    "ldp x2, x3, [sp, #16]",
    "b 1b",
    "4: brk #0",
    "MEASURED_END measured_recurse",
    "MEASURED measured_hog",
    "hint #34", // bti c
    "cbz x0, 2f",
    "mov x9, sp",
    "sub x9, x9, x0",
    "mov w10, #0x5a",
    "strb w10, [x9]",
    "2: ret",
    "MEASURED_END measured_hog",
    "MEASURED measured_leave",
    "MEASURED_PROLOGUE",
    "mov x9, x0",
    "mov x0, x1",
    "mov x1, x9",
    "MEASURED_STUB 16",
    "blr x9",
    "brk #0",
    "MEASURED_END measured_leave",
);

macro_rules! address {
    ($name:ident) => {{
        unsafe extern "C" {
            fn $name();
        }
        RawPc::new($name as *const () as usize)
    }};
}

/// The recursion that calls native code on its own segment.
pub fn recurse() -> Function {
    let signing = if cfg!(target_arch = "aarch64") { Signing::A } else { Signing::None };
    Function { start: address!(measured_recurse), end: address!(measured_recurse_end), frame_bytes: 48, signing }
}

/// The return address of its call.
pub fn site() -> RawPc {
    address!(measured_site)
}

/// Touches the byte `n` bytes below its stack pointer.
pub fn hog() -> usize {
    address!(measured_hog).address()
}

/// Leaves with a code.
pub fn leave() -> usize {
    address!(measured_leave).address()
}

/// Registers the recursion and gives it the stubs' addresses.
pub fn register() -> Registered {
    unsafe extern "C" {
        static mut measured_stubs: [usize; 3];
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let stubs = engine::stubs();
        // SAFETY: written once, before any of the code runs.
        unsafe { measured_stubs = [stubs.grow.address(), fudge::stub().address(), stubs.leave.address()] };
    });
    let mut map = Registration::new();
    managed::describe(&mut map, recurse());
    map.publish().expect("it is not registered yet")
}
