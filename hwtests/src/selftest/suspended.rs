//! Stacks that managed code suspends.

use super::spans::{Op, Run, World, small};
use crate::attack::policy;
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::memory::footprint;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::{Error, Exit, Policy};
use std::sync::atomic::Ordering::Relaxed;

const ROUNDS: usize = 100_000;
/// Resident pages that may come and go: the allocator's, and an emulator's.
const SLACK: usize = 256;

/// S32.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for always in [false, true] {
        for depth in [1, 2, 30, 300] {
            for elsewhere in [false, true] {
                let end = run(|| moved(depth, elsewhere, always));
                let place = if elsewhere { "on another thread" } else { "here" };
                let what = if always { ", moving at every check" } else { "" };
                tally.attack(&format!("{depth} deep, moved, resumed {place}{what}"), &end, &[Code::C]);
            }
        }
    }
    tally.attack("resumed, entered, discarded when it cannot be", &run(mistakes), &[Code::E]);
    // A shadow stack that user mode does not emulate is most likely a whole emulated machine's: a tenth of them there.
    let count = if class.shadow() && !class.user_mode_emulator { ROUNDS / 10 } else { ROUNDS };
    let end = run(|| rounds(count));
    tally.attack(&format!("{count} rounds"), &end, &[Code::C]);
    let [before, after, pages_before, pages_after, ..] = end.notes;
    tally.say(format!(
        "{before} mappings before, {after} after; {pages_before} pages resident before, {pages_after} after"
    ));
    tally.report()
}

/// Goes `depth` frames deep and suspends there and at each frame on the way back.
fn suspends(depth: usize) -> impl FnMut(&mut World<'_>) -> Op {
    let (mut down, mut suspended) = (true, 0);
    move |world| {
        let frames = world.frames.len();
        if down && frames < depth {
            return if frames % 5 == 4 { Op::Large(frames as u64) } else { Op::Small(frames as u64) };
        }
        down = false;
        if suspended != frames {
            suspended = frames;
            return Op::Suspend(frames as u64);
        }
        Op::Return
    }
}

fn moved(depth: usize, elsewhere: bool, always: bool) -> Verdict {
    let mut run = Run::new(Policy { relocate_always: always, ..policy() }, World::new(suspends(depth)))?;
    let native = cpu::shadow_pointer();
    let mut got = run.enter(1);
    let mut suspensions = 0;
    while let Ok(Exit::Suspended(_)) = got {
        let sizes = [run.stack.size(), {
            run.stack.reserve(200_000).map_err(|error| error.to_string())?;
            run.stack.size()
        }];
        if sizes[1] < 200_000 {
            return Err(format!("{sizes:?} bytes, though 200,000 were reserved"));
        }
        let shrunk = run.stack.shrink_to_fit().map_err(|error| error.to_string())?;
        if !shrunk || run.stack.size() > (run.world.frames.len() * 900 + 4096).next_multiple_of(4096) {
            return Err(format!("{} bytes for {} frames", run.stack.size(), run.world.frames.len()));
        }
        suspensions += 1;
        if cpu::shadow_pointer() != native {
            return Err("the shadow-stack pointer is another".into());
        }
        got = run.resume(suspensions as u64, elsewhere && suspensions % 7 == 1);
    }
    run.world.verdict()?;
    if suspensions != depth || !matches!(got, Ok(Exit::Returned(_))) {
        return Err(format!("{suspensions} suspensions, then {got:x?}"));
    }
    let stats = run.stack.stats();
    if stats.shrinks < depth as u64 || stats.growths < depth as u64 {
        return Err(format!("{stats:?}"));
    }
    Ok(Code::C)
}

fn mistakes() -> Verdict {
    let mut run = Run::new(policy(), World::new(suspends(3)))?;
    let other = Activation::new();
    // SAFETY: nothing waits, so nothing runs.
    let idle = unsafe { run.stack.resume(&run.thread, &other, 1) };
    if idle != Err(Error::NotSuspended) || run.stack.discard() != Err(Error::NotSuspended) {
        return Err(format!("an idle stack was resumed: {idle:x?}"));
    }
    for discards in [true, false] {
        if !matches!(run.enter(1), Ok(Exit::Suspended(_))) || !run.stack.is_suspended() {
            return Err("it did not suspend".into());
        }
        // SAFETY: refused before anything runs.
        let entered = unsafe { run.stack.enter(&run.thread, &other, small().start, [0; 4]) };
        if entered != Err(Error::Suspended) {
            return Err(format!("a suspended stack was entered: {entered:x?}"));
        }
        if discards {
            run.stack.discard().map_err(|error| error.to_string())?;
            run.forget();
            run.world = World::new(suspends(3));
            continue;
        }
        let mut got = run.resume(1, false);
        while let Ok(Exit::Suspended(_)) = got {
            got = run.resume(1, false);
        }
        run.world.verdict()?;
    }
    Ok(Code::E)
}

/// One life: suspended a few times, then returned from, discarded or dropped.
fn round(run: &mut Run<'_>, number: usize) -> Result<(), String> {
    let mut got = run.enter(number as u64);
    for again in 0..number % 4 {
        if number % 8 == 3 {
            run.stack.reserve(10_000 * again).map_err(|error| error.to_string())?;
            run.stack.compact().map_err(|error| error.to_string())?;
        }
        got = run.resume(again as u64, false);
    }
    run.world.verdict()?;
    match got {
        Ok(Exit::Suspended(_)) if number.is_multiple_of(3) => run.renew(policy()),
        Ok(Exit::Suspended(_)) => {
            run.stack.discard().map_err(|error| error.to_string())?;
            run.forget();
            Ok(())
        }
        got => Err(format!("{got:x?}")),
    }
}

fn rounds(count: usize) -> Verdict {
    let mut step = 0_u64;
    let world = World::new(move |world| {
        step += 1;
        if world.frames.len() < 4 { Op::Large(step) } else { Op::Suspend(step) }
    });
    let mut run = Run::new(policy(), world)?;
    for number in 0..count / 100 {
        round(&mut run, number)?;
    }
    // A leak grows in every window; an emulator's own pages, which count as ours in user mode, stop coming.
    for _ in 0..3 {
        let before = footprint();
        for number in 0..count / 3 {
            round(&mut run, number)?;
        }
        let after = footprint();
        for (note, value) in page().notes.iter().zip([before.0, after.0, before.1, after.1]) {
            note.store(value as u64, Relaxed);
        }
        if before.0 != after.0 {
            return Err("the number of mappings changed".into());
        }
        if after.1 > before.1 + SLACK {
            return Err("resident memory grew".into());
        }
    }
    Ok(Code::C)
}
