//! What `asm/` and Rust both know: the blocks of memory that the stubs read and write, field for field.

use crate::pac::{Binding, RawPc, Signing};
#[cfg(cfi_stack_native)]
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// What the stubs believe of a segment: its bounds and whose it is, sealed on arm64 by a PACGA chain bound to the
/// record's own address. The stubs verify the seal in registers before they use a word of it.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Record {
    /// Lowest usable address.
    pub(crate) base: usize,
    /// First address above the segment; the first frame's CFA. 16-byte aligned.
    pub(crate) top: usize,
    /// The stack that owns it.
    pub(crate) identity: u64,
    /// The stack's generation when it was made.
    pub(crate) generation: u64,
    /// The seal; 0 on a CPU without generic authentication.
    pub(crate) seal: u64,
    /// The segment that comes before, null for the stack's oldest; sealed with the two words below.
    pub(crate) previous: *const Record,
    /// The frame record of `link`, in the segment before, that the segment was entered from. 0 while nothing runs on it. Odd when frames were
    /// lifted to it: the record of the frame below them, plus 1.
    pub(crate) link_record: usize,
    /// The second part's seal, bound to the record's address + 8; 0 on a CPU without generic authentication.
    pub(crate) link_seal: u64,
    /// The segment that comes behind, or null. A hint: that one's `previous` decides.
    pub(crate) next: *const Record,
    /// What managed code compares its stack pointer with while it runs here. A hint, as in the activation: the guard decides.
    pub(crate) limit: usize,
    /// Bytes between the top and the policy's reserve.
    pub(crate) room: usize,
    /// Bytes at the top that hold stack arguments and results of the call that entered.
    pub(crate) area: u32,
    /// 1 when that call has changed to the shadow segment below. A hint: the return of a call that has not is refused by the CPU.
    pub(crate) shadowed: u32,
    /// Where the oldest of the frames that were lifted to it returns to.
    pub(crate) lifted: usize,
    /// Where the token of the shadow segment lies that calls into the segment begin on, while nothing runs there; 0 where they stay on the one they are on.
    pub(crate) shadow: usize,
    /// Its seal, bound to the record's address + 16; 0 on a CPU without generic authentication.
    pub(crate) shadow_seal: u64,
}

impl Default for Record {
    fn default() -> Self {
        Record {
            base: 0,
            top: 0,
            identity: 0,
            generation: 0,
            seal: 0,
            previous: std::ptr::null(),
            link_record: 0,
            link_seal: 0,
            next: std::ptr::null(),
            limit: 0,
            room: 0,
            area: 0,
            shadowed: 0,
            lifted: 0,
            shadow: 0,
            shadow_seal: 0,
        }
    }
}

impl Record {
    /// Bytes between base and top.
    pub(crate) fn size(&self) -> usize {
        self.top.wrapping_sub(self.base)
    }

    /// Whether `bytes` bytes at `address` lie inside.
    pub(crate) fn holds(&self, address: usize, bytes: usize) -> bool {
        self.extent().holds(address, bytes)
    }

    /// The bounds as they are now. Looked at once: another thread may be writing the record.
    pub(crate) fn extent(&self) -> Extent {
        // SAFETY: both fields are borrowed and aligned; volatile, so that they are read here and not again.
        let (base, top) = unsafe { ((&raw const self.base).read_volatile(), (&raw const self.top).read_volatile()) };
        Extent { base, top }
    }

    /// Whether the two share a byte.
    pub(crate) fn overlaps(&self, other: &Record) -> bool {
        self.base < other.top && other.base < self.top
    }
}

/// The bounds of a segment, out of an attacker's reach once they are in registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) base: usize,
    pub(crate) top: usize,
}

impl Extent {
    /// Whether `bytes` bytes at `address` lie inside.
    pub(crate) fn holds(&self, address: usize, bytes: usize) -> bool {
        address >= self.base && address <= self.top && self.top - address >= bytes
    }
}

/// One word to re-bind: a return address or a signed frame pointer. Its layout is known to `asm/`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebinding {
    /// Address of the word in the source segment, and in its three lowest bits, which an address has clear, its [`form`].
    place: usize,
    /// What it authenticated to: the address whose layout was planned with, or a frame pointer.
    pub pc: RawPc,
}

/// How a word is signed. For return addresses the modifier is the CFA, 8 bytes above the word, unless it is described; for frame
/// pointers the word's own address.
pub(crate) mod form {
    /// Not at all.
    pub const UNSIGNED: usize = 0;
    /// With key A.
    #[cfg(any(test, feature = "model"))]
    pub const A: usize = 1;
    /// With key B.
    #[cfg(any(test, feature = "model"))]
    pub const B: usize = 2;
    /// A return address that the next [`Detail`](super::Detail) tells more of.
    pub const DESCRIBED: usize = 3;
    /// The bits that say so.
    pub const BITS: usize = 7;
}

impl Rebinding {
    /// An entry for the word at `slot`, which is 8-byte aligned.
    pub(crate) fn new(slot: usize, form: usize, pc: RawPc) -> Self {
        Rebinding { place: slot | form, pc }
    }

    /// Address of the word.
    pub fn slot(&self) -> usize {
        self.place & !form::BITS
    }

    /// How it is signed: 1 with key A, 2 with key B, 3 as described elsewhere in the plan, 0 not at all.
    pub fn form(&self) -> usize {
        self.place & form::BITS
    }

    /// Both in one word, to be tampered with by the attack battery.
    #[cfg(any(feature = "steps", feature = "model", test))]
    pub fn place_mut(&mut self) -> &mut usize {
        &mut self.place
    }
}

/// What a described entry needs besides: how the modifier of a return address comes about.
///
/// Bits 0–7: 1 with key A, 2 with key B. Bits 8–15: 0 the CFA, 1 zero, 2 the CFA with its upper 16 bits replaced by bits 16–31.
/// Bits 32–63: bytes between the word's end and the CFA.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detail(pub(crate) u64);

impl Detail {
    pub(crate) fn new(signing: Signing, binding: Binding, beyond: usize) -> Detail {
        let (rule, number) = match binding {
            Binding::Cfa => (0, 0),
            Binding::Zero => (1, 0),
            Binding::Blended(number) => (2, u64::from(number)),
        };
        Detail(signing as u64 | rule << 8 | number << 16 | (beyond as u64) << 32)
    }

    /// What it says; one that says nothing possible was rewritten.
    #[cfg(any(test, feature = "model"))]
    pub(crate) fn parts(self) -> Option<(Signing, Binding, usize)> {
        let signing = Signing::from_byte(self.0 as u8).filter(|&signing| signing != Signing::None)?;
        let binding = match self.0 >> 8 & 0xff {
            0 => Binding::Cfa,
            1 => Binding::Zero,
            2 => Binding::Blended((self.0 >> 16) as u16),
            _ => return None,
        };
        Some((signing, binding, (self.0 >> 32) as usize))
    }
}

/// Where managed code waits while native code runs: written by `exit` and `grow` on the native stack, by `suspend` into the control block.
///
/// On arm64 `seal` is a PACGA chain over `record`, bound to the address of this block, with control's address, identity and generation.
/// On x86 what is read from here must lie in the present segment.
#[cfg(cfi_stack_native)]
#[repr(C, align(16))]
#[derive(Debug, Default)]
pub struct Link {
    /// Address of the stub's frame record; 0 when nothing waits.
    pub(crate) record: usize,
    /// An address in the stub: with `record` a frame record for those who walk frame pointers.
    pub(crate) pc: usize,
    /// The control block.
    pub(crate) control: usize,
    /// 0 where nothing is sealed.
    pub(crate) seal: u64,
}

/// The stubs' view of a stack: where the native side waits, where the tokens lie, which segment is the stack's.
#[cfg(cfi_stack_native)]
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Control {
    /// The innermost entry's native stack pointer; stale while no entry runs.
    pub(crate) native_sp: usize,
    pub(crate) native_token: usize,
    pub(crate) token: usize,
    /// On arm64 of `native_sp`.
    pub(crate) seal: u64,
    /// The segment that managed code runs on.
    pub(crate) segment: *const Record,
    /// The managed shadow-stack pointer when the innermost entry was made.
    pub(crate) shadow_level: usize,
    pub(crate) identity: u64,
    pub(crate) generation: u64,
    pub(crate) outcome: u64,
    /// Address of the link record while native code runs that managed code called; 0 otherwise.
    pub(crate) link: usize,
    /// Entries around the innermost one.
    pub(crate) nested: usize,
    /// The activation that the stack runs with, which can be another one after each resumption; null while it does not run.
    pub(crate) activation: *const Activation,
    /// Where a suspended stack waits.
    pub(crate) suspended: Link,
    /// Its callee-saved registers: in the order of `Register::NAMES`; on arm64 then d8-d15.
    pub(crate) saved: [u64; SAVED],
}

/// Words of callee-saved registers that `suspend` keeps.
#[cfg(cfi_stack_native)]
const SAVED: usize = if cfg!(target_arch = "x86_64") { 5 } else { 18 };

#[cfg(cfi_stack_native)]
impl Control {
    /// Of a stack that nothing runs on.
    pub(crate) fn new(identity: u64, generation: u64, token: usize, shadow_level: usize) -> Self {
        Control {
            native_sp: 0,
            native_token: 0,
            token,
            seal: 0,
            segment: std::ptr::null(),
            shadow_level,
            identity,
            generation,
            outcome: 0,
            link: 0,
            nested: 0,
            activation: std::ptr::null(),
            suspended: Link::default(),
            saved: [0; SAVED],
        }
    }
}

/// What `link` is told of a call: whom it calls, what lies on the stack for it, how much room it wants.
///
/// It lies in memory that nobody can write, beside the code that calls `link`: the stub calls what it says. Code generators may write its
/// 24 bytes themselves: the callee's address (8 bytes), then four 32-bit words: the *area*, result bytes, area + need, argument bytes. The area is
/// the larger of argument and result bytes, rounded up to 16.
#[cfg(cfi_stack_native)]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LinkCall {
    pub(crate) callee: RawPc,
    pub(crate) area: u32,
    pub(crate) results: u32,
    pub(crate) total: u32,
    pub(crate) arguments: u32,
}

/// A context that waits: where its registers lie, and what makes that believable.
///
/// On arm64 `seal` is a PACGA chain over pc, sp, fp, identity and generation, bound to the address of this block. On x86 the pc is the
/// shadow stack's, and the read-only chunk directory says which sp and token belong to the slot.
#[cfg(cfi_stack_native)]
#[repr(C)]
#[derive(Debug, Default)]
pub struct Context {
    /// Stack pointer; the saved registers lie there.
    pub(crate) sp: usize,
    /// 0 once it was used, and where nothing is sealed. A slot's own: see [`slot_state::INLINED`].
    pub(crate) seal: AtomicU64,
    /// Address of the token on the shadow stack that was left; 0 without.
    pub(crate) token: usize,
    /// Counts the saves.
    pub(crate) generation: u64,
}

/// The bookkeeping of one pooled stack, off that stack: for its whole life it belongs to one data area and one shadow stack.
#[cfg(cfi_stack_native)]
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Slot {
    /// The stack's own context, while it is suspended or has not started.
    pub(crate) own: Context,
    /// Who waits for it, while it runs.
    pub(crate) resumer: Context,
    /// Unlike any other slot's of the process.
    pub(crate) identity: u64,
    /// Lowest usable address of the data area.
    pub(crate) base: usize,
    /// One past its highest; 16-byte aligned.
    pub(crate) top: usize,
    /// One past the highest word of the shadow stack; 0 without one.
    pub(crate) shadow_top: usize,
    /// Index of its chunk in the directory.
    pub(crate) chunk: u32,
    /// One of [`slot_state`].
    pub(crate) state: AtomicU32,
    /// Where the program made what runs on it: a `&'static Location`, or null.
    pub(crate) created: AtomicPtr<std::panic::Location<'static>>,
    /// Whose quota it counts against, or null.
    pub(crate) owner: AtomicPtr<()>,
    /// The next free slot while it is free.
    pub(crate) next: AtomicPtr<Slot>,
}

/// What a slot is in.
#[cfg(cfi_stack_native)]
#[allow(dead_code)]
pub(crate) mod slot_state {
    /// In a pool.
    pub const FREE: u32 = 0;
    /// Prepared, never ran.
    pub const READY: u32 = 1;
    /// Runs, or waits for a stack that it resumed.
    pub const RUNNING: u32 = 2;
    /// Suspended.
    pub const SUSPENDED: u32 = 3;
    /// Finished or cancelled, not yet returned to its pool.
    pub const DONE: u32 = 4;
    /// Handed out, nothing prepared on it.
    pub const LEASED: u32 = 5;
    /// Runs, and is to unwind its frames as soon as it looks.
    pub const UNWINDING: u32 = 6;
    /// Waits for its resumer to call something on its behalf.
    pub const ASKING: u32 = 7;
    /// A coroutine's on x86-64 where nothing is checked: the word in its own seal's place says which of the others it is, see [`coroutine_word`](super::coroutine_word).
    pub const INLINED: u32 = 8;
}

/// What the word says that stands in the place of a slot's own seal while coroutines switch inlined (src/switch/inlined.rs has the drawing). 0:
/// nothing is on the stack.
#[cfg(cfi_stack_native)]
#[allow(dead_code)]
pub(crate) mod coroutine_word {
    /// This bit: the rest is the stack pointer of a stack that waits to be resumed. Without it, that of whoever waits for a stack that runs.
    pub const WAITS: u64 = 8;
    /// This bit too: it never ran.
    pub const READY: u64 = 1;
}

#[cfg(cfi_stack_native)]
impl Slot {
    /// What it is in, whichever way that is noted: never [`slot_state::INLINED`].
    pub(crate) fn standing(&self) -> u32 {
        match self.state.load(Ordering::Acquire) {
            slot_state::INLINED => match self.own.seal.load(Ordering::Acquire) {
                0 => slot_state::DONE,
                word if word & coroutine_word::READY != 0 => slot_state::READY,
                word if word & coroutine_word::WAITS != 0 => slot_state::SUSPENDED,
                _ => slot_state::RUNNING,
            },
            noted => noted,
        }
    }
}

/// What managed code carries: the limit it compares with and the stack it runs on.
///
/// The address must not change while a stack runs on it. Both words are written by this library alone.
#[cfg(cfi_stack_native)]
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Activation {
    pub(crate) limit: AtomicUsize,
    pub(crate) control: AtomicPtr<Control>,
    pub(crate) scratch: AtomicUsize,
    /// What `link` asks `grow` to make a segment for; null when `grow` is asked to grow.
    pub(crate) link: AtomicPtr<LinkCall>,
}

#[cfg(cfi_stack_native)]
impl Activation {
    /// Offset in bytes of the limit word: managed code calls `grow` when its stack pointer is below it (unsigned).
    pub const LIMIT_OFFSET: i32 = 0;

    /// An activation without a stack.
    pub const fn new() -> Self {
        Activation {
            limit: AtomicUsize::new(usize::MAX),
            control: AtomicPtr::new(std::ptr::null_mut()),
            scratch: AtomicUsize::new(0),
            link: AtomicPtr::new(std::ptr::null_mut()),
        }
    }
}

#[cfg(cfi_stack_native)]
impl Default for Activation {
    fn default() -> Self {
        Activation::new()
    }
}

/// The offsets that `asm/` has in its `#define`s.
#[cfg(cfi_stack_native)]
const _: () = {
    assert!(std::mem::offset_of!(Control, native_token) == 8);
    assert!(std::mem::offset_of!(Control, token) == 16);
    assert!(std::mem::offset_of!(Control, seal) == 24);
    assert!(std::mem::offset_of!(Control, segment) == 32);
    assert!(std::mem::offset_of!(Control, shadow_level) == 40);
    assert!(std::mem::offset_of!(Control, identity) == 48);
    assert!(std::mem::offset_of!(Control, generation) == 56);
    assert!(std::mem::offset_of!(Control, outcome) == 64);
    assert!(std::mem::offset_of!(Control, link) == 72);
    assert!(std::mem::offset_of!(Control, nested) == 80);
    assert!(std::mem::offset_of!(Control, activation) == 88);
    assert!(std::mem::offset_of!(Control, suspended) == 96);
    assert!(std::mem::offset_of!(Control, saved) == 128);
    assert!(std::mem::offset_of!(Link, pc) == 8);
    assert!(std::mem::offset_of!(Link, control) == 16);
    assert!(std::mem::offset_of!(Link, seal) == 24);
    assert!(size_of::<Link>() == 32);
    assert!(std::mem::offset_of!(Activation, control) == 8);
    assert!(std::mem::offset_of!(Activation, scratch) == 16);
    assert!(std::mem::offset_of!(Activation, link) == 24);
    assert!(std::mem::offset_of!(Record, base) == 0);
    assert!(std::mem::offset_of!(Record, top) == 8);
    assert!(std::mem::offset_of!(Record, identity) == 16);
    assert!(std::mem::offset_of!(Record, generation) == 24);
    assert!(std::mem::offset_of!(Record, seal) == 32);
    assert!(std::mem::offset_of!(Record, previous) == 40);
    assert!(std::mem::offset_of!(Record, link_record) == 48);
    assert!(std::mem::offset_of!(Record, link_seal) == 56);
    assert!(std::mem::offset_of!(Record, next) == 64);
    assert!(std::mem::offset_of!(Record, limit) == 72);
    assert!(std::mem::offset_of!(Record, room) == 80);
    assert!(std::mem::offset_of!(Record, area) == 88);
    assert!(std::mem::offset_of!(Record, shadowed) == 92);
    assert!(std::mem::offset_of!(Record, shadow) == 104);
    assert!(std::mem::offset_of!(Record, shadow_seal) == 112);
    assert!(std::mem::offset_of!(LinkCall, callee) == 0);
    assert!(std::mem::offset_of!(LinkCall, area) == 8);
    assert!(std::mem::offset_of!(LinkCall, results) == 12);
    assert!(std::mem::offset_of!(LinkCall, total) == 16);
    assert!(std::mem::offset_of!(LinkCall, arguments) == 20);
    assert!(size_of::<LinkCall>() == 24);
    assert!(std::mem::offset_of!(Rebinding, place) == 0);
    assert!(std::mem::offset_of!(Rebinding, pc) == 8);
    assert!(size_of::<Rebinding>() == 16 && size_of::<Detail>() == 8);
    assert!(std::mem::offset_of!(Context, seal) == 8);
    assert!(std::mem::offset_of!(Context, token) == 16);
    assert!(std::mem::offset_of!(Context, generation) == 24);
    assert!(size_of::<Context>() == 32);
    assert!(std::mem::offset_of!(Slot, resumer) == 32);
    assert!(std::mem::offset_of!(Slot, identity) == 64);
    assert!(std::mem::offset_of!(Slot, base) == 72);
    assert!(std::mem::offset_of!(Slot, top) == 80);
    assert!(std::mem::offset_of!(Slot, shadow_top) == 88);
    assert!(std::mem::offset_of!(Slot, chunk) == 96);
    assert!(std::mem::offset_of!(Slot, state) == 100);
    assert!(size_of::<Slot>() == 128);
};
