//! The walk over a span: from a stub's frame record, which is the youngest, to what the oldest frame was entered by, piece by piece,
//! authenticating every return address and recomputing every saved frame pointer. It writes nothing.
//!
//! Frames are never inferred by content. Where a frame's caller lies follows from the code map: the caller's frame
//! pointer is the callee's CFA plus the caller's `frame_bytes`, and what the record holds must agree.

use crate::abi::{Extent, Record};
use crate::codemap::table::Cursor;
use crate::codemap::{Found, FrameLayout, Register, Table};
use crate::error::{Error, Refusal};
use crate::pac::{Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing, Tampered};
use crate::segment::read_word;
use crate::signer::Authenticator;

/// A span, and what a walk over it must meet.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// The segment that the span lies in: from the first piece's youngest record to the segment's top.
    pub source: &'a Record,
    /// The span's pieces, youngest first; there is at least one.
    pub pieces: &'a [Piece],
    /// Whether the last piece is the oldest on its shadow segment: then that must be used up.
    pub complete: bool,
    /// Smallest frame that the shadow stack was sized for, frame record included, in bytes.
    pub smallest_frame: usize,
    /// Return addresses on the shadow stack, youngest first, from the first piece's youngest entry, where one is on.
    pub shadow: Option<&'a [u64]>,
    /// Whether the frames stay where they are: then what cannot move may be among them.
    pub in_place: bool,
}

/// A run of managed frames between a stub's record, its youngest, and what its oldest frame returns to.
///
/// Stack arguments that the oldest frame was entered with lie above it, in the span: they move along and hold no
/// pointers into the stack.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Address of its youngest frame record, which is a stub's, ...
    pub youngest: usize,
    /// ... unless it goes on here when frames return that were lifted from above it: then it is the managed function's there.
    pub lifted: Option<RawPc>,
    /// How the stub signs.
    pub stub: Signing,
    /// Where its oldest frame returns to: behind the call in `enter` or in `link`.
    pub bottom: RawPc,
    /// The CFA of its oldest frame: the segment's top, or the youngest record of the piece before it in time, less
    /// `arguments`.
    pub base_cfa: usize,
    /// The frame pointer that its oldest frame saved: the entry frame's, on a native stack, or that of `link`'s record in the
    /// segment before.
    pub base_fp: u64,
    /// Bytes of stack arguments that its oldest frame was entered with.
    pub arguments: usize,
    /// Address of the block in which the stub keeps the callee-saved registers while the frames move and from which it
    /// loads them afterwards, in the order of [`Register::NAMES`]; 0 when it keeps none.
    pub registers: usize,
}

/// Number of callee-saved registers that are followed.
const REGISTERS: usize = Register::NAMES.len();

/// The layouts of stubs' frames, by their signing.
const STUBS: [&FrameLayout; 3] =
    [&FrameLayout::new(0, Signing::None), &FrameLayout::new(0, Signing::A), &FrameLayout::new(0, Signing::B)];

/// A frame as far as it is known before its record is read: where it is, and what its function does.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// Address of its record, which is its frame pointer.
    pub record: usize,
    /// How its function makes frames.
    pub layout: &'a FrameLayout,
    /// Whether that is the plain way.
    pub plain: bool,
}

impl<'a> Owner<'a> {
    fn stub(piece: &Piece) -> Owner<'a> {
        Owner { record: piece.youngest, layout: STUBS[piece.stub as usize], plain: true }
    }

    /// Address of its return address.
    #[inline]
    pub fn slot(&self) -> usize {
        self.record.wrapping_add(if self.plain { 8 } else { self.layout.return_offset() })
    }

    /// Its CFA.
    #[inline]
    pub fn cfa(&self) -> usize {
        self.record.wrapping_add(if self.plain { 16 } else { self.layout.cfa_bytes as usize })
    }
}

/// One frame record on the way.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Whose it is.
    pub owner: Owner<'a>,
    /// Where it returns to, authenticated.
    pub pc: RawPc,
    /// The frame pointer that it holds, authenticated where it is signed.
    pub saved_fp: u64,
    /// Who called. `None` for the oldest frame of a piece.
    pub caller: Option<Caller<'a>>,
}

/// The frame that a frame returns to.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// It.
    pub owner: Owner<'a>,
    /// Offsets from its fp of the slots that hold pointers into the stack.
    pub slots: &'a [i32],
    /// One bit for each callee-saved register that does; [`Walk::register`] knows where its value is.
    pub registers: u32,
}

/// The walk: an iterator over the frame records of a span, youngest first, from piece to piece. It ends after the first refusal.
pub struct Walk<'a, S> {
    signer: &'a S,
    authenticates: bool,
    map: Cursor<'a>,
    bounds: Bounds<'a>,
    /// The bounds of the source, looked at once.
    extent: Extent,
    /// The piece that the next record belongs to, and those behind it.
    piece: Piece,
    older: &'a [Piece],
    next: Option<Owner<'a>>,
    /// Why the piece's youngest frame cannot be what it must be.
    refused: Option<Error>,
    seen: usize,
    /// Where the values of the callee-saved registers are that the caller of the frame seen last had at its call.
    registers: [usize; REGISTERS],
    /// What that caller saves, and where: its own caller's values.
    saves: Option<(&'a [i32], usize)>,
}

impl<'a, S: Authenticator> Walk<'a, S> {
    /// A walk that has not begun.
    pub fn new(signer: &'a S, map: &'a Table, bounds: Bounds<'a>) -> Self {
        // Without a piece the first step finds no record.
        let nothing = Piece {
            youngest: 0,
            lifted: None,
            stub: Signing::None,
            bottom: RawPc::new(0),
            base_cfa: 0,
            base_fp: 0,
            arguments: 0,
            registers: 0,
        };
        let (&piece, older) = bounds.pieces.split_first().unwrap_or((&nothing, &[]));
        let mut walk = Walk {
            signer,
            authenticates: signer.authenticates(),
            map: Cursor::new(map),
            bounds,
            extent: bounds.source.extent(),
            piece,
            older,
            next: None,
            refused: None,
            seen: 0,
            registers: [0; REGISTERS],
            saves: None,
        };
        walk.begin(piece);
        walk
    }

    /// What is walked.
    pub fn bounds(&self) -> &Bounds<'a> {
        &self.bounds
    }

    /// Address of the word that holds what the register with this number held in the frame seen last's caller, at its call.
    ///
    /// `None` where a stub that keeps no registers is all that stands between.
    pub fn register(&self, index: usize) -> Option<usize> {
        self.registers.get(index).copied().filter(|&address| address != 0)
    }

    /// Walks on as long as frames and their callers are plain, which most are, and hands each to `note`: what it returns to, its
    /// address, and the caller with its slots. Where it stops, for whatever reason, the next step of the iterator goes on.
    #[inline]
    pub fn plain_frames(
        &mut self,
        mut note: impl FnMut(Owner<'a>, RawPc, usize, &'a [i32]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let ready = self.saves.is_none() && self.refused.is_none();
        let Some(mut owner) = self.next.filter(|owner| owner.plain && ready) else { return Ok(()) };
        let Extent { base, top } = self.extent;
        let highest = top.wrapping_sub(base).wrapping_sub(16);
        if top.wrapping_sub(base) < 16 || !base.is_multiple_of(16) {
            return Ok(());
        }
        let signer = self.signer;
        // Nothing is known yet. Whoever writes a return address of 0 is not taken for known code: from so many bytes the caller would follow
        // below its callee, where none is.
        let mut known = RawPc::new(0);
        let (mut frame_bytes, mut layout, mut slots): (usize, _, &[i32]) =
            (0_usize.wrapping_sub(32), owner.layout, &[]);
        loop {
            let Owner { record, .. } = owner;
            // Alignment and both bounds in one comparison: what is misaligned comes out large.
            if record.wrapping_sub(base).rotate_right(4) > highest >> 4 {
                break;
            }
            // SAFETY: both words lie within the source segment, which the caller keeps mapped; volatile, because
            // another thread may write there at any time.
            let (saved_fp, word) = unsafe { (read_word(record), read_word(record + 8)) };
            let modifier = Modifier::new(record as u64 + 16);
            let pc = signer.authenticate(SignedPc::from_word(word), record + 8, owner.layout.signing, modifier)?;
            if let Some(shadow) = self.bounds.shadow
                && shadow.get(self.seen) != Some(&(pc.address() as u64))
            {
                break;
            }
            if pc != known {
                if pc == self.piece.bottom {
                    break;
                }
                let Some(found) = self.map.find(pc).filter(|found| found.plain) else { break };
                if found.layout.signing == Signing::None && self.authenticates
                    || found.frame_bytes as usize + 16 < self.bounds.smallest_frame
                {
                    break;
                }
                (known, frame_bytes, layout, slots) = (pc, found.frame_bytes as usize, found.layout, found.slots);
            }
            let caller = record.wrapping_add(16).wrapping_add(frame_bytes);
            if saved_fp != caller as u64 || caller < record || caller.wrapping_sub(base) > highest {
                break;
            }
            note(owner, pc, caller, slots)?;
            self.seen += 1;
            owner = Owner { record: caller, layout, plain: true };
        }
        self.next = Some(owner);
        Ok(())
    }

    fn begin(&mut self, piece: Piece) {
        self.piece = piece;
        self.next = Some(Owner::stub(&piece));
        if let Some(pc) = piece.lifted {
            match self.map.find(pc) {
                Some(found) if found.layout.signing == Signing::None && self.authenticates => {
                    self.refused = Some(Error::Unsigned(pc));
                }
                Some(found) => {
                    self.next = Some(Owner { record: piece.youngest, layout: found.layout, plain: found.plain });
                }
                None => self.refused = Some(Error::UnknownCode(pc)),
            }
        }
        self.saves = None;
        self.registers = std::array::from_fn(|index| match piece.registers {
            0 => 0,
            block => block.wrapping_add(index * 8),
        });
    }

    fn step(&mut self, owner: Owner<'a>) -> Result<Frame<'a>, Refusal> {
        let Bounds { shadow, .. } = self.bounds;
        let Owner { record, layout, .. } = owner;
        let (slot, cfa) = (owner.slot(), owner.cfa());
        if !cfa.is_multiple_of(16) || !record.is_multiple_of(8) || !self.extent.holds(record, cfa.wrapping_sub(record))
        {
            return tampered("a frame record lies outside the stack or is misaligned", record);
        }
        // SAFETY: both words lie within the source segment, which the caller keeps mapped; volatile, because
        // another thread may write there at any time.
        let (saved_fp, word) = unsafe { (read_word(record), read_word(slot)) };
        let modifier = layout.binding.modifier(cfa);
        let pc = self.signer.authenticate(SignedPc::from_word(word), slot, layout.signing, modifier)?;
        if let Some(shadow) = shadow
            && shadow.get(self.seen) != Some(&(pc.address() as u64))
        {
            return tampered("a return address differs from the shadow stack's", slot);
        }
        self.seen += 1;
        let saved_fp = match layout.frame_pointer {
            PointerSigning::None => saved_fp,
            key => self.signer.authenticate_pointer(SignedPointer::from_word(saved_fp), record, key)?,
        };
        if let Some((saves, record)) = self.saves.take() {
            self.note_saves(saves, record);
        }
        if pc == self.piece.bottom && !self.recurs(&owner, pc) {
            self.end_of_piece(owner, saved_fp)?;
            return Ok(Frame { owner, pc, saved_fp, caller: None });
        }
        let &found = self.map.find(pc).ok_or(Error::UnknownCode(pc))?;
        let least = found.frame_bytes as usize;
        if found.layout.signing == Signing::None && self.authenticates {
            return Err(Error::Unsigned(pc).into());
        }
        if least + (found.layout.cfa_bytes as usize) < self.bounds.smallest_frame {
            return Err(Error::Layout { start: pc, rule: "the frame is below the policy's `smallest_frame`" }.into());
        }
        let caller = self.caller(owner, pc, saved_fp, &found)?;
        self.next = Some(caller.owner);
        Ok(Frame { owner, pc, saved_fp, caller: Some(caller) })
    }

    /// Finds the caller of a frame by its layout, whatever that is.
    #[inline(never)]
    fn caller(&mut self, owner: Owner<'a>, pc: RawPc, saved_fp: u64, found: &Found<'a>) -> Result<Caller<'a>, Refusal> {
        let Found { layout, frame_bytes, registers, slots, .. } = *found;
        let moves = !self.bounds.in_place;
        if let Some(reason) = layout.immovable.filter(|_| moves) {
            return Err(Error::Immovable { pc, reason }.into());
        }
        // The caller's stack pointer after the call.
        let begin = owner.cfa().saturating_add(owner.layout.incoming as usize);
        let computed = begin.saturating_add(frame_bytes as usize);
        let record = if layout.dynamic { saved_fp as usize } else { computed };
        let (cfa_bytes, incoming) = (layout.cfa_bytes as usize, layout.incoming as usize);
        let held = self.extent.holds(record, cfa_bytes + incoming);
        if layout.dynamic {
            // Nothing but the frame itself says how large it is. What is believed here shows at its own return address, which
            // authenticates under the CFA that follows, or is the shadow stack's.
            let in_piece = held && record + cfa_bytes <= self.piece.base_cfa.saturating_add(self.piece.arguments);
            if !in_piece || record < computed || !record.is_multiple_of(8) {
                return tampered("a saved frame pointer leads to where no frame can be", owner.record);
            }
        } else if !held {
            return Err(leaves(pc));
        }
        if saved_fp != record as u64 {
            return tampered("a saved frame pointer is not where the layouts put it", owner.record);
        }
        let caller = Owner { record, layout, plain: found.plain };
        if !caller.cfa().is_multiple_of(16) {
            return match layout.dynamic {
                true => tampered("a saved frame pointer leads to where no frame can be", owner.record),
                false => Err(Error::Layout { start: pc, rule: "the frame's CFA is not 16-byte aligned" }.into()),
            };
        }
        if moves && (0..REGISTERS).any(|index| registers & 1 << index != 0 && self.registers[index] == 0) {
            let reason = "a callee-saved register holds a pointer into the stack across a call that does not keep it";
            return Err(Error::Immovable { pc, reason }.into());
        }
        if layout.conservative && moves {
            self.no_hidden_pointer(begin, &caller, pc, found)?;
        }
        self.saves = (!found.saves.is_empty()).then_some((found.saves, record));
        Ok(Caller { owner: caller, slots, registers })
    }

    /// From here on the older frames' values of these registers are where this frame has saved them.
    #[cold]
    fn note_saves(&mut self, saves: &[i32], record: usize) {
        for pair in saves.chunks_exact(2) {
            if let Some(place) = self.registers.get_mut(pair[0] as usize) {
                *place = record.wrapping_add_signed(pair[1] as isize);
            }
        }
    }

    /// Refuses a frame with a word that points into the stack and is not declared. `begin` is the frame's lowest address.
    fn no_hidden_pointer(&self, begin: usize, caller: &Owner<'_>, pc: RawPc, found: &Found<'_>) -> Result<(), Refusal> {
        let end = caller.cfa() + caller.layout.incoming as usize;
        let known = |address: usize| {
            let offset = address.wrapping_sub(caller.record) as isize;
            address == caller.record
                || address == caller.slot()
                || found.slots.iter().any(|&slot| slot as isize == offset)
                || found.saves.chunks_exact(2).any(|pair| pair[1] as isize == offset)
        };
        for slot in (begin..end).step_by(8) {
            // SAFETY: the frame lies in the source segment, as `caller` has seen; volatile, as elsewhere.
            let word = unsafe { read_word(slot) } as usize;
            if word >= self.extent.base && word < self.extent.top && !known(slot) {
                return Err(Error::HiddenPointer { pc, slot }.into());
            }
        }
        Ok(())
    }

    /// Whether a frame that returns to where its piece ends is not the piece's oldest for all that: what frames were lifted above is a managed
    /// function, which may have called itself.
    #[inline(never)]
    fn recurs(&mut self, owner: &Owner<'_>, pc: RawPc) -> bool {
        let end = owner.cfa().saturating_add(owner.layout.incoming as usize);
        end < self.piece.base_cfa && self.map.find(pc).is_some()
    }

    /// The oldest frame of a piece is the one that the piece must end with.
    #[inline(never)]
    fn end_of_piece(&mut self, oldest: Owner<'_>, saved_fp: u64) -> Result<(), Refusal> {
        let record = oldest.record;
        // A function that owns the arguments which the piece was entered with, or one that was called by tail call with others,
        // ends where those end; one that does not begins below them.
        let end = oldest.cfa().saturating_add(oldest.layout.incoming as usize);
        let Piece { base_cfa, base_fp, arguments, .. } = self.piece;
        let span_end = base_cfa.saturating_add(arguments);
        if end != base_cfa && end != span_end {
            return Err(
                Tampered { evidence: "the oldest frame does not end where it was entered", slot: record }.into()
            );
        }
        if saved_fp != base_fp {
            return Err(Tampered { evidence: "the oldest frame pointer is not the entry frame's", slot: record }.into());
        }
        if let Some((&piece, older)) = self.older.split_first() {
            if piece.youngest < span_end {
                let evidence = "an older piece of the stack begins below the end of a younger one";
                return Err(Tampered { evidence, slot: piece.youngest }.into());
            }
            self.older = older;
            self.begin(piece);
        } else if self.bounds.complete && self.bounds.shadow.is_some_and(|shadow| shadow.len() != self.seen) {
            let evidence = "the shadow stack holds more return addresses than the stack";
            return Err(Tampered { evidence, slot: record }.into());
        }
        Ok(())
    }
}

#[cold]
fn tampered<T>(evidence: &'static str, slot: usize) -> Result<T, Refusal> {
    Err(Refusal::Tampered(Tampered { evidence, slot }))
}

/// The address is authentic, so it is the layout that cannot be.
#[cold]
fn leaves(pc: RawPc) -> Refusal {
    Error::Layout { start: pc, rule: "the frame leaves its segment" }.into()
}

impl<'a, S: Authenticator> Iterator for Walk<'a, S> {
    type Item = Result<Frame<'a>, Refusal>;

    fn next(&mut self) -> Option<Self::Item> {
        let owner = self.next.take()?;
        if let Some(error) = self.refused.take() {
            return Some(Err(error.into()));
        }
        Some(self.step(owner))
    }
}
