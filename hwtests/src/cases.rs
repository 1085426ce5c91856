//! The attack battery: one function per case of the attack table.

mod bad_layouts;
mod destination;
mod failure_injection;
mod frame_chain;
mod limit_forged;
mod metadata_pooled;
mod metadata_records;
mod metadata_slots;
mod overflow;
mod plan_rewritten;
mod return_addresses;
mod shadow_store;
mod signals;
mod signing_oracle;
mod stepped;

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
    Case {
        id: "A14",
        title: "a frame's return address is copied into another frame before a migration",
        run: return_addresses::copied,
    },
    Case {
        id: "A17",
        title: "a return address is flipped in the destination, after the re-sign",
        run: return_addresses::flipped_after,
    },
    Case { id: "A19", title: "the frame-pointer chain is forged", run: frame_chain::forged },
    Case { id: "A22", title: "(caller) impossible layouts are registered", run: bad_layouts::impossible },
    Case { id: "A25", title: "a migration is used as a signing oracle", run: signing_oracle::chosen_values },
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
    Case { id: "A38", title: "a plain store to the stack's shadow stack", run: shadow_store::plain_store },
    Case {
        id: "A42",
        title: "single-stepped through every instruction of the stubs, a signal handler walks the stack at each",
        run: stepped::all,
    },
    Case {
        id: "A47",
        title: "overflow on first touch, in the middle of a switch, by a frame larger than a page",
        run: overflow::all,
    },
    Case {
        id: "A49",
        title: "plan entries and segment records are rewritten during a migration",
        run: plan_rewritten::all,
    },
    Case { id: "A50", title: "SIGPROF while small stacks grow; a handler without SA_ONSTACK", run: signals::all },
];
