//! A10: a context is copied to another place and resumed there.
//!
//! arm64 begins the seal with the place. x86 takes no slot that the directory does not have, none whose identity is not its place's, and no
//! stack pointer that is not the slot's own. As somebody's resumer it takes any context that waits (R), as in A05: the stack goes on as
//! its own context says, only that it is passed what was meant for another.

use super::context_scene::{
    SAME, Scene, Side, Target, before_the_next_suspension, nothing_looks, resume, sealed_or, to_the_end,
};
use crate::child::{Verdict, end, run};
use crate::class::Class;
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::probe::Slot;
use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;

/// A10.
pub fn elsewhere(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    let refused = sealed_or(class, Code::K);
    tally.control("nothing copied", &run(|| copied(|_, target, _| Ok(target))));
    let to: [(&str, Copy); 4] = [
        ("the whole slot to ordinary memory", |_, target, _| {
            let place = ordinary()?;
            copy_slot(target, place);
            Ok(place)
        }),
        ("the context into a slot that never ran", |scene, target, _| {
            let place = scene.lease()?;
            place.put_context(Side::Own, target.context(Side::Own));
            Ok(place)
        }),
        ("the context into a suspended slot", |_, target, other| {
            other.put_context(Side::Own, target.context(Side::Own));
            Ok(other)
        }),
        ("the whole slot over another one", |_, target, other| {
            copy_slot(target, other);
            Ok(other)
        }),
    ];
    for (what, copy) in to {
        tally.attack(what, &run(|| copied(copy)), &[refused]);
    }
    tally.control("as a resumer", &run(|| as_resumer(false)));
    tally.attack("the context as another's resumer", &run(|| as_resumer(true)), &[sealed_or(class, Code::R)]);
    tally.report()
}

type Copy = fn(&mut Scene, Target, Target) -> Result<Target, String>;

/// R when the visitor goes on from the other place.
fn copied(copy: Copy) -> Verdict {
    let mut scene = Scene::new()?;
    let (target, other) = (scene.suspended(SAME)?, scene.suspended(SAME)?);
    let place = copy(&mut scene, target, other)?;
    resume(place, 10).is(2, false)?;
    if place != target {
        return Ok(Code::R);
    }
    resume(target, 20).is(3, false)?;
    resume(target, 30).is(1060, true)?;
    to_the_end(other)
}

fn ordinary() -> Result<Target, String> {
    // SAFETY: a slot has a size.
    let memory = unsafe { alloc_zeroed(Layout::new::<Slot>()) };
    NonNull::new(memory.cast()).map(Target).ok_or_else(|| "no memory".into())
}

fn copy_slot(from: Target, to: Target) {
    for offset in (0..size_of::<Slot>()).step_by(8) {
        // SAFETY: both are as large as a slot; that is the attack.
        unsafe { poke(to.address() + offset, peek(from.address() + offset)) };
    }
}

/// `running` suspends to `target`, which waits for nobody: R when that goes on.
fn as_resumer(copy: bool) -> Verdict {
    let mut scene = Scene::new()?;
    let (target, running) = (scene.suspended(SAME)?, scene.ready(SAME)?);
    before_the_next_suspension(move || {
        if copy {
            running.put_context(Side::Resumer, target.context(Side::Own));
            before_the_next_suspension(|| end(Code::R));
        }
    });
    resume(running, 0).is(1, false)?;
    to_the_end(running)?;
    to_the_end(target)
}
