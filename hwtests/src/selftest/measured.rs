//! Native code that managed code calls on its own segment: what it takes is measured to the word, and nothing else changes.

pub(crate) mod code;

use crate::attack::Scene;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::fudge::{self, Sampling, Site, Usage};
use cfi_stack::pac::RawPc;
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack, engine};
use std::mem::transmute;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a call itself takes: its return address.
const CALL: usize = if cfg!(target_arch = "x86_64") { 8 } else { 0 };
/// The stub's frame below managed code's stack pointer.
const STUB: usize = if cfg!(target_arch = "x86_64") { 48 } else { 64 };
const RESERVE: usize = 8192;

fn policy() -> Policy {
    Policy { initial: 16384, maximum: 1 << 20, reserve: RESERVE, ..Policy::default() }
}

/// Enters the recursion and compares the result.
fn called(scene: &mut Scene, depth: usize, f: usize, a0: usize, value: u64) -> Result<(), String> {
    let before = cpu::shadow_pointer();
    let got = scene.enter(code::recurse(), depth, f, a0);
    if got != Ok(Exit::Returned(value + depth as u64 + 1)) {
        return Err(format!("{depth} deep: {got:x?}"));
    }
    if cpu::shadow_pointer() != before {
        return Err("the shadow-stack pointer is another".into());
    }
    Ok(())
}

fn usage() -> Result<Usage, String> {
    let report = fudge::report();
    match report.sites.iter().find(|usage| usage.site == Site::Code(code::site())) {
        Some(usage) => Ok(usage.clone()),
        None => Err(format!("the call is no site of\n{report}")),
    }
}

fn begin(sampling: Sampling) -> Result<(), String> {
    fudge::forget();
    fudge::start(sampling).map_err(|error| error.to_string())
}

/// S42.
pub fn hogs(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (what, depth) in [("on the first segment", 0), ("after growth", 200), ("after several", 2000)] {
        tally.attack(what, &run(|| to_the_word(depth)), &[Code::C]);
    }
    tally.attack("down to the base", &run(down_to_the_base), &[Code::C]);
    tally.attack("a reserve from the report suffices", &run(reserve), &[Code::C]);
    tally.attack("every seventh call", &run(sampled), &[Code::C]);
    tally.report()
}

fn to_the_word(depth: usize) -> Verdict {
    let _code = code::register();
    let mut scene = Scene::new(policy())?;
    for n in (0..=64).chain([500, 1000, 4000, 4001, RESERVE - STUB - CALL - 64]) {
        begin(Sampling::default())?;
        called(&mut scene, depth, code::hog(), n, n as u64)?;
        let usage = usage()?;
        let right = n.next_multiple_of(8) + CALL;
        if (usage.calls, usage.most, usage.clipped) != (1, right, 0) {
            return Err(format!("{n} bytes {depth} deep: {usage:?}"));
        }
    }
    if depth != 0 && scene.stack.stats().growths == 0 {
        return Err("the stack did not grow".into());
    }
    Ok(Code::C)
}

/// At every distance from the limit: the last word of a segment is looked at, none below it.
fn down_to_the_base() -> Verdict {
    let _code = code::register();
    let mut scene = Scene::new(Policy { initial: 4096, reserve: 1024, ..policy() })?;
    let mut painted = Vec::new();
    for depth in 0..60 {
        begin(Sampling { window: 1 << 20, every: 1 })?;
        called(&mut scene, depth, code::hog(), 200, 200)?;
        let usage = usage()?;
        if (usage.most, usage.clipped) != (200 + CALL, 0) {
            return Err(format!("{depth} deep: {usage:?}"));
        }
        painted.push(scene.stack.size());
    }
    match painted.last() {
        Some(&last) if last > 4096 => Ok(Code::C),
        _ => Err("the stack did not grow: the limit was never near".into()),
    }
}

fn reserve() -> Verdict {
    let _code = code::register();
    let n = 3000;
    begin(Sampling::default())?;
    let mut scene = Scene::new(policy())?;
    called(&mut scene, 10, code::hog(), n, n as u64)?;
    // What managed code takes below the limit: its frame, record and return address included, and the stub.
    let policy = Policy { initial: 8192, ..policy() }.reserve_from(&fudge::report(), 64 + STUB + 16);
    let policy = policy.map_err(|error| error.to_string())?;
    if policy.reserve != (n + CALL + 64 + STUB + 16).next_multiple_of(16) {
        return Err(format!("a reserve of {}", policy.reserve));
    }
    drop(scene);
    let mut scene = Scene::new(policy)?;
    for depth in 0..300 {
        called(&mut scene, depth, code::hog(), n, n as u64)?;
    }
    Ok(Code::C)
}

fn sampled() -> Verdict {
    let _code = code::register();
    let mut scene = Scene::new(policy())?;
    begin(Sampling { window: 4096, every: 7 })?;
    for _ in 0..70 {
        called(&mut scene, 3, code::hog(), 100, 100)?;
    }
    fudge::stop();
    for _ in 0..10 {
        called(&mut scene, 3, code::hog(), 1000, 1000)?;
    }
    let usage = usage()?;
    if (usage.calls, usage.most) != (10, 104 + CALL) {
        return Err(format!("{usage:?}"));
    }
    Ok(Code::C)
}

/// S43.
pub fn around(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    /// Calls natives and looks at what was measured.
    type Natives = fn(&mut Scene) -> Verdict;
    let natives: [(&str, Natives); 5] = [
        ("a native callee exits to the thread's stack", exits),
        ("a native callee measures another", nests),
        ("a native callee calls managed code, which cannot grow", calls_back),
        ("a native callee leaves", leaves),
        ("an activation without a stack", without),
    ];
    for (what, native) in natives {
        let end = run(|| {
            let _code = code::register();
            begin(Sampling::default())?;
            let mut scene = Scene::new(policy())?;
            for _ in 0..3 {
                native(&mut scene)?;
                called(&mut scene, 150, code::hog(), 40, 40)?;
            }
            Ok(Code::C)
        });
        tally.attack(what, &end, &[Code::C]);
    }
    tally.attack("four threads at once", &run(threads), &[Code::C]);
    tally.report()
}

type Stub = unsafe extern "C" fn(usize, usize, usize, usize, usize) -> u64;

/// # Safety
/// `pc` is a stub's that takes a function and three arguments.
unsafe fn stub(pc: RawPc) -> Stub {
    // SAFETY: the caller's.
    unsafe { transmute::<usize, Stub>(pc.address()) }
}

/// A place on the thread's own stack.
static NATIVE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_the_native_stack(n: usize, _: usize, _: usize) -> u64 {
    let here = 0_u8;
    let near = NATIVE.load(Ordering::Relaxed).abs_diff((&raw const here).addr()) < 64 << 10;
    // SAFETY: the hog returns its argument and has the room.
    let value = unsafe { transmute::<usize, extern "C" fn(usize) -> u64>(code::hog())(n) };
    if near { value } else { 0 }
}

extern "C" fn exit_from(n: usize, act: usize, _: usize) -> u64 {
    // SAFETY: the stub's contract: called on the managed segment of this activation.
    unsafe { stub(engine::stubs().exit)(act, on_the_native_stack as *const () as usize, n, 0, 0) }
}

fn exits(scene: &mut Scene) -> Verdict {
    let here = 0_u8;
    NATIVE.store((&raw const here).addr(), Ordering::Relaxed);
    fudge::forget();
    let n = 300_000;
    called(scene, 5, exit_from as *const () as usize, n, n as u64)?;
    // What runs on the thread's stack takes nothing here.
    match usage()? {
        usage if usage.most < 1024 && usage.clipped == 0 => Ok(Code::C),
        usage => Err(format!("{usage:?}")),
    }
}

extern "C" fn nest(n: usize, act: usize, _: usize) -> u64 {
    // SAFETY: as in `exit_from`.
    let first = unsafe { stub(fudge::stub())(act, code::hog(), n, 0, 0) };
    // SAFETY: as above; the second is smaller.
    let second = unsafe { stub(fudge::stub())(act, code::hog(), 8, 0, 0) };
    first + second
}

fn nests(scene: &mut Scene) -> Verdict {
    fudge::forget();
    called(scene, 5, nest as *const () as usize, 2000, 2008)?;
    let outer = usage()?;
    let report = fudge::report();
    let inner: Vec<usize> =
        report.sites.iter().filter(|usage| usage.site != outer.site).map(|usage| usage.most).collect();
    if inner == [2000 + CALL, 8 + CALL] && outer.most > 2000 + CALL && outer.most < 3000 {
        return Ok(Code::C);
    }
    Err(format!("{report}"))
}

extern "C" fn call_back(depth: usize, act: usize, _: usize) -> u64 {
    // SAFETY: the recursion keeps the platform's convention; its activation is the one that runs.
    let recurse = unsafe { stub(code::recurse().start) };
    // SAFETY: as above.
    unsafe { recurse(act, depth, code::hog(), 0, 0) }
}

fn calls_back(scene: &mut Scene) -> Verdict {
    let f = call_back as *const () as usize;
    called(scene, 5, f, 10, 11)?;
    match scene.enter(code::recurse(), 5, f, 10_000) {
        Err(Error::UnknownCode(_)) => Ok(Code::C),
        result => Err(format!("{result:x?}")),
    }
}

fn leaves(scene: &mut Scene) -> Verdict {
    match scene.enter(code::recurse(), 100, code::leave(), 77) {
        Ok(Exit::Left(77)) => Ok(Code::C),
        result => Err(format!("{result:x?}")),
    }
}

fn without(_: &mut Scene) -> Verdict {
    let idle = Activation::new();
    // SAFETY: without a stack the stub is a jump to the hog.
    match unsafe { stub(fudge::stub())((&raw const idle).addr(), code::hog(), 24, 0, 0) } {
        24 => Ok(Code::C),
        value => Err(format!("{value}")),
    }
}

fn threads() -> Verdict {
    let _code = code::register();
    begin(Sampling::default())?;
    let body = || -> Result<(), String> {
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        let mut stack = Stack::new(&thread, policy()).map_err(|error| error.to_string())?;
        let activation = Activation::new();
        for round in 0..100 {
            let arguments = [(&raw const activation).addr(), round * 3, code::hog(), 8 + round];
            // SAFETY: the recursion follows the engine's rules.
            let got = unsafe { stack.enter(&thread, &activation, code::recurse().start, arguments) };
            if got != Ok(Exit::Returned((8 + round + round * 3 + 1) as u64)) {
                return Err(format!("round {round}: {got:x?}"));
            }
        }
        Ok(())
    };
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(body)).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked".to_string())?).collect()
    });
    let () = Result::<Vec<()>, String>::map(results, |_| ())?;
    let usage = usage()?;
    if usage.calls != 400 || usage.most != 107_usize.next_multiple_of(8) + CALL {
        return Err(format!("{usage:?}"));
    }
    Ok(Code::C)
}
