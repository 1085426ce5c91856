//! S44: stacks that are parked under a key that threads share, and go on in another key domain.

use super::layouts::Kinds;
use super::lift;
use super::link::{Linked, thunk};
use super::spans::{self, Op, Run, World, word};
use crate::attack::{Dice, policy};
use crate::cases::{DA, DB, GA, IA, IB, Keys};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::foreign::Foreign;
use crate::frames;
use crate::managed::{self, Function};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::Registered;
use cfi_stack::engine::Activation;
use cfi_stack::pac::Signing;
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack, Stats, engine, inspect};
use std::sync::atomic::Ordering::Relaxed;

/// The keys that can be shared, and those that the other thread has of its own then.
const SHARED: [(Signing, usize); 2] = [(Signing::B, IA | DA), (Signing::A, IB | DB)];
/// Frames of one kind that are lifted, or not, at the youngest end.
const DEEP: usize = 1500;

/// S44.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (key, own) in SHARED {
        for deep in [0, DEEP] {
            for linked in [false, true] {
                let end = run(|| there_and_back(class, key, own, deep, linked));
                let link = if linked { ", across a link" } else { "" };
                tally.attack(&format!("under {key:?}, frames of all kinds{link}, {deep} more"), &end, &[Code::C]);
                if deep > 0 {
                    let [frames, lifts, segments, ..] = end.notes;
                    tally.say(format!("{key:?}{link}: {frames} frames, {lifts} lifts, {segments} segments"));
                }
            }
        }
        let end = run(|| refused(class, key, own));
        tally.attack(&format!("under {key:?}, refused where it must be"), &end, &[Code::E]);
        let programs = if class.is_slow() { 60 } else { 1000 };
        let end = run(|| (0..programs).try_for_each(|seed| program(key, own, seed)).map(|()| Code::C));
        tally.attack(&format!("under {key:?}, {programs} programs"), &end, &[Code::C]);
    }
    tally.report()
}

/// A stack on which frames of all kinds wait, the youngest in `suspend`.
struct Waiting {
    linked: Linked,
    table: Vec<usize>,
    /// What the oldest returns when `suspend` returns 0.
    sum: u64,
    /// With which it goes on elsewhere.
    other: Box<Activation>,
    _code: [Registered; 2],
}

impl Waiting {
    fn new(class: &Class, deep: usize, through_a_link: bool) -> Result<Waiting, String> {
        managed::suspend_for_exit();
        let kinds = Kinds::of(class);
        let code = [frames::registration(|_| {}).publish().map_err(|error| error.to_string())?, lift::register(true)?];
        let plain = &kinds.0[0];
        let as_callee = |function: &frames::Function| Function {
            start: function.start,
            end: function.start,
            frame_bytes: function.layout.frame_bytes,
            signing: function.layout.signing,
        };
        let linked = Linked::new(lift::lifting(), as_callee(plain), 0, 0, 512)?;
        // The oldest last: a plain one, all kinds, the thunk, all kinds, and the recursion.
        let mut chain: Vec<usize> = kinds.chain(&mut Dice::new("S44", 1), 60, None);
        chain.push(0);
        let link_at = deep + 1 + chain.len();
        if through_a_link {
            chain.push(usize::MAX);
        }
        chain.extend(kinds.chain(&mut Dice::new("S44", 2), 60, None));
        chain.push(0);
        let mut table = vec![lift::recurse().start.address(); deep + 1];
        table.extend(chain.iter().map(|&kind| kinds.0.get(kind).map_or(thunk().start, |kind| kind.start).address()));
        let sum =
            (0..table.len()).filter(|&level| !through_a_link || level != link_at).map(|level| level as u64 * 8 + 3);
        // The thunk has its callee add what is at its own level.
        let thunks = if through_a_link { link_at as u64 * 8 + 3 } else { 0 };
        let sum = sum.sum::<u64>() + thunks;
        Ok(Waiting { linked, table, sum, other: Box::default(), _code: code })
    }

    fn enter(&mut self) -> Result<(), String> {
        let oldest = self.table.len() - 1;
        let table = self.table.as_ptr().expose_provenance();
        let first = Function { start: cfi_stack::pac::RawPc::new(self.table[oldest]), ..managed::plain() };
        match self.linked.scene.enter(first, oldest, table, 0) {
            Ok(Exit::Suspended(value)) if value == table as u64 => Ok(()),
            other => Err(format!("it did not suspend: {other:x?}")),
        }
    }

    fn stack(&mut self) -> &mut Stack {
        &mut self.linked.scene.stack
    }

    /// Goes on to the end, here or there.
    fn finish(&mut self, foreign: Option<&Foreign>) -> Result<(), String> {
        let scene = &mut self.linked.scene;
        let act = if foreign.is_some() { std::ptr::from_ref(&*self.other).expose_provenance() } else { scene.act() };
        let go_on = move |thread: &Thread, stack: &mut Stack| {
            // SAFETY: the activation outlives the call, and nobody else uses it meanwhile; the functions keep nothing of a thread's.
            unsafe { stack.resume(thread, &*std::ptr::with_exposed_provenance(act), 5) }
        };
        let got = match foreign {
            Some(foreign) => foreign.with(&mut scene.stack, go_on),
            None => go_on(&scene.thread, &mut scene.stack),
        };
        match got == Ok(Exit::Returned(self.sum + 5)) {
            true => Ok(()),
            false => Err(format!("{got:x?} instead of {:#x}", self.sum + 5)),
        }
    }

    fn park(&mut self, key: Signing) -> Result<(), Error> {
        let scene = &mut self.linked.scene;
        scene.stack.park(&scene.thread, key)
    }

    fn unpark(&mut self) -> Result<(), Error> {
        let scene = &mut self.linked.scene;
        scene.stack.unpark(&scene.thread)
    }
}

fn text(error: Error) -> String {
    error.to_string()
}

fn there_and_back(class: &Class, key: Signing, own: usize, deep: usize, linked: bool) -> Verdict {
    let foreign = Foreign::new(Keys::Anew(own))?;
    let mut waiting = Waiting::new(class, deep, linked)?;
    for round in 0..4 {
        waiting.enter()?;
        let picture = inspect::stack(waiting.stack());
        let frames = picture.frames().count();
        waiting.park(key).map_err(text)?;
        let parked = inspect::stack(waiting.stack());
        if parked.state != inspect::State::Parked || parked.frames().count() != frames || !parked.is_complete() {
            return Err(format!("{parked}"));
        }
        // To and fro, changed in size on the way, finished here or there.
        foreign
            .with(waiting.stack(), |thread, stack| {
                stack.unpark(thread)?;
                if round > 1 {
                    stack.reserve(100_000)?;
                    stack.shrink_to_fit()?;
                }
                stack.park(thread, key)
            })
            .map_err(text)?;
        waiting.unpark().map_err(text)?;
        if round % 2 == 0 {
            waiting.finish(None)?;
            // An empty one can be parked as well.
            waiting.park(key).map_err(text)?;
            waiting.unpark().map_err(text)?;
        } else {
            waiting.park(key).map_err(text)?;
            foreign.with(waiting.stack(), |thread, stack| stack.unpark(thread)).map_err(text)?;
            waiting.finish(Some(&foreign))?;
            foreign.with(waiting.stack(), |thread, stack| stack.park(thread, key)).map_err(text)?;
            waiting.unpark().map_err(text)?;
        }
        let stats @ Stats { lifts, segments, growths, .. } = waiting.stack().stats();
        for (note, value) in page().notes.iter().zip([frames as u64, lifts, segments]) {
            note.store(value, Relaxed);
        }
        if (lifts > 0) != (deep > 0) || linked && segments == 0 || deep > 0 && growths == 0 || frames < deep + 120 {
            return Err(format!("{frames} frames, {stats:?}"));
        }
    }
    Ok(Code::C)
}

/// What a parked stack, and one that is not, is refused for.
fn refused(class: &Class, key: Signing, own: usize) -> Verdict {
    let foreign = Foreign::new(Keys::Anew(own))?;
    let mut waiting = Waiting::new(class, 0, true)?;
    waiting.enter()?;
    let not_parked = foreign.with(waiting.stack(), |thread, stack| {
        [stack.unpark(thread), stack.discard(), stack.reserve(1), stack.park(thread, key), stack.compact().map(|_| ())]
    });
    let elsewhere = |error: &Result<(), Error>| matches!(error, Err(Error::Thread(_)));
    let [unparked, others @ ..] = &not_parked;
    if *unparked != Err(Error::NotParked) || class.pac() && !others.iter().all(elsewhere) {
        return Err(format!("not parked: {not_parked:?}"));
    }
    if !class.pac() {
        // One domain: what the other thread was not refused is done. Another stack.
        drop(waiting);
        waiting = Waiting::new(class, 0, true)?;
        waiting.enter()?;
    }
    if waiting.unpark() != Err(Error::NotParked) {
        return Err("what is not parked was unparked".into());
    }
    if class.pac() && !matches!(waiting.park(Signing::None), Err(Error::Key(_))) {
        return Err("parked under no key".into());
    }
    waiting.park(key).map_err(text)?;
    if !waiting.stack().is_parked() {
        return Err("it is not parked".into());
    }
    let act = waiting.linked.scene.act();
    let all = |thread: &Thread, stack: &mut Stack| {
        // SAFETY: refused before anything runs; the activation is live.
        let went_on = unsafe {
            let activation = &*std::ptr::with_exposed_provenance(act);
            [
                stack.resume(thread, activation, 0).map(|_| ()),
                stack.enter(thread, activation, spans::small().start, [0; 4]).map(|_| ()),
            ]
        };
        let others = [
            stack.discard(),
            stack.reserve(1),
            stack.shrink_to_fit().map(|_| ()),
            stack.compact().map(|_| ()),
            stack.park(thread, Signing::A),
            stack.park(thread, Signing::B),
        ];
        let compacted = engine::compact_stacks([stack]);
        let all = went_on.into_iter().chain(others).chain(compacted.error.map(Err));
        all.filter(|result| *result != Err(Error::Parked)).collect::<Vec<_>>()
    };
    let scene = &mut waiting.linked.scene;
    let wrong = [all(&scene.thread, &mut scene.stack), foreign.with(&mut scene.stack, all)];
    if wrong.iter().any(|wrong| !wrong.is_empty()) {
        return Err(format!("parked: {wrong:?}"));
    }
    if class.pac() {
        // Nor by a thread whose shared key, its data key, or whose generic key is another.
        let (shared, data) = if key == Signing::B { (IB, DB) } else { (IA, DA) };
        for keys in [own | shared, own | data, own | GA, shared, GA, IA | IB | DA | DB | GA] {
            let stranger = Foreign::new(Keys::Anew(keys))?;
            let got = stranger.with(waiting.stack(), |thread, stack| stack.unpark(thread));
            if !elsewhere(&got) || !waiting.stack().is_parked() {
                return Err(format!("unparked by a thread with other keys {keys:#x}: {got:?}"));
            }
        }
        // A thread that changes its keys after it attached is asked anew.
        let turncoat = Foreign::new(Keys::Same)?;
        let got = turncoat.with(waiting.stack(), |thread, stack| {
            Keys::Anew(own).apply();
            stack.unpark(thread)
        });
        if !elsewhere(&got) {
            return Err(format!("unparked by a thread that has changed its keys: {got:?}"));
        }
    }
    foreign.with(waiting.stack(), |thread, stack| stack.unpark(thread)).map_err(text)?;
    waiting.finish(Some(&foreign))?;
    // Dropped while it is parked.
    foreign.with(waiting.stack(), |thread, stack| stack.park(thread, key)).map_err(text)?;
    waiting.unpark().map_err(text)?;
    waiting.enter()?;
    waiting.park(key).map_err(text)?;
    drop(waiting);
    Ok(Code::E)
}

/// A random program over one stack that suspends, is parked and goes on in either domain.
fn program(key: Signing, own: usize, seed: u64) -> Result<(), String> {
    let foreign = Foreign::new(Keys::Anew(own))?;
    let mut dice = Dice::new("S44", seed);
    let mut native = Dice::new("S44 outside", seed);
    let mut left = 150;
    let world = World::new(|world| match dice.below(12) {
        0 if world.depth() == 1 => Op::Suspend(word(&mut dice)),
        _ => spans::choose(world, &mut dice, &mut left, false),
    });
    let mut run = Run::new(Policy { poison: seed.is_multiple_of(2), ..policy() }, world)?;
    let mut got = run.enter(word(&mut native));
    let mut away = false;
    while let Ok(Exit::Suspended(_)) = got {
        let moves = native.below(2) == 0;
        let stays = native.below(3) == 0;
        if moves {
            let Run { stack, thread, .. } = &mut run;
            let park = |thread: &Thread, stack: &mut Stack| stack.park(thread, key);
            if away { foreign.with(stack, park) } else { park(thread, stack) }.map_err(text)?;
            away ^= !stays;
            let unpark = |thread: &Thread, stack: &mut Stack| {
                stack.unpark(thread)?;
                stack.compact()
            };
            if away { foreign.with(stack, unpark) } else { unpark(thread, stack) }.map_err(text)?;
        }
        let value = word(&mut native);
        got = run.resume_by(value, |stack, thread, act| {
            let go_on = move |thread: &Thread, stack: &mut Stack| {
                // SAFETY: as in `Waiting::finish`.
                unsafe { stack.resume(thread, &*std::ptr::with_exposed_provenance(act), value) }
            };
            if away { foreign.with(stack, go_on) } else { go_on(thread, stack) }
        });
    }
    run.world.verdict().map_err(|problem| format!("program {seed}: {problem}"))
}
