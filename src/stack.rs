//! One logical stack: its data segment, its shadow stack, its identity and generation, and the control block that
//! the stubs work on.
//!
//! A stack is idle, runs, or is suspended. While it runs, native code that its managed code called can enter it again; then the entries
//! are nested, and the control block is about the innermost one ([`nested`]). Wherever it stands, its frames lie in one segment and
//! move together ([`moves`]).

mod lifts;
mod moves;
mod nested;
mod park;
#[cfg(test)]
pub(crate) mod played;

pub(crate) use nested::{compact, enter_again, reserve};

pub(crate) mod looked;

use crate::abi::{Activation, Control};
use crate::arch;
use crate::error::{Error, Refusal};
use crate::features::{self, Domain};
use crate::link::Links;
use crate::pac::{RawPc, Tampered};
use crate::plan::Plan;
use crate::policy::Policy;
use crate::published;
use crate::segment::{Segment, boxed, page_size};
use crate::shadow::{ShadowStack, Shadows};
use crate::signer::Signer;
use crate::signer::hardware::Hardware;
use crate::tamper;
use crate::thread::{self, Thread};
use crate::walk::Piece;
use nested::Outer;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// The entry function returned.
const OUTCOME_RETURNED: u64 = 0;
/// `leave` was taken; set by the stub.
const OUTCOME_LEFT: u64 = 1;
/// `grow` could not.
const OUTCOME_FAILED: u64 = 2;
/// `suspend` was taken; set by the stub.
const OUTCOME_SUSPENDED: u64 = 3;
/// `suspend` was refused because entries are nested; set by the stub.
const OUTCOME_NESTED: u64 = 4;

const OTHER_DOMAIN: Error = Error::Thread("the stack belongs to another key domain or shadow-stack mode");

/// How managed code came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The entry function returned this.
    Returned(u64),
    /// Managed code, or the engine's fault handler, left with this code.
    Left(u64),
    /// Managed code suspended the stack with this value: [`Stack::resume`] goes on.
    Suspended(u64),
}

/// What a stack has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Times that the frames moved to a larger segment or, with `relocate_always`, to one of the same size.
    pub growths: u64,
    /// Times that they moved to a smaller one.
    pub shrinks: u64,
    /// Frames moved, the stubs' own included.
    pub frames_moved: u64,
    /// Return addresses that were authenticated and signed again. 0 where nothing is signed.
    pub rebound: u64,
    /// Bytes of stack moved.
    pub bytes_moved: u64,
    /// Moves by page tables: no byte was copied.
    pub page_moves: u64,
    /// Largest data segment so far, in bytes.
    pub largest: u64,
    /// Times that the youngest frames alone were moved, to a further segment.
    pub lifts: u64,
    /// Segments that were made for link calls and lifted frames.
    pub segments: u64,
    /// Shadow segments that were made for link calls.
    pub shadow_segments: u64,
}

/// What happens on a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No frame is on it.
    Idle,
    /// Managed code runs on it, or native code that managed code called.
    Running,
    /// Managed code waits on it for [`Stack::resume`].
    Suspended,
}

/// Everything about a stack that stays off it. The control block comes first: stubs hold its address. `S` authenticates and signs what
/// moves: the CPU, and in tests the software model.
#[repr(C)]
pub(crate) struct Inner<S = Hardware> {
    pub(crate) control: Control,
    /// The current one.
    pub(crate) segment: Segment,
    /// The others that calls went through, and those that they may go to.
    pub(crate) links: Links,
    /// The segment moved from last, inaccessible, where the policy poisons: until the next move.
    previous: Option<Segment>,
    pub(crate) shadows: Option<Shadows>,
    pub(crate) domain: Domain,
    pub(crate) policy: Policy,
    plan: Plan,
    /// The span's pieces during a move.
    pieces: Vec<Piece>,
    pub(crate) stats: Stats,
    failure: Option<Error>,
    activation: Option<NonNull<Activation>>,
    pub(crate) state: State,
    /// In the list of the thread that runs it.
    running: Box<thread::Running>,
    /// The entries around the innermost one, outermost first.
    outer: Vec<Outer>,
    /// Whether frames are being moved.
    moving: bool,
    /// Whether it is parked: then its state is idle or suspended, and nobody may go on with it.
    parked: Option<park::Note>,
    signer: S,
}

/// A stack that managed code runs on.
///
/// It holds the frames of managed code only; native code runs on the thread's own stack. It starts with the policy's
/// initial segment and moves to larger ones as managed code calls `grow`, and to smaller ones when it is asked to.
///
/// It can be sent to another thread while it is idle or suspended: nothing native lies on it. That managed code itself keeps nothing of a
/// thread's is what [`Stack::enter`] and [`Stack::resume`] are promised. A thread of the same key domain goes on with it as it is; one of
/// another only when it was parked before it left: [`Stack::park`].
#[derive(Debug)]
pub struct Stack {
    inner: NonNull<Inner>,
}

// SAFETY: `inner` is owned. A stack that runs is borrowed by `enter` or `resume` until it has stopped, so only idle and suspended ones are
// sent, and those hold managed frames alone, which the engine promises to be no thread's. The thread that goes on must have the same keys and shadow mode:
// each function that uses them asks.
unsafe impl Send for Stack {}

static IDENTITIES: AtomicU64 = AtomicU64::new(1);

impl Stack {
    /// Makes a stack: a data segment with its guard and, where this thread has a shadow stack, a shadow stack that can
    /// hold as many return addresses as the policy's `shadowed` and this segment allow.
    ///
    /// # Errors
    /// [`Error::Policy`], [`Error::Memory`]; nothing stays mapped.
    pub fn new(thread: &Thread, policy: Policy) -> Result<Stack, Error> {
        Stack::sized(thread, policy, 0)
    }

    /// Makes a stack whose first segment has room for `bytes` bytes of frames besides the policy's reserve, so that code which knows its
    /// need never stops to grow. Smaller than the policy's `initial` it will not be.
    ///
    /// # Errors
    /// As for [`Stack::new`]; [`Error::Overflow`] when the policy's maximum does not allow it.
    pub fn with_size(thread: &Thread, policy: Policy, bytes: usize) -> Result<Stack, Error> {
        Stack::sized(thread, policy, bytes.saturating_add(policy.reserve))
    }

    fn sized(thread: &Thread, policy: Policy, needed: usize) -> Result<Stack, Error> {
        policy.validate(page_size())?;
        let size = policy.fitting(needed)?;
        published::add_mode(published::MODE_MANAGED)?;
        let domain = thread.domain();
        let inner = Inner::new(domain, policy, size, Hardware, || match domain.shadow {
            true => Shadows::map(policy.shadow_size(size)).map(Some),
            false => Ok(None),
        })?;
        Ok(Stack { inner: NonNull::from(Box::leak(boxed("a stack's own block", inner)?)) })
    }

    /// Runs `entry(args[0], .., args[3])` on this stack until it returns, leaves or suspends.
    ///
    /// # Errors
    /// [`Error::Busy`] when the activation runs a stack already, [`Error::Thread`] when the thread's keys or shadow mode are
    /// not the stack's, [`Error::Parked`] when it is parked, [`Error::Suspended`] when managed code waits on it. Any other error is why `grow` could
    /// not; the frames are gone then, and the stack is empty and usable.
    ///
    /// # Safety
    /// `entry` and all that it calls on this stack is managed code that follows [`crate::engine`]'s rules: registered, with
    /// the registered layout, checking the activation's limit; no destructor is owed by a frame that `leave` drops.
    /// `thread` is this thread's.
    pub unsafe fn enter(
        &mut self,
        thread: &Thread,
        activation: &Activation,
        entry: RawPc,
        args: [usize; 4],
    ) -> Result<Exit, Error> {
        let inner = self.inner.as_ptr();
        // SAFETY: `inner` is owned by self and not running: `&mut self` is exclusive, and a running stack's `enter`
        // has not returned. The reference ends before the stub runs.
        let control = unsafe { (*inner).begin(thread, activation, State::Idle)? };
        let frame = 0;
        // SAFETY: boxed and not part of the block that the stubs and `grow` write; it leaves the list before `inner` goes.
        let running = unsafe { &*(*inner).running };
        let ended = running.enter(activation, &frame);
        // SAFETY: the caller's for `entry`; `begin` has put control, segment and activation in order.
        let value = unsafe { arch::enter(control, entry, args) };
        drop(ended);
        // SAFETY: the stub has returned, so nobody else uses `inner`.
        unsafe { (*inner).end(activation, value) }
    }

    /// Goes on with the managed code that has suspended this stack: its call of `suspend` returns `value`. Runs until it returns, leaves or
    /// suspends again, on the calling thread and with this activation, which may both be other ones than before.
    ///
    /// # Errors
    /// As for [`Stack::enter`]; [`Error::NotSuspended`] when nothing waits here. After [`Error::Busy`], [`Error::Thread`] and [`Error::Parked`] the
    /// stack is suspended as before: a parked one is not unparked on the way, so that whoever takes it over says so.
    ///
    /// # Safety
    /// As for [`Stack::enter`]. The managed code that waits looks for its activation where the engine put this one, and keeps nothing that
    /// belongs to the thread that it was suspended on: no address of thread-local data, no other activation, and, if its keys are others, no pointer that it has
    /// signed itself with one of them. The floating-point control
    /// registers are those of the thread that resumes.
    pub unsafe fn resume(&mut self, thread: &Thread, activation: &Activation, value: u64) -> Result<Exit, Error> {
        let inner = self.inner.as_ptr();
        // SAFETY: as in `enter`.
        let control = unsafe { (*inner).begin(thread, activation, State::Suspended)? };
        let frame = 0;
        // SAFETY: as in `enter`.
        let running = unsafe { &*(*inner).running };
        let ended = running.enter(activation, &frame);
        // SAFETY: the caller's for the code that waits; `begin` has seen that it does and has put segment and activation in order.
        let value = unsafe { arch::resume(control, value, (*inner).oldest()) };
        drop(ended);
        // SAFETY: as in `enter`.
        unsafe { (*inner).end(activation, value) }
    }

    /// Drops the frames of a suspended stack without running anything of them: the stack is empty and usable. Dropping the stack does the
    /// same and gives its memory back.
    ///
    /// # Errors
    /// [`Error::NotSuspended`]; [`Error::Parked`]; [`Error::Thread`] in another key domain or shadow mode than the stack's. Nothing was
    /// changed then.
    pub fn discard(&mut self) -> Result<(), Error> {
        // SAFETY: owned by self; `&mut self` cannot be had while the stack runs.
        let inner = unsafe { self.inner.as_mut() };
        inner.usable()?;
        if inner.state != State::Suspended {
            return Err(Error::NotSuspended);
        }
        // SAFETY: suspended, so nobody runs on it; the frames are dropped here.
        unsafe { arch::discard(&raw mut inner.control) };
        inner.next_generation();
        Ok(())
    }

    /// Whether managed code waits on this stack for [`Stack::resume`].
    pub fn is_suspended(&self) -> bool {
        self.inner().state == State::Suspended
    }

    /// Makes room for `bytes` bytes of frames, besides the policy's reserve, on an idle or suspended stack.
    ///
    /// # Errors
    /// [`Error::Overflow`], [`Error::Memory`], and for a suspended stack what can keep its frames from moving; [`Error::Parked`];
    /// [`Error::Thread`] in another key domain or shadow mode than the stack's. The stack is as it was.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), Error> {
        // SAFETY: as in `discard`.
        let inner = unsafe { self.inner.as_mut() };
        inner.usable()?;
        untampered(inner.counted(|inner| inner.make_room(bytes, 0)))
    }

    /// Moves an idle or suspended stack to the smallest segment that its frames fit in, with the policy's reserve and `keep`, not below
    /// `initial`. Returns whether there was a smaller one; then the rest of the memory went back to the system.
    ///
    /// # Errors
    /// As for [`Stack::reserve`].
    pub fn shrink_to_fit(&mut self) -> Result<bool, Error> {
        // SAFETY: as in `discard`.
        let inner = unsafe { self.inner.as_mut() };
        inner.usable()?;
        untampered(inner.counted(|inner| inner.shrink(false)))
    }

    /// Does so if the policy's `shrink_below` says that the segment is too large for what is on it.
    ///
    /// # Errors
    /// As for [`Stack::reserve`].
    pub fn compact(&mut self) -> Result<bool, Error> {
        // SAFETY: as in `discard`.
        let inner = unsafe { self.inner.as_mut() };
        inner.usable()?;
        untampered(inner.counted(|inner| inner.shrink(true)))
    }

    /// What the stack has done so far.
    pub fn stats(&self) -> Stats {
        self.inner().stats
    }

    /// Size of the present data segment, in bytes.
    pub fn size(&self) -> usize {
        self.inner().segment.record().size()
    }

    fn inner(&self) -> &Inner {
        // SAFETY: owned by self; `&self` cannot be had while `enter` or `resume` runs.
        unsafe { self.inner.as_ref() }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let inner = self.inner.as_ptr();
        // SAFETY: owned by self.
        let (state, running) = unsafe { ((*inner).state, &*(*inner).running) };
        // A longjmp has left `enter`. The thread on which it did still has the record in its list: unless it is this one, all of it stays.
        if state == State::Running && !running.forget() {
            return;
        }
        // SAFETY: `inner` came from a leaked box and is owned by self; no frame on the stack runs any more, and no thread has its record.
        drop(unsafe { Box::from_raw(inner) });
    }
}

/// An error, or the end of the process for evidence of tampering.
fn untampered<T>(result: Result<T, Refusal>) -> Result<T, Error> {
    result.map_err(|refusal| match refusal {
        Refusal::Error(error) => error,
        Refusal::Tampered(evidence) => tamper::end(evidence),
    })
}

impl<S: Signer> Inner<S> {
    /// An idle one with a segment of `size` bytes and the shadow stack that `shadows` makes.
    fn new(
        domain: Domain,
        policy: Policy,
        size: usize,
        signer: S,
        shadows: impl FnOnce() -> Result<Option<Shadows>, Error>,
    ) -> Result<Inner<S>, Error> {
        let identity = IDENTITIES.fetch_add(1, Ordering::Relaxed);
        let generation = 1;
        let segment = Segment::map(size, policy.guard, identity, generation)?;
        let shadows = shadows()?;
        let first = shadows.as_ref().map(Shadows::first);
        let token = first.map_or(0, ShadowStack::token);
        let level = first.map_or(0, ShadowStack::top);
        Ok(Inner {
            control: Control::new(identity, generation, token, level),
            segment,
            links: Links::default(),
            previous: None,
            shadows,
            domain,
            policy,
            plan: Plan::new(),
            pieces: Vec::new(),
            stats: Stats { largest: size as u64, ..Stats::default() },
            failure: None,
            activation: None,
            state: State::Idle,
            outer: Vec::new(),
            moving: false,
            parked: None,
            running: boxed("a stack's record of its entry", thread::Running::idle())?,
            signer,
        })
    }

    /// Whether the stack is not parked and the calling thread can go on with it.
    fn usable(&self) -> Result<(), Error> {
        match self.parked {
            Some(_) => Err(Error::Parked),
            None => self.same_domain(),
        }
    }

    /// Whether the calling thread's keys and shadow mode are the stack's. Asked anew each time: keys can have been reset, and a child of fork can have
    /// changed them, since the thread attached.
    fn same_domain(&self) -> Result<(), Error> {
        if features::domain() == self.domain { Ok(()) } else { Err(OTHER_DOMAIN) }
    }

    /// Makes the stack, which must be in `state`, the activation's. Every check comes before the first write.
    fn begin(&mut self, thread: &Thread, activation: &Activation, state: State) -> Result<*mut Control, Error> {
        if self.parked.is_some() {
            return Err(Error::Parked);
        }
        if self.state != state {
            return Err(match self.state {
                State::Running => Error::Busy,
                State::Suspended => Error::Suspended,
                State::Idle => Error::NotSuspended,
            });
        }
        if thread.domain() != self.domain {
            return Err(OTHER_DOMAIN);
        }
        self.same_domain()?;
        let control = NonNull::from(&mut *self).cast::<Control>().as_ptr();
        activation
            .control
            .compare_exchange(std::ptr::null_mut(), control, Ordering::Acquire, Ordering::Relaxed)
            .map_err(|_| Error::Busy)?;
        if let Some(shadows) = self.shadows.as_ref().filter(|_| state == State::Idle) {
            self.control.shadow_level = shadows.first().top();
        }
        self.control.segment = self.segment.record();
        self.control.outcome = OUTCOME_RETURNED;
        self.control.activation = activation;
        self.control.link = 0;
        self.failure = None;
        self.activation = Some(NonNull::from(activation));
        self.state = State::Running;
        activation.limit.store(self.limit(), Ordering::Relaxed);
        Ok(control)
    }

    fn end(&mut self, activation: &Activation, value: u64) -> Result<Exit, Error> {
        activation.limit.store(usize::MAX, Ordering::Relaxed);
        activation.control.store(std::ptr::null_mut(), Ordering::Release);
        self.activation = None;
        self.control.activation = std::ptr::null();
        self.plan.release();
        if self.control.outcome == OUTCOME_SUSPENDED {
            // Link calls and returns happen without Rust: the segment that managed code waits on is found here, so that it is known from now on.
            self.state = State::Suspended;
            let waits = self.control.suspended.record;
            if let Err(evidence) = self.settle(waits) {
                tamper::end(evidence);
            }
            return Ok(Exit::Suspended(value));
        }
        self.previous = None;
        self.next_generation();
        self.outcome(value)
    }

    /// The stack is empty. A context or a frame of what was on it must not pass for one of what comes.
    fn next_generation(&mut self) {
        self.links.rewind(&mut self.segment, self.policy.warm);
        self.keep_shadows();
        self.control.generation = self.control.generation.wrapping_add(1);
        self.segment.reseal(self.control.generation);
        self.links.reseal(&self.segment, self.control.generation);
        self.state = State::Idle;
    }

    /// What the innermost entry has come to.
    fn outcome(&mut self, value: u64) -> Result<Exit, Error> {
        match (self.control.outcome, self.failure.take()) {
            (OUTCOME_RETURNED, _) => Ok(Exit::Returned(value)),
            (OUTCOME_LEFT, _) => Ok(Exit::Left(value)),
            (OUTCOME_FAILED, Some(error)) => Err(error),
            (OUTCOME_NESTED, _) => Err(Error::Nested),
            _ => tamper::end(Tampered {
                evidence: "the control block says an outcome that no stub wrote",
                slot: std::ptr::from_ref(self).addr(),
            }),
        }
    }

    /// Tells managed code of the limit, while it runs.
    fn show_limit(&self) {
        if let Some(activation) = self.activation {
            // SAFETY: `enter` borrows the activation until the stub returns.
            unsafe { activation.as_ref() }.limit.store(self.limit(), Ordering::Relaxed);
        }
    }

    /// What managed code compares its stack pointer with.
    fn limit(&self) -> usize {
        if self.policy.relocate_always {
            usize::MAX
        } else {
            // Wraps only when the record was rewritten: then the guard, not arithmetic, is what stops the code.
            self.segment.provided().wrapping_add(self.policy.reserve)
        }
    }
}

/// Called by the `grow` stub on the native stacks; `registers` is where it keeps the callee-saved registers. Returns 1, or 0 after it has
/// noted why the stack cannot grow.
///
/// # Safety
/// `control` is that of the running stack, whose link record `grow` has just written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cfi_stack_on_grow(control: *mut Control, bytes: usize, registers: usize) -> usize {
    // SAFETY: the control block is the first field of `Inner`, and `enter` holds no reference to it while the stub runs.
    let inner = unsafe { &mut *control.cast::<Inner>() };
    match inner.counted(|inner| inner.grow(bytes, registers)) {
        Ok(()) => 1,
        Err(Refusal::Error(error)) => {
            inner.control.outcome = OUTCOME_FAILED;
            inner.failure = Some(error);
            0
        }
        Err(Refusal::Tampered(evidence)) => tamper::end(evidence),
    }
}
