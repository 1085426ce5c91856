//! Vectors: enough of them to pass them around, to fill them and to look into them. A value is sixteen lanes of a byte; an
//! instruction with other lanes sees the same bits as those.

use super::Translator;
use crate::error::Error;
use cranelift_codegen::ir::types::{F32X4, F64X2, I8, I8X16, I16, I16X8, I32, I32X4, I64X2};
use cranelift_codegen::ir::{ConstantData, Endianness, InstBuilder, MemFlagsData, Type, Value};
use wasmparser::Operator as Op;

/// The order of lanes in memory, on either ISA.
fn lanes() -> MemFlagsData {
    MemFlagsData::new().with_endianness(Endianness::Little)
}

impl Translator<'_, '_> {
    /// Translates a vector operator; false if `op` is none.
    pub(super) fn vector(&mut self, op: &Op<'_>) -> Result<bool, Error> {
        match op {
            Op::V128Const { value } => {
                let constant = self.e.b.func.dfg.constants.insert(ConstantData::from(&value.bytes()[..]));
                let value = self.e.b.ins().vconst(I8X16, constant);
                self.push(value);
            }
            Op::V128Load { memarg } => self.load(memarg, I8X16)?,
            Op::V128Store { memarg } => self.store(memarg)?,
            Op::I8x16Splat => self.splat(I8X16, Some(I8)),
            Op::I16x8Splat => self.splat(I16X8, Some(I16)),
            Op::I32x4Splat => self.splat(I32X4, None),
            Op::I64x2Splat => self.splat(I64X2, None),
            Op::F32x4Splat => self.splat(F32X4, None),
            Op::F64x2Splat => self.splat(F64X2, None),
            Op::I8x16ExtractLaneS { lane } => self.extract_narrow(I8X16, *lane, true),
            Op::I8x16ExtractLaneU { lane } => self.extract_narrow(I8X16, *lane, false),
            Op::I16x8ExtractLaneS { lane } => self.extract_narrow(I16X8, *lane, true),
            Op::I16x8ExtractLaneU { lane } => self.extract_narrow(I16X8, *lane, false),
            Op::I32x4ExtractLane { lane } => self.extract(I32X4, *lane),
            Op::I64x2ExtractLane { lane } => self.extract(I64X2, *lane),
            Op::F32x4ExtractLane { lane } => self.extract(F32X4, *lane),
            Op::F64x2ExtractLane { lane } => self.extract(F64X2, *lane),
            Op::I32x4ReplaceLane { lane } => self.replace(I32X4, *lane),
            Op::I64x2ReplaceLane { lane } => self.replace(I64X2, *lane),
            Op::F32x4ReplaceLane { lane } => self.replace(F32X4, *lane),
            Op::F64x2ReplaceLane { lane } => self.replace(F64X2, *lane),
            Op::I8x16Add => self.pairwise(I8X16, |e, a, b| e.b.ins().iadd(a, b)),
            Op::I16x8Add => self.pairwise(I16X8, |e, a, b| e.b.ins().iadd(a, b)),
            Op::I32x4Add => self.pairwise(I32X4, |e, a, b| e.b.ins().iadd(a, b)),
            Op::I64x2Add => self.pairwise(I64X2, |e, a, b| e.b.ins().iadd(a, b)),
            Op::I8x16Sub => self.pairwise(I8X16, |e, a, b| e.b.ins().isub(a, b)),
            Op::I16x8Sub => self.pairwise(I16X8, |e, a, b| e.b.ins().isub(a, b)),
            Op::I32x4Sub => self.pairwise(I32X4, |e, a, b| e.b.ins().isub(a, b)),
            Op::I64x2Sub => self.pairwise(I64X2, |e, a, b| e.b.ins().isub(a, b)),
            Op::F32x4Add => self.pairwise(F32X4, |e, a, b| e.b.ins().fadd(a, b)),
            Op::F64x2Add => self.pairwise(F64X2, |e, a, b| e.b.ins().fadd(a, b)),
            Op::V128And => self.pairwise(I8X16, |e, a, b| e.b.ins().band(a, b)),
            Op::V128Or => self.pairwise(I8X16, |e, a, b| e.b.ins().bor(a, b)),
            Op::V128Xor => self.pairwise(I8X16, |e, a, b| e.b.ins().bxor(a, b)),
            Op::V128AnyTrue => {
                let vector = self.pop();
                let any = self.e.b.ins().vany_true(vector);
                let value = self.e.b.ins().uextend(I32, any);
                self.push(value);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn pop_as(&mut self, ty: Type) -> Value {
        let vector = self.pop();
        if ty == I8X16 { vector } else { self.e.b.ins().bitcast(ty, lanes(), vector) }
    }

    fn push_vector(&mut self, vector: Value) {
        let bytes = match self.e.b.func.dfg.value_type(vector) {
            I8X16 => vector,
            _ => self.e.b.ins().bitcast(I8X16, lanes(), vector),
        };
        self.push(bytes);
    }

    fn splat(&mut self, ty: Type, narrowed: Option<Type>) {
        let mut lane = self.pop();
        if let Some(narrow) = narrowed {
            lane = self.e.b.ins().ireduce(narrow, lane);
        }
        let vector = self.e.b.ins().splat(ty, lane);
        self.push_vector(vector);
    }

    fn extract(&mut self, ty: Type, lane: u8) {
        let vector = self.pop_as(ty);
        let value = self.e.b.ins().extractlane(vector, lane);
        self.push(value);
    }

    fn extract_narrow(&mut self, ty: Type, lane: u8, signed: bool) {
        self.extract(ty, lane);
        let narrow = self.pop();
        let value = if signed { self.e.b.ins().sextend(I32, narrow) } else { self.e.b.ins().uextend(I32, narrow) };
        self.push(value);
    }

    fn replace(&mut self, ty: Type, lane: u8) {
        let value = self.pop();
        let vector = self.pop_as(ty);
        let vector = self.e.b.ins().insertlane(vector, value, lane);
        self.push_vector(vector);
    }

    fn pairwise(&mut self, ty: Type, operation: impl FnOnce(&mut crate::emit::Emitter<'_>, Value, Value) -> Value) {
        let second = self.pop_as(ty);
        let first = self.pop_as(ty);
        let value = operation(&mut self.e, first, second);
        self.push_vector(value);
    }
}
