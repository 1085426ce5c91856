//! From a module and its imports to an instance: objects, code, segments, start function.

use crate::compile::{Compiler, finish};
use crate::context::Trampoline;
use crate::emit::{Emitter, signature, tail_signature};
use crate::error::Error;
use crate::glue;
use crate::host::{Data, Elements, Operation};
use crate::library;
use crate::memory::Memory;
use crate::module::{Const, ConstOp, ImportType, Module, Placement, Space};
use crate::object::{Global, Table, Tag};
use crate::store::Store;
use crate::translate::{Addresses, Scope, Target, Translator, tail_calls};
use crate::trap::Trap;
use crate::types::TypeId;
use cranelift_codegen::ir::FuncRef;
use cranelift_module::{FuncId, Module as _};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

/// Something that instances can share.
#[derive(Clone)]
pub enum Extern {
    /// A function, by its number in the store.
    Func(usize),
    /// A table.
    Table(Rc<Table>),
    /// A memory.
    Memory(Rc<Memory>),
    /// A global.
    Global(Rc<Global>),
    /// A tag.
    Tag(Tag),
}

/// What a module exports, by name.
pub type Exports = BTreeMap<String, Extern>;

/// Where imports come from.
pub trait Linker {
    /// What `module` exports under `name`.
    fn find(&self, module: &str, name: &str) -> Option<Extern>;

    /// The host function of this name.
    fn host(&self, module: &str, name: &str) -> Option<library::Entry> {
        library::find(module, name)
    }
}

/// No other instances.
pub struct Alone;

impl Linker for Alone {
    fn find(&self, _: &str, _: &str) -> Option<Extern> {
        None
    }
}

/// A module's objects while it is instantiated.
#[derive(Default)]
struct Parts {
    functions: Vec<usize>,
    references: Vec<usize>,
    tables: Vec<Rc<Table>>,
    memories: Vec<Rc<Memory>>,
    globals: Vec<Rc<Global>>,
    tags: Vec<Tag>,
    elements: Vec<Elements>,
    data: Vec<Data>,
}

/// Instantiates a module in a store and runs its start function.
///
/// # Errors
/// [`Error::Link`], [`Error::Unsupported`], [`Error::System`], and the traps of segments and of the start function.
pub fn instantiate(store: &mut Store<'_>, module: &Module, linker: &dyn Linker) -> Result<Exports, Error> {
    let mut parts = Parts::default();
    let host_imports = link(store, module, linker, &mut parts)?;
    create(store, module, &mut parts)?;
    compile(store, module, &parts, host_imports)?;
    initialise(module, &parts)?;
    let exports = module.exports.iter().map(|(name, space, index)| {
        let index = *index as usize;
        let object = match space {
            Space::Func => Extern::Func(parts.functions[index]),
            Space::Table => Extern::Table(parts.tables[index].clone()),
            Space::Memory => Extern::Memory(parts.memories[index].clone()),
            Space::Global => Extern::Global(parts.globals[index].clone()),
            Space::Tag => Extern::Tag(parts.tags[index]),
        };
        (name.clone(), object)
    });
    let exports = exports.collect();
    if let Some(start) = module.start {
        store.call(parts.functions[start as usize], &[]).map_err(|(error, _)| error)?;
    }
    Ok(exports)
}

/// A host function among a module's imports: its index, and what it is.
type HostImport = (u32, library::Entry);

fn link(
    store: &mut Store<'_>,
    module: &Module,
    linker: &dyn Linker,
    parts: &mut Parts,
) -> Result<Vec<HostImport>, Error> {
    let mut hosts = Vec::new();
    for import in &module.imports {
        let name = format!("import `{}` of `{}`", import.name, import.module);
        let found = linker.find(&import.module, &import.name);
        let limits = |min: u64, max: Option<u64>, want_min: u64, want_max: Option<u64>| {
            min >= want_min && want_max.is_none_or(|want| max.is_some_and(|max| max <= want))
        };
        match (&import.ty, found) {
            (ImportType::Func(ty), Some(Extern::Func(number))) if store.function(number).type_id() == *ty => {
                parts.functions.push(number);
                parts.references.push(store.function(number).address());
            }
            (ImportType::Func(ty), None) => {
                let Some(entry) = linker.host(&import.module, &import.name) else {
                    return Err(Error::Link(format!("unknown {name}")));
                };
                if entry.ty != *store.types.get(*ty) {
                    return Err(Error::Link(format!("incompatible type of {name}: the host has {}", entry.ty)));
                }
                hosts.push((parts.functions.len() as u32, entry));
                let (number, reference) = store.add_function(*ty);
                parts.functions.push(number);
                parts.references.push(reference);
            }
            (ImportType::Table(ty), Some(Extern::Table(table)))
                if table.element == ty.element && limits(table.len(), table.maximum, ty.minimum, ty.maximum) =>
            {
                parts.tables.push(table);
            }
            (ImportType::Memory(ty), Some(Extern::Memory(memory)))
                if limits(memory.pages(), memory.maximum(), ty.minimum, ty.maximum) =>
            {
                parts.memories.push(memory);
            }
            (ImportType::Global(ty), Some(Extern::Global(global)))
                if global.mutable == ty.mutable
                    && (global.content == ty.content || !ty.mutable && global.content.is_subtype(ty.content)) =>
            {
                parts.globals.push(global);
            }
            (ImportType::Tag(ty), Some(Extern::Tag(tag))) if tag.ty == *ty => parts.tags.push(tag),
            (_, None) => return Err(Error::Link(format!("unknown {name}"))),
            _ => return Err(Error::Link(format!("incompatible type of {name}"))),
        }
    }
    Ok(hosts)
}

/// Makes the objects that the module defines itself.
fn create(store: &mut Store<'_>, module: &Module, parts: &mut Parts) -> Result<(), Error> {
    for ty in &module.funcs[module.imported_funcs..] {
        let (number, reference) = store.add_function(*ty);
        parts.functions.push(number);
        parts.references.push(reference);
    }
    for ty in &module.memories[parts.memories.len()..] {
        parts.memories.push(Rc::new(Memory::new(ty.minimum, ty.maximum)?));
    }
    for ty in &module.tags[parts.tags.len()..] {
        parts.tags.push(store.add_tag(*ty));
    }
    for (ty, init) in &module.globals[parts.globals.len()..] {
        let value = evaluate(parts, init.as_ref());
        let global = Global { content: ty.content, mutable: ty.mutable, slot: Cell::new(value) };
        parts.globals.push(Rc::new(global));
    }
    for (ty, init) in &module.tables[parts.tables.len()..] {
        let init = evaluate(parts, init.as_ref());
        parts.tables.push(Rc::new(Table::new(ty.element, ty.minimum, ty.maximum, init)?));
    }
    for (_, items) in &module.elements {
        let references = items.iter().map(|item| evaluate(parts, Some(item))).collect();
        parts.elements.push(Rc::new(RefCell::new(references)));
    }
    for segment in 0..module.data.len() {
        parts.data.push(Rc::new(RefCell::new(module.data_bytes(segment).to_vec())));
    }
    store.context.with_code(|index| {
        for memory in &parts.memories {
            if !index.memories.iter().any(|known| Rc::ptr_eq(known, memory)) {
                index.memories.push(memory.clone());
            }
        }
    });
    store.keep((parts.tables.clone(), parts.globals.clone()));
    Ok(())
}

/// The value of a constant expression; a validated one leaves exactly one.
fn evaluate(parts: &Parts, expression: Option<&Const>) -> u64 {
    let mut stack: Vec<u64> = Vec::new();
    for op in expression.into_iter().flatten() {
        let value = match *op {
            ConstOp::Value(bits) => bits,
            ConstOp::Global(index) => parts.globals[index as usize].slot.get(),
            ConstOp::Func(index) => parts.references[index as usize] as u64,
            ConstOp::Op32(op) => {
                let (b, a) = (stack.pop().unwrap_or(0), stack.pop().unwrap_or(0));
                u64::from(op(a as u32, b as u32))
            }
            ConstOp::Op64(op) => {
                let (b, a) = (stack.pop().unwrap_or(0), stack.pop().unwrap_or(0));
                op(a, b)
            }
        };
        stack.push(value);
    }
    stack.pop().unwrap_or(0)
}

/// The constants that code of this instance may name.
fn addresses(store: &mut Store<'_>, module: &Module, parts: &Parts, hosts: &[HostImport], throws: bool) -> Addresses {
    let mut out = Addresses { functions: parts.references.clone(), ..Addresses::default() };
    for index in 0..module.imported_funcs {
        let host = hosts.iter().any(|(at, _)| *at as usize == index);
        let function = store.function(parts.functions[index]);
        out.imported_code.push((!host).then(|| (function.code.get(), function.body.get())));
    }
    out.tables = parts.tables.iter().map(|table| table.view_address()).collect();
    out.memories = parts.memories.iter().map(|memory| (memory.base(), memory.pages_address())).collect();
    out.globals = parts.globals.iter().map(|global| global.address()).collect();
    out.tags = parts.tags.iter().map(|tag| tag.number).collect();
    let operations = &mut out.operations;
    if !parts.tags.is_empty() || throws {
        operations.catch = store.add_operation(Operation::Catch);
        operations.throw_ref = store.add_operation(Operation::ThrowRef);
    }
    let mut add = |operation| store.add_operation(operation);
    for memory in &parts.memories {
        operations.memory_grow.push(add(Operation::MemoryGrow(memory.clone())));
        operations.memory_fill.push(add(Operation::MemoryFill(memory.clone())));
        let copy = parts.memories.iter().map(|from| add(Operation::MemoryCopy(memory.clone(), from.clone())));
        operations.memory_copy.push(copy.collect());
        let init = parts.data.iter().map(|data| add(Operation::MemoryInit(memory.clone(), data.clone())));
        operations.memory_init.push(init.collect());
    }
    operations.data_drop = parts.data.iter().map(|data| add(Operation::DataDrop(data.clone()))).collect();
    for table in &parts.tables {
        operations.table_grow.push(add(Operation::TableGrow(table.clone())));
        operations.table_fill.push(add(Operation::TableFill(table.clone())));
        let copy = parts.tables.iter().map(|from| add(Operation::TableCopy(table.clone(), from.clone())));
        operations.table_copy.push(copy.collect());
        let init = parts.elements.iter().map(|list| add(Operation::TableInit(table.clone(), list.clone())));
        operations.table_init.push(init.collect());
    }
    operations.elem_drop = parts.elements.iter().map(|list| add(Operation::ElemDrop(list.clone()))).collect();
    out
}

/// The functions of a module, as they are announced to the compiler.
#[derive(Default)]
struct Announced {
    /// What callers call, by index.
    functions: HashMap<u32, FuncId>,
    /// Bodies where the module makes tail calls, by index: the function of the same index is a way into it.
    bodies: HashMap<u32, FuncId>,
    /// Ways from tail calls out to functions without bodies, by type.
    ways_out: HashMap<TypeId, FuncId>,
    /// Ways in, by type.
    trampolines: BTreeMap<u32, FuncId>,
}

/// Announces the module's functions, thunks for its host imports, and trampolines for the types that it exports.
fn announce(
    store: &Store<'_>,
    module: &Module,
    hosts: &[HostImport],
    compiler: &mut Compiler,
) -> Result<Announced, Error> {
    let mut out = Announced::default();
    let defined = module.imported_funcs as u32..module.funcs.len() as u32;
    for index in hosts.iter().map(|(index, _)| *index).chain(defined.clone()) {
        let ty = store.types.get(module.funcs[index as usize]);
        out.functions.insert(index, compiler.declare(&signature(ty))?);
    }
    let mut callees = BTreeSet::new();
    let mut tails = false;
    for body in module.bodies() {
        tails |= tail_calls(module, &body, &mut callees)?;
    }
    for index in defined.filter(|_| tails) {
        let ty = store.types.get(module.funcs[index as usize]);
        out.bodies.insert(index, compiler.declare(&tail_signature(ty))?);
    }
    for ty in callees {
        let signature = tail_signature(store.types.get(TypeId(ty)));
        out.ways_out.insert(TypeId(ty), compiler.declare(&signature)?);
    }
    let exported = module.exports.iter().filter(|export| export.1 == Space::Func).map(|export| export.2);
    for index in exported.chain(module.start) {
        let id = module.funcs[index as usize];
        let ty = store.types.get(id);
        let fits = ty.params.iter().chain(&ty.results).all(|ty| ty.fits_host());
        if fits && !store.has_trampoline(id) && !out.trampolines.contains_key(&id.0) {
            out.trampolines.insert(id.0, compiler.declare(&glue::trampoline_signature())?);
        }
    }
    Ok(out)
}

/// Compiles what is announced, and gives the store's functions their code.
fn compile(store: &mut Store<'_>, module: &Module, parts: &Parts, hosts: Vec<HostImport>) -> Result<(), Error> {
    let throws = store.throws(!parts.tags.is_empty())?;
    let addresses = addresses(store, module, parts, &hosts, throws);
    let wasm_bytes = module.bodies().map(|body| (body.range().end - body.range().start) as usize).sum();
    let mut compiler = Compiler::new(store.config.key, store.stubs(), wasm_bytes)?;
    let ids = announce(store, module, &hosts, &mut compiler)?;
    let defined = module.imported_funcs as u32..module.funcs.len() as u32;
    for (index, entry) in hosts {
        let ty = entry.ty.clone();
        let memory = parts.memories.first().cloned();
        let operation = store.add_operation(Operation::Call { function: entry.function, ty: entry.ty, memory });
        compiler.define(ids.functions[&index], |builder, stubs, _| {
            let (mut e, params) = Emitter::new(builder, stubs);
            glue::import(&mut e, params, &ty, operation);
            finish(e);
            Ok(())
        })?;
    }
    let tails = !ids.bodies.is_empty();
    let scope = Scope { module, types: &store.types, addresses: &addresses, throws, tails };
    for (index, body) in defined.zip(module.bodies()) {
        let ty = store.types.get(module.funcs[index as usize]);
        let function = ids.functions[&index];
        let body_id = ids.bodies.get(&index).copied();
        compiler.define(body_id.unwrap_or(function), |builder, stubs, jit| {
            let (e, params) = Emitter::new(builder, stubs);
            let mut known: HashMap<FuncId, FuncRef> = HashMap::new();
            let mut declare = |func: &mut cranelift_codegen::ir::Function, target: Target| {
                let id = match target {
                    Target::Function(index) => ids.functions[&index],
                    Target::Body(index) => ids.bodies[&index],
                    Target::WayOut(ty) => ids.ways_out[&ty],
                };
                *known.entry(id).or_insert_with(|| jit.declare_func_in_func(id, func))
            };
            finish(Translator::function(&scope, &mut declare, e, params, ty, &body)?);
            Ok(())
        })?;
        if let Some(body) = body_id {
            compiler.define(function, |builder, stubs, jit| {
                let (mut e, params) = Emitter::new(builder, stubs);
                let body = jit.declare_func_in_func(body, e.b.func);
                glue::way_in(&mut e, params, ty, body);
                finish(e);
                Ok(())
            })?;
        }
    }
    for (ty, id) in &ids.ways_out {
        let ty = store.types.get(*ty);
        compiler.define(*id, |builder, stubs, _| {
            let (mut e, params) = Emitter::new(builder, stubs);
            glue::way_out(&mut e, params, ty);
            finish(e);
            Ok(())
        })?;
    }
    for (ty, id) in &ids.trampolines {
        let ty = store.types.get(TypeId(*ty));
        compiler.define(*id, |builder, stubs, _| {
            let (mut e, params) = Emitter::new(builder, stubs);
            // The trampoline's first parameter is the context; two of the others matter.
            glue::trampoline(&mut e, &params, ty, throws);
            finish(e);
            Ok(())
        })?;
    }
    let code = compiler.finish()?;
    for (index, id) in &ids.functions {
        let function = store.function(parts.functions[*index as usize]);
        function.code.set(code.address(*id));
        function.body.set(ids.bodies.get(index).map_or(0, |body| code.address(*body)));
    }
    let trampolines: Vec<_> = ids
        .trampolines
        .iter()
        .map(|(ty, id)| {
            let ty = TypeId(*ty);
            (ty, Trampoline { code: code.address(*id), ty: store.types.get(ty).clone() })
        })
        .collect();
    store.add_code(code, trampolines);
    Ok(())
}

/// Copies active segments, in order, and drops them and the declared ones.
fn initialise(module: &Module, parts: &Parts) -> Result<(), Error> {
    for (segment, (placement, _)) in module.elements.iter().enumerate() {
        let mut references = parts.elements[segment].borrow_mut();
        if let Placement::Active(table, offset) = placement {
            let offset = evaluate(parts, Some(offset)) & 0xffff_ffff;
            let table = &parts.tables[*table as usize];
            table.write(offset, &references).ok_or(Error::Trap(Trap::TableOutOfBounds))?;
        }
        if !matches!(placement, Placement::Passive) {
            references.clear();
        }
    }
    for (segment, (placement, _)) in module.data.iter().enumerate() {
        if let Placement::Active(memory, offset) = placement {
            let offset = evaluate(parts, Some(offset)) & 0xffff_ffff;
            let mut bytes = parts.data[segment].borrow_mut();
            let memory = &parts.memories[*memory as usize];
            memory.write(offset, &bytes).ok_or(Error::Trap(Trap::MemoryOutOfBounds))?;
            bytes.clear();
        }
    }
    Ok(())
}
