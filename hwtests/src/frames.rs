//! The hand-made functions of `asm/frames-*.S`, whose frames are not plain, and their layouts.

use cfi_stack::codemap::{FrameLayout, Register, Registration, Safepoint};
use cfi_stack::pac::{Binding, PointerSigning, RawPc, Signing};

const ARM: bool = cfg!(target_arch = "aarch64");

/// A call of a function: its return address, and what holds there.
#[derive(Clone, Debug)]
pub struct Site {
    /// Where it returns to.
    pub pc: RawPc,
    /// fp − sp there, when it is not the function's.
    pub frame_bytes: Option<u32>,
    /// Slots that hold pointers into the stack.
    pub slots: Vec<i32>,
    /// Registers that do.
    pub registers: Vec<Register>,
}

/// A function as it is registered.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// First byte.
    pub start: RawPc,
    /// Bytes of code.
    pub len: usize,
    /// Its frames.
    pub layout: FrameLayout,
    /// What it saves, and where.
    pub saves: Vec<(Register, i32)>,
    /// Its calls: that of grow, where it checks, then its own.
    pub sites: Vec<Site>,
}

macro_rules! address {
    ($name:ident) => {{
        unsafe extern "C" {
            fn $name();
        }
        RawPc::new($name as *const () as usize)
    }};
}

macro_rules! function {
    ($name:ident, $end:ident, $layout:expr, [$($site:ident),*]) => {
        Function {
            name: stringify!($name),
            start: address!($name),
            len: address!($end).address() - address!($name).address(),
            layout: $layout,
            saves: vec![],
            sites: vec![$(Site { pc: address!($site), frame_bytes: None, slots: vec![], registers: vec![] }),*],
        }
    };
}

fn layout(frame_bytes: u32, signing: Signing) -> FrameLayout {
    FrameLayout::new(frame_bytes, if ARM { signing } else { Signing::None })
}

impl Function {
    /// The slots that hold pointers at its calls: at grow's, then at its own.
    fn slots(mut self, each: &[&[i32]]) -> Self {
        self.sites.iter_mut().zip(each).for_each(|(site, slots)| site.slots = slots.to_vec());
        self
    }
}

/// The register that `frames_register` keeps its pointer in, and `frames_pushes` something else.
fn register() -> Register {
    Register::named(if ARM { "x19" } else { "rbx" }).expect("it is callee-saved")
}

/// A plain frame.
pub fn plain() -> Function {
    function!(frames_plain, frames_plain_end, layout(32, Signing::A), [frames_plain_grow, frames_plain_site])
        .slots(&[&[], &[-24]])
}

/// A pointer in a callee-saved register, the record away from the CFA. Its callee must save that register.
pub fn in_register() -> Function {
    let (frame_bytes, cfa_bytes, save) = if ARM { (32, 32, 24) } else { (40, 24, 8) };
    let mut function = function!(
        frames_register,
        frames_register_end,
        layout(frame_bytes, Signing::A).with_cfa_bytes(cfa_bytes),
        [frames_register_grow, frames_register_site]
    );
    function.saves = vec![(register(), save)];
    function.sites[1].registers = vec![register()];
    function
}

/// Pushes around its call; saves the register.
pub fn pushes() -> Function {
    let mut function =
        function!(frames_pushes, frames_pushes_end, layout(48, Signing::B), [frames_pushes_grow, frames_pushes_site])
            .slots(&[&[], &[if ARM { -64 } else { -56 }]]);
    function.saves = vec![(register(), -8)];
    function.sites[1].frame_bytes = Some(64);
    function
}

/// Passes arguments to `owner`; modifier zero on arm64.
pub fn arguments() -> Function {
    let layout = layout(32, Signing::A).with_binding(Binding::Zero);
    function!(frames_arguments, frames_arguments_end, layout, [frames_arguments_site])
}

/// Owns 16 bytes of arguments, goes on by a tail call of `popper`.
pub fn owner() -> Function {
    let layout = layout(32, Signing::A).with_incoming(16);
    function!(frames_owner, frames_owner_end, layout, [frames_owner_grow]).slots(&[&[24]])
}

/// Owns 32 bytes of arguments and pops them; a blended modifier on arm64.
pub fn popper() -> Function {
    let layout = layout(32, Signing::A).with_incoming(32).with_binding(Binding::Blended(0xabcd));
    function!(frames_popper, frames_popper_end, layout, [frames_popper_grow, frames_popper_site]).slots(&[&[40], &[40]])
}

/// Of dynamic size.
pub fn dynamic() -> Function {
    let layout = layout(48, Signing::A).dynamic();
    function!(frames_dynamic, frames_dynamic_end, layout, [frames_dynamic_grow, frames_dynamic_site])
        .slots(&[&[], &[-24]])
}

/// Signs the frame pointer that it saves, with data key A and with B. Not for CPUs without PAC.
pub fn signed_pointers() -> Vec<Function> {
    #[cfg(target_arch = "aarch64")]
    return vec![
        function!(
            frames_signed_a,
            frames_signed_a_end,
            layout(32, Signing::A).with_frame_pointer(PointerSigning::A),
            [frames_signed_a_grow, frames_signed_a_site]
        )
        .slots(&[&[], &[-24]]),
        function!(
            frames_signed_b,
            frames_signed_b_end,
            layout(32, Signing::A).with_frame_pointer(PointerSigning::B),
            [frames_signed_b_grow, frames_signed_b_site]
        )
        .slots(&[&[], &[-24]]),
    ];
    #[cfg(not(target_arch = "aarch64"))]
    {
        let _ = PointerSigning::None;
        vec![]
    }
}

/// All of them.
pub fn all() -> Vec<Function> {
    let mut all = vec![plain(), in_register(), pushes(), arguments(), owner(), popper(), dynamic()];
    all.extend(signed_pointers());
    all
}

/// A registration of all of them, not published; `change` may tell lies about one.
pub fn registration(mut change: impl FnMut(&mut Function)) -> Registration {
    crate::managed::link();
    let mut map = Registration::new();
    for mut function in all() {
        change(&mut function);
        map.function(function.start, function.len, function.layout).expect("a hand-made function is a possible one");
        map.saves(function.start, &function.saves).expect("it saves what it can");
        for Site { pc, frame_bytes, slots, registers } in &function.sites {
            let safepoint = Safepoint { frame_bytes: *frame_bytes, slots, registers };
            map.call(*pc, safepoint).expect("the slots lie in the frame");
        }
    }
    map
}
