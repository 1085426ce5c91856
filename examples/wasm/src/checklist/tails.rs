//! Tail calls: after growth, with more and with fewer arguments than came in, and without end in constant room.

use super::values::{KINDS, in_turn, types};
use super::{Bench, Item, holds};

pub const ITEMS: &[Item] = &[
    ("tail/ten-results", ten_results),
    ("tail/arguments", arguments),
    ("tail/return_call", |bench| constant(bench, "call")),
    ("tail/return_call_indirect", |bench| constant(bench, "indirect")),
    ("tail/return_call_ref", |bench| constant(bench, "reference")),
    ("tail/growth-between", growth_between),
];

/// `a` makes the stack grow, then makes a tail call to `b`, whose ten results go to the caller of `a`.
fn ten_results(bench: &Bench<'_>) -> Result<String, String> {
    let kinds = in_turn(&KINDS, 2);
    let list = types(&kinds);
    let values: String = kinds
        .iter()
        .enumerate()
        .map(|(at, kind)| kind.sum(&kind.number(11 * at as i32), &kind.of("(local.get 0)")))
        .collect();
    let locals: String = kinds.iter().enumerate().map(|(at, kind)| format!("(local $r{at} {})", kind.0)).collect();
    let mut check = String::new();
    for (at, kind) in kinds.iter().enumerate().rev() {
        let must = kind.sum(&kind.number(11 * at as i32), &kind.of("(local.get $depth)"));
        let differ = kind.differ(&format!("(local.get $r{at})"), &must);
        check.push_str(&format!("(local.set $r{at}) (if {differ} (then (return (i64.const {at}))))"));
    }
    let text = format!(
        "(module
            (func $deep (param i32) (result i32)
                (if (result i32) (local.get 0)
                    (then (i32.add (i32.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i32.const 0))))
            (func $a (param i32) (result {list}) (return_call $b (call $deep (local.get 0)) (i64.const 5)))
            (func $b (param i32 i64) (result {list})
                (if (i32.ne (call $deep (i32.mul (local.get 0) (i32.const 4))) (i32.mul (local.get 0) (i32.const 4)))
                    (then unreachable))
                {values})
            (func (export \"run\") (param $depth i32) (result i64) {locals}
                (call $a (local.get $depth))
                {check}
                (i64.const -1)))"
    );
    let mut program = bench.load(&text)?;
    let depth = bench.depth(500, 120);
    let stats = program.expect("run", &[depth], -1)?;
    holds(stats.growths > 1, || "growth in both was wanted".to_owned())?;
    Ok(format!("ten results of five kinds, {} growths", stats.growths))
}

/// Tail calls from few arguments to many, which do not fit registers, to few again, with growth in each function and a frame of
/// the caller below that lives on.
fn arguments(bench: &Bench<'_>) -> Result<String, String> {
    let mut functions = String::new();
    let counts = [1, 14, 0, 9, 40, 2, 11, 12, 13, 1];
    for (at, count) in counts.iter().enumerate() {
        let params: String = (0..*count).map(|_| "(param i64)").collect();
        let sum: String = (0..*count).map(|param| format!("(local.get {param}) i64.add ")).collect();
        let next = match counts.get(at + 1) {
            Some(next) => {
                let args: String = (0..*next).map(|arg| format!("(i64.const {})", arg + at as i64)).collect();
                format!("{args} (return_call $f{})", at + 1)
            }
            None => "(global.get $sum)".to_owned(),
        };
        functions.push_str(&format!(
            "(func $f{at} {params} (result i64)
                (global.get $sum) {sum} (global.set $sum)
                (global.set $sum (i64.add (global.get $sum)
                    (call $deep (i32.add (i32.const {}) (global.get $depth)))))
                {next})",
            40 * at,
        ));
    }
    let text = format!(
        "(module
            (global $sum (mut i64) (i64.const 0))
            (global $depth (mut i32) (i32.const 0))
            (func $deep (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i64.const 0))))
            {functions}
            (func $below (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1000000) (call $below (i32.sub (local.get 0) (i32.const 1)))))
                    (else (call $f0 (i64.const 3)))))
            (func (export \"run\") (param i32) (param i32) (result i64)
                (global.set $sum (i64.const 0))
                (global.set $depth (local.get 1))
                (call $below (local.get 0))))"
    );
    let mut program = bench.load(&text)?;
    let given = |at: usize| (0..counts[at]).map(|arg| arg + at as i64 - 1).sum::<i64>();
    let mut growths = 0;
    let places = 24;
    for at in bench.sweep(places) {
        let (below, depth) = (7 * at as i32, bench.depth(40, 0));
        let deep: i64 = (0..counts.len() as i64).map(|at| 40 * at + i64::from(depth)).sum();
        let must = 3 + (1..counts.len()).map(given).sum::<i64>() + deep + 1_000_000 * i64::from(below);
        growths += program.expect("run", &[below, depth], must)?.growths;
    }
    holds(growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{counts:?} arguments in turn, {}, {growths} growths", bench.swept(places, "depths")))
}

/// A million tail calls in turn between functions with two and with sixteen arguments, in the first segment.
fn constant(bench: &Bench<'_>, how: &str) -> Result<String, String> {
    let zeros: String = (0..13).map(|at| format!("(f64.const {at})")).collect();
    let floats = "(param f64)".repeat(13);
    // Operators that take what is on the stack, and what they take besides the arguments.
    let (to_many, to_few) = match how {
        "call" => ("return_call $many", "return_call $few"),
        "indirect" => ("(i32.const 1) return_call_indirect (type $m)", "(i32.const 0) return_call_indirect (type $f)"),
        _ => ("(ref.func $many) return_call_ref $m", "(ref.func $few) return_call_ref $f"),
    };
    let text = format!(
        "(module
            (type $f (func (param i32 i64) (result i64)))
            (type $m (func (param i64 i32) (param i64) {floats} (result i64)))
            (table funcref (elem $few $many))
            (func $few (type $f)
                (if (i32.eqz (local.get 0)) (then (return (local.get 1))))
                (i64.add (local.get 1) (i64.const 1)) (i32.sub (local.get 0) (i32.const 1)) (i64.const 1) {zeros}
                {to_many})
            (func $many (type $m)
                (if (i32.eqz (local.get 1)) (then (return (local.get 0))))
                (i32.sub (local.get 1) (i32.const 1)) (i64.add (local.get 0) (local.get 2))
                {to_few})
            (func (export \"run\") (param i32) (result i64) (call $few (local.get 0) (i64.const 0))))"
    );
    let mut program = bench.load(&text)?;
    let calls = match (bench.always(), bench.every) {
        (false, 1) => 1_000_000,
        (false, _) => 20_000,
        (true, _) => 1_000,
    };
    let stats = program.expect("run", &[calls], calls.into())?;
    let first = bench.config.policy.initial as u64;
    holds(stats.largest == first, || format!("{calls} tail calls took {} bytes of stack", stats.largest))?;
    Ok(format!("{calls} tail calls in {first} bytes"))
}

/// A chain of tail calls each link of which goes deep first and comes back, deeper each time.
fn growth_between(bench: &Bench<'_>) -> Result<String, String> {
    let text = "(module
        (func $deep (param i32) (result i64)
            (if (result i64) (local.get 0)
                (then (i64.add (i64.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                (else (i64.const 0))))
        (func $link (export \"run\") (param $links i32) (result i64)
            (return_call $carry (local.get $links) (i64.const 0) (f32.const 0.5)))
        (func $carry (param $links i32) (param $sum i64) (param f32) (result i64)
            (if (i32.eqz (local.get $links)) (then (return (local.get $sum))))
            (return_call $carry
                (i32.sub (local.get $links) (i32.const 1))
                (i64.add (local.get $sum) (call $deep (i32.mul (i32.sub (i32.const 40) (local.get $links)) (i32.const 17))))
                (local.get 2))))";
    let mut program = bench.load(text)?;
    let links: i32 = if bench.always() { 8 } else { 40 };
    let must = (1..=links).map(|left| 17 * i64::from(40 - left)).sum();
    let stats = program.expect("run", &[links], must)?;
    holds(stats.growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{links} links, {} growths", stats.growths))
}
