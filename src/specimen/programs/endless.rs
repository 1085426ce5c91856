//! The model: one endless stack, on which nothing ever moves. What a word of it holds is said so that it can be written down for any place.

use crate::codemap::{FrameLayout, Register};
use crate::pac::{PointerSigning, RawPc, SignedPointer, Signing};
use crate::segment::read_word;
use crate::signer::Authenticator;
use crate::signer::model::Model;

/// Number of callee-saved registers.
pub(super) const REGISTERS: usize = Register::NAMES.len();

/// What a word holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// This, wherever it stands.
    Data(u64),
    /// An address: so many bytes from a level's record.
    Place(usize, i32),
}

/// Whose a level is.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// A function's: its index, and how many bytes this frame has more than it must.
    Managed { function: usize, more: usize },
    /// `grow`'s, while that runs.
    Grow,
    /// `exit`'s. The native callee keeps the registers: what they hold, as it should be and as it is.
    Exit { expected: Box<[Word; REGISTERS]>, registers: Box<[u64; REGISTERS]> },
    /// `link`'s: what it has copied to the top of the next segment, and how many bytes come back.
    Link { area: Vec<u64>, results: usize },
}

/// A frame of the endless stack.
#[derive(Clone, Debug)]
pub(super) struct Level {
    pub what: What,
    pub layout: FrameLayout,
    /// On which segment it is, counted from the oldest.
    pub segment: usize,
    /// Bytes from that one's top down to its record: what a move keeps.
    pub depth: usize,
    /// Where it returns to.
    pub returns: RawPc,
    /// The frame pointer that it saved.
    pub fp: Word,
    /// Bytes between its lowest address and its record.
    pub frame_bytes: usize,
    /// From its lowest address to the end of what it owns. Those of its record are not looked at.
    pub words: Vec<Word>,
    /// The registers that it has saved, and at which offsets from its record.
    pub saves: Vec<(Register, i32)>,
    /// The registers that hold pointers into the stack at its call.
    pub named: Vec<Register>,
}

impl Level {
    /// Index of the word at this offset from its record.
    pub fn index(&self, offset: i32) -> usize {
        (offset + self.frame_bytes as i32) as usize / 8
    }

    /// The offset of a word.
    pub fn offset(&self, index: usize) -> i32 {
        index as i32 * 8 - self.frame_bytes as i32
    }

    /// Whether the word at this offset is its record's.
    pub fn is_record(&self, offset: i32) -> bool {
        offset == 0 || offset as isize == self.layout.return_offset() as isize
    }

    pub fn is_managed(&self) -> bool {
        matches!(self.what, What::Managed { .. })
    }

    /// Whether native code has entered with it.
    pub fn is_entered(&self) -> bool {
        matches!(self.fp, Word::Data(_))
    }
}

/// The endless stack, and where each frame of it should be.
#[derive(Debug)]
pub(super) struct Endless {
    pub model: Model,
    /// The oldest first.
    pub levels: Vec<Level>,
    /// Of each segment, the oldest first.
    pub tops: Vec<usize>,
}

impl Endless {
    /// Where a level's record should be.
    pub fn record(&self, level: usize) -> usize {
        let level = &self.levels[level];
        self.tops[level.segment] - level.depth
    }

    /// Its lowest address.
    pub fn low(&self, level: usize) -> usize {
        self.record(level) - self.levels[level].frame_bytes
    }

    /// What a word should be.
    pub fn value(&self, word: Word) -> u64 {
        match word {
            Word::Data(word) => word,
            Word::Place(level, offset) => self.record(level).wrapping_add_signed(offset as isize) as u64,
        }
    }

    /// The two words of a record, as they are made where it stands: the frame pointer, and the return address.
    pub fn made(&self, level: usize) -> (SignedPointer, u64) {
        let record = self.record(level);
        let Level { layout, returns, fp, .. } = self.levels[level];
        let cfa = record + layout.cfa_bytes as usize;
        let pointer = self.model.sign_pointer(self.value(fp), layout.frame_pointer, record);
        (pointer, self.model.sign(returns, layout.signing, layout.binding.modifier(cfa)).word())
    }

    /// Whether every word of every frame is where it should be, what it should be.
    pub fn check(&self) -> Result<(), String> {
        for (index, level) in self.levels.iter().enumerate() {
            let record = self.record(index);
            let at = |place: usize, expected: u64, what: &str| {
                // SAFETY: the place is one of a frame that the played code has written; segments with frames stay mapped. A library that
                // loses them ends the test here.
                let word = unsafe { read_word(place) };
                match word == expected {
                    true => Ok(()),
                    false => Err(format!("level {index}, {what}: {word:#x} instead of {expected:#x}; {level:x?}")),
                }
            };
            let (pointer, pc) = self.made(index);
            at(record, pointer.word(), "saved frame pointer")?;
            at(record + level.layout.return_offset(), pc, "return address")?;
            for (number, &word) in level.words.iter().enumerate() {
                let offset = level.offset(number);
                if !level.is_record(offset) {
                    at(record.wrapping_add_signed(offset as isize), self.value(word), "a word")?;
                }
            }
            if let What::Link { area, .. } = &level.what {
                let Some(top) = self.tops.get(level.segment + 1) else { continue };
                for (number, &word) in area.iter().rev().enumerate() {
                    at(top - 8 - number * 8, word, "a stack argument")?;
                }
            }
        }
        Ok(())
    }

    /// What a move of the youngest level's segment would be refused for: the first frame that cannot, and why. `kept` says whether a stub keeps
    /// the registers.
    pub fn obstacle(&self, known: impl Fn(usize) -> bool, kept: bool) -> Option<Obstacle> {
        let segment = self.levels.last()?.segment;
        // Whether somebody younger keeps a register's value.
        let mut saved = [kept; REGISTERS];
        for (index, level) in self.levels.iter().enumerate().rev().take_while(|(_, level)| level.segment == segment) {
            let What::Managed { function, .. } = level.what else {
                saved = [kept && index + 1 == self.levels.len(); REGISTERS];
                continue;
            };
            let pc = self.levels[index + 1].returns;
            if !known(function) {
                return Some(Obstacle::Unknown(pc));
            }
            if level.layout.signing == Signing::None && self.model.authenticates() {
                return Some(Obstacle::Unsigned(pc));
            }
            if level.layout.immovable.is_some() || level.named.iter().any(|register| !saved[register.index()]) {
                return Some(Obstacle::Immovable(pc));
            }
            for &(register, _) in &level.saves {
                saved[register.index()] = true;
            }
        }
        None
    }
}

impl Endless {
    /// The oldest level that a lift of `least` bytes takes along: the first, from the youngest, whose caller takes its stack pointer back.
    pub fn cut(&self, known: impl Fn(usize) -> bool, least: usize) -> Option<usize> {
        let youngest = self.levels.len() - 1;
        let low = self.record(youngest);
        for index in (1..=youngest).rev() {
            let (level, caller) = (&self.levels[index], &self.levels[index - 1]);
            let end = self.record(index) + level.layout.cfa_bytes as usize;
            let What::Managed { function, .. } = caller.what else { return None };
            let can = known(function)
                && caller.layout.immovable.is_none()
                && (caller.layout.signing != Signing::None || !self.model.authenticates());
            if level.is_entered() || caller.segment != level.segment || !can || end - low > 4 * least {
                return None;
            }
            let ends = level.layout.incoming == 0 && level.layout.frame_pointer == PointerSigning::None;
            if end - low >= least && ends && caller.layout.retakes_sp {
                return Some(index);
            }
        }
        None
    }

    /// The levels from this one on stand on the next segment from now on, the oldest of them at its top.
    pub fn lift(&mut self, oldest: usize) {
        let edge = self.levels[oldest].depth - self.levels[oldest].layout.cfa_bytes as usize;
        for level in &mut self.levels[oldest..] {
            level.segment += 1;
            level.depth -= edge;
        }
    }
}

/// Why a frame cannot move, and where it is returned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    Unknown(RawPc),
    Unsigned(RawPc),
    Immovable(RawPc),
}
