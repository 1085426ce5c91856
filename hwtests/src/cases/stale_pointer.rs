//! A20: a pointer left into the segment that the stack moved from is used.
//!
//! The functions are registered without the slots in which they keep pointers into their own frames. Where the policy poisons, the use
//! faults at that address; elsewhere it finds what lies there by then.

use crate::attack::{ONE_GROWTH, Scene, at_every_step, frames, policy, stop, zero_address};
use crate::child::{End, Verdict, leave_room_above_a_canary, page, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::Registration;
use cfi_stack::steps::Step;
use cfi_stack::{Exit, Policy};
use std::cell::RefCell;
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
        let what = format!("Frame without poison, other memory there, {key}");
        tally.attack(&what, &run(|| through_stale(function, policy(), User::Frame)), &[Code::R]);
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
                leave_room_above_a_canary(policy.guard, policy.initial);
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
        if step == Step::Begin && begun == growth && !poisons {
            // SAFETY: the segment that the hook was shown.
            let words = (info.base..info.top).step_by(8).map(|place| unsafe { peek(place) }).collect();
            LEFT.set((info.base, words));
        }
        if step == Step::Committed && begun == growth && user == User::Native {
            // SAFETY: that is the attack: a word of the segment that was left.
            unsafe { poke(page().notes[STALE].load(Relaxed) as usize, MORE) };
        }
        Ok(())
    });
    let callee =
        if poisons { zero_address() } else { maps_again as extern "C" fn(usize, usize, usize) -> u64 as usize };
    let result = scene.enter(function, depth, callee, 0);
    stop();
    match result {
        Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(depth as u64) + MORE => Ok(Code::R),
        other => Err(format!("{other:x?}")),
    }
}

thread_local! {
    /// The segment that is left: its base, and what lay in it.
    static LEFT: RefCell<(usize, Vec<u64>)> = const { RefCell::new((0, Vec::new())) };
}

/// The native callee: other memory comes to lie where the old segment was, with one word changed.
extern "C" fn maps_again(_: usize, _: usize, _: usize) -> u64 {
    let (base, words) = LEFT.take();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let writable = libc::PROT_READ | libc::PROT_WRITE;
    let place = std::ptr::with_exposed_provenance_mut(base);
    // SAFETY: takes only what is free.
    let made = unsafe { libc::mmap(place, words.len() * 8, writable, flags, -1, 0) };
    assert!(made == place, "the old segment is still mapped");
    for (index, word) in words.into_iter().enumerate() {
        let at = base + index * 8;
        let more = if at as u64 == page().notes[STALE].load(Relaxed) { MORE } else { 0 };
        // SAFETY: within the mapping just made.
        unsafe { poke(at, word + more) };
    }
    0
}
