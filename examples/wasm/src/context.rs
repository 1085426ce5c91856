//! The context that managed code carries as its first argument: the library's activation and, off the stack, the
//! places through which values travel that registers cannot be trusted to hold.
//!
//! There is one context per store. Addresses of memories, tables, globals and functions are constants of the code,
//! so every instance of a store shares it.

use crate::memory::Memory;
use crate::trap::Trap;
use cfi_stack::engine::Activation;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::mem::offset_of;
use std::ops::Range;
use std::rc::Rc;

/// Slots of each place: WebAssembly allows 1,000 parameters and 1,000 results.
pub const SLOTS: usize = 1024;

/// A place that managed code and the host fill in turn, never at the same time.
pub type Slots = UnsafeCell<[u64; SLOTS]>;

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
    pub params: Slots,
    /// Results of functions with more than one, between callee and caller.
    pub results: Slots,
    /// Arguments of calls to the host.
    pub host: Slots,
    /// For the fault handler.
    pub code: UnsafeCell<CodeIndex>,
    /// Why the last host call failed.
    pub message: RefCell<Option<String>>,
    /// The status with which the program ended itself.
    pub status: Cell<i32>,
    /// Where the program's output goes; `None` passes it on to standard output.
    pub output: RefCell<Option<Vec<u8>>>,
}

impl Context {
    /// Offset of [`Context::params`].
    pub const PARAMS: i32 = offset_of!(Context, params) as i32;
    /// Offset of [`Context::results`].
    pub const RESULTS: i32 = offset_of!(Context, results) as i32;
    /// Offset of [`Context::host`].
    pub const HOST: i32 = offset_of!(Context, host) as i32;

    /// A context at an address that stays.
    pub fn new() -> Box<Context> {
        assert_eq!(offset_of!(Context, activation), 0, "managed code takes the context for its activation");
        let slots = || UnsafeCell::new([0; SLOTS]);
        Box::new(Context {
            activation: Activation::new(),
            params: slots(),
            results: slots(),
            host: slots(),
            code: UnsafeCell::default(),
            message: RefCell::default(),
            status: Cell::default(),
            output: RefCell::default(),
        })
    }

    /// Its address, a constant of the code compiled for it.
    pub fn address(&self) -> usize {
        std::ptr::from_ref(self).expose_provenance()
    }

    /// Changes the index that the fault handler reads.
    pub fn with_code(&self, change: impl FnOnce(&mut CodeIndex)) {
        // SAFETY: no managed code of this store runs now (a context is not `Sync` and hosts do not re-enter), so the
        // fault handler, which reads the index only when managed code faulted, cannot be reading it.
        change(unsafe { &mut *self.code.get() });
    }
}
