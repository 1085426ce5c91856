//! What a coroutine's function has of the outside.

use super::{crossing, word};
use crate::abi::{Slot, slot_state};
use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;

/// Suspends the coroutine that it was given to.
///
/// A reference to it can be copied, but stays on its thread.
#[repr(transparent)]
pub struct Yielder<Input, Yield> {
    slot: NonNull<Slot>,
    marker: PhantomData<fn(Yield) -> Input>,
}

impl<Input, Yield> fmt::Debug for Yielder<Input, Yield> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Yielder").finish_non_exhaustive()
    }
}

impl<Input, Yield> Yielder<Input, Yield> {
    #[inline(always)]
    pub(super) fn of(slot: NonNull<Slot>) -> Self {
        Yielder { slot, marker: PhantomData }
    }

    /// Suspends the coroutine: its `resume` returns `value`. Returns what the next `resume` is given.
    ///
    /// When the coroutine is dropped or unwound instead, this unwinds, as by a panic of which no hook is told.
    ///
    /// # Panics
    /// When the coroutine does not run: it is suspended, or waits for what [`Yielder::on_parent_stack`] runs. Where a coroutine that it has resumed
    /// runs, or what it has put on a stack with [`on_stack`](super::on_stack), that is suspended with it.
    #[inline]
    #[track_caller]
    pub fn suspend(&self, value: Yield) -> Input {
        let value = ManuallyDrop::new(value);
        // SAFETY: the coroutine has the yielder, so it has the slot. The value stays here until the resumer has taken it; the input is
        // the resumer's, of this type.
        unsafe {
            let word = word::send(&value);
            match crossing::suspend(self.slot, word) {
                Some(passed) => word::receive::<Input>(passed),
                None => word::receive::<Input>(self.suspend_with_care(word)),
            }
        }
    }

    /// # Safety
    /// `word` is a `Yield`'s, which is taken.
    #[cfg_attr(target_arch = "x86_64", cold)]
    #[cfg_attr(target_arch = "x86_64", inline(never))]
    #[track_caller]
    unsafe fn suspend_with_care(&self, word: usize) -> usize {
        // SAFETY: as in `suspend`.
        unsafe {
            crossing::suspend_with_care(self.slot, word, slot_state::SUSPENDED).unwrap_or_else(
                #[cold]
                || {
                    drop(word::receive::<Yield>(word));
                    elsewhere()
                },
            )
        }
    }

    /// Whether the caller runs on the coroutine's own stack, not on one that was resumed from there.
    pub(crate) fn is_here(&self) -> bool {
        crossing::runs_on(self.slot)
    }

    /// Runs `f` on the stack of whoever resumed this coroutine last, for what needs more stack than the coroutine has.
    ///
    /// # Panics
    /// What `f` panics with is raised again here. Also where [`Yielder::suspend`] does.
    #[inline]
    #[track_caller]
    pub fn on_parent_stack<F, R>(&self, f: F) -> R
    where
        // A yielder is not Sync, so none gets to the parent's stack by way of `f`.
        F: FnOnce() -> R + Send,
    {
        let mut wish = Wish { grant: grant::<F, R>, f: Some(f), result: None };
        let word = (&raw mut wish).expose_provenance();
        // SAFETY: the coroutine has the yielder, so it has the slot. The resumer comes back as soon as it has granted the wish, which stays here until then.
        if unsafe { crossing::suspend_with_care(self.slot, word, slot_state::ASKING) }.is_none() {
            elsewhere();
        }
        match wish.result {
            Some(Ok(result)) => result,
            Some(Err(payload)) => resume_unwind(payload),
            None => unreachable!("the resumer came back without having called"),
        }
    }
}

/// What [`Yielder::on_parent_stack`] asks of the resumer.
#[repr(C)]
struct Wish<F, R> {
    grant: unsafe fn(*mut ()),
    f: Option<F>,
    result: Option<std::thread::Result<R>>,
}

/// # Safety
/// `wish` is a `Wish<F, R>` that nobody else uses now.
unsafe fn grant<F: FnOnce() -> R, R>(wish: *mut ()) {
    // SAFETY: the caller's.
    let wish = unsafe { &mut *wish.cast::<Wish<F, R>>() };
    if let Some(f) = wish.f.take() {
        wish.result = Some(catch_unwind(AssertUnwindSafe(f)));
    }
}

/// Grants the wish at `word`.
///
/// # Safety
/// A coroutine has asked with that word, and waits.
#[cold]
pub(super) unsafe fn granted(word: usize) {
    // SAFETY: the wish lies in a frame that waits for this; it begins with the function that knows its type.
    unsafe {
        let wish = std::ptr::with_exposed_provenance_mut::<()>(word);
        wish.cast::<unsafe fn(*mut ())>().read()(wish);
    }
}

#[cold]
#[inline(never)]
#[track_caller]
fn elsewhere() -> ! {
    panic!(
        "a yielder was used while its coroutine does not run: only the coroutine, and what it has resumed, can suspend it"
    )
}
