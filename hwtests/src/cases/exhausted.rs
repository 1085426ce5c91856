//! A48: growable stacks when the system gives no more: addresses, mappings, memory for shadow stacks. What cannot be is a typed error, the
//! stacks that were there run on, and nothing stays behind.
//!
//! RLIMIT_AS is set so tight that each mapping in turn is the one that fails: segments, shadow stacks, what a growth moves to. The number of
//! mappings of a process is used up for real.

use crate::attack::{DEPTH, Scene, at_every_step, policy, stop};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::managed;
use crate::memory::footprint;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::steps::Step;
use cfi_stack::{Error, Exit, Policy, Stack};
use std::sync::atomic::Ordering::Relaxed;

/// Rounds on this CPU, and on an emulated one.
const ROUNDS: [u64; 2] = [100_000, 2_000];
/// Where the child says that the system takes no such limit, and counts what was refused.
const UNLIMITED: usize = 0;
const REFUSED: usize = 1;

/// A48.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    let emulated = class.is_slow();
    let rounds = ROUNDS[usize::from(emulated)];
    tally.control("", &run(|| Scene::new(policy())?.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::C)));
    let cases = [("RLIMIT_AS, page by page", each_mapping as fn() -> Verdict), ("mappings used up", no_more_mappings)];
    for (what, case) in cases {
        if class.user_mode_emulator {
            tally.say(format!("left out: {what}, because QEMU's user mode applies no limit to the program alone"));
            continue;
        }
        let end = run(case);
        if end.notes[UNLIMITED] == 1 {
            tally.fail(format!("{what}: the kernel did not take the limit"));
        } else {
            tally.attack(what, &end, &[Code::E]);
            tally.say(format!("{what}: {} refused", end.notes[REFUSED]));
        }
    }
    let end = run(|| refused_growths(rounds));
    tally.attack(&format!("{rounds} rounds leak nothing"), &end, &[Code::E]);
    tally.report()
}

/// Sets the limit, or the highest that is allowed. Whether the kernel says so too.
fn limit_addresses(limit: Option<u64>) -> bool {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: asks for and sets a limit of this process.
    unsafe {
        libc::getrlimit(libc::RLIMIT_AS, &mut now);
        let wanted = limit.unwrap_or(now.rlim_max);
        libc::setrlimit(libc::RLIMIT_AS, &libc::rlimit { rlim_cur: wanted, ..now });
        libc::getrlimit(libc::RLIMIT_AS, &mut now);
        now.rlim_cur == wanted
    }
}

/// Bytes of addresses in use.
fn addresses() -> Result<u64, String> {
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let pages: Option<u64> = statm.split_whitespace().next().and_then(|word| word.parse().ok());
    pages.map(|pages| pages * 4096).ok_or("statm says nothing".into())
}

/// What a new stack and its first growth came to.
fn stack_and_growth(scene: &mut Scene) -> Result<Exit, Error> {
    scene.stack = Stack::new(&scene.thread, policy())?;
    scene.recurse(managed::recurse_a(), DEPTH)
}

/// Memory, refused for whatever it was wanted.
fn is_exhaustion(result: &Result<Exit, Error>) -> bool {
    matches!(result, Err(Error::Memory { .. }))
}

/// With one page more each time, until all there is fits.
fn each_mapping() -> Verdict {
    /// More pages than a stack and its growths take, in steps.
    const PAGES: u64 = 1024;
    const STEP: u64 = 16;
    let mut scene = Scene::new(policy())?;
    // What the heap takes once, it has.
    for _ in 0..2 {
        stack_and_growth(&mut scene).map_err(|error| error.to_string())?;
    }
    scene.recurse_right(managed::recurse_a(), 5)?;
    let before = (footprint().0, addresses()?);
    for pages in (0..PAGES).step_by(STEP as usize) {
        if !limit_addresses(Some(before.1 + pages * 4096)) {
            page().notes[UNLIMITED].store(1, Relaxed);
            return Ok(Code::E);
        }
        let result = stack_and_growth(&mut scene);
        // What is there runs on, refused or not.
        let after = scene.recurse(managed::recurse_a(), 5);
        limit_addresses(None);
        if is_exhaustion(&result) {
            page().notes[REFUSED].fetch_add(1, Relaxed);
        } else if result != Ok(Exit::Returned(managed::recursion_sum(DEPTH as u64))) {
            return Err(format!("{pages} pages: {result:x?}"));
        }
        if after != Ok(Exit::Returned(managed::recursion_sum(5))) {
            return Err(format!("{pages} pages, afterwards: {after:x?}"));
        }
    }
    if page().notes[REFUSED].load(Relaxed) == 0 {
        return Err("nothing was refused".into());
    }
    drop(std::mem::replace(&mut scene.stack, Stack::new(&scene.thread, policy()).map_err(|error| error.to_string())?));
    scene.recurse_right(managed::recurse_a(), 5)?;
    let after = (footprint().0, addresses()?);
    // The plan's buffers and a stack that has grown are given back.
    if after.0 > before.0 || after.1 > before.1 {
        return Err(format!("{before:?} mappings and bytes before, {after:?} after"));
    }
    Ok(Code::E)
}

/// As many mappings as the kernel allows, then stacks and growths, then room again.
fn no_more_mappings() -> Verdict {
    /// More than any kernel allows by default.
    const MOST: usize = 1 << 17;
    const PAGE: usize = 4096;
    let mut scene = Scene::new(Policy { maximum: 16 << 20, ..policy() })?;
    scene.recurse_right(managed::recurse_a(), 5)?;
    // SAFETY: addresses of the kernel's choice, none of which is ever used.
    let area = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), MOST * PAGE, libc::PROT_NONE, flags, -1, 0)
    };
    if area == libc::MAP_FAILED {
        return Err("no addresses".into());
    }
    // Every second page readable: each makes two mappings more.
    let split = (1..MOST).step_by(2).take_while(|index| {
        // SAFETY: within the area just mapped.
        unsafe { libc::mprotect(area.byte_add(index * PAGE), PAGE, libc::PROT_READ) == 0 }
    });
    if split.count() + 1 >= MOST / 2 {
        page().notes[UNLIMITED].store(1, Relaxed);
        return Ok(Code::E);
    }
    // The last mapping or two, so that not even the first half of a segment fits.
    for tight in [false, true] {
        let mut last = Vec::with_capacity(8);
        while tight && last.len() < 8 {
            // SAFETY: as above.
            let one = unsafe {
                let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
                libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_NONE, flags, -1, 0)
            };
            if one == libc::MAP_FAILED {
                break;
            }
            last.push(one);
        }
        let grown = scene.recurse(managed::recurse_a(), DEPTH);
        let made = Stack::new(&scene.thread, policy()).map(drop);
        let shallow = scene.recurse(managed::recurse_a(), 5);
        // SAFETY: mapped above.
        last.into_iter().for_each(|one| unsafe {
            libc::munmap(one, PAGE);
        });
        for refused in [is_exhaustion(&grown), matches!(made, Err(Error::Memory { .. }))] {
            page().notes[REFUSED].fetch_add(u64::from(refused), Relaxed);
        }
        if !is_exhaustion(&grown) && grown != Ok(Exit::Returned(managed::recursion_sum(DEPTH as u64))) {
            return Err(format!("a growth: {grown:x?}"));
        }
        if shallow != Ok(Exit::Returned(managed::recursion_sum(5))) {
            return Err(format!("the stack that was there: {shallow:x?}"));
        }
    }
    if page().notes[REFUSED].load(Relaxed) < 2 {
        return Err("with no mapping left nothing was refused".into());
    }
    // SAFETY: mapped above.
    unsafe { libc::munmap(area, MOST * PAGE) };
    scene.recurse_right(managed::recurse_a(), DEPTH)?;
    Ok(Code::E)
}

/// Rounds of a stack whose growth is refused: by the policy's maximum, and as if memory had run out.
fn refused_growths(rounds: u64) -> Verdict {
    let mut scene = Scene::new(policy())?;
    let small = Policy { maximum: 8192, ..policy() };
    let round = |scene: &mut Scene, number: u64| -> Result<(), String> {
        scene.stack = Stack::new(&scene.thread, small).map_err(|error| error.to_string())?;
        let injected = number % 2 == 1;
        at_every_step(move |step, _| if injected && step == Step::Mapped { Err(Error::Injected) } else { Ok(()) });
        let result = scene.recurse(managed::recurse_a(), DEPTH);
        stop();
        match result {
            Err(Error::Overflow { .. }) if !injected => Ok(()),
            Err(Error::Injected) if injected => Ok(()),
            other => Err(format!("round {number}: {other:x?}")),
        }
    };
    for number in 0..10 {
        round(&mut scene, number)?;
    }
    let before = footprint();
    for number in 0..rounds {
        round(&mut scene, number)?;
    }
    let after = footprint();
    // The heap may take a few pages more, not one for each round.
    if after.0 > before.0 || after.1 > before.1 + 64 {
        return Err(format!("{before:?} mappings and pages before, {after:?} after"));
    }
    scene.recurse(managed::recurse_a(), 5).map_err(|error| error.to_string())?;
    Ok(Code::E)
}
