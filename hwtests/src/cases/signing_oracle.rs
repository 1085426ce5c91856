//! A25 and A26: the attacker writes a value into a return-address slot between plan and re-bind, and reads the output slot.

use super::return_addresses::{FORGERIES, PLACES, SIGNATURE_BIT};
use crate::attack::{DEPTH, Dice, Found, Kept, Scene, at_every_step, corrupt, frames, policy, stop, under_attack};
use crate::child::{End, Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::{peek, take_places};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Policy;
use cfi_stack::steps::{Step, StepInfo};
use std::sync::atomic::Ordering::Relaxed;

/// Tries of what even a fitting signature would not let through.
const FOREIGN: u64 = 100;

/// What the attacker would like to have signed, given the frames and the victim's index.
type Choice = fn(&[Found], usize) -> u64;

const RAW: Choice = |frames, at| cpu::strip(frames[at].word);
const FOREIGN_CODE: Choice = |_, _| crate::attack::zero_address() as u64;
const ANOTHERS: Choice = |frames, _| frames[0].word;
const FLIPPED: Choice = |frames, at| frames[at].word ^ SIGNATURE_BIT;

/// A25.
pub fn chosen_values(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        tally.control(key, &run(|| under_attack(function, DEPTH, Step::Rebased, |_| {})));
    }
    if !class.pac() {
        // Nothing signs, and nothing is taken from the source once it is copied: the destination's words must be the planned ones.
        let function = managed::recurse_a();
        for (what, choice) in [("foreign code", FOREIGN_CODE), ("another frame's", ANOTHERS)] {
            let end = run(|| attempt(function, Dice::new("A25", 0), choice));
            unwritten(&mut tally, what, &end);
            tally.attack(what, &end, &[Code::C]);
        }
        return tally.report();
    }
    let failure = class.stub_failure();
    for number in 0..FORGERIES {
        let (function, key) = managed::recursions()[number as usize % 2];
        let end = run(|| attempt(function, Dice::new("A25", number), RAW));
        unwritten(&mut tally, "the raw planned address", &end);
        tally.one_of_many(&format!("the raw planned address, {key}"), &end, &[failure], Some(end.notes[0] == 1));
        if !tally.is_right() {
            return tally.report();
        }
    }
    tally.rate("the raw planned address", FORGERIES, tally.accepted());
    // A signature that fits by chance is no use: the address is not the one planned with.
    for (what, choice) in [("foreign code", FOREIGN_CODE), ("another frame's signed word", ANOTHERS)] {
        let before = tally.accepted();
        for number in 0..FOREIGN {
            let (function, key) = managed::recursions()[number as usize % 2];
            let end = run(|| attempt(function, Dice::new(what, number), choice));
            unwritten(&mut tally, what, &end);
            let caught = if end.notes[0] == 1 { Code::K } else { failure };
            tally.one_of_many(&format!("{what}, {key}"), &end, &[caught], Some(false));
        }
        tally.say(format!("{what}: {} of {FOREIGN} accepted", tally.accepted() - before));
    }
    for (function, key) in managed::recursions() {
        let end = run(|| attempt(function, Dice::new("flip", 0), FLIPPED));
        unwritten(&mut tally, "a flipped signature bit", &end);
        tally.attack(&format!("a flipped signature bit, {key}"), &end, &[failure]);
    }
    tally.report()
}

/// The output slot holds what was copied there, and was seen whenever a signal ended the run.
fn unwritten(tally: &mut Tally<'_>, what: &str, end: &End) {
    match end.found[0] {
        Some(found) if found != end.notes[1] => {
            tally.fail(format!("{what}: the output slot changed from {:#x} to {found:#x}", end.notes[1]));
        }
        None if matches!(end.code(tally.class()), Ok(Code::F | Code::B | Code::K)) => {
            tally.fail(format!("{what}: nobody saw the output slot ({end})"));
        }
        _ => {}
    }
}

fn attempt(function: Function, mut dice: Dice, choice: Choice) -> Verdict {
    take_places(dice.below(PLACES));
    under_attack(function, DEPTH, Step::Rebased, move |info| {
        let frames = frames(info);
        let at = 1 + dice.below(frames.len() - 2);
        let victim = frames[at];
        let chosen = choice(&frames, at);
        let fits = cpu::sign(cpu::strip(chosen), victim.modifier(), function.signing) == chosen;
        page().notes[0].store(u64::from(fits), Relaxed);
        watch_output(info, victim);
        corrupt(victim.slot(), chosen);
        page().freeze_span(info.youngest, info.top);
    })
}

/// As many values as a signature has with 48-bit addresses.
const GUESSES: u64 = 128;
/// Guesses where one shows as much as all: with the other key, and where nothing is signed.
const SOME: u64 = 16;
/// Lowest bit of a signature.
const LOWEST_BIT: u32 = 48;
/// Where the child counts its guesses.
const MADE: usize = 2;

/// A26: every value that a signature can have, before a foreign address, each child as many of them as it can. It can one.
pub fn many_guesses(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let failure = if class.pac() { class.stub_failure() } else { Code::K };
    let mut fitting = 0;
    for (index, (function, key)) in managed::recursions().into_iter().enumerate() {
        tally.control(key, &run(|| guesses(function, None, class.pac())));
        for first in 0..if class.pac() && index == 0 { GUESSES } else { SOME } {
            let end = run(|| guesses(function, Some(first), class.pac()));
            unwritten(&mut tally, key, &end);
            let fits = class.pac() && end.notes[0] == 1;
            fitting += u64::from(fits);
            tally.attack_of_many(key, &format!("guess {first}, {key}"), &end, &[if fits { Code::K } else { failure }]);
            if end.notes[MADE] != 1 {
                tally.fail(format!("{} guesses from {first} on, {key}", end.notes[MADE]));
            }
        }
    }
    tally.say(format!(
        "each died of its first guess; {fitting} were right, and the address was not the one planned with"
    ));
    tally.report()
}

/// Has the stack move at every call; each time, the attacker tries the next value.
fn guesses(function: Function, first: Option<u64>, signs: bool) -> Verdict {
    /// Moves after which there are frames to choose from.
    const FRAMES: usize = 8;
    let mut scene = Scene::new(Policy { relocate_always: true, ..policy() })?;
    page().breakpoint.store(cpu::breakpoint_of(function.signing), Relaxed);
    at_every_step(move |step, info| {
        if step == Step::Rebound {
            page().thaw_span();
        }
        let Some(first) = first else { return Ok(()) };
        let frames = frames(info);
        if step == Step::Rebased && frames.len() > FRAMES {
            let made = page().notes[MADE].fetch_add(1, Relaxed);
            let victim = frames[FRAMES / 2];
            let chosen = crate::attack::zero_address() as u64 | (((first + made) % GUESSES) << LOWEST_BIT);
            let fits = cpu::sign(cpu::strip(chosen), victim.modifier(), function.signing) == chosen;
            page().notes[0].store(u64::from(fits), Relaxed);
            if signs {
                watch_output(info, victim);
                corrupt(victim.slot(), chosen);
            } else {
                // Nothing is taken from the source once it is copied.
                corrupt(victim.slot().wrapping_add(info.delta), chosen);
                watch_output(info, victim);
            }
            page().freeze_span(info.youngest, info.top);
        }
        Ok(())
    });
    let right = scene.recurse_right(function, 4 * FRAMES);
    stop();
    right.map(|()| Code::C)
}

/// Has the handler look at what lies in the output slot, and notes what the copy has left there.
fn watch_output(info: &StepInfo<'_>, victim: Found) {
    let output = victim.slot().wrapping_add(info.delta);
    // SAFETY: the span was copied there.
    page().notes[1].store(unsafe { peek(output) }, Relaxed);
    // With K the library unmaps the destination before it ends the process.
    page().watch(0, Kept::destination(info).view(output).unwrap_or(output));
}
