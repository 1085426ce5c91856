//! Past the faces' checks, for the attack battery (cargo feature `steps`): the switch verbs as they are, and where their words lie.

pub use crate::abi::Slot;
pub use crate::switch::{Entry, Passed, Thrown};

use crate::abi::{Activation, Context, Control, Link, Record};
use crate::switch;
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// A word of a slot, by its offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Word {
    /// The own context's stack pointer.
    OwnSp = offset_of!(Slot, own),
    /// Its seal.
    OwnSeal = offset_of!(Slot, own) + offset_of!(Context, seal),
    /// Its token's address.
    OwnToken = offset_of!(Slot, own) + offset_of!(Context, token),
    /// Its generation.
    OwnGeneration = offset_of!(Slot, own) + offset_of!(Context, generation),
    /// The resumer's stack pointer.
    ResumerSp = offset_of!(Slot, resumer),
    /// Its seal.
    ResumerSeal = offset_of!(Slot, resumer) + offset_of!(Context, seal),
    /// Its token's address.
    ResumerToken = offset_of!(Slot, resumer) + offset_of!(Context, token),
    /// Its generation.
    ResumerGeneration = offset_of!(Slot, resumer) + offset_of!(Context, generation),
    /// The slot's identity.
    Identity = offset_of!(Slot, identity),
    /// Lowest usable address.
    Base = offset_of!(Slot, base),
    /// One past the highest.
    Top = offset_of!(Slot, top),
    /// One past the highest word of the shadow stack; 0 without one.
    ShadowTop = offset_of!(Slot, shadow_top),
    /// The chunk's index (32 bits) and the state (32 bits).
    ChunkAndState = offset_of!(Slot, chunk),
    /// The next free slot.
    Next = offset_of!(Slot, next),
}

/// Address of a word.
pub fn address(slot: NonNull<Slot>, word: Word) -> usize {
    slot.as_ptr().expose_provenance() + word as usize
}

/// What a slot's word says.
pub fn read(slot: NonNull<Slot>, word: Word) -> u64 {
    // SAFETY: slots are mapped for the life of the process.
    unsafe { std::ptr::with_exposed_provenance::<u64>(address(slot, word)).read_volatile() }
}

/// Writes what an attacker would.
///
/// # Safety
/// Breaks what the library believes: the process is expected to end, or to go on as the case says.
pub unsafe fn write(slot: NonNull<Slot>, word: Word, value: u64) {
    // SAFETY: slots are mapped for the life of the process; the rest is the caller's.
    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(address(slot, word)).write_volatile(value) }
}

/// Offsets in a segment's record, besides the five words that its seal is over.
pub mod record {
    use crate::abi::Record;
    use std::mem::offset_of;

    /// The record of the segment behind.
    pub const NEXT: usize = offset_of!(Record, next);
    /// 32 bits: the area of the call that entered. The 32 above: whether that call has changed to the shadow segment.
    pub const AREA: usize = offset_of!(Record, area);
    /// Where the token of the segment's shadow segment lies.
    pub const SHADOW: usize = offset_of!(Record, shadow);
    /// The seal of that.
    pub const SHADOW_SEAL: usize = offset_of!(Record, shadow_seal);
}

/// Offsets in a saved frame, from the stack pointer that its context names.
pub mod frame {
    /// The frame record: frame pointer, then pc.
    #[cfg(target_arch = "x86_64")]
    pub const RECORD: usize = 56;
    /// The frame record: frame pointer, then pc.
    #[cfg(target_arch = "aarch64")]
    pub const RECORD: usize = 0;
    /// The pc.
    pub const PC: usize = RECORD + 8;
    /// A callee-saved general register: rbx, x19. Of a stack that never ran: its entry function.
    #[cfg(target_arch = "x86_64")]
    pub const CALLEE_SAVED: usize = 48;
    /// A callee-saved general register: rbx, x19. Of a stack that never ran: its entry function.
    #[cfg(target_arch = "aarch64")]
    pub const CALLEE_SAVED: usize = 16;
    /// Another: r12, x20. Of a stack that never ran: what its entry function gets as data.
    #[cfg(target_arch = "x86_64")]
    pub const DATA: usize = 40;
    /// Another: r12, x20. Of a stack that never ran: what its entry function gets as data.
    #[cfg(target_arch = "aarch64")]
    pub const DATA: usize = 24;
    /// A callee-saved vector register, d8.
    #[cfg(target_arch = "aarch64")]
    pub const D8: usize = 96;
    /// Bytes.
    #[cfg(target_arch = "x86_64")]
    pub const SIZE: usize = 72;
    /// Bytes.
    #[cfg(target_arch = "aarch64")]
    pub const SIZE: usize = 176;
}

/// The words of a growable stack's blocks, by their offsets in bytes.
pub mod growable {
    use super::*;

    /// Address of the control block of the stack that runs with this activation; 0 for none.
    pub fn control(activation: &Activation) -> usize {
        activation.control.load(Ordering::Relaxed).expose_provenance()
    }

    /// Bytes of the control block.
    pub const CONTROL: usize = size_of::<Control>();
    /// Control: the innermost entry's native stack pointer.
    pub const NATIVE_SP: usize = offset_of!(Control, native_sp);
    /// Control: the seal of that.
    pub const SEAL: usize = offset_of!(Control, seal);
    /// Control: address of the record of the segment that managed code runs on.
    pub const SEGMENT: usize = offset_of!(Control, segment);
    /// Control: whose stack it is.
    pub const IDENTITY: usize = offset_of!(Control, identity);
    /// Control: which of its lives this is.
    pub const GENERATION: usize = offset_of!(Control, generation);
    /// Control: how the entry has ended.
    pub const OUTCOME: usize = offset_of!(Control, outcome);
    /// Control: address of the link record.
    pub const LINK: usize = offset_of!(Control, link);
    /// Control: entries around the innermost one.
    pub const NESTED: usize = offset_of!(Control, nested);
    /// Control: the link record of a suspended stack.
    pub const SUSPENDED: usize = offset_of!(Control, suspended);
    /// Control: the callee-saved registers of a suspended stack, rbx or x19 first.
    pub const SAVED: usize = offset_of!(Control, saved);
    /// A link record: where managed code waits.
    pub const LINK_RECORD: usize = offset_of!(Link, record);
    /// A link record: an address in its stub.
    pub const LINK_PC: usize = offset_of!(Link, pc);
    /// A link record: the control block.
    pub const LINK_CONTROL: usize = offset_of!(Link, control);
    /// A link record: its seal.
    pub const LINK_SEAL: usize = offset_of!(Link, seal);
    /// Bytes of a link record.
    pub const LINK_SIZE: usize = size_of::<Link>();
    /// Bytes of a segment's record.
    pub const RECORD: usize = size_of::<Record>();
    /// A segment's record: the segment before.
    pub const PREVIOUS: usize = offset_of!(Record, previous);
    /// A segment's record: the frame that it was entered from.
    pub const RECORD_LINK: usize = offset_of!(Record, link_record);
    /// A segment's record: the second part's seal.
    pub const RECORD_LINK_SEAL: usize = offset_of!(Record, link_seal);
    /// A segment's record: the segment behind.
    pub const NEXT: usize = offset_of!(Record, next);
    /// A segment's record: the limit of managed code there.
    pub const LIMIT: usize = offset_of!(Record, limit);
    /// A segment's record: bytes above the reserve.
    pub const ROOM: usize = offset_of!(Record, room);
    /// A segment's record: bytes of arguments and results at its top.
    pub const AREA: usize = offset_of!(Record, area);
    /// A segment's record: where the oldest lifted frame returns to.
    pub const LIFTED: usize = offset_of!(Record, lifted);
}

/// The verbs, unchecked.
///
/// # Safety
/// As those of the same name in `switch`: this is what forces them.
pub mod forced {
    use super::*;

    /// See the module.
    ///
    /// # Safety
    /// See the module.
    pub unsafe fn prepare(slot: NonNull<Slot>, entry: Entry, data: usize) {
        // SAFETY: the caller's.
        unsafe { switch::prepare(slot, entry, data) }
    }

    /// See the module.
    ///
    /// # Safety
    /// See the module.
    #[inline(always)]
    pub unsafe fn resume(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize) -> Passed {
        // SAFETY: the caller's.
        unsafe { switch::resume_through(last, first, arg) }
    }

    /// See the module.
    ///
    /// # Safety
    /// See the module.
    #[inline(always)]
    pub unsafe fn suspend(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize) -> usize {
        // SAFETY: the caller's.
        unsafe { switch::suspend_through(last, first, arg) }
    }

    /// See the module.
    ///
    /// # Safety
    /// See the module.
    #[inline(always)]
    pub unsafe fn switch_to(from: NonNull<Slot>, to: NonNull<Slot>, arg: usize) -> usize {
        // SAFETY: the caller's.
        unsafe { switch::switch_to(from, to, arg) }
    }

    /// See the module.
    ///
    /// # Safety
    /// See the module.
    #[inline(always)]
    pub unsafe fn throw(last: NonNull<Slot>, first: NonNull<Slot>, arg: usize, f: Thrown) -> Passed {
        // SAFETY: the caller's.
        unsafe { switch::throw(last, first, arg, f) }
    }

    /// See the module.
    ///
    /// # Safety
    /// See the module.
    pub unsafe fn cancel(slot: NonNull<Slot>) {
        // SAFETY: the caller's.
        unsafe { switch::cancel(slot) }
    }
}

/// Has callee-saved registers sealed from now on, also when stacks were made before.
///
/// # Safety
/// Nothing is prepared or suspended: what was sealed without them would not hold.
pub unsafe fn ask_full_seal(_: NonNull<Slot>) {
    if let Err(error) = crate::published::add_mode(crate::published::MODE_FULL_SEAL) {
        panic!("{error}");
    }
}

/// Has a stack say that it is not parked, as who rewrites its words does: what lies on it is not changed.
///
/// # Safety
/// What is run then is not signed for the thread: the process is expected to end.
pub unsafe fn forget_parked(stack: &mut crate::Stack) {
    stack.forget_parked();
}
