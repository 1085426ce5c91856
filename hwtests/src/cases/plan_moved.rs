//! A49, where the span moves by page tables: each word is authenticated and re-signed at its new place, which is its only one.
//!
//! What is expected is what it is for spans that are copied, but for this: an entry that names another frame's slot has that word re-bound
//! twice, and the second time it does not authenticate. A rewritten record is found out before a page moves, or before a word is signed.

use super::plan_rewritten::{ENTRIES, End, Expected, RECORDS, RecordAttack, Rewrite, nothing_signed, rewrite_entry};
use super::return_addresses::in_compiled_return;
use crate::attack::{DEPTH, Found, ONE_GROWTH, corrupt, frames, policy, under_attack_on};
use crate::child::{Verdict, page, run};
use crate::class::Feature;
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::peek;
use crate::outcome::Code;
use crate::tally::Tally;
use cfi_stack::Policy;
use cfi_stack::steps::Step;
use std::sync::atomic::Ordering::Relaxed;

/// The entry whose slot is another's.
const TWICE: &str = "slot of another frame";

/// Spans of any size move by page tables.
fn by_pages() -> Policy {
    Policy { move_pages: 1, ..policy() }
}

/// All of it, into A49's tally.
pub fn all(tally: &mut Tally<'_>) {
    let class = tally.class();
    if class.shadow() && !class.pac() {
        tally.say("by page tables: nothing moves so here, records are not sealed");
        return;
    }
    let poisons = class.pac() && !class.has(Feature::Fpac);
    for (function, key) in managed::recursions() {
        for step in [Step::Copied, Step::Rebased] {
            tally.control(&format!("by page tables, {key}"), &run(|| attacked(function, step, None, false)));
            for attack in &ENTRIES {
                let end = run(|| attacked(function, step, Some(attack.rewrite), poisons));
                let expected = match step {
                    Step::Copied => attack.before_rebase,
                    _ if attack.what == TWICE => Expected { signed: End::InStub, ..attack.after_rebase },
                    _ => attack.after_rebase,
                };
                let (code, at_return) = expected.code(class, attack.what, &end);
                let what = format!("by page tables, {} at {step:?}, {key}", attack.what);
                let code = tally.attack(&what, &end, &[code]);
                nothing_signed(tally, &what, &end, code);
                if at_return {
                    in_compiled_return(tally, function, &end);
                }
            }
        }
    }
    for step in [Step::Planned, Step::Copied, Step::Rebased] {
        for attack in &RECORDS {
            let end = run(|| record_attacked(step, attack));
            let code = if class.pac() { Code::B } else { attack.unsealed_moved };
            tally.attack(&format!("by page tables, {} at {step:?}", attack.what), &end, &[code]);
        }
    }
}

/// A growth by page tables under attack, once the pages lie at their new place.
fn attacked(function: Function, step: Step, rewrite: Option<Rewrite>, poisons: bool) -> Verdict {
    let mut planned: Vec<Found> = Vec::new();
    under_attack_on(by_pages(), function, ONE_GROWTH, move |now, info| {
        if now == Step::Planned {
            planned = frames(info);
        }
        if now != step || planned.is_empty() {
            return false;
        }
        let planned = std::mem::take(&mut planned);
        // SAFETY: the youngest record's place in the source, which is mapped.
        let left = unsafe { peek(planned[0].record) };
        if left != 0 {
            // It was copied: this case shows nothing then, and fails.
            return false;
        }
        if let Some(rewrite) = rewrite {
            rewrite_entry(function, step, rewrite, poisons, info, &planned);
        }
        true
    })
}

fn record_attacked(step: Step, attack: &'static RecordAttack) -> Verdict {
    let mut is_made = false;
    under_attack_on(by_pages(), managed::recurse_a(), DEPTH, move |now, info| {
        if now != step || std::mem::replace(&mut is_made, true) {
            return false;
        }
        page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
        let record = if attack.destination { info.destination_record } else { info.source_record };
        let place = record + attack.word * 8;
        // SAFETY: the step hook says that five words lie there.
        corrupt(place, unsafe { peek(place) }.wrapping_add_signed(attack.add));
        true
    })
}
