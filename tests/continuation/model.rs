//! The model: what becomes of each verb, before it is called, and whether what comes back is that.

use super::{Counts, Exchange, entry};
use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames, Handler, On, Outcome, Shape, Woken};
use cfi_stack::thread::Thread;
use std::sync::atomic::{AtomicU64, Ordering};

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

    /// Takes a handle out of those that there are.
    pub(super) fn pick(&mut self) -> Option<usize> {
        if self.handles.is_empty() { None } else { Some(self.below(self.handles.len())) }
    }

    pub(super) fn step(&mut self, me: u64) -> Step {
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

    pub(super) fn make(&mut self) -> Step {
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

    pub(super) fn bind(&mut self, index: usize) -> Step {
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
    pub(super) fn goes_on(&mut self, mut handle: Handle, args: Values) {
        self.consume(handle.cont);
        let actor = handle.last().actor;
        handle.bound.extend(args.get());
        let fresh = !handle.last().begun;
        handle.frames.last_mut().unwrap().begun = true;
        self.running.append(&mut handle.frames);
        self.expect(if fresh { Arrival::Entered(actor, handle.bound) } else { Arrival::Woken(actor, handle.bound) });
    }

    pub(super) fn resume(&mut self, index: usize) -> Step {
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

    pub(super) fn throw(&mut self, index: usize) -> Step {
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
    pub(super) fn search(&self, tag: u64, on: On) -> Result<usize, Error> {
        if self.running.len() == 1 {
            return Err(Error::NotOnStack);
        }
        (1..self.running.len())
            .rev()
            .find(|&first| self.running[first - 1].waits.handlers().contains(&Handler { tag, on }))
            .ok_or(Error::Unhandled { tag })
    }

    pub(super) fn suspend(&mut self) -> Step {
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

    pub(super) fn detach(&mut self, first: usize, room: usize) {
        let frames = self.running.split_off(first);
        self.counts.chains += u64::from(frames.len() > 1);
        self.pending = Some(Handle { cont: Cont::NULL, frames, bound: Values::NONE, room });
    }

    pub(super) fn switch(&mut self, index: usize) -> Step {
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

    pub(super) fn cancel(&mut self, index: usize) -> Step {
        let frames = if self.one_in(2) { Frames::Skip } else { Frames::Unwind };
        let handle = self.handles.swap_remove(index);
        self.consume(handle.cont);
        self.counts.cancelled += 1;
        if frames == Frames::Unwind && handle.last().begun {
            self.unwinding.extend(handle.frames.iter().map(|frame| frame.actor));
        }
        Step::Cancel(handle.cont, frames, None)
    }

    pub(super) fn end_of_some_kind(&mut self) -> Step {
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

    pub(super) fn send(&mut self, index: usize) -> Step {
        if self.handles[index].is_anybodys() {
            let handle = self.handles.swap_remove(index);
            self.exchange.sent.lock().unwrap().push(handle);
        }
        Step::Nothing
    }

    pub(super) fn adopt(&mut self) -> Step {
        let sent = self.exchange.sent.lock().unwrap().pop();
        if let Some(handle) = sent {
            self.counts.migrated += 1;
            self.handles.push(handle);
        }
        Step::Nothing
    }

    /// A handle that cannot be used, with any verb.
    pub(super) fn misuse(&mut self) -> Step {
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
