//! Shadow stacks (x86 SHSTK, arm64 GCS): mapped by the kernel with a token on top, and a guard below.
//!
//! ```text
//!  mapping                                            top
//!  | guard, no access | return addresses, grows down  |
//!                                       token at top − 8 while nothing runs on it
//! ```
//! Sources: Linux `Documentation/arch/x86/shstk.rst`, `Documentation/arch/arm64/gcs.rst`; Intel SDM vol. 1 ch. 17.2.

use crate::error::Error;
use crate::system;
use std::sync::atomic::Ordering;

const WHAT: &str = "a shadow stack";
const GUARD: &str = "a shadow stack's guard";

/// An owned shadow stack. Dropping it unmaps it.
#[derive(Debug)]
pub struct ShadowStack {
    mapping: usize,
    mapped: usize,
    guard: usize,
}

impl ShadowStack {
    /// Maps one with at least `room` bytes, and its guard.
    ///
    /// # Errors
    /// [`Error::Memory`] when the kernel refuses; nothing stays mapped. [`Error::Unsupported`] where there are none.
    pub fn map(room: usize) -> Result<ShadowStack, Error> {
        let page = system::page_size();
        let mapped = room
            .checked_next_multiple_of(page)
            .and_then(|room| room.checked_add(page))
            .ok_or(Error::Memory { what: "a shadow stack", bytes: room, errno: libc::ENOMEM })?;
        map_anywhere(mapped - page, page).map(|mapping| ShadowStack { mapping, mapped, guard: page })
    }

    /// Ordinary memory of at least `room` bytes in the place of one, for tests that play what runs: nothing but they writes it.
    ///
    /// # Errors
    /// As for [`ShadowStack::map`].
    #[cfg(test)]
    pub(crate) fn played(room: usize) -> Result<ShadowStack, Error> {
        let guard = system::page_size();
        let mapped = room.next_multiple_of(guard) + guard;
        let mapping = system::map(WHAT, mapped)?;
        system::make_inaccessible(GUARD, mapping, guard)?;
        Ok(ShadowStack { mapping, mapped, guard })
    }

    /// One past the highest word.
    pub(crate) fn top(&self) -> usize {
        self.mapping + self.mapped
    }

    /// Where the token lies while nothing runs on it.
    pub(crate) fn token(&self) -> usize {
        self.top() - 8
    }

    /// Bytes for return addresses and signal frames.
    pub(crate) fn room(&self) -> usize {
        self.mapped - self.guard
    }

    /// The words above the token at `token`, youngest first; `None` when there can be no token there.
    pub(crate) fn entries(&self, token: usize) -> Option<&[u64]> {
        let lowest = self.mapping + self.guard;
        if !token.is_multiple_of(8) || token < lowest || token >= self.top() {
            return None;
        }
        let first = token + 8;
        let words = (self.top() - first) / 8;
        // SAFETY: the words lie in the mapping, which self owns; ordinary code can read a shadow stack but not write
        // it, and nothing runs on this one while its token stands.
        Some(unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(first), words) })
    }
}

impl Drop for ShadowStack {
    fn drop(&mut self) {
        system::unmap_guarded(self.mapping, self.mapped);
    }
}

/// Whether the token stands on top of a shadow stack that is mapped: then nothing is on it. Ordinary code cannot write it.
#[inline(always)]
pub(crate) fn is_idle(top: usize) -> bool {
    // SAFETY: the callers have the top of a mapped shadow stack from the chunk directory. Volatile: the CPU changes it.
    let word = unsafe { std::ptr::with_exposed_provenance::<usize>(top - 8).read_volatile() };
    word == idle_token(top)
}

/// The address above it, and bit 0 for 64-bit mode (Intel SDM vol. 1, 17.2.3; Linux `Documentation/arch/x86/shstk.rst`).
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn idle_token(top: usize) -> usize {
    top | 1
}

/// Its own address without the lowest 12 bits, and 1 for a valid token (Arm ARM, GCSSS2; Linux `Documentation/arch/arm64/gcs.rst`).
#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn idle_token(top: usize) -> usize {
    ((top - 8) & !0xfff) | 1
}

/// Maps `guard` inaccessible bytes and `room` bytes with a token on top, wherever the kernel likes.
pub(crate) fn map_anywhere(room: usize, guard: usize) -> Result<usize, Error> {
    let mapping = system::map_shadow(WHAT, 0, guard + room)?;
    system::cheap_guard(GUARD, mapping, guard)
        // Before Linux 6.13: something inaccessible in its place.
        .and_then(|done| if done { Ok(()) } else { system::make_inaccessible(GUARD, mapping, guard) })
        .inspect_err(|_| system::unmap(mapping, guard + room))?;
    Ok(mapping)
}

/// Maps the same at `area`, which was set aside. Adjacent ones become one mapping of the system's.
pub(crate) fn map_at(area: usize, room: usize, guard: usize) -> Result<(), Error> {
    if system::cheap_guards() {
        system::map_shadow(WHAT, area, guard + room)?;
        match system::cheap_guard(GUARD, area, guard) {
            Ok(true) => return Ok(()),
            Ok(false) => system::unmap(area, guard),
            Err(error) => {
                system::unmap(area, guard + room);
                return Err(error);
            }
        }
    } else {
        system::map_shadow(WHAT, area + guard, room)?;
    }
    system::GUARD_MAPPINGS.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Sets addresses aside for a run of adjacent areas: below where the system places mappings by itself, and next to the run before.
/// They stay unmapped. `map_shadow_stack` replaces nothing, so whoever maps something there makes [`map_at`] fail, no more.
#[cfg(target_os = "linux")]
pub(crate) fn set_aside(bytes: usize) -> Result<usize, Error> {
    use std::sync::{Mutex, PoisonError};
    /// Where the next run of areas is looked for; 0 before the first.
    static NEXT: Mutex<usize> = Mutex::new(0);
    /// How often another place is tried.
    const PLACES: usize = 64;

    let page = system::page_size();
    let no_room = || Error::Memory { what: WHAT, bytes, errno: libc::ENOMEM };
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    // The system's own places, as random as it makes them, lie in the upper two thirds of the addresses.
    let sample = system::reserve(WHAT, page)?;
    system::unmap(sample, page);
    let lowest = sample.next_power_of_two() / 16;
    for place in 0..PLACES {
        if *next == 0 {
            *next = (lowest + (sample / 16 + place * (lowest / PLACES)) % lowest).next_multiple_of(page);
        }
        let end = next.checked_add(bytes).ok_or_else(no_room)?;
        if end <= 4 * lowest && system::is_free(*next, bytes) {
            return Ok(std::mem::replace(&mut *next, end));
        }
        *next = 0;
    }
    Err(no_room())
}

/// There are none here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn set_aside(_: usize) -> Result<usize, Error> {
    Err(Error::Unsupported("shadow stacks"))
}
