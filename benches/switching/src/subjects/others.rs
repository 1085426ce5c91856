//! context-rs, generator-rs and wasmtime's fibers, each by the calls that its documentation shows.

/// context-rs.
pub mod context_rs {
    use crate::subjects::Run;
    use context::stack::ProtectedFixedSizeStack;
    use context::{Context, Transfer};
    use std::hint::black_box;

    extern "C" fn echo(mut transfer: Transfer) -> ! {
        loop {
            // SAFETY: the one that resumed this context waits where it says.
            transfer = unsafe { transfer.context.resume(transfer.data) };
        }
    }

    fn stack() -> ProtectedFixedSizeStack {
        ProtectedFixedSizeStack::default()
    }

    pub fn inlined() -> Run {
        let stack = stack();
        // SAFETY: the stack lives as long as the closure.
        let mut context = Some(unsafe { Context::new(&stack, echo) });
        Box::new(move |rounds| {
            let _stack = &stack;
            for round in 0..rounds {
                if let Some(waiting) = context.take() {
                    // SAFETY: it is the one that the last transfer brought.
                    let transfer = unsafe { waiting.resume(black_box(round as usize)) };
                    context = Some(transfer.context);
                    black_box(transfer.data);
                }
            }
        })
    }

    #[inline(never)]
    fn resume(context: Context, data: usize) -> Transfer {
        // SAFETY: as in `inlined`.
        unsafe { context.resume(data) }
    }

    extern "C" fn echo_called(mut transfer: Transfer) -> ! {
        loop {
            transfer = resume(transfer.context, transfer.data);
        }
    }

    pub fn called() -> Run {
        let stack = stack();
        // SAFETY: the stack lives as long as the closure.
        let mut context = Some(unsafe { Context::new(&stack, echo_called) });
        Box::new(move |rounds| {
            let _stack = &stack;
            for round in 0..rounds {
                if let Some(waiting) = context.take() {
                    let transfer = resume(waiting, black_box(round as usize));
                    context = Some(transfer.context);
                    black_box(transfer.data);
                }
            }
        })
    }

    fn once(stack: &ProtectedFixedSizeStack, data: usize) {
        // SAFETY: nothing else runs on the stack, and what is left suspended there is never resumed.
        black_box(unsafe { Context::new(stack, echo).resume(black_box(data)) }.data);
    }

    pub fn reused() -> Run {
        let stack = stack();
        Box::new(move |rounds| {
            for round in 0..rounds {
                once(&stack, round as usize);
            }
        })
    }

    pub fn fresh() -> Run {
        Box::new(move |rounds| {
            for round in 0..rounds {
                once(&stack(), round as usize);
            }
        })
    }
}

/// generator-rs.
pub mod generator_rs {
    use crate::subjects::Run;
    use generator::{Generator, Gn, Scope};
    use std::hint::black_box;

    pub fn inlined() -> Run {
        fn echo(mut scope: Scope<'_, 'static, usize, usize>) -> usize {
            let mut input = 0;
            loop {
                input = scope.yield_(input).unwrap_or(0);
            }
        }
        let mut generator = Gn::new_scoped(echo);
        // The first value that is sent starts it and is not seen.
        generator.raw_send(None);
        Box::new(move |rounds| {
            for round in 0..rounds {
                black_box(generator.send(black_box(round as usize)));
            }
        })
    }

    #[inline(never)]
    fn send(generator: &mut Generator<'static, usize, usize>, value: usize) -> usize {
        generator.send(value)
    }

    #[inline(never)]
    fn suspend(scope: &mut Scope<'_, 'static, usize, usize>, value: usize) -> usize {
        scope.yield_(value).unwrap_or(0)
    }

    pub fn called() -> Run {
        fn echo(mut scope: Scope<'_, 'static, usize, usize>) -> usize {
            let mut input = 0;
            loop {
                input = suspend(&mut scope, input);
            }
        }
        let mut generator = Gn::new_scoped(echo);
        generator.raw_send(None);
        Box::new(move |rounds| {
            for round in 0..rounds {
                black_box(send(&mut generator, black_box(round as usize)));
            }
        })
    }

    pub fn reused() -> Run {
        let mut generator = Gn::<()>::new_scoped(|_| 0_usize);
        generator.resume();
        Box::new(move |rounds| {
            for round in 0..rounds {
                let value = black_box(round as usize);
                generator.scoped_init(move |_| value + 1);
                black_box(generator.resume());
            }
        })
    }

    pub fn fresh() -> Run {
        Box::new(move |rounds| {
            for round in 0..rounds {
                let value = black_box(round as usize);
                black_box(Gn::<()>::new_scoped(move |_| value + 1).resume());
            }
        })
    }
}

/// wasmtime's fibers.
pub mod wasmtime {
    use crate::subjects::{ROOM, Run};
    use std::hint::black_box;
    use wasmtime_internal_fiber::{Fiber, FiberStack, Suspend};

    type Echo = Fiber<'static, usize, usize, ()>;

    fn stack() -> FiberStack {
        FiberStack::new(ROOM, false).expect("there is memory for a stack")
    }

    fn fiber<'a, R>(
        stack: FiberStack,
        body: impl FnOnce(usize, &mut Suspend<usize, usize, R>) -> R + 'a,
    ) -> Fiber<'a, usize, usize, R> {
        Fiber::new(stack, body).map_err(|(error, _)| error).expect("the stack is large enough")
    }

    pub fn inlined() -> Run {
        let fiber: Echo = fiber(stack(), |mut input, suspend| {
            loop {
                input = suspend.suspend(input);
            }
        });
        Box::new(move |rounds| {
            for round in 0..rounds {
                let _ = black_box(fiber.resume(black_box(round as usize)));
            }
        })
    }

    #[inline(never)]
    fn resume(fiber: &Echo, value: usize) -> Result<(), usize> {
        fiber.resume(value)
    }

    #[inline(never)]
    fn suspend(suspend: &mut Suspend<usize, usize, ()>, value: usize) -> usize {
        suspend.suspend(value)
    }

    pub fn called() -> Run {
        let fiber: Echo = fiber(stack(), |mut input, inside| {
            loop {
                input = suspend(inside, input);
            }
        });
        Box::new(move |rounds| {
            for round in 0..rounds {
                let _ = black_box(resume(&fiber, black_box(round as usize)));
            }
        })
    }

    fn once(stack: FiberStack, value: usize) -> FiberStack {
        let fiber: Fiber<'_, usize, usize, usize> = fiber(stack, |input, _| input + 1);
        let _ = black_box(fiber.resume(black_box(value)));
        fiber.into_stack()
    }

    pub fn reused() -> Run {
        let mut kept = Some(stack());
        Box::new(move |rounds| {
            for round in 0..rounds {
                kept = kept.take().map(|stack| once(stack, round as usize));
            }
        })
    }

    pub fn fresh() -> Run {
        Box::new(move |rounds| {
            for round in 0..rounds {
                drop(once(stack(), round as usize));
            }
        })
    }
}
