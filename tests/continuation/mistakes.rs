//! What a caller can do wrong, and what comes of it.

use super::closures::{Back, cont, on, on_switch, resume, shape, suspend, switch, throw, with};
use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames, Shape};
use cfi_stack::thread::Thread;

const GET: u64 = 3;
const TURN: u64 = 8;

unsafe extern "C-unwind" fn nothing(_: usize, _: *mut u64, _: usize) -> usize {
    0
}

fn new(shape: Shape) -> Result<Cont, Error> {
    let thread = Thread::attach().unwrap();
    // SAFETY: the function does nothing.
    unsafe { continuation::new(&thread, nothing, 0, shape) }
}

fn cancel(cont: Cont, frames: Frames) -> Result<(), Error> {
    // SAFETY: nothing points into the tests' frames.
    unsafe { continuation::cancel(cont, frames) }
}

/// Every use of a handle that is none.
fn is_consumed(cont: Cont) {
    unsafe extern "C-unwind" fn never(_: usize) -> usize {
        unreachable!()
    }
    assert_eq!(resume(cont, &[], &[]), Err(Error::Consumed));
    assert_eq!(continuation::bind(cont, &[]), Err(Error::Consumed));
    assert_eq!(throw(cont, &[], never, 0), Err(Error::Consumed));
    assert_eq!(cancel(cont, Frames::Unwind), Err(Error::Consumed));
    assert_eq!(cancel(cont, Frames::Skip), Err(Error::Consumed));
    let switches = self::cont(0, 0, move |_| {
        assert_eq!(switch(cont, TURN, &[]), Err(Error::Consumed));
        vec![]
    });
    assert_eq!(resume(switches, &[on_switch(TURN)], &[]).unwrap(), Back::Returned(vec![]));
}

#[test]
fn made_up_handles() {
    let real = cont(0, 0, |_| vec![]);
    let [node, generation] = real.words();
    is_consumed(Cont::NULL);
    for words in [
        [u64::MAX, 2],
        [usize::MAX as u64, u64::MAX],
        [node, 0],
        [node, 1],
        [node, generation + 1],
        [node, generation + 2],
        [node, generation.wrapping_sub(2)],
        [1 << 40, 2],
    ] {
        is_consumed(Cont::from_words(words));
    }
    assert_eq!(resume(real, &[], &[]).unwrap(), Back::Returned(vec![]));
}

#[test]
fn a_handle_is_consumed_by_every_use() {
    let ended = cont(0, 0, |_| vec![]);
    resume(ended, &[], &[]).unwrap();
    is_consumed(ended);
    let cancelled = cont(0, 0, |_| vec![]);
    cancel(cancelled, Frames::Unwind).unwrap();
    is_consumed(cancelled);
    let resumed = cont(0, 0, |_| suspend(GET, &[]).unwrap());
    let (_, _, suspended) = resume(resumed, &[on(GET)], &[]).unwrap().suspended();
    is_consumed(resumed);
    cancel(suspended, Frames::Skip).unwrap();
    is_consumed(suspended);
}

#[test]
fn a_running_one_cannot_be_used() {
    let handle = std::rc::Rc::new(std::cell::Cell::new(Cont::NULL));
    let seen = std::rc::Rc::clone(&handle);
    let running = cont(0, 0, move |_| {
        is_consumed(seen.get());
        vec![]
    });
    handle.set(running);
    resume(running, &[], &[]).unwrap();
}

#[test]
fn suspending_where_nothing_can_be_suspended() {
    assert_eq!(suspend(GET, &[]), Err(Error::NotOnStack));
    let target = cont(2, 0, |_| vec![]);
    assert_eq!(switch(target, TURN, &[]), Err(Error::NotOnStack));
    assert_eq!(resume(target, &[], &[]).unwrap(), Back::Returned(vec![]), "it was not consumed");
}

#[test]
fn tags_that_nobody_handles() {
    let outer = cont(0, 0, |_| {
        let inner = cont(0, 0, |_| {
            assert_eq!(suspend(GET, &[]), Err(Error::Unhandled { tag: GET }));
            let target = cont(2, 0, |_| vec![]);
            // A handler for suspending is none for switching, and the other way round.
            assert_eq!(switch(target, GET, &[]), Err(Error::Unhandled { tag: GET }));
            assert_eq!(switch(target, 5, &[]), Err(Error::Unhandled { tag: 5 }));
            cancel(target, Frames::Skip).unwrap();
            vec![]
        });
        assert_eq!(resume(inner, &[on(5)], &[]).unwrap(), Back::Returned(vec![]));
        vec![]
    });
    assert_eq!(resume(outer, &[on_switch(GET)], &[]).unwrap(), Back::Returned(vec![]));
}

#[test]
fn values_without_room() {
    let takes = cont(2, 3, |args| {
        assert_eq!(args.len(), 2);
        assert_eq!(
            continuation::suspend(GET, &[0; 9], &mut []),
            Err(Error::Values { count: 9, room: 4 }),
            "the resumer takes fewer"
        );
        let mut one = [0; 1];
        continuation::suspend(GET, &[0; 4], &mut one).unwrap();
        vec![one[0]; 3]
    });
    let mut values = [0; 4];
    assert_eq!(continuation::bind(takes, &[0; 3]), Err(Error::Values { count: 3, room: 2 }));
    assert_eq!(continuation::resume(takes, &[], &[0; 3], &mut values), Err(Error::Values { count: 3, room: 2 }));
    assert_eq!(continuation::resume(takes, &[], &[0; 2], &mut values[..2]), Err(Error::Values { count: 3, room: 2 }));
    let takes = continuation::bind(takes, &[1]).unwrap();
    assert_eq!(continuation::resume(takes, &[], &[0; 2], &mut values), Err(Error::Values { count: 3, room: 2 }));
    let outcome = continuation::resume(takes, &[on(GET)], &[2], &mut values).unwrap();
    let continuation::Outcome::Suspended { count: 4, cont, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(continuation::bind(cont, &[1, 2]), Err(Error::Values { count: 2, room: 1 }));
    assert_eq!(continuation::resume(cont, &[], &[], &mut []), Err(Error::Values { count: 3, room: 0 }));
    assert_eq!(resume(cont, &[], &[8]).unwrap(), Back::Returned(vec![8; 3]));
    let huge = cont_of(0, 4);
    let target = cont_of(1, 0);
    let switches = with(shape(0, 0), move |_| {
        assert_eq!(switch(target, TURN, &[]), Err(Error::Values { count: 2, room: 1 }));
        assert_eq!(switch(huge, TURN, &[]), Err(Error::Values { count: 4, room: 3 }));
        Ok(vec![])
    });
    continuation::resume(switches, &[on_switch(TURN)], &[], &mut [0; 3]).unwrap();
    cancel(target, Frames::Skip).unwrap();
    cancel(huge, Frames::Skip).unwrap();
}

fn cont_of(params: usize, results: usize) -> Cont {
    new(shape(params, results)).unwrap()
}

#[test]
fn impossible_shapes() {
    let plain = Shape { size: 16 << 10, params: 0, results: 0, may_migrate: false };
    for shape in [
        Shape { size: 0, ..plain },
        Shape { size: usize::MAX, ..plain },
        Shape { size: usize::MAX / 2, ..plain },
        Shape { params: 1025, size: 1 << 20, ..plain },
        Shape { params: usize::MAX, ..plain },
        Shape { results: usize::MAX / 8 + 1, ..plain },
        Shape { params: 1024, size: 4096, ..plain },
    ] {
        let error = new(shape).unwrap_err();
        assert!(matches!(error, Error::Size { .. } | Error::Memory { .. }), "{shape:?}: {error}");
    }
    let large = new(Shape { params: 1024, results: 1024, size: 64 << 10, ..plain }).unwrap();
    assert_eq!(continuation::bind(large, &[0; 1025]), Err(Error::Values { count: 1025, room: 1024 }));
    let large = continuation::bind(large, &[1; 1000]).unwrap();
    let mut values = [0; 1024];
    let outcome = continuation::resume(large, &[], &[2; 24], &mut values).unwrap();
    assert_eq!(outcome, continuation::Outcome::Returned { count: 1024 });
    assert_eq!((values[999], values[1000]), (1, 2), "the block is the arguments' and the results'");
}

#[test]
fn values_across_the_edge_of_the_stack() {
    let top = std::rc::Rc::new(std::cell::Cell::new(0));
    let known = std::rc::Rc::clone(&top);
    let body = cont(0, 0, move |_| {
        let edge = std::ptr::with_exposed_provenance_mut(known.get() - 8);
        // SAFETY: only its bounds are looked at before it is refused.
        let across = unsafe { std::slice::from_raw_parts_mut(edge, 2) };
        assert!(matches!(continuation::suspend(GET, &[], across), Err(Error::Size { .. })));
        let target = cont_of(2, 0);
        assert!(matches!(continuation::switch(target, TURN, &[], across), Err(Error::Size { .. })));
        cancel(target, Frames::Skip).unwrap();
        vec![]
    });
    // SAFETY: other threads of this test program do not use this continuation, and nothing else is looked at.
    unsafe {
        continuation::for_each_suspended(|stack| {
            if stack.cont == body {
                top.set(stack.top);
            }
        });
    }
    resume(body, &[on(GET), on_switch(TURN)], &[]).unwrap();
}

#[test]
fn a_thread_keeps_what_it_ran() {
    let (_, _, mine) = resume(cont(0, 0, |_| suspend(GET, &[]).unwrap()), &[on(GET)], &[]).unwrap().suspended();
    let fresh = cont_of(0, 0);
    std::thread::spawn(move || {
        for refused in [
            resume(mine, &[], &[]).map(|_| ()),
            continuation::bind(mine, &[]).map(|_| ()),
            cancel(mine, Frames::Unwind),
            cancel(mine, Frames::Skip),
        ] {
            assert!(matches!(refused, Err(Error::Thread(_))), "{refused:?}");
        }
        assert_eq!(resume(fresh, &[], &[]).unwrap(), Back::Returned(vec![]), "it had not run");
    })
    .join()
    .unwrap();
    assert_eq!(resume(mine, &[], &[]).unwrap(), Back::Returned(vec![]));
}

#[test]
fn what_a_thread_leaves_is_listed_and_can_be_dropped() {
    let left = std::thread::spawn(|| {
        let body = cont(0, 0, |_| {
            let inner = cont(0, 0, |_| suspend(GET, &[]).unwrap());
            drop(resume(inner, &[], &[]));
            vec![]
        });
        resume(body, &[on(GET)], &[]).unwrap().suspended().2
    })
    .join()
    .unwrap();
    let leaks = continuation::leaks().unwrap();
    let leak = leaks.iter().find(|leak| leak.cont == left).unwrap();
    assert!(leak.orphaned && leak.created.file().ends_with("mistakes.rs"), "{leak:?}");
    assert!(matches!(resume(left, &[], &[]), Err(Error::Thread(_))));
    assert!(matches!(cancel(left, Frames::Unwind), Err(Error::Thread(_))));
    cancel(left, Frames::Skip).unwrap();
    is_consumed(left);
    assert!(continuation::leaks().unwrap().iter().all(|leak| leak.cont != left));
}

/// Destructors cannot suspend what is being ended, and an end that somebody catches is an end.
#[test]
fn suspending_while_cancelled() {
    struct Suspends;
    impl Drop for Suspends {
        fn drop(&mut self) {
            assert_eq!(suspend(GET, &[]), Err(Error::Cancelled));
        }
    }
    let body = cont(0, 1, |_| {
        let _suspends = Suspends;
        let _ = std::panic::catch_unwind(|| suspend(GET, &[]));
        assert_eq!(suspend(GET, &[]), Err(Error::Cancelled));
        vec![4]
    });
    let (_, _, suspended) = resume(body, &[on(GET)], &[]).unwrap().suspended();
    cancel(suspended, Frames::Unwind).unwrap();
    is_consumed(suspended);
}

#[test]
fn two_threads_resume_one_and_one_succeeds() {
    for _ in 0..200 {
        let shape = Shape { may_migrate: true, ..shape(0, 1) };
        let body = with(shape, |_| Ok(vec![suspend(GET, &[]).unwrap()[0]]));
        let (_, _, suspended) = resume(body, &[on(GET)], &[]).unwrap().suspended();
        let race = || std::thread::spawn(move || resume(suspended, &[], &[6]));
        let (one, other) = (race(), race());
        let results = [one.join().unwrap(), other.join().unwrap()];
        assert_eq!(results.iter().filter(|result| **result == Ok(Back::Returned(vec![6]))).count(), 1, "{results:?}");
        assert_eq!(results.iter().filter(|result| **result == Err(Error::Consumed)).count(), 1, "{results:?}");
    }
}
