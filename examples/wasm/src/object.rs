//! Tables, globals and functions: what instances share with each other, at addresses that stay.

use crate::error::Error;
use crate::types::{TypeId, ValType};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What a function reference points to. Managed code reads all words.
#[repr(C)]
pub struct Function {
    /// Where its code begins; zero until it is compiled.
    pub code: Cell<usize>,
    /// Its interned type, widened to a word.
    pub ty: u64,
    /// The code that a tail call goes to; 0 where its module has no tail calls.
    pub body: Cell<usize>,
}

/// A tag of exceptions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// Its number in the store, never 0.
    pub number: u64,
    /// Type of what its exceptions carry.
    pub ty: TypeId,
}

impl Function {
    /// A function whose code is not known yet.
    pub fn new(ty: TypeId) -> Rc<Function> {
        Rc::new(Function { code: Cell::new(0), ty: u64::from(ty.0), body: Cell::new(0) })
    }

    /// Its interned type.
    pub fn type_id(&self) -> TypeId {
        TypeId(self.ty as u32)
    }

    /// The reference.
    pub fn address(&self) -> usize {
        std::ptr::from_ref(self).expose_provenance()
    }
}

/// A global.
pub struct Global {
    /// Type of its value.
    pub content: ValType,
    /// Code may set it.
    pub mutable: bool,
    /// Its value's slot.
    pub slot: Cell<u64>,
}

impl Global {
    /// Where managed code finds the value.
    pub fn address(&self) -> usize {
        self.slot.as_ptr().expose_provenance()
    }
}

/// Most elements of a table: what the system would not refuse by itself.
const MAX_ELEMENTS: u64 = 10_000_000;

/// Where managed code finds a table's elements.
#[derive(Clone, Copy)]
#[repr(C)]
struct View {
    base: *mut u64,
    len: u64,
}

/// A table of references.
pub struct Table {
    /// Type of its elements.
    pub element: ValType,
    /// Most elements.
    pub maximum: Option<u64>,
    view: Cell<View>,
    entries: RefCell<Vec<u64>>,
}

impl Table {
    /// Offset of the elements' address from [`Table::view_address`].
    pub const BASE: i32 = std::mem::offset_of!(View, base) as i32;
    /// Offset of the number of elements.
    pub const LEN: i32 = std::mem::offset_of!(View, len) as i32;

    /// A table of `minimum` elements, each `init`.
    ///
    /// # Errors
    /// [`Error::System`] for more elements than this engine allows.
    pub fn new(element: ValType, minimum: u64, maximum: Option<u64>, init: u64) -> Result<Table, Error> {
        let view = Cell::new(View { base: std::ptr::null_mut(), len: 0 });
        let table = Table { element, maximum, view, entries: RefCell::default() };
        match table.grow(minimum, init) {
            Some(_) => Ok(table),
            None => Err(Error::System(format!("a table of {minimum} elements; at most {MAX_ELEMENTS} are allowed"))),
        }
    }

    /// Where managed code finds base and length.
    pub fn view_address(&self) -> usize {
        self.view.as_ptr().expose_provenance()
    }

    /// Present number of elements.
    pub fn len(&self) -> u64 {
        self.view.get().len
    }

    /// Adds elements; the former number, or `None` when there may not be so many.
    pub fn grow(&self, by: u64, init: u64) -> Option<u64> {
        let old = self.len();
        let new = old.checked_add(by).filter(|new| *new <= self.maximum.unwrap_or(u64::MAX).min(MAX_ELEMENTS))?;
        let mut entries = self.entries.borrow_mut();
        entries.try_reserve(by as usize).ok()?;
        entries.resize(new as usize, init);
        self.view.set(View { base: entries.as_mut_ptr(), len: new });
        Some(old)
    }

    fn span(&self, start: u64, len: u64) -> Option<std::ops::Range<usize>> {
        let end = start.checked_add(len)?;
        (end <= self.len()).then_some(start as usize..end as usize)
    }

    /// Copies references into the table; `None` when they do not fit.
    pub fn write(&self, start: u64, references: &[u64]) -> Option<()> {
        let span = self.span(start, references.len() as u64)?;
        self.entries.borrow_mut()[span].copy_from_slice(references);
        Some(())
    }

    /// `table.fill`.
    pub fn fill(&self, start: u64, reference: u64, len: u64) -> Option<()> {
        let span = self.span(start, len)?;
        self.entries.borrow_mut()[span].fill(reference);
        Some(())
    }

    /// `table.copy`, from another table or this one.
    pub fn copy(&self, start: u64, from: &Table, source: u64, len: u64) -> Option<()> {
        let references = from.entries.borrow()[from.span(source, len)?].to_vec();
        self.write(start, &references)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Heap;

    #[test]
    fn table_bounds_hold() {
        let element = ValType::Ref { nullable: true, heap: Heap::Func };
        let table = Table::new(element, 2, Some(3), 7).expect("small");
        assert_eq!(table.grow(1, 8), Some(2));
        assert_eq!(table.grow(1, 8), None);
        assert_eq!(table.copy(0, &table, 1, 2), Some(()));
        assert_eq!(table.copy(0, &table, 2, 2), None);
        assert_eq!(table.write(3, &[]), Some(()));
        assert_eq!(table.fill(u64::MAX, 0, 2), None);
        assert_eq!(*table.entries.borrow(), [7, 8, 8]);
        assert!(Table::new(element, u64::MAX, None, 0).is_err());
    }
}
