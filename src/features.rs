//! What the CPU, the kernel and this thread really enforce, found at run time.
//!
//! This library detects and asserts. Turning a shadow stack on for a program whose C library did not is the
//! program's own start: libc's `longjmp` and `dlsym` then need care.

#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
#[path = "features/linux_arm64.rs"]
mod system;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "features/linux_x86.rs"]
mod system;
#[cfg(target_os = "macos")]
#[path = "features/macos.rs"]
mod system;

use crate::pac::Signing;
use bitflags::bitflags;
use std::fmt;

bitflags! {
    /// Mechanisms that protect control flow.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Mechanisms: u32 {
        /// Instruction key A signs addresses (FEAT_PAuth).
        const PAC_IA = 1 << 0;
        /// Instruction key B signs addresses (FEAT_PAuth).
        const PAC_IB = 1 << 1;
        /// Generic authentication: `pacga` (FEAT_PACQARMA*, FEAT_PACIMP).
        const PAC_GA = 1 << 2;
        /// A failed authentication faults by itself (FEAT_FPAC).
        const FPAC = 1 << 3;
        /// So do the combined instructions such as `retaa` (FEAT_FPACCOMBINE).
        const FPACCOMBINE = 1 << 4;
        /// Landing pads on pages mapped with PROT_BTI (FEAT_BTI).
        const BTI = 1 << 5;
        /// Guarded control stack (FEAT_GCS).
        const GCS = 1 << 6;
        /// x86 user shadow stack (CET_SS).
        const SHSTK = 1 << 7;
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// The CPU has it and the kernel offers it.
    pub present: Mechanisms,
    /// It is on for this thread. BTI: the kernel honours PROT_BTI; whether a page has it is the page's own matter.
    pub enabled: Mechanisms,
    /// It cannot be turned off any more.
    pub locked: Mechanisms,
    /// Whether a lock is there cannot be asked on this system, without changing it.
    pub lock_unknown: Mechanisms,
    /// Bits of a code address that a signature takes; 0 without pointer authentication.
    pub pac_bits: u32,
    /// Signals whose handler runs without SA_ONSTACK: on a small stack such a handler hits the guard.
    pub handlers_without_onstack: Vec<i32>,
}

/// What must be equal where a stack is resumed: threads that share PAC keys and the shadow mode.
///
/// Of each key a fingerprint, which says nothing about the key; 0 where there is none, and where the thread has it turned off: then it signs nothing. With the
/// usual 48-bit addresses two keys have the same print once in 2^28 times (GA: 2^32).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Domain {
    /// Instruction key A.
    pub ia: u64,
    /// Instruction key B.
    pub ib: u64,
    /// Data key A.
    pub da: u64,
    /// Data key B.
    pub db: u64,
    /// The generic key: of seals.
    pub ga: u64,
    /// Whether the thread has a shadow stack.
    pub shadow: bool,
}

impl Domain {
    /// The print of an instruction key; 0 for none.
    pub(crate) fn code_key(&self, key: Signing) -> u64 {
        match key {
            Signing::None => 0,
            Signing::A => self.ia,
            Signing::B => self.ib,
        }
    }

    /// That of the data key of the same letter.
    pub(crate) fn data_key(&self, key: Signing) -> u64 {
        match key {
            Signing::None => 0,
            Signing::A => self.da,
            Signing::B => self.db,
        }
    }

    /// Of a thread whose keys have these prints: `print` is asked for IA, IB, DA, DB and GA by their numbers, 0 to 4.
    pub(crate) fn of(print: impl Fn(u64) -> u64) -> Domain {
        let shadow = crate::arch::shadow_pointer() != 0;
        Domain { ia: print(0), ib: print(1), da: print(2), db: print(3), ga: print(4), shadow }
    }
}

/// Asks CPU, kernel and thread.
pub fn detect() -> Features {
    let mut features = system::detect();
    features.handlers_without_onstack = handlers_without_onstack();
    features
}

impl Mechanisms {
    /// The names of the mechanisms in the set, as `--require` and the reports write them.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        const NAMES: [(Mechanisms, &str); 8] = [
            (Mechanisms::PAC_IA, "pac-ia"),
            (Mechanisms::PAC_IB, "pac-ib"),
            (Mechanisms::PAC_GA, "pac-ga"),
            (Mechanisms::FPAC, "fpac"),
            (Mechanisms::FPACCOMBINE, "fpaccombine"),
            (Mechanisms::BTI, "bti"),
            (Mechanisms::GCS, "gcs"),
            (Mechanisms::SHSTK, "shstk"),
        ];
        NAMES.into_iter().filter(move |(mechanism, _)| self.contains(*mechanism)).map(|(_, name)| name)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in self.present.names() {
            let has = |set: Mechanisms, word| if set.names().any(|other| other == name) { word } else { "" };
            let (enabled, locked) = (has(self.enabled, " enabled"), has(self.locked, " locked"));
            let unknown = has(self.lock_unknown, " lock-unknown");
            writeln!(f, "{name}: present{enabled}{locked}{unknown}")?;
        }
        if self.pac_bits != 0 {
            writeln!(f, "signature width: {} bits", self.pac_bits)?;
        }
        if !self.handlers_without_onstack.is_empty() {
            writeln!(f, "signal handlers without SA_ONSTACK: {:?}", self.handlers_without_onstack)?;
        }
        Ok(())
    }
}

/// The mode word for [`crate::published`].
pub(crate) fn mode() -> u64 {
    let shadow = if crate::arch::shadow_pointer() != 0 { crate::published::MODE_SHADOW } else { 0 };
    system::mode() | shadow
}

/// The calling thread's domain.
pub(crate) fn domain() -> Domain {
    system::domain()
}

/// Bytes that the kernel's largest signal frame takes (`AT_MINSIGSTKSZ`).
pub(crate) fn signal_frame_size() -> usize {
    system::signal_frame_size().max(libc::MINSIGSTKSZ)
}

/// Highest signal number asked about.
const LAST_SIGNAL: i32 = 64;

fn handlers_without_onstack() -> Vec<i32> {
    (1..=LAST_SIGNAL)
        .filter(|&signal| {
            let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
            // SAFETY: only asks; a number that is no signal, or libc's own, is refused with an error.
            if unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } != 0 {
                return false;
            }
            // SAFETY: the call succeeded and filled it.
            let action = unsafe { action.assume_init() };
            let handled = action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN;
            handled && action.sa_flags & libc::SA_ONSTACK == 0
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_enabled_is_present() {
        let features = detect();
        assert!(features.present.contains(features.enabled), "{features}");
        assert!(features.present.contains(features.locked), "{features}");
        assert_eq!(features.pac_bits != 0, features.present.contains(Mechanisms::PAC_IA), "{features}");
    }

    #[test]
    fn a_handler_without_an_alternate_stack_is_named() {
        extern "C" fn handler(_: i32) {}
        let set = |flags| {
            // SAFETY: installs a handler that does nothing, for a signal that nothing here sends.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as extern "C" fn(i32) as usize;
                action.sa_flags = flags;
                assert_eq!(libc::sigaction(libc::SIGURG, &action, std::ptr::null_mut()), 0);
            }
        };
        set(0);
        assert!(detect().handlers_without_onstack.contains(&libc::SIGURG));
        set(libc::SA_ONSTACK);
        assert!(!detect().handlers_without_onstack.contains(&libc::SIGURG));
    }
}
