//! Properties of parking, on random specimens: what two processes that share a key hand over is what the second would have signed, and every
//! corruption on the way is refused.

use super::properties::{check, make};
use super::{Design, Specimen};
use crate::error::Refusal;
use crate::pac::{PointerSigning, RawPc, Signing};
use crate::plan::Plan;
use crate::signer::model::Model;
use crate::signer::{Authenticator, Parked, Signer, Way};
use crate::walk::{Bounds, Walk};

/// Frames from which on nothing wrong passes by chance: once in 128 times each.
const MANY: usize = 8;

impl Specimen {
    /// Exchanges the words of the source as a stack's owner does, with `rewrite` in the middle.
    fn exchange(
        &mut self,
        key: Signing,
        way: Way,
        rewrite: impl FnOnce(&mut Plan, &mut Option<Vec<u64>>),
    ) -> Result<(), Refusal> {
        let mut plan = Plan::new();
        let bounds = Bounds { in_place: true, ..self.bounds(&self.source, &self.pieces) };
        match way {
            Way::Park => plan.add(&self.model, Walk::new(&self.model, &self.table, bounds))?,
            Way::Unpark => {
                let parked = Parked::new(&self.model, key);
                plan.add(&parked, Walk::new(&parked, &self.table, bounds))?;
            }
        }
        assert_eq!(self.source.image(), self.image, "written before all was authenticated");
        rewrite(&mut plan, &mut self.shadow);
        let (record, low, shadow) = (&self.source.record, self.youngest(), self.shadow.as_deref());
        // SAFETY: the rooms are owned by self and nothing runs in them.
        let done = unsafe {
            let words = self.model.exchange(record, low, plan.rebindings(), plan.details(), shadow, key, way);
            words.and_then(|()| self.model.exchange_pointers(record, low, plan.signed(), key, way))
        };
        self.image = self.source.image();
        Ok(done?)
    }

    /// Goes over to a process that shares `key` alone.
    fn cross(&mut self, design: &Design, key: Signing) {
        self.model = design.keys.map_or(Model::absent(), |[a, b]| match key {
            Signing::A => Model::new([a, !b ^ 77]),
            _ => Model::new([!a ^ 77, b]),
        });
    }

    /// Whether every signed word is what this process would have signed.
    fn is_native(&self) -> bool {
        self.frames.iter().all(|frame| {
            let words = [self.signed_pointer(frame).word(), self.signed(frame).word()];
            [frame.record, frame.slot()].map(|address| self.image[self.word_at(address)]) == words
        })
    }
}

fn key(b: bool) -> Signing {
    if b { Signing::B } else { Signing::A }
}

#[test]
fn what_is_handed_over_is_what_the_other_process_signs() {
    fn property(design: Design, b: bool) {
        let mut specimen = make(&design);
        let before = specimen.image.clone();
        specimen.exchange(key(b), Way::Park, |_, _| {}).expect("an honest stack is parked");
        let many = specimen.model.authenticates() && specimen.frames.len() >= MANY;
        assert!(!many || specimen.image != before);
        specimen.cross(&design, key(b));
        specimen.exchange(key(b), Way::Unpark, |_, _| {}).expect("an honest stack is unparked");
        assert!(specimen.is_native());
        // Nothing else has changed.
        let signed = specimen.image.clone();
        specimen.exchange(key(b), Way::Park, |_, _| {}).expect("and back");
        specimen.model = design.keys.map_or(Model::absent(), Model::new);
        specimen.exchange(key(b), Way::Unpark, |_, _| {}).expect("and back");
        assert_eq!(specimen.image, before);
        let words: Vec<usize> = (0..signed.len()).filter(|&index| signed[index] != before[index]).collect();
        let places: Vec<usize> = (specimen.frames.iter())
            .flat_map(|frame| [frame.record, frame.slot()].map(|address| specimen.word_at(address)))
            .collect();
        assert!(words.iter().all(|word| places.contains(word)));
        specimen.migrate(0, &[]).moved.expect("it moves as ever");
    }
    check(1500, property as fn(Design, bool));
}

#[test]
fn a_frame_that_cannot_move_is_parked() {
    fn property(mut design: Design, b: bool) {
        design.functions.iter_mut().for_each(|function| function.layout.immovable = Some("pinned"));
        make(&design).exchange(key(b), Way::Park, |_, _| {}).expect("it stays where it is");
    }
    check(300, property as fn(Design, bool));
}

#[test]
fn a_flipped_bit_of_a_parked_word_is_refused() {
    fn property(design: Design, b: bool, frame: usize, bit: u32) {
        let mut specimen = make(&design);
        specimen.exchange(key(b), Way::Park, |_, _| {}).expect("an honest stack is parked");
        specimen.cross(&design, key(b));
        let frame = &specimen.frames[frame % specimen.frames.len()];
        let pointer = frame.layout.frame_pointer != PointerSigning::None && bit.is_multiple_of(2);
        let word = specimen.word_at(if pointer { frame.record } else { frame.slot() });
        specimen.write(super::tampering::Write::Word(word, 1 << (48 + bit % 7)));
        let before = specimen.image.clone();
        assert!(specimen.exchange(key(b), Way::Unpark, |_, _| {}).is_err());
        assert_eq!(specimen.image, before);
    }
    check(2000, property as fn(Design, bool, usize, u32));
}

#[test]
fn another_key_and_an_unparked_look_are_refused() {
    fn property(design: Design, b: bool) -> bool {
        if design.keys.is_none_or(|[a, b]| a == b) || design.calls.len() < MANY {
            return true;
        }
        let mut specimen = make(&design);
        specimen.exchange(key(b), Way::Park, |_, _| {}).expect("an honest stack is parked");
        // As running frames, as parked ones of the other key, and in a process that does not share the key.
        let running = specimen.walk(&specimen.source, &specimen.pieces).is_err();
        let other = specimen.exchange(key(!b), Way::Unpark, |_, _| {}).is_err();
        let again = specimen.exchange(key(b), Way::Park, |_, _| {}).is_err();
        specimen.cross(&design, key(!b));
        running && other && again && specimen.exchange(key(b), Way::Unpark, |_, _| {}).is_err()
    }
    check(1000, property as fn(Design, bool) -> bool);
}

#[test]
fn what_is_exchanged_is_what_was_planned_with() {
    fn property(design: Design, b: bool, back: bool, which: usize, bits: u64) -> bool {
        let (index, bits) = (bits as usize >> 6, 1 << (bits % 48));
        let mut specimen = make(&design);
        let way = if back { Way::Unpark } else { Way::Park };
        if back {
            specimen.exchange(key(b), Way::Park, |_, _| {}).expect("an honest stack is parked");
        }
        let mut rewritten = true;
        let done = specimen.exchange(key(b), way, |plan, shadow| {
            let plan = plan.exposed();
            let list = if which.is_multiple_of(4) { plan.signed } else { plan.rebindings };
            rewritten = !list.is_empty();
            let count = list.len().max(1);
            match (which % 4, list.get_mut(index % count), shadow) {
                (0 | 1, Some(entry), _) => entry.pc = RawPc::new(entry.pc.address() ^ bits as usize),
                (2, Some(entry), _) => *entry.place_mut() ^= 1 << 50,
                (_, _, Some(shadow)) => shadow[index % count] ^= bits,
                _ => rewritten = false,
            }
        });
        !rewritten || matches!(done, Err(Refusal::Tampered(_)))
    }
    check(2000, property as fn(Design, bool, bool, usize, u64) -> bool);
}

/// On the way back nothing but the plan says what to sign for: it is under the signature that is authenticated.
#[test]
fn a_plan_that_says_another_key_or_modifier_signs_nothing() {
    fn rewritten(design: &Design, b: bool, pick: usize, bits: u64) -> Option<bool> {
        let mut specimen = make(design);
        specimen.exchange(key(b), Way::Park, |_, _| {}).expect("an honest stack is parked");
        specimen.cross(design, key(b));
        let done = specimen.exchange(key(b), Way::Unpark, |plan, _| {
            let plan = plan.exposed();
            match pick % 3 {
                0 if !plan.details.is_empty() => {
                    let index = pick / 3 % plan.details.len();
                    plan.details[index].0 ^= 1 << (bits % 64);
                }
                1 if !plan.signed.is_empty() => {
                    let index = pick / 3 % plan.signed.len();
                    *plan.signed[index].place_mut() ^= 3;
                }
                _ => {
                    let index = pick / 3 % plan.rebindings.len();
                    *plan.rebindings[index].place_mut() ^=
                        if bits.is_multiple_of(2) { 3 } else { 1 << (3 + bits % 40) };
                }
            }
        });
        // What the rewriting did not concern is done as before.
        done.is_ok().then(|| !specimen.is_native())
    }
    let (mut tries, mut passed) = (0_u64, 0);
    let mut state = 1_u64;
    let mut pick = |n: u64| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) % n.max(1)
    };
    while tries < 3000 {
        let mut design = Design::choose(&mut pick);
        design.keys = Some([pick(1 << 30), pick(1 << 30)]);
        let signed = |signing| if signing == Signing::None { Signing::A } else { signing };
        design.stub = signed(design.stub);
        design.functions.iter_mut().for_each(|function| function.layout.signing = signed(function.layout.signing));
        let b = pick(2) == 0;
        let choice = pick(1 << 20) as usize;
        passed += u64::from(rewritten(&design, b, choice, pick(1 << 20)) == Some(true));
        tries += 1;
    }
    assert!(passed * 128 <= tries * 3, "{passed} of {tries}");
}
