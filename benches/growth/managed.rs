//! The managed functions of `managed-*.S` and their registration.

use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::engine;
use cfi_stack::pac::{RawPc, Signing};
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(include_str!("managed-x86_64.S"), options(att_syntax, raw));
#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(include_str!("managed-aarch64.S"), options(raw));

/// The addresses of grow and exit, where the functions find them.
#[unsafe(no_mangle)]
static mut bench_stubs: [usize; 2] = [0; 2];

const ARM: bool = cfg!(target_arch = "aarch64");

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident .. $end:ident, $x86:literal, $arm:literal;)*) => {
        unsafe extern "C" {
            $(fn $symbol(); fn $end();)*
        }
        $($(#[$doc])* pub fn $name() -> RawPc {
            RawPc::new($symbol as *const () as usize)
        })*
        fn map() -> Registration {
            let mut map = Registration::new();
            $(
                let len = $end as *const () as usize - $name().address();
                let signing = if ARM { Signing::A } else { Signing::None };
                let frame_bytes = if ARM { $arm } else { $x86 };
                map.function($name(), len, FrameLayout::new(frame_bytes, signing)).expect("a possible frame");
            )*
            map
        }
    };
}

functions! {
    /// `(n, f, bytes)`: n calls deep; there, unless f is 0, f on the native stack, grow by bytes, f again.
    descend = bench_descend..bench_descend_end, 16, 16;
    /// `(n, calls)`: calls the leaf that checks from n frames down.
    edge = bench_edge..bench_edge_end, 16, 16;
    /// What `descend` does at its bottom.
    bottom = bench_bottom..bench_bottom_end, 32, 32;
    /// `(n)`: Fibonacci by recursion, each call checking the limit.
    fib_checked = bench_fib_checked..bench_fib_checked_end, 16, 32;
    /// The same without checks.
    fib_plain = bench_fib_plain..bench_fib_plain_end, 16, 32;
    /// A leaf that checks.
    leaf_checked = bench_leaf_checked..bench_leaf_checked_end, 16, 16;
    /// A leaf that does not.
    leaf_plain = bench_leaf_plain..bench_leaf_plain_end, 16, 16;
    /// `(n)`: n calls of the leaf that checks.
    loop_checked = bench_loop_checked..bench_loop_checked_end, 16, 16;
    /// `(n)`: n calls of the leaf that does not.
    loop_plain = bench_loop_plain..bench_loop_plain_end, 16, 16;
}

/// Bytes of one frame of `descend`, its record included.
pub const FRAME: usize = 32;
/// Bytes of a span of `descend` at its bottom besides the frames of `descend`: bottom's frame and grow's record.
pub const BOTTOM: usize = 48 + 16;

/// Registers the functions, once.
pub fn register() {
    static REGISTERED: OnceLock<Registered> = OnceLock::new();
    REGISTERED.get_or_init(|| {
        let stubs = engine::stubs();
        // SAFETY: written once, before any managed function runs.
        unsafe { bench_stubs = [stubs.grow.address(), stubs.exit.address()] };
        map().publish().expect("nothing is registered yet")
    });
}
