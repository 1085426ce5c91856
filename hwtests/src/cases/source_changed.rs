//! A18: the source is changed after the copy.
//!
//! Nothing in it counts any more but the return addresses, which count until they are re-bound (A16): the frame pointers and pointers that
//! are put right are those that were copied.

use crate::attack::{DEPTH, Scene, at_every_step, corrupt, frames, policy, stop};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Policy;
use cfi_stack::steps::{Step, StepInfo};

/// What the attacker writes, given the place.
type Forgery = fn(usize) -> u64;

const FORGERIES: [(&str, Forgery); 3] =
    [("zeroes", |_| 0), ("no address", |_| 0x5555_5555_5555_5555), ("its own place", |place| place as u64)];

/// A18.
pub fn after_the_copy(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        for always in [false, true] {
            tally.control(key, &run(|| changed(function, always, None)));
            for step in [Step::Copied, Step::Rebased, Step::Rebound, Step::Committed] {
                for (what, forgery) in FORGERIES {
                    let end = run(|| changed(function, always, Some((step, forgery))));
                    tally.attack(&format!("{what} at {step:?}, {key}"), &end, &[Code::C]);
                }
            }
        }
    }
    tally.report()
}

/// The segment moved from: its base, its top, and where return addresses lie in it.
#[derive(Default)]
struct Source {
    base: usize,
    top: usize,
    slots: Vec<usize>,
}

impl Source {
    fn new(info: &StepInfo<'_>) -> Source {
        Source { base: info.base, top: info.top, slots: frames(info).iter().map(|frame| frame.slot()).collect() }
    }
}

/// Writes every word of the source at `step` of every growth, but for return addresses that are still needed.
fn changed(function: Function, always: bool, attack: Option<(Step, Forgery)>) -> Verdict {
    // Without poison: a source that nobody can write needs no attack.
    let mut scene = Scene::new(Policy { relocate_always: always, ..policy() })?;
    let mut source = Source::default();
    let mut attacks = 0_usize;
    let count = std::rc::Rc::new(std::cell::Cell::new(0));
    let made = count.clone();
    at_every_step(move |now, info| {
        if now == Step::Begin {
            source = Source::new(info);
        }
        if let Some((step, forgery)) = attack
            && now == step
            && !(always && now == Step::Committed)
        {
            attacks += 1;
            count.set(attacks);
            let bound = matches!(step, Step::Rebound | Step::Committed);
            for place in (source.base..source.top).step_by(8) {
                if bound || !source.slots.contains(&place) {
                    corrupt(place, forgery(place));
                }
            }
        }
        Ok(())
    });
    let depth = if always { 60 } else { DEPTH };
    let right = scene.recurse_right(function, depth);
    stop();
    right?;
    match attack {
        Some((Step::Committed, _)) if always => Ok(Code::C),
        Some(_) if made.get() == 0 => Err("the source was never changed".into()),
        _ => Ok(Code::C),
    }
}
