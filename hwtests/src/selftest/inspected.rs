//! Pictures of a stack, taken by native code that its managed code has called: what they say must be what is known of it, and taking them changes
//! nothing.

mod across;

use crate::attack::{Scene, policy};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::{self, Activation};
use cfi_stack::inspect::{self, Mark, Owner, Picture, State, Target, svg};
use cfi_stack::{Error, Exit};
use std::cell::{Cell, RefCell};

/// What is done between two looks.
type Act = fn(&Activation, usize);

thread_local! {
    static PICTURES: RefCell<Vec<Result<Picture, Error>>> = const { RefCell::new(Vec::new()) };
    static BETWEEN: RefCell<Option<Act>> = const { RefCell::new(None) };
}

/// The native callee at a recursion's end: looks, does something, looks again. Returns 0.
extern "C" fn look(act: usize, frame: usize, _: usize) -> u64 {
    // SAFETY: the recursion passes its own activation, which the scene keeps.
    let activation = unsafe { &*std::ptr::with_exposed_provenance::<Activation>(act) };
    let picture = || PICTURES.with_borrow_mut(|pictures| pictures.push(inspect::activation(activation)));
    picture();
    if let Some(between) = BETWEEN.take() {
        between(activation, frame);
        picture();
    }
    0
}

/// Recurses, looks, and checks that the recursion comes back right. Returns the pictures.
fn pictures(
    scene: &mut Scene,
    function: Function,
    depth: usize,
    between: Option<fn(&Activation, usize)>,
) -> Result<Vec<Picture>, String> {
    BETWEEN.set(between);
    let before = cpu::shadow_pointer();
    let act = scene.act();
    let got = scene.enter(function, depth, look as *const () as usize, act);
    if got != Ok(Exit::Returned(managed::recursion_sum(depth as u64))) || cpu::shadow_pointer() != before {
        return Err(format!("a recursion {depth} deep gave {got:x?}"));
    }
    PICTURES.take().into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// Compares a picture with what is known of a recursion.
fn right(class: &Class, function: Function, depth: usize, picture: &Picture) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{depth} deep: {what}\n{picture}"));
    let frames: Vec<_> = picture.frames().collect();
    if picture.state != State::Running || !picture.is_complete() || !picture.is_movable() || frames.len() != depth + 2 {
        return wrong("not all frames");
    }
    let size = function.frame_bytes as usize + 16;
    let mut low = frames[0].low;
    for (index, frame) in frames.iter().enumerate() {
        let expected = if index == 0 { 16 } else { size };
        if frame.low != low || frame.bytes != expected || matches!(frame.owner, Owner::Managed(_)) != (index != 0) {
            return wrong("another frame");
        }
        low += frame.bytes;
        let signing = if index == 0 { managed::recurse_a().signing } else { function.signing };
        let mark = match frame.mark {
            Mark::ReSigned(key) => class.pac() && key == signing,
            Mark::Compared => !class.pac() && picture.shadow.is_some(),
            Mark::Unsigned => !class.pac() && picture.shadow.is_none(),
        };
        let pc = frame.returns_to.map_or(0, |pc| pc.address());
        let inside = (function.start.address()..=function.end.address()).contains(&pc);
        let last = index + 1 == frames.len();
        if !mark || inside == last || last && pc != managed::entry_return().address() {
            return wrong("another return address");
        }
        if index != 0 && (frame.pointers.len() != 1 || frame.pointers[0].target != Target::Own) {
            return wrong("another slot");
        }
    }
    let segment = &picture.segments[0];
    if low != segment.top || segment.used != size * (depth + 1) + 16 || segment.cut.is_some() {
        return wrong("another segment");
    }
    match picture.shadow {
        Some(shadow) if shadow.entries != Some(depth + 2) || shadow.room < depth * 8 => wrong("another shadow stack"),
        None if class.shadow() => wrong("no shadow stack"),
        _ => Ok(()),
    }
}

/// S40.
pub fn honest(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        let end = run(|| {
            let mut scene = Scene::new(policy())?;
            for depth in [0, 1, 5, 40, 200] {
                for picture in pictures(&mut scene, function, depth, None)? {
                    right(class, function, depth, &picture)?;
                }
            }
            Ok(Code::C)
        });
        tally.attack(&format!("each frame, {key}"), &end, &[Code::C]);
        let end = run(|| {
            let before = inspect::totals();
            let mut scene = Scene::new(policy())?;
            let make_room = |activation: &Activation, _: usize| {
                // SAFETY: the recursion declares its pointers.
                let _ = unsafe { engine::reserve(activation, 100_000) };
            };
            let seen = pictures(&mut scene, function, 30, Some(make_room))?;
            let [old, new] = &seen[..] else { return Err("two pictures were to be taken".into()) };
            right(class, function, 30, old)?;
            right(class, function, 30, new)?;
            if new.size() < old.size() + 100_000 || old.segments[0].top == new.segments[0].top {
                return Err(format!("the stack did not move\n{old}{new}"));
            }
            let drawing = svg::change(old, new);
            if drawing.matches("<rect class=\"managed\"").count() < 2 * 23 || !drawing.ends_with("</svg>\n") {
                return Err(format!("a drawing of {} bytes", drawing.len()));
            }
            let after = inspect::totals();
            let stats = scene.stack.stats();
            let counted =
                (after.growths - before.growths, after.frames - before.frames, after.rebound - before.rebound);
            if counted != (stats.growths, stats.frames_moved, stats.rebound) || stats.growths == 0 {
                return Err(format!("{after:?}, but {stats:?}"));
            }
            let idle = inspect::stack(&scene.stack);
            if idle.state != State::Idle || idle.frames().next().is_some() || idle.size() != scene.stack.size() {
                return Err(format!("idle:\n{idle}"));
            }
            Ok(Code::C)
        });
        tally.attack(&format!("before and after a move, {key}"), &end, &[Code::C]);
    }
    across::all(&mut tally, class);
    tally.attack("not in a native callee", &run(elsewhere), &[Code::C]);
    tally.report()
}

fn elsewhere() -> Verdict {
    let scene = Scene::new(policy())?;
    match inspect::activation(&scene.activation) {
        Err(Error::NotInExit) => Ok(Code::C),
        result => Err(format!("{result:?}")),
    }
}

/// S41.
pub fn garbage(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let lies: [(&str, Lie); 6] = [
        ("itself", |record| record as u64),
        ("downwards", |record| record as u64 - 64),
        ("out of the segment", |_| 0x1000),
        ("a word beyond", |record| record as u64 + 72),
        ("the highest address", |_| u64::MAX),
        ("null", |_| 0),
    ];
    for (what, lie) in lies {
        for slot in [0, 8] {
            let end = run(|| rewritten(lie, slot));
            tally.attack(&format!("{}: {what}", ["frame pointer", "return address"][slot / 8]), &end, &[Code::C]);
        }
    }
    if class.pac() {
        tally.attack("a picture tells no wrong signature from a right one", &run(no_oracle), &[Code::C]);
    }
    tally.report()
}

/// From a record's address the word that is written there.
type Lie = fn(usize) -> u64;

thread_local! {
    static LIE: Cell<(Lie, usize)> = const { Cell::new((|_| 0, 0)) };
}

/// Rewrites a word of a frame record in the middle, looks, and puts it back.
fn rewritten(lie: Lie, slot: usize) -> Verdict {
    LIE.set((lie, slot));
    let mut scene = Scene::new(policy())?;
    let between = |activation: &Activation, frame: usize| {
        let (lie, slot) = LIE.get();
        let place = frame + slot;
        // SAFETY: a word of the recursion's youngest frame record, which is put back before anything goes there.
        let word = unsafe { peek(place) };
        // SAFETY: as above.
        unsafe { poke(place, lie(frame)) };
        PICTURES.with_borrow_mut(|pictures| pictures.push(inspect::activation(activation)));
        // SAFETY: as above.
        unsafe { poke(place, word) };
    };
    let seen = pictures(&mut scene, managed::recurse_a(), 20, Some(between))?;
    let [before, cut, after] = &seen[..] else { return Err("three pictures were to be taken".into()) };
    if cut.is_complete() || cut.frames().count() >= before.frames().count() || !cut.to_string().contains("cut at") {
        return Err(format!("the picture does not say that it is cut\n{cut}"));
    }
    if before.to_string() != after.to_string() {
        return Err(format!("looking changed something\n{before}{after}"));
    }
    svg::change(before, cut);
    Ok(Code::C)
}

/// Flips each bit that is a signature's with 48-bit addresses: nobody can tell.
fn no_oracle() -> Verdict {
    let mut scene = Scene::new(policy())?;
    let between = |activation: &Activation, frame: usize| {
        // SAFETY: as in `rewritten`.
        let word = unsafe { peek(frame + 8) };
        for bit in 48..55 {
            // SAFETY: as in `rewritten`.
            unsafe { poke(frame + 8, word ^ 1 << bit) };
            PICTURES.with_borrow_mut(|pictures| pictures.push(inspect::activation(activation)));
        }
        // SAFETY: as in `rewritten`.
        unsafe { poke(frame + 8, word) };
    };
    let seen = pictures(&mut scene, managed::recurse_a(), 20, Some(between))?;
    if seen.len() < 4 {
        return Err("there are no bits to flip".into());
    }
    match seen.windows(2).find(|pair| pair[0].to_string() != pair[1].to_string()) {
        None => Ok(Code::C),
        Some(pair) => Err(format!("{}{}", pair[0], pair[1])),
    }
}
