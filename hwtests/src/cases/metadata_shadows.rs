//! A29, third part: what a segment's record says of its shadow segment. The way back is not in it.

use super::shadow_tokens::{is, token_elsewhere};
use crate::attack::{at_every_step, policy, stop};
use crate::child::{Verdict, page, run};
use crate::cpu;
use crate::managed;
use crate::memory::{peek, poke};
use crate::outcome::Code::{self, B, C, S, W, X};
use crate::selftest::link::{Linked, recurse};
use crate::tally::Tally;
use cfi_stack::probe::record::{AREA, NEXT, SHADOW, SHADOW_SEAL};
use cfi_stack::{Exit, Policy, Stack};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

/// Link calls within each other.
const LINKS: usize = 2;

/// Where the records of the oldest segment and of those behind it lie.
type Records = [usize; LINKS + 1];

/// What is done to them; the last argument is the place of another stack's idle token.
type Forgery = fn(&Records, usize);

struct Row {
    what: &'static str,
    forgery: Forgery,
    /// arm64, x86-64.
    codes: [Code; 2],
}

/// In bit 32 of the word with the area: the call has changed to the shadow segment.
const SHADOWED: u64 = 1 << 32;

/// While the stack is empty.
const EMPTY: [Row; 6] = [
    Row { what: "another stack's token", forgery: |records, other| set(records[1] + SHADOW, other), codes: [B, C] },
    Row {
        what: "no token",
        forgery: |records, _| set(records[1] + SHADOW, get(records[1] + SHADOW) - 8),
        codes: [B, S],
    },
    Row {
        what: "a token in ordinary memory",
        forgery: |records, _| set(records[1] + SHADOW, token_elsewhere()),
        codes: [B, W],
    },
    Row {
        what: "the token that is used up by then",
        forgery: |records, _| set(records[2] + SHADOW, get(records[1] + SHADOW)),
        codes: [B, S],
    },
    Row { what: "none", forgery: |records, _| set(records[2] + SHADOW, 0), codes: [C, C] },
    Row {
        what: "its seal",
        forgery: |records, _| set(records[1] + SHADOW_SEAL, get(records[1] + SHADOW_SEAL) ^ 1 << 40),
        codes: [B, C],
    },
];

fn get(address: usize) -> usize {
    // SAFETY: a word of a record, which lives as long as its stack.
    unsafe { peek(address) as usize }
}

fn set(address: usize, word: usize) {
    // SAFETY: that is the attack.
    unsafe { poke(address, word as u64) }
}

/// All of it, into A29's tally, where there are shadow stacks.
pub fn all(tally: &mut Tally<'_>) {
    if !tally.class().shadow() {
        return;
    }
    let code = |codes: [Code; 2]| codes[usize::from(cfg!(target_arch = "x86_64"))];
    tally.control("shadow segment", &run(|| rewritten(|_, _| {})));
    for Row { what, forgery, codes } in EMPTY {
        tally.attack(&format!("shadow segment: {what}"), &run(|| rewritten(forgery)), &[code(codes)]);
    }
    tally.control("shadow segment, while it is in use", &run(|| in_use(true, |_| {})));
    let back = run(|| in_use(true, |record| set(record + AREA, 0)));
    tally.attack("shadow segment: the return does not leave it", &back, &[S]);
    let none = run(|| in_use(false, |record| set(record + AREA, SHADOWED as usize)));
    let what = "shadow segment: the return leaves one that was not entered";
    if cfg!(target_arch = "aarch64") {
        tally.attack(what, &none, &[S]);
    } else if is(&none, libc::SIGSEGV, 128) {
        // #GP: a return address is no previous-SSP word.
        tally.seen(&format!("{what}: signal 11 si_code 128"), X, &none);
    } else {
        tally.fail(format!("{what}: {none}"));
    }
}

fn policy_of(short: bool) -> Policy {
    let shadowed = if short { policy().initial } else { usize::MAX };
    Policy { shadowed, warm: LINKS, ..policy() }
}

/// Links twice on a stack that never did, so that further segments are warm, and says where the records are.
fn records(linked: &mut Linked, short: bool) -> Result<Records, String> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let note = seen.clone();
    at_every_step(move |_, info| {
        note.borrow_mut().push(info.source_record);
        Ok(())
    });
    let first = linked.recurse_right(LINKS);
    stop();
    first?;
    let made = linked.scene.stack.stats();
    if (made.segments, made.shadow_segments) != (LINKS as u64, if short { LINKS as u64 } else { 0 }) {
        return Err(format!("{made:?}"));
    }
    let oldest = *seen.borrow().first().ok_or("no step was announced")?;
    let next = get(oldest + NEXT);
    Ok([oldest, next, get(next + NEXT)])
}

fn rewritten(forgery: Forgery) -> Verdict {
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let mut linked = Linked::new(policy_of(true), recurse(), 0, 0, 256)?;
    let others = records(&mut linked, true)?;
    let fresh = Stack::new(&linked.scene.thread, policy_of(true)).map_err(|error| error.to_string())?;
    let other = std::mem::replace(&mut linked.scene.stack, fresh);
    let records = records(&mut linked, true)?;
    forgery(&records, get(others[1] + SHADOW));
    for _ in 0..2 {
        linked.recurse_right(LINKS)?;
    }
    linked.scene.stack = other;
    linked.recurse_right(LINKS)?;
    Ok(C)
}

/// The record of the youngest segment, and what is done to it.
static YOUNGEST: AtomicUsize = AtomicUsize::new(0);
static ATTACK: AtomicUsize = AtomicUsize::new(0);

extern "C" fn attacks(_: usize, _: usize, _: usize) -> u64 {
    // SAFETY: `in_use` has put a function of this type there.
    let attack = unsafe { std::mem::transmute::<usize, fn(usize)>(ATTACK.load(Relaxed)) };
    attack(YOUNGEST.load(Relaxed));
    0
}

fn in_use(short: bool, attack: fn(usize)) -> Verdict {
    let mut linked = Linked::new(policy_of(short), recurse(), 0, 0, 256)?;
    let records = records(&mut linked, short)?;
    YOUNGEST.store(records[LINKS], Relaxed);
    ATTACK.store(attack as usize, Relaxed);
    let native = attacks as extern "C" fn(usize, usize, usize) -> u64 as usize;
    match linked.scene.enter(recurse(), LINKS, native, 0) {
        Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(LINKS as u64) => Ok(C),
        other => Err(format!("{other:x?}")),
    }
}
