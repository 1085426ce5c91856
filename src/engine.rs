//! The engine's face: what managed code compares with and calls, and the rules that it keeps.
//!
//! An engine embeds an [`Activation`] in the context that its code carries around. Every managed function compares
//! its stack pointer with the limit word there (unsigned), and calls [`Stubs::grow`] when it lies below; imports go
//! through [`Stubs::exit`], traps through [`Stubs::leave`] or, from a fault handler, [`leave_from_signal`].
//!
//! # What managed code owes
//!
//! [`Stack::enter`](crate::Stack::enter) is unsafe because nobody can check these for the engine:
//!
//! 1. **Registered.** Every function whose frame can be on the stack when `grow` is called is published in the code map
//!    ([`crate::codemap`]) before it runs and until its last frame is gone. Native functions are not registered.
//! 2. **Frame record.** It pushes a frame record at entry, before it calls anything: the caller's frame pointer at fp, the return
//!    address at fp + 8, the CFA at fp + 16 = stack pointer at entry. fp stays the frame pointer throughout.
//! 3. **Signed** (arm64): the return address is signed at entry with the registered key and the stack pointer as modifier,
//!    and authenticated before the return (`paciasp`/`autiasp` or the B key). Indirect targets are landing pads where the page
//!    is mapped with PROT_BTI.
//! 4. **Constant size.** At every call, fp − sp is the registered `frame_bytes`; sp is 16-byte aligned.
//! 5. **No hidden pointer into the stack** in a frame or a callee-saved register, besides fp and sp, at any call: such a slot
//!    is declared per return address ([`Registration::safepoint`](crate::codemap::Registration::safepoint)) or does not exist.
//!    `Policy::relocate_always` finds those that do.
//! 6. **Checked.** Before code goes further below the limit than `Policy::reserve` it calls `grow`: either with its frame
//!    already allocated within the reserve and `bytes` 0, or before allocating, with the bytes that it will need.
//! 7. **Callee-saved registers** are kept as in the platform's C convention, and so are the floating-point control
//!    registers (MXCSR, x87 control word, FPCR), which `enter` does not save.
//! 8. **`leave`** is called for the innermost activation of the thread only, and drops frames: none owes a destructor.
//! 9. **Native code** called through `exit` does not unwind and returns on the same thread; while it runs, it may enter other stacks
//!    with other activations.

use crate::arch;
use crate::codemap::table::Reading;
use crate::error::Error;
use crate::pac::RawPc;
use crate::thread;
use std::ptr::NonNull;

pub use crate::abi::Activation;
pub use crate::stack::Exit;

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
    context.redirect(arch::leave_from_signal(), [activation.addr().get() as u64, code]);
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
