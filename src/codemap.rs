//! The code map: where managed code lies and what its frames look like.
//!
//! An engine registers its functions; [`Registration::publish`] adds them to the process-wide table, which is mapped read-only
//! and whose root stands in read-only memory too. Publishing belongs to the engine's own
//! W^X window: between the two `mprotect` calls the root is writable.
//!
//! A managed frame, as every rule here describes it:
//! ```text
//!             +--------------------------+
//!             | stack arguments, results |  incoming: the callee's own, else they belong to the caller's frame
//!   CFA ->    +--------------------------+  stack pointer at entry, = modifier of the signature
//!             | return address, signed   |  x86-64: always here
//!             | saves, locals            |  cfa_bytes, 16 where nothing but the record stands here
//!             | arm64: return address    |
//!   fp  ->    | caller's frame pointer   |  the frame record
//!             | locals, spills, saves    |  frame_bytes
//!             | outgoing arguments       |
//!   sp  ->    +--------------------------+  = CFA of the callee, plus its `incoming` (on x86-64 the call pushes below it)
//! ```
//! The youngest frame of a span is a stub's. Where a frame's caller lies follows from the caller's layout: its frame
//! pointer is the callee's CFA plus the callee's `incoming` plus the caller's `frame_bytes` at that call.
//!
//! A tail call changes whose frame stands there, with `incoming` bytes of its own: CFA plus `incoming` stays where it was.
//!
//! Callee-saved registers that hold pointers into the stack are named per call ([`Safepoint::registers`]); where a function saves such
//! registers is said once ([`Registration::saves`]), so that the walk knows where each caller's value is: in the youngest frame that has
//! saved it, and where none has, in what the stub keeps.

mod layout;
pub mod table;

use crate::error::Error;
use crate::pac::RawPc;
use std::collections::BTreeMap;

pub use layout::{FrameLayout, LARGEST_FRAME, Register, Safepoint};
pub use table::Table;

/// Functions to be published together.
#[derive(Debug, Default)]
pub struct Registration {
    functions: BTreeMap<usize, Function>,
}

#[derive(Clone, Debug)]
struct Function {
    start: usize,
    end: usize,
    layout: FrameLayout,
    /// Which callee-saved registers it saves, and where: offsets from fp.
    saves: Vec<(Register, i32)>,
    /// By return address.
    sites: BTreeMap<usize, Site>,
}

/// A call.
#[derive(Clone, Debug)]
struct Site {
    frame_bytes: u32,
    /// Offsets from fp of the slots that hold pointers into the stack.
    slots: Vec<i32>,
    /// One bit for each register that holds such a pointer.
    registers: u32,
}

impl Registration {
    /// Nothing yet.
    pub fn new() -> Self {
        Registration::default()
    }

    /// Adds a function of `len` bytes of code.
    ///
    /// # Errors
    /// [`Error::Layout`] for an empty, wrapping or overlapping range, and for a frame that cannot be. Nothing is added then.
    pub fn function(&mut self, start: RawPc, len: usize, layout: FrameLayout) -> Result<(), Error> {
        let refuse = |rule| Err(Error::Layout { start, rule });
        let begin = start.address();
        let Some(end) = begin.checked_add(len) else {
            return refuse("the code range wraps around");
        };
        if begin == 0 || len == 0 {
            return refuse("the code range is empty or starts at 0");
        }
        if cfg!(target_arch = "aarch64") && !(begin.is_multiple_of(4) && len.is_multiple_of(4)) {
            return refuse("code on arm64 is 4-byte aligned");
        }
        if let Some(rule) = layout.broken_rule() {
            return refuse(rule);
        }
        if self.functions.range(..end).next_back().is_some_and(|(_, before)| before.end > begin) {
            return refuse("the code range overlaps one that is registered already");
        }
        self.functions.insert(begin, Function { start: begin, end, layout, saves: vec![], sites: BTreeMap::new() });
        Ok(())
    }

    /// Says which callee-saved registers the added function at `start` saves, and where: offsets from fp in bytes, 8-byte aligned.
    /// For functions that save registers which a caller names in [`Safepoint::registers`]; others may leave it out.
    ///
    /// # Errors
    /// [`Error::Layout`] when no added function starts there, or this was said before; when a slot lies outside the frame,
    /// is misaligned, or is a slot for something else.
    pub fn saves(&mut self, start: RawPc, saves: &[(Register, i32)]) -> Result<(), Error> {
        let refuse = |rule| Err(Error::Layout { start, rule });
        let Some(function) = self.functions.get_mut(&start.address()) else {
            return refuse("no registered function starts here");
        };
        if !function.saves.is_empty() {
            return refuse("what the function saves was said already");
        }
        let layout = function.layout;
        if let Some(rule) = saves.iter().find_map(|&(_, offset)| layout.broken_slot(offset, layout.frame_bytes)) {
            return refuse(rule);
        }
        let twice = |(index, &(register, offset)): (usize, &(Register, i32))| {
            saves[..index].iter().any(|&(other, at)| other == register || at == offset)
        };
        if saves.iter().enumerate().any(twice) {
            return refuse("a register or a slot is named twice");
        }
        if function.sites.values().any(|site| saves.iter().any(|(_, offset)| site.slots.contains(offset))) {
            return refuse("a slot holds a pointer and a saved register");
        }
        function.saves = saves.to_vec();
        Ok(())
    }

    /// Says that at return address `pc` the slots at `offsets` (bytes from fp, 8-byte aligned) hold pointers into the stack.
    ///
    /// # Errors
    /// As [`Registration::call`].
    pub fn safepoint(&mut self, pc: RawPc, offsets: &[i32]) -> Result<(), Error> {
        self.call(pc, Safepoint { slots: offsets, ..Safepoint::default() })
    }

    /// Says what holds at the call that returns to `pc`. A call that nothing is said of has the function's layout and no
    /// pointers into the stack.
    ///
    /// # Errors
    /// [`Error::Layout`] when no added function holds `pc`; when its frame cannot have that size; when a slot lies outside the frame,
    /// is misaligned, named twice or a saved register's; or when the return address was described before.
    pub fn call(&mut self, pc: RawPc, safepoint: Safepoint<'_>) -> Result<(), Error> {
        let refuse = |rule| Err(Error::Layout { start: pc, rule });
        let address = pc.address();
        // A call can be a function's last instruction: its return address is then the function's end.
        let Some((_, function)) =
            self.functions.range_mut(..address).next_back().filter(|(_, function)| address <= function.end)
        else {
            return refuse("the safepoint lies in no registered function");
        };
        let layout = function.layout;
        let frame_bytes = safepoint.frame_bytes.unwrap_or(layout.frame_bytes);
        let slots = safepoint.slots;
        let broken = slots.iter().find_map(|&offset| layout.broken_slot(offset, frame_bytes));
        if let Some(rule) = layout.broken_size(frame_bytes).or(broken) {
            return refuse(rule);
        }
        let mut sorted = slots.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != slots.len() {
            return refuse("a slot is named twice");
        }
        if function.saves.iter().any(|(_, offset)| slots.contains(offset)) {
            return refuse("a slot holds a pointer and a saved register");
        }
        if function.sites.contains_key(&address) {
            return refuse("the safepoint is described twice");
        }
        let registers = safepoint.registers.iter().fold(0, |set, register| set | 1 << register.index());
        function.sites.insert(address, Site { frame_bytes, slots: sorted, registers });
        Ok(())
    }

    /// Builds a table of these functions alone, not published: what the software model and the fuzzers walk with.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn table(&self) -> Result<Table, Error> {
        Table::build(None, self.functions.values(), 0)
    }

    /// Adds the functions to the process-wide table.
    ///
    /// # Errors
    /// [`Error::Layout`] when one overlaps a published function, [`Error::Memory`]; nothing is published then.
    #[cfg(cfi_stack_native)]
    pub fn publish(self) -> Result<Registered, Error> {
        table::publish(self.functions.values()).map(|owner| Registered { owner })
    }
}

/// Functions that are published. Dropping it takes them out of the table: no frame of theirs may be live then.
#[cfg(cfi_stack_native)]
#[derive(Debug)]
pub struct Registered {
    owner: u64,
}

#[cfg(cfi_stack_native)]
impl Drop for Registered {
    fn drop(&mut self) {
        table::withdraw(self.owner);
    }
}

/// What the map says about a call, by its return address.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The frames of the function that it stands in.
    pub layout: &'a FrameLayout,
    /// Whether that layout is one that [`FrameLayout::new`] makes.
    pub(crate) plain: bool,
    /// fp − sp at this call.
    pub frame_bytes: u32,
    /// One bit for each register that holds a pointer into the stack at this call.
    pub registers: u32,
    /// Offsets from its fp of the slots that hold pointers into the stack at this call.
    pub slots: &'a [i32],
    /// What the function saves: pairs of a register's number and an offset from fp.
    pub(crate) saves: &'a [i32],
}

#[cfg(test)]
mod tests;
