//! A29: the words of a pooled stack's slot, and who waits for a running stack.
//!
//! Each word is rewritten at each moment of a stack's life, which then goes on to its end and to the next lease of the same stack. What
//! stops it is whoever looks first:
//! - the stubs, where a resumed context is sealed (arm64) or a shadow stack is on: they ask the read-only directory;
//! - `release` and the next `lease`, everywhere: a slot that does not say what the directory says of it is evidence.
//!
//! On x86-64 no directory knows the resumer, who may be any thread's own stack: its generation stands in its frame and must agree, its pc is
//! the shadow stack's, and that is all. A copy of the frame elsewhere is accepted, and which data the resumer's code works on is the
//! attacker's then (R). Where it returns to is not.

use super::metadata_pooled::{Suspended, address, attach, expect, lease, slot_at};
use super::{metadata_growable, metadata_links, metadata_records, metadata_shadows, metadata_suspended};
use crate::child::{self, Verdict, page, run};
use crate::class::{Class, Column};
use crate::cpu;
use crate::memory::{peek, peek_if_mapped, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pool::Lease;
use cfi_stack::probe::{Slot, Word, forced, read, write};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

/// The moments of a stack's life, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Leased,
    Ready,
    Running,
    Suspended,
    Finishing,
    Finished,
    Free,
}

use Moment::{Finished, Finishing, Free, Leased, Ready, Running};

const MOMENTS: [Moment; 7] = [Leased, Ready, Running, Moment::Suspended, Finishing, Finished, Free];

/// The codes in the columns: arm64 with PAC, with a GCS too, x86 with CET, nothing enforced. `None`: not to be shown there.
type Codes = [Option<Code>; 4];

/// What is written, given what stands there and the slot of another, suspended stack.
type Forgery = fn(u64, NonNull<Slot>) -> u64;

/// A rewritten word of the slot.
struct Row {
    what: &'static str,
    word: Word,
    forgery: Forgery,
    codes: fn(Moment) -> Codes,
}

const K: Option<Code> = Some(Code::K);
const B: Option<Code> = Some(Code::B);
const C: Option<Code> = Some(Code::C);

/// Found out by the pools, at the latest when the stack is leased again.
fn by_the_pool(_: Moment) -> Codes {
    [K; 4]
}

/// Where nothing is enforced a stack is prepared wherever its slot says: nothing is claimed there.
fn top(moment: Moment) -> Codes {
    [K, K, K, if moment == Leased { None } else { K }]
}

/// Identity is under the seals, too.
fn identity(moment: Moment) -> Codes {
    match moment {
        Leased | Finished | Free => [K; 4],
        _ => [B, B, K, K],
    }
}

const WORDS: [Row; 7] = [
    Row { what: "base, another's", word: Word::Base, forgery: |_, other| read(other, Word::Base), codes: by_the_pool },
    Row { what: "base, a page down", word: Word::Base, forgery: |word, _| word - 4096, codes: by_the_pool },
    Row { what: "top, another's", word: Word::Top, forgery: |_, other| read(other, Word::Top), codes: top },
    Row { what: "top, 1 KiB down", word: Word::Top, forgery: |word, _| word - 1024, codes: by_the_pool },
    Row {
        what: "shadow top, another's",
        word: Word::ShadowTop,
        forgery: |word, other| if word == 0 { 4096 } else { read(other, Word::ShadowTop) },
        codes: |_| [C, K, K, C],
    },
    Row { what: "chunk", word: Word::ChunkAndState, forgery: |word, _| word ^ 0xffff, codes: by_the_pool },
    Row {
        what: "identity, another's",
        word: Word::Identity,
        forgery: |_, other| read(other, Word::Identity),
        codes: identity,
    },
];

/// A rewritten word of the context of who waits.
struct Waiting {
    what: &'static str,
    attack: fn(NonNull<Slot>),
    codes: Codes,
    /// Where the one who waits is a pooled stack, which runs to its end afterwards.
    pooled: Codes,
}

const S: Option<Code> = Some(Code::S);
const R: Option<Code> = Some(Code::R);

const WAITING: [Waiting; 6] = [
    Waiting {
        what: "sp 16 up",
        attack: |slot| change(slot, Word::ResumerSp, |word| word + 16),
        codes: [B, B, K, None],
        pooled: [B, B, K, None],
    },
    Waiting { what: "sp to a copy of the frame", attack: copy_frame, codes: [B, B, R, None], pooled: [B, B, K, None] },
    Waiting {
        what: "seal",
        attack: |slot| change(slot, Word::ResumerSeal, |word| word ^ 1 << 40),
        codes: [B, B, C, None],
        pooled: [B, B, C, None],
    },
    Waiting {
        what: "generation",
        attack: |slot| change(slot, Word::ResumerGeneration, |word| word + 1),
        codes: [B, B, K, None],
        pooled: [B, B, K, None],
    },
    Waiting {
        what: "token 8 up",
        attack: |slot| change(slot, Word::ResumerToken, |word| word + 8),
        codes: [C, S, S, None],
        pooled: [C, S, S, None],
    },
    Waiting {
        what: "token 8 down",
        attack: |slot| change(slot, Word::ResumerToken, |word| word - 8),
        codes: [C, S, S, None],
        pooled: [C, S, S, None],
    },
];

/// A29.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let expected = |codes: Codes| match class.column() {
        Column::Pac => codes[0],
        Column::PacGcs => codes[1],
        Column::Cet => codes[2],
        Column::Bare => codes[3],
    };
    tally.control("", &run(|| life(&mut |_, _, _| {})));
    for Row { what, word, forgery, codes } in WORDS {
        for moment in MOMENTS {
            let Some(code) = expected(codes(moment)) else { continue };
            let end = run(|| {
                life(&mut |now, slot, other| {
                    if now == moment {
                        change(slot, word, |old| forgery(old, other));
                    }
                })
            });
            tally.attack(&format!("{what}, {moment:?}"), &end, &[code]);
        }
    }
    for Waiting { what, attack, codes, pooled } in WAITING {
        for moment in [Running, Finishing] {
            let Some(code) = expected(codes) else { continue };
            let mut made = false;
            let end = run(|| {
                life(&mut |now, slot, _| {
                    if now == moment {
                        made = true;
                        attack(slot);
                    } else if made && code == Code::R && runs_on_a_copy() {
                        child::end(Code::R);
                    }
                })
            });
            tally.attack(&format!("who waits: {what}, {moment:?}"), &end, &[code]);
        }
        let Some(code) = expected(pooled) else { continue };
        let end = run(|| chained(attack));
        tally.attack(&format!("who waits in a detached chain: {what}"), &end, &[code]);
    }
    metadata_records::all(&mut tally);
    metadata_growable::all(&mut tally);
    metadata_suspended::all(&mut tally);
    metadata_links::all(&mut tally);
    metadata_shadows::all(&mut tally);
    tally.report()
}

fn change(slot: NonNull<Slot>, word: Word, change: impl FnOnce(u64) -> u64) {
    // SAFETY: that is the attack.
    unsafe { write(slot, word, change(read(slot, word))) }
}

/// Puts a copy of the resumer's saved frame, and of what lies above it, into other memory, and names that.
fn copy_frame(slot: NonNull<Slot>) {
    /// Enough for the frames that run before the test is over.
    const WORDS: usize = (16 << 10) / 8;
    /// Room for what is called from there.
    const BELOW: usize = 64 << 10;
    let old = read(slot, Word::ResumerSp) as usize;
    let copy = Box::leak(vec![0_u64; BELOW / 8 + WORDS + 2].into_boxed_slice());
    let place = (copy.as_mut_ptr().expose_provenance() + BELOW + 15) & !15 | old & 15;
    for offset in (0..WORDS * 8).step_by(8) {
        if (old + offset).is_multiple_of(4096) && peek_if_mapped(old + offset).is_none() {
            break;
        }
        // SAFETY: both are mapped: the stack up to its end, and the copy.
        unsafe { poke(place + offset, peek(old + offset)) };
    }
    change(slot, Word::ResumerSp, |_| place as u64);
}

/// Whether this runs on other memory than the main thread's stack.
fn runs_on_a_copy() -> bool {
    let local = 0_u64;
    let here = (&raw const local).addr();
    std::fs::read_to_string("/proc/self/maps").unwrap_or_default().lines().any(|line| {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let bound = |hex| usize::from_str_radix(hex, 16).unwrap_or(0);
        line.ends_with("[heap]") && range.is_some_and(|(low, top)| (bound(low)..bound(top)).contains(&here))
    })
}

/// What is done at each moment.
type Hook<'a> = &'a mut dyn FnMut(Moment, NonNull<Slot>, NonNull<Slot>);

/// What runs on the stack gets this.
struct Part<'a> {
    hook: Hook<'a>,
    other: NonNull<Slot>,
}

unsafe extern "C" fn lives(arg: usize, part: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    // SAFETY: `life` waits meanwhile, and uses its part again only after this has suspended or returned.
    let part = || unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Part<'_>>(part) };
    let other = part().other;
    (part().hook)(Running, slot, other);
    // SAFETY: runs on the slot's stack.
    let next = unsafe { forced::suspend(slot, slot, arg + 1) };
    (part().hook)(Finishing, slot, other);
    next + 1
}

/// A stack's life: leased, prepared, resumed, suspended, finished, given back, and once more. Another waits suspended meanwhile, and goes on
/// afterwards.
fn life(hook: Hook<'_>) -> Verdict {
    let thread = attach()?;
    let neighbour = Suspended::new(&thread, 3)?;
    let mut part = Part { hook, other: neighbour.slot() };
    let mut first = None;
    for moments in [[Leased, Ready, Moment::Suspended, Finished, Free].as_slice(), &[]] {
        let stack = lease(&thread)?;
        if first.replace(address(&stack)).is_some_and(|first| first != address(&stack)) {
            return Err("the pool gave out another stack".into());
        }
        one_run(&stack, &mut part, moments)?;
        let slot = stack.slot();
        drop(stack);
        if moments.contains(&Free) {
            (part.hook)(Free, slot, part.other);
        }
        // The second run is the stack's next life: nothing is done to it.
        part.hook = Box::leak(Box::new(|_, _, _| {}));
    }
    neighbour.finish()?;
    Ok(Code::C)
}

/// The base record: the link and the return address of the oldest frame.
const LINK: usize = 16;

fn one_run(stack: &Lease, part: &mut Part<'_>, moments: &[Moment]) -> Result<(), String> {
    let (slot, other) = (stack.slot(), part.other);
    let data = std::ptr::from_mut(part).expose_provenance();
    let say = |moment| {
        if moments.contains(&moment) {
            // SAFETY: `lives` is not running when this is called.
            let part = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Part<'_>>(data) };
            (part.hook)(moment, slot, other);
        }
    };
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    // What the other stack keeps must stay. Its link may change: nobody reads it before it is written again.
    page().freeze_span(read(other, Word::OwnSp) as usize, read(other, Word::Top) as usize - LINK);
    say(Leased);
    // SAFETY: the lease is ours, its stack empty, then suspended where it suspends.
    unsafe {
        forced::prepare(slot, lives, data);
        say(Ready);
        expect(forced::resume(slot, slot, 1), 2, false)?;
        say(Moment::Suspended);
        expect(forced::resume(slot, slot, 5), 6, true)?;
    }
    say(Finished);
    page().thaw_span();
    Ok(())
}

/// What the inner stack of a chain gets: the outer one's slot.
unsafe extern "C" fn inner(arg: usize, outer: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    // SAFETY: runs on the slot's stack, which `outer` resumed.
    unsafe { forced::suspend(slot, slot_at(outer), arg + 1) }
}

unsafe extern "C" fn outer(arg: usize, inner: usize, _: *mut Slot) -> usize {
    // SAFETY: the inner one is ready.
    unsafe { forced::resume(slot_at(inner), slot_at(inner), arg) }.value + 1
}

/// A resumes B, B suspends both; who waits for B is rewritten; both are resumed as one, and B returns to A.
fn chained(attack: fn(NonNull<Slot>)) -> Verdict {
    let thread = attach()?;
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let (a, b) = (lease(&thread)?, lease(&thread)?);
    // SAFETY: both are ours and empty.
    unsafe {
        forced::prepare(b.slot(), inner, address(&a));
        forced::prepare(a.slot(), outer, address(&b));
        expect(forced::resume(a.slot(), a.slot(), 1), 2, false)?;
        attack(b.slot());
        expect(forced::resume(b.slot(), a.slot(), 7), 8, true)?;
    }
    Ok(Code::C)
}
