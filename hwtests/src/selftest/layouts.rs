//! Frames as code generators make them: S26 to S29.

use crate::attack::{Dice, at_every_step, corrupt, stop};
use crate::child::{Verdict, page, run};
use crate::class::{Class, Feature};
use crate::frames::{self, Function};
use crate::memory::peek;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::engine::Activation;
use cfi_stack::pac::{Binding, PointerSigning, Signing};
use cfi_stack::steps::Step;
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack};
use std::sync::atomic::Ordering::Relaxed;

/// Which function is called at each depth.
pub(crate) type Chain = Vec<usize>;

/// Functions by their place in a chain.
pub(crate) struct Kinds(pub(crate) Vec<Function>);

impl Kinds {
    /// What this CPU can run: the first is plain, the second needs the third as its callee.
    pub(super) fn of(class: &Class) -> Kinds {
        let mut kinds =
            vec![frames::plain(), frames::in_register(), frames::pushes(), frames::arguments(), frames::dynamic()];
        if class.pac() {
            kinds.extend(frames::signed_pointers());
        }
        Kinds(kinds)
    }

    /// A chain of `depth` calls of one kind, or of all mixed; the last is the oldest.
    pub(super) fn chain(&self, dice: &mut Dice, depth: usize, kind: Option<usize>) -> Chain {
        let mut chain: Chain = vec![2];
        for _ in 1..depth {
            let choice = kind.unwrap_or_else(|| dice.below(self.0.len()));
            let callee_saves = matches!(chain.last(), Some(1 | 2));
            chain.push(if choice == 1 && !callee_saves { 2 } else { choice });
        }
        chain
    }
}

/// Runs a chain on a stack of `policy`, with `change` made to the layouts, and gives what `enter` gave.
fn enter(
    kinds: &Kinds,
    chain: &Chain,
    policy: Policy,
    change: impl FnMut(&mut Function),
) -> Result<(Result<Exit, Error>, u64), String> {
    let code = frames::registration(change).publish().map_err(|error| error.to_string())?;
    let thread = Thread::attach().map_err(|error| error.to_string())?;
    let mut stack = Stack::new(&thread, policy).map_err(|error| error.to_string())?;
    let activation = Activation::new();
    let act = (&raw const activation).expose_provenance();
    let table: Vec<usize> = chain.iter().map(|&kind| kinds.0[kind].start.address()).collect();
    let oldest = kinds.0[chain[chain.len() - 1]].start;
    let arguments = [act, chain.len() - 1, table.as_ptr().expose_provenance(), 0];
    // SAFETY: the hand-made functions follow the engine's rules as registered, or break them where a case means to; the thread is ours.
    let result = unsafe { stack.enter(&thread, &activation, oldest, arguments) };
    let growths = stack.stats().growths;
    if result.is_err() {
        // Refused, it is still a stack.
        let first = kinds.0[0].start;
        // SAFETY: as above; a depth of 0 calls nothing and needs no room.
        let again = unsafe { stack.enter(&thread, &activation, first, [act, 0, 0, 0]) };
        let needs_growth = policy.relocate_always;
        if again != Ok(Exit::Returned(3)) && !needs_growth {
            return Err(format!("the stack is not usable any more: {again:x?}"));
        }
    }
    drop(code);
    Ok((result, growths))
}

fn policies() -> [(&'static str, Policy); 2] {
    let policy = Policy { maximum: 1 << 20, ..Policy::default() };
    [("doubling", policy), ("moving at every check", Policy { relocate_always: true, ..policy })]
}

fn right(chain: &Chain) -> u64 {
    (0..chain.len() as u64).map(|level| level * 8 + 3).sum()
}

pub(crate) fn comes_back(kinds: &Kinds, chain: &Chain, policy: Policy) -> Verdict {
    let (result, growths) = enter(kinds, chain, policy, |_| {})?;
    if result != Ok(Exit::Returned(right(chain))) {
        return Err(format!("{result:x?} instead of {:#x}", right(chain)));
    }
    if policy.relocate_always && growths < chain.len() as u64 - 1 {
        return Err(format!("{growths} growths"));
    }
    Ok(Code::C)
}

/// S26.
pub fn kinds_of_frames(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let kinds = Kinds::of(class);
    for (what, policy) in policies() {
        for kind in 0..kinds.0.len() {
            for depth in [1, 2, 9, 120] {
                let chain = kinds.chain(&mut Dice::new("S26", 0), depth, Some(kind));
                let end = run(|| comes_back(&kinds, &chain, policy));
                tally.attack(&format!("{what}, {}, {depth} deep", kinds.0[kind].name), &end, &[Code::C]);
            }
        }
        for number in 0..12 {
            let mut dice = Dice::new("S26", number);
            let depth = 2 + dice.below(150);
            let chain = kinds.chain(&mut dice, depth, None);
            let end = run(|| comes_back(&kinds, &chain, policy));
            tally.attack(&format!("{what}, mixed {number}"), &end, &[Code::C]);
        }
    }
    tally.report()
}

/// A lie about a layout, or a frame that cannot move, and what must come of it.
struct Refused {
    what: &'static str,
    kind: usize,
    change: fn(&mut Function),
    expected: fn(&Error) -> bool,
}

const REFUSED: [Refused; 4] = [
    Refused {
        what: "the engine's reason",
        kind: 0,
        change: |function| function.layout.immovable = Some("it is pinned"),
        expected: |error| matches!(error, Error::Immovable { reason: "it is pinned", .. }),
    },
    Refused {
        what: "an undeclared pointer in a conservative frame",
        kind: 0,
        change: |function| {
            function.layout.conservative = true;
            function.sites.iter_mut().for_each(|site| site.slots.clear());
        },
        expected: |error| matches!(error, Error::HiddenPointer { .. }),
    },
    Refused {
        what: "a frame that leaves its segment",
        kind: 4,
        change: |function| {
            function.layout.dynamic = false;
            function.layout.frame_bytes = 1 << 30;
        },
        expected: |error| matches!(error, Error::Layout { .. }),
    },
    Refused {
        what: "a frame below the smallest",
        kind: 0,
        change: |_| {},
        expected: |error| matches!(error, Error::Layout { rule, .. } if rule.contains("smallest_frame")),
    },
];

/// S27.
pub fn refusals(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let kinds = Kinds::of(class);
    for refused in &REFUSED {
        let chain = kinds.chain(&mut Dice::new("S27", 0), 120, Some(refused.kind));
        let end = run(|| {
            let (_, mut policy) = policies()[0];
            if refused.what.contains("smallest") {
                policy.smallest_frame = 1 << 10;
            }
            let name = kinds.0[refused.kind].name;
            let change = |function: &mut Function| {
                if function.name == name {
                    (refused.change)(function);
                }
            };
            match enter(&kinds, &chain, policy, change)?.0 {
                Err(error) if (refused.expected)(&error) => Ok(Code::E),
                other => Err(format!("{other:x?}")),
            }
        });
        tally.attack(refused.what, &end, &[Code::E]);
    }
    // A conservative frame whose pointers are declared moves.
    let chain = kinds.chain(&mut Dice::new("S27", 1), 100, Some(0));
    let end = run(|| {
        let conservative = |function: &mut Function| function.layout.conservative = true;
        match enter(&kinds, &chain, policies()[0].1, conservative)?.0 {
            Ok(Exit::Returned(sum)) if sum == right(&chain) => Ok(Code::C),
            other => Err(format!("{other:x?}")),
        }
    });
    tally.attack("conservative and declared", &end, &[Code::C]);
    tally.report()
}

/// S28: lies that only the frames themselves can tell.
pub fn lies(class: &Class) -> Report {
    type Lie = (&'static str, usize, fn(&mut Function), bool);
    const LIES: [Lie; 6] = [
        ("the CFA elsewhere", 0, |function| function.layout.cfa_bytes = 32, true),
        ("another size at a call", 2, |function| function.sites[1].frame_bytes = Some(80), true),
        ("arguments that it does not own", 0, |function| function.layout.incoming = 16, true),
        ("the other key", 0, |function| function.layout.signing = Signing::B, false),
        (
            "modifier zero",
            4,
            |function| (function.layout.binding, function.layout.dynamic) = (Binding::Zero, false),
            false,
        ),
        ("another number in the modifier", 0, |function| function.layout.binding = Binding::Blended(7), false),
    ];
    let mut tally = Tally::new(class);
    let kinds = Kinds::of(class);
    for (what, kind, change, geometry) in LIES {
        if !geometry && !class.pac() {
            continue;
        }
        let chain = kinds.chain(&mut Dice::new("S28", 0), 120, Some(kind));
        let end = run(|| {
            page().breakpoint.store(if what == "the other key" { 0xc471 } else { 0xc470 }, Relaxed);
            let name = kinds.0[kind].name;
            let lie = |function: &mut Function| {
                if function.name == name {
                    change(function);
                }
            };
            match enter(&kinds, &chain, policies()[0].1, lie)?.0 {
                Err(Error::Layout { .. } | Error::UnknownCode(_)) => Ok(Code::E),
                other => Err(format!("{other:x?}")),
            }
        });
        // What the layout leads to is not what was signed, or is no frame at all.
        let allowed =
            if geometry { vec![Code::K, Code::E, class.stub_failure()] } else { vec![class.stub_failure(), Code::K] };
        tally.attack(what, &end, &allowed);
    }
    tally.report()
}

/// S29: signed frame pointers, flipped before the walk and between the walk and the move.
pub fn signed_frame_pointers(class: &Class) -> Report {
    if !class.pac() {
        return Report::skip(&[Feature::Pac], "frame pointers are signed by arm64's data keys alone");
    }
    let mut tally = Tally::new(class);
    let kinds = Kinds::of(class);
    for (kind, function) in kinds.0.iter().enumerate() {
        if function.layout.frame_pointer == PointerSigning::None {
            continue;
        }
        let chain = kinds.chain(&mut Dice::new("S29", 0), 120, Some(kind));
        for step in [Step::Begin, Step::Planned, Step::Copied, Step::Rebased] {
            let end = run(|| flipped(&kinds, &chain, kind, step));
            tally.attack(&format!("{} at {step:?}", function.name), &end, &[class.stub_failure()]);
        }
    }
    tally.report()
}

fn flipped(kinds: &Kinds, chain: &Chain, kind: usize, step: Step) -> Verdict {
    let key = kinds.0[kind].layout.frame_pointer;
    page().breakpoint.store(if key == PointerSigning::A { 0xc472 } else { 0xc473 }, Relaxed);
    let site = kinds.0[kind].sites[1].pc.address() as u64;
    at_every_step(move |now, info| {
        if now == step {
            // The oldest return address into this kind of function: the callee's, which is of the kind too, above its frame pointer.
            let words = (info.youngest..info.top - 8).step_by(8);
            // SAFETY: the words lie in the segment that the hook was shown.
            let at = words.rev().find(|&at| unsafe { peek(at) } << 16 >> 16 == site && at % 16 == 8);
            let at = at.ok_or(Error::Injected)?;
            // SAFETY: as above.
            let word = unsafe { peek(at - 8) };
            corrupt(at - 8, word ^ 1 << 50);
        }
        Ok(())
    });
    let result = enter(kinds, chain, policies()[0].1, |_| {})?;
    stop();
    Err(format!("{result:x?}"))
}
