//! What a program asks of the library, and what the answer must be.

use super::endless::{Level, Obstacle};
use super::world::World;
use crate::abi::Extent;
use crate::error::{Error, Refusal};
use crate::segment::read_word;
use crate::stack::Stats;

/// What is asked of the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// By `grow`, for so many bytes.
    Grow(usize),
    /// By native code.
    Reserve(usize),
    /// By native code, with hysteresis or without.
    Shrink(bool),
}

impl World<'_> {
    /// Has the library do something, and compares what it did with what the endless stack says of the frames. Returns what it refused.
    pub(super) fn ask(&mut self, ask: Ask) -> Result<Option<Error>, String> {
        let known = |function: usize| !self.program.unknown[function];
        let kept = matches!(ask, Ask::Grow(_));
        let obstacle = self.endless.obstacle(known, kept);
        let cut = self.endless.cut(known, self.program.policy.lift_bytes);
        let (before, image) = (self.played.stats(), self.image());
        let present = self.present();
        let used = present.top - self.endless.record(self.youngest()) - 16;
        let block = self.registers.as_mut_ptr().expose_provenance();
        let answer = match ask {
            Ask::Grow(bytes) => self.played.grow(bytes, block),
            Ask::Reserve(bytes) => self.played.reserve(bytes),
            Ask::Shrink(hysteresis) => self.played.shrink(hysteresis).map(drop),
        };
        self.look();
        if let Err(refusal) = answer {
            return self.refused(refusal, &before, &image, obstacle).map(Some);
        }
        let after = self.played.stats();
        if after.lifts != before.lifts {
            let oldest = cut.ok_or("frames were lifted that end at no frame which takes its stack pointer back")?;
            self.endless.lift(oldest);
            self.tried.lifts += 1;
        } else if (after.growths, after.shrinks) != (before.growths, before.shrinks) {
            if let Some(obstacle) = obstacle {
                return Err(format!("frames were moved in spite of {obstacle:x?}"));
            }
            let too_large = used < (present.top - present.base) / self.program.policy.shrink_below;
            if ask == Ask::Shrink(true) && !too_large {
                return Err(format!("a segment was made smaller of which {used} bytes are in use"));
            }
            self.tried.note_move(&self.endless.levels, after.shrinks != before.shrinks);
        }
        self.tried.page_moves += after.page_moves - before.page_moves;
        // Bytes that will be needed are there.
        let needed = match ask {
            Ask::Grow(bytes) | Ask::Reserve(bytes) => bytes.saturating_add(self.program.policy.reserve),
            Ask::Shrink(_) if after == before => 0,
            Ask::Shrink(_) => self.program.policy.reserve,
        };
        let room = self.endless.record(self.youngest()) + 16 - self.present().base;
        if room < needed {
            return Err(format!("{room} bytes are free after {ask:?}"));
        }
        Ok(None)
    }

    /// The segment that the youngest level is on.
    fn present(&self) -> Extent {
        self.segments[self.endless.levels[self.youngest()].segment]
    }

    /// Segments in use must be no more than the policy allows, and lifted frames above those that they rest on.
    pub(super) fn check_segments(&self) -> Result<(), String> {
        let levels = &self.endless.levels;
        let used = levels.last().map_or(0, |level| level.segment + 1);
        let bytes: usize = self.segments[..used].iter().map(|segment| segment.top - segment.base).sum();
        if bytes > self.program.policy.maximum {
            return Err(format!("{used} segments take {bytes} bytes"));
        }
        let rests = |pair: &&[Level]| pair[0].segment != pair[1].segment && pair[0].is_managed();
        match levels
            .windows(2)
            .filter(rests)
            .find(|pair| self.segments[pair[1].segment].base < self.segments[pair[0].segment].top)
        {
            None => Ok(()),
            Some(pair) => Err(format!("lifted frames are below those that they rest on: {pair:x?}")),
        }
    }

    /// A refusal must have a reason, and leave no trace.
    pub(super) fn refused(
        &mut self,
        refusal: Refusal,
        before: &Stats,
        image: &[(usize, Vec<u64>)],
        obstacle: Option<Obstacle>,
    ) -> Result<Error, String> {
        let Refusal::Error(error) = refusal else { return Err(format!("{refusal:?}")) };
        let right = match error {
            Error::Overflow { needed, maximum } => needed > maximum && maximum == self.program.policy.maximum,
            Error::ShadowRoom { needed, room } => needed > room && self.program.shadow.is_some(),
            Error::UnknownCode(pc) => obstacle == Some(Obstacle::Unknown(pc)),
            Error::Unsigned(pc) => obstacle == Some(Obstacle::Unsigned(pc)),
            Error::Immovable { pc, .. } => obstacle == Some(Obstacle::Immovable(pc)),
            _ => false,
        };
        if !right {
            return Err(format!("refused for no reason: {error:?}, and the frames have {obstacle:x?}"));
        }
        if self.image() != image || self.played.stats() != *before {
            return Err(format!("a refusal has left a trace: {error}"));
        }
        self.tried.note_refusal(&error);
        Ok(error)
    }

    /// Every word from the lowest frame of each segment up, with its address, and the registers.
    pub(super) fn image(&self) -> Vec<(usize, Vec<u64>)> {
        let mut image = vec![(0, self.registers.to_vec())];
        for (number, segment) in self.segments.iter().enumerate() {
            let levels = (0..self.endless.levels.len()).filter(|&level| self.endless.levels[level].segment == number);
            let Some(low) = levels.map(|level| self.endless.low(level)).min() else { continue };
            // SAFETY: frames of a segment that the stack owns.
            let words = (low..segment.top).step_by(8).map(|place| unsafe { read_word(place) });
            image.push((low, words.collect()));
        }
        image
    }
}
