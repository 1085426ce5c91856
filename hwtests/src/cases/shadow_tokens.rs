//! A35, A36, A37: the tokens that shadow stacks are entered by.
//!
//! A token is consumed by who restores it, so that of two who try one wins: the CPU sees to that, and the tests go to it directly
//! where the library looks first. What the library sees to is whose token it is: the CPU takes any that lives. The directory knows the
//! shadow area of every pooled stack; it does not know that of who waits for one. Another's token there is restored, and the next return
//! is not the one that stands on that shadow stack.

use super::metadata_pooled::{Suspended, address, attach, deep, expect, lease, slot_at};
use crate::child::{self, End, Handler, Verdict, page, run};
use crate::class::{Class, Feature};
use crate::cpu;
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::probe::{Slot, Word, forced, frame, read, write};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};

/// The report where there is no shadow stack.
pub fn without(class: &Class) -> Option<Report> {
    let missing = if cfg!(target_arch = "x86_64") { Feature::Shstk } else { Feature::Gcs };
    (!class.shadow()).then(|| Report::skip(&[missing], "this thread has no shadow stack"))
}

/// Restores the token at an address, goes there, and comes back. Nothing is called meanwhile.
///
/// # Safety
/// This thread has a shadow stack. What the token belongs to is in use by nobody.
#[inline(always)]
unsafe fn restore(token: usize) {
    // SAFETY: the caller's. Both stacks' tokens are where they were before.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "rdsspq {back}",
            "sub {back}, 8",
            "rstorssp [{token}]",
            "saveprevssp",
            "rstorssp [{back}]",
            "saveprevssp",
            token = in(reg) token,
            back = out(reg) _,
            options(nostack),
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!(
            "sys #3, c7, c7, #2, {token}",
            "sysl {back}, #3, c7, c7, #3",
            "sys #3, c7, c7, #2, {back}",
            "sysl {back}, #3, c7, c7, #3",
            token = in(reg) token,
            back = out(reg) _,
            options(nostack),
        );
    }
}

/// Restores the token at an address, notes one more winner at `winners`, and stays there until `losers` is not 0 any more.
///
/// # Safety
/// As [`restore`].
#[inline(always)]
unsafe fn restore_and_stay(token: usize, winners: &AtomicU64, losers: &AtomicU64) {
    // SAFETY: as in `restore`; the words are live.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "rdsspq {back}",
            "sub {back}, 8",
            "rstorssp [{token}]",
            "saveprevssp",
            "lock inc qword ptr [{winners}]",
            "2:",
            "pause",
            "cmp qword ptr [{losers}], 0",
            "je 2b",
            "rstorssp [{back}]",
            "saveprevssp",
            token = in(reg) token,
            winners = in(reg) winners.as_ptr(),
            losers = in(reg) losers.as_ptr(),
            back = out(reg) _,
            options(nostack),
        );
    }
    // SAFETY: as in `restore`; the words are live.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!(
            "sys #3, c7, c7, #2, {token}",
            "sysl {back}, #3, c7, c7, #3",
            "2:",
            "ldaxr {word}, [{winners}]",
            "add {word}, {word}, #1",
            "stlxr {failed:w}, {word}, [{winners}]",
            "cbnz {failed:w}, 2b",
            "3:",
            "ldar {word}, [{losers}]",
            "cbz {word}, 3b",
            "sys #3, c7, c7, #2, {back}",
            "sysl {back}, #3, c7, c7, #3",
            token = in(reg) token,
            winners = in(reg) winners.as_ptr(),
            losers = in(reg) losers.as_ptr(),
            back = out(reg) _,
            word = out(reg) _,
            failed = out(reg) _,
            options(nostack),
        );
    }
}

/// Where the idle token of a leased stack lies.
fn idle_token(slot: NonNull<Slot>) -> usize {
    read(slot, Word::ShadowTop) as usize - 8
}

/// A35.
pub fn used_again(class: &Class) -> Report {
    if let Some(report) = without(class) {
        return report;
    }
    /// Races, each in a fresh child.
    const RACES: usize = 100;
    let mut tally = Tally::new(class);
    tally.control("the context is set back to what it is", &run(|| replayed(false)));
    tally.attack("a consumed context, its frame and its seal are set back", &run(|| replayed(true)), &[Code::S]);
    tally.control("one after the other, given back between", &run(|| in_turn(true)));
    tally.attack("a token that was taken and not given back", &run(|| in_turn(false)), &[Code::S]);
    for race in 1..=RACES {
        let end = run(raced);
        let [winners, losers, ..] = end.notes;
        if race == RACES || end.code(class) != Ok(Code::S) || (winners, losers) != (1, 1) {
            tally.attack(&format!("two threads restore one token, {race} races"), &end, &[Code::S]);
            if (winners, losers) != (1, 1) {
                tally.fail(format!("{winners} won and {losers} lost"));
            }
            break;
        }
    }
    tally.report()
}

/// What the replaying stack gets.
struct Replay {
    victim: NonNull<Slot>,
    context: Vec<u64>,
    frame: Vec<u64>,
    attack: bool,
}

const CONTEXT: [Word; 4] = [Word::OwnSp, Word::OwnSeal, Word::OwnToken, Word::OwnGeneration];

/// Suspends from far down; resumed, it resumes another from where it is.
unsafe extern "C" fn victim(other: usize, _: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    let got = deep(slot, 1, 40);
    // SAFETY: the other one is ready.
    unsafe { forced::resume(slot_at(other), slot_at(other), got) }.value
}

/// Puts back what a suspended stack left, although that runs, and resumes it.
unsafe extern "C" fn replayer(_: usize, replay: usize, _: *mut Slot) -> usize {
    // SAFETY: `replayed` waits for this.
    let replay = unsafe { &*std::ptr::with_exposed_provenance::<Replay>(replay) };
    if !replay.attack {
        return 5;
    }
    for (word, value) in CONTEXT.into_iter().zip(&replay.context) {
        // SAFETY: that is the attack.
        unsafe { write(replay.victim, word, *value) };
    }
    for (index, value) in replay.frame.iter().enumerate() {
        // SAFETY: that is the attack.
        unsafe { poke(replay.context[0] as usize + index * 8, *value) };
    }
    // SAFETY: that is the attack.
    unsafe { forced::resume(replay.victim, replay.victim, 9) }.value
}

fn replayed(attack: bool) -> Verdict {
    let thread = attach()?;
    let (a, b) = (lease(&thread)?, lease(&thread)?);
    let mut replay = Replay { victim: a.slot(), context: Vec::new(), frame: Vec::new(), attack };
    let data = (&raw mut replay).expose_provenance();
    // SAFETY: both are ours and empty.
    unsafe {
        forced::prepare(b.slot(), replayer, data);
        forced::prepare(a.slot(), victim, 0);
        expect(forced::resume(a.slot(), a.slot(), address(&b)), 1, false)?;
    }
    replay.context = CONTEXT.into_iter().map(|word| read(a.slot(), word)).collect();
    let sp = replay.context[0] as usize;
    // SAFETY: a saved frame lies there.
    replay.frame = (0..frame::SIZE / 8).map(|word| unsafe { peek(sp + word * 8) }).collect();
    // SAFETY: `a` is suspended.
    expect(unsafe { forced::resume(a.slot(), a.slot(), 3) }, 5, true)?;
    Ok(Code::C)
}

fn in_turn(given_back: bool) -> Verdict {
    let thread = attach()?;
    let stack = lease(&thread)?;
    let token = idle_token(stack.slot());
    if given_back {
        // SAFETY: nothing is on the stack.
        unsafe {
            restore(token);
            restore(token);
        }
        return Ok(Code::C);
    }
    // SAFETY: `sums` is suspended on it then: the idle token is consumed.
    unsafe {
        forced::prepare(stack.slot(), super::metadata_pooled::sums, 3);
        expect(forced::resume(stack.slot(), stack.slot(), 1), 1, false)?;
        restore(token);
    }
    Ok(Code::R)
}

static EVIDENCE: AtomicUsize = AtomicUsize::new(0);

/// The loser's signal: waits for the winner, then leaves the evidence.
extern "C" fn lost(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// Longer than any emulator takes.
    const PATIENCE: usize = 1 << 32;
    let [winners, losers, ..] = &page().notes;
    losers.fetch_add(1, SeqCst);
    for _ in 0..PATIENCE {
        if winners.load(SeqCst) != 0 {
            break;
        }
        std::hint::spin_loop();
    }
    // SAFETY: the evidence handler's address, put there before.
    let evidence = unsafe { std::mem::transmute::<usize, Handler>(EVIDENCE.load(Relaxed)) };
    evidence(signal, info, context);
}

fn raced() -> Verdict {
    let thread = attach()?;
    let stack = lease(&thread)?;
    let token = idle_token(stack.slot());
    EVIDENCE.store(child::handler_of(libc::SIGSEGV), Relaxed);
    child::handle(libc::SIGSEGV, lost, libc::SA_ONSTACK);
    let [winners, losers, ..] = &page().notes;
    let ready = AtomicUsize::new(0);
    let contend = || {
        ready.fetch_add(1, SeqCst);
        while ready.load(SeqCst) < 2 {
            std::hint::spin_loop();
        }
        // SAFETY: nothing is on the stack. Who wins stays there until the other has lost.
        unsafe { restore_and_stay(token, winners, losers) };
        // The one who lost ends the process.
        loop {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(contend);
        scope.spawn(contend);
    });
    Ok(Code::R)
}

/// What is done to a stack's slot, given another's.
type Attack = fn(NonNull<Slot>, NonNull<Slot>);

/// A36.
pub fn paired(class: &Class) -> Report {
    if let Some(report) = without(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("the own tokens", &run(|| swapped(|_, _| {})));
    let attacks: [(&str, Attack, Code); 4] = [
        ("another's token", |a, b| copy(b, a, &[Word::OwnToken]), Code::K),
        (
            "another's token of a ready stack",
            |a, _| set(a, Word::OwnToken, read(a, Word::ShadowTop) as usize + 8),
            Code::K,
        ),
        (
            "another's stack pointer",
            |a, b| copy(b, a, &[Word::OwnSp, Word::OwnGeneration]),
            if cfg!(target_arch = "aarch64") { Code::B } else { Code::K },
        ),
        (
            "another's whole context",
            |a, b| copy(b, a, &CONTEXT),
            if cfg!(target_arch = "aarch64") { Code::B } else { Code::K },
        ),
    ];
    for (what, attack, code) in attacks {
        tally.attack(what, &run(|| swapped(attack)), &[code]);
    }
    // Between two stacks whose code suspends at the same place the CPU alone sees nothing: it goes on with the other's returns.
    tally.control("nobody's changed", &run(|| waiting(|_, _| {})));
    let codes: &[Code] = if cfg!(target_arch = "aarch64") { &[Code::B] } else { &[Code::S] };
    tally.attack(
        "who waits: a suspended stack's token",
        &run(|| waiting(|slot, other| set(slot, Word::ResumerToken, read(other, Word::OwnToken) as usize))),
        codes,
    );
    tally.report()
}

fn set(slot: NonNull<Slot>, word: Word, value: usize) {
    // SAFETY: that is the attack.
    unsafe { write(slot, word, value as u64) }
}

fn copy(from: NonNull<Slot>, to: NonNull<Slot>, words: &[Word]) {
    for &word in words {
        set(to, word, read(from, word) as usize);
    }
}

/// Two stacks suspended at the same place and depth; `attack(a, b)`, and a goes on.
fn swapped(attack: Attack) -> Verdict {
    let thread = attach()?;
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let (a, b) = (Suspended::new(&thread, 3)?, Suspended::new(&thread, 3)?);
    attack(a.slot(), b.slot());
    a.finish()?;
    b.finish()?;
    Ok(Code::C)
}

/// What the stack that attacks who waits for it gets.
struct Waits {
    other: NonNull<Slot>,
    attack: Attack,
}

unsafe extern "C" fn waited_for(arg: usize, waits: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    // SAFETY: `waiting` waits for this.
    let waits = unsafe { &*std::ptr::with_exposed_provenance::<Waits>(waits) };
    (waits.attack)(slot, waits.other);
    // SAFETY: runs on the slot's stack.
    unsafe { forced::suspend(slot, slot, arg + 1) }
}

/// Not inlined: it returns after the switch.
#[inline(never)]
fn resumes(slot: NonNull<Slot>, arg: usize) -> usize {
    // SAFETY: the slot is ready or suspended.
    std::hint::black_box(unsafe { forced::resume(slot, slot, arg) }.value)
}

fn waiting(attack: Attack) -> Verdict {
    let thread = attach()?;
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let other = Suspended::new(&thread, 3)?;
    let stack = lease(&thread)?;
    let mut waits = Waits { other: other.slot(), attack };
    // SAFETY: the lease is ours.
    unsafe { forced::prepare(stack.slot(), waited_for, (&raw mut waits).expose_provenance()) };
    if resumes(stack.slot(), 1) != 2 || resumes(stack.slot(), 7) != 7 {
        return Err("another value came back".into());
    }
    other.finish()?;
    Ok(Code::C)
}

/// A37.
pub fn forged(class: &Class) -> Report {
    if let Some(report) = without(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("the kernel's token", &run(|| in_turn(true)));
    let ordinary = run(ordinary_memory);
    if class.user_mode_emulator && ordinary.code(class) == Ok(Code::R) {
        return Report::skip(&[], "QEMU's user mode keeps shadow stacks in ordinary memory: a token there is restored");
    }
    tally.attack("forced, a token in ordinary memory", &ordinary, &[Code::W]);
    tally.attack("forced, a word of a shadow stack that is no token", &run(no_token), &[Code::S]);
    tally.attack(
        "the own token, in ordinary memory",
        &run(|| swapped(|a, _| set(a, Word::OwnToken, token_elsewhere()))),
        &[Code::K],
    );
    tally.attack(
        "the own token, a return address",
        &run(|| swapped(|a, _| set(a, Word::OwnToken, read(a, Word::OwnToken) as usize + 8))),
        &[Code::S],
    );
    let attack = |slot: NonNull<Slot>, _: NonNull<Slot>| set(slot, Word::ResumerToken, token_elsewhere());
    tally.attack("who waits: a token in ordinary memory", &run(|| waiting(attack)), &[Code::W]);
    tally.report()
}

/// A word of ordinary memory that looks like a token, where a store by the switch must fault.
pub(super) fn token_elsewhere() -> usize {
    let block = Box::leak(vec![0_u64; 512].into_boxed_slice()).as_mut_ptr().expose_provenance();
    let place = (block + 2048) & !15;
    let token = if cfg!(target_arch = "x86_64") { (place + 8) | 1 } else { (place & !0xfff) | 1 };
    // SAFETY: within the block.
    unsafe { poke(place, token as u64) };
    page().store.store(place as u64, Relaxed);
    place
}

fn ordinary_memory() -> Verdict {
    let place = token_elsewhere();
    // SAFETY: that is the attack.
    unsafe { restore(place) };
    Ok(Code::R)
}

fn no_token() -> Verdict {
    let thread = attach()?;
    let stack = lease(&thread)?;
    // SAFETY: the word below the idle token was never written.
    unsafe { restore(idle_token(stack.slot()) - 8) };
    Ok(Code::R)
}

/// What the parent is told of a child: kept for the cases that judge an end themselves.
pub fn is(end: &End, signal: i32, si_code: i32) -> bool {
    end.how == child::How::Caught && (end.signal, end.si_code) == (signal, si_code)
}
