//! Stacks that are sized up front, shrink and are compacted.

use super::spans::{Op, Run, World};
use crate::attack::{at_every_step, policy, stop};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::steps::Step;
use cfi_stack::{Error, Exit, Policy, Stack, engine};

/// S33.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("a stack that is large enough from the start never grows", &run(up_front), &[Code::C]);
    tally.attack("compaction at a safepoint, below nested entries too", &run(at_safepoints), &[Code::C]);
    tally.attack("many stacks compacted; their memory goes back", &run(many), &[Code::C]);
    tally.attack("sizes that no stack can have", &run(impossible), &[Code::E]);
    for step in [Step::Mapped, Step::Planned, Step::Copied, Step::Rebased, Step::Rebound, Step::Committed] {
        tally.attack(&format!("a suspended stack cannot move at {step:?}"), &run(|| fails_at(step)), &[Code::E]);
    }
    tally.report()
}

/// Goes `depth` large frames deep and back; on the way back does at each frame what `then` says.
fn dives(depth: usize, then: impl Fn(usize) -> Option<Op>) -> impl FnMut(&mut World<'_>) -> Op {
    let (mut down, mut at) = (true, 0);
    move |world| {
        let frames = world.frames.len();
        if down && frames < depth {
            return Op::Large(frames as u64);
        }
        down = false;
        if at != frames {
            at = frames;
            return then(frames).unwrap_or(Op::Return);
        }
        Op::Return
    }
}

fn up_front() -> Verdict {
    /// 900 bytes each.
    const DEPTH: usize = 300;
    for way in 0..3 {
        let world = World::new(dives(DEPTH, |_| None));
        let mut run = Run::new(policy(), world)?;
        let before = match way {
            0 => {
                run.stack = Stack::with_size(&run.thread, policy(), DEPTH * 912).map_err(|error| error.to_string())?;
                0
            }
            1 => {
                run.stack.reserve(DEPTH * 912).map_err(|error| error.to_string())?;
                1
            }
            _ => {
                let mut asked = false;
                let mut dive = dives(DEPTH, |_| None);
                run.world = World::new(move |world| {
                    if std::mem::replace(&mut asked, true) { dive(world) } else { Op::Reserve(DEPTH * 912) }
                });
                1
            }
        };
        let got = run.enter(1);
        run.world.verdict()?;
        let stats = run.stack.stats();
        if !matches!(got, Ok(Exit::Returned(_))) || stats.growths != before {
            return Err(format!("way {way}: {got:x?}, {} growths", stats.growths));
        }
    }
    Ok(Code::C)
}

fn at_safepoints() -> Verdict {
    // Down, nearly back, an entry, and there at each frame a compaction.
    let mut phase = 0;
    let world = World::new(move |world| {
        let frames = world.frames.len();
        match phase {
            0 if frames < 300 => Op::Large(frames as u64),
            0 => {
                phase = 1;
                Op::Return
            }
            1 if frames > 5 => Op::Return,
            1 => {
                phase = 2;
                Op::Enter(9)
            }
            2 if frames < 20 => Op::Small(3),
            2 => {
                phase = 3;
                Op::Compact
            }
            3 => {
                phase = 4;
                Op::Reserve(100_000)
            }
            4 => {
                phase = 5;
                Op::Compact
            }
            _ => Op::Return,
        }
    });
    let mut run = Run::new(policy(), world)?;
    let got = run.enter(1);
    run.world.verdict()?;
    let stats = run.stack.stats();
    if !matches!(got, Ok(Exit::Returned(_))) || stats.shrinks != 2 || run.stack.size() > 16 << 10 {
        return Err(format!("{got:x?}, {stats:?}, {} bytes", run.stack.size()));
    }
    Ok(Code::C)
}

/// Pages of address space and of memory that this process has.
fn pages() -> Result<[usize; 2], String> {
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let mut words = statm.split_whitespace().map(|word| word.parse().unwrap_or(0));
    Ok([words.next().unwrap_or(0), words.next().unwrap_or(0)])
}

fn many() -> Verdict {
    const STACKS: usize = 20;
    let mut runs = Vec::new();
    let (thread, code) =
        (cfi_stack::thread::Thread::attach().map_err(|error| error.to_string())?, super::spans::register());
    for _ in 0..STACKS {
        // Deep, then back to five frames, where it waits.
        let world = World::new(dives(500, |frames| (frames == 5).then_some(Op::Suspend(1))));
        let mut run = Run::on(Stack::new(&thread, policy()).map_err(|error| error.to_string())?, world)?;
        let got = run.enter(1);
        run.world.verdict()?;
        if got != Ok(Exit::Suspended(1)) || run.stack.size() < 400 << 10 {
            return Err(format!("{got:x?}, {} bytes", run.stack.size()));
        }
        runs.push(run);
    }
    let before = pages()?;
    let done = engine::compact_stacks(runs.iter_mut().map(|run| &mut run.stack));
    let after = pages()?;
    let freed = done.freed / 4096;
    if (done.moved, done.refused) != (STACKS, 0) || freed < STACKS * 100 {
        return Err(format!("{done:?}"));
    }
    // Addresses and memory. A segment that was grown to was touched as deep as the frames went; an emulator's own memory counts too.
    let wanted = [freed, STACKS * 100].map(|pages| pages * 7 / 10);
    if before.iter().zip(after).zip(wanted).any(|((before, after), wanted)| before - after.min(*before) < wanted) {
        return Err(format!("{before:?} pages before, {after:?} after, {freed} freed"));
    }
    let again = engine::compact_stacks(runs.iter_mut().map(|run| &mut run.stack));
    if again != engine::Compacted::default() {
        return Err(format!("compacted twice: {again:?}"));
    }
    for mut run in runs {
        let got = run.resume(2, false);
        run.world.verdict()?;
        if !matches!(got, Ok(Exit::Returned(_))) {
            return Err(format!("{got:x?}"));
        }
    }
    drop((code, thread));
    Ok(Code::C)
}

fn impossible() -> Verdict {
    let world = World::new(|world| if world.frames.len() < 3 { Op::Small(1) } else { Op::Suspend(2) });
    let mut run = Run::new(policy(), world)?;
    let base = policy();
    for wrong in [
        Policy { growth: 1, ..base },
        Policy { growth: usize::MAX, ..base },
        Policy { growth: 4, shrink_below: 4, ..base },
        Policy { shrink_below: 0, ..base },
        Policy { keep: usize::MAX, ..base },
    ] {
        match Stack::new(&run.thread, wrong) {
            Err(Error::Policy(_)) => {}
            got => return Err(format!("{wrong:?}: {got:?}")),
        }
    }
    const SIZES: [usize; 5] = [1 << 20, 1 << 21, 1 << 62, usize::MAX - 4095, usize::MAX];
    for bytes in SIZES {
        match Stack::with_size(&run.thread, base, bytes) {
            Err(Error::Overflow { .. }) => {}
            got => return Err(format!("with {bytes} bytes: {got:?}")),
        }
    }
    let refuses = |stack: &mut Stack| {
        SIZES.iter().all(|&bytes| matches!(stack.reserve(bytes), Err(Error::Overflow { .. })))
            && stack.size() == base.initial
    };
    if !refuses(&mut run.stack) {
        return Err("an idle stack".into());
    }
    if run.enter(1) != Ok(Exit::Suspended(2)) || !refuses(&mut run.stack) {
        return Err("a suspended stack".into());
    }
    let got = run.resume(5, true);
    run.world.verdict()?;
    if got == Ok(Exit::Suspended(2)) { Ok(Code::E) } else { Err(format!("{got:x?}")) }
}

fn fails_at(step: Step) -> Verdict {
    let world = World::new(dives(50, |frames| (frames % 10 == 5).then_some(Op::Suspend(2))));
    let mut run = Run::new(policy(), world)?;
    let mut got = run.enter(1);
    for _ in 0..4 {
        if !matches!(got, Ok(Exit::Suspended(_))) {
            return Err(format!("{got:x?}"));
        }
        for shrinks in [false, true] {
            at_every_step(move |now, _| if now == step { Err(Error::Injected) } else { Ok(()) });
            let size = run.stack.size();
            let moved = match shrinks {
                false => run.stack.reserve(500_000),
                true => run.stack.shrink_to_fit().map(|_| ()),
            };
            stop();
            if moved != Err(Error::Injected) || run.stack.size() != size && step != Step::Committed {
                return Err(format!("shrinks {shrinks}: {moved:?}, {size} bytes before, {} after", run.stack.size()));
            }
            run.stack.reserve(500_000).map_err(|error| error.to_string())?;
        }
        run.stack.shrink_to_fit().map_err(|error| error.to_string())?;
        got = run.resume(3, false);
        run.world.verdict()?;
    }
    Ok(Code::E)
}
