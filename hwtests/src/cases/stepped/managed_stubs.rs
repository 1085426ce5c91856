//! A42, the stubs that managed code runs through: enter, exit, grow, leave, rebind.

use super::{Sums, to_main};
use crate::attack::{ONE_GROWTH, Scene, policy, zero_address};
use crate::backtrace::{by_records, by_tables};
use crate::child::{Verdict, caught, handle, page};
use crate::managed::{self, Function};
use crate::memory::peek_if_mapped;
use crate::outcome::Code;
use crate::stepper::{self, Boundary, function_at};
use crate::tally::Tally;
use cfi_stack::engine::leave_from_signal;
use cfi_stack::{Error, Exit, Policy, thread};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

unsafe extern "C" {
    fn cfi_stack_enter();
    fn cfi_stack_exit();
    fn cfi_stack_grow();
    fn cfi_stack_leave();
    fn cfi_stack_leave_from_signal();
    fn cfi_stack_rebind();
}

/// The stubs, in the order of [`stubs`].
const ENTER: usize = 0;
const EXIT: usize = 1;
const GROW: usize = 2;
const LEAVE: usize = 3;
const REBIND: usize = 4;
const FROM_SIGNAL: usize = 5;
const STUBS: usize = 6;

fn stubs() -> Vec<stepper::Code> {
    [
        ("enter", cfi_stack_enter as *const () as usize),
        ("exit", cfi_stack_exit as *const () as usize),
        ("grow", cfi_stack_grow as *const () as usize),
        ("leave", cfi_stack_leave as *const () as usize),
        ("rebind", cfi_stack_rebind as *const () as usize),
        ("leave_from_signal", cfi_stack_leave_from_signal as *const () as usize),
    ]
    .map(|(name, start)| stepper::Code::new(name, start))
    .into()
}

const ARM: bool = cfg!(target_arch = "aarch64");
/// Calls deep, where nothing else is wanted.
const DEPTH: usize = 3;
/// Instructions of a prologue and an epilogue at which the stub's own frame record does not stand yet, or no more.
const WITHOUT_RECORD: usize = 10;
/// Instructions of `grow` from the return of what moved the stack to the one that takes the new frame pointer, at most.
const HIDDEN: usize = 16;
/// An address that nothing is ever mapped at.
const NOWHERE: usize = 16;

/// What the handlers have seen in the run so far.
#[derive(Default)]
struct Watch {
    places: Vec<Range<usize>>,
    function: Range<usize>,
    /// Its recursion's depth.
    depth: usize,
    /// A segment that was moved from is inaccessible at once.
    is_poisoned: bool,
    /// Instructions of the present `grow` at which the frame pointer still leads into such a segment.
    hidden: usize,
    /// `enter`'s callers, up to and with main.
    native: Vec<usize>,
    /// By stub, the callers of its present run at its first instruction.
    callers: [Vec<usize>; STUBS],
    /// Whether a `leave`, or a `grow` that failed, has gone back to `enter`'s frame.
    is_back: bool,
    /// By stub, boundaries of its present run without a record of its own.
    without_record: [usize; STUBS],
    wrong: Option<String>,
}

thread_local! {
    static WATCH: RefCell<Watch> = RefCell::default();
}

fn look(boundary: &Boundary) {
    if WATCH.with_borrow_mut(|watch| watch.is_hidden(boundary)) {
        return;
    }
    let frames = by_tables();
    WATCH.with_borrow_mut(|watch| {
        if watch.wrong.is_none()
            && let Err(problem) = watch.look(boundary, &frames)
        {
            watch.wrong = Some(format!("{}: {problem}", stubs()[boundary.index].at(boundary.pc)));
        }
    });
}

impl Watch {
    /// The loss that the policy's documentation names: between the move and the instruction that takes the new frame pointer, the
    /// frames cannot be read at all.
    fn is_hidden(&mut self, at: &Boundary) -> bool {
        let is_hidden = self.is_poisoned && at.index == GROW && peek_if_mapped(at.fp).is_none();
        if is_hidden {
            self.hidden += 1;
            page().notes[0].fetch_add(1, Relaxed);
            if self.hidden > HIDDEN {
                self.wrong = Some(format!("{} instructions of grow without frames", self.hidden));
            }
        }
        is_hidden
    }

    fn look(&mut self, at: &Boundary, frames: &[crate::backtrace::Frame]) -> Result<(), String> {
        let own = frames
            .iter()
            .position(|frame| frame.pc == at.pc)
            .ok_or_else(|| format!("the tables do not lead from the handler to the stub: {frames:x?}"))?;
        let callers = to_main(&frames[own + 1..]);
        if at.pc == self.places[at.index].start {
            (self.is_back, self.hidden) = (false, 0);
            self.without_record[at.index] = 0;
            self.begins(at.index, &callers)?;
            self.callers[at.index] = callers.clone();
        }
        if matches!(at.index, LEAVE | FROM_SIGNAL | GROW) && !self.is_back {
            self.is_back = callers == self.native;
        }
        let expected = if self.is_back { &self.native } else { &self.callers[at.index] };
        if callers != *expected {
            return Err(format!("by tables {callers:x?} instead of {expected:x?}"));
        }
        let cfa = frames.get(own + 1).map_or(0, |frame| frame.sp);
        self.by_records(at, cfa, &callers)
    }

    /// Whether the callers at a stub's first instruction are the right ones.
    fn begins(&mut self, index: usize, callers: &[usize]) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{what} among {callers:x?}, native {:x?}", self.native));
        match index {
            ENTER => {
                let starts: Vec<usize> = callers.iter().map(|pc| function_at(pc - 1)).collect();
                let position = |start: usize| starts.iter().position(|&found| found == start);
                let inner = position(inner as *const () as usize);
                let outer = position(outer as *const () as usize);
                let main = position(crate::main as *const () as usize);
                if inner.is_none() || inner >= outer || outer >= main {
                    return wrong("no markers in order, then main");
                }
                self.native = callers.to_vec();
                Ok(())
            }
            FROM_SIGNAL => {
                if callers.is_empty() {
                    Ok(())
                } else {
                    wrong("frames below where no return address is")
                }
            }
            EXIT | GROW | LEAVE => match self.managed(callers) {
                0 => wrong("no managed frames"),
                frames if index != GROW && frames != self.depth + 1 => wrong("another number of managed frames"),
                _ => Ok(()),
            },
            _ => {
                let grow = callers.iter().position(|pc| self.places[GROW].contains(pc));
                match grow {
                    Some(grow) if callers[grow + 1..] == self.callers[GROW] => Ok(()),
                    _ => wrong("no grow with its callers"),
                }
            }
        }
    }

    /// How many managed frames come first, if the rest is `enter` and its callers; else 0.
    fn managed(&self, callers: &[usize]) -> usize {
        let managed = callers.iter().take_while(|&pc| self.function.contains(pc)).count();
        match callers[managed..].split_first() {
            Some((&entry, rest)) if entry == managed::entry_return().address() && self.native.starts_with(rest) => {
                managed
            }
            _ => 0,
        }
    }

    /// The walk by frame records finds the same, but for the caller where the stub has no record of its own. On x86-64 it ends at
    /// `enter`'s caller: Rust's own frames keep no records there.
    fn by_records(&mut self, at: &Boundary, cfa: usize, callers: &[usize]) -> Result<(), String> {
        let ends_at = if ARM { self.native.last() } else { self.native.first() };
        let last = *ends_at.ok_or("a stub ran before enter")?;
        // While native code runs the frame pointer is a link record's address, which leads to the stub's frame record.
        let is_linked = cfa != 0 && matches!(at.index, EXIT | GROW) && peek_if_mapped(at.fp) == Some(cfa as u64 - 16);
        let has_record = cfa != 0 && (is_linked || at.fp == cfa - 16 || ARM && at.fp == cfa - 176);
        if !has_record {
            self.without_record[at.index] += 1;
            let count = self.without_record[at.index];
            let has_none = at.index == REBIND || matches!(at.index, LEAVE | FROM_SIGNAL) && !self.is_back;
            if !has_none && count > WITHOUT_RECORD {
                return Err(format!("{count} instructions without a frame record"));
            }
            // The frame pointer is that of the caller, which may be Rust's.
            if !ARM && (matches!(at.index, ENTER | REBIND)) {
                return Ok(());
            }
        }
        // SAFETY: the chain is this thread's own, with a record for every frame up to the last one.
        let mut found = unsafe { by_records(at.fp, last) };
        // A link record names its stub once more, after the return address of what the stub called.
        found.dedup_by(|again, before| {
            again == before && [EXIT, GROW].iter().any(|&at| self.places[at].contains(again))
        });
        if is_linked && !found.is_empty() {
            let stub = found.remove(0);
            if !self.places[at.index].contains(&stub) {
                return Err(format!("the link record names {stub:#x}"));
            }
        }
        if at.index == FROM_SIGNAL && !self.is_back {
            // The frame pointer is still that of the function that has faulted.
            return if self.managed(&found) == self.depth { Ok(()) } else { Err(format!("by records {found:x?}")) };
        }
        let expected = &callers[usize::from(!has_record)..];
        let end = expected.iter().position(|&pc| pc == last).map_or(0, |at| at + 1);
        if found == expected[..end] {
            Ok(())
        } else {
            Err(format!("by records {found:x?} instead of {:x?}", &expected[..end]))
        }
    }
}

/// What managed code does while it is stepped.
#[derive(Clone, Copy)]
struct Scenario {
    what: &'static str,
    function: Function,
    policy: Policy,
    depth: usize,
    /// The last two arguments of the function.
    arguments: [usize; 2],
    right: fn(&Result<Exit, Error>, usize) -> bool,
    /// The stubs that it goes through.
    stubs: &'static [usize],
}

fn returned(result: &Result<Exit, Error>, depth: usize) -> bool {
    *result == Ok(Exit::Returned(managed::recursion_sum(depth as u64)))
}

fn left(result: &Result<Exit, Error>, _: usize) -> bool {
    *result == Ok(Exit::Left(CODE as u64))
}

fn refused(result: &Result<Exit, Error>, _: usize) -> bool {
    matches!(result, Err(Error::Overflow { .. }))
}

/// So deep has the stack been before.
const POLLUTED: usize = 20;

/// What `leave` is told.
const CODE: usize = 4711;

extern "C" fn leave(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let left = thread::current_activation().is_some_and(|activation| {
        // SAFETY: the context is this handler's, which runs on the alternate stack.
        unsafe { leave_from_signal(context, activation, CODE as u64) }.is_ok()
    });
    if !left {
        caught(signal, info, context);
    }
    stepper::returns_to(context);
}

fn scenarios() -> Vec<Scenario> {
    let growing: &[usize] = &[ENTER, EXIT, GROW, REBIND];
    let always = Policy { relocate_always: true, ..policy() };
    let calls = Scenario {
        what: "calls native code",
        function: managed::recurse_a(),
        policy: policy(),
        depth: DEPTH,
        arguments: [zero_address(), 0],
        right: returned,
        stubs: &[ENTER, EXIT],
    };
    let cannot = Policy { maximum: policy().initial, ..policy() };
    let mut all = vec![
        calls,
        Scenario { what: "grows once", depth: ONE_GROWTH, stubs: growing, ..calls },
        Scenario {
            what: "cannot grow",
            policy: cannot,
            depth: ONE_GROWTH,
            right: refused,
            stubs: &[ENTER, GROW],
            ..calls
        },
    ];
    all.extend(managed::recursions().into_iter().map(|(function, _)| Scenario {
        what: "moves at every call",
        function,
        policy: always,
        stubs: growing,
        ..calls
    }));
    let leaves = Scenario {
        what: "leaves",
        function: managed::leave(),
        arguments: [CODE, 0],
        right: left,
        stubs: &[ENTER, LEAVE],
        ..calls
    };
    let faults = Scenario {
        what: "faults and leaves",
        function: managed::fault(),
        arguments: [NOWHERE, 0],
        stubs: &[ENTER, FROM_SIGNAL],
        ..leaves
    };
    all.extend([leaves, faults]);
    all
}

/// Marks the native frames: calls [`inner`].
#[inline(never)]
fn outer(scene: &mut Scene, scenario: &Scenario) -> Result<Exit, Error> {
    std::hint::black_box(inner(scene, scenario))
}

#[inline(never)]
fn inner(scene: &mut Scene, scenario: &Scenario) -> Result<Exit, Error> {
    let [a2, a3] = scenario.arguments;
    std::hint::black_box(scene.enter(scenario.function, scenario.depth, a2, a3))
}

fn walked(scenario: &Scenario, places: Vec<Range<usize>>) -> Verdict {
    let mut scene = Scene::new(scenario.policy)?;
    handle(libc::SIGSEGV, leave, libc::SA_ONSTACK);
    // What lies on the stack is not zero any more.
    scene.recurse_right(managed::recurse_a(), POLLUTED)?;
    let function = scenario.function.start.address()..scenario.function.end.address();
    let (depth, is_poisoned) = (scenario.depth, scenario.policy.relocate_always);
    WATCH.set(Watch { places, function, depth, is_poisoned, ..Watch::default() });
    let result = stepper::through(look, || outer(&mut scene, scenario));
    if let Some(problem) = WATCH.take().wrong {
        return Err(problem);
    }
    if (scenario.right)(&result, scenario.depth) { Ok(Code::C) } else { Err(format!("{result:x?}")) }
}

/// Steps through all of them.
pub fn all(tally: &mut Tally<'_>) {
    let codes = stubs();
    let places: Vec<_> = codes.iter().map(|code| code.place.clone()).collect();
    let mut sums = Sums::default();
    let mut hidden = 0;
    for scenario in scenarios() {
        let what = format!("{}, {:?}", scenario.what, scenario.function.signing);
        let (end, stepped) = stepper::run(&codes, || walked(&scenario, places.clone()));
        tally.attack(&what, &end, &[Code::C]);
        hidden += end.notes[0];
        sums.add(tally, &what, stepped, scenario.stubs);
    }
    sums.say(tally);
    tally.say(format!("{hidden} steps of grow without frames, the segment moved from being inaccessible"));
}
