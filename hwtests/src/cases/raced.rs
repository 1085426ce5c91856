//! A11: a word of a suspended context is flipped between its verification and its use.
//!
//! Stepped, at every instruction boundary of resume and of suspend, for each word; and raced, by a second thread, where there is a
//! second CPU. What a flip meets is the check, or nothing: then everything goes on with the right result.

use crate::child::{End, Verdict, page, run};
use crate::class::{Class, Feature};
use crate::cpu;
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::stepper::{self, Boundary};
use crate::tally::Tally;
use cfi_stack::pool;
use cfi_stack::probe::{Passed, Slot, Word, address, forced, frame, read};
use cfi_stack::thread::Thread;
use std::cell::Cell;
use std::hint::spin_loop;
use std::ptr::NonNull;
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

unsafe extern "C" {
    fn cfi_stack_resume();
    fn cfi_stack_suspend();
}

/// A stub, and the context that it loads.
#[derive(Clone, Copy)]
struct Stub {
    name: &'static str,
    start: usize,
    sp: Word,
    seal: Word,
    token: Word,
    generation: Word,
}

fn stubs() -> [Stub; 2] {
    [
        Stub {
            name: "resume",
            start: cfi_stack_resume as *const () as usize,
            sp: Word::OwnSp,
            seal: Word::OwnSeal,
            token: Word::OwnToken,
            generation: Word::OwnGeneration,
        },
        Stub {
            name: "suspend",
            start: cfi_stack_suspend as *const () as usize,
            sp: Word::ResumerSp,
            seal: Word::ResumerSeal,
            token: Word::ResumerToken,
            generation: Word::ResumerGeneration,
        },
    ]
}

/// What is flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Sp,
    Pc,
    Fp,
    Seal,
    Token,
    Generation,
}

/// The words that the column's row is about. The frame pointer of a saved frame is believed on x86-64 (A03).
fn targets(class: &Class) -> Vec<Target> {
    let mut all = vec![Target::Sp, Target::Pc, Target::Seal, Target::Token, Target::Generation];
    all.extend(class.pac().then_some(Target::Fp));
    all
}

impl Target {
    /// The bit that is flipped: an aligned place stays aligned.
    fn bit(self) -> u64 {
        match self {
            Target::Sp | Target::Fp | Target::Pc => 1 << 4,
            Target::Token => 1 << 3,
            Target::Generation => 1,
            Target::Seal => 1 << 40,
        }
    }

    /// Where the word lies; `sp` is what the context says.
    fn place(self, slot: NonNull<Slot>, stub: Stub, sp: usize) -> usize {
        match self {
            Target::Sp => address(slot, stub.sp),
            Target::Seal => address(slot, stub.seal),
            Target::Token => address(slot, stub.token),
            Target::Generation => address(slot, stub.generation),
            Target::Pc => sp + frame::PC,
            Target::Fp => sp + frame::RECORD,
        }
    }

    /// The codes that the row allows here. No seal covers a token: what is in its place is the business of the shadow stack, and of the
    /// directory that says whose it is.
    fn allowed(self, class: &Class) -> &'static [Code] {
        match (class.pac(), self) {
            (true, Target::Token) if class.shadow() => &[Code::C, Code::S, Code::K],
            (true, _) => &[Code::C, Code::B],
            (false, _) => &[Code::C, Code::S, Code::K],
        }
    }
}

/// What the visitor is to do.
#[derive(Clone, Copy)]
struct Order {
    slot: NonNull<Slot>,
    stub: Stub,
    target: Option<Target>,
    /// At this boundary, counted from the stub's first instruction.
    at: u64,
}

thread_local! {
    static ORDER: Cell<Option<Order>> = const { Cell::new(None) };
}

fn attack(boundary: &Boundary) {
    let Some(Order { slot, stub, target, at }) = ORDER.get() else { return };
    if let Some(target) = target.filter(|_| boundary.number == at) {
        let place = target.place(slot, stub, read(slot, stub.sp) as usize);
        // SAFETY: a word of the slot, or of a saved frame below its stack pointer: that is the attack.
        unsafe { poke(place, peek(place) ^ target.bit()) };
        page().notes[1].store(boundary.pc as u64, Relaxed);
        stepper::enough();
    }
    page().notes[0].store(boundary.number + 1, Relaxed);
}

fn slot_at(address: usize) -> NonNull<Slot> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
}

/// Adds up what it is passed, for ever. It calls nothing but the stub: what lies below its stack pointer is the saved frame alone.
unsafe extern "C" fn adds(first: usize, _: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    let mut sum = first;
    loop {
        // SAFETY: runs on the slot's stack.
        sum += unsafe { forced::suspend(slot, slot, sum) };
    }
}

fn expect(got: Passed, value: usize) -> Result<(), String> {
    if got == (Passed { value, finished: false }) { Ok(()) } else { Err(format!("{got:?} instead of {value}")) }
}

/// Resumed, resumed under attack, resumed again: what was flipped and not looked at yet shows then.
fn stepped(stub: Stub, target: Option<Target>, at: u64) -> Verdict {
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let _thread = Thread::attach().map_err(|error| error.to_string())?;
    let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
    let slot = lease.slot();
    // SAFETY: the lease is ours, its stack empty, then suspended; `adds` owes no destructor.
    unsafe {
        forced::prepare(slot, adds, 0);
        expect(forced::resume(slot, slot, 1), 1)?;
        ORDER.set(Some(Order { slot, stub, target, at }));
        stepper::begin(attack, at);
        let result = forced::resume(slot, slot, 10);
        stepper::enough();
        expect(result, 11)?;
        expect(forced::resume(slot, slot, 100), 111)?;
        expect(forced::resume(slot, slot, 1000), 1111)?;
        forced::cancel(slot);
    }
    Ok(Code::C)
}

const SIZE: usize = 16 << 10;

/// Attempts on one word that ended alike.
struct Alike {
    code: Code,
    attempts: u64,
    end: End,
}

/// Adds an attempt up; what is wrong with it otherwise.
fn add(ends: &mut Vec<Alike>, end: End, class: &Class, allowed: &[Code]) -> Result<(), String> {
    match end.code(class) {
        Ok(code) if allowed.contains(&code) => {
            match ends.iter_mut().find(|alike| alike.code == code) {
                Some(alike) => alike.attempts += 1,
                None => ends.push(Alike { code, attempts: 1, end }),
            }
            Ok(())
        }
        Ok(code) => Err(format!("{code} instead of {allowed:?} ({end})")),
        Err(text) => Err(text),
    }
}

fn at_every_boundary(tally: &mut Tally<'_>, class: &Class) {
    for stub in stubs() {
        let code = [stepper::Code::new(stub.name, stub.start)];
        let (end, _) = stepper::run(&code, || stepped(stub, None, 0));
        tally.control(stub.name, &end);
        let boundaries = end.notes[0];
        if boundaries == 0 {
            tally.fail(format!("no step in {}", stub.name));
        }
        tally.say(format!("{}: {boundaries} boundaries", stub.name));
        for target in targets(class) {
            let mut ends = Vec::new();
            for at in 0..boundaries {
                crate::progress::tick(&format!("{} {target:?} at {at} of {boundaries}", stub.name));
                let (end, _) = stepper::run(&code, || stepped(stub, Some(target), at));
                if end.notes[1] == 0 {
                    tally.fail(format!("{target:?} at {at} of {boundaries}: the attack was never made ({end})"));
                }
                let place = code[0].at(end.notes[1] as usize);
                if let Err(problem) = add(&mut ends, end, class, target.allowed(class)) {
                    tally.fail(format!("{target:?} flipped at {place}: {problem}"));
                }
            }
            for Alike { code, attempts, end } in ends {
                tally.alike(&format!("{target:?} in {}", stub.name), code, attempts, &end);
            }
        }
    }
}

/// So many flips, over all words.
const FLIPS: u64 = 10_000;
/// No more switches than this in one child, whoever wins.
const ROUNDS: usize = 200_000;

static STOP: AtomicBool = AtomicBool::new(false);
static FLIPPED: AtomicU64 = AtomicU64::new(0);
static ROUND: AtomicUsize = AtomicUsize::new(0);
/// Whether the loop is in its frame for good, and where the two saved frames lie in each round: the stack's, its resumer's.
static SWITCHING: AtomicBool = AtomicBool::new(false);
static SAVED: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Flips the word and flips it back, until told to stop.
fn flips(slot: usize, stub: usize, target: Target, pause: u32) {
    while !SWITCHING.load(Acquire) {
        std::thread::yield_now();
    }
    let (slot, stub) = (slot_at(slot), stubs()[stub]);
    let sp = SAVED[usize::from(stub.sp == Word::ResumerSp)].load(Relaxed) as usize;
    let place = target.place(slot, stub, sp);
    while !STOP.load(Relaxed) {
        let round = ROUND.load(Relaxed);
        // SAFETY: as in `attack`; the frame stays where it is in every round, and nothing else ever lies there.
        unsafe {
            let word = peek(place);
            poke(place, word ^ target.bit());
            (0..pause).for_each(|_| spin_loop());
            poke(place, word);
        }
        page().notes[0].store(FLIPPED.fetch_add(1, Relaxed) + 1, Relaxed);
        // A flip is a race only if the other side moves.
        while ROUND.load(Relaxed) == round && !STOP.load(Relaxed) {
            spin_loop();
        }
    }
}

/// Switches as fast as it can while another thread flips the word. `flipped` flips are enough.
fn raced(stub: usize, target: Option<Target>, pause: u32, enough: u64) -> Verdict {
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let _thread = Thread::attach().map_err(|error| error.to_string())?;
    let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
    let slot = lease.slot();
    // SAFETY: as in `stepped`.
    unsafe { forced::prepare(slot, adds, 0) };
    let thread = target.map(|target| {
        let place = slot.as_ptr().expose_provenance();
        std::thread::spawn(move || flips(place, stub, target, pause))
    });
    let result = switch(slot, if target.is_some() { enough } else { u64::MAX });
    STOP.store(true, Relaxed);
    if let Some(thread) = thread {
        thread.join().map_err(|_| "the attacker panicked")?;
    }
    if result.is_err() {
        std::mem::forget(lease);
        return result.map(|()| Code::C);
    }
    // SAFETY: it is suspended, and `adds` owes no destructor.
    unsafe { forced::cancel(slot) };
    Ok(Code::C)
}

/// The loop: it calls nothing but the stub, so that what lies below its stack pointer is the saved frame alone.
#[inline(never)]
fn switch(slot: NonNull<Slot>, enough: u64) -> Result<(), String> {
    let mut sum = 0;
    for round in 0..ROUNDS {
        // SAFETY: as in `stepped`.
        let got = unsafe { forced::resume(slot, slot, round) };
        sum += round;
        ROUND.store(round, Relaxed);
        if got.value != sum || got.finished {
            return Err(format!("{got:?} instead of {sum}"));
        }
        if round == 0 {
            SAVED[0].store(read(slot, Word::OwnSp), Relaxed);
            SAVED[1].store(read(slot, Word::ResumerSp), Relaxed);
            SWITCHING.store(true, Release);
        }
        if FLIPPED.load(Relaxed) >= enough {
            break;
        }
    }
    Ok(())
}

fn freely(tally: &mut Tally<'_>, class: &Class) {
    let targets = targets(class);
    let each = FLIPS / (targets.len() * stubs().len()) as u64 + 1;
    let mut flips = 0;
    tally.control("a race without an attacker", &run(|| raced(0, None, 0, 0)));
    for (index, stub) in stubs().into_iter().enumerate() {
        for &target in &targets {
            let mut ends = Vec::new();
            let mut left = each;
            let mut pause = 0;
            while left > 0 {
                crate::progress::tick(&format!("{} {target:?}: {left} races left", stub.name));
                let end = run(|| raced(index, Some(target), pause % 200, left));
                pause += 37;
                flips += end.notes[0];
                left = left.saturating_sub(end.notes[0].max(1));
                if let Err(problem) = add(&mut ends, end, class, target.allowed(class)) {
                    tally.fail(format!("{target:?} raced in {}: {problem}", stub.name));
                }
            }
            for Alike { code, attempts, end } in ends {
                tally.alike(&format!("{target:?} raced in {}", stub.name), code, attempts, &end);
            }
        }
    }
    tally.say(format!("{flips} flips in free races"));
}

/// A11.
pub fn all(class: &Class) -> Report {
    if !class.pac() && !class.has(Feature::Shstk) {
        return Report::skip(Class::protecting(), "nothing checks a suspended context here");
    }
    let mut tally = Tally::new(class);
    match stepper::unavailable(class) {
        None => at_every_boundary(&mut tally, class),
        Some(reason) => tally.say(format!("not stepped: {reason}")),
    }
    match std::thread::available_parallelism() {
        Ok(cpus) if cpus.get() > 1 => freely(&mut tally, class),
        _ => tally.say("not raced: one CPU"),
    }
    tally.report()
}
