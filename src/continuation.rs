//! Continuations, as an engine for effect handlers or Wasm stack switching needs them.
//!
//! A continuation is the rest of a computation: one stack, or a chain of stacks that was suspended as one. It can be used once. Every use
//! consumes its handle, and suspending makes a new one; a handle that was consumed, that has ended or that never was is [`Error::Consumed`].
//!
//! ```text
//!  new ---> fresh ---resume---> runs ---return, uncaught throw or panic---> ended
//!             |  ^ bind           |  ^
//!             |                   |  | resume, switch, throw; bind makes a new handle of the same
//!             |       suspend, or v  |
//!             |       switch away  suspended
//!             +---------cancel--------+------------------------------------> ended
//! ```
//! | the Wasm proposal | here |
//! |---|---|
//! | `cont.new` | [`new`] |
//! | `cont.bind` | [`bind`] |
//! | `resume` with `(on $tag $label)` and `(on $tag switch)` | [`resume`] with [`Handler`]s |
//! | `resume_throw` | [`throw`] |
//! | `suspend` | [`suspend`] |
//! | `switch` | [`switch`] |
//!
//! Handles, tags and values are plain words; a handle can be copied, kept anywhere and made up, and what comes of it is a typed error.
//! Values are passed in buffers that the receiver provides: those of a suspended continuation lie on its own stack as a rule, so that what is
//! bound to it is kept there. Panics are caught at a stack's base and raised again where it was resumed. MXCSR, the x87 control word
//! and FPCR are kept for each stack.
//!
//! **Threads.** A continuation belongs to the thread that ran it first: native code on it may have kept addresses of that thread's variables.
//! One that was declared to hold nothing of the kind ([`Shape::may_migrate`]) can be resumed by every thread of the same key domain. When a
//! thread ends, what it leaves suspended can be cancelled without destructors by any thread of the domain.
//!
//! **Key domains.** Threads that share pointer-authentication keys and the shadow mode are a domain. A continuation is resumed in the
//! domain that it was made in, or not at all ([`Error::Thread`]). It cannot be parked under a key that two domains share: that would mean to
//! sign every return address on its stack anew, which is possible only where a code map describes every frame. At the base of
//! each pooled stack lie native frames of this library, and native code of the engine's may lie anywhere. A thread that changes its keys while it has
//! suspended continuations is not asked again before each resume: the seals are what stops it.
//!
//! **Other faces.** A search for a handler ends at a stack of another face: a coroutine inside of a continuation is never suspended with it.

mod collect;
mod local;
mod node;
mod run;
mod suspend;
#[cfg(test)]
mod tests;

pub use collect::{Leak, Suspended, for_each_suspended, leaks};
pub(crate) use run::Inside;
pub use suspend::{suspend, switch};

use crate::abi::slot_state;
use crate::error::Error;
use crate::pool::{self, Lease, Quota};
use crate::switch as stubs;
use crate::thread::Thread;
use local::Local;
use node::{ANYBODY, Inbox, Node, Stage};
use run::{Note, Request, Unwinding, Wait};
use std::panic::{Location, resume_unwind};
use std::sync::atomic::Ordering;

pub use crate::switch::Thrown;

/// A handle of a suspended continuation, or of one that has not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Cont {
    node: u64,
    generation: u64,
}

impl Cont {
    /// The handle of none.
    pub const NULL: Cont = Cont { node: 0, generation: 0 };

    /// As two plain words, which is how [`switch`] passes it.
    pub const fn words(self) -> [u64; 2] {
        [self.node, self.generation]
    }

    /// From two plain words. Words that are no handle's give a handle that is consumed.
    pub const fn from_words(words: [u64; 2]) -> Cont {
        Cont { node: words[0], generation: words[1] }
    }
}

/// What runs on a continuation: `entry(data, values, count)`. `values` holds the `count` arguments that were passed and has room for the
/// declared parameters and for the declared results; it is valid until the function returns. Returns 0 when the results stand in
/// `values`, else the word of an exception that nothing on this stack caught.
///
/// A Rust panic may leave it; an exception of another language that does ends the process.
pub type Entry = unsafe extern "C-unwind" fn(data: usize, values: *mut u64, count: usize) -> usize;

/// What a continuation is made with.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Shape {
    /// Bytes of stack; there are at least as many.
    pub size: usize,
    /// Values that the entry function takes, at most 1024. The continuation that [`switch`] adds counts two.
    pub params: usize,
    /// Values that it returns, at most 1024.
    pub results: usize,
    /// Whether another thread of the key domain may resume it after it ran.
    pub may_migrate: bool,
}

/// What a resumer handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Handler {
    /// The tag; what it stands for is the caller's business.
    pub tag: u64,
    /// By what.
    pub on: On,
}

/// How a tag is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum On {
    /// [`suspend`] comes back to the resumer.
    Suspend,
    /// [`switch`] runs another continuation in place of the one that the resumer resumed.
    Switch,
}

/// How a continuation came back to who resumed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum Outcome {
    /// Its entry function returned; the first `count` of the resumer's values are its results.
    Returned {
        /// How many.
        count: usize,
    },
    /// It suspended itself with a tag that the resumer handles; the first `count` of the resumer's values are what it passed.
    Suspended {
        /// The tag.
        tag: u64,
        /// How many.
        count: usize,
        /// The rest of it.
        cont: Cont,
    },
    /// It ended with an exception that nothing on its stack caught.
    Thrown {
        /// The word that its entry function returned, or that what was thrown into it before it ran did.
        word: usize,
    },
}

/// Why [`suspend`] or [`switch`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum Woken {
    /// The continuation was resumed; the first `count` of its values are what was passed.
    Resumed {
        /// How many.
        count: usize,
    },
    /// Somebody threw into it, and what was thrown returned instead of unwinding.
    Thrown {
        /// What it returned.
        word: usize,
    },
}

/// Makes a continuation that will call `entry(data, ...)` on a stack of its own.
///
/// # Errors
/// [`Error::Size`] for a stack of 0 bytes or a huge one, for more parameters or results than 1024, and for more than a quarter of the stack
/// has room for. [`Error::Memory`], [`Error::Budget`] when there is none. [`Error::Thread`] as [`Thread::attach`].
///
/// # Safety
/// `entry` is valid for `data` whenever the continuation is first resumed, and reads and writes `values` within the declared counts. Where
/// `may_migrate` is declared, nothing that is on the stack while it is suspended depends on the thread: no native
/// frame that may have cached the address of a thread-local variable, no guard of a lock that a thread owns.
#[track_caller]
pub unsafe fn new(thread: &Thread, entry: Entry, data: usize, shape: Shape) -> Result<Cont, Error> {
    // SAFETY: the caller's.
    unsafe { make(thread, entry, data, shape, pool::lease) }
}

/// As [`new`], with a stack that counts against a quota until the continuation has ended.
///
/// # Errors
/// [`Error::Quota`] when the quota has no room; else as [`new`].
///
/// # Safety
/// As [`new`].
#[track_caller]
pub unsafe fn new_for(quota: &Quota, thread: &Thread, entry: Entry, data: usize, shape: Shape) -> Result<Cont, Error> {
    // SAFETY: the caller's.
    unsafe { make(thread, entry, data, shape, |size| pool::lease_for(quota, size)) }
}

#[track_caller]
#[inline(always)]
unsafe fn make(
    _: &Thread,
    entry: Entry,
    data: usize,
    shape: Shape,
    lease: impl FnOnce(usize) -> Result<Lease, Error>,
) -> Result<Cont, Error> {
    let local = local::ready()?;
    // SAFETY: this thread's.
    let local = unsafe { &*local };
    let values = shape.params.max(shape.results);
    let too_many = Error::Size {
        bytes: values.saturating_mul(8),
        rule: "parameters and results take at most a quarter of their stack",
    };
    let Some((first, block)) = run::entry_for(values) else { return Err(too_many) };
    let lease = lease(shape.size)?;
    if block > lease.size() / 4 {
        return Err(too_many);
    }
    let node = node::take(local, lease)?;
    node.first.set(node);
    node.inbox.set(Inbox { room: shape.params, ..Inbox::NONE });
    node.from.set(Cont::NULL);
    node.entry.set(Some(entry));
    node.data.set(data);
    node.params.set(shape.params);
    node.results.set(shape.results);
    node.pinned.set(!shape.may_migrate);
    node.cancelling.set(false);
    node.domain.set(local.domain.get());
    node.home.set(local.id.get());
    node.owner.store(ANYBODY, Ordering::Relaxed);
    // SAFETY: the lease is the node's, its stack is empty.
    unsafe { stubs::prepare(node.slot(), first, run::word_of(node, entry, data)) };
    let place = std::ptr::from_ref(Location::caller()).cast_mut();
    node.created.store(place, Ordering::Relaxed);
    // SAFETY: the slot is leased to the node.
    unsafe { node.slot().as_ref() }.created.store(place, Ordering::Relaxed);
    node.set_state(slot_state::READY);
    node.stage.set(Stage::Fresh);
    Ok(node.hand_out())
}

const FOREIGN: Error = Error::Thread("the continuation belongs to the thread that ran it first");
const OTHER_DOMAIN: Error = Error::Thread("the continuation belongs to another key domain or shadow mode");

/// Consumes a handle: who succeeds has the continuation.
#[inline]
fn claim(local: &Local, cont: Cont) -> Result<&'static Node, Error> {
    let node = node::node(cont.node).ok_or(Error::Consumed)?;
    if cont.generation & 1 != 0 || node.generation.load(Ordering::Acquire) != cont.generation {
        return Err(Error::Consumed);
    }
    if node.owner.load(Ordering::Relaxed) == local.id.get() {
        // Nobody else can get past the line above.
        node.generation.store(cont.generation.wrapping_add(1), Ordering::Relaxed);
        local.left.set(local.left.get().wrapping_sub(1));
        return Ok(node);
    }
    claim_anybodys(local, node, cont.generation, ANYBODY)
}

/// The same for a node whose owner is no thread, or, when the frames will never run, a thread that ended.
fn claim_anybodys(local: &Local, node: &'static Node, generation: u64, or_owner: u64) -> Result<&'static Node, Error> {
    // Acquired: it is anybody's from when its stack was left, later than its generation says.
    let owner = node.owner.load(Ordering::Acquire);
    if owner != ANYBODY && owner != or_owner {
        return Err(FOREIGN);
    }
    let next = generation.wrapping_add(1);
    if node.generation.compare_exchange(generation, next, Ordering::Acquire, Ordering::Relaxed).is_err() {
        return Err(Error::Consumed);
    }
    // What keys a thread has can change; nothing runs between two looks at one's own.
    let same = node.domain.get() == local.domain.get();
    if !same || (node.home.get() != local.id.get() && !local::unchanged(local)) {
        node.put_back();
        return Err(OTHER_DOMAIN);
    }
    Ok(node)
}

/// [`Error::Values`] unless the node takes so many more.
#[inline]
fn room_for(node: &Node, count: usize) -> Result<(), Error> {
    let inbox = node.inbox.get();
    let count = inbox.filled.saturating_add(count);
    if count > inbox.room { Err(Error::Values { count, room: inbox.room }) } else { Ok(()) }
}

/// Passes values to a node that has room for them.
#[inline]
fn pass(node: &Node, args: &[u64], from: Option<Cont>) {
    if node.stage.get() == Stage::Fresh {
        node.inbox.set(Inbox { at: args.as_ptr().cast_mut(), filled: args.len(), ..node.inbox.get() });
        node.from.set(from.unwrap_or(Cont::NULL));
        return;
    }
    // SAFETY: there is room (`room_for`), on a stack that is suspended or wherever its owner said.
    unsafe {
        run::append(node, args);
        if let Some(from) = from {
            run::append(node, &from.words());
        }
    }
}

/// The first stack of a claimed chain.
#[inline]
fn first_of(last: &Node) -> &'static Node {
    // SAFETY: nodes are never unmapped, and the chain is the claimer's.
    unsafe { &*last.first.get() }
}

/// Binds arguments: keeps them on the continuation's stack, in front of those that will be passed when it is resumed. Consumes the handle and
/// returns a new one.
///
/// # Errors
/// [`Error::Values`] for more than it takes, [`Error::Consumed`], [`Error::Thread`]. The handle is as it was.
pub fn bind(cont: Cont, args: &[u64]) -> Result<Cont, Error> {
    let mut local = local::ready()?;
    // SAFETY: this thread's.
    let node = claim(unsafe { &*local }, cont)?;
    if let Err(error) = room_for(node, args.len()) {
        // SAFETY: as above.
        put_back(unsafe { &*local }, node);
        return Err(error);
    }
    if !args.is_empty() {
        if node.stage.get() == Stage::Fresh {
            let wait = Wait::new(&[], &mut [], Request::Start);
            // SAFETY: claimed; the library's own function runs and comes back.
            (_, local) = unsafe { run::run(local, node, &wait) };
        }
        pass(node, args, None);
    }
    // SAFETY: this thread's.
    Ok(hand_out(unsafe { &*local }, node))
}

/// Gives a claimed node's next handle out, to the owner that it had.
fn hand_out(local: &Local, node: &Node) -> Cont {
    if node.owner.load(Ordering::Relaxed) == local.id.get() {
        local.left.set(local.left.get().wrapping_add(1));
    }
    node.hand_out()
}

fn put_back(local: &Local, node: &Node) {
    if node.owner.load(Ordering::Relaxed) == local.id.get() {
        local.left.set(local.left.get().wrapping_add(1));
    }
    node.put_back();
}

/// Resumes a continuation and waits until it comes back. While it runs, `handlers` say which suspensions come to this place; the first
/// that fits counts. What it passes goes to `values`, which must have room for its results.
///
/// # Errors
/// [`Error::Values`] for more arguments than it takes or less room than its results need, [`Error::Consumed`], [`Error::Thread`].
/// Nothing ran, and a valid handle still is.
///
/// # Panics
/// With the panic that left the continuation's entry function.
// Behind a switch no return is predicted, so there should be none.
#[inline(always)]
pub fn resume(cont: Cont, handlers: &[Handler], args: &[u64], values: &mut [u64]) -> Result<Outcome, Error> {
    enter(cont, handlers, args, values, Request::Run)
}

/// Resumes a continuation by calling `f(arg)` on its stack, on top of its frames: `f` unwinds to a handler there, or returns a word, which
/// [`suspend`] then says. What it unwinds and nothing on its stack catches is raised again here. On a continuation that never ran nothing
/// else is called; it ends with the word.
///
/// # Errors
/// As [`resume`].
///
/// # Panics
/// As [`resume`].
///
/// # Safety
/// `f` is valid for `arg`, and what it unwinds the frames on the stack let through.
#[inline(never)]
pub unsafe fn throw(
    cont: Cont,
    handlers: &[Handler],
    f: Thrown,
    arg: usize,
    values: &mut [u64],
) -> Result<Outcome, Error> {
    enter(cont, handlers, &[], values, Request::Throw(f, arg))
}

#[inline(always)]
fn enter(
    cont: Cont,
    handlers: &[Handler],
    args: &[u64],
    values: &mut [u64],
    request: Request,
) -> Result<Outcome, Error> {
    let local = local::ready()?;
    // SAFETY: this thread's.
    let node = claim(unsafe { &*local }, cont)?;
    let (needed, room) = (first_of(node).results.get(), values.len());
    let fits = if needed > room { Err(Error::Values { count: needed, room }) } else { room_for(node, args.len()) };
    if let Err(error) = fits {
        // SAFETY: as above.
        put_back(unsafe { &*local }, node);
        return Err(error);
    }
    pass(node, args, None);
    let wait = Wait::new(handlers, values, request);
    // SAFETY: claimed, and what it takes was passed.
    match unsafe { run::run(local, node, &wait) }.0 {
        Note::Returned(count) => Ok(Outcome::Returned { count }),
        Note::Suspended { tag, count, cont } => Ok(Outcome::Suspended { tag, count, cont }),
        Note::Thrown(word) => Ok(Outcome::Thrown { word }),
        Note::Panicked(payload) => resume_unwind(payload),
        // SAFETY: aborts only.
        Note::Nothing | Note::Switch(_) | Note::Detached | Note::Started => std::process::abort(),
    }
}

/// What becomes of the frames of a continuation that is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Frames {
    /// They are unwound, and destructors run; so the stack runs once more. While they do, the continuation cannot be suspended.
    Unwind,
    /// They are dropped, nothing of them runs.
    Skip,
}

/// Ends a continuation and gives its stacks back.
///
/// # Errors
/// [`Error::Consumed`], [`Error::Thread`]; with [`Frames::Skip`] what a thread left that ended is anybody's of its domain.
///
/// # Panics
/// With a panic of another kind that leaves the stack while it is unwound.
///
/// # Safety
/// With [`Frames::Skip`] nothing points into the frames, and nobody relies on a destructor of theirs. With [`Frames::Unwind`] they let
/// a Rust panic through.
#[inline(never)]
pub unsafe fn cancel(cont: Cont, frames: Frames) -> Result<(), Error> {
    let local = local::ready()?;
    // SAFETY: this thread's.
    let here = unsafe { &*local };
    let last = match claim(here, cont) {
        Err(error) if error == FOREIGN && frames == Frames::Skip => {
            let node = node::node(cont.node).ok_or(Error::Consumed)?;
            claim_anybodys(here, node, cont.generation, node::NOBODY)?
        }
        other => other?,
    };
    let begun = last.stage.get() == Stage::Begun;
    if begun && frames == Frames::Unwind {
        for node in run::chain(last, last.first.get()) {
            node.cancelling.set(true);
        }
        let wait = Wait::new(&[], &mut [], Request::Unwind);
        // SAFETY: claimed; what it is passed is asked for only when it is resumed to go on.
        return match unsafe { run::run(local, last, &wait) }.0 {
            Note::Panicked(payload) if !payload.is::<Unwinding>() => resume_unwind(payload),
            _ => Ok(()),
        };
    }
    if !std::ptr::eq(last.first.get(), last) {
        let wait = Wait::new(&[], &mut [], Request::Detach);
        // SAFETY: claimed; only the library's own functions run, and come back.
        unsafe { run::run(local, last, &wait) };
    }
    for node in run::chain(last, last.first.get()) {
        // SAFETY: each stack of the chain is suspended by itself now; the frames are the caller's to drop.
        unsafe { stubs::cancel(node.slot()) };
        // Nothing that ran here can have moved this stack to another thread.
        node::give(here, node);
    }
    Ok(())
}
