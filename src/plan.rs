//! The plan of a move: every word that changes, found and authenticated before anything is written.
//!
//! The plan lies in memory that the attacker writes. It is a list of places to look at again, not an authority:
//! the stub bounds each entry by the sealed records, authenticates the word anew, and derives delta and modifiers
//! in registers.

use crate::abi::{Detail, Rebinding, Record, form};
use crate::error::{Error, Refusal};
use crate::pac::{Binding, PointerSigning, RawPc, Tampered};
use crate::segment::remap::advise_huge;
use crate::signer::Authenticator;
use crate::walk::{Caller, Frame, Owner, Walk};

/// Everything that a move of one span changes.
#[derive(Debug, Default)]
pub struct Plan {
    /// The return addresses, youngest first.
    rebindings: Vec<Rebinding>,
    /// What the described among them need besides, in their order.
    details: Vec<Detail>,
    /// Saved frame pointers that do not stand next to their return address, or do not lead to a record that does: all others
    /// follow from `rebindings`. Youngest first.
    links: Vec<Link>,
    /// Saved frame pointers that are signed.
    signed: Vec<Rebinding>,
    /// Addresses in the source of slots that hold pointers into the stack.
    pointers: Vec<usize>,
    /// Addresses outside the source of words that hold such pointers: what stubs keep of callee-saved registers.
    registers: Vec<usize>,
    low: usize,
    /// Whether its span was moved by page tables.
    pages_moved: bool,
}

/// A saved frame pointer that does not follow from the return addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Index of its frame's return address.
    pub index: usize,
    /// Address in the source of the word; 0 when it is signed and stands in that list.
    pub slot: usize,
    /// What it holds there.
    pub value: u64,
}

/// How many of each of a plan's lists of signed words.
#[cfg(cfi_stack_native)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Words {
    pub rebindings: usize,
    pub details: usize,
    pub signed: usize,
}

impl Plan {
    /// An empty plan. Its buffers are kept from one move to the next, until the run ends.
    pub fn new() -> Self {
        Plan::default()
    }

    /// Walks and authenticates all frames, and notes what must change. Writes nothing but the plan itself.
    ///
    /// # Errors
    /// [`Refusal::Error`] for frames that cannot move and when memory for the plan runs out,
    /// [`Refusal::Tampered`] for evidence of tampering.
    pub fn make<S: Authenticator>(&mut self, signer: &S, walk: Walk<'_, S>) -> Result<(), Refusal> {
        self.clear();
        self.low = walk.bounds().pieces.first().map_or(0, |piece| piece.youngest);
        self.add(signer, walk)
    }

    /// Adds the frames of another walk, over a segment whose frames stay in their places: their words are what is of use of such a plan.
    ///
    /// # Errors
    /// As for [`Plan::make`].
    pub fn add<S: Authenticator>(&mut self, signer: &S, mut walk: Walk<'_, S>) -> Result<(), Refusal> {
        let source = walk.bounds().source.extent();
        let authenticates = signer.authenticates();
        let low = walk.bounds().pieces.first().map_or(0, |piece| piece.youngest);
        self.make_room(source.top.wrapping_sub(low), walk.bounds().smallest_frame);
        loop {
            let Plan { rebindings, pointers, .. } = self;
            walk.plain_frames(|owner, pc, caller, slots| {
                room(rebindings, 1)?;
                let form = if authenticates { owner.layout.signing as usize } else { form::UNSIGNED };
                rebindings.push(Rebinding::new(owner.record.wrapping_add(8), form, pc));
                if !slots.is_empty() {
                    room(pointers, slots.len())?;
                    pointers.extend(slots.iter().map(|&offset| caller.wrapping_add_signed(offset as isize)));
                }
                Ok(())
            })?;
            let Some(frame) = walk.next() else { break };
            let Frame { owner, pc, saved_fp, caller } = frame?;
            room(&mut self.rebindings, 1)?;
            self.note(&owner, pc, saved_fp, caller, authenticates)?;
            let Some(Caller { owner, slots, registers }) = caller else { continue };
            if !slots.is_empty() {
                room(&mut self.pointers, slots.len())?;
                self.pointers.extend(slots.iter().map(|&offset| owner.record.wrapping_add_signed(offset as isize)));
            }
            let named = (0..u32::BITS as usize).filter(|index| registers != 0 && registers & 1 << index != 0);
            for place in named.filter_map(|index| walk.register(index)) {
                let list = if source.holds(place, 8) { &mut self.pointers } else { &mut self.registers };
                room(list, 1)?;
                list.push(place);
            }
        }
        Ok(())
    }

    /// Notes a frame, whatever it is.
    #[inline(never)]
    fn note(
        &mut self,
        owner: &Owner<'_>,
        pc: RawPc,
        saved_fp: u64,
        caller: Option<Caller<'_>>,
        authenticates: bool,
    ) -> Result<(), Refusal> {
        let layout = owner.layout;
        let (slot, beyond) = (owner.slot(), owner.cfa().wrapping_sub(owner.slot() + 8));
        let form = match layout.signing {
            _ if !authenticates => form::UNSIGNED,
            signing if layout.binding == Binding::Cfa && beyond == 0 => signing as usize,
            signing => {
                room(&mut self.details, 1)?;
                self.details.push(Detail::new(signing, layout.binding, beyond));
                form::DESCRIBED
            }
        };
        let index = self.rebindings.len();
        self.rebindings.push(Rebinding::new(slot, form, pc));
        let signed = authenticates && layout.frame_pointer != PointerSigning::None;
        if signed {
            room(&mut self.signed, 1)?;
            let value = RawPc::new(saved_fp as usize);
            self.signed.push(Rebinding::new(owner.record, layout.frame_pointer as usize, value));
        }
        let follows = slot == owner.record + 8
            && caller.is_some_and(|caller| caller.owner.slot() == caller.owner.record.wrapping_add(8));
        if signed || !follows {
            room(&mut self.links, 1)?;
            self.links.push(Link { index, slot: if signed { 0 } else { owner.record }, value: saved_fp });
        }
        Ok(())
    }

    /// For a large span: room at once, in huge pages where there are such. What is not used is never touched. Without memory
    /// the list grows as it goes.
    fn make_room(&mut self, span: usize, smallest_frame: usize) {
        const LARGE: usize = 2 << 20;
        let most = span / smallest_frame.max(16);
        if (LARGE..=1 << 40).contains(&span) && self.rebindings.is_empty() && self.rebindings.capacity() < most {
            // What it holds is of no use.
            self.rebindings = Vec::new();
            if self.rebindings.try_reserve_exact(most).is_ok() {
                let room = self.rebindings.spare_capacity_mut();
                advise_huge(room.as_mut_ptr().expose_provenance(), size_of_val(room));
            }
        }
    }

    /// Forgets everything but its buffers.
    pub(crate) fn clear(&mut self) {
        let Plan { rebindings, details, links, signed, pointers, registers, low, pages_moved } = self;
        *pages_moved = false;
        rebindings.clear();
        details.clear();
        links.clear();
        signed.clear();
        pointers.clear();
        registers.clear();
        *low = 0;
    }

    /// Gives the buffers back.
    pub(crate) fn release(&mut self) {
        *self = Plan::default();
    }

    /// Makes it the plan of the way back, from `delta` above `source` to there.
    #[cfg(feature = "steps")]
    pub(crate) fn turn_round(&mut self, source: crate::abi::Extent, delta: usize) {
        let Plan { rebindings, details: _, links, signed, pointers, registers: _, low, .. } = self;
        let inside = |address: usize| address >= source.base && address < source.top;
        let moved = |address: usize| if inside(address) { address.wrapping_add(delta) } else { address };
        for entry in rebindings {
            *entry = Rebinding::new(entry.slot().wrapping_add(delta), entry.form(), entry.pc);
        }
        for link in links {
            link.slot = if link.slot == 0 { 0 } else { link.slot.wrapping_add(delta) };
            link.value = moved(link.value as usize) as u64;
        }
        for entry in signed {
            let pointer = RawPc::new(moved(entry.pc.address()));
            *entry = Rebinding::new(entry.slot().wrapping_add(delta), entry.form(), pointer);
        }
        for slot in pointers {
            *slot = slot.wrapping_add(delta);
        }
        *low = low.wrapping_add(delta);
    }

    /// The return addresses, youngest first.
    pub fn rebindings(&self) -> &[Rebinding] {
        &self.rebindings
    }

    /// The same, to be tampered with by the attack battery.
    #[cfg(feature = "steps")]
    pub(crate) fn rebindings_mut(&mut self) -> &mut [Rebinding] {
        &mut self.rebindings
    }

    /// Every word of the plan, as an attacker finds them in memory.
    #[cfg(any(test, feature = "model"))]
    pub(crate) fn exposed(&mut self) -> Exposed<'_> {
        let Plan { rebindings, details, links, signed, pointers, registers: _, low, .. } = self;
        Exposed { rebindings, details, links, signed, pointers, low }
    }

    /// What described entries need besides, in their order.
    pub(crate) fn details(&self) -> &[Detail] {
        &self.details
    }

    /// Saved frame pointers that do not follow from the return addresses.
    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    /// Saved frame pointers that are signed.
    pub(crate) fn signed(&self) -> &[Rebinding] {
        &self.signed
    }

    /// How many signed words it has by now.
    #[cfg(cfi_stack_native)]
    pub(crate) fn words(&self) -> Words {
        Words { rebindings: self.rebindings.len(), details: self.details.len(), signed: self.signed.len() }
    }

    /// Slots that hold pointers into the stack.
    pub(crate) fn pointers(&self) -> &[usize] {
        &self.pointers
    }

    /// Words outside the source that hold such pointers.
    pub(crate) fn registers(&self) -> &[usize] {
        &self.registers
    }

    /// Notes how its span was moved.
    pub(crate) fn note_pages_moved(&mut self, moved: bool) {
        self.pages_moved = moved;
    }

    /// Whether its span was moved by page tables.
    #[cfg(cfi_stack_native)]
    pub(crate) fn pages_moved(&self) -> bool {
        self.pages_moved
    }

    /// How many return addresses a move with this plan signs again: all, or none where nothing is signed.
    #[cfg(cfi_stack_native)]
    pub(crate) fn rebound(&self) -> usize {
        let signs = self.rebindings.first().is_some_and(|entry| entry.form() != form::UNSIGNED);
        if signs { self.rebindings.len() } else { 0 }
    }

    /// Whether the span can go to `destination`, with `spare` bytes left below it. Returns its lowest address.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::Foreign`], [`Error::TooSmall`]; [`Refusal::Tampered`] when the span does not begin with
    /// the youngest record, or lies outside the source.
    pub(crate) fn fits(&self, source: &Record, destination: &Record, spare: usize) -> Result<usize, Refusal> {
        let low = self.low;
        if !source.holds(low, 16) || self.rebindings.first().map(Rebinding::slot) != low.checked_add(8) {
            return Err(Tampered { evidence: "the planned span is not the one that was walked", slot: low }.into());
        }
        if source.overlaps(destination) {
            return Err(Error::Overlap.into());
        }
        if (source.identity, source.generation) != (destination.identity, destination.generation) {
            return Err(Error::Foreign.into());
        }
        let needed = source.top.saturating_sub(low).saturating_add(spare);
        if needed > destination.size() {
            return Err(Error::TooSmall { needed, room: destination.size() }.into());
        }
        Ok(low)
    }
}

/// A plan to be tampered with.
#[cfg(any(test, feature = "model"))]
pub(crate) struct Exposed<'a> {
    pub rebindings: &'a mut [Rebinding],
    pub details: &'a mut [Detail],
    pub links: &'a mut [Link],
    pub signed: &'a mut [Rebinding],
    pub pointers: &'a mut [usize],
    pub low: &'a mut usize,
}

#[inline]
fn room<T>(list: &mut Vec<T>, more: usize) -> Result<(), Refusal> {
    if list.capacity() - list.len() >= more {
        return Ok(());
    }
    list.try_reserve(more).map_err(|_| {
        let bytes = (list.len() + more).saturating_mul(size_of::<T>());
        Refusal::Error(Error::Memory { what: "the plan of a move", bytes, errno: libc::ENOMEM })
    })
}
