//! Clocks that an emulator lets tick by instructions.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Instructions of one turn of [`spin`].
pub const INSTRUCTIONS_OF_A_TURN: u64 = 2;

/// What a mark reads.
pub enum Clock {
    /// The CPU's time stamp.
    Stamp,
    /// The length of QEMU's log.
    Trace(Trace),
}

/// QEMU's log, which has a line for each instruction.
pub struct Trace {
    path: PathBuf,
    file: libc::c_int,
}

/// The clock that `CFI_STACK_COUNTER` names; nothing when a parent steps instead.
pub fn clock() -> Result<Option<&'static Clock>, String> {
    match CLOCK.get_or_init(named) {
        Ok(clock) => Ok(clock.as_ref()),
        Err(why) => Err(why.clone()),
    }
}

static CLOCK: OnceLock<Result<Option<Clock>, String>> = OnceLock::new();

fn named() -> Result<Option<Clock>, String> {
    let Some(name) = std::env::var_os("CFI_STACK_COUNTER") else { return Ok(None) };
    if name == "clock" {
        return Ok(Some(Clock::Stamp));
    }
    match name.as_bytes().strip_prefix(b"trace:") {
        Some(path) => Trace::open(Path::new(std::ffi::OsStr::from_bytes(path))).map(|trace| Some(Clock::Trace(trace))),
        None => Err(format!("CFI_STACK_COUNTER is clock or trace:FILE, and not {}", name.display())),
    }
}

/// The clock now; 0 without one.
#[inline]
pub fn now() -> u64 {
    match CLOCK.get() {
        Some(Ok(Some(Clock::Stamp))) => stamp(),
        Some(Ok(Some(Clock::Trace(trace)))) => trace.length(),
        _ => 0,
    }
}

fn stamp() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        let (low, high): (u32, u32);
        // SAFETY: reads a counter.
        unsafe { std::arch::asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
        u64::from(high) << 32 | u64::from(low)
    }
    #[cfg(target_arch = "aarch64")]
    {
        let now: u64;
        // SAFETY: reads a counter.
        unsafe { std::arch::asm!("mrs {}, cntvct_el0", out(reg) now, options(nomem, nostack, preserves_flags)) };
        now
    }
}

impl Trace {
    fn open(path: &Path) -> Result<Self, String> {
        let failed = |what: &str| format!("{}: {what}", path.display());
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| failed("a name with a zero byte"))?;
        // SAFETY: a string that ends with a zero byte.
        let file = unsafe { libc::open(name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        match file {
            -1 => Err(failed(&std::io::Error::last_os_error().to_string())),
            _ => Ok(Trace { path: path.to_owned(), file }),
        }
    }

    /// Its length in bytes.
    fn length(&self) -> u64 {
        let mut status = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: a place for the status; zeroes are one.
        let status = unsafe {
            libc::fstat(self.file, status.as_mut_ptr());
            status.assume_init()
        };
        status.st_size as u64
    }

    /// Gives back what the lines so far take of the disk. QEMU writes on at its own place in the file, so that the length grows on.
    pub fn forget_lines(&self) -> Result<(), String> {
        let file = std::fs::OpenOptions::new().write(true).open(&self.path);
        file.and_then(|file| file.set_len(0)).map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

/// A loop of so many turns.
#[inline(never)]
pub fn spin(turns: u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: counts a register down.
    unsafe {
        std::arch::asm!("2: dec {0}", "jnz 2b", inout(reg) turns => _, options(nomem, nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: counts a register down.
    unsafe {
        std::arch::asm!("2: subs {0}, {0}, #1", "b.ne 2b", inout(reg) turns => _, options(nomem, nostack));
    }
}
