//! What an attacker can write to, and what a child process can do to itself: each ends a child process. And what only the words of the table show.

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
    let (record, frame) = (Running::idle(), 0);
    let _ended = record.enter(&activation, &frame);
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

fn migrates(params: usize) -> Shape {
    Shape { size: 64 << 10, params, results: 1, may_migrate: true }
}

/// What another thread gets that resumes it.
fn resumed_elsewhere(cont: Cont) -> Result<Outcome, Error> {
    std::thread::spawn(move || resume(cont, &[], &[], &mut [0])).join().unwrap()
}

fn owner_of(cont: Cont) -> u64 {
    node::node(cont.node).unwrap().owner.load(Ordering::Relaxed)
}

/// [`suspend`], with a look at what another thread could do before the stack is left.
unsafe extern "C-unwind" fn suspends_slowly(_: usize, values: *mut u64, _: usize) -> usize {
    // SAFETY: this thread's.
    let local = unsafe { &*local::here() };
    let found = super::suspend::search(local, 1, On::Suspend).unwrap();
    let cont = super::suspend::suspended(local, &found, &mut []);
    assert_eq!(found.owner, ANYBODY);
    assert_eq!(owner_of(cont), local.id.get(), "nobody else's while this runs");
    assert_eq!(resumed_elsewhere(cont), Err(FOREIGN));
    found.wait.note.set(Note::Suspended { tag: 1, count: 0, cont });
    let word = std::ptr::from_ref(local).expose_provenance();
    // SAFETY: as `suspend` does.
    let woken = unsafe {
        let word = stubs::suspend_through(found.last.slot(), found.first.slot(), word);
        run::woken(found.last, word, None)
    };
    // SAFETY: one result.
    unsafe { *values = u64::from(woken != Woken::Resumed { count: 0 }) };
    0
}

/// A handle is words, and the next one can be guessed: it is nobody else's before the stack was left.
#[test]
fn what_still_runs_is_nobody_elses() {
    let thread = Thread::attach().unwrap();
    // SAFETY: the function keeps to its counts, and to no thread.
    let cont = unsafe { new(&thread, suspends_slowly, 0, migrates(0)) }.unwrap();
    let outcome = resume(cont, &[Handler { tag: 1, on: On::Suspend }], &[], &mut [0]).unwrap();
    let Outcome::Suspended { cont, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(owner_of(cont), ANYBODY);
    assert_eq!(resumed_elsewhere(cont), Ok(Outcome::Returned { count: 1 }));
}

/// Takes the handle of who switched to it; first suspends itself if `data` says so.
unsafe extern "C-unwind" fn is_switched_to(data: usize, values: *mut u64, _: usize) -> usize {
    // SAFETY: two parameters.
    let mut from = unsafe { [*values, *values.add(1)] };
    if data != 0 {
        assert_eq!(suspend(1, &[], &mut from), Ok(Woken::Resumed { count: 2 }));
    }
    let from = Cont::from_words(from);
    assert_eq!(owner_of(from), ANYBODY);
    assert_eq!(resumed_elsewhere(from), Ok(Outcome::Returned { count: 1 }));
    // SAFETY: one result.
    unsafe { *values = 7 };
    0
}

unsafe extern "C-unwind" fn switches(data: usize, _: *mut u64, _: usize) -> usize {
    // SAFETY: the test's own, which waits.
    let to = unsafe { *std::ptr::with_exposed_provenance::<Cont>(data) };
    usize::from(switch(to, 2, &[], &mut []) != Ok(Woken::Resumed { count: 0 }))
}

/// The same for a stack that another is switched to from: it is anybody's when that one runs.
#[test]
fn what_was_switched_from_is_anybodys() {
    let thread = Thread::attach().unwrap();
    let handlers = [Handler { tag: 1, on: On::Suspend }, Handler { tag: 2, on: On::Switch }];
    for suspended in [0, 1] {
        // SAFETY: the functions keep to their counts, and to no thread.
        let mut to = unsafe { new(&thread, is_switched_to, suspended, migrates(2)) }.unwrap();
        if suspended != 0 {
            let outcome = resume(to, &handlers, &[0, 0], &mut [0]).unwrap();
            let Outcome::Suspended { cont, .. } = outcome else { panic!("{outcome:?}") };
            to = cont;
        }
        // SAFETY: as above.
        let from = unsafe { new(&thread, switches, (&raw const to).expose_provenance(), migrates(0)) }.unwrap();
        let mut values = [0];
        assert_eq!(resume(from, &handlers, &[], &mut values), Ok(Outcome::Returned { count: 1 }));
        assert_eq!(values, [7]);
    }
}

mod within_a_coroutine {
    //! A continuation that a coroutine resumed suspends that coroutine, which goes on when whoever resumed it first has ended.

    use super::*;
    use crate::coroutine::{Coroutine, CoroutineResult, Yielder};
    use std::cell::Cell;
    use std::ptr::null;

    thread_local! {
        static COROUTINE: Cell<Option<Coroutine<(), (), ()>>> = const { Cell::new(None) };
        static YIELDER: Cell<*const Yielder<(), ()>> = const { Cell::new(null()) };
    }

    const ONE: [Handler; 1] = [Handler { tag: 1, on: On::Suspend }];

    fn made(entry: Entry, data: usize) -> Cont {
        // SAFETY: the functions here keep to their counts.
        unsafe { new(&Thread::attach().unwrap(), entry, data, shape()) }.unwrap()
    }

    fn current() -> *const Node {
        // SAFETY: this thread's.
        unsafe { &*local::here() }.current.get()
    }

    /// Resumes it to its end; it suspends itself so often.
    fn to_the_end(mut cont: Cont, suspensions: usize) {
        for _ in 0..suspensions {
            let outcome = resume(cont, &ONE, &[], &mut [0]).unwrap();
            let Outcome::Suspended { cont: next, .. } = outcome else { panic!("{outcome:?}") };
            cont = next;
        }
        assert_eq!(resume(cont, &ONE, &[], &mut [0]), Ok(Outcome::Returned { count: 1 }));
    }

    /// Suspends the coroutine, itself, and no more. `data`: so many continuations lie between it and the coroutine, each resumed by a
    /// coroutine (`data` odd) or by the one before.
    unsafe extern "C-unwind" fn inner(data: usize, _: *mut u64, _: usize) -> usize {
        let mine = current();
        match data {
            // SAFETY: the coroutine's own, which waits for this.
            0 => unsafe { &*YIELDER.get() }.suspend(()),
            1 => Coroutine::<(), (), ()>::new(|_, ()| to_the_end(made(inner, 0), 1)).resume(()).as_return().unwrap(),
            _ => to_the_end(made(inner, data - 1), 1),
        }
        assert_eq!(current(), mine);
        assert_eq!(suspend(1, &[], &mut []), Ok(Woken::Resumed { count: 0 }));
        assert_eq!(suspend(9, &[], &mut []), Err(Error::Unhandled { tag: 9 }));
        0
    }

    /// Resumes the coroutine first.
    unsafe extern "C-unwind" fn first(data: usize, _: *mut u64, _: usize) -> usize {
        let mine = current();
        let mut coroutine: Coroutine<(), (), ()> = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
            YIELDER.set(yielder);
            to_the_end(made(inner, data), 1);
        });
        assert_eq!(coroutine.resume(()), CoroutineResult::Yield(()));
        assert_eq!(current(), mine);
        assert_eq!(suspend(1, &[], &mut []), Ok(Woken::Resumed { count: 0 }));
        COROUTINE.set(Some(coroutine));
        0
    }

    /// Resumes it again.
    unsafe extern "C-unwind" fn again(_: usize, _: *mut u64, _: usize) -> usize {
        let mine = current();
        assert_eq!(COROUTINE.take().unwrap().resume(()), CoroutineResult::Return(()));
        assert_eq!(current(), mine);
        assert_eq!(suspend(1, &[], &mut []), Ok(Woken::Resumed { count: 0 }));
        0
    }

    /// Drops it: what is on its stacks is unwound.
    unsafe extern "C-unwind" fn drops(_: usize, _: *mut u64, _: usize) -> usize {
        let mine = current();
        drop(COROUTINE.take());
        assert_eq!(current(), mine);
        assert_eq!(suspend(1, &[], &mut []), Ok(Woken::Resumed { count: 0 }));
        0
    }

    #[test]
    fn goes_on_elsewhere() {
        let _thread = Thread::attach().unwrap();
        for data in 0..3 {
            let later = [(); 3].map(|()| made(another, 0));
            to_the_end(made(first, data), 1);
            assert_eq!(COROUTINE.take().unwrap().resume(()), CoroutineResult::Return(()));
            assert_eq!(current(), null());
            to_the_end(later[0], 0);
            to_the_end(made(first, data), 1);
            to_the_end(made(again, 0), 1);
            to_the_end(later[1], 0);
            to_the_end(made(first, data), 1);
            to_the_end(made(drops, 0), 1);
            to_the_end(later[2], 0);
        }
    }
}
