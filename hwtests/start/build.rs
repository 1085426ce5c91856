//! Compiles the entry of this ISA. Linking a program with `-e cfi_start` makes it run.

use std::env;

fn main() {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    println!("cargo::rerun-if-changed=start.S");
    if os == "linux" && (arch == "x86_64" || arch == "aarch64") {
        cc::Build::new().file("start.S").compile("cfi_start_entry");
    }
}
