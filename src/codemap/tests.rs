//! What registrations refuse, and what is found.

use super::*;
use crate::pac::Signing;

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
