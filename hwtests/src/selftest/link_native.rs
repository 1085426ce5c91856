//! Native code that asks for room.

use crate::child::{Verdict, run};
use crate::class::Class;
use crate::cpu;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::{Error, ensure};
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// S37.
pub fn ensured(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.attack("recursion through further stacks, and panics", &run(on_this_thread), &[Code::C]);
    let end = run(|| std::thread::spawn(on_this_thread).join().map_err(|_| "the thread panicked".to_string())?);
    tally.attack("the same on a thread of its own", &end, &[Code::C]);
    let end = run(|| match ensure(usize::MAX / 2, || ()) {
        Err(Error::Memory { .. } | Error::Size { .. }) => Ok(Code::E),
        other => Err(format!("{other:?}")),
    });
    tally.attack("more than there can be", &end, &[Code::E]);
    tally.report()
}

fn down(depth: usize) -> usize {
    let filler = black_box([depth; 32]);
    match depth {
        0 => filler[31],
        _ => ensure(96 << 10, || down(depth - 1)).expect("memory for a stack") + filler[1] - depth + 1,
    }
}

fn on_this_thread() -> Verdict {
    for round in 0..3 {
        let before = cpu::shadow_pointer();
        // More than any thread's stack has: what is called lies on a further one.
        let depth = ensure(16 << 20, || down(3000)).map_err(|error| error.to_string())?;
        if depth != 3000 {
            return Err(format!("round {round}: {depth}"));
        }
        let thrown = catch_unwind(AssertUnwindSafe(|| {
            ensure(16 << 20, || ensure(40 << 20, || std::panic::panic_any(round)).map(|()| 0))
        }));
        match thrown {
            Err(payload) if payload.downcast_ref() == Some(&round) => {}
            Ok(result) => return Err(format!("round {round}: {result:?} instead of a panic")),
            Err(_) => return Err(format!("round {round}: another panic")),
        }
        if cpu::shadow_pointer() != before {
            return Err("the shadow-stack pointer is another".into());
        }
    }
    Ok(Code::C)
}
