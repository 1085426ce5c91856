//! The command line.

use crate::class::Feature;
use crate::outcome::Format;
use std::ffi::OsString;

/// What `--help` prints.
pub const HELP: &str = "\
hwtests: the attack battery and self-test of cfi-stack

usage: hwtests [--list] [--only CASES] [--require FEATURES] [--class NAME] [--format table|json]

  --list               name the cases and what each does, run nothing
  --only A14,S01       run these cases alone
  --require FEATURES   of pac, fpac, bti, gcs, shstk: a missing one is a failure, and so is a skip for the want of it
  --class NAME         what the reports call this CPU
  --format FORMAT      table (with a last line of counts) or json (one object per line)
  --help               this text

Exit status: 0 when nothing failed, 1 when something did, or the command line makes no sense, or stdout is
closed or full.
";

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Print the help.
    Help,
    /// Name the cases.
    List(Format),
    /// Run cases.
    Run(Options),
}

/// How cases are run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// These alone; all when `None`.
    pub only: Option<Vec<String>>,
    /// What must not be missing.
    pub require: Vec<Feature>,
    /// What the reports call this CPU.
    pub class: Option<String>,
    /// How reports are written.
    pub format: Format,
}

/// Reads the arguments.
///
/// # Errors
/// What is wrong with them.
pub fn parse(arguments: impl Iterator<Item = OsString>, known: &[&str]) -> Result<Command, String> {
    let mut options = Options { only: None, require: Vec::new(), class: None, format: Format::Table };
    let mut list = false;
    // What is no text is no word of this command line, and is named as far as it is text.
    let mut arguments = arguments.map(|argument| argument.to_string_lossy().into_owned());
    while let Some(argument) = arguments.next() {
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
            _ => (argument, None),
        };
        if inline.is_some() && matches!(name.as_str(), "--help" | "--list") {
            return Err(format!("{name} takes no value"));
        }
        let mut value = || inline.clone().or_else(|| arguments.next()).ok_or(format!("{name} wants a value"));
        match name.as_str() {
            "-h" | "--help" => return Ok(Command::Help),
            "--list" => list = true,
            "--only" => {
                let value = value()?;
                let known_as = |word: &str| known.iter().find(|id| id.eq_ignore_ascii_case(word));
                let ids = words(&value)
                    .map(|word| known_as(word).map(|id| (*id).to_owned()).ok_or(word))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|word| format!("there is no case {word}; the cases are: {}", known.join(" ")))?;
                if ids.is_empty() {
                    return Err("--only names no case".into());
                }
                options.only.get_or_insert_default().extend(ids);
            }
            "--require" => {
                let features = value()?;
                if words(&features).next().is_none() {
                    return Err("--require names no feature".into());
                }
                for word in words(&features) {
                    let names = || Feature::ALL.map(Feature::name).join(", ");
                    let feature = Feature::named(word)
                        .ok_or_else(|| format!("there is no feature {word}; there are {}", names()))?;
                    options.require.push(feature);
                }
            }
            "--class" => options.class = Some(value()?),
            "--format" => {
                options.format = match value()?.as_str() {
                    "table" => Format::Table,
                    "json" => Format::Json,
                    other => return Err(format!("--format is table or json, not {other}")),
                }
            }
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    Ok(if list { Command::List(options.format) } else { Command::Run(options) })
}

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from), &["A14", "A06a", "S01"])
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (line, named) in [
            ("--only A99", "A99"),
            ("--only", "--only"),
            ("--only ,", "--only"),
            ("--require sve", "sve"),
            ("--require=", "--require"),
            ("--require ,", "--require"),
            ("--format xml", "xml"),
            ("--list=yes", "--list"),
            ("now", "now"),
        ] {
            assert!(parsed(line).is_err_and(|text| text.contains(named)), "{line}");
        }
    }

    #[test]
    fn an_argument_that_is_no_text_is_an_error() {
        use std::os::unix::ffi::OsStringExt;
        let argument = OsString::from_vec(vec![b'-', b'-', 0xff]);
        assert!(parse([argument].into_iter(), &["A14"]).is_err_and(|text| text.contains("unknown argument")));
    }

    #[test]
    fn lists_and_both_spellings_are_read() {
        let Ok(Command::Run(options)) = parsed("--only a14,S01,A06A --require=pac,gcs --class x --format json") else {
            panic!("not read");
        };
        assert_eq!(options.only.as_deref(), Some(&["A14".to_owned(), "S01".to_owned(), "A06a".to_owned()][..]));
        assert_eq!(options.require, [Feature::Pac, Feature::Gcs]);
        assert_eq!((options.class.as_deref(), options.format), (Some("x"), Format::Json));
    }
}
