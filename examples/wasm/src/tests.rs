//! The engine on moving stacks: every test runs on 4 KiB stacks that grow when they are full, and again with the
//! whole stack moving at every check, the old segment inaccessible; on arm64 with both keys.

mod forged;
mod growth;
mod traps;

use crate::compile::{Key, RESERVE};
use crate::error::Error;
use crate::instance::{Alone, Extern, instantiate};
use crate::module::Module;
use crate::store::{Config, Store};
use crate::types::{ValType, Value};
use cfi_stack::thread::Thread;
use cfi_stack::{Policy, Stats};

/// What a call came to, and what the stack did.
struct Outcome {
    result: Result<Vec<Value>, Error>,
    stats: Stats,
    output: String,
}

fn configurations() -> impl Iterator<Item = Config> {
    let keys = if cfg!(target_arch = "aarch64") { &[Key::A, Key::B][..] } else { &[Key::A] };
    keys.iter().flat_map(|key| {
        [false, true].map(|always| {
            let policy = Policy {
                initial: 4096,
                maximum: 1 << 20,
                reserve: RESERVE,
                relocate_always: always,
                poison: true,
                ..Policy::default()
            };
            Config { policy, key: *key }
        })
    })
}

/// Runs an exported function of a module in text form.
fn call(config: Config, text: &str, name: &str, args: &[Value]) -> Outcome {
    let buffer = wast::parser::ParseBuffer::new(text).expect("tokens");
    let mut wat: wast::Wat<'_> = wast::parser::parse(&buffer).expect("a module in text form");
    let bytes = wat.encode().expect("a module");
    let thread = Thread::attach().expect("a thread");
    crate::fault::install().expect("handlers");
    let mut store = Store::new(&thread, config);
    *store.context.output.borrow_mut() = Some(Vec::new());
    let module = match Module::parse(bytes, &mut store.types) {
        Ok(module) => module,
        Err(error) => return Outcome { result: Err(error), stats: Stats::default(), output: String::new() },
    };
    let exports = match instantiate(&mut store, &module, &Alone) {
        Ok(exports) => exports,
        Err(error) => return Outcome { result: Err(error), stats: Stats::default(), output: String::new() },
    };
    let Some(Extern::Func(number)) = exports.get(name) else { panic!("no function {name}") };
    let outcome = store.call(*number, args);
    let output = store.context.output.borrow_mut().take().unwrap_or_default();
    let (result, stats) = match outcome {
        Ok((values, stats)) => (Ok(values), stats),
        Err((error, stats)) => (Err(error), stats),
    };
    Outcome { result, stats, output: String::from_utf8(output).expect("text") }
}

fn i32(value: i32) -> Value {
    Value { ty: ValType::I32, bits: u64::from(value as u32) }
}

/// The single 64-bit result.
fn single(outcome: &Outcome) -> u64 {
    match &outcome.result {
        Ok(values) if values.len() == 1 => values[0].bits,
        Ok(values) => panic!("{} results", values.len()),
        Err(error) => panic!("{error}"),
    }
}
