//! Futures that have stacks: polled by hand and by tokio.
#![cfg(any(all(target_arch = "x86_64", target_os = "linux"), target_arch = "aarch64"))]

use cfi_stack::Error;
use cfi_stack::coroutine::stack::DefaultStack;
use cfi_stack::coroutine::{Coroutine, CoroutineResult, Yielder};
use cfi_stack::future::{StackFuture, block_on, spawn_on_stack, try_spawn_on_stack};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// Pending so many times, waking at once.
struct Pauses(u32);
impl Future for Pauses {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.0 == 0 {
            return Poll::Ready(());
        }
        self.0 -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

struct Wakes(AtomicUsize);
impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Polls to the end. Returns how often it was woken, too.
fn run<F: Future>(future: F) -> (F::Output, usize) {
    let wakes = Arc::new(Wakes(AtomicUsize::new(0)));
    let waker = Waker::from(wakes.clone());
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return (value, wakes.0.load(Ordering::Relaxed));
        }
    }
}

struct Counts(Rc<Cell<u32>>);
impl Drop for Counts {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn waiting_suspends_the_stack_and_wakes_by_the_outer_waker() {
    fn deep(levels: u32) -> u32 {
        let local = std::hint::black_box([levels; 16]);
        match levels {
            0 => block_on(async {
                Pauses(3).await;
                7
            })
            .unwrap(),
            _ => deep(levels - 1) + local[3] - levels + 1,
        }
    }
    assert_eq!(run(spawn_on_stack(|| deep(20))), (27, 3));
}

#[test]
fn a_thread_of_its_own_has_no_stack_to_suspend() {
    assert_eq!(block_on(Pauses(0)), Err(Error::NoStack));
    let mut coroutine = Coroutine::new(|_: &Yielder<(), ()>, ()| block_on(Pauses(1)));
    assert_eq!(coroutine.resume(()), CoroutineResult::Return(Err(Error::NoStack)));
}

#[test]
fn a_poll_half_way_is_not_suspended() {
    let inner = spawn_on_stack(|| block_on(async { block_on(Pauses(1)) }));
    assert_eq!(run(inner).0, Ok(Err(Error::NoStack)));
}

#[test]
fn they_nest() {
    let outer = spawn_on_stack(|| {
        block_on(Pauses(2)).unwrap();
        let middle = spawn_on_stack(|| {
            block_on(Pauses(1)).unwrap();
            block_on(spawn_on_stack(|| block_on(Pauses(3)).map(|()| 5))).unwrap().unwrap()
        });
        let value = block_on(middle).unwrap();
        block_on(Pauses(1)).unwrap();
        value + 1
    });
    assert_eq!(run(outer), (6, 7));
}

#[test]
fn a_coroutine_inside_cannot_wait_since_it_could_outlive_the_poll() {
    let future = spawn_on_stack(|| {
        let mut numbers = Coroutine::new(|yielder: &Yielder<(), u32>, ()| {
            for number in 0..4 {
                assert!(matches!(block_on(Pauses(number)), Err(Error::NoStack)));
                yielder.suspend(number);
            }
        });
        let mut sum = 0;
        while let CoroutineResult::Yield(number) = numbers.resume(()) {
            block_on(Pauses(1)).unwrap();
            sum += number;
        }
        sum
    });
    assert_eq!(run(future), (6, 4));
}

#[test]
fn a_panic_comes_out_of_poll() {
    let mut future = Box::pin(spawn_on_stack(|| {
        block_on(Pauses(1)).unwrap();
        std::panic::panic_any(9_u8);
    }));
    let mut context = Context::from_waker(Waker::noop());
    assert!(future.as_mut().poll(&mut context).is_pending());
    let payload = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut context))).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&9_u8));
    // The inner future's, too.
    let thrown = spawn_on_stack(|| {
        catch_unwind(|| block_on(async { std::panic::panic_any(3_u8) })).unwrap_err().downcast_ref::<u8>().copied()
    });
    assert_eq!(run(thrown).0, Some(3));
    assert_eq!(block_on(Pauses(0)), Err(Error::NoStack), "no poll is left behind");
}

#[test]
fn dropping_it_while_it_waits_unwinds_the_stack_and_drops_what_it_waits_for() {
    let dropped = Rc::new(Cell::new(0));
    let (local, waited_for) = (Counts(dropped.clone()), Counts(dropped.clone()));
    let mut future = Box::pin(spawn_on_stack(move || {
        let _local = local;
        block_on(async move {
            let _waited_for = waited_for;
            std::future::pending::<()>().await;
        })
        .unwrap();
    }));
    assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    assert_eq!(dropped.get(), 0);
    drop(future);
    assert_eq!(dropped.get(), 2);
}

#[test]
fn waiting_while_the_stack_is_unwound_goes_on_unwinding() {
    struct Waits(Rc<Cell<u32>>);
    impl Drop for Waits {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
            let waited = catch_unwind(|| block_on(Pauses(0)));
            assert!(matches!(waited, Ok(Err(Error::NoStack))), "{waited:?}");
        }
    }
    let dropped = Rc::new(Cell::new(0));
    let waits = Waits(dropped.clone());
    let mut future = Box::pin(spawn_on_stack(move || {
        let _waits = waits;
        block_on(std::future::pending::<()>()).unwrap();
    }));
    assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(future);
    assert_eq!(dropped.get(), 1);
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[test]
fn many_take_turns_on_a_queue_and_leak_nothing() {
    let order = Rc::new(RefCell::new(Vec::new()));
    let mut queue = VecDeque::<Task>::new();
    for task in 0..50 {
        let order = order.clone();
        queue.push_back(Box::pin(spawn_on_stack(move || {
            for turn in 0..3 {
                order.borrow_mut().push((turn, task));
                block_on(Pauses(1)).unwrap();
            }
        })));
    }
    while let Some(mut task) = queue.pop_front() {
        if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            queue.push_back(task);
        }
    }
    let wanted: Vec<_> = (0..3).flat_map(|turn| (0..50).map(move |task| (turn, task))).collect();
    assert_eq!(*order.borrow(), wanted);
}

#[test]
fn a_stack_serves_one_future_after_the_other() {
    let mut stack = DefaultStack::new(16 << 10).unwrap();
    for round in 0..100 {
        let mut future = StackFuture::with_stack(stack, move || {
            block_on(Pauses(2)).unwrap();
            round
        });
        assert_eq!(run(&mut future).0, round);
        stack = future.into_stack();
    }
    let refused = StackFuture::try_with_stack(stack, || std::hint::black_box([0_u8; 1 << 20]));
    assert!(matches!(refused, Err(Error::Size { .. })));
    assert!(try_spawn_on_stack(|| ()).is_ok());
}

mod with_tokio {
    use super::*;
    use std::time::Duration;
    use tokio::sync::{mpsc, oneshot};
    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::{sleep, timeout};

    fn local(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn timers_wake_stacks() {
        local(async {
            let slow = spawn_local(spawn_on_stack(|| block_on(sleep(Duration::from_millis(20))).map(|()| 1)));
            let fast = spawn_local(spawn_on_stack(|| block_on(sleep(Duration::from_millis(1))).map(|()| 2)));
            assert_eq!((slow.await.unwrap(), fast.await.unwrap()), (Ok(1), Ok(2)));
        });
    }

    #[test]
    fn stacks_talk_by_channels() {
        local(async {
            let (to, mut from) = mpsc::channel::<u32>(1);
            let (answer, result) = oneshot::channel();
            spawn_local(spawn_on_stack(move || {
                for number in 0..100 {
                    block_on(to.send(number)).unwrap().unwrap();
                }
            }));
            spawn_local(spawn_on_stack(move || {
                let mut sum = 0;
                while let Some(number) = block_on(from.recv()).unwrap() {
                    sum += number;
                }
                answer.send(sum).unwrap();
            }));
            assert_eq!(result.await, Ok(4950));
        });
    }

    #[test]
    fn a_task_that_is_aborted_or_timed_out_is_unwound() {
        local(async {
            let dropped = Rc::new(Cell::new(0));
            let local = Counts(dropped.clone());
            let waits = spawn_on_stack(move || {
                let _local = local;
                block_on(std::future::pending::<()>())
            });
            assert!(timeout(Duration::from_millis(1), waits).await.is_err());
            assert_eq!(dropped.get(), 1);
            let local = Counts(dropped.clone());
            let task = spawn_local(spawn_on_stack(move || {
                let _local = local;
                block_on(std::future::pending::<()>()).unwrap();
            }));
            tokio::task::yield_now().await;
            task.abort();
            assert!(task.await.unwrap_err().is_cancelled());
            assert_eq!(dropped.get(), 2);
        });
    }

    #[test]
    fn a_panic_is_the_tasks() {
        local(async {
            let task = spawn_local(spawn_on_stack(|| {
                block_on(sleep(Duration::from_millis(1))).unwrap();
                std::panic::panic_any(4_u8);
            }));
            assert_eq!(task.await.unwrap_err().into_panic().downcast_ref(), Some(&4_u8));
        });
    }
}
