//! macOS: what the slice was compiled for. arm64e processes have pointer authentication by ABI.

use super::{Domain, Features, Mechanisms};
use crate::published::{MODE_PAC, MODE_PACGA};

const ARM64E: bool = cfg!(target_feature = "paca");

pub(super) fn mode() -> u64 {
    if ARM64E { MODE_PAC | MODE_PACGA } else { 0 }
}

pub(super) fn domain() -> Domain {
    Domain::of(|which| if ARM64E { crate::arch::key_print(which) } else { 0 })
}

pub(super) fn signal_frame_size() -> usize {
    libc::MINSIGSTKSZ
}

pub(super) fn detect() -> Features {
    let present =
        if ARM64E { Mechanisms::PAC_IA | Mechanisms::PAC_IB | Mechanisms::PAC_GA } else { Mechanisms::empty() };
    Features {
        present,
        enabled: present,
        locked: Mechanisms::empty(),
        lock_unknown: Mechanisms::empty(),
        pac_bits: if ARM64E { crate::arch::pac_field().count_ones() } else { 0 },
        handlers_without_onstack: Vec::new(),
    }
}
