//! Random programs over continuations against a model, and what is left of them. A test program of its own: it counts the process's stacks.
#![cfg(any(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")), target_os = "macos"))]

#[path = "continuation/programs.rs"]
mod programs;

use cfi_stack::{continuation, pool};

/// The variable's number, or the other one.
fn number(name: &str, other: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(other)
}

#[test]
fn programs_do_what_the_model_says() {
    // ci/test sets it for emulated machines; without it, a million verbs and more.
    let rounds = number("QUICKCHECK_TESTS", 5_000) as usize;
    let seed = number("CFI_STACK_SEED", std::process::id().into());
    let counts = programs::run(seed, 4, rounds * 60);
    eprintln!("seed {seed}: {counts:?}");
    assert_eq!(counts.operations, 4 * 60 * rounds as u64);
    let left = continuation::leaks().unwrap();
    assert!(left.is_empty(), "seed {seed}: {left:?}");
    let pools = pool::stats();
    let leased: usize = pools.classes.iter().map(|class| class.leased).sum();
    assert_eq!(leased, 0, "seed {seed}: {pools:?}");
}
