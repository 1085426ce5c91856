//! Instructions that tests need and Rust does not know. Those for signing lie in hint space; a test uses them as the
//! compiler's own prologues do, to know beforehand what an attack must meet.

use cfi_stack::pac::Signing;

/// Address bits of user code; a signature lies above them.
const ADDRESS: u64 = (1 << 48) - 1;

/// The word without its signature.
pub fn strip(word: u64) -> u64 {
    if cfg!(target_arch = "aarch64") { word & ADDRESS } else { word }
}

/// What a function that signs so makes of a raw address.
#[cfg(target_arch = "aarch64")]
pub fn sign(raw: u64, modifier: u64, signing: Signing) -> u64 {
    let mut word = raw;
    // SAFETY: hint space: computes on registers, or does nothing.
    unsafe {
        match signing {
            Signing::None => {}
            Signing::A => std::arch::asm!("hint #8", inout("x17") word, in("x16") modifier, options(nomem, nostack)),
            Signing::B => std::arch::asm!("hint #10", inout("x17") word, in("x16") modifier, options(nomem, nostack)),
        }
    }
    word
}

/// What a failed authentication leaves on a CPU without FPAC: the poisoned form. Faults with FPAC.
#[cfg(target_arch = "aarch64")]
pub fn poisoned(word: u64, modifier: u64, signing: Signing) -> u64 {
    let mut word = word;
    // SAFETY: as in `sign`.
    unsafe {
        match signing {
            Signing::None => {}
            Signing::A => std::arch::asm!("hint #12", inout("x17") word, in("x16") modifier, options(nomem, nostack)),
            Signing::B => std::arch::asm!("hint #14", inout("x17") word, in("x16") modifier, options(nomem, nostack)),
        }
    }
    word
}

/// Nothing is signed on this ISA.
#[cfg(not(target_arch = "aarch64"))]
pub fn sign(raw: u64, _: u64, _: Signing) -> u64 {
    raw
}

/// Nothing is signed on this ISA.
#[cfg(not(target_arch = "aarch64"))]
pub fn poisoned(word: u64, _: u64, _: Signing) -> u64 {
    word
}

/// The shadow-stack pointer, 0 where there is none. Inlined: a call would move it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn shadow_pointer() -> usize {
    let pointer: usize;
    // SAFETY: reads a register; a no-op without shadow stacks.
    unsafe { std::arch::asm!("xor {0}, {0}", "rdsspq {0}", out(reg) pointer, options(nomem, nostack)) };
    pointer
}

/// The shadow-stack pointer, 0 where there is none. Inlined: a call would move it.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub fn shadow_pointer() -> usize {
    let off: u64;
    // SAFETY: chkfeat is in hint space and computes on x16.
    unsafe { std::arch::asm!("mov x16, #1", "hint #40", out("x16") off, options(nomem, nostack)) };
    if off != 0 {
        return 0;
    }
    let pointer: usize;
    // SAFETY: reads GCSPR_EL0, which is there because GCS is on.
    unsafe { std::arch::asm!("mrs {0}, S3_3_C2_C5_1", out(reg) pointer, options(nomem, nostack)) };
    pointer
}

/// Whether the instruction authenticates a return address or a frame pointer.
pub fn authenticates(instruction: u32) -> bool {
    const AUTIASP: u32 = 0xd503_23bf;
    const AUTIBSP: u32 = 0xd503_23ff;
    const AUTIA: u32 = 0xdac1_1000;
    const AUTIB: u32 = 0xdac1_1400;
    const AUTDA: u32 = 0xdac1_1800;
    const AUTDB: u32 = 0xdac1_1c00;
    matches!(instruction, AUTIASP | AUTIBSP) || matches!(instruction & 0xffff_fc00, AUTIA | AUTIB | AUTDA | AUTDB)
}

/// Immediate of the `brk` in a stub whose check of a sealed record failed.
pub const BRK_SEAL: u64 = 0xc474;

/// Immediate of the `brk` in a stub whose check of a return address failed, by the key that it was made with; 0 for none.
pub fn breakpoint_of(signing: Signing) -> u64 {
    match signing {
        Signing::None => 0,
        Signing::A => 0xc470,
        Signing::B => 0xc471,
    }
}

/// The immediate, when the instruction is `brk`.
pub fn breakpoint(instruction: u32) -> Option<u32> {
    (instruction & 0xffe0_001f == 0xd420_0000).then_some(instruction >> 5 & 0xffff)
}

/// x86-64's `ud2`, as it begins in memory: how a stub's own check ends the process there.
pub const UD2: u32 = 0x0b0f;

/// Whether a function that starts there is a stub whose own check may end the process by `ud2` (x86-64).
pub fn is_checking_stub(start: usize) -> bool {
    unsafe extern "C" {
        fn cfi_stack_enter();
        fn cfi_stack_exit();
        fn cfi_stack_grow();
        fn cfi_stack_resume_managed();
        fn cfi_stack_link_part();
    }
    [
        cfi_stack_enter as unsafe extern "C" fn(),
        cfi_stack_exit,
        cfi_stack_grow,
        cfi_stack_resume_managed,
        cfi_stack_link_part,
    ]
    .into_iter()
    .any(|stub| stub as usize == start)
}
