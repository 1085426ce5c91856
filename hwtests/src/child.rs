//! A forked child for each attack, and the page on which it leaves the evidence.
//!
//! The child's signal handler writes signal, si_code, address, pc and what the case asked to look at into a page that
//! parent and child share, and ends with a status of its own. Any other end is no evidence.

use crate::class::Class;
use crate::cpu;
use crate::memory;
use crate::outcome::Code;
use crate::progress;
use crate::stepper::function_at;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Exit status of a child whose handler has caught a signal.
const CAUGHT: i32 = 71;
/// Exit status of a child whose body has come to an end.
const ENDED: i32 = 72;
/// How long a child may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Words that a case may leave.
pub const NOTES: usize = 8;
const TEXT: usize = 1024;
const SIGNALS: [i32; 6] = [libc::SIGSEGV, libc::SIGILL, libc::SIGTRAP, libc::SIGBUS, libc::SIGABRT, libc::SIGFPE];
/// SIGILL: the operand; what the kernel makes of a failed authentication with FPAC.
const ILL_ILLOPN: i32 = 2;
/// SIGTRAP: a breakpoint instruction.
const TRAP_BRKPT: i32 = 1;
/// SIGSEGV: nothing is mapped there.
const SEGV_MAPERR: i32 = 1;
/// SIGSEGV: what is mapped there forbids it.
const SEGV_ACCERR: i32 = 2;
/// SIGSEGV: a shadow-stack violation.
const SEGV_CPERR: i32 = 10;

/// What parent and child share. Zero is its initial state.
#[repr(C)]
pub struct Page {
    /// Words that the case's body or hook leaves for the parent.
    pub notes: [AtomicU64; NOTES],
    /// Where a store is expected to fault.
    pub store: AtomicU64,
    /// The poisoned form that a compiled return is expected to run into.
    pub poisoned: AtomicU64,
    /// The immediate of the `brk` that a failed check is expected to meet.
    pub breakpoint: AtomicU64,
    guard: [AtomicU64; 2],
    watched: [AtomicU64; 2],
    found: [AtomicU64; 2],
    /// Whether the word watched was still mapped.
    readable: [AtomicU8; 2],
    span: [AtomicU64; 4],
    canary: [AtomicU64; 4],
    /// Where a canary waits.
    waiting: AtomicU64,
    signal: AtomicI32,
    si_code: AtomicI32,
    address: AtomicU64,
    pc: AtomicU64,
    sp: AtomicU64,
    instruction: AtomicU64,
    verdict: AtomicU8,
    text: [AtomicU8; TEXT],
}

static PAGE: AtomicPtr<Page> = AtomicPtr::new(std::ptr::null_mut());

/// The shared page.
pub fn page() -> &'static Page {
    // SAFETY: set once by `prepare`, mapped for the life of the process, all fields atomic.
    unsafe { PAGE.load(Relaxed).as_ref() }.expect("prepare was called")
}

/// Maps the shared page. Once, before the first child.
pub fn prepare() {
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
    let mapping = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size_of::<Page>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(mapping != libc::MAP_FAILED, "no memory for the evidence page: {}", std::io::Error::last_os_error());
    PAGE.store(mapping.cast(), Relaxed);
}

impl Page {
    fn clear(&self) {
        let start = NonNull::from(self).cast::<u8>();
        // SAFETY: no child lives; zero is a valid state of every field.
        unsafe { start.write_bytes(0, size_of::<Page>()) };
    }

    /// Has the handler read the word at `address` when a signal comes.
    pub fn watch(&self, index: usize, address: usize) {
        self.watched[index].store(address as u64, Relaxed);
    }

    /// Remembers what lies in a span that must not change any more.
    pub fn freeze_span(&self, low: usize, top: usize) {
        // SAFETY: the span is that of a stack which the step hook was shown.
        freeze(&self.span, low, (top - low) / 8);
    }

    /// Looks at that span for the last time: it is about to be given back.
    pub fn thaw_span(&self) {
        look_again(&self.span);
        self.span[1].store(0, Relaxed);
    }

    /// Whether that span is still the same.
    pub fn span_is_intact(&self) -> bool {
        look_again(&self.span);
        !changed(&self.span)
    }

    /// Says where the guard is. The page below it must be a canary: one that waits there already
    /// ([`leave_room_above_a_canary`]), or a new one where nothing is mapped.
    pub fn guard(&self, base: usize, guard: usize) {
        let low = base - guard;
        self.guard[0].store(low as u64, Relaxed);
        self.guard[1].store(base as u64, Relaxed);
        let canary = low - CANARY;
        if self.waiting.load(Relaxed) as usize != canary && map_canary(canary, CANARY) != Some(canary) {
            return;
        }
        for word in 0..CANARY / 8 {
            // SAFETY: within a page that `map_canary` has mapped for this.
            unsafe { memory::poke(canary + word * 8, 0x5afe_5afe_0000 + word as u64) };
        }
        freeze(&self.canary, canary, CANARY / 8);
    }

    /// One past the guard: the segment's base.
    pub fn guard_end(&self) -> usize {
        self.guard[1].load(Relaxed) as usize
    }

    fn in_guard(&self, address: u64) -> bool {
        (self.guard[0].load(Relaxed)..self.guard[1].load(Relaxed)).contains(&address)
    }
}

/// Size of a canary: a page.
const CANARY: usize = 4096;

/// Maps memory at `address`, or anywhere for 0, where nothing is mapped yet.
fn map_canary(address: usize, bytes: usize) -> Option<usize> {
    let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // SAFETY: takes only what is free.
    let mapping = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(address),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed,
            -1,
            0,
        )
    };
    (mapping != libc::MAP_FAILED).then(|| mapping.expose_provenance())
}

/// An address in a new mapping above `address`.
pub fn map_above(address: usize) -> usize {
    /// So far from one place to try to the next.
    const STRIDE: usize = 1 << 24;
    (1..1 << 12)
        .find_map(|number| {
            let place = (address & !0xffff) + number * STRIDE;
            map_canary(place, CANARY).filter(|&got| got == place)
        })
        .expect("an address space has a gap above")
}

/// Leaves a hole with a canary below it, as large as what the library maps for a segment of `size` bytes: where the kernel will map that, if it
/// comes next.
pub fn leave_room_above_a_canary(guard: usize, size: usize) {
    /// More gaps that fit as well than an address space has.
    const GAPS: usize = 64;
    // The guard, the segment, and the page above its top.
    let bytes = guard + size + CANARY;
    let Some(canary) = map_canary(0, CANARY + bytes) else { return };
    let hole = canary + CANARY;
    // SAFETY: the upper part of the mapping just made, which nobody knows.
    let unmap = || unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(hole), bytes) };
    unmap();
    // What does not land in the hole stays, and fills the gap that came before it.
    if (0..GAPS).any(|_| map_canary(0, bytes) == Some(hole)) {
        unmap();
        page().waiting.store(canary as u64, Relaxed);
    }
}

fn freeze(place: &[AtomicU64; 4], low: usize, words: usize) {
    place[0].store(low as u64, Relaxed);
    place[1].store(words as u64, Relaxed);
    // SAFETY: the callers'.
    let sum = unsafe { memory::sum(low, words) };
    place[2].store(sum, Relaxed);
    place[3].store(sum, Relaxed);
}

fn look_again(place: &[AtomicU64; 4]) {
    let (low, words) = (place[0].load(Relaxed) as usize, place[1].load(Relaxed) as usize);
    if words == 0 {
        return;
    }
    // SAFETY: it was mapped when it was frozen; if not any more, the child dies a death that is no evidence.
    place[3].store(unsafe { memory::sum(low, words) }, Relaxed);
}

fn changed(place: &[AtomicU64; 4]) -> bool {
    place[2].load(Relaxed) != place[3].load(Relaxed)
}

#[cfg(target_arch = "x86_64")]
fn registers(context: &libc::ucontext_t) -> (u64, u64) {
    let registers = &context.uc_mcontext.gregs;
    (registers[libc::REG_RIP as usize] as u64, registers[libc::REG_RSP as usize] as u64)
}

#[cfg(target_arch = "aarch64")]
fn registers(context: &libc::ucontext_t) -> (u64, u64) {
    (context.uc_mcontext.pc, context.uc_mcontext.sp)
}

/// The handler that writes the evidence and ends the process.
pub extern "C" fn caught(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let page = page();
    // SAFETY: what the kernel passes to a SA_SIGINFO handler.
    let (info, (pc, sp)) = unsafe { (&*info, registers(&*context.cast())) };
    // SAFETY: every signal here that has an address has it at this place; the others' is not looked at.
    let address = unsafe { info.si_addr() }.addr() as u64;
    page.si_code.store(info.si_code, Relaxed);
    page.address.store(address, Relaxed);
    page.pc.store(pc, Relaxed);
    page.sp.store(sp, Relaxed);
    if matches!(signal, libc::SIGILL | libc::SIGTRAP) {
        // SAFETY: the CPU has just executed the instruction there.
        let instruction = unsafe { std::ptr::with_exposed_provenance::<u32>(pc as usize).read_unaligned() };
        page.instruction.store(u64::from(instruction), Relaxed);
    }
    for (index, watched) in page.watched.iter().enumerate() {
        if let Some(word) = memory::peek_if_mapped(watched.load(Relaxed) as usize) {
            page.found[index].store(word, Relaxed);
            page.readable[index].store(1, Relaxed);
        }
    }
    look_again(&page.span);
    look_again(&page.canary);
    page.signal.store(signal, Relaxed);
    // SAFETY: ends the process; async-signal-safe.
    unsafe { libc::_exit(CAUGHT) }
}

/// Installs the handler that writes the evidence, for all signals that an attack may end in.
pub fn catch_signals() {
    for signal in SIGNALS {
        handle(signal, caught, libc::SA_ONSTACK);
    }
}

/// A handler with siginfo.
pub type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler.
pub fn handle(signal: i32, handler: Handler, flags: i32) {
    // SAFETY: a zeroed sigaction is a valid one, and the handler keeps to what is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | flags;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

/// The address of the handler that is installed.
pub fn handler_of(signal: i32) -> usize {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only asks, and fills the action when it succeeds.
    unsafe {
        assert_eq!(libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()), 0);
        action.assume_init().sa_sigaction
    }
}

/// How a child's body ended, if nothing ended it before.
pub type Verdict = Result<Code, String>;

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// Its body came to an end.
    Ended(Verdict),
    /// The handler caught a signal.
    Caught,
    /// A signal that nobody caught.
    Killed(i32),
    /// An exit status that says nothing.
    Silent(i32),
    /// It did not end.
    Hung,
}

/// Everything about a child's end.
#[derive(Clone, Debug)]
pub struct End {
    /// How.
    pub how: How,
    /// What it wrote to stderr.
    pub stderr: String,
    /// The words that it left.
    pub notes: [u64; NOTES],
    /// What the handler read at the watched places, where they were still mapped.
    pub found: [Option<u64>; 2],
    /// The signal caught, 0 for none.
    pub signal: i32,
    /// Its si_code.
    pub si_code: i32,
    /// Its si_addr.
    pub address: u64,
    /// Where it interrupted.
    pub pc: u64,
    /// The stack pointer there.
    pub sp: u64,
    /// The instruction there, for SIGILL and SIGTRAP.
    pub instruction: u32,
    span_changed: bool,
    beyond_guard: bool,
    has_canary: bool,
    on_guard: bool,
    on_store: bool,
    on_poisoned: bool,
    on_breakpoint: bool,
    on_ud2: bool,
}

/// Runs `body` in a child.
pub fn run(body: impl FnOnce() -> Verdict) -> End {
    page().clear();
    let (reader, writer) = pipe();
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        // SAFETY: both are open; 2 may be replaced in the child.
        unsafe { libc::dup2(writer.as_raw_fd(), 2) };
        drop((reader, writer));
        inside(body);
    }
    drop(writer);
    let (stderr, how) = wait(child, reader, LIMIT);
    let page = page();
    let load = |words: &[AtomicU64]| words.iter().map(|word| word.load(Relaxed)).collect::<Vec<_>>();
    let (address, pc) = (page.address.load(Relaxed), page.pc.load(Relaxed));
    let instruction = page.instruction.load(Relaxed) as u32;
    // 0 is what a case leaves that expects none.
    let expected = |place: &AtomicU64| Some(place.load(Relaxed)).filter(|&word| word != 0);
    End {
        how,
        stderr,
        notes: load(&page.notes).try_into().expect("as many"),
        found: std::array::from_fn(|index| {
            (page.readable[index].load(Relaxed) != 0).then(|| page.found[index].load(Relaxed))
        }),
        signal: page.signal.load(Relaxed),
        si_code: page.si_code.load(Relaxed),
        address,
        pc,
        sp: page.sp.load(Relaxed),
        instruction,
        span_changed: changed(&page.span),
        beyond_guard: changed(&page.canary),
        has_canary: page.canary[1].load(Relaxed) != 0,
        on_guard: page.in_guard(address),
        on_store: expected(&page.store) == Some(address),
        on_poisoned: expected(&page.poisoned) == Some(pc),
        on_breakpoint: expected(&page.breakpoint).is_some_and(|brk| cpu::breakpoint(instruction) == Some(brk as u32)),
        on_ud2: expected(&page.breakpoint) == Some(u64::from(cpu::UD2))
            && instruction & 0xffff == cpu::UD2
            && cpu::is_checking_stub(function_at(pc as usize)),
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: fills two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0, "pipe: {}", std::io::Error::last_os_error());
    // SAFETY: just opened, owned by nobody else.
    ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) }).into()
}

/// Runs `body` in a child process and ends it, the verdict on the shared page.
pub fn inside(body: impl FnOnce() -> Verdict) -> ! {
    catch_signals();
    let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body))
        .unwrap_or_else(|_| Err("the test itself panicked".into()));
    let page = page();
    match &verdict {
        Ok(code) => page.verdict.store(*code as u8 + 1, Relaxed),
        Err(text) => {
            for (place, byte) in page.text.iter().zip(text.bytes()) {
                place.store(byte, Relaxed);
            }
        }
    }
    look_again(&page.canary);
    // SAFETY: ends the process without what `exit` would run.
    unsafe { libc::_exit(ENDED) }
}

/// Ends the child with this code, wherever in it this is called: where its body cannot come to its end.
pub fn end(code: Code) -> ! {
    page().verdict.store(code as u8 + 1, Relaxed);
    look_again(&page().canary);
    // SAFETY: ends the process without what `exit` would run.
    unsafe { libc::_exit(ENDED) }
}

fn wait(child: i32, reader: OwnedFd, limit: Duration) -> (String, How) {
    let mut output = Vec::new();
    let mut file = File::from(reader);
    let start = Instant::now();
    let mut status = 0;
    let mut is_open = true;
    let mut hung = false;
    loop {
        if !is_open {
            // SAFETY: our own child, not waited for yet; fills one integer.
            if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live pollfd.
        let ready = if is_open { unsafe { libc::poll(&mut poll, 1, 500) } } else { 0 };
        if ready > 0 {
            let mut block = [0; 4096];
            match file.read(&mut block) {
                Ok(0) | Err(_) => is_open = false,
                Ok(bytes) => output.extend_from_slice(&block[..bytes]),
            }
        } else {
            progress::tick("a child is at work");
        }
        if start.elapsed() > limit {
            hung = true;
            // SAFETY: our own child, not waited for yet; fills one integer.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &mut status, 0);
            }
            break;
        }
    }
    let stderr = String::from_utf8_lossy(&output).into_owned();
    let page = page();
    let how = if hung {
        How::Hung
    } else if libc::WIFSIGNALED(status) {
        How::Killed(libc::WTERMSIG(status))
    } else {
        match libc::WEXITSTATUS(status) {
            CAUGHT => How::Caught,
            ENDED => How::Ended(verdict(page)),
            other => How::Silent(other),
        }
    };
    (stderr, how)
}

fn verdict(page: &Page) -> Verdict {
    const ENDINGS: [Code; 4] = [Code::E, Code::C, Code::R, Code::X];
    let byte = page.verdict.load(Relaxed);
    if let Some(&code) = ENDINGS.iter().find(|&&code| code as u8 + 1 == byte) {
        return Ok(code);
    }
    let bytes: Vec<u8> = page.text.iter().map(|byte| byte.load(Relaxed)).take_while(|&byte| byte != 0).collect();
    Err(String::from_utf8_lossy(&bytes).into_owned())
}

impl End {
    /// Whether the canary beyond the guard is there and untouched.
    pub fn spared_what_lies_beyond(&self) -> bool {
        self.has_canary && !self.beyond_guard
    }

    /// The code that this end is, by the rules of evidence.
    ///
    /// # Errors
    /// What it was instead.
    pub fn code(&self, class: &Class) -> Result<Code, String> {
        let stray = || Err(self.to_string());
        let code = match (&self.how, self.signal, self.si_code) {
            (How::Ended(Ok(code)), ..) => *code,
            (How::Caught, libc::SIGILL, ILL_ILLOPN) if class.pac() && cpu::authenticates(self.instruction) => Code::F,
            (How::Caught, libc::SIGTRAP, TRAP_BRKPT) if self.on_breakpoint => Code::B,
            (How::Caught, libc::SIGILL, ILL_ILLOPN) if self.on_ud2 => Code::B,
            (How::Caught, libc::SIGSEGV, SEGV_CPERR) if class.shadow() => Code::S,
            (How::Caught, libc::SIGSEGV, SEGV_MAPERR) if self.on_poisoned => Code::T,
            (How::Caught, libc::SIGSEGV, SEGV_ACCERR) if self.on_store => Code::W,
            (How::Caught, libc::SIGSEGV, SEGV_ACCERR) if self.on_guard => Code::G,
            (How::Caught, libc::SIGABRT, _) if one_line_of_tampering(&self.stderr) => Code::K,
            _ => return stray(),
        };
        if code == Code::G && !self.has_canary {
            return Err("G, but no canary lay beyond the guard".into());
        }
        if self.beyond_guard {
            return Err(format!("{code}, but memory beyond the guard has changed"));
        }
        if self.span_changed {
            return Err(format!("{code}, but the live stack was written to"));
        }
        Ok(code)
    }
}

fn one_line_of_tampering(stderr: &str) -> bool {
    stderr.starts_with("cfi-stack: tampering: ") && stderr.ends_with('\n') && stderr.lines().count() == 1
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.how {
            How::Ended(Ok(code)) => write!(f, "ended with {code}")?,
            How::Ended(Err(text)) => write!(f, "{text}")?,
            How::Caught => write!(
                f,
                "signal {} si_code {} address {:#x} pc {:#x} sp {:#x} instruction {:#x}",
                self.signal, self.si_code, self.address, self.pc, self.sp, self.instruction
            )?,
            How::Killed(signal) => write!(f, "killed by signal {signal} that no handler saw")?,
            How::Silent(status) => write!(f, "exit status {status} without a word")?,
            How::Hung => write!(f, "did not end in {} s", LIMIT.as_secs())?,
        }
        if !self.stderr.is_empty() {
            write!(f, "; stderr: {}", self.stderr.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_closes_stderr_and_hangs_is_ended() {
        prepare();
        let (reader, writer) = pipe();
        // SAFETY: the child does nothing but wait.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            drop(writer);
            loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            }
        }
        drop(writer);
        assert_eq!(wait(child, reader, Duration::from_millis(300)), (String::new(), How::Hung));
    }
}
