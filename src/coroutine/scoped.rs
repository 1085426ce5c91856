//! Coroutines that borrow.

use super::stack::{self, DefaultStack};
use super::{Coroutine, CoroutineResult, Yielder};
use crate::error::Error;
use std::fmt;
use std::marker::PhantomData;

/// A [`Coroutine`] whose function, stack and values may borrow. It runs within [`ScopedCoroutine::scope`] alone, at whose end it is dropped, so
/// that it cannot be forgotten while its frames use what they borrow.
///
/// ```
/// use cfi_stack::coroutine::ScopedCoroutine;
///
/// let mut seen = Vec::new();
/// let collector = ScopedCoroutine::new(|yielder, mut number: u8| {
///     while number != 0 {
///         seen.push(number);
///         number = yielder.suspend(());
///     }
/// });
/// collector.scope(|mut collector| {
///     collector.resume(2);
///     collector.resume(1);
/// });
/// assert_eq!(seen, [2, 1]);
/// ```
pub struct ScopedCoroutine<'a, Input, Yield, Return, Stack: stack::Stack = DefaultStack> {
    inner: Coroutine<Input, Yield, Return, Stack>,
    /// The function is used, and dropped, with the coroutine.
    borrowed: PhantomData<&'a mut ()>,
}

impl<Input, Yield, Return, Stack: stack::Stack> fmt::Debug for ScopedCoroutine<'_, Input, Yield, Return, Stack> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ScopedCoroutine").field(&self.inner).finish()
    }
}

impl<'a, Input, Yield, Return> ScopedCoroutine<'a, Input, Yield, Return, DefaultStack> {
    /// Makes a coroutine that runs `f` on a new [`DefaultStack`].
    ///
    /// # Panics
    /// As [`Coroutine::new`].
    #[inline]
    #[track_caller]
    pub fn new<F>(f: F) -> Self
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'a,
    {
        Self::with_stack(DefaultStack::default(), f)
    }
}

impl<'a, Input, Yield, Return, Stack: stack::Stack> ScopedCoroutine<'a, Input, Yield, Return, Stack> {
    /// Makes a coroutine that runs `f` on `stack`.
    ///
    /// # Panics
    /// As [`Coroutine::with_stack`].
    #[inline]
    #[track_caller]
    pub fn with_stack<F>(stack: Stack, f: F) -> Self
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'a,
    {
        // SAFETY: it is resumed within `scope` alone, which drops it while all that it borrows is alive. Forgotten outside, it has no frames.
        let inner = unsafe { Coroutine::with_stack_unchecked(stack, f) };
        ScopedCoroutine { inner, borrowed: PhantomData }
    }

    /// [`ScopedCoroutine::with_stack`] with an error for what else would be a panic.
    ///
    /// # Errors
    /// As [`Coroutine::try_with_stack`].
    #[inline]
    #[track_caller]
    pub fn try_with_stack<F>(stack: Stack, f: F) -> Result<Self, Error>
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'a,
    {
        // SAFETY: as in `with_stack`.
        let inner = unsafe { Coroutine::make(stack, f) }?;
        Ok(ScopedCoroutine { inner, borrowed: PhantomData })
    }

    /// The stack of a finished coroutine, for another one.
    ///
    /// # Panics
    /// When it is not finished, which it can be within [`ScopedCoroutine::scope`] alone.
    #[track_caller]
    pub fn into_stack(self) -> Stack {
        self.inner.into_stack()
    }

    /// Calls `f` with the coroutine, and drops it when `f` is done.
    ///
    /// # Panics
    /// With `f`'s panic, and as dropping a [`Coroutine`] does.
    #[inline]
    pub fn scope<F, T>(mut self, f: F) -> T
    where
        F: FnOnce(ScopedCoroutineRef<'_, Input, Yield, Return, Stack>) -> T,
    {
        let result = f(ScopedCoroutineRef { inner: &mut self.inner });
        if cfg!(panic = "abort") && self.inner.started() && !self.inner.done() {
            eprintln!(
                "cfi-stack: a suspended coroutine that borrows cannot be unwound where panics abort, and its scope ends"
            );
            std::process::abort();
        }
        result
    }
}

/// A [`ScopedCoroutine`] within its scope.
pub struct ScopedCoroutineRef<'a, Input, Yield, Return, Stack: stack::Stack> {
    inner: &'a mut Coroutine<Input, Yield, Return, Stack>,
}

impl<Input, Yield, Return, Stack: stack::Stack> fmt::Debug for ScopedCoroutineRef<'_, Input, Yield, Return, Stack> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ScopedCoroutineRef").field(&self.inner).finish()
    }
}

impl<Input, Yield, Return, Stack: stack::Stack> ScopedCoroutineRef<'_, Input, Yield, Return, Stack> {
    /// The same coroutine, borrowed from this.
    #[inline]
    pub fn as_mut(&mut self) -> ScopedCoroutineRef<'_, Input, Yield, Return, Stack> {
        ScopedCoroutineRef { inner: self.inner }
    }

    /// See [`Coroutine::resume`].
    ///
    /// # Panics
    /// As [`Coroutine::resume`].
    #[inline]
    #[track_caller]
    pub fn resume(&mut self, input: Input) -> CoroutineResult<Yield, Return> {
        self.inner.resume(input)
    }

    /// See [`Coroutine::try_resume`].
    ///
    /// # Errors
    /// As [`Coroutine::try_resume`].
    #[inline]
    pub fn try_resume(&mut self, input: Input) -> Result<CoroutineResult<Yield, Return>, Error> {
        self.inner.try_resume(input)
    }

    /// See [`Coroutine::started`].
    #[inline]
    pub fn started(&self) -> bool {
        self.inner.started()
    }

    /// See [`Coroutine::done`].
    #[inline]
    pub fn done(&self) -> bool {
        self.inner.done()
    }

    /// See [`Coroutine::force_reset`].
    ///
    /// # Safety
    /// As [`Coroutine::force_reset`].
    pub unsafe fn force_reset(&mut self) {
        // SAFETY: the caller's.
        unsafe { self.inner.force_reset() }
    }

    /// See [`Coroutine::force_unwind`].
    ///
    /// # Panics
    /// As [`Coroutine::force_unwind`].
    pub fn force_unwind(&mut self) {
        self.inner.force_unwind()
    }
}
