//! Coroutines with the names of corosensei: ours and theirs, from the same source.

/// A module of runs over the crate (or module) that the path names.
macro_rules! face {
    ($(#[$doc:meta])* $module:ident: $coroutine:path, $scoped:path, $result:path, $yielder:path, $stack:path) => {
        $(#[$doc])*
        pub mod $module {
            use crate::subjects::Run;
            use std::hint::black_box;
            use $coroutine as Coroutine;
            use $result as CoroutineResult;
            use $scoped as ScopedCoroutine;
            use $stack as DefaultStack;
            use $yielder as Yielder;

            /// Suspended for ever: the process ends with it.
            fn keep(mut resume: impl FnMut(usize) -> usize + 'static) -> Run {
                Box::new(move |rounds| {
                    for round in 0..rounds {
                        black_box(resume(black_box(round as usize)));
                    }
                })
            }

            fn value(result: CoroutineResult<usize, usize>) -> usize {
                match result {
                    CoroutineResult::Yield(value) | CoroutineResult::Return(value) => value,
                }
            }

            /// Resume and suspend in the loop that times them, as the compiler inlines them.
            pub fn inlined() -> Run {
                let mut coroutine = Coroutine::new(|yielder: &Yielder<usize, usize>, mut input: usize| -> usize {
                    loop {
                        input = yielder.suspend(input);
                    }
                });
                keep(move |input| value(coroutine.resume(input)))
            }

            #[inline(never)]
            fn resume(coroutine: &mut Coroutine<usize, usize, usize>, input: usize) -> usize {
                value(coroutine.resume(input))
            }

            #[inline(never)]
            fn suspend(yielder: &Yielder<usize, usize>, value: usize) -> usize {
                yielder.suspend(value)
            }

            /// Both behind a function of their own, as in most programs: each returns once more in each round.
            pub fn called() -> Run {
                let mut coroutine = Coroutine::new(|yielder: &Yielder<usize, usize>, mut input: usize| -> usize {
                    loop {
                        input = suspend(yielder, input);
                    }
                });
                keep(move |input| resume(&mut coroutine, input))
            }

            /// Create, run to the end, take the stack back.
            pub fn reused() -> Run {
                let mut stack = Some(DefaultStack::default());
                keep(move |input| {
                    let taken = stack.take().expect("it comes back each time");
                    let mut coroutine = Coroutine::with_stack(taken, |_: &Yielder<usize, ()>, input: usize| input + 1);
                    let CoroutineResult::Return(result) = coroutine.resume(input) else {
                        unreachable!("it does not suspend");
                    };
                    stack = Some(coroutine.into_stack());
                    result
                })
            }

            /// The same with a stack that is lent.
            pub fn lent() -> Run {
                let mut stack = DefaultStack::default();
                keep(move |input| {
                    let body = |_: &Yielder<usize, ()>, input: usize| input;
                    let coroutine = ScopedCoroutine::<usize, (), usize, _>::with_stack(&mut stack, body);
                    coroutine.scope(|mut coroutine| match coroutine.resume(input) {
                        CoroutineResult::Return(result) => result,
                        CoroutineResult::Yield(()) => unreachable!("it does not suspend"),
                    })
                })
            }

            /// Create on a stack of its own, run to the end, drop.
            pub fn fresh() -> Run {
                keep(move |input| {
                    let mut coroutine = Coroutine::new(|_: &Yielder<usize, ()>, input: usize| input + 1);
                    let CoroutineResult::Return(result) = coroutine.resume(input) else {
                        unreachable!("it does not suspend");
                    };
                    result
                })
            }
        }
    };
}

#[cfg(feature = "peers")]
face! {
    /// corosensei.
    corosensei: corosensei::Coroutine, corosensei::ScopedCoroutine, corosensei::CoroutineResult, corosensei::Yielder, corosensei::stack::DefaultStack
}

face! {
    /// cfi-stack.
    ours: cfi_stack::coroutine::Coroutine, cfi_stack::coroutine::ScopedCoroutine, cfi_stack::coroutine::CoroutineResult,
        cfi_stack::coroutine::Yielder, cfi_stack::coroutine::stack::DefaultStack
}
