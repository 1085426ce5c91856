//! A23 and A24: frames that the embedder registered as what they are not, or not at all.
//!
//! A23: a frame that signs nothing, or is not known, ends a growth with a typed error before anything is copied: no raw address is ever signed.
//! A24: a frame registered with a key or a modifier that is not its own does not authenticate.

use crate::attack::{DEPTH, Scene, at_every_step, frames, policy, stop, zero_address};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::take_places;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::pac::Signing;
use cfi_stack::steps::Step;
use cfi_stack::{Error, Exit, Policy};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

/// What is told of a function.
#[derive(Clone, Copy)]
enum Lie {
    /// The truth.
    None,
    /// Nothing.
    Unregistered,
    /// That its frames may not move.
    Immovable,
    /// That it signs so.
    Signs(Signing),
}

/// All functions, with `lie` told of the one.
fn registered(function: Function, lie: Lie) -> Result<Registered, String> {
    managed::link();
    let mut map = Registration::new();
    for other in managed::functions() {
        match lie {
            Lie::Unregistered if other.start == function.start => {}
            Lie::Immovable if other.start == function.start => {
                let Function { frame_bytes, signing, .. } = other;
                let len = other.end.address() - other.start.address();
                let layout = FrameLayout::new(frame_bytes, signing).immovable("the case says so");
                map.function(other.start, len, layout).map_err(|error| error.to_string())?;
            }
            Lie::Signs(signing) if other.start == function.start => {
                managed::describe(&mut map, Function { signing, ..other });
            }
            _ => managed::describe(&mut map, other),
        }
    }
    for site in managed::sites() {
        let described = map.safepoint(site, &[-24]);
        // One of a function that is left out is nobody's.
        if !matches!(lie, Lie::Unregistered) {
            described.map_err(|error| error.to_string())?;
        }
    }
    map.publish().map_err(|error| error.to_string())
}

/// Whether the error is the one that the lie must meet.
type Right = fn(&Error) -> bool;

/// A23.
pub fn unmovable(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let plain = managed::plain();
    let recurse = managed::recurse_a();
    let unsigned: Right = |error| matches!(error, Error::Unsigned(_));
    let unknown: Right = |error| matches!(error, Error::UnknownCode(_));
    let immovable: Right = |error| matches!(error, Error::Immovable { .. });
    let layout: Right = |error| matches!(error, Error::Layout { .. });
    let small = Policy { smallest_frame: 512, ..policy() };
    tally.control("signed frames alone", &run(|| grows(recurse, recurse, Lie::None, policy())));
    for always in [false, true] {
        let policy = Policy { relocate_always: always, ..policy() };
        tally.attack(
            "an unregistered function",
            &run(|| refused(plain, plain, Lie::Unregistered, policy, unknown)),
            &[Code::E],
        );
        let end = run(|| refused(recurse, recurse, Lie::Unregistered, policy, unknown));
        tally.attack("nothing registered that runs", &end, &[Code::E]);
        tally.attack(
            "a frame that may not move",
            &run(|| refused(recurse, recurse, Lie::Immovable, policy, immovable)),
            &[Code::E],
        );
    }
    tally.attack(
        "a frame below `smallest_frame`",
        &run(|| refused(recurse, recurse, Lie::None, small, layout)),
        &[Code::E],
    );
    if class.pac() {
        for always in [false, true] {
            let policy = Policy { relocate_always: always, ..policy() };
            let end = run(|| refused(plain, plain, Lie::None, policy, unsigned));
            tally.attack("an unsigned frame among signed ones", &end, &[Code::E]);
            let end = run(|| refused(recurse, recurse, Lie::Signs(Signing::None), policy, unsigned));
            tally.attack("a signed frame registered as unsigned", &end, &[Code::E]);
        }
    } else {
        tally.say("nothing is signed here: unsigned frames move");
        tally.control("unsigned frames", &run(|| grows(plain, plain, Lie::None, policy())));
    }
    tally.report()
}

/// A recursion on a stack whose frames may move.
fn grows(entry: Function, function: Function, lie: Lie, policy: Policy) -> Verdict {
    let mut scene = Scene::with(registered(function, lie)?, policy)?;
    scene.recurse_right(entry, DEPTH).map(|()| Code::C)
}

/// The growth is refused before anything is planned with or copied, and the stack runs on.
fn refused(entry: Function, function: Function, lie: Lie, policy: Policy, right: Right) -> Verdict {
    let mut scene = Scene::with(registered(function, lie)?, policy)?;
    let went_on = Rc::new(Cell::new(None));
    let note = went_on.clone();
    at_every_step(move |step, info| {
        match step {
            Step::Begin => page().freeze_span(info.youngest, info.top),
            Step::Mapped => {}
            _ => note.set(Some(step)),
        }
        Ok(())
    });
    let result = scene.recurse(entry, DEPTH);
    stop();
    match &result {
        Err(error) if right(error) => {}
        other => return Err(format!("{other:x?}")),
    }
    if let Some(step) = went_on.get() {
        return Err(format!("the growth went on to {step:?}"));
    }
    if !page().span_is_intact() {
        return Err("the live span was written to".into());
    }
    // The refused growth has unwound the stack: its first segment is in use again, with frames that need no growth, or may move.
    let honest = if matches!(lie, Lie::None) && entry.start == function.start && policy.smallest_frame > 64 {
        None
    } else {
        managed::recursions().into_iter().map(|(honest, _)| honest).find(|honest| honest.start != function.start)
    };
    if let Some(honest) = honest {
        scene.recurse_right(honest, DEPTH)?;
    }
    if !policy.relocate_always {
        let shallow = scene.recurse(entry, 5);
        if shallow != Ok(Exit::Returned(managed::recursion_sum(5))) {
            return Err(format!("the stack is not usable afterwards: {shallow:x?}"));
        }
    }
    Ok(Code::E)
}

/// A24.
pub fn wrong_rule(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let plain = managed::plain();
    let recurse = managed::recurse_a();
    let code = if class.pac() { class.stub_failure() } else { Code::C };
    tally.control("the right key", &run(|| grows(recurse, recurse, Lie::None, policy())));
    for (function, key) in managed::recursions() {
        let other = if function.signing == Signing::A { Signing::B } else { Signing::A };
        let end = run(|| wrong(function, other, class.pac()));
        tally.attack(&format!("the other key, of one that signs with {key}"), &end, &[code]);
    }
    tally.attack("key A, of one that signs nothing", &run(|| wrong(plain, Signing::A, class.pac())), &[code]);
    tally.attack("key B, of one that signs nothing", &run(|| wrong(plain, Signing::B, class.pac())), &[code]);
    #[cfg(target_arch = "aarch64")]
    {
        let salted = managed::salted();
        tally.attack("another modifier", &run(|| wrong(salted, Signing::A, class.pac())), &[code]);
    }
    tally.report()
}

/// Grows with a frame whose signature is not what was registered. A frame whose signature fits by chance tells nothing: then the
/// stack is made anew at another place.
fn wrong(function: Function, signing: Signing, signs: bool) -> Verdict {
    /// Chances are that the first will do.
    const PLACES: usize = 16;
    page().breakpoint.store(cpu::breakpoint_of(signing), Relaxed);
    let mut scene = Scene::with(registered(function, Lie::Signs(signing))?, policy())?;
    for _ in 0..PLACES {
        let mut first = true;
        at_every_step(move |step, info| {
            if step == Step::Begin && std::mem::take(&mut first) {
                let oldest = frames(info)[frames(info).len() - 1];
                let fits = cpu::sign(cpu::strip(oldest.word), oldest.modifier(), signing) == oldest.word;
                if signs && fits {
                    return Err(Error::Injected);
                }
                page().freeze_span(info.youngest, info.top);
            }
            if step == Step::Rebound {
                page().thaw_span();
            }
            Ok(())
        });
        let result = scene.enter(function, DEPTH, zero_address(), 0);
        stop();
        match result {
            Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(DEPTH as u64) => return Ok(Code::C),
            Err(Error::Injected) => {}
            other => return Err(format!("{other:x?}")),
        }
        take_places(1);
        let stack = cfi_stack::Stack::new(&scene.thread, policy()).map_err(|error| error.to_string())?;
        scene.stack = stack;
    }
    Err("every signature fitted".into())
}
