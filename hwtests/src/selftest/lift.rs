//! Frames that are lifted to a further segment.

use super::link::{Linked, function, site, thunk};
use crate::attack::{policy, zero_address};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::managed::{self, Function};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::{Error, Exit, Policy, Stats};

const ARM: bool = cfg!(target_arch = "aarch64");
const LIFTED: usize = 2048;

pub(crate) fn recurse() -> Function {
    function!(lift_recurse, lift_recurse_end, 48, 64)
}

fn dive() -> Function {
    function!(lift_dive, lift_dive_end, 48, 48)
}

fn wave() -> Function {
    function!(lift_wave, lift_wave_end, 48, 80)
}

/// Registers the functions, as such that take their stack pointer back or as others.
pub(crate) fn register(retake: bool) -> Result<Registered, String> {
    let mut map = Registration::new();
    for function in [recurse(), dive(), wave()] {
        let layout = FrameLayout { retakes_sp: retake, ..FrameLayout::new(function.frame_bytes, function.signing) };
        let len = function.end.address() - function.start.address();
        map.function(function.start, len, layout).map_err(|error| error.to_string())?;
    }
    for site in [site!(lift_recurse_site), site!(lift_recurse_exit_site)] {
        map.safepoint(site, &[-24]).map_err(|error| error.to_string())?;
    }
    map.publish().map_err(|error| error.to_string())
}

pub(super) fn lifting() -> Policy {
    Policy { initial: 16384, maximum: 8 << 20, lift_above: 32 << 10, lift_bytes: LIFTED, poison: true, ..policy() }
}

fn right(got: &Result<Exit, Error>, depth: usize) -> bool {
    *got == Ok(Exit::Returned(managed::recursion_sum(depth as u64)))
}

/// S38.
pub fn frames(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for depth in [400, 700, 3000, 20_000] {
        let end = run(|| {
            let _code = register(true)?;
            let mut linked = Linked::new(lifting(), recurse(), 0, 0, 512)?;
            for round in 0..3 {
                let before = cpu::shadow_pointer();
                let got = linked.scene.recurse(recurse(), depth);
                if !right(&got, depth) || cpu::shadow_pointer() != before {
                    return Err(format!("round {round}: {got:x?}"));
                }
            }
            let stats = linked.scene.stack.stats();
            let deep = depth * if ARM { 80 } else { 64 } > (64 << 10);
            if (stats.lifts > 0) != deep || deep && (stats.rebound > 0) != class.pac() {
                return Err(format!("{stats:?}"));
            }
            // What a relocation copies grows with the stack; a lift does not.
            if stats.bytes_moved > 3 * (64 << 10) + stats.lifts * (4 * LIFTED as u64) {
                return Err(format!("{stats:?}"));
            }
            Ok(Code::C)
        });
        tally.attack(&format!("{depth} deep"), &end, &[Code::C]);
    }
    tally.attack("frames that do not take it back are relocated", &run(relocated), &[Code::C]);
    tally.attack("an overflow", &run(overflow), &[Code::E]);
    tally.attack("lifted frames within a linked segment, and return", &run(within_a_link), &[Code::C]);
    tally.report()
}

fn relocated() -> Verdict {
    let _code = register(false)?;
    let mut linked = Linked::new(lifting(), recurse(), 0, 0, 512)?;
    let got = linked.scene.recurse(recurse(), 3000);
    match linked.scene.stack.stats() {
        _ if !right(&got, 3000) => Err(format!("{got:x?}")),
        Stats { lifts: 0, segments: 0, growths: 3.., .. } => Ok(Code::C),
        stats => Err(format!("{stats:?}")),
    }
}

fn overflow() -> Verdict {
    let maximum = 1 << 20;
    let _code = register(true)?;
    let mut linked = Linked::new(Policy { maximum, ..lifting() }, recurse(), 0, 0, 512)?;
    for _ in 0..3 {
        let before = cpu::shadow_pointer();
        match linked.scene.enter(recurse(), 1_000_000, zero_address(), 0) {
            Err(Error::Overflow { needed, maximum: named }) if named == maximum && needed > maximum => {}
            other => return Err(format!("{other:x?}")),
        }
        let got = linked.scene.recurse(recurse(), 2000);
        if cpu::shadow_pointer() != before || !right(&got, 2000) {
            return Err(format!("afterwards: {got:x?}"));
        }
    }
    if linked.scene.stack.stats().lifts == 0 { Err("nothing was lifted".into()) } else { Ok(Code::E) }
}

fn within_a_link() -> Verdict {
    let _code = register(true)?;
    let mut linked = Linked::new(lifting(), recurse(), 0, 0, 512)?;
    for depth in [10, 3000, 1, 9000, 5] {
        for _ in 0..2 {
            let got = linked.scene.recurse(thunk(), depth);
            if !right(&got, depth) {
                return Err(format!("{depth} deep: {got:x?}"));
            }
        }
    }
    linked.scene.recurse_right(managed::recurse_a(), 300)?;
    if linked.scene.stack.stats().lifts == 0 { Err("nothing was lifted".into()) } else { Ok(Code::C) }
}

/// S39.
pub fn oscillation(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let frame = 16 + if ARM { wave().frame_bytes } else { 48 } as usize;
    // Calls deep where the segment of 64 KiB ends, reserve and all: the dives begin on either side of it.
    let edge = ((64 << 10) - 1024) / frame;
    for depth in edge - 3..edge + 9 {
        let end = run(|| wave_after_wave(depth, 500));
        tally.attack(&format!("500 dives from {depth} deep"), &end, &[Code::C]);
    }
    tally.attack("100,000 dives over the edge", &run(|| wave_after_wave(edge - 2, 100_000)), &[Code::C]);
    tally.report()
}

fn wave_after_wave(depth: usize, times: usize) -> Verdict {
    const DIVE: usize = 5;
    let _code = register(true)?;
    let mut linked = Linked::new(Policy { poison: false, ..lifting() }, recurse(), 0, 0, 512)?;
    for round in 0..2 {
        let before = linked.scene.stack.stats();
        let got = linked.scene.enter(wave(), depth, times, DIVE);
        if got != Ok(Exit::Returned((times * DIVE) as u64)) {
            return Err(format!("round {round}: {got:x?}"));
        }
        let stats = linked.scene.stack.stats();
        // The first descent of the first round makes the segments; each descent lifts once at most, whatever number of dives follow.
        if stats.lifts > before.lifts + 1 || stats.segments > 1 || round > 0 && stats.growths != before.growths {
            return Err(format!("round {round}: {stats:?}"));
        }
    }
    if linked.scene.stack.stats().lifts == 0 { Err("nothing was lifted".into()) } else { Ok(Code::C) }
}
