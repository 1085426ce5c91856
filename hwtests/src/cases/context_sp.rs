//! A02: a saved stack pointer is changed.
//!
//! arm64 seals it. x86 has the generation in the saved frame too, so a stack pointer that is changed alone meets another word there and
//! ends at once (K, before the hardware could tell). An attacker who moves the frame along passes that: the stack goes on sixteen
//! bytes off, and its first return is not the shadow stack's (S). Another stack's is refused for what the directory says
//! of the slot (K); of a resumer the directory knows nothing, there the first return tells (S).

use super::context_faces::attacked_coroutine;
use super::context_scene::{
    GENERATION, Memory, SAME, SP, Scene, Side, Target, attacked_resumer, attacked_suspended,
    before_the_next_suspension, nothing_looks, resume, sealed_or, to_the_end,
};
use super::metadata_suspended;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;

/// A02.
pub fn changed(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("another stack's, suspended", &run(|| another(Side::Own, |_, _| {})));
    tally.control("another stack's, resumer", &run(|| another(Side::Resumer, |_, _| {})));
    tally.control("coroutine", &run(|| attacked_coroutine(|_| {})));
    for by in [16, -16] {
        let alone = sealed_or(class, Code::K);
        let end = run(|| attacked_coroutine(move |at| shift(at, Side::Own, by)));
        tally.attack(&format!("coroutine, {by:+}"), &end, &[alone]);
        tally.attack(
            &format!("suspended, {by:+}"),
            &run(|| attacked_suspended(move |at| shift(at, Side::Own, by))),
            &[alone],
        );
        tally.attack(
            &format!("resumer, {by:+}"),
            &run(|| attacked_resumer(move |at| shift(at, Side::Resumer, by))),
            &[alone],
        );
        let moved = sealed_or(class, Code::S);
        let what = format!("suspended, {by:+}, the frame moved along");
        tally.attack(&what, &run(|| attacked_suspended(move |at| shift_with_frame(at, Side::Own, by))), &[moved]);
        let what = format!("resumer, {by:+}, the frame moved along");
        tally.attack(&what, &run(|| attacked_resumer(move |at| shift_with_frame(at, Side::Resumer, by))), &[moved]);
    }
    let in_directory = sealed_or(class, Code::K);
    tally.attack("suspended, another stack's", &run(|| another(Side::Own, sp_alone)), &[in_directory]);
    tally.attack(
        "suspended, another stack's with its generation",
        &run(|| another(Side::Own, sp_and_generation)),
        &[in_directory],
    );
    tally.attack("resumer, another stack's", &run(|| another(Side::Resumer, sp_alone)), &[sealed_or(class, Code::K)]);
    let what = "resumer, another stack's with its generation";
    tally.attack(what, &run(|| another(Side::Resumer, sp_and_generation)), &[sealed_or(class, Code::S)]);
    metadata_suspended::places(&mut tally);
    tally.report()
}

fn shift(target: Target, side: Side, by: i64) {
    let word = side.words()[SP];
    target.write(word, target.read(word).wrapping_add_signed(by));
}

fn shift_with_frame(target: Target, side: Side, by: i64) {
    let frame = Memory::of_frame(target.frame(side, 0));
    shift(target, side, by);
    frame.put_at(target.frame(side, 0));
}

fn sp_alone(context: &mut [u64; 4], other: [u64; 4]) {
    context[SP] = other[SP];
}

fn sp_and_generation(context: &mut [u64; 4], other: [u64; 4]) {
    sp_alone(context, other);
    context[GENERATION] = other[GENERATION];
}

/// The context of one side gets words of another stack's own, which is suspended for the second time.
fn another(side: Side, mix: fn(&mut [u64; 4], [u64; 4])) -> Verdict {
    let mut scene = Scene::new()?;
    let other = scene.suspended(SAME)?;
    resume(other, 10).is(2, false)?;
    let target = scene.ready(SAME)?;
    let attack = move || {
        let mut context = target.context(side);
        mix(&mut context, other.context(Side::Own));
        target.put_context(side, context);
    };
    if side == Side::Resumer {
        before_the_next_suspension(attack);
        resume(target, 0).is(1, false)?;
    } else {
        resume(target, 0).is(1, false)?;
        attack();
    }
    to_the_end(target)
}
