//! The command line and the tables.

use crate::count;
use crate::measure::{self, Nanoseconds};
use crate::subjects::{self, Group, OURS, Run, Subject};
use cfi_stack::features::{self, Mechanisms};
use std::io::{IsTerminal, Write};
use std::process::{Command, ExitCode};

const HELP: &str = "\
usage: switching [GROUP…] [OPTIONS]

  GROUP               inlined, called, stub, stub-flags, stub-no-fp, stub-new, reused, lent, fresh
                      (default: all; README.md says what they are)
  --only LIBRARY      this library alone; may be given more than once
  --samples N         measurements of each library, in turns (default 41)
  --count             instructions a round instead of times; on an emulated CPU: ci/on --count
  --callgrind         the same by callgrind (valgrind must be installed)
  --at-most N         with --count or --callgrind: exit status 1 if ours takes more in a group
  --rounds N          run N rounds and print nothing: for a debugger or a profiler; wants one GROUP and --only
  --full-seal         arm64: contexts are sealed with the callee-saved registers
  --json              one JSON object a line

A library that is not built in, or does not work under a shadow stack, is named and counted as skipped.
The last line says how many lines there were. Exit status: 0, or 1 when something failed.";

/// What was asked for.
struct Options {
    groups: Vec<String>,
    only: Vec<String>,
    samples: usize,
    how: How,
    at_most: Option<f64>,
    full_seal: bool,
    json: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum How {
    Time,
    Count,
    Callgrind,
    Rounds(u64),
}

pub fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("switching: {why}\nswitching --help says more");
            return ExitCode::FAILURE;
        }
    };
    if options.full_seal
        && let Err(error) = cfi_stack::thread::seal_callee_saved()
    {
        eprintln!("switching: {error}");
        return ExitCode::FAILURE;
    }
    subjects::flags::alike();
    let mut tally = Tally::default();
    let shadow = features::detect().enabled.intersects(Mechanisms::SHSTK | Mechanisms::GCS);
    for group in subjects::groups() {
        if options.groups.is_empty() || options.groups.iter().any(|name| name == group.name) {
            measure_group(group, &options, shadow, &mut tally);
        }
    }
    if matches!(options.how, How::Rounds(_)) {
        return ExitCode::SUCCESS;
    }
    if !options.json {
        println!("{} measured, {} failed, {} skipped", tally.measured, tally.failed, tally.skipped);
    }
    if tally.failed == 0 && tally.measured > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let names: Vec<_> = subjects::groups().iter().map(|group| group.name).collect();
    let mut options = Options {
        groups: Vec::new(),
        only: Vec::new(),
        samples: 41,
        how: How::Time,
        at_most: None,
        full_seal: false,
        json: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
        match word.as_str() {
            "--help" | "-h" => return Ok(None),
            "--only" => options.only.push(value()?),
            "--samples" => options.samples = positive(&value()?)? as usize,
            "--count" => options.how = How::Count,
            "--callgrind" => options.how = How::Callgrind,
            "--rounds" => options.how = How::Rounds(positive(&value()?)?),
            "--at-most" => options.at_most = Some(positive(&value()?)? as f64),
            "--full-seal" => options.full_seal = true,
            "--json" => options.json = true,
            name if names.contains(&name) => options.groups.push(word),
            other => return Err(format!("there is no `{other}`")),
        }
    }
    let known = |library: &String| {
        subjects::groups().iter().any(|group| group.subjects.iter().any(|subject| subject.library == library))
    };
    match &options {
        Options { only, .. } if !only.iter().all(known) => {
            Err("--only wants the name of a library in the report".into())
        }
        Options { how: How::Rounds(_), only, groups, .. } if only.len() != 1 || groups.len() != 1 => {
            Err("--rounds wants one group and one --only".into())
        }
        Options { how: How::Time | How::Rounds(_), at_most: Some(_), .. } => {
            Err("--at-most wants --count or --callgrind: a time is no promise".into())
        }
        _ => Ok(Some(options)),
    }
}

fn positive(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| format!("{text} is no positive number"))
}

#[derive(Default)]
struct Tally {
    measured: usize,
    failed: usize,
    skipped: usize,
}

/// One line of a table.
struct Line {
    library: &'static str,
    result: Outcome,
}

enum Outcome {
    Time(Nanoseconds),
    Instructions(f64),
    Failed(String),
    Skipped(String),
}

/// A library, and how to make its run or why not.
type Made = (&'static str, Result<fn() -> Run, String>);

fn measure_group(group: Group, options: &Options, shadow: bool, tally: &mut Tally) {
    let wanted =
        |subject: &&Subject| options.only.is_empty() || options.only.iter().any(|name| name == subject.library);
    let makes: Vec<Made> = group
        .subjects
        .iter()
        .filter(wanted)
        .map(|subject| match subject.make {
            Ok(_) if shadow && !subject.bears_shadow_stacks => {
                (subject.library, Err("it does not run on a thread with a shadow stack".into()))
            }
            make => (subject.library, make.map_err(String::from)),
        })
        .collect();
    let mut timed = match options.how {
        How::Time => times(group.name, &makes, options.samples),
        How::Rounds(rounds) => {
            makes.iter().filter_map(|(_, make)| make.as_ref().ok()).for_each(|make| make()(rounds));
            return;
        }
        How::Count | How::Callgrind => Vec::new(),
    }
    .into_iter();
    let lines = makes.into_iter().map(|(library, make)| {
        let result = match (make, options.how) {
            (Err(why), _) => Outcome::Skipped(why),
            (Ok(make), How::Count) => count::instructions(make).map_or_else(Outcome::Failed, Outcome::Instructions),
            (Ok(_), How::Callgrind) => {
                callgrind(group.name, library).map_or_else(Outcome::Failed, Outcome::Instructions)
            }
            (Ok(_), _) => timed.next().map_or(Outcome::Failed("it was not timed".into()), Outcome::Time),
        };
        Line { library, result: limited(library, result, options.at_most) }
    });
    let lines: Vec<Line> = lines.collect();
    for line in &lines {
        match line.result {
            Outcome::Time(_) | Outcome::Instructions(_) => tally.measured += 1,
            Outcome::Failed(_) => tally.failed += 1,
            Outcome::Skipped(_) => tally.skipped += 1,
        }
    }
    if options.json { print_json(group.name, &lines) } else { print_table(&group, &lines) }
}

/// A count of ours that is over the limit is a failure.
fn limited(library: &str, result: Outcome, at_most: Option<f64>) -> Outcome {
    match (result, at_most) {
        (Outcome::Instructions(count), Some(most)) if library == OURS && count > most => {
            Outcome::Failed(format!("{count:.1} instructions a round, and {most} are allowed"))
        }
        (result, _) => result,
    }
}

/// The times of those that can be measured, in order.
fn times(name: &str, makes: &[Made], samples: usize) -> Vec<Nanoseconds> {
    let mut runs: Vec<Run> = makes.iter().filter_map(|(_, make)| make.as_ref().ok()).map(|make| make()).collect();
    let progress = std::io::stderr().is_terminal();
    let times = measure::interleaved(&mut runs, samples, |sample| {
        if progress {
            eprint!("\r{name}: {sample} of {samples} ");
            let _ = std::io::stderr().flush();
        }
    });
    if progress {
        eprint!("\r{:40}\r", "");
    }
    // Suspended coroutines would be unwound, and some of the libraries cannot: the end of the process is theirs.
    std::mem::forget(runs);
    times
}

/// Callgrind's count of two runs of this program, subtracted.
fn callgrind(group: &str, library: &str) -> Result<f64, String> {
    const ROUNDS: u64 = 2000;
    let run = |rounds: u64| {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(program)
            .args([group, "--only", library, "--rounds", &rounds.to_string()])
            .output()
            .map_err(|error| format!("valgrind: {error}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let count = text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse::<u64>().ok());
        count.ok_or_else(|| format!("valgrind counted nothing: {}", text.lines().last().unwrap_or("it said nothing")))
    };
    Ok((run(2 * ROUNDS)? as f64 - run(ROUNDS)? as f64) / ROUNDS as f64)
}

fn print_table(group: &Group, lines: &[Line]) {
    println!("{}: {}", group.name, group.what);
    let ours = lines.iter().find(|line| line.library == OURS).and_then(|line| numbers(&line.result));
    for Line { library, result } in lines {
        let ratio = match (ours, numbers(result)) {
            (Some(ours), Some(theirs)) if *library != OURS => {
                format!("   ours is {:.2} of it ({:.2})", ours.median / theirs.median, ours.least / theirs.least)
            }
            _ => String::new(),
        };
        match result {
            Outcome::Time(Nanoseconds { median, least }) => {
                println!("  {library:<16} {median:>9.2} ns  (least {least:>9.2}){ratio}");
            }
            Outcome::Instructions(count) => println!("  {library:<16} {count:>9.1} instructions{ratio}"),
            Outcome::Failed(why) => println!("  {library:<16} FAILED: {why}"),
            Outcome::Skipped(why) => println!("  {library:<16} skipped: {why}"),
        }
    }
}

/// A count is both: it is the same each time.
fn numbers(result: &Outcome) -> Option<Nanoseconds> {
    match *result {
        Outcome::Time(time) => Some(time),
        Outcome::Instructions(count) => Some(Nanoseconds { median: count, least: count }),
        Outcome::Failed(_) | Outcome::Skipped(_) => None,
    }
}

fn print_json(group: &str, lines: &[Line]) {
    for Line { library, result } in lines {
        let rest = match result {
            Outcome::Time(Nanoseconds { median, least }) => {
                format!("\"median_ns\":{median:.3},\"least_ns\":{least:.3}")
            }
            Outcome::Instructions(count) => format!("\"instructions\":{count:.2}"),
            Outcome::Failed(why) => format!("\"failed\":{why:?}"),
            Outcome::Skipped(why) => format!("\"skipped\":{why:?}"),
        };
        println!("{{\"group\":\"{group}\",\"library\":\"{library}\",{rest}}}");
    }
}
