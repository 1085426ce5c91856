//! Single cases: spans of the smallest and the largest size, slots at the bounds, and how often a forgery passes.

use super::{make, tampered_with};
use crate::codemap::FrameLayout;
use crate::error::{Error, Refusal};
use crate::pac::{RawPc, Signing};
use crate::specimen::tampering::{Moment, Write};
use crate::specimen::{Call, Design, ENTRY_RETURN, NATIVE_FP, PATTERN, Pointer, Room, Site, kinds};
use crate::walk::Piece;

/// One function of `frame_bytes` with a call, and `depth` frames of it.
fn recursion(depth: usize, frame_bytes: u32, slots: &[i32], pointers: &[Pointer]) -> Design {
    let mut design = kinds::recursion(FrameLayout::new(frame_bytes, Signing::A), depth);
    (design.keys, design.stub, design.shadow) = (Some([0x0123_4567, 0x89ab_cdef]), Signing::B, true);
    design.functions[0].len = 8;
    design.functions[0].sites[0].slots = slots.to_vec();
    design.calls.iter_mut().for_each(|call| call.pointers = pointers.to_vec());
    design
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
