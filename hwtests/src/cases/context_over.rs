//! A08: a stack that ended, was cancelled or never was is resumed.
//!
//! The faces refuse it (E). Forced past them, by the stubs themselves or with the coroutine's own words set back, what the slot still says is no
//! context: arm64 has no seal, x86 no stack pointer. With all of an earlier context put back it is A06 again, but for one thing: where the
//! shadow stack is empty only a first run is let through. On arm64 that is sealed; on x86 its entry is what the frame says (A09).

use super::context_faces::{Continued, Visitor, is_consumed};
use super::context_scene::{
    FRAME_GENERATION, GENERATION, SAME, Scene, Side, TOKEN, Target, change, prepare, resume, sealed_or, to_the_end,
};
use crate::child::{Verdict, run};
use crate::class::{Class, Column};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames};
use cfi_stack::coroutine::CoroutineResult;
use cfi_stack::probe::{self, Word};

/// A08.
pub fn resumed_after_the_end(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (what, ran, over) in COROUTINES {
        tally.attack(&format!("coroutine, {what}"), &run(|| coroutine(ran, over, false)), &[Code::E]);
    }
    tally.attack("continuations that ended, were cancelled or never were", &run(continuations), &[Code::E]);
    if class.column() == Column::Bare {
        tally.say("forced: not shown without PAC and without a shadow stack");
        return tally.report();
    }
    for (what, ran, over) in COROUTINES {
        let what = format!("coroutine, {what}, its words set back");
        tally.attack(&what, &run(|| coroutine(ran, over, true)), &[sealed_or(class, Code::K)]);
    }
    for (what, over) in OVER {
        tally.control(&format!("{what}, then used again"), &run(|| prepared_again(over)));
        tally.attack(what, &run(|| resumed(over)), &[sealed_or(class, Code::K)]);
    }
    tally.attack("finished, set back to ready but for the generation", &run(ready_again), &[sealed_or(class, Code::R)]);
    if class.column() != Column::Cet {
        let code = if class.column() == Column::Pac { Code::R } else { Code::K };
        let what = "finished, set back to suspended with its generation, the empty shadow stack's token";
        tally.attack(what, &run(suspended_again), &[code]);
    }
    tally.report()
}

type CoroutineOver = fn(&mut Visitor) -> Result<(), String>;

/// Whether it ran before, and what ends it.
const COROUTINES: [(&str, bool, CoroutineOver); 4] = [
    ("finished", true, |visitor| visitor.finish().map(|_| ())),
    ("unwound", true, |visitor| {
        visitor.coroutine.force_unwind();
        Ok(())
    }),
    ("reset", true, reset),
    ("reset before it ran", false, reset),
];

fn reset(visitor: &mut Visitor) -> Result<(), String> {
    // SAFETY: its frames owe no destructor.
    unsafe { visitor.coroutine.force_reset() };
    Ok(())
}

fn coroutine(ran: bool, over: CoroutineOver, rewrite: bool) -> Verdict {
    let _scene = Scene::new()?;
    let mut visitor = Visitor::ready(2, || {})?;
    if ran {
        visitor.resume(0, CoroutineResult::Yield(1))?;
    }
    let words = visitor.words();
    over(&mut visitor)?;
    if rewrite {
        visitor.set_back(&words);
    }
    visitor.is_refused(&Error::Finished)?;
    // Its stack can be used again.
    drop(visitor);
    Visitor::suspended(2, || {})?.finish()?;
    Ok(Code::E)
}

fn continuations() -> Verdict {
    let scene = Scene::new()?;
    for never in [Cont::NULL, Cont::from_words([0, 2]), Cont::from_words([u64::MAX, 2]), Cont::from_words([1 << 40, 4])]
    {
        is_consumed(never)?;
    }
    for frames in [Frames::Skip, Frames::Unwind] {
        let mut continued = Continued::fresh(scene.thread())?;
        // SAFETY: its frames owe no destructor that matters, and are Rust's.
        unsafe { continuation::cancel(continued.0, frames) }.map_err(|error| error.to_string())?;
        is_consumed(continued.0)?;
        continued = Continued::fresh(scene.thread())?;
        continued.passes(&[], 1)?;
        // SAFETY: as above.
        unsafe { continuation::cancel(continued.0, frames) }.map_err(|error| error.to_string())?;
        is_consumed(continued.0)?;
    }
    let mut continued = Continued::fresh(scene.thread())?;
    continued.passes(&[], 1)?;
    continued.passes(&[10], 2)?;
    continued.returns(&[20], 1030)?;
    is_consumed(continued.0)?;
    Ok(Code::E)
}

type Over = fn(&mut Scene) -> Result<Target, String>;

const OVER: [(&str, Over); 3] = [
    ("finished", |scene| {
        let target = scene.suspended(SAME)?;
        to_the_end(target)?;
        Ok(target)
    }),
    ("cancelled when suspended", |scene| cancelled(scene.suspended(SAME)?)),
    ("cancelled before it ran", |scene| cancelled(scene.ready(SAME)?)),
];

fn cancelled(target: Target) -> Result<Target, String> {
    // SAFETY: ready or suspended; nothing points into its frames.
    unsafe { probe::forced::cancel(target.0) };
    Ok(target)
}

fn resumed(over: Over) -> Verdict {
    let mut scene = Scene::new()?;
    let target = over(&mut scene)?;
    Err(format!("it ran: {:?}", resume(target, 10)))
}

fn prepared_again(over: Over) -> Verdict {
    let mut scene = Scene::new()?;
    let target = over(&mut scene)?;
    let generation = target.context(Side::Own)[GENERATION];
    prepare(target, SAME);
    if target.context(Side::Own)[GENERATION] <= generation {
        return Err("the generation was not counted on".into());
    }
    resume(target, 0).is(1, false)?;
    to_the_end(target)
}

/// All that was there when the stack was ready is put back; where x86 looks for the generation, the present one. R when it runs again.
fn ready_again() -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.ready(SAME)?;
    let (mut context, stack) = (target.context(Side::Own), target.stack());
    resume(target, 0).is(1, false)?;
    to_the_end(target)?;
    stack.put_back();
    context[GENERATION] = target.context(Side::Own)[GENERATION];
    target.put_context(Side::Own, context);
    if cfg!(target_arch = "x86_64") {
        change(target.frame(Side::Own, FRAME_GENERATION), |_| context[GENERATION]);
    }
    resume(target, 0).is(1, false)?;
    to_the_end(target).map(|_| Code::R)
}

/// All that was there when the stack was suspended is put back, with the token that its shadow stack has now. R when it goes on.
fn suspended_again() -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.suspended(SAME)?;
    let (mut context, stack) = (target.context(Side::Own), target.stack());
    to_the_end(target)?;
    stack.put_back();
    context[TOKEN] = target.read(Word::ShadowTop).wrapping_sub(8);
    target.put_context(Side::Own, context);
    to_the_end(target).map(|_| Code::R)
}
