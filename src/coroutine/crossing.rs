//! From a coroutine's resumer to it and back: inlined where that is sound, else by the stubs.
//!
//! What is out of the ordinary is out of line here: shadow stacks, native frames that wait for managed code or poll a future, and a yielder that is used on the stack of
//! another coroutine, one that its own coroutine has resumed. That suspends the whole chain of stacks between the two.

use super::body::ForcedUnwind;
use crate::abi::{Slot, slot_state};
use crate::continuation::Inside;
use crate::directory::slot_of_stack;
use crate::error::Error;
#[cfg(target_arch = "x86_64")]
use crate::published;
use crate::switch::inlined::{self, Came};
use crate::switch::{self, Entry};
use crate::thread::{self, Detached};
use std::panic::resume_unwind;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

/// The slot's state.
///
/// # Safety
/// The slot is leased as long as the reference lives.
#[inline(always)]
pub(super) unsafe fn state_of<'a>(slot: NonNull<Slot>) -> &'a AtomicU32 {
    // SAFETY: a slot is mapped as long as it is leased, and this field is atomic. The other fields are not touched.
    unsafe { &(*slot.as_ptr()).state }
}

/// Whether the slot has a shadow stack just where this thread has one. Not asked where no thread of the process has.
#[inline(always)]
pub(super) fn can_run_here(slot: NonNull<Slot>) -> bool {
    // SAFETY: the slot is mapped, and this word does not change while it is leased.
    let has_shadow = || unsafe { (&raw const (*slot.as_ptr()).shadow_top).read() != 0 };
    inlined::unchecked() || has_shadow() == (crate::arch::shadow_pointer() != 0)
}

/// Whether the caller runs on the slot's own stack.
pub(super) fn runs_on(slot: NonNull<Slot>) -> bool {
    // SAFETY: the slot is mapped, and the bounds do not change while it is leased.
    unsafe { ((*slot.as_ptr()).base..(*slot.as_ptr()).top).contains(&stack_pointer()) }
}

/// Makes the stack ready to run `entry(_, data, slot)`.
///
/// # Safety
/// The slot is leased, nothing is on its stack, and the caller alone uses it.
#[inline(always)]
pub(super) unsafe fn prepare(slot: NonNull<Slot>, entry: Entry, data: usize) {
    // SAFETY: the caller's.
    unsafe { inlined::prepare(slot, entry, data) }
}

/// Why a coroutine was [`inlined::REFUSED`].
///
/// # Safety
/// The slot is leased.
#[cold]
pub(super) unsafe fn refusal(slot: NonNull<Slot>) -> Error {
    // SAFETY: the caller's.
    match unsafe { state_of(slot) }.load(Ordering::Relaxed) {
        slot_state::DONE => Error::Finished,
        _ => Error::Busy,
    }
}

/// Runs a coroutine that is ready or suspended until it comes back; `word` goes to it. One that is neither is [`inlined::REFUSED`], with the word.
///
/// # Safety
/// The slot was prepared here, and this thread alone uses it.
#[inline(always)]
pub(super) unsafe fn resume(slot: NonNull<Slot>, word: usize) -> Came {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's.
    if let Some(sp) = unsafe { inlined::waits_at(slot) } {
        // SAFETY: the caller's.
        return unsafe { inlined::resume(slot, sp, word) };
    }
    // SAFETY: the caller's.
    unsafe { resume_by_stub(slot, word, slot_state::RUNNING) }
}

/// [`resume`], for the coroutine to be unwound as soon as it looks at its state.
///
/// # Safety
/// As [`resume`].
pub(super) unsafe fn resume_to_unwind(slot: NonNull<Slot>) -> Came {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's.
    if let Some(sp) = unsafe { inlined::waits_at(slot) } {
        // SAFETY: the caller's.
        return unsafe {
            state_of(slot).store(slot_state::UNWINDING, Ordering::Relaxed);
            inlined::resume(slot, sp, 0)
        };
    }
    // SAFETY: the caller's.
    unsafe { resume_by_stub(slot, 0, slot_state::UNWINDING) }
}

/// # Safety
/// As [`resume`].
#[cfg_attr(target_arch = "x86_64", cold)]
#[cfg_attr(target_arch = "x86_64", inline(never))]
unsafe fn resume_by_stub(slot: NonNull<Slot>, word: usize, state_then: u32) -> Came {
    // SAFETY: the caller's.
    let state = unsafe { state_of(slot) };
    match state.load(Ordering::Relaxed) {
        slot_state::READY | slot_state::SUSPENDED | slot_state::ASKING if !inlined::unchecked() => {}
        _ => return Came { value: word, how: inlined::REFUSED },
    }
    state.store(state_then, Ordering::Relaxed);
    // SAFETY: the state says that it waits, and for the stubs, since it cannot be inlined. The youngest stack of a chain waits in it.
    let passed = unsafe {
        let youngest = (*slot.as_ptr()).next.load(Ordering::Relaxed);
        match NonNull::new(youngest) {
            None => switch::resume_without_fp_control(slot, word),
            Some(youngest) => {
                (*slot.as_ptr()).next.store(null_mut(), Ordering::Relaxed);
                switch::resume_through_without_fp_control(youngest, slot, word)
            }
        }
    };
    let how = match state.load(Ordering::Relaxed) {
        _ if passed.finished => inlined::FINISHED,
        slot_state::ASKING => inlined::ASKS,
        _ => inlined::SUSPENDED,
    };
    Came { value: passed.value, how }
}

/// Suspends the slot's coroutine and passes `word` to its resumer. Returns what the next resume passes; unwinds if that wants it to. `None`
/// where the caller does not run on the coroutine's stack, nor on one that was resumed from there.
///
/// # Safety
/// The slot is leased, and this thread alone uses it.
#[inline(always)]
pub(super) unsafe fn suspend(slot: NonNull<Slot>, word: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    {
        inlined::unless_clear!(published::MODE_SHADOW | published::MODE_MANAGED, {
            // SAFETY: the caller's.
            return unsafe { suspend_with_care(slot, word, slot_state::SUSPENDED) };
        });
        // SAFETY: the caller's. Somebody waits for the coroutine, so the caller runs on its stack or on one that was resumed from there.
        unsafe {
            let (word, slot) = inlined::suspend::<{ inlined::SUSPENDED }>(slot, inlined::resumer(slot)?, word);
            look(slot);
            Some(word)
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's.
    unsafe {
        suspend_with_care(slot, word, slot_state::SUSPENDED)
    }
}

/// Goes to the resumer to ask for what stands at `word`. Returns `Some` when it was granted, `None` as [`suspend`].
///
/// # Safety
/// As [`suspend`].
pub(super) unsafe fn ask(slot: NonNull<Slot>, word: usize) -> Option<()> {
    // SAFETY: the caller's.
    unsafe { suspend_with_care(slot, word, slot_state::ASKING) }.map(|_| ())
}

/// Unwinds if that is what the coroutine was resumed for.
///
/// # Safety
/// It runs, on this thread.
#[inline(always)]
unsafe fn look(slot: NonNull<Slot>) {
    // SAFETY: no other thread writes it now. Not read as an atomic, which the compiler would not compare where it lies.
    unsafe {
        if (&raw const (*slot.as_ptr()).state).cast::<u32>().read() == slot_state::UNWINDING {
            unwind(state_of(slot));
        }
    }
}

#[cold]
#[inline(never)]
fn unwind(state: &AtomicU32) -> ! {
    state.store(running_state(), Ordering::Relaxed);
    resume_unwind(Box::new(ForcedUnwind))
}

/// What the state is while a coroutine runs: the inlined switch does not note it.
pub(super) fn running_state() -> u32 {
    if inlined::unchecked() { slot_state::SUSPENDED } else { slot_state::RUNNING }
}

/// The stacks that are suspended together: from the one that the caller runs on, by resumers, to a coroutine's.
#[derive(Clone, Copy)]
struct Chain {
    youngest: NonNull<Slot>,
    oldest: NonNull<Slot>,
}

impl Chain {
    /// # Safety
    /// `oldest` runs, on this thread.
    unsafe fn to(oldest: NonNull<Slot>) -> Option<Chain> {
        // SAFETY: the bounds stay as they are while the slot is leased.
        let (base, top) = unsafe { ((*oldest.as_ptr()).base, (*oldest.as_ptr()).top) };
        let sp = stack_pointer();
        let youngest = if (base..top).contains(&sp) { oldest } else { slot_of_stack(sp)? };
        Some(Chain { youngest, oldest })
    }

    /// Whether an address lies in one of the stacks.
    ///
    /// # Safety
    /// They run, on this thread.
    unsafe fn holds(self, address: usize) -> bool {
        let mut slot = self.youngest;
        loop {
            // SAFETY: every stack of the chain runs, so its slot is leased and says who waits for it.
            let (base, top, resumer) = unsafe {
                let fields = slot.as_ptr();
                ((*fields).base, (*fields).top, inlined::waits_for(slot))
            };
            if (base..top).contains(&address) {
                return true;
            }
            if slot == self.oldest {
                return false;
            }
            let Some(next) = slot_of_stack(resumer) else { return false };
            slot = next;
        }
    }
}

#[inline(always)]
fn stack_pointer() -> usize {
    let sp: usize;
    // SAFETY: reads a register.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!("mov {}, rsp", out(reg) sp, options(nomem, nostack, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("mov {}, sp", out(reg) sp, options(nomem, nostack, preserves_flags));
    }
    sp
}

/// [`suspend`] and [`ask`], wherever and whatever.
///
/// # Safety
/// As [`suspend`].
#[cfg_attr(target_arch = "x86_64", cold)]
#[cfg_attr(target_arch = "x86_64", inline(never))]
unsafe fn suspend_with_care(slot: NonNull<Slot>, word: usize, state_then: u32) -> Option<usize> {
    // SAFETY: the caller's.
    let state = unsafe { state_of(slot) };
    // SAFETY: the caller's.
    if !unsafe { runs(slot) } {
        return None;
    }
    // SAFETY: it runs, and no other thread has it.
    let chain = unsafe { Chain::to(slot) }?;
    // The records of these stacks' frames leave the thread's list while the frames wait. Those that ask do not wait, they call.
    let detached = (thread::has_records() && state_then == slot_state::SUSPENDED)
        // SAFETY: the chain runs.
        .then(|| Detached::of_stacks(|address| unsafe { chain.holds(address) }))
        .flatten();
    let inside = match chain.youngest == slot {
        true => None,
        // SAFETY: the bounds stay as they are while the slot is leased.
        false => Inside::detach(&unsafe { (*slot.as_ptr()).base..(*slot.as_ptr()).top }),
    };
    // SAFETY: the caller runs on the youngest stack of the chain, and the oldest is the coroutine's.
    let word = unsafe { go(chain, word, state, state_then) };
    if let Some(detached) = detached {
        detached.attach();
    }
    if let Some(inside) = inside {
        inside.attach();
    }
    // SAFETY: the caller's.
    unsafe { look(slot) };
    Some(word)
}

/// # Safety
/// As [`suspend`].
unsafe fn runs(slot: NonNull<Slot>) -> bool {
    #[cfg(target_arch = "x86_64")]
    if inlined::unchecked() {
        // SAFETY: the caller's.
        return unsafe { inlined::resumer(slot) }.is_some();
    }
    // SAFETY: the caller's.
    unsafe { state_of(slot) }.load(Ordering::Relaxed) == slot_state::RUNNING
}

/// # Safety
/// The caller runs on the chain's youngest stack.
#[inline(always)]
unsafe fn go(chain: Chain, word: usize, state: &AtomicU32, state_then: u32) -> usize {
    let slot = chain.oldest;
    #[cfg(target_arch = "x86_64")]
    if inlined::unchecked() {
        // SAFETY: the caller's; the coroutine runs.
        unsafe {
            let Some(resumer) = inlined::resumer(slot) else { unreachable!("a coroutine that runs has a resumer") };
            return match state_then {
                slot_state::ASKING => inlined::suspend::<{ inlined::ASKS }>(slot, resumer, word).0,
                _ => inlined::suspend::<{ inlined::SUSPENDED }>(slot, resumer, word).0,
            };
        }
    }
    state.store(state_then, Ordering::Relaxed);
    // SAFETY: the caller's.
    unsafe {
        if chain.youngest == slot {
            return switch::suspend_without_fp_control(slot, word);
        }
        (*slot.as_ptr()).next.store(chain.youngest.as_ptr(), Ordering::Relaxed);
        switch::suspend_through_without_fp_control(chain.youngest, slot, word)
    }
}
