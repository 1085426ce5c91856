//! The attack battery: one function per case of the attack table.

mod bad_layouts;
mod code_map_store;
mod context_copied;
mod context_entry;
mod context_exchange;
mod context_faces;
mod context_looking;
mod context_over;
mod context_pc;
mod context_registers;
mod context_replay;
mod context_reused;
mod context_scene;
mod context_sp;
mod context_twice;
mod destination;
mod exhausted;
mod failure_injection;
mod frame_chain;
mod frames_foreign;
mod frames_replayed;
mod growable_scene;
mod layouts_wrong;
mod limit_forged;
mod metadata_growable;
mod metadata_links;
mod metadata_lists;
mod metadata_misuse;
mod metadata_pooled;
mod metadata_records;
mod metadata_shadows;
mod metadata_slots;
mod metadata_suspended;
mod overflow;
mod parked;
mod plan_moved;
mod plan_rewritten;
mod process_forks;
mod process_threads;
mod raced;
mod rebind_raced;
mod return_addresses;
mod shadow_areas;
mod shadow_locks;
mod shadow_store;
mod shadow_tokens;
mod signals;
mod signing_oracle;
mod source_changed;
mod stale_pointer;
mod stepped;
mod unwound;

pub use process_forks::{DA, DB, GA, IA, IB, Keys};

use crate::class::Class;
use crate::outcome::Report;

/// A case: its id, what happens, and what runs it.
pub struct Case {
    /// Its id in the attack table, or `S` and a number for a self-test.
    pub id: &'static str,
    /// What happens, in one line.
    pub title: &'static str,
    /// Runs it.
    pub run: fn(&Class) -> Report,
}

/// The attacks.
pub const ATTACKS: &[Case] = &[
    Case { id: "A01", title: "a bit of a saved pc is flipped", run: context_pc::flipped },
    Case { id: "A02", title: "a saved stack pointer is changed", run: context_sp::changed },
    Case { id: "A03", title: "a saved frame pointer is changed", run: context_registers::frame_pointer },
    Case { id: "A04", title: "a saved callee-saved register is changed", run: context_registers::callee_saved },
    Case { id: "A05", title: "the contexts of two stacks are exchanged", run: context_exchange::swapped },
    Case {
        id: "A06a",
        title: "a context of an earlier suspension is put back, the generation intact",
        run: context_replay::generation_intact,
    },
    Case {
        id: "A06b",
        title: "a context of an earlier suspension is put back with its generation",
        run: context_replay::with_generation,
    },
    Case { id: "A07", title: "one context is resumed twice", run: context_twice::used_twice },
    Case {
        id: "A08",
        title: "a stack that ended, was cancelled or never was is resumed",
        run: context_over::resumed_after_the_end,
    },
    Case { id: "A09", title: "what a stack will run first is overwritten", run: context_entry::overwritten },
    Case { id: "A10", title: "a context is copied to another place and resumed there", run: context_copied::elsewhere },
    Case { id: "A11", title: "a word is flipped between verification and use, stepped and raced", run: raced::all },
    Case {
        id: "A12",
        title: "an older return address, signed for the same place, is put back",
        run: frames_replayed::in_one_life,
    },
    Case {
        id: "A13",
        title: "a context, a return address of a stack's former life is put back",
        run: context_reused::former_lives,
    },
    Case {
        id: "A14",
        title: "a frame's return address is copied into another frame before a migration",
        run: return_addresses::copied,
    },
    Case {
        id: "A15",
        title: "a frame of another stack is copied to the same place before a migration",
        run: frames_foreign::copied,
    },
    Case {
        id: "A16",
        title: "a return address is flipped while it is re-signed, stepped and raced",
        run: rebind_raced::all,
    },
    Case {
        id: "A17",
        title: "a return address is flipped in the destination, after the re-sign",
        run: return_addresses::flipped_after,
    },
    Case { id: "A18", title: "the source is changed after the copy", run: source_changed::after_the_copy },
    Case { id: "A19", title: "the frame-pointer chain is forged", run: frame_chain::forged },
    Case { id: "A20", title: "a pointer left into the old segment is used", run: stale_pointer::used },
    Case { id: "A21", title: "a frame descriptor, the code map's root are written", run: code_map_store::rewritten },
    Case { id: "A22", title: "(caller) impossible layouts are registered", run: bad_layouts::impossible },
    Case { id: "A23", title: "(caller) unsigned, unknown, immovable frames in a span", run: layouts_wrong::unmovable },
    Case { id: "A24", title: "(caller) a wrong key or modifier rule in a layout", run: layouts_wrong::wrong_rule },
    Case { id: "A25", title: "a migration is used as a signing oracle", run: signing_oracle::chosen_values },
    Case { id: "A26", title: "the same over many guesses", run: signing_oracle::many_guesses },
    Case {
        id: "A27",
        title: "(caller) the destination overlaps the source or is another stack's",
        run: destination::aliased,
    },
    Case {
        id: "A28",
        title: "a failure is injected at every step of a migration, memory runs out",
        run: failure_injection::every_step,
    },
    Case {
        id: "A29",
        title: "a slot's words, who waits for a running stack, and a segment's record are rewritten",
        run: metadata_slots::all,
    },
    Case { id: "A30", title: "the limit word is forged, then managed code recurses", run: limit_forged::forged },
    Case { id: "A31", title: "what a free list names is rewritten", run: metadata_lists::linked },
    Case {
        id: "A32",
        title: "(caller) stacks are freed twice, while they run, under what they wait for",
        run: metadata_misuse::frees,
    },
    Case { id: "A33", title: "(caller) impossible sizes and counts", run: metadata_misuse::sizes },
    Case {
        id: "A34",
        title: "(caller) a stack that is not aligned, values across its edge",
        run: metadata_misuse::edges,
    },
    Case {
        id: "A35",
        title: "a consumed token is used again; two threads restore one",
        run: shadow_tokens::used_again,
    },
    Case { id: "A36", title: "one stack's token is paired with another's data", run: shadow_tokens::paired },
    Case { id: "A37", title: "a token is forged, or a word that is none is restored", run: shadow_tokens::forged },
    Case { id: "A38", title: "a plain store to the stack's shadow stack", run: shadow_store::plain_store },
    Case { id: "A39", title: "instructions that write a shadow stack", run: shadow_locks::instructions },
    Case { id: "A40", title: "a suspended stack's shadow stack is unmapped; one overflows", run: shadow_areas::all },
    Case {
        id: "A41",
        title: "the shadow stack is unlocked, turned off, made writable; a used token is looked for",
        run: shadow_locks::locked,
    },
    Case {
        id: "A42",
        title: "single-stepped through every instruction of the stubs, a signal handler walks the stack at each",
        run: stepped::all,
    },
    Case { id: "A44", title: "fork with suspended stacks, with the child's keys reset", run: process_forks::all },
    Case { id: "A45", title: "stacks whose thread has ended, on another thread", run: process_threads::all },
    Case { id: "A46", title: "a panic, a forced unwind, pthread_cancel, longjmp across a stub", run: unwound::all },
    Case {
        id: "A47",
        title: "overflow on first touch, in the middle of a switch, by a frame larger than a page",
        run: overflow::all,
    },
    Case { id: "A48", title: "addresses, mappings, memory run out for growable stacks", run: exhausted::all },
    Case {
        id: "A49",
        title: "plan entries and segment records are rewritten during a migration",
        run: plan_rewritten::all,
    },
    Case { id: "A50", title: "SIGPROF while small stacks grow; a handler without SA_ONSTACK", run: signals::all },
];
