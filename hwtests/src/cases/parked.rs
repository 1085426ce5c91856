//! A45, growable stacks: parked under a shared key they go on in another key domain, and attacked while they are parked they do not.

use super::process_forks::{DA, IA, Keys};
use super::return_addresses::SIGNATURE_BIT;
use crate::attack::{DEPTH, Dice, Scene, at_every_step, corrupt, policy, zero_address};
use crate::child::{Verdict, page, run};
use crate::class::{Class, Column};
use crate::cpu;
use crate::foreign::Foreign;
use crate::managed::{self, Function};
use crate::memory::peek;
use crate::outcome::Code;
use crate::tally::Tally;
use cfi_stack::pac::Signing;
use cfi_stack::steps::{Step, StepInfo};
use cfi_stack::{Exit, inspect, probe};
use std::sync::atomic::Ordering::Relaxed;

/// The key that the two threads share.
const SHARED: Signing = Signing::B;
/// Tries of a forgery that a signature lets through once in 2^width.
const FORGERIES: u64 = 1000;

/// The rows of A45 that speak of parked stacks.
pub fn rows(class: &Class, tally: &mut Tally<'_>) {
    for (function, key) in managed::recursions() {
        let end = run(|| attacked(function, DEPTH, |_| {}));
        tally.attack(&format!("a growable stack, parked, another domain's, {key}"), &end, &[Code::C]);
    }
    match class.column() {
        Column::Bare => tally.say("nothing here tells a parked stack from another"),
        Column::Cet => {
            let end = run(|| attacked(managed::recurse_a(), DEPTH, |parked| parked.change(3, 1 << 4)));
            tally.attack("a return address of a parked stack is flipped", &end, &[Code::K]);
        }
        Column::Pac | Column::PacGcs => signed(class, tally),
    }
}

fn signed(class: &Class, tally: &mut Tally<'_>) {
    let failure = [class.stub_failure()];
    for (function, key) in managed::recursions() {
        for index in [0, 3, DEPTH] {
            let end = run(|| attacked(function, DEPTH, |parked| parked.change(index, SIGNATURE_BIT)));
            tally.attack_of_many("a parked word is flipped", &format!("frame {index}, {key}"), &end, &failure);
        }
        let end = run(|| attacked(function, DEPTH, |parked| parked.words(|words| words.to_vec(), true)));
        tally.attack(&format!("all words as they were before, {key}"), &end, &failure);
        let end = run(|| attacked(function, DEPTH, |parked| parked.words(next_ones, false)));
        tally.attack(&format!("all words another frame's, parked as well, {key}"), &end, &failure);
        tally.attack(&format!("resumed as if it were not parked, {key}"), &run(|| forced(function)), &failure);
        for (what, rewrite, allowed) in REWRITES {
            let end = run(|| attacked_in_the_middle(function, rewrite));
            let allowed = if allowed == Code::K { [Code::K] } else { failure };
            tally.attack(&format!("{what}, {key}"), &end, &allowed);
        }
    }
    let before = tally.accepted();
    for attempt in 0..FORGERIES {
        let (function, _) = managed::recursions()[attempt as usize % 2];
        let mut dice = Dice::new("A45", attempt);
        let (index, back) = (1 + dice.below(DEPTH - 2), attempt % 4 < 2);
        let end = run(|| {
            attacked(function, DEPTH, |parked| match back {
                true => corrupt(parked.slots[index], parked.before[index]),
                // SAFETY: a word of the stack.
                false => corrupt(parked.slots[index], unsafe { peek(parked.slots[index + 1]) }),
            })
        });
        tally.one_of_many("one word put back, or another frame's", &end, &failure, None);
    }
    tally.rate("single words put back, or another frame's", FORGERIES, tally.accepted() - before);
}

/// What is done to the plan when all words have authenticated and none is exchanged.
type Rewrite = (&'static str, fn(&mut StepInfo<'_>), Code);

const REWRITES: [Rewrite; 2] = [
    (
        // A and B are 1 and 2: unpark is to sign with a key that the frame does not have.
        "the plan says the other own key",
        |info| info.plan().iter_mut().for_each(|entry| *entry.place_mut() ^= 3),
        Code::F,
    ),
    (
        "the plan names a place outside",
        |info| {
            let top = info.top;
            info.plan().iter_mut().for_each(|entry| *entry.place_mut() = top | 1);
        },
        Code::K,
    ),
];

/// A stack that waits, as the attacker finds it once it is parked.
struct Parked {
    /// Where the return addresses stand, youngest first.
    slots: Vec<usize>,
    /// What they were before.
    before: Vec<u64>,
}

impl Parked {
    fn change(&self, index: usize, bits: u64) {
        // SAFETY: a word of the stack.
        corrupt(self.slots[index], unsafe { peek(self.slots[index]) } ^ bits);
    }

    /// Replaces all words by what `of` makes of those before, or of the present ones.
    fn words(&self, of: impl Fn(&[u64]) -> Vec<u64>, before: bool) {
        // SAFETY: words of the stack.
        let now: Vec<u64> = self.slots.iter().map(|&slot| unsafe { peek(slot) }).collect();
        let words = of(if before { &self.before } else { &now });
        self.slots.iter().zip(words).for_each(|(&slot, word)| corrupt(slot, word));
    }
}

/// Each frame has the word of the next older one that returns to the same place.
fn next_ones(words: &[u64]) -> Vec<u64> {
    let mut words = words.to_vec();
    let last = words.len() - 1;
    words[1..last].rotate_left(1);
    words
}

fn suspended(function: Function, depth: usize) -> Result<(Scene, Parked), String> {
    managed::suspend_for_exit();
    let mut scene = Scene::new(policy())?;
    match scene.enter(function, depth, zero_address(), 0) {
        Ok(Exit::Suspended(_)) => {}
        other => return Err(format!("it did not suspend: {other:x?}")),
    }
    let slots: Vec<usize> = inspect::stack(&scene.stack).frames().map(|frame| frame.record + 8).collect();
    if slots.len() != depth + 2 {
        return Err(format!("{} frames", slots.len()));
    }
    // SAFETY: words of the stack.
    let before = slots.iter().map(|&slot| unsafe { peek(slot) }).collect();
    Ok((scene, Parked { slots, before }))
}

/// C when the stack comes to its end with the right result.
fn right(result: Result<Exit, cfi_stack::Error>, depth: usize) -> Verdict {
    match result == Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
        true => Ok(Code::C),
        false => Err(format!("{result:x?}")),
    }
}

/// Parked here, attacked, unparked and resumed by a thread that shares key B.
fn attacked(function: Function, depth: usize, attack: impl FnOnce(&Parked)) -> Verdict {
    let foreign = Foreign::new(Keys::Anew(IA | DA))?;
    let (mut scene, parked) = suspended(function, depth)?;
    page().breakpoint.store(cpu::breakpoint_of(SHARED), Relaxed);
    scene.stack.park(&scene.thread, SHARED).map_err(|error| error.to_string())?;
    attack(&parked);
    go_on(&foreign, &mut scene, depth, || {})
}

fn attacked_in_the_middle(function: Function, rewrite: fn(&mut StepInfo<'_>)) -> Verdict {
    let foreign = Foreign::new(Keys::Anew(IA | DA))?;
    let (mut scene, _) = suspended(function, DEPTH)?;
    page().breakpoint.store(cpu::breakpoint_of(SHARED), Relaxed);
    scene.stack.park(&scene.thread, SHARED).map_err(|error| error.to_string())?;
    go_on(&foreign, &mut scene, DEPTH, move || {
        at_every_step(move |now, info| {
            if now == Step::Planned {
                rewrite(info);
            }
            Ok(())
        });
    })
}

fn go_on(foreign: &Foreign, scene: &mut Scene, depth: usize, before: impl FnOnce() + Send) -> Verdict {
    let act = scene.act();
    let result = foreign.with(&mut scene.stack, move |thread, stack| {
        before();
        stack.unpark(thread)?;
        // SAFETY: the activation outlives the call, and nobody else uses it meanwhile; the functions keep nothing of a thread's.
        unsafe { stack.resume(thread, &*std::ptr::with_exposed_provenance(act), 0) }
    });
    right(result, depth)
}

/// Parked, and resumed by its own thread with the note of that gone.
fn forced(function: Function) -> Verdict {
    page().breakpoint.store(cpu::breakpoint_of(Signing::A), Relaxed);
    // The parked word of the stub, which the resumption meets first, fits its own key and place by chance once in 2^width: then another depth.
    for depth in DEPTH..DEPTH + 20 {
        let (mut scene, parked) = suspended(function, depth)?;
        scene.stack.park(&scene.thread, SHARED).map_err(|error| error.to_string())?;
        // SAFETY: a word of the stack.
        let word = unsafe { peek(parked.slots[0]) };
        if cpu::sign(cpu::strip(word), parked.slots[0] as u64 + 8, Signing::A) == word {
            continue;
        }
        // SAFETY: that is the attack.
        let result = unsafe {
            probe::forget_parked(&mut scene.stack);
            scene.stack.resume(&scene.thread, &scene.activation, 0)
        };
        return right(result, depth);
    }
    Err("every word fits".into())
}
