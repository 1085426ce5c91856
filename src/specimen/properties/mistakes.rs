//! A caller's mistakes: each is a typed error, and [`Specimen::migrate`](super::Specimen::migrate) sees that nothing was written.

use super::{check, make};
use crate::codemap::LARGEST_FRAME;
use crate::error::{Error, Refusal};
use crate::pac::{RawPc, Signing};
use crate::specimen::Design;

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

/// Where nothing is signed anybody can write one, with a frame pointer that fits.
#[test]
fn a_return_address_of_zero_is_unknown_code() {
    fn property(mut design: Design) {
        (design.keys, design.shadow) = (None, false);
        let specimen = make(&design);
        let youngest = specimen.youngest();
        specimen.source.write(youngest, youngest as u64 + 16);
        specimen.source.write(youngest + 8, 0);
        let walked = specimen.walk(&specimen.source, &specimen.pieces);
        assert_eq!(walked.err(), Some(Refusal::Error(Error::UnknownCode(RawPc::new(0)))));
        specimen.check_scan(&specimen.pieces);
    }
    check(1000, property as fn(Design));
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
