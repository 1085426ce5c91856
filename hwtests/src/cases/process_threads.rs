//! A45: stacks that outlive the thread that made them, on another thread of the key domain, and of another.

use super::metadata_misuse::{continuation_finishes, suspended_continuation};
use super::metadata_pooled::{Suspended, attach};
use super::parked;
use super::process_forks::{DA, IA, Keys};
use crate::attack::{DEPTH, Scene, policy};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Error;
use cfi_stack::continuation::{self, Frames};
use cfi_stack::pool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;

/// A45.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("the same thread", &run(|| pooled(Keys::Same, false)));
    tally.attack("verbs, the domain's", &run(|| pooled(Keys::Same, true)), &[Code::C]);
    tally.attack("a continuation that may migrate, the domain's", &run(|| continued(Keys::Same, true)), &[Code::C]);
    tally.attack("a continuation that may not", &run(|| continued(Keys::Same, false)), &[Code::E]);
    tally.attack("what a thread leaves suspended is cancelled by another", &run(left), &[Code::C]);
    tally.attack("what a thread gives back as it ends is leased again", &run(given_back), &[Code::C]);
    if class.pac() {
        tally.attack("verbs, another domain's", &run(|| pooled(Keys::New, true)), &[Code::B]);
        tally.attack(
            "a continuation that may migrate, another domain's",
            &run(|| continued(Keys::New, true)),
            &[Code::E],
        );
        tally.attack("a growable stack, another domain's", &run(entered), &[Code::E]);
        tally.attack(
            "a continuation that may migrate, of a domain that shares a key",
            &run(|| continued(Keys::Anew(IA | DA), true)),
            &[Code::E],
        );
    } else {
        tally.say("one key domain here");
    }
    parked::rows(class, &mut tally);
    tally.report()
}

/// Runs `what` on another thread, with these keys. That thread does not end: it could not return through what its old keys signed.
fn elsewhere<T: Send + 'static>(keys: Keys, what: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        keys.apply();
        let result = what();
        let _ = sender.send(result);
        loop {
            std::thread::park();
        }
    });
    receiver.recv().map_err(|error| error.to_string())
}

/// A thread suspends a stack and ends; another goes on with it.
fn pooled(keys: Keys, other: bool) -> Verdict {
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let make = || -> Result<Suspended, String> {
        let thread = attach()?;
        Suspended::new(&thread, 5)
    };
    if !other {
        make()?.finish()?;
        return Ok(Code::C);
    }
    let stack = Moved(std::thread::spawn(move || make().map(Moved)).join().map_err(|_| "it panicked")??.0);
    elsewhere(keys, move || {
        let stack = stack;
        let thread = attach()?;
        stack.0.finish()?;
        Suspended::new(&thread, 1)?.finish()
    })??;
    Ok(Code::C)
}

/// A stack on which nothing depends on the thread.
struct Moved(Suspended);

// SAFETY: what is suspended on it adds numbers.
unsafe impl Send for Moved {}

fn continued(keys: Keys, may_migrate: bool) -> Verdict {
    let (sender, receiver) = mpsc::channel();
    let (go_on, wait) = mpsc::channel::<()>();
    let owner = std::thread::spawn(move || -> Result<(), String> {
        let thread = attach()?;
        let cont = suspended_continuation(&thread, may_migrate)?;
        let _ = sender.send(cont);
        let _ = wait.recv();
        // What was refused elsewhere goes on here.
        if may_migrate && keys == Keys::Same {
            return Ok(());
        }
        continuation_finishes(cont).map_err(|error| error.to_string())
    });
    let cont = receiver.recv().map_err(|error| error.to_string())?;
    let result = elsewhere(keys, move || continuation_finishes(cont))?;
    let _ = go_on.send(());
    owner.join().map_err(|_| "it panicked")??;
    match result {
        Ok(()) => Ok(Code::C),
        Err(Error::Thread(_)) => Ok(Code::E),
        Err(error) => Err(error.to_string()),
    }
}

/// A thread ends with a continuation suspended that may not migrate: nobody resumes it, anybody cancels it without destructors.
fn left() -> Verdict {
    let leave = || -> Result<_, String> {
        let thread = attach()?;
        suspended_continuation(&thread, false)
    };
    let _thread = attach()?;
    for _ in 0..20 {
        let cont = std::thread::spawn(leave).join().map_err(|_| "it panicked")??;
        match continuation_finishes(cont) {
            Err(Error::Thread(_)) => {}
            other => return Err(format!("resumed: {other:?}")),
        }
        // SAFETY: nothing points into its frames.
        unsafe { continuation::cancel(cont, Frames::Skip) }.map_err(|error| error.to_string())?;
        match continuation_finishes(cont) {
            Err(Error::Consumed) => {}
            other => return Err(format!("cancelled, then resumed: {other:?}")),
        }
    }
    Ok(Code::C)
}

/// Threads lease and end; no more stacks are made than the first needed.
fn given_back() -> Verdict {
    let _thread = attach()?;
    let once = || -> Result<(), String> {
        let thread = attach()?;
        let stacks = (0..4).map(|depth| Suspended::new(&thread, depth)).collect::<Result<Vec<_>, _>>()?;
        stacks.into_iter().try_for_each(Suspended::finish)
    };
    let mut made = None;
    for _ in 0..50 {
        std::thread::spawn(once).join().map_err(|_| "it panicked")??;
        let now = pool::stats().classes.iter().map(|class| class.idle + class.leased).sum::<usize>();
        if *made.get_or_insert(now) != now {
            return Err(format!("{now} stacks instead of {made:?}"));
        }
    }
    Ok(Code::C)
}

/// A growable stack is bound to its thread by its type; this asks for another domain's by making the keys of its own thread anew.
fn entered() -> Verdict {
    elsewhere(Keys::Same, || {
        let mut scene = Scene::new(policy())?;
        scene.recurse_right(managed::recurse_a(), DEPTH)?;
        Keys::New.apply();
        match scene.recurse(managed::recurse_a(), DEPTH) {
            Err(Error::Thread(_)) => Ok(Code::E),
            other => Err(format!("{other:?}")),
        }
    })?
}
