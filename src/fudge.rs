//! The fudge factor, measured: how much stack native code takes that an engine calls on the managed segment itself.
//!
//! Native code that is called through [`exit`](crate::engine::Stubs::exit) runs on the thread's own stack and needs no room. A helper that is
//! called directly, because the way through `exit` costs too much, runs below the limit that managed code checks, on
//! [`Policy::reserve`](crate::Policy::reserve) bytes that nobody has counted. Here they are counted: the stack below such a call is painted, and
//! what is not paint any more afterwards was used.
//!
//! ```text
//!  let engine call helpers through `fudge::stub()` (or `measured_call`)
//!  fudge::start(Sampling::default())  ->  run the tests  ->  fudge::report()  ->  Policy::reserve_from(&report, margin)
//! ```
//! Measuring is for tests and for a sample of production. While it is off, the stub costs one load, one branch and a jump.
//!
//! # What a figure says
//!
//! - Bytes below the stack pointer at the call, down to the lowest 8-byte word that changed: exact to that word. The return address that
//!   the call pushes on x86-64 counts, and so does what a leaf keeps in its red zone (128 bytes, x86-64): it needs the room.
//! - Room that was allocated and never written is not seen, nor a call path that was not taken. Signal handlers on the same stack count
//!   as the callee's; an attached thread's run on their own.
//! - At most [`Sampling::window`] bytes are looked at, and never more than down to the segment's base. A call that has used all of it is counted as
//!   [`clipped`](Usage::clipped): its figure is a lower bound. What a call touches beyond the window alone, in a frame that steps over all of it, is not seen.
//! - Calls within measured calls are measured too, and count for the outer one as well.
//! - A measured call needs more than the call alone: the stub's frame (48 bytes on x86-64 with the return address, 64 on arm64) and, when the callee has
//!   returned, the frame record of `exit`.
//!
//! The frames of a span do not move while a measured call is on it: native code is not in the code map, and `grow` says
//! [`Error::UnknownCode`].
//!
//! Sites are kept in a table of fixed size, without locks or allocation. It is for reading and for choosing numbers: nothing else believes it, and it is
//! writable memory.

mod report;
#[cfg(test)]
mod tests;

pub use report::{Report, Usage};

use crate::arch;
use crate::error::Error;
use crate::pac::RawPc;
use report::TABLE;
use std::fmt;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Where a measured call stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// Named by the caller of [`measured_call`].
    Named(&'static str),
    /// A call of [`stub`], by its return address.
    Code(RawPc),
}

impl From<&'static str> for Site {
    fn from(name: &'static str) -> Site {
        Site::Named(name)
    }
}

impl From<RawPc> for Site {
    fn from(pc: RawPc) -> Site {
        Site::Code(pc)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Site::Named(name) => f.pad(name),
            Site::Code(pc) => f.pad(&pc.to_string()),
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Most bytes below a call that are painted and looked at. A multiple of 16, up to 1 GiB.
    pub window: usize,
    /// Every how many calls one is measured, over all sites and threads; 1: each. Threads that call at once may make it a few more or less.
    pub every: u64,
}

impl Default for Sampling {
    /// Every call, 64 KiB.
    fn default() -> Self {
        Sampling { window: 64 << 10, every: 1 }
    }
}

/// Largest window.
const LARGEST_WINDOW: usize = 1 << 30;

/// What the stub goes by. Its layout is known to `asm/`.
#[repr(C)]
pub(crate) struct Settings {
    /// 0: nothing is measured.
    window: AtomicUsize,
    every: AtomicU64,
    /// Calls until one is measured.
    left: AtomicU64,
}

const _: () = {
    assert!(std::mem::offset_of!(Settings, window) == 0);
    assert!(std::mem::offset_of!(Settings, every) == 8);
    assert!(std::mem::offset_of!(Settings, left) == 16);
};

#[unsafe(no_mangle)]
static cfi_stack_fudge_settings: Settings =
    Settings { window: AtomicUsize::new(0), every: AtomicU64::new(1), left: AtomicU64::new(0) };

/// Measures from now on, in all threads.
///
/// # Errors
/// [`Error::Policy`] for a window that is 0, no multiple of 16 or above 1 GiB, and for `every` 0.
pub fn start(sampling: Sampling) -> Result<(), Error> {
    let Sampling { window, every } = sampling;
    if window == 0 || !window.is_multiple_of(16) || window > LARGEST_WINDOW {
        return Err(Error::Policy("`window` is not a positive multiple of 16 up to 1 GiB"));
    }
    // The stubs count in signed words.
    if every == 0 || every > i64::MAX as u64 {
        return Err(Error::Policy("`every` is 0 or above 2^63"));
    }
    cfi_stack_fudge_settings.every.store(every, Ordering::Relaxed);
    cfi_stack_fudge_settings.left.store(every, Ordering::Relaxed);
    cfi_stack_fudge_settings.window.store(window, Ordering::Relaxed);
    Ok(())
}

/// Measures nothing from now on. What was measured stays.
pub fn stop() {
    cfi_stack_fudge_settings.window.store(0, Ordering::Relaxed);
}

/// Address of the stub `fudge_call(act: *const Activation, f: extern "C" fn(usize, usize, usize) -> u64, a0, a1, a2) -> u64`: managed code calls
/// native code on the segment that it runs on. The platform's C convention; a landing pad for indirect calls. While measuring is on, the calls of one return
/// address are one site.
///
/// `f` has the segment's reserve, less the stub's frame, and below it the guard. It may call managed code, `exit` and `leave`; a `leave` or an unwind that
/// drops the stub's frame leaves that call unmeasured.
pub fn stub() -> RawPc {
    arch::fudge_call()
}

/// Calls `f(data)` from native code, on the stack that runs, and notes what it touches below the stack pointer that it is called with. Returns what `f`
/// returns. Paints at most `bytes`, rounded down to 16, and no more than [`Sampling::window`].
///
/// # Safety
/// `f` is valid for `data` and does not unwind. Below the caller's stack pointer lie `bytes` bytes and 1 KiB, for this function's own frames, that can be
/// written and that nobody else uses.
pub unsafe fn measured(site: Site, bytes: usize, f: unsafe extern "C" fn(usize) -> u64, data: usize) -> u64 {
    let painted = due().min(bytes) & !15;
    if painted == 0 {
        // SAFETY: the caller's.
        return unsafe { f(data) };
    }
    // SAFETY: the caller's.
    let (value, used) = unsafe { arch::measured(f, data, painted) };
    TABLE.note(site, used, painted);
    value
}

/// As [`measured`], for a closure; it may panic. The frames of this function around `f` count, about 100 bytes.
///
/// # Safety
/// As [`measured`] for the stack; of `f` nothing is asked.
pub unsafe fn measured_call<T>(site: impl Into<Site>, bytes: usize, f: impl FnOnce() -> T) -> T {
    let mut call = Call { f: Some(f), value: MaybeUninit::uninit(), panic: None };
    let data = (&raw mut call).expose_provenance();
    // SAFETY: `run` is valid for the call, which lives until it has returned, and lets no panic out; the stack is the caller's business.
    unsafe { measured(site.into(), bytes, call.runner(), data) };
    match call.panic {
        Some(panic) => resume_unwind(panic),
        // SAFETY: `run` has returned without a panic, so it has written the value.
        None => unsafe { call.value.assume_init() },
    }
}

/// A closure on its way through the stub.
struct Call<T, F> {
    f: Option<F>,
    value: MaybeUninit<T>,
    panic: Option<Box<dyn std::any::Any + Send>>,
}

impl<T, F: FnOnce() -> T> Call<T, F> {
    /// What runs it.
    fn runner(&self) -> unsafe extern "C" fn(usize) -> u64 {
        run::<T, F>
    }
}

/// # Safety
/// `data` is the address of a `Call<T, F>` that nobody else uses.
unsafe extern "C" fn run<T, F: FnOnce() -> T>(data: usize) -> u64 {
    // SAFETY: the caller's.
    let call = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Call<T, F>>(data) };
    if let Some(f) = call.f.take() {
        match catch_unwind(AssertUnwindSafe(f)) {
            Ok(value) => _ = call.value.write(value),
            Err(panic) => call.panic = Some(panic),
        }
    }
    0
}

/// How many bytes the call that is about to be made is to be measured by: 0 when it is not its turn.
fn due() -> usize {
    let settings = &cfi_stack_fudge_settings;
    let window = settings.window.load(Ordering::Relaxed);
    if window == 0 {
        return 0;
    }
    // Not one atomic step, as in the stub: a count that is lost costs a sample.
    let left = settings.left.load(Ordering::Relaxed).saturating_sub(1);
    let next = if left == 0 { settings.every.load(Ordering::Relaxed) } else { left };
    settings.left.store(next, Ordering::Relaxed);
    if left == 0 { window } else { 0 }
}

/// Called by the stub, through `exit`, on the native stacks.
#[unsafe(no_mangle)]
extern "C" fn cfi_stack_on_measured(site: RawPc, used: usize, painted: usize) -> u64 {
    TABLE.note(Site::Code(site), used, painted);
    0
}

/// What was measured since the process began, or since [`forget`].
pub fn report() -> Report {
    TABLE.report()
}

/// Sets all counts to 0. What is measured meanwhile may be counted in part.
pub fn forget() {
    TABLE.forget();
}
