//! What a thread keeps: its number, its key domain, the continuation that it runs, nodes to spare.

use super::node::{self, ANYBODY, List, Node};
use crate::error::Error;
use crate::features::{self, Domain};
use crate::published;
use crate::thread::Thread;
use std::cell::{Cell, RefCell};
use std::ptr::null;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// A thread's own part.
pub(super) struct Local {
    /// Unlike any other thread's of the process; 0 before the first use.
    pub id: Cell<u64>,
    /// Its key domain as it was then.
    pub domain: Cell<u32>,
    /// The continuation that runs; null on the thread's own stack.
    pub current: Cell<*const Node>,
    pub free: Cell<List>,
    /// How many suspended continuations are this thread's alone.
    pub left: Cell<u64>,
    /// A continuation that has been suspended and is to be anybody's, as soon as nothing runs on its stack any more.
    pub leaving: Cell<*const Node>,
}

impl Local {
    /// Said on the stack that a switch has come to, before anything else: lets every thread of the domain have what was left behind.
    /// Until then the handle is this thread's, which is busy: another thread that guesses it would resume a stack that still runs.
    #[inline]
    pub fn settle(&self) {
        // SAFETY: nodes are never unmapped.
        if let Some(node) = unsafe { self.leaving.replace(null()).as_ref() } {
            self.left.set(self.left.get().wrapping_sub(1));
            // With the switch in front of it, for whoever acquires it in `claim_anybodys`.
            node.owner.store(ANYBODY, Ordering::Release);
        }
    }
}

thread_local! {
    static LOCAL: Local = const {
        Local {
            id: Cell::new(0),
            domain: Cell::new(0),
            current: Cell::new(null()),
            free: Cell::new(List::EMPTY),
            left: Cell::new(0),
            leaving: Cell::new(null()),
        }
    };
    /// What has to be undone when the thread ends; apart, so that `LOCAL` needs no look at whether it was.
    static END: RefCell<Option<End>> = const { RefCell::new(None) };
}

struct End {
    _attached: Thread,
}

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: this thread's.
        let local = unsafe { &*here() };
        node::give_up(local, node::spare(local));
        if local.left.get() != 0 {
            node::orphan(local);
        }
    }
}

static THREADS: AtomicU64 = AtomicU64::new(1);
static DOMAINS: Mutex<Vec<Domain>> = Mutex::new(Vec::new());

/// The calling thread's part. Asked again behind every switch: the stack may have changed threads, and the compiler knows nothing of it.
#[inline(never)]
pub(super) fn here() -> *const Local {
    let local = LOCAL.with(std::ptr::from_ref);
    // SAFETY: no instruction. It may read and write memory for all the compiler knows, so that two calls are two.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
    local
}

/// The same, for a thread that may not have been here before: attaches it.
#[inline]
pub(super) fn ready() -> Result<*const Local, Error> {
    let local = here();
    // SAFETY: this thread's.
    if unsafe { &*local }.id.get() == 0 {
        // SAFETY: as above.
        first_time(unsafe { &*local })?;
    }
    Ok(local)
}

#[cold]
fn first_time(local: &Local) -> Result<(), Error> {
    let attached = Thread::attach()?;
    // A coroutine that is suspended may have continuations on its stacks from now on, which is looked for in that mode.
    published::add_mode(published::MODE_MANAGED)?;
    let domain = number_of(attached.domain())?;
    END.try_with(|end| *end.borrow_mut() = Some(End { _attached: attached }))
        .map_err(|_| Error::Thread("it is ending"))?;
    local.domain.set(domain);
    local.id.set(THREADS.fetch_add(1, Ordering::Relaxed));
    Ok(())
}

/// A number for a domain: equal for equal ones.
fn number_of(domain: Domain) -> Result<u32, Error> {
    let mut domains = DOMAINS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(index) = domains.iter().position(|known| *known == domain) {
        return Ok(index as u32);
    }
    domains.try_reserve(1).map_err(|_| Error::Memory {
        what: "key domains",
        bytes: size_of::<Domain>(),
        errno: libc::ENOMEM,
    })?;
    domains.push(domain);
    Ok(domains.len() as u32 - 1)
}

/// Whether the thread still is of the domain that it was of: keys can be changed.
pub(super) fn unchanged(local: &Local) -> bool {
    let now = features::domain();
    let domains = DOMAINS.lock().unwrap_or_else(PoisonError::into_inner);
    domains.get(local.domain.get() as usize) == Some(&now)
}
