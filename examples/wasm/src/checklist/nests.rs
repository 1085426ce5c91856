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
    ("nest/growth-after-return", growth_after_return),
    ("nest/trap-in-the-innermost", trap_in_the_innermost),
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

/// The same; whatever becomes of the call, a second function is called before this one ends.
fn finally(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    let outcome = caller.call(args[0], &args[1..2]);
    let (_, stats) = caller.call(args[2], &args[3..])?;
    GROWTHS.with_borrow_mut(|growths| growths.push(stats.growths));
    results.copy_from_slice(&outcome?.0);
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
