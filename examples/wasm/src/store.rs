//! A store: one context, the functions of its instances, and the way from the host into them.

use crate::compile::{Code, Key};
use crate::context::{Context, SLOTS, Shared, Trampoline};
use crate::error::{Error, unsupported};
use crate::host::Operation;
use crate::object::{Function, Tag};
use crate::trap::Trap;
use crate::types::{TypeId, Types, Value};
use cfi_stack::engine::{Exit, Stubs, stubs};
use cfi_stack::pac::RawPc;
use cfi_stack::thread::Thread;
use cfi_stack::{Policy, Stack, Stats};
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
    /// The context of all code in the store.
    pub context: Box<Context>,
    functions: Vec<Rc<Function>>,
    operations: Vec<Rc<Operation>>,
    objects: Vec<Box<dyn std::any::Any>>,
    thread: &'t Thread,
    throws: Option<bool>,
    tags: u64,
}

impl<'t> Store<'t> {
    /// An empty store for this thread.
    pub fn new(thread: &'t Thread, config: Config) -> Store<'t> {
        Store {
            codes: Vec::new(),
            types: Types::default(),
            config,
            context: Context::new(Shared::new(config)),
            functions: Vec::new(),
            operations: Vec::new(),
            objects: Vec::new(),
            thread,
            throws: None,
            tags: 0,
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

    /// Makes a tag.
    pub fn add_tag(&mut self, ty: TypeId) -> Tag {
        self.tags += 1;
        Tag { number: self.tags, ty }
    }

    /// Whether the store's code looks for exceptions after each call. Its first module decides: code that does not look
    /// must never call code that throws.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a module with tags after one without.
    pub fn throws(&mut self, tags: bool) -> Result<bool, Error> {
        let throws = *self.throws.get_or_insert(tags);
        if tags && !throws {
            return unsupported("exceptions where an earlier module has none");
        }
        Ok(throws)
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
    pub fn add_code(&mut self, code: Code, trampolines: impl IntoIterator<Item = (TypeId, Trampoline)>) {
        self.context.with_code(|index| code.describe(index));
        self.context.shared.trampolines.borrow_mut().extend(trampolines);
        self.codes.push(code);
    }

    /// The largest argument area that one of its functions owns, as those do that tail calls go to, in bytes.
    pub fn largest_argument_area(&self) -> u32 {
        self.codes.iter().map(Code::largest_argument_area).max().unwrap_or(0)
    }

    /// Whether functions of this type can be called from the host.
    pub fn has_trampoline(&self, ty: TypeId) -> bool {
        self.context.shared.trampolines.borrow().contains_key(&ty)
    }

    /// A stack for calls into this store.
    ///
    /// # Errors
    /// What the stack library refused.
    pub fn stack(&self) -> Result<Stack, Error> {
        Ok(Stack::new(self.thread, self.config.policy)?)
    }

    /// Calls a function on a stack of its own.
    ///
    /// # Errors
    /// As [`Store::call_on`].
    #[allow(clippy::result_large_err, reason = "what the stack did is wanted of a call that failed, too")]
    pub fn call(&mut self, number: usize, args: &[Value]) -> Result<(Vec<Value>, Stats), (Error, Stats)> {
        let mut stack = self.stack().map_err(|error| (error, Stats::default()))?;
        match self.call_on(&mut stack, number, args) {
            Ok(values) => Ok((values, stack.stats())),
            Err(error) => Err((error, stack.stats())),
        }
    }

    /// Calls a function on a stack of the caller's.
    ///
    /// # Errors
    /// [`Error::Trap`], [`Error::Exhausted`], [`Error::Exit`], or what the stack library refused; [`Error::Usage`]
    /// when the arguments do not fit the function's type.
    pub fn call_on(&mut self, stack: &mut Stack, number: usize, args: &[Value]) -> Result<Vec<Value>, Error> {
        let function = &self.functions[number];
        let func_type = self.types.get(function.type_id());
        let given: Vec<_> = args.iter().map(|arg| arg.ty).collect();
        if given.len() != func_type.params.len()
            || given.iter().zip(&func_type.params).any(|(given, wanted)| !given.is_subtype(*wanted))
        {
            return Err(Error::Usage(format!("the function's type is {func_type}")));
        }
        let trampoline = self.context.shared.trampolines.borrow().get(&function.type_id()).cloned();
        let Some(trampoline) = trampoline else {
            return Err(Error::Usage("this function is not exported, or has a vector in its type".to_owned()));
        };
        let args: Vec<_> = args.iter().map(|arg| arg.bits).collect();
        let results = enter(&self.context, self.thread, stack, &trampoline, function.code.get(), &args);
        if results.is_err() {
            self.context.reset();
        }
        Ok(func_type.results.iter().zip(results?).map(|(ty, bits)| Value { ty: *ty, bits }).collect())
    }
}

/// Calls `code`, a function of the trampoline's type that belongs to the context's store.
///
/// # Errors
/// As [`Store::call_on`]. After [`Trap::UncaughtException`] the context still has the exception.
pub fn enter(
    context: &Context,
    thread: &Thread,
    stack: &mut Stack,
    trampoline: &Trampoline,
    code: usize,
    args: &[u64],
) -> Result<Vec<u64>, Error> {
    run(context, trampoline, code, args, |entry, args| {
        // SAFETY: the trampoline is code of the context's store, of the callee's type: compiled under the rules of README.md,
        // registered, alive. It checks the context's limit, and no frame of it owes a destructor.
        unsafe { stack.enter(thread, &context.activation, entry, args) }
    })
}

/// Calls `code`, a function of the trampoline's type, through `enter`, which runs managed code on some stack.
///
/// # Errors
/// As [`enter`].
pub fn run(
    context: &Context,
    trampoline: &Trampoline,
    code: usize,
    args: &[u64],
    enter: impl FnOnce(RawPc, [usize; 4]) -> Result<Exit, cfi_stack::Error>,
) -> Result<Vec<u64>, Error> {
    let mut slots = vec![0u64; SLOTS];
    for (slot, arg) in slots.iter_mut().zip(args) {
        *slot = *arg;
    }
    let args = [context.address(), slots.as_mut_ptr().expose_provenance(), code, 0];
    let exit = enter(RawPc::new(trampoline.code), args);
    match exit? {
        Exit::Returned(_) => {
            // SAFETY: the trampoline's writes to the slots are over; the vector is alive and was not moved.
            let read = |at: usize| unsafe { std::ptr::read_volatile(slots.as_ptr().add(at)) };
            Ok(trampoline.ty.results.iter().enumerate().map(|(at, ty)| ty.mask(read(at))).collect())
        }
        // No code of ours suspends a stack: a code that comes this way is none that is known.
        Exit::Left(code) | Exit::Suspended(code) => Err(match Trap::from_code(code) {
            Some(Trap::Exit) => Error::Exit(context.status.get()),
            Some(Trap::Host) => context.failure.borrow_mut().take().unwrap_or(Error::Trap(Trap::Host)),
            Some(trap) => Error::Trap(trap),
            None => Error::System(format!("managed code left with the unknown code {code}")),
        }),
    }
}
