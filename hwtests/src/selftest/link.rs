//! Calls across segments.

use crate::attack::{Scene, policy, zero_address};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::managed::{self, Function};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::engine::{self, LinkCall};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::{Error, Exit, Policy};

const ARM: bool = cfg!(target_arch = "aarch64");

macro_rules! function {
    ($name:ident, $end:ident, $x86:expr, $arm:expr) => {{
        unsafe extern "C" {
            fn $name();
            fn $end();
        }
        Function {
            start: RawPc::new($name as *const () as usize),
            end: RawPc::new($end as *const () as usize),
            frame_bytes: if ARM { $arm } else { $x86 },
            signing: if ARM { Signing::A } else { Signing::None },
        }
    }};
}

macro_rules! site {
    ($name:ident) => {{
        unsafe extern "C" {
            fn $name();
        }
        RawPc::new($name as *const () as usize)
    }};
}

pub(crate) use function;
pub(crate) use site;

pub(crate) fn thunk() -> Function {
    function!(link_thunk, link_thunk_end, 0, 0)
}

fn caller() -> Function {
    function!(link_caller, link_caller_end, 32, 96)
}

fn callee() -> Function {
    function!(link_callee, link_callee_end, 0, 0)
}

pub(crate) fn recurse() -> Function {
    function!(link_recurse, link_recurse_end, 48, 64)
}

/// Its frames cannot move. What it calls is called across the edge where there is no room on this side.
fn climb() -> Function {
    function!(link_climb, link_climb_end, 48, 48)
}

fn repeat() -> Function {
    function!(link_loop, link_loop_end, 32, 32)
}

pub(crate) fn nothing() -> Function {
    function!(link_nothing, link_nothing_end, 0, 0)
}

/// The words that the thunk goes by, and what it calls.
pub(crate) struct Linked {
    pub(crate) scene: Scene,
    _code: Registered,
    /// Never freed: what a thunk goes by stays.
    block: &'static mut [u64],
}

/// Where the block holds what, in words: registers that go in, that the callee saw, that it returns, that came back; stack arguments that go in
/// and that it saw; stack results that it returns and that came back. General registers first, vector registers from word 16.
mod block {
    pub const ARGUMENT_BYTES: usize = 8;
    pub const RESULT_BYTES: usize = 9;
    pub const PASSED: usize = 0;
    pub const SEEN: usize = 128;
    pub const SEEN_SP: usize = SEEN + 8;
    pub const RETURNED: usize = 256;
    pub const BACK: usize = 384;
    pub const STACK_PASSED: usize = 512;
    pub const STACK_SEEN: usize = 1024;
    pub const STACK_RETURNED: usize = 1536;
    pub const STACK_BACK: usize = 2048;
    pub const WORDS: usize = 2560;
}

impl Linked {
    pub(crate) fn new(
        policy: Policy,
        callee: Function,
        arguments: u32,
        results: u32,
        need: u32,
    ) -> Result<Self, String> {
        let mut map = Registration::new();
        for function in [thunk(), caller(), self::callee(), recurse(), repeat(), nothing()] {
            managed::describe(&mut map, function);
        }
        let climb = climb();
        let layout = FrameLayout::new(climb.frame_bytes, climb.signing).immovable("it says so");
        let len = climb.end.address() - climb.start.address();
        map.function(climb.start, len, layout).expect("a hand-made function is a possible one");
        for site in [site!(link_recurse_site), site!(link_recurse_exit_site)] {
            map.safepoint(site, &[-24]).expect("the slot lies in the frame");
        }
        let scene = Scene::new(policy)?;
        let code = map.publish().map_err(|error| error.to_string())?;
        let mut linked = Linked { scene, _code: code, block: vec![0; block::WORDS].leak() };
        linked.call(callee, arguments, results, need)?;
        Ok(linked)
    }

    /// For [`Linked::pass`], with so many bytes of stack arguments and results.
    pub(crate) fn to_callee(policy: Policy, arguments: usize, results: usize) -> Result<Self, String> {
        Linked::new(policy, callee(), arguments as u32, results as u32, 512)
    }

    /// Has the thunk make another call from now on.
    fn call(&mut self, callee: Function, arguments: u32, results: u32, need: u32) -> Result<(), String> {
        unsafe extern "C" {
            static mut link_test: [usize; 4];
        }
        let call = LinkCall::new(callee.start, arguments, results, need).map_err(|error| error.to_string())?;
        let call: &'static LinkCall = Box::leak(Box::new(call));
        let words = [
            self.scene.act(),
            (&raw const *call).expose_provenance(),
            engine::stubs().link.address(),
            self.block.as_mut_ptr().expose_provenance(),
        ];
        // SAFETY: written while no managed function runs.
        unsafe { link_test = words };
        Ok(())
    }

    /// Recurses through links and compares the result.
    pub(crate) fn recurse_right(&mut self, depth: usize) -> Result<(), String> {
        let got = self.scene.recurse(recurse(), depth);
        match got == Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
            true => Ok(()),
            false => Err(format!("a recursion {depth} deep gave {got:x?}")),
        }
    }

    /// Calls with everything in registers and on the stack, and compares all of it.
    pub(crate) fn pass(&mut self, pad: usize, arguments: usize, results: usize, seed: u64) -> Result<(), String> {
        let words = &mut *self.block;
        for (index, word) in words.iter_mut().enumerate() {
            *word = (seed << 48 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
        }
        words[block::ARGUMENT_BYTES] = arguments as u64;
        words[block::RESULT_BYTES] = results as u64;
        let result = self.scene.enter(caller(), pad, arguments, results);
        if result != Ok(Exit::Returned(0)) {
            return Err(format!("{result:x?}"));
        }
        let words = &*self.block;
        // x0-x7, x8-x13 or the seven; then the vector registers.
        let general: Vec<usize> = if ARM { (0..8).chain(10..16).collect() } else { (0..7).collect() };
        let vectors = 16..if ARM { 80 } else { 48 };
        let same = |what: &str, a: usize, b: usize| match words[a] == words[b] {
            true => Ok(()),
            false => Err(format!("{what} {}: {:#x} became {:#x}", a % 128, words[a], words[b])),
        };
        for index in general.into_iter().chain(vectors) {
            same("argument word", block::PASSED + index, block::SEEN + index)?;
            same("result word", block::RETURNED + index, block::BACK + index)?;
        }
        for index in 0..arguments / 8 {
            same("stack argument", block::STACK_PASSED + index, block::STACK_SEEN + index)?;
        }
        for index in 0..results / 8 {
            same("stack result", block::STACK_RETURNED + index, block::STACK_BACK + index)?;
        }
        if !words[block::SEEN_SP].is_multiple_of(16) {
            return Err(format!("the callee's stack pointer was {:#x}", words[block::SEEN_SP]));
        }
        Ok(())
    }
}

/// S35.
pub fn arguments(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let sizes = |step: usize| (0..=4096_usize).step_by(step);
    let all = |pairs: Vec<(usize, usize)>| -> Verdict {
        let policy = Policy { initial: 16384, ..policy() };
        let mut linked = Linked::new(policy, callee(), 0, 0, 512)?;
        for (arguments, results) in pairs {
            linked.call(callee(), arguments as u32, results as u32, 512)?;
            linked
                .pass(0, arguments, results, 1 + arguments as u64)
                .map_err(|why| format!("{arguments}/{results}: {why}"))?;
        }
        match linked.scene.stack.stats().growths {
            0 => Ok(Code::C),
            growths => Err(format!("{growths} growths")),
        }
    };
    let both = |step| run(|| all(sizes(step).map(|size| (size, size)).collect()));
    tally.attack("arguments and results of 0 to 4096 bytes, by 8", &both(8), &[Code::C]);
    tally.attack("the same by 16", &both(16), &[Code::C]);
    let more_results = run(|| all(sizes(56).map(|size| (4088 - size / 8 * 8 % 4088, size)).collect()));
    tally.attack("sizes that differ", &more_results, &[Code::C]);
    let offsets = run(|| {
        let mut linked = Linked::new(policy(), callee(), 24, 40, 1024)?;
        for pad in (0..3072 - 256).step_by(16) {
            linked.pass(pad, 24, 40, pad as u64).map_err(|why| format!("{pad} bytes down: {why}"))?;
        }
        Ok(Code::C)
    });
    tally.attack("the edge at every offset in the segment", &offsets, &[Code::C]);
    let outside = run(|| {
        // The thunk's own arguments would lie above the segment's top.
        let mut linked = Linked::new(policy(), nothing(), 64, 0, 0)?;
        match linked.scene.enter(thunk(), 1, 2, 3) {
            Err(Error::Size { bytes: 64, .. }) => {}
            other => return Err(format!("{other:x?}")),
        }
        linked.call(nothing(), 0, 0, 0)?;
        match linked.scene.enter(thunk(), 1, 2, 3) {
            Ok(Exit::Returned(2)) => Ok(Code::E),
            other => Err(format!("{other:x?}")),
        }
    });
    tally.attack("stack arguments that are not in the segment", &outside, &[Code::E]);
    let sizes = run(|| {
        let at = RawPc::new(0x1000);
        for (arguments, results, need) in
            [(4, 0, 0), (0, 9, 0), (!7, 0, 0), (0, !7, 0), (16, 16, u32::MAX), (64, 0, u32::MAX - 8)]
        {
            if !matches!(LinkCall::new(at, arguments, results, need), Err(Error::Size { .. })) {
                return Err(format!("{arguments} {results} {need}"));
            }
        }
        Ok(Code::E)
    });
    tally.attack("calls of impossible sizes", &sizes, &[Code::E]);
    tally.report()
}

/// S36.
pub fn nests(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    for always in [false, true] {
        for depth in [0, 1, 2, 5, 20] {
            let end = run(|| {
                let policy = Policy { relocate_always: always, poison: always, ..policy() };
                let mut linked = Linked::new(policy, recurse(), 0, 0, 256)?;
                for round in 0..3 {
                    let before = cpu::shadow_pointer();
                    linked.recurse_right(depth).map_err(|why| format!("round {round}: {why}"))?;
                    if cpu::shadow_pointer() != before {
                        return Err("the shadow-stack pointer is another".into());
                    }
                }
                let stats = linked.scene.stack.stats();
                let made = if depth == 0 { 0 } else { depth as u64 + 2 * (depth as u64 - 1) };
                if stats.segments != made {
                    return Err(format!("{} segments instead of {made}", stats.segments));
                }
                if always && stats.growths < 3 * depth as u64 {
                    return Err(format!("{} moves", stats.growths));
                }
                Ok(Code::C)
            });
            let what = if always { ", moving at every check" } else { "" };
            tally.attack(&format!("{depth} links within each other{what}"), &end, &[Code::C]);
        }
    }
    for always in [false, true] {
        for (function, key) in managed::recursions() {
            let end = run(|| {
                let policy = Policy { relocate_always: always, ..policy() };
                let mut linked = Linked::new(policy, function, 0, 0, 512)?;
                for depth in [0, 1, 10, 60, if always { 100 } else { 3000 }, 5] {
                    let got = linked.scene.recurse(thunk(), depth);
                    if got != Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
                        return Err(format!("{depth} deep: {got:x?}"));
                    }
                }
                match linked.scene.stack.stats() {
                    stats if stats.growths < 3 || stats.segments != 1 => Err(format!("{stats:?}")),
                    stats if (stats.rebound != 0) != class.pac() => Err(format!("{stats:?}")),
                    _ => Ok(Code::C),
                }
            });
            let what = if always { " at every check" } else { "" };
            tally.attack(&format!("a linked segment grows{what}, {key}"), &end, &[Code::C]);
        }
    }
    for depth in [0, 1, 60, 600] {
        let end = run(|| {
            let mut linked = Linked::new(policy(), managed::leave(), 0, 0, 512)?;
            for round in 0..3 {
                let before = cpu::shadow_pointer();
                let got = linked.scene.enter(thunk(), depth, 70 + round, 0);
                if got != Ok(Exit::Left(70 + round as u64)) || cpu::shadow_pointer() != before {
                    return Err(format!("{got:x?}"));
                }
            }
            linked.call(recurse(), 0, 0, 64)?;
            linked.recurse_right(7)?;
            linked.scene.recurse_right(managed::recurse_a(), 300)?;
            Ok(Code::C)
        });
        tally.attack(&format!("leave from a linked segment, {depth} deep"), &end, &[Code::C]);
    }
    tally.attack("an overflow of linked segments", &run(|| overflow(recurse(), recurse())), &[Code::E]);
    tally.attack("an overflow in a linked segment", &run(|| overflow(managed::recurse_a(), thunk())), &[Code::E]);
    tally.attack("a link call that wants more than there may be", &run(wants_too_much), &[Code::E]);
    tally.attack("100,000 crossings", &run(oscillation), &[Code::C]);
    tally.attack("frames that cannot move go on by links alone", &run(immovable), &[Code::C]);
    match speed() {
        Ok([plain, linked]) => {
            tally.say(format!("{plain:.1} ns a plain call, {linked:.1} ns a link call there and back"))
        }
        Err(why) => tally.fail(why),
    }
    tally.report()
}

fn overflow(callee: Function, first: Function) -> Verdict {
    let maximum = 1 << 18;
    let mut linked = Linked::new(Policy { maximum, ..policy() }, callee, 0, 0, 512)?;
    for _ in 0..3 {
        let before = cpu::shadow_pointer();
        match linked.scene.enter(first, 1_000_000, zero_address(), 0) {
            Err(Error::Overflow { needed, maximum: named }) if named == maximum && needed > maximum => {}
            other => return Err(format!("{other:x?}")),
        }
        if cpu::shadow_pointer() != before {
            return Err("the shadow-stack pointer is another".into());
        }
        let got = linked.scene.recurse(first, 4);
        if got != Ok(Exit::Returned(managed::recursion_sum(4))) {
            return Err(format!("afterwards: {got:x?}"));
        }
    }
    Ok(Code::E)
}

fn wants_too_much() -> Verdict {
    let mut linked = Linked::new(policy(), nothing(), 0, 0, 1 << 20)?;
    match linked.scene.enter(thunk(), 1, 0, 0) {
        Err(Error::Overflow { .. }) => {}
        other => return Err(format!("{other:x?}")),
    }
    linked.call(nothing(), 0, 0, 1 << 19)?;
    match linked.scene.enter(thunk(), 1, 0, 0) {
        Ok(Exit::Returned(2)) => Ok(Code::E),
        other => Err(format!("{other:x?}")),
    }
}

fn oscillation() -> Verdict {
    const TIMES: u64 = 100_000;
    let mut linked = Linked::new(policy(), nothing(), 0, 0, 512)?;
    for _ in 0..2 {
        let got = linked.scene.enter(repeat(), TIMES as usize, thunk().start.address(), 0);
        if got != Ok(Exit::Returned(TIMES * (TIMES + 1) / 2 + TIMES)) {
            return Err(format!("{got:x?}"));
        }
    }
    match linked.scene.stack.stats() {
        stats if stats.segments == 1 && stats.growths == 0 && stats.bytes_moved == 0 => Ok(Code::C),
        stats => Err(format!("{stats:?}")),
    }
}

/// Nanoseconds of a plain call of a leaf, and of one through a thunk and `link`: the least of many runs.
fn speed() -> Result<[f64; 2], String> {
    const TIMES: usize = 20_000;
    let mut linked = Linked::new(policy(), nothing(), 0, 0, 512)?;
    let mut least = [f64::MAX; 2];
    for _ in 0..40 {
        for (least, target) in least.iter_mut().zip([nothing(), thunk()]) {
            let begun = std::time::Instant::now();
            let got = linked.scene.enter(repeat(), TIMES, target.start.address(), 0);
            *least = least.min(begun.elapsed().as_nanos() as f64 / TIMES as f64);
            if !matches!(got, Ok(Exit::Returned(_))) {
                return Err(format!("{got:x?}"));
            }
        }
    }
    Ok(least)
}

/// The function calls itself through a thunk that links where the limit would be passed, and only there.
fn immovable() -> Verdict {
    const DEPTH: usize = 5000;
    let mut linked = Linked::new(Policy { warm: 16, ..policy() }, climb(), 0, 0, 512)?;
    for round in 0..3 {
        let before = cpu::shadow_pointer();
        let got = linked.scene.enter(climb(), DEPTH, 0, 0);
        if got != Ok(Exit::Returned(DEPTH as u64)) || cpu::shadow_pointer() != before {
            return Err(format!("round {round}: {got:x?}"));
        }
    }
    // Each is twice as large as what lies on the one before: 5000 frames take few, and the later rounds none.
    match linked.scene.stack.stats() {
        stats if stats.growths != 0 || !(2..=9).contains(&stats.segments) => Err(format!("{stats:?}")),
        _ => Ok(Code::C),
    }
}
