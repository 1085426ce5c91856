//! Random programs over continuations, against a plain model.
//!
//! Every continuation runs the same interpreter. Before each verb it asks the model what must come of it: an error at once, or control at a
//! certain place with certain values. Wherever control arrives, what arrived is compared with that. What a program did wrong on purpose
//! (handles used twice, made up, of another thread, of what runs; no handler; too many values) is part of it, with its error.
//!
//! Nothing on the stacks owns memory while they are suspended, so that frames can be dropped.

mod model;

use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames, Handler, On, Outcome, Woken};
use cfi_stack::thread::Thread;
use model::{Arrival, Context, Ended, Frame, Handle, MOST, ROOT, Step, Values, Waits, fail};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub operations: u64,
    pub made: u64,
    pub bound: u64,
    pub resumed: u64,
    pub suspended: u64,
    /// Of those and of those that switched: more than one stack.
    pub chains: u64,
    pub switched: u64,
    pub thrown: u64,
    pub cancelled: u64,
    pub ended: u64,
    pub refused: u64,
    pub migrated: u64,
}

/// Runs a program of so many verbs on each thread, which pass each other continuations, and says what was done. A difference from the model
/// ends the process with a line that names the seed.
pub fn run(seed: u64, threads: usize, operations: usize) -> Counts {
    let exchange = Exchange::default();
    let totals = Mutex::new(Counts::default());
    std::thread::scope(|scope| {
        for number in 0..threads {
            let (exchange, totals) = (&exchange, &totals);
            let work = move || {
                let counts = one_thread(seed, number as u64, operations, exchange);
                let mut totals = totals.lock().unwrap();
                totals.add(&counts);
            };
            scope.spawn(work);
        }
    });
    // What nobody adopted belongs to nobody's thread.
    let rest = std::mem::take(&mut *exchange.sent.lock().unwrap());
    for handle in rest {
        // SAFETY: nothing points into the frames.
        assert_eq!(unsafe { continuation::cancel(handle.cont, Frames::Skip) }, Ok(()), "seed {seed}");
    }
    totals.into_inner().unwrap()
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        for (sum, one) in [
            (&mut self.operations, other.operations),
            (&mut self.made, other.made),
            (&mut self.bound, other.bound),
            (&mut self.resumed, other.resumed),
            (&mut self.suspended, other.suspended),
            (&mut self.chains, other.chains),
            (&mut self.switched, other.switched),
            (&mut self.thrown, other.thrown),
            (&mut self.cancelled, other.cancelled),
            (&mut self.ended, other.ended),
            (&mut self.refused, other.refused),
            (&mut self.migrated, other.migrated),
        ] {
            *sum += one;
        }
    }
}

/// What threads show each other.
#[derive(Default)]
struct Exchange {
    /// Continuations that any thread may go on with.
    sent: Mutex<Vec<Handle>>,
    /// Handles of suspended continuations that belong to their thread, for the others to fail with.
    seen: Mutex<Vec<(u64, Cont)>>,
}

/// The payload of the programs' own panics.
struct Exception(usize);

thread_local! {
    static CONTEXT: Cell<*mut Context<'static>> = const { Cell::new(std::ptr::null_mut()) };
}

#[inline(never)]
fn context() -> *mut Context<'static> {
    let context = CONTEXT.get();
    // SAFETY: no instruction: it keeps the compiler from asking once for two calls, between which the stack may change threads.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
    context
}

fn with<R>(f: impl FnOnce(&mut Context<'static>) -> R) -> R {
    // SAFETY: set for as long as the thread runs programs; no call of `f` makes another or switches.
    f(unsafe { &mut *context() })
}

fn one_thread(seed: u64, number: u64, operations: usize, exchange: &Exchange) -> Counts {
    let thread = Thread::attach().unwrap();
    let no_handler = Handler { tag: 0, on: On::Suspend };
    let waits = Waits { handlers: [no_handler; 3], count: 0, room: 0 };
    let mut context = Context {
        seed,
        number,
        random: seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        left: operations,
        thread: &thread,
        exchange,
        running: vec![Frame { actor: ROOT, results: 0, may_migrate: false, begun: true, waits }],
        handles: Vec::new(),
        stale: vec![Cont::NULL],
        expected: None,
        pending: None,
        unwinding: Vec::new(),
        counts: Counts::default(),
    };
    CONTEXT.set((&raw mut context).cast());
    live(ROOT);
    CONTEXT.set(std::ptr::null_mut());
    exchange.seen.lock().unwrap().retain(|(owner, _)| *owner != number);
    context.counts
}

unsafe extern "C-unwind" fn entry(data: usize, values: *mut u64, count: usize) -> usize {
    let me = data as u64;
    let args = match count {
        0 => Values::NONE,
        // SAFETY: so many arguments stand there.
        _ => Values::of(unsafe { std::slice::from_raw_parts(values, count) }),
    };
    with(|context| context.arrive(Arrival::Entered(me, args)));
    match live(me) {
        Ended::Returned(results) => {
            // SAFETY: the model gives as many results as were declared.
            unsafe { std::ptr::copy_nonoverlapping(results.words.as_ptr(), values, results.count) };
            0
        }
        Ended::Word(word) => word,
        Ended::Panicked(word) => resume_unwind(Box::new(Exception(word))),
    }
}

unsafe extern "C-unwind" fn raises(word: usize) -> usize {
    resume_unwind(Box::new(Exception(word)))
}

unsafe extern "C-unwind" fn returns(word: usize) -> usize {
    word
}

/// The interpreter: what every continuation does, and every thread.
fn live(me: u64) -> Ended {
    loop {
        let step = with(|context| context.step(me));
        let ended = match step {
            Step::Made | Step::Nothing => None,
            Step::Bind(cont, args, error) => {
                let result = continuation::bind(cont, args.get());
                with(|context| context.bound(result, error));
                None
            }
            Step::Resume(cont, waits, args, error) => {
                enter(me, error, waits.room, |values| continuation::resume(cont, waits.handlers(), args.get(), values))
            }
            Step::Throw(cont, waits, raise, word, error) => enter(me, error, waits.room, |values| {
                // SAFETY: the functions take any word; the interpreter's frames let panics through.
                unsafe {
                    continuation::throw(cont, waits.handlers(), if raise { raises } else { returns }, word, values)
                }
            }),
            Step::Suspend(tag, payload, room, error) => {
                leave(me, error, room, |values| continuation::suspend(tag, payload.get(), values))
            }
            Step::Switch(to, tag, args, room, error) => {
                leave(me, error, room, |values| continuation::switch(to, tag, args.get(), values))
            }
            Step::Cancel(cont, frames, error) => {
                // SAFETY: nothing points into the interpreter's frames, and they let panics through.
                let result = unsafe { continuation::cancel(cont, frames) };
                with(|context| context.cancelled(result, error));
                None
            }
            Step::Foreign(cont, verb) => {
                foreign(cont, verb);
                None
            }
            Step::End(ended) => Some(ended),
        };
        if let Some(ended) = ended {
            return ended;
        }
    }
}

/// A verb that resumes, and what comes back of it.
fn enter(
    me: u64,
    error: Option<Error>,
    room: usize,
    verb: impl FnOnce(&mut [u64]) -> Result<Outcome, Error>,
) -> Option<Ended> {
    let mut values = [0; MOST];
    match catch_unwind(AssertUnwindSafe(|| verb(&mut values[..room]))) {
        Ok(result) => {
            with(|context| context.came_back(me, result, error, &values));
            None
        }
        Err(payload) => match payload.downcast::<Exception>() {
            Ok(exception) => with(|context| {
                context.arrive(Arrival::Panicked(me, exception.0));
                context.caught(me, exception.0)
            }),
            Err(payload) => {
                with(|context| context.unwound(me));
                resume_unwind(payload)
            }
        },
    }
}

/// A verb that suspends, and how it is woken.
fn leave(
    me: u64,
    error: Option<Error>,
    room: usize,
    verb: impl FnOnce(&mut [u64]) -> Result<Woken, Error>,
) -> Option<Ended> {
    let mut values = [0; MOST];
    match catch_unwind(AssertUnwindSafe(|| verb(&mut values[..room]))) {
        Ok(result) => {
            with(|context| context.woken(me, result, error, &values));
            None
        }
        Err(payload) => match payload.downcast::<Exception>() {
            Ok(exception) => with(|context| {
                context.arrive(Arrival::Raised(me, exception.0));
                context.caught(me, exception.0)
            }),
            Err(payload) => {
                with(|context| context.unwound(me));
                // While it ends it cannot be suspended.
                if me & 1 == 0 && continuation::suspend(1, &[], &mut []) != Err(Error::Cancelled) {
                    with(|context| fail(context, "suspended while it was cancelled"));
                }
                resume_unwind(payload)
            }
        },
    }
}

/// A handle that belongs to another thread: it cannot be used, whatever that thread does with it meanwhile.
fn foreign(cont: Cont, verb: u64) {
    let mut values = [0; MOST];
    let result = match verb % 4 {
        0 => continuation::resume(cont, &[], &[], &mut values).map(|_| ()),
        1 => continuation::bind(cont, &[]).map(|_| ()),
        // SAFETY: as in `live`.
        2 => unsafe { continuation::cancel(cont, Frames::Unwind) },
        // SAFETY: as in `live`.
        _ => unsafe { continuation::throw(cont, &[], raises, 1, &mut values) }.map(|_| ()),
    };
    if !matches!(result, Err(Error::Thread(_) | Error::Consumed)) {
        with(|context| fail(context, &format!("another thread's: {result:?}")));
    }
}
