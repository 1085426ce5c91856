//! A27: a destination that is no place to move to.

use crate::attack::{DEPTH, Scene, at_every_step, policy, stop, zero_address};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::managed;
use crate::memory::peek;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::steps::{Step, StepInfo};
use cfi_stack::{Error, Stack};
use std::cell::Cell;
use std::rc::Rc;

/// A segment record as raw words: base, top, identity, generation, seal.
#[repr(C, align(64))]
struct Words([u64; 5]);

/// A record like the source's, with other words.
fn like(info: &StepInfo<'_>, change: impl FnOnce(&mut [u64; 5])) -> usize {
    // SAFETY: the step hook says that five words lie there.
    let mut words = std::array::from_fn(|index| unsafe { peek(info.source_record + index * 8) });
    change(&mut words);
    std::ptr::from_mut(Box::leak(Box::new(Words(words)))).expose_provenance()
}

/// Address of the record to move to instead, given what the hook is shown and the other stack's record.
type Choice = fn(&StepInfo<'_>, usize) -> usize;

/// Whether the error is the one that the choice must meet.
type Right = fn(&Error) -> bool;

/// A27.
pub fn aliased(class: &Class) -> Report {
    let choices: [(&str, Choice, Right); 7] = [
        ("the source itself", |info, _| info.source_record, |error| *error == Error::Overlap),
        ("its upper half", |info, _| like(info, |words| words[0] += 2048), |error| *error == Error::Overlap),
        (
            "one word of it",
            |info, _| like(info, |words| (words[0], words[1]) = (words[1] - 8, words[1] + (1 << 20))),
            |error| *error == Error::Overlap,
        ),
        (
            "around it",
            |info, _| like(info, |words| (words[0], words[1]) = (words[0] - 4096, words[1] + 4096)),
            |error| *error == Error::Overlap,
        ),
        ("another stack's", |_, other| other, |error| *error == Error::Foreign),
        (
            "an older generation's",
            |info, _| {
                like(info, |words| {
                    (words[0], words[1], words[3]) = (words[0] - (1 << 20), words[1] - (1 << 20), words[3] - 1)
                })
            },
            |error| *error == Error::Foreign,
        ),
        (
            "too small a one",
            |info, _| like(info, |words| (words[0], words[1]) = (words[0] - (1 << 20), words[0] - (1 << 20) + 64)),
            |error| matches!(error, Error::TooSmall { .. }),
        ),
    ];
    let mut tally = Tally::new(class);
    tally.control("", &run(|| move_to(None)));
    for (what, choice, right) in choices {
        tally.attack(what, &run(|| move_to(Some((choice, right)))), &[Code::E]);
    }
    tally.report()
}

fn move_to(attack: Option<(Choice, Right)>) -> Verdict {
    let mut scene = Scene::new(policy())?;
    let mut other = Stack::new(&scene.thread, policy()).map_err(|error| error.to_string())?;
    let others_record = Rc::new(Cell::new(0));
    let note = others_record.clone();
    at_every_step(move |step, info| {
        if step == Step::Committed {
            note.set(info.source_record);
        }
        Ok(())
    });
    let activation = Activation::new();
    let act = (&raw const activation).expose_provenance();
    // SAFETY: the hand-made functions follow the engine's rules.
    let result =
        unsafe { other.enter(&scene.thread, &activation, managed::recurse_a().start, [act, DEPTH, zero_address(), 0]) };
    result.map_err(|error| error.to_string())?;
    stop();
    let Some((choice, right)) = attack else {
        return scene.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::C);
    };
    at_every_step(move |step, info| {
        if step == Step::Mapped {
            page().freeze_span(info.youngest, info.top);
            info.redirect = Some(choice(info, others_record.get()));
        }
        Ok(())
    });
    let result = scene.recurse(managed::recurse_a(), DEPTH);
    stop();
    match &result {
        Err(error) if right(error) => {}
        result => return Err(format!("{result:x?}")),
    }
    if !page().span_is_intact() {
        return Err("the live span was written to".into());
    }
    scene.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::E)
}
