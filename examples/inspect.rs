//! Looks at a stack of managed code, has it move, and looks again.
//!
//! ```text
//! cargo run --release --example inspect                writes inspect-one.svg and inspect-move.svg into the present folder
//! cargo run --release --example inspect -- FOLDER 100  the same into FOLDER, with 100 calls on the stack
//! ```
//! Any browser shows the drawings; `rsvg-convert inspect-move.svg -o inspect-move.png` makes an image.
//!
//! The managed code is one recursion, by hand: each frame has a word, and a slot with a pointer to it, which a move must put right. The innermost calls native
//! code, and that looks at the stack which waits for it, asks for room, so that all frames move, and looks again.

use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::engine::{self, Activation};
use cfi_stack::inspect::{self, Picture, svg};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack};
use std::arch::global_asm;
use std::path::PathBuf;
use std::sync::Mutex;

// u64 inspected(act, n, look, exit): n calls deep, then exit(act, look, act, 0, 0); each frame adds the word that its pointer leads to,
// which is 1. frame_bytes = 48. The slot with the pointer is fp - 24.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".globl inspected",
    ".type inspected, @function",
    "inspected:",
    ".cfi_startproc",
    "endbr64",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "sub rsp, 48",
    "lea rax, [rbp - 32]",
    "mov [rbp - 24], rax",
    "mov qword ptr [rbp - 32], 1",
    "test rsi, rsi",
    "jz 2f",
    "dec rsi",
    "call inspected",
    ".globl inspected_calls",
    "inspected_calls:",
    "jmp 3f",
    "2: mov rax, rcx",
    "mov rsi, rdx",
    "mov rdx, rdi",
    "call rax",
    ".globl inspected_exits",
    "inspected_exits:",
    "3: mov rcx, [rbp - 24]",
    "add rax, [rcx]",
    "leave",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_endproc",
    ".size inspected, . - inspected",
    ".globl inspected_end",
    "inspected_end:",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".globl inspected",
    ".type inspected, %function",
    ".p2align 2",
    "inspected:",
    ".cfi_startproc",
    "hint #25", // paciasp
    ".cfi_negate_ra_state",
    "stp x29, x30, [sp, #-16]!",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset x29, -16",
    ".cfi_offset x30, -8",
    "mov x29, sp",
    ".cfi_def_cfa x29, 16",
    "sub sp, sp, #48",
    "sub x9, x29, #32",
    "mov x10, #1",
    "stp x10, x9, [x29, #-32]",
    "cbz x1, 2f",
    "sub x1, x1, #1",
    "bl inspected",
    ".globl inspected_calls",
    "inspected_calls:",
    "b 3f",
    "2: mov x9, x3",
    "mov x1, x2",
    "mov x2, x0",
    "blr x9",
    ".globl inspected_exits",
    "inspected_exits:",
    "3: ldr x9, [x29, #-24]",
    "ldr x9, [x9]",
    "add x0, x0, x9",
    "mov sp, x29",
    "ldp x29, x30, [sp], #16",
    ".cfi_def_cfa sp, 0",
    "hint #29", // autiasp
    ".cfi_negate_ra_state",
    "ret",
    ".cfi_endproc",
    ".size inspected, . - inspected",
    ".globl inspected_end",
    "inspected_end:",
);

unsafe extern "C" {
    fn inspected();
    fn inspected_calls();
    fn inspected_exits();
    fn inspected_end();
}

fn address(symbol: unsafe extern "C" fn()) -> RawPc {
    RawPc::new(symbol as *const () as usize)
}

fn register() -> Result<Registered, Error> {
    let signing = if cfg!(target_arch = "aarch64") { Signing::A } else { Signing::None };
    let len = address(inspected_end).address() - address(inspected).address();
    let mut map = Registration::new();
    map.function(address(inspected), len, FrameLayout::new(48, signing))?;
    map.safepoint(address(inspected_calls), &[-24])?;
    map.safepoint(address(inspected_exits), &[-24])?;
    map.publish()
}

/// Before and after.
static PICTURES: Mutex<Vec<Picture>> = Mutex::new(Vec::new());

/// Native code, on the thread's own stack: looks, has the frames move, looks again.
extern "C" fn look(activation: usize, _: usize, _: usize) -> u64 {
    // SAFETY: managed code passes its own activation, which `main` keeps.
    let activation = unsafe { &*std::ptr::with_exposed_provenance::<Activation>(activation) };
    let looked = || -> Result<[Picture; 2], Error> {
        let before = inspect::activation(activation)?;
        // SAFETY: managed code keeps no pointer into its stack but the one that it declares.
        unsafe { engine::reserve(activation, 32 << 10)? };
        Ok([before, inspect::activation(activation)?])
    };
    match looked() {
        Ok(pictures) => PICTURES.lock().expect("nobody panics with it").extend(pictures),
        Err(error) => eprintln!("inspect: {error}"),
    }
    0
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().unwrap_or_else(|| ".".into()));
    let depth = arguments.next().map_or(Ok(9), |depth| depth.parse::<usize>())?;

    let thread = Thread::attach()?;
    let _code = register()?;
    let activation = Activation::new();
    // The code does not check: the first segment has room for it.
    let mut stack = Stack::with_size(&thread, Policy::default(), (depth + 1) * 64)?;
    let act = (&raw const activation).expose_provenance();
    let entered = [act, depth, look as *const () as usize, engine::stubs().exit.address()];
    // SAFETY: the code follows the rules of `engine`, and has room for all its frames.
    let exit = unsafe { stack.enter(&thread, &activation, address(inspected), entered)? };
    assert_eq!(exit, Exit::Returned(depth as u64 + 1), "every pointer leads to its word");

    let pictures = PICTURES.lock().expect("nobody panics with it");
    let [before, after] = &pictures[..] else { return Err("there is no picture".into()) };
    print!("before\n{before}\nafter\n{after}\nwhen all is done\n{}\n", inspect::stack(&stack));
    println!("{:?}", inspect::totals());
    for (name, text) in [("inspect-one.svg", svg::picture(before)), ("inspect-move.svg", svg::change(before, after))] {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}
