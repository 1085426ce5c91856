//! Migration of a specimen with an attacker at its side, who writes memory at three moments, and the laws that hold
//! whatever is written.
//!
//! The laws, checked by [`Specimen::migrate`] after every move and refusal:
//! - Nothing but the attacker writes the source.
//! - Before all frames are walked and authenticated nothing writes the destination; nothing ever writes it outside the moved span.
//! - A move that is accepted leaves, in the destination, the frames that the walk saw: a walk there sees the same, moved by
//!   one delta. Where the attacker rewrote the plan, or the shadow stack behind the walk's back, that walk may refuse instead
//!   (the run ends there), but never sees other frames.
//! - Every word of the span is the source's, but for return addresses (re-signed), saved frame pointers and the
//!   slots that the code map names (rebased by delta when they point into the source).

use super::{PATTERN, Seen, Specimen};
use crate::abi::{Detail, Rebinding, Record};
use crate::error::{Error, Refusal};
use crate::pac::{Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing, Tampered};
use crate::plan::Plan;
use crate::relocate::relocate;
use crate::signer::model::Model;
use crate::signer::{Authenticator, Signer, Way, Words};
use crate::walk::Walk;
use std::cell::RefCell;

/// When the attacker writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the walk.
    Begun,
    /// The frames are walked, the plan stands, nothing is copied.
    Planned,
    /// The span is copied and rebased, nothing is re-bound: the last moment before the stub reads.
    Rebased,
}

/// What the attacker writes. Indices count around the number of what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Changes these bits of a word of the source segment.
    Word(usize, u64),
    /// Copies a word of the source segment over another: replay.
    Copy {
        /// The word that is copied.
        from: usize,
        /// The word that is overwritten.
        to: usize,
    },
    /// Puts a return address of the specimen, not signed, over a word of the source segment.
    Raw {
        /// The frame that returns there.
        from: usize,
        /// The word that is overwritten.
        to: usize,
    },
    /// Changes these bits of an entry of the shadow stack.
    Shadow(usize, u64),
    /// Takes the oldest entry from the shadow stack, or adds one.
    ShadowLength(bool),
    /// Changes these bits of a planned slot.
    Slot(usize, u64),
    /// Changes these bits of a planned return address.
    Pc(usize, u64),
    /// Changes these bits, of three, of what a planned entry says of its signing.
    Signing(usize, u64),
    /// Changes these bits of what a described entry says besides.
    Detail(usize, u64),
    /// Changes these bits of the place of a signed frame pointer. At [`Moment::Planned`] only.
    Signed(usize, u64),
    /// Changes these bits of the index of a frame pointer that stands apart. At [`Moment::Planned`] only.
    Link(usize, u64),
    /// Changes these bits of the address of a slot that is to be rebased. At [`Moment::Planned`] only.
    Pointer(usize, u64),
    /// Changes these bits of the span's lowest address. At [`Moment::Planned`] only.
    Low(u64),
    /// Changes these bits of each frame pointer that the plan expects to stand apart. At [`Moment::Planned`] only.
    NativeFp(u64),
}

/// A write and its moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tampering {
    /// When.
    pub moment: Moment,
    /// What.
    pub write: Write,
}

impl Tampering {
    /// A tampering made of decisions: `pick(n)` gives a number below `n`, which is never 0.
    pub fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Tampering {
        let moment = [Moment::Begun, Moment::Planned, Moment::Rebased][pick(3) as usize];
        let kind = pick(14);
        let index = pick(1 << 16) as usize;
        let bits = match pick(3) {
            0 => 1 << pick(64),
            1 => pick(256) << (8 * pick(8)),
            _ => pick(u64::MAX),
        };
        let write = match kind {
            0 => Write::Word(index, bits),
            1 => Write::Copy { from: index, to: pick(1 << 16) as usize },
            2 => Write::Raw { from: index, to: pick(1 << 16) as usize },
            3 => Write::Shadow(index, bits),
            4 => Write::ShadowLength(index & 1 == 1),
            5 => Write::Slot(index, bits),
            6 => Write::Pc(index, bits),
            7 => Write::Signing(index, bits & 7),
            8 => Write::Pointer(index, bits),
            9 => Write::Low(bits),
            10 => Write::Detail(index, bits),
            11 => Write::Signed(index, bits),
            12 => Write::Link(index, bits),
            _ => Write::NativeFp(bits),
        };
        Tampering { moment, write }
    }

    /// Whether the move acts on words that the walk did not see: the plan's, or the shadow stack's at a later moment.
    fn misleads(&self) -> bool {
        match self.write {
            Write::Slot(..)
            | Write::Pc(..)
            | Write::Signing(..)
            | Write::Detail(..)
            | Write::Signed(..)
            | Write::Link(..)
            | Write::Pointer(..)
            | Write::Low(..)
            | Write::NativeFp(..) => true,
            Write::Shadow(..) | Write::ShadowLength(..) => self.moment != Moment::Begun,
            Write::Word(..) | Write::Copy { .. } | Write::Raw { .. } => false,
        }
    }
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The frames that the walk saw, youngest first, or why it refused.
    pub walked: Result<Vec<Seen>, Refusal>,
    /// Where the youngest record is now, or why nothing moved.
    pub moved: Result<usize, Refusal>,
    /// The destination, word by word.
    pub destination: Vec<u64>,
}

impl Outcome {
    /// The refusal.
    ///
    /// # Panics
    /// When the frames were moved.
    pub fn refused(&self) -> &Refusal {
        self.moved.as_ref().expect_err("tampering was accepted")
    }
}

impl Specimen {
    /// Moves the span as `grow` does, leaving `spare` bytes below it, with the attacker's writes at their moments.
    ///
    /// # Panics
    /// When a law is broken. See the module's text.
    pub fn migrate(&mut self, spare: usize, tampering: &[Tampering]) -> Outcome {
        let at = |moment| tampering.iter().filter(move |tampering| tampering.moment == moment).map(|t| t.write);
        for write in at(Moment::Begun) {
            self.write(write);
        }
        let pieces = self.pieces.clone();
        let registers = self.registers.image();
        let walked = self.walk(&self.source, &pieces);
        let mut plan = Plan::new();
        let made = plan.make(&self.model, Walk::new(&self.model, &self.table, self.bounds(&self.source, &pieces)));
        assert_eq!(made.as_ref().err(), walked.as_ref().err(), "the plan and the walk disagree");
        if let Err(refusal) = made {
            return self.ended(walked, Err(refusal), &registers);
        }
        for write in at(Moment::Planned) {
            self.write(write);
            write.rewrite(&mut plan);
        }
        let bounds = self.bounds(&self.source, &pieces);
        let attacked = Attacked {
            model: self.model,
            image: &self.image,
            at_rebind: at(Moment::Rebased).collect(),
            written: RefCell::default(),
        };
        // SAFETY: the plan was made for the source; both rooms are owned by self and nothing runs in them.
        let moved = unsafe { relocate(&attacked, &mut plan, &bounds, &self.destination.record, spare, usize::MAX) };
        let planned = self.image.clone();
        for (index, word) in attacked.written.into_inner() {
            self.image[index] = word;
        }
        let outcome = self.ended(walked, moved, &registers);
        if let (Ok(frames), Ok(moved)) = (&outcome.walked, &outcome.moved) {
            let misled = tampering.iter().any(Tampering::misleads);
            self.check_moved(frames, *moved, &planned, &registers, &outcome.destination, misled);
        }
        outcome
    }

    /// The laws of every end, good or bad.
    fn ended(&self, walked: Result<Vec<Seen>, Refusal>, moved: Result<usize, Refusal>, registers: &[u64]) -> Outcome {
        assert_eq!(self.source.image(), self.image, "the source was written");
        let destination = self.destination.image();
        let untouched = |words: &[u64]| words.iter().all(|&word| word == PATTERN);
        let span = (self.source.record.top - self.youngest()) / 8;
        assert!(untouched(&destination[..destination.len().saturating_sub(span)]), "written below the moved span");
        if walked.is_err() || matches!(moved, Err(Refusal::Error(_))) {
            assert!(untouched(&destination), "the destination was written without a plan");
        }
        if moved.is_err() {
            assert_eq!(self.registers.image(), registers, "saved registers were written though nothing moved");
        }
        Outcome { walked, moved, destination }
    }

    fn check_moved(
        &self,
        frames: &[Seen],
        moved: usize,
        planned: &[u64],
        registers: &[u64],
        destination: &[u64],
        misled: bool,
    ) {
        let delta = self.delta();
        let Record { base, top, .. } = self.source.record;
        assert_eq!(moved, self.youngest().wrapping_add(delta), "the youngest record is not where it should be");
        let expected: Vec<Seen> = frames.iter().map(|frame| frame.moved(&self.source.record, delta)).collect();
        match self.walk(&self.destination, &self.pieces_in(&self.destination)) {
            Ok(seen) => assert_eq!(seen, expected, "the moved frames are others"),
            Err(Refusal::Error(Error::HiddenPointer { .. })) => {}
            Err(refusal) => assert!(misled, "the moved frames are refused: {refusal:?}"),
        }
        if misled {
            return;
        }
        let mut words = planned.to_vec();
        let mut kept = registers.to_vec();
        let index = |address: usize| (address - base) / 8;
        let block = self.registers.record.base;
        for &place in frames.iter().flat_map(|frame| &frame.pointers) {
            let word =
                if (base..top).contains(&place) { &mut words[index(place)] } else { &mut kept[(place - block) / 8] };
            if (base as u64..top as u64).contains(word) {
                *word = word.wrapping_add(delta as u64);
            }
        }
        for (frame, after) in frames.iter().zip(&expected) {
            words[index(frame.record)] = self.signed_pointer(after).word();
            words[index(frame.slot())] = self.signed(after).word();
        }
        let span = &words[index(self.youngest())..];
        assert_eq!(&destination[destination.len() - span.len()..], span, "a word of the span is wrong");
        assert_eq!(self.registers.image(), kept, "a saved register is wrong");
    }

    /// Writes to the source or to the shadow stack.
    pub(super) fn write(&mut self, write: Write) {
        if let Some((index, word)) = write.word(&self.image, &self.frame_pcs()) {
            self.source.write(self.source.record.base + index * 8, word);
            self.image[index] = word;
        }
        if let Some(shadow) = &mut self.shadow {
            write.shadow(shadow);
        }
    }

    fn frame_pcs(&self) -> Vec<u64> {
        self.frames.iter().map(|frame| frame.pc.address() as u64).collect()
    }

    /// Index of the word at `address`, for [`Write::Word`].
    ///
    /// # Panics
    /// When it lies elsewhere.
    pub fn word_at(&self, address: usize) -> usize {
        assert!(self.source.record.holds(address, 8));
        (address - self.source.record.base) / 8
    }
}

impl Write {
    /// The index and the new value of the word that is written in an image of the source.
    fn word(self, image: &[u64], pcs: &[u64]) -> Option<(usize, u64)> {
        let around = |index: usize| index % image.len();
        match self {
            Write::Word(index, bits) => Some((around(index), image[around(index)] ^ bits)),
            Write::Copy { from, to } => Some((around(to), image[around(from)])),
            Write::Raw { from, to } => Some((around(to), pcs[from % pcs.len()])),
            _ => None,
        }
    }

    fn shadow(self, shadow: &mut Vec<u64>) {
        match self {
            Write::Shadow(index, bits) => {
                let index = index % shadow.len().max(1);
                if let Some(word) = shadow.get_mut(index) {
                    *word ^= bits;
                }
            }
            Write::ShadowLength(true) => shadow.push(super::ENTRY_RETURN.address() as u64),
            Write::ShadowLength(false) => drop(shadow.pop()),
            _ => {}
        }
    }

    fn rebinding(self, rebindings: &mut [Rebinding]) {
        let len = rebindings.len().max(1);
        match self {
            Write::Slot(index, bits) => {
                if let Some(entry) = rebindings.get_mut(index % len) {
                    *entry.place_mut() ^= bits as usize;
                }
            }
            Write::Pc(index, bits) => {
                if let Some(entry) = rebindings.get_mut(index % len) {
                    entry.pc = RawPc::new(entry.pc.address() ^ bits as usize);
                }
            }
            Write::Signing(index, bits) => {
                if let Some(entry) = rebindings.get_mut(index % len) {
                    *entry.place_mut() ^= bits as usize & 7;
                }
            }
            _ => {}
        }
    }

    fn detail(self, details: &mut [Detail]) {
        let len = details.len().max(1);
        if let Write::Detail(index, bits) = self
            && let Some(detail) = details.get_mut(index % len)
        {
            detail.0 ^= bits;
        }
    }

    fn rewrite(self, plan: &mut Plan) {
        let plan = plan.exposed();
        self.rebinding(plan.rebindings);
        self.detail(plan.details);
        match self {
            Write::Signed(index, bits) => {
                let index = index % plan.signed.len().max(1);
                if let Some(entry) = plan.signed.get_mut(index) {
                    *entry.place_mut() ^= bits as usize;
                }
            }
            Write::Link(index, bits) => {
                let index = index % plan.links.len().max(1);
                if let Some(link) = plan.links.get_mut(index) {
                    link.index ^= bits as usize;
                }
            }
            Write::Pointer(index, bits) => {
                let index = index % plan.pointers.len().max(1);
                if let Some(pointer) = plan.pointers.get_mut(index) {
                    *pointer ^= bits as usize;
                }
            }
            Write::Low(bits) => *plan.low ^= bits as usize,
            Write::NativeFp(bits) => plan.links.iter_mut().for_each(|link| link.value ^= bits),
            _ => {}
        }
    }
}

/// The model, with an attacker who writes right before it re-binds.
struct Attacked<'a> {
    model: Model,
    image: &'a [u64],
    at_rebind: Vec<Write>,
    /// Words of the source that were written, by their index.
    written: RefCell<Vec<(usize, u64)>>,
}

impl Authenticator for Attacked<'_> {
    fn enforces(&self, signing: Signing) -> bool {
        self.model.enforces(signing)
    }

    fn authenticate(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
    ) -> Result<RawPc, Tampered> {
        self.model.authenticate(word, slot, signing, modifier)
    }

    fn authenticate_pointer(&self, word: SignedPointer, slot: usize, signing: PointerSigning) -> Result<u64, Tampered> {
        self.model.authenticate_pointer(word, slot, signing)
    }
}

impl Signer for Attacked<'_> {
    #[cfg(cfi_stack_native)]
    fn stubs(&self) -> Signing {
        self.model.stubs()
    }

    fn authenticate_parked(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
        key: Signing,
    ) -> Result<RawPc, Tampered> {
        self.model.authenticate_parked(word, slot, signing, modifier, key)
    }

    fn authenticate_parked_pointer(
        &self,
        word: SignedPointer,
        slot: usize,
        signing: PointerSigning,
        key: Signing,
    ) -> Result<u64, Tampered> {
        self.model.authenticate_parked_pointer(word, slot, signing, key)
    }

    unsafe fn rebind(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        details: &[Detail],
        shadow: Option<&[u64]>,
        words: Words,
    ) -> Result<(), Tampered> {
        let mut image = self.image.to_vec();
        let mut plan = plan.to_vec();
        let mut details = details.to_vec();
        let mut shadow = shadow.map(<[u64]>::to_vec);
        let pcs: Vec<u64> = plan.iter().map(|entry| entry.pc.address() as u64).collect();
        for &write in &self.at_rebind {
            if let Some((index, word)) = write.word(&image, &pcs) {
                let address = source.base + index * 8;
                // SAFETY: the index counts words of the source, which the specimen owns and nobody references.
                unsafe { std::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(word) };
                image[index] = word;
                self.written.borrow_mut().push((index, word));
            }
            write.rebinding(&mut plan);
            write.detail(&mut details);
            if let Some(shadow) = &mut shadow {
                write.shadow(shadow);
            }
        }
        // SAFETY: the caller's.
        unsafe { self.model.rebind(source, destination, low, &plan, &details, shadow.as_deref(), words) }
    }

    unsafe fn rebind_pointers(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        words: Words,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        unsafe { self.model.rebind_pointers(source, destination, low, plan, words) }
    }

    unsafe fn exchange(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        details: &[Detail],
        shadow: Option<&[u64]>,
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        unsafe { self.model.exchange(record, low, plan, details, shadow, key, way) }
    }

    unsafe fn exchange_pointers(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered> {
        // SAFETY: the caller's.
        unsafe { self.model.exchange_pointers(record, low, plan, key, way) }
    }
}
