//! Rounds upon rounds: mappings and resident memory stay what they were.

use crate::attack::{Scene, policy};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::managed;
use crate::memory::footprint;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::{Exit, Stack};
use std::sync::atomic::Ordering::Relaxed;

const ROUNDS: usize = 10_000;
/// Resident pages that may come and go: the allocator's, and an emulator's. A page leaked by every fresh stack is a thousand.
const SLACK: usize = 256;
/// How often the rounds are measured at most.
const WINDOWS: usize = 3;
/// A fresh stack every so many rounds.
const FRESH: usize = 10;
/// Deep enough to grow twice.
const DEPTH: usize = 150;

/// S09.
pub fn rounds(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let end = run(all);
    tally.attack(&format!("{ROUNDS} rounds, a fresh stack every {FRESH}"), &end, &[Code::C]);
    let [before, after, pages_before, pages_after, ..] = end.notes;
    tally.say(format!(
        "{before} mappings before, {after} after; {pages_before} pages resident before, {pages_after} after"
    ));
    tally.report()
}

fn round(scene: &mut Scene, number: usize) -> Result<(), String> {
    if number.is_multiple_of(FRESH) {
        scene.stack = Stack::new(&scene.thread, policy()).map_err(|error| error.to_string())?;
    }
    match number % 3 {
        0 => scene.recurse_right(managed::recurse_a(), DEPTH),
        1 => scene.recurse_right(managed::recurse_b(), DEPTH),
        _ => match scene.enter(managed::leave(), DEPTH, 7, 0) {
            Ok(Exit::Left(7)) => Ok(()),
            result => Err(format!("{result:x?}")),
        },
    }
}

fn all() -> Verdict {
    let mut scene = Scene::new(policy())?;
    for number in 0..ROUNDS / 10 {
        round(&mut scene, number)?;
    }
    // A leak grows in every window; an emulator's own pages, which count as ours in user mode, stop coming.
    for _ in 0..WINDOWS {
        let before = footprint();
        for number in 0..ROUNDS {
            round(&mut scene, number)?;
        }
        let after = footprint();
        for (note, value) in page().notes.iter().zip([before.0, after.0, before.1, after.1]) {
            note.store(value as u64, Relaxed);
        }
        // Neighbours that the kernel has merged since count as one.
        if after.0 > before.0 {
            return Err("there are more mappings than before".into());
        }
        if after.1 <= before.1 + SLACK {
            return Ok(Code::C);
        }
    }
    Err("resident memory grew in every window".into())
}
