//! Exceptions, as ordinary returns with a status: a throw leaves tag and values in the context and goes to the innermost
//! handler of its function that catches it, or returns. Where a store has exceptions, the code behind each call
//! looks at the tag in the context and does the same.
//!
//! Handlers are not branched to from outside a function, so they need no landing pad under BTI, and no return is
//! skipped, so that a shadow stack stays in step (LOWERING.md tells what hides in `try_call`).

use super::{Translator, control};
use crate::context::Context;
use crate::error::Error;
use crate::trap::Trap;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{InstBuilder, Value};
use wasmparser::{Catch, Operator as Op};

impl Translator<'_, '_> {
    /// Translates an operator that throws; false if `op` is none.
    pub(super) fn exception(&mut self, op: &Op<'_>) -> Result<bool, Error> {
        match *op {
            Op::Throw { tag_index } => {
                let ty = self.func_type(self.scope.module.tags[tag_index as usize]);
                let args = self.pop_many(ty.params.len());
                let carried = self.e.address(args.len());
                for (index, arg) in args.into_iter().enumerate() {
                    self.e.set_slot(Context::THROWN, index, arg);
                }
                self.e.set_word(Context::CARRIED, carried);
                let tag = self.tag(tag_index);
                self.e.set_word(Context::EXCEPTION, tag);
                self.handle(tag);
            }
            Op::ThrowRef => {
                let reference = self.pop();
                self.e.b.ins().trapz(reference, Trap::NullReference.cranelift());
                self.e.call_host(self.scope.addresses.operations.throw_ref, &[reference]);
                let tag = self.e.word(Context::EXCEPTION);
                self.handle(tag);
            }
            _ => return Ok(false),
        }
        self.reachable = false;
        Ok(true)
    }

    /// Behind a call: an exception that came back with it goes on to its handler.
    pub(super) fn look_for_exception(&mut self) {
        if !self.scope.throws {
            return;
        }
        let tag = self.e.word(Context::EXCEPTION);
        let (thrown, next) = (self.block(&[]), self.block(&[]));
        self.e.b.set_cold_block(thrown);
        self.e.b.ins().brif(tag, thrown, &[], next, &[]);
        self.e.b.seal_block(thrown);
        self.e.b.seal_block(next);
        self.e.b.switch_to_block(thrown);
        self.handle(tag);
        self.e.b.switch_to_block(next);
    }

    fn tag(&mut self, index: u32) -> Value {
        self.e.b.ins().iconst(I64, self.scope.addresses.tags[index as usize] as i64)
    }

    /// Goes to the handler of the exception in flight, whose tag is `thrown`, or returns; the block ends.
    fn handle(&mut self, thrown: Value) {
        for (around, catches) in self.catches() {
            for catch in catches.iter() {
                let (tag, label, reference) = match *catch {
                    Catch::One { tag, label } => (Some(tag), label, false),
                    Catch::OneRef { tag, label } => (Some(tag), label, true),
                    Catch::All { label } => (None, label, false),
                    Catch::AllRef { label } => (None, label, true),
                };
                let Some(tag) = tag else {
                    self.caught(around, label, vec![], reference);
                    return;
                };
                let expected = self.tag(tag);
                let equal = self.e.b.ins().icmp(IntCC::Equal, thrown, expected);
                let (hit, missed) = (self.block(&[]), self.block(&[]));
                self.e.b.ins().brif(equal, hit, &[], missed, &[]);
                self.e.b.seal_block(hit);
                self.e.b.seal_block(missed);
                self.e.b.switch_to_block(hit);
                let ty = self.func_type(self.scope.module.tags[tag as usize]);
                let slots = ty.params.iter().enumerate();
                let values = slots.map(|(at, ty)| self.e.slot(Context::THROWN, at, ty.repr())).collect();
                self.caught(around, label, values, reference);
                self.e.b.switch_to_block(missed);
            }
        }
        self.return_nothing();
    }

    /// Branches to a handler: label `label` as seen from outside the construct that `around` others are around.
    fn caught(&mut self, around: usize, label: u32, mut values: Vec<Value>, reference: bool) {
        if reference {
            self.e.call_host(self.scope.addresses.operations.catch, &[]);
            values.push(self.e.slot(Context::HOST, 0, I64));
        }
        let none = self.e.address(0);
        self.e.set_word(Context::EXCEPTION, none);
        let inside = (self.frames.len() - around) as u32;
        let (target, _) = self.target(label + inside);
        self.e.b.ins().jump(target, &control::block_args(&values));
    }
}
