//! The command line, the measurement and what is said of it.

use crate::proc::{self, Use};
use crate::stacks::{Guarded, Small, Suspended};
use cfi_stack::features::{self, Mechanisms};
use cfi_stack::thread::Thread;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const HELP: &str = "\
usage: scale [--stacks N] [--class guarded|small] [OPTIONS]

  --stacks N          how many (default 1000000); `fit`: as many as the machine's free memory allows
  --class guarded     coroutines of 4096 bytes, each with a guard (the default)
  --class small       stacks of 1024 bytes that share pages and have no guards
  --at-most BYTES     exit status 1 when a stack takes more: resident memory and page tables, bookkeeping included
  --vmas-at-most N    exit status 1 when the process has more mappings at the end
  --json              one JSON object instead of the table

Where the kernel has shadow stacks the program runs under one, and each stack has its own. Each stack is run until it suspends itself, and
resumed once more when all are there.";

struct Options {
    /// None: as many as fit.
    stacks: Option<u64>,
    small: bool,
    at_most: Option<u64>,
    vmas_at_most: Option<u64>,
    json: bool,
}

/// What was found.
struct Report {
    stacks: u64,
    small: bool,
    shadow: bool,
    before: Use,
    quarter: Use,
    after: Use,
    making: Duration,
    resuming: Duration,
}

pub fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("scale: {why}\nscale --help says more");
            return ExitCode::FAILURE;
        }
    };
    let measured = if options.small { measure::<Small>(&options) } else { measure::<Guarded>(&options) };
    let report = match measured {
        Ok(report) => report,
        Err(error) => {
            eprintln!("scale: {error}");
            return ExitCode::FAILURE;
        }
    };
    if options.json {
        report.print_json()
    } else {
        report.print()
    }
    let mut status = ExitCode::SUCCESS;
    if let Some(most) = options.at_most.filter(|&most| report.bytes_each() > most as f64) {
        eprintln!("scale: {:.0} bytes a stack, and {most} are allowed", report.bytes_each());
        status = ExitCode::FAILURE;
    }
    if let Some(most) = options.vmas_at_most.filter(|&most| report.after.mappings > most) {
        eprintln!("scale: {} mappings, and {most} are allowed", report.after.mappings);
        status = ExitCode::FAILURE;
    }
    status
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options { stacks: Some(1_000_000), small: false, at_most: None, vmas_at_most: None, json: false };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
        match word.as_str() {
            "--help" | "-h" => return Ok(None),
            "--stacks" => {
                let value = value()?;
                options.stacks = if value == "fit" { None } else { Some(positive(&value)?) };
            }
            "--class" => {
                options.small = match value()?.as_str() {
                    "guarded" => false,
                    "small" => true,
                    other => return Err(format!("there is no class `{other}`: guarded or small")),
                }
            }
            "--at-most" => options.at_most = Some(positive(&value()?)?),
            "--vmas-at-most" => options.vmas_at_most = Some(positive(&value()?)?),
            "--json" => options.json = true,
            other => return Err(format!("there is no `{other}`")),
        }
    }
    Ok(Some(options))
}

fn positive(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| format!("{text} is no positive number"))
}

fn measure<S: Suspended + 'static>(options: &Options) -> Result<Report, Box<dyn Error>> {
    let shadow = features::detect().enabled.intersects(Mechanisms::SHSTK | Mechanisms::GCS);
    let stacks = match options.stacks {
        Some(stacks) => stacks,
        None => fitting(options.small, shadow)?,
    };
    let thread = Thread::attach()?;
    let before = Use::now()?;
    let mut progress = Progress::new();
    // Growing would count what was given back meanwhile, and asks for one and a half times as much.
    let mut all = Vec::with_capacity(usize::try_from(stacks)?);
    let mut quarter = before;
    for number in 0..stacks {
        all.push(S::new().map_err(|error| format!("stack {}: {error}", number + 1))?);
        if number + 1 == stacks.div_ceil(4) {
            quarter = Use::now()?;
        }
        progress.tell("made", number + 1, stacks);
    }
    let making = progress.begin.elapsed();
    let after = Use::now()?;
    let mut progress = Progress::new();
    for (number, stack) in (1..).zip(&mut all) {
        let count = stack.resume();
        if count != 2 {
            return Err(format!("stack {number} says {count} when it is resumed for the second time").into());
        }
        progress.tell("resumed", number, stacks);
    }
    let resuming = progress.begin.elapsed();
    // The end of the process is theirs: unwinding a million coroutines is not what is measured.
    std::mem::forget((all, thread));
    Ok(Report { stacks, small: options.small, shadow, before, quarter, after, making, resuming })
}

/// How many the free memory allows, with some left for everybody else.
fn fitting(small: bool, shadow: bool) -> std::io::Result<u64> {
    let data = if small { 1347 } else { 4608 };
    let each = if shadow { data + 4096 } else { data };
    Ok((proc::available()? / 10 * 8 / each).max(1))
}

/// A word on stderr every other second.
struct Progress {
    begin: Instant,
    told: Instant,
}

impl Progress {
    fn new() -> Self {
        let now = Instant::now();
        Progress { begin: now, told: now }
    }

    fn tell(&mut self, what: &str, number: u64, of: u64) {
        const EVERY: u64 = 256;
        if number.is_multiple_of(EVERY) && self.told.elapsed() > Duration::from_secs(2) {
            self.told = Instant::now();
            eprintln!("scale: {number} of {of} {what}");
        }
    }
}

impl Report {
    fn bytes_each(&self) -> f64 {
        let grown = |after: u64, before: u64| after.saturating_sub(before) as f64;
        let resident = grown(self.after.resident, self.before.resident);
        (resident + grown(self.after.page_tables, self.before.page_tables)) / self.stacks as f64
    }

    fn class(&self) -> &'static str {
        if self.small { "small" } else { "guarded" }
    }

    fn print(&self) {
        let Report { stacks, shadow, before, quarter, after, making, resuming, .. } = self;
        let with = if *shadow { ", each with a shadow stack" } else { "" };
        println!("{stacks} suspended stacks, {}{with}", self.class());
        println!("  bytes a stack     {:>12.0}", self.bytes_each());
        println!("  resident          {:>12} bytes, {} before", after.resident, before.resident);
        println!("  page tables       {:>12} bytes, {} before", after.page_tables, before.page_tables);
        let (first, last) = (quarter.mappings, after.mappings);
        println!("  mappings          {last:>12}, {first} when a quarter was there, {} before", before.mappings);
        println!("  vm.max_map_count  {:>12}", proc::most_mappings());
        let each = |time: &Duration| time.as_nanos() as f64 / *stacks as f64;
        println!("  made              {:>12.2} s, {:.0} ns each", making.as_secs_f64(), each(making));
        println!("  resumed again     {:>12.2} s, {:.0} ns each", resuming.as_secs_f64(), each(resuming));
    }

    fn print_json(&self) {
        let Report { stacks, shadow, before, quarter, after, making, resuming, .. } = self;
        let three = |what: fn(&Use) -> u64| format!("[{},{},{}]", what(before), what(quarter), what(after));
        println!(
            "{{\"class\":\"{}\",\"stacks\":{stacks},\"shadow\":{shadow},\"bytes_each\":{:.1},\"resident\":{},\"page_tables\":{},\
             \"mappings\":{},\"making_s\":{:.3},\"resuming_s\":{:.3}}}",
            self.class(),
            self.bytes_each(),
            three(|usage| usage.resident),
            three(|usage| usage.page_tables),
            three(|usage| usage.mappings),
            making.as_secs_f64(),
            resuming.as_secs_f64()
        );
    }
}
