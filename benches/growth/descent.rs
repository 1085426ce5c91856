//! Down to many frames and back: the first time on a stack of 4 KiB that grows, and once more.

use crate::bench::{Bench, Times};
use crate::managed::FRAME;
use crate::parts::Parts;
use crate::peers::{Peer, Peers};

/// Room below the deepest frame that managed code and the stubs may ask for.
pub const SPARE: usize = 8192;

/// One line of the table.
struct Side<'a> {
    name: &'a str,
    peer: Option<&'a Peer>,
    first: Times,
    repeated: Times,
}

impl<'a> Side<'a> {
    fn new(name: &'a str, peer: Option<&'a Peer>) -> Self {
        Side { name, peer, first: Times::default(), repeated: Times::default() }
    }
}

/// Everybody takes turns. Ratios are to our own stack of the final size, for gcc's split stacks to gcc on a mapping of the final size.
pub fn measure(bench: &Bench, peers: &Peers, depths: &[usize]) {
    println!("descent and return, {FRAME} bytes a frame: least (median) in ms; ratio of the least to a fixed stack's");
    for &depth in depths {
        let size = ((depth + 1) * FRAME + SPARE).next_power_of_two();
        let [mut growing, mut fixed] = ["cfi-stack, from 4 KiB", "cfi-stack, fixed"].map(|name| Side::new(name, None));
        let mut others: Vec<_> = peers.found().map(|peer| Side::new(peer.name, Some(peer))).collect();
        let mut stats = None;
        for _ in 0..bench.samples {
            let mut stack = bench.stack(4096, size);
            growing.first.take_own(|| bench.descend(&mut stack, depth));
            growing.repeated.take_own(|| bench.descend(&mut stack, depth));
            stats = Some(stack.stats());
            drop(stack);
            let mut stack = bench.stack(size, size);
            fixed.first.take_own(|| bench.descend(&mut stack, depth));
            fixed.repeated.take_own(|| bench.descend(&mut stack, depth));
            drop(stack);
            for side in &mut others {
                if let Some(figures) = side.peer.and_then(|peer| peer.run("descent", depth)) {
                    side.first.add_nanoseconds(figures[0]);
                    side.repeated.add_nanoseconds(figures[1]);
                }
            }
        }
        println!("  {depth} frames                     first   ratio              repeated   ratio");
        let split_base = others.iter().position(|side| side.name == "gcc-fixed");
        let base = |side: &Side| match (side.name, split_base) {
            ("gcc-split-stack", Some(index)) => (others[index].first.least(), others[index].repeated.least()),
            _ => (fixed.first.least(), fixed.repeated.least()),
        };
        for side in [&growing, &fixed].into_iter().chain(&others) {
            let (first, repeated) = base(side);
            let cell = |times: &Times, base: f64| {
                let (least, median) = (times.least() / 1e6, times.median() / 1e6);
                format!("{least:>8.2} ({median:>7.2})  {:>5.2}", least * 1e6 / base)
            };
            println!("    {:<22} {}   {}", side.name, cell(&side.first, first), cell(&side.repeated, repeated));
        }
        if let Some(stats) = stats {
            println!(
                "    {} moves, {} frames and {} bytes moved for a segment of {} bytes",
                stats.growths, stats.frames_moved, stats.bytes_moved, stats.largest
            );
        }
        // Once more with somebody listening at each step.
        let mut parts = Parts::listen();
        for _ in 0..bench.samples {
            let mut stack = bench.stack(4096, size);
            bench.descend(&mut stack, depth);
            parts.end_of_round();
        }
        println!("    of the first descent: {}", parts.finish().per(depth, "a frame"));
    }
    peers.name_missing();
}
