//! Numbers that embedders give: a policy is refused or it works, whatever is asked of its stack; a link call is refused or its words go together.

#![no_main]

use cfi_stack::engine::LinkCall;
use cfi_stack::pac::RawPc;
use cfi_stack::thread::Thread;
use cfi_stack::{Error, Policy, Stack};
use cfi_stack_fuzz::picker;
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 4096;
/// Largest segment that is really mapped here: an emulated system, or a container, has no more.
const MODEST: usize = 64 << 20;

fuzz_target!(|data: &[u8]| {
    let pick = &mut picker(data);
    link_call(pick);
    let policy = policy(pick);
    let thread = Thread::attach().expect("a thread can be attached");
    let bytes = number(pick);
    match policy.validate(PAGE) {
        Ok(()) => {}
        Err(error) => {
            assert!(matches!(error, Error::Policy(_)), "{error}");
            assert_eq!(Stack::with_size(&thread, policy, bytes).expect_err("it was refused"), error);
            return;
        }
    }
    let wanted = bytes.saturating_add(policy.reserve);
    if policy.initial > MODEST || policy.guard > MODEST || wanted > MODEST && wanted <= policy.maximum {
        return;
    }
    let mut stack = match Stack::with_size(&thread, policy, bytes) {
        Ok(stack) => stack,
        Err(Error::Overflow { needed, maximum }) => {
            assert!(needed == wanted && maximum == policy.maximum && needed > maximum);
            return;
        }
        Err(error) => panic!("{policy:?}, {bytes}: {error}"),
    };
    let fits = |stack: &Stack, room: usize| {
        let size = stack.size();
        assert!(
            size >= room && size >= policy.initial && size <= policy.maximum && size % PAGE == 0,
            "{size} {policy:?}"
        );
    };
    fits(&stack, wanted);
    for _ in 0..pick(4) {
        let more = number(pick);
        let wanted = more.saturating_add(policy.reserve);
        if wanted > MODEST / 16 && wanted <= policy.maximum {
            continue;
        }
        match stack.reserve(more) {
            Ok(()) => fits(&stack, wanted),
            Err(Error::Overflow { needed, maximum }) => assert!(needed > maximum && maximum == policy.maximum),
            Err(error) => panic!("{policy:?}, reserve {more}: {error}"),
        }
        if pick(2) == 0 {
            let before = stack.size();
            let shrunk = if pick(2) == 0 { stack.compact() } else { stack.shrink_to_fit() };
            assert_eq!(shrunk.expect("nothing is on it"), stack.size() < before);
            fits(&stack, policy.reserve);
        }
    }
});

/// Sizes around each limit, and any.
fn number(pick: &mut dyn FnMut(u64) -> u64) -> usize {
    match pick(6) {
        0 => pick(u64::MAX) as usize,
        1 => usize::MAX - pick(3 * PAGE as u64) as usize,
        2 => (1_usize << pick(48)).wrapping_add(pick(3) as usize).wrapping_sub(1),
        3 => pick(64) as usize * PAGE,
        _ => pick(3 * PAGE as u64) as usize,
    }
}

fn policy(pick: &mut dyn FnMut(u64) -> u64) -> Policy {
    let mut policy = Policy::default();
    for _ in 0..pick(6) {
        let number = number(pick);
        match pick(18) {
            0 => policy.initial = number,
            1 => policy.maximum = number,
            2 => policy.growth = pick(20) as usize,
            3 => policy.growth_large = pick(20) as usize,
            4 => policy.large = number,
            5 => policy.move_pages = number,
            6 => policy.huge_pages = number,
            7 => policy.shrink_below = pick(40) as usize,
            8 => policy.keep = number,
            9 => policy.reserve = number,
            10 => policy.guard = number,
            11 => policy.smallest_frame = number,
            12 => policy.shadow_reserve = number,
            13 => policy.warm = number,
            14 => policy.lift_above = number,
            15 => policy.lift_bytes = number,
            16 => policy.shadowed = number,
            _ => policy.poison = true,
        }
    }
    policy
}

fn link_call(pick: &mut dyn FnMut(u64) -> u64) {
    let mut size = || match pick(4) {
        0 => pick(1 << 32),
        1 => (1 << 32) - 1 - pick(64),
        2 => pick(64),
        _ => 8 * pick(512),
    };
    let (arguments, results, need) = (size(), size(), size());
    let area = arguments.max(results).next_multiple_of(16);
    let possible = arguments % 8 == 0 && results % 8 == 0 && area + need < 1 << 32;
    let callee = RawPc::new(0x1000);
    match LinkCall::new(callee, arguments as u32, results as u32, need as u32) {
        Ok(call) => assert!(possible && call.callee() == callee, "{arguments} {results} {need}"),
        Err(error) => {
            assert!(!possible && matches!(error, Error::Size { .. }), "{arguments} {results} {need}: {error}")
        }
    }
}
