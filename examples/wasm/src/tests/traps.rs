//! Traps come back as errors, from a stack that never moved and from one that did.

use super::{call, configurations, i32};
use crate::error::Error;
use crate::trap::Trap;

/// A module whose `run` goes `depth` calls deep and does `what` there.
fn deep(what: &str) -> String {
    format!(
        r#"(module
            (memory 1)
            (table 4 funcref)
            (elem (i32.const 0) $other)
            (type $nothing (func))
            (global $zero (mut i32) (i32.const 0))
            (func $other (param f32))
            (func $what {what})
            (func $run (export "run") (param $depth i32) (result i32)
                (if (result i32) (local.get $depth)
                    (then (i32.add (i32.const 1) (call $run (i32.sub (local.get $depth) (i32.const 1)))))
                    (else (call $what) (i32.const 0)))))"#
    )
}

#[test]
fn every_trap_leaves_from_any_depth() {
    let big = "(f64.const 1e300)";
    let cases: [(&str, Trap); 14] = [
        ("unreachable", Trap::Unreachable),
        ("(drop (i32.load (i32.const 65536)))", Trap::MemoryOutOfBounds),
        ("(drop (i64.load8_u offset=4294967295 (i32.const -1)))", Trap::MemoryOutOfBounds),
        ("(f64.store (i32.const 65529) (f64.const 0))", Trap::MemoryOutOfBounds),
        ("(memory.fill (i32.const 65535) (i32.const 0) (i32.const 2))", Trap::MemoryOutOfBounds),
        ("(drop (i32.div_s (i32.const 1) (global.get $zero)))", Trap::DivisionByZero),
        ("(drop (i64.rem_u (i64.const 1) (i64.extend_i32_u (global.get $zero))))", Trap::DivisionByZero),
        ("(drop (i32.div_s (i32.const 0x80000000) (i32.sub (global.get $zero) (i32.const 1))))", Trap::IntegerOverflow),
        (&format!("(drop (i64.trunc_f64_s {big}))"), Trap::IntegerOverflow),
        ("(drop (i32.trunc_f64_s (f64.const nan)))", Trap::BadConversion),
        ("(call_indirect (type $nothing) (i32.const 4))", Trap::UndefinedElement),
        ("(call_indirect (type $nothing) (i32.const 1))", Trap::UninitializedElement),
        ("(call_indirect (type $nothing) (i32.const 0))", Trap::IndirectCallType),
        ("(drop (table.get (i32.const -1)))", Trap::TableOutOfBounds),
    ];
    for config in configurations() {
        for (what, expected) in cases {
            for depth in [0, 300] {
                let outcome = call(config, &deep(what), "run", &[i32(depth)]);
                match outcome.result {
                    Err(Error::Trap(trap)) => assert_eq!(trap, expected, "{what}"),
                    other => panic!("{what} at {depth}: {other:?}"),
                }
                assert_eq!(outcome.stats.growths > 0, depth > 0 || config.policy.relocate_always, "{what}");
            }
        }
    }
}

#[test]
fn endless_recursion_exhausts_the_stack_and_the_program_goes_on() {
    let text = r#"(module
        (func $endless (export "endless") (param i64 f64) (result i64)
            (i64.add (local.get 0) (call $endless (i64.trunc_f64_s (local.get 1)) (f64.convert_i64_s (local.get 0))))))"#;
    for config in configurations() {
        // Moving everything at every call is quadratic, so its stack is smaller.
        let mut config = config;
        if config.policy.relocate_always {
            config.policy.maximum = 16 << 10;
        }
        let args = [super::i32(0); 2].map(|value| value.bits);
        let args = [
            crate::types::Value { ty: crate::types::ValType::I64, bits: args[0] },
            crate::types::Value { ty: crate::types::ValType::F64, bits: args[1] },
        ];
        let outcome = call(config, text, "endless", &args);
        assert!(matches!(outcome.result, Err(Error::Exhausted(_))), "{:?}", outcome.result);
        assert_eq!(outcome.stats.largest, config.policy.maximum as u64);
    }
}

#[test]
fn a_start_function_that_traps_is_no_instance() {
    for config in configurations() {
        let text = r#"(module (func $start unreachable) (start $start) (func (export "f")))"#;
        let outcome = call(config, text, "f", &[]);
        assert!(matches!(outcome.result, Err(Error::Trap(Trap::Unreachable))));
        let text = r#"(module (memory 1) (data (i32.const 65536) "x") (func (export "f")))"#;
        let outcome = call(config, text, "f", &[]);
        assert!(matches!(outcome.result, Err(Error::Trap(Trap::MemoryOutOfBounds))));
    }
}

#[test]
fn arguments_must_fit() {
    for config in configurations() {
        let text = r#"(module (func (export "f") (param i64)))"#;
        for args in [&[][..], &[i32(1)], &[i32(1), i32(2)]] {
            assert!(matches!(call(config, text, "f", args).result, Err(Error::Usage(_))));
        }
    }
}
