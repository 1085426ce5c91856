//! One call of grow with many frames on the stack, timed from inside, against copying the same bytes.

use crate::bench::{Bench, Times};
use crate::descent::SPARE;
use crate::managed::{self, BOTTOM, FRAME};
use crate::parts::Parts;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::{Duration, Instant};

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

/// Runs one move of `frames` frames from a segment that they fit in to one of twice the size, between two calls of the native `function`.
pub fn move_between(bench: &Bench, frames: usize, function: usize) {
    let size = segment(frames);
    let mut stack = bench.stack(size, size * 2);
    bench.descend(&mut stack, frames - 1);
    bench.run(&mut stack, managed::descend(), [frames - 1, function, size]);
    assert_eq!(stack.stats().growths, 1);
}

fn one_move(bench: &Bench, frames: usize) {
    move_between(bench, frames, stamp as *const () as usize);
}

/// Bytes of so many frames, and what is below them while they move.
pub fn span(frames: usize) -> usize {
    frames * FRAME + BOTTOM
}

fn segment(frames: usize) -> usize {
    (span(frames) + SPARE).next_power_of_two()
}

/// By number of frames.
pub fn measure(bench: &Bench) {
    println!(
        "one move                 grow   mmap+memcpy  ratio    memcpy warm   ratio   grow/frame   grow, memcpy warm in GB/s"
    );
    for frames in [16, 64, 256, 1024, 4096, 16_384, 65_536] {
        let (span, size) = (span(frames), segment(frames));
        let [mut grow, mut cold, mut warm] = [(); 3].map(|()| Times::default());
        let mut bytes = vec![1_u8; span];
        let mut copy = vec![2_u8; span];
        for _ in 0..bench.samples {
            one_move(bench, frames);
            grow.add(stamped());
            cold.take(|| copy_to_fresh(&bytes, size * 2));
            // The first is not looked at: it warms.
            copy.copy_from_slice(black_box(&bytes));
            warm.take(|| {
                copy.copy_from_slice(black_box(&bytes));
                black_box(&mut copy);
            });
            black_box(&mut bytes);
        }
        let (grow, cold, warm) = (grow.least(), cold.least(), warm.least());
        println!(
            "  {frames:>6} frames {:>9.1} us {:>9.1} us   {:>5.2} {:>12.1} us   {:>6.1} {:>9.1} ns {:>14.2} {:>6.1}",
            grow / 1e3,
            cold / 1e3,
            grow / cold,
            warm / 1e3,
            grow / warm,
            grow / frames as f64,
            span as f64 / grow,
            span as f64 / warm
        );
        let mut parts = Parts::listen();
        for _ in 0..bench.samples {
            one_move(bench, frames);
            parts.end_of_round();
        }
        println!("                {}", parts.finish().per(frames, "a frame"));
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
