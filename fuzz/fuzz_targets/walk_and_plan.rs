//! Walker, planner and relocation over specimens: the input decides a stack, a code map that may lie about it, and what an
//! attacker writes when. [`Specimen::migrate`] panics when a law is broken; what oversteps a segment, AddressSanitizer sees.

#![no_main]

use cfi_stack::codemap::Register;
use cfi_stack::pac::{Binding, PointerSigning, Signing};
use cfi_stack::specimen::tampering::Tampering;
use cfi_stack::specimen::{Design, Function, Specimen};
use cfi_stack_fuzz::picker;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut pick = picker(data);
    let lies = pick(4) == 0;
    let count = pick(8);
    let tampering: Vec<Tampering> = (0..count).map(|_| Tampering::choose(&mut pick)).collect();
    let design = Design::choose(&mut pick);
    let mut specimen = Specimen::make(&design).expect("a chosen design is a possible one");
    if lies {
        let mut other = design.clone();
        for function in &mut other.functions {
            lie(&mut pick, function);
        }
        match other.table() {
            Ok(table) => specimen.describe(table),
            // A layout that cannot be is refused at registration; there is nothing to walk with then.
            Err(_) => return,
        }
    }
    let spare = design.room.saturating_add_signed(pick(64) as isize - 48);
    specimen.migrate(spare, &tampering);
});

/// Describes a function as what it is not.
fn lie(pick: &mut dyn FnMut(u64) -> u64, function: &mut Function) {
    let layout = &mut function.layout;
    match pick(16) {
        0 => layout.frame_bytes ^= 1 << pick(32),
        1 => layout.signing = [Signing::None, Signing::A, Signing::B][pick(3) as usize],
        2 => layout.immovable = Some("a lie"),
        3 => function.len += pick(16) as usize * 4,
        4 => function.gap += pick(16) as usize * 4,
        5 => function.sites.iter_mut().for_each(|site| site.slots = vec![-8 * (pick(16) as i32 + 1)]),
        6 => function.sites.truncate(pick(4) as usize),
        7 => layout.cfa_bytes ^= 1 << pick(32),
        8 => layout.incoming ^= 1 << pick(32),
        9 => layout.dynamic ^= true,
        10 => layout.binding = [Binding::Cfa, Binding::Zero, Binding::Blended(pick(1 << 16) as u16)][pick(3) as usize],
        11 => {
            let keys = [PointerSigning::None, PointerSigning::A, PointerSigning::B];
            layout.frame_pointer = keys[pick(3) as usize];
        }
        12 => layout.conservative ^= true,
        13 => function.saves = Register::new(pick(16) as usize).map(|register| (register, -8)).into_iter().collect(),
        14 => function.sites.iter_mut().for_each(|site| site.frame_bytes = Some(8 * pick(64) as u32)),
        _ => {}
    }
}
