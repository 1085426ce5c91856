//! Calls: direct, through a table, through a reference; and tail calls of the three kinds.
//!
//! In a module with tail calls every function has a body by Cranelift's `Tail` convention. Calls of the module's own functions go there,
//! and tail calls, wherever they go; a callee from a module without such calls is called by an intermediary of its type.

use super::{Callee, Target, Translator};
use crate::context::Context;
use crate::emit::trusted;
use crate::error::Error;
use crate::module::Module;
use crate::object::{Function, Table};
use crate::trap::Trap;
use crate::types::TypeId;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, Value};
use std::collections::BTreeSet;
use std::mem::offset_of;
use wasmparser::{FunctionBody, Operator as Op};

/// Whether a body makes tail calls; the interned types of those that may leave the module are added to `callees`.
///
/// # Errors
/// [`Error::Invalid`], which a validated body does not give.
pub fn tail_calls(module: &Module, body: &FunctionBody<'_>, callees: &mut BTreeSet<u32>) -> Result<bool, Error> {
    let mut any = false;
    for op in body.get_operators_reader()? {
        let ty = match op? {
            Op::ReturnCall { function_index } => module.funcs[function_index as usize],
            Op::ReturnCallIndirect { type_index, .. } | Op::ReturnCallRef { type_index } => {
                module.types[type_index as usize]
            }
            _ => continue,
        };
        callees.insert(ty.0);
        any = true;
    }
    Ok(any)
}

impl Translator<'_, '_> {
    /// Translates a call; false if `op` is none.
    pub(super) fn call_operator(&mut self, op: &Op<'_>) -> Result<bool, Error> {
        match *op {
            Op::Call { function_index } => {
                let ty = self.scope.module.funcs[function_index as usize];
                let callee = match self.scope.addresses.imported_code.get(function_index as usize) {
                    Some(&Some((code, _))) => Callee::Address(self.e.address(code)),
                    None if self.scope.tails => {
                        Callee::Body((self.declare)(self.e.b.func, Target::Body(function_index)))
                    }
                    _ => Callee::Local((self.declare)(self.e.b.func, Target::Function(function_index))),
                };
                self.call(callee, ty);
            }
            Op::CallIndirect { type_index, table_index } => {
                let (function, ty) = self.function_in_table(type_index, table_index);
                self.call_reference(function, ty);
            }
            Op::CallRef { type_index } => {
                let function = self.pop();
                self.e.b.ins().trapz(function, Trap::NullReference.cranelift());
                self.call_reference(function, self.scope.module.types[type_index as usize]);
            }
            Op::ReturnCall { function_index } => {
                let ty = self.scope.module.funcs[function_index as usize];
                match self.scope.addresses.imported_code.get(function_index as usize) {
                    None => {
                        let body = (self.declare)(self.e.b.func, Target::Body(function_index));
                        self.tail_call(Callee::Body(body), ty);
                    }
                    Some(&Some((code, 0))) => {
                        let code = self.e.address(code);
                        self.tail_call_out(code, ty);
                    }
                    Some(&Some((_, body))) => {
                        let body = self.e.address(body);
                        self.tail_call(Callee::BodyAt(body), ty);
                    }
                    Some(None) => {
                        let function = (self.declare)(self.e.b.func, Target::Function(function_index));
                        let code = self.e.b.ins().func_addr(I64, function);
                        self.tail_call_out(code, ty);
                    }
                }
            }
            Op::ReturnCallIndirect { type_index, table_index } => {
                let (function, ty) = self.function_in_table(type_index, table_index);
                self.tail_call_reference(function, ty);
            }
            Op::ReturnCallRef { type_index } => {
                let function = self.pop();
                self.e.b.ins().trapz(function, Trap::NullReference.cranelift());
                self.tail_call_reference(function, self.scope.module.types[type_index as usize]);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The function of this type that the operand names in a table.
    fn function_in_table(&mut self, type_index: u32, table_index: u32) -> (Value, TypeId) {
        let ty = self.scope.module.types[type_index as usize];
        let index = self.pop();
        let reference = self.element(table_index, index, Trap::UndefinedElement);
        let function = self.e.b.ins().load(I64, trusted(), reference, 0);
        self.e.b.ins().trapz(function, Trap::UninitializedElement.cranelift());
        let actual = self.e.b.ins().load(I64, trusted(), function, offset_of!(Function, ty) as i32);
        let expected = self.e.b.ins().iconst(I64, i64::from(ty.0));
        let equal = self.e.b.ins().icmp(IntCC::Equal, actual, expected);
        self.e.b.ins().trapz(equal, Trap::IndirectCallType.cranelift());
        (function, ty)
    }

    fn tail_call_reference(&mut self, function: Value, ty: TypeId) {
        let body = self.e.b.ins().load(I64, trusted(), function, offset_of!(Function, body) as i32);
        let (inside, outside) = (self.block(&[]), self.block(&[]));
        self.e.b.ins().brif(body, inside, &[], outside, &[]);
        let operands = self.stack.clone();
        self.e.b.switch_to_block(inside);
        self.e.b.seal_block(inside);
        self.tail_call(Callee::BodyAt(body), ty);
        self.stack = operands;
        self.e.b.switch_to_block(outside);
        self.e.b.seal_block(outside);
        let code = self.e.b.ins().load(I64, trusted(), function, offset_of!(Function, code) as i32);
        self.tail_call_out(code, ty);
    }

    /// A tail call of code that is called as the platform calls, by an intermediary.
    fn tail_call_out(&mut self, code: Value, ty: TypeId) {
        self.e.set_word(Context::TAIL_CALLEE, code);
        let intermediary = (self.declare)(self.e.b.func, Target::WayOut(ty));
        self.tail_call(Callee::Body(intermediary), ty);
    }

    /// Calls a body of type `ty` with the operands in this function's stead.
    fn tail_call(&mut self, callee: Callee, ty: TypeId) {
        let ty = self.func_type(ty);
        let args = self.pop_many(ty.params.len());
        self.e.tail_call(callee, ty, &args);
        self.reachable = false;
    }

    fn call_reference(&mut self, function: Value, ty: TypeId) {
        let code = self.e.b.ins().load(I64, trusted(), function, offset_of!(Function, code) as i32);
        self.call(Callee::Address(code), ty);
    }

    fn call(&mut self, callee: Callee, ty: TypeId) {
        let ty = self.func_type(ty);
        let args = self.pop_many(ty.params.len());
        let results = self.e.call(callee, ty, &args);
        self.stack.extend(results);
        self.look_for_exception();
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
