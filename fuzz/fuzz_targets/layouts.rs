//! What an engine says of its code, whatever it says: each function and call is taken or refused by the rules that the documentation of
//! [`FrameLayout`] and [`Registration`] gives, told here once more; and what was taken is found again.

#![no_main]

use cfi_stack::Error;
use cfi_stack::codemap::{FrameLayout, LARGEST_FRAME, Register, Registration, Safepoint};
use cfi_stack::pac::{Binding, PointerSigning, RawPc, Signing};
use cfi_stack_fuzz::picker;
use libfuzzer_sys::fuzz_target;

/// What was taken.
struct Taken {
    start: usize,
    end: usize,
    layout: FrameLayout,
    saves: Vec<i32>,
    calls: Vec<(usize, u32, Vec<i32>)>,
}

fuzz_target!(|data: &[u8]| {
    let pick = &mut picker(data);
    let mut map = Registration::new();
    let mut taken: Vec<Taken> = vec![];
    for _ in 0..pick(8) + 1 {
        let (start, len, layout) = (address(pick), length(pick), layout(pick));
        let fits = start.checked_add(len).is_some_and(|end| taken.iter().all(|t| end <= t.start || t.end <= start));
        let possible = start != 0 && len != 0 && fits && is_possible(&layout);
        let aligned = !cfg!(target_arch = "aarch64") || (start | len).is_multiple_of(4);
        let got = map.function(RawPc::new(start), len, layout);
        assert_eq!(typed(got), possible && aligned, "{start:#x}+{len:#x} {layout:?}");
        if possible && aligned {
            taken.push(Taken { start, end: start + len, layout, saves: vec![], calls: vec![] });
        }
        let Some(last) = taken.last_mut() else { continue };
        if pick(2) == 0 {
            let all = |index: u64| Register::new(index as usize);
            let saves: Vec<_> = (0..pick(4)).filter_map(|_| Some((all(pick(12))?, offset(pick)))).collect();
            let slots: Vec<i32> = saves.iter().map(|&(_, offset)| offset).collect();
            let mut names: Vec<_> = saves.iter().map(|&(register, _)| register).collect();
            names.sort_unstable();
            names.dedup();
            let clash = last.calls.iter().any(|(_, _, held)| held.iter().any(|slot| slots.contains(slot)));
            let possible = last.saves.is_empty()
                && are_slots(&last.layout, last.layout.frame_bytes, &slots)
                && names.len() == saves.len()
                && !clash;
            assert_eq!(typed(map.saves(RawPc::new(last.start), &saves)), possible, "{saves:?} {:?}", last.layout);
            if possible {
                last.saves = slots;
            }
        }
        for _ in 0..pick(4) {
            let pc = last.start.wrapping_add(pick(40) as usize);
            let frame_bytes = if pick(2) == 0 { None } else { Some(size(pick)) };
            let slots: Vec<i32> = (0..pick(4)).map(|_| offset(pick)).collect();
            let bytes = frame_bytes.unwrap_or(last.layout.frame_bytes);
            let possible = pc > last.start
                && pc <= last.end
                && is_size(&last.layout, bytes)
                && are_slots(&last.layout, bytes, &slots)
                && !slots.iter().any(|slot| last.saves.contains(slot))
                && last.calls.iter().all(|&(other, ..)| other != pc);
            // What lies at another function's address is that one's business.
            if pc <= last.start || pc > last.end {
                continue;
            }
            let said = Safepoint { frame_bytes, slots: &slots, registers: &[] };
            assert_eq!(typed(map.call(RawPc::new(pc), said)), possible, "{pc:#x} {said:?} {:?}", last.layout);
            if possible {
                last.calls.push((pc, bytes, slots));
            }
        }
    }
    let table = map.table().expect("there is memory");
    for function in &taken {
        for (pc, bytes, slots) in &function.calls {
            let found = table.find(RawPc::new(*pc)).expect("a call that was registered");
            assert_eq!((*found.layout, found.frame_bytes), (function.layout, *bytes));
            assert!(found.slots.len() == slots.len() && found.slots.iter().all(|slot| slots.contains(slot)));
        }
        let plain = function.end;
        if function.calls.iter().all(|&(pc, ..)| pc != plain) {
            let found = table.find(RawPc::new(plain)).expect("a call may be a function's last instruction");
            assert_eq!((*found.layout, found.frame_bytes), (function.layout, function.layout.frame_bytes));
        }
    }
});

/// Whether it was taken; a refusal is a typed one.
fn typed(got: Result<(), Error>) -> bool {
    match got {
        Ok(()) => true,
        Err(Error::Layout { .. }) => false,
        Err(other) => panic!("{other}"),
    }
}

fn is_possible(layout: &FrameLayout) -> bool {
    let FrameLayout { cfa_bytes, incoming, .. } = *layout;
    cfa_bytes >= 16
        && cfa_bytes % 8 == 0
        && cfa_bytes <= LARGEST_FRAME
        && incoming <= LARGEST_FRAME
        && incoming % 16 == 0
        && !(layout.dynamic && layout.signing != Signing::None && layout.binding == Binding::Zero)
        && is_size(layout, layout.frame_bytes)
}

fn is_size(layout: &FrameLayout, bytes: u32) -> bool {
    (u64::from(bytes) + u64::from(layout.cfa_bytes)) % 16 == 0 && bytes <= LARGEST_FRAME
}

fn are_slots(layout: &FrameLayout, bytes: u32, slots: &[i32]) -> bool {
    let end = i64::from(layout.cfa_bytes) + i64::from(layout.incoming);
    let returns = if cfg!(target_arch = "x86_64") { i64::from(layout.cfa_bytes) - 8 } else { 8 };
    let fits = |&slot: &i32| {
        let slot = i64::from(slot);
        slot >= -i64::from(bytes) && slot + 8 <= end && slot % 8 == 0 && slot != 0 && slot != returns
    };
    let twice = |(index, slot): (usize, &i32)| slots[..index].contains(slot);
    slots.iter().all(fits) && !slots.iter().enumerate().any(twice)
}

type Pick<'a> = &'a mut dyn FnMut(u64) -> u64;

fn address(pick: Pick<'_>) -> usize {
    match pick(6) {
        0 => pick(u64::MAX) as usize,
        1 => usize::MAX - pick(64) as usize,
        _ => pick(512) as usize,
    }
}

fn length(pick: Pick<'_>) -> usize {
    if pick(8) == 0 { pick(u64::MAX) as usize } else { pick(64) as usize }
}

fn size(pick: Pick<'_>) -> u32 {
    if pick(8) == 0 { pick(1 << 32) as u32 } else { 8 * pick(32) as u32 }
}

fn offset(pick: Pick<'_>) -> i32 {
    if pick(8) == 0 { pick(1 << 32) as u32 as i32 } else { 8 * (pick(48) as i32 - 32) }
}

fn layout(pick: Pick<'_>) -> FrameLayout {
    let signing = [Signing::None, Signing::A, Signing::B][pick(3) as usize];
    let mut layout = FrameLayout::new(size(pick), signing);
    if pick(2) == 0 {
        layout = layout.with_cfa_bytes(if pick(4) == 0 { size(pick) } else { 16 + 8 * pick(6) as u32 });
    }
    if pick(2) == 0 {
        layout = layout.with_incoming(if pick(4) == 0 { size(pick) } else { 16 * pick(4) as u32 });
    }
    layout =
        layout.with_binding([Binding::Cfa, Binding::Zero, Binding::Blended(pick(1 << 16) as u16)][pick(3) as usize]);
    let keys = [PointerSigning::None, PointerSigning::A, PointerSigning::B];
    layout = layout.with_frame_pointer(keys[pick(3) as usize]);
    for with in [FrameLayout::dynamic, FrameLayout::conservative, FrameLayout::retakes_sp] {
        layout = if pick(3) == 0 { with(layout) } else { layout };
    }
    if pick(8) == 0 { layout.immovable("it says so") } else { layout }
}
