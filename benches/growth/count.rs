//! Instructions of a move, part by part and whole.

use crate::bench::Bench;
use crate::parts::PARTS;
use crate::relocation::{move_between, span};
use cfi_counting::{between_marks, mark};
use cfi_stack::Error;
use cfi_stack::steps::{Step, StepInfo, set_hook};
use std::hint::black_box;

/// Frames of the shorter of the two moves that a frame's share is taken from; the longer has twice as many.
const FRAMES: usize = 512;
/// Where copying stands among the parts: by bytes, not by frames.
const COPY: usize = 2;
const REBIND: usize = 4;

extern "C" fn stamp(_: usize, _: usize, _: usize) -> u64 {
    mark();
    0
}

fn silent_stamp() -> usize {
    extern "C" fn nothing(_: usize, _: usize, _: usize) -> u64 {
        0
    }
    nothing as *const () as usize
}

fn hook(step: Step, _: &mut StepInfo<'_>) -> Result<(), Error> {
    black_box(step);
    mark();
    Ok(())
}

/// Prints what a frame takes of each part, and what whole moves of these numbers of frames take beside copying the same bytes.
///
/// # Errors
/// Text that says what did not work, or that re-binding takes more than `at_most` instructions a frame.
pub fn print(frames: &[usize], at_most: Option<f64>) -> Result<(), String> {
    // A step is a call of the hook: they lie between the parts, and cost the same for any number of frames.
    let [short, long] = [parts(FRAMES)?, parts(2 * FRAMES)?];
    println!("instructions of a move     a frame      once");
    let mut total = 0.0;
    let mut rebind = 0.0;
    for (part, name) in PARTS.iter().enumerate() {
        let each = (long[part] as f64 - short[part] as f64) / FRAMES as f64;
        match part {
            COPY => {}
            _ => total += each,
        }
        if part == REBIND {
            rebind = each;
        }
        println!("  {name:<22} {each:>9.2} {:>9.0}", short[part] as f64 - each * FRAMES as f64);
    }
    println!("  {:<22} {total:>9.2}", "all but copy");
    println!("whole moves                  grow   a frame    memcpy of the same bytes");
    for &frames in frames {
        let (whole, copied) = (whole(frames)?, copied(span(frames))?);
        println!("  {frames:>6} frames {whole:>17} {:>9.1} {copied:>11}", whole as f64 / frames as f64);
    }
    match at_most {
        Some(most) if rebind > most => {
            Err(format!("re-binding takes {rebind:.2} instructions a frame, and {most} are allowed"))
        }
        _ => Ok(()),
    }
}

/// The parts of one move, what is between steps.
fn parts(frames: usize) -> Result<[u64; PARTS.len()], String> {
    let counts = between_marks(&mut || {
        let bench = Bench::new(1);
        // The first move finds things in their first state.
        move_between(&bench, frames, silent_stamp());
        set_hook(Some(hook));
        move_between(&bench, frames, silent_stamp());
        set_hook(None);
    })?;
    <[u64; PARTS.len()]>::try_from(counts).map_err(|counts| format!("{} parts were counted", counts.len()))
}

/// One move as managed code sees it: from one call of a native function to the next, with `grow` between.
fn whole(frames: usize) -> Result<u64, String> {
    let counts = between_marks(&mut || {
        let bench = Bench::new(1);
        move_between(&bench, frames, silent_stamp());
        move_between(&bench, frames, stamp as *const () as usize);
    })?;
    match counts[..] {
        [grow] => Ok(grow),
        _ => Err(format!("{} moves were counted, and not 1", counts.len())),
    }
}

fn copied(bytes: usize) -> Result<u64, String> {
    let from = vec![1_u8; bytes];
    let mut to = vec![2_u8; bytes];
    let counts = between_marks(&mut || {
        to.copy_from_slice(black_box(&from));
        mark();
        to.copy_from_slice(black_box(&from));
        mark();
        black_box(&mut to);
    })?;
    counts.first().copied().ok_or_else(|| "nothing was counted".into())
}
