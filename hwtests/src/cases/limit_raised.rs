//! A30: the word that managed code compares its stack pointer with.

use crate::attack::{Scene, corrupt, once_at, policy, stop};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::steps::Step;

/// Deep enough to run through several growths, and through any one segment on the way.
const DEPTH: usize = 3000;

/// A30.
pub fn lowered(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        tally.control(key, &run(|| recurse(function, None)));
        for limit in [0, 8] {
            tally.attack(&format!("limit {limit}, {key}"), &run(|| recurse(function, Some(limit))), &[Code::G]);
        }
    }
    tally.report()
}

fn recurse(function: Function, limit: Option<u64>) -> Verdict {
    let mut scene = Scene::new(policy())?;
    let word = scene.act() + Activation::LIMIT_OFFSET as usize;
    once_at(Step::Committed, move |info| {
        page().guard(info.base, policy().guard);
        if let Some(limit) = limit {
            corrupt(word, limit);
        }
    });
    let right = scene.recurse_right(function, DEPTH);
    stop();
    right.map(|()| Code::C)
}
