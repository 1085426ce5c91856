//! Coroutines within coroutines, and the backtrace from the innermost one: through whoever has resumed it, down to `main`.
//!
//! ```text
//! cargo run --release --example nested
//! ```
//! A debugger sees the same (`ci/debuggers`): `break nested::stop_here`, `run`, `backtrace`.

use cfi_stack::coroutine::{Coroutine, CoroutineResult, Yielder};
use std::backtrace::Backtrace;
use std::hint::black_box;

/// Shows who has called whom. A place for a breakpoint.
#[inline(never)]
fn stop_here(what: &str) -> usize {
    let all = Backtrace::force_capture().to_string();
    let here = all.lines().filter(|line| line.contains("nested::")).map(|line| line.trim_start());
    println!("{what}\n    {}", here.collect::<Vec<_>>().join("\n    "));
    all.len()
}

#[inline(never)]
fn innermost(yielder: &Yielder<usize, usize>, first: usize) -> usize {
    let passed = stop_here("resumed by first_resumer");
    let second = yielder.suspend(first + passed);
    black_box(second + stop_here("resumed by second_resumer"))
}

/// Passes everything between a coroutine of its own and its resumer.
#[inline(never)]
fn middle(yielder: &Yielder<usize, usize>, first: usize) -> usize {
    let mut inner = Coroutine::new(innermost);
    let mut word = first;
    loop {
        match inner.resume(word) {
            CoroutineResult::Yield(passed) => word = yielder.suspend(passed),
            CoroutineResult::Return(last) => return last,
        }
    }
}

#[inline(never)]
fn outer(yielder: &Yielder<usize, usize>, first: usize) -> usize {
    let mut inner = Coroutine::new(middle);
    let mut word = first;
    while let CoroutineResult::Yield(passed) = inner.resume(word) {
        word = yielder.suspend(passed) + 1;
    }
    word
}

type Outer = Coroutine<usize, usize, usize>;

#[inline(never)]
fn first_resumer(outer: &mut Outer) -> bool {
    black_box(outer.resume(1).as_yield().is_some())
}

#[inline(never)]
fn second_resumer(outer: &mut Outer) -> bool {
    black_box(outer.resume(2).as_return().is_some())
}

fn main() {
    let mut outer = Coroutine::new(outer);
    assert!(first_resumer(&mut outer));
    assert!(second_resumer(&mut outer));
}
