//! A39, A41: what would write a shadow stack, or turn it off, after the program's start has locked it.

use super::metadata_pooled::{attach, deep, expect, lease, slot_at, sums};
use super::shadow_tokens::{is, without};
use crate::child::{End, Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::memory::{peek, shadow_mappings};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::probe::{Slot, Word, forced, read};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

/// An instruction that writes a shadow stack, its code, and how it ends: signal and si_code.
struct Instruction {
    what: &'static str,
    code: &'static [u8],
    signal: i32,
    si_code: i32,
}

const ARM: bool = cfg!(target_arch = "aarch64");

/// With the place in the first argument's register and the word in the second's, then a return.
const INSTRUCTIONS: &[Instruction] = if ARM {
    &[
        // The kernel's answer to EC 0x2D, "GCS exception", for an instruction that is turned off.
        Instruction { what: "gcspushm", code: &[0x01, 0x77, 0x0b, 0xd5], signal: libc::SIGILL, si_code: 1 },
        Instruction { what: "gcsstr", code: &[0x01, 0x0c, 0x1f, 0xd9], signal: libc::SIGSEGV, si_code: 10 },
        Instruction { what: "gcssttr", code: &[0x01, 0x1c, 0x1f, 0xd9], signal: libc::SIGSEGV, si_code: 10 },
    ]
} else {
    &[
        // #UD: WR_SHSTK_EN is off.
        Instruction { what: "wrssq", code: &[0x48, 0x0f, 0x38, 0xf6, 0x37], signal: libc::SIGILL, si_code: 2 },
        Instruction { what: "wrssd", code: &[0x0f, 0x38, 0xf6, 0x37], signal: libc::SIGILL, si_code: 2 },
        // #GP: for supervisors.
        Instruction {
            what: "wrussq",
            code: &[0x66, 0x48, 0x0f, 0x38, 0xf5, 0x37],
            signal: libc::SIGSEGV,
            si_code: 128,
        },
    ]
};

const RETURN: &[u8] = if ARM { &[0xc0, 0x03, 0x5f, 0xd6] } else { &[0xc3] };

/// A39.
pub fn instructions(class: &Class) -> Report {
    if let Some(report) = without(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    lock(&mut tally);
    tally.control("no such instruction", &run(|| execute(&[])));
    for Instruction { what, code, signal, si_code } in INSTRUCTIONS {
        let end = run(|| execute(code).map(|_| Code::R));
        if is(&end, *signal, *si_code) {
            tally.seen(&format!("{what}: signal {signal} si_code {si_code}"), Code::X, &end);
        } else {
            tally.fail(format!("{what}: {end}"));
        }
    }
    tally.report()
}

/// The lock must be there: asserted where the system can be asked, and by what it answers to a change.
fn lock(tally: &mut Tally<'_>) {
    let locked = tally.class().features.locked;
    if !ARM && !locked.contains(cfi_stack::features::Mechanisms::SHSTK) {
        tally.fail("the shadow stack is not locked");
    }
    for (what, end, errno) in changes() {
        answered(tally, what, &end, errno);
    }
}

fn answered(tally: &mut Tally<'_>, what: &str, end: &End, errno: i32) {
    let answer = end.notes[0] as i32;
    match end.code(tally.class()) {
        Ok(Code::X) if answer == errno => tally.seen(&format!("{what}: errno {answer}"), Code::X, end),
        Ok(_) => tally.fail(format!("{what}: errno {answer}, not {errno}")),
        Err(text) => tally.fail(format!("{what}: {text}")),
    }
}

/// Asks the kernel to turn off, on, or loosen.
fn changes() -> Vec<(&'static str, End, i32)> {
    #[cfg(target_arch = "x86_64")]
    const CHANGES: [(&str, [usize; 2], i32); 5] = [
        ("ARCH_SHSTK_DISABLE", [0x5002, 1], libc::EPERM),
        ("ARCH_SHSTK_ENABLE WRSS", [0x5001, 2], libc::EPERM),
        ("ARCH_SHSTK_ENABLE again", [0x5001, 1], libc::EPERM),
        ("ARCH_SHSTK_UNLOCK", [0x5004, 1], libc::EPERM),
        ("ARCH_SHSTK_UNLOCK WRSS", [0x5004, 2], libc::EPERM),
    ];
    #[cfg(target_arch = "aarch64")]
    const CHANGES: [(&str, [usize; 2], i32); 4] = [
        ("PR_SET_SHADOW_STACK_STATUS off", [75, 0], libc::EBUSY),
        ("PR_SET_SHADOW_STACK_STATUS write", [75, 3], libc::EBUSY),
        ("PR_SET_SHADOW_STACK_STATUS push", [75, 5], libc::EBUSY),
        ("PR_SET_SHADOW_STACK_STATUS write and push", [75, 7], libc::EBUSY),
    ];
    let call = |arguments: [usize; 2]| {
        let (number, [option, argument]) = (if ARM { libc::SYS_prctl } else { ARCH_PRCTL }, arguments);
        // SAFETY: asks the kernel for what it must refuse.
        let answer = unsafe { libc::syscall(number, option, argument, 0_usize, 0_usize, 0_usize) };
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        page().notes[0].store(if answer == 0 { 0 } else { errno as u64 }, Relaxed);
        Ok(Code::X)
    };
    CHANGES.into_iter().map(|(what, arguments, errno)| (what, run(|| call(arguments)), errno)).collect()
}

/// Of x86-64 only.
const ARCH_PRCTL: libc::c_long = 158;

/// Has the instruction write, to the word that the shadow-stack pointer names, what stands there. It is put together here, so that no
/// program of ours contains one.
fn execute(instruction: &[u8]) -> Verdict {
    let code: Vec<u8> = instruction.iter().chain(RETURN).copied().collect();
    // SAFETY: a mapping of its own, written, then made executable.
    let place = unsafe {
        let place = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert!(place != libc::MAP_FAILED);
        place.cast::<u8>().copy_from_nonoverlapping(code.as_ptr(), code.len());
        assert_eq!(libc::mprotect(place, 4096, libc::PROT_READ | libc::PROT_EXEC), 0);
        synchronise(place.expose_provenance());
        place
    };
    let shadow = cpu::shadow_pointer();
    // SAFETY: shadow stacks are readable.
    let word = unsafe { peek(shadow) };
    // SAFETY: the code just written: at most one instruction, and a return.
    unsafe {
        let function = std::mem::transmute::<*mut libc::c_void, extern "C" fn(usize, u64)>(place);
        function(shadow, word);
    }
    Ok(Code::C)
}

/// Makes new code seen by this CPU.
fn synchronise(_place: usize) {
    // SAFETY: cache maintenance by address of a mapped line.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("dc cvau, {0}", "dsb ish", "ic ivau, {0}", "dsb ish", "isb", in(reg) _place, options(nostack));
    }
}

/// A41.
pub fn locked(class: &Class) -> Report {
    if let Some(report) = without(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    lock(&mut tally);
    for (what, verbs) in VERBS {
        tally.attack(
            &format!("no token at or above the pointer after {what}"),
            &run(|| leaves_none(verbs)),
            &[Code::C],
        );
    }
    #[cfg(target_arch = "x86_64")]
    {
        let end = run(mint);
        if is(&end, libc::SIGSEGV, 128) || is(&end, libc::SIGSEGV, 10) {
            tally.seen(&format!("saveprevssp behind a stub: signal 11 si_code {}", end.si_code), Code::X, &end);
        } else {
            tally.fail(format!("saveprevssp behind a stub: {end}"));
        }
    }
    tally.report()
}

/// `saveprevssp` where a stub has just left its own: there must be no previous-SSP token to make another of.
#[cfg(target_arch = "x86_64")]
fn mint() -> Verdict {
    let thread = attach()?;
    let stack = lease(&thread)?;
    // SAFETY: the lease is ours; the instruction faults, or is what the case denies.
    unsafe {
        forced::prepare(stack.slot(), sums, 3);
        expect(forced::resume(stack.slot(), stack.slot(), 1), 1, false)?;
        std::arch::asm!("clc", "saveprevssp", options(nostack));
    }
    Ok(Code::R)
}

/// One way to use the stubs, after which the shadow stacks are looked at, and on the stacks as well.
type Verbs = fn(NonNull<Slot>, NonNull<Slot>, &dyn Fn(usize)) -> Result<(), String>;

const VERBS: [(&str, Verbs); 5] = [
    ("prepare", |a, _, look| {
        // SAFETY: the stack is empty.
        unsafe { forced::prepare(a, sums, 3) };
        look(cpu::shadow_pointer());
        Ok(())
    }),
    ("resume and suspend", |a, _, look| {
        // SAFETY: the stack is empty, then suspended.
        unsafe {
            forced::prepare(a, looks, (&raw const look).expose_provenance());
            for value in [1, 2, 3] {
                let got = forced::resume(a, a, value);
                look(cpu::shadow_pointer());
                expect(got, value, value == 3)?;
            }
        }
        Ok(())
    }),
    ("switch_to", |a, b, look| {
        // SAFETY: both stacks are empty.
        unsafe {
            forced::prepare(b, looks, (&raw const look).expose_provenance());
            forced::prepare(a, switches, b.as_ptr().expose_provenance());
            let got = forced::resume(a, a, 1);
            look(cpu::shadow_pointer());
            expect(got, 1, false)?;
            forced::cancel(a);
            look(cpu::shadow_pointer());
            forced::cancel(b);
        }
        look(cpu::shadow_pointer());
        Ok(())
    }),
    ("throw", |a, _, look| {
        // SAFETY: the stack is empty, then suspended.
        unsafe {
            forced::prepare(a, looks, (&raw const look).expose_provenance());
            forced::resume(a, a, 1);
            let got = forced::throw(a, a, 2, thrown);
            look(cpu::shadow_pointer());
            forced::cancel(a);
            expect(got, 2, false)
        }
    }),
    ("cancel", |a, _, look| {
        for depth in [0, 3, 40] {
            // SAFETY: the stack is empty, then suspended.
            unsafe {
                forced::prepare(a, sums, depth);
                forced::resume(a, a, 1);
                forced::cancel(a);
            }
            look(cpu::shadow_pointer());
        }
        Ok(())
    }),
];

unsafe extern "C-unwind" fn thrown(arg: usize) -> usize {
    arg
}

/// Looks at its own shadow stack after every switch to it.
unsafe extern "C" fn looks(first: usize, look: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    // SAFETY: the closure outlives what is done with it.
    let look = unsafe { *std::ptr::with_exposed_provenance::<&dyn Fn(usize)>(look) };
    let mut value = first;
    while value < 3 {
        look(cpu::shadow_pointer());
        value = deep(slot, value, 2);
    }
    look(cpu::shadow_pointer());
    value
}

unsafe extern "C" fn switches(arg: usize, to: usize, slot: *mut Slot) -> usize {
    // SAFETY: runs on the slot's stack; the other one is ready.
    unsafe { forced::switch_to(slot_at(slot.expose_provenance()), slot_at(to), arg) }
}

fn leaves_none(verbs: Verbs) -> Verdict {
    let thread = attach()?;
    let (a, b) = (lease(&thread)?, lease(&thread)?);
    let mappings = shadow_mappings();
    let wrong = std::cell::Cell::new(0_usize);
    let look = |pointer: usize| {
        if let Some(place) = tokens_above(pointer, [a.slot(), b.slot()], &mappings) {
            wrong.set(place);
        }
    };
    verbs(a.slot(), b.slot(), &look)?;
    match wrong.get() {
        0 => Ok(Code::C),
        place => {
            // SAFETY: shadow stacks are readable.
            let word = unsafe { peek(place) };
            Err(format!(
                "{word:#x} at {place:#x} (shadow tops {:#x}, {:#x})",
                read(a.slot(), Word::ShadowTop),
                read(b.slot(), Word::ShadowTop)
            ))
        }
    }
}

/// The first word at or above the shadow-stack pointer that names a place on a shadow stack: a token, if only a used one.
fn tokens_above(pointer: usize, slots: [NonNull<Slot>; 2], mappings: &[Range<usize>]) -> Option<usize> {
    // A pooled shadow stack ends inside its mapping, the thread's own with it.
    let top = slots
        .into_iter()
        .map(|slot| read(slot, Word::ShadowTop) as usize)
        .filter(|&top| (top.wrapping_sub(SHADOW)..top).contains(&pointer))
        .chain(mappings.iter().filter(|mapping| mapping.contains(&pointer)).map(|mapping| mapping.end))
        .min()?;
    let names_a_place = |word: u64| mappings.iter().any(|mapping| mapping.contains(&((word & !7) as usize)));
    // SAFETY: shadow stacks are readable up to their end.
    (pointer..top).step_by(8).find(|&place| names_a_place(unsafe { peek(place) }))
}

/// No more than a pooled stack of this size has.
const SHADOW: usize = 12 << 10;
