//! What a frame looks like: the layout of a function's frames, and what one call changes of it.

use crate::pac::{Binding, PointerSigning, Signing};

/// Layout of the frames of one function. See [`crate::codemap`] for the picture.
///
/// [`FrameLayout::new`] is a frame as compilers make it most often; fields and `with_` methods say what is different.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLayout {
    /// Bytes between the frame record and the stack pointer at a call: fp − sp, the stack pointer being what it is after the call:
    /// without what the callee pops, with what the caller pops. With `dynamic` the least of them. A multiple of 8 below 2 GiB
    /// that makes a multiple of 16 together with `cfa_bytes`.
    pub frame_bytes: u32,
    /// Bytes between the frame record and the CFA: CFA − fp. 16 when nothing stands between; a multiple of 8.
    ///
    /// x86-64: the return address is always at CFA − 8, the saved frame pointer at fp. arm64: the return address is at fp + 8.
    pub cfa_bytes: u32,
    /// Bytes above the CFA that belong to this function and not to its caller: stack arguments that it pops, stack results that
    /// it leaves there. A multiple of 16. 0 where the caller owns and pops what it passes.
    pub incoming: u32,
    /// Whether fp − sp is different from call to call (`alloca`). The caller's frame pointer is then what the callee saved.
    pub dynamic: bool,
    /// With which key the function signs its return address.
    pub signing: Signing,
    /// The modifier of that signature.
    pub binding: Binding,
    /// With which key it signs the frame pointer that it saves.
    pub frame_pointer: PointerSigning,
    /// Whether a word of the frame that points into the stack, and that nothing declares, refuses the move. Without it every
    /// slot that holds such a pointer must be declared, and other words are not looked at.
    pub conservative: bool,
    /// Whether it takes its stack pointer back by itself: after each call it computes it from fp, and no call of it passes arguments or results
    /// on the stack. What stands above such a frame can be lifted to another segment.
    pub retakes_sp: bool,
    /// Why its frames may not move, in the engine's words. A frame that may not refuses every move of its span.
    pub immovable: Option<&'static str>,
}

impl FrameLayout {
    /// A frame of constant size: the record next to the CFA, the return address bound to the CFA, the frame pointer saved as it
    /// is, nothing popped, movable. See [`FrameLayout::frame_bytes`].
    pub const fn new(frame_bytes: u32, signing: Signing) -> Self {
        FrameLayout {
            frame_bytes,
            cfa_bytes: RECORD,
            incoming: 0,
            dynamic: false,
            signing,
            binding: Binding::Cfa,
            frame_pointer: PointerSigning::None,
            conservative: false,
            retakes_sp: false,
            immovable: None,
        }
    }

    /// The same with the record this far below the CFA.
    pub const fn with_cfa_bytes(self, cfa_bytes: u32) -> Self {
        FrameLayout { cfa_bytes, ..self }
    }

    /// The same with so many bytes above the CFA that are the function's own.
    pub const fn with_incoming(self, incoming: u32) -> Self {
        FrameLayout { incoming, ..self }
    }

    /// The same with another modifier.
    pub const fn with_binding(self, binding: Binding) -> Self {
        FrameLayout { binding, ..self }
    }

    /// The same with signed frame pointers.
    pub const fn with_frame_pointer(self, frame_pointer: PointerSigning) -> Self {
        FrameLayout { frame_pointer, ..self }
    }

    /// The same, of varying size.
    pub const fn dynamic(self) -> Self {
        FrameLayout { dynamic: true, ..self }
    }

    /// The same, refusing undeclared pointers into the stack.
    pub const fn conservative(self) -> Self {
        FrameLayout { conservative: true, ..self }
    }

    /// The same, taking its stack pointer back by itself.
    pub const fn retakes_sp(self) -> Self {
        FrameLayout { retakes_sp: true, ..self }
    }

    /// The same, not movable for this reason.
    pub const fn immovable(self, reason: &'static str) -> Self {
        FrameLayout { immovable: Some(reason), ..self }
    }

    /// Offset from fp of the return address.
    #[inline]
    pub(crate) fn return_offset(&self) -> usize {
        if cfg!(target_arch = "x86_64") { self.cfa_bytes as usize - 8 } else { 8 }
    }

    /// Whether it is one that [`FrameLayout::new`] makes: the walk has a way of its own for those.
    pub(crate) fn is_plain(&self) -> bool {
        *self == FrameLayout { retakes_sp: self.retakes_sp, ..FrameLayout::new(self.frame_bytes, self.signing) }
    }

    /// The rule that no frame of this layout could keep.
    pub(super) fn broken_rule(&self) -> Option<&'static str> {
        let frame_bytes = self.frame_bytes;
        if self.cfa_bytes < RECORD || !self.cfa_bytes.is_multiple_of(8) {
            return Some("`cfa_bytes` is below 16 or not a multiple of 8");
        }
        if self.cfa_bytes > LARGEST_FRAME || self.incoming > LARGEST_FRAME {
            return Some("`cfa_bytes` or `incoming` is above 2 GiB");
        }
        if !self.incoming.is_multiple_of(16) {
            return Some("`incoming` is not a multiple of 16");
        }
        if self.dynamic && self.signing != Signing::None && self.binding == Binding::Zero {
            return Some("a frame of dynamic size is believed because its return address is bound to its CFA");
        }
        self.broken_size(frame_bytes)
    }

    /// The rule that this size breaks.
    pub(super) fn broken_size(&self, frame_bytes: u32) -> Option<&'static str> {
        if !(u64::from(frame_bytes) + u64::from(self.cfa_bytes)).is_multiple_of(16) {
            return Some("`frame_bytes` and `cfa_bytes` do not make a multiple of 16");
        }
        (frame_bytes > LARGEST_FRAME).then_some("`frame_bytes` is above 2 GiB")
    }

    /// The rule that a slot at this offset from fp breaks, in a call with so many bytes below fp.
    pub(super) fn broken_slot(&self, offset: i32, frame_bytes: u32) -> Option<&'static str> {
        let (lowest, highest) = (-i64::from(frame_bytes), i64::from(self.cfa_bytes) + i64::from(self.incoming) - 8);
        let at = i64::from(offset);
        if at < lowest || at > highest {
            return Some("a slot lies outside its frame");
        }
        if offset % 8 != 0 {
            return Some("a slot is not 8-byte aligned");
        }
        (offset == 0 || at == self.return_offset() as i64).then_some("a slot lies outside its frame: in its record")
    }
}

/// Bytes of a frame record.
const RECORD: u32 = 16;

/// Largest `frame_bytes` accepted: an offset in a frame fits in 31 bits.
pub const LARGEST_FRAME: u32 = i32::MAX as u32 & !15;

/// What holds at one call, overriding the function's layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Safepoint<'a> {
    /// fp − sp at this call, where it is not [`FrameLayout::frame_bytes`]: code that pushes.
    pub frame_bytes: Option<u32>,
    /// Slots that hold pointers into the stack: offsets from fp in bytes, 8-byte aligned, negative but for slots between the
    /// record and the end of what the function owns above its CFA.
    pub slots: &'a [i32],
    /// Callee-saved registers that hold pointers into the stack.
    pub registers: &'a [Register],
}

/// A callee-saved register of the platform's C convention, the frame pointer excepted: rbx and r12 to r15 on x86-64, x19 to x28
/// on arm64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register(u8);

impl Register {
    /// Their names, in the order of the blocks that stubs keep them in: eight bytes each, without gaps.
    pub const NAMES: &'static [&'static str] = if cfg!(target_arch = "x86_64") {
        &["rbx", "r12", "r13", "r14", "r15"]
    } else {
        &["x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28"]
    };

    /// The register with this place in [`Register::NAMES`].
    pub const fn new(index: usize) -> Option<Register> {
        if index < Self::NAMES.len() { Some(Register(index as u8)) } else { None }
    }

    /// The register with this name.
    pub fn named(name: &str) -> Option<Register> {
        Self::NAMES.iter().position(|&known| known == name).and_then(Register::new)
    }

    /// Its place in [`Register::NAMES`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
