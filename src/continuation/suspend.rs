//! The verbs of a continuation that runs: looking for who handles a tag, suspending itself, switching to another.

use super::local::{self, Local};
use super::node::{ANYBODY, Inbox, Node};
use super::run::{self, Note, Wait};
use super::{Cont, On, Woken, claim, first_of, hand_out, pass, put_back, room_for};
use crate::abi::slot_state;
use crate::error::Error;
use crate::switch as switch_stubs;
use std::sync::atomic::Ordering;

/// What is to be suspended, and who handles it.
pub(super) struct Found {
    pub last: &'static Node,
    pub first: &'static Node,
    pub wait: &'static Wait,
    /// Who may resume it.
    pub owner: u64,
}

/// Looks from the stack that runs outwards for who handles a tag.
#[inline]
pub(super) fn search(local: &Local, tag: u64, on: On) -> Result<Found, Error> {
    let current = local.current.get();
    let mark = 0_u8;
    // SAFETY: a node that runs is in use.
    let last = match unsafe { current.as_ref() } {
        Some(node) if node.holds((&raw const mark).addr()) => node,
        _ => return Err(Error::NotOnStack),
    };
    let mut first: &'static Node = last;
    let mut owner = ANYBODY;
    loop {
        if first.cancelling.get() {
            return Err(Error::Cancelled);
        }
        if first.pinned.get() {
            owner = local.id.get();
        }
        // SAFETY: who resumed it waits, on a stack that does not run.
        let wait: &'static Wait = unsafe { &*first.wait.get() };
        // SAFETY: the resumer's own, as long as it waits.
        if unsafe { &*wait.handlers }.iter().any(|handler| handler.tag == tag && handler.on == on) {
            return Ok(Found { last, first, wait, owner });
        }
        // SAFETY: nodes are never unmapped.
        match unsafe { first.parent.get().as_ref() } {
            Some(parent) if !first.barrier.get() => first = parent,
            _ => return Err(Error::Unhandled { tag }),
        }
    }
}

/// [`Error::Size`] for a buffer across the edge of the stack.
#[inline]
fn off_the_edge(node: &Node, values: &[u64]) -> Result<(), Error> {
    let (base, top) = node.area();
    let (low, high) = (values.as_ptr().addr(), values.as_ptr_range().end.addr());
    if (low < base && high > base) || (low < top && high > top) {
        return Err(Error::Size { bytes: size_of_val(values), rule: "values lie across the edge of the stack" });
    }
    Ok(())
}

/// Makes the handle of what is about to be suspended; what is passed to it goes to `values`. It is this thread's alone until the stack has
/// been left ([`Local::settle`]): handles are words, so that another thread may have guessed it.
#[inline]
pub(super) fn suspended(local: &Local, found: &Found, values: &mut [u64]) -> Cont {
    let last = found.last;
    last.first.set(found.first);
    last.inbox.set(Inbox { at: values.as_mut_ptr(), room: values.len(), filled: 0 });
    last.home.set(local.id.get());
    last.owner.store(local.id.get(), Ordering::Relaxed);
    if found.owner == ANYBODY {
        local.leaving.set(last);
    }
    last.set_state(slot_state::SUSPENDED);
    hand_out(local, last)
}

/// Suspends the stacks from the one that runs to the one whose resumer handles `tag`, as one continuation, and passes `payload` to that
/// resumer. Returns when the continuation is resumed; what is passed then goes to `values`, which says how many it takes.
///
/// # Errors
/// [`Error::NotOnStack`], [`Error::Unhandled`]: an engine makes a trap of it. [`Error::Values`] when the resumer has no room for the payload,
/// [`Error::Size`] for `values` across the stack's edge, [`Error::Cancelled`]. Nothing was suspended.
///
/// # Panics
/// With what is thrown into it, and to run destructors when it is cancelled.
// Behind a switch no return is predicted, so there should be none.
#[inline(always)]
pub fn suspend(tag: u64, payload: &[u64], values: &mut [u64]) -> Result<Woken, Error> {
    // SAFETY: this thread's.
    let local = unsafe { &*local::here() };
    let found = search(local, tag, On::Suspend)?;
    if payload.len() > found.wait.room {
        return Err(Error::Values { count: payload.len(), room: found.wait.room });
    }
    off_the_edge(found.last, values)?;
    found.wait.put(payload);
    let cont = suspended(local, &found, values);
    found.wait.note.set(Note::Suspended { tag, count: payload.len(), cont });
    let detached = run::detached(found.last, found.first);
    let word = std::ptr::from_ref(local).expose_provenance();
    // SAFETY: this runs on the stack of `last`, and the search went from it to `first` by the resumers.
    let word = unsafe { switch_stubs::suspend_through(found.last.slot(), found.first.slot(), word) };
    // SAFETY: just resumed, on that stack.
    Ok(unsafe { run::woken(found.last, word, detached) })
}

/// Suspends the stacks up to the one whose resumer handles `tag` by [`On::Switch`], and runs `to` there in their place. `to` is
/// passed `args` and then two more values, the words of what was suspended. Returns as [`suspend`] does.
///
/// # Errors
/// Of [`suspend`], and of [`resume`] for `to`, whose results must have room at that resumer's. Nothing was suspended, and a valid handle still is.
///
/// # Panics
/// As [`suspend`].
// Behind a switch no return is predicted, so there should be none.
#[inline(always)]
pub fn switch(to: Cont, tag: u64, args: &[u64], values: &mut [u64]) -> Result<Woken, Error> {
    let local = local::ready()?;
    // SAFETY: this thread's.
    let local = unsafe { &*local };
    let found = search(local, tag, On::Switch)?;
    off_the_edge(found.last, values)?;
    let to = claim(local, to)?;
    let (needed, room) = (first_of(to).results.get(), found.wait.room);
    let fits = if needed > room {
        Err(Error::Values { count: needed, room })
    } else {
        room_for(to, args.len().saturating_add(2))
    };
    if let Err(error) = fits {
        put_back(local, to);
        return Err(error);
    }
    let from = suspended(local, &found, values);
    pass(to, args, Some(from));
    let Found { last, first, wait, .. } = found;
    let detached = run::detached(last, first);
    let word = if std::ptr::eq(last, first) && std::ptr::eq(to.first.get(), to) {
        to.wait.set(wait);
        to.parent.set(first.parent.get());
        to.barrier.set(first.barrier.get());
        to.set_state(slot_state::RUNNING);
        wait.local.set(local);
        local.current.set(to);
        // SAFETY: this runs on the stack of `last`, which its resumer resumed as one stack; `to` is claimed and one stack, and not this one.
        unsafe { switch_stubs::switch_to(last.slot(), to.slot(), std::ptr::from_ref(wait).expose_provenance()) }
    } else {
        wait.note.set(Note::Switch(to));
        // SAFETY: as in `suspend`.
        unsafe {
            switch_stubs::suspend_through(last.slot(), first.slot(), std::ptr::from_ref(local).expose_provenance())
        }
    };
    // SAFETY: just resumed, on that stack.
    Ok(unsafe { run::woken(last, word, detached) })
}
