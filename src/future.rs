//! Futures and stacks: a future that runs code with a stack of its own, and waiting in such code for any future.
//!
//! [`spawn_on_stack`] makes a future of a function. The function is ordinary code, as deep as it likes; where it has to wait it calls [`block_on`], which
//! suspends its stack instead of the thread and leaves the future pending. No executor is needed but one that polls.
//!
//! ```
//! use cfi_stack::future::{block_on, spawn_on_stack};
//! # fn poll_to_end<F: Future>(future: F) -> F::Output {
//! #     let (mut future, mut context) = (std::pin::pin!(future), std::task::Context::from_waker(std::task::Waker::noop()));
//! #     loop { if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) { return value } }
//! # }
//! fn deep(levels: u32) -> u32 {
//!     match levels {
//!         0 => block_on(async { 40 }).unwrap_or(0),
//!         _ => deep(levels - 1) + 1,
//!     }
//! }
//! assert_eq!(poll_to_end(spawn_on_stack(|| deep(2))), 42);
//! ```
//!
//! The stack is a [`Coroutine`]'s, and so are the rules: a panic comes out of `poll`, a future that is dropped while it waits unwinds its stack, and nothing goes to
//! another thread, since the compiler may keep the address of a thread-local variable in a suspended frame:
//!
//! ```compile_fail,E0277
//! fn goes_to_another_thread<T: Send>(_: T) {}
//! goes_to_another_thread(cfi_stack::future::spawn_on_stack(|| ()));
//! ```

use crate::coroutine::stack::{self, DefaultStack, Stack};
use crate::coroutine::{Coroutine, CoroutineResult, Yielder};
use crate::error::Error;
use crate::published;
use crate::thread::{self, Running};
use std::cell::Cell;
use std::fmt;
use std::pin::{Pin, pin};
use std::ptr::NonNull;
use std::task::{Context, Poll};

/// What a poll lends its stack until it returns. It lies on the polling frame's stack, and in the list of the thread's records ([`Running`]), so
/// that the youngest of these is the poll that the running code was begun by, whatever else is suspended and resumed.
struct Lent {
    context: NonNull<Context<'static>>,
    /// Of the stack; the stack itself puts it there.
    yielder: Cell<Option<NonNull<Lender>>>,
}

/// What suspends a future's stack.
type Lender = Yielder<NonNull<Lent>, ()>;

/// A function that runs on a stack of its own, as a future. It begins when it is first polled.
#[must_use = "a future does nothing unless it is polled"]
pub struct StackFuture<R, S: Stack = DefaultStack> {
    coroutine: Coroutine<NonNull<Lent>, (), R, S>,
}

// What is pinned lies on the stack, which does not move with the future.
impl<R, S: Stack> Unpin for StackFuture<R, S> {}

impl<R, S: Stack> fmt::Debug for StackFuture<R, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StackFuture").field(&self.coroutine).finish()
    }
}

/// Makes a future that runs `f` on a new [`DefaultStack`].
///
/// # Panics
/// When there is no stack; [`try_spawn_on_stack`] gives an error instead.
#[track_caller]
pub fn spawn_on_stack<F, R>(f: F) -> StackFuture<R>
where
    F: FnOnce() -> R + 'static,
    R: 'static,
{
    StackFuture::with_stack(DefaultStack::default(), f)
}

/// [`spawn_on_stack`] with an error for what else would be a panic.
///
/// # Errors
/// Those of [`Coroutine::try_new`].
#[track_caller]
pub fn try_spawn_on_stack<F, R>(f: F) -> Result<StackFuture<R>, Error>
where
    F: FnOnce() -> R + 'static,
    R: 'static,
{
    StackFuture::try_with_stack(DefaultStack::try_new(stack::DEFAULT_SIZE)?, f)
}

impl<R: 'static, S: Stack + 'static> StackFuture<R, S> {
    /// Makes a future that runs `f` on `stack`.
    ///
    /// # Panics
    /// When it cannot; [`StackFuture::try_with_stack`] gives an error instead.
    #[track_caller]
    pub fn with_stack<F>(stack: S, f: F) -> Self
    where
        F: FnOnce() -> R + 'static,
    {
        match Self::try_with_stack(stack, f) {
            Ok(future) => future,
            Err(error) => panic!("{error}"),
        }
    }

    /// [`StackFuture::with_stack`] with an error for what else would be a panic.
    ///
    /// # Errors
    /// Those of [`Coroutine::try_with_stack`], and [`Error::Memory`].
    #[track_caller]
    pub fn try_with_stack<F>(stack: S, f: F) -> Result<Self, Error>
    where
        F: FnOnce() -> R + 'static,
    {
        published::add_mode(published::MODE_MANAGED)?;
        let on_stack = move |yielder: &Lender, lent| {
            lend(yielder, lent);
            f()
        };
        Ok(StackFuture { coroutine: Coroutine::try_with_stack(stack, on_stack)? })
    }

    /// The stack of a future that is finished, for another one.
    ///
    /// # Panics
    /// When it is not finished.
    #[track_caller]
    pub fn into_stack(self) -> S {
        self.coroutine.into_stack()
    }
}

impl<R, S: Stack> Future for StackFuture<R, S> {
    type Output = R;

    /// Runs the function until it waits or returns.
    ///
    /// # Panics
    /// With the function's own panic, and when it is polled after it has finished.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<R> {
        let lent = Lent { context: NonNull::from(context).cast(), yielder: Cell::new(None) };
        let lent = NonNull::from(&lent);
        let running = Running::polling(Some(lent.cast()));
        let _ended = running.begin();
        match self.coroutine.resume(lent) {
            CoroutineResult::Yield(()) => Poll::Pending,
            CoroutineResult::Return(value) => Poll::Ready(value),
        }
    }
}

/// Tells the poll that runs a stack how to suspend that.
fn lend(yielder: &Lender, lent: NonNull<Lent>) {
    // SAFETY: the poll that has just resumed the stack waits for it, and with it what it lends.
    unsafe { lent.as_ref() }.yielder.set(Some(NonNull::from(yielder)));
}

/// Waits for a future in a function that [`spawn_on_stack`] runs: while it is pending, that function's stack is suspended and its own future is pending.
///
/// # Errors
/// [`Error::NoStack`] where no such function runs: then there is nothing that could wait but the thread. Also on the stack of a coroutine or
/// continuation that such a function has resumed: it could outlive the poll.
///
/// # Panics
/// With the future's panic.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, Error> {
    let lent = thread::current_poll().ok_or(Error::NoStack)?.cast::<Lent>();
    // SAFETY: the youngest poll of this thread waits for the stack that this runs on, or for one that waits for that: its frame is there.
    let (mut context, yielder) = unsafe { (lent.as_ref().context, lent.as_ref().yielder.get()) };
    let yielder = yielder.ok_or(Error::NoStack)?;
    // SAFETY: it lies in the oldest frame of the poll's stack, which does not return before this does.
    let yielder = unsafe { yielder.as_ref() };
    // On a stack that was resumed from the poll's it could outlive the poll, and what that has lent.
    if !yielder.is_here() {
        return Err(Error::NoStack);
    }
    let mut future = pin!(future);
    loop {
        let poll = {
            // A poll half way is nothing to suspend: a future that calls `block_on` itself gets an error.
            let running = Running::polling(None);
            let _ended = running.begin();
            // SAFETY: the poll that lent the context has not returned, and lent it to nobody else.
            future.as_mut().poll(unsafe { context.cast::<Context<'_>>().as_mut() })
        };
        if let Poll::Ready(value) = poll {
            return Ok(value);
        }
        let lent = yielder.suspend(());
        lend(yielder, lent);
        // SAFETY: as in `lend`.
        context = unsafe { lent.as_ref() }.context;
    }
}
