//! A47: overflows that no check sees. The guard does.

use crate::attack::{Scene, policy};
use crate::child::{End, Verdict, page, run};
use crate::class::Class;
use crate::managed::{self, Function};
use crate::memory::peek;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::{self, Activation};
use cfi_stack::pac::RawPc;

/// The CPU pushes the return address of a call itself, so the stub's own push is one word further down.
const PUSHED_BY_CALL: usize = if cfg!(target_arch = "x86_64") { 8 } else { 0 };
/// Longer than any prologue.
const PROLOGUE: u64 = 32;

/// A47.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let stubs = engine::stubs();
    tally.control("", &run(|| Scene::new(policy())?.recurse_right(managed::recurse_a(), 400).map(|()| Code::C)));
    tally.attack("first touch", &run(|| at_the_edge(0, managed::spin().start)), &[Code::G]);
    for (what, stub) in [("exit's own push", stubs.exit), ("grow's own push", stubs.grow)] {
        let end = run(|| at_the_edge(PUSHED_BY_CALL, stub));
        tally.attack(what, &end, &[Code::G]);
        in_prologue(&mut tally, what, &end, stub);
    }
    tally.attack("a frame of 12 KiB on 4 KiB", &run(|| enter(managed::big_frame(), 0, 0)), &[Code::G]);
    tally.report()
}

fn in_prologue(tally: &mut Tally<'_>, what: &str, end: &End, stub: RawPc) {
    if end.signal != 0 && end.pc.wrapping_sub(stub.address() as u64) > PROLOGUE {
        tally.fail(format!("{what}: not there but at {:#x}", end.pc));
    }
}

fn at_the_edge(above: usize, target: RawPc) -> Verdict {
    enter(managed::edge(), above, target.address())
}

/// Tells the guard's place, which follows from the limit that managed code sees.
extern "C" fn tell_guard(activation: usize, _: usize, _: usize) -> u64 {
    // SAFETY: the live activation.
    let limit = unsafe { peek(activation + Activation::LIMIT_OFFSET as usize) } as usize;
    page().guard(limit - policy().reserve, policy().guard);
    0
}

/// A scene whose guard the evidence page knows.
pub fn guarded_scene() -> Result<Scene, String> {
    let mut scene = Scene::new(policy())?;
    let tell = tell_guard as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let act = scene.act();
    scene.enter(managed::recurse_a(), 0, tell, act).map_err(|error| error.to_string())?;
    Ok(scene)
}

fn enter(function: Function, a1: usize, a2: usize) -> Verdict {
    let mut scene = guarded_scene()?;
    let result = scene.enter(function, a1, a2, policy().reserve);
    Err(format!("no guard was met: {result:x?}"))
}
