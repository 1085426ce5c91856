//! Random programs over continuations against a model, memory that runs out, and what is left of them. A test program of its own: it counts the
//! process's stacks, and its tests take turns.
#![cfg(any(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")), target_os = "macos"))]

#[path = "continuation/programs.rs"]
mod programs;

use cfi_stack::continuation::{self, Cont, Frames, Outcome, Shape};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, pool};
use std::sync::{Mutex, MutexGuard, PoisonError};

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The variable's number, or the other one.
fn number(name: &str, other: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(other)
}

fn nothing_is_left(what: &str) {
    let left = continuation::leaks().unwrap();
    assert!(left.is_empty(), "{what}: {left:?}");
    let pools = pool::stats();
    let leased: usize = pools.classes.iter().map(|class| class.leased).sum();
    assert_eq!(leased, 0, "{what}: {pools:?}");
}

#[test]
fn programs_do_what_the_model_says() {
    let _turn = turn();
    // ci/test sets it for emulated machines; without it, a million verbs and more.
    let rounds = number("QUICKCHECK_TESTS", 5_000) as usize;
    let seed = number("CFI_STACK_SEED", std::process::id().into());
    let counts = programs::run(seed, 4, rounds * 60);
    eprintln!("seed {seed}: {counts:?}");
    assert_eq!(counts.operations, 4 * 60 * rounds as u64);
    nothing_is_left(&format!("seed {seed}"));
}

unsafe extern "C-unwind" fn adds(data: usize, values: *mut u64, count: usize) -> usize {
    assert_eq!(count, 1);
    // SAFETY: one parameter, one result.
    unsafe { *values += data as u64 };
    0
}

const SHAPE: Shape = Shape { size: 64 << 10, params: 1, results: 1, may_migrate: false };

fn new(shape: Shape) -> Result<Cont, Error> {
    let thread = Thread::attach()?;
    // SAFETY: the function keeps to its counts.
    unsafe { continuation::new(&thread, adds, 3, shape) }
}

fn finishes(cont: Cont) {
    let mut values = [0];
    assert_eq!(continuation::resume(cont, &[], &[4], &mut values), Ok(Outcome::Returned { count: 1 }));
    assert_eq!(values, [7]);
}

#[test]
#[cfg(feature = "steps")]
fn memory_that_runs_out_at_every_call() {
    let _turn = turn();
    let mut refusals = 0;
    for size in [4096, 64 << 10, 2 << 20] {
        let mut held = Vec::new();
        // So many that the pools and the table grow more than once.
        for _ in 0..150 {
            let shape = Shape { size, ..SHAPE };
            let mut calls = 0;
            let cont = loop {
                pool::fail_calls_from(Some(calls));
                let made = new(shape);
                pool::fail_calls_from(None);
                match made {
                    Ok(cont) => break cont,
                    Err(Error::Memory { .. }) => refusals += 1,
                    Err(error) => panic!("{error}"),
                }
                calls += 1;
                assert!(calls < 100, "it never succeeds");
            };
            held.push(cont);
        }
        let listed = continuation::leaks().unwrap().len();
        assert_eq!(listed, held.len(), "one for each that was made");
        // Nothing that follows needs memory of the system.
        pool::fail_calls_from(Some(0));
        for (index, cont) in held.into_iter().enumerate() {
            match index % 3 {
                0 => finishes(cont),
                // SAFETY: it never ran.
                1 => unsafe { continuation::cancel(cont, Frames::Unwind) }.unwrap(),
                _ => {
                    let bound = continuation::bind(cont, &[4]).unwrap();
                    let mut values = [0];
                    continuation::resume(bound, &[], &[], &mut values).unwrap();
                    assert_eq!(values, [7]);
                }
            }
        }
        pool::fail_calls_from(None);
        nothing_is_left("failures");
    }
    assert!(refusals > 10, "{refusals}");
}

#[test]
fn quotas_and_the_budget() {
    let _turn = turn();
    let thread = Thread::attach().unwrap();
    let quota = pool::Quota::new(2, 1 << 20);
    // SAFETY: the function keeps to its counts.
    let new_for = || unsafe { continuation::new_for(&quota, &thread, adds, 3, SHAPE) };
    let (one, other) = (new_for().unwrap(), new_for().unwrap());
    assert!(matches!(new_for(), Err(Error::Quota { .. })));
    finishes(one);
    let third = new_for().unwrap();
    assert!(matches!(new_for(), Err(Error::Quota { .. })));
    // SAFETY: it never ran.
    unsafe { continuation::cancel(other, Frames::Skip) }.unwrap();
    finishes(third);
    assert_eq!((quota.stacks(), quota.bytes()), (0, 0));
    pool::set_budget(300 << 10);
    let mut held = Vec::new();
    let refused = loop {
        match new(SHAPE) {
            Ok(cont) => held.push(cont),
            Err(error) => break error,
        }
    };
    pool::set_budget(usize::MAX);
    assert!(matches!(refused, Error::Budget { .. }), "{refused}");
    assert!(!held.is_empty() && held.len() <= 4, "{}", held.len());
    held.into_iter().for_each(finishes);
    nothing_is_left("budget");
}
