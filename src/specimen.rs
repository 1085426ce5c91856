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
//!   | oldest frame of the piece  |
//!   | its stack arguments        |
//!   | older stub's record, ..    |
//!   +------------+ top           +------------------+ top
//! ```

mod design;
#[cfg(test)]
mod inspected;
#[cfg(test)]
mod kinds;
#[cfg(test)]
mod parked;
#[cfg(all(test, cfi_stack_native))]
mod programs;
#[cfg(test)]
mod properties;
#[cfg(any(cfi_stack_native, test))]
mod scanned;
pub mod tampering;

use crate::abi::Record;
use crate::codemap::{FrameLayout, Register, Table};
use crate::error::Error;
use crate::error::Refusal;
use crate::pac::{RawPc, SignedPc, SignedPointer};
use crate::signer::Authenticator;
use crate::signer::model::Model;
use crate::walk::{Bounds, Piece, Walk};
use std::alloc::Layout;
use std::ptr::NonNull;

pub use design::{Call, Design, Function, MOST_CALLS, Pointer, Site};

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
    /// How its function makes frames.
    pub layout: FrameLayout,
    /// What it holds for the caller's frame pointer.
    pub saved_fp: u64,
    /// The caller's record; none for the oldest frame of a piece.
    pub caller: Option<usize>,
    /// The addresses of the words that hold the caller's pointers into the stack: its slots, then its registers.
    pub pointers: Vec<usize>,
}

impl Seen {
    /// Address of its return address.
    pub fn slot(&self) -> usize {
        self.record + self.layout.return_offset()
    }

    /// Its CFA.
    pub fn cfa(&self) -> usize {
        self.record + self.layout.cfa_bytes as usize
    }

    /// The same frame, `delta` bytes higher; what lies outside the source segment stays.
    fn moved(&self, source: &Record, delta: usize) -> Seen {
        let moved = |address: usize| {
            if (source.base..source.top).contains(&address) { address.wrapping_add(delta) } else { address }
        };
        let mut pointers: Vec<usize> = self.pointers.iter().map(|&address| moved(address)).collect();
        pointers.sort_unstable();
        Seen {
            record: moved(self.record),
            saved_fp: moved(self.saved_fp as usize) as u64,
            caller: self.caller.map(moved),
            pointers,
            ..*self
        }
    }
}

/// A stack in memory, and a place that it could move to.
#[derive(Debug)]
pub struct Specimen {
    model: Model,
    table: Table,
    /// Youngest first. Their addresses are those in the source.
    pieces: Vec<Piece>,
    shadow: Option<Vec<u64>>,
    source: Room,
    destination: Room,
    /// What the stubs keep of callee-saved registers, piece by piece.
    registers: Room,
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
        let block = Register::NAMES.len() * 8;
        let pieces = 1 + design.calls.len();
        let registers = Room::new((pieces * block).next_multiple_of(16), NATIVE_FP)?;
        let table = design.table()?;
        let (pieces, frames) = lay_out(design, youngest, registers.record.base);
        let shadow = design.shadow.then(|| frames.iter().map(|frame| frame.pc.address() as u64).collect());
        let mut specimen =
            Specimen { model, table, pieces, shadow, source, destination, registers, image: vec![], frames };
        specimen.fill(design);
        specimen.image = specimen.source.image();
        Ok(specimen)
    }

    /// Writes data, then pointers and saved registers, then records.
    fn fill(&mut self, design: &Design) {
        let Record { base, top, .. } = self.source.record;
        let youngest = self.youngest();
        let span = top - youngest;
        let mut state = design.contents;
        for address in (base..top).step_by(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let word = state ^ state >> 29 | HEAP;
            // Words that only look like pointers into the stack must stay as they are.
            let stale = youngest + (word >> 8) as usize % span;
            self.source.write(address, if word & 7 == 0 { stale as u64 } else { word });
        }
        // From the oldest frame to the youngest, as they came to be: what each register holds, and where it is put.
        let mut held = [Held::default(); Register::NAMES.len()];
        let mut frame = self.frames.len();
        for (index, call) in design.calls.iter().enumerate().rev() {
            let function = &design.functions[call.function];
            let site = &function.sites[call.site];
            if design.ends_piece(index) {
                // The stub of the piece keeps what native code does not.
                frame -= 1;
                held = [Held::default(); Register::NAMES.len()];
            }
            let record = self.frames[frame].record;
            let (end, bytes) = (self.frames[frame].cfa() + function.layout.incoming as usize, design.frame_bytes(call));
            if function.layout.conservative {
                (record - bytes..end).step_by(8).for_each(|address| self.source.write(address, HEAP));
            }
            for &(register, offset) in &function.saves {
                self.put(held[register.index()], record.wrapping_add_signed(offset as isize));
                // It keeps its value until the function puts another there, but nobody will use it.
                held[register.index()].owner = None;
            }
            frame -= 1;
            let words =
                call.pointers.iter().copied().chain(std::iter::repeat(Pointer::Null)).map(|pointer| match pointer {
                    Pointer::Null => 0,
                    Pointer::Heap(number) => number | HEAP,
                    Pointer::Own(offset) => (record - bytes + offset % (bytes + 16)) as u64,
                    Pointer::Span(offset) => (youngest + offset % span) as u64,
                    Pointer::Base => base as u64,
                    Pointer::Top => top as u64,
                    Pointer::AboveTop => top as u64 + 8,
                    Pointer::BelowBase => base as u64 - 8,
                });
            let mut words = words.take(site.slots.len() + site.registers.len()).collect::<Vec<_>>().into_iter();
            for (&offset, word) in site.slots.iter().zip(words.by_ref()) {
                let owner = Held { word, owner: Some(frame) };
                self.put(owner, record.wrapping_add_signed(offset as isize));
            }
            for (&register, word) in site.registers.iter().zip(words) {
                held[register.index()] = Held { word, owner: Some(frame) };
            }
            let next_is_older = index == 0 || design.ends_piece(index - 1);
            if next_is_older {
                self.keep(&held, frame);
            }
        }
        self.frames.iter_mut().for_each(|frame| frame.pointers.sort_unstable());
        for frame in &self.frames {
            self.source.write(frame.record, self.signed_pointer(frame).word());
            self.source.write(frame.slot(), self.signed(frame).word());
        }
    }

    /// Puts what a register or a slot holds where it stands until the frames move.
    fn put(&mut self, held: Held, address: usize) {
        self.source.write(address, held.word);
        if let Some(owner) = held.owner {
            self.frames[owner].pointers.push(address);
        }
    }

    /// The stub whose record is the frame's keeps what the registers hold at its call.
    fn keep(&mut self, held: &[Held], stub: usize) {
        let record = self.frames[stub].record;
        let Some(piece) = self.pieces.iter().find(|piece| piece.youngest == record && piece.registers != 0) else {
            return;
        };
        let block = piece.registers;
        for (index, held) in held.iter().enumerate() {
            self.registers.write(block + index * 8, held.word);
            if let Some(owner) = held.owner {
                self.frames[owner].pointers.push(block + index * 8);
            }
        }
    }

    fn signed(&self, frame: &Seen) -> SignedPc {
        self.model.sign(frame.pc, frame.layout.signing, frame.layout.binding.modifier(frame.cfa()))
    }

    fn signed_pointer(&self, frame: &Seen) -> SignedPointer {
        self.model.sign_pointer(frame.saved_fp, frame.layout.frame_pointer, frame.record)
    }

    /// Address of the youngest record.
    fn youngest(&self) -> usize {
        self.pieces[0].youngest
    }

    /// The pieces as they are in one of the rooms.
    fn pieces_in(&self, room: &Room) -> Vec<Piece> {
        let delta = room.record.top.wrapping_sub(self.source.record.top);
        let moved = |piece: &Piece| Piece {
            youngest: piece.youngest.wrapping_add(delta),
            base_cfa: piece.base_cfa.wrapping_add(delta),
            ..*piece
        };
        self.pieces.iter().map(moved).collect()
    }

    fn bounds<'a>(&'a self, room: &'a Room, pieces: &'a [Piece]) -> Bounds<'a> {
        let shadow = self.shadow.as_deref();
        Bounds { source: &room.record, pieces, complete: true, smallest_frame: 16, shadow, in_place: false }
    }

    fn walk(&self, room: &Room, pieces: &[Piece]) -> Result<Vec<Seen>, Refusal> {
        let mut walk = Walk::new(&self.model, &self.table, self.bounds(room, pieces));
        let mut frames = vec![];
        while let Some(frame) = walk.next() {
            let frame = frame?;
            let mut pointers = vec![];
            if let Some(caller) = frame.caller {
                pointers
                    .extend(caller.slots.iter().map(|&slot| caller.owner.record.wrapping_add_signed(slot as isize)));
                let named = (0..Register::NAMES.len()).filter(|index| caller.registers & 1 << index != 0);
                pointers.extend(named.filter_map(|index| walk.register(index)));
            }
            pointers.sort_unstable();
            frames.push(Seen {
                record: frame.owner.record,
                pc: frame.pc,
                layout: *frame.owner.layout,
                saved_fp: frame.saved_fp,
                caller: frame.caller.map(|caller| caller.owner.record),
                pointers,
            });
        }
        Ok(frames)
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

/// A word that a register holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    word: u64,
    /// The frame whose caller has put a pointer there.
    owner: Option<usize>,
}

impl Default for Held {
    /// What native code has there.
    fn default() -> Self {
        Held { word: HEAP, owner: None }
    }
}

/// The pieces and the frame records of a design, the youngest at an address. The blocks of registers begin at `block`.
fn lay_out(design: &Design, youngest: usize, mut block: usize) -> (Vec<Piece>, Vec<Seen>) {
    let (records, end) = design.place(youngest);
    let mut pieces = vec![];
    let mut frames = vec![];
    let mut stub = youngest;
    let begin = |pieces: &mut Vec<Piece>, stub: usize, block: &mut usize| {
        let registers = if design.keeps { *block } else { 0 };
        *block += Register::NAMES.len() * 8;
        let arguments = design.arguments;
        let bottom = ENTRY_RETURN;
        pieces.push(Piece {
            youngest: stub,
            lifted: None,
            stub: design.stub,
            bottom,
            base_cfa: 0,
            base_fp: NATIVE_FP,
            arguments,
            registers,
        });
    };
    let finish = |pieces: &mut Vec<Piece>, end: usize| {
        if let Some(piece) = pieces.last_mut() {
            piece.base_cfa = end - piece.arguments;
        }
    };
    let seen = |record, layout, next: Option<(usize, RawPc)>| Seen {
        record,
        pc: next.map_or(ENTRY_RETURN, |(_, pc)| pc),
        layout,
        saved_fp: next.map_or(NATIVE_FP, |(caller, _)| caller as u64),
        caller: next.map(|(caller, _)| caller),
        pointers: vec![],
    };
    begin(&mut pieces, stub, &mut block);
    let stubs = FrameLayout::new(0, design.stub);
    let mut younger = (stub, stubs);
    for (index, (call, &record)) in design.calls.iter().zip(&records).enumerate() {
        frames.push(seen(younger.0, younger.1, Some((record, design.pc(call)))));
        let layout = design.functions[call.function].layout;
        younger = (record, layout);
        if design.ends_piece(index) && index + 1 < design.calls.len() {
            frames.push(seen(record, layout, None));
            stub = record + (layout.cfa_bytes + layout.incoming) as usize;
            stub += if layout.incoming == 0 { design.arguments } else { 0 };
            finish(&mut pieces, stub);
            begin(&mut pieces, stub, &mut block);
            younger = (stub, stubs);
        }
    }
    frames.push(seen(younger.0, younger.1, None));
    finish(&mut pieces, end);
    (pieces, frames)
}
