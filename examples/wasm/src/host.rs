//! The host's side of calls: one entry, which managed code reaches through the library's `exit`, and the operations
//! that it can ask for. They run on the thread's own stack, never unwind out and never re-enter managed code.

use crate::context::Context;
use crate::memory::Memory;
use crate::object::Table;
use crate::trap::Trap;
use crate::types::FuncType;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

/// A function of the host: arguments in, results out, both as slots.
pub type HostFunction = fn(&Caller<'_>, &[u64], &mut [u64]) -> Result<(), Failure>;

/// Why a host function does not return to the program.
pub enum Failure {
    /// It failed, for this reason.
    Message(String),
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
    // SAFETY: managed code waits for this call to return, so nobody else uses these places meanwhile.
    let (slots, results) = unsafe { (&mut *context.host.get(), &mut *context.results.get()) };
    let outcome = catch_unwind(AssertUnwindSafe(|| perform(context, operation, slots, results)));
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(trap)) => trap.code(),
        Err(_) => {
            *context.message.borrow_mut() = Some("a host function panicked".to_owned());
            Trap::Host.code()
        }
    }
}

fn perform(context: &Context, operation: &Operation, slots: &mut [u64], results: &mut [u64]) -> Result<(), Trap> {
    let word = |at: usize| slots[at] & 0xffff_ffff;
    let grown = |old: Option<u64>| old.map_or(0xffff_ffff, |old| old);
    match operation {
        Operation::Call { function, ty, memory } => {
            let args: Vec<u64> = ty.params.iter().zip(&*slots).map(|(ty, slot)| ty.mask(*slot)).collect();
            let count = ty.results.len();
            // A single result is taken from the place for the host, several from the place for results.
            let place = if count > 1 { results } else { slots };
            function(&Caller { context, memory: memory.as_deref() }, &args, &mut place[..count]).map_err(|failure| {
                match failure {
                    Failure::Message(text) => {
                        *context.message.borrow_mut() = Some(text);
                        Trap::Host
                    }
                    Failure::Exit(status) => {
                        context.status.set(status);
                        Trap::Exit
                    }
                }
            })
        }
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
