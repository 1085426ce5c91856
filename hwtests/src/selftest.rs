//! The self-test: what must work on every CPU class, whether it enforces anything or not.

mod backtraces;
mod continuations;
mod coroutines;
mod faults;
mod growth;
mod inspected;
pub(crate) mod layouts;
mod leaks;
pub(crate) mod lift;
pub(crate) mod link;
mod link_native;
mod link_shadows;
pub(crate) mod measured;
mod nested;
mod parked;
mod resized;
mod several;
mod slabs;
pub(crate) mod spans;
mod suspended;
mod switching;
mod unwinding;

use crate::cases::Case;

/// The self-tests.
pub const SELFTESTS: &[Case] = &[
    Case { id: "S01", title: "grow keeps every register", run: growth::registers },
    Case { id: "S02", title: "recursion that moves its frames at every call, each key", run: growth::at_every_call },
    Case { id: "S03", title: "leave from grown stacks gives the shadow stack back", run: growth::leave },
    Case { id: "S04", title: "an overflow is a typed error, the stack is usable afterwards", run: growth::overflow },
    Case {
        id: "S05",
        title: "a fault in managed code leaves through the signal handler",
        run: faults::leave_by_signal,
    },
    Case {
        id: "S06",
        title: "_Unwind_Backtrace passes managed frames to main, before and after growth",
        run: unwinding::by_tables,
    },
    Case { id: "S07", title: "a frame-pointer walk does so too", run: unwinding::by_frame_pointers },
    Case { id: "S08", title: "a panic in a native callee is caught there", run: unwinding::panic_in_native },
    Case { id: "S09", title: "10,000 rounds leak nothing", run: leaks::rounds },
    Case { id: "S10", title: "two threads enter at once", run: several::threads },
    Case { id: "S11", title: "two stacks take turns", run: several::alternating },
    Case { id: "S12", title: "a native callee enters a second stack", run: several::nested },
    Case { id: "S13", title: "impossible policies and busy stacks are typed errors", run: several::mistakes },
    Case { id: "S14", title: "the switch verbs between pooled stacks", run: switching::verbs },
    Case {
        id: "S15",
        title: "backtraces from pooled stacks to main, by tables and by frame records",
        run: backtraces::all,
    },
    Case { id: "S18", title: "stacks of a slab have guards, idle tokens and one mapping", run: slabs::neighbours },
    Case { id: "S20", title: "random programs over continuations against a model", run: continuations::random },
    Case { id: "S21", title: "100,000 rounds with continuations leak nothing", run: continuations::rounds },
    Case { id: "S22", title: "each continuation keeps its rounding mode", run: continuations::rounding },
    Case { id: "S23", title: "coroutines", run: coroutines::face },
    Case {
        id: "S24",
        title: "managed code in coroutines, suspended by its native callees",
        run: coroutines::around_managed_code,
    },
    Case { id: "S25", title: "futures that have stacks, around managed code too", run: coroutines::futures },
    Case { id: "S26", title: "frames of every kind move and come back", run: layouts::kinds_of_frames },
    Case { id: "S27", title: "frames that cannot move say why", run: layouts::refusals },
    Case { id: "S28", title: "layouts that lie move nothing", run: layouts::lies },
    Case { id: "S29", title: "a flipped signed frame pointer", run: layouts::signed_frame_pointers },
    Case { id: "S30", title: "entries within each other, growth at each level", run: nested::levels },
    Case { id: "S31", title: "nested entries: the ways out, and mistakes", run: nested::mistakes },
    Case { id: "S32", title: "suspended stacks move, change threads, are dropped", run: suspended::all },
    Case { id: "S33", title: "sizes up front, shrinking, compaction", run: resized::all },
    Case { id: "S34", title: "random programs over one stack against a model with an endless one", run: spans::random },
    Case { id: "S35", title: "link calls carry arguments and results of every size", run: link::arguments },
    Case { id: "S36", title: "link calls within each other, growth, ways out, oscillation", run: link::nests },
    Case { id: "S37", title: "native code gets the room that it asks for", run: link_native::ensured },
    Case { id: "S38", title: "the youngest frames are lifted, each key, and return", run: lift::frames },
    Case { id: "S39", title: "calls that go to and fro over an edge lift once", run: lift::oscillation },
    Case { id: "S40", title: "pictures of stacks say what is known of them", run: inspected::honest },
    Case { id: "S41", title: "pictures of rewritten stacks end and say so", run: inspected::garbage },
    Case { id: "S42", title: "native code called on the managed segment is measured to the word", run: measured::hogs },
    Case { id: "S43", title: "measured calls nest, exit, leave, and cannot be moved", run: measured::around },
    Case { id: "S44", title: "parked under a shared key, stacks go on in another key domain", run: parked::all },
    Case { id: "S46", title: "link calls over several shadow segments, and every way back", run: link_shadows::all },
    Case {
        id: "S47",
        title: "random programs with link calls where shadow stacks are short",
        run: spans::random_links,
    },
];
