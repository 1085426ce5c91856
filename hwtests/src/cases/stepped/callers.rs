//! What a walk must find in a stub follows from its callers at its first instruction and from what the stub is for: the same callers at
//! every instruction, or other ones from one instruction on, for good.

use super::{Sums, marked, to_main};
use crate::backtrace::{Frame, by_records, by_tables};
use crate::child::Verdict;
use crate::managed;
use crate::outcome::Code;
use crate::stepper::{self, Boundary};
use crate::tally::Tally;
use std::cell::RefCell;
use std::ops::Range;

unsafe extern "C" {
    fn cfi_stack_exit();
    fn cfi_stack_grow();
}

/// What a stub is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Called by native code, nothing of its own lies on a stack.
    Leaf,
    /// Called by native code, has a frame.
    Native,
    /// Called by managed code, has a frame.
    Managed,
    /// Begins an entry; its tail ends one, also for others that jump there.
    Enter,
    /// Begins an entry on the frames that were suspended.
    Resume,
    /// Ends an entry, whose frames stay where it is the only one.
    Suspend,
    /// Ends an entry.
    Leave,
}

impl Kind {
    fn is_called_by_managed_code(self) -> bool {
        matches!(self, Kind::Managed | Kind::Suspend | Kind::Leave)
    }
}

/// A stub that is stepped through.
#[derive(Clone, Debug)]
pub struct Stub {
    code: stepper::Code,
    kind: Kind,
}

impl Stub {
    /// The stub that starts there.
    pub fn new(name: &'static str, start: unsafe extern "C" fn(), kind: Kind) -> Stub {
        Stub { code: stepper::Code::new(name, start as *const () as usize), kind }
    }
}

const ARM: bool = cfg!(target_arch = "aarch64");
/// Instructions at which a stub's own frame record does not stand, at most: a prologue and an epilogue; a stub that managed code calls may
/// look first whether there is anything to do.
const WITHOUT_RECORD: usize = 32;
const WITHOUT_RECORD_YET: usize = 48;

/// What the handlers have seen in the run so far.
#[derive(Default)]
struct Watch {
    stubs: Vec<Stub>,
    /// Managed code.
    functions: Vec<Range<usize>>,
    /// `exit` and `grow`: a link record names its stub once more, after the return address of what the stub called.
    linking: [Range<usize>; 2],
    /// The native callers of the entries that run, the innermost last.
    entries: Vec<Vec<usize>>,
    /// The frames that were suspended, `enter`'s return among them.
    suspended: Vec<usize>,
    /// The callers before and after what the present stub is for, and whether that is done.
    before: Vec<usize>,
    after: Vec<usize>,
    changed: bool,
    without_record: usize,
    /// Instructions at which the walk ended where `grow` had been called from.
    wrong: Option<String>,
}

thread_local! {
    static WATCH: RefCell<Watch> = RefCell::default();
}

/// Visits a boundary.
pub fn look(at: &Boundary) {
    let frames = by_tables();
    WATCH.with_borrow_mut(|watch| {
        if watch.wrong.is_none()
            && let Err(problem) = watch.look(at, &frames)
        {
            watch.wrong = Some(format!("{}: {problem}", watch.stubs[at.index].code.at(at.pc)));
        }
    });
}

impl Watch {
    fn look(&mut self, at: &Boundary, frames: &[Frame]) -> Result<(), String> {
        let own = frames
            .iter()
            .position(|frame| frame.pc == at.pc)
            .ok_or_else(|| format!("the tables do not lead from the handler to the stub: {frames:x?}"))?;
        let callers = to_main(&frames[own + 1..]);
        let Stub { code, kind } = &self.stubs[at.index];
        let (start, kind) = (code.place.start, *kind);
        if at.pc == start {
            self.begins(kind, &callers).map_err(|problem| format!("{problem}: {callers:x?}"))?;
        } else if kind == Kind::Enter && at.pc == managed::entry_return().address() {
            let native = self.entries.pop().ok_or("an entry returns that was not made")?;
            (self.before, self.after, self.changed) = (native.clone(), native, false);
        }
        if !self.changed && callers != self.before {
            self.changed = true;
        }
        let expected = if self.changed { &self.after } else { &self.before };
        if callers != *expected {
            return Err(format!("by tables {callers:x?}, before {:x?}, after {:x?}", self.before, self.after));
        }
        let cfa = frames.get(own + 1).map_or(0, |frame| frame.sp);
        self.by_records(at, kind, cfa, &callers)
    }

    /// A stub begins: who has called it, and what comes of that.
    fn begins(&mut self, kind: Kind, callers: &[usize]) -> Result<(), &'static str> {
        if !marked(callers) {
            return Err("no markers in order, then main");
        }
        let entry = managed::entry_return().address();
        let end = callers.iter().position(|&pc| pc == entry).map_or(0, |at| at + 1);
        let (managed, native) = callers.split_at(if kind.is_called_by_managed_code() { end } else { 0 });
        if kind.is_called_by_managed_code() {
            let frames = managed.len().saturating_sub(1);
            if frames == 0 || !managed[..frames].iter().all(|&pc| self.is_managed(pc)) {
                return Err("no managed frames");
            }
            if self.entries.last().is_some_and(|entered| entered != native) {
                return Err("managed frames, but not on those that entered");
            }
        }
        let same = callers.to_vec();
        self.after = match kind {
            Kind::Leaf | Kind::Native | Kind::Managed => same.clone(),
            Kind::Enter => {
                self.entries.push(same.clone());
                same.clone()
            }
            Kind::Resume => {
                self.entries.push(same.clone());
                [&self.suspended[..], callers].concat()
            }
            Kind::Suspend | Kind::Leave => {
                self.entries.pop();
                if self.entries.is_empty() {
                    self.suspended = managed.to_vec();
                }
                native.to_vec()
            }
        };
        (self.before, self.changed, self.without_record) = (same, false, 0);
        Ok(())
    }

    fn is_managed(&self, pc: usize) -> bool {
        self.functions.iter().any(|function| function.contains(&pc))
    }

    /// The walk by frame records finds the same, but for the caller where the stub has no record of its own. On x86-64 it ends with the first
    /// native caller, and begins with a record of managed code's or the stub's: Rust's own frames keep none there.
    fn by_records(&mut self, at: &Boundary, kind: Kind, cfa: usize, callers: &[usize]) -> Result<(), String> {
        let is_managed = callers.first().is_some_and(|&pc| self.is_managed(pc));
        let has_own = cfa != 0 && at.fp == cfa - 16;
        let keeps_records = ARM || has_own || is_managed && kind.is_called_by_managed_code();
        if !keeps_records {
            return self.counted(kind);
        }
        let entry = managed::entry_return().address();
        let last = match (ARM, is_managed) {
            (true, _) => callers.len() - 1,
            (false, true) => callers.iter().position(|&pc| pc == entry).map_or(0, |at| at + 1),
            (false, false) => 0,
        };
        let expected = &callers[..=last];
        // SAFETY: the chain is this thread's own, with a record for every frame up to the last one.
        let mut found = unsafe { by_records(at.fp, callers[last]) };
        found.dedup_by(|again, before| again == before && self.linking.iter().any(|stub| stub.contains(again)));
        if found == expected {
            Ok(())
        } else if found == expected[1..] {
            self.counted(kind)
        } else {
            Err(format!("by records {found:x?} instead of {expected:x?}"))
        }
    }

    /// An instruction at which the stub has no record of its own.
    fn counted(&mut self, kind: Kind) -> Result<(), String> {
        self.without_record += 1;
        let most = if kind == Kind::Managed { WITHOUT_RECORD_YET } else { WITHOUT_RECORD };
        match kind != Kind::Leaf && self.without_record > most {
            true => Err(format!("{} instructions without a frame record", self.without_record)),
            false => Ok(()),
        }
    }
}

/// Runs `body`, which steps with [`look`], in a child, and adds it up. Stubs of `required`, by their place, must have been stepped through.
pub fn follow(
    tally: &mut Tally<'_>,
    sums: &mut Sums,
    what: &str,
    (stubs, required): (&[Stub], &[usize]),
    functions: &[managed::Function],
    body: impl FnOnce() -> Result<(), String>,
) {
    let codes: Vec<_> = stubs.iter().map(|stub| stub.code.clone()).collect();
    let (end, stepped) = stepper::run(&codes, || followed(stubs, functions, body));
    tally.attack(what, &end, &[Code::C]);
    sums.add(tally, what, stepped, required);
}

fn followed(stubs: &[Stub], functions: &[managed::Function], body: impl FnOnce() -> Result<(), String>) -> Verdict {
    let linking = [("exit", cfi_stack_exit as *const ()), ("grow", cfi_stack_grow as *const ())]
        .map(|(name, start)| stepper::Code::new(name, start as usize).place);
    let functions = functions.iter().map(|function| function.start.address()..function.end.address()).collect();
    WATCH.set(Watch { stubs: stubs.to_vec(), functions, linking, ..Watch::default() });
    let result = body();
    match WATCH.take().wrong {
        Some(problem) => Err(problem),
        None => result.map(|()| Code::C),
    }
}
