//! The command as a user meets it: bad input is a clear line on stderr and exit status 1, results come as text and
//! as JSON.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program, through the emulator that runs this test, if one does.
fn wasm(args: &[&str]) -> Output {
    command(args).output().expect("the program starts")
}

fn command(args: &[&str]) -> Command {
    let program = env!("CARGO_BIN_EXE_wasm");
    let runner = std::env::var("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace();
    let mut command = match words.next() {
        Some(first) if cfg!(target_arch = "aarch64") => {
            let mut command = Command::new(first);
            command.args(words).arg(program);
            command
        }
        _ => Command::new(program),
    };
    command.args(args);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Exit status 1, nothing on stdout, and all of `words` on stderr, without a panic.
#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let output = wasm(args);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    assert_eq!(text(&output.stdout), "", "{args:?}");
    for word in words {
        assert!(error.contains(word), "{args:?}: `{word}` is not in: {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
}

/// A module in a file of its own.
struct File(PathBuf);

impl File {
    fn bytes(name: &str, bytes: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!("cfi-stack-wasm-{}-{name}.wasm", std::process::id()));
        std::fs::write(&path, bytes).expect("a temporary file");
        File(path)
    }

    fn module(name: &str, text: &str) -> File {
        let buffer = wast::parser::ParseBuffer::new(text).expect("tokens");
        let mut wat: wast::Wat<'_> = wast::parser::parse(&buffer).expect("a module in text form");
        File::bytes(name, &wat.encode().expect("a module"))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn calculator(name: &str) -> File {
    File::module(
        name,
        r#"(module
            (memory 1)
            (func (export "div") (param i32 i32) (result i32) (i32.div_s (local.get 0) (local.get 1)))
            (func (export "two") (param f64) (result i64 f64) (i64.const -5) (local.get 0))
            (func $deep (export "deep") (param i32) (result i32)
                (if (result i32) (local.get 0)
                    (then (i32.add (i32.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i32.const 0))))
            (func (export "ref") (param externref)))"#,
    )
}

#[test]
fn help_and_version_are_told() {
    let help = wasm(&["--help"]);
    assert!(help.status.success());
    for word in ["run", "suite", "--invoke", "--tamper", "--stack", "--relocate"] {
        assert!(text(&help.stdout).contains(word), "{word}");
    }
    assert!(text(&wasm(&["--version"]).stdout).starts_with("wasm "));
}

#[test]
fn mistakes_on_the_command_line_say_what_to_do() {
    refused(&[], &["wasm run", "--help"]);
    refused(&["walk"], &["`walk`", "`run`"]);
    refused(&["run"], &["needs a file"]);
    refused(&["run", "/nonexistent.wasm"], &["cannot read", "/nonexistent.wasm"]);
    refused(&["suite", "--only", "nothing"], &["`nothing`", "skip-stack-guard-page"]);
    refused(&["suite", "--format", "xml"], &["`text` or `json`"]);
    let file = calculator("sizes");
    for size in ["0", "1", "4095", "18446744073709551615", "18446744073709547520", "2048G", "-1", "K", ""] {
        refused(&["run", file.path(), "--invoke", "deep", "1", "--stack", size], &["--stack"]);
    }
    refused(&["run", file.path(), "--max", "1T"], &["--max"]);
}

#[test]
fn functions_and_arguments_that_do_not_fit_are_named() {
    let file = calculator("arguments");
    let run = |args: &[&str], words: &[&str]| {
        refused(&[&["run", file.path()], args].concat(), words);
    };
    run(&[], &["--invoke", "div [i32 i32] -> [i32]", "two"]);
    run(&["--invoke", "mul", "1", "2"], &["`mul`", "div"]);
    run(&["--invoke", "div", "1"], &["takes 2 arguments, 1 given"]);
    run(&["--invoke", "div", "1", "2", "3"], &["3 given"]);
    run(&["--invoke", "div", "1", "x"], &["`x`", "i32"]);
    run(&["--invoke", "div", "1", "4294967296"], &["i32"]);
    run(&["--invoke", "ref", "1"], &["externref"]);
}

#[test]
fn modules_that_cannot_run_are_refused() {
    for (name, bytes, words) in [
        ("empty", &b""[..], &["invalid module"][..]),
        ("garbage", &b"hello, world"[..], &["invalid module"]),
        ("truncated", &b"\0asm\x01\0\0\0\x01\x7f"[..], &["invalid module"]),
        ("text", &b"\n(module)"[..], &["text form", "binary"]),
        ("version", &b"\0asm\x09\0\0\0"[..], &["invalid module"]),
    ] {
        let file = File::bytes(name, bytes);
        refused(&["run", file.path()], words);
    }
    for (name, module, words) in [
        ("invalid", "(module (func (export \"_start\") (i32.add)))", &["invalid module"][..]),
        (
            "vectors",
            "(module (global v128 (v128.const i64x2 0 0)) (func (export \"_start\")))",
            &["unsupported", "v128"],
        ),
        (
            "missing",
            "(module (import \"env\" \"f\" (func)) (func (export \"_start\")))",
            &["unknown import `f` of `env`"],
        ),
        ("huge", "(module (table 4294967295 funcref) (func (export \"_start\")))", &["a table of"]),
        ("takes", "(module (func (export \"main\") (param i32)))", &["--invoke"]),
    ] {
        let file = File::module(name, module);
        refused(&["run", file.path()], words);
    }
}

#[test]
fn results_and_traps_come_as_text_and_json() {
    let file = calculator("results");
    let run = |args: &[&str]| wasm(&[&["run", file.path()], args].concat());
    let output = run(&["--invoke", "div", "-7", "2"]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "-3\n"));
    let output = run(&["--invoke", "two", "0.5", "--format", "json"]);
    let json = text(&output.stdout);
    assert!(json.starts_with("{\"result\":[-5,0.5],\"enforced\":["), "{json}");
    assert!(json.contains("\"trap\":null"), "{json}");
    let output = run(&["--invoke", "div", "1", "0", "--format", "json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("\"trap\":\"integer divide by zero\""));
    assert!(text(&output.stderr).contains("trap: integer divide by zero"));
    let output = run(&["--invoke", "deep", "100000", "--max", "64K", "--format", "json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("\"trap\":\"call stack exhausted\""));
    assert!(text(&output.stdout).contains("\"largest_stack\":65536"));
}

#[test]
fn a_small_stack_grows_and_counts() {
    let file = calculator("grows");
    for mode in [&[][..], &["--relocate", "always"]] {
        let output = wasm(&[&["run", file.path(), "--invoke", "deep", "1000", "--stats"], mode].concat());
        let out = text(&output.stdout);
        assert!(out.starts_with("1000\n"), "{out}");
        let growths = out.lines().find_map(|line| line.strip_prefix("growths")).expect("a count");
        assert!(growths.trim().parse::<u64>().expect("a number") >= 3, "{out}");
    }
}

#[test]
fn tampering_never_passes_unnoticed_where_it_cannot_be_done() {
    let file = calculator("tamper");
    let output = wasm(&["run", file.path(), "--invoke", "deep", "10", "--tamper", "0:53"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("never grew"), "{}", text(&output.stderr));
    refused(&["run", file.path(), "--invoke", "deep", "10", "--tamper", "0"], &["FRAME:BIT"]);
}

#[test]
fn programs_of_the_demo_give_their_known_results() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let manifest = std::fs::read_to_string(folder.join("manifest.tsv")).expect("the manifest");
    for line in manifest.lines().filter(|line| !line.starts_with('#')) {
        let [_, file, export, args, expected, _] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("a line of six columns: {line}");
        };
        let file = folder.join(file);
        let mut command = vec!["run", file.to_str().expect("UTF-8"), "--invoke", export];
        command.extend(args.split(',').filter(|arg| *arg != "-"));
        let output = wasm(&command);
        match expected {
            "trap:stack" => assert!(text(&output.stderr).contains("call stack exhausted"), "{line}"),
            "trap:unreachable" => assert!(text(&output.stderr).contains("trap: unreachable"), "{line}"),
            result => assert_eq!(text(&output.stdout).trim(), result, "{line}: {}", text(&output.stderr)),
        }
    }
}

#[test]
fn a_start_function_can_end_the_program_with_its_own_status() {
    let module = |name: &str, status: i32| {
        File::module(
            name,
            &format!(
                r#"(module
                    (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
                    (func $start (call $exit (i32.const {status})))
                    (func (export "_start"))
                    (start $start))"#
            ),
        )
    };
    for (status, code) in [(0, 0), (7, 7), (255, 255), (256, 1), (-1, 1)] {
        let file = module(&format!("exit{status}"), status);
        let output = wasm(&["run", file.path(), "--format", "json"]);
        assert_eq!(output.status.code(), Some(code), "{status}");
        assert!(text(&output.stdout).contains(&format!("\"status\":{code}")), "{status}");
    }
}

#[test]
fn overlapping_vectors_do_not_add_up_to_the_hosts_memory() {
    let file = File::module(
        "vectors",
        r#"(module
            (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
            (memory (export "memory") 1024)
            (func (export "flood") (result i32 i32) (local $at i32)
                (loop $next
                    (i32.store (local.get $at) (i32.const 0))
                    (i32.store offset=4 (local.get $at) (i32.const 0x3000000))
                    (local.set $at (i32.add (local.get $at) (i32.const 8)))
                    (br_if $next (i32.lt_u (local.get $at) (i32.const 0x100000))))
                (call $write (i32.const 1) (i32.const 0) (i32.const 0x20000) (i32.const 0x3fffff0))
                (i32.load (i32.const 0x3fffff0))))"#,
    );
    let output = wasm(&["run", file.path(), "--invoke", "flood"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let lines = text(&output.stdout[output.stdout.len().saturating_sub(64)..]);
    assert!(lines.ends_with("0\n16777216\n"), "16 MiB were written: {lines}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_has_gone_away_is_an_error_and_no_panic() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = command(&["--help"]).stdout(full).output().expect("the program starts");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cannot write"), "{error}");
}

#[test]
fn the_checklist_can_be_chosen_from() {
    let list = text(&wasm(&["checklist", "--list"]).stdout);
    let items: Vec<_> = list.lines().collect();
    assert!(items.contains(&"frames/8000-locals") && items.contains(&"nest/growth-at-each-level"), "{list}");
    let output = wasm(&["checklist", "--only", "overflow,edge/every-depth", "--every", "16", "--relocate", "always"]);
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert!(report.contains("edge/every-depth: passed (10 of 160 depths"), "{report}");
    let chosen = items.iter().filter(|item| item.starts_with("overflow/")).count() + 1;
    assert!(report.ends_with(&format!("\n{chosen} passed, 0 failed, 0 skipped\n")), "{report}");
    refused(&["checklist", "--only", "nothing"], &["no item `nothing`"]);
}
