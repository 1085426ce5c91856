//! A42, the stubs by which managed code suspends its whole stack: suspend, resume, discard, and the tails of enter and leave that they
//! end in.

use super::callers::{Kind, Stub, follow, look};
use super::{Sums, outer};
use crate::attack::policy;
use crate::selftest::spans::{Op, Run, World, large, small};
use crate::stepper;
use crate::tally::Tally;
use cfi_stack::{Error, Exit};

unsafe extern "C" {
    fn cfi_stack_enter();
    fn cfi_stack_leave();
    fn cfi_stack_suspend_managed();
    fn cfi_stack_resume_managed();
    fn cfi_stack_discard();
}

const ENTER: usize = 0;
const LEAVE: usize = 1;
const SUSPEND: usize = 2;
const RESUME: usize = 3;
const DISCARD: usize = 4;

fn stubs() -> Vec<Stub> {
    vec![
        Stub::new("enter", cfi_stack_enter, Kind::Enter),
        Stub::new("leave", cfi_stack_leave, Kind::Leave),
        Stub::new("suspend", cfi_stack_suspend_managed, Kind::Suspend),
        Stub::new("resume", cfi_stack_resume_managed, Kind::Resume),
        Stub::new("discard", cfi_stack_discard, Kind::Native),
    ]
}

/// A stack whose managed code does this, then returns.
fn run<const N: usize>(ops: [Op; N]) -> Result<Run<'static>, String> {
    let mut ops = ops.into_iter();
    Run::new(policy(), World::new(move |_| ops.next().unwrap_or(Op::Return)))
}

fn step<T>(mut what: impl FnMut() -> T) -> Result<T, String> {
    let mut result = None;
    stepper::through(look, || outer(&mut || result = Some(what())));
    result.ok_or_else(|| "nothing ran".into())
}

/// Suspended twice from one frame, moved in between, suspended from an older one.
fn resumed(then_returns: bool) -> Result<(), String> {
    use Op::{Large, Leave, Return, Small, Suspend};
    let end = if then_returns { Return } else { Leave(7) };
    let mut run = run([Small(1), Large(2), Suspend(3), Suspend(4), Return, Suspend(5), end])?;
    let mut got = step(|| run.enter(9))?;
    for (round, expected) in [3, 4, 5].into_iter().enumerate() {
        if got != Ok(Exit::Suspended(expected)) {
            return Err(format!("suspended as {got:x?}"));
        }
        if round == 1 {
            run.stack.reserve(20_000).map_err(|error| error.to_string())?;
        }
        got = step(|| run.resume(round as u64, false))?;
    }
    run.world.verdict()?;
    match got {
        Ok(Exit::Returned(_)) if then_returns => Ok(()),
        Ok(Exit::Left(7)) if !then_returns => Ok(()),
        got => Err(format!("{got:x?}")),
    }
}

/// Discarded, then a second life.
fn discarded() -> Result<(), String> {
    let mut run = run([Op::Small(1), Op::Large(2), Op::Suspend(3), Op::Small(4), Op::Suspend(5)])?;
    for value in [3, 5] {
        let got = step(|| run.enter(9))?;
        run.world.verdict()?;
        if got != Ok(Exit::Suspended(value)) {
            return Err(format!("{got:x?}"));
        }
        step(|| run.stack.discard())?.map_err(|error| error.to_string())?;
        run.forget();
    }
    Ok(())
}

/// A nested entry cannot suspend: it ends with an error.
fn nested() -> Result<(), String> {
    let mut run = run([Op::Small(1), Op::Enter(2), Op::Large(3), Op::Suspend(4), Op::Return])?;
    let got = step(|| run.enter(9))?;
    run.world.verdict()?;
    match (got, run.world.nested.take()) {
        (Ok(Exit::Returned(_)), Some(Err(Error::Nested))) => Ok(()),
        (got, nested) => Err(format!("{got:x?}, {nested:x?}")),
    }
}

/// Steps through all of them.
pub fn all(tally: &mut Tally<'_>) {
    let stubs = stubs();
    let functions = [small(), large()];
    let mut sums = Sums::default();
    let mut follow = |what: &str, required: &[usize], body: &mut dyn FnMut() -> Result<(), String>| {
        follow(tally, &mut sums, what, (&stubs, required), &functions, body);
    };
    follow("suspends, is resumed, returns", &[ENTER, SUSPEND, RESUME], &mut || resumed(true));
    follow("suspends, is resumed, leaves", &[SUSPEND, RESUME, LEAVE], &mut || resumed(false));
    follow("suspends, is discarded", &[SUSPEND, DISCARD, LEAVE, ENTER], &mut discarded);
    follow("suspends in a nested entry", &[ENTER, SUSPEND, LEAVE], &mut nested);
    sums.say(tally);
}
