//! Stacks where the heap has no memory: every allocation of their making fails in turn. A typed error each time, and nothing stays mapped.
//!
//! A program of its own with one test: the allocator and the mappings are the whole process's.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use cfi_stack::thread::Thread;
use cfi_stack::{Error, Policy, Stack};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Allocations that this thread still gets.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
}

struct Failing;

// SAFETY: what it gives is the system's, and null means that there is none.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let left = LEFT.get();
        LEFT.set(left.saturating_sub(usize::from(left != usize::MAX)));
        if left == 0 {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's; it came from the system.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// Makes a stack with so many allocations.
fn make(thread: &Thread, policy: Policy, allocations: usize) -> Result<Stack, Error> {
    LEFT.set(allocations);
    let made = Stack::new(thread, policy);
    LEFT.set(usize::MAX);
    made
}

#[test]
fn a_heap_without_memory_is_a_typed_error() {
    let thread = Thread::attach().unwrap();
    let rounds = if std::env::var_os("CFI_STACK_EMULATED").is_some() { 200 } else { 20_000 };
    for initial in [Policy::default().initial, 8 << 20] {
        let policy = Policy { initial, ..Policy::default() };
        let enough = (0..100).find(|&allocations| make(&thread, policy, allocations).is_ok()).unwrap();
        assert!(enough >= 2, "the segment's record and the stack's own block");
        let before = mappings();
        for _ in 0..rounds {
            for allocations in 0..enough {
                let refused = make(&thread, policy, allocations).unwrap_err();
                assert!(matches!(refused, Error::Memory { errno: libc::ENOMEM, .. }), "{refused}");
            }
        }
        assert!(mappings() <= before + 2, "{before} mappings, then {}", mappings());
    }
}
