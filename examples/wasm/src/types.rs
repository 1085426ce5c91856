//! Types and values. Function types are interned, so that two of them are equal exactly when their numbers are:
//! `call_indirect` compares one word, across modules too.

use crate::error::{Error, unsupported};
use cranelift_codegen::ir::{Type, types};
use std::collections::HashMap;
use std::fmt;

/// The number of an interned function type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TypeId(pub u32);

/// What a reference may point to. Every reference is one 64-bit word, null is zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Heap {
    /// Any function.
    Func,
    /// No function: only null.
    NoFunc,
    /// A value of the host.
    Extern,
    /// No host value: only null.
    NoExtern,
    /// A function of this type.
    Typed(TypeId),
    /// A caught exception.
    Exn,
    /// No exception: only null.
    NoExn,
}

/// A value type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ValType {
    /// 32-bit integer.
    I32,
    /// 64-bit integer.
    I64,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// A vector of 16 bytes.
    V128,
    /// A reference.
    Ref {
        /// Null belongs to the type.
        nullable: bool,
        /// What it points to.
        heap: Heap,
    },
}

impl ValType {
    /// How Cranelift holds such a value.
    pub fn repr(self) -> Type {
        match self {
            ValType::I32 => types::I32,
            ValType::I64 | ValType::Ref { .. } => types::I64,
            ValType::F32 => types::F32,
            ValType::F64 => types::F64,
            ValType::V128 => types::I8X16,
        }
    }

    /// Whether a value fits the 64 bits in which the host holds values.
    pub fn fits_host(self) -> bool {
        self != ValType::V128
    }

    /// The bits of a slot that belong to a value of this type.
    pub fn mask(self, slot: u64) -> u64 {
        match self {
            ValType::I32 | ValType::F32 => slot & 0xffff_ffff,
            _ => slot,
        }
    }

    /// Whether every value of `self` is one of `other`.
    pub fn is_subtype(self, other: ValType) -> bool {
        match (self, other) {
            (ValType::Ref { nullable: a, heap }, ValType::Ref { nullable: b, heap: above }) => {
                (b || !a)
                    && (heap == above
                        || matches!(
                            (heap, above),
                            (Heap::NoFunc | Heap::Typed(_), Heap::Func)
                                | (Heap::NoFunc, Heap::Typed(_))
                                | (Heap::NoExtern, Heap::Extern)
                                | (Heap::NoExn, Heap::Exn)
                        ))
            }
            _ => self == other,
        }
    }
}

impl fmt::Display for ValType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ValType::I32 => "i32",
            ValType::I64 => "i64",
            ValType::F32 => "f32",
            ValType::F64 => "f64",
            ValType::V128 => "v128",
            ValType::Ref { heap: Heap::Exn | Heap::NoExn, .. } => "exnref",
            ValType::Ref { heap: Heap::Extern | Heap::NoExtern, .. } => "externref",
            ValType::Ref { .. } => "funcref",
        })
    }
}

/// A function type.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct FuncType {
    /// Parameters.
    pub params: Vec<ValType>,
    /// Results.
    pub results: Vec<ValType>,
}

impl fmt::Display for FuncType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |of: &[ValType]| of.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        write!(f, "[{}] -> [{}]", list(&self.params), list(&self.results))
    }
}

/// The interned function types.
#[derive(Default)]
pub struct Types {
    list: Vec<FuncType>,
    numbers: HashMap<FuncType, TypeId>,
}

impl Types {
    /// The number of this type.
    pub fn intern(&mut self, ty: FuncType) -> TypeId {
        if let Some(&id) = self.numbers.get(&ty) {
            return id;
        }
        let id = TypeId(u32::try_from(self.list.len()).expect("fewer than 2^32 types fit in memory"));
        self.list.push(ty.clone());
        self.numbers.insert(ty, id);
        id
    }

    /// The type with this number.
    pub fn get(&self, id: TypeId) -> &FuncType {
        &self.list[id.0 as usize]
    }
}

/// A value at the host's side: its type and the 64 bits of its slot.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Value {
    /// Its type.
    pub ty: ValType,
    /// Its bits, zero above the type's width.
    pub bits: u64,
}

impl Value {
    /// Reads a command-line argument. Integers may be signed, unsigned or `0x` hexadecimal.
    ///
    /// # Errors
    /// [`Error::Usage`] when the text is no such value.
    pub fn parse(ty: ValType, text: &str) -> Result<Value, Error> {
        let wrong = || Error::Usage(format!("`{text}` is not a value of type {ty}"));
        let integer = |low: i128, high: i128| -> Result<i128, Error> {
            let (sign, digits) = match text.strip_prefix('-') {
                Some(rest) => (-1, rest),
                None => (1, text),
            };
            let magnitude = match digits.strip_prefix("0x") {
                Some(hex) => i128::from_str_radix(hex, 16),
                None => digits.parse(),
            };
            let value = magnitude.ok().filter(|m| *m >= 0).and_then(|m| m.checked_mul(sign)).ok_or_else(wrong)?;
            if (low..=high).contains(&value) { Ok(value) } else { Err(wrong()) }
        };
        let bits = match ty {
            ValType::I32 => integer(i32::MIN.into(), u32::MAX.into())? as u32 as u64,
            ValType::I64 => integer(i64::MIN.into(), u64::MAX.into())? as u64,
            ValType::F32 => u64::from(text.parse::<f32>().map_err(|_| wrong())?.to_bits()),
            ValType::F64 => text.parse::<f64>().map_err(|_| wrong())?.to_bits(),
            ValType::Ref { nullable: true, .. } if text == "null" => 0,
            ValType::V128 | ValType::Ref { .. } => {
                return unsupported(format!("an argument of type {ty}, unless it is `null`"));
            }
        };
        Ok(Value { ty, bits })
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ty {
            ValType::I32 => write!(f, "{}", self.bits as i32),
            ValType::I64 => write!(f, "{}", self.bits as i64),
            ValType::F32 => write!(f, "{:?}", f32::from_bits(self.bits as u32)),
            ValType::F64 => write!(f, "{:?}", f64::from_bits(self.bits)),
            ValType::Ref { .. } if self.bits == 0 => write!(f, "null"),
            ValType::V128 | ValType::Ref { .. } => write!(f, "{}", self.ty),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_by_type() {
        let read = |ty, text| Value::parse(ty, text).map(|value| value.bits).ok();
        assert_eq!(read(ValType::I32, "-1"), Some(0xffff_ffff));
        assert_eq!(read(ValType::I32, "4294967295"), Some(0xffff_ffff));
        assert_eq!(read(ValType::I32, "4294967296"), None);
        assert_eq!(read(ValType::I32, "1.5"), None);
        assert_eq!(read(ValType::I32, "--1"), None);
        assert_eq!(read(ValType::I64, "0xffffffffffffffff"), Some(u64::MAX));
        assert_eq!(read(ValType::I64, "-9223372036854775808"), Some(1 << 63));
        assert_eq!(read(ValType::F64, "0.5"), Some(0.5f64.to_bits()));
        assert_eq!(read(ValType::F64, "half"), None);
    }

    #[test]
    fn equal_types_have_equal_numbers() {
        let mut types = Types::default();
        let one = FuncType { params: vec![ValType::I32], results: vec![] };
        let a = types.intern(one.clone());
        let b = types.intern(FuncType::default());
        assert_ne!(a, b);
        assert_eq!(types.intern(one), a);
    }

    #[test]
    fn null_is_below_every_reference_of_its_kind() {
        let of = |nullable, heap| ValType::Ref { nullable, heap };
        assert!(of(false, Heap::Func).is_subtype(of(true, Heap::Func)));
        assert!(!of(true, Heap::Func).is_subtype(of(false, Heap::Func)));
        assert!(of(true, Heap::Typed(TypeId(3))).is_subtype(of(true, Heap::Func)));
        assert!(!of(true, Heap::Extern).is_subtype(of(true, Heap::Func)));
    }
}
