//! What `inspect` tells of random specimens, honest ones and such as an attacker has written to.

use super::{Design, Specimen};
use crate::inspect::{Kind, Mark, Owner, Picture, Segment, Shadow, State, Target, svg};
use crate::pac::Signing;
use crate::signer::model;
use quickcheck::{Arbitrary, Gen, QuickCheck, Testable};

fn check<P: Testable>(cases: u64, property: P) {
    QuickCheck::new().tests(cases).max_tests(cases).quickcheck(property);
}

fn make(design: &Design) -> Specimen {
    Specimen::make(design).expect("a chosen design is a possible one")
}

impl Specimen {
    fn picture(&self) -> Picture {
        let record = &self.source.record;
        let (frames, cut) = self.seen(&self.pieces);
        Picture {
            kind: Kind::Growable,
            state: State::Running,
            identity: 7,
            generation: 3,
            authenticates: self.authenticates(),
            segments: vec![Segment {
                base: record.base,
                top: record.top,
                guard: 65536,
                limit: Some(record.base + 64),
                used: record.top - self.youngest(),
                frames,
                cut,
            }],
            shadow: self.shadow.as_ref().map(|shadow| Shadow { room: 4096, entries: Some(shadow.len()) }),
        }
    }
}

#[test]
fn frames_are_those_that_were_made() {
    fn property(design: Design) {
        let specimen = make(&design);
        let picture = specimen.picture();
        assert_eq!(picture.segments[0].cut, None);
        assert_eq!(picture.frames().count(), specimen.frames.len());
        let mut low = specimen.youngest();
        for (frame, made) in picture.frames().zip(&specimen.frames) {
            assert_eq!((frame.record, frame.cfa), (made.record, made.cfa()));
            assert_eq!(frame.returns_to, Some(made.pc));
            match frame.owner {
                Owner::Managed(layout) => assert_eq!(layout, made.layout),
                // An older piece may begin above the stack arguments of the one that it called.
                _ => low = frame.low,
            }
            assert_eq!(frame.low, low, "frames stand next to each other");
            low += frame.bytes;
            let signs = made.layout.signing != Signing::None && specimen.authenticates();
            assert_eq!(matches!(frame.mark, Mark::ReSigned(_)), signs);
            assert_eq!(frame.mark == Mark::Compared, !signs && design.shadow);
        }
        // What the walk finds to rebase, but for registers, whose values lie in other frames.
        let walked = specimen.walk(&specimen.source, &specimen.pieces).expect("an honest stack");
        let slots: usize = picture.frames().map(|frame| frame.pointers.len()).sum();
        let registers: usize = picture.frames().map(|frame| frame.registers.len()).sum();
        assert_eq!(slots + registers, walked.iter().map(|frame| frame.pointers.len()).sum::<usize>());
        assert!(picture.is_movable());
    }
    check(1500, property as fn(Design));
}

#[test]
fn pointers_are_told_by_where_they_lead() {
    fn property(design: Design) {
        let specimen = make(&design);
        let picture = specimen.picture();
        let frames: Vec<_> = picture.frames().collect();
        for (own, frame) in frames.iter().enumerate() {
            for pointer in &frame.pointers {
                let slot = frame.record.wrapping_add_signed(pointer.offset as isize);
                let word = specimen.image[specimen.word_at(slot)] as usize;
                let inside =
                    |index: usize| (frames[index].low..frames[index].low + frames[index].bytes).contains(&word);
                let record = &specimen.source.record;
                let right = match pointer.target {
                    Target::Null => word == 0,
                    Target::Own => inside(own),
                    Target::Frame(index) => index != own && inside(index),
                    Target::Free => (record.base..record.top).contains(&word) && !(0..frames.len()).any(inside),
                    Target::Elsewhere => word != 0 && !(record.base..record.top).contains(&word),
                };
                assert!(right, "{pointer:?} holds {word:#x}");
            }
        }
    }
    check(500, property as fn(Design));
}

/// No answer to whether a signature is right: with any bits where signatures stand the picture is the same.
#[test]
fn signatures_make_no_difference() {
    fn property(design: Design, bits: u64) {
        let specimen = make(&design);
        if !specimen.authenticates() {
            return;
        }
        let before = specimen.picture().to_string();
        for index in 0..specimen.frames.len() {
            let slot = specimen.frames[index].slot();
            let word = specimen.image[specimen.word_at(slot)] ^ (bits.rotate_left(index as u32) & model::FIELD);
            specimen.source.write(slot, word);
        }
        assert_eq!(specimen.picture().to_string(), before);
    }
    check(500, property as fn(Design, u64));
}

/// A word to write, and where.
#[derive(Clone, Debug)]
struct Garbage {
    place: usize,
    word: u64,
    kind: u8,
}

impl Arbitrary for Garbage {
    fn arbitrary(g: &mut Gen) -> Self {
        Garbage { place: usize::arbitrary(g), word: u64::arbitrary(g), kind: u8::arbitrary(g) % 6 }
    }
}

#[test]
fn whatever_is_written_the_picture_ends_inside_the_segment() {
    fn property(design: Design, garbage: Vec<Garbage>, youngest: usize) {
        let specimen = make(&design);
        let record = &specimen.source.record;
        let bytes = record.size();
        for Garbage { place, word, kind } in garbage {
            // Half of them hit what a walk reads.
            let frame = &specimen.frames[place % specimen.frames.len()];
            let address = match kind {
                0 | 1 => frame.record,
                2 => frame.slot(),
                _ => record.base + place % (bytes / 8) * 8,
            };
            let word = match kind {
                // Backwards, to itself, forwards, misaligned, out.
                0 => (record.base + word as usize % (bytes + 32)) as u64,
                1 | 3 => word,
                2 => specimen.frames[word as usize % specimen.frames.len()].pc.address() as u64,
                _ => frame.record as u64,
            };
            specimen.source.write(address, word);
        }
        let mut pieces = specimen.pieces.clone();
        if youngest.is_multiple_of(3) {
            pieces[0].youngest =
                if youngest.is_multiple_of(2) { youngest } else { record.base + youngest % (bytes + 16) };
        }
        let (frames, cut) = specimen.seen(&pieces);
        let mut low = 0;
        for frame in &frames {
            assert!(frame.low >= low && frame.record >= frame.low && frame.cfa > frame.record);
            low = frame.low + frame.bytes;
            assert!(frame.low >= record.base && low <= record.top, "{frame:x?}");
        }
        assert!(frames.len() <= bytes / 16);
        let complete = frames.last().is_some_and(|frame| frame.low + frame.bytes + design.arguments >= record.top);
        assert!(cut.is_some() || complete, "a picture that ends early says so");
    }
    check(3000, property as fn(Design, Vec<Garbage>, usize));
}

/// The elements that stand open in an SVG text: none, where it is well-formed.
fn open_elements(text: &str) -> Vec<&str> {
    let mut open = vec![];
    for tag in text.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("each tag ends");
        let name = tag.split([' ', '/']).next().unwrap_or_default();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed));
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    open
}

#[test]
fn every_picture_is_text_and_a_drawing() {
    fn property(design: Design, other: Design) {
        let (before, after) = (make(&design).picture(), make(&other).picture());
        let lines = before.to_string().lines().count();
        assert_eq!(lines, 2 + before.frames().count() + usize::from(before.shadow.is_some()));
        for text in [svg::picture(&before), svg::change(&before, &after)] {
            assert_eq!(open_elements(&text), Vec::<&str>::new());
            // Folded: a picture stays small.
            assert!(text.len() < 60_000, "{} bytes", text.len());
        }
    }
    check(300, property as fn(Design, Design));
}

#[test]
fn whatever_is_claimed_of_pieces_looking_ends_inside_the_segment() {
    fn property(design: Design, decisions: Vec<u64>) {
        let mut decisions = decisions.into_iter();
        make(&design).scan(&mut |n| decisions.next().unwrap_or(0) % n);
    }
    check(3000, property as fn(Design, Vec<u64>));
}
