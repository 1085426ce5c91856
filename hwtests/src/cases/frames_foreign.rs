//! A15: a frame of stack B is copied into stack A, at the same distance from the top, before A moves.
//!
//! B's frames are live: A runs in a native callee of B's. A return address is signed for its own place, so it does not authenticate in the
//! other stack; the frame pointer that comes with it is not where the layouts put it, which shows where nothing is signed.

use super::return_addresses::{FORGERIES, PLACES};
use crate::attack::{DEPTH, Dice, Scene, at_every_step, corrupt, frames, policy, stop, zero_address};
use crate::child::{Verdict, page, run};
use crate::class::{Class, Column};
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::{peek, take_places};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::steps::{Step, StepInfo};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Stack};
use std::sync::atomic::Ordering::Relaxed;

/// Depth of B, which does not grow.
const ABOVE: usize = 25;
/// Tries of what even a fitting signature would not let through.
const WHOLE: u64 = 32;

/// What is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Nothing,
    /// Locals, saved frame pointer, return address.
    Frame,
    /// The return address alone.
    Address,
    /// The return address of the stub's record that lies there in B, where A has a frame of managed code.
    OfTheStub,
}

/// A15.
pub fn copied(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        tally.control(key, &run(|| attempt(function, What::Nothing, Dice::new("A15", 0))));
    }
    let function = managed::recurse_a();
    if class.column() == Column::Cet {
        tally.attack(
            "a return address from elsewhere",
            &run(|| attempt(function, What::OfTheStub, Dice::new("A15", 0))),
            &[Code::K],
        );
    }
    if !class.pac() {
        for number in 0..4 {
            tally.attack("a frame", &run(|| attempt(function, What::Frame, Dice::new("A15", number))), &[Code::K]);
        }
        return tally.report();
    }
    let failure = class.stub_failure();
    for number in 0..FORGERIES {
        let (function, key) = managed::recursions()[number as usize % 2];
        let end = run(|| attempt(function, What::Address, Dice::new("A15", number)));
        let what = format!("a return address, {key}");
        tally.one_of_many(&what, &end, &[failure], Some(end.notes[0] == 1));
        if !tally.is_right() {
            return tally.report();
        }
    }
    tally.rate("a return address", FORGERIES, tally.accepted());
    for number in 0..WHOLE {
        let (function, key) = managed::recursions()[number as usize % 2];
        let end = run(|| attempt(function, What::Frame, Dice::new("whole", number)));
        let caught = if end.notes[0] == 1 { Code::K } else { failure };
        tally.attack_of_many("a frame", &format!("a frame, {key}"), &end, &[caught]);
    }
    tally.report()
}

/// What B's native callee works with.
struct Inner<'a> {
    stack: Stack,
    activation: Box<Activation>,
    thread: &'a Thread,
    function: Function,
    what: What,
    dice: Dice,
    result: Option<Result<Exit, Error>>,
}

fn attempt(function: Function, what: What, mut dice: Dice) -> Verdict {
    page().breakpoint.store(cpu::breakpoint_of(function.signing), Relaxed);
    take_places(dice.below(PLACES));
    let mut scene = Scene::new(policy())?;
    let stack = Stack::new(&scene.thread, policy()).map_err(|error| error.to_string())?;
    let act = scene.act();
    let Scene { stack: outer, activation, thread, .. } = &mut scene;
    let mut inner = Inner { stack, activation: Box::default(), thread, function, what, dice, result: None };
    let native = within as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let arguments = [act, ABOVE, native, (&raw mut inner).expose_provenance()];
    // SAFETY: the hand-made functions follow the engine's rules; the thread is ours, and `inner` lives until they have returned.
    let result = unsafe { outer.enter(thread, activation, function.start, arguments) };
    stop();
    if result != Ok(Exit::Returned(managed::recursion_sum(ABOVE as u64))) {
        return Err(format!("B came to {result:x?}"));
    }
    match inner.result {
        Some(Ok(Exit::Returned(sum))) if sum == managed::recursion_sum(DEPTH as u64) => Ok(Code::C),
        other => Err(format!("A came to {other:x?}")),
    }
}

/// B's native callee: runs A, whose first growth is attacked.
extern "C" fn within(inner: usize, frame: usize, _: usize) -> u64 {
    // SAFETY: `attempt` passes its own live block, and waits.
    let inner = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Inner<'_>>(inner) };
    let Inner { stack, activation, thread, function, what, .. } = inner;
    let (what, function) = (*what, *function);
    let chosen = inner.dice.below(ABOVE - 4);
    let mut attack = (what != What::Nothing).then_some(());
    at_every_step(move |step, info| {
        if step == Step::Begin && attack.take().is_some() {
            let place = if what == What::OfTheStub { None } else { Some(chosen) };
            copy(info, function, what, frame, place);
        }
        if step == Step::Rebound {
            page().thaw_span();
        }
        Ok(())
    });
    let act = std::ptr::from_ref(&**activation).expose_provenance();
    // SAFETY: as in `attempt`.
    let result = unsafe { stack.enter(thread, activation, function.start, [act, DEPTH, zero_address(), 0]) };
    inner.result = Some(result);
    0
}

/// Copies what lies in B at the same distance from the top as a frame of A, the `chosen` one from B's youngest on; `None`: the stub's.
fn copy(info: &StepInfo<'_>, function: Function, what: What, youngest: usize, chosen: Option<usize>) {
    let of_b = of_managed_code(youngest);
    let top_of_b = of_b[of_b.len() - 1] + 16;
    let size = function.frame_bytes as usize;
    // Below the youngest frame of managed code lies the record of `exit`.
    let from = chosen.map_or(youngest - size - 16, |chosen| of_b[chosen]);
    let record = from + (info.top - top_of_b);
    let victim = frames(info).into_iter().find(|frame| frame.record == record).expect("A has a frame there");
    // SAFETY: B's frames are live, and this frame's locals lie below its record.
    let word = |offset: usize| unsafe { peek(from - size + offset) };
    let signed = word(size + 8);
    let fits = cpu::sign(cpu::strip(signed), victim.modifier(), function.signing) == signed;
    page().notes[0].store(u64::from(fits), Relaxed);
    corrupt(victim.slot(), signed);
    if what == What::Frame {
        (0..=size).step_by(8).for_each(|offset| corrupt(record - size + offset, word(offset)));
    }
    page().freeze_span(info.youngest, info.top);
}

/// The records of managed code from the youngest on, up to the oldest of its stack.
fn of_managed_code(youngest: usize) -> Vec<usize> {
    let mut records = vec![youngest];
    loop {
        let last = records[records.len() - 1];
        // SAFETY: the chain of live frames, as managed code has made it.
        let (next, word) = unsafe { (peek(last) as usize, peek(last + 8)) };
        if cpu::strip(word) as usize == managed::entry_return().address() {
            return records;
        }
        records.push(next);
    }
}
