//! Every caller's mistake and every exhaustion, as one type: the stack that existed still runs.

use crate::pac::{RawPc, Tampered};
use std::fmt;

/// Why an operation was refused. Nothing was written, and what existed before is still usable.
///
/// Evidence of tampering is *not* here: it ends the process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The policy contradicts itself; the text names the rule that it breaks.
    Policy(&'static str),
    /// The stack needs more than its policy's maximum. The engine turns this into its own trap.
    Overflow {
        /// Bytes of data segment that would be needed.
        needed: usize,
        /// The policy's maximum, in bytes.
        maximum: usize,
    },
    /// The operating system refused memory.
    Memory {
        /// What it was wanted for.
        what: &'static str,
        /// How much, in bytes.
        bytes: usize,
        /// The system's own error number.
        errno: i32,
    },
    /// No stack can have this size or this place; the text names the rule that it breaks.
    Size {
        /// The bytes asked for.
        bytes: usize,
        /// The broken rule.
        rule: &'static str,
    },
    /// The process's budget for leased stacks has no room for one more.
    Budget {
        /// What the stack would count, in bytes.
        needed: usize,
        /// What is left of the budget, in bytes.
        left: usize,
    },
    /// The owner's quota has no room for one more stack.
    Quota {
        /// What it has too little of: `"stacks"` or `"bytes"`.
        what: &'static str,
        /// How many of them the stack would count.
        needed: usize,
        /// How many are left.
        left: usize,
    },
    /// A stack was given back that cannot be; the text says why.
    Slot(&'static str),
    /// The continuation was resumed, bound, switched to, thrown into or cancelled already, has ended, or never was.
    Consumed,
    /// The caller runs on no continuation's stack: there is nothing to suspend.
    NotOnStack,
    /// No resumer up to the thread's own stack, or to another face's, handles the tag in this way.
    Unhandled {
        /// The tag.
        tag: u64,
    },
    /// The receiver has no room for so many values.
    Values {
        /// How many there would be.
        count: usize,
        /// How many it takes.
        room: usize,
    },
    /// The continuation is being cancelled and cannot be suspended any more.
    Cancelled,
    /// The shadow segment that the frames are on has less room than the data segment asked for could need (law 2). A call by
    /// [`link`](crate::engine::Stubs::link) goes to a further one.
    ShadowRoom {
        /// Shadow bytes needed.
        needed: usize,
        /// Shadow bytes there are.
        room: usize,
    },
    /// A return address in the span lies in code that nobody registered.
    UnknownCode(RawPc),
    /// A frame in the span cannot move.
    Immovable {
        /// Where it is returned to.
        pc: RawPc,
        /// Why: what the engine registered, or what the walk found.
        reason: &'static str,
    },
    /// A word of a conservative frame points into the stack, and nothing declares it.
    HiddenPointer {
        /// Where the frame is returned to.
        pc: RawPc,
        /// Address of the word.
        slot: usize,
    },
    /// A frame that signs nothing stands among frames of a process that signs: a raw address is never signed.
    Unsigned(RawPc),
    /// A code range or a layout cannot be; the text names the rule that it breaks.
    Layout {
        /// First byte of the code range.
        start: RawPc,
        /// The broken rule.
        rule: &'static str,
    },
    /// Source and destination of a move share memory.
    Overlap,
    /// The destination belongs to another stack.
    Foreign,
    /// The destination is too small for the span.
    TooSmall {
        /// Bytes that the span takes.
        needed: usize,
        /// Bytes that the destination has.
        room: usize,
    },
    /// The stack runs, or the activation has a stack already.
    Busy,
    /// Managed code is suspended on the stack: it is resumed or discarded first.
    Suspended,
    /// There is nothing on the stack to resume.
    NotSuspended,
    /// The stack is parked: [`Stack::unpark`](crate::Stack::unpark) comes first.
    Parked,
    /// The stack is not parked.
    NotParked,
    /// A stack cannot be parked, or unparked here, under that key; the text says why.
    Key(&'static str),
    /// The caller is not native code that managed code of this activation called through `exit`.
    NotInExit,
    /// The stack cannot be suspended: native code below the innermost entry waits for it.
    Nested,
    /// The coroutine is finished: it cannot be resumed any more.
    Finished,
    /// There is no stack that could be suspended: the caller runs on the thread's own.
    NoStack,
    /// The calling thread is not the one that was named, or belongs to another key domain or shadow mode.
    Thread(&'static str),
    /// The interrupted code is not managed code of the named activation.
    NotManaged,
    /// This CPU family or system has no stubs; only the software model works here.
    Unsupported(&'static str),
    /// An error that the embedder's own hook injected (cargo feature `steps`).
    Injected,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Policy(rule) => write!(f, "stack policy: {rule}"),
            Error::Overflow { needed, maximum } => write!(
                f,
                "stack overflow: {needed} bytes needed, the policy allows {maximum}; raise `maximum` if the recursion is wanted"
            ),
            Error::Memory { what, bytes, errno } => {
                write!(f, "no memory for {what} ({bytes} bytes): {}", std::io::Error::from_raw_os_error(*errno))
            }
            Error::Size { bytes, rule } => write!(f, "a stack of {bytes} bytes: {rule}"),
            Error::Budget { needed, left } => write!(
                f,
                "the budget for stacks is used up: {needed} bytes needed, {left} left; raise it or give stacks back"
            ),
            Error::Quota { what, needed, left } => {
                write!(f, "the owner's quota of stacks is used up: {needed} {what} needed, {left} left")
            }
            Error::Slot(why) => write!(f, "stack not given back: {why}"),
            Error::Consumed => write!(f, "the continuation was consumed already, has ended, or never was"),
            Error::NotOnStack => write!(f, "there is nothing to suspend: the caller runs on no continuation's stack"),
            Error::Unhandled { tag } => write!(f, "no resumer handles the tag {tag:#x}"),
            Error::Values { count, room } => write!(f, "{count} values for a receiver that takes {room}"),
            Error::Cancelled => write!(f, "the continuation is being cancelled and cannot be suspended"),
            Error::ShadowRoom { needed, room } => write!(
                f,
                "shadow segment too small: {needed} bytes needed, {room} there; call by `link`, or raise `shadowed`"
            ),
            Error::UnknownCode(pc) => {
                write!(f, "return address {pc} lies in no registered code: register every managed function")
            }
            Error::Immovable { pc, reason } => write!(f, "the frame returned to at {pc} cannot move: {reason}"),
            Error::HiddenPointer { pc, slot } => write!(
                f,
                "the frame returned to at {pc} cannot move: the word at {slot:#x} points into the stack and is not declared"
            ),
            Error::Unsigned(pc) => write!(
                f,
                "the function that holds {pc} signs no return address on a CPU that authenticates: compile it with pac-ret"
            ),
            Error::Layout { start, rule } => write!(f, "code at {start}: {rule}"),
            Error::Overlap => write!(f, "source and destination of the move overlap"),
            Error::Foreign => write!(f, "the destination segment belongs to another stack"),
            Error::TooSmall { needed, room } => write!(f, "the span takes {needed} bytes, the destination has {room}"),
            Error::Busy => write!(f, "the stack or the activation is already running"),
            Error::Suspended => write!(f, "managed code is suspended on the stack: resume or discard it first"),
            Error::NotSuspended => write!(f, "nothing is suspended on the stack"),
            Error::Parked => write!(f, "the stack is parked: unpark it first"),
            Error::NotParked => write!(f, "the stack is not parked"),
            Error::Key(why) => write!(f, "parking: {why}"),
            Error::NotInExit => write!(f, "the caller is not native code that this activation's managed code called"),
            Error::Nested => write!(f, "a stack with nested entries cannot be suspended: native code waits below"),
            Error::Finished => write!(f, "the coroutine is finished: it cannot be resumed any more"),
            Error::NoStack => write!(f, "there is no stack that could be suspended: this runs on the thread's own"),
            Error::Thread(why) => write!(f, "thread: {why}"),
            Error::NotManaged => write!(f, "the interrupted code is not managed code of this activation"),
            Error::Unsupported(what) => write!(f, "not supported here: {what}"),
            Error::Injected => write!(f, "failure injected by the embedder's step hook"),
        }
    }
}

impl std::error::Error for Error {}

/// Why a move did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A caller's mistake or an exhaustion: the stack runs on.
    Error(Error),
    /// Evidence of tampering: the caller ends the process.
    Tampered(Tampered),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Error(error)
    }
}

impl From<Tampered> for Refusal {
    fn from(tampered: Tampered) -> Self {
        Refusal::Tampered(tampered)
    }
}
