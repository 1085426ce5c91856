//! Stacks that switch, grow and move while control-flow integrity stays whole.
//!
//! An engine links this library to own the stacks that its managed code runs on. A stack starts at one page and grows by
//! moving all its frames to a larger segment. Return addresses signed by arm64 pointer authentication are
//! authenticated and signed again for their new place; a shadow stack (x86 SHSTK, arm64 GCS) is never written.
//!
//! The way of the data, which is also the direction of imports (later ones import earlier ones):
//! [`features`] → [`pac`] → `arch` → [`segment`], [`shadow`] → [`thread`] → [`codemap`], [`walk`] → [`plan`] →
//! [`relocate`] → [`policy`] → [`Stack`] → [`engine`].
//!
//! A caller's mistake is a typed [`Error`] and the stack runs on. Evidence of tampering ends the process: by the
//! CPU's own fault, by a `brk` of ours, or by one line on stderr and SIGABRT.

pub mod codemap;
mod error;
pub mod pac;
pub mod plan;
pub mod policy;
pub mod relocate;
pub mod segment;
#[cfg(any(test, feature = "model"))]
pub mod specimen;
pub mod steps;
pub mod tamper;
pub mod walk;

#[cfg(cfi_stack_native)]
mod arch;
#[cfg(cfi_stack_native)]
pub mod engine;
#[cfg(cfi_stack_native)]
pub mod features;
#[cfg(cfi_stack_native)]
mod published;
#[cfg(cfi_stack_native)]
pub mod shadow;
#[cfg(cfi_stack_native)]
mod stack;
#[cfg(cfi_stack_native)]
pub mod thread;

#[cfg(cfi_stack_native)]
pub use engine::Exit;
pub use error::Error;
pub use policy::Policy;
#[cfg(cfi_stack_native)]
pub use stack::{Stack, Stats};

/// Why a move did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A caller's mistake or an exhaustion: the stack runs on.
    Error(Error),
    /// Evidence of tampering: the caller ends the process.
    Tampered(pac::Tampered),
}

/// The README's example, compiled and run.
#[cfg(all(doctest, cfi_stack_native))]
#[doc = include_str!("../README.md")]
struct Readme;
