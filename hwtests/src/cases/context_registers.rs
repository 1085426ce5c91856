//! A03 and A04: a saved frame pointer, or another callee-saved register, is changed.
//!
//! arm64 seals the frame pointer always, x19-x28 and d8-d15 with the full seal. x86 seals nothing: R, and the value that arrives is
//! the attacker's. The floating-point control words are under no seal on either.

use super::context_looking::{Register, look_at_registers, seen};
use super::context_scene::{
    SAME, Scene, Side, Target, attacked_resumer, attacked_suspended, before_the_next_suspension, change, nothing_looks,
    prepare, resume, sealed_or, to_the_end,
};
use crate::child::{Verdict, run};
use crate::class::{Class, Column};
use crate::memory::peek;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::probe::{self, frame};
use std::cell::Cell;
use std::rc::Rc;

/// Where the saved frame has FPCR, or MXCSR in its lower half.
const CONTROL: usize = if cfg!(target_arch = "x86_64") { 0 } else { 160 };
/// Rounding towards zero: FPCR bits 23:22, MXCSR bits 14:13.
const TO_ZERO: u64 = if cfg!(target_arch = "x86_64") { 3 << 13 } else { 3 << 22 };

/// A word of the saved frame, by which bits it is changed, and where they arrive.
struct Saved {
    name: &'static str,
    offset: usize,
    by: u64,
    arrives: Register,
}

const FRAME_POINTER: Saved =
    Saved { name: "frame pointer", offset: frame::RECORD, by: 0x40, arrives: Register::FramePointer };

#[cfg(target_arch = "x86_64")]
const CALLEE_SAVED: [Saved; 1] =
    [Saved { name: "rbx", offset: frame::CALLEE_SAVED, by: 0xbad0_0000, arrives: Register::CalleeSaved }];

#[cfg(target_arch = "aarch64")]
const CALLEE_SAVED: [Saved; 2] = [
    Saved { name: "x19", offset: frame::CALLEE_SAVED, by: 0xbad0_0000, arrives: Register::CalleeSaved },
    Saved { name: "d8", offset: frame::D8, by: 0xbad0_0000, arrives: Register::Vector },
];

const CONTROL_WORD: Saved =
    Saved { name: "floating-point control", offset: CONTROL, by: TO_ZERO, arrives: Register::Control };

/// A03.
pub fn frame_pointer(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    controls(&mut tally);
    both(&mut tally, &FRAME_POINTER, sealed_or(class, Code::R));
    tally.report()
}

/// A04.
pub fn callee_saved(class: &Class) -> Report {
    if let Some(report) = nothing_looks(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    controls(&mut tally);
    for register in CALLEE_SAVED.iter().chain([&CONTROL_WORD]) {
        both(&mut tally, register, Code::R);
    }
    if class.column() != Column::Cet {
        tally.control("full seal, suspended", &run(|| fully_sealed(Side::Own, |_| {})));
        tally.control("full seal, resumer", &run(|| fully_sealed(Side::Resumer, |_| {})));
        for register in &CALLEE_SAVED {
            for side in [Side::Own, Side::Resumer] {
                let what = format!("{}, {side:?}, full seal", register.name);
                tally.attack(
                    &what,
                    &run(|| fully_sealed(side, move |target| corrupt(target, side, register))),
                    &[Code::B],
                );
            }
        }
        for side in [Side::Own, Side::Resumer] {
            let what = format!("{}, {side:?}, full seal", CONTROL_WORD.name);
            tally.attack(
                &what,
                &run(|| arrives(&CONTROL_WORD, |attack| fully_sealed(side, move |at| attack(at, side)))),
                &[Code::R],
            );
        }
    }
    tally.report()
}

fn controls(tally: &mut Tally<'_>) {
    tally.control("suspended", &run(|| attacked_suspended(|_| {})));
    tally.control("resumer", &run(|| attacked_resumer(|_| {})));
}

/// Attacks the register of a suspended stack and of a resumer.
fn both(tally: &mut Tally<'_>, register: &'static Saved, code: Code) {
    let name = register.name;
    let own = run(|| arrives(register, |attack| attacked_suspended(move |at| attack(at, Side::Own))));
    tally.attack(&format!("{name}, suspended"), &own, &[code]);
    let resumer = run(|| arrives(register, |attack| attacked_resumer(move |at| attack(at, Side::Resumer))));
    tally.attack(&format!("{name}, resumer"), &resumer, &[code]);
}

fn corrupt(target: Target, side: Side, register: &Saved) {
    change(target.frame(side, register.offset), |word| word ^ register.by);
}

/// R when the run completes and what arrives first is what the attacker planted.
fn arrives(register: &'static Saved, play: impl FnOnce(Attack) -> Verdict) -> Verdict {
    let planted = Rc::new(Cell::new(None));
    let note = planted.clone();
    play(Box::new(move |target, side| {
        corrupt(target, side, register);
        look_at_registers();
        // SAFETY: a word of the saved frame.
        note.set(Some((side, unsafe { peek(target.frame(side, register.offset)) })));
    }))?;
    let Some((side, planted)) = planted.get() else { return Err("the attack was never made".into()) };
    let arrived = seen(side, register.arrives);
    // MXCSR is the lower half of its word.
    let planted =
        if register.offset == CONTROL && cfg!(target_arch = "x86_64") { planted & 0xffff_ffff } else { planted };
    if arrived == planted { Ok(Code::R) } else { Err(format!("{arrived:#x} arrived instead of {planted:#x}")) }
}

type Attack = Box<dyn FnOnce(Target, Side)>;

fn fully_sealed(side: Side, attack: impl FnOnce(Target) + 'static) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.lease()?;
    // SAFETY: just leased, nothing is prepared on it.
    unsafe { probe::ask_full_seal(target.0) };
    prepare(target, SAME);
    if side == Side::Resumer {
        before_the_next_suspension(move || attack(target));
        resume(target, 0).is(1, false)?;
    } else {
        resume(target, 0).is(1, false)?;
        attack(target);
    }
    to_the_end(target)
}
