//! What a thread keeps of each class, and what all threads share.

use super::{CLASSES, Lease, flag, hand_out, release, single, verified};
use crate::abi::{Slot, slot_state};
use crate::directory::{self, CLASS_BARE, CLASS_LARGE, CLASS_SHADOW};
use crate::error::Error;
use crate::slab::{self, Chunk, Shape};
use crate::{features, system};
use std::cell::Cell;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Stacks that a thread keeps of a class, unless they are large.
const KEPT: usize = 64;
/// Bytes that it keeps of a class, unless that is less than four stacks.
const KEPT_BYTES: usize = 4 << 20;
/// Stacks of a class that are made at once at most.
const MADE_AT_ONCE: usize = 16;
/// Bytes of a class that the reserve keeps in memory, unless that is less than [`WARM`] stacks.
const WARM_BYTES: usize = 4 << 20;
const WARM: usize = 8;

/// Free slots, linked by [`Slot::next`].
pub(super) struct List {
    pub head: Cell<*mut Slot>,
    /// How many more it takes.
    pub room: Cell<u32>,
}

impl List {
    fn push(&self, slot: NonNull<Slot>) {
        // SAFETY: the slot was verified, made or given back: the directory knows it.
        unsafe { slot.as_ref() }.next.store(self.head.get(), Ordering::Relaxed);
        self.head.set(slot.as_ptr());
        self.room.set(self.room.get().saturating_sub(1));
    }

    fn pop(&self, class: u8) -> Option<NonNull<Slot>> {
        let slot = NonNull::new(self.head.get())?;
        self.head.set(verified(slot.as_ptr(), class));
        self.room.set(self.room.get().saturating_add(1));
        Some(slot)
    }
}

/// What a thread keeps.
pub(super) struct Cache {
    pub lists: [List; CLASSES],
    /// `CLASS_SHADOW` if this thread has a shadow stack. Before the thread's first use 0, which meets empty lists without room.
    pub flag: Cell<u8>,
    phase: Cell<Phase>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The thread did not use it yet.
    Unused,
    Open,
    /// The thread is ending and keeps nothing.
    Closed,
}

thread_local! {
    // Without a destructor, so that looking at it costs nothing: `LEAVING` has it.
    pub(super) static CACHE: Cache = const {
        Cache {
            lists: [const { List { head: Cell::new(null_mut()), room: Cell::new(0) } }; CLASSES],
            flag: Cell::new(0),
            phase: Cell::new(Phase::Unused),
        }
    };
    static LEAVING: Leaving = const { Leaving };
}

/// Empties the cache of a thread that ends.
struct Leaving;

impl Drop for Leaving {
    fn drop(&mut self) {
        CACHE.with(|cache| {
            cache.phase.set(Phase::Closed);
            cache.flush();
            cache.lists.iter().for_each(|list| list.room.set(0));
        });
    }
}

/// How many stacks of a class a thread keeps.
fn kept(class: u8) -> usize {
    (KEPT_BYTES / slab::class_bytes(class)).clamp(4, KEPT)
}

impl Cache {
    /// Whether this thread's stacks have shadow stacks.
    pub fn shadow(&self) -> bool {
        self.open();
        self.flag.get() != 0
    }

    /// At a thread's first use: finds out its shadow mode, and makes room in the lists that fit it.
    fn open(&self) {
        if self.phase.get() != Phase::Unused {
            return;
        }
        self.flag.set(flag(features::domain().shadow));
        // A thread whose destructors run already keeps nothing.
        if LEAVING.try_with(|_| ()).is_err() {
            return self.phase.set(Phase::Closed);
        }
        self.phase.set(Phase::Open);
        for (class, list) in (0..).zip(&self.lists).filter(|(class, _)| class & CLASS_SHADOW == self.flag.get()) {
            list.room.set(kept(class) as u32);
        }
    }

    /// Gives everything to the reserves.
    fn flush(&self) {
        for (class, list) in (0..).zip(&self.lists) {
            loop {
                let mut batch = Batch::default();
                while batch.has_room() {
                    let Some(slot) = list.pop(class) else { break };
                    batch.push(slot);
                }
                if batch.count == 0 {
                    break;
                }
                give(class, &batch);
            }
        }
    }
}

/// Slots on their way from list to list: out of an attacker's easy reach, and bounded.
struct Batch {
    slots: [Option<NonNull<Slot>>; Self::ROOM],
    count: usize,
}

impl Batch {
    const ROOM: usize = KEPT / 2 + 1;

    fn has_room(&self) -> bool {
        self.count < Self::ROOM
    }

    fn push(&mut self, slot: NonNull<Slot>) {
        self.slots[self.count] = Some(slot);
        self.count += 1;
    }

    fn iter(&self) -> impl Iterator<Item = NonNull<Slot>> + Clone {
        self.slots[..self.count].iter().copied().flatten()
    }
}

impl Default for Batch {
    fn default() -> Self {
        Batch { slots: [None; Self::ROOM], count: 0 }
    }
}

/// Free slots of a reserve.
struct Line {
    head: *mut Slot,
    count: usize,
}

impl Line {
    fn push(&mut self, slot: NonNull<Slot>) {
        // SAFETY: whoever pushes a slot has it from `verified` or is giving it back: the directory knows it.
        unsafe { slot.as_ref() }.next.store(self.head, Ordering::Relaxed);
        self.head = slot.as_ptr();
        self.count += 1;
    }

    fn pop(&mut self, class: u8) -> Option<NonNull<Slot>> {
        let slot = NonNull::new(self.head)?;
        self.head = verified(self.head, class);
        self.count = self.count.saturating_sub(1);
        Some(slot)
    }
}

/// What all threads share of a class.
struct Reserve {
    /// Stacks that may have memory behind them.
    warm: Line,
    /// Stacks whose memory was given back.
    cold: Line,
    /// The chunk that stacks are made in.
    chunk: Option<Chunk>,
}

// SAFETY: free slots are bound to no thread.
unsafe impl Send for Reserve {}

impl Reserve {
    const fn new() -> Self {
        Reserve { warm: Line { head: null_mut(), count: 0 }, cold: Line { head: null_mut(), count: 0 }, chunk: None }
    }

    /// Makes stacks, at least one.
    fn make(&mut self, shape: &Shape, batch: &mut Batch, wanted: usize) -> Result<(), Error> {
        while batch.count == 0 {
            let chunk = match &mut self.chunk {
                Some(chunk) if chunk.made < chunk.count => chunk,
                full => full.insert(Chunk::map(shape, full.map_or(0, |chunk| chunk.count))?),
            };
            // A small program makes few.
            let end = chunk.count.min(chunk.made + wanted.min(chunk.made.clamp(1, MADE_AT_ONCE)));
            while chunk.made < end {
                match chunk.carve(shape) {
                    Ok(Some(slot)) => batch.push(slot),
                    Ok(None) => {}
                    Err(_) if batch.count != 0 => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

static RESERVES: [Mutex<Reserve>; CLASSES] = [const { Mutex::new(Reserve::new()) }; CLASSES];

fn reserve(class: u8) -> MutexGuard<'static, Reserve> {
    RESERVES[usize::from(class)].lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leases a stack of a class of which this thread keeps none, and gets it some to keep.
#[cold]
#[inline(never)]
pub(super) fn refill(class: u8) -> Result<Lease, Error> {
    CACHE.with(|cache| cache.refill(class)).map(hand_out)
}

impl Cache {
    /// Takes slots of a class from the reserve: one that is said, and others for the list.
    fn refill(&self, class: u8) -> Result<NonNull<Slot>, Error> {
        self.open();
        let class = class | self.flag.get();
        let Some(list) = self.lists.get(usize::from(class)) else {
            return Err(Error::Size { bytes: 0, rule: "there is no such class of stacks" });
        };
        // The first call of a thread comes here with whatever it was given back before.
        if let Some(slot) = list.pop(class) {
            return Ok(slot);
        }
        let wanted = (list.room.get() as usize / 2).clamp(1, Batch::ROOM);
        let mut batch = Batch::default();
        {
            let mut reserve = reserve(class);
            while batch.count < wanted {
                let Some(slot) = reserve.warm.pop(class).or_else(|| reserve.cold.pop(class)) else { break };
                batch.push(slot);
            }
            if batch.count == 0 {
                reserve.make(&Shape::of_class(class), &mut batch, wanted)?;
            }
        }
        let mut slots = batch.iter();
        let Some(first) = slots.next() else { return Err(Error::Slot("none was made")) };
        slots.for_each(|slot| list.push(slot));
        Ok(first)
    }
}

/// Gives a stack back that does not go into this thread's cache as it is: half of a full list goes to the reserve with it. The
/// thread may also not have used its cache yet, have another shadow mode, or be ending, and the stack may be of no slab class.
#[cold]
#[inline(never)]
pub(super) fn give_elsewhere(cache: &Cache, slot: *mut Slot, class: u8) {
    if class & (CLASS_LARGE | CLASS_BARE) != 0 {
        return single::give(slot, class);
    }
    if cache.phase.get() == Phase::Unused {
        cache.open();
        return release(slot);
    }
    let (Some(list), Some(slot)) = (cache.lists.get(usize::from(class)), NonNull::new(slot)) else { return };
    let mut batch = Batch::default();
    // SAFETY: a lease's slot is mapped for ever.
    unsafe { slot.as_ref() }.state.store(slot_state::FREE, Ordering::Release);
    batch.push(slot);
    while batch.count <= kept(class) / 2 {
        let Some(slot) = list.pop(class) else { break };
        batch.push(slot);
    }
    give(class, &batch);
}

/// Puts free slots into the reserve. Those that it does not keep warm lose their memory first.
fn give(class: u8, batch: &Batch) {
    let bytes = slab::class_bytes(class);
    // Stacks that share pages cannot lose them one by one.
    let warm = if bytes < system::page_size() { usize::MAX } else { (WARM_BYTES / bytes).max(WARM) };
    let mut kept = 0;
    {
        let mut reserve = reserve(class);
        for slot in batch.iter().take(warm.saturating_sub(reserve.warm.count)) {
            reserve.warm.push(slot);
            kept += 1;
        }
    }
    cool(class, batch.iter().skip(kept));
}

/// Gives the memory behind free slots back to the system, and puts them into the reserve.
fn cool(class: u8, slots: impl Iterator<Item = NonNull<Slot>> + Clone) {
    let mut any = false;
    for slot in slots.clone() {
        any = true;
        // SAFETY: the slot was verified or is given back: the directory knows it.
        let chunk = unsafe { slot.as_ref() }.chunk;
        if let Some(known) = directory::known(slot.addr().get(), chunk).filter(|known| known.class() == class) {
            let bound = known.bound();
            system::decommit(bound.base, bound.top - bound.base);
        }
    }
    if any {
        let mut reserve = reserve(class);
        slots.for_each(|slot| reserve.cold.push(slot));
    }
}

/// Gives the memory of all idle stacks back that can be had: this thread's and the reserves'.
pub(super) fn trim() {
    CACHE.with(Cache::flush);
    let shared = |class: &u8| slab::class_bytes(*class) < system::page_size();
    for class in (0..CLASSES as u8).filter(|class| !shared(class)) {
        loop {
            let mut batch = Batch::default();
            {
                let mut reserve = reserve(class);
                while batch.has_room() {
                    let Some(slot) = reserve.warm.pop(class) else { break };
                    batch.push(slot);
                }
            }
            if batch.count == 0 {
                break;
            }
            cool(class, batch.iter());
        }
    }
}
