//! What an embedder can get wrong through the library's public face: a typed error, nothing published, nothing left mapped.

#![cfg(all(cfi_stack_native, target_os = "linux"))]

use cfi_stack::codemap::{FrameLayout, Registration};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Policy, Stack};

const LAYOUT: FrameLayout = FrameLayout::new(32, Signing::None);

fn map(start: usize, len: usize) -> Registration {
    let mut map = Registration::new();
    map.function(RawPc::new(start), len, LAYOUT).expect("a possible function");
    map
}

/// Bytes that the process has mapped readable: not what the allocator has only reserved.
fn mapped() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux has it");
    let bytes = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        rest.starts_with('r').then_some(())?;
        Some(usize::from_str_radix(end, 16).ok()? - usize::from_str_radix(start, 16).ok()?)
    };
    maps.lines().filter_map(bytes).sum()
}

#[test]
fn absurd_policies_are_refused_and_leave_nothing_mapped() {
    let thread = Thread::attach().expect("a thread can be attached");
    let fine = Policy::default();
    let absurd = [
        Policy { initial: 0, ..fine },
        Policy { initial: 1, ..fine },
        Policy { initial: usize::MAX, ..fine },
        Policy { initial: usize::MAX & !0xffff, ..fine },
        Policy { maximum: 0, ..fine },
        Policy { maximum: usize::MAX, ..fine },
        Policy { guard: 0, ..fine },
        Policy { guard: usize::MAX, ..fine },
        Policy { reserve: usize::MAX, ..fine },
        Policy { smallest_frame: 0, ..fine },
        Policy { shadow_reserve: usize::MAX, ..fine },
    ];
    let refuse_all = || {
        for policy in absurd {
            let refused = Stack::new(&thread, policy).expect_err("an absurd policy");
            assert!(matches!(refused, Error::Policy(_)), "{policy:?}: {refused}");
        }
    };
    refuse_all();
    let before = mapped();
    for _ in 0..500 {
        refuse_all();
        drop(Stack::new(&thread, Policy { initial: 64 << 10, ..fine }).expect("a modest policy"));
    }
    // 32 MB of segments were made; the allocator, and the other tests' threads, may keep some memory of their own.
    let after = mapped();
    assert!(after < before + (16 << 20), "{before} bytes mapped before, {after} after");
}

#[test]
fn code_that_is_published_cannot_be_published_again_until_it_is_withdrawn() {
    let start = 0x7000_0000_0000;
    let first = map(start, 0x100).publish().expect("nothing lies there");
    for (other, len) in [(start, 0x100), (start + 0xfc, 8), (start - 4, 8), (start - 16, 0x200)] {
        let refused = map(other, len).publish().expect_err("it overlaps");
        assert!(matches!(refused, Error::Layout { .. }), "{other:#x}+{len:#x}: {refused}");
    }
    let neighbour = map(start + 0x100, 0x100).publish().expect("nothing lies there");
    drop(first);
    drop(map(start, 0x100).publish().expect("it was withdrawn"));
    drop(neighbour);
}

#[test]
fn publishing_and_withdrawing_leaves_nothing_mapped() {
    let start = 0x7100_0000_0000;
    let once = || drop(map(start, 0x100).publish().expect("nothing lies there"));
    once();
    let before = mapped();
    for _ in 0..10_000 {
        once();
    }
    let after = mapped();
    assert!(after < before + (16 << 20), "{before} bytes mapped before, {after} after");
}
