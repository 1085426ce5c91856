//! Backtraces from pooled stacks, by the unwind tables and by frame records: through whoever resumed them, to main.

mod framed;

use super::switching::{address, attach, lease, slot_at};
use crate::backtrace::by_tables;
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::stepper::{self, function_at};
use crate::tally::Tally;
use cfi_stack::coroutine::{Coroutine, Yielder};
use cfi_stack::pool::Lease;
use cfi_stack::probe::{Entry, Slot, forced};
use std::cell::RefCell;
use std::hint::black_box;
use std::ptr::NonNull;

/// S15.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("three stacks deep, resumed by one and then by another", &run(nested), &[Code::C]);
    tally.attack("the innermost resumed by itself", &run(reparented), &[Code::C]);
    tally.attack("a chain detached and resumed as one", &run(detached), &[Code::C]);
    tally.attack("switched to, and thrown into", &run(switched_and_thrown), &[Code::C]);
    tally.attack("resumed by another thread", &run(on_another_thread), &[Code::C]);
    tally.attack("coroutines, std's own backtrace", &run(coroutines), &[Code::C]);
    tally.attack("frame records, of a running and of a suspended stack", &run(framed::records), &[Code::C]);
    let end = run(framed::profiled);
    let [samples, in_switches, ..] = end.notes;
    let what = format!("a profiler walks frame records {samples} times, {in_switches} of them in a switch");
    tally.attack(&what, &end, &[Code::C]);
    match stepper::unavailable(class) {
        Some(reason) => tally.say(format!("not at every instruction: {reason}")),
        None => {
            let codes = framed::codes();
            let (end, stepped) = stepper::run(&codes, framed::stepped);
            let steps: u64 = stepped.iter().map(|code| code.steps).sum();
            tally.attack(&format!("at {steps} instructions of switches, both walks"), &end, &[Code::C]);
            for code in stepped.iter().filter(|code| code.steps == 0) {
                tally.fail(format!("no step in {}", code.name));
            }
        }
    }
    tally.report()
}

thread_local! {
    /// The functions of the frames at each look, youngest first, by their start.
    static SEEN: RefCell<Vec<Vec<usize>>> = const { RefCell::new(Vec::new()) };
}

#[inline(never)]
fn look() {
    let functions = by_tables().iter().map(|frame| function_at(frame.pc - 1)).collect();
    SEEN.with_borrow_mut(|seen| seen.push(functions));
}

/// A function's start.
macro_rules! start {
    ($function:expr) => {
        ($function as *const () as usize, stringify!($function))
    };
}

/// Whether the frames of the look `index` hold these functions in this order, and none of the others.
fn expect(index: usize, wanted: &[(usize, &str)], unwanted: &[(usize, &str)]) -> Result<(), String> {
    let functions = SEEN.with_borrow(|seen| seen.get(index).cloned()).ok_or(format!("there was no look {index}"))?;
    let mut rest = functions.iter();
    for (start, name) in wanted {
        if !rest.any(|function| function == start) {
            return Err(format!("look {index}: no {name} in its place among {} frames", functions.len()));
        }
    }
    match unwanted.iter().find(|(start, _)| functions.contains(start)) {
        Some((_, name)) => Err(format!("look {index}: {name} is not there any more")),
        None => Ok(()),
    }
}

fn main_too() -> (usize, &'static str) {
    start!(crate::main)
}

unsafe extern "C" fn inner(_: usize, _: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    loop {
        look();
        // SAFETY: runs on the slot's stack.
        black_box(unsafe { forced::suspend(slot, slot, 1) });
    }
}

unsafe extern "C" fn middle(_: usize, next: usize, slot: *mut Slot) -> usize {
    relay::<2>(next, slot)
}

unsafe extern "C" fn outer(_: usize, next: usize, slot: *mut Slot) -> usize {
    relay::<3>(next, slot)
}

#[inline(always)]
fn relay<const MARK: usize>(next: usize, slot: *mut Slot) -> usize {
    let (slot, next) = (slot_at(slot.expose_provenance()), slot_at(next));
    loop {
        // SAFETY: the next stack is ready or suspended; runs on the slot's stack.
        unsafe {
            forced::resume(next, next, 0);
            black_box(forced::suspend(slot, slot, MARK));
        }
    }
}

#[inline(never)]
fn first_resumer(last: NonNull<Slot>, first: NonNull<Slot>) {
    // SAFETY: the callers': ready or suspended, a stack or a chain.
    black_box(unsafe { forced::resume(last, first, 11) });
}

#[inline(never)]
fn second_resumer(last: NonNull<Slot>, first: NonNull<Slot>) {
    // SAFETY: as above.
    black_box(unsafe { forced::resume(last, first, 22) });
}

/// Stacks that will run these, each with the address of the next one's slot, the last with 0.
fn three(entries: [Entry; 3]) -> Result<[Lease; 3], String> {
    let thread = attach()?;
    let leases = [lease(&thread)?, lease(&thread)?, lease(&thread)?];
    std::mem::forget(thread);
    let next = [address(&leases[1]), address(&leases[2]), 0];
    for ((lease, entry), next) in leases.iter().zip(entries).zip(next) {
        // SAFETY: the lease is ours, its stack empty.
        unsafe { forced::prepare(lease.slot(), entry, next) };
    }
    Ok(leases)
}

/// Stacks that will run `outer`, `middle` and `inner`.
fn layered() -> Result<[Lease; 3], String> {
    three([outer, middle, inner])
}

/// Gives the stacks up. Each is suspended.
fn cancel(leases: &[Lease]) {
    for lease in leases {
        // SAFETY: suspended, and nothing points into its frames.
        unsafe { forced::cancel(lease.slot()) };
    }
}

fn stacks() -> [(usize, &'static str); 3] {
    [start!(inner), start!(middle), start!(outer)]
}

/// The stacks' functions, then the resumer, then main.
fn through(stacks: &[(usize, &'static str)], resumer: (usize, &'static str)) -> Vec<(usize, &'static str)> {
    stacks.iter().copied().chain([resumer, main_too()]).collect()
}

fn nested() -> Verdict {
    let leases = layered()?;
    let a = leases[0].slot();
    first_resumer(a, a);
    second_resumer(a, a);
    first_resumer(a, a);
    let (first, second) = (start!(first_resumer), start!(second_resumer));
    expect(0, &through(&stacks(), first), &[second])?;
    expect(1, &through(&stacks(), second), &[first])?;
    expect(2, &through(&stacks(), first), &[second])?;
    cancel(&leases);
    Ok(Code::C)
}

fn reparented() -> Verdict {
    let leases = layered()?;
    let (a, c) = (leases[0].slot(), leases[2].slot());
    first_resumer(a, a);
    second_resumer(c, c);
    let gone = [stacks()[1], stacks()[2], start!(first_resumer)];
    expect(1, &through(&stacks()[..1], start!(second_resumer)), &gone)?;
    cancel(&leases);
    Ok(Code::C)
}

/// Suspends itself together with all the stacks down to the one whose slot is `first`.
unsafe extern "C" fn detaches(_: usize, first: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    loop {
        look();
        // SAFETY: runs on the slot's stack, which the first has resumed through another.
        black_box(unsafe { forced::suspend(slot, slot_at(first), 4) });
    }
}

fn detached() -> Verdict {
    let leases = layered()?;
    let (a, c) = (leases[0].slot(), leases[2].slot());
    // SAFETY: it never ran; it is prepared anew.
    unsafe {
        forced::cancel(c);
        forced::prepare(c, detaches, address(&leases[0]));
    }
    first_resumer(a, a);
    second_resumer(c, a);
    let chain = [start!(detaches), stacks()[1], stacks()[2]];
    expect(0, &through(&chain, start!(first_resumer)), &[])?;
    expect(1, &through(&chain, start!(second_resumer)), &[start!(first_resumer)])?;
    // The chain is suspended as one; no verb gives a part of it up.
    std::mem::forget(leases);
    Ok(Code::C)
}

unsafe extern "C" fn switches(_: usize, to: usize, slot: *mut Slot) -> usize {
    // SAFETY: runs on the slot's stack; the other is ready.
    black_box(unsafe { forced::switch_to(slot_at(slot.expose_provenance()), slot_at(to), 5) })
}

unsafe extern "C-unwind" fn thrown(arg: usize) -> usize {
    look();
    black_box(arg)
}

#[inline(never)]
fn thrower(slot: NonNull<Slot>) {
    // SAFETY: the stack is suspended, and `thrown` does not unwind.
    black_box(unsafe { forced::throw(slot, slot, 6, thrown) });
}

fn switched_and_thrown() -> Verdict {
    let leases = layered()?;
    let (a, c) = (leases[0].slot(), leases[2].slot());
    // SAFETY: it never ran; it is prepared anew.
    unsafe {
        forced::cancel(a);
        forced::prepare(a, switches, address(&leases[2]));
    }
    first_resumer(a, a);
    thrower(c);
    let gone = [start!(switches), start!(first_resumer)];
    expect(0, &through(&stacks()[..1], start!(first_resumer)), &gone[..1])?;
    expect(1, &through(&[start!(thrown), stacks()[0]], start!(thrower)), &gone)?;
    expect(2, &through(&stacks()[..1], start!(thrower)), &gone)?;
    cancel(&leases);
    Ok(Code::C)
}

#[inline(never)]
fn another_thread(a: usize) -> Result<(), String> {
    let _thread = attach()?;
    second_resumer(slot_at(a), slot_at(a));
    let wanted = [stacks()[0], stacks()[1], stacks()[2], start!(second_resumer), start!(another_thread)];
    black_box(expect(0, &wanted, &[start!(first_resumer), main_too()]))
}

fn on_another_thread() -> Verdict {
    let leases = layered()?;
    first_resumer(leases[0].slot(), leases[0].slot());
    let a = address(&leases[0]);
    std::thread::spawn(move || another_thread(a)).join().map_err(|_| "the thread panicked")??;
    first_resumer(leases[0].slot(), leases[0].slot());
    expect(1, &through(&stacks(), start!(first_resumer)), &[start!(second_resumer), start!(another_thread)])?;
    cancel(&leases);
    Ok(Code::C)
}

thread_local! {
    static PRINTED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

#[inline(never)]
fn inner_face(yielder: &Yielder<(), ()>, (): ()) {
    for _ in 0..2 {
        look();
        let printed = std::backtrace::Backtrace::force_capture().to_string();
        PRINTED.with_borrow_mut(|all| all.push(printed));
        yielder.suspend(());
    }
}

#[inline(never)]
fn outer_face(yielder: &Yielder<(), ()>, (): ()) {
    let mut inner = Coroutine::new(inner_face);
    while inner.resume(()).as_yield().is_some() {
        yielder.suspend(());
    }
}

#[inline(never)]
fn first_face(coroutine: &mut Coroutine<(), (), ()>) {
    black_box(coroutine.resume(()));
}

#[inline(never)]
fn second_face(coroutine: &mut Coroutine<(), (), ()>) {
    black_box(coroutine.resume(()).as_return());
}

/// The names that std's backtrace must hold, in this order.
fn printed(index: usize, names: &[&str]) -> Result<(), String> {
    PRINTED.with_borrow(|all| {
        let mut rest = all.get(index).ok_or("std made no backtrace")?.as_str();
        for name in names {
            rest = rest.split_once(name).ok_or(format!("std's backtrace {index} has no {name} in its place"))?.1;
        }
        Ok(())
    })
}

fn coroutines() -> Verdict {
    let _thread = attach()?;
    let mut coroutine = Coroutine::try_new(outer_face).map_err(|error| error.to_string())?;
    first_face(&mut coroutine);
    second_face(&mut coroutine);
    let faces = [start!(inner_face), start!(outer_face)];
    expect(0, &through(&faces, start!(first_face)), &[])?;
    expect(1, &through(&faces, start!(second_face)), &[start!(first_face)])?;
    printed(0, &["inner_face", "outer_face", "first_face", "hwtests::main"])?;
    printed(1, &["inner_face", "outer_face", "second_face", "hwtests::main"])?;
    Ok(Code::C)
}
