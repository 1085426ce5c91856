//! What this CPU enforces, and which column of the attack table follows from it.

use crate::outcome::Code;
use cfi_stack::features::{self, Features, Mechanisms};

/// A feature as `--require` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Return addresses are signed and authenticated with both instruction keys, records are sealed.
    Pac,
    /// A failed authentication faults by itself.
    Fpac,
    /// Landing pads.
    Bti,
    /// arm64's shadow stack.
    Gcs,
    /// x86's shadow stack.
    Shstk,
}

impl Feature {
    /// All of them.
    pub const ALL: [Feature; 5] = [Feature::Pac, Feature::Fpac, Feature::Bti, Feature::Gcs, Feature::Shstk];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Feature::Pac => "pac",
            Feature::Fpac => "fpac",
            Feature::Bti => "bti",
            Feature::Gcs => "gcs",
            Feature::Shstk => "shstk",
        }
    }

    /// The feature of that name.
    pub fn named(name: &str) -> Option<Feature> {
        Feature::ALL.into_iter().find(|feature| feature.name() == name)
    }

    fn mechanisms(self) -> Mechanisms {
        match self {
            Feature::Pac => Mechanisms::PAC_IA | Mechanisms::PAC_IB | Mechanisms::PAC_GA,
            Feature::Fpac => Mechanisms::FPAC,
            Feature::Bti => Mechanisms::BTI,
            Feature::Gcs => Mechanisms::GCS,
            Feature::Shstk => Mechanisms::SHSTK,
        }
    }
}

/// The columns of the attack table, and the CPUs that stand in none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// arm64, signed return addresses alone.
    Pac,
    /// arm64, signed return addresses and a shadow stack.
    PacGcs,
    /// x86-64 with a shadow stack.
    Cet,
    /// Neither is enforced.
    Bare,
}

/// The class of CPU that this runs on, as its features make it.
#[derive(Clone, Debug)]
pub struct Class {
    /// What the caller calls it, or what its features suggest.
    pub name: String,
    /// What was detected.
    pub features: Features,
    /// Whether QEMU's user mode runs this: it emulates the CPU but not the kernel's memory types.
    pub user_mode_emulator: bool,
}

impl Class {
    /// Asks CPU, kernel and thread.
    pub fn detect(name: Option<String>) -> Class {
        let features = features::detect();
        // QEMU's user mode shows the program's own name everywhere but here.
        let host_name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
        let name = name.unwrap_or_else(|| {
            let words: Vec<_> = features.enabled.names().collect();
            format!("{}:{}", std::env::consts::ARCH, if words.is_empty() { "bare".into() } else { words.join("+") })
        });
        Class { name, features, user_mode_emulator: host_name.starts_with("qemu-") }
    }

    /// Whether a feature is enabled.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.enabled.contains(feature.mechanisms())
    }

    /// The column.
    pub fn column(&self) -> Column {
        match (self.has(Feature::Pac), self.has(Feature::Gcs), self.has(Feature::Shstk)) {
            (true, true, _) => Column::PacGcs,
            (true, false, _) => Column::Pac,
            (false, _, true) => Column::Cet,
            _ => Column::Bare,
        }
    }

    /// Whether return addresses are authenticated.
    pub fn pac(&self) -> bool {
        self.has(Feature::Pac)
    }

    /// Whether a shadow stack of either kind is on.
    pub fn shadow(&self) -> bool {
        self.has(Feature::Gcs) || self.has(Feature::Shstk)
    }

    /// Whether random programs and rounds are fewer here: CPUs with these mechanisms are emulated ones in CI.
    pub fn is_slow(&self) -> bool {
        self.user_mode_emulator || self.pac() || self.shadow()
    }

    /// P in one of the library's stubs.
    pub fn stub_failure(&self) -> Code {
        if self.has(Feature::Fpac) { Code::F } else { Code::B }
    }

    /// P in a return that compiled code executes. Without FPAC the return runs into the poisoned address, and a GCS
    /// sees first that it is not its own.
    pub fn return_failure(&self) -> Code {
        match (self.has(Feature::Fpac), self.has(Feature::Gcs)) {
            (true, _) => Code::F,
            (false, true) => Code::S,
            (false, false) => Code::T,
        }
    }

    /// The features without which a case has nothing to show: any one of them would do.
    pub fn protecting() -> &'static [Feature] {
        if cfg!(target_arch = "x86_64") { &[Feature::Shstk] } else { &[Feature::Pac] }
    }
}
