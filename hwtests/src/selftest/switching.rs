//! The switch verbs by themselves, between pooled stacks, on whatever this CPU enforces.

use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pool::{self, Lease};
use cfi_stack::probe::{Passed, Slot, Word, forced, read};
use cfi_stack::thread::Thread;
use std::ptr::NonNull;

/// S14.
pub fn verbs(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("words pass both ways", &run(words), &[Code::C]);
    tally.attack("cancelled at any depth and used again", &run(cancelled), &[Code::C]);
    tally.attack("a symmetric switch hands the resumer over", &run(symmetric), &[Code::C]);
    tally.attack("64 stacks detached and resumed as one", &run(detached), &[Code::C]);
    tally.attack("thrown into, returns and goes on", &run(thrown), &[Code::C]);
    tally.report()
}

const SIZE: usize = 16 << 10;

pub(super) fn lease(thread: &Thread) -> Result<Lease, String> {
    let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
    let shadow = read(lease.slot(), Word::ShadowTop) != 0;
    if shadow != thread.domain().shadow {
        return Err(format!("the thread's shadow mode is {}, the lease's {shadow}", thread.domain().shadow));
    }
    Ok(lease)
}

pub(super) fn attach() -> Result<Thread, String> {
    Thread::attach().map_err(|error| error.to_string())
}

fn expect(got: Passed, value: usize, finished: bool) -> Result<(), String> {
    if got == (Passed { value, finished }) { Ok(()) } else { Err(format!("{got:?}, not {value} {finished}")) }
}

pub(super) fn slot_at(address: usize) -> NonNull<Slot> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
}

pub(super) fn address(lease: &Lease) -> usize {
    lease.slot().as_ptr().expose_provenance()
}

unsafe extern "C" fn adds(first: usize, data: usize, slot: *mut Slot) -> usize {
    let slot = slot_at(slot.expose_provenance());
    let mut sum = first + data;
    for _ in 0..3 {
        sum += deep(slot, sum, data % 300);
    }
    sum
}

/// Suspends from `depth` calls further down.
#[inline(never)]
fn deep(slot: NonNull<Slot>, sum: usize, depth: usize) -> usize {
    if depth == 0 {
        // SAFETY: runs on the slot's stack.
        return unsafe { forced::suspend(slot, slot, sum) };
    }
    std::hint::black_box(deep(slot, sum, depth - 1))
}

fn words() -> Verdict {
    let thread = attach()?;
    let lease = lease(&thread)?;
    let slot = lease.slot();
    for round in 0..1000 {
        // SAFETY: the lease is ours, its stack empty.
        unsafe {
            forced::prepare(slot, adds, 100);
            expect(forced::resume(slot, slot, 1), 101, false)?;
            expect(forced::resume(slot, slot, 10), 111, false)?;
            expect(forced::resume(slot, slot, 20), 131, false)?;
            expect(forced::resume(slot, slot, round), 131 + round, true)?;
        }
    }
    Ok(Code::C)
}

fn cancelled() -> Verdict {
    let thread = attach()?;
    let lease = lease(&thread)?;
    let slot = lease.slot();
    for depth in 0..150 {
        for resumes in 0..3 {
            // SAFETY: as above; nothing points into the frames that are dropped.
            unsafe {
                forced::prepare(slot, adds, depth);
                for _ in 0..resumes {
                    if forced::resume(slot, slot, 1).finished {
                        return Err("finished early".into());
                    }
                }
                forced::cancel(slot);
            }
        }
    }
    Ok(Code::C)
}

unsafe extern "C" fn relays(_: usize, to: usize, slot: *mut Slot) -> usize {
    // SAFETY: runs on the slot's stack; `to` is suspended or ready, and ours.
    unsafe { forced::switch_to(slot_at(slot.expose_provenance()), slot_at(to), 5) }
}

fn symmetric() -> Verdict {
    let thread = attach()?;
    let (a, b) = (lease(&thread)?, lease(&thread)?);
    for _ in 0..100 {
        // SAFETY: as above.
        unsafe {
            forced::prepare(b.slot(), adds, 100);
            forced::prepare(a.slot(), relays, address(&b));
            expect(forced::resume(a.slot(), a.slot(), 0), 105, false)?;
            expect(forced::resume(a.slot(), a.slot(), 77), 77, true)?;
            forced::prepare(a.slot(), relays, address(&b));
            expect(forced::resume(a.slot(), a.slot(), 0), 110, false)?;
            expect(forced::resume(b.slot(), b.slot(), 1), 111, false)?;
            expect(forced::resume(b.slot(), b.slot(), 1), 112, true)?;
            expect(forced::resume(a.slot(), a.slot(), 78), 78, true)?;
        }
    }
    Ok(Code::C)
}

const CHAIN: usize = 64;

/// `data` is the address of the list of slots from this one on; the last suspends the whole chain.
unsafe extern "C" fn chained(arg: usize, data: usize, slot: *mut Slot) -> usize {
    let list: *const usize = std::ptr::with_exposed_provenance(data);
    // SAFETY: the list ends with a zero, behind this slot's own entry.
    let next = unsafe { list.add(1).read() };
    if next != 0 {
        // SAFETY: the next one is ready.
        return unsafe { forced::resume(slot_at(next), slot_at(next), arg) }.value + 1;
    }
    // SAFETY: the list begins CHAIN − 1 entries before its last.
    let first = slot_at(unsafe { list.sub(CHAIN - 1).read() });
    // SAFETY: runs on the slot's stack; `first` is where the chain began.
    unsafe { forced::suspend(slot_at(slot.expose_provenance()), first, arg * 2) }
}

fn detached() -> Verdict {
    let thread = attach()?;
    let leases = (0..CHAIN).map(|_| lease(&thread)).collect::<Result<Vec<_>, _>>()?;
    let mut list: Vec<usize> = leases.iter().map(address).collect();
    list.push(0);
    let start = list.as_ptr().expose_provenance();
    for _ in 0..20 {
        // SAFETY: as above.
        unsafe {
            for (index, lease) in leases.iter().enumerate() {
                forced::prepare(lease.slot(), chained, start + index * 8);
            }
            let (first, last) = (leases[0].slot(), leases[CHAIN - 1].slot());
            expect(forced::resume(first, first, 21), 42, false)?;
            expect(forced::resume(last, first, 7), 7 + CHAIN - 1, true)?;
        }
    }
    Ok(Code::C)
}

unsafe extern "C-unwind" fn doubled(arg: usize) -> usize {
    arg * 2
}

fn thrown() -> Verdict {
    let thread = attach()?;
    let lease = lease(&thread)?;
    let slot = lease.slot();
    for _ in 0..100 {
        // SAFETY: as above; `doubled` does not unwind.
        unsafe {
            forced::prepare(slot, adds, 0);
            expect(forced::resume(slot, slot, 1), 1, false)?;
            expect(forced::throw(slot, slot, 21, doubled), 43, false)?;
            expect(forced::resume(slot, slot, 1), 44, false)?;
            forced::cancel(slot);
        }
    }
    Ok(Code::C)
}
