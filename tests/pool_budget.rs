//! The process-wide budget. A program of its own with one test: the budget is the whole process's.
#![cfg(all(any(target_os = "linux", target_os = "macos"), any(target_arch = "x86_64", target_arch = "aarch64")))]

use cfi_stack::Error;
use cfi_stack::pool::{self, Quota};

const SIZE: usize = 64 << 10;

#[test]
fn leases_count_from_the_moment_there_is_a_budget() {
    let early: Vec<_> = (0..3).map(|_| pool::lease(SIZE).unwrap()).collect();
    let one = pool::stats().leased_bytes / 3;
    assert!((SIZE..2 * SIZE).contains(&one));
    assert_eq!(pool::stats().counted_bytes, 0);

    pool::set_budget(5 * one + one / 2);
    assert_eq!(pool::stats().counted_bytes, 3 * one);
    let quota = Quota::new(10, usize::MAX);
    let late = [pool::lease_for(&quota, SIZE).unwrap(), pool::lease(SIZE).unwrap()];
    assert_eq!(pool::lease_for(&quota, SIZE).unwrap_err(), Error::Budget { needed: one, left: one / 2 });
    assert_eq!(quota.stacks(), 1);
    assert!(matches!(pool::lease(1 << 30), Err(Error::Budget { .. })));
    let small = pool::lease_small(512).unwrap();
    assert!(pool::stats().counted_bytes > 5 * one);

    // It counts on whatever thread the stack is dropped, and each stack once.
    drop(small);
    std::thread::spawn(move || drop(early)).join().unwrap();
    assert_eq!(pool::stats().counted_bytes, 2 * one);
    pool::set_budget(0);
    let mut ran = false;
    assert!(matches!(cfi_stack::ensure(1 << 30, || ran = true), Err(Error::Budget { .. })));
    assert!(!ran, "what was to run on a further stack has not run");
    assert!(matches!(pool::lease(1), Err(Error::Budget { left: 0, .. })));
    drop(late);
    assert_eq!((pool::stats().counted_bytes, quota.stacks()), (0, 0));

    // None again: what was counted is given back once, what is leased now is not counted.
    pool::set_budget(4 * one);
    let counted = pool::lease(SIZE).unwrap();
    pool::set_budget(usize::MAX);
    let free = pool::lease(SIZE).unwrap();
    drop((counted, free));
    assert_eq!(pool::stats().counted_bytes, 0);

    // Leases and drops on many threads while budgets come and go: in the end nothing is counted.
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                for _ in 0..2_000 {
                    drop(pool::lease(SIZE));
                }
            })
        })
        .collect();
    for round in 0..200 {
        pool::set_budget(if round % 2 == 0 { 1 << 40 } else { usize::MAX });
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    pool::set_budget(1 << 40);
    let all: Vec<_> = (0..300).map(|_| pool::lease(SIZE).unwrap()).collect();
    assert_eq!(pool::stats().counted_bytes, 300 * one);
    drop(all);
    assert_eq!(pool::stats().counted_bytes, 0);

    // A guard that cost a mapping is counted no more when that goes: stacks with mappings of their own.
    pool::set_budget(usize::MAX);
    let before = pool::stats().guard_mappings;
    for _ in 0..3 {
        let large: Vec<_> = (0..10).map(|_| pool::lease(2 << 20).unwrap()).collect();
        let guards = pool::stats().guard_mappings;
        assert!(if pool::stats().cheap_guards { guards == before } else { guards >= before + 10 }, "{guards}");
        drop(large);
        pool::trim();
        assert_eq!(pool::stats().guard_mappings, before);
    }
}
