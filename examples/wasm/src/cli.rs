//! The command line.

use crate::compile::{Key, RESERVE};
use crate::error::Error;
use crate::store::Config;
use crate::tamper::Tamper;
use cfi_stack::Policy;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

/// Shown by `--help`.
pub const HELP: &str = "\
WebAssembly on stacks that start at one page and grow by moving their frames.

usage:
  wasm run FILE [--invoke NAME ARGS...] [options]   run a function of a binary module
                                                    (without --invoke: `_start` or `main`)
  wasm suite [--only FILE,FILE...] [options]        run files of the WebAssembly specification's suite
  wasm checklist [--only ITEM,ITEM...] [--list] [--every N] [options]
                                                    what must survive when a stack grows, item by item
  wasm --help | --version

options:
  --stack BYTES         first stack segment (default 4096); sizes take K, M, G
  --max BYTES           largest stack segment (default 64M; suite: 4M, 16K with --relocate always; checklist: 1M)
  --relocate always     move the whole stack at every check, not only when it is full
  --key a|b             key that signs return addresses on arm64 (default a)
  --format text|json    how to report (default text)
  --list                checklist: only name the items
  --every N             checklist: of depths and offsets that are swept, only each N-th (default 1)
  --stats               run, text: growths, frames moved, largest stack
  --tamper FRAME:BIT[:before|after]
                        run: flip a bit of the return address of the FRAME-th frame from the top, as the first
                        growth begins (before) or when it has moved the frames (after, the default)

exit status: 0, or 1 for a trap, a failed assertion or a mistake; a program's own status if it ends itself;
a signal where tampering is caught by the CPU.
";

/// How to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One object.
    Json,
}

/// `wasm run`.
#[derive(Debug)]
pub struct Run {
    /// The module.
    pub file: PathBuf,
    /// Function and arguments.
    pub invoke: Option<(String, Vec<String>)>,
    /// Stacks and key.
    pub config: Config,
    /// How to report.
    pub format: Format,
    /// Report numbers as text too.
    pub stats: bool,
    /// The attack to play.
    pub tamper: Option<Tamper>,
}

/// `wasm suite`.
#[derive(Debug)]
pub struct Suite {
    /// Names of files; all if empty.
    pub only: Vec<String>,
    /// Stacks and key.
    pub config: Config,
    /// How to report.
    pub format: Format,
}

/// `wasm checklist`.
#[derive(Debug)]
pub struct Checklist {
    /// Names of items, or their first parts; all if empty.
    pub only: Vec<String>,
    /// Only name them.
    pub list: bool,
    /// Of what is swept, each so-manieth is taken.
    pub every: usize,
    /// Stacks and key.
    pub config: Config,
}

/// What was asked for.
#[derive(Debug)]
pub enum Command {
    /// The help text.
    Help,
    /// The version.
    Version,
    /// One program.
    Run(Box<Run>),
    /// The suite.
    Suite(Suite),
    /// The growth checklist.
    Checklist(Checklist),
}

fn usage(text: impl Into<String>) -> Error {
    Error::Usage(format!("{} (see wasm --help)", text.into()))
}

/// Reads a size with an optional suffix K, M or G.
fn size(option: &str, text: &str) -> Result<usize, Error> {
    let wrong = || usage(format!("{option} `{text}`: give a number of bytes, as in 4096, 64K or 16M"));
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 1 << 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1 << 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<usize>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(wrong)
}

/// Options as they are met.
#[derive(Default)]
struct Options {
    positional: Vec<String>,
    invoke: Option<(String, Vec<String>)>,
    only: Option<Vec<String>>,
    stack: Option<usize>,
    max: Option<usize>,
    always: bool,
    key: Option<Key>,
    format: Option<Format>,
    stats: bool,
    list: bool,
    every: Option<usize>,
    tamper: Option<Tamper>,
}

/// Reads the arguments after the program's name.
///
/// # Errors
/// [`Error::Usage`] says what is wrong and what to write instead.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Error> {
    let mut args = args.into_iter().peekable();
    let text = |arg: OsString| arg.into_string().map_err(|arg| usage(format!("{} is not UTF-8", arg.display())));
    let Some(command) = args.next().map(text).transpose()? else {
        return Err(usage("say what to do: `wasm run FILE`, `wasm suite` or `wasm checklist`"));
    };
    match command.as_str() {
        "--help" | "-h" | "help" => return Ok(Command::Help),
        "--version" | "-V" => return Ok(Command::Version),
        "run" | "suite" | "checklist" => {}
        other => return Err(usage(format!("unknown command `{other}`: `run`, `suite` or `checklist`"))),
    }
    let mut options = Options::default();
    while let Some(arg) = args.next().map(text).transpose()? {
        let (name, mut inline) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
            _ => (arg.clone(), None),
        };
        let mut value = || match inline.take() {
            Some(value) => Ok(value),
            None => args.next().map(text).transpose()?.ok_or_else(|| usage(format!("{name} needs a value"))),
        };
        match name.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--stack" => options.stack = Some(size("--stack", &value()?)?),
            "--max" => options.max = Some(size("--max", &value()?)?),
            "--relocate" => match value()?.as_str() {
                "always" => options.always = true,
                other => return Err(usage(format!("--relocate `{other}`: only `always`"))),
            },
            "--key" => match value()?.as_str() {
                "a" => options.key = Some(Key::A),
                "b" => options.key = Some(Key::B),
                other => return Err(usage(format!("--key `{other}`: `a` or `b`"))),
            },
            "--format" => match value()?.as_str() {
                "text" => options.format = Some(Format::Text),
                "json" => options.format = Some(Format::Json),
                other => return Err(usage(format!("--format `{other}`: `text` or `json`"))),
            },
            "--only" => options.only = Some(value()?.split(',').map(str::to_owned).collect()),
            "--list" => options.list = true,
            "--every" => options.every = Some(size("--every", &value()?)?),
            "--stats" => options.stats = true,
            "--tamper" => options.tamper = Some(Tamper::parse(&value()?)?),
            "--invoke" => {
                let function = value()?;
                let mut given = Vec::new();
                while let Some(next) = args.next_if(|next| !next.as_encoded_bytes().starts_with(b"--")) {
                    given.push(text(next)?);
                }
                options.invoke = Some((function, given));
            }
            other if other.starts_with("--") => return Err(usage(format!("unknown option {other}"))),
            _ => options.positional.push(arg),
        }
    }
    if command != "checklist" && (options.list || options.every.is_some()) {
        return Err(usage("--list and --every belong to `wasm checklist`"));
    }
    match command.as_str() {
        "suite" => options.suite(),
        "checklist" => options.checklist(),
        _ => options.run(),
    }
}

impl Options {
    fn config(&self, maximum: usize) -> Result<Config, Error> {
        let policy = Policy {
            initial: self.stack.unwrap_or(4096),
            maximum: self.max.unwrap_or(maximum.max(self.stack.unwrap_or(0))),
            reserve: RESERVE,
            relocate_always: self.always,
            poison: self.always,
            ..Policy::default()
        };
        // SAFETY: asks for a constant of the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        policy.validate(page).map_err(|error| {
            usage(format!("--stack {} --max {}: {error}; a page is {page} bytes", policy.initial, policy.maximum))
        })?;
        Ok(Config { policy, key: self.key.unwrap_or(Key::A) })
    }

    fn run(self) -> Result<Command, Error> {
        if self.only.is_some() {
            return Err(usage("--only belongs to `wasm suite` and `wasm checklist`"));
        }
        let config = self.config(64 << 20)?;
        let [file] = &self.positional[..] else {
            return Err(usage(match self.positional.len() {
                0 => "`wasm run` needs a file: a binary module, .wasm".to_owned(),
                _ => format!(
                    "one file only, not also `{}`; a function's arguments follow --invoke NAME",
                    self.positional[1]
                ),
            }));
        };
        Ok(Command::Run(Box::new(Run {
            file: PathBuf::from(file),
            config,
            invoke: self.invoke,
            format: self.format.unwrap_or(Format::Text),
            stats: self.stats,
            tamper: self.tamper,
        })))
    }

    fn checklist(self) -> Result<Command, Error> {
        if self.invoke.is_some() || self.tamper.is_some() || self.stats || self.format.is_some() {
            return Err(usage("`wasm checklist` takes no --invoke, --stats, --tamper or --format"));
        }
        if !self.positional.is_empty() {
            return Err(usage("`wasm checklist` takes no file; choose items with --only"));
        }
        let every = self.every.unwrap_or(1);
        if every == 0 {
            return Err(usage("--every 0: 1 takes all, 2 every other one"));
        }
        let config = self.config(1 << 20)?;
        Ok(Command::Checklist(Checklist { only: self.only.unwrap_or_default(), list: self.list, every, config }))
    }

    fn suite(self) -> Result<Command, Error> {
        if self.invoke.is_some() || self.tamper.is_some() || self.stats || !self.positional.is_empty() {
            return Err(usage("`wasm suite` takes no file, --invoke, --stats or --tamper; choose files with --only"));
        }
        let config = self.config(if self.always { 16 << 10 } else { 4 << 20 })?;
        Ok(Command::Suite(Suite {
            only: self.only.unwrap_or_default(),
            config,
            format: self.format.unwrap_or(Format::Text),
        }))
    }
}

/// Prints to stdout. A reader that has gone away is an error like any other.
///
/// # Errors
/// [`Error::System`].
pub fn print(text: &str) -> Result<(), Error> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::System(format!("cannot write the result: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Command, Error> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_run_is_read() {
        let Ok(Command::Run(run)) = read("run a.wasm --invoke f -1 2 --stack 8K --key b --relocate always --max=1M")
        else {
            panic!("a run")
        };
        assert_eq!(run.invoke, Some(("f".to_owned(), vec!["-1".to_owned(), "2".to_owned()])));
        assert_eq!((run.config.policy.initial, run.config.policy.maximum), (8192, 1 << 20));
        assert!(run.config.policy.relocate_always);
        assert_eq!(run.config.key, Key::B);
    }

    #[test]
    fn mistakes_are_told() {
        for line in [
            "",
            "walk",
            "run",
            "run a b",
            "run a --stack",
            "run a --stack 0",
            "run a --stack 1",
            "run a --stack 18446744073709551615",
            "run a --stack 18446744073709547520",
            "run a --stack 99999999999G",
            "run a --stack K",
            "run a --max 1",
            "run a --stack 8K --max 4K",
            "run a --relocate sometimes",
            "run a --key c",
            "run a --format xml",
            "run a --tamper 1",
            "run a --only x",
            "run a --nonsense",
            "suite file",
            "suite --tamper 1:1",
            "suite --every 2",
            "run a --list",
            "checklist --every 0",
            "checklist file",
            "checklist --stats",
        ] {
            assert!(matches!(read(line), Err(Error::Usage(_))), "{line}");
        }
    }
}
