//! Exceptions in flight while stacks grow.

use super::values::{KINDS, types};
use super::watch::watched;
use super::{Bench, Item, holds};
use crate::error::Error;
use crate::trap::Trap;

pub const ITEMS: &[Item] = &[
    ("exception/through-grown-frames", |bench| run(bench, "through", "nothing grows after the throw")),
    ("exception/growth-in-flight", |bench| run(bench, "flight", "the handler grows the stack and throws again")),
    ("exception/handler-at-each-depth", |bench| run(bench, "handlers", "each frame catches and throws again")),
    ("exception/through-native-frames", |bench| run(bench, "native", "native code between")),
    ("exception/growth-in-native-frames", |bench| {
        run(bench, "finally", "native code calls what grows before it goes on")
    }),
    ("exception/tail-call", |bench| run(bench, "tail", "thrown by a tail callee")),
    ("exception/through-tail-frames", |bench| {
        run(bench, "tail-handlers", "frames that own their arguments catch and throw again")
    }),
    ("exception/uncaught", uncaught),
];

/// Every function takes a depth and returns −1 when the exception came back whole: one value of each kind. With `tails` the module makes
/// tail calls, which changes the frames of all its functions.
fn text(tails: bool) -> String {
    let list = types(&KINDS);
    let carried: String = KINDS.iter().map(|kind| kind.of("(local.get $depth)")).collect();
    let locals: String = KINDS.iter().enumerate().map(|(at, kind)| format!("(local $r{at} {})", kind.0)).collect();
    let mut check = String::new();
    for (at, kind) in KINDS.iter().enumerate().rev() {
        let differ = kind.differ(&format!("(local.get $r{at})"), &kind.of("(local.get $depth)"));
        check.push_str(&format!("(local.set $r{at}) (if {differ} (then (return (i64.const {at}))))"));
    }
    let (tail, handlers) = match tails {
        true => ("return_call", "tail-handlers"),
        false => ("call", "handlers"),
    };
    // More than registers hold.
    let (padding, pads) = ("(param i64)".repeat(9), "(i64.const 5)".repeat(9));
    let functions: String = [
        ("through", "(drop (call $deep (local.get $depth) (local.get $depth)))"),
        ("flight", "(drop (call $holds (local.get $depth)))"),
        (handlers, "(drop (call $relay (local.get $depth) (local.get $depth) PADS))"),
        ("native", "(drop (call $again (ref.func $thrower) (local.get $depth)))"),
        ("finally", "(drop (call $finally (ref.func $thrower) (local.get $depth) (ref.func $count) (i32.const 600)))"),
        ("tail", "(drop (call $tail (local.get $depth) (f64.const 1)))"),
    ]
    .iter()
    .map(|(name, body)| function(name, &body.replace("PADS", &pads), &locals, &list, &check))
    .collect();
    format!(
        r#"(module
            (import "native" "again" (func $again (param funcref i32) (result i64)))
            (import "native" "finally" (func $finally (param funcref i32 funcref i32) (result i64)))
            (elem declare func $thrower $count)
            (tag $it (param {list}))
            (tag $other (param i64))
            (func $throw (param $depth i32) {carried} (throw $it))
            (func $deep (param $left i32) (param $depth i32) (result i32)
                (if (i32.eqz (local.get $left)) (then (call $throw (local.get $depth))))
                (i32.add (i32.const 1) (call $deep (i32.sub (local.get $left) (i32.const 1)) (local.get $depth))))
            (func $count (export "count") (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1) (call $count (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i64.const 0))))
            (func $holds (param $depth i32) (result i32) (local $held exnref)
                (block $caught (result exnref)
                    (try_table (catch_all_ref $caught) (drop (call $deep (local.get $depth) (local.get $depth))))
                    (return (i32.const 0)))
                (local.set $held)
                (if (i64.ne (call $count (i32.mul (local.get $depth) (i32.const 8)))
                        (i64.extend_i32_s (i32.mul (local.get $depth) (i32.const 8))))
                    (then (return (i32.const 1))))
                (throw_ref (local.get $held)))
            (func $relay (param $left i32) (param $depth i32) {padding} (result i32)
                (if (i32.eqz (local.get $left)) (then (call $throw (local.get $depth))))
                (block $caught (result exnref)
                    (try_table (catch_all_ref $caught)
                        (drop (call $relay (i32.sub (local.get $left) (i32.const 1)) (local.get $depth) {pads})))
                    (return (i32.const 0)))
                throw_ref)
            (func $thrower (export "thrower") (param $depth i32) (result i64)
                (i64.extend_i32_s (call $deep (local.get $depth) (local.get $depth))))
            (func $tail (param $depth i32) (param f64) (result i32)
                ({tail} $deep (local.get $depth) (local.get $depth)))
            {functions})"#
    )
}

/// A function that catches what `body` throws and compares it.
fn function(name: &str, body: &str, locals: &str, list: &str, check: &str) -> String {
    format!(
        "(func (export \"{name}\") (param $depth i32) (result i64) {locals}
            (block $wrong (result i64)
                (block $caught (result {list})
                    (try_table (catch $other $wrong) (catch $it $caught) {body})
                    (return (i64.const -3)))
                {check}
                (return (i64.const -1))))"
    )
}

fn run(bench: &Bench<'_>, name: &str, how: &str) -> Result<String, String> {
    let tails = name.starts_with("tail");
    let mut program = bench.load(&text(tails))?;
    holds(!tails || program.store.largest_argument_area() > 0, || "no frame owns its arguments".to_owned())?;
    let mut stack = program.stack()?;
    let depths = [0, 1, bench.depth(300, 60), 2];
    let seen = watched(|| depths.iter().try_for_each(|depth| program.expect_on(&mut stack, name, &[*depth], -1)))?;
    let growths = seen.growths;
    holds(growths > 0, || "no stack grew".to_owned())?;
    Ok(format!("{how}; depths {depths:?}, {growths} growths"))
}

fn uncaught(bench: &Bench<'_>) -> Result<String, String> {
    let mut program = bench.load(&text(false))?;
    let mut stack = program.stack()?;
    for round in 0..3 {
        match program.call_on(&mut stack, "thrower", &[super::i32(bench.depth(300, 60))])? {
            Err(Error::Trap(Trap::UncaughtException)) => {}
            other => return Err(format!("round {round}: {other:?}, not the trap")),
        }
        program.expect_on(&mut stack, "count", &[200], 200)?;
    }
    Ok("3 times, each followed by a call on the same stack".to_owned())
}
