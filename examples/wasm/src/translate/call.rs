//! Calls: direct, through a table, through a reference.

use super::{Callee, Translator};
use crate::emit::{signature, trusted};
use crate::error::Error;
use crate::object::{Function, Table};
use crate::trap::Trap;
use crate::types::TypeId;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, Value};
use std::mem::offset_of;
use wasmparser::Operator as Op;

impl Translator<'_, '_> {
    /// Translates a call; false if `op` is none.
    pub(super) fn call_operator(&mut self, op: &Op<'_>) -> Result<bool, Error> {
        match *op {
            Op::Call { function_index } => {
                let ty = self.scope.module.funcs[function_index as usize];
                let callee = match self.scope.addresses.imported_code.get(function_index as usize) {
                    Some(&Some(code)) => Callee::Address(self.e.address(code)),
                    _ => Callee::Local((self.declare)(self.e.b.func, function_index)),
                };
                self.call(callee, ty);
            }
            Op::CallIndirect { type_index, table_index } => {
                let ty = self.scope.module.types[type_index as usize];
                let index = self.pop();
                let reference = self.element(table_index, index, Trap::UndefinedElement);
                let function = self.e.b.ins().load(I64, trusted(), reference, 0);
                self.e.b.ins().trapz(function, Trap::UninitializedElement.cranelift());
                let actual = self.e.b.ins().load(I64, trusted(), function, offset_of!(Function, ty) as i32);
                let expected = self.e.b.ins().iconst(I64, i64::from(ty.0));
                let equal = self.e.b.ins().icmp(IntCC::Equal, actual, expected);
                self.e.b.ins().trapz(equal, Trap::IndirectCallType.cranelift());
                self.call_reference(function, ty);
            }
            Op::CallRef { type_index } => {
                let function = self.pop();
                self.e.b.ins().trapz(function, Trap::NullReference.cranelift());
                self.call_reference(function, self.scope.module.types[type_index as usize]);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn call_reference(&mut self, function: Value, ty: TypeId) {
        let code = self.e.b.ins().load(I64, trusted(), function, offset_of!(Function, code) as i32);
        self.call(Callee::Address(code), ty);
    }

    fn call(&mut self, callee: Callee, ty: TypeId) {
        let ty = self.func_type(ty);
        let args = self.pop_many(ty.params.len());
        let signature = self.e.b.import_signature(signature(ty));
        let results = self.e.call(callee, ty, signature, &args);
        self.stack.extend(results);
    }

    /// Address of a table's element; outside the table, the trap.
    pub(super) fn element(&mut self, table: u32, index: Value, trap: Trap) -> Value {
        let view = self.e.address(self.scope.addresses.tables[table as usize]);
        let len = self.e.b.ins().load(I64, trusted(), view, Table::LEN);
        let base = self.e.b.ins().load(I64, trusted(), view, Table::BASE);
        let index = self.e.b.ins().uextend(I64, index);
        let inside = self.e.b.ins().icmp(IntCC::UnsignedLessThan, index, len);
        self.e.b.ins().trapz(inside, trap.cranelift());
        let eight = self.e.b.ins().iconst(I64, 8);
        let offset = self.e.b.ins().imul(index, eight);
        self.e.b.ins().iadd(base, offset)
    }
}
