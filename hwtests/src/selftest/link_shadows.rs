//! Link calls where the shadow stack is short: each goes to a shadow segment of its own. Where there are no shadow stacks the same programs
//! change nothing but data segments.

use super::spans::{Op, Run, World};
use crate::attack::policy;
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::memory::footprint;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pac::Signing;
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack, Stats, pool};
use std::sync::atomic::Ordering::Relaxed;

/// Link calls within each other: so many shadow segments besides the first.
const LINKS: usize = 7;

/// Room for the first page of a stack alone, and nothing given back between runs.
fn short() -> Policy {
    Policy { shadowed: policy().initial, warm: LINKS + 1, ..policy() }
}

/// S46.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let made = if class.shadow() { LINKS as u64 } else { 0 };
    for always in [false, true] {
        let policy = Policy { relocate_always: always, poison: always, ..short() };
        let what = if always { ", moving at every check" } else { "" };
        let mut shown = |name: &str, verdict: &dyn Fn() -> Verdict| {
            tally.attack(&format!("{name}{what}"), &run(verdict), &[Code::C]);
        };
        shown("there and back, then warm", &|| there_and_back(policy, made));
        shown("leave from the last one", &|| leaves(policy, made));
        shown("suspended on the last one, resumed here", &|| suspends(policy, false, Signing::None));
        shown("suspended on the last one, resumed on another thread", &|| suspends(policy, true, Signing::None));
        for key in [Signing::A, Signing::B] {
            shown(&format!("suspended on the last one, parked under {key:?}"), &|| suspends(policy, false, key));
        }
        shown("suspended on the last one, discarded and dropped", &|| forgets(policy, made));
        shown("growth on each", &|| grows(policy));
        for level in [1, 4, LINKS] {
            shown(&format!("native code enters again on number {level}, and links on"), &|| nests(policy, level));
        }
        shown("what is not kept warm is made again", &|| cold(Policy { warm: 0, ..policy }, made));
    }
    if class.shadow() {
        tally.attack("growth beyond the shadow segment", &run(no_room), &[Code::E]);
        tally.attack("no memory at each call of the system", &run(no_memory), &[Code::E]);
    }
    tally.attack("the first segment as large as asked for", &run(sized), &[Code::C]);
    tally.attack(
        "with the least reserve",
        &run(|| there_and_back(Policy { reserve: 160, ..short() }, made)),
        &[Code::C],
    );
    for (what, shadowed) in [("all of the maximum", usize::MAX), ("the first page", policy().initial)] {
        let end = run(|| many(shadowed));
        let [mappings, pages, addresses, ..] = end.notes;
        tally.attack(&format!("{MANY} stacks with shadow room for {what}"), &end, &[Code::C]);
        tally.say(format!(
            "{MANY} stacks with shadow room for {what}: {mappings} mappings, {pages} pages resident, {} KiB of addresses",
            addresses / 1024
        ));
    }
    tally.report()
}

/// What a world is told before a run: nothing that these programs do.
const BEGIN: Op = Op::Compact;

/// How many stacks are made to see what one costs.
const MANY: usize = 1000;

/// Makes them, of the default sizes, and notes what that takes of mappings, pages and addresses.
fn many(shadowed: usize) -> Verdict {
    let thread = Thread::attach().map_err(|error| error.to_string())?;
    let mut stacks = Vec::with_capacity(MANY);
    let before = (footprint(), addresses()?);
    for _ in 0..MANY {
        let policy = Policy { shadowed, ..Policy::default() };
        stacks.push(Stack::new(&thread, policy).map_err(|error| error.to_string())?);
    }
    let after = (footprint(), addresses()?);
    let took = [after.0.0 - before.0.0, after.0.1 - before.0.1, after.1 - before.1];
    for (note, took) in page().notes.iter().zip(took) {
        note.store(took as u64, Relaxed);
    }
    Ok(Code::C)
}

/// Bytes of addresses in use.
fn addresses() -> Result<usize, String> {
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let pages: Option<usize> = statm.split_whitespace().next().and_then(|word| word.parse().ok());
    pages.map(|pages| pages * 4096).ok_or("statm says nothing".into())
}

/// Links until there are `links` of them, does what `end` says there and in each frame on the way back, and returns.
fn down(links: usize, mut end: impl FnMut(&mut World<'_>) -> Option<Op>) -> impl FnMut(&mut World<'_>) -> Op {
    let mut going = false;
    move |world| {
        let frames = world.frames.len();
        going = frames <= links && (going || world.last == BEGIN);
        if going { Op::Link(frames as u64) } else { end(world).unwrap_or(Op::Return) }
    }
}

/// Enters, and compares the result and the native shadow stack.
fn entered(run: &mut Run<'_>, expected: impl Fn(&Result<Exit, Error>) -> bool) -> Result<Stats, String> {
    let native = cpu::shadow_pointer();
    run.world.last = BEGIN;
    let got = run.enter(1);
    run.world.verdict()?;
    if !expected(&got) {
        return Err(format!("{got:x?}"));
    }
    if cpu::shadow_pointer() != native {
        return Err("the shadow-stack pointer is another".into());
    }
    Ok(run.stack.stats())
}

fn returned(got: &Result<Exit, Error>) -> bool {
    matches!(got, Ok(Exit::Returned(_)))
}

/// Whether so many were made, and no more.
fn counted(stats: Stats, made: u64) -> Result<(), String> {
    match (stats.segments, stats.shadow_segments) {
        (segments, shadows) if segments == LINKS as u64 && shadows == made => Ok(()),
        _ => Err(format!("{stats:?}")),
    }
}

fn there_and_back(policy: Policy, made: u64) -> Verdict {
    let mut run = Run::new(policy, World::new(down(LINKS, |_| None)))?;
    counted(entered(&mut run, returned)?, made)?;
    steady(policy, || (0..3).try_for_each(|_| counted(entered(&mut run, returned)?, made)))?;
    Ok(Code::C)
}

/// Whether as much is mapped after `window` as before. A leak grows in each; neighbours that the kernel merges, or no longer does, change the number
/// once. What a policy that poisons keeps depends on when it looks.
fn steady(policy: Policy, mut window: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    /// How often that is looked at, at most.
    const WINDOWS: usize = 3;
    let mut seen = vec![];
    for _ in 0..WINDOWS {
        let before = footprint().0;
        window()?;
        seen.push((before, footprint().0));
        if seen.last().is_some_and(|&(before, after)| after <= before || policy.poison) {
            return Ok(());
        }
    }
    Err(format!("mappings before and after, in each window: {seen:?}"))
}

fn leaves(policy: Policy, made: u64) -> Verdict {
    let mut run = Run::new(policy, World::new(down(LINKS, |world| Some(Op::Leave(world.frames.len() as u64)))))?;
    for _ in 0..3 {
        counted(entered(&mut run, |got| *got == Ok(Exit::Left(LINKS as u64 + 1)))?, made)?;
    }
    run.world = World::new(down(LINKS, |_| None));
    counted(entered(&mut run, returned)?, made)?;
    Ok(Code::C)
}

/// At the deepest, and at each frame on the way back; moved there as well, and parked if a key is named.
fn suspends(policy: Policy, elsewhere: bool, key: Signing) -> Verdict {
    let mut suspended = 0;
    let world = World::new(down(LINKS, move |world| {
        let frames = world.frames.len();
        (suspended != frames).then(|| {
            suspended = frames;
            Op::Suspend(frames as u64)
        })
    }));
    let mut run = Run::new(policy, world)?;
    let native = cpu::shadow_pointer();
    run.world.last = BEGIN;
    let mut got = run.enter(1);
    let mut suspensions = 0;
    while let Ok(Exit::Suspended(_)) = got {
        let room = if run.world.frames.len() > 1 { 8000 } else { 2000 };
        run.stack.reserve(room).map_err(|error| error.to_string())?;
        if suspensions % 3 == 2 {
            run.stack.shrink_to_fit().map_err(|error| error.to_string())?;
        }
        if key != Signing::None {
            run.stack.park(&run.thread, key).map_err(|error| error.to_string())?;
            run.stack.unpark(&run.thread).map_err(|error| error.to_string())?;
        }
        suspensions += 1;
        got = run.resume(suspensions, elsewhere && suspensions % 2 == 1);
    }
    run.world.verdict()?;
    if suspensions != LINKS as u64 + 1 || !returned(&got) || cpu::shadow_pointer() != native {
        return Err(format!("{suspensions} suspensions, then {got:x?}"));
    }
    Ok(Code::C)
}

fn forgets(policy: Policy, made: u64) -> Verdict {
    let suspends = || World::new(down(LINKS, |_| Some(Op::Suspend(9))));
    let waits = |got: &Result<Exit, Error>| *got == Ok(Exit::Suspended(9));
    let mut run = Run::new(policy, suspends())?;
    for _ in 0..3 {
        counted(entered(&mut run, waits)?, made)?;
        run.stack.discard().map_err(|error| error.to_string())?;
        run.forget();
        run.world = suspends();
    }
    run.world = World::new(down(LINKS, |_| None));
    counted(entered(&mut run, returned)?, made)?;
    run.renew(policy)?;
    // Nothing is kept of a stack that is gone, poisoned or not.
    steady(Policy { poison: false, ..policy }, || {
        (0..5).try_for_each(|_| {
            run.world = suspends();
            counted(entered(&mut run, waits)?, made)?;
            run.renew(policy)
        })
    })?;
    Ok(Code::C)
}

/// Each segment grows on the way back, as far as its shadow segment lets it, and on the way there not at all.
fn grows(policy: Policy) -> Verdict {
    let mut grown = 0;
    let world = World::new(down(LINKS, move |world| {
        let frames = world.frames.len();
        (grown != frames).then(|| {
            grown = frames;
            Op::Grow(if frames > 1 { 8000 } else { 2000 })
        })
    }));
    let mut run = Run::new(policy, world)?;
    for _ in 0..2 {
        let stats = entered(&mut run, returned)?;
        if stats.growths < LINKS as u64 {
            return Err(format!("{stats:?}"));
        }
    }
    Ok(Code::C)
}

/// On segment `level` native code enters again, which links on, suspends (refused), leaves, returns; then managed code goes on.
fn nests(policy: Policy, level: usize) -> Verdict {
    let (mut entries, mut deep) = (0, 0);
    let world = World::new(move |world| {
        let (frames, depth) = (world.frames.len(), world.depth());
        if depth == 2 {
            if frames - world.bases[1] <= LINKS && world.last != Op::Return {
                return Op::Link(frames as u64);
            }
            deep += 1;
            return match deep {
                1 => Op::Leave(5),
                2 => Op::Suspend(6),
                _ => Op::Return,
            };
        }
        if frames <= level && matches!(world.last, BEGIN | Op::Link(_)) {
            return Op::Link(frames as u64);
        }
        if entries < 3 && frames == level + 1 {
            entries += 1;
            return Op::Enter(frames as u64);
        }
        Op::Return
    });
    let mut run = Run::new(policy, world)?;
    entered(&mut run, returned)?;
    match &run.world.nested {
        Some(Ok(Exit::Returned(_))) => {}
        other => return Err(format!("the last nested entry: {other:x?}")),
    }
    run.world = World::new(down(LINKS, |_| None));
    entered(&mut run, returned)?;
    Ok(Code::C)
}

fn cold(policy: Policy, made: u64) -> Verdict {
    let mut run = Run::new(policy, World::new(down(LINKS, |_| None)))?;
    let mut rounds = 0;
    steady(policy, || {
        (0..3).try_for_each(|_| {
            rounds += 1;
            let stats = entered(&mut run, returned)?;
            match (stats.segments, stats.shadow_segments) == (rounds * LINKS as u64, rounds * made) {
                true => Ok(()),
                false => Err(format!("round {rounds}: {stats:?}")),
            }
        })
    })?;
    Ok(Code::C)
}

fn no_room() -> Verdict {
    let policy = short();
    for level in [0, 3] {
        let mut asked = false;
        let world = World::new(down(level, move |_| {
            let asks = !asked;
            asked = true;
            asks.then_some(Op::Grow(60_000))
        }));
        let mut run = Run::new(policy, world)?;
        run.world.may_fail = true;
        entered(&mut run, |got| matches!(got, Err(Error::ShadowRoom { needed, room }) if needed > room))?;
        if run.stack.reserve(60_000).is_ok() || run.stack.reserve(2000).is_err() {
            return Err("an idle stack has reserved something else than there was shadow room for".into());
        }
        run.world = World::new(down(LINKS, |_| None));
        entered(&mut run, returned)?;
    }
    Ok(Code::E)
}

/// Each call that a stack and its links make of the system fails once.
fn no_memory() -> Verdict {
    let mut run = Run::new(short(), World::new(down(LINKS, |_| None)))?;
    entered(&mut run, returned)?;
    run.renew(short())?;
    steady(short(), || fails_at_each_call(&mut run))?;
    Ok(Code::E)
}

fn fails_at_each_call(run: &mut Run) -> Result<(), String> {
    let mut refused = 0;
    for calls in 0.. {
        run.renew(short())?;
        run.world = World::new(down(LINKS, |_| None));
        run.world.may_fail = true;
        run.world.last = BEGIN;
        pool::fail_calls_from(Some(calls));
        let got = run.enter(1);
        pool::fail_calls_from(None);
        run.world.verdict()?;
        match got {
            Err(Error::Memory { .. }) => refused += 1,
            got if returned(&got) => break,
            got => return Err(format!("call {calls}: {got:x?}")),
        }
        // What is there goes on.
        run.world = World::new(down(LINKS, |_| None));
        counted(entered(run, returned)?, LINKS as u64).map_err(|why| format!("call {calls}: {why}"))?;
    }
    run.renew(short())?;
    if refused < LINKS { Err(format!("{refused} refused")) } else { Ok(()) }
}

/// `with_size` has a shadow segment for all of it: it grows no more, and a link call from it goes on.
fn sized() -> Verdict {
    let mut run = Run::new(short(), World::new(down(2, |_| Some(Op::Return))))?;
    run.stack = Stack::with_size(&run.thread, short(), 100_000).map_err(|error| error.to_string())?;
    let stats = entered(&mut run, returned)?;
    if stats.growths != 0 || stats.largest < 100_000 {
        return Err(format!("{stats:?}"));
    }
    Ok(Code::C)
}
