//! The edge of a segment at every place: at every depth of a recursion, and at every offset of a stack whose frames start
//! sixteen bytes further down each time.

use super::frames::{locals, locals_result};
use super::watch::{SEGMENT, STEP, watched};
use super::{Bench, Item, Program, holds};
use std::fmt::Write;

pub const ITEMS: &[Item] = &[
    ("edge/every-depth", every_depth),
    ("edge/every-offset", |bench| every_offset(bench, 0)),
    ("edge/every-offset-spills", |bench| every_offset(bench, 24)),
    ("edge/every-offset-thunk", |bench| every_offset(bench, 70)),
    ("edge/every-offset-page", every_offset_of_large_frames),
];

/// `run(shift, depth)`: `shift` frames of sixteen bytes, then a recursion of this depth whose frames hold `live` values.
fn shifted(live: usize) -> String {
    let (mut locals, mut set, mut sum) = (String::new(), String::new(), String::new());
    for at in 0..live {
        write!(locals, "(local $l{at} i64)").unwrap();
        write!(set, "(local.set $l{at} (i64.load offset={} (local.get $depth)))", 8 * at).unwrap();
        write!(sum, "(local.get $l{at}) i64.add ").unwrap();
    }
    format!(
        "(module (memory 1)
            (func $prepare (local $at i32)
                (loop
                    (i64.store (local.get $at) (i64.extend_i32_u (i32.shr_u (local.get $at) (i32.const 3))))
                    (br_if 0 (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 8))) (i32.const 16384)))))
            (start $prepare)
            (func $shift (param $left i32) (result i64)
                (if (i32.eqz (local.get $left)) (then (return (call $deep (global.get $depth)))))
                (i64.add (i64.const 1) (call $shift (i32.sub (local.get $left) (i32.const 1)))))
            (global $depth (mut i32) (i32.const 0))
            (func $deep (param $depth i32) (result i64) {locals} (local $below i64)
                (if (i32.eqz (local.get $depth)) (then (return (i64.const 0))))
                {set}
                (local.set $below (call $deep (i32.sub (local.get $depth) (i32.const 8))))
                (i64.add (local.get $below) (i64.extend_i32_s (local.get $depth))) {sum})
            (func (export \"run\") (param $shift i32) (param $depth i32) (result i64)
                (global.set $depth (i32.mul (local.get $depth) (i32.const 8)))
                (call $shift (local.get $shift))))"
    )
}

fn shifted_result(live: i64, shift: i64, depth: i64) -> i64 {
    let word = |depth: i64, at: i64| depth + at;
    shift + (1..=depth).map(|d| 8 * d + (0..live).map(|at| word(d, at)).sum::<i64>()).sum::<i64>()
}

fn one(program: &mut Program<'_>, live: usize, shift: usize, depth: i32) -> Result<(), String> {
    let must = shifted_result(live as i64, shift as i64, depth.into());
    program.expect("run", &[shift as i32, depth], must).map(|_| ())
}

/// Every depth from none to far beyond two edges: at one of them each frame is the last that fits, or the first that does not.
fn every_depth(bench: &Bench<'_>) -> Result<String, String> {
    let depths = if bench.always() { 160 } else { 600 };
    let mut program = bench.load(&shifted(3))?;
    let seen = watched(|| bench.sweep(depths).try_for_each(|depth| one(&mut program, 3, 0, depth as i32)))?;
    holds(seen.growths > 0, || "the stack never grew".to_owned())?;
    Ok(format!("{}, {} growths", bench.swept(depths, "depths"), seen.growths))
}

/// Every start of a recursion over two edges: so the edge cuts its frames at every offset that they have.
fn every_offset(bench: &Bench<'_>, live: usize) -> Result<String, String> {
    let offsets = SEGMENT / STEP;
    let frame = 8 * live + 32;
    let mut program = bench.load(&shifted(live))?;
    let depth = 2 * SEGMENT / frame;
    let depth = if bench.always() { depth.min(40) } else { depth };
    let seen = watched(|| bench.sweep(offsets).try_for_each(|shift| one(&mut program, live, shift, depth as i32)))?;
    // The frame that finds the stack full ends at an offset of its own size's worth below the edge: at each of them.
    let least = if bench.always() { offsets } else { (8 * live + STEP) / STEP };
    let all = seen.offsets.len() >= least && seen.gaps() <= 1;
    holds(bench.every > 1 || all, || format!("growth at {} offsets with {} gaps", seen.offsets.len(), seen.gaps()))?;
    Ok(format!(
        "{}, recursion {depth} deep, {} growths at {} offsets",
        bench.swept(offsets, "starts"),
        seen.growths,
        seen.offsets.len()
    ))
}

/// Frames above a page ask for room before they are there: the stack pointer at growth takes every offset of the segment.
fn every_offset_of_large_frames(bench: &Bench<'_>) -> Result<String, String> {
    const LIVE: i64 = 530;
    const DEPTH: i64 = 3;
    let text = locals(LIVE).replace(
        "(func $next",
        "(func $shift (export \"run\") (param $left i32) (result i64)
            (if (i32.eqz (local.get $left)) (then (return (call $big (i64.const 3)))))
            (i64.add (i64.const 1) (call $shift (i32.sub (local.get $left) (i32.const 1)))))
        (func $next",
    );
    let mut program = bench.load(&text)?;
    let offsets = SEGMENT / STEP;
    let seen = watched(|| {
        bench.sweep(offsets).try_for_each(|shift| {
            let must = locals_result(LIVE, DEPTH).wrapping_add(shift as i64);
            program.expect("run", &[shift as i32], must).map(|_| ())
        })
    })?;
    let least = bench.sweep(offsets).count();
    holds(seen.offsets.len() >= least, || format!("growth at {} offsets, not {least}", seen.offsets.len()))?;
    Ok(format!(
        "{}, {} growths at {} of {offsets} offsets",
        bench.swept(offsets, "starts"),
        seen.growths,
        seen.offsets.len()
    ))
}
