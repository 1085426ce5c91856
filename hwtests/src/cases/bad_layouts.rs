//! A22: layouts that cannot be.

use crate::attack::{Scene, policy, zero_address};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::{FrameLayout, Registration};
use cfi_stack::engine::Activation;
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Stack};

const LAYOUT: FrameLayout = FrameLayout::new(64, Signing::A);

/// A22.
pub fn impossible(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("", &run(|| Scene::new(policy())?.recurse_right(managed::recurse_a(), 400).map(|()| Code::C)));
    tally.attack("ranges, frames and slots that cannot be", &run(refused), &[Code::E]);
    tally.attack("a range that is published already", &run(published_twice), &[Code::E]);
    for bytes in [4096, 1 << 20, 1 << 30, (i32::MAX & !15) as u32] {
        let end = run(|| leaves_its_segment(bytes));
        tally.attack(&format!("a frame of {bytes} bytes that leaves its segment"), &end, &[Code::E]);
    }
    tally.report()
}

fn refused() -> Verdict {
    let mut scene = Scene::new(policy())?;
    let at = RawPc::new;
    let mut map = Registration::new();
    let mut wrong = Vec::new();
    let mut refuse = |what: &str, result: Result<(), Error>| {
        if !matches!(result, Err(Error::Layout { .. })) {
            wrong.push(format!("{what}: {result:?}"));
        }
    };
    refuse("no bytes", map.function(at(0x10_0000), 0, LAYOUT));
    refuse("at address 0", map.function(at(0), 64, LAYOUT));
    refuse("wrapping", map.function(at(usize::MAX - 15), 64, LAYOUT));
    refuse("as long as memory", map.function(at(16), usize::MAX, LAYOUT));
    for frame_bytes in [1, 8, 15, 17, 0x7fff_fff8, 0x8000_0000, 0xffff_fff0, u32::MAX] {
        refuse("frame_bytes", map.function(at(0x10_0000), 64, FrameLayout { frame_bytes, ..LAYOUT }));
    }
    refuse("a slot of nobody", map.safepoint(at(0x10_0010), &[-8]));
    map.function(at(0x10_0000), 64, LAYOUT).map_err(|error| format!("a possible layout was refused: {error}"))?;
    for (start, len) in [(0x10_0000, 64), (0x0f_fff0, 32), (0x10_0030, 32), (0x10_0010, 16), (0x0f_f000, 0x10000)] {
        refuse("overlapping", map.function(at(start), len, LAYOUT));
    }
    for slot in [-72, -68, 0, 8, -12, -1, i32::MIN, i32::MAX] {
        refuse("a slot outside or misaligned", map.safepoint(at(0x10_0010), &[-8, slot]));
    }
    refuse("a slot twice", map.safepoint(at(0x10_0010), &[-8, -8]));
    refuse("at the first byte", map.safepoint(at(0x10_0000), &[-8]));
    refuse("past the end", map.safepoint(at(0x10_0041), &[-8]));
    if !wrong.is_empty() {
        return Err(format!("accepted: {}", wrong.join(", ")));
    }
    scene.recurse_right(managed::recurse_a(), 400).map(|()| Code::E)
}

fn published_twice() -> Verdict {
    let mut scene = Scene::new(policy())?;
    let again = managed::registration(|function| function).publish();
    if !matches!(again, Err(Error::Layout { .. })) {
        return Err(format!("published twice: {again:?}"));
    }
    scene.recurse_right(managed::recurse_a(), 400).map(|()| Code::E)
}

/// The layout says of `recurse` what no segment this small can hold.
fn leaves_its_segment(frame_bytes: u32) -> Verdict {
    let recurse = managed::recurse_a();
    let map = managed::registration(|function| {
        if function.start == recurse.start { managed::Function { frame_bytes, ..function } } else { function }
    });
    let _code = map.publish().map_err(|error| error.to_string())?;
    let thread = Thread::attach().map_err(|error| error.to_string())?;
    let mut stack = Stack::new(&thread, policy()).map_err(|error| error.to_string())?;
    let activation = Activation::new();
    let act = (&raw const activation).expose_provenance();
    let mut enter = |depth| {
        // SAFETY: the function follows the engine's rules but for the layout, which is the case.
        unsafe { stack.enter(&thread, &activation, recurse.start, [act, depth, zero_address(), 0]) }
    };
    let grown = enter(400);
    if !matches!(grown, Err(Error::Layout { .. })) {
        return Err(format!("grown with an impossible layout: {grown:x?}"));
    }
    let after = enter(5);
    if after != Ok(Exit::Returned(managed::recursion_sum(5))) {
        return Err(format!("the stack is not usable afterwards: {after:x?}"));
    }
    Ok(Code::E)
}
