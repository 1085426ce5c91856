//! arm64: a tracer between the parent and the stepped process. It steps by PTRACE_SINGLESTEP; at a boundary it has a signal
//! delivered, whose handler is the visitor, lets the handler run up to the end of its `rt_sigreturn`, and steps on from there.
//! Elsewhere the process runs freely: breakpoints stand where it can come back to the code that is watched.

use super::{Boundary, Verdict, shared, visit};
use crate::child::{self, End};
use crate::class::Class;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;

/// Asks the tracer to begin.
const BEGIN: i32 = libc::SIGUSR1;
/// Runs the visitor.
const VISIT: i32 = libc::SIGUSR2;
/// si_code of `brk`; a step has another one.
const TRAP_BRKPT: i32 = 1;
/// What PTRACE_O_TRACESYSGOOD adds to SIGTRAP at a system call.
const AT_SYSCALL: i32 = libc::SIGTRAP | 0x80;
/// `brk #0`, at a gate.
const BREAKPOINT: u32 = 0xd420_0000;
const NOBODY_ASKED: &str = "stopped at a system call though nobody asked for that";
/// NT_PRSTATUS: the general registers.
const GENERAL: usize = 1;

/// The tracer stops the process before the instruction that a handler returns to.
pub(super) const TRAPS_AFTER: bool = false;

/// Why nothing can be stepped here, if so.
pub fn unavailable(class: &Class) -> Option<&'static str> {
    class.user_mode_emulator.then_some("QEMU's user mode has no ptrace, and arm64 no other single step for user code")
}

pub(super) fn boundary(context: &libc::ucontext_t) -> Boundary {
    let registers = &context.uc_mcontext.regs;
    Boundary {
        index: 0,
        number: 0,
        pc: context.uc_mcontext.pc as usize,
        fp: registers[29] as usize,
        arguments: [0, 1, 2].map(|index: usize| registers[index] as usize),
        slot: registers[21] as usize,
    }
}

extern "C" fn visited(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: what the kernel passes to a SA_SIGINFO handler.
    visit(shared(), unsafe { &*context.cast::<libc::ucontext_t>() });
}

pub(super) fn arm() {
    child::handle(VISIT, visited, libc::SA_ONSTACK);
    shared().armed.store(1, SeqCst);
    // SAFETY: the tracer takes it; nobody else would send it.
    unsafe { libc::raise(BEGIN) };
}

/// The tracer is the child that the parent knows: it ends as the stepped process did.
pub(super) fn run(body: impl FnOnce() -> Verdict) -> End {
    child::run(|| {
        stay_on_one_cpu();
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: asks the parent to trace this process.
                let traced = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
                child::inside(|| if traced == 0 { body() } else { Err("cannot be traced".into()) })
            }
            process if process > 0 => Err(Traced::new(process)?.follow()),
            _ => Err(format!("fork: {}", std::io::Error::last_os_error())),
        }
    })
}

/// Tracer and traced take turns thousands of times: two CPUs would only wait for each other.
fn stay_on_one_cpu() {
    // SAFETY: a zeroed set is a valid one; the call reads it. Failure costs time alone.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(usize::try_from(libc::sched_getcpu()).unwrap_or(0), &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// Where a traced process has stopped.
enum Stop {
    Signal(i32),
    Syscall,
}

struct Traced {
    process: i32,
    /// Its memory, code included.
    memory: File,
    /// Where the process can come to watched code from elsewhere, and the instruction that stands there. While it runs elsewhere each
    /// of them is a breakpoint.
    gates: Vec<(usize, u32)>,
}

impl Traced {
    fn new(process: i32) -> Result<Traced, String> {
        let path = format!("/proc/{process}/mem");
        let memory = File::options().write(true).open(&path).map_err(|error| format!("{path}: {error}"))?;
        Ok(Traced { process, memory, gates: gates() })
    }

    /// Steps it until it has ended, and ends like it. What was wrong otherwise.
    fn follow(&self) -> String {
        let mut signal = match self.stop() {
            Stop::Signal(signal) => signal,
            Stop::Syscall => return NOBODY_ASKED.into(),
        };
        self.ask(libc::PTRACE_SETOPTIONS, 0, (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as usize);
        // The boundary that it stands at.
        let mut boundary = None;
        loop {
            if signal == BEGIN {
                signal = 0;
                match shared().ahead() {
                    Some((pc, before)) => match self.go_to(pc, before) {
                        Ok(()) => {
                            shared().number.store(shared().first.load(SeqCst), SeqCst);
                            if let Err(died_of) = self.visit(pc) {
                                signal = died_of;
                            }
                            self.set_gates(true);
                            boundary = (signal == 0).then_some(pc);
                        }
                        Err(died_of) => signal = died_of,
                    },
                    None => self.set_gates(true),
                }
            }
            let gate = boundary.and_then(|pc| self.gate(pc));
            if let Some((pc, instruction)) = gate {
                self.write_code(pc, instruction);
            }
            self.resume(if boundary.is_some() { libc::PTRACE_SINGLESTEP } else { libc::PTRACE_CONT }, signal);
            signal = match self.stop() {
                Stop::Signal(signal) => signal,
                Stop::Syscall => return NOBODY_ASKED.into(),
            };
            if let Some((pc, _)) = gate {
                self.write_code(pc, BREAKPOINT);
            }
            let from = boundary.take();
            let pc = self.pc();
            if signal != libc::SIGTRAP || self.si_code() == TRAP_BRKPT && self.gate(pc).is_none() {
                // A signal of the process's own, whose handler runs.
                continue;
            }
            signal = 0;
            if let Some(problem) = from.and_then(|from| missed(from, pc)) {
                return problem;
            }
            if shared().armed.load(SeqCst) == 0 {
                self.set_gates(false);
            } else if let Some(index) = shared().find(pc) {
                if shared().passes_over(index, pc) {
                    boundary = Some(pc);
                    continue;
                }
                if self.holds(VISIT) {
                    shared().held[index].fetch_add(1, SeqCst);
                    boundary = Some(pc);
                    continue;
                }
                match self.visit(pc) {
                    Ok(()) => boundary = Some(pc),
                    Err(died_of) => signal = died_of,
                }
            }
        }
    }

    fn gate(&self, pc: usize) -> Option<(usize, u32)> {
        self.gates.iter().copied().find(|&(gate, _)| gate == pc)
    }

    /// Lets the process run until it has come to `pc` more than `before` times. The signal that ended it otherwise.
    fn go_to(&self, pc: usize, before: usize) -> Result<(), i32> {
        let instruction = instruction_at(pc);
        for visits in 0..=before {
            self.write_code(pc, BREAKPOINT);
            self.resume(libc::PTRACE_CONT, 0);
            match self.stop() {
                Stop::Signal(libc::SIGTRAP) if self.pc() == pc => self.write_code(pc, instruction),
                Stop::Signal(signal) => return Err(signal),
                Stop::Syscall => return Err(0),
            }
            if visits != before {
                self.resume(libc::PTRACE_SINGLESTEP, 0);
                if let Stop::Signal(signal) = self.stop()
                    && signal != libc::SIGTRAP
                {
                    return Err(signal);
                }
            }
        }
        Ok(())
    }

    fn set_gates(&self, closed: bool) {
        for &(gate, instruction) in &self.gates {
            self.write_code(gate, if closed { BREAKPOINT } else { instruction });
        }
    }

    fn write_code(&self, place: usize, instruction: u32) {
        self.memory.write_all_at(&instruction.to_ne_bytes(), place as u64).expect("a tracer writes where it likes");
    }

    /// Has the visitor run at a boundary. Another signal that comes in it is given back.
    fn visit(&self, pc: usize) -> Result<(), i32> {
        let mut signal = VISIT;
        let mut returning = false;
        let mut entering = true;
        loop {
            self.resume(libc::PTRACE_SYSCALL, signal);
            signal = 0;
            match self.stop() {
                Stop::Signal(signal) => return Err(signal),
                Stop::Syscall if entering => returning = self.general()[8] == libc::SYS_rt_sigreturn as u64,
                Stop::Syscall if returning => {
                    assert_eq!(self.pc(), pc, "the visitor returned elsewhere");
                    return Ok(());
                }
                Stop::Syscall => {}
            }
            entering = !entering;
        }
    }

    /// Whether the process holds a signal back.
    fn holds(&self, signal: i32) -> bool {
        /// PTRACE_GETSIGMASK
        const GET_MASK: libc::c_uint = 0x420a;
        let mut mask = 0_u64;
        self.ask(GET_MASK, size_of_val(&mask), (&raw mut mask).expose_provenance());
        mask >> (signal - 1) & 1 == 1
    }

    fn resume(&self, how: libc::c_uint, signal: i32) {
        self.ask(how, 0, signal as usize);
    }

    fn ask(&self, request: libc::c_uint, address: usize, data: usize) {
        // SAFETY: a stopped child of ours; address and data are the request's.
        let answer = unsafe { libc::ptrace(request, self.process, address, data) };
        assert!(answer >= 0, "ptrace {request}: {}", std::io::Error::last_os_error());
    }

    /// Waits for its next stop. When it has ended, so does this process, in the same way.
    fn stop(&self) -> Stop {
        let mut status = 0;
        // SAFETY: waits for our own child; fills one integer.
        let waited = unsafe { libc::waitpid(self.process, &mut status, 0) };
        assert_eq!(waited, self.process, "waitpid: {}", std::io::Error::last_os_error());
        if libc::WIFEXITED(status) {
            // SAFETY: ends the process.
            unsafe { libc::_exit(libc::WEXITSTATUS(status)) }
        }
        if libc::WIFSIGNALED(status) {
            // SAFETY: ends the process by the same signal; SIGKILL if that should not be deadly.
            unsafe {
                libc::signal(libc::WTERMSIG(status), libc::SIG_DFL);
                libc::raise(libc::WTERMSIG(status));
                libc::kill(libc::getpid(), libc::SIGKILL);
            }
        }
        match libc::WSTOPSIG(status) {
            AT_SYSCALL => Stop::Syscall,
            signal => Stop::Signal(signal),
        }
    }

    fn si_code(&self) -> i32 {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        self.ask(libc::PTRACE_GETSIGINFO, 0, info.as_mut_ptr().expose_provenance());
        // SAFETY: zeroed is valid, and the kernel has filled it.
        unsafe { info.assume_init() }.si_code
    }

    /// x0 to x30, sp, pc, pstate.
    fn general(&self) -> [u64; 34] {
        let mut registers = [0; 34];
        let mut vector = libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size_of_val(&registers) };
        self.ask(libc::PTRACE_GETREGSET, GENERAL, (&raw mut vector).expose_provenance());
        registers
    }

    fn pc(&self) -> usize {
        self.general()[32] as usize
    }
}

/// An instruction of this program, which the traced process runs too.
fn instruction_at(pc: usize) -> u32 {
    // SAFETY: the callers pass addresses of code of this program.
    unsafe { std::ptr::with_exposed_provenance::<u32>(pc).read() }
}

/// The first instruction of each piece of code, and what calls in it return to.
fn gates() -> Vec<(usize, u32)> {
    let mut gates = Vec::new();
    for place in &shared().places {
        let [start, end] = [0, 1].map(|index| place[index].load(SeqCst) as usize);
        for pc in (start..end).step_by(4) {
            let before = if pc == start { 0 } else { instruction_at(pc - 4) };
            let is_call = before & 0xfc00_0000 == 0x9400_0000 || before & 0xffff_fc1f == 0xd63f_0000;
            if pc == start || is_call {
                gates.push((pc, instruction_at(pc)));
            }
        }
    }
    gates
}

/// What is wrong when `pc` follows `last` though the instruction at `last` does not branch: a boundary was missed.
fn missed(last: usize, pc: usize) -> Option<String> {
    /// `svc #0`
    const SYSTEM_CALL: u32 = 0xd400_0001;
    // The kernel reports the end of a system call that is stepped, and the step again.
    if pc == last && instruction_at(last - 4) == SYSTEM_CALL {
        return None;
    }
    let instruction = instruction_at(last);
    // Branches, exceptions and system: bits 28-26 are 101 (Arm ARM C4.1). Of these, hints and `sys` do not branch, but a
    // landing pad or `brk` may fault, and then a handler comes next.
    let may_branch = instruction >> 26 & 7 == 5;
    (pc != last + 4 && !may_branch).then(|| format!("from {last:#x} ({instruction:#x}) to {pc:#x} in one step"))
}
