//! Pools of stacks: leased, given back, used again.
//!
//! ```text
//!  lease() <--- this thread's cache <=== reserve of the class (lock) <=== chunk being carved <=== the system
//!  drop()  ---> this thread's cache ===> reserve of the class
//! ```
//! Nothing in a free list is believed: whoever is taken out of one must be a slot that the read-only directory knows, of the list's
//! class, free, and (where there are shadow stacks) with its idle token in place. What is none of that is evidence of tampering.

use crate::abi::{Slot, slot_state};
use crate::directory::{self, Bound};
use crate::error::Error;
use crate::pac::Tampered;
use crate::slab::{self, Chunk, LARGEST, SMALLEST, Shape};
use crate::{features, system, tamper};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

/// Classes that have lists.
const CLASSES: usize = LARGEST as usize + 1;

/// A stack of a pool, the caller's until it is dropped.
#[derive(Debug)]
pub struct Lease {
    slot: NonNull<Slot>,
    not_sync: PhantomData<Cell<()>>,
}

// SAFETY: the slot and its memory belong to whoever has the lease; nothing in them is bound to a thread.
unsafe impl Send for Lease {}

impl Lease {
    fn new(slot: NonNull<Slot>) -> Lease {
        Lease { slot, not_sync: PhantomData }
    }

    /// Its bookkeeping, which the switch stubs work on.
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
        self.top() - self.base()
    }
}

impl Drop for Lease {
    /// Gives the stack back, if nothing is on it any more. A stack that runs or is suspended stays out of the pools.
    #[inline]
    fn drop(&mut self) {
        release(self.slot);
    }
}

#[derive(Clone, Copy)]
struct List {
    head: *mut Slot,
    count: u32,
    limit: u32,
}

const NONE: List = List { head: null_mut(), count: 0, limit: 0 };

/// What a thread keeps. Not yet told its variant: every list is empty and has room for none.
struct Cache {
    lists: [Cell<List>; CLASSES],
    variant: Cell<Variant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    Unknown,
    Plain,
    Shadow,
    /// The thread is ending: nothing is kept any more.
    Closed(bool),
}

thread_local! {
    static CACHE: Cache = const { Cache { lists: [const { Cell::new(NONE) }; CLASSES], variant: Cell::new(Variant::Unknown) } };
}

/// Leases a stack with a guard.
///
/// # Errors
/// [`Error::Memory`] and the like.
#[inline]
pub fn lease(bytes: usize) -> Result<Lease, Error> {
    if bytes.wrapping_sub(1) >= 1 << LARGEST {
        return unusual(bytes);
    }
    let class = (usize::BITS - (bytes - 1).leading_zeros()).max(system::page_shift());
    take(class)
}

/// Leases a stack smaller than a page, without a guard.
///
/// # Errors
/// [`Error::Size`] for more than half a page.
#[inline]
pub fn lease_small(bytes: usize) -> Result<Lease, Error> {
    if bytes.wrapping_sub(1) >= system::page_size() / 2 {
        return Err(Error::Size {
            bytes,
            rule: "a stack without a guard has at least one byte and at most half a page",
        });
    }
    let class = (usize::BITS - (bytes - 1).leading_zeros()).max(SMALLEST);
    take(class)
}

#[cold]
fn unusual(bytes: usize) -> Result<Lease, Error> {
    if bytes == 0 {
        return Err(Error::Size { bytes, rule: "a stack has at least one byte" });
    }
    Err(Error::Size { bytes, rule: "larger than any mapping" })
}

/// Gives out a slab area for memory that is the caller's.
///
/// # Errors
/// Typed.
///
/// # Safety
/// The area is writable, and the caller's until the lease is gone.
pub unsafe fn bare(base: usize, top: usize) -> Result<Lease, Error> {
    if !top.is_multiple_of(16) || base >= top {
        return Err(Error::Size {
            bytes: top.wrapping_sub(base),
            rule: "a stack's top is a multiple of 16 above its base",
        });
    }
    let shadow = features::domain().shadow;
    let slot = slab::bind(&Shape::bare(top - base, shadow), base)?;
    // SAFETY: just made, ours.
    unsafe { slot.as_ref() }.state.store(slot_state::LEASED, Ordering::Relaxed);
    Ok(Lease::new(slot))
}

#[inline]
fn take(class: u32) -> Result<Lease, Error> {
    CACHE.with(|cache| {
        let place = &cache.lists[class as usize];
        let list = place.get();
        if list.head.is_null() {
            return refill(cache, class);
        }
        let slot = list.head;
        let shadow = matches!(cache.variant.get(), Variant::Shadow);
        // SAFETY: `verified` ends the process unless it is a free slot of the directory.
        let next = unsafe { pop(slot, class as u8, shadow) };
        place.set(List { head: next, count: list.count.wrapping_sub(1), limit: list.limit });
        // SAFETY: it was a free slot, so not null.
        Ok(Lease::new(unsafe { NonNull::new_unchecked(slot) }))
    })
}

#[cold]
#[inline(never)]
fn lied(slot: *mut Slot, evidence: &'static str) -> ! {
    tamper::end(Tampered { evidence, slot: slot.addr() })
}

/// Takes a slot that a free list names and says what it names as the next.
///
/// # Safety
/// The caller is the only one who takes from the list.
#[inline]
unsafe fn pop(slot: *mut Slot, class: u8, shadow: bool) -> *mut Slot {
    // SAFETY: an address that an attacker made up faults here or is found out below.
    let chunk = unsafe { (&raw const (*slot).chunk).read_volatile() };
    let Some(bound) = directory::bound(slot.addr(), chunk) else { lied(slot, "a free list named what is no slot") };
    if bound.class != class || (bound.shadow_top != 0) != shadow {
        lied(slot, "a free list named a slot of another class");
    }
    // SAFETY: the directory knows the slot: it is mapped and has atomics where the pools write.
    let slot_ref = unsafe { &*slot };
    if slot_ref.state.load(Ordering::Relaxed) != slot_state::FREE {
        lied(slot, "a free list named a stack that is in use");
    }
    if shadow {
        idle_token_or_end(slot, &bound);
    }
    if slot_ref.base != bound.base || slot_ref.top != bound.top || slot_ref.shadow_top != bound.shadow_top {
        lied(slot, "a free stack's bounds were rewritten");
    }
    slot_ref.state.store(slot_state::LEASED, Ordering::Relaxed);
    slot_ref.next.swap_null()
}

trait SwapNull {
    fn swap_null(&self) -> *mut Slot;
}
impl SwapNull for std::sync::atomic::AtomicPtr<Slot> {
    #[inline]
    fn swap_null(&self) -> *mut Slot {
        let next = self.load(Ordering::Relaxed);
        self.store(null_mut(), Ordering::Relaxed);
        next
    }
}

/// Ends the process unless the token stands on top of the shadow stack: nothing can be on it then.
#[inline]
fn idle_token_or_end(slot: *mut Slot, bound: &Bound) {
    // SAFETY: the directory says that the slot's shadow stack ends there, and the slot was made: it is mapped.
    let word = unsafe { std::ptr::with_exposed_provenance::<u64>(bound.shadow_top - 8).read_volatile() };
    if !is_idle_token(word, bound.shadow_top) {
        lied(slot, "a free stack's shadow stack is in use");
    }
}

/// x86: the address above it, and bit 0 for 64 bit mode (Linux `Documentation/arch/x86/shstk.rst`).
#[cfg(target_arch = "x86_64")]
#[inline]
fn is_idle_token(word: u64, top: usize) -> bool {
    word == (top | 1) as u64
}

/// arm64: its own page, and 1 for a valid cap (Linux `Documentation/arch/arm64/gcs.rst`).
#[cfg(target_arch = "aarch64")]
#[inline]
fn is_idle_token(word: u64, top: usize) -> bool {
    word == (((top - 8) & !0xfff) | 1) as u64
}

#[inline]
fn release(slot: NonNull<Slot>) {
    CACHE.with(|cache| {
        let slot = slot.as_ptr();
        // SAFETY: a lease's slot is mapped.
        let (chunk, slot_ref) = unsafe { ((&raw const (*slot).chunk).read_volatile(), &*slot) };
        let Some(bound) = directory::bound(slot.addr(), chunk) else { lied(slot, "a lease named what is no slot") };
        let state = slot_ref.state.load(Ordering::Relaxed);
        if state == slot_state::RUNNING || state == slot_state::SUSPENDED {
            return;
        }
        if state == slot_state::FREE {
            lied(slot, "a leased stack is free");
        }
        if bound.shadow_top != 0 {
            idle_token_or_end(slot, &bound);
        }
        if bound.class == directory::CLASS_BARE {
            return slab::unbind(slot, chunk, &bound);
        }
        let shadow = bound.shadow_top != 0;
        let ours = matches!((cache.variant.get(), shadow), (Variant::Shadow, true) | (Variant::Plain, false));
        let place = &cache.lists[bound.class as usize];
        let list = place.get();
        if !ours || list.count >= list.limit {
            return overflow(cache, slot, &bound, ours);
        }
        slot_ref.next.store(list.head, Ordering::Relaxed);
        slot_ref.state.store(slot_state::FREE, Ordering::Release);
        place.set(List { head: slot, count: list.count + 1, limit: list.limit });
    });
}

struct Reserve {
    head: *mut Slot,
    count: usize,
    chunk: Option<Chunk>,
    next_slots: usize,
}

// SAFETY: slots are bound to no thread.
unsafe impl Send for Reserve {}

static RESERVES: [[Mutex<Reserve>; CLASSES]; 2] =
    [const { [const { Mutex::new(Reserve { head: null_mut(), count: 0, chunk: None, next_slots: 0 }) }; CLASSES] }; 2];

fn limit_of(class: u32) -> u32 {
    ((4_usize << 20) >> class).clamp(4, 64) as u32
}

#[cold]
#[inline(never)]
fn refill(cache: &Cache, class: u32) -> Result<Lease, Error> {
    if cache.variant.get() == Variant::Unknown {
        cache.variant.set(if features::domain().shadow { Variant::Shadow } else { Variant::Plain });
    }
    let shadow = matches!(cache.variant.get(), Variant::Shadow | Variant::Closed(true));
    let place = &cache.lists[class as usize];
    place.set(List { limit: limit_of(class), ..place.get() });
    let shape = Shape::of_class(class, shadow);
    let mut reserve = RESERVES[usize::from(shadow)][class as usize].lock().unwrap_or_else(PoisonError::into_inner);
    if !reserve.head.is_null() {
        let slot = reserve.head;
        // SAFETY: under the lock.
        reserve.head = unsafe { pop(slot, class as u8, shadow) };
        reserve.count = reserve.count.wrapping_sub(1);
        // SAFETY: not null.
        return Ok(Lease::new(unsafe { NonNull::new_unchecked(slot) }));
    }
    if reserve.chunk.is_none_or(|chunk| chunk.made == chunk.count) {
        let count = if reserve.next_slots == 0 { shape.first_slots() } else { reserve.next_slots };
        let chunk = Chunk::map(&shape, count)?;
        reserve.next_slots = shape.next_slots(chunk.count);
        reserve.chunk = Some(chunk);
    }
    let Some(chunk) = reserve.chunk.as_mut() else { unreachable!() };
    let slot = chunk.carve(&shape)?;
    // SAFETY: just made, ours.
    unsafe { slot.as_ref() }.state.store(slot_state::LEASED, Ordering::Relaxed);
    Ok(Lease::new(slot))
}

#[cold]
#[inline(never)]
fn overflow(_cache: &Cache, slot: *mut Slot, bound: &Bound, _ours: bool) {
    let shadow = bound.shadow_top != 0;
    let mut reserve =
        RESERVES[usize::from(shadow)][bound.class as usize].lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: being released, known by the directory.
    let slot_ref = unsafe { &*slot };
    slot_ref.next.store(reserve.head, Ordering::Relaxed);
    slot_ref.state.store(slot_state::FREE, Ordering::Release);
    reserve.head = slot;
    reserve.count += 1;
    let _ = slab::LARGEST;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_reused_and_cheap() {
        let first = lease(4096).unwrap();
        let (base, slot) = (first.base(), first.slot());
        assert_eq!(first.size(), 4096);
        drop(first);
        let second = lease(100).unwrap();
        assert_eq!((second.base(), second.slot()), (base, slot));
        drop(second);
        let begin = std::time::Instant::now();
        for _ in 0..1_000_000 {
            drop(std::hint::black_box(lease(std::hint::black_box(4096)).unwrap()));
        }
        eprintln!("{:?} per million", begin.elapsed());
    }
}
