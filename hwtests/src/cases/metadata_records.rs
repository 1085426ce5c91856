//! A29, second part: the record of a growable stack's segment.

use crate::attack::{DEPTH, ONE_GROWTH, Scene, at_every_step, corrupt, policy, stop};
use crate::child::{Verdict, leave_room_above_a_canary, page, run};
use crate::class::Column;
use crate::cpu;
use crate::managed;
use crate::memory::peek;
use crate::outcome::Code;
use crate::tally::Tally;
use cfi_stack::steps::Step;
use cfi_stack::{Error, Exit};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

/// When the record is rewritten.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// While the stack is empty; the next run grows it.
    Empty,
    /// When a growth begins.
    Growing,
}

/// What is done to the five words.
type Forgery = fn(&mut [u64; 5]);

/// A rewritten record.
struct Row {
    what: &'static str,
    forgery: Forgery,
    /// While the stack is empty: with seals, without.
    empty: [Code; 2],
    /// When a growth begins.
    growing: [Code; 2],
}

use Code::{B, C, E, G, K, R};

/// Not to be shown without seals while the stack is empty: what lies there is run into.
const TOP_UP: &str = "top, a page up";

/// On arm64 `enter` compares with the control block where nothing is sealed too; on x86-64 the first growth does.
const BY_ENTER: Code = if cfg!(target_arch = "aarch64") { B } else { K };

const ROWS: [Row; 8] = [
    // The limit follows the base: what runs too far meets the guard.
    Row { what: "base, a page down", forgery: |words| words[0] -= 4096, empty: [B, G], growing: [G, G] },
    Row { what: "base, 1 KiB up", forgery: |words| words[0] += 1024, empty: [B, C], growing: [K, K] },
    Row { what: TOP_UP, forgery: |words| words[1] += 4096, empty: [B, B], growing: [K, K] },
    Row { what: "top, 1 KiB down", forgery: |words| words[1] -= 1024, empty: [B, C], growing: [B, E] },
    Row { what: "both, the attacker's memory", forgery: elsewhere, empty: [B, R], growing: [K, K] },
    Row { what: "identity", forgery: |words| words[2] += 1, empty: [B, BY_ENTER], growing: [K, K] },
    Row { what: "generation", forgery: |words| words[3] -= 1, empty: [B, BY_ENTER], growing: [K, K] },
    Row { what: "seal", forgery: |words| words[4] ^= 1 << 40, empty: [B, C], growing: [B, C] },
];

/// As large a place somewhere else.
fn elsewhere(words: &mut [u64; 5]) {
    let size = words[1] - words[0];
    let place = Box::leak(vec![0_u64; size as usize / 8 + 2].into_boxed_slice());
    words[0] = (place.as_mut_ptr().expose_provenance() as u64 + 15) & !15;
    words[1] = words[0] + size;
}

/// All of it, into A29's tally.
pub fn all(tally: &mut Tally<'_>) {
    let sealed = matches!(tally.class().column(), Column::Pac | Column::PacGcs);
    let code = |[with, without]: [Code; 2]| if sealed { with } else { without };
    tally.control("segment record", &run(|| attacked(None, When::Empty, C)));
    for Row { what, forgery, empty, growing } in ROWS {
        for (name, when, codes) in [("empty", When::Empty, empty), ("growing", When::Growing, growing)] {
            if !sealed && what == TOP_UP && when == When::Empty {
                continue;
            }
            let end = run(|| attacked(Some(forgery), when, code(codes)));
            tally.attack(&format!("segment record: {what}, {name}"), &end, &[code(codes)]);
        }
    }
}

fn rewrite(record: usize, forgery: Forgery) {
    // SAFETY: the step hook said that five words lie there.
    let mut words = std::array::from_fn(|index| unsafe { peek(record + index * 8) });
    forgery(&mut words);
    for (index, word) in words.into_iter().enumerate() {
        corrupt(record + index * 8, word);
    }
}

/// A stack that has grown once, and lies above a guard and a canary, is attacked and runs on.
fn attacked(forgery: Option<Forgery>, when: When, expected: Code) -> Verdict {
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let mut scene = Scene::new(policy())?;
    let record = Rc::new(Cell::new(0));
    let note = record.clone();
    let mut growths = 0;
    at_every_step(move |step, info| {
        match step {
            Step::Begin if growths == 0 => leave_room_above_a_canary(policy().guard, 2 * policy().initial),
            Step::Begin if growths == 1 && when == When::Growing => {
                if let Some(forgery) = forgery {
                    rewrite(info.source_record, forgery);
                }
            }
            Step::Committed => {
                growths += 1;
                if growths == 1 {
                    page().guard(info.base, policy().guard);
                    note.set(info.source_record);
                }
            }
            _ => {}
        }
        Ok(())
    });
    if when == When::Empty {
        scene.recurse_right(managed::recurse_a(), ONE_GROWTH)?;
        if let Some(forgery) = forgery {
            rewrite(record.get(), forgery);
        }
    }
    let depth = DEPTH as u64;
    let result = scene.recurse(managed::recurse_a(), DEPTH);
    stop();
    match result {
        Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(depth) => {
            Ok(if expected == Code::R { Code::R } else { Code::C })
        }
        Err(Error::Layout { .. }) => Ok(Code::E),
        other => Err(format!("{other:x?}")),
    }
}
