//! Recursion without an end: a typed overflow, and a stack that goes on.

use super::{Bench, Item, holds};
use crate::error::Error;

pub const ITEMS: &[Item] = &[
    ("overflow/direct", |bench| endless(bench, "direct")),
    ("overflow/mutual", |bench| endless(bench, "mutual")),
    ("overflow/call_indirect", |bench| endless(bench, "indirect")),
    ("overflow/call_ref", |bench| endless(bench, "reference")),
    ("overflow/large-frames", |bench| endless(bench, "large")),
    ("overflow/import", |bench| endless(bench, "import")),
];

fn text() -> String {
    let many: String = (0..90).map(|at| format!("(local $l{at} i64)")).collect();
    let set: String = (0..90)
        .map(|at| format!("(local.set $l{at} (i64.load offset={} (i32.wrap_i64 (local.get 0))))", 8 * at))
        .collect();
    let sum: String = (0..90).map(|at| format!("(local.get $l{at}) i64.add ")).collect();
    format!(
        r#"(module
        (import "native" "again" (func $again (param funcref i32) (result i64)))
        (type $t (func (param i64) (result i64)))
        (memory 1)
        (table funcref (elem $indirect))
        (elem declare func $reference $import)
        (func $direct (export "direct") (type $t) (i64.add (local.get 0) (call $direct (i64.add (local.get 0) (i64.const 1)))))
        (func $mutual (export "mutual") (type $t) 
            (i64.add (local.get 0) (call $other (f64.convert_i64_s (local.get 0)) (local.get 0))))
        (func $other (param f64) (param i64) (result i64)
            (i64.add (i64.trunc_sat_f64_s (local.get 0)) (call $mutual (local.get 1))))
        (func $indirect (export "indirect") (type $t)
            (i64.add (local.get 0) (call_indirect (type $t) (i64.const 3) (i32.const 0))))
        (func $reference (export "reference") (type $t)
            (i64.add (local.get 0) (call_ref $t (i64.const 3) (ref.func $reference))))
        (func $large (export "large") (type $t) {many} {set} (call $large (local.get 0)) {sum})
        (func $import (export "callback") (param i32) (result i64)
            (i64.add (i64.extend_i32_s (local.get 0))
                (call $again (ref.func $import) (i32.add (local.get 0) (i32.const 1)))))
        (func (export "import") (type $t) (call $import (i32.const 0)))
        (func $count (export "count") (param i32) (result i64)
            (if (result i64) (local.get 0)
                (then (i64.add (i64.const 1) (call $count (i32.sub (local.get 0) (i32.const 1)))))
                (else (i64.const 0)))))"#
    )
}

fn endless(bench: &Bench<'_>, name: &str) -> Result<String, String> {
    let mut program = bench.load_with(&text(), |config| {
        // Moving everything at every call is quadratic, and so is an emulated CPU's patience.
        config.policy.maximum = if bench.always() { 16 << 10 } else { 256 << 10 };
    })?;
    let maximum = program.store.config.policy.maximum as u64;
    let mut stack = program.stack()?;
    for round in 0..3 {
        let zero = crate::types::Value { ty: crate::types::ValType::I64, bits: 0 };
        match program.call_on(&mut stack, name, &[zero])? {
            Err(Error::Exhausted(cfi_stack::Error::Overflow { .. })) if name != "import" => {}
            Err(Error::Nested(_)) if name == "import" => {}
            Err(error) => return Err(format!("round {round}: {error}, not an overflow")),
            Ok(_) => return Err(format!("round {round}: it returned")),
        }
        let depth = bench.depth(2000, 200);
        program.expect_on(&mut stack, "count", &[depth], depth.into())?;
    }
    let stats = stack.stats();
    holds(name == "import" || stats.largest == maximum, || format!("{} of {maximum} bytes used", stats.largest))?;
    Ok(format!("3 times, each followed by a call on the same stack; {} growths", stats.growths))
}
