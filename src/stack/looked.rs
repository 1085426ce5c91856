//! What `inspect` is shown of a stack. Nothing here writes, and nothing of it is believed.

use super::nested::in_exit;
use super::{Inner, Stack, State};
use crate::abi::Activation;
use crate::error::{Error, Refusal};
use crate::policy::Policy;
use crate::segment::Segment;
use crate::signer::Signer;
use crate::totals::{self, Count};

/// A stack and where its managed code waits.
#[derive(Debug)]
pub(crate) struct Looked<'a> {
    pub identity: u64,
    pub generation: u64,
    pub policy: &'a Policy,
    /// The oldest first; those at the end may be idle.
    pub segments: Vec<&'a Segment>,
    /// Addresses of the frame records of the stubs by which managed code was left, one for each entry, the youngest first. As
    /// the stubs left them in writable memory.
    pub waits: Vec<usize>,
    pub state: State,
    pub parked: bool,
    /// Bytes of room of the shadow segments that frames are on, and the return addresses there.
    pub shadow: Option<(usize, Option<usize>)>,
}

impl Stack {
    /// Of a stack that does not run: whoever has the reference keeps it so.
    pub(crate) fn looked(&self) -> Looked<'_> {
        // SAFETY: owned by self; `&self` cannot be had while `enter` runs.
        unsafe { self.inner.as_ref() }.looked()
    }
}

/// Of the stack whose managed code has called the native code that asks: hands it to `f`, which runs no managed code.
///
/// # Errors
/// [`Error::NotInExit`] when `activation` is not the innermost one of this thread, or managed code itself runs.
pub(crate) fn of_running<T>(activation: &Activation, f: impl FnOnce(&Looked<'_>) -> T) -> Result<T, Error> {
    let inner = in_exit(activation)?;
    // SAFETY: `in_exit` has seen that native code runs, so nobody else uses `inner` until this returns.
    Ok(f(&unsafe { inner.as_ref() }.looked()))
}

impl<S: Signer> Inner<S> {
    pub(super) fn looked(&self) -> Looked<'_> {
        // What is not where the stubs left it is no place in any segment.
        let waits = match self.state {
            State::Idle => Vec::new(),
            State::Suspended => vec![self.control.suspended.record],
            State::Running => self.entries().map(|(sp, link)| self.waits_at(sp, link).unwrap_or(0)).collect(),
        };
        Looked {
            identity: self.control.identity,
            generation: self.control.generation,
            policy: &self.policy,
            segments: self.links.in_order(&self.segment).collect(),
            waits,
            state: self.state,
            parked: self.parked.is_some(),
            shadow: self.shadows.as_ref().map(|shadows| shadows.looked(self.control.token)),
        }
    }

    /// Does what may move, link or lift frames, and adds what came of it to the process's totals.
    pub(super) fn counted<T>(&mut self, what: impl FnOnce(&mut Inner<S>) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let before = self.stats;
        let result = what(self).inspect_err(totals::refused);
        let more = |now: u64, before: u64, which: Count| {
            if now > before {
                totals::count(which, now - before);
            }
        };
        more(self.stats.growths, before.growths, Count::Growths);
        more(self.stats.shrinks, before.shrinks, Count::Shrinks);
        more(self.stats.segments, before.segments, Count::Links);
        more(self.stats.lifts, before.lifts, Count::Lifts);
        more(self.stats.frames_moved, before.frames_moved, Count::Frames);
        more(self.stats.rebound, before.rebound, Count::Rebound);
        more(self.stats.bytes_moved, before.bytes_moved, Count::Bytes);
        result
    }
}
