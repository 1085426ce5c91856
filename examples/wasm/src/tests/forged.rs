//! An attacker overwrites the stack limit: the guard stops the program, whatever the size of its frames, and the
//! fault handler does not take it for a trap.

use super::{call, configurations, single};
use crate::checklist::locals;
use crate::types::{ValType, Value};
use cfi_stack::engine::Activation;
use cfi_stack::steps::{Step, StepInfo, set_hook};
use cfi_stack::thread::current_activation;
use std::process::{Command, Output};

/// Says to [`victim`] which program to run.
const VARIABLE: &str = "WASM_TEST_FORGED_LIMIT";

/// The first growth has ended: sets the limit to 0, so that no check sees a full stack again.
fn forge(step: Step, info: &mut StepInfo<'_>) -> Result<(), cfi_stack::Error> {
    if let (Step::Committed, Some(activation)) = (step, current_activation()) {
        eprintln!("base=0x{:x}", info.base);
        let limit = activation.as_ptr().wrapping_byte_offset(Activation::LIMIT_OFFSET as isize).cast::<usize>();
        // SAFETY: the limit word of a live activation; the stack's thread, which is this one, wrote it last.
        unsafe { limit.write_volatile(0) };
    }
    Ok(())
}

/// Not a test by itself: what the child processes of [`a_forged_limit_ends_at_the_guard`] do.
#[test]
fn victim() {
    let Ok(what) = std::env::var(VARIABLE) else { return };
    let config = configurations().next().expect("one");
    let (program, depth) = match what.as_str() {
        // One frame nearly fills the 128 KiB that the stack grows to; the next would end far beyond the guard.
        "big" => (locals(15_000), 1002),
        _ => (locals(30), 3000),
    };
    if what != "control" {
        set_hook(Some(forge));
    }
    single(&call(config, &program, "big", &[Value { ty: ValType::I64, bits: depth }]));
    println!("completed");
}

fn child(what: &str) -> Output {
    let program = std::env::current_exe().expect("this program's path");
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
    command.args(["--exact", "tests::forged::victim", "--nocapture"]).env(VARIABLE, what);
    command.output().expect("a child process")
}

fn number_after(text: &str, label: &str) -> usize {
    let start = text.find(label).expect(label) + label.len();
    let digits: String = text[start..].chars().take_while(char::is_ascii_hexdigit).collect();
    usize::from_str_radix(&digits, 16).expect(label)
}

#[test]
fn a_forged_limit_ends_at_the_guard() {
    use std::os::unix::process::ExitStatusExt;
    let control = child("control");
    assert!(control.status.success(), "{control:?}");
    assert!(String::from_utf8_lossy(&control.stdout).contains("completed"), "{control:?}");
    for what in ["small", "big"] {
        let output = child(what);
        let signal = output.status.signal().or(output.status.code().map(|code| code - 128));
        assert_eq!(signal, Some(libc::SIGSEGV), "{what}: {output:?}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("fatal SIGSEGV si_code=2") && error.contains("in managed code"), "{what}: {error}");
        let (base, address) = (number_after(&error, "base=0x"), number_after(&error, "addr=0x"));
        let guard = configurations().next().expect("one").policy.guard;
        assert!((base - guard..base).contains(&address), "{what}: the guard was stepped over: {error}");
    }
}
