//! Times: the subjects of a group take turns, and medians are compared.

use crate::subjects::Run;
use std::time::{Duration, Instant};

/// How long one sample shall take.
const SAMPLE: Duration = Duration::from_micros(500);

/// Nanoseconds for one round.
#[derive(Clone, Copy, Debug)]
pub struct Nanoseconds {
    pub median: f64,
    pub least: f64,
}

/// What each run takes, measured in turns. `tick` is called after every turn.
pub fn interleaved(runs: &mut [Run], samples: usize, mut tick: impl FnMut(usize)) -> Vec<Nanoseconds> {
    let rounds: Vec<u64> = runs.iter_mut().map(rounds_of_a_sample).collect();
    let mut times = vec![Vec::with_capacity(samples); runs.len()];
    for sample in 0..samples {
        for ((run, &rounds), times) in runs.iter_mut().zip(&rounds).zip(&mut times) {
            times.push(time(run, rounds).as_nanos() as f64 / rounds as f64);
        }
        tick(sample + 1);
    }
    times.into_iter().map(summary).collect()
}

fn time(run: &mut Run, rounds: u64) -> Duration {
    let begin = Instant::now();
    run(rounds);
    begin.elapsed()
}

/// Also warms what is measured: the first rounds of all are here.
fn rounds_of_a_sample(run: &mut Run) -> u64 {
    let mut rounds = 1;
    while time(run, rounds) < SAMPLE / 4 {
        rounds *= 2;
    }
    let each = time(run, rounds).as_nanos() as u64 / rounds;
    (SAMPLE.as_nanos() as u64 / each.max(1)).max(1)
}

fn summary(mut times: Vec<f64>) -> Nanoseconds {
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    Nanoseconds { median, least: times.first().copied().unwrap_or(f64::NAN) }
}
