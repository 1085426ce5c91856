//! A42: the stubs are single-stepped, and a signal handler walks the stack at every instruction.

mod callers;
mod leaves;
mod linked;
mod managed_stubs;
mod measured;
mod suspended;
mod switches;

use crate::backtrace::Frame;
use crate::class::Class;
use crate::outcome::Report;
use crate::stepper::{self, Stepped, function_at};
use crate::tally::Tally;
use std::hint::black_box;
use std::sync::OnceLock;

/// A42.
pub fn all(class: &Class) -> Report {
    if let Some(reason) = stepper::unavailable(class) {
        return Report::skip(&[], reason);
    }
    let mut tally = Tally::new(class);
    managed_stubs::all(&mut tally);
    suspended::all(&mut tally);
    leaves::all(&mut tally);
    measured::all(&mut tally);
    linked::all(&mut tally);
    switches::all(&mut tally);
    tally.report()
}

/// How often each stub was stepped through, over all runs.
#[derive(Default)]
struct Sums {
    stubs: Vec<Stepped>,
}

impl Sums {
    /// Adds a run that must have gone through some of the stubs.
    fn add(&mut self, tally: &mut Tally<'_>, what: &str, stepped: Vec<Stepped>, required: &[usize]) {
        for &index in required.iter().filter(|&&index| stepped[index].steps + stepped[index].held == 0) {
            tally.fail(format!("{what}: no step in {}", stepped[index].name));
        }
        if self.stubs.is_empty() {
            self.stubs = stepped;
        } else {
            self.stubs.iter_mut().zip(&stepped).for_each(|(sum, stepped)| sum.add(stepped));
        }
    }

    fn say(&self, tally: &mut Tally<'_>) {
        for stub in &self.stubs {
            let held = match stub.held {
                0 => String::new(),
                held => format!(", {held} with signals held back"),
            };
            tally.say(format!("{}: {} instructions, {} steps{held}", stub.name, stub.instructions.len(), stub.steps));
        }
    }
}

/// The return addresses of frames up to and with that in main: beyond lies what the C library knows about.
fn to_main(frames: &[Frame]) -> Vec<usize> {
    /// Main calls the cases at one place.
    static IN_MAIN: OnceLock<usize> = OnceLock::new();
    let is_main = |pc: usize| function_at(pc - 1) == crate::main as *const () as usize;
    let mut callers: Vec<usize> = frames.iter().map(|frame| frame.pc).collect();
    let last = match IN_MAIN.get() {
        Some(&known) => callers.iter().position(|&pc| pc == known),
        None => callers.iter().position(|&pc| is_main(pc)),
    };
    if let Some(last) = last {
        IN_MAIN.get_or_init(|| callers[last]);
        callers.truncate(last + 1);
    }
    callers
}

/// Marks the frames of the thread's own stack: calls [`inner`].
#[inline(never)]
fn outer(run: &mut dyn FnMut()) {
    inner(run);
    black_box(1);
}

#[inline(never)]
fn inner(run: &mut dyn FnMut()) {
    run();
    black_box(2);
}

/// Whether the markers stand in order among these, then main.
fn marked(callers: &[usize]) -> bool {
    let markers = [inner as *const (), outer as *const (), crate::main as *const ()];
    let mut callers = callers.iter().copied();
    markers.into_iter().all(|marker| callers.any(|pc| function_at(pc - 1) == marker as usize))
}
