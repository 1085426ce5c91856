//! Raw and signed addresses as types, and how they are signed.
//!
//! Pointer authentication (Arm ARM D8.10, "Pointer authentication") puts a keyed MAC of an address and a 64-bit
//! *modifier* into the address' unused upper bits. A return address signed by compiled code has its stack
//! pointer at entry as modifier (AAPCS64 / PAuth ABI), so it is bound to its place: moving its frame means
//! authenticating it for the old place and signing it for the new one.

use std::fmt;

/// A code address without a signature.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct RawPc(usize);

impl RawPc {
    /// A code address that the caller vouches for: one of its own functions, or one that was authenticated.
    pub const fn new(address: usize) -> Self {
        RawPc(address)
    }

    /// The address.
    pub const fn address(self) -> usize {
        self.0
    }
}

impl fmt::Debug for RawPc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RawPc({:#x})", self.0)
    }
}

impl fmt::Display for RawPc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A return address as it stands in memory: signed, or on a CPU without signing plain; in either case not trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct SignedPc(u64);

impl SignedPc {
    /// The word as found in a frame record.
    pub const fn from_word(word: u64) -> Self {
        SignedPc(word)
    }

    /// The word as it stands in memory.
    pub const fn word(self) -> u64 {
        self.0
    }
}

/// A saved frame pointer as it stands in memory: signed, or on a CPU without signing plain; in either case not trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct SignedPointer(u64);

impl SignedPointer {
    /// The word as found in a frame record.
    pub const fn from_word(word: u64) -> Self {
        SignedPointer(word)
    }

    /// The word as it stands in memory.
    pub const fn word(self) -> u64 {
        self.0
    }
}

/// What a signature is bound to besides the address: for return addresses the stack pointer at entry, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Modifier(u64);

impl Modifier {
    /// A modifier by its value.
    pub const fn new(value: u64) -> Self {
        Modifier(value)
    }

    /// Its value.
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// With which key a function signs its return address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Signing {
    /// Not at all: x86-64, or code compiled without pac-ret.
    None = 0,
    /// Instruction key A (`paciasp`).
    A = 1,
    /// Instruction key B (`pacibsp`).
    B = 2,
}

impl Signing {
    #[cfg(any(test, feature = "model"))]
    /// The data key of the same letter.
    pub(crate) fn data_key(self) -> PointerSigning {
        match self {
            Signing::None => PointerSigning::None,
            Signing::A => PointerSigning::A,
            Signing::B => PointerSigning::B,
        }
    }

    #[cfg(any(test, feature = "model"))]
    /// The signing with this number; `None` when there is none.
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Signing::None),
            1 => Some(Signing::A),
            2 => Some(Signing::B),
            _ => None,
        }
    }
}

/// What the signature of a return address is bound to besides the address: its modifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Binding {
    /// The CFA, which is the stack pointer at entry: `paciasp`, `pacibsp`.
    Cfa,
    /// Zero: `paciaz`, `pacibz`. Such a frame is bound to no place: its return address authenticates in every frame of the
    /// process that signs so.
    Zero,
    /// The CFA with its upper 16 bits replaced by this number (`movk xN, #number, lsl #48`).
    Blended(u16),
}

impl Binding {
    /// The modifier in a frame with this CFA.
    #[inline]
    pub fn modifier(self, cfa: usize) -> Modifier {
        match self {
            Binding::Cfa => Modifier(cfa as u64),
            Binding::Zero => Modifier(0),
            Binding::Blended(number) => Modifier(cfa as u64 & (u64::MAX >> 16) | u64::from(number) << 48),
        }
    }
}

/// With which key a function signs the frame pointer that it saves. The modifier is the address of the slot that holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum PointerSigning {
    /// Not at all.
    None = 0,
    /// Data key A (`pacda`).
    A = 1,
    /// Data key B (`pacdb`).
    B = 2,
}

/// Evidence of tampering: a word that is not what it must be. A failed authentication is reported so by the software model
/// alone; on hardware the CPU, or the stub's own `brk`, has ended the process by then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tampered {
    /// What did not fit.
    pub evidence: &'static str,
    /// Where: the address of the word.
    pub slot: usize,
}
