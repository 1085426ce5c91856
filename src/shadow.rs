//! Shadow stacks (x86 SHSTK, arm64 GCS): mapped by the kernel with a token on top, and a guard below.
//!
//! ```text
//!  mapping                                            top
//!  | guard, no access | return addresses, grows down  |
//!                                       token at top − 8 while nothing runs on it
//! ```
//! A growable stack has one shadow segment, or a chain of them: calls by `link` begin a further one where the data segment that they go to
//! needs more room than there is on the present one. While calls are on a further one, none below it has a token: nobody can go there. The word
//! at the bottom of the further one says where it goes on, in memory that nobody can write; link's return makes the token from it and uses it.
//! ```text
//!  the first segment                 a further one                                         top
//!  | ... | return addresses |  <--  | ... | return addresses | link's | where the first is |
//! ```
//! Sources: Linux `Documentation/arch/x86/shstk.rst`, `Documentation/arch/arm64/gcs.rst`; Intel SDM vol. 1 ch. 17.2.

use crate::error::Error;
use crate::system;
use std::sync::atomic::Ordering;

/// Bytes of the word at the bottom of a further shadow segment.
const WAY_BACK: usize = 8;

const WHAT: &str = "a shadow stack";
const GUARD: &str = "a shadow stack's guard";

/// An owned shadow stack. Dropping it unmaps it.
#[derive(Debug)]
pub struct ShadowStack {
    mapping: usize,
    mapped: usize,
    guard: usize,
    /// One past the oldest return address while something runs on it.
    bottom: usize,
}

impl ShadowStack {
    /// Maps one with at least `room` bytes, and its guard.
    ///
    /// # Errors
    /// [`Error::Memory`] when the kernel refuses; nothing stays mapped. [`Error::Unsupported`] where there are none.
    pub fn map(room: usize) -> Result<ShadowStack, Error> {
        ShadowStack::map_with(room, 0)
    }

    /// Of a chain, not the first: see the module.
    ///
    /// # Errors
    /// As for [`ShadowStack::map`].
    pub(crate) fn map_further(room: usize) -> Result<ShadowStack, Error> {
        ShadowStack::map_with(room, WAY_BACK)
    }

    fn map_with(room: usize, below: usize) -> Result<ShadowStack, Error> {
        let page = system::page_size();
        let mapped = room
            .checked_next_multiple_of(page)
            .and_then(|room| room.checked_add(page))
            .ok_or(Error::Memory { what: "a shadow stack", bytes: room, errno: libc::ENOMEM })?;
        let mapping = map_anywhere(mapped - page, page)?;
        Ok(ShadowStack { mapping, mapped, guard: page, bottom: mapping + mapped - below })
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
        Ok(ShadowStack { mapping, mapped, guard, bottom: mapping + mapped })
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

    /// The return addresses above the token at `token`, youngest first; `None` when there can be no token there.
    pub(crate) fn entries(&self, token: usize) -> Option<&[u64]> {
        let lowest = self.mapping + self.guard;
        if !token.is_multiple_of(8) || token < lowest || token >= self.bottom {
            return None;
        }
        let first = token + 8;
        let words = (self.bottom - first) / 8;
        // SAFETY: the words lie in the mapping, which self owns; ordinary code can read a shadow stack but not write
        // it, and nothing runs on this one while its token stands.
        Some(unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(first), words) })
    }
}

impl ShadowStack {
    /// Where the token of the segment before will lie, by the word at the bottom of one that something runs on.
    fn token_before(&self) -> usize {
        // SAFETY: the highest word of a mapped shadow stack, which ordinary code can read. Volatile: the CPU changes it.
        let below = unsafe { std::ptr::with_exposed_provenance::<usize>(self.token()).read_volatile() };
        (below & !7).wrapping_sub(8)
    }
}

impl Drop for ShadowStack {
    fn drop(&mut self) {
        system::unmap_guarded(self.mapping, self.mapped);
    }
}

/// The shadow segments of one stack.
#[derive(Debug)]
pub(crate) struct Shadows {
    first: ShadowStack,
    /// Those that link calls began, the oldest first; the last ones may be idle.
    further: Vec<Further>,
    /// How many of those were made so far.
    made: u64,
    /// Whether it is the software model's, which has one segment.
    #[cfg(test)]
    played: bool,
}

/// A shadow segment that calls into a data segment begin on.
#[derive(Debug)]
struct Further {
    /// How many data segments come before that one.
    depth: usize,
    shadow: ShadowStack,
}

impl Shadows {
    /// A stack's first, of at least `room` bytes.
    ///
    /// # Errors
    /// As for [`ShadowStack::map`].
    pub(crate) fn map(room: usize) -> Result<Shadows, Error> {
        Ok(Shadows {
            first: ShadowStack::map(room)?,
            further: Vec::new(),
            made: 0,
            #[cfg(test)]
            played: false,
        })
    }

    /// The same in ordinary memory: the only one that there will be.
    ///
    /// # Errors
    /// As for [`ShadowStack::map`].
    #[cfg(test)]
    pub(crate) fn played(room: usize) -> Result<Shadows, Error> {
        Ok(Shadows { first: ShadowStack::played(room)?, further: Vec::new(), made: 0, played: true })
    }

    /// The oldest.
    pub(crate) fn first(&self) -> &ShadowStack {
        &self.first
    }

    /// The one that the frames are on of a data segment which `depth` others come before, and how many come before the first data segment
    /// whose frames are on it.
    pub(crate) fn of(&self, depth: usize) -> (&ShadowStack, usize) {
        match self.further.iter().rfind(|further| further.depth <= depth) {
            Some(further) => (&further.shadow, further.depth),
            None => (&self.first, 0),
        }
    }

    /// How many data segments come before the next one behind `depth` of them whose calls begin on another shadow segment.
    pub(crate) fn next_after(&self, depth: usize) -> usize {
        self.further.iter().map(|further| further.depth).find(|&next| next > depth).unwrap_or(usize::MAX)
    }

    /// Maps one of at least `room` bytes for the data segment that `depth` others come before, the last one of the stack. Returns where its token lies.
    ///
    /// # Errors
    /// As for [`ShadowStack::map`], and when there is no memory for the list.
    pub(crate) fn append(&mut self, depth: usize, room: usize) -> Result<usize, Error> {
        let failed =
            |_| Error::Memory { what: "the list of shadow segments", bytes: size_of::<Further>(), errno: libc::ENOMEM };
        self.further.try_reserve(1).map_err(failed)?;
        #[cfg(test)]
        if self.played {
            return Err(Error::ShadowRoom { needed: room, room: self.first.room() });
        }
        let shadow = ShadowStack::map_further(room)?;
        let token = shadow.token();
        self.further.push(Further { depth, shadow });
        self.made += 1;
        Ok(token)
    }

    /// The return addresses, youngest first, on the shadow segment of a data segment which `depth` others come before, while the youngest data segment
    /// has `youngest` before it and the token lies at `token`. `None` when there can be no token there.
    pub(crate) fn entries(&self, youngest: usize, token: usize, depth: usize) -> Option<&[u64]> {
        let (mut at, mut token) = (youngest, token);
        loop {
            let (shadow, first) = self.of(at);
            let words = shadow.entries(token)?;
            if first <= depth {
                return Some(words);
            }
            (at, token) = (first - 1, shadow.token_before());
        }
    }

    /// How many further ones were made so far.
    pub(crate) fn made(&self) -> u64 {
        self.made
    }

    /// Gives those back that belong to data segments behind the first `segments`, on which nothing runs.
    pub(crate) fn keep(&mut self, segments: usize) {
        self.further.retain(|further| further.depth < segments);
    }

    /// Bytes of room up to the one whose token lies at `token`, and the return addresses on all of them; `None` when none has its token there.
    pub(crate) fn looked(&self, token: usize) -> (usize, Option<usize>) {
        let holds = |further: &Further| further.shadow.entries(token).is_some();
        let used = self.further.iter().rposition(holds).map_or(0, |last| last + 1);
        let used = self.further[..used].iter().map(|further| &further.shadow);
        let chain: Vec<&ShadowStack> = std::iter::once(&self.first).chain(used).collect();
        let room = chain.iter().map(|shadow| shadow.room()).sum();
        let mut token = token;
        let mut entries = 0;
        for shadow in chain.iter().rev() {
            let Some(words) = shadow.entries(token) else { return (room, None) };
            entries += words.len();
            token = shadow.token_before();
        }
        (room, Some(entries))
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
