//! What callers get wrong about link calls, and what is evidence of tampering.

use super::*;
use crate::segment::write_word;

const CALLEE: RawPc = RawPc::new(0x5000);

fn policy() -> Policy {
    let page = page_size();
    Policy { maximum: 4 * page, guard: page, reserve: page / 4, ..Policy::default() }
}

fn segment(policy: &Policy) -> Segment {
    Segment::map(policy.initial, policy.guard, 1, 1).expect("there is memory")
}

/// Writes what `grow` and `link` leave on the segment: grow's record, link's above it, the thunk's above that, so many bytes below the top. Returns
/// grow's.
fn called(segment: &Segment, thunk_below: usize) -> usize {
    let thunk = segment.record().top - thunk_below;
    let link = thunk - 16;
    let grow = link - 96;
    // SAFETY: words of the segment, which nothing runs on.
    unsafe {
        write_word(link, thunk as u64);
        write_word(grow, link as u64);
    }
    grow
}

fn refused(result: Result<bool, Refusal>) -> &'static str {
    match result {
        Err(Refusal::Error(Error::Size { rule, .. })) => rule,
        Err(Refusal::Tampered(Tampered { evidence, .. })) => evidence,
        other => panic!("{other:?}"),
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let rule = |arguments, results, need| match LinkCall::new(CALLEE, arguments, results, need) {
        Err(Error::Size { rule, .. }) => rule,
        other => panic!("{other:?}"),
    };
    for odd in [1, 4, 12, !0] {
        assert!(rule(odd, 0, 0).contains("stack arguments come in multiples of 8"));
        assert!(rule(0, odd, 0).contains("stack results come in multiples of 8"));
    }
    for (arguments, results, need) in [(!7, 0, 0), (0, !7, 0), (16, 0, !15), (8, 16, !0), (0, 8, !0 - 14)] {
        assert_eq!(rule(arguments, results, need), TOO_LARGE, "{arguments} {results} {need}");
    }
    let largest = LinkCall::new(CALLEE, 8, 0, !0 - 16).expect("one byte less than 4 GiB");
    assert_eq!((largest.area, largest.total, largest.check()), (16, !0, Ok(())));
}

#[test]
fn calls_that_are_no_calls_are_refused() {
    let policy = policy();
    let (mut links, mut current) = (Links::default(), segment(&policy));
    let grow = called(&current, 64);
    let right = LinkCall::new(CALLEE, 16, 32, 100).expect("possible sizes");
    let mut prepare = |links: &mut Links, call: *const LinkCall| links.prepare(&mut current, &policy, None, grow, call);
    assert!(refused(prepare(&mut links, std::ptr::null())).contains("8-byte aligned"));
    assert!(refused(prepare(&mut links, (&raw const right).wrapping_byte_add(4))).contains("8-byte aligned"));
    for wrong in [
        LinkCall { area: 8, ..right },
        LinkCall { area: 24, ..right },
        LinkCall { area: 16, ..right },
        LinkCall { total: 16, ..right },
        LinkCall { arguments: 4, ..right },
        LinkCall { results: 17, ..right },
        LinkCall { arguments: 40, ..right },
    ] {
        assert!(refused(prepare(&mut links, &wrong)).contains("contradict"), "{wrong:?}");
    }
    let outside = LinkCall::new(CALLEE, 64, 0, 0).expect("possible sizes");
    assert!(refused(prepare(&mut links, &outside)).contains("not in the segment of its caller"));
    let huge = LinkCall::new(CALLEE, 0, 0, 1 << 20).expect("possible sizes");
    let got = prepare(&mut links, &huge);
    assert!(matches!(got, Err(Refusal::Error(Error::Overflow { maximum, .. })) if maximum == policy.maximum));
    assert!(links.next().is_none(), "nothing was made");
    assert_eq!(prepare(&mut links, &right), Ok(true));
    assert_eq!(prepare(&mut links, &right), Ok(false), "the one that is there does");
}

#[test]
fn records_and_stack_pointers_elsewhere_are_evidence() {
    let policy = policy();
    let (mut links, mut current) = (Links::default(), segment(&policy));
    let call = LinkCall::new(CALLEE, 0, 0, 0).expect("possible sizes");
    let grow = called(&current, 64);
    for frame in [0, grow, grow + 8, current.record().top, usize::MAX & !15] {
        // SAFETY: as in `called`.
        unsafe { write_word(grow, frame as u64) };
        assert!(
            refused(links.prepare(&mut current, &policy, None, grow, &call)).contains("outside its segment"),
            "{frame:#x}"
        );
    }
    let grow = called(&current, 64);
    assert_eq!(links.prepare(&mut current, &policy, None, grow, &call), Ok(true));
    let behind = links.next().map(|segment| segment.record().extent()).expect("it was made");
    for sp in [0, behind.top, current.record().top, usize::MAX - 15] {
        let evidence = links.settle(&mut current, sp).map_err(|tampered| tampered.evidence);
        assert_eq!(evidence, Err("the stack pointer is outside the stack"), "{sp:#x}");
    }
    assert_eq!(links.settle(&mut current, behind.top - 16), Ok(true));
    assert_eq!(current.record().base, behind.base);
    assert!(links.base(&current).is_some_and(|base| base.fp == 0), "nothing has linked to it");
    assert_eq!(links.settle(&mut current, behind.top - 16), Ok(false));
    assert_eq!(links.settle(&mut current, grow), Ok(true));
    // A rewritten record behind the current one is not gone to.
    let Some(next) = links.newer.last_mut() else { panic!("it is kept") };
    next.record_mut().previous = std::ptr::null();
    assert!(refused(links.prepare(&mut current, &policy, None, grow, &call)).contains("is not this one's"));
}

#[test]
fn what_is_kept_behind_leaves_room_for_what_grows() {
    let policy = policy();
    let (mut links, mut current) = (Links::default(), segment(&policy));
    let call = LinkCall::new(CALLEE, 0, 0, 0).expect("possible sizes");
    let grow = called(&current, 64);
    assert_eq!(links.prepare(&mut current, &policy, None, grow, &call), Ok(true));
    assert_eq!(links.next().map(|next| next.record().size()), Some(2 * page_size()));
    let mut grow_to = |links: &mut Links, pages: usize| {
        let larger = Segment::map(pages * page_size(), policy.guard, 1, 1).expect("there is memory");
        let old = std::mem::replace(&mut current, larger);
        links.moved(&old, &mut current, &policy);
        current.record().next.is_null()
    };
    assert!(!grow_to(&mut links, 2), "both fit");
    assert!(grow_to(&mut links, 4) && links.next().is_none(), "together they are larger than the maximum");
}
