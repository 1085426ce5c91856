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
//!    already allocated within the reserve and `bytes` 0, or before allocating, with the bytes that it will need. On a large segment that was grown
//!    to, the limit may lie above the segment's end: `grow` then has the system provide the next pages, and nothing moves.
//! 7. **Callee-saved registers** are kept as in the platform's C convention, and so are the floating-point control
//!    registers (MXCSR, x87 control word, FPCR), which `enter` does not save.
//! 8. **`leave`** is called for the innermost activation of the thread only, and drops frames up to the innermost entry: none owes a destructor.
//! 9. **Native code** called through `exit` does not unwind and returns on the same thread; while it runs, it may enter other stacks
//!    with other activations, and this one again ([`enter_again`]). It keeps no pointer into the stack across a call by which
//!    frames can move: those of this module that are `unsafe`, and of managed code.
//! 10. **A suspended stack** ([`Stubs::suspend`]) holds nothing of the thread that it ran on, if another one may resume it, and no frame
//!     on it owes a destructor, if it may be dropped.
//!
//! # Linked calls
//!
//! [`Stubs::link`] calls a function on a further segment of the same stack. Nothing on the present one moves, so it does for spans that cannot
//! move. It is called by a *thunk*, which is called in the callee's stead, with the callee's arguments, and has a frame record:
//!
//! ```text
//!   x86-64                                  arm64
//!   push rbp; mov rbp, rsp                  paciasp; stp x29, x30, [sp, #-16]!; mov x29, sp
//!   r10 = activation, r11 = &LinkCall       x16 = activation, x17 = &LinkCall
//!   call link                               bl link
//!   pop rbp; ret                            ldp x29, x30, [sp], #16; autiasp; ret
//! ```
//!
//! - **Registers**: all but r10 and r11 (x16, x17) reach the callee as they are, and what it returns in registers comes back as it is; flags
//!   do not. The callee is called: it begins with a landing pad where the page asks for one. It keeps the callee-saved registers.
//! - **Stack arguments**: [`LinkCall`]'s argument bytes from fp + 16 of the thunk on are copied; the callee finds them where its convention
//!   says, from its CFA on, 16-byte aligned. They hold no pointers into the stack that move.
//! - **Stack results**: what the callee leaves in the first result bytes from its CFA on comes to the same place from the thunk's fp + 16 on,
//!   which its caller has kept as large as the larger of both. Where the callee leaves its stack pointer does not matter.
//! - **Room**: the next segment has at least the bytes that the [`LinkCall`] says it needs, and the policy's reserve. Where none is warm,
//!   one is mapped, twice as large as what lies on the present one; all segments together stay within the policy's maximum. When that cannot be,
//!   `enter` returns the error, as for `grow`. Before `link` is called, 160 bytes of the reserve are left.
//! - **[`LinkCall`]s** lie in memory that nobody can write: the stub calls the address that is found there.
//! - **Which to emit**: `grow` moves frames that are there, so it is for functions that can move, in their prologue. A function that had called
//!   `grow` could not link any more: its frame is on the old segment. So where a call's caller, or anything below it, cannot move, the code
//!   generator calls a thunk that compares `sp - need` with the limit word before the callee has a frame, and calls `link` when it is below;
//!   else it goes on to the callee by a jump. Above such a caller both ways may be mixed: what lies on the linked segment moves by itself.
//! - The functions above the edge grow by `grow` as any others; only their segment's frames move.
//!
//! # Lifted frames
//!
//! A stack that has more than `Policy::lift_above` bytes in its segment need not move as a whole: `grow` moves the youngest `Policy::lift_bytes` of
//! frames to a further segment, when it finds a frame below them whose function is registered with
//! [`retakes_sp`](crate::codemap::FrameLayout::retakes_sp): after each call, that of `grow` too, it computes its stack pointer from fp anew, and
//! its calls pass nothing on the stack. The further segment lies above the present one. When the lifted frames have returned, the stack pointer is
//! below the limit again, and the next check's `grow` goes back to the old segment's. The further one stays warm.

use crate::arch;
use crate::codemap::table::Reading;
use crate::error::Error;
use crate::pac::RawPc;
use crate::stack::{self, Stack};
use crate::thread;
use std::ptr::NonNull;

pub use crate::abi::{Activation, LinkCall};
pub use crate::stack::Exit;

/// Addresses of the stubs that managed code calls. All are landing pads for indirect calls.
#[derive(Clone, Copy, Debug)]
pub struct Stubs {
    /// `grow(act: *const Activation, bytes: usize)`: makes room. `bytes` will be needed below the stack pointer at the
    /// call, besides the reserve: code that knows what it will need asks once, before it calls. Preserves every general and 128-bit vector register; flags are not preserved. Does not return when the
    /// stack cannot grow: `enter` then returns the error.
    pub grow: RawPc,
    /// `exit(act, f: extern "C" fn(usize, usize, usize) -> u64, a0, a1, a2) -> u64`: calls native code on the thread's
    /// own stacks. The platform's C convention. `f` must not unwind: an unwinder that comes to this frame ends the process.
    pub exit: RawPc,
    /// `leave(act, code: u64) -> !`: pops both stacks to the entry frame; `enter` returns `Exit::Left(code)`.
    pub leave: RawPc,
    /// `link`: calls a function on a further segment of the same stack, whatever lies on the present one. To be called by a thunk,
    /// see [linked calls](self#linked-calls).
    pub link: RawPc,
    /// `suspend(act, value: u64) -> u64`: the stack's entry returns `Exit::Suspended(value)`, and
    /// [`Stack::resume`](crate::Stack::resume) makes the call return. The platform's C convention. With nested entries it drops the innermost
    /// one's frames and has that entry return [`Error::Nested`]: the native code around it would be lost.
    pub suspend: RawPc,
}

/// The stubs' addresses.
pub fn stubs() -> Stubs {
    Stubs { grow: arch::grow(), exit: arch::exit(), leave: arch::leave(), link: arch::link(), suspend: arch::suspend() }
}

/// From native code that managed code called through `exit`: runs `entry(args[0], .., args[3])` on the same stack, below the frames that
/// wait there. Those may move meanwhile.
///
/// # Errors
/// [`Error::NotInExit`] when `activation` is not the innermost one of this thread, or managed code runs with it: this is a signal handler, or a
/// hook. [`Error::Thread`] in another key domain or shadow mode than the stack's. [`Error::Nested`] when the new frames were to be
/// suspended. Any other error is why `grow` could not; the frames of this entry are gone then, and those that wait for the caller go on.
///
/// # Safety
/// As for [`Stack::enter`].
pub unsafe fn enter_again(activation: &Activation, entry: RawPc, args: [usize; 4]) -> Result<Exit, Error> {
    // SAFETY: the caller's.
    unsafe { stack::enter_again(activation, entry, args) }
}

/// From native code that managed code called through `exit`: makes room for `bytes` bytes of frames, besides the policy's reserve, below those
/// that wait for the caller.
///
/// # Errors
/// [`Error::NotInExit`] and [`Error::Thread`] as for [`enter_again`]; [`Error::Overflow`], [`Error::Memory`], and what can keep frames from
/// moving. Nothing has changed then.
///
/// # Safety
/// The frames can move: the caller and its native callers up to `exit` keep no pointer into the stack.
pub unsafe fn reserve(activation: &Activation, bytes: usize) -> Result<(), Error> {
    // SAFETY: the caller's.
    unsafe { stack::reserve(activation, bytes) }
}

/// From native code that managed code called through `exit`, which is a safepoint: moves the frames to the smallest segment that suffices, if the
/// policy's `shrink_below` says that the present one is too large. Returns whether it was.
///
/// # Errors
/// As for [`reserve`].
///
/// # Safety
/// As for [`reserve`].
pub unsafe fn compact(activation: &Activation) -> Result<bool, Error> {
    // SAFETY: the caller's.
    unsafe { stack::compact(activation) }
}

/// What [`compact_stacks`] has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Stacks that are on a smaller segment now.
    pub moved: usize,
    /// Bytes of data segment that went back to the system.
    pub freed: usize,
    /// Stacks that are as they were because of an error.
    pub refused: usize,
    /// The first such error.
    pub error: Option<Error>,
}

/// Compacts idle and suspended stacks, for a collector: each as [`Stack::compact`] does. What one stack is refused for does not keep the others.
pub fn compact_stacks<'a>(stacks: impl IntoIterator<Item = &'a mut Stack>) -> Compacted {
    let mut all = Compacted::default();
    for stack in stacks {
        let before = stack.size();
        match stack.compact() {
            Ok(moved) => {
                all.moved += usize::from(moved);
                all.freed += before - stack.size();
            }
            Err(error) => {
                all.refused += 1;
                all.error.get_or_insert(error);
            }
        }
    }
    all
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
