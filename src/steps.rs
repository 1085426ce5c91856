//! The steps of a migration, announced to a hook when cargo feature `steps` is on.
//!
//! The attack battery tampers and injects failures at them, and the example engine's `--tamper` acts there.
//! Without the feature announcing a step is empty and inlined away.

use crate::abi::Record;
use crate::error::Error;
use crate::plan::Plan;

#[cfg(feature = "steps")]
pub use crate::abi::Rebinding;

/// Where a growth stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `grow` was called; nothing was looked at yet.
    Begin,
    /// The destination segment is mapped.
    Mapped,
    /// All frames were walked and authenticated; the plan stands.
    Planned,
    /// The span's bytes lie in the destination.
    Copied,
    /// Frame pointers and interior pointers in the destination are right.
    Rebased,
    /// Return addresses in the destination are re-bound.
    Rebound,
    /// The destination is the stack's segment now.
    Committed,
}

/// What the hook is shown.
#[derive(Debug)]
#[cfg_attr(not(feature = "steps"), allow(dead_code, reason = "only a hook looks at it"))]
pub struct StepInfo<'a> {
    /// Address of the youngest frame record: in the source up to [`Step::Rebased`], then in the destination.
    pub youngest: usize,
    /// Lowest usable address of the segment that the record lies in.
    pub base: usize,
    /// One past the highest.
    pub top: usize,
    /// Added to an address in the source gives the address in the destination; 0 before there is one.
    pub delta: usize,
    /// Address of the sealed record (base, top, identity, generation, seal: five words) of the segment moved from.
    pub source_record: usize,
    /// The same of the segment moved to; 0 before there is one.
    pub destination_record: usize,
    /// At [`Step::Mapped`]: address of a record to move to instead, which the hook keeps alive.
    pub redirect: Option<usize>,
    plan: &'a mut Plan,
}

impl<'a> StepInfo<'a> {
    /// What is known at any step: the youngest record, and the segments moved from and to.
    pub(crate) fn new(youngest: usize, source: &Record, destination: Option<&Record>, plan: &'a mut Plan) -> Self {
        let holder = destination.filter(|destination| destination.holds(youngest, 16)).unwrap_or(source);
        let address = |record: &Record| std::ptr::from_ref(record).addr();
        StepInfo {
            youngest,
            base: holder.base,
            top: holder.top,
            delta: destination.map_or(0, |destination| destination.top.wrapping_sub(source.top)),
            source_record: address(source),
            destination_record: destination.map_or(0, address),
            redirect: None,
            plan,
        }
    }

    /// The planned return addresses, youngest first, as an attacker can rewrite them.
    #[cfg(feature = "steps")]
    pub fn plan(&mut self) -> &mut [Rebinding] {
        self.plan.rebindings_mut()
    }
}

/// A hook. An error that it returns is what the step fails with.
#[cfg(feature = "steps")]
pub type Hook = fn(Step, &mut StepInfo<'_>) -> Result<(), Error>;

#[cfg(feature = "steps")]
static HOOK: std::sync::RwLock<Option<Hook>> = std::sync::RwLock::new(None);

/// Sets the hook of this process, or takes it away.
#[cfg(feature = "steps")]
pub fn set_hook(hook: Option<Hook>) {
    *HOOK.write().unwrap_or_else(std::sync::PoisonError::into_inner) = hook;
}

/// Announces a step. The address is [`StepInfo::redirect`].
#[cfg(feature = "steps")]
pub(crate) fn step(step: Step, mut info: StepInfo<'_>) -> Result<Option<usize>, Error> {
    let hook = *HOOK.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    hook.map_or(Ok(()), |hook| hook(step, &mut info))?;
    Ok(info.redirect)
}

/// Announces a step to nobody. The address is [`StepInfo::redirect`].
#[cfg(not(feature = "steps"))]
#[inline(always)]
pub(crate) fn step(_: Step, _: StepInfo<'_>) -> Result<Option<usize>, Error> {
    Ok(None)
}
