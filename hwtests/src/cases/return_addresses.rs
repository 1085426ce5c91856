//! A14 and A17: return addresses changed before and after a migration.

use crate::attack::{DEPTH, Dice, ONE_GROWTH, corrupt, frames, under_attack};
use crate::child::{End, Verdict, page, run};
use crate::class::{Class, Column, Feature};
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::take_places;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pac::Signing;
use cfi_stack::steps::Step;
use std::sync::atomic::Ordering::Relaxed;

/// Tries of a forgery that a signature lets through once in 2^width.
pub const FORGERIES: u64 = 1000;
/// Different places that the stack of a forgery may lie at.
pub const PLACES: usize = 128;
/// A bit of the signature, on every width that Linux uses.
pub const SIGNATURE_BIT: u64 = 1 << 53;

/// A14.
pub fn copied(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    match class.column() {
        Column::Bare => {
            return Report::skip(
                Class::protecting(),
                "nothing here tells one return address of a frame from another's",
            );
        }
        Column::Cet => {
            let function = managed::recurse_a();
            tally.control("unsigned", &run(|| under_attack(function, DEPTH, Step::Begin, |_| {})));
            for (what, from, to) in [
                ("the youngest's into frame 3", 0, 3),
                ("the entry's into frame 3", usize::MAX, 3),
                ("frame 3's into the youngest", 3, 0),
            ] {
                let end = run(|| copy(function, from, to));
                tally.attack(what, &end, &[Code::K]);
            }
        }
        Column::Pac | Column::PacGcs => {
            for (function, key) in managed::recursions() {
                tally.control(key, &run(|| under_attack(function, DEPTH, Step::Begin, |_| {})));
            }
            for attempt in 0..FORGERIES {
                let (function, key) = managed::recursions()[attempt as usize % 2];
                let end = run(|| copy_of_equal(function, Dice::new("A14", attempt)));
                tally.one_of_many(
                    &format!("another frame's, {key}"),
                    &end,
                    &[class.stub_failure()],
                    Some(end.notes[0] == 1),
                );
                if !tally.is_right() {
                    return tally.report();
                }
            }
            tally.rate("another frame's, same return site", FORGERIES, tally.accepted());
            // Its signature may fit once in 128: then the walk sees that the entry frame cannot be there.
            tally.attack(
                "the entry's into frame 3",
                &run(|| copy(managed::recurse_a(), usize::MAX, 3)),
                &[class.stub_failure(), Code::K],
            );
        }
    }
    tally.report()
}

/// Copies frame `from`'s return address (MAX: the oldest's) into frame `to`.
fn copy(function: Function, from: usize, to: usize) -> Verdict {
    under_attack(function, DEPTH, Step::Begin, move |info| {
        let frames = frames(info);
        corrupt(frames[to].slot(), frames[from.min(frames.len() - 1)].word);
        page().freeze_span(info.youngest, info.top);
    })
}

/// Copies between two frames that return to the same place: what differs is the place that the signature is bound to.
fn copy_of_equal(function: Function, mut dice: Dice) -> Verdict {
    take_places(dice.below(PLACES));
    under_attack(function, DEPTH, Step::Begin, move |info| {
        let frames = frames(info);
        let recursive = frames.len() - 2;
        let from = 1 + dice.below(recursive);
        let to = 1 + (from + dice.below(recursive - 1)) % recursive;
        let (from, to) = (frames[from], frames[to]);
        let fits = cpu::sign(cpu::strip(from.word), to.modifier(), function.signing) == from.word;
        page().notes[0].store(u64::from(fits), Relaxed);
        corrupt(to.slot(), from.word);
        page().freeze_span(info.youngest, info.top);
    })
}

/// A17.
pub fn flipped_after(class: &Class) -> Report {
    if class.column() == Column::Bare {
        return Report::skip(Class::protecting(), "nothing here checks a return address");
    }
    let mut tally = Tally::new(class);
    let (in_code, in_stub) = match class.column() {
        Column::Cet => (Code::S, Code::S),
        _ => (class.return_failure(), class.stub_failure()),
    };
    let poisons = !class.has(Feature::Fpac);
    for (function, key) in managed::recursions() {
        tally.control(key, &run(|| under_attack(function, ONE_GROWTH, Step::Committed, |_| {})));
        for index in [1, 3, 20] {
            let end = run(|| flip(function, index, poisons));
            tally.attack(&format!("frame {index}, {key}"), &end, &[in_code]);
            in_compiled_return(&mut tally, function, &end);
        }
        tally.attack(&format!("the stub's own frame, {key}"), &run(|| flip(function, 0, poisons)), &[in_stub]);
    }
    tally.report()
}

/// It is the return of managed code that met it, not a later walk.
pub fn in_compiled_return(tally: &mut Tally<'_>, function: Function, end: &End) {
    let pc = cpu::strip(end.pc) as usize;
    if end.signal != 0 && !(function.start.address()..function.end.address()).contains(&pc) {
        tally.fail(format!("not in a return of managed code: {end}"));
    }
}

fn flip(function: Function, index: usize, poisons: bool) -> Verdict {
    under_attack(function, ONE_GROWTH, Step::Committed, move |info| {
        let frame = frames(info)[index];
        let bit = if function.signing == Signing::None { 1 << 4 } else { SIGNATURE_BIT };
        let word = frame.word ^ bit;
        if poisons {
            page().poisoned.store(cpu::poisoned(word, frame.modifier(), function.signing), Relaxed);
        }
        if index == 0 {
            // The stub's: compiled code has no part in it, and the stubs sign with key A.
            page().breakpoint.store(cpu::breakpoint_of(Signing::A), Relaxed);
        }
        corrupt(frame.slot(), word);
    })
}
