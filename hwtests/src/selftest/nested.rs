//! Entries within each other on one stack.

use super::spans::{Op, Run, World, large, small};
use crate::attack::{at_every_step, policy, stop};
use crate::backtrace::by_tables;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::stepper::function_at;
use crate::tally::Tally;
use cfi_stack::engine::{self, Activation};
use cfi_stack::thread;
use cfi_stack::{Error, Exit, Policy};
use std::cell::RefCell;
use std::rc::Rc;

/// Frames of each entry before it enters again.
const FRAMES: usize = 6;

/// S30.
pub fn levels(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for always in [false, true] {
        for levels in [1, 2, 3, 6, 20] {
            for grows in 1..=levels.min(6) {
                let end = run(|| nest(levels, grows, always));
                let what = if always { ", moving at every check" } else { "" };
                tally.attack(&format!("{levels} levels, growth on {grows}{what}"), &end, &[Code::C]);
            }
        }
    }
    tally.report()
}

/// `levels` entries deep; on level `grows` twice as much is asked for as the stack has, before the next entry and after it.
fn nest(levels: usize, grows: usize, always: bool) -> Verdict {
    // By level: has asked before, has entered, has asked after.
    let mut done = vec![[false; 3]; levels + 1];
    let sizes = Rc::new(RefCell::new(Vec::new()));
    let noted = sizes.clone();
    let world = World::new(move |world| {
        let level = world.depth();
        let frames = world.frames.len() - world.bases[level - 1];
        let [before, entered, after] = &mut done[level];
        let held = world.frames.len() as u64 * 1_000_003;
        if !*entered && frames < FRAMES {
            return if frames % 3 == 2 { Op::Large(held) } else { Op::Small(held) };
        }
        if level == grows && !*before {
            *before = true;
            return Op::Grow(20_000);
        }
        if level < levels && !*entered {
            *entered = true;
            return Op::Enter(held);
        }
        if level == levels
            && !*entered
            && let Err(problem) = seen_from_native_code(world)
        {
            world.note(problem);
        }
        *entered = true;
        if level == grows && !*after {
            *after = true;
            noted.borrow_mut().push(level);
            return Op::Reserve(150_000);
        }
        Op::Return
    });
    let mut run = Run::new(Policy { relocate_always: always, ..policy() }, world)?;
    let got = run.enter(7);
    run.world.verdict()?;
    if !matches!(got, Ok(Exit::Returned(_))) || sizes.borrow().as_slice() != [grows] {
        return Err(format!("{got:x?}, {:?}", sizes.borrow()));
    }
    let growths = run.stack.stats().growths;
    if growths < 2 || always && growths < (levels * FRAMES) as u64 || run.stack.size() < 150_000 {
        return Err(format!("{growths} growths to {} bytes", run.stack.size()));
    }
    Ok(Code::C)
}

/// The unwind tables lead from here through all entries to main, whether the frames have moved or not.
fn seen_from_native_code(world: &World<'_>) -> Result<(), String> {
    unsafe extern "C" {
        fn cfi_stack_enter();
    }
    let starts: Vec<usize> = by_tables().iter().map(|frame| function_at(frame.pc - 1)).collect();
    let count = |wanted: &[usize]| starts.iter().filter(|start| wanted.contains(start)).count();
    let managed = count(&[small().start.address(), large().start.address()]);
    let entries = count(&[cfi_stack_enter as *const () as usize]);
    let mains = count(&[crate::main as *const () as usize]);
    if (managed, entries, mains) == (world.frames.len(), world.depth(), 1) {
        Ok(())
    } else {
        Err(format!(
            "{managed} managed frames of {}, {entries} entries of {}, main {mains} times among {}",
            world.frames.len(),
            world.depth(),
            starts.len()
        ))
    }
}

/// S31.
pub fn mistakes(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for level in [2, 3, 5] {
        for (what, op) in [("leaves", Op::Leave(9)), ("suspends", Op::Suspend(5)), ("overflows", Op::Grow(1 << 40))] {
            for frames in [1, 40] {
                let end = run(|| innermost(level, op, frames));
                tally.attack(&format!("the entry on level {level}, {frames} frames deep, {what}"), &end, &[Code::E]);
            }
        }
    }
    tally.attack("entered where no native code was called", &run(nowhere), &[Code::E]);
    tally.attack("entered with another activation, and by another thread", &run(with_others), &[Code::E]);
    tally.attack("entered by a hook while the frames move", &run(while_moving), &[Code::E]);
    tally.report()
}

/// What the innermost entry does ends it alone; the others go on, and the stack can be used again.
fn innermost(level: usize, op: Op, deep: usize) -> Verdict {
    let mut ended = false;
    let world = World::new(move |world| {
        let base = world.bases[world.depth() - 1];
        let frames = world.frames.len() - base;
        if ended || world.depth() == level && frames == deep {
            // The entry around it goes on: as many frames again, then back.
            let again = ended && world.depth() == level - 1 && frames < 5 && world.nested.take().is_some();
            ended = true;
            return if world.depth() == level {
                op
            } else if again {
                Op::Large(3)
            } else {
                Op::Return
            };
        }
        match world.depth() < level && frames == 3 {
            true => Op::Enter(1),
            false => Op::Small(frames as u64),
        }
    });
    let mut run = Run::new(policy(), world)?;
    run.world.may_fail = matches!(op, Op::Grow(_));
    let got = run.enter(7);
    run.world.verdict()?;
    if !matches!(got, Ok(Exit::Returned(_))) {
        return Err(format!("the outermost entry gave {got:x?}"));
    }
    let again = run.enter(8);
    run.world.verdict()?;
    if again != Ok(Exit::Returned(8)) {
        return Err(format!("the stack is not usable afterwards: {again:x?}"));
    }
    Ok(Code::E)
}

fn refused<T: std::fmt::Debug>(got: Result<T, Error>) -> Result<(), String> {
    match got {
        Err(Error::NotInExit) => Ok(()),
        got => Err(format!("{got:?} instead of a refusal")),
    }
}

fn all_refused(activation: &Activation) -> Result<(), String> {
    // SAFETY: refused before anything is done.
    unsafe {
        refused(engine::enter_again(activation, small().start, [0; 4]))?;
        refused(engine::reserve(activation, 4096))?;
        refused(engine::compact(activation))
    }
}

fn nowhere() -> Verdict {
    let mut run = Run::new(policy(), World::new(|_| Op::Return))?;
    all_refused(&Activation::new())?;
    if run.enter(3) != Ok(Exit::Returned(3)) {
        return Err("the stack is not usable".into());
    }
    all_refused(&Activation::new())?;
    run.world.verdict().map(|()| Code::E)
}

fn with_others() -> Verdict {
    let mut asked = false;
    let world = World::new(move |world| {
        if !asked {
            asked = true;
            let ours = thread::current_activation().map(|activation| activation.as_ptr().expose_provenance());
            let elsewhere = std::thread::scope(|scope| {
                let there = scope.spawn(move || match ours {
                    // SAFETY: the activation runs a stack, which waits for this callee.
                    Some(ours) => all_refused(unsafe { &*std::ptr::with_exposed_provenance(ours) }),
                    None => Err("no activation runs".into()),
                });
                there.join().unwrap_or_else(|_| Err("it panicked".into()))
            });
            if let Err(problem) = all_refused(&Activation::new()).and(elsewhere) {
                world.note(problem);
            }
            return Op::Large(5);
        }
        Op::Return
    });
    let mut run = Run::new(policy(), world)?;
    let got = run.enter(3);
    run.world.verdict()?;
    if got == Ok(Exit::Returned(3 * 31 + 5)) { Ok(Code::E) } else { Err(format!("{got:x?}")) }
}

fn while_moving() -> Verdict {
    let mut grown = false;
    let world = World::new(move |_| if std::mem::replace(&mut grown, true) { Op::Return } else { Op::Grow(30_000) });
    let mut run = Run::new(policy(), world)?;
    let asked = Rc::new(RefCell::new(Vec::new()));
    let note = asked.clone();
    at_every_step(move |_, _| {
        let activation = thread::current_activation();
        // SAFETY: the activation runs a stack on this thread.
        let got = activation.map(|activation| all_refused(unsafe { activation.as_ref() }));
        note.borrow_mut().push(got);
        Ok(())
    });
    let got = run.enter(4);
    stop();
    run.world.verdict()?;
    let asked = asked.borrow();
    match got {
        Ok(Exit::Returned(4)) if !asked.is_empty() && asked.iter().all(|got| *got == Some(Ok(()))) => Ok(Code::E),
        got => Err(format!("{got:x?}, {asked:?}")),
    }
}
