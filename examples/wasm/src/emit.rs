//! What every compiled function shares: the signature that its type is lowered to, the check of the stack limit,
//! calls, and calls to the host.
//!
//! The rules (see README.md). Called as the platform calls, a function takes the context, then up to [`MAX_DIRECT`]
//! parameters; further ones, and the results of functions with more than one, travel through the context, so that no
//! pointer into the stack is a value of the code. Functions of modules with tail calls are called by Cranelift's `Tail`
//! convention within their module: context, where several results go, up to [`MAX_TAIL_DIRECT`] parameters. That place lies in
//! the caller's frame: the one pointer into the stack that code holds, and the stack maps say where.
//! Only the first instructions read the stack pointer.

use crate::context::{Context, Place};
use crate::trap::Trap;
use crate::types::FuncType;
use cfi_stack::engine::{Activation, Stubs};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::immediates::{Ieee32, Ieee64};
use cranelift_codegen::ir::types::{F32, F64, I64};
use cranelift_codegen::ir::{
    AbiParam, ConstantData, FuncRef, InstBuilder, MemFlagsData, Signature, SourceLoc, StackSlot, StackSlotData,
    StackSlotKind, Type, Value,
};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::FunctionBuilder;

/// Parameters passed as the platform passes them. It bounds the argument area in every frame.
pub const MAX_DIRECT: usize = 12;
/// The same by the `Tail` convention. It bounds what an entry thunk must keep while the stack grows, too.
pub const MAX_TAIL_DIRECT: usize = 32;
/// Bytes between several results on the stack, which may be vectors.
const RESULT_STRIDE: u32 = 16;

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

/// The signature of bodies of this type in modules with tail calls: context, place for several results or 0, parameters, at
/// most one result.
pub fn tail_signature(ty: &FuncType) -> Signature {
    let mut signature = Signature::new(CallConv::Tail);
    signature.params = vec![AbiParam::new(I64); 2];
    signature.params.extend(ty.params.iter().take(MAX_TAIL_DIRECT).map(|ty| AbiParam::new(ty.repr())));
    if let [result] = ty.results[..] {
        signature.returns.push(AbiParam::new(result.repr()));
    }
    signature
}

/// Bytes of stack arguments that a function with this signature owns and pops. Cranelift does not tell: six integers and eight
/// others come in registers on both ISAs, what is more in slots of its own size, at least eight bytes.
pub fn argument_area(signature: &Signature) -> u32 {
    if signature.call_conv != CallConv::Tail {
        return 0;
    }
    let (mut integers, mut others, mut bytes) = (6, 8, 0u32);
    for param in &signature.params {
        let left: &mut u32 = if param.value_type.is_int() { &mut integers } else { &mut others };
        if *left > 0 {
            *left -= 1;
            continue;
        }
        let size = param.value_type.bytes().max(8);
        bytes = bytes.next_multiple_of(size) + size;
    }
    bytes.next_multiple_of(16)
}

/// Access to the engine's own data: aligned, never trapping.
pub fn trusted() -> MemFlagsData {
    MemFlagsData::trusted()
}

/// Whom a call goes to.
#[derive(Clone, Copy)]
pub enum Callee {
    /// A function of the module being compiled, as the platform calls.
    Local(FuncRef),
    /// Code at an address, as the platform calls.
    Address(Value),
    /// A body of the module being compiled, by the `Tail` convention.
    Body(FuncRef),
    /// Such a body at an address.
    BodyAt(Value),
}

/// A function being built.
pub struct Emitter<'f> {
    /// Cranelift's builder.
    pub b: FunctionBuilder<'f>,
    /// The first parameter.
    pub context: Value,
    stubs: Stubs,
    /// Where several results go; `None` in a function that the platform's convention calls.
    place: Option<Value>,
    /// Where those of its own calls come.
    results: Option<StackSlot>,
}

impl<'f> Emitter<'f> {
    /// Opens the function: its entry block, with the parameters that come in registers and on the stack.
    pub fn new(mut b: FunctionBuilder<'f>, stubs: Stubs) -> (Emitter<'f>, Vec<Value>) {
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        b.seal_block(entry);
        let params = b.block_params(entry).to_vec();
        let tail = b.func.signature.call_conv == CallConv::Tail;
        let place = tail.then(|| params[1]);
        if let Some(place) = place {
            b.declare_value_needs_stack_map(place);
        }
        (Emitter { b, context: params[0], stubs, place, results: None }, params[1 + usize::from(tail)..].to_vec())
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
    pub fn call(&mut self, callee: Callee, ty: &FuncType, args: &[Value]) -> Vec<Value> {
        let several = ty.results.len() > 1;
        let list = || ty.results.iter().map(|ty| ty.repr()).enumerate();
        let (call, slot) = match callee {
            Callee::Local(func) => {
                let direct = self.direct(None, MAX_DIRECT, args);
                (self.b.ins().call(func, &direct), None)
            }
            Callee::Address(code) => {
                let direct = self.direct(None, MAX_DIRECT, args);
                let signature = self.b.import_signature(signature(ty));
                (self.b.ins().call_indirect(signature, code, &direct), None)
            }
            Callee::Body(_) | Callee::BodyAt(_) => {
                let slot = several.then(|| self.room_for_results(ty.results.len()));
                // Right before the call, so that nothing holds it across another.
                let place = match slot {
                    Some(slot) => self.b.ins().stack_addr(I64, slot, 0),
                    None => self.address(0),
                };
                let direct = self.direct(Some(place), MAX_TAIL_DIRECT, args);
                // The only thing that goes with an instruction through the code generator: what this call pops.
                let popped = argument_area(&tail_signature(ty));
                if popped > 0 {
                    self.b.set_srcloc(SourceLoc::new(popped));
                }
                let call = match callee {
                    Callee::BodyAt(code) => {
                        let signature = self.b.import_signature(tail_signature(ty));
                        self.b.ins().call_indirect(signature, code, &direct)
                    }
                    Callee::Body(func) | Callee::Local(func) => self.b.ins().call(func, &direct),
                    Callee::Address(_) => unreachable!("handled above"),
                };
                self.b.set_srcloc(SourceLoc::default());
                (call, slot)
            }
        };
        match slot {
            Some(slot) => list()
                .map(|(at, ty)| self.b.ins().stack_load(I64, ty, slot, (RESULT_STRIDE * at as u32) as i32))
                .collect(),
            None if several => list().map(|(at, ty)| self.slot(Context::RESULTS, at, ty)).collect(),
            None => self.b.inst_results(call).to_vec(),
        }
    }

    /// Calls a body of type `ty` in this function's stead; the block ends.
    pub fn tail_call(&mut self, callee: Callee, ty: &FuncType, args: &[Value]) {
        let place = if ty.results.len() > 1 { self.place } else { None };
        let place = place.unwrap_or_else(|| self.address(0));
        let direct = self.direct(Some(place), MAX_TAIL_DIRECT, args);
        match callee {
            Callee::Body(func) | Callee::Local(func) => self.b.ins().return_call(func, &direct),
            Callee::BodyAt(code) | Callee::Address(code) => {
                let signature = self.b.import_signature(tail_signature(ty));
                self.b.ins().return_call_indirect(signature, code, &direct)
            }
        };
    }

    /// Everything that this function was called with, to be passed on.
    pub fn all_direct(&self, params: &[Value]) -> Vec<Value> {
        std::iter::once(self.context).chain(self.place).chain(params.iter().copied()).collect()
    }

    /// What is passed as the convention passes it, of which the arguments are `most`; the others go into the context.
    fn direct(&mut self, place: Option<Value>, most: usize, args: &[Value]) -> Vec<Value> {
        for (index, arg) in args.iter().enumerate().skip(most) {
            self.set_slot(Context::PARAMS, index, *arg);
        }
        std::iter::once(self.context).chain(place).chain(args.iter().take(most).copied()).collect()
    }

    /// The room in the frame for several results. All calls of a function share it: what came is read at once.
    fn room_for_results(&mut self, count: usize) -> StackSlot {
        let bytes = RESULT_STRIDE * count as u32;
        let b = &mut self.b;
        let new = || StackSlotData::new(StackSlotKind::ExplicitSlot, 0, 4);
        let slot = *self.results.get_or_insert_with(|| b.create_sized_stack_slot(new()));
        let size = &mut b.func.sized_stack_slots[slot].size;
        *size = bytes.max(*size);
        slot
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
                match self.place {
                    Some(place) => self.b.ins().store(trusted(), *value, place, (RESULT_STRIDE * index as u32) as i32),
                    None => self.b.ins().store(trusted(), *value, self.context, Context::RESULTS.at(index)),
                };
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
