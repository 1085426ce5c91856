//! A module as this engine needs it: validated, its sections read, its function bodies as ranges of its bytes.

use crate::error::{Error, unsupported};
use crate::types::{FuncType, Heap, TypeId, Types, ValType};
use std::ops::Range;
use wasmparser as wp;

/// One step of a constant expression.
#[derive(Clone, Copy, Debug)]
pub enum ConstOp {
    /// A constant, in its slot's bits.
    Value(u64),
    /// The value of a global.
    Global(u32),
    /// A reference to a function.
    Func(u32),
    /// 32-bit `add`, `sub`, `mul`.
    Op32(fn(u32, u32) -> u32),
    /// 64-bit `add`, `sub`, `mul`.
    Op64(fn(u64, u64) -> u64),
}

/// A constant expression, in the order of evaluation.
pub type Const = Vec<ConstOp>;

/// A table's type.
#[derive(Clone, Debug)]
pub struct TableType {
    /// Type of its elements.
    pub element: ValType,
    /// Elements at the start.
    pub minimum: u64,
    /// Most elements.
    pub maximum: Option<u64>,
}

/// A memory's type, in pages of 64 KiB.
#[derive(Clone, Debug)]
pub struct MemoryType {
    /// Pages at the start.
    pub minimum: u64,
    /// Most pages.
    pub maximum: Option<u64>,
}

/// A global's type.
#[derive(Clone, Copy, Debug)]
pub struct GlobalType {
    /// Type of its value.
    pub content: ValType,
    /// Code may set it.
    pub mutable: bool,
}

/// What an import must be.
#[derive(Clone, Debug)]
pub enum ImportType {
    /// A function.
    Func(TypeId),
    /// A table.
    Table(TableType),
    /// A memory.
    Memory(MemoryType),
    /// A global.
    Global(GlobalType),
    /// A tag of exceptions, by the type of what they carry.
    Tag(TypeId),
}

/// One import.
#[derive(Clone, Debug)]
pub struct Import {
    /// Name of the module that it comes from.
    pub module: String,
    /// Its name there.
    pub name: String,
    /// Its type.
    pub ty: ImportType,
}

/// The index spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Functions.
    Func,
    /// Tables.
    Table,
    /// Memories.
    Memory,
    /// Globals.
    Global,
    /// Tags of exceptions.
    Tag,
}

/// When a segment is copied.
#[derive(Clone, Debug)]
pub enum Placement {
    /// At instantiation, into this table or memory at this offset.
    Active(u32, Const),
    /// By an instruction.
    Passive,
    /// Never.
    Declared,
}

/// A validated module.
#[derive(Default)]
pub struct Module {
    bytes: Vec<u8>,
    /// Type index to interned type.
    pub types: Vec<TypeId>,
    /// In order.
    pub imports: Vec<Import>,
    /// Types of all functions, imported ones first.
    pub funcs: Vec<TypeId>,
    /// Number of imported functions.
    pub imported_funcs: usize,
    /// Types of all tables; those defined here have an initial value.
    pub tables: Vec<(TableType, Option<Const>)>,
    /// Types of all memories.
    pub memories: Vec<MemoryType>,
    /// Types of all globals; those defined here have an initial value.
    pub globals: Vec<(GlobalType, Option<Const>)>,
    /// Types of what exceptions carry, by tag, imported ones first.
    pub tags: Vec<TypeId>,
    /// Name, space and index.
    pub exports: Vec<(String, Space, u32)>,
    /// Function to run at instantiation.
    pub start: Option<u32>,
    /// Element segments.
    pub elements: Vec<(Placement, Vec<Const>)>,
    /// Data segments.
    pub data: Vec<(Placement, Range<usize>)>,
    bodies: Vec<Range<usize>>,
}

impl Module {
    /// Validates and reads a binary module.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`].
    pub fn parse(bytes: Vec<u8>, types: &mut Types) -> Result<Module, Error> {
        wp::Validator::new_with_features(wp::WasmFeatures::WASM3).validate_all(&bytes)?;
        let mut module = Module::default();
        for payload in wp::Parser::new(0).parse_all(&bytes) {
            module.section(payload?, &bytes, types)?;
        }
        module.bytes = bytes;
        Ok(module)
    }

    /// Bodies of the functions defined here, by their index among these.
    pub fn bodies(&self) -> impl Iterator<Item = wp::FunctionBody<'_>> {
        self.bodies
            .iter()
            .map(|range| wp::FunctionBody::new(wp::BinaryReader::new(&self.bytes[range.clone()], range.start as u64)))
    }

    /// Bytes of a data segment.
    pub fn data_bytes(&self, segment: usize) -> &[u8] {
        &self.bytes[self.data[segment].1.clone()]
    }

    fn section(&mut self, payload: wp::Payload<'_>, bytes: &[u8], types: &mut Types) -> Result<(), Error> {
        match payload {
            wp::Payload::TypeSection(reader) => {
                for group in reader {
                    let group = group?;
                    if group.is_explicit_rec_group() && group.types().len() != 1 {
                        return unsupported("recursive type groups");
                    }
                    for ty in group.types() {
                        let ty = self.func_type(ty)?;
                        self.types.push(types.intern(ty));
                    }
                }
            }
            wp::Payload::ImportSection(reader) => {
                for import in reader.into_imports() {
                    self.import(&import?)?;
                }
                self.imported_funcs = self.funcs.len();
            }
            wp::Payload::FunctionSection(reader) => {
                for index in reader {
                    self.funcs.push(self.types[index? as usize]);
                }
            }
            wp::Payload::TableSection(reader) => {
                for table in reader {
                    let table = table?;
                    let init = match table.init {
                        wp::TableInit::RefNull => vec![ConstOp::Value(0)],
                        wp::TableInit::Expr(expr) => const_expr(&expr)?,
                    };
                    self.tables.push((self.table_type(&table.ty)?, Some(init)));
                }
            }
            wp::Payload::MemorySection(reader) => {
                for memory in reader {
                    self.memories.push(memory_type(&memory?)?);
                }
            }
            wp::Payload::GlobalSection(reader) => {
                for global in reader {
                    let global = global?;
                    self.globals.push((self.global_type(&global.ty)?, Some(const_expr(&global.init_expr)?)));
                }
            }
            wp::Payload::ExportSection(reader) => {
                for export in reader {
                    let export = export?;
                    let space = match export.kind {
                        wp::ExternalKind::Func | wp::ExternalKind::FuncExact => Space::Func,
                        wp::ExternalKind::Table => Space::Table,
                        wp::ExternalKind::Memory => Space::Memory,
                        wp::ExternalKind::Global => Space::Global,
                        wp::ExternalKind::Tag => Space::Tag,
                    };
                    self.exports.push((export.name.to_owned(), space, export.index));
                }
            }
            wp::Payload::StartSection { func, .. } => self.start = Some(func),
            wp::Payload::ElementSection(reader) => {
                for element in reader {
                    let segment = element_segment(&element?)?;
                    self.elements.push(segment);
                }
            }
            wp::Payload::DataSection(reader) => {
                for data in reader {
                    let data = data?;
                    let placement = match &data.kind {
                        wp::DataKind::Passive => Placement::Passive,
                        wp::DataKind::Active { memory_index, offset_expr } => {
                            Placement::Active(*memory_index, const_expr(offset_expr)?)
                        }
                    };
                    let start = data.data.as_ptr().addr() - bytes.as_ptr().addr();
                    self.data.push((placement, start..start + data.data.len()));
                }
            }
            wp::Payload::CodeSectionEntry(body) => {
                let range = body.range();
                self.bodies.push(range.start as usize..range.end as usize);
            }
            wp::Payload::TagSection(reader) => {
                for tag in reader {
                    self.tags.push(self.types[tag?.func_type_idx as usize]);
                }
            }
            wp::Payload::Version { encoding: wp::Encoding::Component, .. } => {
                return unsupported("components; give a core module");
            }
            _ => {}
        }
        Ok(())
    }

    fn import(&mut self, import: &wp::Import<'_>) -> Result<(), Error> {
        let ty = match &import.ty {
            wp::TypeRef::Func(index) | wp::TypeRef::FuncExact(index) => {
                let id = self.types[*index as usize];
                self.funcs.push(id);
                ImportType::Func(id)
            }
            wp::TypeRef::Table(ty) => {
                let ty = self.table_type(ty)?;
                self.tables.push((ty.clone(), None));
                ImportType::Table(ty)
            }
            wp::TypeRef::Memory(ty) => {
                let ty = memory_type(ty)?;
                self.memories.push(ty.clone());
                ImportType::Memory(ty)
            }
            wp::TypeRef::Global(ty) => {
                let ty = self.global_type(ty)?;
                self.globals.push((ty, None));
                ImportType::Global(ty)
            }
            wp::TypeRef::Tag(tag) => {
                let id = self.types[tag.func_type_idx as usize];
                self.tags.push(id);
                ImportType::Tag(id)
            }
        };
        self.imports.push(Import { module: import.module.to_owned(), name: import.name.to_owned(), ty });
        Ok(())
    }

    fn func_type(&self, ty: &wp::SubType) -> Result<FuncType, Error> {
        let wp::CompositeInnerType::Func(func) = &ty.composite_type.inner else {
            return unsupported("structs, arrays and continuations");
        };
        if !ty.is_final || !ty.supertype_idxs.is_empty() {
            return unsupported("subtypes of function types");
        }
        let list = |of: &[wp::ValType]| of.iter().map(|ty| self.val_type(*ty)).collect::<Result<Vec<_>, _>>();
        Ok(FuncType { params: list(func.params())?, results: list(func.results())? })
    }

    /// The engine's form of a value type of this module.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for garbage-collected references.
    pub fn val_type(&self, ty: wp::ValType) -> Result<ValType, Error> {
        Ok(match ty {
            wp::ValType::I32 => ValType::I32,
            wp::ValType::I64 => ValType::I64,
            wp::ValType::F32 => ValType::F32,
            wp::ValType::F64 => ValType::F64,
            wp::ValType::V128 => ValType::V128,
            wp::ValType::Ref(ty) => self.ref_type(ty)?,
        })
    }

    fn ref_type(&self, ty: wp::RefType) -> Result<ValType, Error> {
        use wp::AbstractHeapType as Abstract;
        let heap = match ty.heap_type() {
            wp::HeapType::Abstract { shared: false, ty: Abstract::Func } => Heap::Func,
            wp::HeapType::Abstract { shared: false, ty: Abstract::NoFunc } => Heap::NoFunc,
            wp::HeapType::Abstract { shared: false, ty: Abstract::Extern } => Heap::Extern,
            wp::HeapType::Abstract { shared: false, ty: Abstract::NoExtern } => Heap::NoExtern,
            wp::HeapType::Abstract { shared: false, ty: Abstract::Exn } => Heap::Exn,
            wp::HeapType::Abstract { shared: false, ty: Abstract::NoExn } => Heap::NoExn,
            wp::HeapType::Concrete(index) => {
                let known = index.as_module_index().and_then(|index| self.types.get(index as usize));
                match known {
                    Some(&id) => Heap::Typed(id),
                    None => return unsupported("recursive types"),
                }
            }
            other => return unsupported(format!("references to {other:?}")),
        };
        Ok(ValType::Ref { nullable: ty.is_nullable(), heap })
    }

    fn table_type(&self, ty: &wp::TableType) -> Result<TableType, Error> {
        if ty.table64 || ty.shared {
            return unsupported("64-bit and shared tables");
        }
        Ok(TableType { element: self.ref_type(ty.element_type)?, minimum: ty.initial, maximum: ty.maximum })
    }

    fn global_type(&self, ty: &wp::GlobalType) -> Result<GlobalType, Error> {
        if ty.shared {
            return unsupported("shared globals");
        }
        let content = self.val_type(ty.content_type)?;
        if !content.fits_host() {
            return unsupported("globals of type v128");
        }
        Ok(GlobalType { content, mutable: ty.mutable })
    }
}

fn memory_type(ty: &wp::MemoryType) -> Result<MemoryType, Error> {
    if ty.memory64 || ty.shared || ty.page_size_log2.is_some() {
        return unsupported("64-bit and shared memories, and page sizes other than 64 KiB");
    }
    Ok(MemoryType { minimum: ty.initial, maximum: ty.maximum })
}

fn element_segment(element: &wp::Element<'_>) -> Result<(Placement, Vec<Const>), Error> {
    let placement = match &element.kind {
        wp::ElementKind::Passive => Placement::Passive,
        wp::ElementKind::Declared => Placement::Declared,
        wp::ElementKind::Active { table_index, offset_expr } => {
            Placement::Active(table_index.unwrap_or(0), const_expr(offset_expr)?)
        }
    };
    let items = match &element.items {
        wp::ElementItems::Functions(list) => {
            list.clone().into_iter().map(|index| Ok(vec![ConstOp::Func(index?)])).collect::<Result<_, Error>>()?
        }
        wp::ElementItems::Expressions(_, list) => {
            list.clone().into_iter().map(|expr| const_expr(&expr?)).collect::<Result<_, Error>>()?
        }
    };
    Ok((placement, items))
}

fn const_expr(expr: &wp::ConstExpr<'_>) -> Result<Const, Error> {
    use wp::Operator as Op;
    let mut steps = Const::new();
    for op in expr.get_operators_reader() {
        steps.push(match op? {
            Op::I32Const { value } => ConstOp::Value(u64::from(value as u32)),
            Op::I64Const { value } => ConstOp::Value(value as u64),
            Op::F32Const { value } => ConstOp::Value(u64::from(value.bits())),
            Op::F64Const { value } => ConstOp::Value(value.bits()),
            Op::RefNull { .. } => ConstOp::Value(0),
            Op::RefFunc { function_index } => ConstOp::Func(function_index),
            Op::GlobalGet { global_index } => ConstOp::Global(global_index),
            Op::I32Add => ConstOp::Op32(u32::wrapping_add),
            Op::I32Sub => ConstOp::Op32(u32::wrapping_sub),
            Op::I32Mul => ConstOp::Op32(u32::wrapping_mul),
            Op::I64Add => ConstOp::Op64(u64::wrapping_add),
            Op::I64Sub => ConstOp::Op64(u64::wrapping_sub),
            Op::I64Mul => ConstOp::Op64(u64::wrapping_mul),
            Op::End => break,
            other => return unsupported(format!("constant expression with {other:?}")),
        });
    }
    Ok(steps)
}
