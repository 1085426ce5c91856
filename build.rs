//! Compiles the stubs of this ISA and tells the crate whether it has any.

use std::env;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(cfi_stack_native)");
    println!("cargo::rerun-if-changed=asm");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let isa = match (arch.as_str(), os.as_str()) {
        ("x86_64", "linux") => "x86_64",
        ("aarch64", "linux" | "macos") => "aarch64",
        // Elsewhere the library still walks, plans and relocates over the software model.
        _ => return,
    };
    // Managed stacks; suspending them; re-signing and seals; moving pages; linked segments; switching; what the CPU is asked; what native code takes.
    let mut files = ["", "_suspend", "_rebind", "_remap", "_link", "_switch", "_cpu", "_fudge"]
        .map(|part| format!("asm/{isa}{part}.S"))
        .to_vec();
    if isa == "aarch64" {
        // Signing under a key that threads share.
        files.push("asm/aarch64_park.S".into());
    }
    cc::Build::new().include("asm").files(files).compile("cfi_stack_stubs");
    println!("cargo::rustc-cfg=cfi_stack_native");
}
