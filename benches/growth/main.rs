//! What growing by moving frames costs, against the same work on a stack that never moves.
//!
//! Every line is a ratio within one run: the two sides take turns, and medians are compared. `README.md` beside this
//! folder says what each line means. Nothing here asserts a time.

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod managed;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod measure;

const HELP: &str = "\
usage: cargo bench --bench growth [-- [descent] [relocation] [check] [--samples N]]

  descent      from 4 KiB to 10^5 and 10^6 frames against a fixed stack, first and repeated
  relocation   one move by number of frames against memcpy of the same bytes
               (with --features steps also where its time goes)
  check        the limit check: a loop calling a leaf, and fib, with and without it
  --samples N  measurements of each side (default 15)";

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn main() {
    let mut samples = 15;
    let mut only = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--help" | "-h" => return println!("{HELP}"),
            // What cargo passes on to every benchmark.
            "--bench" => {}
            "--samples" => match words.next().and_then(|number| number.parse().ok()).filter(|&number| number > 0) {
                Some(number) => samples = number,
                None => refuse("--samples wants a positive number"),
            },
            "descent" | "relocation" | "check" => only.push(word),
            other => refuse(&format!("unknown argument `{other}`")),
        }
    }
    let wanted = |name: &str| only.is_empty() || only.iter().any(|word| word == name);
    managed::register();
    let bench = measure::Bench::new(samples);
    if wanted("descent") {
        bench.descent();
    }
    if wanted("relocation") {
        bench.relocation();
    }
    if wanted("check") {
        bench.check();
    }
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
fn main() {
    println!("{HELP}\n\nThere are no managed functions for this system.");
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn refuse(why: &str) -> ! {
    eprintln!("{why}\n{HELP}");
    std::process::exit(1)
}
