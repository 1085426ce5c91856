//! The context that managed code carries as its first argument: the library's activation and, off the stack, the
//! places through which values travel that registers cannot be trusted to hold.
//!
//! Addresses of memories, tables, globals and functions are constants of the code, so every instance of a store shares
//! its context. A call that the host makes while managed code waits for it has a context of its own.

use crate::error::Error;
use crate::memory::Memory;
use crate::store::Config;
use crate::trap::Trap;
use crate::types::{FuncType, TypeId};
use cfi_stack::engine::Activation;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::HashMap;
use std::mem::offset_of;
use std::ops::Range;
use std::rc::Rc;

/// Slots of each place: WebAssembly allows 1,000 parameters and 1,000 results.
pub const SLOTS: usize = 1024;

/// A place that managed code and the host fill in turn, never at the same time.
pub type Slots = UnsafeCell<[u64; SLOTS]>;
/// One between managed functions, whose values may be vectors.
pub type WideSlots = UnsafeCell<[u128; SLOTS]>;

/// Where in the context the slots of a place lie.
#[derive(Clone, Copy)]
pub struct Place {
    offset: usize,
    stride: usize,
}

impl Place {
    /// Offset of a slot from the context.
    pub fn at(self, index: usize) -> i32 {
        (self.offset + self.stride * index) as i32
    }
}

/// A way in for functions of one type.
#[derive(Clone)]
pub struct Trampoline {
    /// Its code.
    pub code: usize,
    /// The type.
    pub ty: FuncType,
}

/// A caught exception, for as long as its store lives: what an `exnref` points to.
pub struct Caught {
    tag: u64,
    values: Vec<u128>,
}

/// What the contexts of one store share.
pub struct Shared {
    /// For the fault handler.
    pub code: UnsafeCell<CodeIndex>,
    /// Ways in for calls from the host.
    pub trampolines: RefCell<HashMap<TypeId, Trampoline>>,
    /// How the store was configured.
    pub config: Config,
    caught: RefCell<Vec<Rc<Caught>>>,
}

impl Shared {
    /// Nothing yet.
    pub fn new(config: Config) -> Rc<Shared> {
        let (code, trampolines, caught) = (UnsafeCell::default(), RefCell::default(), RefCell::default());
        Rc::new(Shared { code, trampolines, config, caught })
    }
}

/// What the fault handler looks up. Changed only while no managed code runs.
#[derive(Default)]
pub struct CodeIndex {
    /// Managed code.
    pub ranges: Vec<Range<usize>>,
    /// Instructions that may trap, by address, in order.
    pub traps: Vec<(usize, Trap)>,
    /// Memories whose guards turn a fault into a trap.
    pub memories: Vec<Rc<Memory>>,
}

impl CodeIndex {
    /// Whether `pc` lies in managed code.
    pub fn is_managed(&self, pc: usize) -> bool {
        self.ranges.iter().any(|range| range.contains(&pc))
    }

    /// The trap that the instruction at `pc` may raise.
    pub fn trap_at(&self, pc: usize) -> Option<Trap> {
        let at = self.traps.binary_search_by_key(&pc, |trap| trap.0).ok()?;
        Some(self.traps[at].1)
    }

    /// Whether `address` lies in a memory or its guard.
    pub fn is_memory(&self, address: usize) -> bool {
        self.memories.iter().any(|memory| memory.reservation().contains(&address))
    }
}

/// The context. Its address is that of its activation.
#[repr(C, align(16))]
pub struct Context {
    /// The library's part; managed code compares its stack pointer with the limit in it.
    pub activation: Activation,
    /// Parameters beyond [`crate::emit::MAX_DIRECT`], between caller and callee.
    pub params: WideSlots,
    /// Results of functions with more than one, between callee and caller.
    pub results: WideSlots,
    /// What the exception in flight carries.
    pub thrown: WideSlots,
    /// Arguments of calls to the host.
    pub host: Slots,
    /// Tag of the exception in flight; 0 when there is none.
    pub exception: Cell<u64>,
    /// Number of values that it carries.
    pub carried: Cell<u64>,
    /// Code of the function that a tail call goes to which has no body for it.
    pub tail_callee: Cell<u64>,
    /// Number of calls by the host that this one is within.
    pub depth: Cell<usize>,
    /// The store's.
    pub shared: Rc<Shared>,
    /// Why the last host call failed.
    pub failure: RefCell<Option<Error>>,
    /// The status with which the program ended itself.
    pub status: Cell<i32>,
    /// Where the program's output goes; `None` passes it on to standard output.
    pub output: RefCell<Option<Vec<u8>>>,
}

impl Context {
    /// Where [`Context::params`] lie.
    pub const PARAMS: Place = Place { offset: offset_of!(Context, params), stride: 16 };
    /// Where [`Context::results`] lie.
    pub const RESULTS: Place = Place { offset: offset_of!(Context, results), stride: 16 };
    /// Where [`Context::thrown`] lies.
    pub const THROWN: Place = Place { offset: offset_of!(Context, thrown), stride: 16 };
    /// Where [`Context::host`] lies.
    pub const HOST: Place = Place { offset: offset_of!(Context, host), stride: 8 };
    /// Offset of [`Context::exception`].
    pub const EXCEPTION: i32 = offset_of!(Context, exception) as i32;
    /// Offset of [`Context::carried`].
    pub const CARRIED: i32 = offset_of!(Context, carried) as i32;
    /// Offset of [`Context::tail_callee`].
    pub const TAIL_CALLEE: i32 = offset_of!(Context, tail_callee) as i32;

    /// A context at an address that stays.
    pub fn new(shared: Rc<Shared>) -> Box<Context> {
        assert_eq!(offset_of!(Context, activation), 0, "managed code takes the context for its activation");
        let wide = || UnsafeCell::new([0; SLOTS]);
        Box::new(Context {
            activation: Activation::new(),
            params: wide(),
            results: wide(),
            thrown: wide(),
            host: UnsafeCell::new([0; SLOTS]),
            exception: Cell::default(),
            carried: Cell::default(),
            tail_callee: Cell::default(),
            depth: Cell::default(),
            shared,
            failure: RefCell::default(),
            status: Cell::default(),
            output: RefCell::default(),
        })
    }

    /// Forgets an exception that a trap cut short.
    pub fn reset(&self) {
        self.exception.set(0);
    }

    /// Keeps the exception in flight; a reference to it, and no exception is in flight any more.
    pub fn catch(&self) -> u64 {
        // SAFETY: managed code waits for the host, which alone looks at the place now.
        let thrown = unsafe { &*self.thrown.get() };
        let values = thrown[..(self.carried.get() as usize).min(SLOTS)].to_vec();
        let caught = Rc::new(Caught { tag: self.exception.replace(0), values });
        let reference = Rc::as_ptr(&caught).expose_provenance();
        self.shared.caught.borrow_mut().push(caught);
        reference as u64
    }

    /// Takes over the exception that is in flight in another context.
    pub fn take_exception(&self, other: &Context) {
        // SAFETY: managed code of this context waits for the host, and that of the other has ended.
        unsafe { *self.thrown.get() = *other.thrown.get() };
        self.carried.set(other.carried.get());
        self.exception.set(other.exception.replace(0));
    }

    /// Throws a caught exception again; false when the reference is none of this store.
    pub fn throw(&self, reference: u64) -> bool {
        let list = self.shared.caught.borrow();
        let found = list.iter().rev().find(|caught| Rc::as_ptr(caught).addr() as u64 == reference);
        let Some(caught) = found else { return false };
        // SAFETY: as in `catch`.
        let thrown = unsafe { &mut *self.thrown.get() };
        thrown[..caught.values.len()].copy_from_slice(&caught.values);
        self.carried.set(caught.values.len() as u64);
        self.exception.set(caught.tag);
        true
    }

    /// Its address, a constant of the code compiled for it.
    pub fn address(&self) -> usize {
        std::ptr::from_ref(self).expose_provenance()
    }

    /// Changes the index that the fault handler reads.
    pub fn with_code(&self, change: impl FnOnce(&mut CodeIndex)) {
        // SAFETY: no managed code of this store runs now (contexts are not `Sync`, and who changes it has the store to itself), so the
        // fault handler, which reads the index only when managed code faulted, cannot be reading it.
        change(unsafe { &mut *self.shared.code.get() });
    }
}
