//! Coroutines: functions with a stack of their own, which suspend themselves from any depth and go on later.
//!
//! Names and meaning are corosensei's: a program that uses that crate is ported by renaming it. Stacks come from [`crate::pool`]. How two stacks
//! change places is [`crate`]'s business: sealed contexts on arm64, the shadow stack on x86-64, and inlined where a process has neither.
//!
//! ```
//! use cfi_stack::coroutine::{Coroutine, CoroutineResult};
//!
//! let mut squares = Coroutine::new(|yielder, mut number: u32| {
//!     while number != 0 {
//!         number = yielder.suspend(number * number);
//!     }
//!     "done"
//! });
//! assert_eq!(squares.resume(3), CoroutineResult::Yield(9));
//! assert_eq!(squares.resume(5), CoroutineResult::Yield(25));
//! assert_eq!(squares.resume(0), CoroutineResult::Return("done"));
//! ```
//!
//! # Panics and destructors
//! A panic in a coroutine is caught at the base of its stack and raised again where it was resumed, with the same payload; the
//! coroutine is finished then. A coroutine that is dropped while suspended is unwound first, so that every destructor on its stack runs:
//! [`Yielder::suspend`] raises a panic that no hook is told of. Where panics abort (`-C panic=abort`) nothing can be unwound: the frames stay as
//! they are and their stack is lost, unless its memory is the program's own, whose end would leave them without ground: that ends the process.
//!
//! # Threads
//! The compiler may keep the address of a thread-local variable in a suspended frame, so no coroutine may go to another thread:
//!
//! ```compile_fail,E0277
//! fn goes_to_another_thread<T: Send>() {}
//! goes_to_another_thread::<cfi_stack::coroutine::Coroutine<(), (), ()>>();
//! ```
//!
//! Who knows all the code that a coroutine runs, and that all it has on its stack is `Send`, may say so of a type of their own that wraps it.
//! Rust code changes neither MXCSR, the x87 control word nor FPCR; a coroutine must not either: they are the thread's.

mod body;
mod crossing;
mod ending;
mod scoped;
pub mod stack;
mod word;
mod yielder;

pub use scoped::{ScopedCoroutine, ScopedCoroutineRef};
pub use stack::DefaultStack;
pub use yielder::Yielder;

use crate::abi::{Slot, slot_state};
use crate::error::Error;
use crate::pool::Lease;
use crate::switch::inlined::{self, Came};
use crossing::state_of;
use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, forget};
use std::panic::{Location, resume_unwind};
use std::ptr::{NonNull, from_ref};
use std::sync::atomic::Ordering;

/// What a coroutine gives when it is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CoroutineResult<Yield, Return> {
    /// It suspended itself and passed this.
    Yield(Yield),
    /// Its function returned this.
    Return(Return),
}

impl<Yield, Return> CoroutineResult<Yield, Return> {
    /// What it passed, if it suspended itself.
    pub fn as_yield(self) -> Option<Yield> {
        match self {
            CoroutineResult::Yield(value) => Some(value),
            CoroutineResult::Return(_) => None,
        }
    }

    /// What it returned, if it is finished.
    pub fn as_return(self) -> Option<Return> {
        match self {
            CoroutineResult::Yield(_) => None,
            CoroutineResult::Return(value) => Some(value),
        }
    }
}

/// A function on a stack of its own.
///
/// Dropping it while it is suspended unwinds it, see [the module](self).
pub struct Coroutine<Input, Yield, Return, Stack: stack::Stack = DefaultStack> {
    /// The stack's, which says where the coroutine is; leased for it where the stack is not a pool's. [`BLANK`] when it is finished.
    slot: NonNull<Slot>,
    stack: ManuallyDrop<Stack>,
    marker: PhantomData<fn(Input) -> CoroutineResult<Yield, Return>>,
}

/// What a finished coroutine has for a slot: nothing waits there, and nobody can write it.
static BLANK: Blank = Blank([0; size_of::<Slot>() / 8]);

#[repr(align(128))]
struct Blank(#[expect(dead_code, reason = "the switch reads its words")] [u64; size_of::<Slot>() / 8]);

impl Blank {
    #[inline(always)]
    fn slot() -> NonNull<Slot> {
        NonNull::from(&BLANK).cast()
    }
}

// SAFETY: what a shared reference gives is where the coroutine is, which is never written while there is one.
unsafe impl<Input, Yield, Return, Stack: stack::Stack + Sync> Sync for Coroutine<Input, Yield, Return, Stack> {}

impl<Input, Yield, Return, Stack: stack::Stack> fmt::Debug for Coroutine<Input, Yield, Return, Stack> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coroutine")
            .field("started", &self.started())
            .field("done", &self.done())
            .finish_non_exhaustive()
    }
}

/// Ends a function that has no way to return an error.
#[cold]
#[inline(never)]
#[track_caller]
fn refused(error: &Error) -> ! {
    panic!("{error}")
}

impl<Input, Yield, Return> Coroutine<Input, Yield, Return, DefaultStack> {
    /// Makes a coroutine that runs `f` on a new [`DefaultStack`] when it is first resumed.
    ///
    /// # Panics
    /// When there is no stack; [`Coroutine::try_new`] gives an error instead.
    #[inline]
    #[track_caller]
    pub fn new<F>(f: F) -> Self
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'static,
        Input: 'static,
        Yield: 'static,
        Return: 'static,
    {
        Self::with_stack(DefaultStack::default(), f)
    }

    /// [`Coroutine::new`] with an error for what else would be a panic.
    ///
    /// # Errors
    /// Those of [`DefaultStack::try_new`] and [`Coroutine::try_with_stack`].
    #[inline]
    #[track_caller]
    pub fn try_new<F>(f: F) -> Result<Self, Error>
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'static,
        Input: 'static,
        Yield: 'static,
        Return: 'static,
    {
        Self::try_with_stack(DefaultStack::try_new(stack::DEFAULT_SIZE)?, f)
    }
}

impl<Input, Yield, Return, Stack: stack::Stack> Coroutine<Input, Yield, Return, Stack> {
    /// Makes a coroutine that runs `f` on `stack` when it is first resumed.
    ///
    /// # Panics
    /// When it cannot; [`Coroutine::try_with_stack`] gives an error instead.
    #[inline]
    #[track_caller]
    pub fn with_stack<F>(stack: Stack, f: F) -> Self
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'static,
        Input: 'static,
        Yield: 'static,
        Return: 'static,
        Stack: 'static,
    {
        // SAFETY: nothing here is borrowed.
        unsafe { Self::with_stack_unchecked(stack, f) }
    }

    /// [`Coroutine::with_stack`] with an error for what else would be a panic.
    ///
    /// # Errors
    /// [`Error::Size`] when `f`, or what it returns, has no room on the stack, or base and limit are not what [`stack::Stack`] asks for.
    /// [`Error::Busy`] when frames are left on the stack. For memory of the program's own, [`Error::Memory`] when there is none for its slot or shadow stack.
    #[inline]
    #[track_caller]
    pub fn try_with_stack<F>(stack: Stack, f: F) -> Result<Self, Error>
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return + 'static,
        Input: 'static,
        Yield: 'static,
        Return: 'static,
        Stack: 'static,
    {
        // SAFETY: nothing here is borrowed.
        unsafe { Self::make(stack, f) }
    }

    /// [`Coroutine::with_stack`] for functions, values and stacks that borrow.
    ///
    /// # Panics
    /// As [`Coroutine::with_stack`].
    ///
    /// # Safety
    /// What `f`, the values passed and the stack borrow stays valid until the coroutine is finished or dropped; for ever if it is forgotten.
    #[inline]
    #[track_caller]
    pub unsafe fn with_stack_unchecked<F>(stack: Stack, f: F) -> Self
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
    {
        // SAFETY: the caller's.
        match unsafe { Self::make(stack, f) } {
            Ok(coroutine) => coroutine,
            Err(error) => refused(&error),
        }
    }

    /// # Safety
    /// As [`Coroutine::with_stack_unchecked`].
    #[inline]
    #[track_caller]
    unsafe fn make<F>(stack: Stack, f: F) -> Result<Self, Error>
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
    {
        let (slot, bare) = match stack.slot(stack::Private(())) {
            Some(slot) => (slot, None),
            None => {
                let lease = stack::bind(&stack)?;
                (lease.slot(), Some(lease))
            }
        };
        // SAFETY: whoever has the stack alone may use the slot. What `f` borrows is the caller's business.
        unsafe { Self::leave(slot, f, from_ref(Location::caller()).cast_mut())? };
        // `finish` takes it back.
        bare.map(Lease::into_raw);
        Ok(Coroutine { slot, stack: ManuallyDrop::new(stack), marker: PhantomData })
    }

    /// Makes the stack ready to run `f`.
    ///
    /// # Safety
    /// The slot is leased, and the caller alone uses it.
    #[inline(always)]
    unsafe fn leave<F>(slot: NonNull<Slot>, f: F, created: *mut Location<'static>) -> Result<(), Error>
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
    {
        #[cfg(target_arch = "x86_64")]
        if inlined::unchecked() {
            // SAFETY: the caller's; the stack was adopted when it was leased.
            unsafe {
                if !inlined::is_free(slot) {
                    return Err(Error::Busy);
                }
                let place = body::leave::<Input, Yield, Return, F>(slot, f)?;
                (*slot.as_ptr()).created.store(created, Ordering::Relaxed);
                let first = body::first::<Input, Yield, Return, F> as *const ();
                inlined::prepare(slot, first.expose_provenance() + inlined::AHEAD, place);
            }
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { Self::leave_for_stubs(slot, f, created) }
    }

    /// # Safety
    /// As [`Coroutine::leave`].
    #[cfg_attr(target_arch = "x86_64", cold)]
    #[cfg_attr(target_arch = "x86_64", inline(never))]
    unsafe fn leave_for_stubs<F>(slot: NonNull<Slot>, f: F, created: *mut Location<'static>) -> Result<(), Error>
    where
        F: FnOnce(&Yielder<Input, Yield>, Input) -> Return,
    {
        if !crossing::can_run_here(slot) {
            return Err(Error::Thread("the stack was leased by a thread of another shadow-stack mode"));
        }
        // SAFETY: the caller's; the state says that no frames are on the stack.
        unsafe {
            let state = state_of(slot);
            if !matches!(state.load(Ordering::Relaxed), slot_state::LEASED | slot_state::DONE | slot_state::READY) {
                return Err(Error::Busy);
            }
            let (entry, data) = body::leave_for_stubs::<Input, Yield, Return, F>(slot, f)?;
            inlined::prepare_by_stub(slot, entry, data);
            (*slot.as_ptr()).created.store(created, Ordering::Relaxed);
            state.store(slot_state::READY, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Nothing is on the stack any more.
    #[inline(always)]
    fn finish(&mut self) {
        if self.stack.slot(stack::Private(())).is_none() {
            // SAFETY: `make` has leased it.
            drop(unsafe { Lease::from_raw(self.slot) });
        }
        self.slot = Blank::slot();
    }

    /// Runs the coroutine until it suspends itself or is finished; its function, or the `suspend` that it waits in, is given `input`.
    ///
    /// # Panics
    /// When it is finished already; [`Coroutine::try_resume`] gives an error instead. With the coroutine's own panic.
    #[inline]
    #[track_caller]
    pub fn resume(&mut self, input: Input) -> CoroutineResult<Yield, Return> {
        let input = ManuallyDrop::new(input);
        let came = self.cross(&input);
        // In this order, one question after the other: that is how they are predicted.
        if came.how & inlined::HOW == inlined::SUSPENDED {
            // SAFETY: it has just come back so.
            return CoroutineResult::Yield(unsafe { self.yielded(came) });
        }
        if came.how & (inlined::HOW ^ inlined::FINISHED) == 0 {
            // SAFETY: as above.
            return CoroutineResult::Return(unsafe { self.returned(came) });
        }
        match self.otherwise(came) {
            Ok(result) => result,
            Err(error) => refused(&error),
        }
    }

    /// [`Coroutine::resume`] with an error for a coroutine that cannot be resumed.
    ///
    /// # Errors
    /// [`Error::Finished`]; [`Error::Busy`] while it runs, which only unsafe code can see.
    ///
    /// # Panics
    /// With the coroutine's own panic.
    #[inline]
    pub fn try_resume(&mut self, input: Input) -> Result<CoroutineResult<Yield, Return>, Error> {
        let input = ManuallyDrop::new(input);
        let came = self.cross(&input);
        if came.how & inlined::HOW == inlined::SUSPENDED {
            // SAFETY: it has just come back so.
            return Ok(CoroutineResult::Yield(unsafe { self.yielded(came) }));
        }
        self.otherwise(came)
    }

    #[inline(always)]
    fn cross(&mut self, input: &ManuallyDrop<Input>) -> Came {
        // SAFETY: `make` prepared the slot; self alone uses it, on the thread that made it. The input stays where it is until this is over.
        unsafe { crossing::resume(self.slot, word::send(input)) }
    }

    /// What it passed to `suspend`.
    ///
    /// # Safety
    /// It has just come back, suspended.
    #[inline(always)]
    unsafe fn yielded(&mut self, came: Came) -> Yield {
        // SAFETY: `Yielder::suspend` sent it and waits.
        unsafe { word::receive(came.value) }
    }

    /// What its function returned.
    ///
    /// # Safety
    /// It has just come back, finished.
    #[inline(always)]
    unsafe fn returned(&mut self, came: Came) -> Return {
        // SAFETY: `body::run` sent it; its place is not used again before the stack is.
        let result = unsafe { word::receive(came.value) };
        self.finish();
        result
    }

    /// Whatever a coroutine can come back for.
    #[cold]
    #[inline(never)]
    fn otherwise(&mut self, came: Came) -> Result<CoroutineResult<Yield, Return>, Error> {
        match self.settle(came) {
            Ended::Passed(result) => Ok(result),
            Ended::Panicked(payload) => resume_unwind(payload),
            Ended::Refused => {
                // SAFETY: the word came back as it was sent; `cross`'s caller still has what it stands for.
                drop(unsafe { word::receive::<Input>(came.value) });
                Err(if self.done() { Error::Finished } else { Error::Busy })
            }
        }
    }

    /// What the coroutine passed, once it passes something to its resumer rather than asking for something.
    fn settle(&mut self, mut came: Came) -> Ended<Yield, Return> {
        loop {
            // SAFETY: it has just come back so.
            unsafe {
                match came.how & inlined::HOW {
                    inlined::SUSPENDED => return Ended::Passed(CoroutineResult::Yield(self.yielded(came))),
                    inlined::FINISHED => return Ended::Passed(CoroutineResult::Return(self.returned(came))),
                    inlined::PANICKED => {
                        self.finish();
                        return Ended::Panicked(payload(came.value));
                    }
                    inlined::ASKS => {
                        yielder::granted(came.value);
                        came = crossing::resume(self.slot, 0);
                    }
                    _ => return Ended::Refused,
                }
            }
        }
    }

    /// Whether it was resumed before.
    pub fn started(&self) -> bool {
        // SAFETY: the stack, or the lease, keeps the slot of a coroutine that is not finished.
        self.done() || unsafe { self.slot.as_ref() }.standing() != slot_state::READY
    }

    /// Whether it is finished: its function returned or panicked, or it was unwound or reset.
    #[inline]
    pub fn done(&self) -> bool {
        self.slot == Blank::slot()
    }

    /// Marks the coroutine finished and forgets its frames, or its function if that never ran. No destructor of theirs runs.
    ///
    /// # Safety
    /// As for a `longjmp` to its function: no frame owes a destructor on which soundness depends, nobody uses what lies in the frames any
    /// more, and none of them has entered managed code.
    pub unsafe fn force_reset(&mut self) {
        if !self.done() {
            // SAFETY: not running, since `&mut self` is exclusive; the rest is the caller's.
            unsafe { inlined::cancel(self.slot) };
            self.finish();
        }
    }

    /// Drops what is on the coroutine's stack by unwinding it, and its function if that never ran. Nothing happens to one that is finished.
    ///
    /// A coroutine that catches the unwinding and suspends itself again is unwound again, until it is finished; what it yields or returns then is dropped.
    ///
    /// # Panics
    /// With the coroutine's own panic, if it turns the unwinding into one. Where panics abort, when the coroutine is suspended.
    pub fn force_unwind(&mut self) {
        if !self.done() {
            self.unwind();
        }
    }

    /// The stack of a finished coroutine, for another one.
    ///
    /// # Panics
    /// When it is not finished.
    #[track_caller]
    pub fn into_stack(mut self) -> Stack {
        assert!(self.done(), "the stack of a coroutine that is not finished cannot be taken from it");
        // SAFETY: self is forgotten, so the stack is taken once.
        let stack = unsafe { ManuallyDrop::take(&mut self.stack) };
        forget(self);
        stack
    }
}

/// How a resume ended.
enum Ended<Yield, Return> {
    Passed(CoroutineResult<Yield, Return>),
    Panicked(Box<dyn Any + Send>),
    Refused,
}

/// What a coroutine panicked with.
#[cold]
fn payload(word: usize) -> Box<dyn Any + Send> {
    // SAFETY: `body::run` boxed it for this.
    unsafe { *Box::from_raw(std::ptr::with_exposed_provenance_mut::<Box<dyn Any + Send>>(word)) }
}

/// Runs `f` on `stack`, for what needs more stack than there is here.
///
/// # Panics
/// What `f` panics with is raised again here. When `f` or its result has no room on the stack, see [`Coroutine::try_with_stack`].
#[inline]
#[track_caller]
pub fn on_stack<F, R>(stack: impl stack::Stack, f: F) -> R
where
    F: FnOnce() -> R,
{
    // SAFETY: it is finished when this returns, and nothing that is borrowed ends before.
    let mut coroutine = unsafe { Coroutine::with_stack_unchecked(stack, |_: &Yielder<(), Infallible>, ()| f()) };
    match coroutine.resume(()) {
        CoroutineResult::Return(result) => result,
    }
}
