//! Hogs of known size, measured from native code.

use super::report::Table;
use super::*;
use crate::Policy;
use std::arch::naked_asm;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the call itself takes: the return address.
const CALL: usize = if cfg!(target_arch = "x86_64") { 8 } else { 0 };

/// Touches the byte that lies `n` bytes below its stack pointer at entry, if `n` is not 0. Returns `n`.
#[unsafe(naked)]
unsafe extern "C" fn hog(n: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    naked_asm!(
        "endbr64",
        "mov rax, rsp",
        "sub rax, rdi",
        "cmp rax, rsp",
        "je 2f",
        "mov byte ptr [rax], 0x5a",
        "2:",
        "mov rax, rdi",
        "ret"
    );
    #[cfg(target_arch = "aarch64")]
    naked_asm!(
        "hint #34",
        "cbz x0, 2f",
        "mov x9, sp",
        "sub x9, x9, x0",
        "mov w10, #0x5a",
        "strb w10, [x9]",
        "2:",
        "ret"
    );
}

/// The settings are the process's: one test at a time.
fn measuring(sampling: Sampling) -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    forget();
    start(sampling).unwrap();
    one
}

fn usage(site: &'static str) -> Option<Usage> {
    report().sites.into_iter().find(|usage| usage.site == Site::Named(site))
}

fn most(site: &'static str) -> usize {
    usage(site).map_or(0, |usage| usage.most)
}

/// Bytes that a test's stack has below it for sure.
const ROOM: usize = 256 << 10;

#[test]
fn hogs_are_measured_to_the_word() {
    let _one = measuring(Sampling { window: 1 << 20, every: 1 });
    for n in (0..200).chain([4096, 4097, 10_000, 65_535, 65_536, 131_072]) {
        forget();
        // SAFETY: a test's stack has so much room.
        let value = unsafe { measured("hog".into(), ROOM, hog, n) };
        assert_eq!(value, n as u64);
        assert_eq!(most("hog"), n.next_multiple_of(8) + CALL, "{n} bytes");
    }
}

#[test]
fn the_same_depth_twice_is_seen_twice() {
    let _one = measuring(Sampling { window: 1 << 20, every: 1 });
    for n in [100_000, 500, 500, 8, 100_000, 0, 64] {
        forget();
        // SAFETY: as above.
        unsafe { measured("hog".into(), ROOM, hog, n) };
        assert_eq!(most("hog"), n.next_multiple_of(8) + CALL, "{n} bytes");
    }
}

#[test]
fn a_window_that_is_too_small_says_so() {
    let _one = measuring(Sampling { window: 1024, every: 1 });
    for (n, clipped) in [(100, 0), (1024 - CALL - 8, 0), (1024 - CALL, 1)] {
        forget();
        // SAFETY: as above.
        unsafe { measured("hog".into(), ROOM, hog, n) };
        let usage = usage("hog").unwrap();
        assert_eq!(usage.clipped, clipped, "{n} bytes: {usage:?}");
        assert!(usage.most <= 1024);
        assert_eq!(report().is_complete(), clipped == 0);
        assert_eq!(Policy::default().reserve_from(&report(), 0).is_ok(), clipped == 0, "{n} bytes");
    }
}

/// Measures a hog below another measured call, before or after the outer one has touched deeper words.
#[test]
fn calls_within_calls_count_for_both() {
    let _one = measuring(Sampling { window: 1 << 20, every: 1 });
    for (outer, inner) in [(50_000, 100), (100, 50_000), (0, 3000), (20_000, 20_000)] {
        for after in [false, true] {
            forget();
            let hogs = || {
                let touch = || {
                    // SAFETY: as above; the hog's return address is its own.
                    unsafe { hog(outer) };
                };
                if !after {
                    touch();
                }
                // SAFETY: as above.
                unsafe { measured_call("inner", ROOM / 2, || hog(inner)) };
                if after {
                    touch();
                }
            };
            // SAFETY: as above.
            unsafe { measured_call("outer", ROOM, hogs) };
            let larger = outer.max(inner);
            let seen = (most("outer"), most("inner"));
            let what = format!("outer {outer}, inner {inner}, after {after}: {seen:?}");
            assert!(seen.0 >= larger && seen.0 < larger + 4096, "{what}");
            assert!(seen.1 >= inner && seen.1 < inner + 4096, "{what}");
        }
    }
}

#[test]
fn recursion_through_measured_calls() {
    fn recurse(depth: usize) -> usize {
        if depth == 0 {
            // SAFETY: as above.
            return unsafe { hog(3000) } as usize;
        }
        // SAFETY: as above.
        unsafe { measured_call(NAMES[depth - 1], ROOM - 16384, || recurse(depth - 1)) + 1 }
    }
    const NAMES: [&str; 8] = ["r1", "r2", "r3", "r4", "r5", "r6", "r7", "r8"];
    let _one = measuring(Sampling { window: 1 << 20, every: 1 });
    assert_eq!(recurse(8), 3008);
    let seen = NAMES.map(most);
    assert!(seen[0] >= 3000, "{seen:?}");
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "the outer ones take more: {seen:?}");
}

#[test]
fn values_panics_and_what_is_above_stay() {
    let _one = measuring(Sampling::default());
    let above: [u64; 64] = std::array::from_fn(|index| 0x0123_4567_89ab_cdef ^ index as u64);
    let kept = std::hint::black_box(above);
    // SAFETY: as above.
    let text = unsafe { measured_call("value", ROOM, || format!("{} and more", kept.len())) };
    assert_eq!(text, "64 and more");
    // SAFETY: as above.
    let panic = catch_unwind(|| unsafe { measured_call("panic", ROOM, || -> u8 { resume_unwind(Box::new("out")) }) });
    assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"out"));
    assert_eq!(usage("panic").unwrap().calls, 1);
    assert_eq!(std::hint::black_box(kept), above);
}

#[test]
fn one_call_in_so_many_is_measured() {
    let _one = measuring(Sampling { window: 4096, every: 7 });
    for _ in 0..70 {
        // SAFETY: as above.
        assert_eq!(unsafe { measured("sampled".into(), ROOM, hog, 100) }, 100);
    }
    assert_eq!(usage("sampled").unwrap().calls, 10);
    stop();
    // SAFETY: as above.
    unsafe { measured("sampled".into(), ROOM, hog, 100) };
    assert_eq!(usage("sampled").unwrap().calls, 10);
}

#[test]
fn threads_measure_their_own_stacks() {
    let _one = measuring(Sampling::default());
    const NAMES: [&str; 4] = ["t1", "t2", "t3", "t4"];
    std::thread::scope(|scope| {
        for (index, name) in NAMES.into_iter().enumerate() {
            scope.spawn(move || {
                for round in 0..200 {
                    let n = index * 1000 + round;
                    // SAFETY: a thread's stack has so much room.
                    assert_eq!(unsafe { measured(name.into(), ROOM, hog, n) }, n as u64);
                }
            });
        }
    });
    for (index, name) in NAMES.into_iter().enumerate() {
        let usage = usage(name).unwrap();
        assert_eq!(usage.most, (index * 1000 + 199_usize).next_multiple_of(8) + CALL);
        assert_eq!(usage.histogram.iter().sum::<u64>(), usage.calls);
    }
}

#[test]
fn impossible_settings_are_refused() {
    let _one = measuring(Sampling::default());
    for window in [0, 8, 24, (1 << 30) + 16, usize::MAX & !15] {
        assert!(start(Sampling { window, every: 1 }).is_err(), "window {window}");
    }
    for every in [0, 1 << 63, u64::MAX] {
        assert!(start(Sampling { window: 4096, every }).is_err(), "every {every}");
    }
}

#[test]
fn a_full_table_counts_what_it_loses() {
    let table = Table::<4>::new();
    for address in 1..=6 {
        table.note(Site::Code(RawPc::new(address * 16)), address * 10, 4096);
        table.note(Site::Code(RawPc::new(address * 16)), 5, 4096);
    }
    let report = table.report();
    assert_eq!(report.lost, 4);
    assert!(!report.is_complete());
    assert_eq!(report.sites.iter().map(|usage| usage.most).collect::<Vec<_>>(), [40, 30, 20, 10]);
    assert!(report.sites.iter().all(|usage| usage.calls == 2));
    table.forget();
    assert_eq!(table.report(), Report::default());
}

#[test]
fn a_report_names_the_hungriest_and_gives_a_reserve() {
    let table = Table::<8>::new();
    table.note(Site::Named("small"), 100, 4096);
    table.note(Site::Named("large"), 900, 4096);
    table.note(Site::Named("large"), 513, 4096);
    table.note(Site::Code(RawPc::new(0x5000)), 512, 4096);
    let report = table.report();
    assert_eq!(report.most(), 900);
    let text = report.to_string();
    let lines: Vec<&str> = text.lines().skip(1).collect();
    assert!(lines[0].contains("large") && lines[0].contains("≤1024:2"), "{text}");
    assert!(lines[1].contains("0x5000") && lines[1].contains("≤512:1"), "{text}");
    assert!(format!("{report:.1}").contains("and 2 sites more"));

    let policy = Policy { initial: 16384, ..Policy::default() };
    assert_eq!(policy.reserve_from(&report, 100).map(|policy| policy.reserve), Ok(1008));
    assert_eq!(policy.reserve_from(&report, 8192 - 900).map(|policy| policy.reserve), Ok(8192));
    for margin in [8193 - 900, usize::MAX - 900, usize::MAX] {
        assert!(matches!(policy.reserve_from(&report, margin), Err(Error::Policy(_))), "margin {margin}");
    }
    assert!(policy.reserve_from(&Report::default(), 4096).is_err(), "nothing was measured");
}
