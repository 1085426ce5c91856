//! The code map: where managed code lies and what its frames look like.
//!
//! An engine registers its functions; [`Registration::publish`] adds them to the process-wide table, which is mapped read-only
//! and whose root stands in read-only memory too. Publishing belongs to the engine's own
//! W^X window: between the two `mprotect` calls the root is writable.
//!
//! A managed frame, as every rule here describes it:
//! ```text
//!   CFA ->  +------------------------+  stack pointer at entry, = modifier of the signature
//!           | return address, signed |
//!   fp  ->  | caller's frame pointer |  the frame record
//!           | locals, spills, saves  |  frame_bytes
//!   sp  ->  | outgoing arguments     |
//!           +------------------------+  = CFA of the callee (on x86-64 the call pushes below it)
//! ```

pub mod table;

use crate::error::Error;
use crate::pac::{RawPc, Signing};
use std::collections::BTreeMap;

pub use table::Table;

/// Layout of the frames of one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLayout {
    /// Bytes between the frame record and the stack pointer at every call: fp − sp.
    /// A multiple of 16, below 2 GiB.
    pub frame_bytes: u32,
    /// How the function signs its return address.
    pub signing: Signing,
    /// Whether its frames may move. A frame that may not refuses every move of its span.
    pub movable: bool,
}

/// Largest `frame_bytes` accepted: an offset in a frame fits in 31 bits.
pub const LARGEST_FRAME: u32 = i32::MAX as u32 & !15;

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
    /// Return address → offsets from fp of the slots that hold pointers into the stack.
    sites: BTreeMap<usize, Vec<i32>>,
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
        if !layout.frame_bytes.is_multiple_of(16) {
            return refuse("`frame_bytes` is not a multiple of 16");
        }
        if layout.frame_bytes > LARGEST_FRAME {
            return refuse("`frame_bytes` is above 2 GiB");
        }
        if self.functions.range(..end).next_back().is_some_and(|(_, before)| before.end > begin) {
            return refuse("the code range overlaps one that is registered already");
        }
        self.functions.insert(begin, Function { start: begin, end, layout, sites: BTreeMap::new() });
        Ok(())
    }

    /// Says that at return address `pc` the slots at `offsets` (bytes from fp, negative, 8-byte aligned) hold pointers into the stack.
    ///
    /// # Errors
    /// [`Error::Layout`] when no added function holds `pc`, or a slot lies outside its frame or is misaligned, or the
    /// return address was described before.
    pub fn safepoint(&mut self, pc: RawPc, offsets: &[i32]) -> Result<(), Error> {
        let refuse = |rule| Err(Error::Layout { start: pc, rule });
        let address = pc.address();
        // A call can be a function's last instruction: its return address is then the function's end.
        let Some((_, function)) =
            self.functions.range_mut(..address).next_back().filter(|(_, function)| address <= function.end)
        else {
            return refuse("the safepoint lies in no registered function");
        };
        let lowest = -i64::from(function.layout.frame_bytes);
        if offsets.iter().any(|&offset| i64::from(offset) < lowest || offset > -8) {
            return refuse("a slot lies outside its frame");
        }
        if offsets.iter().any(|offset| offset % 8 != 0) {
            return refuse("a slot is not 8-byte aligned");
        }
        let mut sorted = offsets.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() != offsets.len() {
            return refuse("a slot is named twice");
        }
        if function.sites.contains_key(&address) {
            return refuse("the safepoint is described twice");
        }
        function.sites.insert(address, sorted);
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

/// What the map says about the function that a return address lies in.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// Its frames.
    pub layout: FrameLayout,
    /// Offsets from its fp of the slots that hold pointers into the stack at this return address.
    pub slots: &'a [i32],
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: FrameLayout = FrameLayout { frame_bytes: 64, signing: Signing::A, movable: true };

    fn refused(result: Result<(), Error>) -> &'static str {
        match result {
            Err(Error::Layout { rule, .. }) => rule,
            other => panic!("expected a layout error, got {other:?}"),
        }
    }

    #[test]
    fn impossible_functions_are_refused() {
        let mut map = Registration::new();
        let at = RawPc::new;
        assert!(refused(map.function(at(0x1000), 0, LAYOUT)).contains("empty"));
        assert!(refused(map.function(at(0), 16, LAYOUT)).contains("starts at 0"));
        assert!(refused(map.function(at(usize::MAX - 7), 16, LAYOUT)).contains("wraps"));
        assert!(refused(map.function(at(0x1000), 16, FrameLayout { frame_bytes: 8, ..LAYOUT })).contains("multiple"));
        assert!(
            refused(map.function(at(0x1000), 16, FrameLayout { frame_bytes: LARGEST_FRAME + 16, ..LAYOUT }))
                .contains("2 GiB")
        );
        assert_eq!(map.function(at(0x1000), 0x100, LAYOUT), Ok(()));
        for (start, len) in [(0x1000, 0x100), (0x10fc, 8), (0xff0, 0x14), (0xff0, 0x1000), (0x1010, 4)] {
            assert!(refused(map.function(at(start), len, LAYOUT)).contains("overlaps"), "{start:#x}+{len:#x}");
        }
        assert_eq!(map.function(at(0x1100), 4, LAYOUT), Ok(()));
        assert_eq!(map.function(at(0xffc), 4, LAYOUT), Ok(()));
    }

    #[test]
    fn impossible_safepoints_are_refused() {
        let mut map = Registration::new();
        map.function(RawPc::new(0x1000), 0x100, LAYOUT).unwrap();
        let at = RawPc::new(0x1010);
        assert!(refused(map.safepoint(RawPc::new(0x1000), &[])).contains("no registered"));
        assert!(refused(map.safepoint(RawPc::new(0x1101), &[])).contains("no registered"));
        for outside in [-72, 0, 8, i32::MIN, i32::MAX] {
            assert!(refused(map.safepoint(at, &[outside])).contains("outside"), "{outside}");
        }
        assert!(refused(map.safepoint(at, &[-12])).contains("aligned"));
        assert!(refused(map.safepoint(at, &[-16, -16])).contains("twice"));
        assert_eq!(map.safepoint(at, &[-64, -8]), Ok(()));
        assert!(refused(map.safepoint(at, &[-8])).contains("twice"));
    }

    #[test]
    fn look_up_finds_the_function_that_called() {
        let mut map = Registration::new();
        map.function(RawPc::new(0x1000), 0x100, LAYOUT).unwrap();
        map.function(RawPc::new(0x1100), 0x100, FrameLayout { frame_bytes: 32, ..LAYOUT }).unwrap();
        map.safepoint(RawPc::new(0x1100), &[-16, -8]).unwrap();
        let table = map.table().unwrap();
        let frame_bytes = |pc| table.find(RawPc::new(pc)).map(|found| found.layout.frame_bytes);
        assert_eq!(frame_bytes(0x1000), None, "a return address is never a function's first byte");
        assert_eq!(frame_bytes(0x1004), Some(64));
        assert_eq!(frame_bytes(0x1100), Some(64), "a call as the last instruction");
        assert_eq!(frame_bytes(0x1101), Some(32));
        assert_eq!(frame_bytes(0x1200), Some(32));
        assert_eq!(frame_bytes(0x1201), None);
        assert_eq!(table.find(RawPc::new(0x1100)).unwrap().slots, [-16, -8]);
        assert!(table.find(RawPc::new(0x1101)).unwrap().slots.is_empty());
    }
}
