//! The traps of WebAssembly and the numbers by which they leave managed code.

use cranelift_codegen::ir::TrapCode;
use std::fmt;

/// One trap. The number is Cranelift's user trap code and the code given to the library's `leave`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Trap {
    /// `unreachable` was executed.
    Unreachable = 1,
    /// A load, store or bulk operation outside memory.
    MemoryOutOfBounds,
    /// A table operation outside the table.
    TableOutOfBounds,
    /// `call_indirect` with an index outside the table.
    UndefinedElement,
    /// `call_indirect` of a null entry.
    UninitializedElement,
    /// `call_indirect` of a function of another type.
    IndirectCallType,
    /// A quotient or a conversion that does not fit.
    IntegerOverflow,
    /// Division by zero.
    DivisionByZero,
    /// Conversion of NaN to an integer.
    BadConversion,
    /// `call_ref` or `ref.as_non_null` of null.
    NullReference,
    /// A host function failed; its message is kept in the store.
    Host,
    /// The program ended itself; its status is kept in the store.
    Exit,
    /// An exception that nothing catches.
    UncaughtException,
    /// Code that cannot be reached was reached: an error of this engine.
    Internal,
}

const ALL: [Trap; 14] = [
    Trap::Unreachable,
    Trap::MemoryOutOfBounds,
    Trap::TableOutOfBounds,
    Trap::UndefinedElement,
    Trap::UninitializedElement,
    Trap::IndirectCallType,
    Trap::IntegerOverflow,
    Trap::DivisionByZero,
    Trap::BadConversion,
    Trap::NullReference,
    Trap::Host,
    Trap::Exit,
    Trap::UncaughtException,
    Trap::Internal,
];

impl Trap {
    /// The number that travels through `leave`.
    pub const fn code(self) -> u64 {
        self as u64
    }

    /// The trap with that number.
    pub fn from_code(code: u64) -> Option<Trap> {
        ALL.into_iter().find(|trap| trap.code() == code)
    }

    /// The trap that an instruction marked with this Cranelift code raises.
    pub fn from_cranelift(code: TrapCode) -> Trap {
        match code {
            TrapCode::HEAP_OUT_OF_BOUNDS => Trap::MemoryOutOfBounds,
            TrapCode::INTEGER_OVERFLOW => Trap::IntegerOverflow,
            TrapCode::INTEGER_DIVISION_BY_ZERO => Trap::DivisionByZero,
            TrapCode::BAD_CONVERSION_TO_INTEGER => Trap::BadConversion,
            other => Trap::from_code(u64::from(other.as_raw().get())).unwrap_or(Trap::Internal),
        }
    }

    /// The Cranelift code for an explicit trap instruction.
    pub fn cranelift(self) -> TrapCode {
        TrapCode::unwrap_user(self as u8)
    }
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trap::Unreachable => "unreachable",
            Trap::MemoryOutOfBounds => "out of bounds memory access",
            Trap::TableOutOfBounds => "out of bounds table access",
            Trap::UndefinedElement => "undefined element",
            Trap::UninitializedElement => "uninitialized element",
            Trap::IndirectCallType => "indirect call type mismatch",
            Trap::IntegerOverflow => "integer overflow",
            Trap::DivisionByZero => "integer divide by zero",
            Trap::BadConversion => "invalid conversion to integer",
            Trap::NullReference => "null reference",
            Trap::Host => "a host function failed",
            Trap::Exit => "the program ended itself",
            Trap::UncaughtException => "uncaught exception",
            Trap::Internal => "internal error of the engine",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_traps_are_one_to_one() {
        for trap in ALL {
            assert_eq!(Trap::from_code(trap.code()), Some(trap));
            assert_eq!(Trap::from_cranelift(trap.cranelift()), trap);
        }
        assert_eq!(Trap::from_code(0), None);
        assert_eq!(Trap::from_code(255), None);
    }
}
