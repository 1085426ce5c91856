//! Stacks of a slab as this thread's shadow mode has them: neighbours in one mapping, a guard below each, an idle token in each.

use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::memory::{peek_if_mapped, shadow_mappings};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::features::{self, Mechanisms};
use cfi_stack::pool::{self, Lease};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;

/// Stacks leased at once: they fill several chunks.
const STACKS: usize = 200;
/// Offset of `shadow_top` in a slot.
const SHADOW_TOP: usize = 88;

/// S18.
pub fn neighbours(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    // QEMU user mode does not say which mappings are shadow stacks.
    let end = if class.user_mode_emulator { run(|| all(false)) } else { run(|| all(true)) };
    tally.attack(&format!("{STACKS} stacks of a page"), &end, &[Code::C]);
    let [with_shadow, mappings, ..] = end.notes;
    tally.say(format!("{with_shadow} with shadow stacks, in {mappings} mappings"));
    tally.report()
}

fn shadow_top(lease: &Lease) -> usize {
    // SAFETY: the slot is leased, and the field is a word of it.
    unsafe { lease.slot().as_ptr().cast::<usize>().byte_add(SHADOW_TOP).read() }
}

fn all(mappings_are_told: bool) -> Verdict {
    let expected = features::detect().enabled.intersects(Mechanisms::SHSTK | Mechanisms::GCS);
    let mut last = BTreeSet::new();
    for round in 0..3 {
        let leases =
            (0..STACKS).map(|_| pool::lease(1)).collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
        let mut mappings = BTreeSet::new();
        let shadows = if expected { shadow_mappings() } else { Vec::new() };
        for lease in &leases {
            if peek_if_mapped((lease.base() - 8) & !7).is_some() {
                return Err("a data area has no guard".into());
            }
            let top = shadow_top(lease);
            if (top != 0) != expected || lease.has_shadow() != expected {
                return Err(format!("a shadow stack ends at {top:#x}"));
            }
            if !expected {
                continue;
            }
            let token = if cfg!(target_arch = "x86_64") { top | 1 } else { ((top - 8) & !0xfff) | 1 };
            if peek_if_mapped(top - 8) != Some(token as u64) {
                return Err(format!("no idle token at the top {top:#x}"));
            }
            if peek_if_mapped(top - lease.size()).is_none() || peek_if_mapped(top - lease.size() - 8).is_some() {
                return Err(format!("no guard below the shadow stack that ends at {top:#x}"));
            }
            if !mappings_are_told {
                continue;
            }
            let mapping = shadows.iter().find(|mapping| mapping.contains(&(top - 8)));
            mappings.insert(mapping.ok_or("a shadow stack is in no mapping")?.start);
        }
        page().notes[0].store(if expected { leases.len() as u64 } else { 0 }, Relaxed);
        page().notes[1].store(mappings.len() as u64, Relaxed);
        if pool::stats().cheap_guards && mappings.len() > 1 {
            return Err(format!("the shadow stacks lie in {} mappings", mappings.len()));
        }
        if round > 0 && mappings != last {
            return Err("more mappings in a later round".into());
        }
        last = mappings;
    }
    Ok(Code::C)
}
