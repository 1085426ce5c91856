//! A38: a plain store to a shadow stack: the managed one's token and a word below it, and the thread's own.

use crate::attack::{Scene, policy};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::managed;
use crate::memory::{peek, poke, shadow_mappings};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use std::sync::atomic::Ordering::Relaxed;

/// A38.
pub fn plain_store(class: &Class) -> Report {
    if !class.shadow() {
        let missing =
            if cfg!(target_arch = "x86_64") { crate::class::Feature::Shstk } else { crate::class::Feature::Gcs };
        return Report::skip(&[missing], "this thread has no shadow stack");
    }
    let mut tally = Tally::new(class);
    tally.control("a store elsewhere", &run(|| store(Target::Elsewhere)));
    let own = run(|| store(Target::Own));
    if class.user_mode_emulator && own.code(class) == Ok(Code::R) {
        return Report::skip(&[], "QEMU's user mode keeps shadow stacks in ordinary memory: the store went through");
    }
    tally.attack("the thread's own", &own, &[Code::W]);
    tally.attack("the managed one's token", &run(|| store(Target::Token)), &[Code::W]);
    tally.attack("the managed one, below its token", &run(|| store(Target::BelowToken)), &[Code::W]);
    tally.report()
}

#[derive(Clone, Copy)]
enum Target {
    Elsewhere,
    Own,
    Token,
    BelowToken,
}

fn store(target: Target) -> Verdict {
    let before = shadow_mappings();
    let mut scene = Scene::new(policy())?;
    let place = match target {
        Target::Elsewhere => {
            let mut word = 7;
            // SAFETY: a live local.
            unsafe { poke((&raw mut word).expose_provenance(), 8) };
            return scene.recurse_right(managed::recurse_a(), 400).map(|()| Code::C);
        }
        Target::Own => cpu::shadow_pointer(),
        Target::Token | Target::BelowToken => {
            // The kernel merges neighbours into one mapping: what counts is what was not there before.
            let is_new = |address: usize| !before.iter().any(|old| old.contains(&address));
            let word = if matches!(target, Target::Token) { 8 } else { 16 };
            shadow_mappings()
                .iter()
                .flat_map(|now| {
                    before.iter().map(|old| old.start).chain([now.end]).map(|top| (now.clone(), top - word))
                })
                .find(|(now, place)| now.contains(place) && is_new(*place))
                .map(|(_, place)| place)
                .ok_or("no shadow stack appeared in /proc/self/smaps")?
        }
    };
    // SAFETY: shadow stacks are readable.
    let word = unsafe { peek(place) };
    if matches!(target, Target::Token) && word & !0xfff == 0 {
        return Err(format!("no token at {place:#x}: {word:#x}"));
    }
    page().store.store(place as u64, Relaxed);
    // SAFETY: that is the attack; the word stays the same where the store goes through.
    unsafe { poke(place, word) };
    Ok(Code::R)
}
