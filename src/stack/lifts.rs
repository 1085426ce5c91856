//! Growth of a deep stack by lifting: see [`crate::lift`].

use super::nested::astray;
use super::{Inner, State};
use crate::arch;
use crate::codemap::table::Reading;
use crate::error::Refusal;
use crate::lift::{Lift, find};
use crate::pac::Tampered;
use crate::signer::Signer;
use crate::steps::{Step, StepInfo, step};
use crate::walk::{Bounds, Walk};

impl<S: Signer> Inner<S> {
    /// Lifts the youngest frames of the managed function that has called `grow` for `bytes`, where the policy wants it and the frames let it. Says
    /// whether that was done; else the whole span is to be moved.
    pub(super) fn lift(&mut self, bytes: usize, registers: usize) -> Result<bool, Refusal> {
        let Some(youngest) = self.settled()?.filter(|_| self.state == State::Running) else { return Ok(false) };
        let used = self.used(Some(youngest))?;
        let spare = self.policy.reserve.saturating_add(bytes);
        let fits = used.saturating_add(spare) <= self.segment.record().size();
        if fits || used <= self.policy.lift_above || self.policy.relocate_always {
            return Ok(false);
        }
        let complete = self.list_pieces(youngest, registers)?;
        let present = self.segment.record().size();
        // Lifted frames stay on their shadow segment: a segment that comes with one of its own is none for them.
        if self.links.next().is_some_and(|next| {
            next.record().shadow != 0 || present.saturating_add(next.record().size()) > self.shadow_allows()
        }) {
            self.forget_idle();
        }
        let most = self.shadow_allows().saturating_sub(present);
        let Inner { links, segment, policy, plan, shadows, control, pieces, signer, .. } = self;
        let Some(&piece) = pieces.first() else { return Ok(false) };
        let evidence = "the shadow stack's token is outside the shadow stack";
        let outside = Tampered { evidence, slot: control.token };
        let shadow = match shadows {
            None => None,
            Some(shadows) => Some(shadows.of(links.depth()).0.entries(control.token).ok_or(outside)?),
        };
        let reading = Reading::begin();
        let Some(table) = reading.table() else { return Ok(false) };
        let smallest_frame = policy.smallest_frame;
        let bounds = Bounds { source: segment.record(), pieces, complete, smallest_frame, shadow, in_place: false };
        let Some(cut) = find(Walk::new(&*signer, table, bounds), policy.lift_bytes)? else { return Ok(false) };
        let lift = Lift { policy, table, cut, piece, shadow, most, spare };
        let link = control.link;
        let lifted = lift.carry_out(&*signer, links, segment, plan, |part, target| {
            // SAFETY: the link record that `grow` wrote and `list_pieces` has found in its place; the records live while this runs.
            let moved = unsafe { arch::move_link(link, control, part, target) };
            moved.map(|_| ()).ok_or_else(|| astray(link))
        });
        drop(reading);
        self.keep_shadows();
        let Some(lifted) = lifted? else { return Ok(false) };
        self.control.segment = self.segment.record();
        self.show_limit();
        self.stats.lifts += 1;
        self.stats.segments += u64::from(lifted.made);
        self.stats.frames_moved += self.plan.rebindings().len() as u64;
        self.stats.rebound += self.plan.rebound() as u64;
        self.stats.bytes_moved += lifted.bytes as u64;
        self.stats.largest = self.stats.largest.max(self.segment.record().size() as u64);
        step(Step::Committed, StepInfo::new(lifted.record, self.segment.record(), None, &mut self.plan))?;
        Ok(true)
    }
}
