//! The measurements.

use crate::managed::{self, BOTTOM, FRAME};
use cfi_stack::engine::{Activation, Exit};
use cfi_stack::pac::RawPc;
use cfi_stack::thread::Thread;
use cfi_stack::{Policy, Stack};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Room below the deepest frame that managed code and the stubs may ask for.
const SPARE: usize = 8192;

/// The thread's own things, and how often everything is measured.
pub struct Bench {
    thread: Thread,
    activation: Box<Activation>,
    samples: usize,
}

/// Times of one side.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn take<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.0.push(begin.elapsed());
        result
    }

    /// In nanoseconds.
    fn median(&self) -> f64 {
        let mut times = self.0.clone();
        times.sort_unstable();
        times.get(times.len() / 2).map_or(f64::NAN, |time| time.as_nanos() as f64)
    }
}

/// What `bottom` calls on the native stack: the two moments around its call of grow.
static STAMPS: Mutex<[Option<Instant>; 2]> = Mutex::new([None; 2]);

extern "C" fn stamp(_: usize, _: usize, _: usize) -> u64 {
    let now = Instant::now();
    if let Ok(mut stamps) = STAMPS.lock() {
        *stamps = [stamps[1], Some(now)];
    }
    0
}

fn stamped() -> Duration {
    match STAMPS.lock().as_deref() {
        Ok(&[Some(first), Some(second)]) => second - first,
        _ => Duration::ZERO,
    }
}

impl Bench {
    pub fn new(samples: usize) -> Self {
        let thread = Thread::attach().expect("a thread can be attached");
        Bench { thread, activation: Box::default(), samples }
    }

    fn stack(&self, initial: usize, maximum: usize) -> Stack {
        let policy = Policy { initial, maximum, ..Policy::default() };
        Stack::new(&self.thread, policy).expect("there is memory for a stack")
    }

    fn run(&self, stack: &mut Stack, entry: RawPc, args: [usize; 3]) -> u64 {
        let act = std::ptr::from_ref(&*self.activation).addr();
        // SAFETY: the functions of `managed` are registered with their layouts and check the limit, or stay within the reserve.
        let exit = unsafe { stack.enter(&self.thread, &self.activation, entry, [act, args[0], args[1], args[2]]) };
        match exit {
            Ok(Exit::Returned(value)) => value,
            other => panic!("managed code ended with {other:?}"),
        }
    }

    fn descend(&self, stack: &mut Stack, depth: usize) {
        assert_eq!(self.run(stack, managed::descend(), [depth, 0, 0]), depth as u64);
    }

    /// From 4 KiB down and back, against a stack that has its final size from the start.
    pub fn descent(&self) {
        println!("descent and return, {FRAME} bytes a frame      growing     fixed   ratio");
        for depth in [100_000, 1_000_000] {
            let size = ((depth + 1) * FRAME + SPARE).next_power_of_two();
            let [mut first_growing, mut first_fixed, mut again_growing, mut again_fixed] =
                [(); 4].map(|()| Times::default());
            let mut stats = None;
            for _ in 0..self.samples {
                let mut growing = self.stack(4096, size);
                first_growing.take(|| self.descend(&mut growing, depth));
                again_growing.take(|| self.descend(&mut growing, depth));
                stats = Some(growing.stats());
                drop(growing);
                let mut fixed = self.stack(size, size);
                first_fixed.take(|| self.descend(&mut fixed, depth));
                again_fixed.take(|| self.descend(&mut fixed, depth));
            }
            let line = |name: &str, growing: &Times, fixed: &Times| {
                let (growing, fixed) = (growing.median(), fixed.median());
                println!(
                    "  {depth:>9} frames, {name:<16} {:>9.3} ms {:>6.3} ms   {:.2}",
                    growing / 1e6,
                    fixed / 1e6,
                    growing / fixed
                );
            };
            line("first", &first_growing, &first_fixed);
            line("repeated", &again_growing, &again_fixed);
            if let Some(stats) = stats {
                println!(
                    "            {} moves, {} frames and {} bytes moved for {} bytes of stack",
                    stats.growths, stats.frames_moved, stats.bytes_moved, stats.largest
                );
            }
        }
    }

    /// One call of grow at the bottom of a descent, timed from inside, against copying the same bytes.
    pub fn relocation(&self) {
        println!(
            "one move                 grow   mmap+memcpy  ratio    memcpy warm   ratio   grow/frame   warm memcpy/frame"
        );
        for frames in [16, 64, 256, 1024, 4096, 16_384, 65_536] {
            let span = frames * FRAME + BOTTOM;
            let size = (span + SPARE).next_power_of_two();
            let [mut grow, mut cold, mut warm] = [(); 3].map(|()| Times::default());
            let mut bytes = vec![1_u8; span];
            let mut copy = vec![2_u8; span];
            steps::forget();
            for _ in 0..self.samples {
                let mut stack = self.stack(size, size * 2);
                self.descend(&mut stack, frames - 1);
                let stamp = stamp as *const () as usize;
                self.run(&mut stack, managed::descend(), [frames - 1, stamp, size]);
                assert_eq!(stack.stats().growths, 1);
                grow.0.push(stamped());
                cold.take(|| copy_to_fresh(&bytes, size * 2));
                // The first is not looked at: it warms.
                copy.copy_from_slice(black_box(&bytes));
                warm.take(|| {
                    copy.copy_from_slice(black_box(&bytes));
                    black_box(&mut copy);
                });
                black_box(&mut bytes);
            }
            let (grow, cold, warm) = (grow.median(), cold.median(), warm.median());
            let each = frames as f64;
            println!(
                "  {frames:>6} frames {:>9.1} us {:>9.1} us   {:>5.2} {:>12.1} us   {:>6.1} {:>9.1} ns {:>12.2} ns",
                grow / 1e3,
                cold / 1e3,
                grow / cold,
                warm / 1e3,
                grow / warm,
                grow / each,
                warm / each
            );
            steps::print(frames);
        }
    }

    /// A loop that calls a leaf, and fib: with the limit check and without.
    pub fn check(&self) {
        println!("the limit check            checked       plain   ratio");
        let mut stack = self.stack(64 << 10, 64 << 10);
        let pairs = [
            ("leaf in a loop, a call", managed::loop_checked(), managed::loop_plain(), 2_000_000, 2_000_000),
            ("fib(27), a call", managed::fib_checked(), managed::fib_plain(), 27, 832_039),
        ];
        for (name, checked, plain, n, calls) in pairs {
            let [mut with, mut without] = [(); 2].map(|()| Times::default());
            assert_eq!(self.run(&mut stack, checked, [n, 0, 0]), self.run(&mut stack, plain, [n, 0, 0]));
            for _ in 0..self.samples {
                with.take(|| self.run(&mut stack, checked, [n, 0, 0]));
                without.take(|| self.run(&mut stack, plain, [n, 0, 0]));
            }
            let (with, without) = (with.median() / f64::from(calls), without.median() / f64::from(calls));
            println!("  {name:<22} {with:>7.3} ns  {without:>7.3} ns   {:.3}", with / without);
        }
    }
}

/// What a move cannot do without: a mapping, and the bytes copied to its top.
fn copy_to_fresh(bytes: &[u8], size: usize) {
    let length = NonZeroUsize::new(size).expect("a size above 0");
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the system's choice; the copy ends at its end; it is unmapped unused.
    unsafe {
        let memory = mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)
            .expect("there is memory")
            .cast::<u8>();
        memory.add(size - bytes.len()).as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        black_box(memory);
        munmap(memory.cast(), size).expect("an own mapping can be unmapped");
    }
}

/// Where the time of a move goes, seen through the step hook.
#[cfg(feature = "steps")]
mod steps {
    use super::Times;
    use cfi_stack::Error;
    use cfi_stack::steps::{Step, StepInfo, set_hook};
    use std::sync::Mutex;
    use std::time::Instant;

    const PARTS: [&str; 6] = ["map", "walk and plan", "copy", "rebase", "rebind", "commit"];

    static SEEN: Mutex<(Vec<Instant>, Vec<Times>)> = Mutex::new((Vec::new(), Vec::new()));

    fn hook(step: Step, _: &mut StepInfo<'_>) -> Result<(), Error> {
        let now = Instant::now();
        if let Ok(mut seen) = SEEN.lock() {
            let (moments, parts) = &mut *seen;
            if step == Step::Begin {
                moments.clear();
            }
            moments.push(now);
            if step == Step::Committed {
                for (part, pair) in parts.iter_mut().zip(moments.windows(2)) {
                    part.0.push(pair[1] - pair[0]);
                }
            }
        }
        Ok(())
    }

    pub fn forget() {
        if let Ok(mut seen) = SEEN.lock() {
            seen.1 = PARTS.map(|_| Times::default()).into();
        }
        set_hook(Some(hook));
    }

    pub fn print(frames: usize) {
        if let Ok(seen) = SEEN.lock() {
            let parts = PARTS.iter().zip(&seen.1).map(|(name, times)| {
                let median = times.median();
                format!("{name} {:.1} us ({:.1} ns a frame)", median / 1e3, median / frames as f64)
            });
            println!("                {}", parts.collect::<Vec<_>>().join(", "));
        }
    }
}

#[cfg(not(feature = "steps"))]
mod steps {
    pub fn forget() {}
    pub fn print(_: usize) {}
}
