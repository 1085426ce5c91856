//! Properties of walk, plan and relocation, on random specimens: a move keeps what it must, and every single corruption is
//! refused before anything is written, as far as the mechanism that is on can see it.

use super::tampering::{Moment, Outcome, Tampering, Write};
use super::{
    Call, Design, ENTRY_RETURN, Error, FrameLayout, Function, NATIVE_FP, PATTERN, Pointer, RawPc, Record, Refusal,
    Room, Site, Specimen,
};
use crate::codemap::LARGEST_FRAME;
use crate::pac::Signing;
use crate::walk::Piece;
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
fn check<P: Testable + Copy>(cases: u64, property: P) {
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

fn make(design: &Design) -> Specimen {
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

// A caller's mistakes.

#[test]
fn a_frame_that_may_not_move_is_a_typed_error() {
    fn property(mut design: Design, pick: usize) -> bool {
        let Some(call) = design.calls.get(pick % design.calls.len().max(1)).cloned() else { return true };
        design.functions[call.function].layout.immovable = Some("pinned");
        let youngest = design.calls.iter().find(|other| other.function == call.function).map(|call| design.pc(call));
        let mut specimen = make(&design);
        matches!(specimen.migrate(0, &[]).refused(), Refusal::Error(Error::Immovable { pc, .. }) if Some(*pc) == youngest)
    }
    check(1000, property as fn(Design, usize) -> bool);
}

#[test]
fn a_frame_of_unregistered_code_is_a_typed_error() {
    fn property(design: Design, pick: usize) -> bool {
        let Some(call) = design.calls.get(pick % design.calls.len().max(1)) else { return true };
        let mut specimen = make(&design);
        let mut known = design.clone();
        let unknown = known.functions.remove(call.function);
        if let Some(next) = known.functions.get_mut(call.function) {
            next.gap += unknown.gap + unknown.len;
        }
        specimen.describe(known.table().expect("a design without a function is a possible one"));
        let youngest = design.calls.iter().find(|other| other.function == call.function).map(|call| design.pc(call));
        matches!(specimen.migrate(0, &[]).refused(), Refusal::Error(Error::UnknownCode(pc)) if Some(*pc) == youngest)
    }
    check(1000, property as fn(Design, usize) -> bool);
}

#[test]
fn a_layout_that_leaves_its_segment_is_a_typed_error() {
    fn property(design: Design, pick: usize) -> bool {
        let Some(call) = design.calls.get(pick % design.calls.len().max(1)) else { return true };
        let mut specimen = make(&design);
        let mut described = design.clone();
        let function = &mut described.functions[call.function];
        function.layout.frame_bytes = LARGEST_FRAME - function.layout.cfa_bytes % 16;
        function.layout.dynamic = false;
        function.sites.iter_mut().for_each(|site| site.frame_bytes = None);
        specimen.describe(described.table().expect("a frame that large can be registered"));
        let youngest = design.calls.iter().find(|other| other.function == call.function).map(|call| design.pc(call));
        matches!(specimen.migrate(0, &[]).refused(), Refusal::Error(Error::Layout { start, .. }) if Some(*start) == youngest)
    }
    check(1000, property as fn(Design, usize) -> bool);
}

#[test]
fn an_unsigned_frame_among_signing_ones_is_a_typed_error() {
    fn property(mut design: Design, pick: usize) {
        design.keys.get_or_insert([1, 2]);
        let Some(call) = design.calls.get(pick % design.calls.len().max(1)).cloned() else { return };
        let signed = |signing| if signing == Signing::None { Signing::A } else { signing };
        design.stub = signed(design.stub);
        design.functions.iter_mut().for_each(|function| function.layout.signing = signed(function.layout.signing));
        design.functions[call.function].layout.signing = Signing::None;
        let youngest = design.calls.iter().find(|other| other.function == call.function);
        let inside = design.pc(youngest.unwrap_or(&call));
        let mut specimen = make(&design);
        assert_eq!(*specimen.migrate(0, &[]).refused(), Refusal::Error(Error::Unsigned(inside)));
    }
    check(1000, property as fn(Design, usize));
}

#[test]
fn a_destination_that_is_too_small_is_a_typed_error() {
    fn property(design: Design, more: usize) {
        let spare = design.room.saturating_add(more.max(1));
        let (needed, room) = (design.span().saturating_add(spare), design.span() + design.room);
        let error = Error::TooSmall { needed, room };
        assert_eq!(*make(&design).migrate(spare, &[]).refused(), Refusal::Error(error));
    }
    check(1000, property as fn(Design, usize));
}

#[test]
fn a_destination_that_overlaps_is_a_typed_error() {
    fn property(design: Design, distance: usize, below: bool) {
        let mut specimen = make(&design);
        let (base, size) = (specimen.source.record.base, specimen.source.record.size());
        let distance = distance % (size / 16) * 16;
        let base = if below { base - distance } else { base + distance };
        (specimen.destination.record.base, specimen.destination.record.top) = (base, base + size);
        assert_eq!(*specimen.migrate(0, &[]).refused(), Refusal::Error(Error::Overlap));
    }
    check(1000, property as fn(Design, usize, bool));
}

#[test]
fn a_destination_of_another_stack_or_generation_is_a_typed_error() {
    fn property(design: Design, other: u64, generation: bool) {
        let mut specimen = make(&design);
        let record = &mut specimen.destination.record;
        *(if generation { &mut record.generation } else { &mut record.identity }) ^= other.max(1);
        assert_eq!(*specimen.migrate(0, &[]).refused(), Refusal::Error(Error::Foreign));
    }
    check(500, property as fn(Design, u64, bool));
}

// Single cases.

/// One function of `frame_bytes` with a call, and `depth` frames of it.
fn recursion(depth: usize, frame_bytes: u32, slots: &[i32], pointers: &[Pointer]) -> Design {
    let layout = FrameLayout::new(frame_bytes, Signing::A);
    let site = Site { offset: 8, frame_bytes: None, slots: slots.to_vec(), registers: vec![] };
    let call = Call { function: 0, site: 0, more: 0, entered: false, pointers: pointers.to_vec() };
    Design {
        keys: Some([0x0123_4567, 0x89ab_cdef]),
        stub: Signing::B,
        shadow: true,
        functions: vec![Function { layout, saves: vec![], gap: 0, len: 8, sites: vec![site] }],
        calls: vec![call; depth],
        arguments: 0,
        keeps: true,
        slack: 64,
        room: 128,
        contents: 1,
    }
}

/// The same where nothing is signed and no shadow stack is on.
fn unprotected(mut design: Design) -> Design {
    design.functions.iter_mut().for_each(|function| function.layout.signing = Signing::None);
    Design { keys: None, shadow: false, stub: Signing::None, ..design }
}

#[test]
fn a_span_of_the_stub_alone_moves() {
    let mut specimen = make(&recursion(0, 0, &[], &[]));
    assert_eq!(specimen.frames().len(), 1);
    specimen.migrate(128, &[]).moved.expect("it moves");
}

#[test]
fn one_frame_moves() {
    make(&recursion(1, 32, &[], &[])).migrate(128, &[]).moved.expect("it moves");
}

#[test]
fn frames_of_records_alone_move() {
    let mut specimen = make(&recursion(200, 0, &[], &[]));
    let outcome = specimen.migrate(128, &[]);
    let frames = outcome.walked.expect("it is sound");
    assert!(frames.windows(2).all(|pair| pair[1].record == pair[0].record + 16));
    outcome.moved.expect("it moves");
}

#[test]
fn a_span_that_fills_its_segment_moves() {
    let design = Design { slack: 0, room: 0, ..recursion(7, 48, &[-8], &[Pointer::Base]) };
    make(&design).migrate(0, &[]).moved.expect("it moves");
}

#[test]
fn a_span_moves_to_a_smaller_segment() {
    let design = Design { slack: 4096, room: 16, ..recursion(7, 48, &[-8], &[Pointer::Own(0)]) };
    make(&design).migrate(16, &[]).moved.expect("it moves");
}

#[test]
fn slots_at_the_segments_bounds_are_rebased_and_beyond_them_kept() {
    let cases = [
        (Pointer::Base, true),
        (Pointer::Top, false),
        (Pointer::Own(0), true),
        (Pointer::AboveTop, false),
        (Pointer::BelowBase, false),
        (Pointer::Null, false),
        (Pointer::Heap(12), false),
    ];
    for (pointer, rebased) in cases {
        let design = recursion(1, 32, &[-16], &[pointer]);
        let mut specimen = make(&design);
        let outcome = specimen.migrate(0, &[]);
        // From the top: the frame's record, then the two words below it.
        let before = specimen.image[specimen.image.len() - 4];
        let after = outcome.destination[outcome.destination.len() - 4];
        let delta = if rebased { specimen.delta() as u64 } else { 0 };
        assert_eq!(after, before.wrapping_add(delta), "{pointer:?}");
    }
}

#[test]
fn a_destination_smaller_than_the_span_is_refused() {
    let mut specimen = make(&recursion(3, 32, &[], &[]));
    specimen.destination = Room::new(16, PATTERN).expect("there is memory");
    let outcome = specimen.migrate(0, &[]);
    assert_eq!(*outcome.refused(), Refusal::Error(Error::TooSmall { needed: 160, room: 16 }));
}

#[test]
fn a_youngest_record_outside_the_segment_is_refused() {
    for wrong in [0, 8, usize::MAX, usize::MAX & !15] {
        // Without signatures, so that nothing but its address speaks against a record.
        let mut specimen = make(&unprotected(recursion(2, 32, &[], &[])));
        let record = &specimen.source.record;
        for youngest in [wrong, record.base.wrapping_sub(16), record.top, record.top - 8, record.base + 8] {
            let refused = specimen
                .walk(&specimen.source, &[Piece { youngest, ..specimen.pieces[0] }])
                .expect_err("no record lies there");
            assert!(matches!(refused, Refusal::Tampered(_)), "{youngest:#x}");
        }
        specimen.migrate(0, &[]).moved.expect("the stack is as it was");
    }
}

#[test]
fn a_chain_that_ends_below_the_top_is_refused() {
    // A whole forged record, where nothing but its place tells.
    let mut specimen = make(&unprotected(recursion(5, 32, &[], &[])));
    for frame in 0..5 {
        let (record, word) = (specimen.frame_pointer_word(frame), specimen.return_word(frame));
        let forged = [
            Write::Word(record, specimen.image[record] ^ NATIVE_FP),
            Write::Word(word, specimen.image[word] ^ ENTRY_RETURN.address() as u64),
        ];
        forged.into_iter().for_each(|write| specimen.write(write));
        let refused = specimen.walk(&specimen.source, &specimen.pieces).expect_err("frames above it would stay behind");
        assert!(matches!(refused, Refusal::Tampered(_)), "{refused:?}");
        forged.into_iter().for_each(|write| specimen.write(write));
    }
    specimen.migrate(0, &[]).moved.expect("the stack is as it was");
}

#[test]
fn forged_return_addresses_pass_about_once_in_128_and_never_with_a_shadow_stack() {
    // Every site of one function has the same frame, so nothing but the signature tells their addresses apart.
    let mut design = recursion(3, 32, &[], &[]);
    design.functions[0].len = 4 * 256;
    design.functions[0].sites =
        (1..=256).map(|word| Site { offset: word * 4, frame_bytes: None, slots: vec![], registers: vec![] }).collect();
    let accepted = |design: &Design| {
        let mut accepted = 0;
        for keys in 0..16 {
            let mut specimen = make(&Design { keys: Some([keys, keys + 100]), ..design.clone() });
            let honest = design.pc(&design.calls[1]).address() as u64;
            for site in 1..256 {
                let forged = design.pc(&Call { site, ..design.calls[1].clone() }).address() as u64;
                let write = Write::Word(specimen.return_word(1), honest ^ forged);
                specimen.write(write);
                accepted += usize::from(specimen.walk(&specimen.source, &specimen.pieces).is_ok());
                specimen.write(write);
            }
        }
        accepted
    };
    let forgeries = 16 * 255;
    let passed = accepted(&Design { shadow: false, ..design.clone() });
    assert!((forgeries / 256..=forgeries / 64).contains(&passed), "{passed} of {forgeries}");
    assert_eq!(accepted(&design), 0);
}

#[test]
fn without_signatures_and_shadow_stack_a_forged_address_passes() {
    // What is not protected is named: this is x86-64 without a shadow stack.
    let mut design = unprotected(recursion(3, 32, &[], &[]));
    design.functions[0].sites.insert(0, Site { offset: 4, frame_bytes: None, slots: vec![], registers: vec![] });
    let [forged, honest] = [0, 1].map(|site| design.pc(&Call { site, ..design.calls[0].clone() }).address() as u64);
    design.calls.iter_mut().for_each(|call| call.site = 1);
    let outcome =
        tampered_with(&design, |specimen| (Moment::Begun, Write::Word(specimen.return_word(1), forged ^ honest)));
    let frames = outcome.walked.expect("nothing tells");
    assert_eq!(frames[1].pc, RawPc::new(forged as usize));
}
