//! The model: what becomes of each verb, before it is called, and whether what comes back is that.

mod verbs;

use super::{Counts, Exchange};
use cfi_stack::Error;
use cfi_stack::continuation::{Cont, Frames, Handler, On, Outcome, Woken};
use cfi_stack::thread::Thread;
use std::sync::atomic::AtomicU64;

pub(super) const MOST: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Values {
    pub(super) count: usize,
    pub(super) words: [u64; MOST],
}

impl Values {
    pub(super) const NONE: Values = Values { count: 0, words: [0; MOST] };

    pub(super) fn of(words: &[u64]) -> Values {
        let mut values = Values::NONE;
        values.extend(words);
        values
    }

    pub(super) fn extend(&mut self, words: &[u64]) {
        self.words[self.count..self.count + words.len()].copy_from_slice(words);
        self.count += words.len();
    }

    pub(super) fn get(&self) -> &[u64] {
        &self.words[..self.count]
    }
}

/// What a resumer handles and takes.
#[derive(Clone, Copy)]
pub(super) struct Waits {
    pub(super) handlers: [Handler; 3],
    pub(super) count: usize,
    pub(super) room: usize,
}

impl Waits {
    pub(super) fn handlers(&self) -> &[Handler] {
        &self.handlers[..self.count]
    }
}

/// The model of a stack.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    pub(super) actor: u64,
    pub(super) results: usize,
    pub(super) may_migrate: bool,
    pub(super) begun: bool,
    /// When it waits for another.
    pub(super) waits: Waits,
}

/// The model of a continuation: its stacks, the first one resumed first.
pub(super) struct Handle {
    pub(super) cont: Cont,
    pub(super) frames: Vec<Frame>,
    pub(super) bound: Values,
    pub(super) room: usize,
}

impl Handle {
    pub(super) fn last(&self) -> &Frame {
        self.frames.last().unwrap()
    }

    pub(super) fn results(&self) -> usize {
        self.frames[0].results
    }

    pub(super) fn fits(&self, count: usize) -> Result<(), Error> {
        let count = self.bound.count + count;
        if count > self.room { Err(Error::Values { count, room: self.room }) } else { Ok(()) }
    }

    pub(super) fn is_anybodys(&self) -> bool {
        self.frames.iter().all(|frame| frame.may_migrate || !frame.begun)
    }
}

/// Control at a certain place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    Entered(u64, Values),
    Woken(u64, Values),
    WokenByThrow(u64, usize),
    Raised(u64, usize),
    Returned(u64, Values),
    Suspended(u64, u64, Values),
    Thrown(u64, usize),
    Panicked(u64, usize),
}

#[derive(Clone, Copy)]
pub(super) enum Ended {
    Returned(Values),
    Word(usize),
    Panicked(usize),
}

/// What an actor does next. What fails is expected to fail so.
pub(super) enum Step {
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
pub(super) struct Context<'a> {
    pub(super) seed: u64,
    pub(super) number: u64,
    pub(super) random: u64,
    pub(super) left: usize,
    pub(super) thread: &'a Thread,
    pub(super) exchange: &'a Exchange,
    /// Whose stacks wait for whose: the root first, who runs last.
    pub(super) running: Vec<Frame>,
    pub(super) handles: Vec<Handle>,
    pub(super) stale: Vec<Cont>,
    pub(super) expected: Option<Arrival>,
    /// Suspended; its handle comes with the next arrival.
    pub(super) pending: Option<Handle>,
    /// Who has to see that it is unwound, the first one last.
    pub(super) unwinding: Vec<u64>,
    pub(super) counts: Counts,
}

pub(super) fn fail(context: &Context<'_>, text: &str) -> ! {
    eprintln!("random programs: seed {} thread {} with {} to go: {text}", context.seed, context.number, context.left);
    std::process::abort()
}

pub(super) static ACTORS: AtomicU64 = AtomicU64::new(1);
pub(super) const ROOT: u64 = 0;
/// Deepest chain of resumers.
pub(super) const DEPTH: usize = 20;
pub(super) const TAGS: u64 = 3;
/// Most continuations that a thread has to itself.
pub(super) const HANDLES: usize = 40;

impl Context<'_> {
    /// SplitMix64.
    pub(super) fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(super) fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    pub(super) fn values(&mut self, most: usize) -> Values {
        let mut values = Values::NONE;
        for _ in 0..self.below(most + 1) {
            let word = self.next();
            values.extend(&[word]);
        }
        values
    }

    pub(super) fn word(&mut self) -> usize {
        self.next() as usize | 1
    }

    pub(super) fn waits(&mut self) -> Waits {
        let handlers = [(); 3]
            .map(|()| Handler { tag: self.next() % TAGS, on: if self.one_in(2) { On::Switch } else { On::Suspend } });
        Waits { handlers, count: self.below(4), room: self.below(8) }
    }

    pub(super) fn arrive(&mut self, arrival: Arrival) {
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
    pub(super) fn keep(&mut self, cont: Cont) {
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

    pub(super) fn expect(&mut self, arrival: Arrival) {
        if self.expected.replace(arrival).is_some() {
            fail(self, "the model expected something already");
        }
    }

    pub(super) fn consume(&mut self, cont: Cont) {
        if self.stale.len() >= 64 {
            let index = self.below(64);
            self.stale.swap_remove(index);
        }
        self.stale.push(cont);
    }

    pub(super) fn refused<T: std::fmt::Debug>(&mut self, result: &Result<T, Error>, error: &Option<Error>) -> bool {
        match (result, error) {
            (Err(actual), Some(expected)) if actual == expected => {
                self.counts.refused += 1;
                true
            }
            (Err(_), _) | (_, Some(_)) => fail(self, &format!("{result:?} where {error:?} was expected")),
            _ => false,
        }
    }

    pub(super) fn bound(&mut self, result: Result<Cont, Error>, error: Option<Error>) {
        if !self.refused(&result, &error) {
            self.keep(result.unwrap());
        }
    }

    pub(super) fn cancelled(&mut self, result: Result<(), Error>, error: Option<Error>) {
        self.refused(&result, &error);
        if !self.unwinding.is_empty() {
            fail(self, "not everything was unwound");
        }
    }

    pub(super) fn came_back(&mut self, me: u64, result: Result<Outcome, Error>, error: Option<Error>, values: &[u64]) {
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

    pub(super) fn woken(&mut self, me: u64, result: Result<Woken, Error>, error: Option<Error>, values: &[u64]) {
        if self.refused(&result, &error) {
            return;
        }
        self.arrive(match result.unwrap() {
            Woken::Resumed { count } => Arrival::Woken(me, Values::of(&values[..count])),
            Woken::Thrown { word } => Arrival::WokenByThrow(me, word),
        });
    }

    pub(super) fn unwound(&mut self, me: u64) {
        if self.unwinding.pop() != Some(me) {
            fail(self, &format!("{me} was unwound"));
        }
    }

    /// An exception arrived: it is caught, or goes on.
    pub(super) fn caught(&mut self, me: u64, word: usize) -> Option<Ended> {
        if me == ROOT || self.one_in(2) { None } else { Some(self.end(Ended::Panicked(word))) }
    }

    /// Who runs ends.
    pub(super) fn end(&mut self, ended: Ended) -> Ended {
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
}
