//! Specimens: spans of managed frames, made in memory by the rules of [`crate::codemap`] over the software model, to be
//! walked, moved and tampered with on any host.
//!
//! A [`Design`] says what a specimen is made of; numbers decide it, so that a property test and a fuzzer can drive the same
//! one. [`Specimen::make`] plays the compiled code: it lays the frames out, signs their return addresses and pushes
//! them on a shadow stack. [`Specimen::migrate`] then does what `grow` does, with an attacker at its side
//! ([`tampering`]), and checks what every move must keep whatever the attacker wrote.
//!
//! Only there under the cargo feature `model`, which is for tests: the software model can sign.
//!
//! ```text
//!   source                       destination (disjoint, larger or smaller)
//!   | slack      | filled        | untouched        | keeps the pattern
//!   +------------+ low           |                  |
//!   | stub's record              +------------------+ low + delta
//!   | frame of calls[0]          | the same, re-bound
//!   | its record                 |
//!   | ..                         |
//!   | oldest record              |
//!   +------------+ top           +------------------+ top
//! ```

#[cfg(test)]
mod properties;
pub mod tampering;

use crate::abi::Record;
use crate::codemap::{FrameLayout, Registration, Table};
use crate::error::Error;
use crate::error::Refusal;
use crate::pac::{Modifier, RawPc, SignedPc, Signing};
use crate::signer::Signer;
use crate::signer::model::Model;
use crate::walk::{Bounds, Piece, Walk};
use std::alloc::Layout;
use std::ptr::NonNull;

/// Where the oldest frame returns to: registered by nobody, like the stub that it stands for.
pub const ENTRY_RETURN: RawPc = RawPc::new(0x4000);
/// The entry frame's frame pointer, on a native stack that nobody looks at.
pub const NATIVE_FP: u64 = 0x7ffd_0000_1230;
/// Where the code of a specimen would begin.
const CODE: usize = 0x5500_0000_1000;
/// What the destination holds before a move.
const PATTERN: u64 = 0xdddd_dddd_dddd_dddd;
/// Set in every pointer to the heap: no segment lies there.
const HEAP: u64 = 1 << 62;

/// What a specimen is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Design {
    /// The keys A and B of the CPU, or none on a CPU that authenticates nothing.
    pub keys: Option<[u64; 2]>,
    /// How the stub signs that owns the youngest record.
    pub stub: Signing,
    /// Whether a shadow stack is on.
    pub shadow: bool,
    /// The functions of the code map, by ascending address.
    pub functions: Vec<Function>,
    /// The managed frames, youngest first. The stub's own record comes before them.
    pub calls: Vec<Call>,
    /// Bytes of the source below the youngest record, a multiple of 16.
    pub slack: usize,
    /// Bytes of the destination below the moved youngest record, a multiple of 16.
    pub room: usize,
    /// Decides the words that are not pointers, records or return addresses.
    pub contents: u64,
}

/// A function of the code map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Layout of its frames.
    pub layout: FrameLayout,
    /// Bytes between the function before it and this one, a multiple of 4.
    pub gap: usize,
    /// Bytes of code, a positive multiple of 4.
    pub len: usize,
    /// Its calls, by ascending address.
    pub sites: Vec<Site>,
}

/// A call in a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Where it returns to, from the function's start: 1 up to its length.
    pub offset: usize,
    /// Offsets from fp of the slots that hold pointers into the stack.
    pub slots: Vec<i32>,
}

/// A managed frame: the call that it is suspended in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Index of the function.
    pub function: usize,
    /// Index of its site.
    pub site: usize,
    /// What the site's slots hold, in their order; slots beyond this list hold null.
    pub pointers: Vec<Pointer>,
}

/// What a slot for pointers into the stack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pointer {
    /// 0.
    Null,
    /// A place that is no stack's, made of this number.
    Heap(u64),
    /// This many bytes into its own frame, counted from its lowest address around its size.
    Own(usize),
    /// This many bytes into the span, counted from its lowest address around its size.
    Span(usize),
    /// The segment's lowest address.
    Base,
    /// One past its highest: still a pointer into the stack.
    Top,
    /// A word above that: a pointer into the stack no more.
    AboveTop,
    /// A word below the segment.
    BelowBase,
}

/// Largest number of managed frames that [`Design::choose`] makes.
pub const MOST_CALLS: u64 = 200;

impl Design {
    /// A design made of decisions: `pick(n)` gives a number below `n`, which is never 0.
    pub fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Design {
        let keys = match pick(4) {
            0 => None,
            _ => Some([pick(u64::MAX), pick(u64::MAX)]),
        };
        let signs = |pick: &mut dyn FnMut(u64) -> u64| match (keys, pick(2)) {
            (None, _) => Signing::None,
            (_, 0) => Signing::A,
            _ => Signing::B,
        };
        let stub = signs(pick);
        let shadow = pick(2) == 1;
        let functions: Vec<Function> = (0..=pick(6))
            .map(|_| {
                let signing = signs(pick);
                Function::choose(pick, signing)
            })
            .collect();
        let depth = match pick(8) {
            0 => pick(MOST_CALLS + 1),
            _ => pick(16),
        };
        let calls = (0..depth)
            .map(|_| {
                let function = pick(functions.len() as u64) as usize;
                let site = pick(functions[function].sites.len() as u64) as usize;
                let pointers = functions[function].sites[site].slots.iter().map(|_| Pointer::choose(pick)).collect();
                Call { function, site, pointers }
            })
            .collect();
        let slack = pick(32) as usize * 16;
        let room = pick(64) as usize * 16;
        Design { keys, stub, shadow, functions, calls, slack, room, contents: pick(u64::MAX) }
    }

    /// The code map that describes the design's frames.
    ///
    /// # Errors
    /// [`Error::Layout`] for functions that cannot be, [`Error::Memory`].
    pub fn table(&self) -> Result<Table, Error> {
        let mut map = Registration::new();
        for (function, start) in self.functions.iter().zip(self.starts()) {
            map.function(RawPc::new(start), function.len, function.layout)?;
            for site in &function.sites {
                map.safepoint(RawPc::new(start + site.offset), &site.slots)?;
            }
        }
        map.table()
    }

    /// The address behind a call.
    pub fn pc(&self, call: &Call) -> RawPc {
        let start = self.starts().nth(call.function).unwrap_or(CODE);
        RawPc::new(start + self.functions[call.function].sites[call.site].offset)
    }

    fn starts(&self) -> impl Iterator<Item = usize> {
        let mut end = CODE;
        self.functions.iter().map(move |function| {
            let start = end + function.gap;
            end = start + function.len;
            start
        })
    }

    fn frame_bytes(&self, call: &Call) -> usize {
        self.functions[call.function].layout.frame_bytes as usize
    }

    /// Bytes from the youngest record to the top.
    pub fn span(&self) -> usize {
        16 + self.calls.iter().map(|call| 16 + self.frame_bytes(call)).sum::<usize>()
    }
}

impl Function {
    fn choose(pick: &mut dyn FnMut(u64) -> u64, signing: Signing) -> Function {
        let frame_bytes = 16
            * match pick(24) {
                0 => pick(256) as u32,
                1..4 => 0,
                _ => pick(10) as u32,
            };
        let words = pick(63) as usize + 1;
        let first = pick(words as u64) as usize + 1;
        let sites = (first..=words)
            .step_by(pick(words as u64) as usize + 1)
            .take(5)
            .map(|word| {
                let mut slots: Vec<i32> =
                    (0..pick(4)).map(|_| -8 * (pick(u64::from(frame_bytes / 8).max(1)) as i32 + 1)).collect();
                slots.sort_unstable();
                slots.dedup();
                slots.retain(|&slot| slot >= -(frame_bytes as i32));
                Site { offset: word * 4, slots }
            })
            .collect();
        let layout = FrameLayout { frame_bytes, signing, movable: true };
        Function { layout, gap: pick(4) as usize * 4, len: words * 4, sites }
    }
}

impl Pointer {
    fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Pointer {
        match pick(10) {
            0 => Pointer::Null,
            1 => Pointer::Heap(pick(u64::MAX)),
            2 => Pointer::Base,
            3 => Pointer::Top,
            4 => Pointer::AboveTop,
            5 => Pointer::BelowBase,
            6 | 7 => Pointer::Own(pick(4096) as usize),
            _ => Pointer::Span(pick(1 << 20) as usize),
        }
    }
}

/// Memory that a segment stands in, and its record. There is no guard: an address sanitizer sees what oversteps it.
#[derive(Debug)]
struct Room {
    memory: NonNull<u8>,
    layout: Layout,
    record: Record,
}

impl Room {
    /// `bytes`, a positive multiple of 16, every word of it `word`.
    fn new(bytes: usize, word: u64) -> Result<Room, Error> {
        let failed = Error::Memory { what: "a specimen", bytes, errno: libc::ENOMEM };
        let layout = Layout::from_size_align(bytes, 16).map_err(|_| failed.clone())?;
        if bytes == 0 {
            return Err(failed);
        }
        // SAFETY: the layout is not empty.
        let memory = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(failed)?;
        let base = memory.as_ptr().expose_provenance();
        let record = Record { base, top: base + bytes, identity: 7, generation: 3, ..Record::default() };
        let room = Room { memory, layout, record };
        for address in (base..base + bytes).step_by(8) {
            room.write(address, word);
        }
        Ok(room)
    }

    fn words(&self) -> usize {
        self.layout.size() / 8
    }

    /// # Panics
    /// When the word lies elsewhere.
    fn write(&self, address: usize, word: u64) {
        assert!(address.is_multiple_of(8) && self.record.holds(address, 8));
        // SAFETY: the word lies in the memory, which self owns and never lends.
        unsafe { std::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(word) }
    }

    /// All its words.
    fn image(&self) -> Vec<u64> {
        // SAFETY: `new` has initialised that many words; nobody writes while the slice is copied.
        unsafe { std::slice::from_raw_parts(self.memory.cast::<u64>().as_ptr(), self.words()) }.to_vec()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), self.layout) }
    }
}

/// One frame record as a walk saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its address.
    pub record: usize,
    /// Where it returns to.
    pub pc: RawPc,
    /// How its function signs.
    pub signing: Signing,
    /// The caller's record, and where its pointers into the stack stand.
    pub caller: Option<(usize, Vec<i32>)>,
}

impl Seen {
    /// The same frame, `delta` bytes higher.
    fn moved(&self, delta: usize) -> Seen {
        let caller = self.caller.as_ref().map(|(record, slots)| (record.wrapping_add(delta), slots.clone()));
        Seen { record: self.record.wrapping_add(delta), caller, ..*self }
    }

    /// Addresses of the caller's slots that hold pointers into the stack.
    fn pointers(&self) -> impl Iterator<Item = usize> {
        self.caller
            .iter()
            .flat_map(|(record, slots)| slots.iter().map(|&slot| record.wrapping_add_signed(slot as isize)))
    }
}

/// A stack in memory, and a place that it could move to.
#[derive(Debug)]
pub struct Specimen {
    model: Model,
    table: Table,
    stub: Signing,
    youngest: usize,
    shadow: Option<Vec<u64>>,
    source: Room,
    destination: Room,
    /// What the source must hold: what it was made with, and what was tampered with since.
    image: Vec<u64>,
    /// What the frames are, youngest first, known from making them.
    frames: Vec<Seen>,
}

impl Specimen {
    /// Makes the stack that a design describes.
    ///
    /// # Errors
    /// What [`Design::table`] refuses.
    ///
    /// # Panics
    /// When the design names a function or a site that it does not have.
    pub fn make(design: &Design) -> Result<Specimen, Error> {
        let model = design.keys.map_or(Model::absent(), Model::new);
        let span = design.span();
        let source = Room::new(design.slack + span, 0)?;
        let destination = Room::new(design.room + span, PATTERN)?;
        let youngest = source.record.base + design.slack;
        let mut frames = Vec::with_capacity(design.calls.len() + 1);
        let mut record = youngest;
        let mut signing = design.stub;
        for call in &design.calls {
            let function = &design.functions[call.function];
            let caller = record + 16 + function.layout.frame_bytes as usize;
            let slots = function.sites[call.site].slots.clone();
            frames.push(Seen { record, pc: design.pc(call), signing, caller: Some((caller, slots)) });
            (record, signing) = (caller, function.layout.signing);
        }
        frames.push(Seen { record, pc: ENTRY_RETURN, signing, caller: None });

        let shadow = design.shadow.then(|| frames.iter().map(|frame| frame.pc.address() as u64).collect());
        let table = design.table()?;
        let mut specimen =
            Specimen { model, table, stub: design.stub, youngest, shadow, source, destination, image: vec![], frames };
        specimen.fill(design);
        specimen.image = specimen.source.image();
        Ok(specimen)
    }

    /// Writes data, then pointers, then records.
    fn fill(&self, design: &Design) {
        let Record { base, top, .. } = self.source.record;
        let span = top - self.youngest;
        let mut state = design.contents;
        for address in (base..top).step_by(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let word = state ^ state >> 29;
            // Words that only look like pointers into the stack must stay as they are.
            let stale = self.youngest + (word >> 8) as usize % span;
            self.source.write(address, if word & 7 == 0 { stale as u64 } else { word });
        }
        for (frame, call) in self.frames.iter().zip(&design.calls) {
            let (lowest, bytes) = (frame.record + 16, 16 + design.frame_bytes(call));
            let held = call.pointers.iter().copied().chain(std::iter::repeat(Pointer::Null));
            for (slot, pointer) in frame.pointers().zip(held) {
                let word = match pointer {
                    Pointer::Null => 0,
                    Pointer::Heap(number) => number | HEAP,
                    Pointer::Own(offset) => (lowest + offset % bytes) as u64,
                    Pointer::Span(offset) => (self.youngest + offset % span) as u64,
                    Pointer::Base => base as u64,
                    Pointer::Top => top as u64,
                    Pointer::AboveTop => top as u64 + 8,
                    Pointer::BelowBase => base as u64 - 8,
                };
                self.source.write(slot, word);
            }
        }
        for frame in &self.frames {
            let caller = frame.caller.as_ref().map_or(NATIVE_FP, |(record, _)| *record as u64);
            self.source.write(frame.record, caller);
            self.source.write(frame.record + 8, self.signed(frame).word());
        }
    }

    fn signed(&self, frame: &Seen) -> SignedPc {
        self.model.sign(frame.pc, frame.signing, Modifier::new(frame.record as u64 + 16))
    }

    fn piece(&self, room: &Room, youngest: usize) -> Piece {
        Piece {
            youngest,
            stub: self.stub,
            bottom: ENTRY_RETURN,
            base_cfa: room.record.top,
            base_fp: NATIVE_FP,
            arguments: 0,
            registers: 0,
        }
    }

    fn bounds<'a>(&'a self, room: &'a Room, pieces: &'a [Piece]) -> Bounds<'a> {
        Bounds { source: &room.record, pieces, complete: true, smallest_frame: 16, shadow: self.shadow.as_deref() }
    }

    fn walk(&self, room: &Room, youngest: usize) -> Result<Vec<Seen>, Refusal> {
        Walk::new(&self.model, &self.table, self.bounds(room, &[self.piece(room, youngest)]))
            .map(|frame| {
                let frame = frame?;
                let caller = frame.caller.map(|(record, slots)| (record, slots.to_vec()));
                Ok(Seen { record: frame.record, pc: frame.pc, signing: frame.signing, caller })
            })
            .collect()
    }

    /// What must be added to an address in the source for its place in the destination.
    pub fn delta(&self) -> usize {
        self.destination.record.top.wrapping_sub(self.source.record.top)
    }

    /// The frames that were made, youngest first.
    pub fn frames(&self) -> &[Seen] {
        &self.frames
    }

    /// Looks frames up in another code map from now on, as if the engine had described its code wrongly.
    pub fn describe(&mut self, table: Table) {
        self.table = table;
    }

    /// Whether return addresses are signed here.
    pub fn authenticates(&self) -> bool {
        self.model.authenticates()
    }
}
