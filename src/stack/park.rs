//! Out of a key domain and into another: a stack whose words are signed, for as long, under a key that threads of both share.
//!
//! What lies on an idle or suspended stack is managed code's, which the code map describes to the last frame; so each signature on it can be exchanged, in
//! its place, whether the frame can move or not. Native frames cannot: pooled stacks are never parked (see [`crate::continuation`]).
//!
//! What is noted here of a parked stack lies in memory that anybody writes, and nothing rests on it: each word authenticates under one key and one
//! modifier alone, parked or not, so a lie dies at the first `aut`.

use super::moves::entry_base;
use super::{Inner, OTHER_DOMAIN, Stack, untampered};
use crate::arch;
use crate::codemap::table::Reading;
use crate::error::{Error, Refusal};
use crate::features::{self, Domain};
use crate::pac::{Signing, Tampered};
use crate::plan::Words;
use crate::published;
use crate::segment::Segment;
use crate::signer::{Parked, Signer, Way};
use crate::steps::{Step, StepInfo, step};
use crate::thread::Thread;
use crate::walk::{Bounds, Piece, Walk};

/// That a stack is parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    /// The shared key.
    key: Signing,
    /// Whether there are frame pointers under the data key of its letter.
    pointers: bool,
}

/// What lies in one segment.
#[derive(Clone, Copy, Debug)]
struct Part<'a> {
    source: &'a Segment,
    /// Its youngest record.
    low: usize,
    /// Its return addresses, and those of older ones, on their shadow segment.
    shadow: Option<&'a [u64]>,
    /// Where its words end in the plan's lists.
    end: Words,
}

impl Stack {
    /// Parks an idle or suspended stack: what is signed on it is signed under `key` from now on, A or B, so that a thread of another key domain which has the same
    /// key, the same generic key and the same shadow mode can [`unpark`](Stack::unpark) it and go on. Whether its frames could move does not
    /// matter. Where the CPU signs nothing, `key` does not either: return addresses are compared with the shadow stack where there is one.
    ///
    /// Until it is unparked, nobody runs, moves or discards it: [`Error::Parked`]. It can be dropped.
    ///
    /// # Errors
    /// [`Error::Thread`] when the thread's keys or shadow mode are not the stack's, [`Error::Parked`] when it is parked already; [`Error::Key`] without a key, on a CPU without generic
    /// authentication, and when an address key is turned off on this thread; [`Error::UnknownCode`], [`Error::Unsigned`] and [`Error::Layout`] for frames that the code map does
    /// not describe; [`Error::Memory`]. Nothing has changed then.
    pub fn park(&mut self, thread: &Thread, key: Signing) -> Result<(), Error> {
        // SAFETY: owned by self; `&mut self` cannot be had while the stack runs.
        let inner = unsafe { self.inner.as_mut() };
        inner.usable()?;
        if thread.domain() != inner.domain {
            return Err(OTHER_DOMAIN);
        }
        signs(signed(), &thread.domain(), key)?;
        let pointers = untampered(inner.exchange(key, Way::Park))?;
        inner.parked = Some(Note { key, pointers });
        Ok(())
    }

    /// Takes a parked stack over: what is signed on it is signed under this thread's own keys from now on, and its key domain is this thread's.
    ///
    /// The generic key must be the same because the stack's segments, and where its managed code waits, are sealed with it; what is sealed is
    /// believed and not made again. On Linux, `PR_PAC_RESET_KEYS` leaves it alone unless it is named.
    ///
    /// # Errors
    /// [`Error::NotParked`]; [`Error::Thread`] when the thread's shadow mode, its generic key, the key that the stack was parked under or, where there are signed frame pointers,
    /// the data key of its letter is another, and when its keys have changed since it attached; [`Error::Key`] when an address key is turned off; else as for
    /// [`Stack::park`]. The stack is parked as before.
    pub fn unpark(&mut self, thread: &Thread) -> Result<(), Error> {
        // SAFETY: as in `park`.
        let inner = unsafe { self.inner.as_mut() };
        let Some(Note { key, pointers }) = inner.parked else { return Err(Error::NotParked) };
        let now = features::domain();
        if thread.domain() != now {
            return Err(Error::Thread("its keys or its shadow-stack mode have changed since it attached"));
        }
        if now.shadow != inner.domain.shadow {
            return Err(OTHER_DOMAIN);
        }
        signs(signed(), &now, key)?;
        if now.ga != inner.domain.ga {
            return Err(Error::Thread("the generic key, which the stack is sealed with, is another"));
        }
        if now.code_key(key) != inner.domain.code_key(key)
            || pointers && now.data_key(key) != inner.domain.data_key(key)
        {
            return Err(Error::Thread("the key that the stack was parked under is another"));
        }
        untampered(inner.exchange(key, Way::Unpark))?;
        inner.parked = None;
        inner.domain = now;
        Ok(())
    }

    /// Whether the stack is parked.
    pub fn is_parked(&self) -> bool {
        self.inner().parked.is_some()
    }

    /// Forgets that the stack is parked, as who rewrites its words does (cargo feature `steps`).
    #[cfg(feature = "steps")]
    pub(crate) fn forget_parked(&mut self) {
        // SAFETY: as in `park`.
        unsafe { self.inner.as_mut() }.parked = None;
    }
}

/// Whether this process signs words.
fn signed() -> bool {
    published::mode() & published::MODE_PAC != 0
}

/// Whether a thread of this domain can exchange words with `key`, where words are `signed`.
fn signs(signed: bool, domain: &Domain, key: Signing) -> Result<(), Error> {
    if !signed {
        return Ok(());
    }
    if key == Signing::None {
        return Err(Error::Key("no key is named"));
    }
    if domain.ga == 0 {
        return Err(Error::Key(
            "without generic authentication nothing binds a parked word to its own key and modifier",
        ));
    }
    // What signs nothing authenticates nothing: a raw word would pass, and be signed under the other key.
    if [domain.ia, domain.ib, domain.da, domain.db].contains(&0) {
        return Err(Error::Key("an address key is turned off on this thread"));
    }
    Ok(())
}

impl<S: Signer> Inner<S> {
    /// Exchanges every signature on the stack between the frames' own keys and `key`. All are authenticated, in all segments, before the first is
    /// written. Says whether there were signed frame pointers.
    fn exchange(&mut self, key: Signing, way: Way) -> Result<bool, Refusal> {
        let Some(youngest) = self.settled()? else { return Ok(false) };
        let exchanged = self.exchange_frames(youngest, key, way);
        self.plan.release();
        exchanged
    }

    fn exchange_frames(&mut self, youngest: usize, key: Signing, way: Way) -> Result<bool, Refusal> {
        let Inner { links, segment, policy, plan, shadows, control, signer, .. } = self;
        let (signer, shadows) = (&*signer, shadows.as_ref());
        let evidence = "the shadow stack's token is outside the shadow stack";
        let outside = Tampered { evidence, slot: control.token };
        let (mut depth, mut on_shadow, mut begun) = (links.used(), usize::MAX, 0);
        let mut parts = Vec::new();
        let bytes = links.used() * size_of::<Part<'_>>();
        let failed = |_| Error::Memory { what: "the parts of a stack", bytes, errno: libc::ENOMEM };
        parts.try_reserve(links.used()).map_err(failed)?;
        let reading = Reading::begin();
        let table = reading.table().ok_or(Error::UnknownCode(arch::suspend()))?;
        plan.clear();
        let (mut low, mut lifted) = (youngest, None);
        for (source, base) in links.to_the_oldest(segment) {
            let on = base.unwrap_or_else(|| entry_base(control.native_sp));
            let piece = Piece {
                youngest: low,
                lifted,
                stub: signer.stubs(),
                bottom: on.bottom,
                base_cfa: source.record().top.wrapping_sub(on.arguments),
                base_fp: on.fp,
                arguments: on.arguments,
                registers: 0,
            };
            depth -= 1;
            let first = shadows.map_or(0, |shadows| shadows.of(depth).1);
            if first != on_shadow {
                (on_shadow, begun) = (first, plan.words().rebindings);
            }
            let shadow = match shadows {
                None => None,
                Some(shadows) => {
                    let words = shadows.entries(links.depth(), control.token, depth).ok_or(outside)?;
                    Some(words.get(plan.words().rebindings - begun..).unwrap_or(&[]))
                }
            };
            let (smallest_frame, complete) = (policy.smallest_frame, depth == first);
            let (source_record, pieces) = (source.record(), &[piece]);
            let bounds = Bounds { source: source_record, pieces, complete, smallest_frame, shadow, in_place: true };
            match way {
                Way::Park => plan.add(signer, Walk::new(signer, table, bounds))?,
                Way::Unpark => {
                    let parked = Parked::new(signer, key);
                    plan.add(&parked, Walk::new(&parked, table, bounds))?;
                }
            }
            parts.push(Part { source, low, shadow, end: plan.words() });
            (low, lifted) = (on.fp as usize, on.lifted.then_some(on.bottom));
        }
        drop(reading);
        step(Step::Planned, StepInfo::new(youngest, segment.record(), None, plan))?;
        let mut begin = Words::default();
        for Part { source, low, shadow, end } in parts {
            let record = source.record();
            let words = &plan.rebindings()[begin.rebindings..end.rebindings];
            let details = &plan.details()[begin.details..end.details];
            let signed = &plan.signed()[begin.signed..end.signed];
            // SAFETY: the segment is owned by self, which does not run; the entries were just planned for it, and the stub bounds each by the sealed record.
            unsafe {
                signer.exchange(record, low, words, details, shadow, key, way)?;
                if !signed.is_empty() {
                    signer.exchange_pointers(record, low, signed, key, way)?;
                }
            }
            begin = end;
        }
        Ok(!plan.signed().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_each_key_nothing_is_parked() {
        let all = Domain { ia: 1, ib: 2, da: 3, db: 4, ga: 5, shadow: false };
        let none = Domain { shadow: true, ..Domain::default() };
        for key in [Signing::A, Signing::B] {
            assert_eq!(signs(true, &all, key), Ok(()));
            assert_eq!(signs(false, &none, key), Ok(()), "nothing is signed there");
            let off = [
                Domain { ia: 0, ..all },
                Domain { ib: 0, ..all },
                Domain { da: 0, ..all },
                Domain { db: 0, ..all },
                Domain { ga: 0, ..all },
            ];
            assert!(off.iter().all(|domain| matches!(signs(true, domain, key), Err(Error::Key(_)))));
        }
        assert!(matches!(signs(true, &all, Signing::None), Err(Error::Key(_))));
        assert_eq!(signs(false, &none, Signing::None), Ok(()));
    }
}
