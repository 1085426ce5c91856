//! Which verb comes next, and what the model makes of it.

use super::super::entry;
use super::*;
use cfi_stack::continuation::{self, Shape};
use std::sync::atomic::Ordering;

impl Context<'_> {
    /// Takes a handle out of those that there are.
    pub(crate) fn pick(&mut self) -> Option<usize> {
        if self.handles.is_empty() { None } else { Some(self.below(self.handles.len())) }
    }

    pub(crate) fn step(&mut self, me: u64) -> Step {
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

    pub(crate) fn make(&mut self) -> Step {
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

    pub(crate) fn bind(&mut self, index: usize) -> Step {
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
    pub(crate) fn goes_on(&mut self, mut handle: Handle, args: Values) {
        self.consume(handle.cont);
        let actor = handle.last().actor;
        handle.bound.extend(args.get());
        let fresh = !handle.last().begun;
        handle.frames.last_mut().unwrap().begun = true;
        self.running.append(&mut handle.frames);
        self.expect(if fresh { Arrival::Entered(actor, handle.bound) } else { Arrival::Woken(actor, handle.bound) });
    }

    pub(crate) fn resume(&mut self, index: usize) -> Step {
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

    pub(crate) fn throw(&mut self, index: usize) -> Step {
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
    pub(crate) fn search(&self, tag: u64, on: On) -> Result<usize, Error> {
        if self.running.len() == 1 {
            return Err(Error::NotOnStack);
        }
        (1..self.running.len())
            .rev()
            .find(|&first| self.running[first - 1].waits.handlers().contains(&Handler { tag, on }))
            .ok_or(Error::Unhandled { tag })
    }

    pub(crate) fn suspend(&mut self) -> Step {
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

    pub(crate) fn detach(&mut self, first: usize, room: usize) {
        let frames = self.running.split_off(first);
        self.counts.chains += u64::from(frames.len() > 1);
        self.pending = Some(Handle { cont: Cont::NULL, frames, bound: Values::NONE, room });
    }

    pub(crate) fn switch(&mut self, index: usize) -> Step {
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

    pub(crate) fn cancel(&mut self, index: usize) -> Step {
        let frames = if self.one_in(2) { Frames::Skip } else { Frames::Unwind };
        let handle = self.handles.swap_remove(index);
        self.consume(handle.cont);
        self.counts.cancelled += 1;
        if frames == Frames::Unwind && handle.last().begun {
            self.unwinding.extend(handle.frames.iter().map(|frame| frame.actor));
        }
        Step::Cancel(handle.cont, frames, None)
    }

    pub(crate) fn end_of_some_kind(&mut self) -> Step {
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

    pub(crate) fn send(&mut self, index: usize) -> Step {
        if self.handles[index].is_anybodys() {
            let handle = self.handles.swap_remove(index);
            self.exchange.sent.lock().unwrap().push(handle);
        }
        Step::Nothing
    }

    pub(crate) fn adopt(&mut self) -> Step {
        let sent = self.exchange.sent.lock().unwrap().pop();
        if let Some(handle) = sent {
            self.counts.migrated += 1;
            self.handles.push(handle);
        }
        Step::Nothing
    }

    /// A handle that cannot be used, with any verb.
    pub(crate) fn misuse(&mut self) -> Step {
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
