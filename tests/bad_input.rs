//! What an embedder can get wrong through the library's public face: a typed error, nothing published, nothing left mapped.

#![cfg(all(cfi_stack_native, target_os = "linux"))]

use cfi_stack::codemap::{FrameLayout, Registration};
use cfi_stack::engine::{self, Activation};
use cfi_stack::inspect;
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Policy, Stack};
use std::ptr::NonNull;

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

#[test]
fn an_idle_stack_has_nothing_to_resume_or_to_discard_and_no_room_without_end() {
    let thread = Thread::attach().expect("a thread can be attached");
    let policy = Policy::default();
    let activation = Activation::new();
    let mut stack = Stack::new(&thread, policy).expect("a modest policy");
    // SAFETY: refused before anything runs.
    assert_eq!(unsafe { stack.resume(&thread, &activation, 1) }, Err(Error::NotSuspended));
    assert_eq!(stack.discard(), Err(Error::NotSuspended));
    for bytes in [policy.maximum, 1 << 62, usize::MAX - policy.reserve, usize::MAX] {
        let overflow = Error::Overflow { needed: bytes.saturating_add(policy.reserve), maximum: policy.maximum };
        assert_eq!(stack.reserve(bytes), Err(overflow.clone()));
        assert_eq!(Stack::with_size(&thread, policy, bytes).expect_err("too much"), overflow);
    }
    assert_eq!((stack.shrink_to_fit(), stack.compact()), (Ok(false), Ok(false)));
    assert_eq!((stack.size(), stack.stats().growths), (policy.initial, 0));
}

#[test]
fn what_native_code_asks_for_is_refused_where_no_managed_code_has_called_it() {
    let _thread = Thread::attach().expect("a thread can be attached");
    let activation = Activation::new();
    let entry = RawPc::new(0x7200_0000_0000);
    // SAFETY: refused before anything runs or moves.
    unsafe {
        assert_eq!(engine::enter_again(&activation, entry, [0; 4]), Err(Error::NotInExit));
        assert_eq!(engine::reserve(&activation, 0), Err(Error::NotInExit));
        assert_eq!(engine::compact(&activation), Err(Error::NotInExit));
    }
    assert_eq!(inspect::activation(&activation).expect_err("nothing runs"), Error::NotInExit);
    // SAFETY: this thread runs no activation, so the context, which is none, is not looked at.
    let left = unsafe { engine::leave_from_signal(std::ptr::null_mut(), NonNull::from(&activation), 1) };
    assert_eq!(left, Err(Error::NotManaged));
}
