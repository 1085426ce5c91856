//! References and tables.

use super::Translator;
use crate::emit::trusted;
use crate::error::Error;
use crate::trap::Trap;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{I32, I64};
use cranelift_codegen::ir::{InstBuilder, Value};
use wasmparser::Operator as Op;

impl Translator<'_, '_> {
    /// Translates a reference or table operator; false if `op` is none.
    pub(super) fn reference(&mut self, op: &Op<'_>) -> Result<bool, Error> {
        let operations = &self.scope.addresses.operations;
        match *op {
            Op::RefNull { .. } => {
                let null = self.e.b.ins().iconst(I64, 0);
                self.push(null);
            }
            Op::RefIsNull => {
                let reference = self.pop();
                let truth = self.is_null(reference);
                let value = self.e.b.ins().uextend(I32, truth);
                self.push(value);
            }
            Op::RefFunc { function_index } => {
                let reference = self.e.address(self.scope.addresses.functions[function_index as usize]);
                self.push(reference);
            }
            Op::RefAsNonNull => {
                let reference = self.top();
                self.e.b.ins().trapz(reference, Trap::NullReference.cranelift());
            }
            Op::BrOnNull { relative_depth } => {
                let reference = self.pop();
                self.branch_if(reference, relative_depth, false);
                self.push(reference);
            }
            Op::BrOnNonNull { relative_depth } => {
                let reference = self.top();
                self.branch_if(reference, relative_depth, true);
                self.pop();
            }
            Op::TableGet { table } => {
                let index = self.pop();
                let element = self.element(table, index, Trap::TableOutOfBounds);
                let reference = self.e.b.ins().load(I64, trusted(), element, 0);
                self.push(reference);
            }
            Op::TableSet { table } => {
                let (index, reference) = self.pop2();
                let element = self.element(table, index, Trap::TableOutOfBounds);
                self.e.b.ins().store(trusted(), reference, element, 0);
            }
            Op::TableSize { table } => {
                let view = self.e.address(self.scope.addresses.tables[table as usize]);
                let len = self.e.b.ins().load(I32, trusted(), view, crate::object::Table::LEN);
                self.push(len);
            }
            Op::TableGrow { table } => self.host(operations.table_grow[table as usize], 2, true),
            Op::TableFill { table } => self.host(operations.table_fill[table as usize], 3, false),
            Op::TableCopy { dst_table, src_table } => {
                self.host(operations.table_copy[dst_table as usize][src_table as usize], 3, false);
            }
            Op::TableInit { elem_index, table } => {
                self.host(operations.table_init[table as usize][elem_index as usize], 3, false);
            }
            Op::ElemDrop { elem_index } => self.host(operations.elem_drop[elem_index as usize], 0, false),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn is_null(&mut self, reference: Value) -> Value {
        let null = self.e.b.ins().iconst(I64, 0);
        self.e.b.ins().icmp(IntCC::Equal, reference, null)
    }
}
