//! The programs of the Wasm proposal, in Rust.

use super::closures::{Back, cont, on, on_switch, resume, shape, suspend, switch, throw, with};
use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

const YIELD: u64 = 1;
const FORK: u64 = 2;
const GET: u64 = 3;

#[test]
fn a_generator_and_its_consumer() {
    let mut generator = cont(1, 1, |args| {
        for value in 0..args[0] {
            assert_eq!(suspend(YIELD, &[value]), Ok(vec![]));
        }
        vec![77]
    });
    let (mut args, mut sum) = (vec![100], 0);
    loop {
        match resume(generator, &[on(YIELD)], &args).unwrap() {
            Back::Suspended(YIELD, values, next) => {
                sum += values[0];
                (generator, args) = (next, vec![]);
            }
            other => {
                assert_eq!(other, Back::Returned(vec![77]));
                break;
            }
        }
    }
    assert_eq!(sum, 4950);
}

/// `lwt.wast`: threads that yield and fork, run in turn.
#[test]
fn threads_yield_and_fork() {
    let log = Rc::new(RefCell::new(Vec::new()));
    let speaker = |name: u64, log: &Rc<RefCell<Vec<u64>>>| {
        let log = Rc::clone(log);
        cont(0, 0, move |_| {
            for step in 0..3 {
                log.borrow_mut().push(name * 10 + step);
                suspend(YIELD, &[]).unwrap();
            }
            vec![]
        })
    };
    let inner = Rc::clone(&log);
    let main = cont(0, 0, move |_| {
        for name in 1..=3 {
            suspend(FORK, &speaker(name, &inner).words()).unwrap();
        }
        vec![]
    });
    let mut queue = VecDeque::from([main]);
    while let Some(next) = queue.pop_front() {
        match resume(next, &[on(YIELD), on(FORK)], &[]).unwrap() {
            Back::Suspended(FORK, words, cont) => {
                queue.push_back(Cont::from_words([words[0], words[1]]));
                queue.push_front(cont);
            }
            Back::Suspended(_, _, cont) => queue.push_back(cont),
            other => assert_eq!(other, Back::Returned(vec![])),
        }
    }
    assert_eq!(*log.borrow(), [10, 20, 30, 11, 21, 31, 12, 22, 32]);
}

/// `fun-state.wast`: a state that a handler keeps.
#[test]
fn a_handler_keeps_a_state() {
    const SET: u64 = 4;
    let body = cont(0, 1, |_| {
        let before = suspend(GET, &[]).unwrap()[0];
        suspend(SET, &[before * 2]).unwrap();
        vec![suspend(GET, &[]).unwrap()[0] + 1]
    });
    let (mut cont, mut state, mut args) = (body, 21, vec![]);
    let result = loop {
        match resume(cont, &[on(GET), on(SET)], &args).unwrap() {
            Back::Suspended(GET, _, next) => (cont, args) = (next, vec![state]),
            Back::Suspended(_, values, next) => (cont, state, args) = (next, values[0], vec![]),
            other => break other,
        }
    };
    assert_eq!(result, Back::Returned(vec![43]));
}

/// The inner handler does not know the tag: the two stacks are suspended as one, and resumed as one.
#[test]
fn a_tag_goes_past_a_resumer_that_does_not_handle_it() {
    let outer = cont(0, 1, |_| {
        let inner = cont(0, 1, |_| vec![suspend(GET, &[5]).unwrap()[0] + suspend(YIELD, &[6]).unwrap()[0]]);
        let (_, values, inner) = resume(inner, &[on(YIELD)], &[]).unwrap().suspended();
        assert_eq!(values, [6]);
        assert_eq!(resume(inner, &[], &[1000]).unwrap(), Back::Returned(vec![1100]));
        vec![9]
    });
    let (tag, values, both) = resume(outer, &[on(YIELD), on(GET)], &[]).unwrap().suspended();
    assert_eq!((tag, values), (GET, vec![5]));
    assert_eq!(resume(both, &[], &[100]).unwrap(), Back::Returned(vec![9]));
}

#[test]
fn the_first_handler_that_fits_counts_and_the_nearest() {
    let outer = cont(0, 1, |_| {
        let inner = cont(0, 0, |_| {
            suspend(YIELD, &[]).unwrap();
            vec![]
        });
        let (_, _, inner) = resume(inner, &[on(YIELD)], &[]).unwrap().suspended();
        // What is resumed without a handler goes further out now.
        assert_eq!(resume(inner, &[], &[]).unwrap(), Back::Returned(vec![]));
        vec![1]
    });
    assert_eq!(resume(outer, &[on(YIELD)], &[]).unwrap(), Back::Returned(vec![1]));
}

fn deep(levels: u64) -> Cont {
    cont(0, 1, move |_| {
        if levels == 0 {
            return vec![suspend(GET, &[64]).unwrap()[0]];
        }
        let Back::Returned(values) = resume(deep(levels - 1), &[on(YIELD)], &[]).unwrap() else { panic!() };
        vec![values[0] + 1]
    })
}

#[test]
fn suspend_goes_through_64_levels_and_back() {
    for _ in 0..3 {
        let (_, values, chain) = resume(deep(64), &[on(GET)], &[]).unwrap().suspended();
        assert_eq!(values, [64]);
        assert_eq!(resume(chain, &[], &[1000]).unwrap(), Back::Returned(vec![1064]));
    }
}

#[test]
fn a_chain_is_dropped_with_destructors_and_without() {
    struct Counts(Rc<Cell<u32>>);
    impl Drop for Counts {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    fn nested(levels: u32, count: &Rc<Cell<u32>>) -> Cont {
        let count = Rc::clone(count);
        cont(0, 0, move |_| {
            let _counts = Counts(Rc::clone(&count));
            match levels {
                0 => drop(suspend(GET, &[])),
                _ => drop(resume(nested(levels - 1, &count), &[on(YIELD)], &[])),
            }
            vec![]
        })
    }
    for (levels, frames, ran) in
        [(0, Frames::Unwind, 1), (0, Frames::Skip, 0), (9, Frames::Unwind, 10), (9, Frames::Skip, 0)]
    {
        let count = Rc::new(Cell::new(0));
        let (_, _, chain) = resume(nested(levels, &count), &[on(GET)], &[]).unwrap().suspended();
        // SAFETY: nothing points into the frames but the counters, which are leaked where they are skipped.
        unsafe { continuation::cancel(chain, frames) }.unwrap();
        assert_eq!(count.get(), ran, "{levels} {frames:?}");
        // SAFETY: as above.
        assert_eq!(unsafe { continuation::cancel(chain, frames) }, Err(Error::Consumed));
    }
}

#[test]
fn two_take_turns_by_switching() {
    const TURN: u64 = 8;
    fn player(name: u64, log: Rc<RefCell<Vec<u64>>>) -> Cont {
        cont(3, 1, move |args| {
            let mut passed = args.to_vec();
            loop {
                let other = Cont::from_words([passed[passed.len() - 2], passed[passed.len() - 1]]);
                let step = passed[0];
                log.borrow_mut().push(name * 100 + step);
                if step == 10 {
                    // SAFETY: the other's frames own the log alone, which is leaked.
                    unsafe { continuation::cancel(other, Frames::Skip) }.unwrap();
                    return vec![step];
                }
                passed = switch(other, TURN, &[step + 1]).unwrap();
            }
        })
    }
    let log = Rc::new(RefCell::new(Vec::new()));
    let (a, b) = (player(1, Rc::clone(&log)), player(2, Rc::clone(&log)));
    let mut args = vec![1];
    args.extend(b.words());
    assert_eq!(resume(a, &[on_switch(TURN)], &args).unwrap(), Back::Returned(vec![10]));
    assert_eq!(*log.borrow(), [101, 202, 103, 204, 105, 206, 107, 208, 109, 210]);
}

/// The handler is two levels out and the target is a chain itself.
#[test]
fn a_chain_switches_to_a_chain() {
    const TURN: u64 = 8;
    let (_, _, target) = resume(
        cont(0, 1, |_| {
            let inner = cont(0, 1, |_| {
                let passed = suspend(GET, &[]).unwrap();
                assert_eq!(passed[0], 41);
                let from = Cont::from_words([passed[1], passed[2]]);
                assert_eq!(resume(from, &[], &[500]).unwrap(), Back::Returned(vec![502]));
                vec![7]
            });
            let Back::Returned(values) = resume(inner, &[], &[]).unwrap() else { panic!() };
            vec![values[0] + 1]
        }),
        &[on(GET)],
        &[],
    )
    .unwrap()
    .suspended();
    let from = cont(0, 1, move |_| {
        let inner = cont(0, 1, move |_| vec![switch(target, TURN, &[41]).unwrap()[0] + 1]);
        let Back::Returned(values) = resume(inner, &[on(TURN)], &[]).unwrap() else { panic!() };
        vec![values[0] + 1]
    });
    assert_eq!(resume(from, &[on_switch(TURN)], &[]).unwrap(), Back::Returned(vec![8]));
}

#[test]
fn arguments_are_bound_a_few_at_a_time() {
    let sums = || {
        cont(4, 1, |args| {
            assert_eq!(args.len(), 4);
            let later = suspend(GET, &[]).unwrap();
            vec![args.iter().chain(&later).fold(0, |sum, value| sum * 10 + value)]
        })
    };
    let fresh = sums();
    let bound = continuation::bind(fresh, &[1]).unwrap();
    assert_eq!(continuation::bind(fresh, &[1]), Err(Error::Consumed));
    let bound = continuation::bind(bound, &[]).unwrap();
    let bound = continuation::bind(bound, &[2, 3]).unwrap();
    let (_, _, suspended) = resume(bound, &[on(GET)], &[4]).unwrap().suspended();
    let bound = continuation::bind(suspended, &[5]).unwrap();
    assert_eq!(continuation::bind(suspended, &[5]), Err(Error::Consumed));
    assert_eq!(resume(bound, &[], &[6]).unwrap(), Back::Returned(vec![123456]));
}

struct Exception(usize);

unsafe extern "C-unwind" fn raises(word: usize) -> usize {
    std::panic::resume_unwind(Box::new(Exception(word)));
}

unsafe extern "C-unwind" fn doubles(word: usize) -> usize {
    2 * word
}

#[test]
fn what_is_thrown_is_caught_where_it_was_suspended() {
    let catches = || {
        cont(0, 1, |_| {
            let caught = std::panic::catch_unwind(|| suspend(GET, &[]));
            match caught {
                Ok(passed) => vec![passed.unwrap()[1]],
                Err(payload) => vec![payload.downcast::<Exception>().unwrap().0 as u64 + suspend(GET, &[]).unwrap()[0]],
            }
        })
    };
    let (_, _, cont) = resume(catches(), &[on(GET)], &[]).unwrap().suspended();
    let (_, _, cont) = throw(cont, &[on(GET)], raises, 40).unwrap().suspended();
    assert_eq!(resume(cont, &[], &[2]).unwrap(), Back::Returned(vec![42]));
    let (_, _, cont) = resume(catches(), &[on(GET)], &[]).unwrap().suspended();
    assert_eq!(throw(cont, &[], doubles, 21).unwrap(), Back::Returned(vec![42]));
}

#[test]
fn what_nobody_catches_is_raised_where_it_was_resumed() {
    let (_, _, chain) = resume(deep(5), &[on(GET)], &[]).unwrap().suspended();
    let caught = std::panic::catch_unwind(|| throw(chain, &[], raises, 9));
    assert_eq!(caught.unwrap_err().downcast::<Exception>().unwrap().0, 9);
    assert_eq!(throw(chain, &[], raises, 9), Err(Error::Consumed));
}

#[test]
fn what_is_thrown_into_a_fresh_one_ends_it() {
    let never = || cont(0, 0, |_| unreachable!());
    assert_eq!(throw(never(), &[], doubles, 4).unwrap(), Back::Thrown(8));
    let caught = std::panic::catch_unwind(|| throw(never(), &[], raises, 3));
    assert_eq!(caught.unwrap_err().downcast::<Exception>().unwrap().0, 3);
}

#[test]
fn an_exception_can_be_a_word() {
    let body = with(shape(0, 1), |_| Err(suspend(GET, &[]).unwrap()[0] as usize));
    let (_, _, cont) = resume(body, &[on(GET)], &[]).unwrap().suspended();
    assert_eq!(resume(cont, &[], &[17]).unwrap(), Back::Thrown(17));
}

#[test]
fn a_panic_is_raised_again_at_the_resumer() {
    let outer = cont(0, 0, |_| {
        let inner = cont(0, 0, |_| std::panic::panic_any(5_u8));
        let _ = resume(inner, &[], &[]);
        unreachable!()
    });
    let caught = std::panic::catch_unwind(|| resume(outer, &[], &[]));
    assert_eq!(*caught.unwrap_err().downcast::<u8>().unwrap(), 5);
}
