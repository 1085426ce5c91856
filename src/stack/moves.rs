//! Moving a stack's frames to another segment: larger, smaller or just another one. It is the same for a stack that grows, for one whose managed
//! code waits for native code, between nested entries, and for a suspended one.

use super::nested::astray;
use super::{Inner, State};
use crate::abi::{Link, Record};
use crate::arch::{self, ENTRY_FP_OFFSET};
use crate::codemap::table::Reading;
use crate::error::{Error, Refusal};
use crate::link::{Base, within};
use crate::pac::Tampered;
use crate::relocate::relocate;
use crate::segment::remap::{Held, moves_pages};
use crate::segment::{Segment, read_word};
use crate::shadow::Shadows;
use crate::signer::Signer;
use crate::steps::{Step, StepInfo, step};
use crate::walk::{Bounds, Piece, Walk};
use std::sync::atomic::Ordering;

/// What the frames of an entry rest on: its frame on the native stack.
pub(super) fn entry_base(native_sp: usize) -> Base {
    let fp = native_sp.wrapping_add(ENTRY_FP_OFFSET) as u64;
    Base { bottom: arch::entry_return(), fp, arguments: 0, lifted: false }
}

impl<S: Signer> Inner<S> {
    /// What the stub `grow` asks for: room, or a segment for a link call.
    pub(super) fn grow(&mut self, bytes: usize, registers: usize) -> Result<(), Refusal> {
        self.moving = true;
        let grown = self.grow_now(bytes, registers);
        self.moving = false;
        grown
    }

    fn grow_now(&mut self, bytes: usize, registers: usize) -> Result<(), Refusal> {
        let youngest = self.youngest()?.unwrap_or(0);
        step(Step::Begin, StepInfo::new(youngest, self.segment.record(), None, &mut self.plan))?;
        if self.prepare_link()? || self.lift(bytes, registers)? { Ok(()) } else { self.make_room(bytes, registers) }
    }

    /// Makes a segment for a link call, where it is `link` that has called `grow`. Says whether it was.
    fn prepare_link(&mut self) -> Result<bool, Refusal> {
        let Some(activation) = self.activation else { return Ok(false) };
        // SAFETY: `enter` borrows the activation until the stub returns.
        let call = unsafe { activation.as_ref() }.link.swap(std::ptr::null_mut(), Ordering::Relaxed);
        let record = match self.settled()? {
            Some(record) if !call.is_null() => record,
            _ => return Ok(false),
        };
        let Inner { links, segment, policy, shadows, .. } = self;
        let made = links.prepare(segment, policy, shadows.as_mut(), record, call);
        self.stats.shadow_segments = self.shadows.as_ref().map_or(0, Shadows::made);
        let made = made?;
        self.stats.segments += u64::from(made);
        Ok(true)
    }

    /// Makes the segment that holds `record`, a stub's, the current one.
    pub(super) fn settle(&mut self, record: usize) -> Result<(), Tampered> {
        if self.links.settle(&mut self.segment, record)? {
            self.show_limit();
        }
        self.control.segment = self.segment.record();
        Ok(())
    }

    /// Address of the youngest frame record, where there is one; its segment is the current one now.
    pub(super) fn settled(&mut self) -> Result<Option<usize>, Refusal> {
        let youngest = self.youngest()?;
        if let Some(record) = youngest {
            self.settle(record)?;
        }
        Ok(youngest)
    }

    /// The record of the segment that the stack's oldest frame lies in.
    pub(super) fn oldest(&self) -> *const Record {
        self.links.oldest().unwrap_or(&self.segment).record()
    }

    /// Makes room for `bytes` and the reserve below the stack pointer of the managed function that waits, or for an idle stack's first one.
    /// `registers` is the address of the callee-saved registers that will be loaded when it goes on; 0 where they are in
    /// native frames.
    pub(super) fn make_room(&mut self, bytes: usize, registers: usize) -> Result<(), Refusal> {
        let youngest = self.settled()?;
        let used = self.used(youngest)?;
        let spare = self.policy.reserve.saturating_add(bytes);
        let needed = used.saturating_add(spare);
        let present = self.segment.record().size();
        match needed > present {
            true => {
                let size = self.policy.next_size(present, needed)?;
                let size = self.links.bounded(&self.policy, size, needed)?;
                let size = within(&self.policy, size, needed, self.shadow_allows())?;
                self.move_segment(size, youngest, spare, registers)
            }
            false if self.policy.relocate_always && youngest.is_some() => {
                self.move_segment(present, youngest, spare, registers)
            }
            // The limit stands where pages end that were provided, or too high: that costs time, nothing else.
            false => {
                if self.segment.provide(needed) {
                    self.show_limit();
                }
                Ok(())
            }
        }
    }

    /// Moves to the smallest segment that suffices. With `hysteresis` only when the present one is much too large.
    pub(super) fn shrink(&mut self, hysteresis: bool) -> Result<bool, Refusal> {
        let youngest = self.settled()?;
        let used = self.used(youngest)?;
        let present = self.segment.record().size();
        if hysteresis && !self.policy.is_too_large(present, used) {
            return Ok(false);
        }
        let spare = self.policy.reserve.saturating_add(self.policy.keep);
        let size = self.policy.fitting(used.saturating_add(spare).min(present))?;
        self.forget_idle();
        if size >= present {
            return Ok(false);
        }
        self.move_segment(size, youngest, spare, 0)?;
        Ok(true)
    }

    /// How large the current segment may become on the shadow segment that its frames are on.
    pub(super) fn shadow_allows(&self) -> usize {
        self.links.shadow_allows(&self.policy, self.shadows.as_ref())
    }

    /// Gives the segments back that nothing runs on, and their shadow segments.
    pub(super) fn forget_idle(&mut self) {
        self.links.forget_idle(&mut self.segment);
        self.keep_shadows();
    }

    /// Gives the shadow segments back whose data segments are gone.
    pub(super) fn keep_shadows(&mut self) {
        if let Some(shadows) = &mut self.shadows {
            shadows.keep(self.links.count());
        }
    }

    /// Address of the youngest frame record, where there is one: that of the stub by which managed code was left.
    pub(super) fn youngest(&self) -> Result<Option<usize>, Refusal> {
        match self.state {
            State::Idle => Ok(None),
            State::Suspended => Ok(Some(self.control.suspended.record)),
            State::Running => self.waits_at(self.control.native_sp, self.control.link).map(Some),
        }
    }

    /// What the link record of an entry says. It stands right below the entry's frame.
    pub(super) fn waits_at(&self, native_sp: usize, link: usize) -> Result<usize, Refusal> {
        if link == 0 || link != native_sp.wrapping_sub(size_of::<Link>()) {
            return Err(astray(link));
        }
        // SAFETY: the stub wrote the link record there, on this thread's stack. Had both words been rewritten, the read faults or gives what is
        // no frame record's address.
        Ok(unsafe { read_word(link) } as usize)
    }

    /// Bytes that the frames take, without the youngest record.
    pub(super) fn used(&self, youngest: Option<usize>) -> Result<usize, Refusal> {
        let source = self.segment.record();
        if (source.identity, source.generation) != (self.control.identity, self.control.generation) {
            let slot = std::ptr::from_ref(source).addr();
            return Err(Tampered { evidence: "the segment's record is not this stack's", slot }.into());
        }
        match youngest {
            None => Ok(0),
            Some(record) if !source.holds(record, 16) => {
                Err(Tampered { evidence: "the stack pointer is outside the stack", slot: record }.into())
            }
            // The stack pointer at the call of the stub is the CFA of its frame.
            Some(record) => Ok(source.top.wrapping_sub(record.wrapping_add(16))),
        }
    }

    /// Lists the pieces that lie in the current segment, youngest first: one for each entry that has frames there. Returns whether the last is the
    /// oldest on its shadow segment.
    pub(super) fn list_pieces(&mut self, youngest: usize, registers: usize) -> Result<bool, Refusal> {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        let count = self.outer.len() + 1;
        pieces.try_reserve(count).map_err(|_| {
            let bytes = count.saturating_mul(size_of::<Piece>());
            Error::Memory { what: "the pieces of a span", bytes, errno: libc::ENOMEM }
        })?;
        let source = self.segment.record();
        let mut youngest = youngest;
        let mut entries = self.entries().peekable();
        while let Some((native_sp, _)) = entries.next() {
            let entry = entry_base(native_sp);
            let waits = match entries.peek() {
                Some(&(native_sp, link)) => Some(self.waits_at(native_sp, link)?),
                None => None,
            };
            // An entry whose code waits in an older segment has frames there too: in this one they rest on a link.
            let older = waits.filter(|&record| source.holds(record, 16));
            let base = match (older, self.links.base(&self.segment)) {
                (None, Some(linked)) => linked,
                (None, None) if waits.is_some() => return Err(astray(waits.unwrap_or(0))),
                _ => entry,
            };
            pieces.push(Piece {
                youngest,
                lifted: None,
                stub: self.signer.stubs(),
                bottom: base.bottom,
                base_cfa: older.unwrap_or(source.top.wrapping_sub(base.arguments)),
                base_fp: base.fp,
                arguments: base.arguments,
                registers: if pieces.is_empty() { registers } else { 0 },
            });
            match older {
                Some(record) => youngest = record,
                None => break,
            }
        }
        drop(entries);
        self.pieces = pieces;
        let depth = self.links.depth();
        Ok(self.shadows.as_ref().map_or(depth == 0, |shadows| shadows.of(depth).1 == depth))
    }

    /// Moves all frames to a new segment of `size` bytes and makes that the stack's. `spare` bytes must be free there below the stack pointer of the
    /// function that waits. On an error nothing has changed.
    fn move_segment(
        &mut self,
        size: usize,
        youngest: Option<usize>,
        spare: usize,
        registers: usize,
    ) -> Result<(), Refusal> {
        // Idle segments count with the current one: a link call may go to them without Rust.
        let idle = self.shadows.as_ref().map_or(0, |shadows| self.links.idle_on_shadow(shadows));
        if size.saturating_add(idle) > self.shadow_allows() {
            self.forget_idle();
        }
        self.moving = true;
        let moved = self.move_frames(size, youngest, spare, registers);
        self.moving = false;
        moved
    }

    fn move_frames(
        &mut self,
        size: usize,
        youngest: Option<usize>,
        spare: usize,
        registers: usize,
    ) -> Result<(), Refusal> {
        self.previous = None;
        let (identity, generation) = (self.control.identity, self.control.generation);
        let guard = self.policy.guard;
        let span = youngest.map_or(0, |record| self.segment.record().top.wrapping_sub(record));
        let mut destination = match self.links.floor(&self.segment) {
            None => Segment::map_for(span, size, &self.policy, identity, generation)?,
            Some(floor) => Segment::map_above(size, guard, identity, generation, floor)?,
        };
        if span < self.policy.move_pages {
            destination.populate(span);
        }
        if youngest.is_some() && size > self.segment.record().size() {
            destination.provide_behind(span, span.saturating_sub(16).saturating_add(spare));
        }
        let present = self.segment.record().size();
        let mut at = destination.record().top;
        if let Some(record) = youngest {
            let registers = match self.state {
                State::Suspended => (&raw mut self.control.saved).expose_provenance(),
                _ => registers,
            };
            let complete = self.list_pieces(record, registers)?;
            at = self.move_span(record, complete, destination.record(), spare)?;
        }
        let old = std::mem::replace(&mut self.segment, destination);
        self.links.moved(&old, &mut self.segment, &self.policy);
        self.keep_shadows();
        self.control.segment = self.segment.record();
        let old = if self.policy.poison || self.policy.relocate_always {
            // Without memory to split the mapping the old segment stays readable, which is what a policy without poison has.
            let _ = old.poison();
            self.previous = Some(old);
            None
        } else {
            Some(old)
        };
        let shrunk = size < present;
        self.stats.shrinks += u64::from(shrunk);
        self.stats.growths += u64::from(!shrunk);
        self.stats.largest = self.stats.largest.max(size as u64);
        self.show_limit();
        step(Step::Committed, StepInfo::new(at, self.segment.record(), None, &mut self.plan))?;
        drop(old);
        Ok(())
    }

    /// Walks, plans and moves the span of the listed pieces, and what says where managed code waits. Returns the place of the youngest record.
    fn move_span(&mut self, record: usize, complete: bool, target: &Record, spare: usize) -> Result<usize, Refusal> {
        let source = self.segment.record();
        let token = self.control.token;
        let evidence = "the shadow stack's token is outside the shadow stack";
        let shadow = match &self.shadows {
            None => None,
            Some(shadows) => {
                let (shadow, _) = shadows.of(self.links.depth());
                Some(shadow.entries(token).ok_or(Tampered { evidence, slot: token })?)
            }
        };
        let redirect = step(Step::Mapped, StepInfo::new(record, source, Some(target), &mut self.plan))?;
        // What a hook directs elsewhere need not be a segment of ours.
        let pages = if redirect.is_none() { self.policy.move_pages } else { usize::MAX };
        // SAFETY: only a hook redirects, and it vouches for the record (cargo feature `steps`).
        let target = redirect.map_or(target, |record| unsafe { &*std::ptr::with_exposed_provenance(record) });

        let reading = Reading::begin();
        let table = reading.table().ok_or(Error::UnknownCode(arch::grow()))?;
        let smallest_frame = self.policy.smallest_frame;
        let bounds = Bounds { source, pieces: &self.pieces, complete, smallest_frame, shadow, in_place: false };
        self.plan.make(&self.signer, Walk::new(&self.signer, table, bounds))?;
        drop(reading);
        let by_pages = source.top.wrapping_sub(record) >= pages && moves_pages();
        let _held = by_pages.then(Held::new);
        // SAFETY: the plan was just made for `bounds`; both segments are owned by self; the youngest frame is a stub's, and native code runs now.
        let moved = unsafe { relocate(&self.signer, &mut self.plan, &bounds, target, spare - 16, pages)? };
        self.stats.frames_moved += self.plan.rebindings().len() as u64;
        self.stats.rebound += self.plan.rebound() as u64;
        self.stats.page_moves += u64::from(self.plan.pages_moved());
        self.stats.bytes_moved += source.top.wrapping_sub(record) as u64;
        self.move_links(target)?;
        Ok(moved)
    }

    /// Tells the stubs by which managed code was left where it waits now. The last thing that a move writes before the segment is the stack's; what
    /// fails here is evidence of tampering.
    fn move_links(&mut self, target: &Record) -> Result<(), Refusal> {
        let innermost = match self.state {
            State::Suspended => (&raw mut self.control.suspended).expose_provenance(),
            _ => self.control.link,
        };
        self.move_link(innermost, target)?;
        // One piece for each entry: those in older segments stay.
        let more = self.pieces.len().saturating_sub(1);
        for index in (0..self.outer.len()).rev().take(more) {
            self.move_link(self.outer[index].link, target)?;
        }
        Ok(())
    }

    fn move_link(&mut self, link: usize, target: &Record) -> Result<(), Refusal> {
        let source = std::ptr::from_ref(self.segment.record());
        // SAFETY: a link record that a stub wrote and `list_pieces` has found in its place, or control's own; the source's record is boxed.
        let moved = unsafe { arch::move_link(link, &raw mut self.control, &*source, target) };
        moved.map(|_| ()).ok_or_else(|| astray(link))
    }
}
