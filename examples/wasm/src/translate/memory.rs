//! Loads, stores and operations on whole memories.

use super::Translator;
use crate::emit::trusted;
use crate::error::{Error, unsupported};
use cranelift_codegen::ir::types::{F32, F64, I32, I64};
use cranelift_codegen::ir::{InstBuilder, MemFlagsData, TrapCode, Type, Value};
use wasmparser::{MemArg, MemArgTarget, Operator as Op};

/// Memory of the program: a fault there is a trap.
fn checked() -> MemFlagsData {
    MemFlagsData::new().with_trap_code(Some(TrapCode::HEAP_OUT_OF_BOUNDS))
}

impl Translator<'_, '_> {
    /// Translates a memory or global operator; false if `op` is none.
    pub(super) fn memory_operator(&mut self, op: &Op<'_>) -> Result<bool, Error> {
        macro_rules! narrow {
            ($memarg:expr, $load:ident $ty:ident) => {{
                let (base, offset) = self.place($memarg)?;
                let value = self.e.b.ins().$load($ty, checked(), base, offset);
                self.push(value);
            }};
            ($memarg:expr, $load:ident) => {{
                let (base, offset) = self.place($memarg)?;
                let value = self.e.b.ins().$load(checked(), base, offset);
                self.push(value);
            }};
            (store $memarg:expr, $store:ident) => {{
                let value = self.pop();
                let (base, offset) = self.place($memarg)?;
                self.e.b.ins().$store(checked(), value, base, offset);
            }};
        }
        match op {
            Op::I32Load { memarg } => self.load(memarg, I32)?,
            Op::I64Load { memarg } => self.load(memarg, I64)?,
            Op::F32Load { memarg } => self.load(memarg, F32)?,
            Op::F64Load { memarg } => self.load(memarg, F64)?,
            Op::I32Load8S { memarg } => narrow!(memarg, sload8 I32),
            Op::I32Load8U { memarg } => narrow!(memarg, uload8 I32),
            Op::I32Load16S { memarg } => narrow!(memarg, sload16 I32),
            Op::I32Load16U { memarg } => narrow!(memarg, uload16 I32),
            Op::I64Load8S { memarg } => narrow!(memarg, sload8 I64),
            Op::I64Load8U { memarg } => narrow!(memarg, uload8 I64),
            Op::I64Load16S { memarg } => narrow!(memarg, sload16 I64),
            Op::I64Load16U { memarg } => narrow!(memarg, uload16 I64),
            Op::I64Load32S { memarg } => narrow!(memarg, sload32),
            Op::I64Load32U { memarg } => narrow!(memarg, uload32),
            Op::I32Store { memarg } | Op::I64Store { memarg } | Op::F32Store { memarg } | Op::F64Store { memarg } => {
                self.store(memarg)?;
            }
            Op::I32Store8 { memarg } | Op::I64Store8 { memarg } => narrow!(store memarg, istore8),
            Op::I32Store16 { memarg } | Op::I64Store16 { memarg } => narrow!(store memarg, istore16),
            Op::I64Store32 { memarg } => narrow!(store memarg, istore32),
            Op::MemorySize { mem } => {
                let size = self.e.address(self.scope.addresses.memories[*mem as usize].1);
                let pages = self.e.b.ins().load(I64, trusted(), size, 0);
                let pages = self.e.b.ins().ireduce(I32, pages);
                self.push(pages);
            }
            Op::MemoryGrow { mem } => self.host(self.scope.addresses.operations.memory_grow[*mem as usize], 1, true),
            Op::MemoryFill { mem } => self.host(self.scope.addresses.operations.memory_fill[*mem as usize], 3, false),
            Op::MemoryCopy { dst_mem, src_mem } => {
                let copy = &self.scope.addresses.operations.memory_copy;
                self.host(copy[*dst_mem as usize][*src_mem as usize], 3, false);
            }
            Op::MemoryInit { data_index, mem } => {
                let init = &self.scope.addresses.operations.memory_init;
                self.host(init[*mem as usize][*data_index as usize], 3, false);
            }
            Op::DataDrop { data_index } => {
                self.host(self.scope.addresses.operations.data_drop[*data_index as usize], 0, false);
            }
            Op::GlobalGet { global_index } => {
                let ty = self.scope.module.globals[*global_index as usize].0.content.repr();
                let address = self.e.address(self.scope.addresses.globals[*global_index as usize]);
                let value = self.e.b.ins().load(ty, trusted(), address, 0);
                self.push(value);
            }
            Op::GlobalSet { global_index } => {
                let value = self.pop();
                let address = self.e.address(self.scope.addresses.globals[*global_index as usize]);
                self.e.b.ins().store(trusted(), value, address, 0);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Calls a host operation with the top `args` operands; with `result` it leaves a 32-bit integer.
    pub(super) fn host(&mut self, operation: usize, args: usize, result: bool) {
        let args = self.pop_many(args);
        self.e.call_host(operation, &args);
        if result {
            let value = self.e.slot(crate::context::Context::HOST, 0, I32);
            self.push(value);
        }
    }

    pub(super) fn load(&mut self, memarg: &MemArg, ty: Type) -> Result<(), Error> {
        let (base, offset) = self.place(memarg)?;
        let value = self.e.b.ins().load(ty, checked(), base, offset);
        self.push(value);
        Ok(())
    }

    pub(super) fn store(&mut self, memarg: &MemArg) -> Result<(), Error> {
        let value = self.pop();
        let (base, offset) = self.place(memarg)?;
        self.e.b.ins().store(checked(), value, base, offset);
        Ok(())
    }

    /// The place of an access, as an address and an offset that fits the instruction.
    fn place(&mut self, memarg: &MemArg) -> Result<(Value, i32), Error> {
        let MemArgTarget::Memory(memory) = memarg.target else {
            return unsupported("loads and stores of arrays");
        };
        let index = self.pop();
        let base = self.e.address(self.scope.addresses.memories[memory as usize].0);
        let index = self.e.b.ins().uextend(I64, index);
        let address = self.e.b.ins().iadd(base, index);
        match i32::try_from(memarg.offset) {
            Ok(offset) => Ok((address, offset)),
            Err(_) => {
                let offset = self.e.b.ins().iconst(I64, memarg.offset as i64);
                Ok((self.e.b.ins().iadd(address, offset), 0))
            }
        }
    }
}
