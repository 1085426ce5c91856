//! A29, third part: what a growable stack's control block and link records say is rewritten while native code runs that managed code
//! has called, and everything goes on.
//!
//! arm64 seals where managed code waits and where the native stack is, with whose stack and which of its lives it is. On x86-64 these are plain words: what is
//! returned from must lie in the stack, and is another frame's authentic record (R), which a shadow stack catches (S). Rust compares
//! what it can before a move (K). How an entry has ended is believed everywhere (R).

use super::growable_scene::{
    Codes, Control, OTHER_FRAME, Place, copy, everywhere, expect_the_stubs_check, of, older, sealed,
};
use crate::attack::policy;
use crate::child::{Verdict, run};
use crate::outcome::Code::{self, B, C, E, K, R, S};
use crate::selftest::spans::{Op, Run, World};
use crate::tally::Tally;
use cfi_stack::probe::growable::{
    CONTROL, GENERATION, IDENTITY, LINK, LINK_CONTROL, LINK_PC, LINK_RECORD, LINK_SEAL, NATIVE_SP, NESTED, OUTCOME,
    RECORD, SEAL, SEGMENT,
};
use cfi_stack::{Error, Exit};

/// What goes on afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The native code returns, and all managed code.
    Returns,
    /// It makes room first.
    Reserves,
    /// It has managed code call native code again.
    ExitsAgain,
    /// It enters the stack again.
    Enters,
    /// Managed code suspends the stack.
    Suspends,
    /// The native code of a nested entry was attacked; its managed code suspends.
    SuspendsNested,
}

use Then::{Enters, ExitsAgain, Reserves, Returns, Suspends, SuspendsNested};

struct Row {
    what: &'static str,
    attack: fn(&Place),
    then: Then,
    codes: Codes,
}

const fn row(what: &'static str, then: Then, codes: Codes, attack: fn(&Place)) -> Row {
    Row { what, attack, then, codes }
}

/// A shadow stack sees it in the walk.
const IN_THE_WALK: Codes = [Some(B), Some(K), Some(K), Some(R), Some(R)];

const ROWS: [Row; 33] = [
    row("link record: another frame's", Returns, OTHER_FRAME, |at| at.control.link().change(LINK_RECORD, older)),
    row("link record: another frame's", Reserves, IN_THE_WALK, |at| at.control.link().change(LINK_RECORD, older)),
    row("link record: outside the stack", Returns, everywhere(B), outside),
    row("link record: outside the stack", Reserves, everywhere(K), outside),
    row("link record: misaligned", Returns, everywhere(B), |at| at.control.link().change(LINK_RECORD, |word| word + 8)),
    row("link record: pc", Returns, everywhere(C), |at| at.control.link().change(LINK_PC, |word| word + 4)),
    row("link record: a copy of the control block", Returns, sealed(B, C), |at| {
        at.control.link().change(LINK_CONTROL, |control| copy(control as usize, CONTROL) as u64);
    }),
    row("link record: seal", Returns, sealed(B, C), |at| at.control.link().change(LINK_SEAL, |word| word ^ 1 << 40)),
    row("link record: an earlier one's words", Returns, [Some(R), Some(S), Some(S), Some(R), Some(R)], |at| {
        at.control.link().set(at.earlier);
    }),
    row("link record: an earlier one's words", Reserves, [Some(R), Some(K), Some(K), Some(R), Some(R)], |at| {
        at.control.link().set(at.earlier);
    }),
    row("native sp", Reserves, everywhere(K), |at| at.control.change(NATIVE_SP, |word| word - LOWER)),
    row("native sp", ExitsAgain, sealed(B, R), |at| at.control.change(NATIVE_SP, |word| word - LOWER)),
    row("native sp's seal", Returns, sealed(B, C), |at| at.control.change(SEAL, |word| word ^ 1 << 40)),
    row("segment: a copy of its record", Returns, everywhere(C), |at| {
        at.control.change(SEGMENT, |record| copy(record, RECORD));
    }),
    row("segment: one elsewhere", Returns, [Some(C), Some(C), Some(B), Some(B), Some(B)], elsewhere),
    row("segment: one elsewhere", Reserves, everywhere(C), elsewhere),
    row("segment: one elsewhere", Enters, everywhere(C), elsewhere),
    row("identity", Returns, sealed(B, C), |at| at.control.change(IDENTITY, |word| word + 1)),
    row("identity", Reserves, everywhere(K), |at| at.control.change(IDENTITY, |word| word + 1)),
    row("generation", Returns, sealed(B, C), |at| at.control.change(GENERATION, |word| word + 1)),
    row("generation", Reserves, everywhere(K), |at| at.control.change(GENERATION, |word| word + 1)),
    row("nested: one more", Returns, everywhere(C), |at| at.control.set(NESTED, 1)),
    row("nested: one more", Suspends, everywhere(E), |at| at.control.set(NESTED, 1)),
    row("nested: none", SuspendsNested, everywhere(K), |at| at.control.set(NESTED, 0)),
    row("outcome: left", Returns, everywhere(R), |at| at.control.set(OUTCOME, 1)),
    row("outcome: failed", Returns, everywhere(K), |at| at.control.set(OUTCOME, 2)),
    row("outcome: suspended", Returns, everywhere(K), |at| at.control.set(OUTCOME, 3)),
    row("outcome: none that there is", Returns, everywhere(K), |at| at.control.set(OUTCOME, 99)),
    row("link: elsewhere", Returns, everywhere(C), |at| at.control.change(LINK, |word| word - 32)),
    row("link: elsewhere", Reserves, everywhere(K), |at| at.control.change(LINK, |word| word - 32)),
    row("link: elsewhere", Enters, everywhere(K), |at| at.control.change(LINK, |word| word - 32)),
    row("link: none", Returns, everywhere(C), |at| at.control.set(LINK, 0)),
    row("link: none", Reserves, everywhere(E), |at| at.control.set(LINK, 0)),
];

/// So far down the native stack is free.
const LOWER: usize = 64 << 10;

fn outside(at: &Place) {
    let link = at.control.get(LINK);
    at.control.link().change(LINK_RECORD, |_| link as u64);
}

fn elsewhere(at: &Place) {
    let forged = Control(copy(at.control.get(SEGMENT), RECORD));
    let size = forged.get(8) - forged.get(0);
    let place = copy(forged.0, size);
    forged.set(0, place);
    forged.set(8, place + size);
    at.control.set(SEGMENT, forged.0);
}

/// All of it, into A29's tally.
pub fn all(tally: &mut Tally<'_>) {
    for then in [Returns, Reserves, ExitsAgain, Enters, Suspends, SuspendsNested] {
        tally.control(&format!("native code, then {then:?}"), &run(|| attacked(None, then, C)));
    }
    for Row { what, attack, then, codes } in ROWS {
        if let Some(code) = of(tally.class(), codes) {
            let end = run(|| attacked(Some(attack), then, code));
            tally.attack(&format!("{what}, then {then:?}"), &end, &[code]);
        }
    }
}

/// Managed frames under the native code that is attacked.
const DEPTH: usize = 6;
/// What all of them are called with: a frame that is returned from by mistake finds its registers as it left them.
const HELD: u64 = 7;

/// The attack is made in the native callee of the youngest of so many frames.
fn attacked(attack: Option<fn(&Place)>, then: Then, expected: Code) -> Verdict {
    expect_the_stubs_check();
    let mut earlier = [0; 4];
    let mut native_sp = None;
    let world = World::new(|world| {
        let here = 0_u8;
        let control = Control::of(world);
        let depth = world.frames.len();
        if let Some(native_sp) = native_sp {
            let below = usize::saturating_sub(native_sp, (&raw const here).addr());
            if below >= LOWER {
                // It is put right before anything is left.
                control.set(NATIVE_SP, native_sp);
                world.note("native code runs where the control block says".into());
            }
            return Op::Return;
        }
        match depth {
            3 if then == SuspendsNested => return Op::Enter(HELD),
            3 => earlier = control.link().get(),
            _ => {}
        }
        if depth < DEPTH {
            return Op::Small(HELD);
        }
        native_sp = Some(control.get(NATIVE_SP));
        if let Some(attack) = attack {
            attack(&Place { control, earlier });
        }
        match then {
            Returns => Op::Return,
            Reserves => Op::Reserve(20_000),
            ExitsAgain => Op::Small(HELD),
            Enters => Op::Enter(HELD),
            Suspends | SuspendsNested => Op::Suspend(5),
        }
    });
    let mut run = Run::new(policy(), world)?;
    let mut got = run.enter(HELD);
    if got == Ok(Exit::Suspended(5)) {
        got = run.resume(1, false);
    }
    match (run.world.verdict(), got) {
        (Ok(()), Ok(Exit::Returned(_))) => Ok(C),
        (_, Err(Error::Nested)) if expected == E => Ok(E),
        (Err(text), Ok(_)) if expected == E && text.contains("NotInExit") => Ok(E),
        // Managed code has gone on with what was another frame's, or the caller is told what was not.
        (Err(_), Ok(_)) if expected == R => Ok(R),
        (verdict, got) => Err(format!("{verdict:?}, {got:x?}")),
    }
}
