//! The hand-made managed functions of `asm/`, and their registration.

use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::engine;
use cfi_stack::pac::{RawPc, Signing};
use std::sync::Once;

/// A hand-made function: where it lies, how large its frame is, how it signs.
#[derive(Clone, Copy)]
pub struct Function {
    /// First byte.
    pub start: RawPc,
    /// One past the last.
    pub end: RawPc,
    /// fp − sp at its calls.
    pub frame_bytes: u32,
    /// Its signing.
    pub signing: Signing,
}

const ARM: bool = cfg!(target_arch = "aarch64");

macro_rules! function {
    ($name:ident, $end:ident, $x86:expr, $arm:expr, $signing:expr) => {{
        unsafe extern "C" {
            fn $name();
            fn $end();
        }
        Function {
            start: RawPc::new($name as *const () as usize),
            end: RawPc::new($end as *const () as usize),
            frame_bytes: if ARM { $arm } else { $x86 },
            signing: if ARM { $signing } else { Signing::None },
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

/// `n` calls deep, then a native function; each frame reads itself through a pointer into itself.
pub fn recurse_a() -> Function {
    function!(managed_recurse_a, managed_recurse_a_end, 48, 64, Signing::A)
}

/// The same with key B; on x86-64 the same function.
pub fn recurse_b() -> Function {
    #[cfg(target_arch = "aarch64")]
    return function!(managed_recurse_b, managed_recurse_b_end, 48, 64, Signing::B);
    #[cfg(not(target_arch = "aarch64"))]
    recurse_a()
}

/// Writes to the lowest word of a 12 KiB frame without a check.
pub fn big_frame() -> Function {
    function!(managed_big_frame, managed_big_frame_end, 12288, 12288, Signing::A)
}

/// Grows with every register full.
pub fn registers() -> Function {
    function!(managed_registers, managed_registers_end, 64, 128, Signing::A)
}

/// Leaves from `n` calls deep.
pub fn leave() -> Function {
    function!(managed_leave, managed_leave_end, 16, 32, Signing::A)
}

/// Spins until told.
pub fn spin() -> Function {
    function!(managed_spin, managed_spin_end, 16, 16, Signing::A)
}

/// Faults from `n` calls deep.
pub fn fault() -> Function {
    function!(managed_fault, managed_fault_end, 16, 32, Signing::A)
}

/// Calls a stub with the stack pointer just above the segment's base.
pub fn edge() -> Function {
    function!(managed_edge, managed_edge_end, 16, 16, Signing::A)
}

/// Spins there.
pub fn edge_spin() -> Function {
    function!(managed_edge_spin, managed_edge_spin_end, 16, 16, Signing::A)
}

/// Calls `recurse_a` from two places at one stack pointer; returns how often it came back to the first.
pub fn twice_a() -> Function {
    function!(managed_twice_a, managed_twice_a_end, 48, 48, Signing::A)
}

/// The same with key B; on x86-64 the same function.
pub fn twice_b() -> Function {
    #[cfg(target_arch = "aarch64")]
    return function!(managed_twice_b, managed_twice_b_end, 48, 48, Signing::B);
    #[cfg(not(target_arch = "aarch64"))]
    twice_a()
}

/// Calls `recurse_a` and signs nothing.
pub fn plain() -> Function {
    function!(managed_plain, managed_plain_end, 16, 16, Signing::None)
}

/// Calls `recurse_a` and signs with key A, but not under its CFA.
#[cfg(target_arch = "aarch64")]
pub fn salted() -> Function {
    function!(managed_salted, managed_salted_end, 16, 16, Signing::A)
}

/// Where `recurse_a` goes on after its recursive call.
pub fn recurse_a_site() -> RawPc {
    site!(managed_recurse_a_site)
}

/// The two recursions with the key that each signs with; one of them on x86-64, where nothing is signed.
pub fn recursions() -> Vec<(Function, &'static str)> {
    if ARM { vec![(recurse_a(), "key A"), (recurse_b(), "key B")] } else { vec![(recurse_a(), "unsigned")] }
}

/// Behind the call in the library's `enter`: what the oldest managed frame returns to.
pub fn entry_return() -> RawPc {
    site!(cfi_stack_entry_return)
}

/// What `recurse` returns from `n` calls deep when its native function returns 0.
pub fn recursion_sum(n: u64) -> u64 {
    (0..=n).map(|level| level * 8 + 3).sum()
}

/// Gives the functions the stubs' addresses. Idempotent.
pub fn link() {
    unsafe extern "C" {
        static mut managed_stubs: [usize; 3];
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let stubs = engine::stubs();
        // SAFETY: written once, before any managed function runs.
        unsafe { managed_stubs = [stubs.grow.address(), stubs.exit.address(), stubs.leave.address()] };
    });
}

/// Has the functions call `suspend` where they called `exit`, from now on: instead of calling a native function they suspend with its address.
pub fn suspend_for_exit() {
    unsafe extern "C" {
        static mut managed_stubs: [usize; 3];
    }
    link();
    // SAFETY: written while no managed function runs.
    unsafe { managed_stubs[1] = engine::stubs().suspend.address() };
}

/// Adds a function, with the slots that its code keeps pointers into the stack in.
pub fn describe(map: &mut Registration, function: Function) {
    let layout = FrameLayout::new(function.frame_bytes, function.signing);
    let len = function.end.address() - function.start.address();
    map.function(function.start, len, layout).expect("a hand-made function is a possible one");
}

/// All of them.
pub fn functions() -> Vec<Function> {
    let mut functions =
        vec![recurse_a(), big_frame(), registers(), leave(), spin(), fault(), edge(), edge_spin(), twice_a(), plain()];
    if ARM {
        functions.extend([recurse_b(), twice_b()]);
        #[cfg(target_arch = "aarch64")]
        functions.push(salted());
    }
    functions
}

/// Where they keep a pointer into the stack in the slot 24 bytes below the frame record.
pub fn sites() -> Vec<RawPc> {
    #[cfg(target_arch = "aarch64")]
    return vec![
        recurse_a_site(),
        site!(managed_recurse_a_exit_site),
        site!(managed_recurse_b_site),
        site!(managed_recurse_b_exit_site),
    ];
    #[cfg(not(target_arch = "aarch64"))]
    vec![recurse_a_site(), site!(managed_recurse_a_exit_site)]
}

/// A registration of all hand-made functions, not published yet; `change` may tell lies about one.
pub fn registration(change: impl Fn(Function) -> Function) -> Registration {
    link();
    let mut map = Registration::new();
    for function in functions() {
        describe(&mut map, change(function));
    }
    for site in sites() {
        map.safepoint(site, &[-24]).expect("the slot lies in the frame");
    }
    map
}

/// Registers all hand-made functions.
pub fn register() -> Registered {
    registration(|function| function).publish().expect("nothing is registered yet")
}
