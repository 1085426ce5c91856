//! What registrations refuse, and what is found.

use super::*;
use crate::pac::{Binding, Signing};

const LAYOUT: FrameLayout = FrameLayout::new(64, Signing::A);

fn refused(result: Result<(), Error>) -> &'static str {
    match result {
        Err(Error::Layout { rule, .. }) => rule,
        other => panic!("expected a layout error, got {other:?}"),
    }
}

#[test]
fn impossible_functions_are_refused() {
    let mut map = Registration::new();
    let at = RawPc::new;
    assert!(refused(map.function(at(0x1000), 0, LAYOUT)).contains("empty"));
    assert!(refused(map.function(at(0), 16, LAYOUT)).contains("starts at 0"));
    assert!(refused(map.function(at(usize::MAX - 7), 16, LAYOUT)).contains("wraps"));
    assert!(refused(map.function(at(0x1000), 16, FrameLayout { frame_bytes: 8, ..LAYOUT })).contains("multiple"));
    assert!(refused(map.function(at(0x1000), 16, FrameLayout::new(LARGEST_FRAME + 16, Signing::A))).contains("2 GiB"));
    assert_eq!(map.function(at(0x1000), 0x100, LAYOUT), Ok(()));
    for (start, len) in [(0x1000, 0x100), (0x10fc, 8), (0xff0, 0x14), (0xff0, 0x1000), (0x1010, 4)] {
        assert!(refused(map.function(at(start), len, LAYOUT)).contains("overlaps"), "{start:#x}+{len:#x}");
    }
    assert_eq!(map.function(at(0x1100), 4, LAYOUT), Ok(()));
    assert_eq!(map.function(at(0xffc), 4, LAYOUT), Ok(()));
}

#[test]
fn impossible_safepoints_are_refused() {
    let mut map = Registration::new();
    map.function(RawPc::new(0x1000), 0x100, LAYOUT).unwrap();
    let at = RawPc::new(0x1010);
    assert!(refused(map.safepoint(RawPc::new(0x1000), &[])).contains("no registered"));
    assert!(refused(map.safepoint(RawPc::new(0x1101), &[])).contains("no registered"));
    for outside in [-72, 0, 8, i32::MIN, i32::MAX] {
        assert!(refused(map.safepoint(at, &[outside])).contains("outside"), "{outside}");
    }
    assert!(refused(map.safepoint(at, &[-12])).contains("aligned"));
    assert!(refused(map.safepoint(at, &[-16, -16])).contains("twice"));
    assert_eq!(map.safepoint(at, &[-64, -8]), Ok(()));
    assert!(refused(map.safepoint(at, &[-8])).contains("twice"));
}

#[test]
fn look_up_finds_the_function_that_called() {
    let mut map = Registration::new();
    map.function(RawPc::new(0x1000), 0x100, LAYOUT).unwrap();
    map.function(RawPc::new(0x1100), 0x100, FrameLayout { frame_bytes: 32, ..LAYOUT }).unwrap();
    map.safepoint(RawPc::new(0x1100), &[-16, -8]).unwrap();
    let table = map.table().unwrap();
    let frame_bytes = |pc| table.find(RawPc::new(pc)).map(|found| found.frame_bytes);
    assert_eq!(frame_bytes(0x1000), None, "a return address is never a function's first byte");
    assert_eq!(frame_bytes(0x1004), Some(64));
    assert_eq!(frame_bytes(0x1100), Some(64), "a call as the last instruction");
    assert_eq!(frame_bytes(0x1101), Some(32));
    assert_eq!(frame_bytes(0x1200), Some(32));
    assert_eq!(frame_bytes(0x1201), None);
    assert_eq!(table.find(RawPc::new(0x1100)).unwrap().slots, [-16, -8]);
    assert!(table.find(RawPc::new(0x1101)).unwrap().slots.is_empty());
}

#[test]
fn impossible_layouts_are_refused() {
    let mut map = Registration::new();
    let mut refuse = |layout: FrameLayout, rule: &str| {
        let found = refused(map.function(RawPc::new(0x1000), 16, layout));
        assert!(found.contains(rule), "{layout:?}: {found}");
    };
    for cfa_bytes in [0, 8, 20, 28] {
        refuse(LAYOUT.with_cfa_bytes(cfa_bytes), "`cfa_bytes`");
    }
    refuse(LAYOUT.with_cfa_bytes(24), "multiple of 16");
    refuse(FrameLayout::new(8, Signing::A), "multiple of 16");
    refuse(LAYOUT.with_cfa_bytes(!15), "2 GiB");
    refuse(LAYOUT.with_incoming(!15), "2 GiB");
    for incoming in [1, 8, 24] {
        refuse(LAYOUT.with_incoming(incoming), "`incoming`");
    }
    refuse(LAYOUT.dynamic().with_binding(Binding::Zero), "dynamic size");
    let unsigned = FrameLayout::new(64, Signing::None).dynamic().with_binding(Binding::Zero);
    assert_eq!(map.function(RawPc::new(0x1000), 16, unsigned), Ok(()), "where nothing signs there is no modifier");
    let odd = FrameLayout::new(56, Signing::A).with_cfa_bytes(24).with_incoming(32);
    assert_eq!(map.function(RawPc::new(0x2000), 16, odd), Ok(()));
}

#[test]
fn slots_lie_in_the_frame_and_in_what_it_owns_above() {
    let mut map = Registration::new();
    let layout = FrameLayout::new(56, Signing::A).with_cfa_bytes(24).with_incoming(16);
    map.function(RawPc::new(0x1000), 0x100, layout).unwrap();
    let return_offset = layout.return_offset() as i32;
    for outside in [-64, 0, return_offset, 40] {
        assert!(refused(map.safepoint(RawPc::new(0x1010), &[outside])).contains("outside"), "{outside}");
    }
    let between = 8 + 16 - return_offset;
    assert_eq!(map.safepoint(RawPc::new(0x1010), &[-56, -8, between, 24, 32]), Ok(()));
    // A call with other bytes below fp has other slots.
    let call = |frame_bytes, slots| Safepoint { frame_bytes, slots, ..Safepoint::default() };
    assert!(refused(map.call(RawPc::new(0x1020), call(Some(64), &[]))).contains("multiple of 16"));
    assert!(refused(map.call(RawPc::new(0x1020), call(Some(8), &[-16]))).contains("outside"));
    assert_eq!(map.call(RawPc::new(0x1020), call(Some(88), &[-88])), Ok(()));
    let table = map.table().unwrap();
    assert_eq!(table.find(RawPc::new(0x1020)).map(|found| found.frame_bytes), Some(88));
    assert_eq!(table.find(RawPc::new(0x1030)).map(|found| found.frame_bytes), Some(56));
}

#[test]
fn impossible_saves_are_refused() {
    let mut map = Registration::new();
    let at = RawPc::new(0x1000);
    let [first, second] = [0, 1].map(|index| Register::new(index).unwrap());
    map.function(at, 0x100, LAYOUT).unwrap();
    assert!(refused(map.saves(RawPc::new(0x1004), &[(first, -8)])).contains("no registered"));
    assert!(refused(map.saves(at, &[(first, -72)])).contains("outside"));
    assert!(refused(map.saves(at, &[(first, -12)])).contains("aligned"));
    assert!(refused(map.saves(at, &[(first, -8), (first, -16)])).contains("twice"));
    assert!(refused(map.saves(at, &[(first, -8), (second, -8)])).contains("twice"));
    map.safepoint(RawPc::new(0x1010), &[-24]).unwrap();
    assert!(refused(map.saves(at, &[(first, -24)])).contains("saved register"));
    assert_eq!(map.saves(at, &[(first, -8), (second, -16)]), Ok(()));
    assert!(refused(map.saves(at, &[(first, -8)])).contains("already"));
    assert!(refused(map.safepoint(RawPc::new(0x1020), &[-16])).contains("saved register"));
    let registers = &[second];
    assert_eq!(map.call(RawPc::new(0x1020), Safepoint { registers, ..Safepoint::default() }), Ok(()));
    let table = map.table().unwrap();
    let found = table.find(RawPc::new(0x1020)).unwrap();
    assert_eq!((found.registers, found.saves), (1 << second.index(), &[0, -8, 1, -16][..]));
    assert!(!found.plain);
}

#[test]
fn registers_have_names_and_places() {
    assert_eq!(Register::new(Register::NAMES.len()), None);
    assert_eq!(Register::named("rsp"), None);
    for (index, name) in Register::NAMES.iter().enumerate() {
        assert_eq!(Register::named(name).map(Register::index), Some(index));
    }
}
