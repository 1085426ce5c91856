//! From Cranelift's form to code that may run and whose frames may move.
//!
//! Every function is compiled once, its frame measured, its code placed by `cranelift-jit` in one arena, and its
//! layout registered with the library. A function whose frame the reserve does not cover gets an entry thunk.
//!
//! One by the `Tail` convention owns what lies above its CFA: as many bytes as it was called with, or as the largest tail call that it
//! makes wants. A call of such a function pops what it passed, and the layout's `frame_bytes` there is so much less.

use crate::context::CodeIndex;
use crate::emit::{Emitter, argument_area};
use crate::error::Error;
use crate::glue;
use crate::trap::Trap;
use cfi_stack::codemap::{FrameLayout, Registered, Registration, Safepoint};
use cfi_stack::engine::Stubs;
use cfi_stack::pac::{Binding, RawPc, Signing};
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::{Function, InstructionData, Opcode, Signature, UserFuncName};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{Context, Final, MachSrcLoc};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{ArenaMemoryProvider, JITBuilder, JITModule};
use cranelift_module::{FuncId, Module as _, ModuleReloc, ModuleRelocTarget, default_libcall_names};

/// Largest frame of a function without an entry thunk, in bytes below its frame record.
pub const MAX_FRAME: u32 = 512;
/// Bytes below the limit that code may use unchecked: the largest such frame with its record, and the stubs' need.
pub const RESERVE: usize = MAX_FRAME as usize + 16 + 112;
/// Code is placed so that direct calls reach all of it: 128 MiB on arm64.
const LARGEST_ARENA: usize = 120 << 20;

/// Which arm64 key signs return addresses. On x86-64 it means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Instruction key A.
    A,
    /// Instruction key B.
    B,
}

impl Key {
    /// How code compiled with this key signs.
    pub fn signing(self) -> Signing {
        match self {
            _ if !cfg!(target_arch = "aarch64") => Signing::None,
            Key::A => Signing::A,
            Key::B => Signing::B,
        }
    }
}

/// Bytes that a function with this frame touches below the stack pointer at its call: record, frame, and the probes
/// of frames beyond a page, which go by whole pages.
fn room_for(frame_bytes: u32) -> u32 {
    const PROBED: u32 = 4096;
    16 + if frame_bytes < PROBED { frame_bytes } else { frame_bytes.next_multiple_of(PROBED) }
}

fn internal(error: impl std::fmt::Display) -> Error {
    Error::System(format!("the code generator failed: {error}"))
}

/// Cranelift's settings for movable frames (README.md gives the reason of each).
fn isa(key: Key, optimise: bool) -> Result<OwnedTargetIsa, Error> {
    let mut shared = settings::builder();
    for (name, value) in [
        ("opt_level", if optimise { "speed" } else { "none" }),
        ("is_pic", "false"),
        ("use_colocated_libcalls", "false"),
        ("preserve_frame_pointers", "true"),
        ("enable_multi_ret_implicit_sret", "false"),
        ("enable_probestack", "true"),
        ("probestack_strategy", "inline"),
        ("probestack_size_log2", "12"),
        ("unwind_info", "false"),
    ] {
        shared.set(name, value).map_err(internal)?;
    }
    if cfg!(debug_assertions) {
        shared.enable("enable_verifier").map_err(internal)?;
    } else {
        shared.set("enable_verifier", "false").map_err(internal)?;
    }
    // On arm64 nothing is inferred: authentication stays in hint space, `autiasp; ret`, which faults at the `aut` on
    // every CPU with FEAT_FPAC; a fused `retaa` would need FEAT_FPACCOMBINE for that.
    let mut builder = cranelift_native::builder_with_options(cfg!(target_arch = "x86_64")).map_err(internal)?;
    if cfg!(target_arch = "aarch64") {
        for name in ["sign_return_address", "sign_return_address_all", "use_bti"] {
            builder.enable(name).map_err(internal)?;
        }
        if key == Key::B {
            builder.enable("sign_return_address_with_bkey").map_err(internal)?;
        }
    }
    #[cfg(target_arch = "x86_64")]
    if !std::is_x86_feature_detected!("sse4.1") {
        // Rounding would become calls of native functions on the managed stack.
        return crate::error::unsupported("x86-64 CPUs without SSE4.1");
    }
    builder.finish(settings::Flags::new(shared)).map_err(internal)
}

/// `bti jc`. By the `Tail` convention Cranelift signs with `paciaz` or `pacibz`, which are no landing pads, and an indirect tail
/// call is a branch by a register of its own choice, for which `bti c` is none.
const LANDING_PAD: [u8; 4] = 0xd503_24df_u32.to_le_bytes();

/// How the frames of one function look.
#[derive(Clone, Copy)]
struct Shape {
    /// Below the frame record.
    frame_bytes: u32,
    /// The `Tail` convention: zero is the modifier, and what lies above the CFA is its own.
    tail: bool,
    /// Bytes of that.
    incoming: u32,
    /// How many of these it was not called with: its frame record lies so much further down.
    added: u32,
}

impl Shape {
    /// Bytes below the frame record that it was called to make.
    fn depth(&self) -> u32 {
        self.frame_bytes + self.added
    }

    fn layout(&self, signing: Signing) -> FrameLayout {
        let layout = FrameLayout::new(self.frame_bytes, signing).with_incoming(self.incoming);
        if self.tail && signing != Signing::None { layout.with_binding(Binding::Zero) } else { layout }
    }
}

/// A call at which the frame is not what the function's layout says.
struct Site {
    /// Where it returns to, from the function's beginning.
    at: u32,
    /// What the callee pops.
    popped: u32,
    /// Offsets from fp of the pointers into the stack.
    slots: Vec<i32>,
}

/// One compiled function.
struct Compiled {
    id: FuncId,
    len: usize,
    shape: Shape,
    sites: Vec<Site>,
    traps: Vec<(u32, Trap)>,
}

/// Functions being compiled.
pub struct Compiler {
    jit: JITModule,
    /// For functions with places in their frames: optimisation may keep the address of one across calls.
    plain: OwnedTargetIsa,
    reuse: FunctionBuilderContext,
    context: Context,
    compiled: Vec<Compiled>,
    stubs: Stubs,
    key: Key,
}

impl Compiler {
    /// A compiler of a module with `wasm_bytes` bytes of function bodies.
    ///
    /// # Errors
    /// [`Error::System`] or [`Error::Unsupported`] when this CPU or its memory will not do.
    pub fn new(key: Key, stubs: Stubs, wasm_bytes: usize) -> Result<Compiler, Error> {
        let arena = wasm_bytes.saturating_mul(64).clamp(4 << 20, LARGEST_ARENA);
        let memory = ArenaMemoryProvider::new_with_size(arena)
            .map_err(|error| Error::System(format!("no addresses for {arena} bytes of code: {error}")))?;
        let mut builder = JITBuilder::with_isa(isa(key, true)?, default_libcall_names());
        builder.memory_provider(Box::new(memory));
        Ok(Compiler {
            jit: JITModule::new(builder),
            plain: isa(key, false)?,
            reuse: FunctionBuilderContext::new(),
            context: Context::new(),
            compiled: Vec::new(),
            stubs,
            key,
        })
    }

    /// Announces a function.
    ///
    /// # Errors
    /// [`Error::System`] when the code generator refuses.
    pub fn declare(&mut self, signature: &Signature) -> Result<FuncId, Error> {
        self.jit.declare_anonymous_function(signature).map_err(internal)
    }

    /// Compiles an announced function, which `build` emits.
    ///
    /// # Errors
    /// What `build` returns, and [`Error::System`] when the code generator refuses.
    pub fn define(
        &mut self,
        id: FuncId,
        build: impl FnOnce(FunctionBuilder<'_>, Stubs, &mut JITModule) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let signature = self.jit.declarations().get_function_decl(id).signature.clone();
        self.build(&signature, build)?;
        let shape = self.compile()?;
        if shape.depth() <= MAX_FRAME {
            return self.place(id, shape);
        }
        let body = self.declare(&signature)?;
        self.place(body, shape)?;
        self.build(&signature, |builder, stubs, jit| {
            let (mut e, params) = Emitter::new(builder, stubs);
            let body = jit.declare_func_in_func(body, e.b.func);
            glue::entry_thunk(&mut e, &params, body, room_for(shape.depth()));
            finish(e);
            Ok(())
        })?;
        let thunk = self.compile()?;
        if thunk.depth() > MAX_FRAME {
            return Err(internal(format!("an entry thunk with a frame of {} bytes", thunk.depth())));
        }
        self.place(id, thunk)
    }

    fn build(
        &mut self,
        signature: &Signature,
        build: impl FnOnce(FunctionBuilder<'_>, Stubs, &mut JITModule) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.context.clear();
        self.context.func = Function::with_name_signature(UserFuncName::default(), signature.clone());
        let builder = FunctionBuilder::new(&mut self.context.func, &mut self.reuse);
        let built = build(builder, self.stubs, &mut self.jit);
        if built.is_err() {
            self.reuse = FunctionBuilderContext::new();
        }
        built
    }

    /// Compiles what was built.
    fn compile(&mut self) -> Result<Shape, Error> {
        let optimise = self.context.func.sized_stack_slots.is_empty();
        let isa = if optimise { self.jit.isa() } else { &*self.plain };
        let code = self
            .context
            .compile(isa, &mut ControlPlane::default())
            .map_err(|error| internal(format!("{:?}", error.inner)))?;
        let layout = code.buffer.frame_layout().ok_or_else(|| internal("a function without a frame layout"))?;
        let frame_bytes = layout.frame_to_fp_offset;
        // The library recomputes every frame pointer from this number: it must hold at each call.
        if code.buffer.call_sites().any(|site| site.frame_offset.is_some_and(|at| at != frame_bytes)) {
            return Err(internal("a call where the frame has another size"));
        }
        let func = &self.context.func;
        let given = argument_area(&func.signature);
        let incoming = tail_calls(func).map(argument_area).fold(given, u32::max);
        let tail = func.signature.call_conv == CallConv::Tail;
        Ok(Shape { frame_bytes, tail, incoming, added: incoming - given })
    }

    fn place(&mut self, id: FuncId, shape: Shape) -> Result<(), Error> {
        let code = self.context.compiled_code().ok_or_else(|| internal("no code"))?;
        let func = &self.context.func;
        let pad: &[u8] = if shape.tail && cfg!(target_arch = "aarch64") { &LANDING_PAD } else { &[] };
        let before = pad.len() as u32;
        let mut relocations: Vec<_> =
            code.buffer.relocs().iter().map(|reloc| ModuleReloc::from_mach_reloc(reloc, func, id)).collect();
        for relocation in &mut relocations {
            relocation.offset += before;
            if let ModuleRelocTarget::FunctionOffset(_, offset) = &mut relocation.name {
                *offset += before;
            }
        }
        let traps = code.buffer.traps();
        let traps = traps.iter().map(|trap| (before + trap.offset, Trap::from_cranelift(trap.code))).collect();
        let mut sites = Vec::new();
        for site in code.buffer.call_sites() {
            let holds = |loc: &&MachSrcLoc<Final>| loc.start < site.ret_addr && site.ret_addr <= loc.end;
            let location = code.buffer.get_srclocs_sorted().iter().find(holds).map(|found| found.loc);
            let popped = location.filter(|location| !location.is_default()).map_or(0, |location| location.bits());
            let maps = code.buffer.user_stack_maps().iter().filter(|map| map.0 == site.ret_addr);
            let slots: Vec<_> =
                maps.flat_map(|map| map.2.entries()).map(|(_, at)| at as i32 - shape.frame_bytes as i32).collect();
            if popped > 0 || !slots.is_empty() {
                sites.push(Site { at: before + site.ret_addr, popped, slots });
            }
        }
        let bytes = [pad, code.code_buffer()].concat();
        let alignment = u64::from(code.buffer.alignment);
        self.jit.define_function_bytes(id, alignment, &bytes, &relocations).map_err(internal)?;
        self.compiled.push(Compiled { id, len: bytes.len(), shape, sites, traps });
        Ok(())
    }

    /// Makes the code executable and registers its layouts.
    ///
    /// # Errors
    /// [`Error::System`] for lack of memory, [`Error::Stack`] when the library refuses a layout.
    pub fn finish(mut self) -> Result<Code, Error> {
        self.jit.finalize_definitions().map_err(internal)?;
        let mut code = Code { registered: None, jit: Some(self.jit), compiled: self.compiled };
        let mut registration = Registration::new();
        for function in &code.compiled {
            let (start, frame_bytes) = (code.address(function.id), function.shape.frame_bytes);
            registration.function(RawPc::new(start), function.len, function.shape.layout(self.key.signing()))?;
            for Site { at, popped, slots } in &function.sites {
                let frame_bytes =
                    frame_bytes.checked_sub(*popped).ok_or_else(|| internal("a call that pops too much"))?;
                let safepoint = Safepoint { frame_bytes: Some(frame_bytes), slots, registers: &[] };
                registration.call(RawPc::new(start + *at as usize), safepoint)?;
            }
        }
        code.registered = Some(registration.publish()?);
        Ok(code)
    }
}

/// Signatures of the tail calls that a function makes.
fn tail_calls(func: &Function) -> impl Iterator<Item = &Signature> {
    let instructions = func.layout.blocks().flat_map(|block| func.layout.block_insts(block));
    instructions.filter_map(|inst| match func.dfg.insts[inst] {
        InstructionData::Call { opcode: Opcode::ReturnCall, func_ref, .. } => {
            Some(&func.dfg.signatures[func.dfg.ext_funcs[func_ref].signature])
        }
        InstructionData::CallIndirect { opcode: Opcode::ReturnCallIndirect, sig_ref, .. } => {
            Some(&func.dfg.signatures[sig_ref])
        }
        _ => None,
    })
}

/// Completes a function.
pub fn finish(e: Emitter<'_>) {
    let mut b = e.b;
    b.seal_all_blocks();
    let config = cranelift_codegen::isa::TargetFrontendConfig {
        default_call_conv: cranelift_codegen::isa::CallConv::SystemV,
        pointer_width: target_lexicon::PointerWidth::U64,
        page_size_align_log2: 12,
    };
    b.finalize(config);
}

/// Compiled code, registered as long as it exists.
pub struct Code {
    registered: Option<Registered>,
    jit: Option<JITModule>,
    compiled: Vec<Compiled>,
}

impl Code {
    /// Where a function begins.
    pub fn address(&self, id: FuncId) -> usize {
        let jit = self.jit.as_ref().expect("taken only by drop");
        jit.get_finalized_function(id).expose_provenance()
    }

    /// The largest argument area that one of its functions owns, in bytes.
    pub fn largest_argument_area(&self) -> u32 {
        self.compiled.iter().map(|function| function.shape.incoming).max().unwrap_or(0)
    }

    /// Tells the fault handler about this code.
    pub fn describe(&self, index: &mut CodeIndex) {
        for function in &self.compiled {
            let start = self.address(function.id);
            index.ranges.push(start..start + function.len);
            index.traps.extend(function.traps.iter().map(|(at, trap)| (start + *at as usize, *trap)));
        }
        index.traps.sort_unstable_by_key(|trap| trap.0);
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // The code map must not describe code that is gone.
        drop(self.registered.take());
        if let Some(jit) = self.jit.take() {
            // SAFETY: code is dropped with its store, which enters managed code only by borrowing itself mutably,
            // so none runs; all addresses of it are in that store.
            unsafe { jit.free_memory() };
        }
    }
}
