//! Instructions of a move: a child moves a stack and its parent steps through it one by one.
//!
//! Exact, and it wants nothing but ptrace: it also counts on an emulated CPU whose kernel is real. Two moves are counted, one of twice
//! as many frames, so that what is paid once is left out.

use crate::bench::Bench;
use crate::parts::PARTS;
use crate::relocation::one_move;
use cfi_stack::Error;
use cfi_stack::steps::{Step, StepInfo, set_hook};
use libc::{c_int, pid_t};
use std::hint::black_box;
use std::mem::MaybeUninit;

/// Frames of the shorter span.
const FRAMES: usize = 64;
/// Parts of one move, beginning and end not counted: `Begin` to `Committed`.
const STEPS: usize = PARTS.len() + 1;
/// No run of this program takes as many.
const MOST_STEPS: u64 = 2_000_000;

/// Prints the instructions of each part for one frame.
///
/// # Errors
/// Text that says what did not work.
pub fn print() -> Result<(), String> {
    // SAFETY: this process has one thread.
    let counted = match unsafe { libc::fork() } {
        -1 => return Err(failed("fork")),
        0 => child(),
        child => {
            let counted = step_through(child);
            // SAFETY: a process of ours that has not been waited for to its end; both calls fail harmlessly if it has.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            counted?
        }
    };
    // The first move finds things in their first state; it is not looked at.
    let [_, short, long] = counted;
    println!("instructions of a move           once   a frame");
    let mut total = 0.0;
    for (part, name) in PARTS.iter().enumerate() {
        let took = |marks: &[u64; STEPS]| (marks[part + 1] - marks[part]) as f64;
        let each = (took(&long) - took(&short)) / FRAMES as f64;
        if name != &"copy" {
            total += each;
        }
        println!("  {name:<24} {:>10.0} {each:>9.2}", took(&short) - each * FRAMES as f64);
    }
    println!("  all but copy             {:>10} {total:>9.2}   (`rep movsb` stops at each byte)", "");
    Ok(())
}

fn failed(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// Where a part ends: the parent knows its address. The store keeps it from being folded into another function.
#[inline(never)]
extern "C" fn mark() {
    static mut SEEN: u64 = 0;
    // SAFETY: written by the only thread and read by nobody.
    unsafe { (&raw mut SEEN).write_volatile(1) };
}

fn hook(step: Step, _: &mut StepInfo<'_>) -> Result<(), Error> {
    black_box(step);
    mark();
    Ok(())
}

fn child() -> ! {
    let bench = Bench::new(1);
    set_hook(Some(hook));
    // SAFETY: the parent waits for the stop; a failing call leaves it without one and is noticed there.
    unsafe {
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
        libc::raise(libc::SIGSTOP);
    }
    for frames in [FRAMES, FRAMES, 2 * FRAMES] {
        one_move(&bench, frames);
    }
    // SAFETY: ends the child at once; what it holds is the parent's business.
    unsafe { libc::_exit(0) }
}

/// When each mark of each of the three moves was reached.
fn step_through(child: pid_t) -> Result<[[u64; STEPS]; 3], String> {
    let mark = mark as *const () as u64;
    if wait(child)? != libc::SIGSTOP {
        return Err("the child did not stop where it should".into());
    }
    let mut at = Vec::new();
    for step in 0..MOST_STEPS {
        if program_counter(child)? == mark {
            at.push(step);
        }
        if at.len() == 3 * STEPS {
            return Ok(std::array::from_fn(|run| std::array::from_fn(|part| at[run * STEPS + part])));
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
