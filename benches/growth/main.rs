//! What growing by moving frames costs: against the same work on a stack that never moves, and against gcc's split stacks and Go.
//!
//! Every line is a ratio within one run: the sides take turns, and the least of each is compared. `README.md` beside this
//! folder says what each line means. Nothing here asserts a time.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod bench;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod count;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod descent;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod edge;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod managed;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod parts;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod peers;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod relocation;

const HELP: &str = "\
usage: growth [descent] [edge] [relocation] [check] [OPTIONS]

  descent          from 4 KiB to 10^5 and 10^6 frames against a fixed stack and the peers, first and repeated
  edge             a call across the edge of a segment against a call elsewhere, ours and the peers'
  relocation       one move by number of frames against memcpy of the same bytes, and where its time goes
  check            the limit check: a loop calling a leaf, and fib, with and without it
  --samples N      measurements of each side (default 21)
  --no-huge-pages  the kernel gives this process none (PR_SET_THP_DISABLE)
  --count          instructions of a move instead of times, a frame's and whole: also on an emulated CPU (ci/on --count)
  --frames N,N,…   descents to so many frames (default 100000,1000000); with --count whole moves of so many (default 10,100,1000)
  --at-most N      with --count: exit status 1 if re-binding takes more instructions a frame
  --peers FOLDER   where benches/growth/peers has built the peers (default: CFI_STACK_CACHE/peers,
                   ~/.cache/cfi-stack/peers); those that are not there are named";

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn main() -> std::process::ExitCode {
    use cfi_start as _;
    use std::process::ExitCode;

    let refuse = |why: &str| {
        eprintln!("growth: {why}\n{HELP}");
        ExitCode::FAILURE
    };
    let mut samples = 21;
    let mut only = Vec::new();
    let mut counted = false;
    let mut frames = None;
    let mut at_most = None;
    let mut folder = peers::default_folder();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            "--count" => counted = true,
            "--no-huge-pages" => {
                if let Err(errno) = nix::sys::prctl::set_thp_disable(true) {
                    return refuse(&format!("--no-huge-pages: {errno}"));
                }
            }
            "--frames" => {
                let numbers =
                    words.next().map(|list| list.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>());
                match numbers {
                    Some(Ok(numbers)) if !numbers.contains(&0) => frames = Some(numbers),
                    _ => return refuse("--frames wants positive numbers with commas between"),
                }
            }
            "--at-most" => match words.next().and_then(|number| number.parse().ok()) {
                Some(number) => at_most = Some(number),
                None => return refuse("--at-most wants a number"),
            },
            "--peers" => match words.next() {
                Some(path) => folder = path.into(),
                None => return refuse("--peers wants a folder"),
            },
            "--samples" => match words.next().and_then(|number| number.parse().ok()).filter(|&number| number > 0) {
                Some(number) => samples = number,
                None => return refuse("--samples wants a positive number"),
            },
            "descent" | "edge" | "relocation" | "check" => only.push(word),
            other => return refuse(&format!("unknown argument `{other}`")),
        }
    }
    if at_most.is_some() && !counted {
        return refuse("--at-most wants --count: a time is no promise");
    }
    managed::register();
    if counted {
        return match count::print(&frames.unwrap_or_else(|| vec![10, 100, 1000]), at_most) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("growth: {why}");
                ExitCode::FAILURE
            }
        };
    }
    let wanted = |name: &str| only.is_empty() || only.iter().any(|word| word == name);
    let bench = bench::Bench::new(samples);
    let peers = peers::Peers::find(&folder);
    if wanted("descent") {
        descent::measure(&bench, &peers, &frames.unwrap_or_else(|| vec![100_000, 1_000_000]));
    }
    if wanted("edge") {
        edge::measure(&bench, &peers);
    }
    if wanted("relocation") {
        relocation::measure(&bench);
    }
    if wanted("check") {
        bench.check();
    }
    ExitCode::SUCCESS
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
fn main() {
    println!("{HELP}\n\nThere are no managed functions for this system.");
}
