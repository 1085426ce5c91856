use super::*;
use crate::pool;

unsafe extern "C" fn adds(first: usize, data: usize, slot: *mut Slot) -> usize {
    let slot = NonNull::new(slot).unwrap();
    let mut sum = first + data;
    for _ in 0..3 {
        // SAFETY: this function runs on the slot's stack.
        sum += unsafe { suspend(slot, sum) };
    }
    sum
}

#[test]
fn words_pass_both_ways() {
    let _thread = crate::thread::Thread::attach().unwrap();
    let lease = pool::lease(16 << 10).unwrap();
    for _ in 0..3 {
        // SAFETY: the lease is this test's own and its stack is empty; the function above suspends by the same kind of stub.
        unsafe {
            prepare(lease.slot(), adds, 100);
            assert_eq!(resume(lease.slot(), 1), Passed { value: 101, finished: false });
            assert_eq!(resume(lease.slot(), 10), Passed { value: 111, finished: false });
            assert_eq!(resume(lease.slot(), 20), Passed { value: 131, finished: false });
            assert_eq!(resume(lease.slot(), 30), Passed { value: 161, finished: true });
        }
    }
}

#[test]
fn a_cancelled_stack_can_be_prepared_again() {
    let _thread = crate::thread::Thread::attach().unwrap();
    let lease = pool::lease(16 << 10).unwrap();
    for depth in 0..3 {
        // SAFETY: as above; nothing points into the frames that are dropped.
        unsafe {
            prepare(lease.slot(), adds, 0);
            for _ in 0..depth {
                assert!(!resume(lease.slot(), 1).finished);
            }
            cancel(lease.slot());
        }
    }
}

unsafe extern "C" fn relays(_: usize, to: usize, slot: *mut Slot) -> usize {
    let (slot, to) = (NonNull::new(slot).unwrap(), NonNull::new(std::ptr::with_exposed_provenance_mut(to)).unwrap());
    // SAFETY: this function runs on the slot's stack; `to` is suspended and nobody else's.
    unsafe { switch_to(slot, to, 5) }
}

#[test]
fn a_symmetric_switch_hands_the_resumer_over() {
    let _thread = crate::thread::Thread::attach().unwrap();
    let (a, b) = (pool::lease(16 << 10).unwrap(), pool::lease(16 << 10).unwrap());
    // SAFETY: as above.
    unsafe {
        prepare(b.slot(), adds, 100);
        assert_eq!(resume(b.slot(), 1).value, 101);
        prepare(a.slot(), relays, b.slot().as_ptr().expose_provenance());
        assert_eq!(resume(a.slot(), 0), Passed { value: 106, finished: false }, "what b passes comes to a's resumer");
        assert_eq!(resume(a.slot(), 77), Passed { value: 77, finished: true });
        assert_eq!(resume(b.slot(), 1).value, 107);
        assert_eq!(resume(b.slot(), 1), Passed { value: 108, finished: true });
    }
}

unsafe extern "C" fn resumes(arg: usize, inner: usize, _: *mut Slot) -> usize {
    let inner = NonNull::new(std::ptr::with_exposed_provenance_mut(inner)).unwrap();
    // SAFETY: `inner` is ready and nobody else's.
    unsafe { resume(inner, arg) }.value + 1000
}

unsafe extern "C" fn suspends_through(arg: usize, outer: usize, slot: *mut Slot) -> usize {
    let (slot, outer) =
        (NonNull::new(slot).unwrap(), NonNull::new(std::ptr::with_exposed_provenance_mut(outer)).unwrap());
    // SAFETY: this function runs on the slot's stack, and `outer` resumed it.
    unsafe { suspend_through(slot, outer, arg + 1) + 10 }
}

#[test]
fn a_chain_is_detached_and_resumed_as_one() {
    let _thread = crate::thread::Thread::attach().unwrap();
    let (outer, inner) = (pool::lease(16 << 10).unwrap(), pool::lease(16 << 10).unwrap());
    // SAFETY: as above.
    unsafe {
        prepare(inner.slot(), suspends_through, outer.slot().as_ptr().expose_provenance());
        prepare(outer.slot(), resumes, inner.slot().as_ptr().expose_provenance());
        assert_eq!(resume(outer.slot(), 1), Passed { value: 2, finished: false });
        let passed = resume_through(inner.slot(), outer.slot(), 5);
        assert_eq!(passed, Passed { value: 1015, finished: true });
    }
}

unsafe extern "C-unwind" fn doubled(arg: usize) -> usize {
    arg * 2
}

#[test]
fn what_is_thrown_returns_where_the_stack_was_suspended() {
    let _thread = crate::thread::Thread::attach().unwrap();
    let lease = pool::lease(16 << 10).unwrap();
    // SAFETY: as above; `doubled` does not unwind.
    unsafe {
        prepare(lease.slot(), adds, 0);
        assert_eq!(resume(lease.slot(), 1).value, 1);
        assert_eq!(throw(lease.slot(), lease.slot(), 21, doubled).value, 43);
        cancel(lease.slot());
    }
}

unsafe extern "C" fn ends(arg: usize, _: usize, _: *mut Slot) -> usize {
    arg
}

/// Fills what will be the frame of the next call.
#[inline(never)]
fn soil_the_stack() {
    std::hint::black_box(&mut [u64::MAX; 256]);
}

#[test]
fn a_stack_that_ends_loads_no_control_words_from_a_frame_without() {
    let _thread = crate::thread::Thread::attach().unwrap();
    let lease = pool::lease(16 << 10).unwrap();
    for round in 0..3 {
        // SAFETY: as above.
        unsafe {
            prepare(lease.slot(), ends, 0);
            soil_the_stack();
            assert_eq!(resume_without_fp_control(lease.slot(), round), Passed { value: round, finished: true });
        }
    }
}
