//! The attack battery and self-test of cfi-stack: one static program for real CPUs and emulated ones.
//!
//! Each attack runs in a forked child whose signal handler leaves the evidence ([`child`]); the parent compares it with the
//! code that the attack table says for what this CPU enforces ([`class`], [`outcome`]). The cases are in [`cases`] and
//! [`selftest`], the managed code that they run in `asm/`.

mod attack;
mod backtrace;
mod cases;
mod child;
mod class;
mod cli;
mod cpu;
mod foreign;
mod frames;
mod managed;
mod memory;
mod outcome;
mod progress;
mod selftest;
mod stepper;
mod tally;

use cases::Case;
use cfi_start as _;
use class::Class;
use cli::{Command, Options};
use outcome::{Counts, Format, Outcome, Report};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let cases: Vec<&Case> = cases::ATTACKS.iter().chain(selftest::SELFTESTS).collect();
    let ids: Vec<&str> = cases.iter().map(|case| case.id).collect();
    let mut out = std::io::stdout().lock();
    let done = match cli::parse(std::env::args_os().skip(1), &ids) {
        Ok(Command::Help) => write!(out, "{}", cli::HELP).map(|()| true),
        Ok(Command::List(format)) => list(&mut out, &cases, format).map(|()| true),
        Ok(Command::Run(options)) => run(&mut out, &cases, options),
        Err(text) => {
            tell(&format!("{text}\nhwtests --help says more"));
            Ok(false)
        }
    };
    match done.and_then(|right| out.flush().map(|()| right)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            tell(&format!("cannot write the report: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// A word on stderr, if anybody can hear it.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "hwtests: {text}");
}

fn list(out: &mut impl Write, cases: &[&Case], format: Format) -> io::Result<()> {
    for Case { id, title, .. } in cases {
        match format {
            Format::Table => writeln!(out, "{id}  {title}")?,
            Format::Json => {
                writeln!(out, "{{\"case\":{},\"title\":{}}}", outcome::quoted(id), outcome::quoted(title))?;
            }
        }
    }
    Ok(())
}

/// Whether nothing failed.
fn run(out: &mut impl Write, cases: &[&Case], options: Options) -> io::Result<bool> {
    let Options { only, require, class, format } = options;
    child::prepare();
    let class = Class::detect(class);
    let mut counts = Counts::default();
    // Each line at once: what a child inherits must not be written twice.
    let report = |out: &mut dyn Write, counts: &mut Counts, case: &str, report: &Report, took: Duration| {
        counts.add(report.outcome);
        writeln!(out, "{}", outcome::line(format, case, &class.name, report, took)).and_then(|()| out.flush())
    };
    if format == Format::Table {
        let enabled: Vec<_> = class.features.enabled.names().collect();
        let enabled = if enabled.is_empty() { "nothing enforced".into() } else { enabled.join(" ") };
        writeln!(out, "{}: {enabled}\n{}", class.name, outcome::heading())?;
        out.flush()?;
    }
    for &feature in require.iter().filter(|&&feature| !class.has(feature)) {
        let missing = Report::fail(format!("{} is required and not enabled here", feature.name()));
        report(out, &mut counts, "-", &missing, Duration::ZERO)?;
    }
    let chosen = |id: &str| only.as_ref().is_none_or(|only| only.iter().any(|wanted| wanted == id));
    for case in cases.iter().filter(|case| chosen(case.id)) {
        progress::begin(case.id);
        let start = Instant::now();
        let mut found = (case.run)(&class);
        if found.outcome == Outcome::Skip && found.missing.iter().any(|missing| require.contains(missing)) {
            found = Report::fail(format!("skipped, though it is required: {}", found.reason));
        }
        report(out, &mut counts, case.id, &found, start.elapsed())?;
    }
    if format == Format::Table {
        writeln!(out, "{counts}")?;
    }
    Ok(counts.failed == 0)
}
