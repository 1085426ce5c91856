//! A30: the word that managed code compares its stack pointer with.
//!
//! A forged limit below the reserve lets code run into the guard; one that lies too high costs a call of `grow`, which looks at the
//! record and not at this word.

use crate::attack::{Scene, at_every_step, corrupt, policy, stop};
use crate::child::{Verdict, leave_room_above_a_canary, map_above, page, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::steps::{Step, StepInfo};

/// Deep enough to run through several growths, and through any one segment on the way.
const DEPTH: usize = 3000;

/// The limit that the attacker writes, given what the hook is shown.
type Forgery = fn(&StepInfo<'_>) -> usize;

const FORGERIES: [(&str, Forgery, Code); 9] = [
    ("0", |_| 0, Code::G),
    ("8", |_| 8, Code::G),
    ("in the mapping below the guard", |info| info.base - policy().guard - 64, Code::G),
    ("8 below the base, in the guard", |info| info.base - 8, Code::G),
    ("the base", |info| info.base, Code::G),
    ("8 above the base", |info| info.base + 8, Code::G),
    ("the real one less 16", |info| info.base + policy().reserve - 16, Code::C),
    ("in a mapping above", |info| map_above(info.top), Code::C),
    ("usize::MAX", |_| usize::MAX, Code::C),
];

/// A30.
pub fn forged(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        tally.control(key, &run(|| recurse(function, None)));
        for (what, forgery, code) in FORGERIES {
            tally.attack(&format!("{what}, {key}"), &run(|| recurse(function, Some(forgery))), &[code]);
        }
    }
    tally.report()
}

fn recurse(function: Function, forgery: Option<Forgery>) -> Verdict {
    let mut scene = Scene::new(policy())?;
    let word = scene.act() + Activation::LIMIT_OFFSET as usize;
    let mut growths = 0;
    at_every_step(move |step, info| {
        match step {
            // The first growth doubles the stack; its guard shall lie on a canary.
            Step::Begin if growths == 0 => leave_room_above_a_canary(policy().guard, 2 * policy().initial),
            Step::Committed => {
                growths += 1;
                if growths == 1 {
                    page().guard(info.base, policy().guard);
                    if let Some(forgery) = forgery {
                        corrupt(word, forgery(info) as u64);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    });
    let right = scene.recurse_right(function, DEPTH);
    stop();
    right.map(|()| Code::C)
}
