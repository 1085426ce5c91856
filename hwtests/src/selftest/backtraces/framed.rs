//! Functions that keep frame records, in assembly because Rust keeps none on x86-64, and walks from them by records alone.

use super::cancel;
use crate::backtrace::{by_records, by_tables};
use crate::child::{Verdict, handle, page};
use crate::cpu;
use crate::memory::peek;
use crate::outcome::Code;
use crate::stepper::{self, Boundary, function_at};
use cfi_stack::pool::Lease;
use cfi_stack::probe::{Slot, Word, frame, read};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn cfi_stack_first();
    fn cfi_stack_resume();
    fn cfi_stack_suspend();
}

/// Resumes the stack `next` again and again, or looks when that is 0; suspends its own each time.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn framed(arg: usize, next: usize, slot: *mut Slot) -> usize {
    std::arch::naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "push rdx",
        "push rsi",
        "2:",
        "mov rsi, [rbp - 16]",
        "test rsi, rsi",
        "jz 3f",
        "mov rdi, rsi",
        "xor edx, edx",
        "call {resume}",
        "endbr64",
        "jmp 4f",
        "3:",
        "mov rdi, rbp",
        "call {look}",
        "4:",
        "mov rdi, [rbp - 8]",
        "mov rsi, rdi",
        "xor edx, edx",
        "call {suspend}",
        "endbr64",
        "jmp 2b",
        ".cfi_endproc",
        resume = sym cfi_stack_resume,
        suspend = sym cfi_stack_suspend,
        look = sym look,
    )
}

/// Resumes the stack `next` again and again, or looks when that is 0; suspends its own each time.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn framed(arg: usize, next: usize, slot: *mut Slot) -> usize {
    std::arch::naked_asm!(
        ".cfi_startproc",
        "hint #34", // bti c
        "stp x29, x30, [sp, #-32]!",
        ".cfi_def_cfa_offset 32",
        ".cfi_offset x29, -32",
        ".cfi_offset x30, -24",
        "mov x29, sp",
        "stp x1, x2, [sp, #16]",
        "2:",
        "ldr x0, [sp, #16]",
        "cbz x0, 3f",
        "mov x1, x0",
        "mov x2, #0",
        "bl {resume}",
        "hint #36", // bti j
        "b 4f",
        "3:",
        "mov x0, x29",
        "bl {look}",
        "4:",
        "ldr x0, [sp, #24]",
        "mov x1, x0",
        "mov x2, #0",
        "bl {suspend}",
        "hint #36",
        "b 2b",
        ".cfi_endproc",
        resume = sym cfi_stack_resume,
        suspend = sym cfi_stack_suspend,
        look = sym look,
    )
}

/// Resumes a stack.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn framed_resumer(slot: *mut Slot) {
    std::arch::naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "mov rsi, rdi",
        "xor edx, edx",
        "call {resume}",
        "endbr64",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
        resume = sym cfi_stack_resume,
    )
}

/// Resumes a stack.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn framed_resumer(slot: *mut Slot) {
    std::arch::naked_asm!(
        ".cfi_startproc",
        "stp x29, x30, [sp, #-16]!",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset x29, -16",
        ".cfi_offset x30, -8",
        "mov x29, sp",
        "mov x1, x0",
        "mov x2, #0",
        "bl {resume}",
        "hint #36", // bti j
        "ldp x29, x30, [sp], #16",
        ".cfi_def_cfa_offset 0",
        ".cfi_restore x29",
        ".cfi_restore x30",
        "ret",
        ".cfi_endproc",
        resume = sym cfi_stack_resume,
    )
}

/// Whether Rust's own frames keep records here.
const RUST_KEEPS_THEM: bool = cfg!(target_arch = "aarch64");
/// More records than there are.
const RECORDS: usize = 256;

thread_local! {
    /// The functions that the records lead to at each look.
    static SEEN: RefCell<Vec<Vec<usize>>> = const { RefCell::new(Vec::new()) };
}

/// Whether [`look`] does.
static LOOKING: AtomicBool = AtomicBool::new(true);

extern "C" fn look(record: usize) {
    if !LOOKING.load(Relaxed) {
        return;
    }
    // The first frame that is Rust's and no longer of this file, by the tables.
    let frames = by_tables();
    let resumer = frames.iter().position(|frame| function_at(frame.pc - 1) == framed_resumer as *const () as usize);
    let Some(last) = resumer.and_then(|at| frames.get(at + 1)).map(|frame| frame.pc) else { return };
    let end = if RUST_KEEPS_THEM { main_return(&frames) } else { last };
    // SAFETY: the chain is this thread's own, with a record for every frame up to that one.
    let pcs = unsafe { by_records(record, end) };
    SEEN.with_borrow_mut(|seen| seen.push(pcs.iter().map(|pc| function_at(pc - 1)).collect()));
}

/// Where the first frame of main goes on.
fn main_return(frames: &[crate::backtrace::Frame]) -> usize {
    let main = crate::main as *const () as usize;
    frames.iter().map(|frame| frame.pc).find(|pc| function_at(pc - 1) == main).unwrap_or(0)
}

fn three() -> Result<[Lease; 3], String> {
    super::three([framed; 3])
}

#[inline(never)]
fn one_caller(leases: &[Lease]) {
    // SAFETY: the outermost stack is ready or suspended.
    unsafe { framed_resumer(leases[0].slot().as_ptr()) };
    std::hint::black_box(1);
}

#[inline(never)]
fn another_caller(leases: &[Lease]) {
    // SAFETY: as above.
    unsafe { framed_resumer(leases[0].slot().as_ptr()) };
    std::hint::black_box(2);
}

/// From inside three stacks; and of a suspended one, up to its base.
pub fn records() -> Verdict {
    let leases = three()?;
    one_caller(&leases);
    another_caller(&leases);
    let first = cfi_stack_first as *const () as usize;
    let stack = framed as *const () as usize;
    let main = crate::main as *const () as usize;
    let callers = [one_caller as *const () as usize, another_caller as *const () as usize];
    for (index, caller) in callers.into_iter().enumerate() {
        let seen = SEEN.with_borrow(|seen| seen.get(index).cloned()).ok_or("nobody looked")?;
        // Per stack: its function returns to first, the base record does so too, and the link leads to the resumer's frame.
        let mut wanted = [first, first, stack, first, first, stack, first, first].to_vec();
        wanted.extend([framed_resumer as *const () as usize, caller]);
        let is_right = seen.starts_with(&wanted) && (!RUST_KEEPS_THEM || seen.last() == Some(&main));
        if !is_right {
            return Err(format!("look {index}: {seen:x?}, not {wanted:x?}"));
        }
    }
    for lease in &leases {
        upwards(lease)?;
    }
    cancel(&leases);
    Ok(Code::C)
}

/// The chain of a suspended stack goes up to its base record, whose link is its last resumer's: there a walk ends.
fn upwards(lease: &Lease) -> Result<(), String> {
    let first = cfi_stack_first as *const () as usize;
    let base_record = lease.top() - 16;
    let mut record = read(lease.slot(), Word::OwnSp) as usize + frame::RECORD;
    let mut pcs = Vec::new();
    while record < base_record {
        // SAFETY: between the saved frame and the base record of a suspended stack.
        let (next, pc) = unsafe { (peek(record) as usize, cpu::strip(peek(record + 8)) as usize) };
        if next <= record {
            return Err(format!("the record at {record:#x} leads down, to {next:#x}"));
        }
        pcs.push(function_at(pc - 1));
        record = next;
    }
    // SAFETY: the base record, which lies below the stack's top.
    let last = function_at(unsafe { peek(base_record + 8) } as usize - 1);
    let wanted = [framed as *const () as usize, first];
    if record == base_record && pcs == wanted && last == first {
        Ok(())
    } else {
        Err(format!("{pcs:x?} up to {record:#x}, then {last:#x}; the base record lies at {base_record:#x}"))
    }
}

/// Memory that a profiler may read: the stacks, and this thread's own.
static PLACES: [[AtomicUsize; 2]; 4] = [const { [const { AtomicUsize::new(0) }; 2] }; 4];
/// The code in which a walk must arrive: switches, and what keeps records.
static SWITCHES: [[AtomicUsize; 2]; 4] = [const { [const { AtomicUsize::new(0) }; 2] }; 4];
/// The caller in which a walk must arrive.
static CALLER: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];
static SAMPLES: AtomicU64 = AtomicU64::new(0);
static IN_SWITCHES: AtomicU64 = AtomicU64::new(0);
/// Samples in a switch that did not arrive, and walks that did not end.
static LOST: AtomicU64 = AtomicU64::new(0);
/// The pc of one of them.
static LOST_AT: AtomicUsize = AtomicUsize::new(0);

fn within(place: &[AtomicUsize; 2], address: usize) -> bool {
    (place[0].load(Relaxed)..place[1].load(Relaxed)).contains(&address)
}

fn set(place: &[AtomicUsize; 2], range: &Range<usize>) {
    place[0].store(range.start, Relaxed);
    place[1].store(range.end, Relaxed);
}

/// What a profiler does: follows the records as long as they lie in memory that it knows. Says whether it came by the caller, or None
/// when it did not come to an end. Async-signal-safe.
fn follow(mut record: usize) -> Option<bool> {
    let mut arrived = false;
    for _ in 0..RECORDS {
        let is_known = PLACES.iter().any(|place| within(place, record) && within(place, record + 15));
        if !is_known || !record.is_multiple_of(8) {
            return Some(arrived);
        }
        // SAFETY: two words of a stack.
        let (next, pc) = unsafe { (peek(record) as usize, cpu::strip(peek(record + 8)) as usize) };
        arrived |= within(&CALLER, pc);
        record = next;
    }
    None
}

/// Looks at one place where the thread was interrupted.
fn sample(pc: usize, fp: usize) {
    SAMPLES.fetch_add(1, Relaxed);
    let in_switch = SWITCHES.iter().any(|place| within(place, pc));
    IN_SWITCHES.fetch_add(u64::from(in_switch), Relaxed);
    let is_right = match follow(fp) {
        Some(arrived) => arrived || !in_switch,
        None => false,
    };
    if !is_right {
        LOST.fetch_add(1, Relaxed);
        LOST_AT.store(pc, Relaxed);
    }
}

extern "C" fn interrupted(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: what the kernel passes to a SA_SIGINFO handler.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    #[cfg(target_arch = "x86_64")]
    let (pc, fp) = {
        let registers = &context.uc_mcontext.gregs;
        (registers[libc::REG_RIP as usize] as usize, registers[libc::REG_RBP as usize] as usize)
    };
    #[cfg(target_arch = "aarch64")]
    let (pc, fp) = (context.uc_mcontext.pc as usize, context.uc_mcontext.regs[29] as usize);
    sample(pc, fp);
}

/// The functions in which walks by records must arrive.
pub fn codes() -> Vec<stepper::Code> {
    [
        ("resume", cfi_stack_resume as *const () as usize),
        ("suspend", cfi_stack_suspend as *const () as usize),
        ("first", cfi_stack_first as *const () as usize),
        ("framed", framed as *const () as usize),
    ]
    .map(|(name, start)| stepper::Code::new(name, start))
    .into()
}

/// Tells the handler what it may read and where it must arrive.
fn publish(leases: &[Lease]) {
    /// As far as this thread's stack is looked at, from here.
    const ABOVE: usize = 4096;
    let here = 0_usize;
    let low = (&raw const here).addr();
    set(&PLACES[0], &(low - 4 * ABOVE..low + ABOVE));
    for (place, lease) in PLACES[1..].iter().zip(leases) {
        set(place, &(lease.base()..lease.top()));
    }
    for (place, code) in SWITCHES.iter().zip(codes()) {
        set(place, &code.place);
    }
    set(&CALLER, &stepper::Code::new("caller", one_caller as *const () as usize).place);
}

fn verdict() -> Verdict {
    let notes = &page().notes;
    notes[0].store(SAMPLES.load(Relaxed), Relaxed);
    notes[1].store(IN_SWITCHES.load(Relaxed), Relaxed);
    match LOST.load(Relaxed) {
        0 => Ok(Code::C),
        lost => {
            let pc = LOST_AT.load(Relaxed);
            let function = function_at(pc);
            Err(format!("{lost} walks lost their way or did not end, one at {function:#x} + {:#x}", pc - function))
        }
    }
}

/// SIGPROF, as often as the kernel lets it come, over code that does nothing but switch.
pub fn profiled() -> Verdict {
    /// So many samples in switches are enough …
    const ENOUGH: u64 = 40;
    /// … and so long is long enough.
    const PATIENCE: Duration = Duration::from_secs(10);
    let leases = three()?;
    publish(&leases);
    LOOKING.store(false, Relaxed);
    handle(libc::SIGPROF, interrupted, libc::SA_ONSTACK | libc::SA_RESTART);
    let set_timer = |microseconds| {
        let interval = libc::timeval { tv_sec: 0, tv_usec: microseconds };
        let timer = libc::itimerval { it_interval: interval, it_value: interval };
        // SAFETY: sets a timer of this process.
        assert_eq!(unsafe { libc::setitimer(libc::ITIMER_PROF, &timer, std::ptr::null_mut()) }, 0);
    };
    set_timer(1000);
    let start = Instant::now();
    while IN_SWITCHES.load(Relaxed) < ENOUGH && start.elapsed() < PATIENCE {
        for _ in 0..200 {
            one_caller(&leases);
        }
    }
    set_timer(0);
    cancel(&leases);
    if SAMPLES.load(Relaxed) == 0 {
        return Err("no signal came".into());
    }
    verdict()
}

fn visitor(at: &Boundary) {
    sample(at.pc, at.fp);
    let main = crate::main as *const () as usize;
    if !by_tables().iter().any(|frame| function_at(frame.pc - 1) == main) {
        LOST.fetch_add(1, Relaxed);
        LOST_AT.store(at.pc, Relaxed);
    }
}

/// Both walks before every instruction of the switches.
pub fn stepped() -> Verdict {
    let leases = three()?;
    publish(&leases);
    LOOKING.store(false, Relaxed);
    stepper::through(visitor, || {
        one_caller(&leases);
        one_caller(&leases);
    });
    cancel(&leases);
    verdict()
}
