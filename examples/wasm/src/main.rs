//! An engine for WebAssembly whose stacks start at one page and grow by moving their frames.
//!
//! It exists to show [`cfi_stack`] at work: Cranelift compiles a module under the rules of README.md, the library
//! owns the stacks. The way of the data: [`cli`] → [`module`] → [`instance`] (with [`translate`], [`emit`],
//! [`glue`], [`compile`]) → [`store`] → [`run`], [`suite`] or [`checklist`]; [`host`] and [`library`] are what programs can call,
//! [`fault`] turns hardware faults into traps.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod checklist;
mod cli;
mod compile;
mod context;
mod emit;
mod error;
mod fault;
mod glue;
mod host;
mod instance;
mod json;
mod library;
mod memory;
mod module;
mod object;
mod run;
mod store;
mod suite;
mod tamper;
#[cfg(test)]
mod tests;
mod translate;
mod trap;
mod types;

use cfi_start as _;
use cli::Command;
use std::process::ExitCode;

fn main() -> ExitCode {
    let done = cli::parse(std::env::args_os().skip(1)).and_then(|command| match command {
        Command::Help => cli::print(cli::HELP).map(|()| 0),
        Command::Version => cli::print(concat!("wasm ", env!("CARGO_PKG_VERSION"), "\n")).map(|()| 0),
        Command::Run(options) => run::run(&options),
        Command::Suite(options) => suite::suite(&options),
        Command::Checklist(options) => checklist::checklist(&options),
    });
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("wasm: {error}");
            ExitCode::FAILURE
        }
    }
}
