//! A42, the leaves that Rust calls while a stack moves: nothing of theirs lies on a stack, so the callers are the same at every
//! instruction. From one called by way of `grow` the walk leads through the managed frames to main.

use super::callers::{Kind, Stub, follow, look};
use super::{Sums, outer};
use crate::attack::{ONE_GROWTH, Scene, at_every_step, policy, stop};
use crate::managed;
use crate::selftest::link::Linked;
use crate::selftest::spans::{Op, Run, World};
use crate::selftest::{lift, link};
use crate::stepper;
use crate::tally::Tally;
use cfi_stack::steps::Step;
use cfi_stack::{Exit, Policy};

const MOVE_LINK: usize = 0;
const SEAL: usize = 1;
const RESEAL: usize = 2;
const LINK_IDLE: usize = 3;
const LINK_MOVED: usize = 4;
const LINK_PART: usize = 5;
const LINK_LIFTED: usize = 6;
const REBIND: usize = 7;
const REMAP: usize = 8;

fn stubs() -> Vec<Stub> {
    macro_rules! leaves {
        ($($name:literal $stub:ident),*) => {{
            unsafe extern "C" {
                $(fn $stub();)*
            }
            [$(Stub::new($name, $stub, Kind::Leaf)),*]
        }};
    }
    #[allow(unused_mut, reason = "some sign")]
    let mut all = leaves!(
        "move_link" cfi_stack_move_link,
        "seal" cfi_stack_seal,
        "reseal" cfi_stack_reseal,
        "link_idle" cfi_stack_link_idle,
        "link_moved" cfi_stack_link_moved,
        "link_part" cfi_stack_link_part,
        "link_lifted" cfi_stack_link_lifted,
        "rebind" cfi_stack_rebind,
        "remap" cfi_stack_remap
    )
    .to_vec();
    #[cfg(target_arch = "aarch64")]
    all.extend(leaves!(
        "rebind_in_place" cfi_stack_rebind_in_place
    ));
    all
}

/// Steps from the beginning of a growth to its end.
fn while_growing() {
    at_every_step(|step, _| {
        match step {
            Step::Begin => stepper::begin(look, 0),
            Step::Committed => stepper::enough(),
            _ => {}
        }
        Ok(())
    });
}

/// By page tables, whatever the size.
fn by_pages() -> Policy {
    Policy { move_pages: 1, ..policy() }
}

/// Grows once, by few frames that are large; then a run that does not, whose end seals the record for the next.
fn grows(policy: Policy, by_pages: bool) -> Result<(), String> {
    let mut ops = [Op::Small(1), Op::Large(2), Op::Large(3), Op::Large(4), Op::Large(5)].into_iter();
    let mut run = Run::new(policy, World::new(move |_| ops.next().unwrap_or(Op::Return)))?;
    let mut got = None;
    while_growing();
    outer(&mut || got = Some(run.enter(9)));
    stop();
    run.world.verdict()?;
    match run.stack.stats() {
        stats if stats.growths != 1 || stats.page_moves != u64::from(by_pages) => return Err(format!("{stats:?}")),
        _ => {}
    }
    let mut again = None;
    stepper::through(look, || outer(&mut || again = Some(run.enter(9))));
    run.world.verdict()?;
    match [got, again] {
        [Some(Ok(Exit::Returned(_))), Some(Ok(Exit::Returned(_)))] => Ok(()),
        other => Err(format!("{other:x?}")),
    }
}

/// A suspended stack moves.
fn moves_suspended() -> Result<(), String> {
    let mut ops = [Op::Small(1), Op::Large(2), Op::Suspend(3)].into_iter();
    let mut run = Run::new(policy(), World::new(move |_| ops.next().unwrap_or(Op::Return)))?;
    let got = run.enter(9);
    let mut moved = Ok(());
    stepper::through(look, || outer(&mut || moved = run.stack.reserve(20_000)));
    moved.map_err(|error| error.to_string())?;
    run.world.verdict()?;
    match (got, run.resume(5, false)) {
        (Ok(Exit::Suspended(3)), Ok(Exit::Returned(_))) => run.world.verdict(),
        other => Err(format!("{other:x?}")),
    }
}

/// Links, and grows in the linked segment.
fn links() -> Result<(), String> {
    let policy = Policy { relocate_always: true, ..policy() };
    let mut linked = Linked::new(policy, link::recurse(), 0, 0, 256)?;
    let mut right = Ok(());
    while_growing();
    outer(&mut || right = linked.recurse_right(2));
    stop();
    right?;
    let mut right = Ok(());
    stepper::through(look, || outer(&mut || right = linked.recurse_right(0)));
    right
}

/// Lifts once.
fn lifts() -> Result<(), String> {
    let _code = lift::register(true)?;
    let policy = Policy { lift_above: 1024, lift_bytes: 512, ..policy() };
    let mut scene = Scene::new(policy)?;
    let mut got = None;
    while_growing();
    outer(&mut || got = Some(scene.recurse(lift::recurse(), ONE_GROWTH)));
    stop();
    match scene.stack.stats().lifts {
        1.. if got == Some(Ok(Exit::Returned(managed::recursion_sum(ONE_GROWTH as u64)))) => Ok(()),
        lifts => Err(format!("{got:x?}, {lifts} lifts")),
    }
}

/// Steps through all of them.
pub fn all(tally: &mut Tally<'_>) {
    let class = tally.class();
    // Records that are not sealed move no pages where something is defended.
    let by_tables = class.pac() || !class.shadow();
    let stubs = stubs();
    let mut sums = Sums::default();
    let mut follow = |what: &str, required: &[usize], body: &mut dyn FnMut() -> Result<(), String>| {
        follow(tally, &mut sums, what, (&stubs, required), &[], body);
    };
    const MOVES: &[usize] = &[MOVE_LINK, SEAL, RESEAL, REBIND];
    follow("grows by copying", MOVES, &mut || grows(policy(), false));
    follow("grows by page tables", &[MOVE_LINK, SEAL, RESEAL, REBIND, REMAP], &mut || grows(by_pages(), by_tables));
    follow("a suspended stack moves", &[MOVE_LINK, SEAL, REBIND], &mut moves_suspended);
    follow("links and grows there", &[LINK_IDLE, LINK_MOVED, MOVE_LINK], &mut links);
    follow("lifts", &[LINK_PART, LINK_IDLE, LINK_LIFTED, MOVE_LINK, REBIND], &mut lifts);
    sums.say(tally);
}
