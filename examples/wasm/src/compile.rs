//! From Cranelift's form to code that may run and whose frames may move.
//!
//! Every function is compiled once, its frame measured, its code placed by `cranelift-jit` in one arena, and its
//! layout registered with the library. A function whose frame the reserve does not cover gets an entry thunk.

use crate::context::CodeIndex;
use crate::emit::Emitter;
use crate::error::Error;
use crate::glue;
use crate::trap::Trap;
use cfi_stack::codemap::{FrameLayout, Registered, Registration};
use cfi_stack::engine::Stubs;
use cfi_stack::pac::{RawPc, Signing};
use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::{Function, Signature, UserFuncName};
use cranelift_codegen::isa::OwnedTargetIsa;
use cranelift_codegen::settings::{self, Configurable};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{ArenaMemoryProvider, JITBuilder, JITModule};
use cranelift_module::{FuncId, Module as _, ModuleReloc, default_libcall_names};

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
fn isa(key: Key) -> Result<OwnedTargetIsa, Error> {
    let mut shared = settings::builder();
    for (name, value) in [
        ("opt_level", "speed"),
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

/// One compiled function.
struct Compiled {
    id: FuncId,
    len: usize,
    frame_bytes: u32,
    traps: Vec<(u32, Trap)>,
}

/// Functions being compiled.
pub struct Compiler {
    jit: JITModule,
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
        let mut builder = JITBuilder::with_isa(isa(key)?, default_libcall_names());
        builder.memory_provider(Box::new(memory));
        Ok(Compiler {
            jit: JITModule::new(builder),
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
        let frame_bytes = self.compile()?;
        if frame_bytes <= MAX_FRAME {
            return self.place(id, frame_bytes);
        }
        let body = self.declare(&signature)?;
        self.place(body, frame_bytes)?;
        self.build(&signature, |builder, stubs, jit| {
            let (mut e, params) = Emitter::new(builder, stubs);
            let body = jit.declare_func_in_func(body, e.b.func);
            glue::entry_thunk(&mut e, &params, body, room_for(frame_bytes));
            finish(e);
            Ok(())
        })?;
        let frame_bytes = self.compile()?;
        if frame_bytes > MAX_FRAME {
            return Err(internal(format!("an entry thunk with a frame of {frame_bytes} bytes")));
        }
        self.place(id, frame_bytes)
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

    /// Compiles what was built; the size of its frame below the frame record.
    fn compile(&mut self) -> Result<u32, Error> {
        let code = self
            .context
            .compile(self.jit.isa(), &mut ControlPlane::default())
            .map_err(|error| internal(format!("{:?}", error.inner)))?;
        let layout = code.buffer.frame_layout().ok_or_else(|| internal("a function without a frame layout"))?;
        let frame_bytes = layout.frame_to_fp_offset;
        // The library recomputes every frame pointer from this number: it must hold at each call.
        if code.buffer.call_sites().any(|site| site.frame_offset.is_some_and(|at| at != frame_bytes)) {
            return Err(internal("a call where the frame has another size"));
        }
        Ok(frame_bytes)
    }

    fn place(&mut self, id: FuncId, frame_bytes: u32) -> Result<(), Error> {
        let code = self.context.compiled_code().ok_or_else(|| internal("no code"))?;
        let func = &self.context.func;
        let relocations: Vec<_> =
            code.buffer.relocs().iter().map(|reloc| ModuleReloc::from_mach_reloc(reloc, func, id)).collect();
        let traps = code.buffer.traps().iter().map(|trap| (trap.offset, Trap::from_cranelift(trap.code))).collect();
        let bytes = code.code_buffer();
        let alignment = u64::from(code.buffer.alignment);
        self.jit.define_function_bytes(id, alignment, bytes, &relocations).map_err(internal)?;
        self.compiled.push(Compiled { id, len: bytes.len(), frame_bytes, traps });
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
            let layout = FrameLayout::new(function.frame_bytes, self.key.signing());
            registration.function(RawPc::new(code.address(function.id)), function.len, layout)?;
        }
        code.registered = Some(registration.publish()?);
        Ok(code)
    }
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
