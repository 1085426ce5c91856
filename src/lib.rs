//! Stacks that switch, grow and move while control-flow integrity stays whole.
//!
//! Two kinds of stacks. *Pooled* ones hold any code; [`coroutine`], [`continuation`] and `future` switch between them. What a suspended one leaves in
//! memory is sealed on arm64, and bound to its shadow stack (x86 SHSTK, arm64 GCS) where there is one. *Growable* ones ([`Stack`]) hold an
//! engine's managed code: they start at one page and grow by moving all their frames to a larger segment. Return addresses signed by
//! arm64 pointer authentication are authenticated and signed again for their new place; a shadow stack is never written.
//!
//! The modules, in the direction of imports (later ones import earlier ones, never the other way):
//!
//! | | |
//! |---|---|
//! | [`pac`], `error`, `tamper` | raw and signed addresses; why something is refused; the end for evidence of tampering |
//! | `abi`, `arch`, `published` | what `asm/` and Rust share; the stubs' declarations; the read-only page |
//! | [`features`] | what CPU, kernel and thread enforce |
//! | `segment`, `shadow`, [`thread`] | data segments; shadow stacks; attaching a thread |
//! | [`codemap`], `signer` | the layout of managed frames; authenticate, re-sign for another place or, in its place, for another key domain, by the CPU or by a software model |
//! | `walk`, `plan`, `steps`, `relocate` | from frames to a plan to the move |
//! | `system`, `directory`, `slab`, `budget`, [`pool`] | system calls that can be made to fail; which data and shadow stack a slot has, read-only; many stacks in one mapping; what they may use; leasing them |
//! | `switch` | the verbs that change stacks |
//! | `policy`, `link`, `lift`, `stack`, [`engine`] | the embedder's numbers; the segments of a stack; moving some frames to the next one; one growable stack; what engines use |
//! | [`coroutine`], [`continuation`], `future` | the faces of switching: safe Rust, an engine's effect handlers, await on a stack |
//! | `ensure` | room for native code: [`ensure()`] |
//! | [`fudge`], [`inspect`] | how much stack native code takes on managed segments; a stack as data, as text and as a drawing, and what all have done |
//!
//! A caller's mistake is a typed [`Error`] and the stack runs on. Evidence of tampering ends the process: by the
//! CPU's own fault, by a `brk` of ours, or by one line on stderr and SIGABRT.

mod abi;
pub mod codemap;
mod error;
pub mod inspect;
pub mod pac;
mod plan;
mod policy;
mod relocate;
mod segment;
mod signer;
#[cfg(any(test, feature = "model"))]
pub mod specimen;
#[cfg(feature = "steps")]
pub mod steps;
#[cfg(not(feature = "steps"))]
mod steps;
mod tamper;
#[cfg_attr(not(cfi_stack_native), allow(dead_code, reason = "nothing moves here but specimens"))]
mod totals;
mod walk;

#[cfg(cfi_stack_native)]
mod arch;
#[cfg(cfi_stack_native)]
mod budget;
#[cfg(cfi_stack_native)]
pub mod continuation;
#[cfg(cfi_stack_native)]
pub mod coroutine;
#[cfg(cfi_stack_native)]
mod directory;
#[cfg(cfi_stack_native)]
pub mod engine;
#[cfg(cfi_stack_native)]
mod ensure;
#[cfg(cfi_stack_native)]
pub mod features;
#[cfg(cfi_stack_native)]
pub mod fudge;
#[cfg(cfi_stack_native)]
pub mod future;
#[cfg(cfi_stack_native)]
mod lift;
#[cfg(cfi_stack_native)]
mod link;
#[cfg(cfi_stack_native)]
pub mod pool;
#[cfg(all(cfi_stack_native, feature = "steps"))]
pub mod probe;
#[cfg(cfi_stack_native)]
mod published;
#[cfg(cfi_stack_native)]
mod sanitizer;
#[cfg(cfi_stack_native)]
mod shadow;
#[cfg(cfi_stack_native)]
mod slab;
#[cfg(cfi_stack_native)]
mod stack;
#[cfg(cfi_stack_native)]
pub(crate) mod switch;
#[cfg(cfi_stack_native)]
mod system;
#[cfg(cfi_stack_native)]
pub mod thread;

#[cfg(cfi_stack_native)]
pub use ensure::ensure;
pub use error::Error;
pub use policy::Policy;
#[cfg(cfi_stack_native)]
pub use stack::{Exit, Stack, Stats};

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
