//! Visitors as coroutines and as continuations: the same attacks through the faces, and what the faces refuse by themselves.

use super::context_scene::{Memory, SIZE, Scene, Target};
use crate::child::Verdict;
use crate::outcome::Code;
use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Handler, On, Outcome, Shape};
use cfi_stack::coroutine::stack::Stack;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, DefaultStack, Yielder};
use cfi_stack::pool;
use cfi_stack::probe::Word;
use cfi_stack::thread::Thread;

/// A visitor (see [`super::context_scene`]) as a coroutine, with the slot that it runs on.
pub struct Visitor {
    /// Its slot.
    pub target: Target,
    /// Itself.
    pub coroutine: Coroutine<usize, usize, usize>,
}

impl Visitor {
    /// A visitor that is ready; it suspends `depth` calls down the first time. After that `then` is called on its stack.
    ///
    /// # Errors
    /// What the library refused.
    pub fn ready(depth: u8, then: impl FnOnce() + 'static) -> Result<Visitor, String> {
        // The pool gives the stack out next that it got back last.
        let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
        let (target, top) = (Target(lease.slot()), lease.top());
        drop(lease);
        let stack = DefaultStack::try_new(SIZE).map_err(|error| error.to_string())?;
        if stack.base().get() != top {
            return Err("the pool gave another stack out".into());
        }
        let coroutine = Coroutine::with_stack(stack, move |yielder, first| {
            let mut sum = 1000 + first + down(yielder, 1, depth);
            then();
            sum += down(yielder, 2, 0);
            sum + down(yielder, 3, 0)
        });
        Ok(Visitor { target, coroutine })
    }

    /// A visitor that has suspended once.
    ///
    /// # Errors
    /// What was not right.
    pub fn suspended(depth: u8, then: impl FnOnce() + 'static) -> Result<Visitor, String> {
        let mut visitor = Visitor::ready(depth, then)?;
        visitor.resume(0, CoroutineResult::Yield(1))?;
        Ok(visitor)
    }

    /// Resumes it.
    ///
    /// # Errors
    /// What came of it, if it was something else.
    pub fn resume(&mut self, input: usize, wanted: CoroutineResult<usize, usize>) -> Result<(), String> {
        match self.coroutine.try_resume(input) {
            Ok(got) if got == wanted => Ok(()),
            got => Err(format!("{got:?} instead of {wanted:?}")),
        }
    }

    /// Resumes a visitor that has suspended once until it ends.
    ///
    /// # Errors
    /// What was not right.
    pub fn finish(&mut self) -> Verdict {
        self.resume(10, CoroutineResult::Yield(2))?;
        self.resume(20, CoroutineResult::Yield(3))?;
        self.resume(30, CoroutineResult::Return(1060))?;
        Ok(Code::C)
    }

    /// The words by which the face knows how far it has come: the slot's state, and the coroutine itself.
    pub fn words(&self) -> (u64, Memory) {
        let start = (&raw const self.coroutine).expose_provenance();
        (self.target.read(Word::ChunkAndState), Memory::of(start, start + size_of_val(&self.coroutine)))
    }

    /// Sets them back.
    pub fn set_back(&self, (state, coroutine): &(u64, Memory)) {
        self.target.write(Word::ChunkAndState, *state);
        coroutine.put_back();
    }

    /// What it gives is this error.
    ///
    /// # Errors
    /// What it gave instead.
    pub fn is_refused(&mut self, wanted: &Error) -> Result<(), String> {
        match self.coroutine.try_resume(0) {
            Err(error) if error == *wanted => Ok(()),
            got => Err(format!("{got:?} instead of {wanted:?}")),
        }
    }
}

#[inline(never)]
fn down(yielder: &Yielder<usize, usize>, value: usize, depth: u8) -> usize {
    if depth == 0 { yielder.suspend(value) } else { std::hint::black_box(down(yielder, value, depth - 1)) }
}

/// A coroutine is attacked while it is suspended for the first time, and resumed until it ends.
///
/// # Errors
/// What was not right.
pub fn attacked_coroutine(attack: impl FnOnce(Target)) -> Verdict {
    let _scene = Scene::new()?;
    let mut visitor = Visitor::suspended(2, || {})?;
    attack(visitor.target);
    visitor.finish()
}

const TAG: u64 = 7;
const HANDLERS: [Handler; 1] = [Handler { tag: TAG, on: On::Suspend }];

/// Passes 1 and 2 with the tag and returns the sum of what it was resumed with.
unsafe extern "C-unwind" fn continued(_: usize, values: *mut u64, _: usize) -> usize {
    let mut sum = 1000;
    for value in [1, 2] {
        let mut got = [0];
        if continuation::suspend(TAG, &[value], &mut got).is_err() {
            return 1;
        }
        sum += got[0];
    }
    // SAFETY: there is room for the one result.
    unsafe { values.write(sum) };
    0
}

/// A continuation that can be used once more at each step.
pub struct Continued(pub Cont);

impl Continued {
    /// One that has not run.
    ///
    /// # Errors
    /// What the library refused.
    pub fn fresh(thread: &Thread) -> Result<Continued, String> {
        let shape = Shape { size: SIZE, params: 0, results: 1, may_migrate: false };
        // SAFETY: the function reads no values and writes its one result.
        let made = unsafe { continuation::new(thread, continued, 0, shape) };
        made.map(Continued).map_err(|error| error.to_string())
    }

    /// Uses it: it suspends and passes `value`.
    ///
    /// # Errors
    /// What came of it, if it was something else.
    pub fn passes(&mut self, args: &[u64], value: u64) -> Result<(), String> {
        let mut values = [0];
        match continuation::resume(self.0, &HANDLERS, args, &mut values) {
            Ok(Outcome::Suspended { tag: TAG, count: 1, cont }) if values == [value] => {
                self.0 = cont;
                Ok(())
            }
            got => Err(format!("{got:?} with {values:?} instead of {value}")),
        }
    }

    /// Uses it: it ends and returns `value`.
    ///
    /// # Errors
    /// What came of it, if it was something else.
    pub fn returns(&self, args: &[u64], value: u64) -> Result<(), String> {
        let mut values = [0];
        match continuation::resume(self.0, &HANDLERS, args, &mut values) {
            Ok(Outcome::Returned { count: 1 }) if values == [value] => Ok(()),
            got => Err(format!("{got:?} with {values:?} instead of {value}")),
        }
    }
}

/// A handle gives [`Error::Consumed`], whatever it is used for.
///
/// # Errors
/// What it gave instead.
pub fn is_consumed(cont: Cont) -> Result<(), String> {
    unsafe extern "C-unwind" fn never(_: usize) -> usize {
        0
    }
    // SAFETY: nothing of it comes to run.
    let got = unsafe {
        [
            continuation::resume(cont, &HANDLERS, &[], &mut [0]).err(),
            continuation::bind(cont, &[]).err(),
            continuation::throw(cont, &HANDLERS, never, 0, &mut [0]).err(),
            continuation::cancel(cont, continuation::Frames::Skip).err(),
            continuation::cancel(cont, continuation::Frames::Unwind).err(),
        ]
    };
    if got.iter().all(|error| *error == Some(Error::Consumed)) { Ok(()) } else { Err(format!("{got:?}")) }
}
