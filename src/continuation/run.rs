//! The two sides of a switch: who resumes a continuation waits in [`run`]; what a stack does first and last is [`first`].
//!
//! ```text
//!  resumer's stack                     a chain, resumed as one                        off the stacks
//!  | resume: Wait | <--- wait ----- | first ... resume: Wait | <--- | last |          Node per stack: wait, parent, inbox
//!       ^   handlers, room for values,   handlers, ...
//!       |   note                                  a search for a tag goes from last to first to the resumer
//!       +--- what a stack has to say stands in the note of the Wait that it goes to
//! ```
//! The word that a switch passes: towards a continuation the `Wait`, towards a resumer the thread's [`Local`].

use super::local::{self, Local};
use super::node::{self, Inbox, Node, Stage};
use super::{Cont, Entry, Handler, Woken};
use crate::abi::{Slot, slot_state};
use crate::pac::Tampered;
use crate::switch::{self, Thrown};
use crate::tamper;
use crate::thread::{self, Detached};
use std::any::Any;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
#[cfg(target_arch = "aarch64")]
use std::ptr::from_ref;
use std::ptr::null;

/// What a continuation is resumed for.
#[derive(Clone, Copy)]
pub(super) enum Request {
    /// To go on.
    Run,
    /// To call this on top of its frames.
    Throw(Thrown, usize),
    /// To run its destructors and end.
    Unwind,
    /// To come back at once, each stack of the chain by itself.
    Detach,
    /// To make room for arguments on its stack and come back.
    Start,
}

/// What a continuation says when it comes back.
#[derive(Default)]
pub(super) enum Note {
    #[default]
    Nothing,
    Returned(usize),
    Thrown(usize),
    Panicked(Box<dyn Any + Send>),
    Suspended {
        tag: u64,
        count: usize,
        cont: Cont,
    },
    /// To run this chain in its stead.
    Switch(&'static Node),
    Detached,
    Started,
}

/// What a continuation is unwound with to end it.
pub(super) struct Unwinding;

/// What a resumer waits with, on its own stack.
pub(super) struct Wait {
    pub handlers: *const [Handler],
    /// Where values go that it is passed, and how many it takes.
    pub out: *mut u64,
    pub room: usize,
    pub request: Cell<Request>,
    /// The thread that resumed.
    pub local: Cell<*const Local>,
    pub note: Cell<Note>,
    /// The continuation that runs again when it comes back; null where none did.
    pub on: Cell<*const Node>,
    /// Who ended, when it says so.
    pub done: Cell<*const Node>,
}

impl Wait {
    pub fn new(handlers: &[Handler], values: &mut [u64], request: Request) -> Wait {
        Wait {
            handlers,
            out: values.as_mut_ptr(),
            room: values.len(),
            request: Cell::new(request),
            local: Cell::new(null()),
            note: Cell::new(Note::Nothing),
            on: Cell::new(null()),
            done: Cell::new(null()),
        }
    }

    /// Copies values to the resumer, who has room for them.
    pub fn put(&self, values: &[u64]) {
        // SAFETY: `out` has room for `room` values while the resumer waits, and the caller compared.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.out, values.len().min(self.room)) }
    }
}

fn impossible(node: *const Node) -> ! {
    tamper::end(Tampered { evidence: "a continuation came back where none waited for it", slot: node.addr() })
}

/// Runs a chain that the caller claimed until something comes back that is the caller's.
///
/// # Safety
/// `local` is this thread's; `last` is claimed, its inbox has what is passed; `wait` is the caller's own.
#[inline]
pub(super) unsafe fn run(mut local: *const Local, mut last: &'static Node, wait: &Wait) -> (Note, *const Local) {
    // SAFETY: this thread's.
    let on = unsafe { &*local }.current.get();
    wait.on.set(on);
    let mark = 0_u8;
    // Also where there is none: this may be a coroutine's stack, and another continuation resume that later ([`Inside`]).
    // SAFETY: a node that runs is in use.
    let barrier = on.is_null() || !unsafe { &*on }.holds((&raw const mark).addr());
    loop {
        // SAFETY: nodes are never unmapped; the chain's are this thread's, since `last` is.
        let first = unsafe { &*last.first.get() };
        first.wait.set(wait);
        first.parent.set(wait.on.get());
        first.barrier.set(barrier);
        last.set_state(slot_state::RUNNING);
        wait.local.set(local);
        // SAFETY: this thread's.
        unsafe { &*local }.current.set(last);
        let word = std::ptr::from_ref(wait).expose_provenance();
        // SAFETY: the chain was suspended as one, by this module, and belongs to this thread's domain (`claim`).
        let passed = unsafe { switch::resume_through(last.slot(), first.slot(), word) };
        // The stack may be on another thread now: who came back says on which.
        local = std::ptr::with_exposed_provenance(passed.value);
        // SAFETY: what is passed towards a resumer is the thread's own part.
        let here = unsafe { &*local };
        here.current.set(wait.on.get());
        here.settle();
        if passed.finished {
            // SAFETY: who ends names itself, and does not run any more.
            node::give(here, unsafe { &*wait.done.get() });
        }
        match wait.note.take() {
            Note::Switch(to) => last = to,
            Note::Detached if !matches!(wait.request.get(), Request::Detach) => {
                // SAFETY: only stacks of a chain are detached, so the caller runs on a continuation's own stack.
                unsafe { leave(&*wait.on.get(), local) }
            }
            note => return (note, local),
        }
    }
}

/// Suspends one stack of a chain whose frames are to be dropped.
///
/// # Safety
/// The caller runs on its stack, on the thread of `local`.
unsafe fn leave(node: &Node, local: *const Local) -> ! {
    // SAFETY: who resumed it waits.
    unsafe { &*node.wait.get() }.note.set(Note::Detached);
    node.set_state(slot_state::SUSPENDED);
    // SAFETY: the caller's.
    unsafe { switch::suspend(node.slot(), local.expose_provenance()) };
    impossible(node)
}

/// What the thread notes of frames on the stacks from `last` to `first`, taken out for as long as these do not run.
#[inline]
pub(super) fn detached(last: &'static Node, first: &'static Node) -> Option<Detached> {
    if !thread::has_records() {
        return None;
    }
    let holds = |address| chain(last, first).any(|node| node.holds(address));
    Detached::of_stacks(holds)
}

/// Notes it for the thread that runs them now. A call of its own, so that no thread's address is kept over a switch.
#[cold]
#[inline(never)]
fn attach(detached: Detached) {
    detached.attach();
}

/// The continuations on stacks that a coroutine is suspended with. Who resumes the coroutine next may be another one than did before, and that one
/// may have ended by then.
pub(crate) struct Inside {
    last: &'static Node,
    first: &'static Node,
}

impl Inside {
    /// The thread's current continuations from the innermost to the one that the coroutine with this stack resumed. They are not
    /// current any more: who resumed the coroutine is. `None` where no continuation was resumed from there.
    pub(crate) fn detach(coroutine: &Range<usize>) -> Option<Inside> {
        // SAFETY: this thread's.
        let local = unsafe { &*local::here() };
        // SAFETY: nodes are never unmapped, and those that run on this thread are in use.
        let last = unsafe { local.current.get().as_ref() }?;
        let mut first = last;
        // Who resumed it keeps its `Wait` on its own stack.
        while !coroutine.contains(&first.wait.get().addr()) {
            // SAFETY: as above.
            first = unsafe { first.parent.get().as_ref() }?;
        }
        // SAFETY: who resumed it waits.
        local.current.set(unsafe { &*first.wait.get() }.on.get());
        Some(Inside { last, first })
    }

    /// They run again, and within who resumed the coroutine. A call of its own, so that no thread's address is kept over a switch.
    #[inline(never)]
    pub(crate) fn attach(self) {
        // SAFETY: this thread's.
        let local = unsafe { &*local::here() };
        let on = local.current.replace(self.last);
        self.first.parent.set(on);
        // SAFETY: who resumed it waits, on the coroutine's stack.
        unsafe { &*self.first.wait.get() }.on.set(on);
    }
}

/// What a continuation does when it was suspended and is resumed: `word` was passed to it.
///
/// # Safety
/// The caller runs on the node's stack and was just resumed.
#[inline]
pub(super) unsafe fn woken(node: &Node, word: usize, detached: Option<Detached>) -> Woken {
    // SAFETY: what is passed towards a continuation is what its resumer waits with.
    let wait = unsafe { &*std::ptr::with_exposed_provenance::<Wait>(word) };
    // SAFETY: the thread that resumed is this one.
    unsafe { &*wait.local.get() }.settle();
    let filled = node.inbox.replace(Inbox::NONE).filled;
    let request = wait.request.get();
    if let Some(detached) = detached
        && !matches!(request, Request::Detach)
    {
        attach(detached);
    }
    match request {
        Request::Run => Woken::Resumed { count: filled },
        // SAFETY: the caller's.
        request => unsafe { asked(node, wait, request) },
    }
}

#[cold]
unsafe fn asked(node: &Node, wait: &Wait, request: Request) -> Woken {
    if !matches!(request, Request::Detach) {
        wait.request.set(Request::Run);
    }
    match request {
        // SAFETY: who threw answers for the function.
        Request::Throw(f, arg) => Woken::Thrown { word: unsafe { f(arg) } },
        Request::Unwind => resume_unwind(Box::new(Unwinding)),
        // SAFETY: the caller's; the resumer's thread is this one.
        Request::Detach => unsafe { leave(node, wait.local.get()) },
        Request::Run | Request::Start => impossible(node),
    }
}

/// The stacks of a chain, from the last to the first. Each can be given back when it was said.
pub(super) fn chain(last: &'static Node, first: *const Node) -> impl Iterator<Item = &'static Node> {
    let mut next = Some(last);
    std::iter::from_fn(move || {
        let node = next?;
        // SAFETY: nodes are never unmapped.
        next = if std::ptr::eq(node, first) { None } else { unsafe { node.parent.get().as_ref() } };
        Some(node)
    })
}

/// How a continuation's entry function ended.
enum Ended {
    Returned,
    Thrown(usize),
}

/// The word that a continuation's first function is prepared with: which node, and on arm64 what seals its entry function and that one's
/// argument. The stubs seal the word itself with the stack's context, so that neither can be taken from an earlier continuation.
pub(super) fn word_of(node: &Node, entry: Entry, data: usize) -> usize {
    seal(node, entry, data) as usize | node.index() as usize
}

/// The node's number, in a word of [`word_of`].
const INDEX: usize = u32::MAX as usize;

#[cfg(target_arch = "aarch64")]
unsafe extern "C-unwind" {
    fn cfi_stack_seal_entry(entry: Entry, data: usize, place: *const ()) -> u64;
    fn cfi_stack_call_entry(
        entry: Entry,
        data: usize,
        place: *const (),
        seal: u64,
        values: *mut u64,
        count: usize,
    ) -> usize;
}

/// 32 bits, in the upper half.
#[cfg(target_arch = "aarch64")]
fn seal(node: &Node, entry: Entry, data: usize) -> u64 {
    // SAFETY: computes on registers; a `Thread` exists, so that the mode is known.
    unsafe { cfi_stack_seal_entry(entry, data, from_ref(node).cast()) }
}

/// Calls the entry function; another one than was sealed, or another argument, ends the process.
///
/// # Safety
/// The entry function's contract.
#[cfg(target_arch = "aarch64")]
unsafe fn call(entry: Entry, node: &Node, seal: usize, values: *mut u64, count: usize) -> usize {
    // SAFETY: the caller's.
    unsafe { cfi_stack_call_entry(entry, node.data.get(), from_ref(node).cast(), seal as u64, values, count) }
}

/// Nothing is sealed on this ISA.
#[cfg(not(target_arch = "aarch64"))]
fn seal(_: &Node, _: Entry, _: usize) -> u64 {
    0
}

/// Calls the entry function.
///
/// # Safety
/// The entry function's contract.
#[cfg(not(target_arch = "aarch64"))]
unsafe fn call(entry: Entry, node: &Node, _: usize, values: *mut u64, count: usize) -> usize {
    // SAFETY: the caller's.
    unsafe { entry(node.data.get(), values, count) }
}

/// The first function on every continuation's stack, with room for `N` values.
///
/// # Safety
/// Called by the stubs alone, on the stack of the node of which `data` is the word.
unsafe extern "C" fn first<const N: usize>(word: usize, data: usize, _: *mut Slot) -> usize {
    let mut block = [const { MaybeUninit::<u64>::uninit() }; N];
    let Some(node) = node::node((data & INDEX) as u64) else { impossible(null()) };
    // SAFETY: the caller's; the block has room for the parameters and the results, which chose it.
    unsafe { begin(word, node, data & !INDEX, block.as_mut_ptr().cast()) }
}

/// # Safety
/// As [`first`]; `block` lies on the stack and has room for the node's parameters and for its results.
#[inline(never)]
unsafe fn begin(word: usize, node: &'static Node, seal: usize, block: *mut u64) -> usize {
    // SAFETY: what is passed towards a continuation is what its resumer waits with.
    let mut wait = unsafe { &*std::ptr::with_exposed_provenance::<Wait>(word) };
    // SAFETY: the thread that resumed is this one.
    unsafe { &*wait.local.get() }.settle();
    if matches!(wait.request.get(), Request::Start) {
        node.inbox.set(Inbox { at: block, room: node.params.get(), filled: 0 });
        node.stage.set(Stage::Started);
        node.set_state(slot_state::SUSPENDED);
        wait.note.set(Note::Started);
        // SAFETY: this function runs on the node's stack.
        let word = unsafe { switch::suspend(node.slot(), wait.local.get().expose_provenance()) };
        // SAFETY: as above.
        wait = unsafe { &*std::ptr::with_exposed_provenance::<Wait>(word) };
        // SAFETY: as above.
        unsafe { &*wait.local.get() }.settle();
    } else {
        let passed = node.inbox.get();
        // SAFETY: for a fresh continuation the inbox names what its resumer passes, who waits or is suspended; `room` is the parameters' count.
        unsafe { std::ptr::copy_nonoverlapping(passed.at, block, passed.filled.min(node.params.get())) };
        node.inbox.set(Inbox { at: block, ..passed });
        let from = node.from.replace(Cont::NULL);
        if from != Cont::NULL {
            // SAFETY: who switched saw that there is room.
            unsafe { append(node, &from.words()) };
        }
    }
    let count = node.inbox.replace(Inbox::NONE).filled;
    let request = wait.request.replace(Request::Run);
    node.stage.set(Stage::Begun);
    let ended = catch_unwind(AssertUnwindSafe(|| match request {
        Request::Run => {
            let Some(entry) = node.entry.get() else { impossible(node) };
            // SAFETY: whoever made the continuation answers for the function; the block lies further up on this stack.
            match unsafe { call(entry, node, seal, block, count) } {
                0 => Ended::Returned,
                word => Ended::Thrown(word),
            }
        }
        // SAFETY: who threw answers for the function.
        Request::Throw(f, arg) => Ended::Thrown(unsafe { f(arg) }),
        Request::Unwind => resume_unwind(Box::new(Unwinding)),
        Request::Detach | Request::Start => impossible(node),
    }));
    // SAFETY: who resumed it waits.
    let wait = unsafe { &*node.wait.get() };
    wait.done.set(node);
    wait.note.set(match ended {
        Ok(Ended::Returned) => {
            // SAFETY: the block has room for the results; the function wrote them.
            wait.put(unsafe { std::slice::from_raw_parts(block, node.results.get()) });
            Note::Returned(node.results.get())
        }
        Ok(Ended::Thrown(word)) => Note::Thrown(word),
        Err(payload) => Note::Panicked(payload),
    });
    local::here().expose_provenance()
}

/// Adds values to a node's inbox.
///
/// # Safety
/// The inbox names a buffer with room for them.
#[inline]
pub(super) unsafe fn append(node: &Node, values: &[u64]) {
    let inbox = node.inbox.get();
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), inbox.at.add(inbox.filled), values.len()) };
    node.inbox.set(Inbox { filled: inbox.filled + values.len(), ..inbox });
}

/// The first function with room for so many values, and the bytes that it takes for them; `None` when there is none that large.
pub(super) fn entry_for(values: usize) -> Option<(switch::Entry, usize)> {
    let (entry, room): (switch::Entry, usize) = match values {
        0 => (first::<0>, 0),
        1..=4 => (first::<4>, 4),
        5..=16 => (first::<16>, 16),
        17..=64 => (first::<64>, 64),
        65..=256 => (first::<256>, 256),
        257..=1024 => (first::<1024>, 1024),
        _ => return None,
    };
    Some((entry, room * size_of::<u64>()))
}
