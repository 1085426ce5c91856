//! Compiles the stubs of this ISA and tells the crate whether it has any.

use std::env;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(cfi_stack_native)");
    println!("cargo::rerun-if-changed=asm");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let files = match (arch.as_str(), os.as_str()) {
        ("x86_64", "linux") => ["asm/x86_64.S", "asm/x86_64_switch.S"],
        ("aarch64", "linux" | "macos") => ["asm/aarch64.S", "asm/aarch64_switch.S"],
        // Elsewhere the library still walks, plans and relocates over the software model.
        _ => return,
    };
    cc::Build::new().include("asm").files(files).compile("cfi_stack_stubs");
    println!("cargo::rustc-cfg=cfi_stack_native");
}
