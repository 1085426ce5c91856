//! Arguments and results of every kind across an edge.

use super::values::{KINDS, Kind, in_turn, types};
use super::{Bench, Item, Program, holds, i32};
use crate::types::{ValType, Value};
use std::fmt::Write;

pub const ITEMS: &[Item] = &[
    ("arguments/i32", |bench| arguments(bench, &KINDS[..1])),
    ("arguments/i64", |bench| arguments(bench, &KINDS[1..2])),
    ("arguments/f32", |bench| arguments(bench, &KINDS[2..3])),
    ("arguments/f64", |bench| arguments(bench, &KINDS[3..4])),
    ("arguments/v128", |bench| arguments(bench, &KINDS[4..])),
    ("arguments/all", |bench| arguments(bench, &KINDS)),
    ("arguments/maximum", maximum),
    ("arguments/maximum-v128", maximum_vectors),
    ("results/i32", |bench| results(bench, &KINDS[..1])),
    ("results/i64", |bench| results(bench, &KINDS[1..2])),
    ("results/f32", |bench| results(bench, &KINDS[2..3])),
    ("results/f64", |bench| results(bench, &KINDS[3..4])),
    ("results/v128", |bench| results(bench, &KINDS[4..])),
    ("results/all", |bench| results(bench, &KINDS)),
    ("results/floats", |bench| results(bench, &[Kind("f32"), Kind("f64"), Kind("f32")])),
];

/// `down` passes ten arguments of each of these kinds on, each one less at each call, and compares them with what they
/// must be, before it calls itself and after. It returns how deep it went, or a negative number for the argument that is wrong.
pub fn passing(kinds: &[Kind]) -> String {
    let list = in_turn(kinds, 10);
    let base = |at: usize| 1000 + 37 * at as i32;
    let check = |code: i32| {
        let one = |(at, kind): (usize, &Kind)| {
            let must = kind.sum(&kind.number(base(at)), &kind.of("(local.get $depth)"));
            let differ = kind.differ(&format!("(local.get $a{at})"), &must);
            format!("(if {differ} (then (return (i64.const {}))))", code - at as i32)
        };
        list.iter().enumerate().map(one).collect::<String>()
    };
    let params: String = list.iter().enumerate().map(|(at, kind)| format!("(param $a{at} {})", kind.0)).collect();
    let less = |(at, kind): (usize, &Kind)| kind.difference(&format!("(local.get $a{at})"), &kind.number(1));
    let next: String = list.iter().enumerate().map(less).collect();
    let first = |depth: &str| {
        let value = |(at, kind): (usize, &Kind)| kind.sum(&kind.number(base(at)), &kind.of(depth));
        format!("(call $down {depth} {})", list.iter().enumerate().map(value).collect::<String>())
    };
    format!(
        "(module
            (import \"native\" \"compact\" (func $compact (result i64)))
            (func $down (param $depth i32) {params} (result i64) (local $below i64)
                {}
                (if (local.get $depth)
                    (then (local.set $below (call $down (i32.sub (local.get $depth) (i32.const 1)) {next}))))
                {}
                (if (result i64) (i64.lt_s (local.get $below) (i64.const 0))
                    (then (local.get $below))
                    (else (i64.add (local.get $below) (i64.const 1)))))
            (func (export \"twice\") (param $depth i32) (result i64) (local $one i64) (local $other i64)
                (local.set $one {})
                (if (i64.ne (call $compact) (i64.const 1)) (then (return (i64.const -200000))))
                (local.set $other {})
                (if (i64.ne (call $compact) (i64.const 1)) (then (return (i64.const -200001))))
                (if (i64.ne (local.get $one) (local.get $other)) (then (return (i64.const -100000))))
                (local.get $one)))",
        check(-1),
        check(-1001),
        first("(local.get $depth)"),
        first("(local.get $depth)"),
    )
}

fn arguments(bench: &Bench<'_>, kinds: &[Kind]) -> Result<String, String> {
    let mut program = bench.load(&passing(kinds))?;
    let depths = [60, bench.depth(400, 120)];
    let mut growths = 0;
    let mut stack = program.stack()?;
    for depth in depths {
        // Deeper at the second: each call goes twice over the edge that the one before left above it.
        program.expect_on(&mut stack, "twice", &[depth], i64::from(depth) + 1)?;
        let all = stack.stats().growths;
        holds(all > growths, || format!("depth {depth}: the stack did not grow"))?;
        growths = all;
    }
    Ok(format!("{} arguments, depths {depths:?}, {growths} growths", 10 * kinds.len()))
}

/// Calls itself with one result of each of these kinds (a single one in a register), each one more at every return.
pub fn returning(kinds: &[Kind]) -> String {
    let all = types(kinds);
    let mut more = String::new();
    for at in (0..kinds.len()).rev() {
        write!(more, "(local.set $r{at})").unwrap();
    }
    for (at, kind) in kinds.iter().enumerate() {
        more.push_str(&kind.sum(&format!("(local.get $r{at})"), &kind.number(at as i32 + 1)));
    }
    let locals: String = kinds.iter().enumerate().map(|(at, kind)| format!("(local $r{at} {})", kind.0)).collect();
    let base: String = kinds.iter().enumerate().map(|(at, kind)| kind.number(7 * at as i32)).collect();
    let mut check = String::new();
    for (at, kind) in kinds.iter().enumerate().rev() {
        let step = format!("(i32.mul (local.get $depth) (i32.const {}))", at + 1);
        let must = kind.sum(&kind.number(7 * at as i32), &kind.of(&step));
        write!(check, "(local.set $r{at}) (if {} (then (return (i64.const {at}))))", {
            kind.differ(&format!("(local.get $r{at})"), &must)
        })
        .unwrap();
    }
    format!(
        "(module
            (func $deep (param $depth i32) (result {all}) {locals}
                (if (i32.eqz (local.get $depth)) (then (return {base})))
                (call $deep (i32.sub (local.get $depth) (i32.const 1)))
                {more})
            (func (export \"run\") (param $depth i32) (result i64) {locals}
                (call $deep (local.get $depth))
                {check}
                (i64.const -1)))"
    )
}

fn results(bench: &Bench<'_>, kinds: &[Kind]) -> Result<String, String> {
    let mut program = bench.load(&returning(kinds))?;
    let (depth, mut stack) = (bench.depth(1000, 150), program.stack()?);
    for depth in [0, depth, 1, depth] {
        program.expect_on(&mut stack, "run", &[depth], -1)?;
    }
    let growths = stack.stats().growths;
    holds(growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{} results, depth {depth}, {growths} growths", kinds.len()))
}

/// `pass` hands its parameters on by a call and by `call_indirect` in turn, and returns the last ones with `extra` before them.
fn many(kinds: &[Kind], extra: &str) -> String {
    let list = types(kinds);
    let gets: String = (0..kinds.len()).map(|at| format!("(local.get {})", at + 1)).collect();
    format!(
        "(type $t (func (param i32 {list}) (result i32 {list})))
        (type $b (func (result i32 {list})))
        (table funcref (elem $pass))
        (func $pass (export \"pass\") (type $t)
            (if (type $b) (i32.eqz (local.get 0))
                (then (i32.const 77) {gets})
                (else (if (type $b) (i32.and (local.get 0) (i32.const 1))
                    (then (call $pass (i32.sub (local.get 0) (i32.const 1)) {gets}))
                    (else (call_indirect (type $t) (i32.sub (local.get 0) (i32.const 1)) {gets} (i32.const 0)))))))
        {extra}"
    )
}

/// Parameters besides the depth, and results besides one more: 1,000 in all, the most that WebAssembly allows.
const MOST: usize = 999;

fn sample(kind: Kind, at: usize) -> Value {
    match kind.0 {
        "i32" => Value { ty: ValType::I32, bits: at as u64 * 3 + 1 },
        "i64" => Value { ty: ValType::I64, bits: (at as u64 * 7) << 32 | 1 },
        "f32" => Value { ty: ValType::F32, bits: u64::from((at as f32 + 0.5).to_bits()) },
        _ => Value { ty: ValType::F64, bits: (at as f64 + 0.25).to_bits() },
    }
}

fn maximum(bench: &Bench<'_>) -> Result<String, String> {
    let kinds: Vec<_> = in_turn(&KINDS[..4], 250).into_iter().take(MOST).collect();
    let mut program = bench.load(&format!("(module {})", many(&kinds, "")))?;
    let samples: Vec<_> = kinds.iter().enumerate().map(|(at, kind)| sample(*kind, at)).collect();
    let mut growths = 0;
    for depth in [0, 1, 2, 20] {
        let args: Vec<_> = std::iter::once(i32(depth)).chain(samples.iter().copied()).collect();
        let expected: Vec<_> = std::iter::once(i32(77)).chain(samples.iter().copied()).collect();
        let (result, stats) = program.call("pass", &args)?;
        let values = result.map_err(|error| format!("depth {depth}: {error}"))?;
        let wrong = values.iter().zip(&expected).position(|(is, must)| is != must);
        holds(wrong.is_none() && values.len() == expected.len(), || {
            format!("depth {depth}: result {wrong:?} is wrong")
        })?;
        growths += stats.growths;
    }
    holds(growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{} parameters and results, {growths} growths", MOST + 1))
}

fn maximum_vectors(bench: &Bench<'_>) -> Result<String, String> {
    // Vectors take the compiler and an emulated CPU longer.
    let count = if bench.every > 1 { 99 } else { MOST };
    let kinds = vec![KINDS[4]; count];
    let all: String = (0..count).map(|at| KINDS[4].number(5 * at as i32 + 1)).collect();
    let mut check = String::new();
    for at in (0..count).rev() {
        let differ = KINDS[4].differ("(local.get $v)", &KINDS[4].number(5 * at as i32 + 1));
        write!(check, "(local.set $v) (if {differ} (then (return (i64.const {at}))))").unwrap();
    }
    let run = format!(
        "(func (export \"run\") (param $depth i32) (result i64) (local $v v128)
            (call $pass (local.get $depth) {all})
            {check}
            (if (i32.ne (i32.const 77)) (then (return (i64.const -2))))
            (i64.const -1))"
    );
    let mut program: Program<'_> = bench.load(&format!("(module {})", many(&kinds, &run)))?;
    let mut growths = 0;
    for depth in [0, 20] {
        growths += program.expect("run", &[depth], -1)?.growths;
    }
    holds(growths > 0, || "the stack did not grow".to_owned())?;
    Ok(format!("{count} vectors and results, {growths} growths"))
}
