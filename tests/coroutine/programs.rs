//! Random programs over a few coroutines, against a plain model.

use crate::Counts;
use cfi_stack::Error;
use cfi_stack::coroutine::stack::DefaultStack;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, Yielder};
use quickcheck::{Arbitrary, Gen, QuickCheck, TestResult};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;

#[derive(Clone, Copy, Debug)]
enum Step {
    Create { place: usize, length: u32, panics: bool, large: bool },
    Resume { place: usize, input: u32 },
    Unwind { place: usize },
    Drop { place: usize },
    Nest { place: usize, into: usize, input: u32 },
}

const PLACES: usize = 6;

impl Arbitrary for Step {
    fn arbitrary(gen_: &mut Gen) -> Self {
        let place = usize::arbitrary(gen_) % PLACES;
        let input = u32::arbitrary(gen_) % 1000;
        match u8::arbitrary(gen_) % 10 {
            0..=2 => Step::Create {
                place,
                length: input % 6,
                panics: u8::arbitrary(gen_).is_multiple_of(4),
                large: bool::arbitrary(gen_),
            },
            3..=6 => Step::Resume { place, input },
            7 => Step::Unwind { place },
            8 => Step::Drop { place },
            _ => Step::Nest { place, into: usize::arbitrary(gen_) % PLACES, input },
        }
    }
}

/// Yields running sums `length` times; counts its own end.
fn make(length: u32, panics: bool, large: bool, ended: &Rc<Cell<u32>>) -> Coroutine<u32, u32, u64> {
    let counts = Counts(ended.clone());
    let ballast = [length; 40];
    let body = move |yielder: &Yielder<u32, u32>, mut input: u32| {
        let _counts = &counts;
        let mut sum = 0;
        for _ in 0..length {
            sum += input;
            input = yielder.suspend(sum);
        }
        if panics {
            panic_any(sum + input);
        }
        u64::from(sum + input)
    };
    match large {
        true => Coroutine::new(move |yielder, input| body(yielder, input) + u64::from(ballast[7] - length)),
        // A panic on it: the unwinder of arm64 wants more than 16 KiB when it is used first.
        false => Coroutine::with_stack(DefaultStack::new(64 << 10).unwrap(), body),
    }
}

type Place = (Coroutine<u32, u32, u64>, Model);

#[derive(Clone, Copy)]
struct Model {
    left: u32,
    sum: u32,
    panics: bool,
    done: bool,
}

#[derive(Debug, PartialEq)]
enum Seen {
    Yield(u32),
    Return(u64),
    Panic(u32),
    Finished,
}

impl Model {
    fn resume(&mut self, input: u32) -> Seen {
        if self.done {
            return Seen::Finished;
        }
        self.sum += input;
        if self.left > 0 {
            self.left -= 1;
            return Seen::Yield(self.sum);
        }
        self.done = true;
        if self.panics { Seen::Panic(self.sum) } else { Seen::Return(u64::from(self.sum)) }
    }
}

fn resume(coroutine: &mut Coroutine<u32, u32, u64>, input: u32) -> Seen {
    match catch_unwind(AssertUnwindSafe(|| coroutine.try_resume(input))) {
        Ok(Ok(CoroutineResult::Yield(value))) => Seen::Yield(value),
        Ok(Ok(CoroutineResult::Return(value))) => Seen::Return(value),
        Ok(Err(error)) => {
            assert_eq!(error, Error::Finished);
            Seen::Finished
        }
        Err(payload) => Seen::Panic(*payload.downcast_ref().unwrap()),
    }
}

fn behaves(steps: Vec<Step>) -> TestResult {
    let ended = Rc::new(Cell::new(0));
    let (mut made, mut gone) = (0, 0);
    let mut places: [Option<Place>; PLACES] = Default::default();
    for step in steps {
        match step {
            Step::Create { place, length, panics, large } => {
                gone += u32::from(places[place].as_ref().is_some_and(|(_, model)| !model.done));
                let model = Model { left: length, sum: 0, panics, done: false };
                places[place] = Some((make(length, panics, large, &ended), model));
                made += 1;
            }
            Step::Resume { place, input } => {
                let Some((coroutine, model)) = &mut places[place] else { continue };
                let before = model.done;
                assert_eq!(resume(coroutine, input), model.resume(input));
                assert_eq!(coroutine.done(), model.done);
                gone += u32::from(model.done && !before);
            }
            Step::Unwind { place } => {
                let Some((coroutine, model)) = &mut places[place] else { continue };
                coroutine.force_unwind();
                gone += u32::from(!model.done);
                model.done = true;
                assert!(coroutine.done());
            }
            Step::Drop { place } => {
                gone += u32::from(places[place].take().is_some_and(|(_, model)| !model.done));
            }
            Step::Nest { place, into, input } => {
                // One coroutine resumes another, on a stack of its own, and passes on what it sees.
                let Some((mut coroutine, mut model)) = places[place].take() else { continue };
                let before = model.done;
                let wanted = model.resume(input);
                let mut outer = Coroutine::new(move |yielder: &Yielder<(), ()>, ()| {
                    yielder.suspend(());
                    let seen = resume(&mut coroutine, input);
                    (coroutine, seen)
                });
                outer.resume(());
                let (coroutine, seen) = outer.resume(()).as_return().unwrap();
                assert_eq!(seen, wanted);
                gone += u32::from(model.done && !before);
                let replaced = places[into].replace((coroutine, model));
                gone += u32::from(replaced.is_some_and(|(_, model)| !model.done));
            }
        }
        assert_eq!(ended.get(), gone);
    }
    drop(places);
    assert_eq!(ended.get(), made);
    TestResult::passed()
}

#[test]
fn random_programs_behave_as_the_model() {
    let tests = if std::env::var_os("CFI_STACK_EMULATED").is_some() { 20 } else { 300 };
    QuickCheck::new().rng(Gen::new(300)).tests(tests).quickcheck(behaves as fn(Vec<Step>) -> TestResult);
}
