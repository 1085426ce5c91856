//! Budgets: what all leased stacks may count together, and what those of one owner may.
//!
//! A stack counts what it can take at most: its data area without the guard, its shadow stack, its slot. While nobody has set a budget
//! and a lease names no quota nothing is counted, and what is counted stands in the slot itself (its `owner` word), so that the
//! stack gives back exactly that, on whatever thread it is dropped.

use crate::error::Error;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The budget in bytes; all bits set: none.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);
/// Bytes counted against the budget.
static USED: AtomicUsize = AtomicUsize::new(0);

/// In a slot's owner word: it counts against the process's budget.
pub(crate) const COUNTED: usize = 1;
/// In a slot's owner word: its lease was dropped while something was on the stack.
pub(crate) const ABANDONED: usize = 2;

/// Whether a budget is set.
#[inline(always)]
pub(crate) fn is_set() -> bool {
    LIMIT.load(Ordering::Relaxed) != usize::MAX
}

/// Sets the budget; what was set before, `None` for none.
pub(crate) fn set_limit(bytes: Option<usize>) {
    LIMIT.store(bytes.unwrap_or(usize::MAX), Ordering::SeqCst);
}

/// Bytes counted against the budget.
pub(crate) fn used() -> usize {
    USED.load(Ordering::Relaxed)
}

/// A limit on the stacks of one owner: a tenant, a request, a plug-in. Clones share it.
#[derive(Clone, Debug)]
pub struct Quota(Arc<Limits>);

#[derive(Debug)]
struct Limits {
    stacks: Count,
    bytes: Count,
}

/// How many there are, and how many there may be.
#[derive(Debug)]
struct Count {
    used: AtomicUsize,
    limit: usize,
}

impl Quota {
    /// At most `stacks` stacks that count at most `bytes` bytes together. `usize::MAX` for no limit.
    pub fn new(stacks: usize, bytes: usize) -> Quota {
        let count = |limit| Count { used: AtomicUsize::new(0), limit };
        Quota(Arc::new(Limits { stacks: count(stacks), bytes: count(bytes) }))
    }

    /// Stacks that are leased against it.
    pub fn stacks(&self) -> usize {
        self.0.stacks.used.load(Ordering::Relaxed)
    }

    /// Bytes that those count.
    pub fn bytes(&self) -> usize {
        self.0.bytes.used.load(Ordering::Relaxed)
    }
}

/// Adds to a count unless that exceeds its limit; else says what is left.
fn add(used: &AtomicUsize, limit: usize, more: usize) -> Result<(), usize> {
    let sum = |now: usize| now.checked_add(more).filter(|&sum| sum <= limit);
    match used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum) {
        Ok(_) => Ok(()),
        Err(now) => Err(limit.saturating_sub(now)),
    }
}

/// Takes from a count. An attacker's word may have made it too small.
fn take(used: &AtomicUsize, less: usize) {
    let _ = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(less)));
}

/// What one stack counts, until it is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    bytes: usize,
    counted: bool,
    quota: Option<Quota>,
}

impl Charge {
    /// Counts a stack of `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Quota`] and [`Error::Budget`]: nothing is counted.
    pub fn new(bytes: usize, quota: Option<&Quota>) -> Result<Charge, Error> {
        let mut charge = Charge { bytes, counted: false, quota: None };
        if let Some(quota) = quota {
            let refused = |what, needed| move |left| Error::Quota { what, needed, left };
            let (stacks, held) = (&quota.0.stacks, &quota.0.bytes);
            add(&stacks.used, stacks.limit, 1).map_err(refused("stacks", 1))?;
            add(&held.used, held.limit, bytes)
                .map_err(refused("bytes", bytes))
                .inspect_err(|_| take(&stacks.used, 1))?;
            charge.quota = Some(quota.clone());
        }
        if is_set() {
            let limit = LIMIT.load(Ordering::Relaxed);
            add(&USED, limit, bytes).map_err(|left| Error::Budget { needed: bytes, left })?;
            charge.counted = true;
        }
        Ok(charge)
    }

    /// Counts a stack that was leased before there was a budget, whatever the limit: the flag for its owner word.
    pub fn late(bytes: usize) -> Charge {
        USED.fetch_add(bytes, Ordering::Relaxed);
        Charge { bytes, counted: true, quota: None }
    }

    /// As a slot's owner word.
    pub fn into_word(mut self) -> *mut () {
        let quota = match self.quota.take() {
            Some(quota) => Arc::into_raw(quota.0).cast_mut().cast::<()>(),
            None => null_mut(),
        };
        let counted = if self.counted { COUNTED } else { 0 };
        std::mem::forget(self);
        quota.map_addr(|address| address | counted)
    }

    /// Out of a slot's owner word.
    ///
    /// # Safety
    /// The word is one that [`Charge::into_word`] made, perhaps with flags added, and nobody else takes it.
    pub unsafe fn from_word(word: *mut (), bytes: usize) -> Charge {
        let flags = COUNTED | ABANDONED;
        let limits = word.map_addr(|address| address & !flags).cast::<Limits>();
        // SAFETY: the caller's: without the flags it is what `Arc::into_raw` gave, or null.
        let quota = (!limits.is_null()).then(|| Quota(unsafe { Arc::from_raw(limits) }));
        Charge { bytes, counted: word.addr() & COUNTED != 0, quota }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.counted {
            take(&USED, self.bytes);
        }
        if let Some(quota) = &self.quota {
            take(&quota.0.stacks.used, 1);
            take(&quota.0.bytes.used, self.bytes);
        }
    }
}

const _: () = assert!(align_of::<Limits>() > (COUNTED | ABANDONED));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_counts_stacks_and_bytes_and_gives_them_back() {
        let quota = Quota::new(2, 100);
        let first = Charge::new(60, Some(&quota)).unwrap();
        assert_eq!(Charge::new(60, Some(&quota)).unwrap_err(), Error::Quota { what: "bytes", needed: 60, left: 40 });
        let second = Charge::new(40, Some(&quota)).unwrap();
        assert_eq!(Charge::new(0, Some(&quota)).unwrap_err(), Error::Quota { what: "stacks", needed: 1, left: 0 });
        assert_eq!((quota.stacks(), quota.bytes()), (2, 100));
        let word = first.into_word().map_addr(|address| address | ABANDONED);
        assert_eq!(quota.stacks(), 2);
        // SAFETY: made above, taken once.
        drop(unsafe { Charge::from_word(word, 60) });
        drop(second);
        assert_eq!((quota.stacks(), quota.bytes()), (0, 0));
        assert_eq!(
            Charge::new(usize::MAX, Some(&quota)).unwrap_err(),
            Error::Quota { what: "bytes", needed: usize::MAX, left: 100 }
        );
    }
}
