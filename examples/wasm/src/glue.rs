//! Compiled functions that no module contains: the way in, the way to the host, and the thunk before a big frame.

use crate::context::Context;
use crate::emit::{Callee, Emitter, MAX_DIRECT, signature, trusted};
use crate::trap::Trap;
use crate::types::FuncType;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, BlockArg, FuncRef, InstBuilder, Signature, Value};
use cranelift_codegen::isa::CallConv;

/// Signature of all trampolines: context, slots, callee; the fourth is what `enter` passes besides.
pub fn trampoline_signature() -> Signature {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(I64); 4];
    signature.returns = vec![AbiParam::new(I64)];
    signature
}

/// The way in for functions of type `ty`: arguments from the slots, the call, results into the slots.
/// With `throws`, an exception that comes back is a trap.
pub fn trampoline(e: &mut Emitter<'_>, params: &[Value], ty: &FuncType, throws: bool) {
    let (slots, callee) = (params[0], params[1]);
    e.check_stack(0);
    let at = |index: usize| 8 * index as i32;
    let mut args = Vec::new();
    for (index, ty) in ty.params.iter().enumerate() {
        args.push(e.b.ins().load(ty.repr(), trusted(), slots, at(index)));
    }
    let callee_signature = e.b.import_signature(signature(ty));
    let results = e.call(Callee::Address(callee), ty, callee_signature, &args);
    if throws {
        let exception = e.word(Context::EXCEPTION);
        let (uncaught, returned) = (e.b.create_block(), e.b.create_block());
        e.b.ins().brif(exception, uncaught, &[], returned, &[]);
        e.b.switch_to_block(uncaught);
        e.b.set_cold_block(uncaught);
        let code = e.address(Trap::UncaughtException.code() as usize);
        e.leave(code);
        e.b.switch_to_block(returned);
    }
    for (index, result) in results.into_iter().enumerate() {
        e.b.ins().store(trusted(), result, slots, at(index));
    }
    let done = e.address(0);
    e.b.ins().return_(&[done]);
}

/// An imported host function as a function of type `ty`: through the host operation at `operation`.
pub fn import(e: &mut Emitter<'_>, params: Vec<Value>, ty: &FuncType, operation: usize) {
    e.check_stack(0);
    let args = e.all_params(ty, params);
    e.call_host(operation, &args);
    match ty.results[..] {
        [single] => {
            let result = e.slot(Context::HOST, 0, single.repr());
            e.b.ins().return_(&[result]);
        }
        // The host put several where the caller looks for them.
        _ => {
            e.b.ins().return_(&[]);
        }
    }
}

/// What callers of a function with a big frame call: makes sure of `bytes` below its own frame, then calls the body.
/// What travels through the context stays there untouched.
pub fn entry_thunk(e: &mut Emitter<'_>, params: &[Value], body: FuncRef, bytes: u32) {
    e.check_stack(bytes);
    let mut args = vec![e.context];
    args.extend(params);
    let call = e.b.ins().call(body, &args);
    let results = e.b.inst_results(call).to_vec();
    e.b.ins().return_(&results);
}

/// Signature of [`tail_adapter`]: context, callee, and the result of functions of this type.
pub fn adapter_signature(ty: &FuncType) -> Signature {
    let mut adapter = signature(&FuncType { params: vec![], results: ty.results.clone() });
    adapter.params.push(AbiParam::new(I64));
    adapter
}

/// Makes a tail call for [`tail_loop`]: calls `callee`, of type `ty`, with arguments that all travel through the context.
pub fn tail_adapter(e: &mut Emitter<'_>, params: &[Value], ty: &FuncType) {
    e.check_stack(0);
    let args = e.all_params(ty, vec![]);
    let callee_signature = e.b.import_signature(signature(ty));
    let direct: Vec<_> = std::iter::once(e.context).chain(args.into_iter().take(MAX_DIRECT)).collect();
    let call = e.b.ins().call_indirect(callee_signature, params[0], &direct);
    let results = e.b.inst_results(call).to_vec();
    e.b.ins().return_(&results);
}

/// What callers of a function that makes tail calls call: its body, and then one function after the other that a tail
/// call asks for. A body asks by leaving the arguments and the callee in the context and returning: so every
/// call has its return, and no frame's argument area changes.
pub fn tail_loop(e: &mut Emitter<'_>, params: &[Value], ty: &FuncType, body: FuncRef) {
    e.check_stack(0);
    let adapter_signature = e.b.import_signature(adapter_signature(ty));
    let (returned, again, done) = (e.b.create_block(), e.b.create_block(), e.b.create_block());
    if let [single] = ty.results[..] {
        e.b.append_block_param(returned, single.repr());
    }
    let mut args = vec![e.context];
    args.extend(params);
    let call = e.b.ins().call(body, &args);
    let results: Vec<BlockArg> = e.b.inst_results(call).iter().copied().map(BlockArg::from).collect();
    e.b.ins().jump(returned, &results);
    e.b.switch_to_block(returned);
    let results = e.b.block_params(returned).to_vec();
    let adapter = e.word(Context::TAIL_ADAPTER);
    e.b.ins().brif(adapter, again, &[], done, &[]);
    e.b.switch_to_block(again);
    let none = e.address(0);
    e.set_word(Context::TAIL_ADAPTER, none);
    let callee = e.word(Context::TAIL_CALLEE);
    let call = e.b.ins().call_indirect(adapter_signature, adapter, &[e.context, callee]);
    let next: Vec<BlockArg> = e.b.inst_results(call).iter().copied().map(BlockArg::from).collect();
    e.b.ins().jump(returned, &next);
    e.b.switch_to_block(done);
    e.b.ins().return_(&results);
}
