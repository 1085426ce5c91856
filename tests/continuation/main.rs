//! Continuations: what the Wasm proposal's programs do, the mistakes that a caller can make, and random programs against a model.
#![cfg(any(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")), target_os = "macos"))]

mod closures;
mod effects;
mod mistakes;
mod state;
