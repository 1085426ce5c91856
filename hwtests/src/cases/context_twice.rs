//! A07: one context is resumed twice.
//!
//! The faces refuse it (E): a handle of a continuation is consumed by its first use, and a coroutine that runs is busy, for an alias that only
//! unsafe code can have. Forced past them, a stack that runs is resumed by another one, or by itself. Its context was used: on arm64 the
//! seal is gone and the generation counted on, so that the seal does not help who puts it back; on x86 its token is none any more. With
//! the generation it is A06b.

use super::context_faces::{Continued, Visitor, is_consumed};
use super::context_scene::{
    GENERATION, Memory, Scene, Side, Target, Visits, before_the_next_suspension, resume, sealed_or, to_the_end,
};
use crate::child::{Verdict, end, run};
use crate::class::{Class, Column};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Error;
use std::cell::{Cell, RefCell};
use std::ptr::null_mut;
use std::rc::Rc;

/// What the attacker puts back before the second use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Help {
    Nothing,
    StackAndSeal,
    GenerationToo,
}

/// A07.
pub fn used_twice(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("a running coroutine", &run(|| running_coroutine(false)), &[Code::E]);
    tally.attack("a continuation's consumed handle", &run(consumed), &[Code::E]);
    if class.column() == Column::Bare {
        tally.say("forced: not shown without PAC and without a shadow stack");
        return tally.report();
    }
    tally.control("once", &run(|| twice(None)));
    tally.attack("as it is", &run(|| twice(Some(Help::Nothing))), &[sealed_or(class, Code::S)]);
    let what = "stack and seal put back, the generation intact";
    tally.attack(what, &run(|| twice(Some(Help::StackAndSeal))), &[sealed_or(class, Code::S)]);
    let code = if class.column() == Column::Pac { Code::R } else { Code::S };
    let what = "stack, seal and generation put back";
    tally.attack(what, &run(|| twice(Some(Help::GenerationToo))), &[code]);
    let end = run(|| running_coroutine(true));
    tally.attack("a running coroutine, its words set back", &end, &[sealed_or(class, Code::S)]);
    tally.report()
}

/// A coroutine that resumes itself while it runs.
fn running_coroutine(set_back: bool) -> Verdict {
    let _scene = Scene::new()?;
    let itself: Rc<Cell<*mut Visitor>> = Rc::new(Cell::new(null_mut()));
    let words = Rc::new(RefCell::new(None));
    let refused = Rc::new(Cell::new(false));
    let (place, kept, note) = (itself.clone(), words.clone(), refused.clone());
    // The context used lies far below the frames that use it again.
    let mut visitor = Visitor::suspended(200, move || {
        let visitor = place.get();
        // SAFETY: it lives, and nobody looks at it while it runs but this alias, which safe code cannot have.
        unsafe {
            if let Some(words) = kept.take().filter(|_| set_back) {
                (*visitor).set_back(&words);
            }
            note.set((*visitor).is_refused(&Error::Busy).is_ok());
        }
    })?;
    words.replace(Some(visitor.words()));
    itself.set(&raw mut visitor);
    // SAFETY: as above.
    unsafe { (*itself.get()).finish() }?;
    if refused.get() { Ok(Code::E) } else { Err("it was not refused".into()) }
}

/// A continuation goes on by its present handle, however often the others are tried.
fn consumed() -> Verdict {
    let scene = Scene::new()?;
    let mut continued = Continued::fresh(scene.thread())?;
    let fresh = continued.0;
    continued.passes(&[], 1)?;
    let first = continued.0;
    is_consumed(fresh)?;
    continued.passes(&[10], 2)?;
    is_consumed(first)?;
    is_consumed(fresh)?;
    continued.returns(&[20], 1030)?;
    is_consumed(continued.0)?;
    Ok(Code::E)
}

/// `target` runs and resumes `other`, which resumes `target` by the context that it was resumed by: R when it runs for the second time.
fn twice(attack: Option<Help>) -> Verdict {
    let mut scene = Scene::new()?;
    // The context used lies far below the frames that resume `other`.
    let target = scene.suspended(Visits::at(200, 0))?;
    let other = scene.ready(Visits::at(0, 0))?;
    let (context, stack) = (target.context(Side::Own), target.stack());
    before_the_next_suspension(move || {
        before_the_next_suspension(move || {
            let Some(help) = attack else { return };
            put_back(target, context, &stack, help);
            assert_eq!(resume(target, 10).is(2, false), Ok(()));
            end(Code::R);
        });
        let right = resume(other, 0).is(1, false).and_then(|()| to_the_end(other));
        assert_eq!(right, Ok(Code::C));
    });
    to_the_end(target)
}

fn put_back(target: Target, mut context: [u64; 4], stack: &Memory, help: Help) {
    if help == Help::Nothing {
        return;
    }
    if help == Help::StackAndSeal {
        context[GENERATION] = target.context(Side::Own)[GENERATION];
    }
    stack.put_back();
    target.put_context(Side::Own, context);
}
