//! A42, the stub `link`: on the segment that it was called on, on the next one, and back.

use super::{Sums, to_main};
use crate::attack::policy;
use crate::backtrace::{by_records, by_tables};
use crate::child::Verdict;
use crate::cpu;
use crate::managed;
use crate::outcome::Code;
use crate::selftest::link::Linked;
use crate::stepper::{self, Boundary};
use crate::tally::Tally;
use cfi_stack::Policy;
use std::cell::RefCell;

unsafe extern "C" {
    fn cfi_stack_link();
}

/// Boundaries of a run of the stub at which its own frame record does not stand, before and behind, at most.
const WITHOUT_RECORD: usize = 10;

#[derive(Default)]
struct Watch {
    /// The callers at the stub's first instruction.
    callers: Vec<usize>,
    without_record: usize,
    wrong: Option<String>,
}

thread_local! {
    static WATCH: RefCell<Watch> = RefCell::default();
}

fn code() -> stepper::Code {
    stepper::Code::new("link", cfi_stack_link as *const () as usize)
}

fn look(at: &Boundary) {
    let frames = by_tables();
    WATCH.with_borrow_mut(|watch| {
        if watch.wrong.is_none()
            && let Err(problem) = watch.look(at, &frames)
        {
            watch.wrong = Some(format!("{}: {problem}", code().at(at.pc)));
        }
    });
}

impl Watch {
    fn look(&mut self, at: &Boundary, frames: &[crate::backtrace::Frame]) -> Result<(), String> {
        let entry = managed::entry_return().address();
        let own = frames.iter().position(|frame| frame.pc == at.pc).ok_or("the tables do not lead to the stub")?;
        let callers = to_main(&frames[own + 1..]);
        if at.pc == code().place.start {
            if callers.iter().position(|&pc| pc == entry) != Some(2) {
                return Err(format!("no thunk, its caller and enter in {callers:x?}"));
            }
            (self.callers, self.without_record) = (callers, 0);
        } else if callers != self.callers {
            return Err(format!("by tables {callers:x?} instead of {:x?}", self.callers));
        }
        // SAFETY: the chain is this thread's own, and managed frames have records.
        let found = unsafe { by_records(at.fp, entry) };
        match found.len() {
            3 if found == self.callers[..3] => Ok(()),
            2 if found == self.callers[1..3] && self.without_record < WITHOUT_RECORD => {
                self.without_record += 1;
                Ok(())
            }
            _ => Err(format!("by records {found:x?} instead of {:x?}", &self.callers[..3])),
        }
    }
}

fn walked(short: bool, arguments: usize, results: usize) -> Verdict {
    let shadowed = if short { policy().initial } else { usize::MAX };
    let mut linked = Linked::to_callee(Policy { shadowed, ..policy() }, arguments, results)?;
    WATCH.set(Watch::default());
    // The first call maps the segment, the second finds it.
    for round in 1..3 {
        stepper::through(look, || linked.pass(0, arguments, results, round))?;
    }
    if short && cpu::shadow_pointer() != 0 && linked.scene.stack.stats().shadow_segments == 0 {
        return Err("no further shadow segment".into());
    }
    WATCH.take().wrong.map_or(Ok(Code::C), Err)
}

/// Steps through it with and without arguments and results on the stack, and with and without a shadow segment at the next one.
pub fn all(tally: &mut Tally<'_>) {
    let mut sums = Sums::default();
    let short: &[bool] = if tally.class().shadow() { &[false, true] } else { &[false] };
    let sizes = [(0, 0), (24, 0), (0, 16), (40, 24)];
    for (&short, (arguments, results)) in short.iter().flat_map(|short| sizes.map(|sizes| (short, sizes))) {
        let shadow = if short { ", a further shadow segment" } else { "" };
        let what = format!("link, {arguments} bytes of arguments, {results} of results{shadow}");
        let (end, stepped) = stepper::run(&[code()], || walked(short, arguments, results));
        tally.attack(&what, &end, &[Code::C]);
        sums.add(tally, &what, stepped, &[0]);
    }
    sums.say(tally);
}
