//! What native code may do that managed code called through `exit`: enter the stack again, make room on it, have it shrink.
//!
//! Entries nest like calls. The control block is about the innermost one; what the outer ones need again is kept here, off both stacks. What the
//! stubs take from it, they verify: the native stack pointer by its seal, the link record by its own.

use super::{Inner, OUTCOME_RETURNED, untampered};
use crate::abi::Activation;
use crate::arch;
use crate::error::{Error, Refusal};
use crate::pac::{RawPc, Tampered};
use crate::signer::Signer;
use crate::stack::Exit;
use crate::tamper;
use crate::thread;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// An entry whose native callee has entered the stack again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outer {
    /// Its native stack pointer, and the seal of that.
    pub native_sp: usize,
    pub seal: u64,
    /// Address of the link record of the `exit` that the native callee was called by.
    pub link: usize,
    /// The managed shadow-stack pointer when it was made.
    pub shadow_level: usize,
}

/// The stack whose `exit` has called the native code that asks.
///
/// # Errors
/// [`Error::NotInExit`] when `activation` is not the innermost one of this thread, or managed code itself runs: this was called by a signal
/// handler or a hook.
pub(super) fn in_exit(activation: &Activation) -> Result<NonNull<Inner>, Error> {
    if thread::current_activation() != Some(NonNull::from(activation)) {
        return Err(Error::NotInExit);
    }
    let control = activation.control.load(Ordering::Relaxed);
    let inner = NonNull::new(control.cast::<Inner>()).ok_or(Error::NotInExit)?;
    // SAFETY: the activation runs a stack on this thread, whose control block is the first field of `Inner`. `enter` holds no reference to
    // it while the stub runs, and every function here gives its own up before managed code runs.
    let (link, moving) = unsafe { ((*control).link, (*inner.as_ptr()).moving) };
    if link == 0 || moving { Err(Error::NotInExit) } else { Ok(inner) }
}

/// See [`crate::engine::enter_again`].
///
/// # Safety
/// See there.
pub(crate) unsafe fn enter_again(activation: &Activation, entry: RawPc, args: [usize; 4]) -> Result<Exit, Error> {
    let inner = in_exit(activation)?.as_ptr();
    // SAFETY: `in_exit` has seen that native code runs, so nobody else uses `inner`; the reference ends before the stub runs.
    unsafe { (*inner).begin_again()? };
    // The thread's list has this activation already: it is the innermost one.
    // SAFETY: the caller's for `entry`; `begin_again` has put control in order, and exit's link record says where the frames begin.
    let value = unsafe { arch::enter(inner.cast(), entry, args) };
    // SAFETY: the stub has returned: native code runs again.
    unsafe { (*inner).end_again(value) }
}

/// See [`crate::engine::reserve`].
///
/// # Safety
/// See there.
pub(crate) unsafe fn reserve(activation: &Activation, bytes: usize) -> Result<(), Error> {
    let mut inner = in_exit(activation)?;
    // SAFETY: `in_exit` has seen that native code runs, so nobody else uses `inner`.
    let inner = unsafe { inner.as_mut() };
    inner.same_domain()?;
    untampered(inner.counted(|inner| inner.make_room(bytes, 0)))
}

/// See [`crate::engine::compact`].
///
/// # Safety
/// See there.
pub(crate) unsafe fn compact(activation: &Activation) -> Result<bool, Error> {
    let mut inner = in_exit(activation)?;
    // SAFETY: as in `reserve`.
    let inner = unsafe { inner.as_mut() };
    inner.same_domain()?;
    untampered(inner.counted(|inner| inner.shrink(true)))
}

impl<S: Signer> Inner<S> {
    /// Makes the present entry an outer one. Every check comes before the first write, but for the move that makes room.
    pub(super) fn begin_again(&mut self) -> Result<(), Error> {
        self.same_domain()?;
        self.outer.try_reserve(1).map_err(|_| Error::Memory {
            what: "a nested entry",
            bytes: size_of::<Outer>(),
            errno: libc::ENOMEM,
        })?;
        // exit's own record may lie in the reserve already: a nested entry begins with the whole of it.
        untampered(self.counted(|inner| inner.make_room(0, 0)))?;
        let control = &mut self.control;
        self.outer.push(Outer {
            native_sp: control.native_sp,
            seal: control.seal,
            link: control.link,
            shadow_level: control.shadow_level,
        });
        control.nested = self.outer.len();
        control.outcome = OUTCOME_RETURNED;
        if self.shadows.is_some() {
            control.shadow_level = control.token.wrapping_add(8);
        }
        self.failure = None;
        Ok(())
    }

    /// Makes the entry that waits for the innermost one, which has ended, the present one again.
    pub(super) fn end_again(&mut self, value: u64) -> Result<Exit, Error> {
        let ended = self.outcome(value);
        let Some(outer) = self.outer.pop() else {
            let slot = std::ptr::from_ref(self).addr();
            tamper::end(Tampered { evidence: "a nested entry ended that was never made", slot })
        };
        let control = &mut self.control;
        control.native_sp = outer.native_sp;
        control.seal = outer.seal;
        control.link = outer.link;
        control.shadow_level = outer.shadow_level;
        control.nested = self.outer.len();
        control.outcome = OUTCOME_RETURNED;
        // The entry may have left linked segments, which only the stubs had gone to: from now on the limit is again that of the segment that
        // the outer entry's code waits on.
        untampered(self.youngest().and_then(|youngest| Ok(self.settle(youngest.unwrap_or(0))?)))?;
        self.show_limit();
        ended
    }

    /// The entries, innermost first: native stack pointer and link record of each.
    pub(super) fn entries(&self) -> impl Iterator<Item = (usize, usize)> {
        let innermost = (self.control.native_sp, self.control.link);
        std::iter::once(innermost).chain(self.outer.iter().rev().map(|outer| (outer.native_sp, outer.link)))
    }
}

/// Evidence that a link record is not where the stubs put it.
pub(super) fn astray(slot: usize) -> Refusal {
    Tampered { evidence: "the stack's place is not where the stubs left it", slot }.into()
}
