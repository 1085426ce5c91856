//! A42, the stubs that measure what native code takes of the stack that runs.

use super::callers::{Kind, Stub, follow, look};
use super::{Sums, outer};
use crate::attack::{Scene, policy};
use crate::selftest::measured::code;
use crate::stepper;
use crate::tally::Tally;
use cfi_stack::Exit;
use cfi_stack::fudge::{self, Sampling, Site};

unsafe extern "C" {
    fn cfi_stack_measured();
    fn cfi_stack_fudge_call();
}

const MEASURED: usize = 0;
const FUDGE_CALL: usize = 1;

fn stubs() -> Vec<Stub> {
    vec![
        Stub::new("measured", cfi_stack_measured, Kind::Native),
        Stub::new("fudge_call", cfi_stack_fudge_call, Kind::Managed),
    ]
}

/// Bytes painted: each word is a few instructions.
const WINDOW: usize = 64;
/// Bytes that the callee touches: fewer and more than are painted.
const TAKES: [usize; 3] = [0, 24, 200];

/// Managed code calls native code on its own segment: with and without a measurement.
fn called(measures: bool) -> Result<(), String> {
    /// Managed frames.
    const DEPTH: usize = 2;
    let _code = code::register();
    let mut scene = Scene::new(policy())?;
    if measures {
        fudge::start(Sampling { window: WINDOW, every: 1 }).map_err(|error| error.to_string())?;
    }
    for takes in TAKES {
        let mut got = None;
        let mut run = || got = Some(scene.enter(code::recurse(), DEPTH, code::hog(), takes));
        stepper::through(look, || outer(&mut run));
        if got != Some(Ok(Exit::Returned((takes + DEPTH + 1) as u64))) {
            return Err(format!("{takes} bytes: {got:x?}"));
        }
    }
    match fudge::report().sites.iter().map(|site| site.calls).sum::<u64>() {
        calls if calls == if measures { TAKES.len() as u64 } else { 0 } => Ok(()),
        calls => Err(format!("{calls} calls measured")),
    }
}

unsafe extern "C" fn touches(bytes: usize) -> u64 {
    // SAFETY: the hog touches so many bytes below its stack pointer, which the caller has.
    unsafe { std::mem::transmute::<usize, extern "C" fn(usize) -> u64>(code::hog())(bytes) }
}

/// Native code has native code measured.
fn native() -> Result<(), String> {
    fudge::start(Sampling { window: WINDOW, every: 1 }).map_err(|error| error.to_string())?;
    for takes in TAKES {
        let mut got = 0;
        // SAFETY: this thread's own stack has far more below.
        let mut run = || got = unsafe { fudge::measured(Site::Named("stepped"), WINDOW, touches, takes) };
        stepper::through(look, || outer(&mut run));
        if got != takes as u64 {
            return Err(format!("{takes} bytes: {got}"));
        }
    }
    match fudge::report().sites.iter().map(|site| site.calls).sum::<u64>() {
        calls if calls == TAKES.len() as u64 => Ok(()),
        calls => Err(format!("{calls} calls measured")),
    }
}

/// Steps through both.
pub fn all(tally: &mut Tally<'_>) {
    let stubs = stubs();
    let functions = [code::recurse()];
    let mut sums = Sums::default();
    let mut follow = |what: &str, required: usize, body: &mut dyn FnMut() -> Result<(), String>| {
        follow(tally, &mut sums, what, (&stubs, &[required]), &functions, body);
    };
    follow("native code on the managed segment, measured", FUDGE_CALL, &mut || called(true));
    follow("native code on the managed segment", FUDGE_CALL, &mut || called(false));
    follow("native code measured by native code", MEASURED, &mut native);
    sums.say(tally);
}
