//! A stack of which everything is played that compiled code and the stubs do, for tests: what moves its frames is the real thing, with the
//! software model as its CPU.
//!
//! ```text
//!  played, here          the link record that `exit` and `grow` leave on the native stack; what `link` reads and writes of
//!                        the segments' records; the shadow stack, in ordinary memory
//!  played, by the test   frames, their signatures, registers
//!  real                  all that [`Inner`] does, and below it: links, lifts, walk, plan, relocation, segments
//! ```
//! Records that are sealed are the stubs' alone, so this is for processes without generic authentication.

use super::{Inner, OUTCOME_FAILED, OUTCOME_RETURNED, State, Stats};
use crate::abi::{Activation, Extent, Link, LinkCall, Record};
use crate::arch::ENTRY_FP_OFFSET;
use crate::error::{Error, Refusal};
use crate::inspect::Picture;
use crate::inspect::native::growable;
use crate::pac::RawPc;
use crate::policy::Policy;
use crate::segment::{page_size, read_word, write_word};
use crate::shadow::{ShadowStack, Shadows};
use crate::signer::model::Model;
use crate::stack::Exit;
use crate::thread::Thread;
use std::sync::atomic::Ordering;

/// Most entries within each other.
pub(crate) const ENTRIES: usize = 8;
/// Bytes of native stack for each.
const ENTRY: usize = 256;

/// The stack, the activation that it runs with, and the native stack that it is entered from.
pub(crate) struct Played<'a> {
    thread: &'a Thread,
    inner: Box<Inner<Model>>,
    activation: Box<Activation>,
    native: Box<[u128]>,
    /// Return addresses on the shadow stack, the oldest first.
    shadow: Vec<u64>,
}

impl<'a> Played<'a> {
    /// An idle stack. `shadow` is how many bytes of shadow stack it has, where it has one.
    pub(crate) fn new(
        thread: &'a Thread,
        policy: Policy,
        model: Model,
        shadow: Option<usize>,
    ) -> Result<Played<'a>, Error> {
        policy.validate(page_size())?;
        let make = || shadow.map(Shadows::played).transpose();
        let inner = Inner::new(thread.domain(), policy, policy.initial, model, make)?;
        let native = vec![0; (ENTRIES + 1) * ENTRY / size_of::<u128>()].into_boxed_slice();
        let (inner, activation) = (Box::new(inner), Box::default());
        Ok(Played { thread, inner, activation, native, shadow: Vec::new() })
    }

    /// `enter`, on an idle stack. Returns the frame pointer that its oldest frame saves.
    pub(crate) fn enter(&mut self) -> Result<u64, Error> {
        self.inner.begin(self.thread, &self.activation, State::Idle)?;
        Ok(self.entered())
    }

    /// The same by native code that managed code has called.
    pub(crate) fn enter_again(&mut self) -> Result<u64, Error> {
        self.inner.begin_again()?;
        Ok(self.entered())
    }

    fn entered(&mut self) -> u64 {
        let top = self.native.as_mut_ptr().expose_provenance() + size_of_val(&*self.native);
        let native_sp = top - (self.inner.outer.len() + 1) * ENTRY;
        self.inner.control.native_sp = native_sp;
        self.inner.control.link = 0;
        (native_sp + ENTRY_FP_OFFSET) as u64
    }

    /// Entries within each other.
    pub(crate) fn entries(&self) -> usize {
        usize::from(self.inner.state == State::Running) + self.inner.outer.len()
    }

    /// The innermost entry ends: its oldest frame has returned, or growth was refused for this reason.
    pub(crate) fn end(&mut self, value: u64, failure: Option<Error>) -> Result<Exit, Error> {
        self.inner.control.outcome = if failure.is_some() { OUTCOME_FAILED } else { OUTCOME_RETURNED };
        self.inner.failure = failure;
        self.note_token();
        match self.inner.outer.is_empty() {
            true => self.inner.end(&self.activation, value),
            false => self.inner.end_again(value),
        }
    }

    /// A stub leaves managed code, its record is here.
    pub(crate) fn leave(&mut self, record: usize) {
        let link = self.inner.control.native_sp - size_of::<Link>();
        // SAFETY: the place of the link record on the native stack that self owns, below the entry's frame.
        unsafe { write_word(link, record as u64) };
        self.inner.control.link = link;
        self.note_token();
    }

    /// It goes back, to where managed code waits now.
    pub(crate) fn go_back(&mut self) -> usize {
        let link = std::mem::take(&mut self.inner.control.link);
        // SAFETY: as in `leave`, which has put it there.
        unsafe { read_word(link) as usize }
    }

    /// The shadow stack, of one segment.
    fn kept(&self) -> Option<&ShadowStack> {
        self.inner.shadows.as_ref().map(Shadows::first)
    }

    fn note_token(&mut self) {
        if let Some(token) = self.kept().map(ShadowStack::token) {
            self.inner.control.token = token - self.shadow.len() * 8;
        }
    }

    /// What `grow` does on the native stack. `registers` is where it keeps the callee-saved ones.
    pub(crate) fn grow(&mut self, bytes: usize, registers: usize) -> Result<(), Refusal> {
        self.inner.counted(|inner| inner.grow(bytes, registers))
    }

    /// What `reserve` does.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.inner.counted(|inner| inner.make_room(bytes, 0))
    }

    /// What `compact` does, with hysteresis or without.
    pub(crate) fn shrink(&mut self, hysteresis: bool) -> Result<bool, Refusal> {
        self.inner.counted(|inner| inner.shrink(hysteresis))
    }

    /// What `link` does before it calls, with its record here: the bounds of the segment that it calls on. None where it asks `grow` for one.
    pub(crate) fn link(&mut self, record: usize, call: &LinkCall) -> Option<Extent> {
        let present = record_at(self.inner.control.segment.addr());
        // SAFETY: records of the stack's segments, which `inner` owns; nobody else looks at them while this runs.
        let (present, next) = unsafe {
            if !(*present).holds(record, 16) || (*present).next.is_null() {
                return None;
            }
            (&mut *present, &mut *record_at((*present).next.addr()))
        };
        if next.previous != std::ptr::from_ref(present) || next.room < call.total as usize {
            return None;
        }
        (next.link_record, next.area) = (record, call.area);
        self.inner.control.segment = next;
        present.limit = self.activation.limit.swap(next.limit, Ordering::Relaxed);
        Some(next.extent())
    }

    /// Asks `grow` for a segment that the call fits on.
    pub(crate) fn ask_for_segment(&mut self, call: &LinkCall) -> Result<(), Refusal> {
        self.activation.link.store(std::ptr::from_ref(call).cast_mut(), Ordering::Relaxed);
        self.grow(0, 0)
    }

    /// What `link` does when its callee has returned: the bounds of the segment that was called on. None where no segment was entered from the
    /// record.
    pub(crate) fn unlink(&mut self, record: usize) -> Option<Extent> {
        let mut left = record_at(self.inner.control.segment.addr());
        // SAFETY: as in `link`.
        let (left, previous) = unsafe {
            while (*left).link_record != record {
                left = record_at((*left).previous.addr());
                if left.is_null() {
                    return None;
                }
            }
            (&*left, &*record_at((*left).previous.addr()))
        };
        if !previous.holds(record, 16) {
            return None;
        }
        self.inner.control.segment = previous;
        self.activation.limit.store(previous.limit, Ordering::Relaxed);
        Some(left.extent())
    }

    /// A call.
    pub(crate) fn push_shadow(&mut self, pc: RawPc) {
        self.shadow.push(pc.address() as u64);
        if let Some(shadow) = self.kept() {
            // SAFETY: the mapping is ordinary memory in a test, and has room for the frames that there are.
            unsafe { write_word(shadow.top() - self.shadow.len() * 8, pc.address() as u64) };
        }
    }

    /// A return, by the shadow stack.
    pub(crate) fn pop_shadow(&mut self) -> Option<RawPc> {
        let from = self.shadow.len() * 8;
        let model = self.shadow.pop()?;
        // SAFETY: as in `push_shadow`.
        let kept = self.kept().map(|shadow| unsafe { read_word(shadow.top() - from) });
        Some(RawPc::new(kept.unwrap_or(model) as usize))
    }

    /// All of it, the oldest first.
    pub(crate) fn shadow(&self) -> Vec<u64> {
        match self.kept() {
            None => self.shadow.clone(),
            Some(shadow) => {
                let words = shadow.entries(shadow.top() - self.shadow.len() * 8 - 8).unwrap_or_default();
                words.iter().rev().copied().collect()
            }
        }
    }

    /// The segments, the oldest first; those at the end may be idle.
    pub(crate) fn segments(&self) -> impl Iterator<Item = Extent> {
        self.inner.links.in_order(&self.inner.segment).map(|segment| segment.record().extent())
    }

    /// What managed code compares its stack pointer with.
    pub(crate) fn limit(&self) -> usize {
        self.activation.limit.load(Ordering::Relaxed)
    }

    /// As `inspect` shows it, to the native code that managed code has called.
    pub(crate) fn picture(&self) -> Picture {
        growable(&self.inner.looked())
    }

    /// What the stack has done.
    pub(crate) fn stats(&self) -> Stats {
        self.inner.stats
    }
}

/// A record by its address, which the library has written into another.
fn record_at(address: usize) -> *mut Record {
    std::ptr::with_exposed_provenance_mut(address)
}
