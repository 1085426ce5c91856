//! Growth: registers, results, ways out.

use crate::attack::{Scene, policy};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::{Error, Exit, Policy};

/// S01.
pub fn registers(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for seed in 1..=4 {
        tally.attack(&format!("pattern {seed}"), &run(|| keep_registers(seed)), &[Code::C]);
    }
    tally.report()
}

fn keep_registers(seed: u64) -> Verdict {
    // Where the hand-made function puts what, in words: see `asm/`.
    let (words, general, vectors, more): (usize, _, _, std::ops::Range<usize>) =
        if cfg!(target_arch = "x86_64") { (48, 0..12, 16..48, 0..0) } else { (96, 2..16, 16..80, 80..91) };
    let mut scene = Scene::new(policy())?;
    let mut block = vec![0_u64; words * 2];
    for (index, word) in block.iter_mut().enumerate().take(words) {
        *word = (seed << 56 | index as u64).wrapping_mul(0x0101_0101_0101_0101 | seed);
    }
    let place = block.as_mut_ptr().expose_provenance();
    let result = scene.enter(managed::registers(), 0, 0, place);
    if result != Ok(Exit::Returned(0)) {
        return Err(format!("{result:x?}"));
    }
    if scene.stack.stats().growths != 1 {
        return Err("the stack did not grow".into());
    }
    for index in general.chain(vectors).chain(more) {
        if block[index] != block[words + index] {
            return Err(format!("word {index}: {:#x} became {:#x}", block[index], block[words + index]));
        }
    }
    let arguments = if cfg!(target_arch = "x86_64") { [words + 12, words + 13] } else { [words, words + 1] };
    let kept = arguments.map(|index| block[index] as usize);
    if kept != [scene.act(), 16384] {
        return Err(format!("grow's own arguments became {kept:x?}"));
    }
    Ok(Code::C)
}

/// S02.
pub fn at_every_call(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    // Under a shadow stack the records that say which pages move would have to be sealed, and x86-64 has no seals.
    let by_pages = !(class.shadow() && cfg!(target_arch = "x86_64"));
    for (function, key) in managed::recursions() {
        let ways = [
            ("doubling", false, false),
            ("moving at every call", true, false),
            ("doubling, pages moved", false, true),
            ("moving at every call, pages moved", true, true),
        ];
        for (what, always, pages) in ways {
            for depth in [0, 1, 2, 5, 40, 100, 300] {
                let end = run(|| {
                    let move_pages = if pages { 0 } else { usize::MAX };
                    let mut scene = Scene::new(Policy { relocate_always: always, move_pages, ..policy() })?;
                    for _ in 0..3 {
                        scene.recurse_right(function, depth)?;
                    }
                    let stats = scene.stack.stats();
                    let least = if always { depth as u64 * 3 } else { u64::from(depth > 100) };
                    if stats.growths < least {
                        return Err(format!("only {} growths", stats.growths));
                    }
                    if stats.page_moves != if pages && by_pages { stats.growths } else { 0 } {
                        return Err(format!("{} of {} moves were by page tables", stats.page_moves, stats.growths));
                    }
                    // Every frame moved is one return address re-bound, where anything signs.
                    if stats.rebound != if class.pac() { stats.frames_moved } else { 0 } {
                        return Err(format!("{} frames moved, {} re-bound", stats.frames_moved, stats.rebound));
                    }
                    Ok(Code::C)
                });
                tally.attack(&format!("{what}, {depth} deep, {key}"), &end, &[Code::C]);
            }
        }
    }
    tally.report()
}

/// S03.
pub fn leave(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for always in [false, true] {
        for depth in [0, 1, 50, 252, 253, 254, 255, 256, 508, 600, 3000] {
            let depth = if always { depth.min(300) } else { depth };
            let end = run(|| {
                let mut scene = Scene::new(Policy { relocate_always: always, ..policy() })?;
                for round in 0..3 {
                    let before = cpu::shadow_pointer();
                    let result = scene.enter(managed::leave(), depth, 77 + round, 0);
                    let after = cpu::shadow_pointer();
                    if result != Ok(Exit::Left(77 + round as u64)) {
                        return Err(format!("{result:x?}"));
                    }
                    if before != after {
                        return Err(format!("the shadow-stack pointer was {before:#x} and is {after:#x}"));
                    }
                    scene.recurse_right(managed::recurse_a(), depth.min(300))?;
                }
                Ok(Code::C)
            });
            let what = if always { "moving at every call, " } else { "" };
            tally.attack(&format!("{what}{depth} deep"), &end, &[Code::C]);
        }
    }
    tally.report()
}

/// S04.
pub fn overflow(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for maximum in [4096, 8192, 20480, 1 << 20] {
        for (function, key) in managed::recursions() {
            let end = run(|| {
                let mut scene = Scene::new(Policy { maximum, ..Policy::default() })?;
                for _ in 0..3 {
                    let before = cpu::shadow_pointer();
                    let result = scene.recurse(function, 1_000_000);
                    match result {
                        Err(Error::Overflow { needed, maximum: named }) if named == maximum && needed > maximum => {}
                        result => return Err(format!("{result:x?}")),
                    }
                    if cpu::shadow_pointer() != before {
                        return Err("the shadow-stack pointer is another".into());
                    }
                    scene.recurse_right(function, 30)?;
                }
                if scene.stack.size() > maximum {
                    return Err(format!("{} bytes", scene.stack.size()));
                }
                Ok(Code::E)
            });
            tally.attack(&format!("maximum {maximum}, {key}"), &end, &[Code::E]);
        }
    }
    tally.report()
}
