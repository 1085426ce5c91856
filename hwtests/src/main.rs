//! The attack battery and self-test of cfi-stack: one static program for real CPUs and emulated ones.
//!
//! Each attack runs in a forked child whose signal handler leaves the evidence ([`child`]); the parent compares it with the
//! code that the attack table says for what this CPU enforces ([`class`], [`outcome`]). The cases are in [`cases`] and
//! [`selftest`], the managed code that they run in `asm/`.

mod attack;
mod cases;
mod child;
mod class;
mod cli;
mod cpu;
mod managed;
mod memory;
mod outcome;
mod progress;
mod selftest;
mod tally;

use cases::Case;
use cfi_start as _;
use class::Class;
use cli::{Command, Options};
use outcome::{Counts, Format, Outcome, Report};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cases: Vec<&Case> = cases::ATTACKS.iter().chain(selftest::SELFTESTS).collect();
    let ids: Vec<&str> = cases.iter().map(|case| case.id).collect();
    match cli::parse(std::env::args().skip(1), &ids) {
        Ok(Command::Help) => print!("{}", cli::HELP),
        Ok(Command::List(format)) => list(&cases, format),
        Ok(Command::Run(options)) => return run(&cases, options),
        Err(text) => {
            eprintln!("hwtests: {text}\nhwtests --help says more");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn list(cases: &[&Case], format: Format) {
    for Case { id, title, .. } in cases {
        match format {
            Format::Table => println!("{id}  {title}"),
            Format::Json => println!("{{\"case\":{},\"title\":{}}}", outcome::quoted(id), outcome::quoted(title)),
        }
    }
}

fn run(cases: &[&Case], options: Options) -> ExitCode {
    let Options { only, require, class, format } = options;
    child::prepare();
    let class = Class::detect(class);
    let mut counts = Counts::default();
    let mut tell = |case: &str, report: &Report| {
        counts.add(report.outcome);
        println!("{}", outcome::line(format, case, &class.name, report));
    };
    if format == Format::Table {
        let enabled: Vec<_> = class.features.enabled.names().collect();
        println!("{}: {}", class.name, if enabled.is_empty() { "nothing enforced".into() } else { enabled.join(" ") });
        println!("{}", outcome::heading());
    }
    for &feature in require.iter().filter(|&&feature| !class.has(feature)) {
        tell("-", &Report::fail(format!("{} is required and not enabled here", feature.name())));
    }
    let chosen = |id: &str| only.as_ref().is_none_or(|only| only.iter().any(|wanted| wanted == id));
    for case in cases.iter().filter(|case| chosen(case.id)) {
        progress::begin(case.id);
        let mut report = (case.run)(&class);
        if report.outcome == Outcome::Skip && report.missing.iter().any(|missing| require.contains(missing)) {
            report = Report::fail(format!("skipped, though it is required: {}", report.reason));
        }
        tell(case.id, &report);
    }
    if format == Format::Table {
        println!("{counts}");
    }
    if counts.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
