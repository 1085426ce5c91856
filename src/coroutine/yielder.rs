//! What a coroutine's function has of the outside.

use super::body::ForcedUnwind;
use super::word;
use crate::abi::{Slot, slot_state};
use crate::switch::inlined::{self, At, Left};
use crate::thread;
use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Suspends the coroutine that it was given to.
///
/// A reference to it can be copied, but stays on its thread.
pub struct Yielder<Input, Yield> {
    slot: NonNull<Slot>,
    /// The slot's link.
    link: usize,
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
        Yielder { slot, link: inlined::link(slot), marker: PhantomData }
    }

    /// Suspends the coroutine: its `resume` returns `value`. Returns what the next `resume` is given.
    ///
    /// When the coroutine is dropped or unwound instead, this unwinds, as by a panic of which no hook is told.
    ///
    /// # Panics
    /// When the caller does not run on the coroutine's own stack, but on that of a coroutine that it resumed, on one lent with
    /// [`on_stack`](super::on_stack), or outside: only the frames of the one stack can be suspended.
    #[inline]
    #[track_caller]
    pub fn suspend(&self, value: Yield) -> Input {
        if inlined::unchecked_and_native() && !cfg!(debug_assertions) {
            let value = ManuallyDrop::new(value);
            // SAFETY: this is the slot's stack, or one that was resumed from there, which then waits with it. The value stays here until the
            // resumer has taken it; the input is the resumer's, of this type.
            return unsafe {
                let word = inlined::suspend_unchecked(self.slot, self.link, word::send(&value));
                unwind_if_told(self.slot);
                word::receive::<Input>(word)
            };
        }
        self.suspend_checked(value)
    }

    #[inline(never)]
    #[track_caller]
    fn suspend_checked(&self, value: Yield) -> Input {
        if !runs_on(self.slot) {
            drop(value);
            elsewhere();
        }
        let value = ManuallyDrop::new(value);
        // SAFETY: this is the slot's stack. The value stays here until the resumer has taken it; the input is the resumer's, of this type.
        unsafe {
            let word = suspend(self.slot, self.link, word::send(&value));
            word::receive::<Input>(word)
        }
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
        if !runs_on(self.slot) {
            drop(f);
            elsewhere();
        }
        let mut wish = Wish { grant: grant::<F, R>, f: Some(f), result: None };
        // SAFETY: this is the slot's stack. The resumer comes back as soon as it has granted the wish, which stays here until then.
        unsafe {
            state_of(self.slot).store(slot_state::ASKING, Ordering::Relaxed);
            inlined::suspend_asking(self.slot, self.link, (&raw mut wish).expose_provenance());
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

/// Grants the wish at `word` and lets the coroutine go on.
///
/// # Safety
/// The coroutine of `slot` has suspended itself by [`inlined::suspend_asking`], passed `word` and waits at `at`.
#[cold]
pub(super) unsafe fn granted(slot: NonNull<Slot>, link: usize, at: At, word: usize) -> Left {
    // SAFETY: the wish lies in a frame that waits for this; it begins with the function, which knows its type.
    unsafe {
        let wish = std::ptr::with_exposed_provenance_mut::<()>(word);
        wish.cast::<unsafe fn(*mut ())>().read()(wish);
        state_of(slot).store(slot_state::SUSPENDED, Ordering::Relaxed);
        inlined::resume(slot, link, at, 0)
    }
}

/// The slot's state.
///
/// # Safety
/// The slot is leased as long as the reference lives.
#[inline(always)]
pub(super) unsafe fn state_of<'a>(slot: NonNull<Slot>) -> &'a AtomicU32 {
    // SAFETY: a slot is mapped as long as it is leased, and this field is atomic. The other fields are not touched.
    unsafe { &(*slot.as_ptr()).state }
}

/// Whether the caller's frame lies on the slot's stack.
#[inline(always)]
fn runs_on(slot: NonNull<Slot>) -> bool {
    let sp: usize;
    // SAFETY: reads a register. The two bounds stay as they are while the slot is leased.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("mov {}, sp", out(reg) sp, options(nomem, nostack, preserves_flags));
        let slot = slot.as_ptr();
        sp.wrapping_sub((*slot).base) < (*slot).top.wrapping_sub((*slot).base)
    }
}

#[cold]
#[inline(never)]
#[track_caller]
fn elsewhere() -> ! {
    panic!(
        "a yielder was used off its coroutine's own stack: only the coroutine that it was given to can suspend by it"
    )
}

/// Suspends the slot's coroutine; unwinds when it is told to.
///
/// # Safety
/// The caller runs on the slot's stack.
#[inline(always)]
unsafe fn suspend(slot: NonNull<Slot>, link: usize, word: usize) -> usize {
    if thread::in_managed_code() {
        // SAFETY: the caller's.
        return unsafe { suspend_managed(slot, link, word) };
    }
    // SAFETY: the caller's.
    unsafe {
        let word = inlined::suspend(slot, link, word);
        unwind_if_told(slot);
        word
    }
}

/// [`suspend`] where frames of this thread wait for managed code, perhaps of this stack.
#[cold]
#[inline(never)]
unsafe fn suspend_managed(slot: NonNull<Slot>, link: usize, word: usize) -> usize {
    // SAFETY: as in `suspend`; the records of this stack's frames are gone from the thread while those frames are.
    unsafe {
        let detached = thread::Detached::of_stack((*slot.as_ptr()).base, (*slot.as_ptr()).top);
        let word = inlined::suspend(slot, link, word);
        if let Some(detached) = detached {
            detached.attach();
        }
        unwind_if_told(slot);
        word
    }
}

/// Behind a suspension: unwinds when that is what the resumer wants.
///
/// # Safety
/// The slot is leased.
#[inline(always)]
unsafe fn unwind_if_told(slot: NonNull<Slot>) {
    // SAFETY: the caller's.
    let state = unsafe { state_of(slot) };
    if state.load(Ordering::Relaxed) == slot_state::UNWINDING {
        unwind(state);
    }
}

#[cold]
#[inline(never)]
fn unwind(state: &AtomicU32) -> ! {
    state.store(slot_state::SUSPENDED, Ordering::Relaxed);
    resume_unwind(Box::new(ForcedUnwind))
}
