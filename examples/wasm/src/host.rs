//! The host's side of calls: one entry, which managed code reaches through the library's `exit`, and the operations
//! that it can ask for. They run on the thread's own stack and never unwind out. What they call back runs on the same stack as
//! their caller, or on a stack and with a context of its own.

use crate::context::{Context, Trampoline};
use crate::error::Error;
use crate::memory::Memory;
use crate::object::{Function, Table};
use crate::store;
use crate::trap::Trap;
use crate::types::FuncType;
use cfi_stack::engine::{compact, enter_again};
use cfi_stack::thread::Thread;
use cfi_stack::{Stack, Stats};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

/// A function of the host: arguments in, results out, both as slots.
pub type HostFunction = fn(&Caller<'_>, &[u64], &mut [u64]) -> Result<(), Failure>;

/// Most calls back into the program within each other.
const MAX_NESTED: usize = 100;

/// Why a host function does not return to the program.
pub enum Failure {
    /// It failed, for this reason.
    Because(Error),
    /// It throws the exception that its context has in flight.
    Thrown,
    /// The program asked to end with this status.
    Exit(i32),
}

/// What a host function can see of the program.
pub struct Caller<'a> {
    /// The context.
    pub context: &'a Context,
    /// The calling module's first memory.
    pub memory: Option<&'a Memory>,
}

impl Caller<'_> {
    /// Calls the function behind a reference on the caller's own stack, below the frames that wait for the host; they may move.
    ///
    /// # Errors
    /// As [`Caller::call`].
    pub fn call_within(&self, reference: u64, args: &[u64]) -> Result<Vec<u64>, Failure> {
        let (trampoline, code) = self.function(reference)?;
        let depth = self.context.depth.get();
        if depth == MAX_NESTED {
            return Err(Failure::Because(Error::Nested(MAX_NESTED)));
        }
        self.context.depth.set(depth + 1);
        let result = store::run(self.context, &trampoline, code, args, |entry, args| {
            // SAFETY: the trampoline is code of this context's store: compiled under the rules of README.md, registered, alive.
            unsafe { enter_again(&self.context.activation, entry, args) }
        });
        self.context.depth.set(depth);
        result.map_err(|error| match error {
            Error::Trap(Trap::UncaughtException) => Failure::Thrown,
            error => Failure::Because(error),
        })
    }

    /// Gives back what the stack of the caller has too much; whether that was anything.
    ///
    /// # Errors
    /// What the stack library refused.
    pub fn compact(&self) -> Result<bool, Failure> {
        // SAFETY: managed code called the host, which keeps no pointer into the stack.
        unsafe { compact(&self.context.activation) }.map_err(|error| Failure::Because(error.into()))
    }

    /// The function behind a reference, and the way in to it.
    fn function(&self, reference: u64) -> Result<(Trampoline, usize), Failure> {
        if reference == 0 {
            return Err(Failure::Because(Error::Trap(Trap::NullReference)));
        }
        // SAFETY: the module was validated, so that this is a reference to a function of the store.
        let function = unsafe { &*std::ptr::with_exposed_provenance::<Function>(reference as usize) };
        match self.context.shared.trampolines.borrow().get(&function.type_id()) {
            Some(trampoline) => Ok((trampoline.clone(), function.code.get())),
            None => Err(Failure::Because(Error::Usage("no function of this type is exported".to_owned()))),
        }
    }

    /// Calls the function behind a reference, on a stack of its own. An exception that comes back is in flight in the caller's context then.
    ///
    /// # Errors
    /// [`Failure::Thrown`] with an exception; else why no result came.
    pub fn call(&self, reference: u64, args: &[u64]) -> Result<(Vec<u64>, Stats), Failure> {
        let (trampoline, code) = self.function(reference)?;
        let shared = &self.context.shared;
        // What nests takes room on the thread's own stack, which does not grow.
        if self.context.depth.get() == MAX_NESTED {
            return Err(Failure::Because(Error::Nested(MAX_NESTED)));
        }
        let context = Context::new(shared.clone());
        context.depth.set(self.context.depth.get() + 1);
        let result = Thread::attach().and_then(|thread| {
            let mut stack = Stack::new(&thread, shared.config.policy)?;
            let result = store::enter(&context, &thread, &mut stack, &trampoline, code, args);
            Ok((result, stack.stats()))
        });
        match result {
            Ok((Ok(values), stats)) => Ok((values, stats)),
            Ok((Err(Error::Trap(Trap::UncaughtException)), _)) => {
                self.context.take_exception(&context);
                Err(Failure::Thrown)
            }
            Ok((Err(error), _)) => Err(Failure::Because(error)),
            Err(error) => Err(Failure::Because(error.into())),
        }
    }
}

/// The references of an element segment; empty once dropped.
pub type Elements = Rc<RefCell<Vec<u64>>>;
/// The bytes of a data segment; empty once dropped.
pub type Data = Rc<RefCell<Vec<u8>>>;

/// What managed code can ask for. Its address is a constant of the code.
pub enum Operation {
    /// A host function.
    Call {
        /// The function.
        function: HostFunction,
        /// Its type.
        ty: FuncType,
        /// The calling module's first memory.
        memory: Option<Rc<Memory>>,
    },
    /// Makes a reference to the exception in flight, which is caught then.
    Catch,
    /// `throw_ref`.
    ThrowRef,
    /// `memory.grow`.
    MemoryGrow(Rc<Memory>),
    /// `memory.fill`.
    MemoryFill(Rc<Memory>),
    /// `memory.copy`, destination first.
    MemoryCopy(Rc<Memory>, Rc<Memory>),
    /// `memory.init`.
    MemoryInit(Rc<Memory>, Data),
    /// `data.drop`.
    DataDrop(Data),
    /// `table.grow`.
    TableGrow(Rc<Table>),
    /// `table.fill`.
    TableFill(Rc<Table>),
    /// `table.copy`, destination first.
    TableCopy(Rc<Table>, Rc<Table>),
    /// `table.init`.
    TableInit(Rc<Table>, Elements),
    /// `elem.drop`.
    ElemDrop(Elements),
}

/// What `exit` calls: performs the operation at `operation` for the context at `context`. 0, or a trap's code.
///
/// # Safety
/// Both are addresses that the compiler of the running code made constants of it: they outlive the code.
pub unsafe extern "C" fn dispatch(context: usize, operation: usize, _: usize) -> u64 {
    // SAFETY: the caller's promise; the store keeps contexts and operations at their addresses while code exists.
    let (context, operation) = unsafe {
        (
            &*std::ptr::with_exposed_provenance::<Context>(context),
            &*std::ptr::with_exposed_provenance::<Operation>(operation),
        )
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| match operation {
        Operation::Call { function, ty, memory } => call(context, *function, ty, memory.as_deref()),
        _ => {
            // SAFETY: managed code waits for this call to return and these operations run none, so nobody else uses this place
            // meanwhile.
            perform(context, operation, unsafe { &mut *context.host.get() })
        }
    }));
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(trap)) => trap.code(),
        Err(_) => {
            *context.failure.borrow_mut() = Some(Error::System("a host function panicked".to_owned()));
            Trap::Host.code()
        }
    }
}

/// Calls a function of the host. It may run managed code with the same context, which uses the same places.
fn call(context: &Context, function: HostFunction, ty: &FuncType, memory: Option<&Memory>) -> Result<(), Trap> {
    // SAFETY: managed code waits for the host, which runs none while it copies.
    let slots = unsafe { &*context.host.get() };
    let args: Vec<u64> = ty.params.iter().zip(slots).map(|(ty, slot)| ty.mask(*slot)).collect();
    let mut results = vec![0; ty.results.len()];
    match function(&Caller { context, memory }, &args, &mut results) {
        Ok(()) => {}
        // The caller's code finds the exception in the context.
        Err(Failure::Thrown) => return Ok(()),
        Err(Failure::Because(error)) => {
            *context.failure.borrow_mut() = Some(error);
            return Err(Trap::Host);
        }
        Err(Failure::Exit(status)) => {
            context.status.set(status);
            return Err(Trap::Exit);
        }
    }
    // A single result is taken from the place for the host, several from the place for results.
    if let [single] = results[..] {
        // SAFETY: as above; the function has returned.
        unsafe { (*context.host.get())[0] = single };
    } else {
        // SAFETY: as above.
        let places = unsafe { &mut *context.results.get() };
        for (place, result) in places.iter_mut().zip(results) {
            *place = u128::from(result);
        }
    }
    Ok(())
}

fn perform(context: &Context, operation: &Operation, slots: &mut [u64]) -> Result<(), Trap> {
    let word = |at: usize| slots[at] & 0xffff_ffff;
    let grown = |old: Option<u64>| old.map_or(0xffff_ffff, |old| old);
    match operation {
        Operation::Call { .. } => unreachable!("`dispatch` calls"),
        Operation::Catch => {
            slots[0] = context.catch();
            Ok(())
        }
        Operation::ThrowRef => context.throw(slots[0]).then_some(()).ok_or(Trap::NullReference),
        Operation::MemoryGrow(memory) => {
            slots[0] = grown(memory.grow(word(0)));
            Ok(())
        }
        Operation::MemoryFill(memory) => memory.fill(word(0), slots[1] as u8, word(2)).ok_or(Trap::MemoryOutOfBounds),
        Operation::MemoryCopy(to, from) => to.copy(word(0), from, word(1), word(2)).ok_or(Trap::MemoryOutOfBounds),
        Operation::MemoryInit(memory, data) => {
            let data = data.borrow();
            let part = part(&data, word(1), word(2)).ok_or(Trap::MemoryOutOfBounds)?;
            memory.write(word(0), part).ok_or(Trap::MemoryOutOfBounds)
        }
        Operation::DataDrop(data) => {
            data.borrow_mut().clear();
            Ok(())
        }
        Operation::TableGrow(table) => {
            slots[0] = grown(table.grow(word(1), slots[0]));
            Ok(())
        }
        Operation::TableFill(table) => table.fill(word(0), slots[1], word(2)).ok_or(Trap::TableOutOfBounds),
        Operation::TableCopy(to, from) => to.copy(word(0), from, word(1), word(2)).ok_or(Trap::TableOutOfBounds),
        Operation::TableInit(table, elements) => {
            let elements = elements.borrow();
            let part = part(&elements, word(1), word(2)).ok_or(Trap::TableOutOfBounds)?;
            table.write(word(0), part).ok_or(Trap::TableOutOfBounds)
        }
        Operation::ElemDrop(elements) => {
            elements.borrow_mut().clear();
            Ok(())
        }
    }
}

fn part<T>(of: &[T], start: u64, len: u64) -> Option<&[T]> {
    of.get(start as usize..start.checked_add(len)? as usize)
}
