//! A06a and A06b: a context of an earlier suspension is put back, together with the stack as it was then.
//!
//! The generation is under arm64's seal, so a context without its own generation fails there. x86 has the generation in the saved frame
//! as well: whoever puts the old frame back without it is seen (K), who puts it back but for that word is not. From there on it
//! is the shadow stack that decides: at another depth the token is none any more, or the first returns do not match (S); at
//! the same depth the stack goes on from where it was (R).
//!
//! With the generation everything is as it was (R), but for a shadow stack of another depth (S). A GCS tells another place in the code too:
//! the stub compares the sealed pc with it (B). x86 goes on at the place that the shadow stack has, on the frame that is put back.

use super::context_scene::{
    FRAME_GENERATION, GENERATION, Memory, SAME, SP, Scene, Side, TOKEN, Target, Visits, change, nothing_looks, resume,
    sealed_or, to_the_end,
};
use crate::child::{Verdict, run};
use crate::class::{Class, Column};
use crate::outcome::{Code, Report};
use crate::tally::Tally;

/// Depths of the suspension that is put back and of the present one.
const DEPTHS: [(u8, u8); 3] = [(2, 2), (6, 2), (2, 6)];

/// What the attacker puts back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Replay {
    /// The context's token; else the present one stays.
    token: bool,
    /// The context's generation; else the present one stays.
    generation: bool,
    /// The stack's memory.
    stack: bool,
    /// In that, the present generation where x86 looks for it.
    patched: bool,
}

const WORDS: Replay = Replay { token: true, generation: false, stack: false, patched: false };
const STACK: Replay = Replay { stack: true, ..WORDS };
const PATCHED: Replay = Replay { patched: true, ..STACK };
const WHOLE: Replay = Replay { generation: true, ..STACK };

/// A06a.
pub fn generation_intact(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    for (then, now) in DEPTHS {
        let visits = Visits::at(then, now);
        let at = format!("from depth {then}, now {now}");
        tally.control(&at, &run(|| untouched(visits)));
        // At the same depth the words alone are the present ones, but for arm64's seal.
        let alone = if then == now { Code::C } else { Code::K };
        tally.attack(&format!("context alone {at}"), &run(|| replayed(visits, WORDS)), &[sealed_or(class, alone)]);
        tally.attack(
            &format!("context and stack {at}"),
            &run(|| replayed(visits, STACK)),
            &[sealed_or(class, Code::K)],
        );
        if class.column() == Column::Cet {
            let code = if then == now { Code::R } else { Code::S };
            let what = format!("context and stack, the frame's generation written anew, {at}");
            tally.attack(&what, &run(|| replayed(visits, PATCHED)), &[code]);
            let what = format!("{what}, the token left");
            tally.attack(&what, &run(|| replayed(visits, Replay { token: false, ..PATCHED })), &[code]);
        }
    }
    tally.report()
}

/// A06b.
pub fn with_generation(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    for (then, now) in DEPTHS {
        let visits = Visits::at(then, now);
        let at = format!("from depth {then}, now {now}");
        tally.control(&at, &run(|| untouched(visits)));
        let code = if then == now || !class.shadow() { Code::R } else { Code::S };
        tally.attack(&format!("all {at}"), &run(|| replayed(visits, WHOLE)), &[code]);
        if class.shadow() {
            let what = format!("all but the token {at}");
            tally.attack(&what, &run(|| replayed(visits, Replay { token: false, ..WHOLE })), &[code]);
        }
    }
    let elsewhere = Visits { elsewhere: true, ..SAME };
    tally.control("another place in the code", &run(|| untouched(elsewhere)));
    let code = if class.column() == Column::PacGcs { Code::B } else { Code::R };
    tally.attack("all, another place in the code", &run(|| replayed(elsewhere, WHOLE)), &[code]);
    tally.report()
}

fn untouched(visits: Visits) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.suspended(visits)?;
    to_the_end(target)
}

/// R when the stack passes 2 for the second time.
fn replayed(visits: Visits, replay: Replay) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.suspended(visits)?;
    let (context, stack) = (target.context(Side::Own), target.stack());
    resume(target, 10).is(2, false)?;
    put_back(target, context, stack, replay);
    let got = resume(target, 20);
    if got.is(2, false).is_ok() {
        return Ok(Code::R);
    }
    got.is(3, false)?;
    resume(target, 30).is(1060, true)?;
    Ok(Code::C)
}

fn put_back(target: Target, mut context: [u64; 4], stack: Memory, replay: Replay) {
    let present = target.context(Side::Own);
    if !replay.token {
        context[TOKEN] = present[TOKEN];
    }
    if !replay.generation {
        context[GENERATION] = present[GENERATION];
    }
    if replay.stack {
        stack.put_back();
    }
    if replay.patched {
        change(context[SP] as usize + FRAME_GENERATION, |_| present[GENERATION]);
    }
    target.put_context(Side::Own, context);
}
