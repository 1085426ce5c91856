//! A44: fork with suspended stacks. The child has the same keys and its own copy of everything; one that has its keys made anew
//! has stacks that it cannot enter.

use super::metadata_misuse::{continuation_finishes, suspended_continuation};
use super::metadata_pooled::{Suspended, attach, expect};
use crate::attack::{DEPTH, Scene, policy};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::cpu;
use crate::managed;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Error;
#[cfg(target_arch = "aarch64")]
use cfi_stack::features::{Mechanisms, detect};
use cfi_stack::probe::forced;
use std::sync::atomic::Ordering::Relaxed;

/// A44.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("no fork", &run(|| pooled(false, Keys::Same)));
    tally.attack("the child resumes", &run(|| pooled(true, Keys::Same)), &[Code::C]);
    tally.attack("the child resumes a continuation", &run(|| continued(Keys::Same)), &[Code::C]);
    tally.attack("the child enters a growable stack", &run(|| entered(Keys::Same)), &[Code::C]);
    if class.pac() {
        tally.attack("the child's keys are new: verbs", &run(|| pooled(true, Keys::New)), &[Code::B]);
        // The thread's own continuation: its domain is not asked anew, the seal is what stops it.
        tally.attack("the child's keys are new: a continuation", &run(|| continued(Keys::New)), &[Code::B]);
        tally.attack("the child's keys are new: a growable stack", &run(|| entered(Keys::New)), &[Code::E]);
    } else {
        tally.say("no keys to make anew here");
    }
    tally.report()
}

/// What becomes of the keys.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// They stay.
    Same,
    /// All are made anew: another key domain.
    New,
    /// These are: a sum of [`IA`] to [`GA`].
    Anew(usize),
}

/// The keys, as `PR_PAC_RESET_KEYS` names them.
pub const IA: usize = 1;
/// See [`IA`].
pub const IB: usize = 2;
/// See [`IA`].
pub const DA: usize = 4;
/// See [`IA`].
pub const DB: usize = 8;
/// See [`IA`].
pub const GA: usize = 16;

impl Keys {
    /// Has the kernel make this thread's keys anew, if they are to be and it has any. No function of libc's may be returned from that was called before.
    pub fn apply(self) {
        #[cfg(target_arch = "aarch64")]
        if self != Keys::Same && detect().present.contains(Mechanisms::PAC_IA) {
            let which = if let Keys::Anew(which) = self { which } else { 0 };
            /// `prctl(PR_PAC_RESET_KEYS, which)`; 0: all of them.
            const PR_PAC_RESET_KEYS: usize = 54;
            let result: usize;
            // SAFETY: a system call; nothing of libc's is between.
            unsafe {
                std::arch::asm!(
                    "svc #0",
                    in("x8") 167,
                    inlateout("x0") PR_PAC_RESET_KEYS => result,
                    in("x1") which,
                    in("x2") 0,
                    in("x3") 0,
                    in("x4") 0,
                    options(nostack),
                );
            }
            assert_eq!(result, 0, "PR_PAC_RESET_KEYS");
        }
    }
}

/// Goes on in a child of this process, and ends as it does.
fn fork() {
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        return;
    }
    let mut status = 0;
    // SAFETY: our own child; then this process ends, by the child's signal if there was one.
    unsafe {
        libc::waitpid(child, &mut status, 0);
        if libc::WIFEXITED(status) {
            libc::_exit(libc::WEXITSTATUS(status));
        }
        libc::signal(libc::WTERMSIG(status), libc::SIG_DFL);
        libc::raise(libc::WTERMSIG(status));
        libc::_exit(1);
    }
}

fn pooled(forks: bool, keys: Keys) -> Verdict {
    let thread = attach()?;
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let stacks = (0..10).map(|depth| Suspended::new(&thread, depth)).collect::<Result<Vec<_>, _>>()?;
    if forks {
        fork();
        keys.apply();
    }
    for stack in stacks {
        stack.finish()?;
    }
    let stack = Suspended::new(&thread, 5)?;
    // SAFETY: it is suspended, and ours.
    unsafe {
        expect(forced::resume(stack.slot(), stack.slot(), 2), 3, false)?;
        forced::cancel(stack.slot());
    }
    Ok(Code::C)
}

fn continued(keys: Keys) -> Verdict {
    let thread = attach()?;
    page().breakpoint.store(cpu::BRK_SEAL, Relaxed);
    let cont = suspended_continuation(&thread, false)?;
    fork();
    keys.apply();
    match continuation_finishes(cont) {
        Ok(()) => Ok(Code::C),
        Err(Error::Thread(_)) => Ok(Code::E),
        Err(error) => Err(error.to_string()),
    }
}

/// A stack that managed code ran on before.
fn entered(keys: Keys) -> Verdict {
    let mut scene = Scene::new(policy())?;
    scene.recurse_right(managed::recurse_a(), DEPTH)?;
    fork();
    keys.apply();
    match scene.recurse(managed::recurse_a(), DEPTH) {
        Err(Error::Thread(_)) => Ok(Code::E),
        Ok(_) => scene.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::C),
        Err(error) => Err(error.to_string()),
    }
}
