//! From native code that managed code calls, unwinders see everything up to main.

use crate::attack::{Scene, policy};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::managed;
use crate::memory::peek;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::{Exit, Policy};
use std::ffi::c_void;

/// Depths before the first growth, and after several.
const DEPTHS: [usize; 4] = [0, 3, 100, 400];

unsafe extern "C" {
    fn _Unwind_Backtrace(visit: extern "C" fn(*mut c_void, *mut c_void) -> i32, argument: *mut c_void) -> i32;
    fn _Unwind_GetIP(context: *mut c_void) -> usize;
    fn _Unwind_FindEnclosingFunction(pc: *const c_void) -> *const c_void;
    fn cfi_stack_enter();
    fn cfi_stack_exit();
}

#[derive(Default)]
struct Seen {
    pcs: Vec<usize>,
}

extern "C" fn visit(context: *mut c_void, seen: *mut c_void) -> i32 {
    // SAFETY: `collect` passes a live `Seen`, and the unwinder its context.
    let (seen, pc) = unsafe { (&mut *seen.cast::<Seen>(), _Unwind_GetIP(context)) };
    seen.pcs.push(cpu::strip(pc as u64) as usize);
    0
}

extern "C" fn collect(seen: usize, _: usize, _: usize) -> u64 {
    // SAFETY: walks and calls back.
    unsafe { _Unwind_Backtrace(visit, std::ptr::with_exposed_provenance_mut(seen)) };
    0
}

/// S06.
pub fn by_tables(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        for always in [false, true] {
            for depth in DEPTHS {
                let end = run(|| unwind(function, depth, always));
                let always = if always { ", moved at every call" } else { "" };
                tally.attack(&format!("{depth} deep{always}, {key}"), &end, &[Code::C]);
            }
        }
    }
    tally.report()
}

fn unwind(function: managed::Function, depth: usize, always: bool) -> Verdict {
    let mut scene = Scene::new(Policy { relocate_always: always, ..policy() })?;
    let mut seen = Seen::default();
    let native = collect as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let place = (&raw mut seen).expose_provenance();
    let result = scene.enter(function, depth, native, place);
    if result != Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
        return Err(format!("{result:x?}"));
    }
    let starts: Vec<usize> = seen
        .pcs
        .iter()
        // SAFETY: looks an address up in the unwind tables; a return address lies behind its call.
        .map(|&pc| unsafe { _Unwind_FindEnclosingFunction(std::ptr::without_provenance(pc - 1)) }.addr())
        .collect();
    let position = |what: &str, start: usize| {
        starts.iter().position(|&found| found == start).ok_or(format!("no {what} among {} frames", starts.len()))
    };
    let exit = position("exit", cfi_stack_exit as *const () as usize)?;
    let first = position("managed frame", function.start.address())?;
    let enter = position("enter", cfi_stack_enter as *const () as usize)?;
    let main = position("main", crate::main as *const () as usize)?;
    let managed = starts.iter().filter(|&&start| start == function.start.address()).count();
    if first != exit + 1 || enter != first + managed || managed != depth + 1 || main <= enter {
        return Err(format!("exit {exit}, {managed} managed from {first}, enter {enter}, main {main}, depth {depth}"));
    }
    grew_as_meant(&scene, depth, always)?;
    Ok(Code::C)
}

/// The shallow recursions show the time before the first growth, the deep ones the time after.
fn grew_as_meant(scene: &Scene, depth: usize, always: bool) -> Result<(), String> {
    let growths = scene.stack.stats().growths;
    if (growths > 0) == (always || depth >= 100) { Ok(()) } else { Err(format!("{growths} growths {depth} deep")) }
}

/// Whether Rust's own frames keep frame pointers here, std's included.
const RUST_KEEPS_THEM: bool = cfg!(target_arch = "aarch64");
/// More native frames than there are.
const NATIVE: usize = 64;

extern "C" fn walk(seen: usize, record: usize, _: usize) -> u64 {
    // SAFETY: `follow` passes a live `Seen`.
    let seen = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Seen>(seen) };
    let mut record = record;
    let entry_return = managed::entry_return().address();
    let mut native = 0;
    loop {
        // SAFETY: the chain is this thread's own, and followed no further than frame pointers are kept.
        let (next, word) = unsafe { (peek(record) as usize, peek(record + 8)) };
        let pc = cpu::strip(word) as usize;
        seen.pcs.push(pc);
        native += usize::from(native > 0 || pc == entry_return);
        let last = if RUST_KEEPS_THEM { NATIVE } else { 2 };
        // Native records go upwards; the oldest managed one leads to another stack.
        if native == last || native > 1 && next <= record {
            return 0;
        }
        record = next;
    }
}

/// S07. On x86-64 Rust keeps no frame pointers unless it is told to, so the walk ends at `enter`'s caller there.
pub fn by_frame_pointers(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        for always in [false, true] {
            for depth in DEPTHS {
                let end = run(|| follow(function, depth, always));
                let always = if always { ", moved at every call" } else { "" };
                tally.attack(&format!("{depth} deep{always}, {key}"), &end, &[Code::C]);
            }
        }
    }
    tally.report()
}

fn follow(function: managed::Function, depth: usize, always: bool) -> Verdict {
    let mut scene = Scene::new(Policy { relocate_always: always, ..policy() })?;
    let mut seen = Seen::default();
    let native = walk as extern "C" fn(usize, usize, usize) -> u64 as usize;
    let place = (&raw mut seen).expose_provenance();
    let result = scene.enter(function, depth, native, place);
    if result != Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
        return Err(format!("{result:x?}"));
    }
    // The youngest record returns into its caller, the oldest to enter, and enter's own into Rust.
    let inside = |pc: &usize| (function.start.address()..function.end.address()).contains(pc);
    let managed = seen.pcs.iter().take_while(|pc| inside(pc)).count();
    let [entry, ref rust @ ..] = seen.pcs[managed..] else { return Err(format!("{managed} managed frames alone")) };
    let callers: Vec<usize> = rust
        .iter()
        // SAFETY: looks an address up in the unwind tables.
        .map(|&pc| unsafe { _Unwind_FindEnclosingFunction(std::ptr::without_provenance(pc.wrapping_sub(1))) }.addr())
        .collect();
    let arrived = match RUST_KEEPS_THEM {
        true => callers.contains(&(crate::main as *const () as usize)),
        false => callers.first().is_some_and(|&caller| caller != 0),
    };
    if managed != depth || entry != managed::entry_return().address() || !arrived {
        return Err(format!("{managed} managed frames, then {entry:#x}, then {rust:x?}"));
    }
    grew_as_meant(&scene, depth, always)?;
    Ok(Code::C)
}

extern "C" fn panics(_: usize, _: usize, _: usize) -> u64 {
    let caught = std::panic::catch_unwind(|| {
        std::panic::resume_unwind(Box::new("a panic of native code"));
    });
    u64::from(caught.is_err()) * 1_000_000
}

/// S08.
pub fn panic_in_native(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for (function, key) in managed::recursions() {
        for depth in DEPTHS {
            let end = run(|| {
                let mut scene = Scene::new(policy())?;
                let native = panics as extern "C" fn(usize, usize, usize) -> u64 as usize;
                for _ in 0..3 {
                    let result = scene.enter(function, depth, native, 0);
                    if result != Ok(Exit::Returned(managed::recursion_sum(depth as u64) + 1_000_000)) {
                        return Err(format!("{result:x?}"));
                    }
                }
                Ok(Code::C)
            });
            tally.attack(&format!("{depth} deep, {key}"), &end, &[Code::C]);
        }
    }
    tally.report()
}
