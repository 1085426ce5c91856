//! The attacker's hook into a migration, and a stack for it to attack.

use crate::child::{Verdict, leave_room_above_a_canary, page};
use crate::cpu;
use crate::managed::{self, Function};
use crate::memory::{peek, poke, share};
use crate::outcome::Code;
use cfi_stack::codemap::Registered;
use cfi_stack::engine::Activation;
use cfi_stack::steps::{Step, StepInfo, set_hook};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

type Attack = Box<dyn FnMut(Step, &mut StepInfo<'_>) -> Result<(), Error>>;

thread_local! {
    static ATTACK: RefCell<Option<Attack>> = const { RefCell::new(None) };
}

fn relay(step: Step, info: &mut StepInfo<'_>) -> Result<(), Error> {
    // Taken out while it runs: a hook may replace itself.
    let Some(mut attack) = ATTACK.take() else { return Ok(()) };
    let result = attack(step, info);
    ATTACK.with_borrow_mut(|place| {
        place.get_or_insert(attack);
    });
    result
}

/// Has `attack` called at every step of every migration on this thread.
pub fn at_every_step(attack: impl FnMut(Step, &mut StepInfo<'_>) -> Result<(), Error> + 'static) {
    ATTACK.set(Some(Box::new(attack)));
    set_hook(Some(relay));
}

/// Ends the attack.
pub fn stop() {
    set_hook(None);
    ATTACK.set(None);
}

/// Depth at which the hand-made recursions have grown a stack of 4 KiB several times.
pub const DEPTH: usize = 400;

/// Depth at which they have grown it exactly once.
pub const ONE_GROWTH: usize = 60;

/// The native function at the end of a recursion: returns 0.
pub extern "C" fn zero(_: usize, _: usize, _: usize) -> u64 {
    0
}

/// Address of [`zero`], as managed code wants it.
pub fn zero_address() -> usize {
    zero as extern "C" fn(usize, usize, usize) -> u64 as usize
}

/// A small policy: 4 KiB that may become 1 MiB.
pub fn policy() -> Policy {
    Policy { maximum: 1 << 20, ..Policy::default() }
}

/// A thread attached, a stack, managed code registered.
pub struct Scene {
    /// The stack.
    pub stack: Stack,
    /// What its code carries.
    pub activation: Box<Activation>,
    /// The thread.
    pub thread: Thread,
    /// Keeps the code map published.
    pub _code: Registered,
}

impl Scene {
    /// Sets it up.
    ///
    /// # Errors
    /// What the library refused.
    pub fn new(policy: Policy) -> Result<Scene, String> {
        Scene::with(managed::register(), policy)
    }

    /// Sets it up with this code.
    ///
    /// # Errors
    /// What the library refused.
    pub fn with(code: Registered, policy: Policy) -> Result<Scene, String> {
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        leave_room_above_a_canary(policy.guard, policy.initial);
        let stack = Stack::new(&thread, policy).map_err(|error| error.to_string())?;
        Ok(Scene { stack, activation: Box::default(), thread, _code: code })
    }

    /// Address of the activation: what managed code gets as its first argument.
    pub fn act(&self) -> usize {
        (&raw const *self.activation).expose_provenance()
    }

    /// Enters a hand-made function; the first argument is the activation.
    ///
    /// # Errors
    /// The library's.
    pub fn enter(&mut self, function: Function, a1: usize, a2: usize, a3: usize) -> Result<Exit, Error> {
        let act = self.act();
        // SAFETY: the hand-made functions follow the engine's rules, or break them where a case means to; the thread is ours.
        unsafe { self.stack.enter(&self.thread, &self.activation, function.start, [act, a1, a2, a3]) }
    }

    /// Recurses `depth` deep and back.
    ///
    /// # Errors
    /// The library's.
    pub fn recurse(&mut self, function: Function, depth: usize) -> Result<Exit, Error> {
        self.enter(function, depth, zero_address(), 0)
    }

    /// Recurses and compares the result.
    ///
    /// # Errors
    /// What was wrong.
    pub fn recurse_right(&mut self, function: Function, depth: usize) -> Result<(), String> {
        let got = self.recurse(function, depth);
        if got == Ok(Exit::Returned(managed::recursion_sum(depth as u64))) {
            Ok(())
        } else {
            Err(format!("a recursion {depth} deep gave {got:x?}"))
        }
    }
}

/// Recurses `depth` deep with `attack` made at the first migration that comes to `step`: C when the result is right all the same.
/// The `brk` expected is that of the function's key, unless the attack names another; a span that it freezes must stay as it is
/// until the migration gives it back.
///
/// # Errors
/// What else came of it; also when the attack was never made.
pub fn under_attack(
    function: Function,
    depth: usize,
    step: Step,
    attack: impl FnOnce(&mut StepInfo<'_>) + 'static,
) -> Verdict {
    let mut attack = Some(attack);
    under_attack_on(policy(), function, depth, move |now, info| {
        let is_now = now == step && attack.is_some();
        if is_now && let Some(attack) = attack.take() {
            attack(info);
        }
        is_now
    })
}

/// The same on a stack of this policy; `attack` is called at every step of every migration and says whether it did anything.
///
/// # Errors
/// As for [`under_attack`].
pub fn under_attack_on(
    policy: Policy,
    function: Function,
    depth: usize,
    mut attack: impl FnMut(Step, &mut StepInfo<'_>) -> bool + 'static,
) -> Verdict {
    let mut scene = Scene::new(policy)?;
    let made = Rc::new(Cell::new(false));
    let note = made.clone();
    page().breakpoint.store(cpu::breakpoint_of(function.signing), Relaxed);
    at_every_step(move |now, info| {
        if now == Step::Rebound {
            // The next step gives the source away.
            page().thaw_span();
        }
        note.set(attack(now, info) || note.get());
        Ok(())
    });
    let right = scene.recurse_right(function, depth);
    stop();
    right?;
    if made.get() { Ok(Code::C) } else { Err("the attack was never made".into()) }
}

/// A frame of a span, as an attacker finds it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Its record.
    pub record: usize,
    /// Its return address as it stands there.
    pub word: u64,
}

impl Found {
    /// Where the return address stands.
    pub fn slot(&self) -> usize {
        self.record + 8
    }

    /// Its CFA, which is the modifier of its signature.
    pub fn modifier(&self) -> u64 {
        self.record as u64 + 16
    }
}

/// The frames of the span that the hook is shown, youngest first.
pub fn frames(info: &StepInfo<'_>) -> Vec<Found> {
    let records = crate::memory::records(info.youngest, info.top);
    // SAFETY: the records lie in the segment that the hook was shown.
    records.into_iter().map(|record| Found { record, word: unsafe { peek(record + 8) } }).collect()
}

/// The destination of a migration, kept readable when the library unmaps it.
#[derive(Clone, Copy)]
pub struct Kept {
    base: usize,
    top: usize,
    view: usize,
}

impl Kept {
    /// Puts shared memory with the same contents in its place. The library sees no difference.
    pub fn destination(info: &StepInfo<'_>) -> Kept {
        // SAFETY: the step hook says that five words lie there.
        let [base, top] = [0, 8].map(|offset| unsafe { peek(info.destination_record + offset) } as usize);
        Kept { base, top, view: share(base, top - base) }
    }

    /// Where a word of the destination can be read for good; nothing when it does not lie in it.
    pub fn view(&self, place: usize) -> Option<usize> {
        (self.base..=self.top - 8).contains(&place).then(|| place - self.base + self.view)
    }
}

/// Writes a word of the stack that the hook was shown.
pub fn corrupt(address: usize, word: u64) {
    // SAFETY: the address comes from `frames` or a record of the step; that is the attack.
    unsafe { poke(address, word) }
}

/// Random numbers that can be had again: splitmix64.
pub struct Dice(u64);

impl Dice {
    /// Dice for one try of one case.
    pub fn new(case: &str, attempt: u64) -> Dice {
        Dice(
            case.bytes()
                .fold(attempt, |seed, byte| seed.rotate_left(8) ^ u64::from(byte))
                .wrapping_mul(0x2545_f491_4f6c_dd1d),
        )
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }
}
