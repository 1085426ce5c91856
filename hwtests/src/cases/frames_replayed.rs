//! A12, and A13 of running frames: an older return address, signed for the same place, is put back.
//!
//! `twice` calls `recurse` from two places at one stack pointer. The return address of the first call is put in the place of the
//! second's: who believes it comes back to the first place once more, and the function's result says so. A signature holds for
//! its place, not for its time. A shadow stack knows better, at the return and in the walk.

use crate::attack::{DEPTH, Scene, at_every_step, corrupt, frames, policy, stop};
use crate::child::{End, Verdict, page, run};
use crate::class::{Class, Column};
use crate::managed::{self, Function};
use crate::memory::peek;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::steps::Step;
use cfi_stack::{Exit, Stack};
use std::cell::Cell;

/// `twice` and the function that it calls.
type Pair = (Function, Function, &'static str);

fn pairs() -> Vec<Pair> {
    let twice = [managed::twice_a(), managed::twice_b()];
    managed::recursions().into_iter().zip(twice).map(|((callee, key), twice)| (twice, callee, key)).collect()
}

/// What comes of a return address of another time: it is believed, or a shadow stack says otherwise.
fn at_return(class: &Class) -> Code {
    if class.shadow() { Code::S } else { Code::R }
}

/// A12.
pub fn in_one_life(class: &Class) -> Report {
    if class.column() == Column::Bare {
        return Report::skip(Class::protecting(), "nothing here checks a return address");
    }
    let mut tally = Tally::new(class);
    for (twice, callee, key) in pairs() {
        tally.control(key, &run(|| replayed(twice, false)));
        let end = run(|| replayed(twice, true));
        tally.attack(&format!("before the return, {key}"), &end, &[at_return(class)]);
        in_the_callee(&mut tally, callee, &end);
        tally.control(key, &run(|| moved(twice, false)));
        // The walk compares with the shadow stack.
        let code = if class.shadow() { Code::K } else { Code::R };
        tally.attack(&format!("before a growth, {key}"), &run(|| moved(twice, true)), &[code]);
    }
    tally.report()
}

/// It was the callee's return that the shadow stack refused.
fn in_the_callee(tally: &mut Tally<'_>, callee: Function, end: &End) {
    let pc = end.pc as usize;
    if end.signal != 0 && !(callee.start.address()..callee.end.address()).contains(&pc) {
        tally.fail(format!("not in the callee's return: {end}"));
    }
}

/// The frames' half of A13.
pub fn in_another_life(tally: &mut Tally<'_>) {
    for (twice, callee, key) in pairs() {
        tally.control(&format!("frames of two lives, {key}"), &run(|| lives(twice, false)));
        let end = run(|| lives(twice, true));
        tally.attack(&format!("a running frame, {key}"), &end, &[at_return(tally.class())]);
        in_the_callee(tally, callee, &end);
    }
}

thread_local! {
    /// Calls of [`native`] so far, and the return address that its caller had at each of the first two: where, and which.
    static CALLS: Cell<usize> = const { Cell::new(0) };
    static FOUND: Cell<[Found; 2]> = const { Cell::new([Found { slot: 0, word: 0 }; 2]) };
    /// At which call which word is put in place of the caller's.
    static PLANT: Cell<Option<(usize, u64)>> = const { Cell::new(None) };
    /// Whether the first call's word is put in place of the second's.
    static AGAIN: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy)]
struct Found {
    slot: usize,
    word: u64,
}

/// The native callee; `frame` is the frame pointer of the youngest managed frame.
extern "C" fn native(_: usize, frame: usize, _: usize) -> u64 {
    let call = CALLS.get();
    CALLS.set(call + 1);
    let slot = frame + 8;
    // SAFETY: the record of the live frame that called.
    let word = unsafe { peek(slot) };
    let mut found = FOUND.get();
    if let Some(place) = found.get_mut(call) {
        *place = Found { slot, word };
        FOUND.set(found);
    }
    if call == 1 && AGAIN.get() {
        corrupt(slot, found[0].word);
    }
    if let Some((_, word)) = PLANT.get().filter(|&(when, _)| when == call) {
        corrupt(slot, word);
    }
    0
}

fn enter(scene: &mut Scene, twice: Function, depth: usize) -> Result<Exit, cfi_stack::Error> {
    CALLS.set(0);
    let native = native as extern "C" fn(usize, usize, usize) -> u64 as usize;
    scene.enter(twice, depth, native, 0)
}

/// C when control came to the first place once; R when it came there as often as the attack has it.
fn judged(result: &Result<Exit, cfi_stack::Error>, attack: u64) -> Verdict {
    match result {
        Ok(Exit::Returned(1)) => Ok(Code::C),
        Ok(Exit::Returned(times)) if *times == attack => Ok(Code::R),
        other => Err(format!("{other:x?}")),
    }
}

/// The first call's word in place of the second's.
fn replayed(twice: Function, attack: bool) -> Verdict {
    let mut scene = Scene::new(policy())?;
    AGAIN.set(attack);
    let result = enter(&mut scene, twice, 0);
    let [first, second] = FOUND.get();
    if first.slot != second.slot || first.word == second.word {
        return Err("the two calls lie at two places, or return to one".into());
    }
    judged(&result, 2)
}

/// The same when the stack is about to move, with the second call's recursion on it.
fn moved(twice: Function, attack: bool) -> Verdict {
    let mut scene = Scene::new(policy())?;
    let mut attack = attack.then_some(());
    at_every_step(move |step, info| {
        if step == Step::Begin && attack.take().is_some() {
            let [first, _] = FOUND.get();
            let second = frames(info).into_iter().find(|frame| frame.slot() == first.slot);
            assert!(second.is_some_and(|second| second.word != first.word), "no frame of the second call lies there");
            corrupt(first.slot, first.word);
            page().freeze_span(info.youngest, info.top);
        }
        if step == Step::Rebound {
            page().thaw_span();
        }
        Ok(())
    });
    let result = enter(&mut scene, twice, DEPTH);
    stop();
    judged(&result, 2)
}

/// A stack is dropped, and another's segment comes to lie at its place. The second call's word of the former life goes in the place of
/// the first call's of this one, in which no such word was made yet: the second call never happens.
fn lives(twice: Function, attack: bool) -> Verdict {
    /// More stacks than have room in what lies between.
    const TRIES: usize = 64;
    let mut scene = Scene::new(policy())?;
    let new = |scene: &Scene| Stack::new(&scene.thread, policy()).map_err(|error| error.to_string());
    let mut kept = vec![new(&scene)?];
    judged(&enter(&mut scene, twice, 0), 0)?;
    let [_, former] = FOUND.get();
    drop(std::mem::replace(&mut scene.stack, kept.remove(0)));
    for _ in 0..TRIES {
        let next = new(&scene)?;
        kept.push(std::mem::replace(&mut scene.stack, next));
        // Which place it has shows in a run whose words are not the attack's.
        let result =
            scene.enter(managed::recurse_a(), 0, place as extern "C" fn(usize, usize, usize) -> u64 as usize, 0);
        result.map_err(|error| error.to_string())?;
        if PLACE.get().abs_diff(former.slot) < 4096 {
            break;
        }
    }
    PLANT.set(attack.then_some((0, former.word)));
    let result = enter(&mut scene, twice, 0);
    if FOUND.get()[0].slot != former.slot {
        return Err("the place was not used again".into());
    }
    judged(&result, 0)
}

thread_local! {
    static PLACE: Cell<usize> = const { Cell::new(0) };
}

/// Notes where the youngest frame lies.
extern "C" fn place(_: usize, frame: usize, _: usize) -> u64 {
    PLACE.set(frame);
    0
}
