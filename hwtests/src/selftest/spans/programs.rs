//! Random programs over one stack against the model with an endless one, by the functions of [`spans`](super).

use super::{Op, Run, World};
use crate::attack::{Dice, policy};
use crate::child::{page, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::{Error, Exit, Policy};
use std::sync::atomic::Ordering::Relaxed;

/// A number that goes through managed code's three-bit shift unharmed.
pub fn word(dice: &mut Dice) -> u64 {
    dice.below(1 << 40) as u64
}

/// So many programs, at least; a program is one stack's life.
const PROGRAMS: u64 = 150;
/// Most frames on the endless stack, and entries within each other.
const FRAMES: usize = 400;
const ENTRIES: usize = 8;

/// S34.
pub fn random(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let programs = if class.is_slow() { PROGRAMS } else { PROGRAMS * 20 };
    for (what, always, poison) in
        [("", false, false), (", poisoned", false, true), (", moving at every check", true, false)]
    {
        let policy = Policy { relocate_always: always, poison, ..policy() };
        let end = run(|| {
            let mut seen = Seen::default();
            for seed in 0..programs {
                // Some with a small first shadow segment, where there are any.
                let short = class.shadow() && seed % 4 == 3;
                let policy = if short { Policy { shadowed: policy.initial, ..policy } } else { policy };
                program(&mut seen, policy, seed, if always { 150 } else { 400 }, short)
                    .map_err(|problem| format!("program {seed}: {problem}"))?;
            }
            for (note, seen) in page().notes.iter().zip([seen.growths, seen.shrinks, seen.entries, seen.resumed]) {
                note.store(seen, Relaxed);
            }
            if [seen.growths, seen.shrinks, seen.entries, seen.resumed].iter().any(|&count| count < programs) {
                return Err(format!("hardly anything happened: {seen:?}"));
            }
            Ok(Code::C)
        });
        tally.attack(&format!("{programs} programs{what}"), &end, &[Code::C]);
        let [growths, shrinks, entries, resumed, ..] = end.notes;
        tally.say(format!(
            "{growths} growths, {shrinks} shrinks, {entries} nested entries, {resumed} resumptions{what}"
        ));
    }
    tally.report()
}

/// S47.
pub fn random_links(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let programs = if class.is_slow() { PROGRAMS } else { PROGRAMS * 10 };
    for (what, always, warm) in [("", false, 1), (", kept warm", false, 16), (", moving at every check", true, 0)] {
        let end = run(|| {
            let mut seen = Seen::default();
            for seed in 0..programs {
                let page = policy().initial;
                let shadowed = [page, 2 * page, 16 * page, usize::MAX][seed as usize % 4];
                let policy = Policy { relocate_always: always, poison: always, warm, shadowed, ..policy() };
                program(&mut seen, policy, seed + 1_000_000, if always { 150 } else { 400 }, true)
                    .map_err(|problem| format!("program {seed}: {problem}"))?;
            }
            for (note, seen) in page().notes.iter().zip([seen.segments, seen.shadow_segments, seen.short, seen.resumed])
            {
                note.store(seen, Relaxed);
            }
            let shadows = if class.shadow() { seen.shadow_segments } else { programs };
            if [seen.segments, shadows, seen.resumed].iter().any(|&count| count < programs) {
                return Err(format!("hardly anything happened: {seen:?}"));
            }
            if !class.shadow() && seen.shadow_segments + seen.short != 0 {
                return Err(format!("shadow segments where there are none: {seen:?}"));
            }
            Ok(Code::C)
        });
        tally.attack(&format!("{programs} programs{what}"), &end, &[Code::C]);
        let [segments, shadows, short, resumed, ..] = end.notes;
        tally.say(format!("{segments} segments, {shadows} shadow segments, {short} growths without shadow room, {resumed} resumptions{what}"));
    }
    tally.report()
}

/// What the programs did.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    segments: u64,
    shadow_segments: u64,
    short: u64,
    growths: u64,
    shrinks: u64,
    entries: u64,
    resumed: u64,
}

/// What a frame does next, by the dice, through `link` too where that is wanted.
pub fn choose(world: &World<'_>, dice: &mut Dice, left: &mut usize, links: bool) -> Op {
    if *left == 0 {
        return Op::Return;
    }
    *left -= 1;
    let deep = world.frames.len() >= FRAMES;
    match dice.below(40) {
        0..=11 if !deep => Op::Small(word(dice)),
        12..=17 if !deep => Op::Large(word(dice)),
        18..=20 if world.depth() < ENTRIES && !deep => Op::Enter(word(dice)),
        21..=22 => Op::Compact,
        23 => Op::Reserve(dice.below(1 << 16)),
        24 => Op::Reserve([usize::MAX, usize::MAX - 4096, 1 << 62][dice.below(3)]),
        25..=26 => Op::Grow(dice.below(1 << 16) as u64),
        27..=28 if world.depth() == 1 => Op::Suspend(word(dice)),
        29 if world.depth() > 1 && dice.below(4) == 0 => Op::Suspend(word(dice)),
        30 if dice.below(4) == 0 => Op::Leave(word(dice)),
        31..=34 if links && !deep => Op::Link(word(dice)),
        _ => Op::Return,
    }
}

fn program(seen: &mut Seen, policy: Policy, seed: u64, steps: usize, links: bool) -> Result<(), String> {
    let mut dice = Dice::new("S34", seed);
    let mut native = Dice::new("S34 outside", seed);
    let mut left = steps;
    let mut entries = 0;
    let world = World::new(|world| {
        let op = choose(world, &mut dice, &mut left, links);
        entries += u64::from(matches!(op, Op::Enter(_)));
        op
    });
    let mut run = Run::new(policy, world)?;
    run.world.may_fail = links;
    let short = |error: &Error| links && matches!(error, Error::ShadowRoom { .. } | Error::Overflow { .. });
    for _ in 0..2 {
        let mut got = run.enter(word(&mut native));
        while let Ok(Exit::Suspended(_)) = got {
            let moved = match native.below(6) {
                0 => run.stack.shrink_to_fit().map(|_| ()),
                1 => run.stack.compact().map(|_| ()),
                2 => run.stack.reserve(native.below(1 << 17)),
                3 => match run.stack.reserve(usize::MAX - native.below(64)) {
                    Err(Error::Overflow { .. }) => Ok(()),
                    got => return Err(format!("a reservation of everything: {got:?}")),
                },
                _ => Ok(()),
            };
            match moved {
                Err(error) if short(&error) => seen.short += u64::from(matches!(error, Error::ShadowRoom { .. })),
                moved => moved.map_err(|error| format!("a suspended stack: {error}"))?,
            }
            if native.below(40) == 0 {
                run.stack.discard().map_err(|error| error.to_string())?;
                run.forget();
                break;
            }
            seen.resumed += 1;
            got = run.resume(word(&mut native), native.below(12) == 0);
        }
        run.world.verdict()?;
        seen.short += u64::from(matches!(got, Err(Error::ShadowRoom { .. })));
        if !run.world.frames.is_empty() {
            return Err(format!("{} frames are left of {got:x?}", run.world.frames.len()));
        }
        if native.below(2) == 0 {
            run.stack.shrink_to_fit().map_err(|error| error.to_string())?;
            if run.stack.size() != policy.initial {
                return Err(format!("an empty stack of {} bytes", run.stack.size()));
            }
        }
    }
    seen.segments += run.stack.stats().segments;
    seen.shadow_segments += run.stack.stats().shadow_segments;
    seen.growths += run.stack.stats().growths;
    seen.shrinks += run.stack.stats().shrinks;
    drop(run);
    seen.entries += entries;
    Ok(())
}
