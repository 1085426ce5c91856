//! arm64 Linux: hwcaps (Documentation/arch/arm64/elf_hwcaps.rst), ID registers as the kernel emulates them
//! (cpu-feature-registers.rst), prctl for keys and GCS (pointer-authentication.rst, gcs.rst).

use super::{Domain, Features, Mechanisms};
use crate::arch;
use crate::published::{MODE_PAC, MODE_PACGA};

const HWCAP_CPUID: u64 = 1 << 11;
const HWCAP_PACA: u64 = 1 << 30;
const HWCAP_PACG: u64 = 1 << 31;
const HWCAP_GCS: u64 = 1 << 32;
const HWCAP2_BTI: u64 = 1 << 17;
const AT_MINSIGSTKSZ: libc::c_ulong = 51;

const PR_PAC_GET_ENABLED_KEYS: libc::c_int = 61;
const PR_PAC_APIAKEY: libc::c_int = 1;
const PR_PAC_APIBKEY: libc::c_int = 2;
const PR_GET_SHADOW_STACK_STATUS: libc::c_int = 74;
const PR_SHADOW_STACK_ENABLE: u64 = 1;

/// ID_AA64ISAR1_EL1.{APA,API}, ID_AA64ISAR2_EL1.APA3: from this value on FEAT_FPAC, then FEAT_FPACCOMBINE.
const FPAC: u64 = 4;
const FPACCOMBINE: u64 = 5;

fn auxiliary(kind: libc::c_ulong) -> u64 {
    // SAFETY: looks up a value of the auxiliary vector; 0 when it is not there.
    unsafe { libc::getauxval(kind) }
}

pub(super) fn mode() -> u64 {
    let hwcap = auxiliary(libc::AT_HWCAP);
    let bit = |cap, mode| if hwcap & cap != 0 { mode } else { 0 };
    bit(HWCAP_PACA, MODE_PAC) | bit(HWCAP_PACG, MODE_PACGA)
}

pub(super) fn domain() -> Domain {
    let mode = mode();
    Domain::of(|which| {
        let needs = if which == arch::GENERIC_KEY { MODE_PACGA } else { MODE_PAC };
        if mode & needs != 0 { arch::key_print(which) } else { 0 }
    })
}

pub(super) fn signal_frame_size() -> usize {
    auxiliary(AT_MINSIGSTKSZ) as usize
}

pub(super) fn detect() -> Features {
    let (hwcap, hwcap2) = (auxiliary(libc::AT_HWCAP), auxiliary(libc::AT_HWCAP2));
    let mut present = Mechanisms::empty();
    let mut pac_bits = 0;
    if hwcap & HWCAP_PACA != 0 {
        present |= Mechanisms::PAC_IA | Mechanisms::PAC_IB;
        pac_bits = arch::pac_field().count_ones();
        if hwcap & HWCAP_CPUID != 0 {
            let (isar1, isar2) = arch::id_registers();
            let level = [isar1 >> 4 & 15, isar1 >> 8 & 15, isar2 >> 12 & 15].into_iter().max().unwrap_or(0);
            present.set(Mechanisms::FPAC, level >= FPAC);
            present.set(Mechanisms::FPACCOMBINE, level >= FPACCOMBINE);
        }
    }
    present.set(Mechanisms::PAC_GA, hwcap & HWCAP_PACG != 0);
    present.set(Mechanisms::BTI, hwcap2 & HWCAP2_BTI != 0);
    present.set(Mechanisms::GCS, hwcap & HWCAP_GCS != 0);

    let mut enabled = present - Mechanisms::GCS;
    // SAFETY: only asks.
    let keys = unsafe { libc::prctl(PR_PAC_GET_ENABLED_KEYS, 0_u64, 0_u64, 0_u64, 0_u64) };
    // A kernel (or emulator) that cannot be asked has no way to turn keys off either.
    if keys >= 0 {
        enabled.set(Mechanisms::PAC_IA, present.contains(Mechanisms::PAC_IA) && keys & PR_PAC_APIAKEY != 0);
        enabled.set(Mechanisms::PAC_IB, present.contains(Mechanisms::PAC_IB) && keys & PR_PAC_APIBKEY != 0);
    }
    let mut status = 0_u64;
    // SAFETY: writes one u64 to a live place.
    let asked = unsafe { libc::prctl(PR_GET_SHADOW_STACK_STATUS, &raw mut status, 0_u64, 0_u64, 0_u64) };
    // The kernel's word and the register must agree: the register is what the stubs go by.
    let on = asked == 0 && status & PR_SHADOW_STACK_ENABLE != 0 && arch::shadow_pointer() != 0;
    enabled.set(Mechanisms::GCS, on);
    Features {
        present,
        enabled,
        locked: Mechanisms::empty(),
        lock_unknown: present & Mechanisms::GCS,
        pac_bits,
        handlers_without_onstack: Vec::new(),
    }
}
