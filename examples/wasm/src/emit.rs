//! What every compiled function shares: the signature that its type is lowered to, the check of the stack limit,
//! calls, and calls to the host.
//!
//! The rules (see README.md): no pointer into the stack is ever a value of the code. The context comes first, then
//! up to [`MAX_DIRECT`] parameters; further parameters, and the results of functions with more than one, travel
//! through the context. Only the first instructions read the stack pointer.

use crate::context::{Context, Place};
use crate::trap::Trap;
use crate::types::FuncType;
use cfi_stack::engine::{Activation, Stubs};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::immediates::{Ieee32, Ieee64};
use cranelift_codegen::ir::types::{F32, F64, I64};
use cranelift_codegen::ir::{AbiParam, ConstantData, InstBuilder, MemFlagsData, SigRef, Signature, Type, Value};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::FunctionBuilder;

/// Parameters passed as the platform passes them. It bounds the argument area in every frame.
pub const MAX_DIRECT: usize = 12;

/// The signature of functions of this type: context, parameters, at most one result.
pub fn signature(ty: &FuncType) -> Signature {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params.push(AbiParam::new(I64));
    signature.params.extend(ty.params.iter().take(MAX_DIRECT).map(|ty| AbiParam::new(ty.repr())));
    if let [result] = ty.results[..] {
        signature.returns.push(AbiParam::new(result.repr()));
    }
    signature
}

/// Access to the engine's own data: aligned, never trapping.
pub fn trusted() -> MemFlagsData {
    MemFlagsData::trusted()
}

/// Whom a call goes to.
#[derive(Clone, Copy)]
pub enum Callee {
    /// A function of the module being compiled.
    Local(cranelift_codegen::ir::FuncRef),
    /// Code at an address.
    Address(Value),
}

/// A function being built.
pub struct Emitter<'f> {
    /// Cranelift's builder.
    pub b: FunctionBuilder<'f>,
    /// The first parameter.
    pub context: Value,
    stubs: Stubs,
}

impl<'f> Emitter<'f> {
    /// Opens the function: its entry block, with the parameters that come in registers and on the stack.
    pub fn new(mut b: FunctionBuilder<'f>, stubs: Stubs) -> (Emitter<'f>, Vec<Value>) {
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        b.seal_block(entry);
        let params = b.block_params(entry).to_vec();
        (Emitter { b, context: params[0], stubs }, params[1..].to_vec())
    }

    /// Tests the limit: below it, `grow` is called. With `below`, tests for that many bytes more than the frame.
    ///
    /// Must come before anything else, as it reads the stack pointer.
    pub fn check_stack(&mut self, below: u32) {
        let b = &mut self.b;
        let sp = b.ins().get_stack_pointer(I64);
        let limit = b.ins().load(I64, trusted(), self.context, Activation::LIMIT_OFFSET);
        let bytes = b.ins().iconst(I64, i64::from(below));
        let mut short = if below == 0 {
            b.ins().icmp(IntCC::UnsignedLessThan, sp, limit)
        } else {
            let low = b.ins().isub(sp, bytes);
            b.ins().icmp(IntCC::UnsignedLessThan, low, limit)
        };
        if below > 0 {
            let wraps = b.ins().icmp(IntCC::UnsignedLessThan, sp, bytes);
            short = b.ins().bor(short, wraps);
        }
        let (grow, body) = (b.create_block(), b.create_block());
        b.set_cold_block(grow);
        b.ins().brif(short, grow, &[], body, &[]);
        b.switch_to_block(grow);
        b.seal_block(grow);
        let mut signature = Signature::new(CallConv::PreserveAll);
        signature.params = vec![AbiParam::new(I64); 2];
        let signature = b.import_signature(signature);
        let stub = b.ins().iconst(I64, self.stubs.grow.address() as i64);
        b.ins().call_indirect(signature, stub, &[self.context, bytes]);
        b.ins().jump(body, &[]);
        b.switch_to_block(body);
        b.seal_block(body);
    }

    /// The address of something that stays.
    pub fn address(&mut self, address: usize) -> Value {
        self.b.ins().iconst(I64, address as i64)
    }

    /// Reads slot `index` of a place in the context.
    pub fn slot(&mut self, place: Place, index: usize, ty: Type) -> Value {
        self.b.ins().load(ty, trusted(), self.context, place.at(index))
    }

    /// Writes slot `index` of a place in the context.
    pub fn set_slot(&mut self, place: Place, index: usize, value: Value) {
        self.b.ins().store(trusted(), value, self.context, place.at(index));
    }

    /// Reads the word at an offset in the context.
    pub fn word(&mut self, offset: i32) -> Value {
        self.b.ins().load(I64, trusted(), self.context, offset)
    }

    /// Writes the word at an offset in the context.
    pub fn set_word(&mut self, offset: i32, value: Value) {
        self.b.ins().store(trusted(), value, self.context, offset);
    }

    /// Completes the parameters with those that come through the context.
    pub fn all_params(&mut self, ty: &FuncType, mut direct: Vec<Value>) -> Vec<Value> {
        for (index, ty) in ty.params.iter().enumerate().skip(direct.len()) {
            direct.push(self.slot(Context::PARAMS, index, ty.repr()));
        }
        direct
    }

    /// Calls a function of type `ty`.
    pub fn call(&mut self, callee: Callee, ty: &FuncType, signature: SigRef, args: &[Value]) -> Vec<Value> {
        for (index, arg) in args.iter().enumerate().skip(MAX_DIRECT) {
            self.set_slot(Context::PARAMS, index, *arg);
        }
        let mut direct = vec![self.context];
        direct.extend(args.iter().take(MAX_DIRECT));
        let call = match callee {
            Callee::Local(func) => self.b.ins().call(func, &direct),
            Callee::Address(code) => self.b.ins().call_indirect(signature, code, &direct),
        };
        self.results_of(ty, |b| b.inst_results(call).to_vec())
    }

    fn results_of(&mut self, ty: &FuncType, single: impl FnOnce(&FunctionBuilder<'_>) -> Vec<Value>) -> Vec<Value> {
        if ty.results.len() > 1 {
            let list: Vec<_> = ty.results.iter().map(|ty| ty.repr()).collect();
            return list.into_iter().enumerate().map(|(i, ty)| self.slot(Context::RESULTS, i, ty)).collect();
        }
        single(&self.b)
    }

    /// A value of this type without a meaning: zero.
    pub fn zero(&mut self, ty: Type) -> Value {
        match ty {
            F32 => self.b.ins().f32const(Ieee32::with_bits(0)),
            F64 => self.b.ins().f64const(Ieee64::with_bits(0)),
            vector if vector.is_vector() => {
                let zero = self.b.func.dfg.constants.insert(ConstantData::from(&[0; 16][..]));
                self.b.ins().vconst(vector, zero)
            }
            integer => self.b.ins().iconst(integer, 0),
        }
    }

    /// Returns from the function without a result that means anything: its caller looks at the context first.
    pub fn ret_nothing(&mut self, ty: &FuncType) {
        let values = match ty.results[..] {
            [single] => vec![self.zero(single.repr())],
            _ => vec![],
        };
        self.b.ins().return_(&values);
    }

    /// Returns from the function.
    pub fn ret(&mut self, values: &[Value]) {
        if values.len() > 1 {
            for (index, value) in values.iter().enumerate() {
                self.set_slot(Context::RESULTS, index, *value);
            }
            self.b.ins().return_(&[]);
        } else {
            self.b.ins().return_(values);
        }
    }

    /// Calls the host through `exit`: arguments into the context, then [`crate::host::dispatch`] on the thread's own
    /// stack with the operation at `operation`. A trap leaves through `leave`. Results are in the context's `host`.
    pub fn call_host(&mut self, operation: usize, args: &[Value]) {
        for (index, arg) in args.iter().enumerate() {
            self.set_slot(Context::HOST, index, *arg);
        }
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params = vec![AbiParam::new(I64); 5];
        signature.returns = vec![AbiParam::new(I64)];
        let signature = self.b.import_signature(signature);
        let exit = self.address(self.stubs.exit.address());
        let dispatch = self.address(crate::host::dispatch as *const () as usize);
        let operation = self.address(operation);
        let zero = self.address(0);
        let args = [self.context, dispatch, self.context, operation, zero];
        let call = self.b.ins().call_indirect(signature, exit, &args);
        let status = self.b.inst_results(call)[0];
        let (trapped, done) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(trapped);
        self.b.ins().brif(status, trapped, &[], done, &[]);
        self.b.switch_to_block(trapped);
        self.b.seal_block(trapped);
        self.leave(status);
        self.b.switch_to_block(done);
        self.b.seal_block(done);
    }

    /// Leaves managed code with a code in a value; the block ends.
    pub fn leave(&mut self, code: Value) {
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params = vec![AbiParam::new(I64); 2];
        let signature = self.b.import_signature(signature);
        let leave = self.address(self.stubs.leave.address());
        self.b.ins().call_indirect(signature, leave, &[self.context, code]);
        self.b.ins().trap(Trap::Internal.cranelift());
    }
}
