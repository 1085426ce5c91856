//! Makes the program begin at `cfi_start`, which turns the thread's shadow stack on before libc runs.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let of = |name| env::var(name).unwrap_or_default();
    let arch = of("CARGO_CFG_TARGET_ARCH");
    if of("CARGO_CFG_TARGET_OS") == "linux" && (arch == "x86_64" || arch == "aarch64") {
        println!("cargo::rustc-link-arg-bins=-Wl,-e,cfi_start");
    }
}
