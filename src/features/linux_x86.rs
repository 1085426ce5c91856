//! x86-64 Linux: /proc/self/status and arch_prctl (Documentation/arch/x86/shstk.rst), and SSP itself.

use super::{Domain, Features, Mechanisms};
use crate::arch;

const AT_MINSIGSTKSZ: libc::c_ulong = 51;
/// `arch_prctl(ARCH_SHSTK_STATUS, &mask)`.
const ARCH_SHSTK_STATUS: libc::c_long = 0x5005;
const ARCH_SHSTK_SHSTK: u64 = 1;

pub(super) fn mode() -> u64 {
    0
}

pub(super) fn domain() -> Domain {
    Domain::of(|_| 0)
}

pub(super) fn signal_frame_size() -> usize {
    // SAFETY: looks up a value of the auxiliary vector; 0 when it is not there.
    (unsafe { libc::getauxval(AT_MINSIGSTKSZ) }) as usize
}

pub(super) fn detect() -> Features {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let listed = |text: &str, field: &str, word: &str| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .any(|(name, words)| name.trim() == field && words.split_whitespace().any(|other| other == word))
    };
    let mut mask = 0_u64;
    // SAFETY: writes one u64 to a live place; kernels without shadow stacks answer EINVAL.
    let asked = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SHSTK_STATUS, &raw mut mask) };
    // The kernel's word and the register must agree: the register is what the stubs go by.
    let on = asked == 0 && mask & ARCH_SHSTK_SHSTK != 0 && arch::shadow_pointer() != 0;
    let some = |is: bool| if is { Mechanisms::SHSTK } else { Mechanisms::empty() };
    Features {
        present: some(on || listed(&cpu, "flags", "user_shstk")),
        enabled: some(on),
        locked: some(on && listed(&status, "x86_Thread_features_locked", "shstk")),
        lock_unknown: Mechanisms::empty(),
        pac_bits: 0,
        handlers_without_onstack: Vec::new(),
    }
}
