//! `--tamper`: plays the attacker once. It flips one bit of one saved return address at a step of the first growth
//! that has the frame.

use crate::error::Error;
use cfi_stack::steps::{Step, StepInfo, set_hook};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// When the bit is flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// As a growth begins, before the library walks.
    Before,
    /// Just after a growth has moved the frames, so that a compiled return meets it.
    After,
}

/// What to flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tamper {
    /// Which managed frame; 0 is the youngest.
    pub frame: usize,
    /// Which bit of its return address.
    pub bit: u32,
    /// When.
    pub when: When,
}

static TARGET: OnceLock<Tamper> = OnceLock::new();
static DONE: AtomicBool = AtomicBool::new(false);

impl Tamper {
    /// Reads `FRAME:BIT[:before|after]`.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn parse(text: &str) -> Result<Tamper, Error> {
        let wrong = || {
            Error::Usage(format!(
                "--tamper `{text}`: write FRAME:BIT[:before|after], with BIT from 0 to 63, as in 2:53:after"
            ))
        };
        let mut parts = text.split(':');
        let frame = parts.next().and_then(|part| part.parse().ok()).ok_or_else(wrong)?;
        let bit = parts.next().and_then(|part| part.parse().ok()).filter(|bit| *bit < 64).ok_or_else(wrong)?;
        let when = match parts.next() {
            None | Some("after") => When::After,
            Some("before") => When::Before,
            Some(_) => return Err(wrong()),
        };
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Tamper { frame, bit, when })
    }

    /// Waits for the first growth.
    pub fn arm(self) {
        if TARGET.set(self).is_ok() {
            set_hook(Some(hook));
        }
    }
}

/// Whether the bit was flipped.
pub fn done() -> bool {
    DONE.load(Ordering::Relaxed)
}

fn hook(step: Step, info: &mut StepInfo<'_>) -> Result<(), cfi_stack::Error> {
    let Some(target) = TARGET.get() else { return Ok(()) };
    let due = match target.when {
        When::Before => step == Step::Begin,
        When::After => step == Step::Committed,
    };
    if due && !done() && flip(target, info) {
        DONE.store(true, Ordering::Relaxed);
    }
    Ok(())
}

/// Flips the bit if the stack has that frame.
fn flip(target: &Tamper, info: &StepInfo<'_>) -> bool {
    let inside = |record: usize| record.is_multiple_of(8) && record >= info.base && info.top - 16 >= record;
    // The youngest record is that of `grow` itself; the frames that compiled code returns from begin with the next.
    let mut record = info.youngest;
    for _ in 0..=target.frame {
        if !inside(record) {
            return false;
        }
        // SAFETY: the record lies in the stack's segment, which is mapped and writable.
        let next = unsafe { std::ptr::with_exposed_provenance::<usize>(record).read_volatile() };
        if next <= record {
            return false;
        }
        record = next;
    }
    if !inside(record) {
        return false;
    }
    let word = std::ptr::with_exposed_provenance_mut::<u64>(record + 8);
    // SAFETY: as above. That this breaks the frame is the purpose.
    unsafe { word.write_volatile(word.read_volatile() ^ (1 << target.bit)) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        let of = |text| Tamper::parse(text).ok();
        assert_eq!(of("2:53"), Some(Tamper { frame: 2, bit: 53, when: When::After }));
        assert_eq!(of("0:0:before"), Some(Tamper { frame: 0, bit: 0, when: When::Before }));
        for text in ["", "1", "1:64", "-1:3", "1:2:during", "1:2:after:x", "a:b"] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
