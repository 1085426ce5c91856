//! What the system says of this process and of the machine.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};

/// Memory of this process.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    /// Bytes of resident memory.
    pub resident: u64,
    /// Bytes of page tables.
    pub page_tables: u64,
    /// Mappings, each of which counts against `vm.max_map_count`.
    pub mappings: u64,
}

impl Use {
    pub fn now() -> io::Result<Use> {
        // The sum over all mappings: exact, while VmRSS may lag behind by some pages of each CPU.
        let resident = field("/proc/self/smaps_rollup", "Rss:").or_else(|_| field("/proc/self/status", "VmRSS:"))?;
        let page_tables = field("/proc/self/status", "VmPTE:")?;
        let mappings = BufReader::new(File::open("/proc/self/maps")?).split(b'\n').count() as u64;
        Ok(Use { resident: resident << 10, page_tables: page_tables << 10, mappings })
    }
}

/// Bytes that the machine has left.
pub fn available() -> io::Result<u64> {
    Ok(field("/proc/meminfo", "MemAvailable:")? << 10)
}

/// How many mappings a process may have.
pub fn most_mappings() -> String {
    fs::read_to_string("/proc/sys/vm/max_map_count").map_or("unknown".into(), |text| text.trim().into())
}

/// The number behind `name`, in KiB as these files say it.
fn field(path: &str, name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} has no {name}")))
}
