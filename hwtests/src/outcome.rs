//! The codes of the attack table, the report of a case, and how reports are written.

use crate::class::Feature;
use std::fmt::{self, Write};
use std::time::Duration;

/// How an attack ended; the attack table defines each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Authentication fault: SIGILL, ILL_ILLOPN, at an `aut` instruction.
    F,
    /// Our own check: SIGTRAP, TRAP_BRKPT, at the `brk` that the case names: `#0xc470` (key A), `#0xc471` (B), `#0xc474` (a seal).
    B,
    /// A compiled return ran into exactly the poisoned address: SIGSEGV, SEGV_MAPERR.
    T,
    /// Shadow stack violation: SIGSEGV, SEGV_CPERR.
    S,
    /// A store that memory forbids: SIGSEGV, SEGV_ACCERR, at that address.
    W,
    /// The guard: SIGSEGV on it, nothing beyond touched.
    G,
    /// The library ended the process: one line, SIGABRT.
    K,
    /// A typed error, and the stack runs on.
    E,
    /// Completed with the right result.
    C,
    /// Accepted: a residual risk.
    R,
    /// An end that the attack table spells out, by signal and si_code, or by the kernel's answer. The case judges it.
    X,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Whether a case passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Exactly as the table says.
    Pass,
    /// Anything else, silence too.
    Fail,
    /// The mechanism is not there.
    Skip,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Fail => "fail",
            Outcome::Skip => "skip",
        }
    }
}

/// What one case found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Verdict.
    pub outcome: Outcome,
    /// The codes seen, each once, in order; the first is the row's own.
    pub codes: Vec<Code>,
    /// The signal that came first, 0 when there was none.
    pub signal: i32,
    /// Its si_code.
    pub si_code: i32,
    /// Attacks made, controls not counted.
    pub tries: u64,
    /// Of these, how many a signature let through.
    pub accepted: u64,
    /// What was seen, or what went wrong, or what is missing.
    pub reason: String,
    /// For a skip: any of these features would have let the case run. Empty when something else is missing.
    pub missing: Vec<Feature>,
}

impl Report {
    /// The mechanism is missing.
    pub fn skip(missing: &[Feature], reason: impl Into<String>) -> Report {
        Report {
            outcome: Outcome::Skip,
            codes: Vec::new(),
            signal: 0,
            si_code: 0,
            tries: 0,
            accepted: 0,
            reason: reason.into(),
            missing: missing.to_vec(),
        }
    }

    /// Something is wrong that no child showed.
    pub fn fail(reason: impl Into<String>) -> Report {
        Report { outcome: Outcome::Fail, ..Report::skip(&[], reason) }
    }

    fn code(&self) -> String {
        self.codes.iter().map(Code::to_string).collect::<Vec<_>>().join("+")
    }
}

/// How many of each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Passed.
    pub passed: u64,
    /// Failed.
    pub failed: u64,
    /// Skipped.
    pub skipped: u64,
}

impl Counts {
    /// Counts one more.
    pub fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Pass => self.passed += 1,
            Outcome::Fail => self.failed += 1,
            Outcome::Skip => self.skipped += 1,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// How reports are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people, with a last line of counts.
    Table,
    /// One object per line.
    Json,
}

/// The line above a table.
pub fn heading() -> String {
    format!(
        "{:<5} {:<5} {:<6} {:>6} {:>7} {:>6} {:>8} {:>5}  what was seen",
        "case", "", "code", "signal", "si_code", "tries", "accepted", "s"
    )
}

/// One report as a line, with the time that the case took.
pub fn line(format: Format, case: &str, class: &str, report: &Report, took: Duration) -> String {
    let seconds = took.as_secs_f64();
    let Report { outcome, signal, si_code, tries, accepted, reason, .. } = report;
    let code = report.code();
    match format {
        Format::Table => {
            let code = if code.is_empty() { "-" } else { &code };
            let name = outcome.name();
            format!(
                "{case:<5} {name:<5} {code:<6} {signal:>6} {si_code:>7} {tries:>6} {accepted:>8} {seconds:>5.1}  {reason}"
            )
        }
        Format::Json => format!(
            "{{\"case\":{},\"class\":{},\"outcome\":\"{}\",\"code\":\"{code}\",\"signal\":{signal},\"si_code\":{si_code},\
             \"tries\":{tries},\"accepted\":{accepted},\"seconds\":{seconds:.1},\"reason\":{}}}",
            quoted(case),
            quoted(class),
            outcome.name(),
            quoted(reason),
        ),
    }
}

/// A JSON string.
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => {
                out.push('\\');
                out.push(character);
            }
            '\n' => out.push_str("\\n"),
            character if character < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            character => out.push(character),
        }
    }
    out.push('"');
    out
}
