//! A child process does the work and its parent steps through it.

use libc::{c_int, pid_t};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

/// No work here takes as many.
const MOST_STEPS: u64 = 100_000_000;

/// The steps between neighbouring marks.
pub fn between_marks(work: &mut dyn FnMut()) -> Result<Vec<u64>, String> {
    // SAFETY: the programs that count have one thread.
    match unsafe { libc::fork() } {
        -1 => Err(failed("fork")),
        0 => child(work),
        child => {
            let counted = step_through(child);
            // SAFETY: a process of ours that has not been waited for to its end; both calls fail harmlessly if it has.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            counted
        }
    }
}

fn failed(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// Where stepping ends: the parent knows its address.
#[inline(never)]
extern "C" fn end() -> ! {
    // SAFETY: ends the child at once; what it holds is the parent's business.
    unsafe { libc::_exit(0) }
}

/// Whether this is a child that nobody steps through yet.
static UNWATCHED: AtomicBool = AtomicBool::new(false);

fn child(work: &mut dyn FnMut()) -> ! {
    UNWATCHED.store(true, Ordering::Relaxed);
    work();
    end()
}

/// Before a child's first mark: from here on its parent steps.
#[inline]
pub fn wait_for_parent() {
    if UNWATCHED.swap(false, Ordering::Relaxed) {
        // SAFETY: the parent waits for the stop; a failing call leaves it without one and is noticed there.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
        }
    }
}

fn step_through(child: pid_t) -> Result<Vec<u64>, String> {
    let [mark, end] = [super::set as *const () as u64, end as *const () as u64];
    if wait(child)? != libc::SIGSTOP {
        return Err("the child did not stop where it should".into());
    }
    let (mut last, mut steps, mut intervals) = (0, 0, Vec::new());
    let mut since = None;
    while steps < MOST_STEPS {
        let at = program_counter(child)?;
        if at == end {
            return Ok(intervals);
        }
        // A string instruction stops after each repetition, where it stands.
        steps += u64::from(at != last);
        if at == mark && at != last {
            intervals.extend(since.map(|since| steps - since));
            since = Some(steps);
        }
        last = at;
        // SAFETY: the child is stopped.
        if unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) } != 0 {
            return Err(failed("a single step"));
        }
        let signal = wait(child)?;
        if signal != libc::SIGTRAP {
            return Err(format!("signal {signal} while stepping"));
        }
    }
    Err(format!("no end after {MOST_STEPS} instructions, at {last:#x}"))
}

/// The signal that stopped the child.
fn wait(child: pid_t) -> Result<c_int, String> {
    let mut status = 0;
    // SAFETY: a place for the status.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        return Err(failed("waitpid"));
    }
    if libc::WIFSTOPPED(status) {
        Ok(libc::WSTOPSIG(status))
    } else {
        Err(format!("the child ended, status {status:#x}"))
    }
}

fn program_counter(child: pid_t) -> Result<u64, String> {
    const NT_PRSTATUS: usize = 1;
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    let mut place =
        libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size_of::<libc::user_regs_struct>() };
    // SAFETY: the kernel writes at most iov_len bytes to where iov_base points.
    if unsafe { libc::ptrace(libc::PTRACE_GETREGSET, child, NT_PRSTATUS, &raw mut place) } != 0 {
        return Err(failed("reading the program counter"));
    }
    // SAFETY: integers alone; what the kernel did not write is zero.
    let registers = unsafe { registers.assume_init() };
    #[cfg(target_arch = "x86_64")]
    return Ok(registers.rip);
    #[cfg(target_arch = "aarch64")]
    return Ok(registers.pc);
}
