//! A42, the stubs that switch between pooled stacks: a walk leads from a coroutine through its resumers to main.
//!
//! At a stub's first instruction the callers are known: they are what the stubs before it left, in order. From them follow the
//! callers after the switch, and at every instruction the walk must find the one list or the other, changing once.

use super::{Sums, inner, outer, to_main};
use crate::backtrace::{Frame, by_records, by_tables};
use crate::child::Verdict;
use crate::memory::peek;
use crate::outcome::Code;
use crate::stepper::{self, Boundary, function_at};
use crate::tally::Tally;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, Yielder};
use cfi_stack::pool::{self, Lease};
use cfi_stack::probe::{Passed, Slot, Word, ask_full_seal, forced, read};
use cfi_stack::thread::Thread;
use std::cell::RefCell;
use std::collections::HashMap;
use std::hint::black_box;
use std::ptr::NonNull;

unsafe extern "C" {
    fn cfi_stack_prepare();
    fn cfi_stack_first();
    fn cfi_stack_resume();
    fn cfi_stack_suspend();
    fn cfi_stack_switch_to();
    fn cfi_stack_throw();
    fn cfi_stack_cancel();
    fn cfi_stack_resume_without_fp_control();
    fn cfi_stack_suspend_without_fp_control();
}

/// The stubs, in the order of [`stubs`].
const PREPARE: usize = 0;
const FIRST: usize = 1;
const RESUME: usize = 2;
const SUSPEND: usize = 3;
const SWITCH_TO: usize = 4;
const THROW: usize = 5;
const CANCEL: usize = 6;
const RESUME_PLAIN: usize = 7;
const SUSPEND_PLAIN: usize = 8;

fn stubs() -> Vec<stepper::Code> {
    [
        ("prepare", cfi_stack_prepare as *const () as usize),
        ("first", cfi_stack_first as *const () as usize),
        ("resume", cfi_stack_resume as *const () as usize),
        ("suspend", cfi_stack_suspend as *const () as usize),
        ("switch_to", cfi_stack_switch_to as *const () as usize),
        ("throw", cfi_stack_throw as *const () as usize),
        ("cancel", cfi_stack_cancel as *const () as usize),
        ("resume without fp control", cfi_stack_resume_without_fp_control as *const () as usize),
        ("suspend without fp control", cfi_stack_suspend_without_fp_control as *const () as usize),
    ]
    .map(|(name, start)| stepper::Code::new(name, start))
    .into()
}

const ARM: bool = cfg!(target_arch = "aarch64");
/// Below a slot's top: the record that links to the resumer.
const BASE_RECORD: usize = 16;

/// A place that a walk can begin at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Side {
    /// The return addresses.
    callers: Vec<usize>,
    /// The frame pointer.
    fp: usize,
    /// Whether it is the base record: then the chain of records has that one's pc before the callers; else it has not the first of them.
    at_base: bool,
}

impl Side {
    /// The chain of records from here. The base record repeats its pc, which the record before it has too.
    fn record_chain(&self, base_return: usize) -> Vec<usize> {
        let rest =
            if self.at_base && self.callers.first() != Some(&first()) { &self.callers[..] } else { &self.callers[1..] };
        let doubled = rest.iter().flat_map(|&pc| std::iter::repeat_n(pc, 1 + usize::from(pc == base_return)));
        self.at_base.then_some(base_return).into_iter().chain(doubled).collect()
    }

    /// This, resumed by `resumer`.
    fn on(&self, resumer: &Side) -> Side {
        Side { callers: [&self.callers[..], &resumer.callers].concat(), ..self.clone() }
    }
}

/// What the handlers have seen in the run so far.
#[derive(Default)]
struct Watch {
    codes: Vec<stepper::Code>,
    /// What `first` goes on at when its entry function returns.
    base_return: usize,
    /// By slot: the suspended stack itself, or the chain that ends with it.
    own: HashMap<usize, Side>,
    /// By slot: who resumed it.
    resumers: HashMap<usize, Side>,
    /// Of the present stub: from where, to where.
    before: Side,
    after: Side,
    /// Whether the walk by tables, and the frame pointer, have changed sides.
    changed: [bool; 2],
    wrong: Option<String>,
}

thread_local! {
    static WATCH: RefCell<Watch> = RefCell::default();
}

/// The label that a stack which never ran goes on at.
fn first() -> usize {
    cfi_stack_first as *const () as usize
}

fn look(boundary: &Boundary) {
    let frames = by_tables();
    WATCH.with_borrow_mut(|watch| {
        if watch.wrong.is_none()
            && let Err(problem) = watch.look(boundary, &frames)
        {
            watch.wrong = Some(format!("{}: {problem}", watch.codes[boundary.index].at(boundary.pc)));
        }
    });
}

impl Watch {
    fn look(&mut self, at: &Boundary, frames: &[Frame]) -> Result<(), String> {
        let own = frames
            .iter()
            .position(|frame| frame.pc == at.pc)
            .ok_or_else(|| format!("the tables do not lead from the handler to the stub: {frames:x?}"))?;
        let callers = to_main(&frames[own + 1..]);
        if at.pc == self.codes[at.index].place.start {
            self.begins(at, &callers)?;
        } else if at.index == FIRST && at.pc == self.base_return {
            self.ends(at.slot)?;
        }
        self.changes(0, callers == self.before.callers, callers == self.after.callers).map_err(|problem| {
            format!("by tables {problem}: {callers:x?}, before {:x?}, after {:x?}", self.before, self.after)
        })?;
        self.changes(1, at.fp == self.before.fp, at.fp == self.after.fp).map_err(|problem| {
            format!(
                "the frame pointer {problem}: {:#x}, before {:#x}, after {:#x}",
                at.fp, self.before.fp, self.after.fp
            )
        })?;
        self.records(at)
    }

    /// Everything is as before, or as after; and once it is as after it stays so.
    fn changes(&mut self, what: usize, is_before: bool, is_after: bool) -> Result<(), &'static str> {
        match (self.changed[what], is_before, is_after) {
            (false, true, _) | (true, _, true) => Ok(()),
            (false, false, true) => {
                self.changed[what] = true;
                Ok(())
            }
            (true, true, false) => Err("has gone back"),
            (_, false, false) => Err("is neither"),
        }
    }

    /// On arm64 all code keeps frame records.
    fn records(&self, at: &Boundary) -> Result<(), String> {
        if !ARM {
            return Ok(());
        }
        let side = if self.changed[1] { &self.after } else { &self.before };
        let expected = side.record_chain(self.base_return);
        // SAFETY: the chain is this thread's own; main has a record.
        let found = unsafe { by_records(at.fp, expected.last().copied().unwrap_or(0)) };
        if found == expected { Ok(()) } else { Err(format!("by records {found:x?} instead of {expected:x?}")) }
    }

    /// A stub begins: who has called it, and where it leads.
    fn begins(&mut self, at: &Boundary, callers: &[usize]) -> Result<(), String> {
        self.changed = [false; 2];
        let [a, b, _] = at.arguments;
        if matches!(at.index, RESUME | RESUME_PLAIN | THROW) {
            // SAFETY: the base record of a stack that was prepared.
            self.base_return = unsafe { peek(read(slot_at(a), Word::Top) as usize - BASE_RECORD + 8) } as usize;
        }
        if at.index == FIRST {
            return self.starts(at.slot);
        }
        let caller = Side { callers: callers.to_vec(), fp: at.fp, at_base: false };
        self.shape(callers).map_err(|problem| format!("{problem}: {callers:x?}"))?;
        self.before = caller.clone();
        self.after = match at.index {
            RESUME | RESUME_PLAIN | THROW => {
                if let Some(earlier) = self.resumers.insert(b, caller.clone()) {
                    self.chain_moves(&earlier, &caller);
                }
                self.suspended(a)?.on(&caller)
            }
            SUSPEND | SUSPEND_PLAIN => {
                let resumer = self.resumer(b)?;
                self.own.insert(a, below(&caller, &resumer)?);
                resumer
            }
            SWITCH_TO => {
                let resumer = self.resumer(a)?;
                self.own.insert(a, below(&caller, &resumer)?);
                self.resumers.insert(b, resumer.clone());
                self.suspended(b)?.on(&resumer)
            }
            CANCEL => {
                self.own.remove(&a);
                caller
            }
            _ => {
                let top = read(slot_at(a), Word::Top) as usize;
                self.own.insert(a, Side { callers: vec![first()], fp: top - BASE_RECORD, at_base: true });
                caller
            }
        };
        Ok(())
    }

    /// The stacks of a chain have their resumers among themselves. Below these is now another one than before.
    fn chain_moves(&mut self, before: &Side, now: &Side) {
        for resumer in self.resumers.values_mut() {
            if let Some(own @ [_, ..]) = resumer.callers.strip_suffix(&before.callers[..]) {
                resumer.callers = [own, &now.callers].concat();
            }
        }
    }

    /// A stack's oldest frame begins.
    fn starts(&mut self, slot: usize) -> Result<(), String> {
        let callers = self.resumer(slot)?.callers;
        let fp = read(slot_at(slot), Word::Top) as usize - BASE_RECORD;
        self.before = Side { callers, fp, at_base: true };
        self.after = self.before.clone();
        Ok(())
    }

    /// Its entry function has returned.
    fn ends(&mut self, slot: usize) -> Result<(), String> {
        self.changed = [false; 2];
        self.starts(slot)?;
        self.after = self.resumer(slot)?;
        Ok(())
    }

    fn resumer(&self, slot: usize) -> Result<Side, String> {
        self.resumers.get(&slot).cloned().ok_or_else(|| format!("{slot:#x} was not resumed"))
    }

    fn suspended(&self, slot: usize) -> Result<Side, String> {
        self.own.get(&slot).cloned().ok_or_else(|| format!("{slot:#x} is not suspended"))
    }

    /// The markers stand in order: those of the thread's own stack, and before them as many pairs as there are stacks above it.
    fn shape(&self, callers: &[usize]) -> Result<(), &'static str> {
        let mut frames = callers.iter().copied().peekable();
        let base_return = self.base_return;
        let stacks = callers.iter().filter(|&&pc| pc == base_return).count();
        for on_thread in std::iter::repeat_n(false, stacks).chain([true]) {
            let [inner, outer] = if on_thread {
                [inner as *const (), outer as *const ()]
            } else {
                [upper as *const (), lower as *const ()]
            }
            .map(|marker| marker as usize);
            for marker in [inner, outer] {
                if !frames.any(|pc| function_at(pc - 1) == marker) {
                    return Err("a marker is missing");
                }
            }
            if !on_thread && frames.by_ref().find(|&pc| pc == base_return).is_none() {
                return Err("a base is missing");
            }
        }
        let main = crate::main as *const () as usize;
        if frames.last().is_some_and(|pc| function_at(pc - 1) == main) { Ok(()) } else { Err("main is missing") }
    }
}

/// The caller's own frames, without those of its resumer.
fn below(caller: &Side, resumer: &Side) -> Result<Side, String> {
    match caller.callers.strip_suffix(&resumer.callers[..]) {
        Some(own) => Ok(Side { callers: own.to_vec(), ..caller.clone() }),
        None => Err(format!("{:x?} does not end with {:x?}", caller.callers, resumer.callers)),
    }
}

fn slot_at(address: usize) -> NonNull<Slot> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
}

/// Marks those of a pooled stack: calls [`upper`].
#[inline(never)]
fn lower(run: &mut dyn FnMut() -> usize) -> usize {
    black_box(upper(run)) + black_box(0)
}

#[inline(never)]
fn upper(run: &mut dyn FnMut() -> usize) -> usize {
    black_box(run())
}

/// What runs on a pooled stack.
struct Task<'a> {
    run: fn(&Task<'_>, usize, NonNull<Slot>) -> usize,
    other: Option<(NonNull<Slot>, &'a Task<'a>)>,
}

impl Task<'_> {
    fn prepare(&self, slot: NonNull<Slot>) {
        // SAFETY: the slot is leased, its stack empty, and the task outlives what runs on it.
        unsafe { forced::prepare(slot, entry, std::ptr::from_ref(self).expose_provenance()) }
    }
}

unsafe extern "C" fn entry(arg: usize, data: usize, slot: *mut Slot) -> usize {
    // SAFETY: `Task::prepare` has passed it.
    let task = unsafe { &*std::ptr::with_exposed_provenance::<Task>(data) };
    lower(&mut || (task.run)(task, arg, slot_at(slot.expose_provenance())))
}

fn resume(slot: NonNull<Slot>, arg: usize) -> Passed {
    // SAFETY: the scenarios resume what is ready or suspended.
    unsafe { forced::resume(slot, slot, arg) }
}

fn suspend(slot: NonNull<Slot>, arg: usize) -> usize {
    // SAFETY: runs on the slot's stack.
    unsafe { forced::suspend(slot, slot, arg) }
}

fn expect(got: Passed, value: usize, finished: bool) -> Result<(), String> {
    if got == (Passed { value, finished }) { Ok(()) } else { Err(format!("{got:?}, not {value} {finished}")) }
}

/// Suspends twice, adding up what it is passed.
fn adds(_: &Task<'_>, arg: usize, slot: NonNull<Slot>) -> usize {
    let mut sum = arg;
    for _ in 0..2 {
        sum += suspend(slot, sum);
    }
    sum
}

const ADDS: Task<'static> = Task { run: adds, other: None };

fn added(slot: NonNull<Slot>) -> Result<(), String> {
    ADDS.prepare(slot);
    expect(resume(slot, 1), 1, false)?;
    expect(resume(slot, 10), 11, false)?;
    expect(resume(slot, 100), 111, true)
}

fn suspends_and_finishes([x, _]: [NonNull<Slot>; 2]) -> Result<(), String> {
    added(x)?;
    added(x)
}

fn with_full_seal([x, _]: [NonNull<Slot>; 2]) -> Result<(), String> {
    // SAFETY: nothing is prepared on it.
    unsafe { ask_full_seal(x) };
    added(x)
}

/// As [`adds`], with other control registers than its resumer's.
fn rounds(_: &Task<'_>, arg: usize, slot: NonNull<Slot>) -> usize {
    round_towards_zero();
    let sum = arg + suspend(slot, arg);
    sum + suspend(slot, sum)
}

/// Changes the floating-point control registers of this stack.
fn round_towards_zero() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: nothing here computes in floating point; the stubs keep the registers apart.
    unsafe {
        let (mxcsr, x87) = (0x7f80_u32, 0x0f7f_u16);
        std::arch::asm!("ldmxcsr [{}]", "fldcw [{}]", in(reg) &mxcsr, in(reg) &x87, options(nostack, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("msr fpcr, {}", in(reg) 3_u64 << 22, options(nostack, nomem));
    }
}

fn with_other_control([x, _]: [NonNull<Slot>; 2]) -> Result<(), String> {
    Task { run: rounds, other: None }.prepare(x);
    expect(resume(x, 1), 1, false)?;
    expect(resume(x, 10), 11, false)?;
    expect(resume(x, 100), 111, true)
}

/// Resumes the other, suspends itself, resumes the other to its end.
fn resumes_other(task: &Task<'_>, arg: usize, slot: NonNull<Slot>) -> usize {
    let Some((other, others)) = task.other else { return 0 };
    others.prepare(other);
    let sum = resume(other, arg).value;
    let sum = sum + suspend(slot, sum);
    let sum = resume(other, sum).value;
    resume(other, sum).value
}

fn nested([x, y]: [NonNull<Slot>; 2]) -> Result<(), String> {
    Task { run: resumes_other, other: Some((y, &ADDS)) }.prepare(x);
    expect(resume(x, 1), 1, false)?;
    expect(resume(x, 10), 24, true)
}

/// Twice in place of itself, the other.
fn switches(task: &Task<'_>, arg: usize, slot: NonNull<Slot>) -> usize {
    let Some((other, _)) = task.other else { return 0 };
    // SAFETY: runs on the slot's stack; the other is ready, then suspended.
    unsafe {
        let sum = forced::switch_to(slot, other, arg);
        sum + forced::switch_to(slot, other, sum)
    }
}

fn symmetric([x, y]: [NonNull<Slot>; 2]) -> Result<(), String> {
    ADDS.prepare(y);
    Task { run: switches, other: Some((y, &ADDS)) }.prepare(x);
    expect(resume(x, 1), 1, false)?;
    expect(resume(x, 10), 11, false)?;
    expect(resume(y, 100), 111, true)?;
    expect(resume(x, 1000), 1010, true)
}

/// Runs the other, which suspends both.
fn relays(task: &Task<'_>, arg: usize, _: NonNull<Slot>) -> usize {
    task.other.map_or(0, |(other, _)| resume(other, arg).value + 1)
}

/// Suspends the chain from the other to itself.
fn detaches(task: &Task<'_>, arg: usize, slot: NonNull<Slot>) -> usize {
    let Some((first, _)) = task.other else { return 0 };
    // SAFETY: runs on the slot's stack, whose resumer is the other.
    unsafe {
        let sum = arg + forced::suspend(slot, first, arg);
        sum + forced::suspend(slot, first, sum)
    }
}

fn chain([x, y]: [NonNull<Slot>; 2]) -> Result<(), String> {
    let last = Task { run: detaches, other: Some((x, &ADDS)) };
    last.prepare(y);
    Task { run: relays, other: Some((y, &ADDS)) }.prepare(x);
    expect(resume(x, 1), 1, false)?;
    // SAFETY: suspended with these two.
    unsafe {
        expect(forced::throw(y, x, 5, doubled), 11, false)?;
        expect(forced::resume(y, x, 100), 112, true)
    }
}

unsafe extern "C-unwind" fn doubled(arg: usize) -> usize {
    arg * 2
}

fn thrown([x, _]: [NonNull<Slot>; 2]) -> Result<(), String> {
    ADDS.prepare(x);
    expect(resume(x, 1), 1, false)?;
    // SAFETY: it is suspended; `doubled` does not unwind.
    expect(unsafe { forced::throw(x, x, 5, doubled) }, 11, false)?;
    expect(resume(x, 100), 111, true)
}

fn cancelled([x, _]: [NonNull<Slot>; 2]) -> Result<(), String> {
    for resumes in 0..3 {
        ADDS.prepare(x);
        for _ in 0..resumes {
            resume(x, 1);
        }
        // SAFETY: it is ready or suspended, and nothing points into it.
        unsafe { forced::cancel(x) };
    }
    Ok(())
}

/// Through the coroutines' face: other stubs, and on x86-64 without shadow stacks none but code that is inlined.
fn faces(_: [NonNull<Slot>; 2]) -> Result<(), String> {
    let mut coroutine = Coroutine::new(|yielder: &Yielder<usize, usize>, first: usize| {
        lower(&mut || first + yielder.suspend(first) + yielder.suspend(first + 1))
    });
    let results = [1, 10, 100].map(|number| coroutine.resume(number));
    if results == [CoroutineResult::Yield(1), CoroutineResult::Yield(2), CoroutineResult::Return(111)] {
        Ok(())
    } else {
        Err(format!("{results:?}"))
    }
}

type Scenario = fn([NonNull<Slot>; 2]) -> Result<(), String>;

fn stepped(scenario: Scenario, codes: &[stepper::Code]) -> Verdict {
    const SIZE: usize = 16 << 10;
    let _thread = Thread::attach().map_err(|error| error.to_string())?;
    let lease = || pool::lease(SIZE).map_err(|error| error.to_string());
    let leases: [Lease; 2] = [lease()?, lease()?];
    WATCH.set(Watch { codes: codes.to_vec(), ..Watch::default() });
    let mut result = Ok(());
    let mut run = || result = scenario([leases[0].slot(), leases[1].slot()]);
    stepper::through(look, || outer(&mut run));
    match WATCH.take().wrong {
        Some(problem) => Err(problem),
        None => result.map(|()| Code::C),
    }
}

/// Steps through all of them.
pub fn all(tally: &mut Tally<'_>) {
    let scenarios: [(&str, Scenario, &[usize]); 9] = [
        ("suspends and finishes", suspends_and_finishes, &[PREPARE, FIRST, RESUME, SUSPEND]),
        ("with the full seal", with_full_seal, &[PREPARE, FIRST, RESUME, SUSPEND]),
        ("with other control registers", with_other_control, &[PREPARE, FIRST, RESUME, SUSPEND]),
        ("a stack on a stack", nested, &[PREPARE, FIRST, RESUME, SUSPEND]),
        ("symmetric", symmetric, &[FIRST, SWITCH_TO]),
        ("two detached, thrown into, resumed", chain, &[SUSPEND, THROW, RESUME]),
        ("thrown into", thrown, &[THROW]),
        ("cancelled", cancelled, &[CANCEL]),
        ("coroutines", faces, if has_face_stubs(tally) { &[FIRST, RESUME_PLAIN, SUSPEND_PLAIN] } else { &[] }),
    ];
    let codes = stubs();
    let mut sums = Sums::default();
    for (what, scenario, required) in scenarios {
        let (end, steps) = stepper::run(&codes, || stepped(scenario, &codes));
        tally.attack(what, &end, &[Code::C]);
        sums.add(tally, what, steps, required);
    }
    sums.say(tally);
}

/// On x86-64 without shadow stacks the coroutines' switch is inlined.
fn has_face_stubs(tally: &Tally<'_>) -> bool {
    ARM || tally.class().shadow()
}
