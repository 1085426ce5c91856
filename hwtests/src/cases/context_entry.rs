//! A09: what a stack that has not run yet will run is overwritten.
//!
//! arm64 seals entry, data and slot with the context. x86 seals nothing: the attacker's function runs, with the attacker's data (R). The slot
//! that the entry function gets is compared with the stack when that function returns (K).

use super::context_scene::{SAME, Scene, Side, Target, change, nothing_looks, resume, sealed_or, to_the_end};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::probe::{Slot, forced, frame};
use std::sync::atomic::Ordering::Relaxed;

/// Where a ready stack's frame has the slot: x21, r13.
const SLOT: usize = if cfg!(target_arch = "x86_64") { frame::DATA - 8 } else { frame::DATA + 8 };
/// What the right entry gets as data, and what the attacker would rather have.
const DATA: usize = 11;
const ATTACKERS_DATA: usize = 13;

/// A09.
pub fn overwritten(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("ready", &run(|| started(|_, _| {})));
    let entry: Attack = |target, _| {
        change(target.frame(Side::Own, frame::CALLEE_SAVED), |_| wrong as *const () as u64);
    };
    tally.attack("entry", &run(|| started(entry)), &[sealed_or(class, Code::R)]);
    let data: Attack = |target, _| change(target.frame(Side::Own, frame::DATA), |_| ATTACKERS_DATA as u64);
    tally.attack("data", &run(|| started(data)), &[sealed_or(class, Code::R)]);
    let slot: Attack = |target, other| change(target.frame(Side::Own, SLOT), |_| other.address() as u64);
    tally.attack("slot", &run(|| started(slot)), &[sealed_or(class, Code::K)]);
    tally.report()
}

type Attack = fn(Target, Target);

/// C when the right function ran with the right data, R when another did.
fn started(attack: Attack) -> Verdict {
    let mut scene = Scene::new()?;
    let other = scene.suspended(SAME)?;
    let target = scene.lease()?;
    // SAFETY: just leased, nothing is on it.
    unsafe { forced::prepare(target.0, right, DATA) };
    attack(target, other);
    let got = resume(target, 1);
    let ran = (page().notes[0].load(Relaxed), page().notes[1].load(Relaxed) as usize);
    to_the_end(other)?;
    match ran {
        (RIGHT, DATA) => got.is(1 + DATA, true).map(|()| Code::C),
        (WRONG, DATA) => got.is(2, true).map(|()| Code::R),
        (RIGHT, ATTACKERS_DATA) => got.is(1 + ATTACKERS_DATA, true).map(|()| Code::R),
        _ => Err(format!("{ran:?} ran")),
    }
}

const RIGHT: u64 = 1;
const WRONG: u64 = 2;

fn note(which: u64, data: usize) {
    page().notes[0].store(which, Relaxed);
    page().notes[1].store(data as u64, Relaxed);
}

unsafe extern "C" fn right(arg: usize, data: usize, _: *mut Slot) -> usize {
    note(RIGHT, data);
    arg + data
}

unsafe extern "C" fn wrong(_: usize, data: usize, _: *mut Slot) -> usize {
    note(WRONG, data);
    2
}
