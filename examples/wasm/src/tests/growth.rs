//! What must survive when frames move: big frames, values in registers, parameters and results off the stack.

use super::{call, configurations, i32, single};
use crate::checklist::{locals, locals_result};
use crate::error::Error;
use crate::types::{ValType, Value};
use std::fmt::Write;

fn i64(value: i64) -> Value {
    Value { ty: ValType::I64, bits: value as u64 }
}

#[test]
fn frames_of_every_size_grow_the_stack_in_time() {
    for (at, config) in configurations().enumerate() {
        // Thousands of locals take the compiler long: once is enough.
        let largest = if at == 0 { 8000 } else { 1500 };
        for count in [1, 60, 70, 600, largest] {
            let depth = 3;
            let outcome = call(config, &locals(count), "big", &[i64(depth)]);
            assert_eq!(single(&outcome), locals_result(count, depth) as u64, "{count} locals");
            assert_eq!(outcome.stats.growths > 0, count > 100 || config.policy.relocate_always, "{count} locals");
        }
    }
}

#[test]
fn a_frame_larger_than_what_is_left_or_than_the_maximum_overflows() {
    for mut config in configurations() {
        // At the first call.
        config.policy.maximum = 4096;
        let outcome = call(config, &locals(600), "big", &[i64(0)]);
        assert!(matches!(outcome.result, Err(Error::Exhausted(_))), "{:?}", outcome.result);
        // Two such frames fit, four do not.
        config.policy.maximum = 16 << 10;
        let outcome = call(config, &locals(600), "big", &[i64(1)]);
        single(&outcome);
        let outcome = call(config, &locals(600), "big", &[i64(3)]);
        assert!(matches!(outcome.result, Err(Error::Exhausted(_))), "{:?}", outcome.result);
    }
}

const TYPES: [(&str, ValType); 4] =
    [("i32", ValType::I32), ("f64", ValType::F64), ("i64", ValType::I64), ("f32", ValType::F32)];

/// A value of the parameter's type that differs from its neighbours'.
fn sample(at: usize) -> Value {
    let ty = TYPES[at % 4].1;
    let bits = match ty {
        ValType::I32 => at as u64 * 3 + 1,
        ValType::I64 => (at as u64 * 7) << 32 | 1,
        ValType::F32 => u64::from((at as f32 + 0.5).to_bits()),
        _ => (at as f64 + 0.25).to_bits(),
    };
    Value { ty, bits }
}

/// `rotate` passes its parameters on `depth` times, by a call and by `call_indirect` in turn, and returns them.
fn many(count: usize) -> String {
    let types: Vec<_> = (0..count).map(|at| TYPES[at % 4].0).collect();
    let list = types.join(" ");
    let gets: String = (0..count).map(|at| format!("(local.get {})", at + 1)).collect();
    format!(
        r#"(module
            (type $t (func (param i32 {list}) (result {list})))
            (table funcref (elem $pass))
            (func $pass (export "pass") (type $t)
                (if (type $b) (i32.eqz (local.get 0))
                    (then {gets})
                    (else (if (type $b) (i32.and (local.get 0) (i32.const 1))
                        (then (call $pass (i32.sub (local.get 0) (i32.const 1)) {gets}))
                        (else (call_indirect (type $t) (i32.sub (local.get 0) (i32.const 1)) {gets} (i32.const 0)))))))
            (type $b (func (result {list}))))"#
    )
}

#[test]
fn parameters_and_results_beyond_registers_survive_growth() {
    for config in configurations() {
        for count in [1, 2, 5, 11, 12, 13, 40, 200, 999] {
            let samples: Vec<_> = (0..count).map(sample).collect();
            for depth in [0, 20] {
                let mut args = vec![i32(depth)];
                args.extend(&samples);
                let outcome = call(config, &many(count), "pass", &args);
                assert_eq!(outcome.result.expect("values"), samples, "{count} parameters, depth {depth}");
                assert!(outcome.stats.growths > 0 || count < 200 || depth == 0);
            }
        }
    }
}

#[test]
fn callee_saved_registers_and_spills_survive_growth() {
    // More integers and floats live across the recursion than there are registers.
    let live = 40;
    let mut text = String::from(r#"(module (func $deep (export "deep") (param $n i64) (result i64)"#);
    for i in 0..live {
        write!(text, "(local $i{i} i64)(local $f{i} f64)").unwrap();
    }
    text.push_str("(if (i64.eqz (local.get $n)) (then (return (i64.const 0))))");
    for i in 0..live {
        write!(text, "(local.set $i{i} (i64.mul (local.get $n) (i64.const {i})))").unwrap();
        write!(text, "(local.set $f{i} (f64.convert_i64_s (local.get $i{i})))").unwrap();
    }
    text.push_str("(local.set $n (call $deep (i64.sub (local.get $n) (i64.const 1))))");
    for i in 0..live {
        write!(
            text,
            "(local.set $n (i64.add (local.get $n) (i64.add (local.get $i{i}) (i64.trunc_f64_s (local.get $f{i})))))"
        )
        .unwrap();
    }
    text.push_str("(local.get $n)))");
    for config in configurations() {
        let depth = 100;
        let outcome = call(config, &text, "deep", &[i64(depth)]);
        let per_level: i64 = (0..live).map(|i| 2 * i).sum();
        assert_eq!(single(&outcome), (depth * (depth + 1) / 2 * per_level) as u64);
        assert!(outcome.stats.growths > 1);
    }
}

#[test]
fn imports_run_on_the_threads_own_stack() {
    let text = r#"(module
        (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
        (import "spectest" "print_f64_f64" (func $print (param f64 f64)))
        (memory (export "memory") 1)
        (data (i32.const 0) "\10\00\00\00\01\00\00\00")
        (func $say (export "say") (param $n i32) (result i32)
            (i32.store8 (i32.const 16) (i32.add (i32.const 97) (i32.rem_u (local.get $n) (i32.const 26))))
            (call $print (f64.const 1) (f64.const 2))
            (if (result i32) (local.get $n)
                (then
                    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
                    (i32.add (memory.grow (i32.const 0)) (call $say (i32.sub (local.get $n) (i32.const 1)))))
                (else (i32.const 0)))))"#;
    for config in configurations() {
        let outcome = call(config, text, "say", &[i32(300)]);
        assert_eq!(single(&outcome), 300);
        let expected: String = (1..=300u32).rev().map(|n| char::from(b'a' + (n % 26) as u8)).collect();
        assert_eq!(outcome.output, expected);
        assert!(outcome.stats.growths > 0);
    }
}

#[test]
fn a_program_can_end_itself_from_any_depth() {
    let text = r#"(module
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (func $deep (export "deep") (param i32) (result i32)
            (if (i32.eqz (local.get 0)) (then (call $exit (i32.const 7))))
            (i32.add (i32.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1))))))"#;
    for config in configurations() {
        let outcome = call(config, text, "deep", &[i32(500)]);
        assert!(matches!(outcome.result, Err(Error::Exit(7))), "{:?}", outcome.result);
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let config = configurations().next().expect("one");
    for (text, what) in [
        (r#"(module (global v128 (v128.const i64x2 0 0)) (func (export "f")))"#, "v128"),
        (r#"(module (func (export "f") (drop (i8x16.popcnt (v128.const i64x2 0 0)))))"#, "I8x16Popcnt"),
        (r#"(module (memory i64 1) (func (export "f")))"#, "64-bit"),
        (r#"(module (type (struct)) (func (export "f")))"#, "structs"),
    ] {
        match call(config, text, "f", &[]).result {
            Err(Error::Unsupported(text)) => assert!(text.contains(what), "{text}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    let text = r#"(module (import "env" "missing" (func)) (func (export "f")))"#;
    assert!(matches!(call(config, text, "f", &[]).result, Err(Error::Link(_))));
    let text = r#"(module (import "spectest" "print_i32" (func (param i64))) (func (export "f")))"#;
    assert!(matches!(call(config, text, "f", &[]).result, Err(Error::Link(_))));
}
