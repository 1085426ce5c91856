//! A20: a pointer left into the segment that the stack moved from is used.
//!
//! The functions are registered without the slots in which they keep pointers into their own frames. Where the policy poisons, the use
//! faults at that address; elsewhere it finds what lies there.

use crate::attack::{ONE_GROWTH, Scene, at_every_step, frames, policy, stop};
use crate::child::{End, Verdict, leave_room_above_a_canary, page, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::Registration;
use cfi_stack::steps::Step;
use cfi_stack::{Exit, Policy};
use std::sync::atomic::Ordering::Relaxed;

/// Where the child notes the address whose use must fault.
const STALE: usize = 0;
/// What the attacker adds to a word that is read through a pointer left behind.
const MORE: u64 = 1000;

/// Who uses the pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// Managed code loads through it.
    Frame,
    /// Native code stores through one that it was given before the growth.
    Native,
}

/// A20.
pub fn used(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let poison = Policy { poison: true, ..policy() };
    let always = Policy { relocate_always: true, ..policy() };
    for (function, key) in managed::recursions() {
        for policy in [policy(), poison, always] {
            tally.control(&format!("every slot declared, {key}"), &run(|| declared(function, policy)));
        }
        for (what, policy) in [("poison", poison), ("relocate_always", always)] {
            for user in [User::Frame, User::Native] {
                let what = format!("{user:?} with {what}, {key}");
                let end = run(|| through_stale(function, policy, user));
                tally.attack(&what, &end, &[Code::G]);
                at_the_address(&mut tally, &what, &end, function, user);
            }
        }
        for user in [User::Frame, User::Native] {
            let what = format!("{user:?} without poison, {key}");
            tally.attack(&what, &run(|| through_stale(function, policy(), user)), &[Code::R]);
        }
    }
    tally.report()
}

fn at_the_address(tally: &mut Tally<'_>, what: &str, end: &End, function: Function, user: User) {
    if end.address != end.notes[STALE] {
        tally.fail(format!("{what}: not at {:#x}: {end}", end.notes[STALE]));
    }
    let in_function = (function.start.address()..function.end.address()).contains(&(end.pc as usize));
    if in_function != (user == User::Frame) {
        tally.fail(format!("{what}: not where it is used: {end}"));
    }
}

fn declared(function: Function, policy: Policy) -> Verdict {
    Scene::new(policy)?.recurse_right(function, ONE_GROWTH).map(|()| Code::C)
}

/// The growth whose source is used afterwards, and how deep the recursion goes: with `relocate_always` each call moves the stack, and what was left
/// longer ago is not mapped any more.
fn plan(policy: Policy) -> (usize, usize) {
    if policy.relocate_always { (2, 1) } else { (1, ONE_GROWTH) }
}

fn through_stale(function: Function, policy: Policy, user: User) -> Verdict {
    managed::link();
    let mut map = Registration::new();
    managed::functions().into_iter().for_each(|function| managed::describe(&mut map, function));
    if user == User::Native {
        managed::sites().into_iter().for_each(|site| map.safepoint(site, &[-24]).expect("the slot lies in the frame"));
    }
    let mut scene = Scene::with(map.publish().map_err(|error| error.to_string())?, policy)?;
    let (growth, depth) = plan(policy);
    let poisons = policy.poison || policy.relocate_always;
    let mut begun = 0;
    at_every_step(move |step, info| {
        if step == Step::Begin {
            begun += 1;
            if begun + 1 == growth {
                leave_room_above_a_canary(policy.guard + policy.initial);
            }
            if begun == growth {
                // The youngest frame writes its pointer after the growth; its caller has written its own.
                let stale = frames(info)[2].record - 32;
                page().notes[STALE].store(stale as u64, Relaxed);
                if poisons {
                    // All that was the segment and its guard is to be inaccessible.
                    page().guard(info.top, info.top - info.base + policy.guard);
                }
            }
        }
        if step == Step::Committed && begun == growth && (user == User::Native || !poisons) {
            let stale = page().notes[STALE].load(Relaxed) as usize;
            // SAFETY: that is the attack: a word of the segment that was left.
            unsafe {
                let word = if poisons { 0 } else { peek(stale) };
                poke(stale, word + MORE);
            }
        }
        Ok(())
    });
    let result = scene.recurse(function, depth);
    stop();
    let right = managed::recursion_sum(depth as u64);
    match (result, user) {
        (Ok(Exit::Returned(sum)), User::Frame) if sum == right + MORE => Ok(Code::R),
        // The store went to where the frame is not any more.
        (Ok(Exit::Returned(sum)), User::Native) if sum == right => Ok(Code::R),
        (other, _) => Err(format!("{other:x?}")),
    }
}
