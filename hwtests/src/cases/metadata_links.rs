//! A29, last part: the second part of segments' records, which says how they are linked, and what a link call goes by.
//!
//! arm64 seals which segment comes before and which frame it was entered from, and believes of the one behind what is sealed. On x86-64 these are
//! plain words: a segment in the attacker's memory is entered (R), returns are the shadow stack's. Rust keeps lists of its own and compares (K).
//! The words that no seal covers are hints.

use super::growable_scene::{Codes, Control, copy, everywhere, expect_the_stubs_check, of, sealed};
use crate::attack::{at_every_step, corrupt, policy, stop};
use crate::child::{Verdict, page, run};
use crate::managed;
use crate::memory::peek;
use crate::outcome::Code::{self, B, C, E, K, R};
use crate::selftest::lift;
use crate::selftest::link::{self, Linked};
use crate::tally::Tally;
use cfi_stack::engine::{self, Activation, LinkCall};
use cfi_stack::probe::growable::{
    self, AREA, LIFTED, LIMIT, LINK, NEXT, PREVIOUS, RECORD, RECORD_LINK, RECORD_LINK_SEAL, ROOM,
};
use cfi_stack::steps::Step;
use cfi_stack::{Error, Exit, Policy};
use std::sync::atomic::Ordering::Relaxed;

/// When a record is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// While native code runs that its managed code has called; then it is returned from.
    Entered,
    /// Then, and the native code makes room first.
    Moves,
    /// The same, where frames were lifted to it.
    Lifted,
    /// Before it is entered again.
    Idle,
}

use When::{Entered, Idle, Lifted, Moves};

/// The record of the segment that was linked; that of the one before is what its `previous` says.
type Attack = fn(Control);

struct Row {
    what: &'static str,
    when: When,
    codes: Codes,
    attack: Attack,
}

const fn row(what: &'static str, when: When, codes: Codes, attack: Attack) -> Row {
    Row { what, when, codes, attack }
}

/// Found out by the return of the link call: the stub traps, on x86-64 it has the library say so.
const AT_THE_RETURN: Codes = [Some(B), Some(B), Some(K), Some(B), Some(K)];

const ROWS: [Row; 27] = [
    row("previous: a copy", Entered, sealed(B, C), previous_copied),
    row("previous: itself", Entered, AT_THE_RETURN, |record| record.set(PREVIOUS, record.0)),
    row("entering frame", Entered, AT_THE_RETURN, |record| record.change(RECORD_LINK, |word| word + 16)),
    row("its seal", Entered, sealed(B, C), |record| record.change(RECORD_LINK_SEAL, |word| word ^ 1 << 40)),
    row("area", Entered, everywhere(C), |record| record.set(AREA, 64)),
    row("hints", Entered, everywhere(C), |record| [NEXT, ROOM, LIFTED].iter().for_each(|&word| record.set(word, 1))),
    row("the limit of the one before", Entered, everywhere(C), |record| before(record).set(LIMIT, usize::MAX)),
    row("previous: a copy", Moves, sealed(B, C), previous_copied),
    row("entering frame", Moves, everywhere(K), |record| record.change(RECORD_LINK, |word| word + 16)),
    row("entering frame: none", Moves, everywhere(K), |record| record.set(RECORD_LINK, 0)),
    // It cannot move then, and cannot be returned from.
    row("entering frame: a lift's", Moves, AT_THE_RETURN, |record| record.change(RECORD_LINK, |word| word | 1)),
    row("its seal", Moves, sealed(B, C), |record| record.change(RECORD_LINK_SEAL, |word| word ^ 1 << 40)),
    row("area", Moves, everywhere(C), |record| record.set(AREA, 16)),
    row("where lifted frames return to", Moves, everywhere(C), |record| record.set(LIFTED, 16)),
    row("previous: a copy", Lifted, sealed(B, C), previous_copied),
    row("the frame below", Lifted, everywhere(K), |record| record.change(RECORD_LINK, |word| word + 16)),
    // The frames cannot move, and return as they did.
    row("the frame below: a link's", Lifted, everywhere(E), |record| record.change(RECORD_LINK, |word| word & !1)),
    row("where lifted frames return to", Lifted, everywhere(E), |record| record.change(LIFTED, |word| word + 4)),
    row("previous: a copy", Idle, everywhere(K), previous_copied),
    row("entering frame", Idle, sealed(B, C), |record| record.set(RECORD_LINK, before(record).get(8) - 64)),
    row("its seal", Idle, sealed(B, C), |record| record.change(RECORD_LINK_SEAL, |word| word ^ 1 << 40)),
    row("top, 64 down", Idle, sealed(B, C), |record| record.change(8, |word| word - 64)),
    row("base and top, the attacker's memory", Idle, sealed(B, R), elsewhere),
    row("identity", Idle, [Some(B), Some(B), Some(C), Some(B), Some(C)], |record| record.change(16, |word| word + 1)),
    row("next of the one before: forged", Idle, sealed(B, R), |record| {
        let forged = Control(copy(record.0, RECORD));
        elsewhere(forged);
        forged.set(LIMIT, 0);
        before(record).set(NEXT, forged.0);
    }),
    row("next of the one before: none", Idle, everywhere(C), |record| before(record).set(NEXT, 0)),
    row("hints", Idle, everywhere(C), |record| [LIMIT, ROOM].iter().for_each(|&word| record.set(word, usize::MAX))),
];

fn before(record: Control) -> Control {
    Control(record.get(PREVIOUS))
}

fn previous_copied(record: Control) {
    record.change(PREVIOUS, |previous| copy(previous, RECORD));
}

/// A segment of the attacker's, with the same words at its top.
fn elsewhere(record: Control) {
    let size = record.get(8) - record.get(0);
    let place = copy(record.get(0), size);
    record.set(0, place);
    record.set(8, place + size);
}

/// All of it, into A29's tally.
pub fn all(tally: &mut Tally<'_>) {
    for when in [Entered, Moves, Lifted, Idle] {
        tally.control(&format!("linked segment, {when:?}"), &run(|| attacked(None, when, C)));
    }
    for Row { what, when, codes, attack } in ROWS {
        if let Some(code) = of(tally.class(), codes) {
            let end = run(|| attacked(Some(attack), when, code));
            tally.attack(&format!("linked segment, {when:?}: {what}"), &end, &[code]);
        }
    }
    tally.control("a link call's words", &run(|| call_on_its_way(false, false)));
    let pac = tally.class().pac();
    let code = if pac { tally.class().stub_failure() } else { R };
    let end = run(|| call_on_its_way(true, pac));
    tally.attack("a link call's words, named while a segment is made", &end, &[code]);
}

/// What the native callee is told.
struct Callee<'a> {
    activation: &'a Activation,
    attack: Option<Attack>,
    moves: bool,
    refused: Option<Error>,
    /// The record of the segment that its caller runs on, and that one's frame.
    record: Control,
    frame: usize,
}

extern "C" fn native(callee: usize, frame: usize, _: usize) -> u64 {
    // SAFETY: `attacked` passes its own live block, and waits.
    let callee = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Callee<'_>>(callee) };
    callee.record = Control(growable::control(callee.activation)).segment();
    callee.frame = frame;
    if let Some(attack) = callee.attack {
        attack(callee.record);
    }
    if callee.moves {
        // SAFETY: managed code has called this through `exit`; nothing here points into its stack.
        callee.refused = unsafe { engine::reserve(callee.activation, 60_000) }.err();
    }
    0
}

fn attacked(attack: Option<Attack>, when: When, expected: Code) -> Verdict {
    /// Calls deep: one link each, or frames enough to be lifted.
    const LINKS: usize = 2;
    const FRAMES: usize = 150;
    expect_the_stubs_check();
    let lifts = when == Lifted;
    let lifting = Policy { lift_above: 3500, lift_bytes: 512, ..policy() };
    let mut linked = Linked::new(if lifts { lifting } else { policy() }, link::recurse(), 0, 0, 256)?;
    let _code = lift::register(true)?;
    let scene = &mut linked.scene;
    let (function, depth) = match when {
        Lifted => (lift::recurse(), FRAMES),
        Idle => (link::recurse(), 1),
        Entered | Moves => (link::recurse(), LINKS),
    };
    let activation = std::ptr::from_ref(&*scene.activation);
    let mut callee = Callee {
        // SAFETY: boxed, and lives as long as the scene.
        activation: unsafe { &*activation },
        attack: attack.filter(|_| when != Idle),
        moves: matches!(when, Moves | Lifted),
        refused: None,
        record: Control::default(),
        frame: 0,
    };
    let address = native as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let mut enter = |callee: &mut Callee<'_>| {
        let context = std::ptr::from_mut(callee).expose_provenance();
        let got = scene.enter(function, depth, address, context);
        match got == Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
            true => Ok(()),
            false => Err(format!("{got:x?}")),
        }
    };
    enter(&mut callee)?;
    let (base, top) = (callee.record.get(0), callee.record.get(8));
    if when == Idle {
        if let Some(attack) = attack {
            attack(callee.record);
        }
        enter(&mut callee)?;
    }
    if lifts && scene.stack.stats().lifts == 0 {
        return Err("nothing was lifted".into());
    }
    let is_elsewhere = !(base..top).contains(&callee.frame);
    match callee.refused {
        Some(Error::Layout { .. } | Error::UnknownCode(_)) if expected == E => Ok(E),
        Some(error) => Err(error.to_string()),
        None if expected == R && is_elsewhere => Ok(R),
        None if when == Idle && is_elsewhere => Err("the frames lie elsewhere".into()),
        None => Ok(C),
    }
}

/// The first link call has a segment made; meanwhile the address of its words lies in writable memory, signed where there are keys.
fn call_on_its_way(attack: bool, signed: bool) -> Verdict {
    /// `brk` for a pointer under data key B.
    const BRK_DB: u64 = 0xc473;
    /// x86-64: where `grow` keeps r11, below the link record.
    const KEPT: usize = 384 - 256;
    page().breakpoint.store(BRK_DB, Relaxed);
    let mut linked = Linked::new(policy(), link::recurse(), 0, 0, 256)?;
    let activation = std::ptr::from_ref(&*linked.scene.activation);
    // SAFETY: boxed, and lives as long as the scene.
    let activation: &'static Activation = unsafe { &*activation };
    let call = LinkCall::new(link::nothing().start, 0, 0, 256).map_err(|error| error.to_string())?;
    let forged = std::ptr::from_ref::<LinkCall>(Box::leak(Box::new(call))).expose_provenance() as u64;
    at_every_step(move |step, _| {
        if step == Step::Begin && attack {
            let link = Control(growable::control(activation)).get(LINK);
            let place = match cfg!(target_arch = "aarch64") {
                // Above grow's frame record: x0, x1, then the address.
                // SAFETY: the link record that grow has just written.
                true => unsafe { peek(link) as usize + 16 + 16 },
                false => link - KEPT,
            };
            // SAFETY: a word of link's own frame, or of grow's.
            let word = unsafe { peek(place) };
            corrupt(place, if signed { word ^ 1 << 50 } else { forged });
        }
        Ok(())
    });
    let got = linked.scene.recurse(link::recurse(), 1);
    stop();
    match got {
        Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(1) => Ok(C),
        Ok(Exit::Returned(_)) if attack => Ok(R),
        got => Err(format!("{got:x?}")),
    }
}
