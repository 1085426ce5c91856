//! A13: contexts and frames of a stack's former life.
//!
//! Contexts: a stack ended, was given back and leased again, and a context of its former life is put back with the memory of then.
//!
//! The slot's generation goes on from life to life, so that is A06a again. Between the lives nothing was saved since, but the
//! context was used: arm64 counts that too, and on x86 its token is gone.

use super::context_scene::{
    GENERATION, SAME, Scene, Side, Visits, nothing_looks, prepare, resume, sealed_or, to_the_end,
};
use super::frames_replayed;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;

/// How far the second life has come.
#[derive(Clone, Copy, Debug)]
enum Life {
    GivenBack,
    Leased,
    Ready,
    Suspended,
}

/// A13.
pub fn former_lives(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("two lives", &run(|| lives(Life::Suspended, SAME, false)));
    for (depth, now) in [(2, 2), (6, 2)] {
        for (life, code) in
            [(Life::GivenBack, Code::S), (Life::Leased, Code::S), (Life::Ready, Code::K), (Life::Suspended, Code::K)]
        {
            let what = format!("{life:?}, from depth {depth}, now {now}");
            tally.attack(&what, &run(|| lives(life, Visits::at(now, depth), true)), &[sealed_or(class, code)]);
        }
    }
    frames_replayed::in_another_life(&mut tally);
    tally.report()
}

/// Puts the last context of the first life back, but for its generation.
fn lives(life: Life, visits: Visits, attack: bool) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.suspended(visits)?;
    resume(target, 10).is(2, false)?;
    resume(target, 20).is(3, false)?;
    let (mut context, stack) = (target.context(Side::Own), target.stack());
    resume(target, 30).is(1060, true)?;
    scene.give_back();
    if !matches!(life, Life::GivenBack) && scene.lease()? != target {
        return Err("another stack was leased".into());
    }
    if matches!(life, Life::Ready | Life::Suspended) {
        prepare(target, visits);
    }
    if matches!(life, Life::Suspended) {
        resume(target, 0).is(1, false)?;
    }
    if attack {
        context[GENERATION] = target.context(Side::Own)[GENERATION];
        stack.put_back();
        target.put_context(Side::Own, context);
        return Err(format!("it was resumed: {:?}", resume(target, 30)));
    }
    to_the_end(target)
}
