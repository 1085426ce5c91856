//! Pictures of this process's own stacks.

use super::{Kind, Owner, State, lease, slot, stack, svg};
use crate::coroutine::{Coroutine, CoroutineResult};
use crate::policy::Policy;
use crate::pool;
use crate::stack::Stack;
use crate::thread::Thread;

#[test]
fn an_idle_stack_is_empty() {
    let thread = Thread::attach().unwrap();
    let policy = Policy::default();
    let picture = stack(&Stack::new(&thread, policy).unwrap());
    assert_eq!((picture.kind, picture.state), (Kind::Growable, State::Idle));
    assert_eq!(picture.frames().count(), 0);
    assert!(picture.is_complete());
    let [segment] = &picture.segments[..] else { panic!("{picture}") };
    assert_eq!((segment.size(), segment.used, segment.guard), (policy.initial, 0, policy.guard));
    assert_eq!(segment.limit, Some(segment.base + policy.reserve));
    assert_eq!(picture.shadow.is_some(), thread.domain().shadow);
    assert!(svg::picture(&picture).contains("free: "));
}

#[test]
fn a_leased_stack_has_its_bounds() {
    let stack = pool::lease(20_000).unwrap();
    let picture = lease(&stack);
    assert_eq!((picture.kind, picture.state), (Kind::Pooled, State::Idle));
    let segment = &picture.segments[0];
    assert_eq!((segment.base, segment.top, segment.used), (stack.base(), stack.top(), 0));
    assert!(segment.guard != 0 && segment.limit.is_none());
    assert_eq!(picture.shadow.map(|shadow| shadow.entries), stack.has_shadow().then_some(Some(0)));
}

#[test]
fn what_is_suspended_is_native_and_stays() {
    let before: Vec<_> = pool::suspended().collect();
    let mut coroutine = Coroutine::new(|yielder, big: [u64; 100]| {
        let kept = std::hint::black_box(big);
        yielder.suspend(());
        std::hint::black_box(kept)[7]
    });
    assert_eq!(coroutine.resume([7; 100]), CoroutineResult::Yield(()));
    let pictures = pool::suspended().filter(|slot| !before.contains(slot));
    // SAFETY: other tests may give theirs back meanwhile, but nothing of a slot is unmapped, and nothing on the stack is read.
    let pictures: Vec<_> = pictures.filter_map(|at| unsafe { slot(at) }).collect();
    // Other tests have coroutines too.
    let fits = |bytes: usize| (800..64 << 10).contains(&bytes);
    let found = pictures.iter().find(|picture| picture.segments.iter().any(|segment| fits(segment.used)));
    let picture = found.unwrap_or_else(|| panic!("{pictures:?}"));
    assert_eq!(picture.state, State::Suspended);
    let frame = picture.frames().next().expect("it has frames");
    assert_eq!(frame.owner, Owner::Native);
    assert!(frame.obstacle.is_some() && !picture.is_movable());
    assert!(picture.to_string().contains("native frames stay where they are"), "{picture}");
    assert_eq!(coroutine.resume([0; 100]), CoroutineResult::Return(7));
}

#[test]
fn what_is_no_slot_has_no_picture() {
    let mut word = 0_u64;
    let at = std::ptr::NonNull::from(&mut word).cast();
    // SAFETY: no memory of what the directory does not know is looked at.
    assert!(unsafe { slot(at) }.is_none());
}
