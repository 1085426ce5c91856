//! Instructions: a child process runs the rounds and its parent steps through them one by one.
//!
//! Exact, the same each time, and it wants nothing but ptrace: it also counts on an emulated CPU whose kernel is real.

use crate::subjects::Run;
use libc::{c_int, pid_t};
use std::hint::black_box;
use std::mem::MaybeUninit;

/// Rounds of the shorter of the two counted runs; the longer has twice as many.
const ROUNDS: u64 = 4;
/// Rounds before anything is counted: what happens but once has happened.
const WARM: u64 = 16;
/// No run of this program takes as many.
const MOST_STEPS: u64 = 200_000;

/// Instructions that one round takes: the difference between a run and one of twice the length, so that what is paid once is left out.
///
/// # Errors
/// Text that says what did not work.
pub fn instructions(make: fn() -> Run) -> Result<f64, String> {
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(failed("fork")),
        0 => child(make),
        child => {
            let counted = step_through(child);
            // SAFETY: a process of ours that has not been waited for to its end; both calls fail harmlessly if it has.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            let [short, long] = counted?;
            Ok((long as f64 - short as f64) / ROUNDS as f64)
        }
    }
}

fn failed(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// Where the counting begins and ends: the parent knows its address. The store keeps it from being folded into another function.
#[inline(never)]
extern "C" fn mark(number: u64) {
    static mut LAST: u64 = 0;
    // SAFETY: written by the only thread and read by nobody.
    unsafe { (&raw mut LAST).write_volatile(number) };
}

fn child(make: fn() -> Run) -> ! {
    let mut run = make();
    run(WARM);
    // SAFETY: the parent waits for the stop; a failing call leaves it without one and is noticed there.
    unsafe {
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
        libc::raise(libc::SIGSTOP);
    }
    mark(1);
    run(black_box(ROUNDS));
    mark(2);
    run(black_box(2 * ROUNDS));
    mark(3);
    // SAFETY: ends the child at once; what it holds is the parent's business.
    unsafe { libc::_exit(0) }
}

/// The steps between the first and the second mark, and between the second and the third.
fn step_through(child: pid_t) -> Result<[u64; 2], String> {
    let mark = mark as *const () as u64;
    if wait(child)? != libc::SIGSTOP {
        return Err("the child did not stop where it should".into());
    }
    let mut at = Vec::new();
    for step in 0..MOST_STEPS {
        if program_counter(child)? == mark {
            at.push(step);
        }
        if let [first, second, third] = at[..] {
            return Ok([second - first, third - second]);
        }
        // SAFETY: the child is stopped.
        if unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) } != 0 {
            return Err(failed("a single step"));
        }
        let signal = wait(child)?;
        if signal != libc::SIGTRAP {
            return Err(format!("signal {signal} while stepping"));
        }
    }
    Err(format!("no end after {MOST_STEPS} instructions, at {:#x}", program_counter(child)?))
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
