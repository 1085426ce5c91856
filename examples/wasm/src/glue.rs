//! Compiled functions that no module contains: the way in, the way to the host, and the thunk before a big frame.

use crate::context::Context;
use crate::emit::{Callee, Emitter, trusted};
use crate::trap::Trap;
use crate::types::FuncType;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, FuncRef, InstBuilder, Signature, Value};
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
    let results = e.call(Callee::Address(callee), ty, &args);
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

/// What callers of a function with a big frame call: makes sure of `bytes` below its own frame, then calls the body; one
/// that can be called by tail call does so too. What travels through the context stays there untouched.
pub fn entry_thunk(e: &mut Emitter<'_>, params: &[Value], body: FuncRef, bytes: u32) {
    e.check_stack(bytes);
    let args = e.all_direct(params);
    if e.b.func.signature.call_conv == CallConv::Tail {
        e.b.ins().return_call(body, &args);
        return;
    }
    let call = e.b.ins().call(body, &args);
    let results = e.b.inst_results(call).to_vec();
    e.b.ins().return_(&results);
}

/// What others call of a function in a module with tail calls, as the platform calls: the body, by the `Tail` convention.
pub fn way_in(e: &mut Emitter<'_>, params: Vec<Value>, ty: &FuncType, body: FuncRef) {
    e.check_stack(0);
    let args = e.all_params(ty, params);
    let results = e.call(Callee::Body(body), ty, &args);
    e.ret(&results);
}

/// What a tail call goes to whose callee has no body to be called so: calls the code that the context names, of type `ty`, as
/// the platform calls.
pub fn way_out(e: &mut Emitter<'_>, params: Vec<Value>, ty: &FuncType) {
    e.check_stack(0);
    let args = e.all_params(ty, params);
    let callee = e.word(Context::TAIL_CALLEE);
    let results = e.call(Callee::Address(callee), ty, &args);
    e.ret(&results);
}
