//! Compiles the hand-made managed functions of this ISA and makes `cfi_start` the entry.

use std::env;

fn main() {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    println!("cargo::rerun-if-changed=asm");
    cc::Build::new()
        .files(["managed", "link", "frames", "spans", "attacked"].map(|part| format!("asm/{part}-{arch}.S")))
        .compile("cfi_managed");
    println!("cargo::rustc-link-arg-bins=-Wl,-e,cfi_start");
}
