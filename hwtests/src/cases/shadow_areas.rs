//! A40: a suspended stack's shadow stack is unmapped; one overflows.
//!
//! Nobody can catch the overflow of a shadow stack: the kernel has to push the signal frame's token there, cannot, and ends the
//! process (Linux on x86-64 and arm64). A tracer sees the state in which it ends.

use super::metadata_pooled::{Suspended, attach, expect, lease, slot_at};
use super::shadow_tokens::{is, without};
use crate::child::{How, Verdict, page, run};
use crate::class::Class;
use crate::memory::sum;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pool::Lease;
use cfi_stack::probe::{Slot, Word, forced, read};
use cfi_stack::thread::Thread;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Notes: the place that must fault; the neighbour's shadow stack, its words, their sum before and after.
const PLACE: usize = 0;
const LOW: usize = 1;
const WORDS: usize = 2;
const BEFORE: usize = 3;
const AFTER: usize = 4;

/// A40.
pub fn all(class: &Class) -> Report {
    if let Some(report) = without(class) {
        return report;
    }
    let mut tally = Tally::new(class);
    tally.control("mapped", &run(|| unmapped(false)));
    let end = run(|| unmapped(true));
    if is(&end, libc::SIGSEGV, 1) && end.address == end.notes[PLACE] {
        tally.seen("unmapped, resumed: signal 11 si_code 1 at the token", Code::X, &end);
    } else {
        tally.fail(format!("unmapped, resumed: {end}"));
    }
    tally.control("a recursion that fits", &run(|| recursion(false)));
    overflow(&mut tally);
    tally.report()
}

fn note(index: usize, value: usize) {
    page().notes[index].store(value as u64, SeqCst);
}

fn unmapped(unmap: bool) -> Verdict {
    let thread = attach()?;
    let stack = Suspended::new(&thread, 3)?;
    let top = read(stack.slot(), Word::ShadowTop) as usize;
    note(PLACE, read(stack.slot(), Word::OwnToken) as usize);
    if unmap {
        // SAFETY: that is the attack.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(top - ROOM), ROOM) };
    }
    stack.finish()?;
    Ok(if unmap { Code::R } else { Code::C })
}

/// Bytes of shadow stack that a stack of 16 KiB has: half of it and room for handlers, in whole pages.
const ROOM: usize = 12 << 10;

fn overflow(tally: &mut Tally<'_>) {
    if tally.class().user_mode_emulator {
        // Nobody can trace there.
        let end = run(|| recursion(true));
        if end.how == How::Killed(libc::SIGSEGV) {
            tally.seen("an overflow: killed by signal 11 that no handler saw", Code::X, &end);
        } else {
            tally.fail(format!("an overflow: {end}"));
        }
        return;
    }
    let end = run(|| traced(|| recursion(true)));
    let [_, _, _, before, after, killed, ..] = end.notes;
    if end.how != How::Ended(Ok(Code::X)) || killed as i32 != libc::SIGSEGV {
        tally.fail(format!("an overflow: {end}, signal {killed}"));
    } else if before == 0 || before != after {
        tally.fail(format!("an overflow changed the neighbour: {before:#x} {after:#x}"));
    } else {
        tally.seen("an overflow: killed by signal 11 that no handler saw, the neighbour intact", Code::X, &end);
    }
}

/// Two leases of which the first's shadow stack lies right below the second's.
fn neighbours(thread: &Thread) -> Result<(Lease, Lease), String> {
    let mut leases = (0..8).map(|_| lease(thread)).collect::<Result<Vec<_>, _>>()?;
    let top = |lease: &Lease| read(lease.slot(), Word::ShadowTop);
    leases.sort_by_key(top);
    let upper = leases.pop().ok_or("no lease")?;
    let lower = leases.pop().ok_or("no lease")?;
    Ok((lower, upper))
}

/// Recurses on the upper of two neighbours, without data frames to speak of.
fn recursion(endless: bool) -> Verdict {
    let thread = attach()?;
    let (lower, upper) = neighbours(&thread)?;
    let tops = [&lower, &upper].map(|lease| read(lease.slot(), Word::ShadowTop) as usize);
    if tops[1] - tops[0] > 4 * ROOM {
        return Err(format!("the shadow stacks are no neighbours: {tops:x?}"));
    }
    // SAFETY: the lease is ours.
    unsafe {
        forced::prepare(lower.slot(), super::metadata_pooled::sums, 3);
        expect(forced::resume(lower.slot(), lower.slot(), 1), 1, false)?;
    }
    note(PLACE, tops[1] - ROOM);
    note(LOW, tops[0] - ROOM);
    note(WORDS, ROOM / 8);
    // SAFETY: the neighbour's shadow stack.
    page().notes[BEFORE].store(unsafe { sum(tops[0] - ROOM, ROOM / 8) }, SeqCst);
    page().freeze_span(tops[0] - ROOM, tops[0]);
    // SAFETY: the lease is ours.
    unsafe {
        forced::prepare(upper.slot(), recurses, usize::from(endless));
        expect(forced::resume(upper.slot(), upper.slot(), 1), 1, true)?;
    }
    page().thaw_span();
    // SAFETY: it is suspended, and nobody points into it.
    unsafe { forced::cancel(lower.slot()) };
    Ok(Code::C)
}

unsafe extern "C" fn recurses(arg: usize, endless: usize, slot: *mut Slot) -> usize {
    std::hint::black_box(slot_at(slot.expose_provenance()));
    if endless == 0 {
        return arg;
    }
    // Every call takes a word of the shadow stack, and of the data stack no more (x86) or nothing (arm64).
    // SAFETY: it does not come back.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!("2:", "call 2b", options(noreturn))
    }
    // SAFETY: it does not come back.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("2:", "bl 2b", options(noreturn))
    }
}

/// Runs `body` in a child that this one traces; notes what it looks like when it is killed, and by which signal.
fn traced(body: impl FnOnce() -> Verdict) -> Verdict {
    const KILLED: usize = 5;
    // SAFETY: this process has one thread; the child goes on as this one would.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the parent is there to trace.
        unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        return body();
    }
    let mut status = 0;
    loop {
        // SAFETY: our own child; fills one integer.
        if unsafe { libc::waitpid(child, &mut status, 0) } != child {
            return Err("the traced child is lost".into());
        }
        if !libc::WIFSTOPPED(status) {
            break;
        }
        let signal = libc::WSTOPSIG(status);
        if signal == libc::SIGSEGV {
            let [low, words] = [LOW, WORDS].map(|index| page().notes[index].load(Relaxed) as usize);
            let mut copy = vec![0_u64; words];
            let local = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: words * 8 };
            let remote = libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(low), iov_len: words * 8 };
            // SAFETY: the kernel fills the copy.
            let read = unsafe { libc::process_vm_readv(child, &local, 1, &remote, 1, 0) };
            // SAFETY: the copy is live.
            let seen = unsafe { sum(copy.as_ptr().expose_provenance(), words) };
            note(AFTER, if read == words as isize * 8 { seen as usize } else { 0 });
        }
        // SAFETY: our own child, stopped.
        unsafe { libc::ptrace(libc::PTRACE_CONT, child, 0, signal) };
    }
    note(KILLED, if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) as usize } else { 0 });
    Ok(Code::X)
}
