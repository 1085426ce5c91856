//! Suspended stacks for the context cases to attack.
//!
//! A visitor is a stack that suspends three times, at depths of the case's choice, and passes 1, 2 and 3; it is resumed with 0, 10, 20 and 30
//! and returns 1060. Its calls of the stubs are written by hand, so that nothing but the attack decides what a register holds.

use super::context_looking::{Two, resume_looking, resumed, suspend_here, suspend_there};
use crate::child::{Verdict, page};
use crate::class::{Class, Column};
use crate::cpu::BRK_SEAL;
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use cfi_stack::pool::{self, Lease};
use cfi_stack::probe::{self, Passed, Slot, Word, frame};
use cfi_stack::thread::Thread;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

/// How a visitor behaves.
#[derive(Clone, Copy, Debug)]
pub struct Visits {
    /// How many calls down it suspends, each time.
    pub depths: [u8; 3],
    /// Whether the second time is from another place in the code.
    pub elsewhere: bool,
}

/// The same place each time.
pub const SAME: Visits = Visits { depths: [2, 2, 2], elsewhere: false };

impl Visits {
    /// Two depths.
    pub fn at(first: u8, then: u8) -> Visits {
        Visits { depths: [first, then, then], elsewhere: false }
    }

    fn pack(self) -> usize {
        usize::from_ne_bytes([self.depths[0], self.depths[1], self.depths[2], self.elsewhere.into(), 0, 0, 0, 0])
    }

    fn unpack(word: usize) -> Visits {
        let [first, second, third, elsewhere, ..] = word.to_ne_bytes();
        Visits { depths: [first, second, third], elsewhere: elsewhere != 0 }
    }
}

type Hook = Box<dyn FnOnce()>;

thread_local! {
    static HOOKS: RefCell<VecDeque<Hook>> = const { RefCell::new(VecDeque::new()) };
}

/// Has `hook` run on the next stack that is about to suspend, before it does. Several wait for their turns.
pub fn before_the_next_suspension(hook: impl FnOnce() + 'static) {
    HOOKS.with_borrow_mut(|hooks| hooks.push_back(Box::new(hook)));
}

/// The entry of a visitor; `data` is a packed [`Visits`].
pub unsafe extern "C" fn visitor(first: usize, data: usize, slot: *mut Slot) -> usize {
    let visits = Visits::unpack(data);
    let slot = NonNull::new(slot).unwrap_or(NonNull::dangling());
    let mut sum = 1000 + first;
    // The compiler knows neither count nor index: each time the calls are the same.
    for index in 0..std::hint::black_box(3) {
        let index = std::hint::black_box(index);
        if let Some(hook) = HOOKS.with_borrow_mut(VecDeque::pop_front) {
            hook();
        }
        sum += down(slot, index + 1, visits.depths[index], visits.elsewhere && index == 1);
    }
    sum
}

#[inline(never)]
fn down(slot: NonNull<Slot>, value: usize, depth: u8, elsewhere: bool) -> usize {
    if depth > 0 {
        return std::hint::black_box(down(slot, value, depth - 1, elsewhere));
    }
    let suspend = std::hint::black_box(if elsewhere { suspend_there } else { suspend_here });
    // SAFETY: runs on the slot's stack.
    unsafe { suspend(slot, slot, value) }.value
}

/// One of a slot's two contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its own.
    Own,
    /// That of who waits for it.
    Resumer,
}

impl Side {
    /// Its words: sp, seal, token, generation.
    pub fn words(self) -> [Word; 4] {
        match self {
            Side::Own => [Word::OwnSp, Word::OwnSeal, Word::OwnToken, Word::OwnGeneration],
            Side::Resumer => [Word::ResumerSp, Word::ResumerSeal, Word::ResumerToken, Word::ResumerGeneration],
        }
    }
}

/// Index of a context's stack pointer.
pub const SP: usize = 0;
/// Of its token's address.
pub const TOKEN: usize = 2;
/// Of its generation.
pub const GENERATION: usize = 3;

/// Where a saved frame has the generation that x86 compares.
pub const FRAME_GENERATION: usize = 8;

/// A slot, as the attacker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target(pub NonNull<Slot>);

impl Target {
    /// Its address.
    pub fn address(self) -> usize {
        self.0.as_ptr().expose_provenance()
    }

    /// What a word of it says.
    pub fn read(self, word: Word) -> u64 {
        probe::read(self.0, word)
    }

    /// Writes a word of it.
    pub fn write(self, word: Word, value: u64) {
        // SAFETY: that is the attack.
        unsafe { probe::write(self.0, word, value) }
    }

    /// A context of it.
    pub fn context(self, side: Side) -> [u64; 4] {
        side.words().map(|word| self.read(word))
    }

    /// Writes a context of it.
    pub fn put_context(self, side: Side, context: [u64; 4]) {
        for (word, value) in side.words().into_iter().zip(context) {
            self.write(word, value);
        }
    }

    /// Address of a word of a context's saved frame.
    pub fn frame(self, side: Side, offset: usize) -> usize {
        self.read(side.words()[SP]) as usize + offset
    }

    /// The stack from its own context's saved frame to its top.
    pub fn stack(self) -> Memory {
        Memory::of(self.frame(Side::Own, 0), self.read(Word::Top) as usize)
    }
}

/// A copy of some memory, and where it was.
#[derive(Clone, Debug)]
pub struct Memory {
    start: usize,
    words: Vec<u64>,
}

impl Memory {
    /// A copy.
    pub fn of(start: usize, end: usize) -> Memory {
        // SAFETY: the callers name a stack's or a slot's memory.
        Memory { start, words: (start..end).step_by(8).map(|address| unsafe { peek(address) }).collect() }
    }

    /// A copy of a saved frame.
    pub fn of_frame(start: usize) -> Memory {
        Memory::of(start, start + frame::SIZE)
    }

    /// Writes it somewhere.
    pub fn put_at(&self, start: usize) {
        for (index, &word) in self.words.iter().enumerate() {
            // SAFETY: that is the attack.
            unsafe { poke(start + index * 8, word) };
        }
    }

    /// Writes it where it was.
    pub fn put_back(&self) {
        self.put_at(self.start);
    }
}

/// Changes a word somewhere.
pub fn change(address: usize, by: impl FnOnce(u64) -> u64) {
    // SAFETY: the callers name a saved frame's words; that is the attack.
    unsafe { poke(address, by(peek(address))) }
}

/// A thread that is attached, and stacks.
pub struct Scene {
    thread: Thread,
    leases: Vec<Lease>,
}

impl Scene {
    /// Sets it up; `brk #0xc474` is the breakpoint expected.
    ///
    /// # Errors
    /// What the library refused.
    pub fn new() -> Result<Scene, String> {
        page().breakpoint.store(BRK_SEAL, Relaxed);
        Ok(Scene { thread: Thread::attach().map_err(|error| error.to_string())?, leases: Vec::new() })
    }

    /// A stack on which nothing is prepared.
    ///
    /// # Errors
    /// What the library refused.
    pub fn lease(&mut self) -> Result<Target, String> {
        let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
        let target = Target(lease.slot());
        if (target.read(Word::ShadowTop) != 0) != self.thread.domain().shadow {
            return Err("the stack's shadow mode is not the thread's".into());
        }
        self.leases.push(lease);
        Ok(target)
    }

    /// The thread.
    pub fn thread(&self) -> &Thread {
        &self.thread
    }

    /// Gives the stack back that was leased last; it must be empty.
    pub fn give_back(&mut self) {
        self.leases.pop();
    }

    /// A visitor that is ready.
    ///
    /// # Errors
    /// What the library refused.
    pub fn ready(&mut self, visits: Visits) -> Result<Target, String> {
        let target = self.lease()?;
        prepare(target, visits);
        Ok(target)
    }

    /// A visitor that has suspended once.
    ///
    /// # Errors
    /// What the library refused.
    pub fn suspended(&mut self, visits: Visits) -> Result<Target, String> {
        let target = self.ready(visits)?;
        resume(target, 0).is(1, false)?;
        Ok(target)
    }
}

impl Drop for Scene {
    /// What is left may be suspended: it is the child's end that frees it.
    fn drop(&mut self) {
        self.leases.drain(..).for_each(std::mem::forget);
    }
}

/// Bytes of a scene's stack.
pub const SIZE: usize = 32 << 10;

/// Makes a visitor of a stack with nothing on it.
pub fn prepare(target: Target, visits: Visits) {
    // SAFETY: leased, and nothing is on it.
    unsafe { probe::forced::prepare(target.0, visitor, visits.pack()) }
}

/// Resumes whatever is there.
#[inline(never)]
pub fn resume(target: Target, arg: usize) -> Got {
    // SAFETY: that is what the cases force.
    let Two { value, kind } = unsafe { resume_looking(target.0, target.0, arg) };
    resumed();
    Got(Passed { value, finished: kind != 0 })
}

/// What a resume brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Got(pub Passed);

impl Got {
    /// It must be this.
    ///
    /// # Errors
    /// What it was instead.
    pub fn is(self, value: usize, finished: bool) -> Result<(), String> {
        if self.0 == (Passed { value, finished }) {
            Ok(())
        } else {
            Err(format!("{:?} instead of {value} {finished}", self.0))
        }
    }
}

/// Resumes a visitor that has suspended once until it ends.
///
/// # Errors
/// What was not right.
pub fn to_the_end(target: Target) -> Verdict {
    resume(target, 10).is(2, false)?;
    resume(target, 20).is(3, false)?;
    resume(target, 30).is(1060, true)?;
    Ok(Code::C)
}

/// A visitor is attacked while it is suspended for the first time, and resumed until it ends.
///
/// # Errors
/// What was not right.
pub fn attacked_suspended(attack: impl FnOnce(Target)) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.suspended(SAME)?;
    attack(target);
    to_the_end(target)
}

/// A visitor's resumer is attacked while the visitor runs for the first time; then the visitor is resumed until it ends.
///
/// # Errors
/// What was not right.
pub fn attacked_resumer(attack: impl FnOnce(Target) + 'static) -> Verdict {
    let mut scene = Scene::new()?;
    let target = scene.ready(SAME)?;
    before_the_next_suspension(move || attack(target));
    resume(target, 0).is(1, false)?;
    to_the_end(target)
}

/// The code for P where contexts are sealed (a seal is compared, so FPAC has no part in it), else x86's.
pub fn sealed_or(class: &Class, cet: Code) -> Code {
    match class.column() {
        Column::Pac | Column::PacGcs => Code::B,
        Column::Cet | Column::Bare => cet,
    }
}

/// The report where nothing looks at a context.
pub fn nothing_looks(class: &Class) -> Option<Report> {
    (class.column() == Column::Bare).then(|| {
        Report::skip(Class::protecting(), "without PAC and without a shadow stack contexts are believed as they are")
    })
}
