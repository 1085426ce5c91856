//! Where the time of moves goes, seen through the step hook.

use crate::bench::Times;
use cfi_stack::Error;
use cfi_stack::steps::{Step, StepInfo, set_hook};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What lies between one step and the next.
pub const PARTS: [&str; 6] = ["map", "walk and plan", "copy", "rebase", "rebind", "commit"];

/// The last step, and what each part has taken since the round began.
static SEEN: Mutex<(Option<Instant>, [Duration; PARTS.len()])> = Mutex::new((None, [Duration::ZERO; PARTS.len()]));

fn hook(step: Step, _: &mut StepInfo<'_>) -> Result<(), Error> {
    let now = Instant::now();
    if let Ok(mut seen) = SEEN.lock() {
        let (last, parts) = &mut *seen;
        let part = (step as usize).checked_sub(Step::Mapped as usize);
        if let (Some(last), Some(part)) = (*last, part.and_then(|part| parts.get_mut(part))) {
            *part += now - last;
        }
        *last = Some(now);
    }
    Ok(())
}

/// Times of all parts.
pub struct Parts([Times; PARTS.len()]);

impl Parts {
    /// Begins to listen, from a round's beginning.
    pub fn listen() -> Self {
        set_hook(Some(hook));
        let mut parts = Parts(Default::default());
        parts.end_of_round();
        parts.0 = Default::default();
        parts
    }

    /// The round is over: its moves are one measurement.
    pub fn end_of_round(&mut self) {
        if let Ok(mut seen) = SEEN.lock() {
            for (times, part) in self.0.iter_mut().zip(&mut seen.1) {
                times.add(std::mem::take(part));
            }
        }
    }

    /// Listens no more.
    pub fn finish(self) -> Self {
        set_hook(None);
        self
    }

    /// The least of each, divided by `count`.
    pub fn per(&self, count: usize, what: &str) -> String {
        let each = PARTS.iter().zip(&self.0).map(|(name, times)| format!("{name} {:.2}", times.least() / count as f64));
        format!("{} ns {what}", each.collect::<Vec<_>>().join(", "))
    }
}
