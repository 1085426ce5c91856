//! What is suspended: for a garbage collector, and for finding what was forgotten.

use super::Cont;
use super::node::{self, NOBODY, Node, Stage};
use super::run;
use crate::error::Error;
use std::panic::Location;
use std::sync::atomic::Ordering;

/// Where the stubs keep the frame pointer and the pc in a saved frame, in bytes above the stack pointer (`asm/*_switch.S`).
const FP: usize = if cfg!(target_arch = "x86_64") { 56 } else { 0 };
const PC: usize = FP + 8;

/// A stack that is suspended, as a collector sees it. All addresses are raw.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Suspended {
    /// The continuation that it belongs to.
    pub cont: Cont,
    /// Its place in the chain: 0 is the stack that suspended itself, the next one is what resumed it.
    pub depth: usize,
    /// The word that its entry function is or was called with.
    pub data: usize,
    /// Whether its entry function was called. If not, its roots are `data` and the values alone.
    pub begun: bool,
    /// Lowest address of its data area.
    pub base: usize,
    /// One past the highest.
    pub top: usize,
    /// Its stack pointer. What it saved lies from here to `top`, callee-saved registers included.
    pub sp: usize,
    /// The frame pointer register that it will have: the address of the youngest frame record, in code that keeps frame pointers.
    pub fp: usize,
    /// Where it will go on; the youngest frame's pc.
    pub pc: usize,
    /// The values that were bound to it and not yet taken.
    pub values: *const u64,
    /// How many.
    pub count: usize,
    /// Where it was made.
    pub created: &'static Location<'static>,
}

/// Calls `f` for every stack that is suspended or has not run.
///
/// # Safety
/// Meanwhile no thread makes, binds, resumes, switches or cancels a continuation, and `f` does not either.
pub unsafe fn for_each_suspended(mut f: impl FnMut(&Suspended)) {
    for index in 0..node::made() as u64 {
        let Some(last) = node::node(index) else { continue };
        let Some(cont) = last.handle() else { continue };
        // SAFETY: the slot is leased to the node and nobody uses it.
        let mut sp = unsafe { last.slot().as_ref() }.own.sp;
        for (depth, node) in run::chain(last, last.first.get()).enumerate() {
            let (base, top) = node.area();
            // SAFETY: a saved frame lies there, of a stack that does not run.
            let word = |offset| unsafe { std::ptr::with_exposed_provenance::<usize>(sp + offset).read_volatile() };
            let inbox = node.inbox.get();
            f(&Suspended {
                cont,
                depth,
                data: node.data.get(),
                begun: node.stage.get() == Stage::Begun,
                base,
                top,
                sp,
                fp: word(FP),
                pc: word(PC),
                values: inbox.at,
                count: if depth == 0 { inbox.filled } else { 0 },
                created: created(node),
            });
            // SAFETY: as above; the stack that this one resumed keeps where this one waits.
            sp = unsafe { node.slot().as_ref() }.resumer.sp;
        }
    }
}

fn created(node: &Node) -> &'static Location<'static> {
    // SAFETY: null, or what `new` stored.
    unsafe { node.created.load(Ordering::Relaxed).as_ref() }.unwrap_or(Location::caller())
}

/// A continuation that was not resumed since it was made or suspended.
#[derive(Clone, Copy, Debug)]
pub struct Leak {
    /// Its handle.
    pub cont: Cont,
    /// Where it was made.
    pub created: &'static Location<'static>,
    /// Whether the thread that it belongs to has ended, so that it can be cancelled without destructors and no more.
    pub orphaned: bool,
}

/// All that are suspended or have not run. What another thread does meanwhile may be in it or not.
///
/// # Errors
/// [`Error::Memory`]
pub fn leaks() -> Result<Vec<Leak>, Error> {
    let mut leaks = Vec::new();
    for index in 0..node::made() as u64 {
        let Some(node) = node::node(index) else { continue };
        let Some(cont) = node.handle() else { continue };
        let leak = Leak { cont, created: created(node), orphaned: node.owner.load(Ordering::Relaxed) == NOBODY };
        // The one that was looked at is still the same.
        if node.handle() == Some(cont) {
            let bytes = size_of::<Leak>();
            leaks.try_reserve(1).map_err(|_| Error::Memory { what: "a list of leaks", bytes, errno: libc::ENOMEM })?;
            leaks.push(leak);
        }
    }
    Ok(leaks)
}
