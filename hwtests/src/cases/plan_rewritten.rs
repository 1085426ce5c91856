//! A49: the plan and the segments' records are rewritten while a migration works with them.
//!
//! What is expected follows from who looks at the word next:
//! - Before the frame pointers are put right (`Planned`, `Copied`), `rebase` meets a moved slot first and sees that the frame chain
//!   is not the planned one.
//! - After it (`Rebased`), the stub bounds the slot by the sealed records, authenticates what lies there under the CFA
//!   that the slot implies, and compares with the planned address. A slot of another frame is re-bound for that frame; the one left out
//!   keeps its old signature, and its return fails.
//! - A rewritten record does not hold its seal: `brk #0xc474`, with FPAC too, because a seal is compared, not authenticated.
//!   Where nothing seals, the stub finds that the words do not lie where the records say, and the next growth that the record is not
//!   the stack's.
//!
//! Whatever the end, nothing may be signed for the place that the attacker chose, nor for the victim's own when its entry failed: the
//! handler reads both, and finds what the copy left there (in a second view: with K the library unmaps the destination first).
//! The source must stay as it was until the migration gives it back.

use super::plan_moved;
use super::return_addresses::in_compiled_return;
use crate::attack::{DEPTH, Found, Kept, ONE_GROWTH, corrupt, frames, under_attack};
use crate::child::{self, Verdict, page, run};
use crate::class::{Class, Column, Feature};
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::{peek, peek_if_mapped};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::steps::{Rebinding, Step, StepInfo};
use std::sync::atomic::Ordering::Relaxed;

/// The entry that is rewritten, and another.
const VICTIM: usize = 5;
const OTHER: usize = 9;

/// Where the child notes what the watched places must hold: as the copy leaves them, and as re-bound by right, 0 for never.
const COPIED: [usize; 2] = [2, 3];
const REBOUND: [usize; 2] = [4, 5];
/// Which places are watched: the chosen one, the victim's own.
const CHOSEN: usize = 0;
const OWN: usize = 1;
/// Where the child notes which of them lie in the destination, one bit each.
const WATCHED: usize = 6;

pub(super) type Rewrite = fn(&mut [Rebinding], &[Found]);

pub(super) struct EntryAttack {
    pub(super) what: &'static str,
    pub(super) rewrite: Rewrite,
    /// At `Planned` and `Copied`.
    pub(super) before_rebase: Expected,
    /// At `Rebased`.
    pub(super) after_rebase: Expected,
}

#[derive(Clone, Copy)]
pub(super) struct Expected {
    /// Where return addresses are signed.
    pub(super) signed: End,
    /// Where nothing is signed.
    pub(super) unsigned: End,
}

#[derive(Clone, Copy)]
pub(super) enum End {
    Code(Code),
    /// P in the stub; at the return when the word happens to fit under the other key too.
    InStub,
    /// P in the victim's compiled return; C when its old signature happens to fit its new place.
    AtReturn,
}

const fn same(code: Code) -> Expected {
    Expected { signed: End::Code(code), unsigned: End::Code(code) }
}

const fn signed(signed: End, unsigned: Code) -> Expected {
    Expected { signed, unsigned: End::Code(unsigned) }
}

impl Expected {
    /// The code that the child must have ended with, by what it noted of the signature; and whether that is the victim's return's.
    pub(super) fn code(self, class: &Class, what: &str, end: &child::End) -> (Code, bool) {
        let code = match class.column() {
            // The shadow stack says where a frame returns to; the plan's word for it is not looked at.
            Column::PacGcs | Column::Cet if what == ANOTHER_PC => End::Code(Code::C),
            Column::Pac | Column::PacGcs => self.signed,
            Column::Cet | Column::Bare => self.unsigned,
        };
        let [fits, fits_other_key, ..] = end.notes.map(|note| note == 1);
        let at_return = match code {
            End::AtReturn => true,
            End::InStub => fits_other_key,
            End::Code(_) => false,
        };
        let code = match code {
            End::Code(code) => code,
            _ if fits => Code::C,
            End::InStub if !fits_other_key => class.stub_failure(),
            End::InStub | End::AtReturn => class.return_failure(),
        };
        (code, at_return)
    }
}

/// Makes no difference where a shadow stack is on.
const ANOTHER_PC: &str = "another pc";

/// Where the CPU authenticates, no unsigned entry was ever planned.
const NO_KEY: Expected = signed(End::Code(Code::K), Code::C);

pub(super) const ENTRIES: [EntryAttack; 10] = [
    EntryAttack {
        what: "slot of another frame",
        rewrite: |plan, _| *plan[VICTIM].place_mut() = *plan[OTHER].place_mut(),
        before_rebase: same(Code::K),
        after_rebase: signed(End::AtReturn, Code::C),
    },
    EntryAttack {
        what: "two entries swapped",
        rewrite: |plan, _| plan.swap(VICTIM, OTHER),
        before_rebase: same(Code::K),
        after_rebase: same(Code::C),
    },
    EntryAttack {
        what: "slot below the span",
        rewrite: |plan, frames| *plan[VICTIM].place_mut() = (frames[0].record - 8) | plan[VICTIM].form(),
        before_rebase: same(Code::K),
        after_rebase: same(Code::K),
    },
    EntryAttack {
        what: "slot past the top",
        rewrite: |plan, frames| {
            *plan[VICTIM].place_mut() = (frames[frames.len() - 1].record + 16) | plan[VICTIM].form()
        },
        before_rebase: same(Code::K),
        after_rebase: same(Code::K),
    },
    EntryAttack {
        what: "slot misaligned",
        rewrite: |plan, _| *plan[VICTIM].place_mut() += 4,
        before_rebase: same(Code::K),
        after_rebase: same(Code::K),
    },
    EntryAttack {
        what: ANOTHER_PC,
        rewrite: |plan, _| plan[VICTIM].pc = RawPc::new(crate::attack::zero_address()),
        before_rebase: same(Code::K),
        after_rebase: same(Code::K),
    },
    EntryAttack {
        what: "the other key",
        rewrite: |plan, _| *plan[VICTIM].place_mut() ^= Signing::A as usize ^ Signing::B as usize,
        before_rebase: signed(End::InStub, Code::K),
        after_rebase: signed(End::InStub, Code::K),
    },
    EntryAttack {
        what: "no key",
        rewrite: |plan, _| *plan[VICTIM].place_mut() = plan[VICTIM].slot(),
        before_rebase: NO_KEY,
        after_rebase: NO_KEY,
    },
    EntryAttack {
        what: "no key and the signed word as pc",
        rewrite: |plan, frames| {
            *plan[VICTIM].place_mut() = plan[VICTIM].slot();
            plan[VICTIM].pc = RawPc::new(frames[VICTIM].word as usize);
        },
        before_rebase: NO_KEY,
        after_rebase: NO_KEY,
    },
    EntryAttack {
        what: "a key that does not exist",
        rewrite: |plan, _| *plan[VICTIM].place_mut() = plan[VICTIM].slot() | 7,
        before_rebase: same(Code::K),
        after_rebase: same(Code::K),
    },
];

/// Which record, which of its words, by how much, and what it comes to where nothing seals.
pub(super) struct RecordAttack {
    pub(super) what: &'static str,
    pub(super) destination: bool,
    pub(super) word: usize,
    pub(super) add: i64,
    unsealed: Code,
    /// The same where the pages have moved, or are to.
    pub(super) unsealed_moved: Code,
}

pub(super) const RECORDS: [RecordAttack; 9] = [
    RecordAttack {
        what: "source base lowered",
        destination: false,
        word: 0,
        add: -4096,
        unsealed: Code::C,
        unsealed_moved: Code::C,
    },
    RecordAttack {
        what: "source top lowered",
        destination: false,
        word: 1,
        add: -64,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
    RecordAttack {
        what: "source top raised",
        destination: false,
        word: 1,
        add: 64,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
    RecordAttack {
        what: "source identity",
        destination: false,
        word: 2,
        add: 1,
        // The arm64 stub compares the two even where nothing seals them.
        unsealed: if cfg!(target_arch = "aarch64") { Code::K } else { Code::C },
        unsealed_moved: if cfg!(target_arch = "aarch64") { Code::K } else { Code::C },
    },
    RecordAttack {
        what: "destination base raised",
        destination: true,
        word: 0,
        add: 6144,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
    RecordAttack {
        what: "destination top lowered",
        destination: true,
        word: 1,
        add: -64,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
    RecordAttack {
        what: "destination top raised",
        destination: true,
        word: 1,
        add: 64,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
    RecordAttack {
        what: "destination identity",
        destination: true,
        word: 2,
        add: 1,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
    RecordAttack {
        what: "destination generation",
        destination: true,
        word: 3,
        add: 1,
        unsealed: Code::K,
        unsealed_moved: Code::K,
    },
];

/// A49.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        for step in [Step::Planned, Step::Copied, Step::Rebased] {
            tally.control(key, &run(|| under_attack(function, ONE_GROWTH, step, |_| {})));
            for attack in &ENTRIES {
                let poisons = class.pac() && !class.has(Feature::Fpac);
                let end = run(|| rewrite(function, step, attack.rewrite, poisons));
                let expected = if step == Step::Rebased { attack.after_rebase } else { attack.before_rebase };
                let (code, at_return) = expected.code(class, attack.what, &end);
                let what = format!("{} at {step:?}, {key}", attack.what);
                let code = tally.attack(&what, &end, &[code]);
                nothing_signed(&mut tally, &what, &end, code);
                if at_return {
                    in_compiled_return(&mut tally, function, &end);
                }
            }
        }
    }
    for step in [Step::Planned, Step::Copied, Step::Rebased] {
        for attack in &RECORDS {
            let end = run(|| rewrite_record(step, attack, class.pac()));
            // Seals are compared, so FPAC has no part in it.
            let code = if class.pac() { Code::B } else { attack.unsealed };
            let what = format!("{} at {step:?}", attack.what);
            let code = tally.attack(&what, &end, &[code]);
            nothing_signed(&mut tally, &what, &end, code);
        }
    }
    plan_moved::all(&mut tally);
    tally.report()
}

/// The watched places hold what they must.
pub(super) fn nothing_signed(tally: &mut Tally<'_>, what: &str, end: &child::End, code: Option<Code>) {
    if !matches!(code, Some(Code::F | Code::B | Code::T | Code::S | Code::K)) {
        return;
    }
    for (index, place) in [(CHOSEN, "the chosen place"), (OWN, "the victim's own place")] {
        let (copied, rebound) = (end.notes[COPIED[index]], end.notes[REBOUND[index]]);
        match end.found[index] {
            Some(found) if found == copied || rebound != 0 && found == rebound => {}
            Some(found) => tally.fail(format!("{what}: {place} changed from {copied:#x} to {found:#x}")),
            None if end.notes[WATCHED] & 1 << index == 0 => {}
            None => tally.fail(format!("{what}: nobody saw {place} ({end})")),
        }
    }
}

/// Has the handler read a place in the destination, kept for it, and notes what it must hold then: what lies there once the span is copied,
/// and `rebound`, which may have been signed for it by right. A place elsewhere is none that the stub may write to.
fn watch(kept: Kept, info: &StepInfo<'_>, step: Step, index: usize, slot: usize, rebound: Option<u64>) {
    let Some(place) = kept.view(slot.wrapping_add(info.delta)) else { return };
    let from = if step == Step::Planned && (info.youngest..info.top).contains(&slot) { slot } else { place };
    let Some(copied) = peek_if_mapped(from) else { return };
    page().notes[COPIED[index]].store(copied, Relaxed);
    page().notes[REBOUND[index]].store(rebound.unwrap_or(0), Relaxed);
    page().notes[WATCHED].fetch_or(1 << index, Relaxed);
    page().watch(index, place);
}

fn rewrite(function: Function, step: Step, rewrite: Rewrite, poisons: bool) -> Verdict {
    under_attack(function, ONE_GROWTH, step, move |info| {
        let frames = frames(info);
        page().freeze_span(info.youngest, info.top);
        rewrite_entry(function, step, rewrite, poisons, info, &frames);
    })
}

/// Rewrites an entry, and notes what must come of it. `frames` are those of the span, as they were planned.
pub(super) fn rewrite_entry(
    function: Function,
    step: Step,
    rewrite: Rewrite,
    poisons: bool,
    info: &mut StepInfo<'_>,
    frames: &[Found],
) {
    let victim = frames[VICTIM];
    let raw = cpu::strip(victim.word);
    let place = victim.modifier().wrapping_add(info.delta as u64);
    rewrite(info.plan(), frames);
    let chosen = info.plan()[VICTIM].slot();
    // What will stand in the destination when the victim returns: its old word, or one made with the other key.
    let key = match info.plan()[VICTIM].form() {
        1 => Signing::A,
        2 => Signing::B,
        _ => function.signing,
    };
    let fits_other_key = key != function.signing && cpu::sign(raw, victim.modifier(), key) == victim.word;
    let word = match (key == function.signing, fits_other_key) {
        (true, _) => Some(victim.word),
        (false, true) => Some(cpu::sign(raw, place, key)),
        (false, false) => None,
    };
    let fits = word == Some(cpu::sign(raw, place, function.signing));
    page().notes[0].store(u64::from(fits), Relaxed);
    page().notes[1].store(u64::from(fits_other_key), Relaxed);
    // The stub authenticates with the key that the entry names.
    page().breakpoint.store(cpu::breakpoint_of(key), Relaxed);
    // What the other key let through is signed with it; never what the victim's return would take, or the run completes.
    let accepted = word.filter(|_| fits_other_key);
    let rightful = |frame: &Found| {
        cpu::sign(cpu::strip(frame.word), frame.modifier().wrapping_add(info.delta as u64), function.signing)
    };
    let other = frames.iter().find(|frame| frame.slot() == chosen && chosen != victim.slot()).map(rightful);
    let kept = Kept::destination(info);
    watch(kept, info, step, CHOSEN, chosen, if chosen == victim.slot() { accepted } else { other });
    watch(kept, info, step, OWN, victim.slot(), accepted);
    if poisons && let Some(word) = word {
        page().poisoned.store(cpu::poisoned(word, place, function.signing), Relaxed);
    }
}

/// Where records are not sealed, some attacks show at the next growth only, when the destination is the stack: nothing is
/// watched there then.
fn rewrite_record(step: Step, attack: &'static RecordAttack, seals: bool) -> Verdict {
    under_attack(managed::recurse_a(), DEPTH, step, move |info: &mut StepInfo<'_>| {
        let record = if attack.destination { info.destination_record } else { info.source_record };
        let place = record + attack.word * 8;
        // SAFETY: the step hook says that five words lie there.
        let word = unsafe { peek(place) };
        page().freeze_span(info.youngest, info.top);
        if seals {
            let victim = frames(info)[VICTIM].slot();
            // Where the victim's word would go if the record were believed.
            let shift = match (attack.word, attack.destination) {
                (1, true) => attack.add,
                (1, false) => -attack.add,
                _ => 0,
            };
            let kept = Kept::destination(info);
            watch(kept, info, step, CHOSEN, victim.wrapping_add_signed(shift as isize), None);
            watch(kept, info, step, OWN, victim, None);
            page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
        }
        corrupt(place, word.wrapping_add_signed(attack.add));
    })
}
