//! A call that crosses the edge of a segment, over and over: the hot split.

use crate::bench::{Bench, Times};
use crate::managed;
use crate::peers::Peers;
use std::time::Instant;

/// From as many frames down: the segments of all sides end within them.
const DEPTHS: usize = 1024;
const CALLS: usize = 2000;

/// The best and the worst depth for a loop that calls a leaf.
pub fn measure(bench: &Bench, peers: &Peers) {
    println!("a loop calling a leaf from 1 to {DEPTHS} frames down: ns a call          best   worst   more");
    let line = |name: &str, plain: f64, worst: f64| {
        println!("  {name:<56} {plain:>8.2} {worst:>7.2} {:>6.2}", worst - plain);
    };
    let (plain, worst) = ours(bench);
    line("cfi-stack, relocate", plain, worst);
    for peer in peers.found() {
        let [mut plain, mut worst] = [(); 2].map(|()| Times::default());
        for _ in 0..bench.samples.div_ceil(4) {
            if let Some(figures) = peer.run("edge", DEPTHS) {
                plain.add_nanoseconds(figures[0]);
                worst.add_nanoseconds(figures[1]);
            }
        }
        line(peer.name, plain.least(), worst.least());
    }
    peers.name_missing();
}

fn ours(bench: &Bench) -> (f64, f64) {
    let mut stack = bench.stack(4096, 1 << 20);
    let mut least = |depth: usize, calls: usize, rounds: usize| {
        let mut times = Times::default();
        for _ in 0..rounds {
            let begin = Instant::now();
            assert_eq!(bench.run(&mut stack, managed::edge(), [depth, calls, 0]), calls as u64);
            times.add(begin.elapsed());
        }
        times.least()
    };
    let mut crossing = |depth, rounds| (least(depth, CALLS + 1, rounds) - least(depth, 1, rounds)) / CALLS as f64;
    let all: Vec<f64> = (1..=DEPTHS).map(|depth| crossing(depth, 5)).collect();
    let plain = all.iter().copied().fold(f64::NAN, f64::min);
    let worst = all.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(1, |(index, _)| index + 1);
    // A moment that another program took is not there each time.
    (plain, crossing(worst, 51))
}
