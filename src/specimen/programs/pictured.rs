//! What `inspect` shows of a stack in the middle of a program: each segment, each frame, whose it is, where its pointers lead, and what keeps it
//! from moving must be what the endless stack says.

use super::endless::{Level, What, Word};
use super::world::World;
use crate::error::Error;
use crate::inspect::{Frame, Mark, Owner, State, Target, svg};
use crate::pac::Signing;
use crate::signer::Authenticator;

impl World<'_> {
    /// Looks at the stack from native code that managed code has called, and compares each frame. A picture strips what the CPU can have signed, and
    /// this one has signed nothing where it is compared; of code that nobody registered there is no picture.
    pub(super) fn check_picture(&mut self) -> Result<(), String> {
        if self.endless.model.authenticates() || self.program.unknown.contains(&true) {
            return Ok(());
        }
        let picture = self.played.picture();
        let wrong = |what: &str| Err(format!("{what}\n{picture}"));
        let levels = &self.endless.levels;
        if picture.state != State::Running || !picture.is_complete() || picture.segments.len() != self.segments.len() {
            return wrong("not the whole stack");
        }
        let mut obstacles = false;
        for (segment, (seen, real)) in picture.segments.iter().rev().zip(&self.segments).enumerate() {
            // The youngest first, as pictures are.
            let here: Vec<usize> = (0..levels.len()).rev().filter(|&level| levels[level].segment == segment).collect();
            let used = here.first().map_or(0, |&youngest| real.top - self.shown_low(youngest));
            if (seen.base, seen.top, seen.used, seen.frames.len()) != (real.base, real.top, used, here.len()) {
                return wrong("another segment");
            }
            for (place, (&level, frame)) in here.iter().zip(&seen.frames).enumerate() {
                let waits = level + 1 < levels.len();
                if let Err(what) = self.check_frame(level, frame, waits) {
                    return wrong(&format!("frame {place} of segment {segment}, level {level}: {what}"));
                }
                let held = &levels[level];
                for pointer in &frame.pointers {
                    let right = match held.words[held.index(pointer.offset)] {
                        Word::Data(0) => Target::Null,
                        Word::Data(_) => Target::Elsewhere,
                        Word::Place(to, offset) if self.is_hidden(to, offset) && levels[to].segment == segment => {
                            Target::Free
                        }
                        Word::Place(to, _) if to == level => Target::Own,
                        Word::Place(to, _) => {
                            here.iter().position(|&other| other == to).map_or(Target::Elsewhere, Target::Frame)
                        }
                    };
                    if pointer.target != right {
                        return wrong(&format!("{pointer:?} of level {level} instead of {right:?}"));
                    }
                }
                obstacles |= frame.obstacle.is_some();
            }
        }
        if picture.is_movable() == obstacles {
            return wrong("movable or not");
        }
        let entries = picture.shadow.map(|shadow| shadow.entries);
        if entries != self.program.shadow.map(|_| Some(levels.len())) {
            return wrong("another shadow stack");
        }
        let (text, drawing) = (picture.to_string(), svg::picture(&picture));
        let lines = levels.len() + picture.segments.len() + 1 + usize::from(picture.shadow.is_some());
        if text.lines().count() != lines || drawing.matches("<svg").count() != 1 || !drawing.ends_with("</svg>\n") {
            return wrong("another text or drawing");
        }
        self.tried.pictures += 1;
        Ok(())
    }

    /// The lowest address of a frame, as far as it can be told: where what it called was lifted away, a frame of varying size is shown as small as it
    /// can be.
    fn shown_low(&self, level: usize) -> usize {
        let held = &self.endless.levels[level];
        let lifted = self.endless.levels.get(level + 1).is_some_and(|other| other.segment != held.segment);
        let more = match held.what {
            What::Managed { more, .. } if lifted => more,
            _ => 0,
        };
        self.endless.low(level) + more
    }

    fn is_hidden(&self, level: usize, offset: i32) -> bool {
        self.endless.value(Word::Place(level, offset)) < self.shown_low(level) as u64
    }

    /// What a picture says of one frame, but for its pointers.
    fn check_frame(&self, level: usize, frame: &Frame, waits: bool) -> Result<(), &'static str> {
        let held: &Level = &self.endless.levels[level];
        let (record, low) = (self.endless.record(level), self.shown_low(level));
        let cfa = record + held.layout.cfa_bytes as usize;
        let bytes = cfa + held.layout.incoming as usize - low;
        if (frame.record, frame.low, frame.cfa, frame.bytes) != (record, low, cfa, bytes) {
            return Err("another place");
        }
        let owner = match held.what {
            What::Managed { .. } => Owner::Managed(held.layout),
            _ => Owner::Stub,
        };
        let at = held.is_managed().then(|| self.endless.levels[level + usize::from(waits)].returns);
        if (frame.owner, frame.at, frame.returns_to) != (owner, at, Some(held.returns)) {
            return Err("another function");
        }
        let mark = if self.program.shadow.is_some() { Mark::Compared } else { Mark::Unsigned };
        if frame.mark != mark || held.layout.signing != Signing::None && held.is_managed() {
            return Err("another signature");
        }
        let right = match (&frame.obstacle, held.layout.immovable) {
            (None, None) => true,
            (Some(Error::Immovable { pc, reason }), Some(why)) => *reason == why && Some(*pc) == at,
            _ => false,
        };
        if !right || frame.registers.iter().ne(registers(held)) {
            return Err("another obstacle, or other registers");
        }
        Ok(())
    }
}

/// Those that hold pointers, in the order of their numbers.
fn registers(level: &Level) -> impl Iterator<Item = &crate::codemap::Register> {
    let mut named: Vec<_> = level.named.iter().collect();
    named.sort_unstable();
    named.into_iter()
}
