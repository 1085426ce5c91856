//! Pictures of the stacks of this process.

use super::look::{Bottom, First, Seen, Start, View};
use super::{Cut, Frame, Kind, Mark, Owner, Picture, Segment, Shadow, State};
use crate::abi::{Activation, Extent, Slot, slot_state};
use crate::arch;
use crate::codemap::table::Reading;
use crate::directory::{self, Bound};
use crate::error::Error;
use crate::pac::RawPc;
use crate::pool::Lease;
use crate::published;
use crate::slab::Shape;
use crate::stack::looked::{self, Looked};
use crate::stack::{self, Stack};
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

fn authenticates() -> bool {
    published::mode() & published::MODE_PAC != 0
}

/// A growable stack that does not run.
pub fn stack(stack: &Stack) -> Picture {
    growable(&stack.looked())
}

/// The stack of the managed code that has called the native code which asks, through `exit`: `activation` is the innermost one of this thread.
///
/// # Errors
/// [`Error::NotInExit`] when it is not, or when managed code itself runs: this was called by a signal handler.
pub fn activation(activation: &Activation) -> Result<Picture, Error> {
    looked::of_running(activation, growable)
}

/// The bits that a signature can take in an address, none where nothing is signed.
#[cfg(target_arch = "aarch64")]
fn field() -> u64 {
    if authenticates() { arch::pac_field() } else { 0 }
}

/// Nothing is signed here.
#[cfg(not(target_arch = "aarch64"))]
fn field() -> u64 {
    0
}

/// The oldest frames of a run return to `enter`, ...
const ENTRY: usize = 0;
/// ... to `link`, in the segment before, ...
const LINK: usize = 1;

/// A growable stack, as it is shown.
pub(crate) fn growable(looked: &Looked<'_>) -> Picture {
    let segments = &looked.segments;
    let view = |index: usize| View {
        extent: segments[index].record().extent(),
        smallest_frame: looked.policy.smallest_frame,
        authenticates: authenticates(),
        shadow: looked.shadow.is_some(),
        field: field(),
    };
    let mut seen: Vec<Seen> = segments.iter().map(|_| Seen::default()).collect();
    let reading = Reading::begin();
    let mut waits = looked.waits.iter().copied();
    // A run of frames begins where an entry's managed code waits, or where it has linked to the segment behind.
    let holder = |record: usize| segments.iter().position(|segment| segment.record().holds(record, 16));
    let mut youngest = segments.len() - 1;
    let mut next =
        waits.next().map(|record| (holder(record), Start { record, owner: First::Stub(arch::STUB_SIGNING) }));
    while let Some((index, start)) = next.take() {
        let Some(index) = index.filter(|&index| index <= youngest) else {
            seen[youngest].cut = Some(Cut { at: start.record, why: "the stubs left managed code outside the stack" });
            break;
        };
        youngest = index;
        let record = segments[index].record();
        let (link, lifted) = (record.link_record, RawPc::new(record.lifted));
        let mut bottoms = vec![Bottom { pc: arch::entry_return(), at_top: false }];
        bottoms.push(Bottom { pc: arch::link_return(), at_top: false });
        if link & 1 == 1 {
            bottoms.push(Bottom { pc: lifted, at_top: true });
        }
        // SAFETY: the stack owns the segment, which is mapped readable.
        let Some((which, _)) = (unsafe { view(index).run(start, &bottoms, reading.table(), &mut seen[index]) }) else {
            break;
        };
        let before = index.checked_sub(1);
        next = match which {
            ENTRY => {
                waits.next().map(|record| (holder(record), Start { record, owner: First::Stub(arch::STUB_SIGNING) }))
            }
            LINK => Some((before, Start { record: link, owner: First::Stub(arch::STUB_SIGNING) })),
            _ => Some((before, Start { record: link & !1, owner: First::Managed(lifted) })),
        };
    }
    let pictures = seen.into_iter().enumerate().map(|(index, seen)| {
        let Extent { base, top } = segments[index].record().extent();
        let (frames, cut) = view(index).told(seen);
        let limit = if looked.policy.relocate_always { usize::MAX } else { base.saturating_add(looked.policy.reserve) };
        let used = frames.first().map_or(0, |frame| top.saturating_sub(frame.low));
        Segment { base, top, guard: looked.policy.guard, limit: Some(limit), used, frames, cut }
    });
    let mut segments: Vec<Segment> = pictures.collect();
    segments.reverse();
    Picture {
        kind: Kind::Growable,
        state: match looked.state {
            _ if looked.parked => State::Parked,
            stack::State::Idle => State::Idle,
            stack::State::Running => State::Running,
            stack::State::Suspended => State::Suspended,
        },
        identity: looked.identity,
        generation: looked.generation,
        authenticates: authenticates(),
        segments,
        shadow: looked.shadow.map(|(room, entries)| Shadow { room, entries }),
    }
}

/// A pooled stack: its bounds as the read-only directory has them, and how far what is suspended on it reaches.
///
/// The frames on it are native code's and are one frame here. Of a stack that runs it is not known how far it reaches.
pub fn lease(lease: &Lease) -> Picture {
    // SAFETY: the lease keeps the stack from being given back.
    let picture = unsafe { slot(lease.slot()) };
    picture.unwrap_or_else(|| unreachable!("a lease's slot is the directory's"))
}

/// As [`lease`], for a stack that somebody else has, such as one of [`pool::suspended`](crate::pool::suspended). `None` for what is no
/// slot of a pool.
///
/// # Safety
/// The stack is not given back meanwhile.
pub unsafe fn slot(slot: NonNull<Slot>) -> Option<Picture> {
    let bound = directory::find(slot.addr().get())?.bound();
    // SAFETY: the directory knows the slot: it is mapped for ever. Volatile: whoever runs on the stack writes them.
    let (sp, token, generation) = unsafe {
        let own = &raw const (*slot.as_ptr()).own;
        let word = |place: *const usize| place.read_volatile();
        (word(&raw const (*own).sp), word(&raw const (*own).token), (&raw const (*own).generation).read_volatile())
    };
    // SAFETY: as above; these two are atomic.
    let (noted, standing, word) = unsafe {
        let fields = slot.as_ref();
        (fields.state.load(Ordering::Acquire), fields.standing(), fields.own.seal.load(Ordering::Acquire))
    };
    // Coroutines that switch inlined have their stack pointer in the seal's place.
    let sp = if noted == slot_state::INLINED { word as usize & !1 } else { sp };
    let state = match standing {
        slot_state::READY => State::Ready,
        slot_state::SUSPENDED | slot_state::ASKING => State::Suspended,
        slot_state::RUNNING | slot_state::UNWINDING => State::Running,
        _ => State::Idle,
    };
    Some(Picture {
        kind: Kind::Pooled,
        state,
        identity: bound.identity,
        generation,
        authenticates: authenticates(),
        segments: vec![area(&bound, Shape::of(&bound).guard, state, sp)],
        shadow: shadow(&bound, state, token),
    })
}

fn area(bound: &Bound, guard: usize, state: State, sp: usize) -> Segment {
    let Bound { base, top, .. } = *bound;
    let mut segment = Segment { base, top, guard, limit: None, used: 0, frames: Vec::new(), cut: None };
    match state {
        State::Suspended if sp >= base && sp < top => {
            segment.used = top - sp;
            let reason = "native frames stay where they are";
            segment.frames.push(Frame {
                owner: Owner::Native,
                low: sp,
                record: sp,
                cfa: top,
                bytes: top - sp,
                at: None,
                returns_to: None,
                mark: if bound.shadow_top != 0 { Mark::Compared } else { Mark::Unsigned },
                pointers: Vec::new(),
                registers: Vec::new(),
                obstacle: Some(Error::Immovable { pc: RawPc::new(0), reason }),
            });
        }
        State::Suspended => segment.cut = Some(Cut { at: sp, why: "its stack pointer lies outside the stack" }),
        State::Running => segment.cut = Some(Cut { at: top, why: "it runs, and its stack pointer is in a register" }),
        State::Idle | State::Ready | State::Parked => {}
    }
    segment
}

fn shadow(bound: &Bound, state: State, token: usize) -> Option<Shadow> {
    let Shape { room, .. } = Shape::of(bound);
    if room == 0 {
        return None;
    }
    let entries = match state {
        State::Idle | State::Ready => Some(0),
        // The words above the token.
        State::Suspended => {
            bound.shadow_top.checked_sub(token).filter(|&above| above >= 8 && above <= room).map(|above| above / 8 - 1)
        }
        State::Running | State::Parked => None,
    };
    Some(Shadow { room, entries })
}
