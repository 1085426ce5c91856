//! Frames larger than the reserve, than a page and than every segment so far.

use super::{Bench, Item, holds};
use crate::types::{ValType, Value};
use std::fmt::Write;

pub const ITEMS: &[Item] = &[
    ("frames/page", |bench| frames(bench, &[60, 70, 480, 512, 600], 12)),
    ("frames/largest-so-far", |bench| frames(bench, if bench.every < 32 { &[1100, 2500] } else { &[1100] }, 3)),
    // It is the compiler that takes long over so many, and far too long on a CPU that is emulated to the last detail.
    ("frames/8000-locals", |bench| frames(bench, if bench.every < 32 { &[8000] } else { &[1500] }, 3)),
    ("frames/sizes", sizes),
];

/// Byte `at` of the memory that [`locals`] reads.
fn pattern(at: i64) -> u8 {
    (at.wrapping_mul(7) >> 3) as u8 ^ at as u8
}

/// A function with `count` locals that all live across a call of `$next`, and their sum, weighted. The locals are
/// loads, which the compiler cannot put off until after the call. From depth 1000 on, nothing of a frame is touched
/// but its lowest end, by a call.
pub fn locals(count: i64) -> String {
    let mut text = String::from("(module (memory 4) (data (i32.const 0) \"");
    for at in 0..8 * count + 64 {
        write!(text, "\\{:02x}", pattern(at)).unwrap();
    }
    text.push_str(
        r#"")
            (func $next (export "next") (param $depth i64) (result i64)
                (if (result i64) (i64.eqz (local.get $depth))
                    (then (i64.const 0))
                    (else (call $big (i64.sub (local.get $depth) (i64.const 1))))))
            (func $big (export "big") (param $depth i64) (result i64) (local $sum i64)"#,
    );
    for i in 0..count {
        write!(text, "(local $l{i} i64)").unwrap();
    }
    text.push_str(
        "(if (i64.ge_s (local.get $depth) (i64.const 1000)) (then (return (call $next (local.get $depth)))))",
    );
    for i in 0..count {
        write!(text, "(local.set $l{i} (i64.load offset={} (i32.wrap_i64 (local.get $depth))))", 8 * i).unwrap();
    }
    text.push_str("(local.set $sum (call $next (local.get $depth)))");
    for i in 0..count {
        write!(text, "(local.set $sum (i64.add (i64.mul (local.get $sum) (i64.const 31)) (local.get $l{i})))").unwrap();
    }
    text.push_str("(local.get $sum)))");
    text
}

/// What `big` of [`locals`] returns.
pub fn locals_result(count: i64, depth: i64) -> i64 {
    let sum = if depth == 0 { 0 } else { locals_result(count, depth - 1) };
    let load = |i: i64| i64::from_le_bytes(std::array::from_fn(|byte| pattern(8 * i + depth + byte as i64)));
    (0..count).fold(sum, |sum, i| sum.wrapping_mul(31).wrapping_add(load(i)))
}

/// Calls `big` at this depth; the growths and the largest segment.
fn run(bench: &Bench<'_>, count: i64, depths: impl IntoIterator<Item = i64>) -> Result<(u64, u64), String> {
    let mut program =
        bench.load_with(&locals(count), |config| config.policy.maximum = config.policy.maximum.max(1 << 20))?;
    let (mut growths, mut largest) = (0, 0);
    for depth in depths {
        let (result, stats) = program.call("big", &[Value { ty: ValType::I64, bits: depth as u64 }])?;
        let bits = result.map_err(|error| format!("{count} locals, depth {depth}: {error}"))?[0].bits;
        let must = locals_result(count, depth) as u64;
        holds(bits == must, || format!("{count} locals, depth {depth}: {bits:#x}, not {must:#x}"))?;
        growths += stats.growths;
        largest = largest.max(stats.largest);
        // A frame beyond the segment at the first call makes the stack grow at once.
        let frame = 8 * count as u64 * (depth as u64 + 1);
        holds(frame < 4096 || stats.growths > 0, || format!("{count} locals, depth {depth}: no growth"))?;
        holds(frame < stats.largest, || format!("{count} locals, depth {depth}: {} bytes are too few", stats.largest))?;
    }
    Ok((growths, largest))
}

fn frames(bench: &Bench<'_>, counts: &[i64], depth: i64) -> Result<String, String> {
    let (mut growths, mut largest) = (0, 0);
    for count in counts {
        let (grown, size) = run(bench, *count, [0, 1, depth])?;
        growths += grown;
        largest = largest.max(size);
    }
    Ok(format!("{counts:?} locals, up to {depth} deep, {growths} growths, up to {largest} bytes"))
}

/// Every frame size around what the reserve covers, around a page and around two, by 16 bytes.
fn sizes(bench: &Bench<'_>) -> Result<String, String> {
    let counts: Vec<i64> = [56..80, 500..524, 1012..1036].into_iter().flat_map(|range| range.step_by(2)).collect();
    let mut growths = 0;
    for at in bench.sweep(counts.len()) {
        growths += run(bench, counts[at], [9])?.0;
    }
    Ok(format!("{}, {growths} growths", bench.swept(counts.len(), "sizes")))
}
