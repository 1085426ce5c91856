//! Arithmetic, comparisons and conversions: one Cranelift instruction each, nearly always.

use super::Translator;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32, F64, I8, I16, I32, I64};
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, Type, Value};
use wasmparser::Operator as Op;

impl Translator<'_, '_> {
    /// Translates a numeric operator; false if `op` is none.
    pub(super) fn numeric(&mut self, op: &Op<'_>) -> bool {
        self.comparison(op) || self.binary(op) || self.unary(op) || self.conversion(op)
    }

    fn comparison(&mut self, op: &Op<'_>) -> bool {
        use FloatCC as F;
        use IntCC as I;
        let integer = match op {
            Op::I32Eqz | Op::I64Eqz => {
                let value = self.pop();
                let ty = self.e.b.func.dfg.value_type(value);
                let zero = self.e.b.ins().iconst(ty, 0);
                self.push_comparison(|b| b.ins().icmp(I::Equal, value, zero));
                return true;
            }
            Op::I32Eq | Op::I64Eq => Some(I::Equal),
            Op::I32Ne | Op::I64Ne => Some(I::NotEqual),
            Op::I32LtS | Op::I64LtS => Some(I::SignedLessThan),
            Op::I32LtU | Op::I64LtU => Some(I::UnsignedLessThan),
            Op::I32GtS | Op::I64GtS => Some(I::SignedGreaterThan),
            Op::I32GtU | Op::I64GtU => Some(I::UnsignedGreaterThan),
            Op::I32LeS | Op::I64LeS => Some(I::SignedLessThanOrEqual),
            Op::I32LeU | Op::I64LeU => Some(I::UnsignedLessThanOrEqual),
            Op::I32GeS | Op::I64GeS => Some(I::SignedGreaterThanOrEqual),
            Op::I32GeU | Op::I64GeU => Some(I::UnsignedGreaterThanOrEqual),
            _ => None,
        };
        if let Some(condition) = integer {
            let (a, b) = self.pop2();
            self.push_comparison(|builder| builder.ins().icmp(condition, a, b));
            return true;
        }
        let condition = match op {
            Op::F32Eq | Op::F64Eq => F::Equal,
            Op::F32Ne | Op::F64Ne => F::NotEqual,
            Op::F32Lt | Op::F64Lt => F::LessThan,
            Op::F32Gt | Op::F64Gt => F::GreaterThan,
            Op::F32Le | Op::F64Le => F::LessThanOrEqual,
            Op::F32Ge | Op::F64Ge => F::GreaterThanOrEqual,
            _ => return false,
        };
        let (a, b) = self.pop2();
        self.push_comparison(|builder| builder.ins().fcmp(condition, a, b));
        true
    }

    /// Pushes the truth that `compare` makes, as the 32-bit integer that WebAssembly has for it.
    fn push_comparison(&mut self, compare: impl FnOnce(&mut cranelift_frontend::FunctionBuilder<'_>) -> Value) {
        let truth = compare(&mut self.e.b);
        let value = self.e.b.ins().uextend(I32, truth);
        self.push(value);
    }

    fn binary(&mut self, op: &Op<'_>) -> bool {
        macro_rules! table {
            ($($($op:ident)|+ => $inst:ident,)*) => {
                match op {
                    $($(Op::$op)|+ => {
                        let (a, b) = self.pop2();
                        let value = self.e.b.ins().$inst(a, b);
                        self.push(value);
                        true
                    })*
                    _ => false,
                }
            };
        }
        table! {
            I32Add | I64Add => iadd,
            I32Sub | I64Sub => isub,
            I32Mul | I64Mul => imul,
            I32DivS | I64DivS => sdiv,
            I32DivU | I64DivU => udiv,
            I32RemS | I64RemS => srem,
            I32RemU | I64RemU => urem,
            I32And | I64And => band,
            I32Or | I64Or => bor,
            I32Xor | I64Xor => bxor,
            I32Shl | I64Shl => ishl,
            I32ShrS | I64ShrS => sshr,
            I32ShrU | I64ShrU => ushr,
            I32Rotl | I64Rotl => rotl,
            I32Rotr | I64Rotr => rotr,
            F32Add | F64Add => fadd,
            F32Sub | F64Sub => fsub,
            F32Mul | F64Mul => fmul,
            F32Div | F64Div => fdiv,
            F32Min | F64Min => fmin,
            F32Max | F64Max => fmax,
            F32Copysign | F64Copysign => fcopysign,
        }
    }

    fn unary(&mut self, op: &Op<'_>) -> bool {
        macro_rules! table {
            ($($($op:ident)|+ => $inst:ident,)*) => {
                match op {
                    $($(Op::$op)|+ => {
                        let a = self.pop();
                        let value = self.e.b.ins().$inst(a);
                        self.push(value);
                        true
                    })*
                    _ => false,
                }
            };
        }
        table! {
            I32Clz | I64Clz => clz,
            I32Ctz | I64Ctz => ctz,
            I32Popcnt | I64Popcnt => popcnt,
            F32Abs | F64Abs => fabs,
            F32Neg | F64Neg => fneg,
            F32Ceil | F64Ceil => ceil,
            F32Floor | F64Floor => floor,
            F32Trunc | F64Trunc => trunc,
            F32Nearest | F64Nearest => nearest,
            F32Sqrt | F64Sqrt => sqrt,
        }
    }

    fn conversion(&mut self, op: &Op<'_>) -> bool {
        macro_rules! table {
            ($($($op:ident)|+ => $inst:ident $ty:ident,)*) => {
                match op {
                    $($(Op::$op)|+ => {
                        let a = self.pop();
                        let value = self.e.b.ins().$inst($ty, a);
                        self.push(value);
                        true
                    })*
                    Op::I32Extend8S => self.extend_part(I8, I32),
                    Op::I32Extend16S => self.extend_part(I16, I32),
                    Op::I64Extend8S => self.extend_part(I8, I64),
                    Op::I64Extend16S => self.extend_part(I16, I64),
                    Op::I64Extend32S => self.extend_part(I32, I64),
                    Op::I32ReinterpretF32 => self.reinterpret(I32),
                    Op::I64ReinterpretF64 => self.reinterpret(I64),
                    Op::F32ReinterpretI32 => self.reinterpret(F32),
                    Op::F64ReinterpretI64 => self.reinterpret(F64),
                    _ => false,
                }
            };
        }
        table! {
            I32WrapI64 => ireduce I32,
            I64ExtendI32S => sextend I64,
            I64ExtendI32U => uextend I64,
            I32TruncF32S | I32TruncF64S => fcvt_to_sint I32,
            I32TruncF32U | I32TruncF64U => fcvt_to_uint I32,
            I64TruncF32S | I64TruncF64S => fcvt_to_sint I64,
            I64TruncF32U | I64TruncF64U => fcvt_to_uint I64,
            I32TruncSatF32S | I32TruncSatF64S => fcvt_to_sint_sat I32,
            I32TruncSatF32U | I32TruncSatF64U => fcvt_to_uint_sat I32,
            I64TruncSatF32S | I64TruncSatF64S => fcvt_to_sint_sat I64,
            I64TruncSatF32U | I64TruncSatF64U => fcvt_to_uint_sat I64,
            F32ConvertI32S | F32ConvertI64S => fcvt_from_sint F32,
            F32ConvertI32U | F32ConvertI64U => fcvt_from_uint F32,
            F64ConvertI32S | F64ConvertI64S => fcvt_from_sint F64,
            F64ConvertI32U | F64ConvertI64U => fcvt_from_uint F64,
            F32DemoteF64 => fdemote F32,
            F64PromoteF32 => fpromote F64,
        }
    }

    fn extend_part(&mut self, part: Type, whole: Type) -> bool {
        let value = self.pop();
        let low = self.e.b.ins().ireduce(part, value);
        let value = self.e.b.ins().sextend(whole, low);
        self.push(value);
        true
    }

    fn reinterpret(&mut self, ty: Type) -> bool {
        let value = self.pop();
        let value = self.e.b.ins().bitcast(ty, MemFlagsData::new(), value);
        self.push(value);
        true
    }
}
