//! The words of a growable stack's control block and link records, as an attacker finds them, and the classes of CPU that differ about them.

use crate::attack::corrupt;
use crate::child::page;
use crate::class::{Class, Column};
use crate::cpu;
use crate::memory::peek;
use crate::outcome::Code::{self, B, R, S};
use crate::selftest::spans::World;
use cfi_stack::probe::growable::{self, LINK};
use std::sync::atomic::Ordering::Relaxed;

/// The codes in the columns: arm64 with PAC, with a GCS too, x86-64 with CET; arm64 and x86-64 where nothing is enforced. `None`: not to be
/// shown there.
pub type Codes = [Option<Code>; 5];

/// This class's of them.
pub fn of(class: &Class, codes: Codes) -> Option<Code> {
    codes[match class.column() {
        Column::Pac => 0,
        Column::PacGcs => 1,
        Column::Cet => 2,
        Column::Bare if cfg!(target_arch = "aarch64") => 3,
        Column::Bare => 4,
    }]
}

/// The same in all columns.
pub const fn everywhere(code: Code) -> Codes {
    [Some(code); 5]
}

/// One code where words are sealed, another where not.
pub const fn sealed(code: Code, else_: Code) -> Codes {
    [Some(code), Some(code), Some(else_), Some(else_), Some(else_)]
}

/// The stubs' own check is what may end the child.
pub fn expect_the_stubs_check() {
    let check = if cfg!(target_arch = "aarch64") { cpu::BRK_SEAL } else { u64::from(cpu::UD2) };
    page().breakpoint.store(check, Relaxed);
}

/// The control block of a stack.
#[derive(Clone, Copy, Debug, Default)]
pub struct Control(pub usize);

impl Control {
    /// That of the stack whose native callee asks.
    pub fn of(world: &World<'_>) -> Control {
        Control(growable::control(world.activation()))
    }

    /// The word at an offset.
    pub fn get(self, offset: usize) -> usize {
        // SAFETY: the stack that the block is about lives; whatever it holds is a number here.
        unsafe { peek(self.0 + offset) as usize }
    }

    /// Rewrites the word at an offset.
    pub fn set(self, offset: usize, word: usize) {
        corrupt(self.0 + offset, word as u64);
    }

    /// Rewrites it for what `change` makes of it.
    pub fn change(self, offset: usize, change: impl FnOnce(usize) -> usize) {
        self.set(offset, change(self.get(offset)));
    }

    /// The link record on the native stack, while native code runs.
    pub fn link(self) -> Words<4> {
        Words(self.get(LINK))
    }

    /// The segment's record.
    pub fn segment(self) -> Control {
        Control(self.get(growable::SEGMENT))
    }
}

/// So many words somewhere.
#[derive(Clone, Copy, Debug)]
pub struct Words<const N: usize>(pub usize);

impl<const N: usize> Words<N> {
    /// What they are.
    pub fn get(self) -> [u64; N] {
        // SAFETY: the callers name words of a live stack's.
        std::array::from_fn(|index| unsafe { peek(self.0 + index * 8) })
    }

    /// Rewrites them.
    pub fn set(self, words: [u64; N]) {
        words.into_iter().enumerate().for_each(|(index, word)| corrupt(self.0 + index * 8, word));
    }

    /// Rewrites one.
    pub fn change(self, offset: usize, change: impl FnOnce(u64) -> u64) {
        // SAFETY: as in `get`.
        corrupt(self.0 + offset, change(unsafe { peek(self.0 + offset) }));
    }
}

/// The frame record of the caller's caller of what waits at `record`.
pub fn older(record: u64) -> u64 {
    // SAFETY: a chain of live frames of managed code.
    (0..3).fold(record, |record, _| unsafe { peek(record as usize) })
}

/// As many bytes in memory of the attacker's.
pub fn copy(address: usize, bytes: usize) -> usize {
    let words = Box::leak(vec![0_u64; bytes / 8 + 8].into_boxed_slice());
    let place = (words.as_mut_ptr().expose_provenance() + 63) & !63;
    for offset in (0..bytes).step_by(8) {
        // SAFETY: the block that is copied is a live stack's.
        corrupt(place + offset, unsafe { peek(address + offset) });
    }
    place
}

/// What an attacker knows.
pub(super) struct Place {
    pub control: Control,
    /// The link record of an earlier call of the same run, or of an earlier suspension, at another depth.
    pub earlier: [u64; 4],
}

/// Another frame is returned from, where no shadow stack sees that.
pub(super) const OTHER_FRAME: Codes = [Some(B), Some(B), Some(S), Some(R), Some(R)];
