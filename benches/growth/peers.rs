//! The peers: programs that `benches/growth/peers` builds, one process for each measurement, so that each stack is as cold as ours.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;

const NAMES: [&str; 3] = ["gcc-fixed", "gcc-split-stack", "go"];

/// One program.
pub struct Peer {
    pub name: &'static str,
    program: PathBuf,
}

impl Peer {
    /// The two figures that `what` prints, in nanoseconds; nothing when the program fails.
    pub fn run(&self, what: &str, count: usize) -> Option<[f64; 2]> {
        let output = Command::new(&self.program).args([what, &count.to_string()]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let mut figures = text.lines().filter_map(|line| line.split_once(' ')?.1.parse().ok());
        let found = [figures.next()?, figures.next()?];
        output.status.success().then_some(found)
    }
}

/// Those that are there and those that are not.
pub struct Peers {
    found: Vec<Peer>,
    missing: Cell<Vec<&'static str>>,
}

impl Peers {
    pub fn find(folder: &Path) -> Self {
        let (found, missing) = NAMES.into_iter().partition::<Vec<_>, _>(|name| folder.join(name).is_file());
        let found = found.into_iter().map(|name| Peer { name, program: folder.join(name) }).collect();
        Peers { found, missing: Cell::new(missing) }
    }

    pub fn found(&self) -> impl Iterator<Item = &Peer> {
        self.found.iter()
    }

    /// Says once which are not built.
    pub fn name_missing(&self) {
        let missing = self.missing.take();
        if !missing.is_empty() {
            println!("  not built: {}; benches/growth/peers builds them, or says what it wants", missing.join(", "));
        }
    }
}

/// Where `benches/growth/peers` puts them.
pub fn default_folder() -> PathBuf {
    let cache = std::env::var_os("CFI_STACK_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/cfi-stack");
    cache.unwrap_or_else(home).join("peers")
}
