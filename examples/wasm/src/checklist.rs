//! `wasm checklist`: what an engine's stacks must survive when they grow by moving, item by item, in modules made for it.
//!
//! Each item compiles its own modules, whose sizes are parameters of their text, and compares every result with one
//! that was worked out without a stack. What is swept (depths, offsets) is swept whole, or, with `--every N`, at each N-th place;
//! the line says how many of how many.

mod calls;
mod edges;
mod exceptions;
mod frames;
mod nests;
mod overflow;
mod tails;
mod values;
mod watch;

#[cfg(test)]
pub use frames::{locals, locals_result};

use crate::cli::{Checklist, print};
use crate::error::Error;
use crate::instance::{Exports, Extern, Linker, instantiate};
use crate::library::Entry;
use crate::module::Module;
use crate::store::{Config, Store};
use crate::types::{ValType, Value};
use cfi_stack::thread::Thread;
use cfi_stack::{Stack, Stats};

/// One item: its name, and what shows it. The text says what was counted.
type Item = (&'static str, fn(&Bench<'_>) -> Result<String, String>);

/// All of them, in order.
fn items() -> Vec<Item> {
    [calls::ITEMS, frames::ITEMS, overflow::ITEMS, tails::ITEMS, edges::ITEMS, nests::ITEMS, exceptions::ITEMS].concat()
}

/// Runs the items; the exit status.
///
/// # Errors
/// Whatever keeps them from running at all.
pub fn checklist(options: &Checklist) -> Result<u8, Error> {
    let items = items();
    if let Some(unknown) = options.only.iter().find(|only| !items.iter().any(|item| chosen(item, only))) {
        return Err(Error::Usage(format!("--only: no item `{unknown}`; see wasm checklist --list")));
    }
    let (mut passed, mut failed, mut left_out) = (0u32, 0u32, 0u32);
    let thread = Thread::attach()?;
    crate::fault::install()?;
    let bench = Bench { thread: &thread, config: options.config, every: options.every };
    for item in &items {
        if !options.only.is_empty() && !options.only.iter().any(|only| chosen(item, only)) {
            left_out += 1;
            continue;
        }
        if options.list {
            print(&format!("{}\n", item.0))?;
            continue;
        }
        match item.1(&bench) {
            Ok(counted) => {
                passed += 1;
                print(&format!("{}: passed ({counted})\n", item.0))?;
            }
            Err(why) => {
                failed += 1;
                print(&format!("{}: FAILED: {why}\n", item.0))?;
            }
        }
    }
    if options.list {
        return Ok(0);
    }
    if left_out > 0 {
        print(&format!("{left_out} not chosen\n"))?;
    }
    print(&format!("{passed} passed, {failed} failed, 0 skipped\n"))?;
    Ok(u8::from(failed != 0 || passed == 0))
}

/// Whether a word of `--only` names this item: by its whole name, or by the part before the slash.
fn chosen(item: &Item, only: &str) -> bool {
    item.0 == only || item.0.split('/').next() == Some(only)
}

/// What items run on.
struct Bench<'t> {
    thread: &'t Thread,
    config: Config,
    every: usize,
}

impl<'t> Bench<'t> {
    /// Whether every check moves the whole stack: then time is quadratic in the depth.
    fn always(&self) -> bool {
        self.config.policy.relocate_always
    }

    /// `plain`, or `moving` where every check moves the stack.
    fn depth(&self, plain: i32, moving: i32) -> i32 {
        if self.always() { moving } else { plain }
    }

    /// Each `every`-th of `0..count`.
    fn sweep(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        (0..count).step_by(self.every)
    }

    /// How many places a sweep visits, as a text.
    fn swept(&self, count: usize, what: &str) -> String {
        let visited = self.sweep(count).count();
        if visited == count { format!("{count} {what}") } else { format!("{visited} of {count} {what}") }
    }

    /// An instance of the module with this text.
    fn load(&self, text: &str) -> Result<Program<'t>, String> {
        self.load_with(text, |_| {})
    }

    /// The same, with another configuration.
    fn load_with(&self, text: &str, change: impl FnOnce(&mut Config)) -> Result<Program<'t>, String> {
        let mut config = self.config;
        change(&mut config);
        let mut program = Program { store: Store::new(self.thread, config), exports: Exports::new() };
        program.add(text)?;
        Ok(program)
    }
}

/// A store, and what its instances export.
struct Program<'t> {
    store: Store<'t>,
    exports: Exports,
}

impl Program<'_> {
    /// Adds an instance of the module with this text, which can import from `earlier` what those before it export.
    fn add(&mut self, text: &str) -> Result<(), String> {
        let buffer = wast::parser::ParseBuffer::new(text).map_err(|error| error.to_string())?;
        let mut wat: wast::Wat<'_> = wast::parser::parse(&buffer).map_err(|error| error.to_string())?;
        let bytes = wat.encode().map_err(|error| error.to_string())?;
        let module = Module::parse(bytes, &mut self.store.types).map_err(|error| error.to_string())?;
        let imports = Imports { earlier: &self.exports };
        let exports = instantiate(&mut self.store, &module, &imports).map_err(|error| error.to_string())?;
        self.exports.extend(exports);
        Ok(())
    }

    fn function(&self, name: &str) -> Result<usize, String> {
        match self.exports.get(name) {
            Some(Extern::Func(number)) => Ok(*number),
            _ => Err(format!("no function `{name}`")),
        }
    }

    /// Calls a function on a stack of its own.
    fn call(&mut self, name: &str, args: &[Value]) -> Result<(Result<Vec<Value>, Error>, Stats), String> {
        let mut stack = self.stack()?;
        let result = self.call_on(&mut stack, name, args)?;
        Ok((result, stack.stats()))
    }

    fn stack(&self) -> Result<Stack, String> {
        self.store.stack().map_err(|error| error.to_string())
    }

    /// Calls a function on this stack.
    fn call_on(&mut self, stack: &mut Stack, name: &str, args: &[Value]) -> Result<Result<Vec<Value>, Error>, String> {
        let number = self.function(name)?;
        Ok(self.store.call_on(stack, number, args))
    }

    /// Calls a function with 32-bit arguments, which must have this single 64-bit result.
    fn expect(&mut self, name: &str, args: &[i32], expected: i64) -> Result<Stats, String> {
        let mut stack = self.stack()?;
        self.expect_on(&mut stack, name, args, expected)?;
        Ok(stack.stats())
    }

    /// The same, on this stack.
    fn expect_on(&mut self, stack: &mut Stack, name: &str, args: &[i32], expected: i64) -> Result<(), String> {
        let values: Vec<_> = args.iter().map(|arg| i32(*arg)).collect();
        match self.call_on(stack, name, &values)? {
            Ok(values) if values.len() == 1 && values[0].bits == expected as u64 => Ok(()),
            Ok(values) => {
                let list = values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                Err(format!("{name}{args:?} gave [{list}], not {expected}"))
            }
            Err(error) => Err(format!("{name}{args:?}: {error}, not {expected}")),
        }
    }
}

fn i32(value: i32) -> Value {
    Value { ty: ValType::I32, bits: u64::from(value as u32) }
}

/// `Ok` when it holds, and what is wrong when not.
fn holds(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

/// Where the modules' imports come from.
struct Imports<'e> {
    earlier: &'e Exports,
}

impl Linker for Imports<'_> {
    fn find(&self, module: &str, name: &str) -> Option<Extern> {
        if module == "earlier" { self.earlier.get(name).cloned() } else { None }
    }

    fn host(&self, module: &str, name: &str) -> Option<Entry> {
        if module == "native" { nests::native(name) } else { None }
    }
}
