//! A16: a return address is flipped while `rebind` re-signs it: where that takes it from, which is the source where it signs, else the
//! destination.
//!
//! Stepped, at every instruction boundary of `rebind`: up to the load the flip is found out. From then on one of the source changes nothing,
//! because everything that is done with the word is done in registers; one of the destination meets the shadow stack at the return. Raced, by a second thread, at any time from the walk on.

use super::return_addresses::SIGNATURE_BIT;
use crate::attack::{ONE_GROWTH, Scene, at_every_step, frames, policy, stop};
use crate::child::{End, Verdict, page, run};
use crate::class::{Class, Column};
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::stepper::{self, Boundary};
use crate::tally::Tally;
use cfi_stack::Policy;
use cfi_stack::pac::Signing;
use cfi_stack::steps::Step;
use std::cell::Cell;
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};

unsafe extern "C" {
    fn cfi_stack_rebind();
}

/// Where the child counts boundaries, notes at which pc it flipped, and counts races.
const BOUNDARIES: usize = 0;
const AT: usize = 1;
const RACED: usize = 2;

/// The bit that is flipped: of the signature where there is one.
fn bit(signing: Signing) -> u64 {
    if signing == Signing::None || cfg!(not(target_arch = "aarch64")) { 1 << 4 } else { SIGNATURE_BIT }
}

/// What a flip that is seen comes to.
fn caught(class: &Class) -> Code {
    if class.pac() { class.stub_failure() } else { Code::K }
}

/// What a flip that comes too late comes to.
fn late(class: &Class) -> Code {
    if class.pac() { Code::C } else { Code::S }
}

/// A16.
pub fn all(class: &Class) -> Report {
    if class.column() == Column::Bare {
        return Report::skip(Class::protecting(), "nothing here checks a return address");
    }
    let mut tally = Tally::new(class);
    match stepper::unavailable(class) {
        None => at_every_boundary(&mut tally, class),
        Some(reason) => tally.say(format!("not stepped: {reason}")),
    }
    match std::thread::available_parallelism() {
        Ok(cpus) if cpus.get() > 1 => freely(&mut tally, class),
        _ => tally.say("not raced: one CPU"),
    }
    tally.report()
}

/// What the visitor is to do: flip this bit of this word at this boundary.
#[derive(Clone, Copy)]
struct Order {
    slot: usize,
    bit: u64,
    at: Option<u64>,
}

thread_local! {
    static ORDER: Cell<Option<Order>> = const { Cell::new(None) };
}

fn attack(boundary: &Boundary) {
    let Some(Order { slot, bit, at }) = ORDER.get() else { return };
    page().notes[BOUNDARIES].store(boundary.number + 1, Relaxed);
    if at == Some(boundary.number) {
        // SAFETY: a return address in the source: that is the attack.
        unsafe { poke(slot, peek(slot) ^ bit) };
        page().notes[AT].store(boundary.pc as u64, Relaxed);
        stepper::enough();
    }
}

/// The second growth of a recursion that moves at every call, with three frames, the one in the middle under attack.
fn stepped(function: Function, at: Option<u64>, signs: bool) -> Verdict {
    page().breakpoint.store(cpu::breakpoint_of(function.signing), Relaxed);
    let mut scene = Scene::new(Policy { relocate_always: true, ..policy() })?;
    let mut growths = 0;
    at_every_step(move |step, info| {
        growths += usize::from(step == Step::Begin);
        match step {
            Step::Rebased if growths == 2 => {
                let victim = frames(info)[1];
                let slot = if signs { victim.slot() } else { victim.slot().wrapping_add(info.delta) };
                ORDER.set(Some(Order { slot, bit: bit(function.signing), at }));
                stepper::begin(attack, at.unwrap_or(0));
            }
            Step::Rebound => stepper::enough(),
            _ => {}
        }
        Ok(())
    });
    let right = scene.recurse_right(function, 1);
    stop();
    right.map(|()| Code::C)
}

fn at_every_boundary(tally: &mut Tally<'_>, class: &Class) {
    let code = [stepper::Code::new("rebind", cfi_stack_rebind as *const () as usize)];
    for (function, key) in managed::recursions() {
        let (end, _) = stepper::run(&code, || stepped(function, None, class.pac()));
        tally.control(key, &end);
        let boundaries = end.notes[BOUNDARIES];
        let mut seen: [Option<(u64, End)>; 2] = [None, None];
        for at in 0..boundaries {
            crate::progress::tick(&format!("{key}, at {at} of {boundaries}"));
            let (end, _) = stepper::run(&code, || stepped(function, Some(at), class.pac()));
            if end.notes[AT] == 0 {
                return tally.fail(format!("{key}, at {at} of {boundaries}: the attack was never made ({end})"));
            }
            let place = code[0].at(end.notes[AT] as usize);
            let harmless = match end.code(class) {
                Ok(code) if code == caught(class) => 0,
                Ok(code) if code == late(class) => 1,
                Ok(code) => return tally.fail(format!("flipped at {place}, {key}: {code} ({end})")),
                Err(text) => return tally.fail(format!("flipped at {place}, {key}: {text}")),
            };
            if harmless == 0 && seen[1].is_some() {
                tally.fail(format!("flipped at {place}, {key}: found out, though an earlier boundary was too late"));
            }
            let count = seen[harmless].as_ref().map_or(0, |(count, _)| *count);
            seen[harmless] = Some((count + 1, end));
        }
        let [Some(before), Some(after)] = seen else {
            return tally
                .fail(format!("{key}: of {boundaries} boundaries none was before the load, or none behind it"));
        };
        tally.alike(&format!("up to the load, {key}"), caught(class), before.0, &before.1);
        tally.alike(&format!("behind the load, {key}"), late(class), after.0, &after.1);
    }
}

/// So many growths with a flip in each, over all functions.
const RACES: u64 = 1_000;
/// No more recursions than this in one child.
const ROUNDS: usize = 1_000;

/// The word to flip, while there is one; whether the attacker has it in hand; flips so far; whether it is over.
static SLOT: AtomicUsize = AtomicUsize::new(0);
static IN_HAND: AtomicBool = AtomicBool::new(false);
static FLIPPED: AtomicU64 = AtomicU64::new(0);
static OVER: AtomicBool = AtomicBool::new(false);

/// A short while.
fn linger(turns: u32) {
    (0..turns).for_each(|turn| {
        std::hint::black_box(turn);
    });
}

/// Flips the word that it is shown, and flips it back, as long as it is shown it.
fn flips(bit: u64, pause: u32) {
    while !OVER.load(SeqCst) {
        IN_HAND.store(true, SeqCst);
        let slot = SLOT.load(SeqCst);
        if slot != 0 {
            // SAFETY: the growth that shows it waits, before the source goes, until nobody has it in hand.
            unsafe {
                let word = peek(slot);
                poke(slot, word ^ bit);
                linger(pause % 16);
                poke(slot, word);
            }
            FLIPPED.fetch_add(1, SeqCst);
        }
        IN_HAND.store(false, SeqCst);
        linger(pause);
    }
}

/// Grows at every call while the other thread flips a return address of the source, until there were `enough` growths with a flip in them.
fn raced(function: Function, pause: Option<u32>, enough: u64) -> Verdict {
    page().breakpoint.store(cpu::breakpoint_of(function.signing), Relaxed);
    let mut scene = Scene::new(Policy { relocate_always: true, ..policy() })?;
    let attacker = pause.map(|pause| {
        let bit = bit(function.signing);
        std::thread::spawn(move || flips(bit, pause))
    });
    let mut before = 0;
    at_every_step(move |step, info| {
        match step {
            // Shown from before the walk on until all is re-signed.
            Step::Begin => {
                let frames = frames(info);
                before = FLIPPED.load(SeqCst);
                SLOT.store(frames[frames.len() / 2].slot(), SeqCst);
            }
            // It is a race if both have moved.
            Step::Rebased if FLIPPED.load(SeqCst) != before => {
                page().notes[RACED].fetch_add(1, SeqCst);
            }
            Step::Rebound => {
                SLOT.store(0, SeqCst);
                while IN_HAND.load(SeqCst) {
                    std::thread::yield_now();
                }
            }
            _ => {}
        }
        Ok(())
    });
    let mut right = Ok(());
    for _ in 0..ROUNDS {
        right = scene.recurse_right(function, ONE_GROWTH / 2);
        if right.is_err() || attacker.is_none() || page().notes[RACED].load(Relaxed) >= enough {
            break;
        }
    }
    stop();
    OVER.store(true, SeqCst);
    if let Some(attacker) = attacker {
        attacker.join().map_err(|_| "the attacker panicked")?;
    }
    right.map(|()| Code::C)
}

fn freely(tally: &mut Tally<'_>, class: &Class) {
    let functions = managed::recursions();
    let each = RACES / functions.len() as u64;
    let mut races = 0;
    for (function, key) in functions {
        tally.control(&format!("a race without an attacker, {key}"), &run(|| raced(function, None, 0)));
        let mut left = each;
        let mut pause = 40;
        let mut ends: [(u64, Option<End>); 2] = [(0, None), (0, None)];
        while left > 0 {
            crate::progress::tick(&format!("{key}: {left} races left"));
            let end = run(|| raced(function, Some(pause), left));
            pause = (pause * 7 + 30) % 1021;
            races += end.notes[RACED];
            left = left.saturating_sub(end.notes[RACED].max(1));
            let harmless = match end.code(class) {
                Ok(code) if code == caught(class) => 0,
                Ok(Code::C) => 1,
                Ok(code) => return tally.fail(format!("raced, {key}: {code} ({end})")),
                Err(text) => return tally.fail(format!("raced, {key}: {text}")),
            };
            ends[harmless] = (ends[harmless].0 + 1, Some(end));
        }
        for ((count, end), code) in ends.into_iter().zip([caught(class), Code::C]) {
            if let Some(end) = end {
                tally.alike(&format!("raced, {key}"), code, count, &end);
            }
        }
    }
    tally.say(format!("{races} growths raced"));
}
