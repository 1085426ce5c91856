//! A02, A05, A29: what the control block of a suspended growable stack says is rewritten, and the stack moves or is resumed.
//!
//! arm64 seals where managed code waits, as in a link record. On x86-64 the place must lie in the stack; another frame's is returned from (R)
//! unless a shadow stack sees it (S). What native code left must be what the oldest frame has saved, everywhere (B). Registers are data (R).

use super::growable_scene::{
    Codes, Control, OTHER_FRAME, Place, Words, everywhere, expect_the_stubs_check, of, older, sealed,
};
use crate::attack::policy;
use crate::child::{How, Verdict, run};
use crate::outcome::Code::{self, B, C, E, K, R, S};
use crate::selftest::spans::{Op, Run, World, small};
use crate::stepper::function_at;
use crate::tally::Tally;
use cfi_stack::probe::growable::{
    CONTROL, GENERATION, IDENTITY, LINK, LINK_PC, LINK_RECORD, LINK_SEAL, NATIVE_SP, NESTED, OUTCOME, SAVED, SEGMENT,
    SUSPENDED,
};
use cfi_stack::{Error, Exit, Stack};
use std::cell::Cell;

struct Row {
    what: &'static str,
    attack: fn(&Place),
    /// Whether the stack is moved before it is resumed.
    moves: bool,
    codes: Codes,
}

const fn row(what: &'static str, moves: bool, codes: Codes, attack: fn(&Place)) -> Row {
    Row { what, attack, moves, codes }
}

const RESUMED: bool = false;
const MOVED: bool = true;
const IN_THE_WALK: Codes = [Some(B), Some(K), Some(K), Some(R), Some(R)];
const WHERE: usize = SUSPENDED + LINK_RECORD;

/// A02: where managed code waits.
const PLACES: [Row; 6] = [
    // What lies sixteen bytes up is no return address.
    row("growable, +16", RESUMED, [Some(B), Some(B), Some(S), None, None], |at| {
        at.control.change(WHERE, |word| word + 16)
    }),
    row("growable, -16", RESUMED, [Some(B), Some(B), Some(S), None, None], |at| {
        at.control.change(WHERE, |word| word - 16)
    }),
    row("growable, another frame's", RESUMED, OTHER_FRAME, |at| {
        at.control.change(WHERE, |word| older(word as u64) as usize)
    }),
    row("growable, another frame's", MOVED, IN_THE_WALK, |at| {
        at.control.change(WHERE, |word| older(word as u64) as usize)
    }),
    row("growable, outside", RESUMED, everywhere(B), |at| at.control.set(WHERE, at.control.0)),
    row("growable, outside", MOVED, everywhere(K), |at| at.control.set(WHERE, at.control.0)),
];

/// A29: the others.
const ROWS: [Row; 12] = [
    row("pc", RESUMED, everywhere(C), |at| at.control.change(SUSPENDED + LINK_PC, |word| word + 4)),
    row("seal", RESUMED, sealed(B, C), |at| at.control.change(SUSPENDED + LINK_SEAL, |word| word ^ 1 << 40)),
    row("seal", MOVED, sealed(B, C), |at| at.control.change(SUSPENDED + LINK_SEAL, |word| word ^ 1 << 40)),
    row("an earlier suspension's words", RESUMED, [Some(R), Some(S), Some(S), Some(R), Some(R)], |at| {
        Words::<4>(at.control.0 + SUSPENDED).set(at.earlier);
    }),
    row("native sp", RESUMED, everywhere(B), |at| at.control.change(NATIVE_SP, |word| word - 64)),
    row("segment", RESUMED, everywhere(C), |at| at.control.set(SEGMENT, 0)),
    row("identity", RESUMED, [Some(B), Some(B), Some(C), Some(B), Some(C)], |at| {
        at.control.change(IDENTITY, |word| word + 1)
    }),
    row("identity", MOVED, everywhere(K), |at| at.control.change(IDENTITY, |word| word + 1)),
    row("generation", RESUMED, [Some(B), Some(B), Some(C), Some(B), Some(C)], |at| {
        at.control.change(GENERATION, |word| word + 1)
    }),
    row("nested", RESUMED, everywhere(E), |at| at.control.set(NESTED, 1)),
    row("outcome", RESUMED, everywhere(C), |at| at.control.set(OUTCOME, 99)),
    row("link", RESUMED, everywhere(C), |at| at.control.set(LINK, 16)),
];

fn attack_all(tally: &mut Tally<'_>, rows: &[Row]) {
    for moves in [RESUMED, MOVED] {
        let what = if moves { "growable, suspended, moved" } else { "growable, suspended" };
        tally.control(what, &run(|| attacked(None, moves, C)));
    }
    for &Row { what, attack, moves, codes } in rows {
        if let Some(code) = of(tally.class(), codes) {
            let end = run(|| attacked(Some(attack), moves, code));
            let then = if moves { "moved" } else { "resumed" };
            tally.attack(&format!("suspended: {what}, then {then}"), &end, &[code]);
        }
    }
}

/// Into A02's tally.
pub fn places(tally: &mut Tally<'_>) {
    attack_all(tally, &PLACES);
}

/// Into A29's tally.
pub fn all(tally: &mut Tally<'_>) {
    attack_all(tally, &ROWS);
    let end = run(|| attacked(Some(|at| at.control.change(SAVED, |word| word ^ 1 << 20)), RESUMED, R));
    // The managed code that has got another value says so itself.
    let what = "suspended: a callee-saved register";
    if end.how == How::Caught && function_at(end.pc as usize) == small().start.address() {
        tally.seen(what, R, &end);
    } else {
        tally.fail(format!("{what}: {end}"));
    }
}

/// Into A05's tally: what two suspended stacks wait by is exchanged; then both control blocks whole.
pub fn exchanged(tally: &mut Tally<'_>) {
    tally.control("growable", &run(|| two(None)));
    for (what, words) in [("growable, where they wait", SUSPENDED..SAVED), ("growable, control blocks", 0..CONTROL)] {
        tally.attack(what, &run(|| two(Some(words.clone()))), &[B]);
    }
}

/// Frames of a suspended stack.
const DEPTH: usize = 6;
/// As in `metadata_growable`.
const HELD: u64 = 7;

thread_local! {
    /// The control block of the stack that has run last.
    static CONTROL_BLOCK: Cell<usize> = const { Cell::new(0) };
}

/// Suspends when it is three deep, then at its deepest; then once more, then returns.
fn world() -> Box<World<'static>> {
    let mut suspensions = 0;
    World::new(move |world| {
        CONTROL_BLOCK.set(Control::of(world).0);
        let depth = world.frames.len();
        let suspends = [depth == 3, depth == DEPTH, true].get(suspensions).copied();
        match suspends {
            Some(true) => {
                suspensions += 1;
                Op::Suspend(5)
            }
            Some(false) => Op::Small(HELD),
            None => Op::Return,
        }
    })
}

fn attacked(attack: Option<fn(&Place)>, moves: bool, expected: Code) -> Verdict {
    expect_the_stubs_check();
    let mut run = Run::new(policy(), world())?;
    let mut got = run.enter(HELD);
    let control = Control(CONTROL_BLOCK.get());
    let earlier = Words::<4>(control.0 + SUSPENDED).get();
    // Resumed with 0, what a frame holds stays what all of them hold, but for its own count.
    got = got.and_then(|_| run.resume(0, false));
    if got != Ok(Exit::Suspended(5)) {
        return Err(format!("it did not suspend twice: {got:x?}"));
    }
    if let Some(attack) = attack {
        attack(&Place { control, earlier });
    }
    if moves {
        run.stack.reserve(20_000).map_err(|error| error.to_string())?;
    }
    for _ in 0..2 {
        got = run.resume(0, false);
    }
    match (run.world.verdict(), got) {
        (Ok(()), Ok(Exit::Returned(_))) => Ok(C),
        (_, Err(Error::NotSuspended)) if expected == E => Ok(E),
        (Err(_), Ok(_) | Err(Error::NotSuspended)) if expected == R => Ok(R),
        (verdict, got) => Err(format!("{verdict:?}, {got:x?}")),
    }
}

fn two(words: Option<std::ops::Range<usize>>) -> Verdict {
    expect_the_stubs_check();
    let mut one = Run::new(policy(), world())?;
    let stack = Stack::new(&one.thread, policy()).map_err(|error| error.to_string())?;
    let mut other = Run::on(stack, world())?;
    let suspended = |run: &mut Run<'_>| match run.enter(HELD) {
        Ok(Exit::Suspended(_)) => Ok(Control(CONTROL_BLOCK.get())),
        got => Err(format!("{got:x?}")),
    };
    let (a, b) = (suspended(&mut one)?, suspended(&mut other)?);
    for offset in words.into_iter().flatten().step_by(8) {
        let (of_a, of_b) = (a.get(offset), b.get(offset));
        a.set(offset, of_b);
        b.set(offset, of_a);
    }
    for run in [&mut one, &mut other] {
        for _ in 0..3 {
            let got = run.resume(0, false);
            got.map_err(|error| error.to_string())?;
        }
        run.world.verdict()?;
    }
    Ok(C)
}
