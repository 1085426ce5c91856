//! Instructions of a round.

use crate::subjects::Run;
use cfi_counting::{between_marks, mark};
use std::hint::black_box;

/// Rounds of the shorter of the two counted runs; the longer has twice as many.
const ROUNDS: u64 = 4;
/// Rounds before anything is counted: what happens but once has happened.
const WARM: u64 = 16;

/// Instructions that one round takes: the difference between a run and one of twice the length, so that what is paid once is left out.
///
/// # Errors
/// Text that says what did not work.
pub fn instructions(make: fn() -> Run) -> Result<f64, String> {
    let counted = between_marks(&mut || {
        let mut run = make();
        run(WARM);
        mark();
        run(black_box(ROUNDS));
        mark();
        run(black_box(2 * ROUNDS));
        mark();
        // A suspended coroutine would be unwound, and some of the libraries cannot.
        std::mem::forget(run);
    })?;
    match counted[..] {
        [short, long] => Ok((long as f64 - short as f64) / ROUNDS as f64),
        _ => Err(format!("{} runs were counted, and not 2", counted.len())),
    }
}
