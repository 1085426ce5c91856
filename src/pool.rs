//! Pools of stacks: leased, given back, used again.
//!
//! ```text
//!  lease() <--- this thread's cache <=== reserve of the class (lock) <=== chunk being made <=== the system
//!  drop()  ---> this thread's cache ===> reserve of the class ---> memory given back, addresses kept
//! ```
//! Sizes are rounded up to classes, powers of two. The stacks of a class lie in chunks, many in one mapping, each with an inaccessible guard
//! below it; the smallest classes ([`lease_small`]) share a page and have no guard. A stack above 1 MiB has a mapping of its own. On a
//! thread with a shadow stack, a stack has one too.
//!
//! A stack keeps its slot, its data area and its shadow stack for life; the read-only chunk directory says which. Nothing in a free list is
//! believed: what is taken out of one must be a slot that the directory knows, of the list's class, free, and (where there are shadow
//! stacks) with its idle token in place, which no store can put there. What is none of that is evidence of tampering and ends the process.

mod report;
mod reserve;
mod single;
#[cfg(test)]
mod tests;

pub use crate::budget::Quota;
pub use report::{ClassStats, Leak, Stats, leaks, stats, suspended};

use crate::abi::{Slot, slot_state};
use crate::budget::{self, Charge};
use crate::directory::{self, CLASS_SHADOW, Known};
use crate::error::Error;
use crate::pac::Tampered;
use crate::slab::{self, LARGEST, SMALLEST, Shape};
use crate::{shadow, system, tamper};
use reserve::CACHE;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;

/// Slab classes, with and without shadow stacks: those that have lists.
const CLASSES: usize = 2 * CLASS_SHADOW as usize;
const _: () = assert!(LARGEST - SMALLEST < CLASS_SHADOW as u32);
/// The largest stack: no address space of ours has room for a larger one.
const MAXIMUM: usize = 1 << 46;

/// A stack of a pool: the caller's until it is dropped.
///
/// Dropping it gives the stack back if nothing is on it. A stack that still runs or is suspended is not handed out again: it
/// keeps its memory and counts on, and [`leaks`] lists it.
#[derive(Debug)]
#[must_use = "a lease that is dropped gives the stack back"]
pub struct Lease {
    slot: NonNull<Slot>,
    not_sync: PhantomData<Cell<()>>,
}

// SAFETY: the slot and its memory belong to whoever has the lease; nothing in them is bound to a thread.
unsafe impl Send for Lease {}

impl Lease {
    #[inline(always)]
    fn new(slot: NonNull<Slot>) -> Lease {
        Lease { slot, not_sync: PhantomData }
    }

    /// Its bookkeeping, which the switch stubs work on. It stays mapped for the life of the process, also when the lease is gone.
    #[inline]
    pub fn slot(&self) -> NonNull<Slot> {
        self.slot
    }

    /// Lowest usable address.
    #[inline]
    pub fn base(&self) -> usize {
        // SAFETY: the slot is leased and mapped for ever.
        unsafe { (&raw const (*self.slot.as_ptr()).base).read() }
    }

    /// One past the highest usable address, a multiple of 16.
    #[inline]
    pub fn top(&self) -> usize {
        // SAFETY: the slot is leased and mapped for ever.
        unsafe { (&raw const (*self.slot.as_ptr()).top).read() }
    }

    /// Usable bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.top().wrapping_sub(self.base())
    }

    /// Whether it comes with a shadow stack.
    #[inline]
    pub fn has_shadow(&self) -> bool {
        // SAFETY: the slot is leased and mapped for ever.
        unsafe { (&raw const (*self.slot.as_ptr()).shadow_top).read() != 0 }
    }

    /// The lease that [`Lease::into_raw`] let go of.
    ///
    /// # Safety
    /// It did, and nobody else makes it anew or gives the stack back.
    #[inline(always)]
    pub(crate) unsafe fn from_raw(slot: NonNull<Slot>) -> Lease {
        Lease::new(slot)
    }

    /// Lets go of the lease without giving the stack back: for owners that keep a slot's address alone, such as C.
    /// [`release_raw`] gives it back.
    pub fn into_raw(self) -> NonNull<Slot> {
        std::mem::ManuallyDrop::new(self).slot
    }
}

impl Drop for Lease {
    #[inline]
    fn drop(&mut self) {
        release(self.slot.as_ptr());
    }
}

/// Leases a stack of at least `bytes` usable bytes: the next power of two, at least a page. Below it lie inaccessible bytes: as many
/// again, up to 64 KiB.
///
/// # Errors
/// [`Error::Size`] for 0 bytes and for more than any address space has. [`Error::Memory`] when the system refuses memory or one
/// more mapping, [`Error::Budget`] when the process's budget ([`set_budget`]) has no room. Nothing is leased then.
#[inline]
pub fn lease(bytes: usize) -> Result<Lease, Error> {
    if bytes.wrapping_sub(1) >= 1 << LARGEST || budget::is_set() {
        return lease_counted(bytes, None);
    }
    take(class_of(bytes, system::page_shift()))
}

/// Leases a stack of at least `bytes` usable bytes and at most half a page: the next power of two, at least 512.
///
/// Such stacks share pages and **have no guard**: what overflows one overwrites its neighbour, unless every function on it compares its stack
/// pointer with a limit first. For managed code with limit checks, and nothing else.
///
/// # Errors
/// [`Error::Size`] for 0 bytes and for more than half a page; else as [`lease`].
#[inline]
pub fn lease_small(bytes: usize) -> Result<Lease, Error> {
    if bytes.wrapping_sub(1) >= system::page_size() / 2 || budget::is_set() {
        return lease_small_counted(bytes, None);
    }
    take(class_of(bytes, SMALLEST))
}

/// As [`lease`], counted against a quota until the lease is dropped.
///
/// # Errors
/// [`Error::Quota`] when the quota has no room; else as [`lease`].
pub fn lease_for(quota: &Quota, bytes: usize) -> Result<Lease, Error> {
    lease_counted(bytes, Some(quota))
}

/// As [`lease_small`], counted against a quota until the lease is dropped.
///
/// # Errors
/// [`Error::Quota`] when the quota has no room; else as [`lease_small`].
pub fn lease_small_for(quota: &Quota, bytes: usize) -> Result<Lease, Error> {
    lease_small_counted(bytes, Some(quota))
}

/// Leases a slot for a data area that the caller has: a custom stack. It comes with a shadow stack as any other, and the directory binds it
/// to the area.
///
/// # Errors
/// [`Error::Size`] when the area is empty, wraps around, or its top is not a multiple of 16; else as [`lease`].
///
/// # Safety
/// `base..top` is writable memory that nobody else uses as a stack, and stays so until the lease is dropped.
pub unsafe fn bare(base: usize, top: usize) -> Result<Lease, Error> {
    // SAFETY: the caller's.
    unsafe { bare_counted(base, top, None) }
}

/// As [`bare`], counted against a quota until the lease is dropped. The data area is the caller's and counts nothing.
///
/// # Errors
/// [`Error::Quota`] when the quota has no room; else as [`bare`].
///
/// # Safety
/// As [`bare`].
pub unsafe fn bare_for(quota: &Quota, base: usize, top: usize) -> Result<Lease, Error> {
    // SAFETY: the caller's.
    unsafe { bare_counted(base, top, Some(quota)) }
}

#[cold]
#[inline(never)]
fn lease_counted(bytes: usize, quota: Option<&Quota>) -> Result<Lease, Error> {
    if bytes == 0 || bytes > MAXIMUM {
        return Err(Error::Size { bytes, rule: "a stack has at least one byte and at most 64 TiB" });
    }
    let shadow = CACHE.with(reserve::Cache::shadow);
    if bytes > 1 << LARGEST {
        let shape = Shape::large(bytes.next_power_of_two(), shadow);
        return counted(shape, quota, || single::lease_large(&shape));
    }
    let class = class_of(bytes, system::page_shift());
    counted(Shape::of_class(class | flag(shadow)), quota, || take(class))
}

#[cold]
#[inline(never)]
fn lease_small_counted(bytes: usize, quota: Option<&Quota>) -> Result<Lease, Error> {
    if bytes.wrapping_sub(1) >= system::page_size() / 2 {
        return Err(Error::Size {
            bytes,
            rule: "a stack without a guard has at least one byte and at most half a page",
        });
    }
    let class = class_of(bytes, SMALLEST);
    counted(Shape::of_class(class | flag(CACHE.with(reserve::Cache::shadow))), quota, || take(class))
}

/// # Safety
/// As [`bare`].
unsafe fn bare_counted(base: usize, top: usize, quota: Option<&Quota>) -> Result<Lease, Error> {
    let bytes = top.wrapping_sub(base);
    if base == 0 || base >= top || bytes > MAXIMUM {
        return Err(Error::Size { bytes, rule: "a data area lies between its base and its top" });
    }
    if !top.is_multiple_of(16) {
        return Err(Error::Size { bytes, rule: "a data area's top is a multiple of 16" });
    }
    let shape = Shape::bare(bytes, CACHE.with(reserve::Cache::shadow));
    counted(shape, quota, || single::lease_bare(&shape, base))
}

/// Leases what `lease` leases, if quota and budget have room for it.
fn counted(shape: Shape, quota: Option<&Quota>, lease: impl FnOnce() -> Result<Lease, Error>) -> Result<Lease, Error> {
    let charge = Charge::new(shape.cost(), quota)?;
    let lease = lease()?;
    // SAFETY: the slot is leased and mapped for ever.
    let owner = &unsafe { lease.slot.as_ref() }.owner;
    let word = charge.into_word();
    let is_counted = |word: *mut ()| word.addr() & budget::COUNTED != 0;
    // A budget that was set since may have counted the stack already: the flag stays, and stands for one count.
    let twice = is_counted(owner.swap(word, Ordering::Relaxed))
        && (is_counted(word) || is_counted(owner.fetch_or(budget::COUNTED, Ordering::Relaxed)));
    if twice {
        // SAFETY: a word that `late` stands for; the slot has another that says the same.
        drop(unsafe { Charge::from_word(std::ptr::without_provenance_mut(budget::COUNTED), shape.cost()) });
    }
    Ok(lease)
}

/// The class of stacks of at least `bytes` bytes (not 0) and at least `1 << smallest`.
#[inline(always)]
fn class_of(bytes: usize, smallest: u32) -> u8 {
    slab::class_of_shift((usize::BITS - (bytes - 1).leading_zeros()).max(smallest))
}

/// As part of a class: whether its stacks have shadow stacks.
#[inline(always)]
fn flag(shadow: bool) -> u8 {
    if shadow { CLASS_SHADOW } else { 0 }
}

/// Gives a stack back that [`Lease::into_raw`] let go of.
///
/// # Errors
/// [`Error::Slot`] when the address is no slot's, when the slot is free already, or while something runs or is suspended on it.
///
/// # Safety
/// The address came from [`Lease::into_raw`], and nobody has leased the stack again since it was given back.
pub unsafe fn release_raw(slot: *mut Slot) -> Result<(), Error> {
    if directory::find(slot.addr()).is_none() {
        return Err(Error::Slot("it is no slot of a pool"));
    }
    // SAFETY: the directory knows the slot: it is mapped for ever.
    let state = unsafe { &(*slot).state };
    // Whoever makes it RUNNING gives it back: of two that try at once one gets the error.
    let claim = |now| match now {
        slot_state::LEASED | slot_state::DONE | slot_state::READY => Some(slot_state::RUNNING),
        _ => None,
    };
    match state.fetch_update(Ordering::Acquire, Ordering::Relaxed, claim) {
        Ok(before) => state.store(before, Ordering::Relaxed),
        Err(slot_state::FREE) => return Err(Error::Slot("it is free already")),
        Err(_) => return Err(Error::Slot("something is on it: let it finish or cancel it first")),
    }
    release(slot);
    Ok(())
}

/// Gives the memory of idle stacks back to the system: those in this thread's cache and in the reserves. Stacks above 1 MiB are unmapped.
/// What other threads keep stays (at most 64 stacks of a class each), and so does the memory of stacks that share pages, and that of shadow
/// stacks: a token that is lost makes the stack useless.
pub fn trim() {
    reserve::trim();
    single::trim();
}

/// Sets how many bytes all leased stacks of the process may count together: data areas, shadow stacks and bookkeeping at their full size,
/// whether touched or not. `usize::MAX`, as in the beginning: no budget.
///
/// Stacks that are leased already count too; if they count more than the budget nothing can be leased until enough are given back.
pub fn set_budget(bytes: usize) {
    budget::set_limit((bytes != usize::MAX).then_some(bytes));
    if bytes == usize::MAX {
        return;
    }
    for (slot, bound) in report::slots() {
        // SAFETY: the directory knows the slot: it is mapped for ever.
        let fields = unsafe { slot.as_ref() };
        let mark = |word: *mut ()| {
            (word.addr() & budget::COUNTED == 0).then(|| word.map_addr(|address| address | budget::COUNTED))
        };
        let counted = std::ptr::without_provenance_mut(budget::COUNTED);
        let order = Ordering::Relaxed;
        if fields.state.load(order) != slot_state::FREE {
            // Counted first: whoever finds the flag and gives the stack back takes it off again.
            let charge = Charge::late(Shape::of(&bound).cost());
            if fields.owner.fetch_update(order, order, mark).is_ok() {
                std::mem::forget(charge);
            }
        } else if fields.owner.compare_exchange(counted, null_mut(), order, order).is_ok() {
            // It was given back while an earlier call was about to count it.
            // SAFETY: the word is one that `late` stands for, and was taken out of the slot just now.
            drop(unsafe { Charge::from_word(counted, Shape::of(&bound).cost()) });
        }
    }
}

/// Makes the calls of the operating system that the pools make for this thread fail from the `n`th on, counted from 0, as if memory had
/// run out; `None`: none of them. For tests of what a program does then.
#[cfg(feature = "steps")]
pub fn fail_calls_from(n: Option<usize>) {
    system::injection::fail_from(n);
}

#[cold]
#[inline(never)]
fn lied(slot: *mut Slot, evidence: &'static str) -> ! {
    tamper::end(Tampered { evidence, slot: slot.addr() })
}

/// A stack of a slab class, with a shadow stack if this thread has one: out of this thread's cache.
#[inline(always)]
fn take(class: u8) -> Result<Lease, Error> {
    // An address alone goes through here: a whole `Result` would go through memory.
    let slot = CACHE.with(|cache| {
        let class = class | cache.flag.get();
        let list = cache.lists.get(usize::from(class))?;
        let slot = NonNull::new(list.head.get())?;
        list.head.set(verified(slot.as_ptr(), class));
        list.room.set(list.room.get().wrapping_add(1));
        Some(slot)
    });
    match slot {
        Some(slot) => Ok(hand_out(slot)),
        None => reserve::refill(class),
    }
}

/// Leases a slot that [`verified`] has looked at and that is on no list any more.
#[inline(always)]
fn hand_out(slot: NonNull<Slot>) -> Lease {
    // SAFETY: `verified` ends the process unless the directory knows the slot.
    let fields = unsafe { slot.as_ref() };
    fields.created.store(null_mut(), Ordering::Relaxed);
    fields.state.store(slot_state::LEASED, Ordering::Relaxed);
    Lease::new(slot)
}

/// Ends the process unless `slot`, which a free list names, is a free slot of the class; says which one it names as the next.
#[inline(always)]
fn verified(slot: *mut Slot, class: u8) -> *mut Slot {
    // SAFETY: reads a word where a slot should be. An address that an attacker made up faults, or is found out next.
    let chunk = unsafe { (&raw const (*slot).chunk).read_volatile() };
    let Some(known) = directory::known(slot.addr(), chunk) else { lied(slot, "a free list names what is no stack") };
    if known.class() != class {
        lied(slot, "a free list names a stack of another class");
    }
    // SAFETY: the directory knows the slot: it is mapped for ever.
    let fields = unsafe { &*slot };
    if fields.state.load(Ordering::Acquire) != slot_state::FREE {
        lied(slot, "a free list names a stack that is in use");
    }
    let bound = known.bound();
    if fields.base != bound.base || fields.top != bound.top || fields.identity != bound.identity {
        lied(slot, "a free stack's bounds were rewritten");
    }
    if class & CLASS_SHADOW != 0 {
        if fields.shadow_top != bound.shadow_top {
            lied(slot, "a free stack's bounds were rewritten");
        }
        if !shadow::is_idle(bound.shadow_top) {
            lied(slot, "a free list names a stack whose shadow stack is in use");
        }
    }
    if !fields.owner.load(Ordering::Relaxed).is_null() {
        settle(slot, &known);
    }
    fields.next.load(Ordering::Relaxed)
}

/// Gives a stack back. One that something is on stays where it is.
#[inline(always)]
fn release(slot: *mut Slot) {
    // SAFETY: a lease's slot is mapped for ever.
    let fields = unsafe { &*slot };
    let Some(known) = directory::known(slot.addr(), fields.chunk) else { lied(slot, "a lease names what is no stack") };
    let state = fields.standing();
    if state != slot_state::LEASED && state != slot_state::DONE && !unusual_state(slot, state) {
        return;
    }
    let class = known.class();
    if class & CLASS_SHADOW != 0 && !shadow::is_idle(known.bound().shadow_top) {
        lied(slot, "a stack was given back whose shadow stack is in use");
    }
    if !fields.owner.load(Ordering::Relaxed).is_null() {
        settle(slot, &known);
    }
    CACHE.with(|cache| {
        // A thread has no room for stacks of the other shadow mode.
        let list = cache.lists.get(usize::from(class)).filter(|list| list.room.get() != 0);
        let Some(list) = list else { return reserve::give_elsewhere(cache, slot, class) };
        fields.next.store(list.head.get(), Ordering::Relaxed);
        fields.state.store(slot_state::FREE, Ordering::Release);
        list.head.set(slot);
        list.room.set(list.room.get() - 1);
    });
}

/// Whether a stack in such a state can be given back.
#[cold]
#[inline(never)]
fn unusual_state(slot: *mut Slot, state: u32) -> bool {
    match state {
        slot_state::READY => {
            // SAFETY: a lease's slot is mapped for ever, and what was prepared on it is the lease's.
            let own = unsafe { &mut (*slot).own };
            (own.sp, *own.seal.get_mut(), own.token) = (0, 0, 0);
            true
        }
        slot_state::RUNNING | slot_state::SUSPENDED => {
            // SAFETY: a lease's slot is mapped for ever.
            unsafe { &(*slot).owner }.fetch_or(budget::ABANDONED, Ordering::Relaxed);
            false
        }
        _ => lied(slot, "a leased stack is free"),
    }
}

/// Takes a stack off the counts that it stands in.
#[cold]
#[inline(never)]
fn settle(slot: *mut Slot, known: &Known) {
    // SAFETY: the directory knows the slot: it is mapped for ever. Nobody else settles it: it is given back, or idle and being taken.
    unsafe {
        let word = (*slot).owner.swap(null_mut(), Ordering::Relaxed);
        drop(Charge::from_word(word, Shape::of(&known.bound()).cost()));
    }
}
