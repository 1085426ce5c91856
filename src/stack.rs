//! One logical stack: its data segment, its shadow stack, its identity and generation, and the control block that
//! the stubs work on.

use crate::abi::{Activation, Control};
use crate::arch::{self, ENTRY_FP_OFFSET};
use crate::codemap::table::Reading;
use crate::error::{Error, Refusal};
use crate::features::{self, Domain};
use crate::link::{Base, Links};
use crate::pac::{RawPc, Tampered};
use crate::plan::Plan;
use crate::policy::Policy;
use crate::published;
use crate::relocate::relocate;
use crate::segment::{Segment, page_size};
use crate::shadow::ShadowStack;
use crate::signer::hardware::Hardware;
use crate::steps::{Step, StepInfo, step};
use crate::tamper;
use crate::thread::{self, Thread};
use crate::walk::{Bounds, Piece, Walk};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// The entry function returned.
const OUTCOME_RETURNED: u64 = 0;
/// `leave` was taken; set by the stub.
const OUTCOME_LEFT: u64 = 1;
/// `grow` could not.
const OUTCOME_FAILED: u64 = 2;

/// How managed code came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The entry function returned this.
    Returned(u64),
    /// Managed code, or the engine's fault handler, left with this code.
    Left(u64),
}

/// What a stack has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Times that `grow` moved the stack, to a larger segment or, with `relocate_always`, to one of the same size.
    pub growths: u64,
    /// Frames moved, the stubs' own included.
    pub frames_moved: u64,
    /// Return addresses that were authenticated and signed again. 0 where nothing is signed.
    pub rebound: u64,
    /// Bytes of stack copied.
    pub bytes_moved: u64,
    /// Largest data segment so far, in bytes.
    pub largest: u64,
    /// Segments that were made for link calls and lifted frames.
    pub segments: u64,
}

/// Everything about a stack that stays off it. The control block comes first: stubs hold its address.
#[repr(C)]
struct Inner {
    control: Control,
    /// The current one.
    segment: Segment,
    /// The others that calls went through, and those that they may go to.
    links: Links,
    /// The segment moved from last: kept until the next move, because the stub's callers in Rust still have its
    /// frame chain when the move ends; inaccessible when the policy poisons.
    previous: Option<Segment>,
    shadow: Option<ShadowStack>,
    domain: Domain,
    policy: Policy,
    plan: Plan,
    stats: Stats,
    failure: Option<Error>,
    activation: Option<NonNull<Activation>>,
}

/// A stack that managed code runs on.
///
/// It holds the frames of managed code only; native code runs on the thread's own stack. It starts with the policy's
/// initial segment and moves to larger ones as managed code calls `grow`.
#[derive(Debug)]
pub struct Stack {
    inner: NonNull<Inner>,
}

static IDENTITIES: AtomicU64 = AtomicU64::new(1);

impl Stack {
    /// Makes a stack: a data segment with its guard and, where this thread has a shadow stack, a shadow stack that can
    /// hold as many return addresses as the policy's maximum allows.
    ///
    /// # Errors
    /// [`Error::Policy`], [`Error::Memory`]; nothing stays mapped.
    pub fn new(thread: &Thread, policy: Policy) -> Result<Stack, Error> {
        policy.validate(page_size())?;
        published::add_mode(published::MODE_MANAGED)?;
        let identity = IDENTITIES.fetch_add(1, Ordering::Relaxed);
        let generation = 1;
        let segment = Segment::map(policy.initial, policy.guard, identity, generation)?;
        let shadow = match thread.domain().shadow {
            true => Some(ShadowStack::map(policy.shadow_need(policy.maximum))?),
            false => None,
        };
        let control = Control {
            native_sp: 0,
            native_token: 0,
            token: shadow.as_ref().map_or(0, ShadowStack::token),
            seal: 0,
            segment: std::ptr::null(),
            shadow_top: shadow.as_ref().map_or(0, ShadowStack::top),
            identity,
            generation,
            outcome: OUTCOME_RETURNED,
        };
        let stats = Stats { largest: policy.initial as u64, ..Stats::default() };
        let inner = Inner {
            control,
            segment,
            links: Links::default(),
            previous: None,
            shadow,
            domain: thread.domain(),
            policy,
            plan: Plan::new(),
            stats,
            failure: None,
            activation: None,
        };
        Ok(Stack { inner: NonNull::from(Box::leak(Box::new(inner))) })
    }

    /// Runs `entry(args[0], .., args[3])` on this stack until it returns or leaves.
    ///
    /// # Errors
    /// [`Error::Busy`] when the activation runs a stack already, [`Error::Thread`] when the thread's keys or shadow mode are
    /// not those that the stack was made with. Any other error is why `grow` could not; the frames are gone then, and the stack
    /// is empty and usable.
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
        let control = unsafe { (*inner).begin(thread, activation)? };
        let running = thread::Running::with(activation);
        let ended = running.begin();
        // SAFETY: the caller's for `entry`; `begin` has put control, segment and activation in order.
        let value = unsafe { arch::enter(control, entry, args) };
        drop(ended);
        // SAFETY: the stub has returned, so nobody else uses `inner`.
        unsafe { (*inner).end(activation, value) }
    }

    /// What the stack has done so far.
    pub fn stats(&self) -> Stats {
        // SAFETY: owned by self; `&self` cannot be had while `enter` runs.
        unsafe { self.inner.as_ref() }.stats
    }

    /// Size of the present data segment, in bytes.
    pub fn size(&self) -> usize {
        // SAFETY: as in `stats`.
        unsafe { self.inner.as_ref() }.segment.record().size()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: `inner` came from a leaked box and is owned by self; no frame lives on the stack.
        drop(unsafe { Box::from_raw(self.inner.as_ptr()) });
    }
}

impl Inner {
    /// Makes the stack current. Every check comes before the first write.
    fn begin(&mut self, thread: &Thread, activation: &Activation) -> Result<*mut Control, Error> {
        // Asked anew: keys can have been reset, and a child of fork can have changed them, since the thread attached.
        if thread.domain() != self.domain || features::domain() != self.domain {
            return Err(Error::Thread("the stack was made in another key domain or shadow-stack mode"));
        }
        let control = NonNull::from(&mut *self).cast::<Control>().as_ptr();
        activation
            .control
            .compare_exchange(std::ptr::null_mut(), control, Ordering::Acquire, Ordering::Relaxed)
            .map_err(|_| Error::Busy)?;
        self.control.segment = self.segment.record();
        self.control.outcome = OUTCOME_RETURNED;
        self.failure = None;
        self.activation = Some(NonNull::from(activation));
        activation.limit.store(self.limit(), Ordering::Relaxed);
        Ok(control)
    }

    fn end(&mut self, activation: &Activation, value: u64) -> Result<Exit, Error> {
        activation.limit.store(usize::MAX, Ordering::Relaxed);
        activation.control.store(std::ptr::null_mut(), Ordering::Release);
        self.activation = None;
        self.previous = None;
        self.plan.release();
        self.links.rewind(&mut self.segment, self.policy.warm);
        // A context or a frame of the run that ended must not pass for one of the next.
        self.control.generation = self.control.generation.wrapping_add(1);
        self.segment.reseal(self.control.generation);
        self.links.reseal(&self.segment, self.control.generation);
        match (self.control.outcome, self.failure.take()) {
            (OUTCOME_RETURNED, _) => Ok(Exit::Returned(value)),
            (OUTCOME_LEFT, _) => Ok(Exit::Left(value)),
            (OUTCOME_FAILED, Some(error)) => Err(error),
            _ => tamper::end(Tampered {
                evidence: "the control block says an outcome that no stub wrote",
                slot: std::ptr::from_ref(self).addr(),
            }),
        }
    }

    /// What managed code compares its stack pointer with.
    fn limit(&self) -> usize {
        if self.policy.relocate_always {
            usize::MAX
        } else {
            // Wraps only when the record was rewritten: then the guard, not arithmetic, is what stops the code.
            self.segment.record().base.wrapping_add(self.policy.reserve)
        }
    }

    /// Makes room for `bytes` and the reserve below the stack pointer of the function that called `grow`. Returns the
    /// address of grow's frame record, moved or not.
    fn grow(&mut self, record: usize, bytes: usize) -> Result<usize, Refusal> {
        step(Step::Begin, StepInfo::new(record, self.segment.record(), None, &mut self.plan))?;
        self.settle(record)?;
        let source = self.segment.record();
        if (source.identity, source.generation) != (self.control.identity, self.control.generation) {
            let slot = std::ptr::from_ref(source).addr();
            return Err(Tampered { evidence: "the segment's record is not this stack's", slot }.into());
        }
        if self.prepare_link(record)? {
            return Ok(record);
        }
        let source = self.segment.record();
        // The caller's stack pointer at the call is the CFA of grow's frame.
        let used = source.top.wrapping_sub(record.wrapping_add(16));
        let spare = self.policy.reserve.saturating_add(bytes);
        let needed = used.saturating_add(spare);
        let size = match needed > source.size() {
            true => self.policy.next_size(source.size(), needed)?,
            false if self.policy.relocate_always => source.size(),
            // A limit that lies too high costs time, nothing else.
            false => return Ok(record),
        };
        let size = self.links.bounded(&self.policy, size, needed)?;
        let token = self.control.token;
        let shadow =
            match &self.shadow {
                None => None,
                Some(shadow) => Some(shadow.entries(token).ok_or(Tampered {
                    evidence: "the shadow stack's token is outside the shadow stack",
                    slot: token,
                })?),
            };
        if let Some(room) = self.shadow.as_ref().map(ShadowStack::room) {
            let needed = self.policy.shadow_need(size);
            if needed > room {
                return Err(Error::ShadowRoom { needed, room }.into());
            }
        }
        self.previous = None;
        let destination = Segment::map(size, self.policy.guard, self.control.identity, self.control.generation)?;
        destination.populate(used + 16);
        let target = destination.record();
        let redirect = step(Step::Mapped, StepInfo::new(record, source, Some(target), &mut self.plan))?;
        // SAFETY: only a hook redirects, and it vouches for the record (cargo feature `steps`).
        let target = redirect.map_or(target, |record| unsafe { &*std::ptr::with_exposed_provenance(record) });

        let reading = Reading::begin();
        let table = reading.table().ok_or(Error::UnknownCode(arch::grow()))?;
        let linked = self.links.base(&self.segment);
        let complete = linked.is_none();
        let entry_fp = self.control.native_sp.wrapping_add(ENTRY_FP_OFFSET) as u64;
        let base = linked.unwrap_or(Base { bottom: arch::entry_return(), fp: entry_fp, arguments: 0 });
        let piece = Piece {
            youngest: record,
            stub: arch::STUB_SIGNING,
            bottom: base.bottom,
            base_cfa: source.top.wrapping_sub(base.arguments),
            base_fp: base.fp,
            arguments: base.arguments,
            registers: 0,
        };
        let bounds = Bounds { source, pieces: &[piece], complete, smallest_frame: self.policy.smallest_frame, shadow };
        self.plan.make(&Hardware, Walk::new(&Hardware, table, bounds))?;
        drop(reading);
        // SAFETY: the plan was just made for `source`; both segments are owned by self; the youngest frame is grow's,
        // which runs on the native stack now.
        let moved = unsafe { relocate(&Hardware, &mut self.plan, &bounds, target, spare - 16)? };
        let old = std::mem::replace(&mut self.segment, destination);
        self.links.moved(&old, &mut self.segment, &self.policy);
        self.control.segment = self.segment.record();
        if self.policy.poison || self.policy.relocate_always {
            // Without memory to split the mapping the old segment stays readable, which is what a policy without poison has.
            let _ = old.poison();
        }
        self.previous = Some(old);
        let size = self.segment.record().size() as u64;
        self.stats.growths += 1;
        self.stats.frames_moved += self.plan.rebindings().len() as u64;
        self.stats.rebound += self.plan.rebound() as u64;
        self.stats.bytes_moved += used as u64 + 16;
        self.stats.largest = self.stats.largest.max(size);
        let limit = self.limit();
        if let Some(activation) = self.activation {
            // SAFETY: `enter` borrows the activation until the stub returns.
            unsafe { activation.as_ref() }.limit.store(limit, Ordering::Relaxed);
        }
        step(Step::Committed, StepInfo::new(moved, self.segment.record(), None, &mut self.plan))?;
        Ok(moved)
    }
}

impl Inner {
    /// Makes the segment that holds `record`, a stub's, the current one.
    fn settle(&mut self, record: usize) -> Result<(), Tampered> {
        if self.links.settle(&mut self.segment, record)? {
            let limit = self.limit();
            if let Some(activation) = self.activation {
                // SAFETY: `enter` borrows the activation until the stub returns.
                unsafe { activation.as_ref() }.limit.store(limit, Ordering::Relaxed);
            }
        }
        self.control.segment = self.segment.record();
        Ok(())
    }

    /// Makes a segment for a link call, where it is `link` that has called `grow`. Says whether it was.
    fn prepare_link(&mut self, record: usize) -> Result<bool, Refusal> {
        let Some(activation) = self.activation else { return Ok(false) };
        // SAFETY: `enter` borrows the activation until the stub returns.
        let call = unsafe { activation.as_ref() }.link.swap(std::ptr::null_mut(), Ordering::Relaxed);
        if call.is_null() {
            return Ok(false);
        }
        let made = self.links.prepare(&mut self.segment, &self.policy, record, call)?;
        self.stats.segments += u64::from(made);
        Ok(true)
    }
}

/// Called by the `grow` stub on the native stacks. Returns where grow's frame record is now, or 0 after it has
/// noted why the stack cannot grow.
///
/// # Safety
/// `control` is that of the running stack, `record` the frame record that `grow` has just written.
#[unsafe(no_mangle)]
unsafe extern "C" fn cfi_stack_on_grow(control: *mut Control, record: usize, bytes: usize) -> usize {
    // SAFETY: the control block is the first field of `Inner`, and `enter` holds no reference to it while the stub runs.
    let inner = unsafe { &mut *control.cast::<Inner>() };
    match inner.grow(record, bytes) {
        Ok(moved) => moved,
        Err(Refusal::Error(error)) => {
            inner.control.outcome = OUTCOME_FAILED;
            inner.failure = Some(error);
            0
        }
        Err(Refusal::Tampered(evidence)) => tamper::end(evidence),
    }
}
