//! Growths as they happen, on whatever stack of this thread.

use cfi_stack::steps::{Step, StepInfo, set_hook};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Bytes of the first segment; offsets repeat after so many.
pub const SEGMENT: usize = 4096;
/// Frames are multiples of this.
pub const STEP: usize = 16;

/// What growths were seen.
#[derive(Default)]
pub struct Seen {
    /// Offsets, modulo the segment, of the record that `grow` made below the frame that was to fit.
    pub offsets: BTreeSet<usize>,
    /// How many.
    pub growths: usize,
}

impl Seen {
    /// How often the next offset after a seen one was not seen, around the segment's end.
    pub fn gaps(&self) -> usize {
        self.offsets.iter().filter(|offset| !self.offsets.contains(&((**offset + STEP) % SEGMENT))).count()
    }
}

thread_local! {
    static SEEN: RefCell<Seen> = RefCell::default();
}

fn note(step: Step, info: &mut StepInfo<'_>) -> Result<(), cfi_stack::Error> {
    if step == Step::Begin {
        SEEN.with_borrow_mut(|seen| {
            seen.offsets.insert((info.top - info.youngest) % SEGMENT);
            seen.growths += 1;
        });
    }
    Ok(())
}

/// Runs something and gives back what growths it made.
pub fn watched(run: impl FnOnce() -> Result<(), String>) -> Result<Seen, String> {
    SEEN.take();
    set_hook(Some(note));
    let result = run();
    set_hook(None);
    result.map(|()| SEEN.take())
}
