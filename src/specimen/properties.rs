//! Properties of walk, plan and relocation, on random specimens: a move keeps what it must, and every single corruption is
//! refused before anything is written, as far as the mechanism that is on can see it.

mod mistakes;
mod single;

use super::tampering::{Moment, Outcome, Tampering, Write};
use super::{Design, Error, PATTERN, Record, Refusal, Specimen};
use quickcheck::{Arbitrary, Gen, QuickCheck, Testable};
use std::time::{Duration, Instant};

/// The bits of an address that the model's signature takes.
const SIGNATURE: std::ops::Range<u32> = 48..55;

impl Arbitrary for Design {
    fn arbitrary(g: &mut Gen) -> Self {
        Design::choose(&mut |n| u64::arbitrary(g) % n)
    }

    fn shrink(&self) -> Box<dyn Iterator<Item = Self>> {
        let half = self.calls.len() / 2;
        let fewer = [self.calls[half..].to_vec(), self.calls[..half].to_vec()]
            .into_iter()
            .chain((0..self.calls.len().min(16)).map(|left_out| {
                let mut calls = self.calls.clone();
                calls.remove(left_out);
                calls
            }))
            .filter(|calls| calls.len() < self.calls.len())
            .map(|calls| Design { calls, ..self.clone() });
        let mut plain = self.clone();
        plain.calls.iter_mut().for_each(|call| call.pointers.clear());
        let simpler = [Design { slack: 0, ..self.clone() }, Design { shadow: false, ..self.clone() }, plain];
        let simpler: Vec<Design> = simpler.into_iter().filter(|design| design != self).collect();
        Box::new(fewer.collect::<Vec<_>>().into_iter().chain(simpler))
    }
}

impl Arbitrary for Tampering {
    fn arbitrary(g: &mut Gen) -> Self {
        Tampering::choose(&mut |n| u64::arbitrary(g) % n)
    }
}

/// A moment at which the walk, or the checks behind it, are still to come.
#[derive(Clone, Copy, Debug)]
struct Early(Moment);

impl Arbitrary for Early {
    fn arbitrary(g: &mut Gen) -> Self {
        Early(*g.choose(&[Moment::Begun, Moment::Planned]).expect("there are two"))
    }
}

/// Tries a property on `cases` specimens, or for a while: an emulated CPU does not get through all of them.
pub(super) fn check<P: Testable + Copy>(cases: u64, property: P) {
    const WHILE: Duration = Duration::from_secs(5);
    const AT_ONCE: u64 = 50;
    let begin = Instant::now();
    for done in (0..cases).step_by(AT_ONCE as usize) {
        if begin.elapsed() > WHILE {
            println!("{done} of {cases} cases in {WHILE:?}");
            return;
        }
        QuickCheck::new().tests(AT_ONCE).max_tests(AT_ONCE).quickcheck(property);
    }
}

pub(super) fn make(design: &Design) -> Specimen {
    Specimen::make(design).expect("a chosen design is a possible one")
}

fn tampered_with(design: &Design, tampering: impl FnOnce(&Specimen) -> (Moment, Write)) -> Outcome {
    let mut specimen = make(design);
    let (moment, write) = tampering(&specimen);
    specimen.migrate(0, &[Tampering { moment, write }])
}

impl Specimen {
    /// Makes the place that the span was moved to the source, and the one that it came from the destination.
    fn turn(&mut self, moved: usize) {
        let delta = self.delta();
        self.pieces = self.pieces_in(&self.destination);
        assert_eq!(self.youngest(), moved);
        self.frames = self.frames.iter().map(|frame| frame.moved(&self.source.record, delta)).collect();
        std::mem::swap(&mut self.source, &mut self.destination);
        self.image = self.source.image();
        let Record { base, top, .. } = self.destination.record;
        (base..top).step_by(8).for_each(|address| self.destination.write(address, PATTERN));
    }

    /// Index of the word that holds the return address of a frame, counted around.
    fn return_word(&self, frame: usize) -> usize {
        self.word_at(self.frames[frame % self.frames.len()].slot())
    }

    /// Index of the word that holds the saved frame pointer of a frame, counted around.
    fn frame_pointer_word(&self, frame: usize) -> usize {
        self.word_at(self.frames[frame % self.frames.len()].record)
    }

    /// Indices of the words in the span that are data alone: no record, no slot that the code map names.
    fn data_words(&self) -> Vec<usize> {
        let taken: Vec<usize> = self
            .frames
            .iter()
            .flat_map(|frame| [frame.record, frame.slot()].into_iter().chain(frame.pointers.iter().copied()))
            .filter(|&address| self.source.record.holds(address, 8))
            .map(|address| self.word_at(address))
            .collect();
        (self.word_at(self.youngest())..self.image.len()).filter(|word| !taken.contains(word)).collect()
    }
}

// What a move keeps.

#[test]
fn a_move_keeps_frames_return_addresses_and_contents() {
    fn property(design: Design) {
        let mut specimen = make(&design);
        // `migrate` itself compares every word and walks the destination.
        let outcome = specimen.migrate(design.room, &[]);
        let walked = outcome.walked.as_deref().expect("an honest stack is walked");
        let other = walked.iter().zip(specimen.frames()).find(|(walked, made)| walked != made);
        assert_eq!((other, walked.len()), (None, specimen.frames().len()));
        outcome.moved.expect("an honest stack moves");
    }
    check(3000, property as fn(Design));
}

#[test]
fn a_move_there_and_back_is_the_identity() {
    fn property(mut design: Design) {
        // A pointer into free memory below the span keeps its distance only where the destination has that memory.
        design.room = design.room.max(design.slack);
        let mut specimen = make(&design);
        let before = specimen.image.clone();
        let there = specimen.migrate(0, &[]).moved.expect("an honest stack moves");
        specimen.turn(there);
        let back = specimen.migrate(0, &[]).destination;
        let span = design.span() / 8;
        assert_eq!(back[back.len() - span..], before[before.len() - span..]);
    }
    check(2000, property as fn(Design));
}

#[test]
fn a_corrupted_data_word_changes_itself_alone() {
    fn property(design: Design, early: Early, pick: usize, bits: u64) -> bool {
        let mut specimen = make(&design);
        let words = specimen.data_words();
        let Some(&word) = words.get(pick % words.len().max(1)) else { return true };
        let before = specimen.image.clone();
        let outcome = specimen.migrate(0, &[Tampering { moment: early.0, write: Write::Word(word, bits) }]);
        outcome.moved.expect("data is not checked");
        let moved = |index: usize| outcome.destination[index + outcome.destination.len() - before.len()];
        words.iter().all(|&index| moved(index) == before[index] ^ if index == word { bits } else { 0 })
    }
    check(1000, property as fn(Design, Early, usize, u64) -> bool);
}

// What is refused.

#[test]
fn a_corrupted_signature_bit_is_refused() {
    fn property(design: Design, early: Early, frame: usize, bit: u32) {
        let bit = SIGNATURE.start + bit % SIGNATURE.len() as u32;
        let outcome = tampered_with(&design, |specimen| (early.0, Write::Word(specimen.return_word(frame), 1 << bit)));
        match outcome.refused() {
            Refusal::Tampered(_) => {}
            // Without signatures the changed word is an address that nobody knows; with a shadow stack it differs from that.
            Refusal::Error(Error::UnknownCode(_)) => assert!(design.keys.is_none() && !design.shadow),
            Refusal::Error(error) => panic!("{error}"),
        }
        assert_eq!(outcome.walked.is_err(), early.0 == Moment::Begun, "what the walk can see, it refuses");
    }
    check(3000, property as fn(Design, Early, usize, u32));
}

#[test]
fn a_return_address_changed_after_the_walk_is_refused() {
    // It authenticated to one address; no other word does.
    fn property(design: Design, late: bool, frame: usize, bits: u64) {
        let moment = if late { Moment::Rebased } else { Moment::Planned };
        let outcome =
            tampered_with(&design, |specimen| (moment, Write::Word(specimen.return_word(frame), bits.max(1))));
        assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
    }
    check(3000, property as fn(Design, bool, usize, u64));
}

#[test]
fn a_corrupted_frame_pointer_is_refused() {
    fn property(design: Design, early: Early, frame: usize, bits: u64) {
        let outcome =
            tampered_with(&design, |specimen| (early.0, Write::Word(specimen.frame_pointer_word(frame), bits.max(1))));
        assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
        assert_eq!(outcome.walked.is_err(), early.0 == Moment::Begun, "what the walk can see, it refuses");
    }
    check(3000, property as fn(Design, Early, usize, u64));
}

#[test]
fn a_return_address_that_the_shadow_stack_does_not_have_is_refused() {
    fn property(mut design: Design, frame: usize, bits: u64) {
        design.shadow = true;
        let outcome =
            tampered_with(&design, |specimen| (Moment::Begun, Write::Word(specimen.return_word(frame), bits.max(1))));
        assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
    }
    check(2000, property as fn(Design, usize, u64));
}

#[test]
fn a_corrupted_shadow_entry_is_refused() {
    fn property(mut design: Design, moment: usize, entry: usize, bits: u64) {
        design.shadow = true;
        let moment = [Moment::Begun, Moment::Planned, Moment::Rebased][moment % 3];
        let outcome = tampered_with(&design, |_| (moment, Write::Shadow(entry, bits.max(1))));
        assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
        assert_eq!(outcome.walked.is_err(), moment == Moment::Begun, "what the walk can see, it refuses");
    }
    check(2000, property as fn(Design, usize, usize, u64));
}

#[test]
fn a_shadow_stack_of_another_length_is_refused() {
    fn property(mut design: Design, early: Early, longer: bool) {
        design.shadow = true;
        let outcome = tampered_with(&design, |_| (early.0, Write::ShadowLength(longer)));
        assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
        assert_eq!(outcome.walked.is_err(), early.0 == Moment::Begun, "what the walk can see, it refuses");
    }
    check(500, property as fn(Design, Early, bool));
}

#[test]
fn a_corrupted_plan_entry_is_refused() {
    fn property(design: Design, late: bool, entry: usize, slot: bool, bits: u64) {
        let moment = if late { Moment::Rebased } else { Moment::Planned };
        let write = if slot { Write::Slot(entry, bits & !7 | 8) } else { Write::Pc(entry, bits.max(1)) };
        let outcome = tampered_with(&design, |_| (moment, write));
        // At the last moment a slot may be exchanged for another frame's that returns to the same place: then one
        // return address keeps its old signature, and `migrate` has seen that no walk takes it for another.
        if outcome.moved.is_err() || !(late && slot) {
            assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
        }
    }
    check(3000, property as fn(Design, bool, usize, bool, u64));
}

#[test]
fn a_planned_signing_that_is_none_is_refused() {
    fn property(design: Design, late: bool, entry: usize, bits: u64) {
        let moment = if late { Moment::Rebased } else { Moment::Planned };
        let outcome = tampered_with(&design, |_| (moment, Write::Signing(entry, bits | 4)));
        assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
    }
    check(1000, property as fn(Design, bool, usize, u64));
}

#[test]
fn whatever_is_written_the_laws_hold() {
    fn property(design: Design, tampering: Vec<Tampering>, writes: usize) {
        // Few of them: what is written all over is refused at once.
        make(&design).migrate(0, &tampering[..tampering.len().min(writes % 5)]);
    }
    check(4000, property as fn(Design, Vec<Tampering>, usize));
}

#[test]
fn a_code_map_that_describes_other_frames_breaks_no_law() {
    fn property(design: Design, other: Design) {
        let mut specimen = make(&design);
        specimen.describe(other.table().expect("a chosen design is a possible one"));
        specimen.migrate(0, &[]);
    }
    check(1000, property as fn(Design, Design));
}
