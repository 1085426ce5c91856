//! The exception flags of MXCSR, which any rounding sets. They belong to nobody (x86-64 psABI 3.2.3), but `ldmxcsr` with other flags
//! than those in force is slow on some CPUs.

use super::Run;

#[cfg(target_arch = "x86_64")]
const FLAGS: u32 = 0x3f;
const PRECISION: u32 = 0x20;

/// What `make` makes, its stack having last seen no flag where the thread has one.
pub fn differing(make: fn() -> Run) -> Run {
    set(0);
    let mut run = make();
    run(1);
    set(PRECISION);
    run
}

/// Sets the flags as after some arithmetic: the same for all that is made from here on.
pub fn alike() {
    set(PRECISION);
}

#[cfg(target_arch = "x86_64")]
fn set(flags: u32) {
    let mut word = 0_u32;
    // SAFETY: stores and loads the register by a local word; control bits stay, flags trap nothing.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack));
        word = word & !FLAGS | flags;
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack, readonly));
    }
}

/// FPSR, the flags of arm64, is a register of its own that no switch needs to keep.
#[cfg(target_arch = "aarch64")]
fn set(_: u32) {}
