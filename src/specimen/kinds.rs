//! Single cases for each kind of frame that is not plain; random ones are in [`super::properties`].

use super::tampering::{Moment, Outcome, Tampering, Write};
use super::{Call, Design, Function, Pointer, Site, Specimen};
use crate::codemap::{FrameLayout, Register};
use crate::error::{Error, Refusal};
use crate::pac::{Binding, PointerSigning, Signing};
use crate::walk::{Piece, Walk};

/// `depth` frames of one function with one call, signed, no shadow stack.
pub(super) fn recursion(layout: FrameLayout, depth: usize) -> Design {
    let site = Site { offset: 8, frame_bytes: None, slots: vec![], registers: vec![] };
    let call = Call { function: 0, site: 0, more: 0, entered: false, pointers: vec![] };
    Design {
        keys: Some([11, 12]),
        stub: Signing::A,
        shadow: false,
        functions: vec![Function { layout, saves: vec![], gap: 0, len: 64, sites: vec![site] }],
        calls: vec![call; depth],
        arguments: 0,
        keeps: true,
        slack: 64,
        room: 128,
        contents: 1,
    }
}

const LAYOUT: FrameLayout = FrameLayout::new(48, Signing::A);

fn migrate(design: &Design, attack: impl FnOnce(&Specimen) -> Vec<Tampering>) -> Outcome {
    let mut specimen = Specimen::make(design).expect("a possible design");
    let tampering = attack(&specimen);
    specimen.migrate(0, &tampering)
}

/// Whether `attempt` passes whatever the keys are. With one pair of keys a signature fits another place once in 128 times by chance.
fn passes_with_any_key(design: &mut Design, attempt: impl Fn(&Design) -> bool) -> bool {
    let keys = design.keys;
    let passes = (0..8).all(|more| {
        design.keys = keys.map(|keys| keys.map(|key| key + 16 * more));
        attempt(design)
    });
    design.keys = keys;
    passes
}

fn at(moment: Moment, write: Write) -> Vec<Tampering> {
    vec![Tampering { moment, write }]
}

#[test]
fn a_flipped_bit_of_a_signed_frame_pointer_is_refused() {
    for key in [PointerSigning::A, PointerSigning::B] {
        let design = recursion(LAYOUT.with_frame_pointer(key), 5);
        migrate(&design, |_| vec![]).moved.expect("it moves");
        for moment in [Moment::Begun, Moment::Planned, Moment::Rebased] {
            for bit in [4, 20, 48, 54] {
                let outcome = migrate(&design, |specimen| {
                    at(moment, Write::Word(specimen.word_at(specimen.frames()[2].record), 1 << bit))
                });
                assert!(matches!(outcome.refused(), Refusal::Tampered(_)), "{moment:?}, {bit}");
            }
        }
    }
}

#[test]
fn a_signed_frame_pointer_is_bound_to_its_place() {
    let design = recursion(LAYOUT.with_frame_pointer(PointerSigning::A), 5);
    let outcome = migrate(&design, |specimen| {
        let [from, to] = [1, 3].map(|frame| specimen.word_at(specimen.frames()[frame].record));
        at(Moment::Begun, Write::Copy { from, to })
    });
    assert!(matches!(outcome.refused(), Refusal::Tampered(_)));
}

/// What is not protected is named: modifier zero binds a return address to no place.
#[test]
fn frames_with_modifier_zero_can_be_exchanged_unless_a_shadow_stack_is_on() {
    let mut design = recursion(LAYOUT.with_binding(Binding::Zero), 6);
    let other = Site { offset: 16, ..design.functions[0].sites[0].clone() };
    design.functions[0].sites.push(other);
    design.calls[4].site = 1;
    let replayed = |specimen: &Specimen| {
        // What returns into the frame with the other call is the record before it.
        let [from, to] = [4, 2].map(|frame| specimen.word_at(specimen.frames()[frame].slot()));
        at(Moment::Begun, Write::Copy { from, to })
    };
    assert!(migrate(&design, replayed).moved.is_ok());
    design.shadow = true;
    assert!(matches!(migrate(&design, replayed).refused(), Refusal::Tampered(_)));
    design.shadow = false;
    design.functions[0].layout.binding = Binding::Blended(3);
    assert!(
        !passes_with_any_key(&mut design, |design| migrate(design, replayed).moved.is_ok()),
        "bound to its CFA it cannot"
    );
}

/// What is not protected is named: where neither the frame pointer is signed nor a shadow stack counts the frames, that of an older frame
/// of the piece is believed, whose return address authenticates in its own place. The code that restores its stack pointer from
/// that frame pointer returns there just so.
#[test]
fn a_forged_frame_pointer_of_a_dynamic_frame_is_refused_unless_it_is_an_older_frames() {
    let kinds = [
        (Some([11, 12]), false, PointerSigning::None),
        (Some([11, 12]), false, PointerSigning::A),
        (Some([11, 12]), true, PointerSigning::None),
        (None, true, PointerSigning::None),
    ];
    for (keys, shadow, frame_pointer) in kinds {
        let mut design = recursion(LAYOUT.dynamic().with_frame_pointer(frame_pointer), 6);
        design.calls[2].more = 64;
        (design.keys, design.shadow) = (keys, shadow);
        if keys.is_none() {
            design.stub = Signing::None;
            design.functions[0].layout.signing = Signing::None;
        }
        migrate(&design, |_| vec![]).moved.expect("it moves");
        // Younger and older records, a word beside one, nothing, and what lies outside.
        let forge: [fn(&Specimen) -> usize; 7] = [
            |specimen| specimen.frames()[1].record,
            |specimen| specimen.frames()[2].record,
            |specimen| specimen.frames()[2].record + 16,
            |specimen| specimen.frames()[4].record,
            |specimen| specimen.frames()[5].record + 8,
            |_| 0,
            |specimen| specimen.source.record.top,
        ];
        for (number, forge) in forge.into_iter().enumerate() {
            let forged = |specimen: &Specimen| {
                let frame = &specimen.frames()[2];
                let word = Write::Word(specimen.word_at(frame.record), frame.saved_fp ^ forge(specimen) as u64);
                at(Moment::Begun, word)
            };
            let older = number == 3 && !shadow && frame_pointer == PointerSigning::None;
            let passes = passes_with_any_key(&mut design, |design| migrate(design, forged).walked.is_ok());
            assert_eq!(passes, older, "forgery {number}");
        }
    }
}

#[test]
fn an_undeclared_pointer_in_a_conservative_frame_is_named() {
    let mut design = recursion(LAYOUT.conservative(), 4);
    design.functions[0].sites[0].slots = vec![-16];
    design.calls.iter_mut().for_each(|call| call.pointers = vec![Pointer::Own(0)]);
    migrate(&design, |_| vec![]).moved.expect("what is declared moves");
    let mut specimen = Specimen::make(&design).expect("a possible design");
    let mut undeclared = design.clone();
    undeclared.functions[0].sites[0].slots.clear();
    specimen.describe(undeclared.table().expect("a possible design"));
    let slot = specimen.frames()[1].record - 16;
    let pc = design.pc(&design.calls[0]);
    let outcome = specimen.migrate(0, &[]);
    assert_eq!(*outcome.refused(), Refusal::Error(Error::HiddenPointer { pc, slot }));
}

#[test]
fn a_pointer_in_a_register_that_nobody_keeps_is_a_typed_error() {
    let register = Register::new(1).expect("there are more");
    let mut design = recursion(LAYOUT, 3);
    design.functions[0].saves = vec![(register, -8)];
    design.functions[0].sites[0].registers = vec![register];
    design.calls.iter_mut().for_each(|call| call.pointers = vec![Pointer::Own(0)]);
    let outcome = migrate(&design, |_| vec![]);
    outcome.moved.expect("the stub keeps it");
    design.keeps = false;
    let reason = match migrate(&design, |_| vec![]).refused() {
        Refusal::Error(Error::Immovable { pc, reason }) if *pc == design.pc(&design.calls[0]) => *reason,
        other => panic!("{other:?}"),
    };
    assert!(reason.contains("callee-saved register"), "{reason}");
    // The youngest frame has no pointer there: then its callers' are where it has saved them.
    let plain = Site { offset: 16, registers: vec![], ..design.functions[0].sites[0].clone() };
    design.functions[0].sites.push(plain);
    (design.calls[0].site, design.calls[0].pointers) = (1, vec![]);
    migrate(&design, |_| vec![]).moved.expect("its frames have saved it");
}

#[test]
fn pieces_that_overlap_and_a_shadow_stack_that_is_not_used_up_are_refused() {
    let mut design = recursion(LAYOUT.with_incoming(16), 6);
    (design.shadow, design.arguments) = (true, 32);
    design.calls[2].entered = true;
    let mut specimen = Specimen::make(&design).expect("a possible design");
    let walk = |specimen: &Specimen, pieces: &[Piece], complete: bool| {
        let bounds = specimen.bounds(&specimen.source, pieces);
        let bounds = crate::walk::Bounds { complete, ..bounds };
        Walk::new(&specimen.model, &specimen.table, bounds).find_map(Result::err)
    };
    let pieces = specimen.pieces.clone();
    assert_eq!(pieces.len(), 2);
    assert_eq!(walk(&specimen, &pieces, true), None);
    assert!(matches!(walk(&specimen, &pieces[..1], true), Some(Refusal::Tampered(_))), "entries are left");
    assert_eq!(walk(&specimen, &pieces[..1], false), None);
    let lower = Piece { youngest: pieces[1].youngest - 32, ..pieces[1] };
    assert!(matches!(walk(&specimen, &[pieces[0], lower], true), Some(Refusal::Tampered(_))));
    for wrong in [16, 48] {
        let ends = Piece { base_cfa: pieces[0].base_cfa + wrong, ..pieces[0] };
        assert!(matches!(walk(&specimen, &[ends, pieces[1]], true), Some(Refusal::Tampered(_))));
    }
    assert!(matches!(walk(&specimen, &[], true), Some(Refusal::Tampered(_))), "a span has a piece");
    specimen.migrate(0, &[]).moved.expect("the stack is as it was");
}
