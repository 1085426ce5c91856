//! `wasm run`: one function of one module, and a report.

use crate::cli::{Format, Run, print};
use crate::context::Context;
use crate::error::Error;
use crate::instance::{Alone, Exports, Extern, instantiate};
use crate::json::{self, Object};
use crate::module::Module;
use crate::store::Store;
use crate::tamper;
use crate::types::{FuncType, Value};
use cfi_stack::Stats;
use cfi_stack::features::detect;
use cfi_stack::thread::Thread;
use std::time::Instant;

/// What a run came to.
struct Outcome {
    result: Result<Vec<Value>, Error>,
    stats: Stats,
    output: String,
    microseconds: u64,
}

/// Performs the command; the exit status.
///
/// # Errors
/// Whatever kept the program from running: it is told on stderr by the caller.
pub fn run(options: &Run) -> Result<u8, Error> {
    let bytes = std::fs::read(&options.file)
        .map_err(|error| Error::Usage(format!("cannot read {}: {error}", options.file.display())))?;
    if !bytes.starts_with(b"\0asm") && bytes.trim_ascii_start().starts_with(b"(") {
        let file = options.file.display();
        return Err(Error::Usage(format!("{file} is a module in text form: make a binary of it, as with wat2wasm")));
    }
    let thread = Thread::attach()?;
    crate::fault::install()?;
    let mut store = Store::new(&thread, options.config);
    if options.format == Format::Json {
        *store.context.output.borrow_mut() = Some(Vec::new());
    }
    let module = Module::parse(bytes, &mut store.types)?;
    let prepared = prepare(&mut store, &module, options);
    let (number, args) = match prepared {
        Err(error @ Error::Exit(_)) => {
            let output = output(&store.context);
            return report(options, &Outcome { result: Err(error), stats: Stats::default(), output, microseconds: 0 });
        }
        prepared => prepared?,
    };
    if let Some(target) = options.tamper {
        target.arm();
    }
    let begin = Instant::now();
    let outcome = store.call(number, &args);
    let microseconds = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    let (result, stats) = match outcome {
        Ok((values, stats)) => (Ok(values), stats),
        Err((error, stats)) => (Err(error), stats),
    };
    let output = output(&store.context);
    let status = report(options, &Outcome { result, stats, output, microseconds })?;
    if options.tamper.is_some() && !tamper::done() {
        return Err(Error::Usage(
            "--tamper: nothing was changed, because the stack never grew with so many frames on it".to_owned(),
        ));
    }
    Ok(status)
}

/// Makes the instance and runs what runs before the chosen function: the module's start function and `_initialize`.
fn prepare(store: &mut Store<'_>, module: &Module, options: &Run) -> Result<(usize, Vec<Value>), Error> {
    let exports = instantiate(store, module, &Alone)?;
    let chosen = choose(store, &exports, options)?;
    if let Some(Extern::Func(initialize)) = exports.get("_initialize") {
        store.call(*initialize, &[]).map_err(|(error, _)| error)?;
    }
    Ok(chosen)
}

fn output(context: &Context) -> String {
    context.output.borrow_mut().take().map_or_else(String::new, |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The function to call and its arguments.
fn choose(store: &Store<'_>, exports: &Exports, options: &Run) -> Result<(usize, Vec<Value>), Error> {
    let functions = || {
        let names = exports.iter().filter_map(|(name, object)| match object {
            Extern::Func(number) => Some(format!("  {name} {}", func_type(store, *number))),
            _ => None,
        });
        let names: Vec<_> = names.collect();
        if names.is_empty() {
            "it exports no function".to_owned()
        } else {
            format!("it exports:\n{}", names.join("\n"))
        }
    };
    let number = |name: &str| match exports.get(name) {
        Some(Extern::Func(number)) => Some(*number),
        _ => None,
    };
    let file = options.file.display();
    let Some((name, args)) = &options.invoke else {
        let Some(start) = number("_start").or_else(|| number("main")) else {
            return Err(Error::Usage(format!(
                "{file} exports neither `_start` nor `main`: choose a function with --invoke; {}",
                functions()
            )));
        };
        let ty = func_type(store, start);
        if !ty.params.is_empty() {
            return Err(Error::Usage(format!(
                "{file}: the start function takes arguments ({ty}): give them with --invoke"
            )));
        }
        return Ok((start, Vec::new()));
    };
    let Some(number) = number(name) else {
        return Err(Error::Usage(format!("{file} exports no function `{name}`; {}", functions())));
    };
    let ty = func_type(store, number);
    if args.len() != ty.params.len() {
        return Err(Error::Usage(format!(
            "`{name}` takes {} arguments, {} given; its type is {ty}",
            ty.params.len(),
            args.len()
        )));
    }
    let args = ty.params.iter().zip(args).map(|(ty, text)| Value::parse(*ty, text)).collect::<Result<_, _>>()?;
    Ok((number, args))
}

fn func_type<'a>(store: &'a Store<'_>, number: usize) -> &'a FuncType {
    store.types.get(store.function(number).type_id())
}

fn report(options: &Run, outcome: &Outcome) -> Result<u8, Error> {
    let Outcome { result, stats, output, microseconds } = outcome;
    let enforced: Vec<_> = detect().enabled.names().collect();
    let status = match result {
        Ok(_) => 0,
        Err(Error::Exit(status)) => u8::try_from(*status).unwrap_or(1),
        Err(_) => 1,
    };
    if options.format == Format::Json {
        let trap = match result {
            Ok(_) | Err(Error::Exit(_)) => None,
            Err(Error::Exhausted(_)) => Some("call stack exhausted".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        let values: &[Value] = result.as_ref().map_or(&[], |values| values);
        let text = Object::default()
            .list("result", values.iter().map(json::value))
            .list("enforced", enforced.iter().map(|name| json::string(name)))
            .number("growths", stats.growths)
            .number("frames_moved", stats.frames_moved)
            .number("rebound", stats.rebound)
            .number("bytes_moved", stats.bytes_moved)
            .number("largest_stack", stats.largest)
            .text("trap", trap.as_deref().map(|text| text.strip_prefix("trap: ").unwrap_or(text)))
            .number("status", status.into())
            .text("output", Some(output))
            .number("microseconds", *microseconds)
            .finish();
        print(&format!("{text}\n"))?;
    } else {
        let mut text: String = result.iter().flatten().map(|value| format!("{value}\n")).collect();
        if options.stats {
            let list = if enforced.is_empty() { "nothing".to_owned() } else { enforced.join(" ") };
            for (name, value) in [
                ("enforced", list),
                ("growths", stats.growths.to_string()),
                ("frames moved", stats.frames_moved.to_string()),
                ("returns re-bound", stats.rebound.to_string()),
                ("bytes moved", stats.bytes_moved.to_string()),
                ("largest stack", stats.largest.to_string()),
                ("microseconds", microseconds.to_string()),
            ] {
                text.push_str(&format!("{name:<18} {value}\n"));
            }
        }
        print(&text)?;
    }
    if let Err(error) = result
        && !matches!(error, Error::Exit(_))
    {
        eprintln!("wasm: {error}");
    }
    Ok(status)
}
