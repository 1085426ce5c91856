//! What belongs to each stack by itself, and what others can see of it.

use super::closures::{Back, cont, on, resume, shape, suspend, with};
use cfi_stack::continuation::{self, Frames, Shape};

const GET: u64 = 3;

/// Reads MXCSR, sets it, computes 1/3: the sum of rounding is in the last bit.
#[cfg(target_arch = "x86_64")]
mod control {
    pub fn set(toward_zero: bool) {
        let (mxcsr, x87): (u32, u16) = if toward_zero { (0x7f80, 0x0f7f) } else { (0x1f80, 0x037f) };
        // SAFETY: rounding modes, with all exceptions masked.
        unsafe { std::arch::asm!("ldmxcsr [{}]", "fldcw [{}]", in(reg) &mxcsr, in(reg) &x87) }
    }
    pub fn get() -> (u64, u64) {
        let (mut mxcsr, mut x87) = (0_u32, 0_u16);
        // SAFETY: two stores.
        unsafe { std::arch::asm!("stmxcsr [{}]", "fnstcw [{}]", in(reg) &mut mxcsr, in(reg) &mut x87) }
        (u64::from(mxcsr & 0x6000), u64::from(x87 & 0x0c00))
    }
}

#[cfg(target_arch = "aarch64")]
mod control {
    pub fn set(toward_zero: bool) {
        let fpcr: u64 = if toward_zero { 3 << 22 } else { 0 };
        // SAFETY: a rounding mode.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) fpcr) }
    }
    pub fn get() -> (u64, u64) {
        let fpcr: u64;
        // SAFETY: a read.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) fpcr) }
        (fpcr & 3 << 22, 0)
    }
}

#[test]
fn each_stack_has_its_own_rounding_mode() {
    let usual = control::get();
    let body = |toward_zero: bool| {
        cont(0, 0, move |_| {
            control::set(toward_zero);
            let mine = control::get();
            for _ in 0..3 {
                suspend(GET, &[]).unwrap();
                assert_eq!(control::get(), mine);
            }
            vec![]
        })
    };
    let mut conts = vec![body(true), body(false), body(true)];
    for _ in 0..4 {
        let mut next = Vec::new();
        for cont in conts {
            match resume(cont, &[on(GET)], &[]).unwrap() {
                Back::Suspended(_, _, cont) => next.push(cont),
                other => assert_eq!(other, Back::Returned(vec![])),
            }
            assert_eq!(control::get(), usual);
        }
        conts = next;
    }
    assert!(conts.is_empty());
}

#[test]
fn a_declared_one_is_resumed_by_other_threads() {
    let shape = Shape { may_migrate: true, ..shape(0, 1) };
    let inner_shape = shape;
    let body = with(shape, move |_| {
        let inner = with(inner_shape, |_| {
            let mut sum = 0;
            for _ in 0..10 {
                sum += suspend(GET, &[]).unwrap()[0];
            }
            Ok(vec![sum])
        });
        let Back::Returned(values) = resume(inner, &[], &[]).unwrap() else { panic!() };
        Ok(values)
    });
    let (_, _, mut cont) = resume(body, &[on(GET)], &[]).unwrap().suspended();
    for round in 0..9 {
        cont = std::thread::spawn(move || resume(cont, &[on(GET)], &[round]).unwrap().suspended().2).join().unwrap();
    }
    assert_eq!(resume(cont, &[on(GET)], &[100]).unwrap(), Back::Returned(vec![136]));
}

#[test]
fn a_pinned_stack_pins_its_chain() {
    let migrates = Shape { may_migrate: true, ..shape(0, 0) };
    let body = cont(0, 0, move |_| {
        let inner = with(migrates, |_| Ok(suspend(GET, &[]).unwrap()));
        drop(resume(inner, &[], &[]));
        vec![]
    });
    let (_, _, chain) = resume(body, &[on(GET)], &[]).unwrap().suspended();
    std::thread::spawn(move || {
        assert!(matches!(resume(chain, &[], &[]), Err(cfi_stack::Error::Thread(_))));
    })
    .join()
    .unwrap();
    assert_eq!(resume(chain, &[], &[]).unwrap(), Back::Returned(vec![]));
}

#[test]
fn a_collector_sees_every_suspended_stack() {
    const MARK: u64 = 0x5ee4_0000_1111_2222;
    let body = cont(1, 0, |args| {
        let mark = std::hint::black_box(args[0] + 1);
        let inner = cont(0, 0, move |_| {
            let mark = std::hint::black_box(mark + 1);
            suspend(GET, &[]).unwrap();
            assert_ne!(std::hint::black_box(mark), 0);
            vec![]
        });
        drop(resume(inner, &[], &[]));
        assert_ne!(std::hint::black_box(mark), 0);
        vec![]
    });
    let (_, _, chain) = resume(body, &[on(GET)], &[MARK]).unwrap().suspended();
    let bound = continuation::bind(cont(2, 0, |_| vec![]), &[MARK + 7]).unwrap();
    let mut seen = Vec::new();
    // SAFETY: this program is a thread of its own among those of the test harness; it looks for its own stacks only, which none of them uses.
    unsafe {
        continuation::for_each_suspended(|stack| {
            if stack.cont == chain || stack.cont == bound {
                assert!(stack.base <= stack.sp && stack.sp < stack.top && stack.pc != 0);
                let words = std::ptr::with_exposed_provenance::<u64>(stack.sp);
                let words = std::slice::from_raw_parts(words, (stack.top - stack.sp) / 8).to_vec();
                let values = if stack.count == 0 {
                    vec![]
                } else {
                    std::slice::from_raw_parts(stack.values, stack.count).to_vec()
                };
                seen.push((stack.cont, stack.depth, words, values));
            }
        });
    }
    seen.sort_by_key(|(cont, depth, ..)| (*cont == bound, *depth));
    assert_eq!(seen.len(), 3);
    assert!(seen[0].1 == 0 && seen[0].2.contains(&(MARK + 2)));
    assert!(seen[1].1 == 1 && seen[1].2.contains(&(MARK + 1)));
    assert_eq!(seen[2].3, [MARK + 7]);
    assert_eq!(resume(chain, &[], &[]).unwrap(), Back::Returned(vec![]));
    // SAFETY: it never ran.
    unsafe { continuation::cancel(bound, Frames::Skip) }.unwrap();
}

#[test]
fn a_child_process_resumes_what_was_suspended() {
    let (_, _, suspended) = resume(cont(0, 1, |_| suspend(GET, &[]).unwrap()), &[on(GET)], &[]).unwrap().suspended();
    // SAFETY: the child touches its own thread's things alone, and leaves by _exit.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let right = resume(suspended, &[], &[12]) == Ok(Back::Returned(vec![12]));
            libc::_exit(if right { 0 } else { 1 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert_eq!(status, 0);
    }
    assert_eq!(resume(suspended, &[], &[13]).unwrap(), Back::Returned(vec![13]));
}

/// A coroutine is a stack of another face: nothing is suspended past it, nor from it.
#[test]
fn coroutines_and_continuations_within_each_other() {
    use cfi_stack::Error;
    use cfi_stack::coroutine::{Coroutine, CoroutineResult};
    let body = cont(0, 1, |_| {
        let mut coroutine = Coroutine::new(|yielder, ()| {
            assert_eq!(suspend(GET, &[]), Err(Error::NotOnStack));
            let inner = cont(0, 1, |_| {
                assert_eq!(suspend(GET, &[]), Err(Error::Unhandled { tag: GET }));
                vec![suspend(1, &[]).unwrap()[0]]
            });
            let (_, _, inner) = resume(inner, &[on(1)], &[]).unwrap().suspended();
            yielder.suspend(());
            let Back::Returned(values) = resume(inner, &[], &[20]).unwrap() else { panic!() };
            values[0]
        });
        assert_eq!(coroutine.resume(()), CoroutineResult::Yield(()));
        let passed = suspend(GET, &[]).unwrap()[0];
        let CoroutineResult::Return(value) = coroutine.resume(()) else { panic!() };
        vec![passed + value]
    });
    let (_, _, suspended) = resume(body, &[on(GET)], &[]).unwrap().suspended();
    assert_eq!(resume(suspended, &[on(GET)], &[1]).unwrap(), Back::Returned(vec![21]));
}
