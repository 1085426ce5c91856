//! A31: the pools' free lists: a link in a free slot, and the heads, wherever in writable memory they lie.
//!
//! What a list names must be a slot of the directory, of the list's class, free and with the directory's bounds. Whether it is free stands
//! in the slot, which is writable: where there are shadow stacks, the idle token on its shadow stack says it too, and no store makes one.
//! So a stack that is suspended or runs is handed out twice only where there is none, or when nothing has run on it yet (R). What runs
//! there then is what was prepared last, sealed as ever: two owners are mixed up, as by an attacker who exchanges two handles of theirs.

use super::metadata_pooled::{address, attach, expect, slot_at, sums};
use crate::child::{self, Verdict, run};
use crate::class::Class;
use crate::memory::{peek, peek_if_mapped, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::pool::{self, Lease};
use cfi_stack::probe::{Word, forced, read, write};
use std::cell::Cell;

/// What the link is made to name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// What it named: the control.
    Same,
    /// A suspended stack.
    Suspended,
    /// A suspended stack whose state was made free.
    SuspendedFreed,
    /// A stack that has not run yet, whose state was made free.
    ReadyFreed,
    /// A leased stack on which nothing is.
    Leased,
    /// The free slot itself.
    Itself,
    /// The middle of a slot.
    Middle,
    /// Memory of the attacker's that looks like a free slot.
    Own,
    /// A free stack of another class.
    OtherClass,
}

/// Bytes of the stacks here: a class that nobody else uses.
const BYTES: usize = 32 << 10;
/// More leases than a cache and the reserve have.
const LEASES: usize = 64;

/// A31.
pub fn linked(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let twice = if class.shadow() { Code::K } else { Code::R };
    let targets = [
        ("a suspended stack", Target::Suspended, Code::K),
        ("a suspended stack made to look free", Target::SuspendedFreed, twice),
        ("a stack that never ran made to look free", Target::ReadyFreed, Code::R),
        ("a leased stack", Target::Leased, Code::K),
        ("itself", Target::Itself, Code::K),
        ("the middle of a slot", Target::Middle, Code::K),
        ("own memory", Target::Own, Code::K),
        ("a free stack of another class", Target::OtherClass, Code::K),
    ];
    for (place, attack) in [("link", link as fn(Target) -> Verdict), ("head", head), ("reserve", reserve)] {
        tally.control(place, &run(|| attack(Target::Same)));
        for (what, target, code) in targets {
            // A head that names what it named is the control.
            if target != Target::Itself || place == "link" {
                tally.attack(&format!("{place}: {what}"), &run(|| attack(target)), &[code]);
            }
        }
    }
    tally.report()
}

/// What the attacker has at hand.
struct Cast {
    suspended: Lease,
    ready: Lease,
    leased: Lease,
    other_class: usize,
}

fn leased() -> Result<Lease, String> {
    pool::lease(BYTES).map_err(|error| error.to_string())
}

impl Cast {
    fn new() -> Result<Cast, String> {
        let (suspended, ready) = (leased()?, leased()?);
        // SAFETY: both are ours and empty.
        unsafe {
            forced::prepare(ready.slot(), sums, 3);
            forced::prepare(suspended.slot(), sums, 3);
            expect(forced::resume(suspended.slot(), suspended.slot(), 1), 1, false)?;
        }
        let other = pool::lease(2 * BYTES).map_err(|error| error.to_string())?;
        let other_class = address(&other);
        drop(other);
        Ok(Cast { suspended, ready, leased: leased()?, other_class })
    }

    /// What is written instead of `word`, the address of a free slot, into what names it.
    fn target(&self, target: Target, word: usize, holder: usize) -> usize {
        /// The state's half of its word.
        const STATE: u64 = 0xffff_ffff << 32;
        let free = |lease: &Lease| {
            let slot = lease.slot();
            // SAFETY: that is the attack.
            unsafe { write(slot, Word::ChunkAndState, read(slot, Word::ChunkAndState) & !STATE) };
            address(lease)
        };
        match target {
            Target::Same => word,
            Target::Suspended => address(&self.suspended),
            Target::SuspendedFreed => free(&self.suspended),
            Target::ReadyFreed => free(&self.ready),
            Target::Leased => address(&self.leased),
            Target::Itself => holder,
            Target::Middle => word + 64,
            Target::Own => copy(word),
            Target::OtherClass => self.other_class,
        }
    }

    /// Leases more than the lists have. R when somebody else's stack is handed out.
    fn lease_all(self, target: Target) -> Verdict {
        let mut stacks = Vec::new();
        for _ in 0..LEASES {
            let stack = leased()?;
            if [&self.suspended, &self.ready, &self.leased].iter().any(|other| other.slot() == stack.slot()) {
                // Dropping them would give a stack back twice.
                child::end(Code::R);
            }
            stacks.push(stack);
        }
        if target != Target::Same {
            return Err("nothing came of what the list names".into());
        }
        let slot = self.suspended.slot();
        // SAFETY: it is suspended, and ours.
        expect(unsafe { forced::resume(slot, slot, 0) }, 1, true)?;
        Ok(Code::C)
    }
}

/// A copy of a slot in other memory, aligned as one.
fn copy(slot: usize) -> usize {
    const BYTES: usize = 128;
    let block = Box::leak(vec![0_u64; 2 * BYTES / 8].into_boxed_slice());
    let place = block.as_mut_ptr().expose_provenance().next_multiple_of(BYTES);
    for offset in (0..BYTES).step_by(8) {
        // SAFETY: a slot is this long and mapped for ever; so is the block.
        unsafe { poke(place + offset, peek(slot + offset)) };
    }
    place
}

/// A free slot's link.
fn link(target: Target) -> Verdict {
    let _thread = attach()?;
    let cast = Cast::new()?;
    let (first, second) = (leased()?, leased()?);
    let (below, above) = (address(&first), address(&second));
    drop(first);
    drop(second);
    let head = slot_at(above);
    if read(head, Word::Next) != below as u64 {
        return Err("the list is not linked as it was given back".into());
    }
    // SAFETY: that is the attack.
    unsafe { write(head, Word::Next, cast.target(target, below, above) as u64) };
    cast.lease_all(target)
}

/// Whatever in the program's data, heap and thread-local memory names the stack that was given back last.
fn head(target: Target) -> Verdict {
    let _thread = attach()?;
    let cast = Cast::new()?;
    let stack = leased()?;
    let slot = address(&stack);
    drop(stack);
    rewrite(slot, cast.target(target, slot, slot))?;
    cast.lease_all(target)
}

/// Whatever there and in the slots names a stack that a thread which has ended left to the others.
fn reserve(target: Target) -> Verdict {
    let _thread = attach()?;
    let cast = Cast::new()?;
    let leave = || {
        let _thread = attach()?;
        leased().map(|stack| address(&stack))
    };
    let slot = std::thread::spawn(leave).join().map_err(|_| "the thread panicked")??;
    let named = cast.target(target, slot, slot);
    // SAFETY: the attacker looks at all slots of the chunk, of which this is one.
    let links = |address| slot_at(address);
    let chunk = read(slot_at(slot), Word::ChunkAndState) & 0xffff_ffff;
    let neighbours = (1..LEASES).flat_map(|number| [slot + number * 128, slot - number * 128]);
    let is_slot = |address: usize| {
        peek_if_mapped(address + Word::ChunkAndState as usize).is_some_and(|word| word & 0xffff_ffff == chunk)
            && peek_if_mapped(address + Word::Base as usize).is_some_and(|base| base != 0)
    };
    let mut found = rewrite(slot, named).is_ok();
    for neighbour in neighbours.filter(|&address| is_slot(address)).map(links) {
        if read(neighbour, Word::Next) == slot as u64 {
            // SAFETY: that is the attack.
            unsafe { write(neighbour, Word::Next, named as u64) };
            found = true;
        }
    }
    if found { cast.lease_all(target) } else { Err("nothing names the stack that was left".into()) }
}

/// Rewrites every word that names `slot` in the program's data, on its heap and among its thread-locals.
fn rewrite(slot: usize, named: usize) -> Result<(), String> {
    unsafe extern "C" {
        static __ehdr_start: u8;
        static _end: u8;
    }
    thread_local! {
        static LOCAL: Cell<usize> = const { Cell::new(0) };
    }
    let local = LOCAL.with(|local| std::ptr::from_ref(local).addr());
    let begin = (&raw const __ehdr_start).addr();
    let end = (&raw const _end).addr().next_multiple_of(4096);
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|error| error.to_string())?;
    let mut found = false;
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let bound = |hex| usize::from_str_radix(hex, 16).unwrap_or(0);
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let (low, top) = range.map_or((0, 0), |(low, top)| (bound(low), bound(top)));
        let is_data = low >= begin && top <= end;
        if !(is_data || line.ends_with("[heap]") || (low..top).contains(&local)) || line.ends_with("[stack]") {
            continue;
        }
        for place in (low..top).step_by(8) {
            // SAFETY: the mapping is writable, and nobody else runs.
            unsafe {
                if peek(place) == slot as u64 {
                    poke(place, named as u64);
                    found = true;
                }
            }
        }
    }
    if found { Ok(()) } else { Err("nothing names the stack that was given back".into()) }
}
