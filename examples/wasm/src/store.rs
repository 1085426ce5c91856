//! A store: one context, the functions of its instances, and the way from the host into them.

use crate::compile::{Code, Key};
use crate::context::{Context, SLOTS};
use crate::error::Error;
use crate::host::Operation;
use crate::object::Function;
use crate::trap::Trap;
use crate::types::{TypeId, Types, Value};
use cfi_stack::engine::{Exit, Stubs, stubs};
use cfi_stack::pac::RawPc;
use cfi_stack::thread::Thread;
use cfi_stack::{Policy, Stack, Stats};
use std::collections::HashMap;
use std::rc::Rc;

/// How the stacks of a store behave and how its code is signed.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The stacks' policy.
    pub policy: Policy,
    /// The key that signs return addresses on arm64.
    pub key: Key,
}

/// What instances share. Fields are dropped in order: code first, then what its constants point to.
pub struct Store<'t> {
    codes: Vec<Code>,
    /// The interned types.
    pub types: Types,
    /// How it was configured.
    pub config: Config,
    trampolines: HashMap<TypeId, usize>,
    /// The context of all code in the store.
    pub context: Box<Context>,
    functions: Vec<Rc<Function>>,
    operations: Vec<Rc<Operation>>,
    objects: Vec<Box<dyn std::any::Any>>,
    thread: &'t Thread,
}

impl<'t> Store<'t> {
    /// An empty store for this thread.
    pub fn new(thread: &'t Thread, config: Config) -> Store<'t> {
        Store {
            codes: Vec::new(),
            types: Types::default(),
            config,
            trampolines: HashMap::new(),
            context: Context::new(),
            functions: Vec::new(),
            operations: Vec::new(),
            objects: Vec::new(),
            thread,
        }
    }

    /// The library's stubs.
    pub fn stubs(&self) -> Stubs {
        stubs()
    }

    /// Takes a function in; its number, and the reference to it.
    pub fn add_function(&mut self, ty: TypeId) -> (usize, usize) {
        let function = Function::new(ty);
        let address = function.address();
        self.functions.push(function);
        (self.functions.len() - 1, address)
    }

    /// A function of this store.
    pub fn function(&self, number: usize) -> &Function {
        &self.functions[number]
    }

    /// Takes a host operation in; its address.
    pub fn add_operation(&mut self, operation: Operation) -> usize {
        let operation = Rc::new(operation);
        let address = Rc::as_ptr(&operation).expose_provenance();
        self.operations.push(operation);
        address
    }

    /// Keeps something as long as the code that has its address as a constant.
    pub fn keep(&mut self, object: impl std::any::Any) {
        self.objects.push(Box::new(object));
    }

    /// Takes code in, and the trampolines that it contains.
    pub fn add_code(&mut self, code: Code, trampolines: impl IntoIterator<Item = (TypeId, usize)>) {
        self.context.with_code(|index| code.describe(index));
        self.trampolines.extend(trampolines);
        self.codes.push(code);
    }

    /// Whether functions of this type can be called from the host.
    pub fn has_trampoline(&self, ty: TypeId) -> bool {
        self.trampolines.contains_key(&ty)
    }

    /// Calls a function on a stack of its own.
    ///
    /// # Errors
    /// [`Error::Trap`], [`Error::Exhausted`], [`Error::Exit`], or what the stack library refused; [`Error::Usage`]
    /// when the arguments do not fit the function's type.
    pub fn call(&mut self, number: usize, args: &[Value]) -> Result<(Vec<Value>, Stats), (Error, Stats)> {
        let none = Stats::default();
        let function = &self.functions[number];
        let (ty, code) = (function.type_id(), function.code.get());
        let func_type = self.types.get(ty).clone();
        let given: Vec<_> = args.iter().map(|arg| arg.ty).collect();
        if given.len() != func_type.params.len()
            || given.iter().zip(&func_type.params).any(|(given, wanted)| !given.is_subtype(*wanted))
        {
            return Err((Error::Usage(format!("the function's type is {func_type}")), none));
        }
        let Some(&trampoline) = self.trampolines.get(&ty) else {
            return Err((Error::Usage("this function is not exported".to_owned()), none));
        };
        let mut slots = vec![0u64; SLOTS];
        for (slot, arg) in slots.iter_mut().zip(args) {
            *slot = arg.bits;
        }
        let mut stack = Stack::new(self.thread, self.config.policy).map_err(|error| (error.into(), none))?;
        let args = [self.context.address(), slots.as_mut_ptr().expose_provenance(), code, 0];
        // SAFETY: the trampoline is code of this store, of the callee's type: compiled under the rules of README.md,
        // registered, alive. It checks the context's limit, and no frame of it owes a destructor.
        let exit = unsafe { stack.enter(self.thread, &self.context.activation, RawPc::new(trampoline), args) };
        let stats = stack.stats();
        match exit {
            Ok(Exit::Returned(_)) => {
                // SAFETY: the trampoline's writes to the slots are over; the vector is alive and was not moved.
                let read = |at: usize| unsafe { std::ptr::read_volatile(slots.as_ptr().add(at)) };
                let values =
                    func_type.results.iter().enumerate().map(|(at, ty)| Value { ty: *ty, bits: ty.mask(read(at)) });
                Ok((values.collect(), stats))
            }
            Ok(Exit::Left(code)) => Err((self.trapped(code), stats)),
            Err(error) => Err((error.into(), stats)),
        }
    }

    fn trapped(&self, code: u64) -> Error {
        match Trap::from_code(code) {
            Some(Trap::Exit) => Error::Exit(self.context.status.get()),
            Some(Trap::Host) => {
                let message = self.context.message.borrow_mut().take();
                Error::System(message.unwrap_or_else(|| Trap::Host.to_string()))
            }
            Some(trap) => Error::Trap(trap),
            None => Error::System(format!("managed code left with the unknown code {code}")),
        }
    }
}
