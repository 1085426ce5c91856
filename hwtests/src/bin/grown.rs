//! Recursions that grow, for a debugger to look at (`ci/debuggers`): from ever deeper on, hand-made managed functions call `stop_here`. First a
//! stack whose frames are relocated and then lifted to a further segment, then one that goes from segment to segment by links.
//!
//! Ends with status 0 when the results are right, and frames were relocated, lifted and linked.

use cfi_stack::codemap::{FrameLayout, Registration};
use cfi_stack::engine::{self, Activation, LinkCall};
use cfi_stack::pac::{RawPc, Signing};
use cfi_stack::thread::Thread;
use cfi_stack::{Exit, Policy, Stack, Stats};
use cfi_start as _;
use std::error::Error;
use std::hint::black_box;

const ARM: bool = cfg!(target_arch = "aarch64");

unsafe extern "C" {
    fn lift_recurse();
    fn lift_recurse_end();
    fn lift_recurse_site();
    fn lift_recurse_exit_site();
    fn link_recurse();
    fn link_recurse_end();
    fn link_recurse_site();
    fn link_recurse_exit_site();
    fn link_thunk();
    fn link_thunk_end();
    static mut managed_stubs: [usize; 3];
    static mut link_test: [usize; 4];
}

/// What a debugger stops in.
#[inline(never)]
fn stop_here(word: u64) -> u64 {
    black_box(word) + 1
}

/// What the deepest frame calls: `(context, its frame pointer, 0)`.
extern "C" fn at_the_bottom(depth: u64, _: u64, _: u64) -> u64 {
    black_box(stop_here(depth)) - depth - 1
}

fn pc(function: unsafe extern "C" fn()) -> RawPc {
    RawPc::new(function as *const () as usize)
}

/// Adds a function whose frames take `frame_bytes`, with its sites, where it keeps a pointer into the stack.
fn describe(
    map: &mut Registration,
    (start, end): (unsafe extern "C" fn(), unsafe extern "C" fn()),
    layout: FrameLayout,
    sites: &[unsafe extern "C" fn()],
) -> Result<(), cfi_stack::Error> {
    map.function(pc(start), pc(end).address() - pc(start).address(), layout)?;
    sites.iter().try_for_each(|site| map.safepoint(pc(*site), &[-24]))
}

/// Recurses through `function` to each of these depths on one stack, and back.
fn to_each(
    thread: &Thread,
    activation: &Activation,
    policy: Policy,
    function: unsafe extern "C" fn(),
    depths: impl Iterator<Item = usize>,
) -> Result<Stats, Box<dyn Error>> {
    let mut stack = Stack::new(thread, policy)?;
    for depth in depths {
        let bottom = at_the_bottom as extern "C" fn(u64, u64, u64) -> u64 as usize;
        let args = [std::ptr::from_ref(activation).expose_provenance(), depth, bottom, depth];
        // SAFETY: the hand-made functions follow the engine's rules; the thread is this one.
        let exit = unsafe { stack.enter(thread, activation, pc(function), args) }?;
        let expected = Exit::Returned((0..=depth as u64).map(|level| level * 8 + 3).sum());
        if exit != expected {
            return Err(format!("{depth} deep: {exit:x?}, not {expected:x?}").into());
        }
    }
    Ok(stack.stats())
}

fn main() -> Result<(), Box<dyn Error>> {
    let thread = Thread::attach()?;
    let activation = Box::new(Activation::new());
    let stubs = engine::stubs();
    let call: &'static LinkCall = Box::leak(Box::new(LinkCall::new(pc(link_recurse), 0, 0, 1024)?));
    let words = [&raw const *activation as usize, &raw const *call as usize, stubs.link.address(), 0];
    // SAFETY: written once, before any managed function runs.
    unsafe {
        managed_stubs = [stubs.grow.address(), stubs.exit.address(), stubs.leave.address()];
        link_test = words;
    }
    let signing = if ARM { Signing::A } else { Signing::None };
    let frame = FrameLayout::new(if ARM { 64 } else { 48 }, signing);
    let mut map = Registration::new();
    let (lift, link) = ((lift_recurse as _, lift_recurse_end as _), (link_recurse as _, link_recurse_end as _));
    describe(&mut map, lift, frame.retakes_sp(), &[lift_recurse_site, lift_recurse_exit_site])?;
    describe(&mut map, link, frame, &[link_recurse_site, link_recurse_exit_site])?;
    describe(&mut map, (link_thunk, link_thunk_end), FrameLayout::new(0, signing), &[])?;
    let _code = map.publish()?;
    let policy = Policy { initial: 4096, reserve: 1024, maximum: 1 << 20, ..Policy::default() };
    let lifting = Policy { lift_above: 8 << 10, lift_bytes: 1024, ..policy };
    let stats = to_each(&thread, &activation, lifting, lift_recurse, (0..=260).step_by(13))?;
    if stats.growths == 0 || stats.lifts == 0 {
        return Err(format!("frames were not relocated and lifted: {stats:?}").into());
    }
    let stats = to_each(&thread, &activation, policy, link_recurse, (0..=120).step_by(8))?;
    if stats.segments == 0 {
        return Err(format!("nothing was linked: {stats:?}").into());
    }
    Ok(())
}
