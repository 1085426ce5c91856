//! From the operators of one function body to Cranelift's form.
//!
//! The module was validated: operand types are right, and every index exists. What follows an unconditional branch
//! is skipped up to the block's end.

mod call;
mod control;
mod exception;
mod memory;
mod numeric;
mod reference;
mod vector;

pub use call::tail_calls;

use crate::emit::{Callee, Emitter};
use crate::error::{Error, unsupported};
use crate::module::Module;
use crate::types::{FuncType, TypeId, Types, ValType};
use control::Frame;
use cranelift_codegen::ir::immediates::{Ieee32, Ieee64};
use cranelift_codegen::ir::types::{I32, I64};
use cranelift_codegen::ir::{Block, InstBuilder, Type, Value};
use cranelift_frontend::Variable;
use wasmparser::{FunctionBody, Operator};

/// Whom the code of an instance can name, each as a constant.
#[derive(Default)]
pub struct Addresses {
    /// Function references.
    pub functions: Vec<usize>,
    /// Code of functions that are not of this module.
    /// What calls go to, and what tail calls go to, or 0.
    pub imported_code: Vec<Option<(usize, usize)>>,
    /// Where tables keep base and length.
    pub tables: Vec<usize>,
    /// Bases of memories and where they keep their size.
    pub memories: Vec<(usize, usize)>,
    /// Values of globals.
    pub globals: Vec<usize>,
    /// Numbers of tags.
    pub tags: Vec<u64>,
    /// Host operations by what they do.
    pub operations: Operations,
}

/// Addresses of the host operations that instructions call, by their immediates.
#[derive(Default)]
pub struct Operations {
    /// `memory.grow`, by memory.
    pub memory_grow: Vec<usize>,
    /// `memory.fill`, by memory.
    pub memory_fill: Vec<usize>,
    /// `memory.copy`, by destination and source.
    pub memory_copy: Vec<Vec<usize>>,
    /// `memory.init`, by memory and segment.
    pub memory_init: Vec<Vec<usize>>,
    /// `data.drop`, by segment.
    pub data_drop: Vec<usize>,
    /// `table.grow`, by table.
    pub table_grow: Vec<usize>,
    /// `table.fill`, by table.
    pub table_fill: Vec<usize>,
    /// `table.copy`, by destination and source.
    pub table_copy: Vec<Vec<usize>>,
    /// `table.init`, by table and segment.
    pub table_init: Vec<Vec<usize>>,
    /// `elem.drop`, by segment.
    pub elem_drop: Vec<usize>,
    /// Makes a reference to the exception in flight.
    pub catch: usize,
    /// `throw_ref`.
    pub throw_ref: usize,
}

/// What the translation of a body can look up.
pub struct Scope<'a> {
    /// The module.
    pub module: &'a Module,
    /// The interned types.
    pub types: &'a Types,
    /// The instance's constants.
    pub addresses: &'a Addresses,
    /// Calls may come back with an exception.
    pub throws: bool,
    /// The module makes tail calls: its functions have bodies.
    pub tails: bool,
}

/// A function of this module that code refers to.
#[derive(Clone, Copy)]
pub enum Target {
    /// What others call, as the platform calls.
    Function(u32),
    /// What the module itself calls where it makes tail calls.
    Body(u32),
    /// What makes tail calls to functions of this type that have no body.
    WayOut(TypeId),
}

/// Makes a function of this module callable from another.
type Declare<'a> = dyn FnMut(&mut cranelift_codegen::ir::Function, Target) -> cranelift_codegen::ir::FuncRef + 'a;

/// The translation of one body.
pub struct Translator<'a, 'f> {
    scope: &'a Scope<'a>,
    declare: &'a mut Declare<'a>,
    e: Emitter<'f>,
    locals: Vec<Variable>,
    stack: Vec<Value>,
    frames: Vec<Frame>,
    reachable: bool,
    /// Returns without a result that means anything.
    nothing: Option<Block>,
}

impl<'a, 'f> Translator<'a, 'f> {
    /// Translates `body`, a function of type `ty`, into the function that `e` builds. `declare` makes a function
    /// of this module callable from it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the operator that this engine lacks.
    pub fn function(
        scope: &'a Scope<'a>,
        declare: &'a mut Declare<'a>,
        mut e: Emitter<'f>,
        direct: Vec<Value>,
        ty: &FuncType,
        body: &FunctionBody<'_>,
    ) -> Result<Emitter<'f>, Error> {
        e.check_stack(0);
        let params = e.all_params(ty, direct);
        let mut locals = Vec::with_capacity(params.len());
        for value in params {
            let variable = e.b.declare_var(e.b.func.dfg.value_type(value));
            e.b.def_var(variable, value);
            locals.push(variable);
        }
        for group in body.get_locals_reader()? {
            let (count, ty) = group?;
            let ty = scope.module.val_type(ty)?.repr();
            for _ in 0..count {
                let variable = e.b.declare_var(ty);
                let zero = e.zero(ty);
                e.b.def_var(variable, zero);
                locals.push(variable);
            }
        }
        let mut translator = Translator {
            scope,
            declare,
            e,
            locals,
            stack: Vec::new(),
            frames: Vec::new(),
            reachable: true,
            nothing: None,
        };
        translator.enter_function(ty);
        for op in body.get_operators_reader()? {
            let op = op?;
            if translator.reachable {
                translator.operator(&op)?;
            } else {
                translator.skipped(&op);
            }
        }
        if let Some(nothing) = translator.nothing {
            translator.e.b.switch_to_block(nothing);
            translator.e.ret_nothing(ty);
        }
        Ok(translator.e)
    }

    /// Returns to the caller, which will look at the context; the block ends.
    fn return_nothing(&mut self) {
        let nothing = *self.nothing.get_or_insert_with(|| self.e.b.create_block());
        self.e.b.ins().jump(nothing, &[]);
    }

    fn operator(&mut self, op: &Operator<'_>) -> Result<(), Error> {
        if self.control(op)?
            || self.exception(op)?
            || self.call_operator(op)?
            || self.memory_operator(op)?
            || self.reference(op)?
            || self.vector(op)?
        {
            return Ok(());
        }
        match *op {
            Operator::Nop => {}
            Operator::Drop => {
                self.pop();
            }
            Operator::Select | Operator::TypedSelect { .. } => {
                let condition = self.pop();
                let (then, otherwise) = self.pop2();
                let value = self.e.b.ins().select(condition, then, otherwise);
                self.push(value);
            }
            Operator::LocalGet { local_index } => {
                let value = self.e.b.use_var(self.locals[local_index as usize]);
                self.push(value);
            }
            Operator::LocalSet { local_index } => {
                let value = self.pop();
                self.e.b.def_var(self.locals[local_index as usize], value);
            }
            Operator::LocalTee { local_index } => {
                let value = self.top();
                self.e.b.def_var(self.locals[local_index as usize], value);
            }
            Operator::I32Const { value } => {
                let value = self.e.b.ins().iconst(I32, i64::from(value as u32));
                self.push(value);
            }
            Operator::I64Const { value } => {
                let value = self.e.b.ins().iconst(I64, value);
                self.push(value);
            }
            Operator::F32Const { value } => {
                let value = self.e.b.ins().f32const(Ieee32::with_bits(value.bits()));
                self.push(value);
            }
            Operator::F64Const { value } => {
                let value = self.e.b.ins().f64const(Ieee64::with_bits(value.bits()));
                self.push(value);
            }
            _ if self.numeric(op) => {}
            _ => return unsupported(name(op)),
        }
        Ok(())
    }

    fn push(&mut self, value: Value) {
        self.stack.push(value);
    }

    fn pop(&mut self) -> Value {
        self.stack.pop().expect("a validated body has its operands")
    }

    fn pop2(&mut self) -> (Value, Value) {
        let second = self.pop();
        (self.pop(), second)
    }

    fn top(&self) -> Value {
        *self.stack.last().expect("a validated body has its operands")
    }

    fn pop_many(&mut self, count: usize) -> Vec<Value> {
        self.stack.split_off(self.stack.len() - count)
    }

    fn func_type(&self, id: TypeId) -> &'a FuncType {
        self.scope.types.get(id)
    }
}

fn reprs(types: &[ValType]) -> Vec<Type> {
    types.iter().map(|ty| ty.repr()).collect()
}

/// The operator's name without its immediates.
fn name(op: &Operator<'_>) -> String {
    let text = format!("{op:?}");
    let end = text.find([' ', '{', '(']).unwrap_or(text.len());
    format!("operator {}", &text[..end])
}
