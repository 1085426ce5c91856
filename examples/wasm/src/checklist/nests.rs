//! Native code between managed code: imports that call the program back, each time on a stack that grows.

use super::{Bench, Item, holds};
use crate::error::Error;
use crate::host::{Caller, Failure, HostFunction};
use crate::library::Entry;
use crate::trap::Trap;
use crate::types::{FuncType, Heap, ValType};
use std::cell::RefCell;

pub const ITEMS: &[Item] = &[
    ("nest/growth-at-each-level", growth_at_each_level),
    ("nest/growth-on-one-stack", growth_on_one_stack),
    ("nest/growth-after-return", growth_after_return),
    ("nest/trap-in-the-innermost", trap_in_the_innermost),
    ("nest/backtrace", backtrace),
    ("nest/backtrace-at-each-depth", backtrace_at_each_depth),
];

thread_local! {
    /// Growths of the stacks that native code made, in the order of their ends.
    static GROWTHS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// What the modules import from `native`.
pub fn native(name: &str) -> Option<Entry> {
    const FUNCREF: ValType = ValType::Ref { nullable: true, heap: Heap::Func };
    let (function, params): (HostFunction, &[ValType]) = match name {
        "again" => (again, &[FUNCREF, ValType::I32]),
        "finally" => (finally, &[FUNCREF, ValType::I32, FUNCREF, ValType::I32]),
        "stop" => (stop, &[]),
        "within" => (within, &[FUNCREF, ValType::I32]),
        "compact" => (give_back, &[]),
        _ => return None,
    };
    Some(Entry { function, ty: FuncType { params: params.to_vec(), results: vec![ValType::I64] } })
}

/// Calls a function reference with a number.
fn again(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    let (values, stats) = caller.call(args[0], &args[1..])?;
    GROWTHS.with_borrow_mut(|growths| growths.push(stats.growths));
    results.copy_from_slice(&values);
    Ok(())
}

/// Calls a function reference with a number, on the stack that called.
fn within(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    results.copy_from_slice(&caller.call_within(args[0], &args[1..])?);
    Ok(())
}

/// Whether the stack that called has become smaller.
fn give_back(caller: &Caller<'_>, _: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    results[0] = u64::from(caller.compact()?);
    Ok(())
}

/// The same as `again`; whatever becomes of the call, a second function is called before this one ends.
fn finally(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    let outcome = caller.call(args[0], &args[1..2]);
    let (_, stats) = caller.call(args[2], &args[3..])?;
    GROWTHS.with_borrow_mut(|growths| growths.push(stats.growths));
    results.copy_from_slice(&outcome?.0);
    Ok(())
}

/// Where debuggers stop.
#[inline(never)]
fn stop_here(stops: u64) -> u64 {
    std::hint::black_box(stops) + 1
}

fn stop(_: &Caller<'_>, _: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    results[0] = stop_here(0);
    Ok(())
}

/// `nest(levels)`: goes `deep` calls down, calls native code there, which calls `nest(levels − 1)`, and compares on the way back.
fn text(deep: i32, innermost: &str) -> String {
    format!(
        r#"(module
            (import "native" "again" (func $again (param funcref i32) (result i64)))
            (elem declare func $nest)
            (func $nest (export "nest") (param $level i32) (result i64)
                (if (i32.eqz (local.get $level)) (then {innermost} (return (i64.const 0))))
                (call $down (i32.const {deep}) (local.get $level) (f64.convert_i32_s (local.get $level))))
            (func $down (param $left i32) (param $level i32) (param $same f64) (result i64) (local $below i64)
                (local.set $below
                    (if (result i64) (local.get $left)
                        (then (call $down (i32.sub (local.get $left) (i32.const 1)) (local.get $level) (local.get $same)))
                        (else (call $again (ref.func $nest) (i32.sub (local.get $level) (i32.const 1))))))
                (if (f64.ne (local.get $same) (f64.convert_i32_s (local.get $level))) (then unreachable))
                (i64.add (local.get $below) (i64.const 1)))
            (func $count (param i32) (result i64)
                (if (result i64) (local.get 0)
                    (then (i64.add (i64.const 1) (call $count (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i64.const 0))))
            (func (export "twice") (param $level i32) (result i64)
                (i64.add (i64.add (call $nest (local.get $level)) (call $count (i32.const 600)))
                    (call $nest (local.get $level)))))"#
    )
}

const LEVELS: i32 = 4;

fn growth_at_each_level(bench: &Bench<'_>) -> Result<String, String> {
    let deep = bench.depth(300, 100);
    let mut program = bench.load(&text(deep, ""))?;
    GROWTHS.take();
    let stats = program.expect("nest", &[LEVELS], i64::from(LEVELS) * (i64::from(deep) + 1))?;
    let mut growths = GROWTHS.take();
    growths.push(stats.growths);
    // The first to end is the innermost, which has nothing to do.
    let grown = growths.iter().skip(1).filter(|growths| **growths > 0).count();
    holds(grown == LEVELS as usize, || format!("growths by level, innermost first: {growths:?}"))?;
    Ok(format!("{LEVELS} levels, growths by level, innermost first: {growths:?}"))
}

/// The same where all levels share a stack: each growth moves the frames of all levels, with native frames between that stay.
fn growth_on_one_stack(bench: &Bench<'_>) -> Result<String, String> {
    let deep = bench.depth(300, 40);
    let mut program = bench.load(&text(deep, "").replace("\"again\"", "\"within\""))?;
    let mut stack = program.stack()?;
    let mut growths = vec![];
    for levels in [1, LEVELS, 0, LEVELS + 4] {
        program.expect_on(&mut stack, "nest", &[levels], i64::from(levels) * (i64::from(deep) + 1))?;
        growths.push(stack.stats().growths);
    }
    holds(growths[0] > 0 && growths[1] > growths[0] && growths[3] > growths[2], || format!("growths: {growths:?}"))?;
    let mut program = bench.load(&text(deep, "unreachable").replace("\"again\"", "\"within\""))?;
    match program.call_on(&mut stack, "nest", &[super::i32(LEVELS)])? {
        Err(Error::Trap(Trap::Unreachable)) => {}
        other => return Err(format!("{other:?}, not the trap")),
    }
    Ok(format!("1, {LEVELS}, 0 and {} levels, growths so far: {growths:?}; a trap comes through", LEVELS + 4))
}

fn growth_after_return(bench: &Bench<'_>) -> Result<String, String> {
    // Only what comes after the first nest makes the outer stack grow: it has been left and entered again by then.
    let mut program = bench.load(&text(5, ""))?;
    let stats = program.expect("twice", &[LEVELS], 2 * i64::from(LEVELS) * 6 + 600)?;
    holds(stats.growths > 0, || "the outer stack did not grow".to_owned())?;
    Ok(format!("twice {LEVELS} levels around growth of the outermost: {} growths", stats.growths))
}

fn trap_in_the_innermost(bench: &Bench<'_>) -> Result<String, String> {
    let mut program = bench.load(&text(bench.depth(300, 60), "unreachable"))?;
    let mut stack = program.stack()?;
    for round in 0..2 {
        match program.call_on(&mut stack, "nest", &[super::i32(LEVELS)])? {
            Err(Error::Trap(Trap::Unreachable)) => {}
            other => return Err(format!("round {round}: {other:?}, not the trap")),
        }
    }
    Ok(format!("the trap came through {LEVELS} levels, twice on one stack"))
}

/// Three stops for a debugger, which `ci/debuggers` runs this item in: on a stack that has not grown, on one that has, and
/// on one that has and whose oldest frame was called by native code, called by managed code on another one.
fn backtrace(bench: &Bench<'_>) -> Result<String, String> {
    const LIVE: usize = 30;
    let locals: String = (0..LIVE).map(|at| format!("(local $l{at} i64)")).collect();
    let load = |at: usize| format!("(local.set $l{at} (i64.load offset={} (local.get $left)))", 8 * at);
    let loads: String = (0..LIVE).map(load).collect();
    let sum: String = (0..LIVE).map(|at| format!("(local.get $l{at}) i64.add ")).collect();
    let text = format!(
        r#"(module
            (import "native" "again" (func $again (param funcref i32) (result i64)))
            (import "native" "stop" (func $stop (result i64)))
            (memory 1)
            (elem declare func $at)
            (func $at (export "at") (param $left i32) (result i64) {locals}
                (if (i32.eqz (local.get $left)) (then (return (i64.mul (i64.const 7) (call $stop)))))
                {loads}
                (call $at (i32.sub (local.get $left) (i32.const 1)))
                {sum})
            (func $within (export "within") (param $left i32) (result i64)
                (i64.add (i64.const 1)
                    (if (result i64) (local.get $left)
                        (then (call $within (i32.sub (local.get $left) (i32.const 1))))
                        (else (call $again (ref.func $at) (i32.const 20)))))))"#
    );
    let mut program = bench.load(&text)?;
    let before = program.expect("at", &[2], 7)?.growths;
    let after = program.expect("at", &[20], 7)?.growths;
    program.expect("within", &[5], 13)?;
    holds(after > 0 && (before == 0 || bench.always()), || format!("{before} and {after} growths"))?;
    Ok(format!("3 stops; {before} and {after} growths"))
}

/// A stop for a debugger at each depth of a recursion, which `ci/debuggers` runs this item in: each eighth call goes through native code, back
/// to the same stack, and all frames below move when it grows. They own what they were called with on the stack.
fn backtrace_at_each_depth(bench: &Bench<'_>) -> Result<String, String> {
    const DEPTH: i32 = 40;
    const LIVE: usize = 50;
    let locals: String = (0..LIVE).map(|at| format!("(local $l{at} i64)")).collect();
    let load = |at: usize| format!("(local.set $l{at} (i64.load offset={} (local.get $depth)))", 8 * at);
    let loads: String = (0..LIVE).map(load).collect();
    let sum: String = (0..LIVE).map(|at| format!("(local.get $l{at}) i64.add ")).collect();
    let (more, fives) = ("(param i64)".repeat(9), "(i64.const 5)".repeat(9));
    let text = format!(
        r#"(module
            (import "native" "within" (func $within (param funcref i32) (result i64)))
            (import "native" "stop" (func $stop (result i64)))
            (memory 1)
            (elem declare func $run)
            (func $run (export "run") (param $depth i32) (result i64)
                (return_call $at (local.get $depth) {fives}))
            (func $at (param $depth i32) {more} (result i64) {locals} (local $below i64)
                {loads}
                (local.set $below (call $stop))
                (if (i32.lt_u (local.get $depth) (i32.const {DEPTH})) (then
                    (local.set $depth (i32.add (local.get $depth) (i32.const 1)))
                    (local.set $below (i64.add (local.get $below)
                        (if (result i64) (i32.and (local.get $depth) (i32.const 7))
                            (then (call $at (local.get $depth) {fives}))
                            (else (call $within (ref.func $run) (local.get $depth))))))))
                (local.get $below) {sum}))"#
    );
    let mut program = bench.load(&text)?;
    let stats = program.expect("run", &[0], i64::from(DEPTH) + 1)?;
    holds(stats.growths > 2, || format!("{} growths", stats.growths))?;
    Ok(format!("{} stops, {} growths", DEPTH + 1, stats.growths))
}
