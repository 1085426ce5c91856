//! Random programs over one growable stack whose CPU is the software model, against one endless stack: calls, tail calls, returns, nested
//! entries, linked calls, lifts, growth, shrinking, and what of it is refused.
//!
//! [`world`] plays compiled code and stubs ([`acts`]) and asks the library as they do ([`asks`]), and looks as `inspect` does ([`pictured`]); [`endless`] knows after each step what every word of every frame must be,
//! where it must be, and how it would have been signed there. The shadow stack, in ordinary memory, is compared word for word.

mod acts;
mod asks;
mod endless;
mod pictured;
mod world;

use super::design::{Design, Function, Site};
use crate::codemap::FrameLayout;
use crate::error::Error;
use crate::pac::{PointerSigning, Signing};
use crate::policy::Policy;
use crate::published;
use crate::segment::page_size;
use crate::thread::Thread;
use endless::{Level, What};
use quickcheck::{Arbitrary, Gen, QuickCheck};
use std::sync::{Mutex, PoisonError};
use world::World;

/// Programs that are tried on a CPU that is not emulated.
const PROGRAMS: u64 = 1500;
/// Most steps of one.
const STEPS: u64 = 160;

/// One step: what it does depends on what runs. See [`World::step`].
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: u8,
    function: u8,
    site: usize,
    bytes: usize,
    noise: u64,
}

impl Op {
    /// `deep` of a hundred more calls than else.
    fn choose(pick: &mut dyn FnMut(u64) -> u64, deep: u64) -> Op {
        let bytes = match pick(16) {
            0 | 1 => pick(1 << 17) as usize,
            2 => usize::MAX - pick(4096) as usize,
            3..8 => pick(1 << 14) as usize,
            _ => pick(512) as usize,
        };
        let kind = if pick(100) < deep { 0 } else { pick(24) as u8 };
        let (function, site) = (pick(256) as u8, pick(8) as usize);
        Op { kind, function, site, bytes, noise: pick(u64::MAX) }
    }
}

/// Functions, how their stack behaves, and what they do.
#[derive(Clone, Debug)]
struct Program {
    /// Its functions and keys; it has no calls. The last function is the thunk of linked calls.
    design: Design,
    /// Whether each function is left out of the code map.
    unknown: Vec<bool>,
    policy: Policy,
    /// Bytes of shadow stack, where there is one.
    shadow: Option<usize>,
    ops: Vec<Op>,
}

impl Program {
    fn choose(pick: &mut dyn FnMut(u64) -> u64) -> Program {
        let mut design = Design::choose(pick);
        design.calls.clear();
        let lifts = pick(2) == 0;
        let bad = pick(if lifts { 6 } else { 2 }) == 0;
        let mut unknown = vec![];
        for function in &mut design.functions {
            let Function { layout, sites, .. } = &*function;
            let below = sites.iter().filter_map(|site| site.frame_bytes).fold(layout.frame_bytes, u32::max);
            if below + layout.cfa_bytes + layout.incoming > 1200 {
                *function = plain(128, layout.signing);
            }
            function.layout.retakes_sp = lifts && pick(4) != 0;
            if lifts && pick(2) == 0 {
                function.layout.frame_pointer = PointerSigning::None;
            }
            if bad && pick(10) == 0 {
                function.layout.immovable = Some("pinned");
            }
            if bad && pick(20) == 0 {
                function.layout.signing = Signing::None;
            }
            unknown.push(bad && pick(20) == 0);
        }
        design.functions.push(plain(0, if design.keys.is_some() { Signing::B } else { Signing::None }));
        unknown.push(false);
        let policy = choose_policy(pick, lifts);
        let shadow = design.shadow.then(|| match pick(6) {
            0 => policy.shadow_need(2 * policy.initial),
            _ => policy.shadow_need(policy.maximum),
        });
        let deep = [0, 30, 60][pick(3) as usize];
        let ops = (0..=pick(if lifts { 2 * STEPS } else { STEPS })).map(|_| Op::choose(pick, deep)).collect();
        Program { design, unknown, policy, shadow, ops }
    }

    /// The function that a step is about.
    fn function(&self, op: &Op) -> usize {
        op.function as usize % self.thunk()
    }

    /// The function that calls `link`.
    fn thunk(&self) -> usize {
        self.design.functions.len() - 1
    }

    fn run(&self, thread: &Thread) -> Result<Tried, String> {
        let map = self.design.registration(|function| !self.unknown[function]).map_err(|error| error.to_string())?;
        let _code = map.publish().map_err(|error| error.to_string())?;
        let mut world = World::new(self, thread)?;
        for (number, op) in self.ops.iter().enumerate() {
            world.step(op).map_err(|problem| format!("step {number}, {op:?}: {problem}"))?;
        }
        world.finish()?;
        assert!(world.is_idle());
        Ok(world.tried)
    }
}

/// A function with plain frames and one call.
fn plain(frame_bytes: u32, signing: Signing) -> Function {
    let site = Site { offset: 4, frame_bytes: None, slots: vec![], registers: vec![] };
    Function { layout: FrameLayout::new(frame_bytes, signing), saves: vec![], gap: 0, len: 8, sites: vec![site] }
}

fn choose_policy(pick: &mut dyn FnMut(u64) -> u64, lifts: bool) -> Policy {
    let page = page_size();
    let growth = 2 + pick(3) as usize;
    Policy {
        initial: page,
        maximum: page * if lifts { 32 } else { [4, 16, 64][pick(3) as usize] },
        growth,
        growth_large: growth,
        shrink_below: growth + 1,
        keep: [0, 1024][pick(2) as usize],
        reserve: page / 2,
        guard: page,
        shadow_reserve: 512,
        warm: pick(3) as usize,
        move_pages: [usize::MAX, page][pick(2) as usize],
        lift_above: if lifts { [600, 1200, page][pick(3) as usize] } else { usize::MAX },
        lift_bytes: [256, 256, 1024][pick(3) as usize],
        relocate_always: !lifts && pick(4) == 0,
        poison: pick(8) == 0,
        ..Policy::default()
    }
}

impl Arbitrary for Program {
    fn arbitrary(g: &mut Gen) -> Self {
        Program::choose(&mut |n| u64::arbitrary(g) % n)
    }

    fn shrink(&self) -> Box<dyn Iterator<Item = Self>> {
        let program = self.clone();
        // Ever smaller runs of steps are left out.
        let lengths = std::iter::successors(Some(self.ops.len()), |&length| Some(length / 2)).take_while(|&n| n != 0);
        let fewer = lengths.flat_map(move |length| {
            let program = program.clone();
            (0..program.ops.len()).step_by(length).map(move |from| {
                let mut program = program.clone();
                program.ops.drain(from..program.ops.len().min(from + length));
                program
            })
        });
        let mut simpler = vec![Program { shadow: None, ..self.clone() }];
        simpler
            .push(Program { policy: Policy { poison: false, relocate_always: false, ..self.policy }, ..self.clone() });
        simpler.retain(|other| other.shadow != self.shadow || other.policy != self.policy);
        Box::new(simpler.into_iter().chain(fewer))
    }
}

/// What programs have done.
#[derive(Clone, Copy, Debug, Default)]
struct Tried {
    growths: u64,
    shrinks: u64,
    page_moves: u64,
    lifts: u64,
    links: u64,
    nested: u64,
    /// Moves of several pieces.
    of_pieces: u64,
    /// Moves of pieces that rest on a link, and on lifted frames' edge.
    on_links: u64,
    on_edges: u64,
    overflows: u64,
    shadow_rooms: u64,
    pictures: u64,
    unknown: u64,
    unsigned: u64,
    immovable: u64,
}

impl Tried {
    /// The youngest level's segment was moved.
    fn note_move(&mut self, levels: &[Level], shrunk: bool) {
        *(if shrunk { &mut self.shrinks } else { &mut self.growths }) += 1;
        let Some(segment) = levels.last().map(|level| level.segment) else { return };
        let oldest = levels.iter().position(|level| level.segment == segment).unwrap_or(0);
        let entered = levels[oldest + 1..].iter().any(Level::is_entered);
        self.of_pieces += u64::from(entered);
        match oldest.checked_sub(1).map(|below| &levels[below].what) {
            Some(What::Link { .. }) => self.on_links += 1,
            Some(What::Managed { .. }) => self.on_edges += 1,
            _ => {}
        }
    }

    fn note_refusal(&mut self, error: &Error) {
        *match error {
            Error::Overflow { .. } => &mut self.overflows,
            Error::ShadowRoom { .. } => &mut self.shadow_rooms,
            Error::UnknownCode(_) => &mut self.unknown,
            Error::Unsigned(_) => &mut self.unsigned,
            _ => &mut self.immovable,
        } += 1;
    }

    fn all(&mut self) -> [&mut u64; 15] {
        let Tried { growths, shrinks, page_moves, lifts, links, nested, of_pieces, on_links, on_edges, .. } = self;
        let Tried { pictures, overflows, shadow_rooms, unknown, unsigned, immovable, .. } = self;
        let moves = [growths, shrinks, page_moves, lifts, links, nested, of_pieces, on_links, on_edges, pictures];
        let refusals = [overflows, shadow_rooms, unknown, unsigned, immovable];
        let mut all = moves.into_iter().chain(refusals);
        std::array::from_fn(|_| all.next().expect("as many as there are"))
    }
}

/// What all programs together have done.
static TRIED: Mutex<Option<Tried>> = Mutex::new(None);

#[test]
fn random_programs_agree_with_an_endless_stack() {
    fn property(program: Program) -> Result<(), String> {
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        let mut tried = program.run(&thread)?;
        let mut sum = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
        for (sum, more) in sum.get_or_insert_default().all().into_iter().zip(tried.all()) {
            *sum += *more;
        }
        Ok(())
    }
    let _attached = Thread::attach().expect("a thread can be attached");
    if published::mode() & published::MODE_PAC != 0 {
        println!("records are sealed here, which nobody but the stubs can do: not played");
        return;
    }
    let programs = if std::env::var_os("CFI_STACK_EMULATED").is_some() { PROGRAMS / 10 } else { PROGRAMS };
    QuickCheck::new().tests(programs).max_tests(programs).quickcheck(property as fn(Program) -> Result<(), String>);
    let mut sum = TRIED.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_default();
    println!("{programs} programs: {sum:?}");
    let rarest = sum.all().into_iter().map(|count| *count).min();
    assert!(rarest >= Some(programs / 300), "hardly anything happened: {sum:?}");
}
