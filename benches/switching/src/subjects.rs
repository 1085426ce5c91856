//! What is measured: each library's way to do the same work.

mod face;
mod fcontext;
pub mod flags;
#[cfg(feature = "peers")]
mod others;
mod stubs;

/// Does the work so many times. It may keep a suspended stack: nobody drops a run before the process ends.
pub type Run = Box<dyn FnMut(u64)>;

/// The library that the others are compared with.
pub const OURS: &str = "cfi-stack";

/// One library's way to do one kind of work.
pub struct Subject {
    pub library: &'static str,
    /// What it needs that this build has not, or how to make it.
    pub make: Result<fn() -> Run, &'static str>,
    /// Whether it works on a thread with a shadow stack.
    pub bears_shadow_stacks: bool,
}

/// The same work by several libraries.
pub struct Group {
    pub name: &'static str,
    pub what: &'static str,
    pub subjects: Vec<Subject>,
}

/// A peer that is a crate.
macro_rules! peer {
    ($library:literal, $($make:ident)::+) => {{
        #[cfg(feature = "peers")]
        let make = Ok($($make)::+ as fn() -> Run);
        #[cfg(not(feature = "peers"))]
        let make = Err("built without the feature `peers`");
        Subject { library: $library, make, bears_shadow_stacks: false }
    }};
}

fn ours(make: fn() -> Run) -> Subject {
    Subject { library: OURS, make: Ok(make), bears_shadow_stacks: true }
}

fn boost(library: &'static str, make: Result<fn() -> Run, &'static str>) -> Subject {
    Subject { library, make, bears_shadow_stacks: false }
}

/// Bytes of a stack of one size for all.
const ROOM: usize = 64 << 10;

fn differing_debian() -> Run {
    flags::differing(fcontext::DEBIAN.expect("its group asks only where it is").0)
}

/// Everything there is to measure, in the order of the report.
pub fn groups() -> Vec<Group> {
    #[cfg(feature = "peers")]
    use face::corosensei;
    use face::ours as cfi_stack;
    use fcontext::{DEBIAN, WITHOUT_FP};
    #[cfg(feature = "peers")]
    use others::{context_rs, generator_rs, wasmtime};
    use stubs::{kept, not_kept};
    let group = |name, what, subjects| Group { name, what, subjects };
    vec![
        group(
            "inlined",
            "round trip: resume and suspend as the compiler inlines them",
            vec![
                ours(cfi_stack::inlined),
                peer!("corosensei", corosensei::inlined),
                peer!("context-rs", context_rs::inlined),
                peer!("generator-rs", generator_rs::inlined),
                peer!("wasmtime-fiber", wasmtime::inlined),
            ],
        ),
        group(
            "called",
            "round trip: resume and suspend each behind a function that is not inlined",
            vec![
                ours(cfi_stack::called),
                peer!("corosensei", corosensei::called),
                peer!("context-rs", context_rs::called),
                peer!("generator-rs", generator_rs::called),
                peer!("wasmtime-fiber", wasmtime::called),
            ],
        ),
        group(
            "stub",
            "round trip: the assembly called directly, FP control kept",
            vec![ours(kept::stub), boost("boost, Debian", DEBIAN.map(|(stub, _)| stub))],
        ),
        group(
            "stub-flags",
            "the same, one side having other floating-point exception flags than the other",
            vec![
                ours(|| flags::differing(kept::stub)),
                boost("boost, Debian", DEBIAN.map(|_| differing_debian as fn() -> Run)),
            ],
        ),
        group(
            "stub-no-fp",
            "round trip: the assembly called directly, FP control not kept",
            vec![ours(not_kept::stub), boost("boost, no FP", WITHOUT_FP.map(|(stub, _)| stub))],
        ),
        group(
            "stub-new",
            "a new entry on a used stack, and back: the assembly called directly, FP control kept",
            vec![ours(kept::reused), boost("boost, Debian", DEBIAN.map(|(_, reused)| reused))],
        ),
        group(
            "reused",
            "create, run to the end, on a stack that was used before",
            vec![
                ours(cfi_stack::reused),
                peer!("corosensei", corosensei::reused),
                peer!("context-rs", context_rs::reused),
                peer!("generator-rs", generator_rs::reused),
                peer!("wasmtime-fiber", wasmtime::reused),
            ],
        ),
        group(
            "lent",
            "create, run to the end and drop, on a stack that is lent to each",
            vec![ours(cfi_stack::lent), peer!("corosensei", corosensei::lent)],
        ),
        group(
            "fresh",
            "create, run to the end and drop, each with a stack of its own",
            vec![
                ours(cfi_stack::fresh),
                peer!("corosensei", corosensei::fresh),
                peer!("context-rs", context_rs::fresh),
                peer!("generator-rs", generator_rs::fresh),
                peer!("wasmtime-fiber", wasmtime::fresh),
            ],
        ),
    ]
}
