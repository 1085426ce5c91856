//! The engine's face: what managed code compares with and calls.
//!
//! An engine embeds an [`Activation`] in the context that its code carries around. Every managed function compares
//! its stack pointer with the limit word there (unsigned), and calls [`Stubs::grow`] when it lies below; imports go
//! through [`Stubs::exit`], traps through [`Stubs::leave`] or, from a fault handler, [`leave_from_signal`].

use crate::arch;
use crate::codemap::table::Reading;
use crate::error::Error;
use crate::pac::RawPc;
use crate::stack::Control;
use crate::thread;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicUsize};

/// What managed code carries: the limit it compares with and the stack it runs on.
///
/// The address must not change while a stack runs on it. Both words are written by this library alone.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Activation {
    pub(crate) limit: AtomicUsize,
    pub(crate) control: AtomicPtr<Control>,
    pub(crate) scratch: AtomicUsize,
    reserved: AtomicUsize,
}

impl Activation {
    /// Offset in bytes of the limit word: managed code calls `grow` when its stack pointer is below it (unsigned).
    pub const LIMIT_OFFSET: i32 = 0;

    /// An activation without a stack.
    pub const fn new() -> Self {
        Activation {
            limit: AtomicUsize::new(usize::MAX),
            control: AtomicPtr::new(std::ptr::null_mut()),
            scratch: AtomicUsize::new(0),
            reserved: AtomicUsize::new(0),
        }
    }
}

impl Default for Activation {
    fn default() -> Self {
        Activation::new()
    }
}

/// Addresses of the stubs that managed code calls. All are landing pads for indirect calls.
#[derive(Clone, Copy, Debug)]
pub struct Stubs {
    /// `grow(act: *const Activation, bytes: usize)`: makes room. `bytes` will be needed below the stack pointer at the
    /// call, besides the reserve. Preserves every general and 128-bit vector register; flags are not preserved. Does not return when the
    /// stack cannot grow: `enter` then returns the error.
    pub grow: RawPc,
    /// `exit(act, f: extern "C" fn(usize, usize, usize) -> u64, a0, a1, a2) -> u64`: calls native code on the thread's
    /// own stacks. The platform's C convention. `f` must not unwind.
    pub exit: RawPc,
    /// `leave(act, code: u64) -> !`: pops both stacks to the entry frame; `enter` returns `Exit::Left(code)`.
    pub leave: RawPc,
}

/// How managed code came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The entry function returned this.
    Returned(u64),
    /// Managed code, or the engine's fault handler, left with this code.
    Left(u64),
}

/// The stubs' addresses.
pub fn stubs() -> Stubs {
    Stubs { grow: arch::grow(), exit: arch::exit(), leave: arch::leave() }
}

/// In a fault handler: rewrites the interrupted context so that returning from the handler runs `leave(activation, code)`.
///
/// # Errors
/// [`Error::NotManaged`] when the interrupted instruction is not registered managed code, or `activation` is not what this thread
/// runs: the fault is somebody else's. The context is untouched then.
///
/// # Safety
/// `context` is the third argument of a handler installed with SA_SIGINFO and SA_ONSTACK, which is still running.
pub unsafe fn leave_from_signal(
    context: *mut std::ffi::c_void,
    activation: NonNull<Activation>,
    code: u64,
) -> Result<(), Error> {
    if thread::current_activation() != Some(activation) {
        return Err(Error::NotManaged);
    }
    // SAFETY: the caller's.
    let mut context = unsafe { Interrupted::new(context) };
    let reading = Reading::begin();
    if !reading.table().is_some_and(|table| table.runs(context.pc())) {
        return Err(Error::NotManaged);
    }
    context.redirect(arch::leave(), [activation.addr().get() as u64, code]);
    Ok(())
}

/// The registers that the kernel will restore.
struct Interrupted {
    context: *mut libc::ucontext_t,
}

impl Interrupted {
    /// # Safety
    /// See [`leave_from_signal`].
    unsafe fn new(context: *mut std::ffi::c_void) -> Self {
        Interrupted { context: context.cast() }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl Interrupted {
    fn pc(&self) -> RawPc {
        // SAFETY: the context is live while the handler runs.
        RawPc::new(unsafe { (*self.context).uc_mcontext.gregs[libc::REG_RIP as usize] } as usize)
    }

    fn redirect(&mut self, pc: RawPc, arguments: [u64; 2]) {
        // SAFETY: as in `pc`; nobody else looks at it until the handler returns.
        let registers = unsafe { &mut (*self.context).uc_mcontext.gregs };
        registers[libc::REG_RIP as usize] = pc.address() as i64;
        registers[libc::REG_RDI as usize] = arguments[0] as i64;
        registers[libc::REG_RSI as usize] = arguments[1] as i64;
    }
}

#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
impl Interrupted {
    fn pc(&self) -> RawPc {
        // SAFETY: the context is live while the handler runs.
        RawPc::new(unsafe { (*self.context).uc_mcontext.pc } as usize)
    }

    fn redirect(&mut self, pc: RawPc, arguments: [u64; 2]) {
        // SAFETY: as in `pc`; nobody else looks at it until the handler returns.
        let context = unsafe { &mut (*self.context).uc_mcontext };
        context.pc = pc.address() as u64;
        context.regs[..2].copy_from_slice(&arguments);
    }
}

#[cfg(target_os = "macos")]
impl Interrupted {
    fn pc(&self) -> RawPc {
        // SAFETY: the context is live while the handler runs.
        RawPc::new(unsafe { (*(*self.context).uc_mcontext).__ss.__pc } as usize)
    }

    fn redirect(&mut self, pc: RawPc, arguments: [u64; 2]) {
        // SAFETY: as in `pc`; nobody else looks at it until the handler returns.
        let state = unsafe { &mut (*(*self.context).uc_mcontext).__ss };
        state.__pc = pc.address() as u64;
        state.__x[..2].copy_from_slice(&arguments);
    }
}
