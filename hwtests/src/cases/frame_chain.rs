//! A19: the chain of saved frame pointers. The walk follows layouts, not the chain, and compares the two.

use crate::attack::{DEPTH, Found, corrupt, frames, under_attack};
use crate::child::{page, run};
use crate::class::Class;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::steps::Step;

type Forgery = fn(&[Found], usize) -> usize;

const FORGERIES: [(&str, Forgery); 8] = [
    ("outside the stack", |_, _| 0x1000),
    ("into the evidence page", |_, _| std::ptr::from_ref(page()).addr()),
    ("past the top", |frames, _| frames[frames.len() - 1].record + 4096),
    ("a loop onto itself", |frames, at| frames[at].record),
    ("a loop through another frame", |frames, _| frames[0].record),
    ("downwards", |frames, _| frames[0].record - 64),
    ("misaligned", |frames, at| frames[at + 1].record + 8),
    ("one frame skipped", |frames, at| frames[at + 2].record),
];

/// A19.
pub fn forged(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let function = managed::recurse_a();
    tally.control("", &run(|| under_attack(function, DEPTH, Step::Begin, |_| {})));
    for (what, forgery) in FORGERIES {
        for at in [0, 1, 10] {
            let end = run(|| {
                under_attack(function, DEPTH, Step::Begin, move |info| {
                    let frames = frames(info);
                    corrupt(frames[at].record, forgery(&frames, at) as u64);
                    page().freeze_span(info.youngest, info.top);
                })
            });
            tally.attack(&format!("{what}, frame {at}"), &end, &[Code::K]);
        }
    }
    for (what, value) in [("the oldest's, null", 0), ("the oldest's, into the stack", 1)] {
        let end = run(|| {
            under_attack(function, DEPTH, Step::Begin, move |info| {
                let frames = frames(info);
                let oldest = frames[frames.len() - 1].record;
                corrupt(oldest, if value == 0 { 0 } else { frames[3].record as u64 });
                page().freeze_span(info.youngest, info.top);
            })
        });
        tally.attack(what, &end, &[Code::K]);
    }
    tally.report()
}
