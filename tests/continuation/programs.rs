//! Random programs over continuations, against a plain model.
//!
//! Every continuation runs the same interpreter. Before each verb it asks the model what must come of it: an error at once, or control at a
//! certain place with certain values. Wherever control arrives, what arrived is compared with that. What a program did wrong on purpose
//! (handles used twice, made up, of another thread, of what runs; no handler; too many values) is part of it, with its error.
//!
//! Nothing on the stacks owns memory while they are suspended, so that frames can be dropped.

use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames, Handler, On, Outcome, Shape, Woken};
use cfi_stack::thread::Thread;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

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

const MOST: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Values {
    count: usize,
    words: [u64; MOST],
}

impl Values {
    const NONE: Values = Values { count: 0, words: [0; MOST] };

    fn of(words: &[u64]) -> Values {
        let mut values = Values::NONE;
        values.extend(words);
        values
    }

    fn extend(&mut self, words: &[u64]) {
        self.words[self.count..self.count + words.len()].copy_from_slice(words);
        self.count += words.len();
    }

    fn get(&self) -> &[u64] {
        &self.words[..self.count]
    }
}

/// What a resumer handles and takes.
#[derive(Clone, Copy)]
struct Waits {
    handlers: [Handler; 3],
    count: usize,
    room: usize,
}

impl Waits {
    fn handlers(&self) -> &[Handler] {
        &self.handlers[..self.count]
    }
}

/// The model of a stack.
#[derive(Clone, Copy)]
struct Frame {
    actor: u64,
    results: usize,
    may_migrate: bool,
    begun: bool,
    /// When it waits for another.
    waits: Waits,
}

/// The model of a continuation: its stacks, the first one resumed first.
struct Handle {
    cont: Cont,
    frames: Vec<Frame>,
    bound: Values,
    room: usize,
}

impl Handle {
    fn last(&self) -> &Frame {
        self.frames.last().unwrap()
    }

    fn results(&self) -> usize {
        self.frames[0].results
    }

    fn fits(&self, count: usize) -> Result<(), Error> {
        let count = self.bound.count + count;
        if count > self.room { Err(Error::Values { count, room: self.room }) } else { Ok(()) }
    }

    fn is_anybodys(&self) -> bool {
        self.frames.iter().all(|frame| frame.may_migrate || !frame.begun)
    }
}

/// Control at a certain place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    Entered(u64, Values),
    Woken(u64, Values),
    WokenByThrow(u64, usize),
    Raised(u64, usize),
    Returned(u64, Values),
    Suspended(u64, u64, Values),
    Thrown(u64, usize),
    Panicked(u64, usize),
}

/// The payload of the programs' own panics.
struct Exception(usize);

#[derive(Clone, Copy)]
enum Ended {
    Returned(Values),
    Word(usize),
    Panicked(usize),
}

/// What an actor does next. What fails is expected to fail so.
enum Step {
    Made,
    Bind(Cont, Values, Option<Error>),
    Resume(Cont, Waits, Values, Option<Error>),
    Throw(Cont, Waits, bool, usize, Option<Error>),
    Suspend(u64, Values, usize, Option<Error>),
    Switch(Cont, u64, Values, usize, Option<Error>),
    Cancel(Cont, Frames, Option<Error>),
    Foreign(Cont, u64),
    Nothing,
    End(Ended),
}

/// A thread's part of the world.
struct Context<'a> {
    seed: u64,
    number: u64,
    random: u64,
    left: usize,
    thread: &'a Thread,
    exchange: &'a Exchange,
    /// Whose stacks wait for whose: the root first, who runs last.
    running: Vec<Frame>,
    handles: Vec<Handle>,
    stale: Vec<Cont>,
    expected: Option<Arrival>,
    /// Suspended; its handle comes with the next arrival.
    pending: Option<Handle>,
    /// Who has to see that it is unwound, the first one last.
    unwinding: Vec<u64>,
    counts: Counts,
}

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

fn fail(context: &Context<'_>, text: &str) -> ! {
    eprintln!("random programs: seed {} thread {} with {} to go: {text}", context.seed, context.number, context.left);
    std::process::abort()
}

static ACTORS: AtomicU64 = AtomicU64::new(1);
const ROOT: u64 = 0;
/// Deepest chain of resumers.
const DEPTH: usize = 20;
const TAGS: u64 = 3;
/// Most continuations that a thread has to itself.
const HANDLES: usize = 40;

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

impl Context<'_> {
    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    fn values(&mut self, most: usize) -> Values {
        let mut values = Values::NONE;
        for _ in 0..self.below(most + 1) {
            let word = self.next();
            values.extend(&[word]);
        }
        values
    }

    fn word(&mut self) -> usize {
        self.next() as usize | 1
    }

    fn waits(&mut self) -> Waits {
        let handlers = [(); 3]
            .map(|()| Handler { tag: self.next() % TAGS, on: if self.one_in(2) { On::Switch } else { On::Suspend } });
        Waits { handlers, count: self.below(4), room: self.below(8) }
    }

    fn arrive(&mut self, arrival: Arrival) {
        let mut arrival = arrival;
        // Who is switched to is told in two more values who switched.
        if let (Arrival::Entered(_, values) | Arrival::Woken(_, values), Some(_)) = (&mut arrival, &self.pending)
            && values.count >= 2
        {
            values.count -= 2;
            let words = [values.words[values.count], values.words[values.count + 1]];
            values.words[values.count..].fill(0);
            self.keep(Cont::from_words(words));
        }
        if self.expected.take() != Some(arrival) || self.pending.is_some() {
            fail(self, &format!("{arrival:?} arrived"));
        }
    }

    /// What is suspended has a handle now.
    fn keep(&mut self, cont: Cont) {
        let Some(mut handle) = self.pending.take() else { fail(self, "a handle of nothing") };
        if self.stale.contains(&cont) || self.handles.iter().any(|other| other.cont == cont) {
            fail(self, "a handle that was there before");
        }
        handle.cont = cont;
        if !handle.is_anybodys() && self.one_in(8) {
            let mut seen = self.exchange.seen.lock().unwrap();
            if seen.len() >= 32 {
                seen.remove(0);
            }
            seen.push((self.number, cont));
        }
        self.handles.push(handle);
    }

    fn expect(&mut self, arrival: Arrival) {
        if self.expected.replace(arrival).is_some() {
            fail(self, "the model expected something already");
        }
    }

    fn consume(&mut self, cont: Cont) {
        if self.stale.len() >= 64 {
            let index = self.below(64);
            self.stale.swap_remove(index);
        }
        self.stale.push(cont);
    }

    fn refused<T: std::fmt::Debug>(&mut self, result: &Result<T, Error>, error: &Option<Error>) -> bool {
        match (result, error) {
            (Err(actual), Some(expected)) if actual == expected => {
                self.counts.refused += 1;
                true
            }
            (Err(_), _) | (_, Some(_)) => fail(self, &format!("{result:?} where {error:?} was expected")),
            _ => false,
        }
    }

    fn bound(&mut self, result: Result<Cont, Error>, error: Option<Error>) {
        if !self.refused(&result, &error) {
            self.keep(result.unwrap());
        }
    }

    fn cancelled(&mut self, result: Result<(), Error>, error: Option<Error>) {
        self.refused(&result, &error);
        if !self.unwinding.is_empty() {
            fail(self, "not everything was unwound");
        }
    }

    fn came_back(&mut self, me: u64, result: Result<Outcome, Error>, error: Option<Error>, values: &[u64]) {
        if self.refused(&result, &error) {
            return;
        }
        let arrival = match result.unwrap() {
            Outcome::Returned { count } => Arrival::Returned(me, Values::of(&values[..count])),
            Outcome::Suspended { tag, count, cont } => {
                self.keep(cont);
                Arrival::Suspended(me, tag, Values::of(&values[..count]))
            }
            Outcome::Thrown { word } => Arrival::Thrown(me, word),
        };
        self.arrive(arrival);
    }

    fn woken(&mut self, me: u64, result: Result<Woken, Error>, error: Option<Error>, values: &[u64]) {
        if self.refused(&result, &error) {
            return;
        }
        self.arrive(match result.unwrap() {
            Woken::Resumed { count } => Arrival::Woken(me, Values::of(&values[..count])),
            Woken::Thrown { word } => Arrival::WokenByThrow(me, word),
        });
    }

    fn unwound(&mut self, me: u64) {
        if self.unwinding.pop() != Some(me) {
            fail(self, &format!("{me} was unwound"));
        }
    }

    /// An exception arrived: it is caught, or goes on.
    fn caught(&mut self, me: u64, word: usize) -> Option<Ended> {
        if me == ROOT || self.one_in(2) { None } else { Some(self.end(Ended::Panicked(word))) }
    }

    /// Who runs ends.
    fn end(&mut self, ended: Ended) -> Ended {
        self.running.pop();
        self.counts.ended += 1;
        let resumer = self.running.last().unwrap().actor;
        self.expect(match ended {
            Ended::Returned(results) => Arrival::Returned(resumer, results),
            Ended::Word(word) => Arrival::Thrown(resumer, word),
            Ended::Panicked(word) => Arrival::Panicked(resumer, word),
        });
        ended
    }

    /// Takes a handle out of those that there are.
    fn pick(&mut self) -> Option<usize> {
        if self.handles.is_empty() { None } else { Some(self.below(self.handles.len())) }
    }

    fn step(&mut self, me: u64) -> Step {
        if me != self.running.last().unwrap().actor {
            fail(self, &format!("{me} runs"));
        }
        if self.left == 0 {
            return if me != ROOT {
                self.end_of_some_kind()
            } else if let Some(index) = self.handles.len().checked_sub(1) {
                self.cancel(index)
            } else {
                Step::End(Ended::Word(0))
            };
        }
        self.left -= 1;
        self.counts.operations += 1;
        let deep = self.running.len() > DEPTH;
        if self.handles.len() > HANDLES {
            let index = self.below(self.handles.len());
            return self.cancel(index);
        }
        let (choice, picked) = (self.below(100), self.pick());
        match (choice, picked) {
            (0..12, _) => self.make(),
            (12..40, Some(index)) if !deep => self.resume(index),
            (40..46, Some(index)) => self.bind(index),
            (46..64, _) if me != ROOT || choice == 46 => self.suspend(),
            (64..78, Some(index)) if me != ROOT || choice == 64 => self.switch(index),
            (78..83, Some(index)) if !deep => self.throw(index),
            (83..87, Some(index)) => self.cancel(index),
            (87..90, Some(index)) => self.send(index),
            (90..92, _) => self.adopt(),
            (92..96, _) => self.misuse(),
            (_, Some(index)) if me == ROOT => self.resume(index),
            _ if me == ROOT => self.make(),
            _ => self.end_of_some_kind(),
        }
    }

    fn make(&mut self) -> Step {
        let actor = ACTORS.fetch_add(1, Ordering::Relaxed);
        let shape =
            Shape { size: 64 << 10, params: self.below(5), results: self.below(4), may_migrate: self.one_in(2) };
        // SAFETY: the interpreter keeps to the counts, and no address of a thread's variables over a switch.
        let cont = match unsafe { continuation::new(self.thread, entry, actor as usize, shape) } {
            Ok(cont) => cont,
            Err(error) => fail(self, &format!("{error}")),
        };
        let Shape { params: room, results, may_migrate, .. } = shape;
        let waits = self.running[0].waits;
        self.counts.made += 1;
        self.pending = Some(Handle {
            cont,
            frames: vec![Frame { actor, results, may_migrate, begun: false, waits }],
            bound: Values::NONE,
            room,
        });
        self.keep(cont);
        Step::Made
    }

    fn bind(&mut self, index: usize) -> Step {
        let args = self.values(3);
        let cont = self.handles[index].cont;
        if let Err(error) = self.handles[index].fits(args.count) {
            return Step::Bind(cont, args, Some(error));
        }
        let mut handle = self.handles.swap_remove(index);
        handle.bound.extend(args.get());
        self.consume(cont);
        self.counts.bound += 1;
        self.pending = Some(handle);
        Step::Bind(cont, args, None)
    }

    /// The stacks of a handle run: what arrives there is `args` after what was bound.
    fn goes_on(&mut self, mut handle: Handle, args: Values) {
        self.consume(handle.cont);
        let actor = handle.last().actor;
        handle.bound.extend(args.get());
        let fresh = !handle.last().begun;
        handle.frames.last_mut().unwrap().begun = true;
        self.running.append(&mut handle.frames);
        self.expect(if fresh { Arrival::Entered(actor, handle.bound) } else { Arrival::Woken(actor, handle.bound) });
    }

    fn resume(&mut self, index: usize) -> Step {
        let mut waits = self.waits();
        let handle = &self.handles[index];
        let (cont, results, free) = (handle.cont, handle.results(), handle.room - handle.bound.count);
        let args = self.values(free + usize::from(self.random & 7 == 0));
        if waits.room < results && !self.one_in(8) {
            waits.room = results;
        }
        if waits.room < results {
            let error = Error::Values { count: results, room: waits.room };
            return Step::Resume(cont, waits, args, Some(error));
        }
        if let Err(error) = self.handles[index].fits(args.count) {
            return Step::Resume(cont, waits, args, Some(error));
        }
        let handle = self.handles.swap_remove(index);
        self.running.last_mut().unwrap().waits = waits;
        self.counts.resumed += 1;
        self.goes_on(handle, args);
        Step::Resume(cont, waits, args, None)
    }

    fn throw(&mut self, index: usize) -> Step {
        let (waits, raise, word) = (self.waits(), self.one_in(2), self.word());
        let handle = &self.handles[index];
        let (cont, results) = (handle.cont, handle.results());
        if waits.room < results {
            let error = Error::Values { count: results, room: waits.room };
            return Step::Throw(cont, waits, raise, word, Some(error));
        }
        let mut handle = self.handles.swap_remove(index);
        self.consume(cont);
        self.counts.thrown += 1;
        let last = *handle.last();
        let me = self.running.last_mut().unwrap();
        me.waits = waits;
        let me = me.actor;
        self.expect(match (last.begun, raise) {
            (false, true) => Arrival::Panicked(me, word),
            (false, false) => Arrival::Thrown(me, word),
            (true, true) => Arrival::Raised(last.actor, word),
            (true, false) => Arrival::WokenByThrow(last.actor, word),
        });
        if last.begun {
            self.running.append(&mut handle.frames);
        } else {
            self.counts.ended += 1;
        }
        Step::Throw(cont, waits, raise, word, None)
    }

    /// Which of those that run is the first whose resumer handles a tag.
    fn search(&self, tag: u64, on: On) -> Result<usize, Error> {
        if self.running.len() == 1 {
            return Err(Error::NotOnStack);
        }
        (1..self.running.len())
            .rev()
            .find(|&first| self.running[first - 1].waits.handlers().contains(&Handler { tag, on }))
            .ok_or(Error::Unhandled { tag })
    }

    fn suspend(&mut self) -> Step {
        let (tag, payload, room) = (self.next() % TAGS, self.values(4), self.below(5));
        let refused = |error| Step::Suspend(tag, payload, room, Some(error));
        let first = match self.search(tag, On::Suspend) {
            Ok(first) => first,
            Err(error) => return refused(error),
        };
        let takes = self.running[first - 1].waits.room;
        if payload.count > takes {
            return refused(Error::Values { count: payload.count, room: takes });
        }
        self.detach(first, room);
        self.counts.suspended += 1;
        let resumer = self.running.last().unwrap().actor;
        self.expect(Arrival::Suspended(resumer, tag, payload));
        Step::Suspend(tag, payload, room, None)
    }

    fn detach(&mut self, first: usize, room: usize) {
        let frames = self.running.split_off(first);
        self.counts.chains += u64::from(frames.len() > 1);
        self.pending = Some(Handle { cont: Cont::NULL, frames, bound: Values::NONE, room });
    }

    fn switch(&mut self, index: usize) -> Step {
        let (tag, args, room) = (self.next() % TAGS, self.values(2), self.below(5));
        let handle = &self.handles[index];
        let (cont, results) = (handle.cont, handle.results());
        let refused = |error| Step::Switch(cont, tag, args, room, Some(error));
        let first = match self.search(tag, On::Switch) {
            Ok(first) => first,
            Err(error) => return refused(error),
        };
        let takes = self.running[first - 1].waits.room;
        if results > takes {
            return refused(Error::Values { count: results, room: takes });
        }
        if let Err(error) = self.handles[index].fits(args.count + 2) {
            return refused(error);
        }
        let handle = self.handles.swap_remove(index);
        self.detach(first, room);
        self.counts.switched += 1;
        self.goes_on(handle, args);
        Step::Switch(cont, tag, args, room, None)
    }

    fn cancel(&mut self, index: usize) -> Step {
        let frames = if self.one_in(2) { Frames::Skip } else { Frames::Unwind };
        let handle = self.handles.swap_remove(index);
        self.consume(handle.cont);
        self.counts.cancelled += 1;
        if frames == Frames::Unwind && handle.last().begun {
            self.unwinding.extend(handle.frames.iter().map(|frame| frame.actor));
        }
        Step::Cancel(handle.cont, frames, None)
    }

    fn end_of_some_kind(&mut self) -> Step {
        if self.running.len() == 1 {
            return Step::Nothing;
        }
        let mut results = Values::NONE;
        for _ in 0..self.running.last().unwrap().results {
            let word = self.next();
            results.extend(&[word]);
        }
        let word = self.word();
        let ended = match self.below(8) {
            0 => Ended::Word(word),
            1 => Ended::Panicked(word),
            _ => Ended::Returned(results),
        };
        Step::End(self.end(ended))
    }

    fn send(&mut self, index: usize) -> Step {
        if self.handles[index].is_anybodys() {
            let handle = self.handles.swap_remove(index);
            self.exchange.sent.lock().unwrap().push(handle);
        }
        Step::Nothing
    }

    fn adopt(&mut self) -> Step {
        let sent = self.exchange.sent.lock().unwrap().pop();
        if let Some(handle) = sent {
            self.counts.migrated += 1;
            self.handles.push(handle);
        }
        Step::Nothing
    }

    /// A handle that cannot be used, with any verb.
    fn misuse(&mut self) -> Step {
        if self.one_in(4) {
            let number = self.number;
            let seen = self.exchange.seen.lock().unwrap().iter().find(|(owner, _)| *owner != number).copied();
            if let Some((_, cont)) = seen {
                return Step::Foreign(cont, self.next());
            }
        }
        let index = self.below(self.stale.len());
        let mut cont = self.stale[index];
        match self.below(6) {
            0 => cont = Cont::from_words([self.next(), self.next()]),
            1 => cont = Cont::from_words([cont.words()[0], cont.words()[1] ^ 1]),
            2 => cont = Cont::from_words([cont.words()[0], 0]),
            _ => {}
        }
        let error = Some(Error::Consumed);
        let (args, word, waits) = (self.values(2), self.word(), self.waits());
        match self.below(5) {
            0 => Step::Bind(cont, args, error),
            1 => Step::Resume(cont, waits, args, error),
            2 => Step::Throw(cont, waits, true, word, error),
            3 => Step::Cancel(cont, if word & 2 == 0 { Frames::Unwind } else { Frames::Skip }, error),
            _ => {
                let tag = self.next() % TAGS;
                Step::Switch(cont, tag, args, 0, self.search(tag, On::Switch).err().or(error))
            }
        }
    }
}
