//! Makes `cfi_start` the entry: where the kernel has shadow stacks, the program runs under one and its stacks have theirs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,-e,cfi_start");
}
