//! A stack as data: its segments, its frames, what the code map says of them, and what a move would do with each.
//!
//! ```text
//!  inspect::stack(&stack)            idle or suspended          |
//!  inspect::activation(&activation)  from native code that      |--> Picture --> Display, svg::picture, svg::change
//!                                    managed code has called    |
//!  inspect::lease(&lease)            a pooled stack             |
//! ```
//! Return addresses and signed frame pointers are *stripped*: the bits in which a signature can stand are masked out. Nothing is authenticated, so nothing
//! here says, or shows by ending, whether a signature is right. For the same reason nothing here is to be believed: a picture is for people, tests and
//! statistics, and no decision of the library rests on one.
//!
//! Frames are found as a move finds them, by the code map and never by content. What does not fit together ends the picture there, and
//! [`Segment::cut`] says why. Whatever the stack holds, only words inside of its own segments are read, each step leads towards the top, and what the words mean is
//! told by class: no data of the program's is in a picture.

#[cfg(any(cfi_stack_native, test))]
pub(crate) mod look;
#[cfg(cfi_stack_native)]
pub(crate) mod native;
pub mod svg;
#[cfg(all(test, cfi_stack_native))]
mod tests;
mod text;

pub use crate::totals::{Totals, totals};
#[cfg(cfi_stack_native)]
pub use native::{activation, lease, slot, stack};

use crate::codemap::{FrameLayout, Register};
use crate::error::Error;
use crate::pac::{RawPc, Signing};

/// A stack, as it was at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Picture {
    /// Which kind of stack.
    pub kind: Kind,
    /// What happens on it.
    pub state: State,
    /// Its number, unlike that of any other stack of its kind.
    pub identity: u64,
    /// Its generation.
    pub generation: u64,
    /// Whether return addresses are authenticated in this process.
    pub authenticates: bool,
    /// Its data segments, the youngest first.
    pub segments: Vec<Segment>,
    /// Its shadow stack, where it has one.
    pub shadow: Option<Shadow>,
}

/// Kinds of stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// [`Stack`](crate::Stack): managed code, in segments that its frames move between.
    Growable,
    /// Of a [`pool`](crate::pool): any code, in one place.
    Pooled,
}

/// What happens on a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing is on it.
    Idle,
    /// Something was prepared on it and has not run.
    Ready,
    /// It runs, or what it called does.
    Running,
    /// It waits to be resumed.
    Suspended,
    /// It is parked: what is on it, if anything, is signed with a key that threads share, and waits to be unparked.
    Parked,
}

/// A data segment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Segment {
    /// Lowest usable address.
    pub base: usize,
    /// One past the highest.
    pub top: usize,
    /// Inaccessible bytes below it.
    pub guard: usize,
    /// What managed code compares its stack pointer with while it runs here; `None` where nothing is compared.
    pub limit: Option<usize>,
    /// Bytes from the lowest known frame to the top.
    pub used: usize,
    /// Its frames, the youngest first.
    pub frames: Vec<Frame>,
    /// Where and why the picture ends before the oldest frame.
    pub cut: Option<Cut>,
}

/// Why a picture is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Address of the frame record, or of the word, that does not fit.
    pub at: usize,
    /// What does not fit.
    pub why: &'static str,
}

/// A frame.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Frame {
    /// What it belongs to.
    pub owner: Owner,
    /// Its lowest address.
    pub low: usize,
    /// Address of its frame record.
    pub record: usize,
    /// Its CFA: the stack pointer at entry.
    pub cfa: usize,
    /// Bytes from its lowest address to the end of what it owns, mostly the CFA.
    pub bytes: usize,
    /// Where it goes on when the frame that it called returns; `None` for a stub's, which goes on by itself, and where it is not known.
    pub at: Option<RawPc>,
    /// Where it returns to, stripped; `None` where it is not known.
    pub returns_to: Option<RawPc>,
    /// What becomes of its return address when the frame moves.
    pub mark: Mark,
    /// The slots in it that the code map says hold pointers into the stack.
    pub pointers: Vec<Pointer>,
    /// The callee-saved registers that the code map says hold pointers into the stack at its call.
    pub registers: Vec<Register>,
    /// Why it cannot move; `None` when it can.
    pub obstacle: Option<Error>,
}

/// What a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A stub of this library, which was called by the frame above it.
    Stub,
    /// A registered function with this layout.
    Managed(FrameLayout),
    /// Native code: one or more frames, of which nothing is known but where they lie.
    Native,
}

/// What a move does with a return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    /// It is authenticated and signed again, with this key.
    ReSigned(Signing),
    /// It stays as it is; a shadow stack has it too, with which it is compared.
    Compared,
    /// It stays as it is.
    Unsigned,
}

/// A slot that holds a pointer into the stack, or may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// Offset from the frame record, in bytes.
    pub offset: i32,
    /// Where it points.
    pub target: Target,
}

/// Where a slot points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Nowhere.
    Null,
    /// Into its own frame.
    Own,
    /// Into another frame of the segment, by its place in [`Segment::frames`].
    Frame(usize),
    /// Into the segment, where no frame is.
    Free,
    /// Somewhere else: a move leaves it as it is.
    Elsewhere,
}

/// A shadow stack. Whether it agrees with the frames is a move's business, not a picture's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadow {
    /// Bytes for return addresses and signal frames.
    pub room: usize,
    /// Return addresses on it; `None` while they cannot be told.
    pub entries: Option<usize>,
}

impl Picture {
    /// All frames, the youngest first.
    pub fn frames(&self) -> impl Iterator<Item = &Frame> {
        self.segments.iter().flat_map(|segment| &segment.frames)
    }

    /// Bytes of all segments.
    pub fn size(&self) -> usize {
        self.segments.iter().map(Segment::size).sum()
    }

    /// Whether every frame down to the oldest is in it.
    pub fn is_complete(&self) -> bool {
        self.segments.iter().all(|segment| segment.cut.is_none())
    }

    /// Whether nothing that the picture shows stands against a move of all frames.
    pub fn is_movable(&self) -> bool {
        self.kind == Kind::Growable && self.is_complete() && self.frames().all(|frame| frame.obstacle.is_none())
    }
}

impl Segment {
    /// Usable bytes.
    pub fn size(&self) -> usize {
        self.top.saturating_sub(self.base)
    }
}
