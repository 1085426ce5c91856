//! Everything that can go wrong on the way to a result, as one type.

use crate::trap::Trap;
use std::fmt;

/// Why no result came.
#[derive(Debug)]
pub enum Error {
    /// The command line, or what it asks for, cannot be.
    Usage(String),
    /// The module is malformed or does not validate.
    Invalid(String),
    /// The module is valid and uses what this engine does not implement.
    Unsupported(String),
    /// An import is missing or has another type.
    Link(String),
    /// The program trapped.
    Trap(Trap),
    /// The program recursed beyond the stack's maximum.
    Exhausted(cfi_stack::Error),
    /// Calls of the program by the host, each within the one before, went too deep: this many.
    Nested(usize),
    /// The program ended itself with a status.
    Exit(i32),
    /// The stack library refused.
    Stack(cfi_stack::Error),
    /// The system refused memory or signal handlers.
    System(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(text) | Error::System(text) => f.write_str(text),
            Error::Invalid(text) => write!(f, "invalid module: {text}"),
            Error::Unsupported(text) => write!(f, "unsupported: {text}"),
            Error::Link(text) => write!(f, "cannot link: {text}"),
            Error::Trap(trap) => write!(f, "trap: {trap}"),
            Error::Exhausted(error) => write!(f, "trap: call stack exhausted ({error}); see --max"),
            Error::Nested(depth) => {
                write!(f, "trap: call stack exhausted ({depth} calls by the host within each other)")
            }
            Error::Exit(status) => write!(f, "the program ended itself with status {status}"),
            Error::Stack(error) => write!(f, "stack: {error}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<cfi_stack::Error> for Error {
    fn from(error: cfi_stack::Error) -> Self {
        match error {
            cfi_stack::Error::Overflow { .. } => Error::Exhausted(error),
            other => Error::Stack(other),
        }
    }
}

impl From<wasmparser::Error> for Error {
    fn from(error: wasmparser::Error) -> Self {
        Error::Invalid(error.to_string())
    }
}

/// Shorthand for [`Error::Unsupported`].
pub fn unsupported<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Unsupported(what.into()))
}
