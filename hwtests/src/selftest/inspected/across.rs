//! Pictures of stacks that are more than one run of frames in one segment: linked, lifted, nested, suspended; before and after a move.

use super::{BETWEEN, PICTURES, look};
use crate::attack::policy;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::outcome::Code;
use crate::selftest::lift::{self, lifting};
use crate::selftest::link::{self, Linked};
use crate::selftest::spans::{self, Op, Run, World};
use crate::tally::Tally;
use cfi_stack::engine::{self, Activation};
use cfi_stack::inspect::{self, Mark, Owner, Picture, State, svg};
use cfi_stack::{Exit, Policy};

/// A frame that the program has made: a stub's, or a function's.
type Made = Option<Function>;

/// All of it, as attempts of S40.
pub(super) fn all(tally: &mut Tally, class: &Class) {
    for links in [0, 1, 2, 7] {
        tally.attack(&format!("{links} links within each other"), &run(|| linked(class, links)), &[Code::C]);
    }
    for depth in [500, 1500, 4000] {
        tally.attack(&format!("lifted frames, {depth} deep"), &run(|| lifted(class, depth)), &[Code::C]);
    }
    for entries in [1, 2, 5] {
        tally.attack(&format!("{entries} entries within each other"), &run(|| nested(class, entries)), &[Code::C]);
    }
    for depth in [1, 2, 60] {
        tally.attack(&format!("suspended, {depth} deep"), &run(|| suspended(class, depth)), &[Code::C]);
    }
}

/// Compares a picture with the frames that were made, segment by segment, the youngest first; idle segments are left out.
fn right(class: &Class, picture: &Picture, state: State, made: &[Vec<Made>]) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what}\n{picture}"));
    let segments: Vec<_> = picture.segments.iter().filter(|segment| segment.used != 0).collect();
    if picture.state != state || !picture.is_complete() || !picture.is_movable() || segments.len() != made.len() {
        return wrong("not the stack that there is");
    }
    for (segment, made) in segments.iter().zip(made) {
        let mut low = segment.top - segment.used;
        if segment.frames.len() != made.len() {
            return wrong("not all frames");
        }
        for (frame, made) in segment.frames.iter().zip(made) {
            let bytes = 16 + made.map_or(0, |function| function.frame_bytes as usize);
            let owner = match frame.owner {
                Owner::Managed(layout) => made.is_some_and(|function| function.frame_bytes == layout.frame_bytes),
                owner => owner == Owner::Stub && made.is_none(),
            };
            if (frame.low, frame.bytes, owner, frame.at.is_some()) != (low, bytes, true, made.is_some()) {
                return wrong("another frame");
            }
            low += bytes;
            // A stub signs as the compiled functions with key A do.
            let signing = made.map_or(managed::recurse_a().signing, |function| function.signing);
            let mark = match frame.mark {
                Mark::ReSigned(key) => class.pac() && key == signing,
                Mark::Compared => !class.pac() && picture.shadow.is_some(),
                Mark::Unsigned => !class.pac() && picture.shadow.is_none(),
            };
            if !mark {
                return wrong("another signature");
            }
        }
        if low != segment.top {
            return wrong("the frames do not end at the top");
        }
    }
    let frames: Vec<_> = picture.frames().zip(made.iter().flatten()).collect();
    for pair in frames.windows(2) {
        let (returns, at) = (pair[0].0.returns_to, pair[1].0.at);
        let inside = |function: &Function| {
            returns.is_some_and(|pc| (function.start.address()..=function.end.address()).contains(&pc.address()))
        };
        // What a run of frames begins with is a stub: what is above it has returned to no function.
        if pair[1].1.as_ref().is_some_and(|function| !inside(function) || at != returns) {
            return wrong("another return address");
        }
    }
    let entries = picture.shadow.map(|shadow| shadow.entries);
    if entries != class.shadow().then_some(Some(frames.len())) {
        return wrong("another shadow stack");
    }
    let (text, drawing) = (picture.to_string(), svg::picture(picture));
    let lines = 1 + frames.len() + picture.segments.len() + usize::from(picture.shadow.is_some());
    if text.lines().count() != lines || !drawing.starts_with("<svg") || !drawing.ends_with("</svg>\n") {
        return wrong("another text or drawing");
    }
    Ok(())
}

/// Two pictures, between which the youngest segment's frames have moved, and nothing else.
fn right_after_a_move(class: &Class, seen: &[Picture], state: State, made: &[Vec<Made>]) -> Result<(), String> {
    let [old, new] = seen else { return Err(format!("{} pictures instead of two", seen.len())) };
    right(class, old, state, made)?;
    right(class, new, state, made)?;
    let places = |picture: &Picture| -> Vec<(usize, usize)> {
        let used = picture.segments.iter().filter(|segment| segment.used != 0);
        used.map(|segment| (segment.base, segment.top)).collect()
    };
    let (old_places, new_places) = (places(old), places(new));
    if old_places[0] == new_places[0] || old_places[1..] != new_places[1..] {
        return Err(format!("other segments have moved\n{old}{new}"));
    }
    let drawing = svg::change(old, new);
    if !drawing.starts_with("<svg") || !drawing.ends_with("</svg>\n") {
        return Err("no drawing".into());
    }
    Ok(())
}

/// Has the youngest segment's frames move: there is no segment as large as what it asks for.
fn make_room(activation: &Activation, _: usize) {
    let sizes = |picture: Picture| picture.segments.iter().map(|segment| segment.top - segment.base).max();
    let largest = inspect::activation(activation).ok().and_then(sizes).unwrap_or(0);
    // SAFETY: the recursions declare their pointers.
    let _ = unsafe { engine::reserve(activation, largest) };
}

/// Recurses, and looks at the recursion's end, before and after a move.
fn looked(linked: &mut Linked, function: Function, depth: usize) -> Result<Vec<Picture>, String> {
    BETWEEN.set(Some(make_room));
    let act = linked.scene.act();
    let got = linked.scene.enter(function, depth, look as *const () as usize, act);
    if got != Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
        return Err(format!("a recursion {depth} deep gave {got:x?}"));
    }
    PICTURES.take().into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn linked(class: &Class, links: usize) -> Verdict {
    let mut linked = Linked::new(policy(), link::recurse(), 0, 0, 256)?;
    let seen = looked(&mut linked, link::recurse(), links)?;
    // On each segment but the youngest: link's own frame, the thunk's, the caller's.
    let mut made = vec![vec![None, Some(link::recurse())]];
    made.extend((0..links).map(|_| vec![None, Some(link::thunk()), Some(link::recurse())]));
    right_after_a_move(class, &seen, State::Running, &made)?;
    Ok(Code::C)
}

fn lifted(class: &Class, depth: usize) -> Verdict {
    let _code = lift::register(true)?;
    let mut linked = Linked::new(lifting(), lift::recurse(), 0, 0, 512)?;
    let seen = looked(&mut linked, lift::recurse(), depth)?;
    let lifts = linked.scene.stack.stats().lifts;
    let segments: Vec<usize> = seen[0].segments.iter().map(|segment| segment.frames.len()).collect();
    if lifts as usize + 1 != segments.len() || segments.iter().sum::<usize>() != depth + 2 {
        return Err(format!("{lifts} lifts, frames: {segments:?}"));
    }
    // How many are on which segment is the library's choice; whose they are is not. The youngest is exit's.
    let mut made: Vec<Vec<Made>> = segments.iter().map(|&frames| vec![Some(lift::recurse()); frames]).collect();
    made[0][0] = None;
    right_after_a_move(class, &seen, State::Running, &made)?;
    Ok(Code::C)
}

/// The frames of one entry, the youngest first: what native code was called by, then what [`spans`] was told to call.
fn entry(frames: usize) -> impl Iterator<Item = Made> {
    let called = (0..frames).rev().map(|index| Some(if is_large(index) { spans::large() } else { spans::small() }));
    std::iter::once(None).chain(called)
}

fn is_large(index: usize) -> bool {
    index % 3 == 2
}

fn nested(class: &Class, entries: usize) -> Verdict {
    /// Of the `index`th entry.
    fn frames(index: usize) -> usize {
        2 + 3 * (index % 3)
    }
    let class = class.clone();
    let mut looked = false;
    let world = World::new(move |world| {
        let entry_frames = world.frames.len() - world.bases[world.depth() - 1];
        if looked {
            return Op::Return;
        }
        if entry_frames < frames(world.depth() - 1) {
            return if is_large(entry_frames) { Op::Large(1) } else { Op::Small(1) };
        }
        if world.depth() < entries {
            return Op::Enter(2);
        }
        looked = true;
        let activation = world.activation();
        let picture = || inspect::activation(activation).map_err(|error| error.to_string());
        let all = (0..entries).rev().flat_map(|index| entry(frames(index))).collect();
        let verdict = picture().and_then(|old| {
            make_room(activation, 0);
            right_after_a_move(&class, &[old, picture()?], State::Running, &[all])
        });
        if let Err(problem) = verdict {
            world.note(problem);
        }
        Op::Return
    });
    let mut run = Run::new(policy(), world)?;
    let got = run.enter(7);
    run.world.verdict()?;
    if matches!(got, Ok(Exit::Returned(_))) { Ok(Code::C) } else { Err(format!("{got:x?}")) }
}

fn suspended(class: &Class, depth: usize) -> Verdict {
    let world = World::new(move |world| match world.frames.len() {
        frames if frames < depth && is_large(frames) => Op::Large(1),
        frames if frames < depth => Op::Small(1),
        _ => Op::Suspend(3),
    });
    let mut run = Run::new(Policy { poison: true, ..policy() }, world)?;
    if run.enter(7) != Ok(Exit::Suspended(3)) {
        return Err("it does not suspend".into());
    }
    let old = inspect::stack(&run.stack);
    run.stack.reserve(100_000).map_err(|error| error.to_string())?;
    let new = inspect::stack(&run.stack);
    right_after_a_move(class, &[old, new], State::Suspended, &[entry(depth).collect()])?;
    run.stack.discard().map_err(|error| error.to_string())?;
    run.forget();
    let idle = inspect::stack(&run.stack);
    if idle.state != State::Idle || idle.frames().next().is_some() {
        return Err(format!("discarded:\n{idle}"));
    }
    run.world.verdict()?;
    Ok(Code::C)
}
