//! Memory that runs out at every step, again and again: typed errors, and nothing stays mapped, leased or counted.
//!
//! A program of its own with one test: it counts the mappings and the memory of the whole process.
#![cfg(all(feature = "steps", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use cfi_stack::Error;
use cfi_stack::pool::{self, Lease, Quota};

/// Emulated CPUs go through fewer rounds (ci/test says so with this variable).
fn rounds() -> usize {
    if std::env::var_os("QUICKCHECK_TESTS").is_some() { 2_000 } else { 100_000 }
}

/// Mappings, and resident pages.
fn footprint() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    (maps, statm.split(' ').nth(1).unwrap().parse().unwrap())
}

/// Runs `body` with every call of the system failing from the `n`th on.
fn failing_from<T>(n: usize, body: impl FnOnce() -> T) -> T {
    pool::fail_calls_from(Some(n));
    let result = body();
    pool::fail_calls_from(None);
    result
}

fn leased() -> usize {
    pool::stats().classes.iter().map(|class| class.leased).sum()
}

/// More calls than any lease makes.
const CALLS: usize = 24;

#[test]
fn nothing_stays_of_what_failed() {
    let quota = Quota::new(usize::MAX, usize::MAX);
    let mut area = vec![0_u128; 1024];
    let area = area.as_mut_ptr_range();
    let (base, top) = (area.start.expose_provenance(), area.end.addr());
    let memory = |result: &Result<Lease, Error>| matches!(result, Err(Error::Memory { .. }));

    // The directory's first page and the slots' first memory stay for good, and are there after this.
    drop(pool::lease_for(&quota, 1 << 21).unwrap());
    pool::trim();
    let chunks = || pool::stats().classes.iter().map(|class| class.chunks).sum::<usize>();
    let (mut before, chunks_before) = ((0, 0), chunks());
    let rounds = rounds();
    for round in 0..rounds {
        if round == rounds / 10 {
            before = footprint();
        }
        let n = round / 4;
        match round % 4 {
            // A chunk of many stacks never comes to be.
            0 => assert!(memory(&failing_from(n % 2, || pool::lease_for(&quota, 8192)))),
            1 => assert!(memory(&failing_from(n % 2, || pool::lease_small_for(&quota, 512)))),
            // One of a single stack may, and cannot always be given up.
            2 => failing_from(n % CALLS, || {
                let result = pool::lease_for(&quota, 1 << 22);
                assert!(result.is_ok() || memory(&result));
                drop(result);
                pool::trim();
            }),
            _ => failing_from(n % CALLS, || {
                // SAFETY: the area is nobody else's.
                let result = unsafe { pool::bare_for(&quota, base, top) };
                assert!(result.is_ok() || memory(&result));
                drop(result);
                pool::trim();
            }),
        }
        pool::trim();
        assert_eq!((quota.stacks(), quota.bytes()), (0, 0));
    }
    assert_eq!((leased(), chunks()), (0, chunks_before));
    let after = footprint();
    // Neighbours that the system has merged since count as one.
    assert!(after.0 <= before.0, "{before:?} {after:?} mappings");
    assert!(after.1 <= before.1 + 256, "{before:?} {after:?} resident pages");

    // Every class, at every call of its way: then it works.
    for shift in 9..=21 {
        let lease =
            || if shift < 12 { pool::lease_small_for(&quota, 1 << shift) } else { pool::lease_for(&quota, 1 << shift) };
        let mut n = 0;
        let lease = loop {
            match failing_from(n, lease) {
                Ok(lease) => break lease,
                Err(error) => assert!(matches!(error, Error::Memory { .. }) && n < 100, "{error}"),
            }
            assert_eq!((leased(), quota.stacks()), (0, 0));
            n += 1;
        };
        assert_eq!(quota.stacks(), 1);
        // SAFETY: the word is the lease's.
        unsafe { std::ptr::with_exposed_provenance_mut::<u64>(lease.top() - 8).write_volatile(1) };
    }
    assert_eq!((leased(), quota.bytes()), (0, 0));
}
