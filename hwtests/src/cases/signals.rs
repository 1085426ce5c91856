//! A50: profiling signals while stacks grow, and a handler that would run on a managed stack.

use super::overflow::guarded_scene;
use crate::attack::{DEPTH, Scene, policy};
use crate::child::{Verdict, handle, page, run};
use crate::class::Class;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::{Policy, Stack, features};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// As many signals must have come …
const SIGNALS: u64 = 300;
/// … before this.
const PATIENCE: Duration = Duration::from_secs(60);
/// The kernel's si_code when it could not write a signal frame.
const SI_KERNEL: i32 = 0x80;

static DELIVERED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    DELIVERED.fetch_add(1, Relaxed);
}

/// SIGPROF every `microseconds` of CPU time.
fn profile(microseconds: i64) {
    let interval = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let timer = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: sets a timer of this process.
    assert_eq!(unsafe { libc::setitimer(libc::ITIMER_PROF, &timer, std::ptr::null_mut()) }, 0);
}

/// Microseconds that this process has run, in user and kernel mode: what the timer counts.
fn cpu_time() -> u64 {
    // SAFETY: a zeroed rusage is a valid one, and the kernel fills it.
    let used = unsafe {
        let mut used: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, &mut used), 0);
        used
    };
    [used.ru_utime, used.ru_stime].iter().map(|time| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64).sum()
}

/// A50.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("no signals", &run(|| grow_under_signals(0)));
    let end = run(|| grow_under_signals(1000));
    let [signals, growths, microseconds, ..] = end.notes;
    // How often the timer really fires is up to the kernel's tick; what came is what was shown.
    let rate = signals * 1_000_000 / microseconds.max(1);
    let what = format!("{signals} SIGPROF over {growths} growths, {rate} per second of CPU time, asked for 1000");
    tally.attack(&what, &end, &[Code::C]);

    tally.control("handler on the alternate stack", &run(|| without_room(libc::SA_ONSTACK)));
    let end = run(|| without_room(0));
    // The kernel cannot push the frame. No store of the program's faults, so the SIGSEGV that it forces has no address and
    // si_code SI_KERNEL (signal_setup_done, force_sig): the evidence is where the stack pointer stood, and the canary.
    let [named, sp, ..] = end.notes;
    let forced = end.signal == libc::SIGSEGV && end.si_code == SI_KERNEL && end.sp == sp;
    if named == 1 && forced && end.spared_what_lies_beyond() {
        tally.seen("a handler without SA_ONSTACK, named beforehand", Code::G, &end);
    } else {
        tally.fail(format!("a handler without SA_ONSTACK: {end}"));
    }
    tally.report()
}

fn grow_under_signals(microseconds: i64) -> Verdict {
    handle(libc::SIGPROF, count, libc::SA_ONSTACK | libc::SA_RESTART);
    let mut scene = Scene::new(policy())?;
    let always = Policy { relocate_always: true, ..policy() };
    profile(microseconds);
    let before = cpu_time();
    let start = Instant::now();
    let mut growths = 0;
    loop {
        for policy in [policy(), always] {
            scene.stack = Stack::new(&scene.thread, policy).map_err(|error| error.to_string())?;
            for (function, _) in managed::recursions() {
                scene.recurse_right(function, if policy.relocate_always { 60 } else { DEPTH })?;
            }
            growths += scene.stack.stats().growths;
        }
        if microseconds == 0 || DELIVERED.load(Relaxed) >= SIGNALS {
            break;
        }
        if start.elapsed() > PATIENCE {
            return Err(format!("only {} signals came in {} s", DELIVERED.load(Relaxed), PATIENCE.as_secs()));
        }
    }
    profile(0);
    page().notes[2].store(cpu_time() - before, Relaxed);
    page().notes[0].store(DELIVERED.load(Relaxed), Relaxed);
    page().notes[1].store(growths, Relaxed);
    Ok(Code::C)
}

extern "C" fn release(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    DELIVERED.fetch_add(1, Relaxed);
}

/// A signal comes while the stack pointer stands 64 bytes above the segment's base.
fn without_room(flags: i32) -> Verdict {
    const ABOVE: usize = 64;
    let mut scene = guarded_scene()?;
    handle(libc::SIGPROF, release, flags);
    let named = features::detect().handlers_without_onstack.contains(&libc::SIGPROF);
    page().notes[0].store(u64::from(named), Relaxed);
    page().notes[1].store((page().guard_end() + ABOVE) as u64, Relaxed);
    if named != (flags & libc::SA_ONSTACK == 0) {
        return Err(format!("features names the handler: {named}"));
    }
    profile(20_000);
    let result = scene.enter(managed::edge_spin(), ABOVE, DELIVERED.as_ptr().expose_provenance(), policy().reserve);
    profile(0);
    result.map(|_| Code::C).map_err(|error| error.to_string())
}
