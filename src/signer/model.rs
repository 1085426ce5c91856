//! A software model of pointer authentication, for walking and moving frames on any host.
//!
//! Like the CPU it keeps keys of its own and puts a MAC of address and modifier into bits 48–54. Unlike the CPU
//! it returns a failure instead of ending the process, so that properties can be tested; and it can sign, because
//! somebody must play the compiled code that made the frames.

use super::{Authenticator, Signer, Way, Words};
use crate::abi::{Detail, Rebinding, Record, form};
use crate::pac::{Binding, Modifier, PointerSigning, RawPc, SignedPc, SignedPointer, Signing, Tampered};
use crate::segment::{read_word, write_word};

/// Where the signature stands with 48-bit addresses: 7 bits, as on Linux with top-byte-ignore.
pub(crate) const FIELD: u64 = 0x7f << 48;

/// The keys of a model process.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    keys: [u64; 2],
    present: bool,
}

impl Model {
    /// A CPU with these keys for A and B.
    pub const fn new(keys: [u64; 2]) -> Self {
        Model { keys, present: true }
    }

    /// A CPU without pointer authentication.
    pub const fn absent() -> Self {
        Model { keys: [0; 2], present: false }
    }

    /// What `paciasp` or `pacibsp` in compiled code does at entry.
    pub fn sign(&self, pc: RawPc, signing: Signing, modifier: Modifier) -> SignedPc {
        let raw = pc.address() as u64;
        let key = self.keys[usize::from(signing == Signing::B)];
        SignedPc::from_word(if self.enforces(signing) { raw | mac(key, raw, modifier) } else { raw })
    }

    /// What `pacda` or `pacdb` in compiled code does to a frame pointer that goes to `slot`.
    pub fn sign_pointer(&self, pointer: u64, signing: PointerSigning, slot: usize) -> SignedPointer {
        self.sign_pointer_under(pointer, signing, Modifier::new(slot as u64))
    }

    fn sign_pointer_under(&self, pointer: u64, signing: PointerSigning, modifier: Modifier) -> SignedPointer {
        let signs = self.present && signing != PointerSigning::None;
        // The data keys, made of the others: no word signed with one kind passes for one of the other.
        let key = !self.keys[usize::from(signing == PointerSigning::B)];
        SignedPointer::from_word(if signs { pointer | mac(key, pointer, modifier) } else { pointer })
    }

    fn authenticate_pointer_under(
        &self,
        word: SignedPointer,
        slot: usize,
        signing: PointerSigning,
        modifier: Modifier,
    ) -> Result<u64, Tampered> {
        let signs = self.present && signing != PointerSigning::None;
        let pointer = if signs { word.word() & !FIELD } else { word.word() };
        if self.sign_pointer_under(pointer, signing, modifier) == word {
            Ok(pointer)
        } else {
            Err(Tampered { evidence: "a frame pointer does not authenticate", slot })
        }
    }

    /// How an entry says that its return address is signed, and how many bytes lie between the word and the CFA.
    fn how<'a>(
        &self,
        entry: &Rebinding,
        details: &mut impl Iterator<Item = &'a Detail>,
    ) -> Option<(Signing, Binding, usize)> {
        match entry.form() {
            form::UNSIGNED if !self.present => Some((Signing::None, Binding::Cfa, 0)),
            form::A if self.present => Some((Signing::A, Binding::Cfa, 0)),
            form::B if self.present => Some((Signing::B, Binding::Cfa, 0)),
            form::DESCRIBED if self.present => details.next().and_then(|detail| detail.parts()),
            _ => None,
        }
    }

    /// How an entry says that its frame pointer is signed.
    fn how_pointer(&self, entry: &Rebinding) -> Option<PointerSigning> {
        match entry.form() {
            form::A if self.present => Some(PointerSigning::A),
            form::B if self.present => Some(PointerSigning::B),
            _ => None,
        }
    }

    /// Whether an entry's place lies in the span and in the destination.
    fn bounded(source: &Record, destination: &Record, low: usize, entry: &Rebinding) -> bool {
        let slot = entry.slot();
        let delta = destination.top.wrapping_sub(source.top);
        slot >= low && source.holds(slot, 8) && destination.holds(slot.wrapping_add(delta), 8)
    }
}

/// The generic key: all model processes share it, as threads must that park stacks for one another.
const GENERIC: u64 = 0x1d8e_4e27_c47d_124f;

/// The modifier of a parked word at `slot`, which runs under `modifier` and the key with this number.
fn parked(slot: usize, own: usize, modifier: Modifier) -> Modifier {
    let place = Modifier::new((slot | own) as u64);
    Modifier::new(mix(GENERIC, modifier.value(), place) & !0xffff_ffff | 1)
}

/// The MAC of an address and a modifier.
fn mac(key: u64, raw: u64, modifier: Modifier) -> u64 {
    mix(key, raw, modifier) & FIELD
}

fn mix(key: u64, raw: u64, modifier: Modifier) -> u64 {
    let mut state = key ^ 0x9e37_79b9_7f4a_7c15;
    for word in [raw, modifier.value()] {
        // splitmix64's finaliser: every input bit reaches every output bit.
        state = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
    }
    state
}

impl Authenticator for Model {
    fn enforces(&self, signing: Signing) -> bool {
        self.present && signing != Signing::None
    }

    fn authenticate(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
    ) -> Result<RawPc, Tampered> {
        let raw = if self.enforces(signing) { word.word() & !FIELD } else { word.word() };
        let pc = RawPc::new(raw as usize);
        if self.sign(pc, signing, modifier) == word {
            Ok(pc)
        } else {
            Err(Tampered { evidence: "a return address does not authenticate", slot })
        }
    }

    fn authenticate_pointer(&self, word: SignedPointer, slot: usize, signing: PointerSigning) -> Result<u64, Tampered> {
        self.authenticate_pointer_under(word, slot, signing, Modifier::new(slot as u64))
    }
}

impl Signer for Model {
    #[cfg(cfi_stack_native)]
    fn stubs(&self) -> Signing {
        if self.present { Signing::A } else { Signing::None }
    }

    fn authenticate_parked(
        &self,
        word: SignedPc,
        slot: usize,
        signing: Signing,
        modifier: Modifier,
        key: Signing,
    ) -> Result<RawPc, Tampered> {
        let key = if self.enforces(signing) { key } else { Signing::None };
        self.authenticate(word, slot, key, parked(slot, signing as usize, modifier))
    }

    fn authenticate_parked_pointer(
        &self,
        word: SignedPointer,
        slot: usize,
        signing: PointerSigning,
        key: Signing,
    ) -> Result<u64, Tampered> {
        let key = if signing == PointerSigning::None { PointerSigning::None } else { key.data_key() };
        let modifier = parked(slot, signing as usize, Modifier::new(slot as u64));
        self.authenticate_pointer_under(word, slot, key, modifier)
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
        let delta = destination.top.wrapping_sub(source.top);
        let mut details = details.iter();
        for (index, entry) in plan.iter().enumerate() {
            let slot = entry.slot();
            let how = self.how(entry, &mut details);
            let (true, Some((signing, binding, beyond))) = (Self::bounded(source, destination, low, entry), how) else {
                return Err(Tampered { evidence: "the plan names a place outside the span", slot });
            };
            // SAFETY: the slot lies in the source segment and its new place in the destination; the caller keeps both mapped.
            let word = SignedPc::from_word(unsafe { read_word(words.place(slot, delta)) });
            let cfa = slot.wrapping_add(8 + beyond);
            let pc = self.authenticate(word, slot, signing, binding.modifier(cfa))?;
            if pc != entry.pc || shadow.is_some_and(|shadow| shadow.get(index) != Some(&(pc.address() as u64))) {
                return Err(Tampered { evidence: "a return address is not the one planned with", slot });
            }
            let moved = slot.wrapping_add(delta);
            let word = self.sign(pc, signing, binding.modifier(cfa.wrapping_add(delta)));
            // SAFETY: `moved` lies in the destination segment, mapped and not yet in use.
            unsafe { write_word(moved, word.word()) };
        }
        Ok(())
    }

    unsafe fn rebind_pointers(
        &self,
        source: &Record,
        destination: &Record,
        low: usize,
        plan: &[Rebinding],
        words: Words,
    ) -> Result<(), Tampered> {
        let delta = destination.top.wrapping_sub(source.top);
        for entry in plan {
            let slot = entry.slot();
            let (true, Some(signing)) = (Self::bounded(source, destination, low, entry), self.how_pointer(entry))
            else {
                return Err(Tampered { evidence: "the plan names a place outside the span", slot });
            };
            // SAFETY: the slot lies in the source segment and its new place in the destination; the caller keeps both mapped.
            let word = SignedPointer::from_word(unsafe { read_word(words.place(slot, delta)) });
            let mut pointer = self.authenticate_pointer(word, slot, signing)? as usize;
            if pointer != entry.pc.address() {
                return Err(Tampered { evidence: "a frame pointer is not the one planned with", slot });
            }
            if pointer >= source.base && pointer < source.top {
                pointer = pointer.wrapping_add(delta);
            }
            let moved = slot.wrapping_add(delta);
            let word = self.sign_pointer(pointer as u64, signing, moved);
            // SAFETY: `moved` lies in the destination segment, mapped and not yet in use.
            unsafe { write_word(moved, word.word()) };
        }
        Ok(())
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
        let mut details = details.iter();
        for (index, entry) in plan.iter().enumerate() {
            let slot = entry.slot();
            let how = self.how(entry, &mut details);
            let (true, Some((signing, binding, beyond))) = (Self::bounded(record, record, low, entry), how) else {
                return Err(Tampered { evidence: "the plan names a place outside the span", slot });
            };
            let running = (signing, binding.modifier(slot.wrapping_add(8 + beyond)));
            let key = if signing == Signing::None { Signing::None } else { key };
            let shared = (key, parked(slot, signing as usize, running.1));
            let (from, to) = if way == Way::Park { (running, shared) } else { (shared, running) };
            // SAFETY: the slot lies in the segment, which the caller keeps mapped.
            let word = SignedPc::from_word(unsafe { read_word(slot) });
            let pc = self.authenticate(word, slot, from.0, from.1)?;
            if pc != entry.pc || shadow.is_some_and(|shadow| shadow.get(index) != Some(&(pc.address() as u64))) {
                return Err(Tampered { evidence: "a return address is not the one planned with", slot });
            }
            // SAFETY: as above.
            unsafe { write_word(slot, self.sign(pc, to.0, to.1).word()) };
        }
        Ok(())
    }

    unsafe fn exchange_pointers(
        &self,
        record: &Record,
        low: usize,
        plan: &[Rebinding],
        key: Signing,
        way: Way,
    ) -> Result<(), Tampered> {
        for entry in plan {
            let slot = entry.slot();
            let (true, Some(signing)) = (Self::bounded(record, record, low, entry), self.how_pointer(entry)) else {
                return Err(Tampered { evidence: "the plan names a place outside the span", slot });
            };
            let running = (signing, Modifier::new(slot as u64));
            let shared = (key.data_key(), parked(slot, signing as usize, running.1));
            let (from, to) = if way == Way::Park { (running, shared) } else { (shared, running) };
            // SAFETY: the slot lies in the segment, which the caller keeps mapped.
            let word = SignedPointer::from_word(unsafe { read_word(slot) });
            let pointer = self.authenticate_pointer_under(word, slot, from.0, from.1)?;
            if pointer as usize != entry.pc.address() {
                return Err(Tampered { evidence: "a frame pointer is not the one planned with", slot });
            }
            // SAFETY: as above.
            unsafe { write_word(slot, self.sign_pointer_under(pointer, to.0, to.1).word()) };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Model = Model::new([1, 2]);
    const PC: RawPc = RawPc::new(0x5555_1234_5678);
    const AT: Modifier = Modifier::new(0x7fff_0000_1000);

    #[test]
    fn a_signature_is_bound_to_address_key_and_modifier() {
        let signed = MODEL.sign(PC, Signing::A, AT);
        let check = |word, signing, modifier| MODEL.authenticate(word, 0, signing, modifier);
        assert_eq!(check(signed, Signing::A, AT), Ok(PC));
        assert!(check(signed, Signing::B, AT).is_err());
        assert!(check(signed, Signing::A, Modifier::new(AT.value() + 16)).is_err());
        for bit in 48..55 {
            assert!(check(SignedPc::from_word(signed.word() ^ 1 << bit), Signing::A, AT).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn forged_addresses_are_accepted_about_once_in_128() {
        let signed = MODEL.sign(PC, Signing::A, AT).word();
        let accepted = (1..=4096_u64)
            .filter(|flip| MODEL.authenticate(SignedPc::from_word(signed ^ flip << 2), 0, Signing::A, AT).is_ok())
            .count();
        assert!((8..=96).contains(&accepted), "{accepted} of 4096, 32 expected");
    }

    #[test]
    fn without_the_mechanism_addresses_stay_raw() {
        let none = Model::absent();
        assert_eq!(none.sign(PC, Signing::A, AT).word(), PC.address() as u64);
        assert!(!none.authenticates());
    }
}
