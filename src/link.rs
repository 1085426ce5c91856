//! The segments of one stack, in the order in which calls went through them, and what the stub `link` needs.
//!
//! ```text
//!  older …            the current one      newer, idle
//!  [ C0 ] <-previous- [ C1 ] <-previous- [ C2 ]
//!         -next->            -next->
//! ```
//! A segment may come with a shadow segment on which calls into it begin, so that the frames of one data segment are on one shadow segment
//! ([`Shadows`]). Each record's second part, sealed on arm64, says which segment comes before; one alone comes behind each, so what comes
//! behind the current one is idle. The stubs go back and forth by themselves, so that Rust first looks where the stack pointer is:
//! [`Links::settle`].

use crate::abi::{LinkCall, Record};
use crate::arch;
use crate::error::{Error, Refusal};
use crate::pac::{RawPc, Tampered};
use crate::policy::Policy;
use crate::segment::{Segment, page_size, read_word};
use crate::shadow::Shadows;
use crate::tamper;

impl LinkCall {
    /// A call of `callee` with `argument_bytes` of stack arguments, which leaves `result_bytes` of stack results in the beginning of its argument
    /// area, and wants `need` bytes below its stack pointer at entry, besides the policy's reserve. All sizes in bytes; the first two multiples of 8.
    ///
    /// # Errors
    /// [`Error::Size`] when one is not, and when arguments and need together come to 4 GiB.
    pub const fn new(callee: RawPc, argument_bytes: u32, result_bytes: u32, need: u32) -> Result<LinkCall, Error> {
        if !argument_bytes.is_multiple_of(8) {
            return Err(Error::Size {
                bytes: argument_bytes as usize,
                rule: "stack arguments come in multiples of 8 bytes",
            });
        }
        if !result_bytes.is_multiple_of(8) {
            return Err(Error::Size {
                bytes: result_bytes as usize,
                rule: "stack results come in multiples of 8 bytes",
            });
        }
        let larger = if argument_bytes > result_bytes { argument_bytes } else { result_bytes };
        let Some(area) = larger.checked_next_multiple_of(16) else {
            return Err(Error::Size { bytes: larger as usize, rule: TOO_LARGE });
        };
        let Some(total) = area.checked_add(need) else {
            return Err(Error::Size { bytes: need as usize, rule: TOO_LARGE });
        };
        Ok(LinkCall { callee, area, results: result_bytes, total, arguments: argument_bytes })
    }

    /// Whom it calls.
    pub const fn callee(&self) -> RawPc {
        self.callee
    }

    /// Whether the words go together, as [`LinkCall::new`] makes them.
    fn check(&self) -> Result<(), Error> {
        let fits = self.arguments <= self.area && self.results <= self.area && self.area <= self.total;
        let aligned = self.area.is_multiple_of(16) && (self.arguments | self.results).is_multiple_of(8);
        match fits && aligned {
            true => Ok(()),
            false => {
                Err(Error::Size { bytes: self.area as usize, rule: "the words of a link call contradict one another" })
            }
        }
    }
}

const TOO_LARGE: &str = "the arguments of a link call and what it needs come to 4 GiB";

/// What the frames of a segment rest on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base {
    /// Where the oldest of them returns to.
    pub bottom: RawPc,
    /// The frame pointer that it saved.
    pub fp: u64,
    /// Bytes between its CFA and the top.
    pub arguments: usize,
    /// Whether they return there by themselves, because they were lifted.
    pub lifted: bool,
}

impl Base {
    /// Of a segment, and the one before it.
    fn of(segment: &Segment, previous: &Segment) -> Base {
        let record = segment.record();
        let fp = record.link_record as u64 & !1;
        let base = match record.link_record & 1 {
            0 => Base { bottom: arch::link_return(), fp, arguments: record.area as usize, lifted: false },
            _ => Base { bottom: RawPc::new(record.lifted), fp, arguments: 0, lifted: true },
        };
        // What is not there is not compared with: a frame that saved something else is evidence.
        if previous.record().holds(fp as usize, 16) { base } else { Base { fp: 0, ..base } }
    }
}

/// The segments of a stack besides the current one.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// Those that were left by a link call or a lift, the oldest first.
    older: Vec<Segment>,
    /// Those that nothing runs on, kept warm; the next one last.
    newer: Vec<Segment>,
}

impl Links {
    /// All segments, the oldest first.
    pub(crate) fn in_order<'a>(&'a self, current: &'a Segment) -> impl Iterator<Item = &'a Segment> {
        self.older.iter().chain([current]).chain(self.newer.iter().rev())
    }

    /// Makes the segment that holds `sp` the current one, and says whether it was another: link calls and their returns, and the returns
    /// of lifted frames, happen without Rust.
    pub(crate) fn settle(&mut self, current: &mut Segment, sp: usize) -> Result<bool, Tampered> {
        if current.record().holds(sp, 16) {
            return Ok(false);
        }
        let holds = |segment: &Segment| segment.record().holds(sp, 16);
        if let Some(index) = self.newer.iter().rposition(holds) {
            while self.newer.len() > index {
                self.forward(current);
            }
            Ok(true)
        } else if let Some(index) = self.older.iter().rposition(holds) {
            while self.older.len() > index {
                self.back(current);
            }
            Ok(true)
        } else {
            Err(Tampered { evidence: "the stack pointer is outside the stack", slot: sp })
        }
    }

    /// To the next segment. `append` has made room in the lists.
    fn forward(&mut self, current: &mut Segment) {
        if let Some(next) = self.newer.pop() {
            self.older.push(std::mem::replace(current, next));
        }
    }

    /// To the one before.
    fn back(&mut self, current: &mut Segment) {
        if let Some(previous) = self.older.pop() {
            self.newer.push(std::mem::replace(current, previous));
        }
    }

    /// What the frames of the current segment rest on; `None` on the oldest one.
    pub(crate) fn base(&self, current: &Segment) -> Option<Base> {
        Some(Base::of(current, self.older.last()?))
    }

    /// How many segments there are from the current one to the oldest.
    pub(crate) fn used(&self) -> usize {
        self.older.len() + 1
    }

    /// The segments from the current one to the oldest, each with what its frames rest on: `None` for the oldest.
    pub(crate) fn to_the_oldest<'a>(
        &'a self,
        current: &'a Segment,
    ) -> impl Iterator<Item = (&'a Segment, Option<Base>)> {
        let older = self.older.iter().rev();
        let before = older.clone().map(Some).chain([None]);
        std::iter::once(current)
            .chain(older)
            .zip(before)
            .map(|(segment, before)| (segment, before.map(|before| Base::of(segment, before))))
    }

    /// The size for the current segment when it becomes `size` bytes large and `needed` of them must fit: all segments together stay
    /// within the policy's maximum.
    pub(crate) fn bounded(&self, policy: &Policy, size: usize, needed: usize) -> Result<usize, Error> {
        bounded(policy, self.older.iter(), size, needed)
    }

    /// How many segments come before the current one.
    pub(crate) fn depth(&self) -> usize {
        self.older.len()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.older.len() + 1 + self.newer.len()
    }

    /// How large the current segment may become on the shadow segment that its frames are on: those before it have frames there too.
    pub(crate) fn shadow_allows(&self, policy: &Policy, shadows: Option<&Shadows>) -> usize {
        let Some(shadows) = shadows else { return usize::MAX };
        let (shadow, first) = shadows.of(self.depth());
        let others = self.older[first.min(self.older.len())..].iter();
        policy.shadow_fits(shadow.room()).saturating_sub(bytes(others))
    }

    /// Bytes of the idle segments whose calls would stay on the shadow segment of the current one.
    pub(crate) fn idle_on_shadow(&self, shadows: &Shadows) -> usize {
        let count = shadows.next_after(self.depth()) - self.depth() - 1;
        bytes(self.newer.iter().rev().take(count))
    }

    /// Sees to it that the segment behind the current one is large enough for the call, with a further shadow segment where the present one has
    /// no room for it, and says what is wrong if it cannot be. `record` is grow's frame record, whose caller is `link`.
    /// Returns whether a segment was made.
    pub(crate) fn prepare(
        &mut self,
        current: &mut Segment,
        policy: &Policy,
        shadows: Option<&mut Shadows>,
        record: usize,
        call: *const LinkCall,
    ) -> Result<bool, Refusal> {
        if !call.is_aligned() || call.is_null() {
            return Err(Error::Size { bytes: call.addr(), rule: "a link call's words are not 8-byte aligned" }.into());
        }
        // SAFETY: `link`'s caller passed it, and the engine's rules say that it lies in memory that stays.
        let call = unsafe { call.read_volatile() };
        call.check()?;
        let place = current.record().extent();
        let outside =
            |slot| Err(Refusal::from(Tampered { evidence: "a link call's frame is outside its segment", slot }));
        // SAFETY: `settle` has found grow's record in the current segment.
        let frame = unsafe { read_word(record) } as usize;
        if !frame.is_multiple_of(16) || frame <= record || !place.holds(frame, 16) {
            return outside(frame);
        }
        if call.area != 0 {
            // SAFETY: it lies in the segment.
            let thunk = unsafe { read_word(frame) } as usize;
            if thunk <= frame || !place.holds(thunk, 16 + call.area as usize) {
                let rule = "the stack arguments of a link call are not in the segment of its caller";
                return Err(Error::Size { bytes: call.area as usize, rule }.into());
            }
        }
        if let Some(next) = self.newer.last_mut()
            && next.record().room >= call.total as usize
        {
            if next.record().previous != std::ptr::from_ref(current.record()) {
                let slot = std::ptr::from_ref(next.record()).addr();
                return Err(Tampered { evidence: "the next segment is not this one's", slot }.into());
            }
            current.record_mut().next = next.record();
            return Ok(false);
        }
        let Record { identity, generation, .. } = *current.record();
        let map = |size| Segment::map(size, policy.guard, identity, generation);
        let Some(shadows) = shadows else {
            self.append(current, policy, usize::MAX, record, call.total as usize, map)?;
            return Ok(true);
        };
        shadows.keep(self.depth() + 1);
        self.append(current, policy, usize::MAX, record, call.total as usize, map)?;
        if let Err(error) = self.shadow_next(current, policy, shadows) {
            self.forget_idle(current);
            return Err(error.into());
        }
        Ok(true)
    }

    /// Gives the segment behind the current one, which has just been made for a link call, a shadow segment where it needs one.
    fn shadow_next(&mut self, current: &Segment, policy: &Policy, shadows: &mut Shadows) -> Result<(), Error> {
        let left = self.shadow_allows(policy, Some(shadows)).saturating_sub(current.record().size());
        let depth = self.depth() + 1;
        let Some(next) = self.newer.last_mut().filter(|next| next.record().size() > left) else { return Ok(()) };
        let token = shadows.append(depth, policy.shadow_size(next.record().size()))?;
        arch::link_shadow(next.record_mut(), token);
        Ok(())
    }

    /// Replaces what is behind the current segment, which is in use from `used_from` on, by one that `map` makes, of a size that takes `need`
    /// bytes and the reserve and is not above `most`.
    pub(crate) fn append(
        &mut self,
        current: &mut Segment,
        policy: &Policy,
        most: usize,
        used_from: usize,
        need: usize,
        map: impl FnOnce(usize) -> Result<Segment, Error>,
    ) -> Result<(), Error> {
        self.newer.clear();
        current.record_mut().next = std::ptr::null();
        let needed = need.saturating_add(policy.reserve);
        // Twice what lies on the present one, so that many links cost no more than one growth.
        let lies = current.record().top.saturating_sub(used_from);
        let present = lies.next_multiple_of(page_size()).max(policy.initial);
        let size = policy.next_size(present, needed)?;
        let size = bounded(policy, self.older.iter().chain([&*current]), size, needed)?;
        let size = within(policy, size, needed, most)?;
        // Each list can come to hold all of them, by `settle`, which has nobody to give an error to.
        let all = self.older.len() + 2;
        for list in [&mut self.older, &mut self.newer] {
            let bytes = all * size_of::<Segment>();
            let failed = |_| Error::Memory { what: "the list of segments", bytes, errno: libc::ENOMEM };
            list.try_reserve(all - list.len()).map_err(failed)?;
        }
        let mut fresh = map(size)?;
        note_limit(&mut fresh, policy);
        arch::link_idle(fresh.record_mut(), current.record());
        current.record_mut().next = fresh.record();
        self.newer.push(fresh);
        Ok(())
    }

    /// Where frames that rest on lifted ones must lie above: so that their limit shows that they have returned.
    pub(crate) fn floor(&self, current: &Segment) -> Option<usize> {
        let lifted = current.record().link_record & 1 == 1;
        self.older.last().filter(|_| lifted).map(|previous| previous.record().top)
    }

    /// The segment behind the current one, on which nothing runs.
    pub(crate) fn next(&self) -> Option<&Segment> {
        self.newer.last()
    }

    /// Frames of the current segment lie in the next one now, which becomes the current one: they return to `bottom`, to the frame at `fp`.
    pub(crate) fn lifted(&mut self, current: &mut Segment, fp: usize, bottom: RawPc) {
        if let Some(next) = self.newer.last_mut() {
            arch::link_lifted(next.record_mut(), current.record(), fp);
            let record = next.record_mut();
            (record.area, record.shadowed, record.lifted) = (0, 0, bottom.address());
            self.forward(current);
        }
    }

    /// The frames of `source` lie in the current segment now: it takes its place.
    pub(crate) fn moved(&mut self, source: &Segment, current: &mut Segment, policy: &Policy) {
        let Record { area, shadowed, lifted, .. } = *source.record();
        let record = current.record_mut();
        (record.area, record.shadowed, record.lifted) = (area, shadowed, lifted);
        note_limit(current, policy);
        if let Some(previous) = self.older.last_mut() {
            arch::link_moved(current.record_mut(), source.record());
            previous.record_mut().next = current.record();
        }
        // Link calls go to what is kept behind without asking: it must fit beside the others.
        let all = self.in_order(current).map(|segment| segment.record().size()).fold(0, usize::saturating_add);
        if all > policy.maximum {
            self.forget_idle(current);
        }
        if let Some(next) = self.newer.last_mut() {
            arch::link_idle(next.record_mut(), current.record());
            current.record_mut().next = next.record();
        }
    }

    /// The oldest segment, if it is not the current one.
    pub(crate) fn oldest(&self) -> Option<&Segment> {
        self.older.first()
    }

    /// Gives the segments back that nothing runs on.
    pub(crate) fn forget_idle(&mut self, current: &mut Segment) {
        self.newer.clear();
        current.record_mut().next = std::ptr::null();
    }

    /// Nothing runs on the stack any more: the oldest segment is the current one again, and `warm` of the others are kept.
    pub(crate) fn rewind(&mut self, current: &mut Segment, warm: usize) {
        while !self.older.is_empty() {
            self.back(current);
        }
        let cold = self.newer.len().saturating_sub(warm);
        self.newer.drain(..cold);
        if let Some(last) = self.newer.first_mut() {
            last.record_mut().next = std::ptr::null();
        } else {
            current.record_mut().next = std::ptr::null();
        }
    }

    /// Seals those that were kept for another generation, which the current segment has already.
    pub(crate) fn reseal(&mut self, current: &Segment, generation: u64) {
        let mut previous: *const Record = current.record();
        for segment in self.newer.iter_mut().rev() {
            segment.reseal(generation);
            // SAFETY: the record of the segment before, which is owned by the caller or by an earlier element of the list.
            arch::link_idle(segment.record_mut(), unsafe { &*previous });
            previous = segment.record();
        }
    }
}

/// Writes the words that say how far managed code may go.
fn note_limit(segment: &mut Segment, policy: &Policy) {
    let record = segment.record_mut();
    let limit = record.base.wrapping_add(policy.reserve);
    record.room = record.top.wrapping_sub(limit);
    record.limit = if policy.relocate_always { usize::MAX } else { limit };
}

/// Of all of them together.
fn bytes<'a>(segments: impl Iterator<Item = &'a Segment>) -> usize {
    segments.map(|segment| segment.record().size()).fold(0, usize::saturating_add)
}

/// A size of at most `most` bytes, which the shadow segment has room for, that `needed` fit in.
pub(crate) fn within(policy: &Policy, size: usize, needed: usize, most: usize) -> Result<usize, Error> {
    let most = most & !(page_size() - 1);
    if needed > most {
        let whole = needed.checked_next_multiple_of(page_size()).unwrap_or(needed);
        return Err(Error::ShadowRoom { needed: policy.shadow_need(whole), room: policy.shadow_need(most) });
    }
    Ok(size.min(most))
}

fn bounded<'a>(
    policy: &Policy,
    others: impl Iterator<Item = &'a Segment>,
    size: usize,
    needed: usize,
) -> Result<usize, Error> {
    let used = bytes(others);
    let left = policy.maximum.saturating_sub(used);
    if needed > left {
        return Err(Error::Overflow { needed: used.saturating_add(needed), maximum: policy.maximum });
    }
    Ok(size.min(left & !(page_size() - 1)).max(needed.next_multiple_of(page_size()).min(left)))
}

/// Called by the `link` stub where it comes back to a frame that it was not called from (x86-64; arm64 traps).
#[unsafe(no_mangle)]
extern "C" fn cfi_stack_unlinked(frame: usize) -> ! {
    tamper::end(Tampered {
        evidence: "a linked segment was not entered from the frame that it returns to",
        slot: frame,
    })
}

#[cfg(test)]
mod tests;
