//! The sites and what their calls have used, and what is read out of it.

use super::Site;
use crate::error::Error;
use crate::pac::RawPc;
use crate::policy::{LEAST_RESERVE, Policy};
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Powers of two that a histogram has.
const POWERS: usize = 31;

/// One site. Whoever makes it [`WRITING`] fills `address` and `length`, and nobody changes them afterwards.
struct Entry {
    state: AtomicU8,
    /// Return address, or address of the name.
    address: AtomicUsize,
    /// Bytes of the name; [`CODE`] for a return address.
    length: AtomicUsize,
    calls: AtomicU64,
    clipped: AtomicU64,
    most: AtomicUsize,
    histogram: [AtomicU32; POWERS],
}

const EMPTY: u8 = 0;
const WRITING: u8 = 1;
const READY: u8 = 2;
/// [`Entry::length`] of a return address: no name is so long.
const CODE: usize = usize::MAX;

/// Sites, found by their words: open addressing.
pub(super) struct Table<const SITES: usize> {
    entries: [Entry; SITES],
    /// Measured calls that found no room.
    lost: AtomicU64,
}

/// The process's.
pub(super) static TABLE: Table<512> = Table::new();

impl Site {
    fn words(self) -> (usize, usize) {
        match self {
            Site::Named(name) => (name.as_ptr().expose_provenance(), name.len()),
            Site::Code(pc) => (pc.address(), CODE),
        }
    }

    /// # Safety
    /// The words are [`Site::words`] of a site.
    unsafe fn from_words((address, length): (usize, usize)) -> Site {
        if length == CODE {
            return Site::Code(RawPc::new(address));
        }
        let name = std::ptr::with_exposed_provenance(address);
        // SAFETY: the caller's: these are the bytes of a `&'static str`.
        Site::Named(unsafe { std::str::from_utf8_unchecked(std::slice::from_raw_parts(name, length)) })
    }
}

impl Entry {
    const fn new() -> Entry {
        Entry {
            state: AtomicU8::new(EMPTY),
            address: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            calls: AtomicU64::new(0),
            clipped: AtomicU64::new(0),
            most: AtomicUsize::new(0),
            histogram: [const { AtomicU32::new(0) }; POWERS],
        }
    }

    fn words(&self) -> (usize, usize) {
        (self.address.load(Ordering::Relaxed), self.length.load(Ordering::Relaxed))
    }

    fn note(&self, used: usize, painted: usize) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.clipped.fetch_add(u64::from(used >= painted), Ordering::Relaxed);
        self.most.fetch_max(used, Ordering::Relaxed);
        self.histogram[power(used)].fetch_add(1, Ordering::Relaxed);
    }

    fn add_to(&self, usage: &mut Usage) {
        usage.calls += self.calls.load(Ordering::Relaxed);
        usage.clipped += self.clipped.load(Ordering::Relaxed);
        usage.most = usage.most.max(self.most.load(Ordering::Relaxed));
        for (sum, count) in usage.histogram.iter_mut().zip(&self.histogram) {
            *sum += u64::from(count.load(Ordering::Relaxed));
        }
    }
}

/// The power of two that a number of bytes counts under: the least that is not below it.
fn power(bytes: usize) -> usize {
    ((usize::BITS - bytes.saturating_sub(1).leading_zeros()) as usize).min(POWERS - 1)
}

impl<const SITES: usize> Table<SITES> {
    pub(super) const fn new() -> Self {
        Table { entries: [const { Entry::new() }; SITES], lost: AtomicU64::new(0) }
    }

    /// The entry of a site, a new one if there is none yet. Async-signal-safe: it waits for nobody. An entry that another
    /// thread is just making is passed over, so that a site can have two, which the report adds up.
    fn entry(&self, site: Site) -> Option<&Entry> {
        let words = site.words();
        let first = (words.0 ^ words.0 >> 9).wrapping_mul(0x9e37_79b9) % SITES;
        let (behind, before) = self.entries.split_at(first);
        before.iter().chain(behind).find(|entry| {
            match entry.state.compare_exchange(EMPTY, WRITING, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    entry.address.store(words.0, Ordering::Relaxed);
                    entry.length.store(words.1, Ordering::Relaxed);
                    entry.state.store(READY, Ordering::Release);
                    true
                }
                Err(state) => state == READY && entry.words() == words,
            }
        })
    }

    /// Notes one measured call.
    pub(super) fn note(&self, site: Site, used: usize, painted: usize) {
        match self.entry(site) {
            Some(entry) => entry.note(used, painted),
            None => _ = self.lost.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// What was noted.
    pub(super) fn report(&self) -> Report {
        let mut sites: Vec<Usage> = Vec::new();
        let ready = |entry: &&Entry| entry.state.load(Ordering::Acquire) == READY;
        for entry in self.entries.iter().filter(ready).filter(|entry| entry.calls.load(Ordering::Relaxed) != 0) {
            // SAFETY: the entry is ready, so these are the words of a site.
            let site = unsafe { Site::from_words(entry.words()) };
            // One name can stand at two addresses, and one site have two entries.
            let known = sites.iter().position(|usage| usage.site == site).unwrap_or_else(|| {
                sites.push(Usage { site, calls: 0, clipped: 0, most: 0, histogram: [0; POWERS] });
                sites.len() - 1
            });
            entry.add_to(&mut sites[known]);
        }
        sites.sort_by(|a, b| b.most.cmp(&a.most).then(a.site.cmp(&b.site)));
        Report { sites, lost: self.lost.load(Ordering::Relaxed) }
    }

    /// Sets all counts to 0. The sites keep their places.
    pub(super) fn forget(&self) {
        self.lost.store(0, Ordering::Relaxed);
        for entry in &self.entries {
            entry.calls.store(0, Ordering::Relaxed);
            entry.clipped.store(0, Ordering::Relaxed);
            entry.most.store(0, Ordering::Relaxed);
            entry.histogram.iter().for_each(|count| count.store(0, Ordering::Relaxed));
        }
    }
}

/// What the calls of one site have used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The site.
    pub site: Site,
    /// Calls that were measured.
    pub calls: u64,
    /// Of those: calls that have used all that was looked at, and perhaps more.
    pub clipped: u64,
    /// Bytes that the hungriest call has used.
    pub most: usize,
    /// How many calls have used at most 2^i bytes, and more than 2^(i−1); the last one also counts those above.
    pub histogram: [u64; POWERS],
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The sites, the hungriest first.
    pub sites: Vec<Usage>,
    /// Measured calls of further sites, for which there was no room.
    pub lost: u64,
}

impl Report {
    /// Bytes that the hungriest call has used; 0 when none was measured.
    pub fn most(&self) -> usize {
        self.sites.iter().map(|usage| usage.most).max().unwrap_or(0)
    }

    /// Whether every figure is one that nothing has cut off.
    pub fn is_complete(&self) -> bool {
        self.lost == 0 && self.sites.iter().all(|usage| usage.clipped == 0)
    }
}

/// A table of the hungriest sites, at most as many as the precision says (`{:.20}`; 10 otherwise).
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = f.precision().unwrap_or(10).min(self.sites.len());
        writeln!(f, "{:>9} {:>9} {:>8}  {:<24}  calls by bytes", "bytes", "calls", "clipped", "site")?;
        for usage in &self.sites[..shown] {
            write!(f, "{:>9} {:>9} {:>8}  {:<24} ", usage.most, usage.calls, usage.clipped, usage.site)?;
            for (power, count) in usage.histogram.iter().enumerate().filter(|(_, count)| **count != 0) {
                write!(f, " ≤{}:{count}", 1_u64 << power)?;
            }
            writeln!(f)?;
        }
        if shown < self.sites.len() {
            writeln!(f, "and {} sites more", self.sites.len() - shown)?;
        }
        if self.lost != 0 {
            writeln!(f, "{} calls of further sites, for which the table has no room", self.lost)?;
        }
        Ok(())
    }
}

impl Policy {
    /// This policy with the reserve that the report asks for: what the hungriest site has used and `margin` bytes, rounded up to 16. The
    /// margin is for what was not seen, and for what managed code itself takes below the limit before it calls.
    ///
    /// # Errors
    /// [`Error::Policy`] when the report has no site or is cut off ([`Report::is_complete`]), or the policy with that reserve is not valid: it may need a
    /// larger `initial`.
    pub fn reserve_from(self, report: &Report, margin: usize) -> Result<Policy, Error> {
        if report.sites.is_empty() {
            return Err(Error::Policy("a reserve from a report in which nothing was measured"));
        }
        if !report.is_complete() {
            return Err(Error::Policy("a reserve from figures that were cut off: measure with a larger `window`"));
        }
        let reserve = report
            .most()
            .checked_add(margin)
            .and_then(|bytes| bytes.checked_next_multiple_of(16))
            .ok_or(Error::Policy("`reserve` with that margin is larger than any stack"))?;
        // The stubs' own need.
        let policy = Policy { reserve: reserve.max(LEAST_RESERVE), ..self };
        policy.validate(crate::segment::page_size())?;
        Ok(policy)
    }
}
