//! What all growable stacks of the process have done, counted on slow paths alone.

use crate::error::{Error, Refusal};
use std::sync::atomic::{AtomicU64, Ordering};

/// What all growable stacks of the process have done so far. A refusal is counted where a move, a link or a lift was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Moves to a larger segment or, with `relocate_always`, to one of the same size.
    pub growths: u64,
    /// Moves to a smaller one.
    pub shrinks: u64,
    /// Segments that were made for calls through `link` and for lifted frames.
    pub links: u64,
    /// Times that frames were lifted to a linked segment.
    pub lifts: u64,
    /// Frames moved, the stubs' own included.
    pub frames: u64,
    /// Return addresses that were authenticated and signed again.
    pub rebound: u64,
    /// Bytes of stack moved.
    pub bytes: u64,
    /// What was refused, by reason, those that never were left out: the error's name and how often.
    pub refusals: Vec<(&'static str, u64)>,
}

/// One of the plain counters.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    Growths,
    Shrinks,
    Links,
    Lifts,
    Frames,
    Rebound,
    Bytes,
}

const COUNTS: usize = Count::Bytes as usize + 1;
static COUNTED: [AtomicU64; COUNTS] = [const { AtomicU64::new(0) }; COUNTS];

/// The reasons, in the order of their counters.
const REASONS: [&str; 16] = [
    "Overflow",
    "Memory",
    "ShadowRoom",
    "UnknownCode",
    "Immovable",
    "HiddenPointer",
    "Unsigned",
    "Layout",
    "Overlap",
    "Foreign",
    "TooSmall",
    "Busy",
    "Policy",
    "Thread",
    "Injected",
    "other",
];
static REFUSED: [AtomicU64; REASONS.len()] = [const { AtomicU64::new(0) }; REASONS.len()];

/// Adds to a counter.
pub(crate) fn count(which: Count, more: u64) {
    COUNTED[which as usize].fetch_add(more, Ordering::Relaxed);
}

/// The name under which an error is counted: its variant's.
fn reason(error: &Error) -> &'static str {
    match error {
        Error::Overflow { .. } => "Overflow",
        Error::Memory { .. } => "Memory",
        Error::ShadowRoom { .. } => "ShadowRoom",
        Error::UnknownCode(_) => "UnknownCode",
        Error::Immovable { .. } => "Immovable",
        Error::HiddenPointer { .. } => "HiddenPointer",
        Error::Unsigned(_) => "Unsigned",
        Error::Layout { .. } => "Layout",
        Error::Overlap => "Overlap",
        Error::Foreign => "Foreign",
        Error::TooSmall { .. } => "TooSmall",
        Error::Busy => "Busy",
        Error::Policy(_) => "Policy",
        Error::Thread(_) => "Thread",
        Error::Injected => "Injected",
        _ => "other",
    }
}

/// Counts a refusal. Evidence of tampering is not counted: it ends the process.
pub(crate) fn refused(refusal: &Refusal) {
    if let Refusal::Error(error) = refusal {
        let name = reason(error);
        let index = REASONS.iter().position(|&known| known == name).unwrap_or(REASONS.len() - 1);
        REFUSED[index].fetch_add(1, Ordering::Relaxed);
    }
}

/// What was counted since the process began. Counters are read one by one, so they need not fit together while stacks move.
pub fn totals() -> Totals {
    let load = |count: Count| COUNTED[count as usize].load(Ordering::Relaxed);
    let refusals = REASONS.into_iter().zip(&REFUSED).map(|(reason, count)| (reason, count.load(Ordering::Relaxed)));
    Totals {
        growths: load(Count::Growths),
        shrinks: load(Count::Shrinks),
        links: load(Count::Links),
        lifts: load(Count::Lifts),
        frames: load(Count::Frames),
        rebound: load(Count::Rebound),
        bytes: load(Count::Bytes),
        refusals: refusals.filter(|(_, count)| *count != 0).collect(),
    }
}
