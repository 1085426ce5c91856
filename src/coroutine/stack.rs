//! Stacks that coroutines run on.

use crate::abi::Slot;
use crate::error::Error;
use crate::pool::{self, Lease};
use crate::switch::inlined;
use crate::{features, published};
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

/// An address in a stack.
pub type StackPointer = NonZeroUsize;

/// What a stack's base is a multiple of, in bytes (System V ABI x86-64 3.2.2; AAPCS64 6.4.5.1).
pub const STACK_ALIGNMENT: usize = 16;

/// The least that a stack has, in bytes. It has no room for unwinding where the unwinder keeps many registers (arm64): who drops suspended coroutines
/// or panics on so small a stack comes to its guard.
pub const MIN_STACK_SIZE: usize = 4096;

/// Owns the memory of a stack.
///
/// # Safety
/// The memory from `limit` to `base` is readable and writable, except for a guard at its low end that stops an overflow; apart from the
/// guard it has at least [`MIN_STACK_SIZE`] bytes. It stays so and belongs to nobody else until `self` is dropped. Both addresses stay the same.
pub unsafe trait Stack {
    /// One past the highest address: where the stack begins. A multiple of [`STACK_ALIGNMENT`].
    fn base(&self) -> StackPointer;

    /// The lowest address, the guard's. A multiple of [`STACK_ALIGNMENT`].
    fn limit(&self) -> StackPointer;

    /// The slot that the memory has already.
    #[doc(hidden)]
    fn slot(&self, _: Private) -> Option<NonNull<Slot>> {
        None
    }
}

/// Keeps [`Stack`]'s hidden method this crate's own.
#[doc(hidden)]
#[derive(Debug)]
pub struct Private(pub(super) ());

// SAFETY: as the stack behind it, which the reference keeps from everybody else.
unsafe impl<S: Stack> Stack for &mut S {
    #[inline]
    fn base(&self) -> StackPointer {
        (**self).base()
    }

    #[inline]
    fn limit(&self) -> StackPointer {
        (**self).limit()
    }

    #[doc(hidden)]
    #[inline]
    fn slot(&self, private: Private) -> Option<NonNull<Slot>> {
        (**self).slot(private)
    }
}

/// A stack with a guard, from [`pool`] and given back to it.
#[derive(Debug)]
pub struct DefaultStack {
    lease: Lease,
}

/// What [`DefaultStack::default`] has, in bytes. Memory is used as far as it is touched.
pub(crate) const DEFAULT_SIZE: usize = 1 << 20;

impl DefaultStack {
    /// Takes a stack of at least `size` bytes, and at least [`MIN_STACK_SIZE`], from the pool.
    ///
    /// # Errors
    /// With what [`DefaultStack::try_new`] says as the inner error.
    #[inline]
    pub fn new(size: usize) -> io::Result<Self> {
        Self::try_new(size).map_err(|error| {
            let kind = match error {
                Error::Memory { .. } | Error::Budget { .. } | Error::Quota { .. } => io::ErrorKind::OutOfMemory,
                Error::Size { .. } => io::ErrorKind::InvalidInput,
                _ => io::ErrorKind::Other,
            };
            io::Error::new(kind, error)
        })
    }

    /// [`DefaultStack::new`] with this library's own error.
    ///
    /// # Errors
    /// [`Error::Size`] when no stack can be so large, [`Error::Memory`] and [`Error::Budget`] when there is none,
    /// [`Error::Thread`] when this thread has a shadow stack and the process switches without.
    #[inline]
    pub fn try_new(size: usize) -> Result<Self, Error> {
        decided()?;
        let lease = pool::lease(size.max(MIN_STACK_SIZE))?;
        adopt(&lease)?;
        Ok(DefaultStack { lease })
    }
}

impl Default for DefaultStack {
    /// A stack of 1 MiB.
    ///
    /// # Panics
    /// When there is none; [`DefaultStack::try_new`] gives an error instead.
    #[track_caller]
    #[inline]
    fn default() -> Self {
        match Self::try_new(DEFAULT_SIZE) {
            Ok(stack) => stack,
            Err(error) => super::refused(&error),
        }
    }
}

// SAFETY: the lease's memory is writable, has its guard below, is this lease's alone and does not move.
unsafe impl Stack for DefaultStack {
    #[inline]
    fn base(&self) -> StackPointer {
        // SAFETY: a data area has bytes below its top, so that is not 0.
        unsafe { StackPointer::new_unchecked(self.lease.top()) }
    }

    /// The lowest usable address: the guard lies below it.
    #[inline]
    fn limit(&self) -> StackPointer {
        // SAFETY: user space begins above 0, and a guard lies below.
        unsafe { StackPointer::new_unchecked(self.lease.base()) }
    }

    #[doc(hidden)]
    #[inline]
    fn slot(&self, _: Private) -> Option<NonNull<Slot>> {
        Some(self.lease.slot())
    }
}

// SAFETY: what a shared reference gives is the two addresses, which never change while the lease exists.
unsafe impl Sync for DefaultStack {}

/// Gives memory that is not a pool's a slot.
#[cold]
pub(super) fn bind(stack: &impl Stack) -> Result<Lease, Error> {
    let (base, limit) = (stack.base().get(), stack.limit().get());
    let bytes = base.saturating_sub(limit);
    if !base.is_multiple_of(STACK_ALIGNMENT) || !limit.is_multiple_of(STACK_ALIGNMENT) {
        return Err(Error::Size { bytes, rule: "base and limit are multiples of 16" });
    }
    if bytes < MIN_STACK_SIZE {
        return Err(Error::Size { bytes, rule: "at least 4096 bytes lie between limit and base" });
    }
    decided()?;
    // SAFETY: the implementor of `Stack` vouches for the memory, and the coroutine keeps it as long as the lease.
    let lease = unsafe { pool::bare(limit, base) }?;
    adopt(&lease)?;
    Ok(lease)
}

/// Sees to it that the process has decided how it switches: the first stack asks, unless a thread has attached before.
#[inline]
fn decided() -> Result<(), Error> {
    if published::mode() & published::MODE_SET != 0 {
        return Ok(());
    }
    decide()
}

#[cold]
fn decide() -> Result<(), Error> {
    published::set_mode(features::mode())
}

/// Makes a stack the coroutines'. One with a shadow stack needs the stubs.
#[inline]
fn adopt(lease: &Lease) -> Result<(), Error> {
    // SAFETY: the lease keeps the slot, of which only this field is read.
    let shadow_top = unsafe { (&raw const (*lease.slot().as_ptr()).shadow_top).read() };
    if shadow_top != 0 && published::mode() & published::MODE_SHADOW == 0 {
        return Err(Error::Thread("it has a shadow stack and the thread that came first had none"));
    }
    // SAFETY: it was leased just now.
    unsafe { inlined::adopt(lease.slot()) };
    Ok(())
}
