//! The suite's values against the engine's.

use crate::types::{Heap, ValType, Value};
use wast::WastArg;
use wast::core::{AbstractHeapType, HeapType, NanPattern, WastArgCore, WastRetCore};

const FUNCREF: ValType = ValType::Ref { nullable: true, heap: Heap::NoFunc };
const NULL_EXTERN: ValType = ValType::Ref { nullable: true, heap: Heap::NoExtern };
const EXTERNREF: ValType = ValType::Ref { nullable: false, heap: Heap::Extern };

/// A host value as a reference: never null.
fn host_reference(number: u32) -> u64 {
    u64::from(number) + 1
}

/// An argument as a value; the error is the reason for a skip.
pub fn argument(arg: &WastArg<'_>) -> Result<Value, String> {
    let WastArg::Core(core) = arg else {
        return Err("component values".to_owned());
    };
    let (ty, bits) = match core {
        WastArgCore::I32(value) => (ValType::I32, u64::from(*value as u32)),
        WastArgCore::I64(value) => (ValType::I64, *value as u64),
        WastArgCore::F32(value) => (ValType::F32, u64::from(value.bits)),
        WastArgCore::F64(value) => (ValType::F64, value.bits),
        WastArgCore::RefExtern(number) | WastArgCore::RefHost(number) => (EXTERNREF, host_reference(*number)),
        WastArgCore::RefNull(HeapType::Abstract {
            ty: AbstractHeapType::Extern | AbstractHeapType::NoExtern, ..
        }) => (NULL_EXTERN, 0),
        WastArgCore::RefNull(_) => (FUNCREF, 0),
        WastArgCore::V128(_) => return Err("vectors (v128)".to_owned()),
    };
    Ok(Value { ty, bits })
}

/// Whether a result is what the suite expects.
pub fn matches_result(expected: &WastRetCore<'_>, value: &Value) -> bool {
    let reference = matches!(value.ty, ValType::Ref { .. });
    match expected {
        WastRetCore::I32(bits) => value.ty == ValType::I32 && value.bits == u64::from(*bits as u32),
        WastRetCore::I64(bits) => value.ty == ValType::I64 && value.bits == *bits as u64,
        WastRetCore::F32(pattern) => {
            value.ty == ValType::F32
                && match pattern {
                    NanPattern::CanonicalNan => value.bits & 0x7fff_ffff == 0x7fc0_0000,
                    NanPattern::ArithmeticNan => value.bits & 0x7fc0_0000 == 0x7fc0_0000,
                    NanPattern::Value(float) => value.bits == u64::from(float.bits),
                }
        }
        WastRetCore::F64(pattern) => {
            value.ty == ValType::F64
                && match pattern {
                    NanPattern::CanonicalNan => value.bits & (u64::MAX >> 1) == 0x7ff8 << 48,
                    NanPattern::ArithmeticNan => value.bits & (0x7ff8 << 48) == 0x7ff8 << 48,
                    NanPattern::Value(float) => value.bits == float.bits,
                }
        }
        WastRetCore::RefNull(_) => reference && value.bits == 0,
        WastRetCore::RefExtern(None) | WastRetCore::RefFunc(_) => reference && value.bits != 0,
        WastRetCore::RefExtern(Some(number)) | WastRetCore::RefHost(number) => {
            reference && value.bits == host_reference(*number)
        }
        WastRetCore::Either(list) => list.iter().any(|expected| matches_result(expected, value)),
        _ => false,
    }
}
