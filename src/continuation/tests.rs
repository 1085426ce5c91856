//! What an attacker can write to, and what a child process can do to itself. Each ends a child process.

use super::*;

fn shape() -> Shape {
    Shape { size: 64 << 10, params: 0, results: 1, may_migrate: false }
}

unsafe extern "C-unwind" fn suspends(data: usize, values: *mut u64, _: usize) -> usize {
    let mut passed = [0];
    let right = suspend(1, &[], &mut passed).is_ok();
    // SAFETY: one result.
    unsafe { *values = passed[0] + data as u64 };
    usize::from(!right)
}

unsafe extern "C-unwind" fn another(_: usize, values: *mut u64, _: usize) -> usize {
    // SAFETY: one result.
    unsafe { *values = 99 };
    0
}

/// How a child process ends that runs this: its exit status, or the signal that ended it.
fn child(body: impl FnOnce() -> i32) -> Result<i32, i32> {
    // SAFETY: the child runs `body` and leaves; other threads' locks are not touched there.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::_exit(body());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        if libc::WIFSIGNALED(status) { Err(libc::WTERMSIG(status)) } else { Ok(libc::WEXITSTATUS(status)) }
    }
}

/// Whether contexts are sealed here.
fn sealed() -> bool {
    #[cfg(target_arch = "aarch64")]
    return crate::published::mode() & crate::published::MODE_PACGA != 0;
    #[cfg(not(target_arch = "aarch64"))]
    false
}

fn finishes(cont: Cont, result: u64) -> i32 {
    let mut values = [0];
    let outcome = resume(cont, &[Handler { tag: 1, on: On::Suspend }], &[], &mut values);
    if outcome == Ok(Outcome::Returned { count: 1 }) && values[0] == result { 0 } else { 1 }
}

/// A09.
#[test]
fn another_entry_function_or_argument() {
    let thread = Thread::attach().unwrap();
    // Made before the fork: a child of a process with threads takes no lock.
    let fresh = || {
        // SAFETY: the function keeps to its counts.
        let cont = unsafe { new(&thread, another, 5, shape()) }.unwrap();
        (cont, node::node(cont.node).unwrap())
    };
    let ends = |cont: Cont| {
        // SAFETY: it never ran.
        unsafe { cancel(cont, Frames::Skip) }.unwrap();
    };
    let expected = if sealed() { Err(libc::SIGTRAP) } else { Ok(1) };
    let (cont, node) = fresh();
    assert_eq!(child(|| finishes(cont, 99)), Ok(0), "control");
    let other_entry = child(|| {
        node.entry.set(Some(suspends));
        finishes(cont, 99)
    });
    assert_eq!(other_entry, expected);
    let other_data = child(|| {
        node.entry.set(Some(suspends));
        node.data.set(6);
        finishes(cont, 99)
    });
    assert_eq!(other_data, expected);
    ends(cont);
    // What was sealed for an earlier continuation of the same place: it ended, and its node is used again.
    // SAFETY: as above.
    let first = unsafe { new(&thread, suspends, 5, shape()) }.unwrap();
    ends(first);
    let (cont, node) = fresh();
    assert_eq!(cont.node, first.node);
    let earlier = child(|| {
        node.entry.set(Some(suspends));
        finishes(cont, 99)
    });
    assert_eq!(earlier, expected);
    ends(cont);
}

/// A44: the child resets its keys.
#[test]
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
fn a_child_that_changes_its_keys() {
    use std::arch::asm;
    let thread = Thread::attach().unwrap();
    if !sealed() {
        return;
    }
    // SAFETY: the function keeps to its counts.
    let cont = unsafe { new(&thread, suspends, 5, shape()) }.unwrap();
    let mut values = [0];
    let outcome = resume(cont, &[Handler { tag: 1, on: On::Suspend }], &[], &mut values).unwrap();
    let Outcome::Suspended { cont, .. } = outcome else { panic!("{outcome:?}") };
    let status = child(|| {
        let result: isize;
        // SAFETY: prctl(PR_PAC_RESET_KEYS, 0, 0, 0, 0); this function does not return afterwards.
        unsafe {
            asm!("svc #0", in("x8") 167, inlateout("x0") 54_isize => result, in("x1") 0, in("x2") 0, in("x3") 0, in("x4") 0);
        }
        let status = if result == 0 { finishes(cont, 5) } else { 77 };
        // SAFETY: leaves at once.
        unsafe { libc::_exit(status) }
    });
    assert!(status == Err(libc::SIGTRAP) || status == Ok(77), "{status:?}");
    assert_eq!(finishes(cont, 5), 0, "the parent goes on");
}

/// Another domain's continuation is refused, by any thread.
#[test]
fn another_key_domain() {
    let thread = Thread::attach().unwrap();
    // SAFETY: the function keeps to its counts.
    let cont = unsafe { new(&thread, another, 5, shape()) }.unwrap();
    let node = node::node(cont.node).unwrap();
    let domain = node.domain.replace(u32::MAX);
    let mut values = [0];
    assert_eq!(resume(cont, &[], &[], &mut values), Err(OTHER_DOMAIN));
    // SAFETY: it never ran.
    assert_eq!(unsafe { cancel(cont, Frames::Skip) }, Err(OTHER_DOMAIN));
    node.domain.set(domain);
    assert_eq!(finishes(cont, 99), 0);
}

unsafe extern "C-unwind" fn manages(data: usize, values: *mut u64, _: usize) -> usize {
    use crate::thread::{Running, current_activation};
    let activation = crate::abi::Activation::new();
    let record = Running::with(&activation);
    let _ended = record.begin();
    let mine = Some(std::ptr::NonNull::from(&activation));
    let mut passed = [0];
    let mut right = current_activation() == mine;
    for _ in 0..3 {
        right &= match data {
            0 => suspend(1, &[], &mut passed).is_ok(),
            // SAFETY: the function keeps to its counts.
            inner => Thread::attach()
                .and_then(|thread| unsafe { new(&thread, manages, inner - 1, shape()) })
                .and_then(|inner| resume(inner, &[], &[], &mut passed))
                .is_ok_and(|outcome| outcome == Outcome::Returned { count: 1 } && passed == [0]),
        };
        right &= current_activation() == mine;
    }
    // SAFETY: one result.
    unsafe { *values = u64::from(!right) };
    0
}

/// What a thread notes of managed code leaves it with the stacks that it lies on, and comes back with them.
#[test]
fn activations_wait_with_their_stacks() {
    use crate::thread::current_activation;
    let thread = Thread::attach().unwrap();
    for depth in 0..3 {
        // SAFETY: the function keeps to its counts.
        let mut conts = [(); 2].map(|()| unsafe { new(&thread, manages, depth, shape()) }.unwrap());
        let mut values = [1];
        for turn in 0..=2 * 3_usize.pow(depth as u32 + 1) {
            assert_eq!(current_activation(), None);
            match resume(conts[turn % 2], &[Handler { tag: 1, on: On::Suspend }], &[], &mut values) {
                Ok(Outcome::Suspended { cont, .. }) => conts[turn % 2] = cont,
                other => {
                    assert_eq!((other, values), (Ok(Outcome::Returned { count: 1 }), [0]));
                    // SAFETY: nothing points into the other one's frames.
                    unsafe { cancel(conts[(turn + 1) % 2], Frames::Skip) }.unwrap();
                    break;
                }
            }
        }
        assert_eq!(current_activation(), None);
    }
}
