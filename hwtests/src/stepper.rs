//! Single-stepping: a signal handler runs before every instruction of the code that a case chooses.
//!
//! On x86-64 the process steps itself: the trap flag in the flags that the kernel restores makes the CPU trap after each
//! instruction. On arm64 user code cannot do that, so a tracer steps it and has a signal delivered at every boundary.
//! Either way the visitor runs in a handler on an alternate stack of the stepped thread, at the boundary before the
//! instruction that `pc` names, and may look at memory or change it.

#[cfg(target_arch = "aarch64")]
#[path = "stepper/tracer.rs"]
mod mechanism;
#[cfg(target_arch = "x86_64")]
#[path = "stepper/trap.rs"]
mod mechanism;

use crate::child::{End, Verdict};
use std::cell::Cell;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

pub use mechanism::unavailable;

/// Pieces of code that one run can watch.
const PIECES: usize = 16;
/// Boundaries of a run that are remembered.
const TRAIL: usize = 1024;
/// Longest piece of code whose instructions are told apart, in bytes.
const LONGEST: usize = 8192;
/// Size of the stack that visitors run on: unwinders are at home there.
const VISITORS: usize = 256 << 10;

unsafe extern "C" {
    fn _Unwind_FindEnclosingFunction(pc: *const c_void) -> *const c_void;
}

/// Start of the function whose instruction lies at an address, by the unwind tables; or 0.
pub fn function_at(pc: usize) -> usize {
    // SAFETY: looks an address up in the unwind tables: that of the call before a return address.
    unsafe { _Unwind_FindEnclosingFunction(std::ptr::without_provenance(pc + 1)) }.addr()
}

/// A function to be stepped through.
#[derive(Clone, Debug)]
pub struct Code {
    /// What it is called.
    pub name: &'static str,
    /// Where it lies, by the unwind tables.
    pub place: Range<usize>,
}

impl Code {
    /// The function that starts at `start`.
    pub fn new(name: &'static str, start: usize) -> Code {
        let end = (start..start + LONGEST).find(|&pc| function_at(pc) != start).unwrap_or(start + LONGEST);
        assert!(end > start, "the unwind tables do not know {name}");
        Code { name, place: start..end }
    }
}

impl Code {
    /// An address in it, in words.
    pub fn at(&self, pc: usize) -> String {
        format!("{} + {:#x}", self.name, pc.wrapping_sub(self.place.start))
    }
}

/// What the stepped process, its tracer and the parent share. Zero is its initial state.
#[repr(C)]
struct Shared {
    armed: AtomicU32,
    /// Boundaries since it was armed, and the first of them at which the visitor is called.
    number: AtomicU64,
    first: AtomicU64,
    places: [[AtomicU64; 2]; PIECES],
    steps: [AtomicU64; PIECES],
    /// Boundaries at which no visitor could run, because signals were held back.
    held: [AtomicU64; PIECES],
    /// Where the boundaries of the latest run were that had all of them visited.
    trail: [AtomicU64; TRAIL],
    seen: [[AtomicU64; LONGEST / 64]; PIECES],
}

impl Shared {
    /// Counts a boundary that the visitor does not want to see, if it is one.
    #[cfg(target_arch = "aarch64")]
    fn passes_over(&self, index: usize, pc: usize) -> bool {
        let passes = self.number.load(SeqCst) < self.first.load(SeqCst);
        if passes {
            self.count(index, pc);
        }
        passes
    }

    /// Where the first boundary lies that the visitor wants to see, and how often the run comes there before, by a run like this one.
    #[cfg(target_arch = "aarch64")]
    fn ahead(&self) -> Option<(usize, usize)> {
        let first = self.first.load(SeqCst) as usize;
        let pc = self.trail.get(first).filter(|_| first != 0)?.load(SeqCst);
        let before = self.trail[..first].iter().filter(|place| place.load(SeqCst) == pc).count();
        (pc != 0).then_some((pc as usize, before))
    }

    fn find(&self, pc: usize) -> Option<usize> {
        self.places.iter().position(|place| (place[0].load(SeqCst)..place[1].load(SeqCst)).contains(&(pc as u64)))
    }

    /// Counts a boundary; says its number when the visitor wants to see it.
    fn count(&self, index: usize, pc: usize) -> Option<u64> {
        self.steps[index].fetch_add(1, SeqCst);
        let offset = pc - self.places[index][0].load(SeqCst) as usize;
        self.seen[index][offset / 64].fetch_or(1 << (offset % 64), SeqCst);
        let number = self.number.fetch_add(1, SeqCst);
        if let Some(place) = self.trail.get(number as usize).filter(|_| self.first.load(SeqCst) == 0) {
            place.store(pc as u64, SeqCst);
        }
        (number >= self.first.load(SeqCst)).then_some(number)
    }
}

fn shared() -> &'static Shared {
    static PLACE: OnceLock<usize> = OnceLock::new();
    let place = PLACE.get_or_init(|| {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(mapping != libc::MAP_FAILED, "no memory to step with: {}", std::io::Error::last_os_error());
        mapping.expose_provenance()
    });
    // SAFETY: mapped for the life of the process and its children, zeroed, all fields atomic.
    unsafe { &*std::ptr::with_exposed_provenance(*place) }
}

/// How far a run stepped through one piece of code.
#[derive(Clone, Debug)]
pub struct Stepped {
    /// What the code is called.
    pub name: &'static str,
    /// Boundaries visited.
    pub steps: u64,
    /// Boundaries at which signals were held back, so that no visitor could run.
    pub held: u64,
    /// Offsets of the instructions before which the visitor ran, in order.
    pub instructions: Vec<usize>,
}

impl Stepped {
    /// Adds another run's.
    pub fn add(&mut self, other: &Stepped) {
        self.steps += other.steps;
        self.held += other.held;
        self.instructions.extend(&other.instructions);
        self.instructions.sort_unstable();
        self.instructions.dedup();
    }
}

/// Runs `body` in a child. Within it, [`through`] steps through `codes`.
pub fn run(codes: &[Code], body: impl FnOnce() -> Verdict) -> (End, Vec<Stepped>) {
    assert!(codes.len() <= PIECES);
    let shared = shared();
    shared.armed.store(0, SeqCst);
    for index in 0..PIECES {
        let place = codes.get(index).map_or(0..0, |code| code.place.clone());
        shared.places[index][0].store(place.start as u64, SeqCst);
        shared.places[index][1].store(place.end as u64, SeqCst);
        shared.steps[index].store(0, SeqCst);
        shared.held[index].store(0, SeqCst);
        shared.seen[index].iter().for_each(|word| word.store(0, SeqCst));
    }
    let end = mechanism::run(body);
    let stepped = codes.iter().enumerate().map(|(index, code)| Stepped {
        name: code.name,
        steps: shared.steps[index].load(SeqCst),
        held: shared.held[index].load(SeqCst),
        instructions: (0..LONGEST)
            .filter(|offset| shared.seen[index][offset / 64].load(SeqCst) >> (offset % 64) & 1 == 1)
            .collect(),
    });
    (end, stepped.collect())
}

/// A boundary, and the registers there.
pub struct Boundary {
    /// Which of the codes this is.
    pub index: usize,
    /// How many there were before it.
    pub number: u64,
    /// The instruction that comes next.
    pub pc: usize,
    /// The frame pointer.
    pub fp: usize,
    /// The first three argument registers.
    pub arguments: [usize; 3],
    /// r13, x21: where the oldest frame of a pooled stack has the slot's address.
    pub slot: usize,
}

/// What runs at a boundary, in a signal handler that has interrupted none of Rust's code.
pub type Visitor = fn(&Boundary);

thread_local! {
    static VISITOR: Cell<Option<Visitor>> = const { Cell::new(None) };
}

fn visit(shared: &Shared, context: &libc::ucontext_t) {
    let mut boundary = mechanism::boundary(context);
    if let Some(index) = shared.find(boundary.pc)
        && let Some(number) = shared.count(index, boundary.pc)
    {
        (boundary.index, boundary.number) = (index, number);
        if let Some(visitor) = VISITOR.get() {
            visitor(&boundary);
        }
    }
}

/// Runs `what`, with `visitor` called before every instruction of the codes that [`run`] was given. In [`run`]'s body only.
pub fn through<T>(visitor: Visitor, what: impl FnOnce() -> T) -> T {
    begin(visitor, 0);
    let result = what();
    enough();
    result
}

/// Steps from here on, and calls `visitor` at every boundary but the `first` ones. In [`run`]'s body only. Where a run like this one has been stepped through
/// before, from its first boundary on, a tracer need not step to get to a later one.
pub fn begin(visitor: Visitor, first: u64) {
    own_stack_for_visitors();
    VISITOR.set(Some(visitor));
    let shared = shared();
    shared.number.store(0, SeqCst);
    shared.first.store(first, SeqCst);
    mechanism::arm();
}

/// No more steps. For visitors, too.
pub fn enough() {
    shared().armed.store(0, SeqCst);
}

/// Tells the visitor where a case's own handler is about to return to. A CPU that traps after each instruction does not stop there.
pub fn returns_to(context: *mut c_void) {
    if mechanism::TRAPS_AFTER && shared().armed.load(SeqCst) != 0 {
        // SAFETY: the callers' handlers pass what the kernel has passed to them.
        visit(shared(), unsafe { &*context.cast::<libc::ucontext_t>() });
    }
}

fn own_stack_for_visitors() {
    // SAFETY: new memory that stays mapped; the child has no other use for its alternate stack.
    unsafe {
        let place = libc::mmap(
            std::ptr::null_mut(),
            VISITORS,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert!(place != libc::MAP_FAILED, "no memory for an alternate stack");
        let stack = libc::stack_t { ss_sp: place, ss_flags: 0, ss_size: VISITORS };
        assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0);
    }
}
