//! The embedder's numbers: how small a stack starts, how far it grows, what it keeps in reserve.

use crate::error::Error;
use crate::segment::page_size;

/// How one stack behaves. All sizes in bytes. The default starts at one page and goes to 64 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Size of the first data segment. A multiple of the page size.
    pub initial: usize,
    /// Largest data segment. A multiple of the page size, not below `initial`.
    pub maximum: usize,
    /// Bytes of data segments that a shadow segment is made for, where there is a shadow stack: it takes 8 / `smallest_frame` of that for return
    /// addresses. Not below `initial`; from `maximum` on all of `maximum`, the default: 32 MiB of addresses, not of memory. With less a stack takes few
    /// addresses, frames move no further than this ([`Error::ShadowRoom`]), and calls by [`link`](crate::engine::Stubs::link) go on, on a further
    /// shadow segment. A first data segment that is asked to be larger has a shadow segment for all of it.
    pub shadowed: usize,
    /// How many times as large as the segment before each new one is: from 2 to 16.
    pub growth: usize,
    /// The same for segments of `large` bytes and more: what is mapped and not used takes addresses, not memory, and what moves costs time.
    /// From 2 to 16.
    pub growth_large: usize,
    /// See `growth_large`.
    pub large: usize,
    /// Spans from this size on move by page tables instead of being copied, where the system can (Linux 5.7). Meanwhile signals
    /// are held back, but for faults: a handler would not find the frames.
    pub move_pages: usize,
    /// Segments from this size on that a stack has grown to use huge pages where the system has them on offer (Linux: `madvise` or `always`
    /// in /sys/kernel/mm/transparent_hugepage/enabled): the first touch of 2 MiB brings all of it.
    pub huge_pages: usize,
    /// A segment is too large when the frames on it take less than one part in so many: then `compact` moves them to a smaller one. More than
    /// `growth` and `growth_large`, so that a stack which has just grown is not too large at once.
    pub shrink_below: usize,
    /// Bytes that a stack keeps free when it shrinks, besides `reserve`, so that it need not grow again at its next call. Less than `maximum`.
    pub keep: usize,
    /// Room below the limit that managed code may use unchecked: its largest frame without an entry thunk,
    /// leaves that do not check, and the frames of the stubs, which take up to 160 bytes. At least that and at most half of `initial`.
    pub reserve: usize,
    /// Inaccessible bytes below every segment. A multiple of the page size, larger than the largest frame that is
    /// written to before its function checks.
    pub guard: usize,
    /// Smallest frame of managed code, frame record included: it bounds the shadow stack (law 2). At least 16.
    pub smallest_frame: usize,
    /// Shadow-stack bytes kept for signal handlers and the stubs.
    pub shadow_reserve: usize,
    /// Linked segments that are kept when a run ends. While it goes on all are.
    pub warm: usize,
    /// A stack that has more bytes than this in its present segment grows by lifting: its youngest frames alone move to a further segment, if a
    /// frame below them takes its stack pointer back by itself ([`FrameLayout::retakes_sp`](crate::codemap::FrameLayout::retakes_sp)).
    pub lift_above: usize,
    /// The least bytes of frames that are lifted, up to four times as many. A call that goes to and fro over less than that moves nothing.
    pub lift_bytes: usize,
    /// Move the whole span at every check, old segment inaccessible: finds each pointer into the stack that
    /// hides in a frame. For tests.
    pub relocate_always: bool,
    /// Leave a moved-from segment inaccessible until the stack next moves or ends its run, so that a stale pointer faults. With
    /// `relocate_always` likewise.
    pub poison: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            initial: page_size(),
            maximum: 64 << 20,
            shadowed: usize::MAX,
            growth: 2,
            growth_large: 8,
            large: 64 << 10,
            move_pages: 64 << 10,
            huge_pages: 4 << 20,
            shrink_below: 9,
            keep: 1024,
            reserve: 1024,
            guard: page_size().max(64 << 10),
            smallest_frame: 16,
            shadow_reserve: 4096,
            warm: 1,
            lift_above: 1 << 20,
            lift_bytes: 16 << 10,
            relocate_always: false,
            poison: false,
        }
    }
}

/// Bytes of a frame record: no frame is smaller.
const SMALLEST_RECORD: usize = 16;

/// Words of a shadow segment besides those of frames: the token, and what lies below the oldest return address of a further one.
const SHADOW_WORDS: usize = 2;

/// What the stubs take below the limit, at most: `link`'s thunk, its frame and that of `grow`, on arm64.
pub(crate) const LEAST_RESERVE: usize = 160;

/// Largest stack that may be asked for: above it, sizes derived from it could wrap.
const LARGEST: usize = 1 << 40;

/// Largest factor of growth.
const LARGEST_FACTOR: usize = 16;

impl Policy {
    /// Checks the numbers against each other and against the page size.
    ///
    /// # Errors
    /// [`Error::Policy`] names the first rule that is broken.
    pub fn validate(&self, page: usize) -> Result<(), Error> {
        let rule = |holds: bool, rule: &'static str| if holds { Ok(()) } else { Err(Error::Policy(rule)) };
        rule(self.initial != 0, "`initial` is 0; the smallest stack is one page")?;
        rule(self.initial.is_multiple_of(page), "`initial` is not a multiple of the page size")?;
        rule(self.maximum.is_multiple_of(page), "`maximum` is not a multiple of the page size")?;
        rule(self.maximum >= self.initial, "`maximum` is below `initial`")?;
        rule(self.maximum <= LARGEST, "`maximum` is above 1 TiB")?;
        rule(
            self.shadowed >= self.initial,
            "`shadowed` is below `initial`: the first data segment would have no shadow room",
        )?;
        rule(
            self.guard != 0 && self.guard.is_multiple_of(page) && self.guard <= LARGEST,
            "`guard` is not a positive multiple of the page size up to 1 TiB",
        )?;
        rule((2..=LARGEST_FACTOR).contains(&self.growth), "`growth` is not a factor from 2 to 16")?;
        rule((2..=LARGEST_FACTOR).contains(&self.growth_large), "`growth_large` is not a factor from 2 to 16")?;
        rule(
            self.shrink_below > self.growth.max(self.growth_large),
            "`shrink_below` is not above `growth` and `growth_large`: a stack would be too large as soon as it has grown",
        )?;
        rule(self.keep < self.maximum, "`keep` is not below `maximum`")?;
        rule(self.reserve >= LEAST_RESERVE, "`reserve` is below 160 bytes, the stubs' own need")?;
        rule(self.reserve <= self.initial / 2, "`reserve` is more than half of `initial`")?;
        rule(self.lift_bytes >= 256, "`lift_bytes` is below 256 bytes")?;
        rule(self.smallest_frame >= 16, "`smallest_frame` is below 16, a frame record")?;
        rule(
            self.shadow_reserve >= 512 && self.shadow_reserve <= LARGEST,
            "`shadow_reserve` is not between 512 bytes and 1 TiB",
        )
    }

    /// Shadow-stack bytes that a data segment of `data` bytes may need: law 2. `grow` refuses frames below
    /// `smallest_frame`, but nothing looks at those in the first segment: there every frame may be a record alone.
    pub(crate) fn shadow_need(&self, data: usize) -> usize {
        let frames = (data / self.smallest_frame).max(self.initial / SMALLEST_RECORD);
        frames.saturating_add(SHADOW_WORDS).saturating_mul(8).saturating_add(self.shadow_reserve)
    }

    /// Shadow-stack bytes of a shadow segment that begins with a data segment of `data` bytes.
    pub(crate) fn shadow_size(&self, data: usize) -> usize {
        self.shadow_need(data.max(self.shadowed.min(self.maximum)))
    }

    /// The most bytes of data segments that `room` shadow-stack bytes suffice for: the other way round.
    pub(crate) fn shadow_fits(&self, room: usize) -> usize {
        let words = (room.saturating_sub(self.shadow_reserve) / 8).saturating_sub(SHADOW_WORDS);
        if words < self.initial / SMALLEST_RECORD {
            return 0;
        }
        words.saturating_mul(self.smallest_frame).saturating_add(self.smallest_frame - 1)
    }

    /// The size to grow to from `present` when `needed` bytes must fit: so many times as large, and again.
    ///
    /// # Errors
    /// [`Error::Overflow`] when the maximum is too small.
    pub(crate) fn next_size(&self, present: usize, needed: usize) -> Result<usize, Error> {
        if needed > self.maximum {
            return Err(Error::Overflow { needed, maximum: self.maximum });
        }
        let factor = |size: usize| if size < self.large { self.growth } else { self.growth_large };
        let mut size = present.saturating_mul(factor(present));
        while size < needed {
            size = size.saturating_mul(factor(size));
        }
        Ok(size.min(self.maximum))
    }

    /// The smallest size that `needed` bytes fit in.
    ///
    /// # Errors
    /// [`Error::Overflow`] when the maximum is too small.
    #[cfg_attr(not(cfi_stack_native), allow(dead_code, reason = "there are no stacks here"))]
    pub(crate) fn fitting(&self, needed: usize) -> Result<usize, Error> {
        if needed > self.maximum {
            return Err(Error::Overflow { needed, maximum: self.maximum });
        }
        Ok(needed.next_multiple_of(page_size()).max(self.initial).min(self.maximum))
    }

    /// Whether a segment of `present` bytes is too large for frames of `used` bytes.
    #[cfg_attr(not(cfi_stack_native), allow(dead_code, reason = "there are no stacks here"))]
    pub(crate) fn is_too_large(&self, present: usize, used: usize) -> bool {
        used < present / self.shrink_below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn default_is_valid() {
        assert_eq!(Policy::default().validate(PAGE), Ok(()));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for initial in [0, 1, 4095, usize::MAX] {
            let policy = Policy { initial, ..Policy::default() };
            assert!(matches!(policy.validate(PAGE), Err(Error::Policy(_))), "initial {initial}");
        }
        for maximum in [0, 1, 2048, usize::MAX, usize::MAX & !4095] {
            let policy = Policy { maximum, ..Policy::default() };
            assert!(matches!(policy.validate(PAGE), Err(Error::Policy(_))), "maximum {maximum}");
        }
        for guard in [0, 1, usize::MAX] {
            assert!(Policy { guard, ..Policy::default() }.validate(PAGE).is_err(), "guard {guard}");
        }
        for reserve in [0, 64, LEAST_RESERVE - 1, 2049, usize::MAX] {
            assert!(Policy { reserve, ..Policy::default() }.validate(PAGE).is_err(), "reserve {reserve}");
        }
        assert_eq!(Policy { reserve: LEAST_RESERVE, ..Policy::default() }.validate(PAGE), Ok(()));
        for smallest_frame in [0, 15] {
            assert!(Policy { smallest_frame, ..Policy::default() }.validate(PAGE).is_err());
        }
    }

    #[test]
    fn each_rule_is_named() {
        let fine = Policy::default();
        let broken = [
            (Policy { initial: 0, ..fine }, "`initial` is 0"),
            (Policy { initial: PAGE + 16, ..fine }, "`initial` is not a multiple"),
            (Policy { maximum: fine.maximum + 16, ..fine }, "`maximum` is not a multiple"),
            (Policy { initial: 4 * PAGE, maximum: 2 * PAGE, ..fine }, "`maximum` is below `initial`"),
            (Policy { maximum: LARGEST + PAGE, ..fine }, "`maximum` is above 1 TiB"),
            (Policy { guard: LARGEST + PAGE, ..fine }, "`guard` is not"),
            (Policy { shadowed: PAGE - 1, ..fine }, "`shadowed` is below"),
            (Policy { growth: 1, ..fine }, "`growth` is not"),
            (Policy { growth_large: 17, shrink_below: 99, ..fine }, "`growth_large` is not"),
            (Policy { shrink_below: 4, ..fine }, "`shrink_below` is not"),
            (Policy { keep: fine.maximum, ..fine }, "`keep` is not"),
            (Policy { reserve: LEAST_RESERVE - 1, ..fine }, "`reserve` is below"),
            (Policy { reserve: PAGE / 2 + 1, ..fine }, "`reserve` is more than half"),
            (Policy { lift_bytes: 255, ..fine }, "`lift_bytes` is below"),
            (Policy { smallest_frame: 15, ..fine }, "`smallest_frame` is below"),
            (Policy { shadow_reserve: 511, ..fine }, "`shadow_reserve` is not"),
            (Policy { shadow_reserve: LARGEST + 1, ..fine }, "`shadow_reserve` is not"),
        ];
        for (policy, rule) in broken {
            let named = policy.validate(PAGE);
            assert!(matches!(named, Err(Error::Policy(text)) if text.starts_with(rule)), "{rule}: {named:?}");
        }
    }

    #[test]
    fn growth_doubles_to_the_maximum_and_no_further() {
        let policy = Policy { maximum: 20 << 10, ..Policy::default() };
        assert_eq!(policy.next_size(4096, 5000), Ok(8192));
        assert_eq!(policy.next_size(4096, 9000), Ok(16384));
        assert_eq!(policy.next_size(16384, 20000), Ok(20 << 10));
        assert_eq!(policy.next_size(16384, 20481), Err(Error::Overflow { needed: 20481, maximum: 20480 }));
        assert!(policy.next_size(16384, usize::MAX).is_err());
    }

    #[test]
    fn growth_takes_the_embedders_factor() {
        let policy = Policy { growth: 8, growth_large: 8, shrink_below: 9, ..Policy::default() };
        assert_eq!(policy.validate(PAGE), Ok(()));
        assert_eq!(policy.next_size(4096, 5000), Ok(32768));
        assert_eq!(policy.next_size(4096, 32769), Ok(262_144));
        assert_eq!(policy.next_size(usize::MAX / 2, 64 << 20), Ok(64 << 20));
    }

    #[test]
    fn contradicting_numbers_are_refused() {
        for (growth, shrink_below, keep) in [
            (0, 4, 0),
            (1, 4, 0),
            (17, 32, 0),
            (usize::MAX, usize::MAX, 0),
            (2, 0, 0),
            (2, 2, 0),
            (8, 8, 0),
            (8, 4, 0),
            (2, 4, 64 << 20),
            (2, 4, usize::MAX),
        ] {
            let policy = Policy { growth, growth_large: 2, shrink_below, keep, ..Policy::default() };
            assert!(matches!(policy.validate(PAGE), Err(Error::Policy(_))), "{policy:?}");
            let policy = Policy { growth: 2, growth_large: growth, shrink_below, keep, ..Policy::default() };
            assert!(matches!(policy.validate(PAGE), Err(Error::Policy(_))), "{policy:?}");
        }
    }

    #[test]
    fn large_segments_grow_faster() {
        let policy = Policy { large: 8192, maximum: 1 << 20, ..Policy::default() };
        assert_eq!(policy.next_size(4096, 5000), Ok(8192));
        assert_eq!(policy.next_size(8192, 9000), Ok(64 << 10));
        assert_eq!(policy.next_size(4096, 9000), Ok(64 << 10));
        assert_eq!(policy.next_size(512 << 10, 600 << 10), Ok(1 << 20));
    }

    #[test]
    fn fitting_sizes_are_whole_pages_within_bounds() {
        let page = page_size();
        let policy = Policy { initial: 2 * page, maximum: 8 * page, ..Policy::default() };
        assert_eq!(policy.fitting(0), Ok(2 * page));
        assert_eq!(policy.fitting(2 * page + 1), Ok(3 * page));
        assert_eq!(policy.fitting(8 * page), Ok(8 * page));
        for needed in [8 * page + 1, usize::MAX, usize::MAX - page] {
            assert_eq!(policy.fitting(needed), Err(Error::Overflow { needed, maximum: 8 * page }));
        }
    }

    #[test]
    fn what_has_just_grown_is_not_too_large() {
        for growth in 2..=16 {
            let policy = Policy { growth, growth_large: growth, shrink_below: growth + 1, ..Policy::default() };
            for used in [4096, 5000, 1 << 20] {
                let size = policy.next_size(used, used + 1024).unwrap();
                assert!(!policy.is_too_large(size, used), "{growth} {used}");
            }
        }
    }

    #[test]
    fn shadow_need_covers_one_return_address_per_smallest_frame() {
        let policy = Policy::default();
        assert!(policy.shadow_need(1 << 20) >= (1 << 20) / 16 * 8 + policy.shadow_reserve);
    }

    #[test]
    fn what_a_shadow_segment_fits_needs_no_more() {
        for smallest_frame in [16, 48, 100, 4096] {
            let policy = Policy { smallest_frame, ..Policy::default() };
            for room in (0..1 << 16).step_by(8) {
                let data = policy.shadow_fits(room);
                assert!(data == 0 || policy.shadow_need(data) <= room, "{smallest_frame} {room}");
                let more = data + 1;
                assert!(policy.shadow_need(more.max(policy.initial)) > room, "{smallest_frame} {room}");
            }
            for data in [4096, 8192, 1 << 20] {
                assert!(policy.shadow_fits(policy.shadow_need(data)) >= data);
            }
        }
    }

    #[test]
    fn shadow_segments_are_as_large_as_asked_for() {
        let policy = Policy::default();
        assert_eq!(policy.shadow_size(policy.initial), policy.shadow_need(policy.maximum));
        let small = Policy { shadowed: 2 * policy.initial, ..policy };
        assert_eq!(small.validate(PAGE), Ok(()));
        assert_eq!(small.shadow_size(policy.initial), small.shadow_need(2 * policy.initial));
        assert_eq!(small.shadow_size(16 * policy.initial), small.shadow_need(16 * policy.initial));
        for shadowed in [0, 8, policy.initial - 1] {
            assert!(matches!(Policy { shadowed, ..policy }.validate(PAGE), Err(Error::Policy(_))), "{shadowed}");
        }
    }
}
