//! Adds the attempts of one case up into its report.

use crate::child::{End, How};
use crate::class::Class;
use crate::outcome::{Code, Outcome, Report};
use crate::progress;

/// The attempts of one case so far.
pub struct Tally<'a> {
    class: &'a Class,
    codes: Vec<Code>,
    signal: i32,
    si_code: i32,
    tries: u64,
    accepted: u64,
    /// Attacks that passed, with how they ended.
    passed: Vec<(Code, String)>,
    said: Vec<String>,
    wrong: Vec<String>,
}

impl<'a> Tally<'a> {
    /// None yet.
    pub fn new(class: &'a Class) -> Self {
        Tally {
            class,
            codes: Vec::new(),
            signal: 0,
            si_code: 0,
            tries: 0,
            accepted: 0,
            passed: Vec::new(),
            said: Vec::new(),
            wrong: Vec::new(),
        }
    }

    /// The class of CPU that the case runs on.
    pub fn class(&self) -> &'a Class {
        self.class
    }

    /// A control: the run without the corruption must complete.
    pub fn control(&mut self, what: &str, end: &End) {
        match end.code(self.class) {
            Ok(Code::C) => {}
            Ok(code) => self.wrong.push(format!("control {what}: {code} instead of C")),
            Err(text) => self.wrong.push(format!("control {what}: {text}")),
        }
    }

    /// An attack that must end in one of `allowed`.
    pub fn attack(&mut self, what: &str, end: &End, allowed: &[Code]) -> Option<Code> {
        self.attack_of_many(what, what, end, allowed)
    }

    /// One of many attacks alike, which the report counts under the name of all; `what` is its own.
    pub fn attack_of_many(&mut self, all: &str, what: &str, end: &End, allowed: &[Code]) -> Option<Code> {
        self.tries += 1;
        progress::tick(what);
        match end.code(self.class) {
            Ok(code) if allowed.contains(&code) => {
                self.note(code, end);
                self.passed.push((code, all.into()));
                Some(code)
            }
            Ok(code) => {
                self.note(code, end);
                self.fail(format!("{what}: {code} instead of {allowed:?} ({end})"));
                None
            }
            Err(text) => {
                self.fail(format!("{what}: {text}"));
                None
            }
        }
    }

    /// An attack whose end the case has judged itself.
    pub fn seen(&mut self, what: &str, code: Code, end: &End) {
        self.tries += 1;
        self.note(code, end);
        self.passed.push((code, what.into()));
    }

    /// Many attempts alike that ended with the same code.
    pub fn alike(&mut self, what: &str, code: Code, attempts: u64, end: &End) {
        self.tries += attempts;
        self.note(code, end);
        self.passed.push((code, format!("{what} ({attempts})")));
    }

    /// One of many tries of the same attack: a code of `caught`, or accepted with C. Whether it was accepted must be what the test
    /// foresaw, where it could.
    pub fn one_of_many(&mut self, what: &str, end: &End, caught: &[Code], foreseen: Option<bool>) {
        self.tries += 1;
        progress::tick(&format!("{what}: {} tries", self.tries));
        let accepted = match end.code(self.class) {
            Ok(Code::C) => true,
            Ok(code) if caught.contains(&code) => {
                self.note(code, end);
                false
            }
            Ok(code) => return self.fail(format!("{what}: {code} instead of {caught:?} ({end})")),
            Err(text) => return self.fail(format!("{what}: {text}")),
        };
        self.accepted += u64::from(accepted);
        if foreseen.is_some_and(|foreseen| foreseen != accepted) {
            self.fail(format!("{what}: accepted {accepted}, but the signature says otherwise"));
        }
    }

    /// Of `tries` tries at most three times as many as a signature of the CPU's width lets through may be `accepted`.
    pub fn rate(&mut self, what: &str, tries: u64, accepted: u64) {
        let values = 1_u64 << self.class.features.pac_bits.min(32);
        self.said.push(format!("{what}: {accepted} of {tries} accepted"));
        if accepted * values > tries * 3 {
            self.fail(format!("{what}: {accepted} of {tries} accepted, more than 3 in {values}"));
        }
    }

    /// How many were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Whether nothing has gone wrong so far.
    pub fn is_right(&self) -> bool {
        self.wrong.is_empty()
    }

    /// Something else is wrong.
    pub fn fail(&mut self, what: impl Into<String>) {
        self.wrong.push(what.into());
    }

    /// Something worth saying.
    pub fn say(&mut self, what: impl Into<String>) {
        self.said.push(what.into());
    }

    fn note(&mut self, code: Code, end: &End) {
        if !self.codes.contains(&code) {
            self.codes.push(code);
        }
        if self.signal == 0 && end.how == How::Caught {
            (self.signal, self.si_code) = (end.signal, end.si_code);
        }
    }

    /// The report.
    pub fn report(self) -> Report {
        let right = self.wrong.is_empty();
        /// More than this many failures alike help nobody.
        const SHOWN: usize = 6;
        let more = self.wrong.len().saturating_sub(SHOWN);
        let mut reason = if right { self.said } else { self.wrong };
        for code in self.codes.iter().filter(|_| right) {
            let of_code = || self.passed.iter().filter(|(of, _)| of == code).map(|(_, what)| what.as_str());
            let mut whats: Vec<(&str, usize)> = Vec::new();
            for what in of_code() {
                match whats.iter_mut().find(|(name, _)| *name == what) {
                    Some((_, count)) => *count += 1,
                    None => whats.push((what, 1)),
                }
            }
            if !whats.is_empty() {
                let names = whats.iter().map(|(what, count)| match count {
                    1 => (*what).to_owned(),
                    _ => format!("{what} ×{count}"),
                });
                reason.push(format!("{code} ×{}: {}", of_code().count(), names.collect::<Vec<_>>().join("; ")));
            }
        }
        if !right && more > 0 {
            reason.truncate(SHOWN);
            reason.push(format!("and {more} more"));
        }
        Report {
            outcome: if right { Outcome::Pass } else { Outcome::Fail },
            codes: self.codes,
            signal: self.signal,
            si_code: self.si_code,
            tries: self.tries,
            accepted: self.accepted,
            reason: reason.join(" | "),
            missing: Vec::new(),
        }
    }
}
