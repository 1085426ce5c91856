//! A world that the hand-made functions of `asm/spans-*.S` ask what to do, and a model of it with one endless stack: the words that the
//! frames hold, each compared at every step.

mod programs;

use crate::managed::{self, Function};
use cfi_stack::codemap::{Registered, Registration};
use cfi_stack::engine::{self, Activation, LinkCall};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Exit, Policy, Stack};
use std::sync::Once;

pub use programs::{choose, random, random_links, word};

/// What a frame does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Returns what it holds.
    Return,
    /// Calls a small frame with this.
    Small(u64),
    /// Calls a large one.
    Large(u64),
    /// Calls a small one through `link`.
    Link(u64),
    /// Suspends the stack with this.
    Suspend(u64),
    /// Asks for so many bytes.
    Grow(u64),
    /// Leaves with this.
    Leave(u64),
    /// Native code enters the stack again, with this.
    Enter(u64),
    /// Native code makes room for so many bytes.
    Reserve(usize),
    /// Native code compacts the stack.
    Compact,
}

/// Who decides: called with the world, which is not in use meanwhile.
pub type Choose<'a> = Box<dyn FnMut(&mut World<'_>) -> Op + 'a>;

/// What managed code and its native callee share. Its first word is read by managed code.
#[repr(C)]
pub struct World<'a> {
    act: usize,
    /// What each frame of the endless stack holds, oldest first.
    pub frames: Vec<u64>,
    /// Where each entry's frames begin.
    pub bases: Vec<usize>,
    /// What the frame that waits asked for.
    pub last: Op,
    choose: Option<Choose<'a>>,
    /// What the innermost entry will give, once it has been told to end.
    expected: Option<Result<Exit, Error>>,
    /// What the latest nested entry gave.
    pub nested: Option<Result<Exit, Error>>,
    /// Whether growth may fail.
    pub may_fail: bool,
    wrong: Option<String>,
}

fn mix(held: u64, result: u64) -> u64 {
    held.wrapping_mul(31).wrapping_add(result)
}

impl<'a> World<'a> {
    /// A world in which `choose` decides.
    pub fn new(choose: impl FnMut(&mut World<'_>) -> Op + 'a) -> Box<World<'a>> {
        Box::new(World {
            act: 0,
            frames: Vec::new(),
            bases: Vec::new(),
            last: Op::Return,
            choose: Some(Box::new(choose)),
            expected: None,
            nested: None,
            may_fail: false,
            wrong: None,
        })
    }

    /// Entries within each other.
    pub fn depth(&self) -> usize {
        self.bases.len()
    }

    /// What the stack runs with.
    pub fn activation(&self) -> &Activation {
        // SAFETY: `act` is the address of the activation that the stack runs with, which the caller of `run` holds.
        unsafe { &*std::ptr::with_exposed_provenance(self.act) }
    }

    /// Remembers the first problem.
    pub fn note(&mut self, problem: String) {
        self.wrong.get_or_insert(problem);
    }

    /// What was wrong so far.
    pub fn verdict(&mut self) -> Result<(), String> {
        self.wrong.take().map_or(Ok(()), Err)
    }

    fn begin(&mut self, held: u64) {
        self.bases.push(self.frames.len());
        self.frames.push(held);
    }

    /// An entry has ended: compares with what it was to give.
    fn end(&mut self, got: &Result<Exit, Error>) {
        let base = self.bases.pop().unwrap_or(0);
        self.frames.truncate(base);
        let expected = self.expected.take();
        let right = match (&expected, got) {
            (Some(expected), got) => expected == got,
            // What no frame asked for: growth that could not be.
            (None, Err(Error::Overflow { .. } | Error::ShadowRoom { .. } | Error::Memory { .. })) => self.may_fail,
            (None, _) => false,
        };
        if !right {
            self.note(format!("an entry gave {got:x?} instead of {expected:x?}"));
        }
    }

    /// Notes what managed code is about to do, as its word for it.
    fn tell(&mut self, op: Op) -> u64 {
        self.last = op;
        let nested = self.depth() > 1;
        let (code, operand) = match op {
            Op::Return => {
                let held = self.frames.pop().unwrap_or(0);
                if self.frames.len() == self.bases.last().copied().unwrap_or(0) {
                    self.expected = Some(Ok(Exit::Returned(held)));
                } else if let Some(caller) = self.frames.last_mut() {
                    *caller = mix(*caller, held);
                }
                (0, 0)
            }
            Op::Small(held) => {
                self.frames.push(held);
                (1, held)
            }
            Op::Large(held) => {
                self.frames.push(held);
                (2, held)
            }
            Op::Link(held) => {
                self.frames.push(held);
                (7, held)
            }
            Op::Suspend(value) => {
                self.expected = Some(if nested { Err(Error::Nested) } else { Ok(Exit::Suspended(value)) });
                (3, value)
            }
            Op::Grow(bytes) => (4, bytes),
            Op::Leave(code) => {
                self.expected = Some(Ok(Exit::Left(code)));
                (5, code)
            }
            Op::Enter(_) | Op::Reserve(_) | Op::Compact => (6, 0),
        };
        operand << 3 | code
    }
}

/// Asked by managed code, on the native stack: checks what the frame holds and says what is next.
extern "C" fn next(world: usize, _frame: usize, held: usize) -> u64 {
    let world = std::ptr::with_exposed_provenance_mut::<World<'_>>(world);
    loop {
        // SAFETY: `run` lends the world until the entry has ended; managed code reads its first word alone. Entries
        // within each other use it one at a time.
        let now = unsafe { &mut *world };
        if now.frames.last() != Some(&(held as u64)) {
            let frames = now.frames.len();
            now.note(format!(
                "frame {frames} holds {held:#x} instead of {:x?} after {:?}",
                now.frames.last(),
                now.last
            ));
            return now.tell(Op::Leave(99));
        }
        if now.wrong.is_some() {
            return now.tell(Op::Leave(98));
        }
        let Some(mut choose) = now.choose.take() else { return now.tell(Op::Return) };
        let op = choose(now);
        now.choose = Some(choose);
        now.last = op;
        match op {
            Op::Enter(value) => {
                now.begin(value);
                let (function, args) = (small(), [now.act, next_address(), world.expose_provenance(), value as usize]);
                let activation = std::ptr::from_ref(now.activation());
                // SAFETY: managed code called this through `exit` with that activation; the functions follow the rules.
                let got = unsafe { engine::enter_again(&*activation, function.start, args) };
                // SAFETY: as above.
                let now = unsafe { &mut *world };
                now.end(&got);
                now.nested = Some(got);
            }
            Op::Reserve(bytes) => {
                // SAFETY: as above; nothing here points into the stack.
                let got = unsafe { engine::reserve(now.activation(), bytes) };
                let short = now.may_fail && matches!(got, Err(Error::ShadowRoom { .. }));
                if !short && !matches!(got, Ok(()) | Err(Error::Overflow { .. })) {
                    now.note(format!("reserve {bytes}: {got:x?}"));
                }
            }
            Op::Compact => {
                // SAFETY: as above.
                let got = unsafe { engine::compact(now.activation()) };
                if let Err(error) = got {
                    now.note(format!("compact: {error}"));
                }
            }
            op => return now.tell(op),
        }
    }
}

fn next_address() -> usize {
    next as extern "C" fn(usize, usize, usize) -> u64 as usize
}

/// A stack with a world on it.
pub struct Run<'a> {
    /// The stack.
    pub stack: Stack,
    /// The thread that made it.
    pub thread: Thread,
    /// The world.
    pub world: Box<World<'a>>,
    activations: [Box<Activation>; 2],
    _code: Option<Registered>,
}

impl<'a> Run<'a> {
    /// A stack, its code registered.
    pub fn new(policy: Policy, world: Box<World<'a>>) -> Result<Run<'a>, String> {
        let code = register();
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        let stack = Stack::new(&thread, policy).map_err(|error| error.to_string())?;
        Ok(Run { stack, thread, world, activations: Default::default(), _code: Some(code) })
    }

    /// The same on a stack of the caller's, who has registered the code.
    pub fn on(stack: Stack, world: Box<World<'a>>) -> Result<Run<'a>, String> {
        let thread = Thread::attach().map_err(|error| error.to_string())?;
        Ok(Run { stack, thread, world, activations: Default::default(), _code: None })
    }

    /// Drops the stack, whatever waits on it, and makes another.
    pub fn renew(&mut self, policy: Policy) -> Result<(), String> {
        self.stack = Stack::new(&self.thread, policy).map_err(|error| error.to_string())?;
        self.forget();
        Ok(())
    }

    /// Enters with a frame that holds `held`.
    pub fn enter(&mut self, held: u64) -> Result<Exit, Error> {
        self.world.begin(held);
        let activation = &*self.activations[0];
        self.world.act = std::ptr::from_ref(activation).expose_provenance();
        let place = (&raw mut *self.world).expose_provenance();
        let args = [self.world.act, next_address(), place, held as usize];
        // SAFETY: the hand-made functions follow the engine's rules; the thread is ours.
        let got = unsafe { self.stack.enter(&self.thread, activation, small().start, args) };
        self.came_back(got)
    }

    fn came_back(&mut self, got: Result<Exit, Error>) -> Result<Exit, Error> {
        if let Ok(Exit::Suspended(_)) = got {
            let expected = self.world.expected.take();
            if expected.as_ref() != Some(&got) {
                self.world.note(format!("suspended as {got:x?} instead of {expected:x?}"));
            }
        } else {
            self.world.end(&got);
        }
        got
    }

    /// Resumes, here or on another thread, with the other activation.
    pub fn resume(&mut self, value: u64, elsewhere: bool) -> Result<Exit, Error> {
        self.resume_by(value, |stack, thread, act| {
            // SAFETY: the activation outlives the call, and nobody else uses it meanwhile; the functions keep nothing of a thread's.
            let go_on = |stack: &mut Stack, thread: &Thread| unsafe {
                stack.resume(thread, &*std::ptr::with_exposed_provenance(act), value)
            };
            if !elsewhere {
                return go_on(stack, thread);
            }
            std::thread::scope(|scope| {
                let there = scope.spawn(move || go_on(stack, &Thread::attach()?));
                there.join().unwrap_or(Err(Error::Thread("it panicked")))
            })
        })
    }

    /// Resumes in `by`'s way, which is given the address of the other activation.
    pub fn resume_by(
        &mut self,
        value: u64,
        by: impl FnOnce(&mut Stack, &Thread, usize) -> Result<Exit, Error>,
    ) -> Result<Exit, Error> {
        if let Some(held) = self.world.frames.last_mut() {
            *held = mix(*held, value);
        }
        self.activations.swap(0, 1);
        self.world.act = std::ptr::from_ref(&*self.activations[0]).expose_provenance();
        let got = by(&mut self.stack, &self.thread, self.world.act);
        self.came_back(got)
    }

    /// The frames of a suspended stack are gone.
    pub fn forget(&mut self) {
        self.world.frames.clear();
        self.world.bases.clear();
    }
}

const ARM: bool = cfg!(target_arch = "aarch64");

macro_rules! function {
    ($name:ident, $end:ident, $bytes:expr, $signing:expr, [$($site:ident),*]) => {{
        unsafe extern "C" {
            fn $name();
            fn $end();
            $(fn $site();)*
        }
        let at = |place: *const ()| RawPc::new(place as usize);
        let function = Function {
            start: at($name as *const ()),
            end: at($end as *const ()),
            frame_bytes: $bytes,
            signing: if ARM { $signing } else { Signing::None },
        };
        (function, [$(at($site as *const ())),*])
    }};
}

fn small_and_sites() -> (Function, [RawPc; 6]) {
    function!(
        spans_small,
        spans_small_end,
        96,
        Signing::A,
        [
            spans_small_site_exit,
            spans_small_site_small,
            spans_small_site_large,
            spans_small_site_suspend,
            spans_small_site_grow,
            spans_small_site_link
        ]
    )
}

fn large_and_sites() -> (Function, [RawPc; 6]) {
    function!(
        spans_large,
        spans_large_end,
        880,
        Signing::B,
        [
            spans_large_site_exit,
            spans_large_site_small,
            spans_large_site_large,
            spans_large_site_suspend,
            spans_large_site_grow,
            spans_large_site_link
        ]
    )
}

/// The function with the small frame.
pub fn small() -> Function {
    small_and_sites().0
}

/// The function with the large frame.
pub fn large() -> Function {
    large_and_sites().0
}

/// What they go through to the next segment.
fn thunk() -> Function {
    let (thunk, []): (Function, [RawPc; 0]) = function!(spans_link, spans_link_end, 0, Signing::A, []);
    thunk
}

/// Registers them.
pub fn register() -> Registered {
    /// Bytes that a call through `link` asks for: the small function's frame.
    const NEED: u32 = 256;
    unsafe extern "C" {
        static mut spans_stubs: [usize; 6];
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let stubs = engine::stubs();
        let call = LinkCall::new(small().start, 0, 0, NEED).expect("a possible call");
        // Never freed: what a thunk goes by stays.
        let call = std::ptr::from_ref::<LinkCall>(Box::leak(Box::new(call))).expose_provenance();
        let [grow, exit, leave, suspend, link] =
            [stubs.grow, stubs.exit, stubs.leave, stubs.suspend, stubs.link].map(RawPc::address);
        // SAFETY: written once, before any of the functions runs.
        unsafe { spans_stubs = [grow, exit, leave, suspend, link, call] };
    });
    let mut map = Registration::new();
    managed::describe(&mut map, thunk());
    for (function, sites) in [small_and_sites(), large_and_sites()] {
        managed::describe(&mut map, function);
        for site in sites {
            map.safepoint(site, &[-40]).expect("the slot lies in the frame");
        }
    }
    map.publish().expect("nothing is registered yet")
}
