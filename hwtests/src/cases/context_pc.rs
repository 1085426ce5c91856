//! A01: bits of a saved pc are flipped.
//!
//! arm64 seals it. x86 under a shadow stack does not look at it: the pc is the shadow stack's, and that of a stack which never ran
//! is known.

use super::context_faces::attacked_coroutine;
use super::context_scene::{
    SAME, Scene, Side, Target, attacked_resumer, attacked_suspended, change, nothing_looks, resume, sealed_or,
    to_the_end,
};
use crate::child::{Verdict, end, run};
use crate::class::{Class, Column};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::probe::{Word, frame};

/// A01.
pub fn flipped(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("suspended", &run(|| attacked_suspended(|_| {})));
    tally.control("ready", &run(|| attacked_ready(|_| {})));
    tally.control("resumer", &run(|| attacked_resumer(|_| {})));
    tally.control("coroutine", &run(|| attacked_coroutine(|_| {})));
    let code = sealed_or(class, Code::C);
    for bit in 0..64 {
        let flip = move |side| move |target: Target| change(target.frame(side, frame::PC), |pc| pc ^ 1 << bit);
        for (what, end) in [
            ("suspended", run(|| attacked_suspended(flip(Side::Own)))),
            ("ready", run(|| attacked_ready(flip(Side::Own)))),
            ("resumer", run(|| attacked_resumer(flip(Side::Resumer)))),
            ("coroutine", run(|| attacked_coroutine(flip(Side::Own)))),
        ] {
            tally.attack_of_many(what, &format!("{what}, bit {bit}"), &end, &[code]);
        }
    }
    if class.column() == Column::Cet {
        // Where nothing is enforced these two words decide where a coroutine goes on. Here the second is the token's address.
        let inlined = run(|| attacked_coroutine(|at| at.write(Word::OwnSeal, at.read(Word::OwnSp) | 8)));
        tally.attack("coroutine, as if nothing were enforced", &inlined, &[Code::C]);
        let inlined = run(|| {
            attacked_coroutine(|at| {
                at.write(Word::OwnSeal, at.read(Word::OwnSp) | 8);
                at.write(Word::OwnToken, chosen as *const () as u64);
            })
        });
        tally.attack("coroutine, as if nothing were enforced, and a pc", &inlined, &[Code::K]);
    }
    tally.report()
}

/// Where the attacker wants it to go on.
extern "C" fn chosen() {
    end(Code::R)
}

fn attacked_ready(attack: impl FnOnce(Target)) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.ready(SAME)?;
    attack(target);
    resume(target, 0).is(1, false)?;
    to_the_end(target)
}
