//! Continuations on whatever this CPU enforces.

#[path = "../../../tests/continuation/programs.rs"]
mod programs;

use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::memory::footprint;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::continuation::{self, Cont, Frames, Handler, On, Outcome, Shape};
use cfi_stack::pool;
use cfi_stack::thread::Thread;
use std::sync::atomic::Ordering::Relaxed;

/// Verbs of each thread's program.
const OPERATIONS: usize = 20_000;
const THREADS: usize = 2;

/// S20.
pub fn random(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let seed = std::process::id().into();
    let end = run(|| {
        let counts = programs::run(seed, THREADS, OPERATIONS);
        page().notes[0].store(counts.operations, Relaxed);
        page().notes[1].store(counts.resumed + counts.thrown, Relaxed);
        page().notes[2].store(counts.suspended + counts.switched, Relaxed);
        page().notes[3].store(counts.chains, Relaxed);
        page().notes[4].store(counts.migrated, Relaxed);
        nothing_left()?;
        Ok(Code::C)
    });
    tally.attack(&format!("random programs, seed {seed}"), &end, &[Code::C]);
    let [operations, resumed, suspended, chains, migrated, ..] = end.notes;
    tally.say(format!(
        "{operations} verbs, {resumed} resumptions, {suspended} suspensions, {chains} of chains, {migrated} went to another thread"
    ));
    tally.report()
}

fn nothing_left() -> Result<(), String> {
    let leaks = continuation::leaks().map_err(|error| error.to_string())?;
    let leased: usize = pool::stats().classes.iter().map(|class| class.leased).sum();
    if leaks.is_empty() && leased == 0 { Ok(()) } else { Err(format!("{leased} stacks leased; left: {leaks:?}")) }
}

/// S21.
pub fn rounds(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let end = run(all_rounds);
    tally.attack(&format!("{ROUNDS} rounds"), &end, &[Code::C]);
    let [before, after, pages_before, pages_after, ..] = end.notes;
    tally.say(format!(
        "{before} mappings before, {after} after; {pages_before} pages resident before, {pages_after} after"
    ));
    tally.report()
}

const ROUNDS: usize = 100_000;
/// Resident pages that may come and go: the allocator's, and an emulator's.
const SLACK: usize = 256;
/// How often the rounds are measured at most.
const WINDOWS: usize = 3;
const TAG: Handler = Handler { tag: 1, on: On::Suspend };

/// Adds what it is passed to what it was bound to; with an odd `data` it resumes such a one first, whose suspension goes through it.
unsafe extern "C-unwind" fn adds(data: usize, values: *mut u64, _: usize) -> usize {
    // SAFETY: two parameters, one result.
    let sum: u64 = unsafe { std::slice::from_raw_parts(values, 2) }.iter().sum();
    let mut passed = [0];
    let right = if data & 1 == 0 {
        continuation::suspend(1, &[sum], &mut passed).is_ok()
    } else {
        Thread::attach()
            .and_then(|thread| make(&thread, data & !1))
            .and_then(|inner| continuation::resume(inner, &[], &[sum, 0], &mut passed))
            .is_ok()
    };
    // SAFETY: as above.
    unsafe { *values = passed[0] + 1 };
    usize::from(!right)
}

fn make(thread: &Thread, data: usize) -> Result<Cont, cfi_stack::Error> {
    let shape = Shape { size: 32 << 10, params: 2, results: 1, may_migrate: false };
    // SAFETY: the function keeps to the counts.
    unsafe { continuation::new(thread, adds, data, shape) }
}

/// One of each way that a continuation can go.
fn round(thread: &Thread, number: usize) -> Result<(), String> {
    let text = |error: cfi_stack::Error| error.to_string();
    let mut values = [0];
    let cont = make(thread, number & 1).map_err(text)?;
    let cont = if number & 2 == 0 { continuation::bind(cont, &[3]).map_err(text)? } else { cont };
    let args: &[u64] = if number & 2 == 0 { &[4] } else { &[3, 4] };
    let Outcome::Suspended { cont, .. } = continuation::resume(cont, &[TAG], args, &mut values).map_err(text)? else {
        return Err("it did not suspend".into());
    };
    if values != [7] {
        return Err(format!("{values:?} passed"));
    }
    match number % 16 {
        0 | 1 => {
            let frames = if number & 8 == 0 { Frames::Unwind } else { Frames::Skip };
            // SAFETY: nothing points into the frames, which own nothing.
            unsafe { continuation::cancel(cont, frames) }.map_err(text)
        }
        _ => {
            let outcome = continuation::resume(cont, &[], &[number as u64], &mut values).map_err(text)?;
            let right =
                outcome == Outcome::Returned { count: 1 } && values[0] == number as u64 + 1 + (number as u64 & 1);
            if right { Ok(()) } else { Err(format!("{outcome:?} {values:?}")) }
        }
    }
}

fn all_rounds() -> Verdict {
    let thread = Thread::attach().map_err(|error| error.to_string())?;
    for number in 0..ROUNDS / 100 {
        round(&thread, number)?;
    }
    // A leak grows in every window; an emulator's own pages, which count as ours in user mode, stop coming.
    for _ in 0..WINDOWS {
        let before = footprint();
        for number in 0..ROUNDS {
            round(&thread, number)?;
        }
        let after = footprint();
        for (note, value) in page().notes.iter().zip([before.0, after.0, before.1, after.1]) {
            note.store(value as u64, Relaxed);
        }
        nothing_left()?;
        if before.0 != after.0 {
            return Err("the number of mappings changed".into());
        }
        if after.1 <= before.1 + SLACK {
            return Ok(Code::C);
        }
    }
    Err("resident memory grew in every window".into())
}

/// S22.
pub fn rounding(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("each stack keeps its rounding mode", &run(rounding_modes), &[Code::C]);
    tally.report()
}

/// The rounding mode bits of MXCSR or of FPCR.
#[cfg(target_arch = "x86_64")]
mod control {
    pub const MODE: u64 = 3 << 13;

    pub fn get() -> u64 {
        let mut word = 0_u32;
        // SAFETY: a store.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word) };
        u64::from(word) & MODE
    }

    pub fn set(mode: u64) {
        let word = 0x1f80 | (mode & MODE) as u32;
        // SAFETY: a rounding mode, with all exceptions masked.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word) }
    }
}

/// The rounding mode bits of MXCSR or of FPCR.
#[cfg(target_arch = "aarch64")]
mod control {
    pub const MODE: u64 = 3 << 22;

    pub fn get() -> u64 {
        let word: u64;
        // SAFETY: a read.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) word) };
        word & MODE
    }

    pub fn set(mode: u64) {
        // SAFETY: a rounding mode.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) mode & MODE) }
    }
}

/// Sets a rounding mode, suspends itself and switches; returns 0 if it always was its own.
unsafe extern "C-unwind" fn rounds_its_way(data: usize, values: *mut u64, _: usize) -> usize {
    let mode = data as u64;
    let before = control::get();
    control::set(mode);
    let mut right = before == 0;
    for turn in 0..6 {
        right &= continuation::suspend(1, &[turn], &mut []).is_ok() && control::get() == mode;
        // Who is switched to suspends itself at once, and is dropped; it has the mode that it was made in.
        let mut passed = [0; 2];
        let other = Thread::attach().and_then(|thread| {
            let shape = Shape { size: 32 << 10, params: 2, results: 0, may_migrate: false };
            // SAFETY: the function keeps to the counts.
            unsafe { continuation::new(&thread, switches_back, mode as usize, shape) }
        });
        right &= other.and_then(|other| continuation::switch(other, 1, &[], &mut passed)).is_ok();
        right &= control::get() == mode;
        // SAFETY: nothing points into its frames.
        right &= unsafe { continuation::cancel(Cont::from_words(passed), Frames::Skip) }.is_ok();
    }
    // SAFETY: one result.
    unsafe { *values = u64::from(!right) };
    0
}

unsafe extern "C-unwind" fn switches_back(data: usize, values: *mut u64, _: usize) -> usize {
    // SAFETY: two parameters.
    let from = unsafe { Cont::from_words([*values, *values.add(1)]) };
    let right = control::get() == data as u64;
    control::set(!data as u64);
    // It does not come back.
    let _ = continuation::switch(from, 1, &[], &mut []);
    usize::from(right)
}

unsafe extern "C-unwind" fn rounds_down(_: usize) -> usize {
    let mode = control::get();
    control::set(control::MODE);
    control::set(mode);
    0
}

fn rounding_modes() -> Verdict {
    let thread = Thread::attach().map_err(|error| error.to_string())?;
    let text = |error: cfi_stack::Error| error.to_string();
    let handlers = [TAG, Handler { tag: 1, on: On::Switch }];
    let new = |mode: u64| {
        let shape = Shape { size: 32 << 10, params: 0, results: 1, may_migrate: false };
        // SAFETY: the function keeps to the counts.
        unsafe { continuation::new(&thread, rounds_its_way, mode as usize, shape) }
    };
    let lowest = control::MODE & control::MODE.wrapping_neg();
    let mut waiting = Vec::new();
    for mode in [0, lowest, 2 * lowest, 3 * lowest] {
        waiting.push(new(mode).map_err(text)?);
    }
    let mut values = [0; 2];
    for turn in 0.. {
        let Some(cont) = (!waiting.is_empty()).then(|| waiting.remove(0)) else { return Ok(Code::C) };
        let outcome = if turn % 5 == 4 {
            // SAFETY: the function takes any word.
            unsafe { continuation::throw(cont, &handlers, rounds_down, 0, &mut values) }
        } else {
            continuation::resume(cont, &handlers, &[], &mut values)
        };
        match outcome.map_err(text)? {
            Outcome::Suspended { cont, .. } => waiting.push(cont),
            Outcome::Returned { .. } if values[0] == 0 => {}
            other => return Err(format!("{other:?} {values:?}")),
        }
        if control::get() != 0 {
            return Err("the resumer's rounding mode changed".into());
        }
    }
    Ok(Code::C)
}
