//! The table of continuations: what is kept of each, off its stack, and what a handle is compared with.
//!
//! A handle names an entry by its index, never by an address: whatever somebody makes up names an entry or nothing. Entries are never
//! given back to the system, so the word that a handle is compared with goes on counting for ever. It is kept here and not in the slot: the
//! slot's generations are the stubs', under their seals, and on a CPU without seals the stubs do not count at all.

use super::local::Local;
use super::run::Wait;
use super::{Cont, Entry};
use crate::abi::{Slot, slot_state};
use crate::error::Error;
use crate::pac::Tampered;
use crate::pool::Lease;
use crate::{system, tamper};
use std::cell::Cell;
use std::panic::Location;
use std::ptr::{NonNull, null, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// [`Node::owner`]: every thread of the domain.
pub(super) const ANYBODY: u64 = 0;
/// [`Node::owner`]: a thread that ended.
pub(super) const NOBODY: u64 = u64::MAX;

/// How far a continuation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The entry is not in use.
    Free,
    /// Its stack is prepared; nothing ran on it.
    Fresh,
    /// The library's own first function ran and waits for arguments.
    Started,
    /// Its entry function was called.
    Begun,
}

/// Where values go that are passed to a suspended continuation.
#[derive(Clone, Copy)]
pub(super) struct Inbox {
    /// The buffer, on the suspended stack as a rule. For a fresh continuation what the resumer passes, to be copied.
    pub at: *mut u64,
    /// Values that it takes.
    pub room: usize,
    /// Values that it has.
    pub filled: usize,
}

impl Inbox {
    pub const NONE: Inbox = Inbox { at: null_mut(), room: 0, filled: 0 };
}

/// A continuation. All but the atomics belongs to whoever made `generation` odd, or made the node.
#[repr(align(64))]
pub(super) struct Node {
    /// Even and not 0: the handle with this word is valid. Odd: the continuation runs, or there is none.
    pub generation: AtomicU64,
    /// Which thread may use the handle: its number, or [`ANYBODY`].
    pub owner: AtomicU64,
    /// Where it was made.
    pub created: AtomicPtr<Location<'static>>,
    /// Its stack's bookkeeping.
    pub slot: Cell<*mut Slot>,
    /// The outermost stack of the chain that is suspended with it: itself when it is one stack.
    pub first: Cell<*const Node>,
    /// Who resumed it: null for a thread's own stack. Of the first of a suspended chain it is stale.
    pub parent: Cell<*const Node>,
    /// What its resumer waits with.
    pub wait: Cell<*const Wait>,
    pub inbox: Cell<Inbox>,
    /// Who switched to it when it was fresh.
    pub from: Cell<Cont>,
    pub entry: Cell<Option<Entry>>,
    pub data: Cell<usize>,
    pub params: Cell<usize>,
    pub results: Cell<usize>,
    pub stage: Cell<Stage>,
    /// Whether its frames may not change threads.
    pub pinned: Cell<bool>,
    /// Whether it was resumed from a stack of another face: no chain goes past it.
    pub barrier: Cell<bool>,
    pub cancelling: Cell<bool>,
    /// The key domain that its frames belong to.
    pub domain: Cell<u32>,
    /// The thread that it ran on last.
    pub home: Cell<u64>,
    lease: Cell<Option<Lease>>,
    index: u32,
    next_free: Cell<u32>,
}

// SAFETY: the atomics decide who may touch the rest, one thread at a time.
unsafe impl Sync for Node {}

impl Node {
    fn empty(index: u32) -> Node {
        Node {
            generation: AtomicU64::new(1),
            owner: AtomicU64::new(ANYBODY),
            created: AtomicPtr::new(null_mut()),
            slot: Cell::new(null_mut()),
            first: Cell::new(null()),
            parent: Cell::new(null()),
            wait: Cell::new(null()),
            inbox: Cell::new(Inbox::NONE),
            from: Cell::new(Cont::NULL),
            entry: Cell::new(None),
            data: Cell::new(0),
            params: Cell::new(0),
            results: Cell::new(0),
            stage: Cell::new(Stage::Free),
            pinned: Cell::new(true),
            barrier: Cell::new(false),
            cancelling: Cell::new(false),
            domain: Cell::new(0),
            home: Cell::new(0),
            lease: Cell::new(None),
            index,
            next_free: Cell::new(NO_NODE),
        }
    }

    /// Its number in the table.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its stack's bookkeeping.
    #[inline]
    pub fn slot(&self) -> NonNull<Slot> {
        // SAFETY: a node that is in use has a leased slot; `give` is what ends that.
        unsafe { NonNull::new_unchecked(self.slot.get()) }
    }

    #[inline]
    pub fn set_state(&self, state: u32) {
        // SAFETY: the slot is leased to this node.
        unsafe { &*self.slot.get() }.state.store(state, Ordering::Relaxed);
    }

    /// Bounds of its data area.
    #[inline]
    pub fn area(&self) -> (usize, usize) {
        let slot = self.slot.get();
        // SAFETY: the slot is leased to this node.
        unsafe { ((&raw const (*slot).base).read(), (&raw const (*slot).top).read()) }
    }

    /// Whether an address lies in its data area.
    #[inline]
    pub fn holds(&self, address: usize) -> bool {
        let (base, top) = self.area();
        address >= base && address < top
    }

    /// Makes a handle valid again that nobody has yet.
    #[inline]
    pub fn hand_out(&self) -> Cont {
        let generation = self.generation.load(Ordering::Relaxed).wrapping_add(1);
        self.generation.store(generation, Ordering::Release);
        Cont { node: u64::from(self.index), generation }
    }

    /// Makes the handle valid again that was claimed.
    pub fn put_back(&self) {
        self.generation.store(self.generation.load(Ordering::Relaxed).wrapping_sub(1), Ordering::Release);
    }

    /// The handle that is valid now, if there is one.
    pub fn handle(&self) -> Option<Cont> {
        let generation = self.generation.load(Ordering::Acquire);
        (generation & 1 == 0).then_some(Cont { node: u64::from(self.index), generation })
    }
}

const NO_NODE: u32 = u32::MAX;
/// Logarithm of the first segment's nodes; each further segment has as many as all before it and those.
const FIRST: u32 = 6;
const SEGMENTS: usize = 25;
/// Nodes that a thread takes from the table at once.
const BATCH: u32 = 32;

static SEGMENT: [AtomicPtr<Node>; SEGMENTS] = [const { AtomicPtr::new(null_mut()) }; SEGMENTS];
static MADE: AtomicUsize = AtomicUsize::new(0);
static FREE: Mutex<List> = Mutex::new(List::EMPTY);

/// Free nodes.
#[derive(Clone, Copy)]
pub(super) struct List {
    head: u32,
    count: u32,
}

impl List {
    pub const EMPTY: List = List { head: NO_NODE, count: 0 };
}

/// How many nodes there are; each can be looked up.
pub(super) fn made() -> usize {
    MADE.load(Ordering::Acquire)
}

/// The node with this index.
#[inline]
pub(super) fn node(index: u64) -> Option<&'static Node> {
    if index >= made() as u64 {
        return None;
    }
    let (segment, offset) = place(index as usize);
    let nodes = SEGMENT.get(segment)?.load(Ordering::Relaxed);
    // SAFETY: `MADE` counts nodes that were written, in segments that are in place for ever.
    Some(unsafe { &*nodes.add(offset) })
}

#[inline]
fn place(index: usize) -> (usize, usize) {
    let shifted = index + (1 << FIRST);
    let order = shifted.ilog2();
    ((order - FIRST) as usize, shifted - (1 << order))
}

/// Takes a node and gives it a stack.
pub(super) fn take(local: &Local, lease: Lease) -> Result<&'static Node, Error> {
    if local.free.get().head == NO_NODE {
        refill(local)?;
    }
    let list = local.free.get();
    let Some(node) = node(u64::from(list.head)) else { lied(list.head) };
    if node.stage.get() != Stage::Free {
        lied(list.head);
    }
    local.free.set(List { head: node.next_free.get(), count: list.count.wrapping_sub(1) });
    node.slot.set(lease.slot().as_ptr());
    node.lease.set(Some(lease));
    Ok(node)
}

#[cold]
fn lied(index: u32) -> ! {
    tamper::end(Tampered { evidence: "a free list named a continuation that is in use", slot: index as usize })
}

/// Gives a node and its stack back; nothing is on the stack any more.
pub(super) fn give(local: &Local, node: &'static Node) {
    node.set_state(slot_state::DONE);
    node.stage.set(Stage::Free);
    node.slot.set(null_mut());
    drop(node.lease.take());
    let list = local.free.get();
    node.next_free.set(list.head);
    local.free.set(List { head: node.index, count: list.count + 1 });
    if list.count >= 2 * BATCH {
        give_up(local, BATCH);
    }
}

/// Moves `count` of a thread's free nodes to the table.
#[cold]
pub(super) fn give_up(local: &Local, count: u32) {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut list = local.free.get();
    for _ in 0..count.min(list.count) {
        let Some(node) = node(u64::from(list.head)) else { lied(list.head) };
        let next = node.next_free.replace(free.head);
        *free = List { head: list.head, count: free.count + 1 };
        list = List { head: next, count: list.count - 1 };
    }
    local.free.set(list);
}

/// How many nodes a thread has to spare.
pub(super) fn spare(local: &Local) -> u32 {
    local.free.get().count
}

/// Leaves what the thread would have had to resume to nobody.
pub(super) fn orphan(local: &Local) {
    let id = local.id.get();
    let nodes = (0..made() as u64).filter_map(node);
    for node in nodes.filter(|node| node.owner.load(Ordering::Relaxed) == id && node.handle().is_some()) {
        node.owner.store(NOBODY, Ordering::Release);
    }
}

#[cold]
fn refill(local: &Local) -> Result<(), Error> {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut list = List::EMPTY;
    while list.count < BATCH {
        let index = if free.head == NO_NODE {
            match make() {
                Ok(index) => index,
                Err(_) if list.count != 0 => break,
                Err(error) => return Err(error),
            }
        } else {
            let index = free.head;
            let Some(node) = node(u64::from(index)) else { lied(index) };
            *free = List { head: node.next_free.get(), count: free.count.wrapping_sub(1) };
            index
        };
        let Some(node) = node(u64::from(index)) else { lied(index) };
        node.next_free.set(list.head);
        list = List { head: index, count: list.count + 1 };
    }
    local.free.set(list);
    Ok(())
}

/// Makes one more node, under the lock of the free list.
fn make() -> Result<u32, Error> {
    let index = MADE.load(Ordering::Relaxed);
    let (segment, offset) = place(index);
    let bytes = size_of::<Node>() << (segment as u32 + FIRST);
    let Some(anchor) = SEGMENT.get(segment) else {
        return Err(Error::Memory { what: "continuations", bytes, errno: libc::ENOMEM });
    };
    if anchor.load(Ordering::Relaxed).is_null() {
        let mapped = system::map("continuations", bytes)?;
        anchor.store(std::ptr::with_exposed_provenance_mut(mapped), Ordering::Relaxed);
    }
    // SAFETY: the segment is mapped, page-aligned, and has this many nodes; this one is nobody's yet.
    unsafe { anchor.load(Ordering::Relaxed).add(offset).write(Node::empty(index as u32)) };
    MADE.store(index + 1, Ordering::Release);
    Ok(index as u32)
}
