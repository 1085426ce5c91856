//! A05: the contexts of two stacks are exchanged, all words.
//!
//! arm64 binds each to its place. x86 refuses a stack's own, whose stack pointer and token the directory does not have for
//! the slot. Who waits may stand on any stack, of which no directory knows: two resumers can be exchanged (R), and with them who gets
//! what is passed. What runs then is a stack that really waits, with its own pc, its own shadow stack and its own frame.

use super::context_faces::Visitor;
use super::context_scene::{
    SAME, Scene, Side, Target, before_the_next_suspension, nothing_looks, resume, sealed_or, to_the_end,
};
use super::metadata_suspended;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use std::cell::Cell;
use std::rc::Rc;

/// A05.
pub fn swapped(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    for first in [true, false] {
        let which = if first { "the first" } else { "the second" };
        tally.control(which, &run(|| own(first, |_, _| {})));
        let end = run(|| own(first, |a, b| swap(a, b, Side::Own)));
        tally.attack(&format!("own, {which} is resumed"), &end, &[sealed_or(class, Code::K)]);
    }
    tally.control("coroutines", &run(|| coroutines(|_, _| {})));
    let end = run(|| coroutines(|a, b| swap(a, b, Side::Own)));
    tally.attack("coroutines", &end, &[sealed_or(class, Code::K)]);
    tally.control("resumers", &run(|| resumers(false)));
    tally.attack("resumers", &run(|| resumers(true)), &[sealed_or(class, Code::R)]);
    metadata_suspended::exchanged(&mut tally);
    tally.report()
}

fn swap(a: Target, b: Target, side: Side) {
    let (of_a, of_b) = (a.context(side), b.context(side));
    a.put_context(side, of_b);
    b.put_context(side, of_a);
}

fn own(resume_first: bool, attack: fn(Target, Target)) -> Verdict {
    let mut scene = Scene::new()?;
    let (a, b) = (scene.suspended(SAME)?, scene.suspended(SAME)?);
    attack(a, b);
    let (one, other) = if resume_first { (a, b) } else { (b, a) };
    to_the_end(one)?;
    to_the_end(other)
}

fn coroutines(attack: fn(Target, Target)) -> Verdict {
    let _scene = Scene::new()?;
    let mut a = Visitor::suspended(2, || {})?;
    let mut b = Visitor::suspended(2, || {})?;
    attack(a.target, b.target);
    a.finish()?;
    b.finish()
}

/// `outer` resumes `inner`; their resumers are exchanged, and what `inner` passes goes to who waits for `outer`.
fn resumers(exchange: bool) -> Verdict {
    let mut scene = Scene::new()?;
    let (outer, inner) = (scene.ready(SAME)?, scene.ready(SAME)?);
    let outer_went_on = Rc::new(Cell::new(false));
    let note = outer_went_on.clone();
    before_the_next_suspension(move || {
        before_the_next_suspension(move || {
            if exchange {
                swap(outer, inner, Side::Resumer);
            }
        });
        let right = resume(inner, 0).is(1, false).and_then(|()| to_the_end(inner));
        note.set(right.is_ok());
    });
    resume(outer, 0).is(1, false)?;
    if !outer_went_on.get() {
        return Ok(Code::R);
    }
    to_the_end(outer)
}
