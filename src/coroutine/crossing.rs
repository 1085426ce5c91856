//! From a coroutine's resumer to it and back: inlined where that is sound, else by the stubs.
//!
//! What is out of the ordinary is out of line here: shadow stacks, native frames that wait for managed code or poll a future, and a yielder that is used on the stack of
//! another coroutine, one that its own coroutine has resumed. That suspends the whole chain of stacks between the two.

use super::body::ForcedUnwind;
use crate::abi::{Slot, slot_state};
use crate::continuation::Inside;
use crate::directory::slot_of_stack;
use crate::switch;
use crate::switch::inlined::{self, Came};
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

/// Whether the slot has a shadow stack just where this thread has one.
pub(super) fn can_run_here(slot: NonNull<Slot>) -> bool {
    // SAFETY: the slot is mapped, and this word does not change while it is leased.
    let has_shadow = unsafe { (&raw const (*slot.as_ptr()).shadow_top).read() != 0 };
    has_shadow == (crate::arch::shadow_pointer() != 0)
}

/// Whether the caller runs on the slot's own stack.
pub(super) fn runs_on(slot: NonNull<Slot>) -> bool {
    // SAFETY: the slot is mapped, and the bounds do not change while it is leased.
    unsafe { ((*slot.as_ptr()).base..(*slot.as_ptr()).top).contains(&stack_pointer()) }
}

/// Runs a coroutine that is ready or suspended until it comes back; `word` goes to it. One that is neither is [`inlined::REFUSED`], with the word.
///
/// # Safety
/// The slot was prepared by this face, or is blank, and this thread alone uses it.
#[inline(always)]
pub(super) unsafe fn resume(slot: NonNull<Slot>, word: usize) -> Came {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's.
    if let Some(sp) = unsafe { inlined::waits_at(slot) } {
        // SAFETY: the caller's.
        return unsafe { inlined::resume(slot, sp, word) };
    }
    // SAFETY: the caller's.
    unsafe { resume_by_stub(word, slot) }
}

/// [`resume`], for the coroutine to be unwound as soon as it looks at its state.
///
/// # Safety
/// As [`resume`]; where stacks are switched inlined it has run.
pub(super) unsafe fn resume_to_unwind(slot: NonNull<Slot>) -> Came {
    // SAFETY: the caller's.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if let Some(sp) = inlined::waits_at(slot) {
            return inlined::resume_to_unwind(slot, sp);
        }
        go_by_stub(slot, 0, slot_state::UNWINDING)
    }
}

/// [`resume`] by the stubs. The word first: both are in their registers then.
///
/// # Safety
/// As [`resume`].
#[cfg_attr(target_arch = "x86_64", cold)]
#[cfg_attr(target_arch = "x86_64", inline(never))]
unsafe fn resume_by_stub(word: usize, slot: NonNull<Slot>) -> Came {
    // SAFETY: the caller's.
    unsafe { go_by_stub(slot, word, slot_state::RUNNING) }
}

/// # Safety
/// As [`resume`].
#[inline(always)]
unsafe fn go_by_stub(slot: NonNull<Slot>, word: usize, state_then: u32) -> Came {
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
        slot_state::DONE if passed.finished => inlined::PANICKED,
        _ if passed.finished => {
            state.store(slot_state::DONE, Ordering::Relaxed);
            inlined::FINISHED
        }
        slot_state::ASKING => inlined::ASKS,
        _ => inlined::SUSPENDED,
    };
    Came { value: passed.value, how }
}

/// Suspends the slot's coroutine, where that is inlined, and passes `word` to its resumer. Returns what the next resume passes; unwinds if that wants
/// it to. `None`: nothing was done, and [`suspend_with_care`] says what there is to do.
///
/// # Safety
/// The slot is leased, and this thread alone uses it.
#[inline(always)]
pub(super) unsafe fn suspend(slot: NonNull<Slot>, word: usize) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's. Where somebody waits for the coroutine the caller runs on its stack or on one that was resumed from there.
    unsafe {
        let resumer = inlined::resumer(slot)?;
        let woken = inlined::suspend::<{ inlined::SUSPENDED }>(slot, resumer, word);
        if woken.goes_on == 0 {
            unwind();
        }
        Some(woken.value)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (slot, word);
        None
    }
}

/// What a coroutine does that was resumed to unwind.
#[cold]
#[inline(never)]
fn unwind() -> ! {
    resume_unwind(Box::new(ForcedUnwind))
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

/// Suspends the slot's coroutine and passes `word` to its resumer, wherever and whatever: with `state_then` [`slot_state::ASKING`], to ask for what
/// stands at `word`. Returns what the next resume passes; unwinds if that wants it to. `None` where the caller does not run on the coroutine's
/// stack, nor on one that was resumed from there.
///
/// # Safety
/// As [`suspend`].
pub(super) unsafe fn suspend_with_care(slot: NonNull<Slot>, word: usize, state_then: u32) -> Option<usize> {
    // SAFETY: the caller's. Once it is known to run, no other thread has it.
    let chain = unsafe { if runs(slot) { Chain::to(slot) } else { None } }?;
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
    let passed = unsafe { go(chain, word, state_then) };
    if let Some(detached) = detached {
        detached.attach();
    }
    if let Some(inside) = inside {
        inside.attach();
    }
    Some(passed.unwrap_or_else(|| unwind()))
}

/// # Safety
/// As [`suspend`].
unsafe fn runs(slot: NonNull<Slot>) -> bool {
    // SAFETY: the caller's.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if inlined::unchecked() {
            return inlined::resumer_with_care(slot).is_some();
        }
        state_of(slot).load(Ordering::Relaxed) == slot_state::RUNNING
    }
}

/// `None`: it was resumed to unwind.
///
/// # Safety
/// The caller runs on the chain's youngest stack.
#[inline(always)]
unsafe fn go(chain: Chain, word: usize, state_then: u32) -> Option<usize> {
    let slot = chain.oldest;
    #[cfg(target_arch = "x86_64")]
    if inlined::unchecked() {
        // SAFETY: the caller's; the coroutine runs.
        let woken = unsafe {
            let Some(resumer) = inlined::resumer_with_care(slot) else {
                unreachable!("a coroutine that runs has a resumer")
            };
            match state_then {
                slot_state::ASKING => inlined::suspend::<{ inlined::ASKS }>(slot, resumer, word),
                _ => inlined::suspend::<{ inlined::SUSPENDED }>(slot, resumer, word),
            }
        };
        return (woken.goes_on != 0).then_some(woken.value);
    }
    // SAFETY: the caller's.
    unsafe {
        let state = state_of(slot);
        state.store(state_then, Ordering::Relaxed);
        let word = if chain.youngest == slot {
            switch::suspend_without_fp_control(slot, word)
        } else {
            (*slot.as_ptr()).next.store(chain.youngest.as_ptr(), Ordering::Relaxed);
            switch::suspend_through_without_fp_control(chain.youngest, slot, word)
        };
        if state.load(Ordering::Relaxed) == slot_state::UNWINDING {
            state.store(slot_state::RUNNING, Ordering::Relaxed);
            return None;
        }
        Some(word)
    }
}
