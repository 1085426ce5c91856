//! Instructions counted one by one, between marks that the counted code sets.
//!
//! | `CFI_STACK_COUNTER` | who counts | what is counted |
//! |---|---|---|
//! | not set | the parent of a child process that it steps through by ptrace | user mode; a repeated string instruction is one |
//! | `trace:FILE` | QEMU in user mode, which writes a line of FILE for each instruction: the length of the file is the clock | user mode |
//! | `clock` | a time stamp that ticks once an instruction: Bochs, QEMU in system mode with `-icount shift=0` | the kernel too: the least of several runs |
//!
//! `ci/on --count` sets it. Before anything is counted a loop of known length is: where that comes out wrong, or no whole number of ticks
//! belongs to an instruction, counting is refused.

#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod clock;
mod stepping;

use clock::Clock;
use std::hint::black_box;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Marks that one piece of work may set.
const MOST_MARKS: usize = 64;
/// Runs of which the least is taken where a kernel's instructions are counted too.
const RUNS: usize = 9;

static TICKS: [AtomicU64; MOST_MARKS] = [const { AtomicU64::new(0) }; MOST_MARKS];
static SET: AtomicUsize = AtomicUsize::new(0);

/// Sets a mark. What it takes itself is not counted.
pub fn mark() {
    stepping::wait_for_parent();
    set();
}

/// Where a mark is: a parent that steps knows its address.
#[inline(never)]
extern "C" fn set() {
    let index = SET.fetch_add(1, Ordering::Relaxed);
    if let Some(ticks) = TICKS.get(index) {
        ticks.store(clock::now(), Ordering::Relaxed);
    }
}

/// The instructions between each two neighbouring marks that `work` sets. Where they are taken from a clock, `work` runs in this process
/// and may run several times; else it runs once, in a child.
///
/// # Errors
/// Text that says what did not work: this machine has no such counter, or the counter cannot be believed.
pub fn between_marks(work: &mut dyn FnMut()) -> Result<Vec<u64>, String> {
    let scale = scale()?;
    let counts = raw(work)?.into_iter().map(|ticks| scale.instructions(ticks));
    counts.collect()
}

/// What a tick is, and what two marks with nothing between them take.
#[derive(Clone, Copy)]
struct Scale {
    ticks: u64,
    empty: u64,
}

impl Scale {
    fn instructions(self, ticks: u64) -> Result<u64, String> {
        if !ticks.is_multiple_of(self.ticks) {
            return Err(format!("{ticks} ticks are no whole number of instructions, at {} for each", self.ticks));
        }
        (ticks / self.ticks).checked_sub(self.empty).ok_or_else(|| "less was counted than two marks take".into())
    }
}

/// Found out once, by counting what is known.
fn scale() -> Result<Scale, String> {
    static SCALE: OnceLock<Result<Scale, String>> = OnceLock::new();
    SCALE.get_or_init(calibrate).clone()
}

fn calibrate() -> Result<Scale, String> {
    const TURNS: u64 = 500;
    let mut known = || {
        mark();
        mark();
        marked_spin(black_box(TURNS));
        marked_spin(black_box(2 * TURNS));
        marked_spin(black_box(5 * TURNS));
    };
    let intervals = raw(&mut known)?;
    let &[empty, _, once, _, twice, _, more] = &intervals[..] else {
        return Err(format!("{} intervals were counted, and not 7", intervals.len()));
    };
    let ticks = twice.wrapping_sub(once) / (TURNS * clock::INSTRUCTIONS_OF_A_TURN);
    let scale = Scale { ticks, empty: empty.checked_div(ticks).unwrap_or(0) };
    let expected = |times: u64| ticks.wrapping_mul(times * TURNS * clock::INSTRUCTIONS_OF_A_TURN);
    let right = ticks != 0
        && empty.is_multiple_of(ticks)
        && twice.wrapping_sub(once) == expected(1)
        && more.wrapping_sub(once) == expected(4);
    match right {
        true => Ok(scale),
        false => Err(format!(
            "nothing here counts instructions: loops of 1, 2 and 5 lengths took {once}, {twice} and {more}"
        )),
    }
}

/// In a function of its own: the same instructions around each loop.
#[inline(never)]
fn marked_spin(turns: u64) {
    mark();
    clock::spin(turns);
    mark();
}

/// The ticks between neighbouring marks.
fn raw(work: &mut dyn FnMut()) -> Result<Vec<u64>, String> {
    match clock::clock()? {
        None => stepping::between_marks(work),
        Some(Clock::Trace(trace)) => {
            trace.forget_lines()?;
            once(work)
        }
        Some(Clock::Stamp) => {
            let mut least = once(work)?;
            for _ in 1..RUNS {
                for (least, now) in least.iter_mut().zip(once(work)?) {
                    *least = now.min(*least);
                }
            }
            Ok(least)
        }
    }
}

/// One run in this process.
fn once(work: &mut dyn FnMut()) -> Result<Vec<u64>, String> {
    SET.store(0, Ordering::Relaxed);
    work();
    let set = SET.load(Ordering::Relaxed);
    let ticks = TICKS.get(..set).ok_or_else(|| format!("{set} marks are more than {MOST_MARKS}"))?;
    let ticks: Vec<u64> = ticks.iter().map(|ticks| ticks.load(Ordering::Relaxed)).collect();
    Ok(ticks.windows(2).map(|pair| pair[1].wrapping_sub(pair[0])).collect())
}
