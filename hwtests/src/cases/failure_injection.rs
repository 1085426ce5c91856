//! A28: a migration fails at every step that it has, and for real when memory runs out.

use crate::attack::{DEPTH, Scene, at_every_step, policy, stop, zero_address};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::managed;
use crate::memory::footprint;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::steps::Step;
use cfi_stack::{Error, Exit, Policy, Stack};
use std::sync::atomic::Ordering::Relaxed;

const STEPS: [Step; 7] =
    [Step::Begin, Step::Mapped, Step::Planned, Step::Copied, Step::Rebased, Step::Rebound, Step::Committed];
/// Rounds after which a leak of one mapping each would show.
const ROUNDS: usize = 50;

/// A28.
pub fn every_step(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("", &run(|| Scene::new(policy())?.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::C)));
    for step in STEPS {
        for growth in [1, 3] {
            tally.attack(&format!("{step:?}, growth {growth}"), &run(|| fails_at(step, growth, policy())), &[Code::E]);
            let what = format!("{step:?}, growth {growth}, pages moved");
            tally.attack(&what, &run(|| fails_at(step, growth, moving_pages())), &[Code::E]);
        }
    }
    tally.attack("every step in turn leaks nothing", &run(leaks_nothing), &[Code::E]);
    let end = run(out_of_memory);
    if end.notes[0] == 1 && class.user_mode_emulator {
        tally.say(
            "left out: memory running out for real, because QEMU's user mode does not apply RLIMIT_AS to the program",
        );
    } else if end.notes[0] == 1 {
        tally.fail("RLIMIT_AS: the kernel did not take the limit");
    } else {
        tally.attack("RLIMIT_AS", &end, &[Code::E]);
    }
    tally.report()
}

/// Every span moves by page tables, where the kernel can.
fn moving_pages() -> Policy {
    Policy { move_pages: 0, ..policy() }
}

fn fails_at(step: Step, growth: usize, policy: Policy) -> Verdict {
    let mut scene = Scene::new(policy)?;
    let mut begun = 0;
    at_every_step(move |now, info| {
        begun += usize::from(now == Step::Begin);
        if begun != growth {
            return Ok(());
        }
        // From the last step on the stack has moved, and the old segment goes.
        if now == Step::Begin && step != Step::Committed {
            page().freeze_span(info.youngest, info.top);
        }
        if now == step { Err(Error::Injected) } else { Ok(()) }
    });
    let result = scene.recurse(managed::recurse_a(), DEPTH);
    stop();
    if result != Err(Error::Injected) {
        return Err(format!("{result:x?}"));
    }
    if !page().span_is_intact() {
        return Err("the live span was written to".into());
    }
    for (function, _) in managed::recursions() {
        scene.recurse_right(function, DEPTH)?;
    }
    Ok(Code::E)
}

fn leaks_nothing() -> Verdict {
    let mut scene = Scene::new(policy())?;
    let round = |scene: &mut Scene, number: usize| -> Result<(), String> {
        let step = STEPS[number % STEPS.len()];
        let policy = if (number / STEPS.len()).is_multiple_of(2) { policy() } else { moving_pages() };
        scene.stack = Stack::new(&scene.thread, policy).map_err(|error| error.to_string())?;
        at_every_step(move |now, _| if now == step { Err(Error::Injected) } else { Ok(()) });
        let result = scene.recurse(managed::recurse_a(), DEPTH);
        stop();
        if result == Err(Error::Injected) { Ok(()) } else { Err(format!("{step:?}: {result:x?}")) }
    };
    for number in 0..2 * STEPS.len() {
        round(&mut scene, number)?;
    }
    let (before, _) = footprint();
    for number in 0..ROUNDS {
        round(&mut scene, number)?;
    }
    round(&mut scene, 2 * STEPS.len() - 1)?;
    let (after, _) = footprint();
    if before != after {
        return Err(format!("{before} mappings before, {after} after {ROUNDS} failures"));
    }
    scene.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::E)
}

fn address_space(limit: Option<u64>) -> u64 {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: asks for and sets a limit of this process.
    unsafe {
        libc::getrlimit(libc::RLIMIT_AS, &mut now);
        if let Some(limit) = limit {
            libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: limit, ..now });
        }
        libc::getrlimit(libc::RLIMIT_AS, &mut now);
    }
    now.rlim_cur
}

fn out_of_memory() -> Verdict {
    let mut scene = Scene::new(Policy { maximum: 16 << 20, ..policy() })?;
    scene.recurse_right(managed::recurse_a(), DEPTH)?;
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let pages: u64 = statm.split_whitespace().next().and_then(|word| word.parse().ok()).ok_or("statm says nothing")?;
    let unlimited = address_space(None);
    let limit = pages * 4096 + (256 << 10);
    if address_space(Some(limit)) != limit {
        page().notes[0].store(1, Relaxed);
        return Ok(Code::E);
    }
    let result = scene.enter(managed::recurse_a(), 100_000, zero_address(), 0);
    address_space(Some(unlimited));
    if !matches!(result, Err(Error::Memory { .. })) {
        return Err(format!("{result:x?}"));
    }
    let after = scene.recurse(managed::recurse_a(), 100_000);
    if after != Ok(Exit::Returned(managed::recursion_sum(100_000))) {
        return Err(format!("the stack is not usable afterwards: {after:x?}"));
    }
    Ok(Code::E)
}
