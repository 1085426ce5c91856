//! What every measurement needs: a thread, stacks, managed calls, times; and the limit check.

use crate::managed;
use cfi_stack::engine::{Activation, Exit};
use cfi_stack::pac::RawPc;
use cfi_stack::thread::Thread;
use cfi_stack::{Policy, Stack};
use nix::time::ClockId;
use std::time::{Duration, Instant};

/// The thread's own things, and how often everything is measured.
pub struct Bench {
    thread: Thread,
    activation: Box<Activation>,
    pub samples: usize,
}

/// Times of one side, in nanoseconds. The least is compared: other programs only ever add to one.
#[derive(Default)]
pub struct Times(Vec<f64>);

impl Times {
    pub fn take<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.add(begin.elapsed());
        result
    }

    /// In processor time, the kernel's for this thread included: other programs take turns with what runs for milliseconds.
    pub fn take_own<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let now = || ClockId::CLOCK_THREAD_CPUTIME_ID.now().map(Duration::from).expect("threads have a clock");
        let begin = now();
        let result = work();
        self.add(now() - begin);
        result
    }

    pub fn add(&mut self, time: Duration) {
        self.0.push(time.as_nanos() as f64);
    }

    pub fn add_nanoseconds(&mut self, time: f64) {
        self.0.push(time);
    }

    pub fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    pub fn median(&self) -> f64 {
        let mut times = self.0.clone();
        times.sort_unstable_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

impl Bench {
    pub fn new(samples: usize) -> Self {
        let thread = Thread::attach().expect("a thread can be attached");
        Bench { thread, activation: Box::default(), samples }
    }

    pub fn stack(&self, initial: usize, maximum: usize) -> Stack {
        let policy = Policy { initial, maximum, ..Policy::default() };
        Stack::new(&self.thread, policy).expect("there is memory for a stack")
    }

    pub fn run(&self, stack: &mut Stack, entry: RawPc, args: [usize; 3]) -> u64 {
        let act = std::ptr::from_ref(&*self.activation).addr();
        // SAFETY: the functions of `managed` are registered with their layouts and check the limit, or stay within the reserve.
        let exit = unsafe { stack.enter(&self.thread, &self.activation, entry, [act, args[0], args[1], args[2]]) };
        match exit {
            Ok(Exit::Returned(value)) => value,
            other => panic!("managed code ended with {other:?}"),
        }
    }

    pub fn descend(&self, stack: &mut Stack, depth: usize) {
        assert_eq!(self.run(stack, managed::descend(), [depth, 0, 0]), depth as u64);
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
            let (with, without) = (with.least() / f64::from(calls), without.least() / f64::from(calls));
            println!("  {name:<22} {with:>7.3} ns  {without:>7.3} ns   {:.3}", with / without);
        }
    }
}
