//! A32, A33, A34: callers' mistakes, each a typed error after which everything goes on.

use super::metadata_pooled::{Suspended, attach};
use crate::child::{Verdict, run};
use crate::class::Class;
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Frames, Handler, On, Outcome, Shape};
use cfi_stack::coroutine::stack::{Stack, StackPointer};
use cfi_stack::coroutine::{Coroutine, CoroutineResult, DefaultStack};
use cfi_stack::pool;
use cfi_stack::probe::{Slot, Word, read, write};
use cfi_stack::thread::Thread;
use std::ptr::NonNull;

const SIZE: usize = 16 << 10;
const TAG: u64 = 7;
const SHAPE: Shape = Shape { size: SIZE, params: 1, results: 1, may_migrate: false };
const HANDLERS: [Handler; 1] = [Handler { tag: TAG, on: On::Suspend }];

/// One kind of mistake; what it gives must be `Err`, or the text says what is wrong.
type Mistake = fn(&Thread) -> Result<(), String>;

fn all(class: &Class, mistakes: &[(&str, Mistake)]) -> Report {
    let mut tally = Tally::new(class);
    tally.control("", &run(|| made(|_| Ok(())).map(|_| Code::C)));
    for &(what, mistake) in mistakes {
        tally.attack(what, &run(|| made(mistake)), &[Code::E]);
    }
    tally.report()
}

/// The mistake is made while a pooled stack, a continuation and a coroutine are suspended; all of them go on, and new ones are made.
fn made(mistake: Mistake) -> Verdict {
    let thread = attach()?;
    let text = |error: Error| error.to_string();
    let pooled = Suspended::new(&thread, 3)?;
    // SAFETY: `entry` keeps to its values.
    let cont = suspended(unsafe { continuation::new(&thread, entry, 0, SHAPE) }.map_err(text)?)?;
    let mut coroutine = Coroutine::<u32, u32, u32>::new(|yielder, first| yielder.suspend(first + 1) + 2);
    coroutine_gives(&mut coroutine, 1, CoroutineResult::Yield(2))?;
    mistake(&thread)?;
    coroutine_gives(&mut coroutine, 5, CoroutineResult::Return(7))?;
    finishes(cont)?;
    pooled.finish()?;
    Suspended::new(&thread, 1)?.finish()?;
    // SAFETY: as above.
    finishes(suspended(unsafe { continuation::new(&thread, entry, 0, SHAPE) }.map_err(text)?)?)?;
    Ok(Code::E)
}

fn coroutine_gives(
    coroutine: &mut Coroutine<u32, u32, u32>,
    input: u32,
    wanted: CoroutineResult<u32, u32>,
) -> Result<(), String> {
    let got = coroutine.resume(input);
    if got == wanted { Ok(()) } else { Err(format!("the coroutine gave {got:?}")) }
}

/// Suspends with its argument and returns what it is resumed with. `data` is the address of what is done before, or 0.
unsafe extern "C-unwind" fn entry(data: usize, values: *mut u64, _: usize) -> usize {
    if data != 0 {
        // SAFETY: `within` waits for this.
        let before = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<&mut dyn FnMut()>(data) };
        before();
    }
    // SAFETY: there is one argument, and room for one result.
    let value = unsafe { &mut *values };
    let mut next = [0];
    if continuation::suspend(TAG, &[*value], &mut next).is_ok() {
        *value = next[0];
    }
    0
}

/// The handle of a continuation that was resumed with 3 and has suspended itself.
fn suspended(cont: Cont) -> Result<Cont, String> {
    let mut values = [0];
    match continuation::resume(cont, &HANDLERS, &[3], &mut values) {
        Ok(Outcome::Suspended { tag: TAG, count: 1, cont }) if values == [3] => Ok(cont),
        other => Err(format!("the continuation gave {other:?} {values:?}")),
    }
}

fn finishes(cont: Cont) -> Result<(), String> {
    let mut values = [0];
    match continuation::resume(cont, &HANDLERS, &[9], &mut values) {
        Ok(Outcome::Returned { count: 1 }) if values == [9] => Ok(()),
        other => Err(format!("the continuation gave {other:?} {values:?}")),
    }
}

/// A continuation that has suspended itself.
///
/// # Errors
/// What is wrong.
pub fn suspended_continuation(thread: &Thread, may_migrate: bool) -> Result<Cont, String> {
    // SAFETY: `entry` keeps to its values, and to nothing of the thread's.
    let cont = unsafe { continuation::new(thread, entry, 0, Shape { may_migrate, ..SHAPE }) };
    suspended(cont.map_err(|error| error.to_string())?)
}

/// Resumes it to its end.
///
/// # Errors
/// The library's.
///
/// # Panics
/// When it gave something else.
pub fn continuation_finishes(cont: Cont) -> Result<(), Error> {
    let mut values = [0];
    let outcome = continuation::resume(cont, &HANDLERS, &[9], &mut values)?;
    assert_eq!((outcome, values), (Outcome::Returned { count: 1 }, [9]));
    Ok(())
}

/// Does something on a continuation's stack, which goes on afterwards.
fn within(thread: &Thread, mut what: impl FnMut()) -> Result<(), String> {
    let mut what: &mut dyn FnMut() = &mut what;
    let data = (&raw mut what).expose_provenance();
    // SAFETY: `what` lives until the continuation has ended.
    let cont = unsafe { continuation::new(thread, entry, data, SHAPE) }.map_err(|error| error.to_string())?;
    finishes(suspended(cont)?)
}

/// An `Err` of the right kind, or it is said what it was.
fn refused<T: std::fmt::Debug>(got: Result<T, Error>, right: fn(&Error) -> bool) -> Result<(), String> {
    match &got {
        Err(error) if right(error) => Ok(()),
        _ => Err(format!("{got:?}")),
    }
}

fn no_slot(error: &Error) -> bool {
    matches!(error, Error::Slot(_))
}

fn consumed(error: &Error) -> bool {
    *error == Error::Consumed
}

fn size(error: &Error) -> bool {
    matches!(error, Error::Size { .. })
}

fn values(error: &Error) -> bool {
    matches!(error, Error::Values { .. })
}

/// A slot that was let go of, in a state that a face gives it.
fn in_state(state: u64) -> Result<NonNull<Slot>, String> {
    let slot = pool::lease(SIZE).map_err(|error| error.to_string())?.into_raw();
    let chunk = read(slot, Word::ChunkAndState) & 0xffff_ffff;
    // SAFETY: the slot is ours; the faces write the same.
    unsafe { write(slot, Word::ChunkAndState, chunk | state << 32) };
    Ok(slot)
}

/// # Safety
/// As [`pool::release_raw`].
unsafe fn release(slot: *mut Slot) -> Result<(), Error> {
    // SAFETY: the caller's.
    unsafe { pool::release_raw(slot) }
}

/// A32.
pub fn frees(class: &Class) -> Report {
    all(
        class,
        &[
            ("pool: twice", |_| {
                let slot = in_state(LEASED)?;
                // SAFETY: nobody leases it between.
                unsafe {
                    release(slot.as_ptr()).map_err(|error| error.to_string())?;
                    refused(release(slot.as_ptr()), no_slot)
                }
            }),
            ("pool: of what runs, and of what is suspended", |_| {
                for state in [RUNNING, SUSPENDED] {
                    let slot = in_state(state)?;
                    // SAFETY: it is refused.
                    refused(unsafe { release(slot.as_ptr()) }, no_slot)?;
                }
                Ok(())
            }),
            ("pool: of what is no slot", |_| {
                let local = 0_u64;
                let slot = in_state(LEASED)?.as_ptr();
                let places = [std::ptr::null_mut(), (&raw const local).cast_mut().cast(), slot.wrapping_byte_add(64)];
                for place in places {
                    // SAFETY: it is refused.
                    refused(unsafe { release(place) }, no_slot)?;
                }
                // SAFETY: leased to us.
                unsafe { release(slot) }.map_err(|error| error.to_string())
            }),
            ("continuation: cancelled twice, and resumed then", |thread| {
                for frames in [Frames::Unwind, Frames::Skip] {
                    // SAFETY: nothing points into its frames.
                    unsafe {
                        let cont = continuation::new(thread, entry, 0, SHAPE).map_err(|error| error.to_string())?;
                        let cont = suspended(cont)?;
                        continuation::cancel(cont, frames).map_err(|error| error.to_string())?;
                        refused(continuation::cancel(cont, frames), consumed)?;
                        refused(continuation::resume(cont, &HANDLERS, &[1], &mut [0]), consumed)?;
                    }
                }
                Ok(())
            }),
            ("continuation: of one that runs, and of one that was made up", |thread| {
                // SAFETY: nothing points into its frames.
                let cancel = |cont| refused(unsafe { continuation::cancel(cont, Frames::Skip) }, consumed);
                cancel(Cont::NULL)?;
                cancel(Cont::from_words([0x1234_5678, 2]))?;
                cancel(Cont::from_words([u64::MAX, u64::MAX]))?;
                let mut inside = Ok(());
                let handle = std::cell::Cell::new(Cont::NULL);
                let mut what = || inside = cancel(handle.get());
                let mut what: &mut dyn FnMut() = &mut what;
                let data = (&raw mut what).expose_provenance();
                // SAFETY: `what` lives until the continuation has ended.
                let cont =
                    unsafe { continuation::new(thread, entry, data, SHAPE) }.map_err(|error| error.to_string())?;
                handle.set(cont);
                finishes(suspended(cont)?)?;
                inside
            }),
            ("continuation: of the outer one while both are suspended", |thread| {
                let (mut inside, mut result) = (Err("did not run".to_string()), [0]);
                let outer = std::cell::Cell::new(Cont::NULL);
                let thread: *const Thread = thread;
                let mut what = || {
                    // SAFETY: the thread is attached until this is over; `entry` keeps to its values.
                    let inner = unsafe { continuation::new(&*thread, entry, 0, SHAPE) };
                    // Nobody here handles the tag: it suspends both.
                    inside = match inner.and_then(|inner| continuation::resume(inner, &[], &[3], &mut result)) {
                        Ok(Outcome::Returned { count: 1 }) => Ok(()),
                        other => Err(format!("{other:?}")),
                    };
                };
                let mut what: &mut dyn FnMut() = &mut what;
                let data = (&raw mut what).expose_provenance();
                // SAFETY: `what` lives until the continuation has ended.
                let cont =
                    unsafe { continuation::new(&*thread, entry, data, SHAPE) }.map_err(|error| error.to_string())?;
                outer.set(cont);
                let both = suspended(cont)?;
                // SAFETY: it is refused.
                refused(unsafe { continuation::cancel(outer.get(), Frames::Skip) }, consumed)?;
                let mut values = [0];
                match continuation::resume(both, &HANDLERS, &[4], &mut values) {
                    Ok(Outcome::Suspended { cont, .. }) => finishes(cont)?,
                    other => return Err(format!("{other:?}")),
                }
                inside
            }),
        ],
    )
}

const RUNNING: u64 = 2;
const SUSPENDED: u64 = 3;
const LEASED: u64 = 5;

/// A33.
pub fn sizes(class: &Class) -> Report {
    all(
        class,
        &[
            ("pool: no bytes, and more than there are", |_| {
                for bytes in [0, usize::MAX, usize::MAX - 4095, 1 << 63, (1 << 46) + 1] {
                    refused(pool::lease(bytes), size)?;
                    refused(pool::lease_small(bytes), size)?;
                }
                refused(pool::lease_small(4096), size)
            }),
            ("pool: areas that are empty, wrap around, or are not aligned", |_| {
                for (base, top) in
                    [(0, 0), (4096, 4096), (8192, 4096), (usize::MAX & !15, 16), (4096, 8193), (4096, 8200), (0, 4096)]
                {
                    // SAFETY: it is refused.
                    refused(unsafe { pool::bare(base, top) }, size)?;
                }
                Ok(())
            }),
            ("pool: a quota that has no room", |_| {
                let quota = pool::Quota::new(1, usize::MAX);
                let first = pool::lease_for(&quota, SIZE).map_err(|error| error.to_string())?;
                refused(pool::lease_for(&quota, SIZE), |error| matches!(error, Error::Quota { .. }))?;
                drop(first);
                pool::lease_for(&quota, SIZE).map(drop).map_err(|error| error.to_string())
            }),
            ("coroutine: a stack of all memory", |_| {
                refused(DefaultStack::try_new(usize::MAX), |error| {
                    matches!(error, Error::Size { .. } | Error::Memory { .. })
                })
            }),
            ("continuation: sizes and counts", |thread| {
                let shapes = [
                    Shape { size: 0, ..SHAPE },
                    Shape { size: usize::MAX, ..SHAPE },
                    Shape { params: usize::MAX, ..SHAPE },
                    Shape { params: usize::MAX / 8 + 2, ..SHAPE },
                    Shape { results: 1 << 61, ..SHAPE },
                    Shape { size: 4096, params: 1024, ..SHAPE },
                ];
                for shape in shapes {
                    // SAFETY: it is refused.
                    refused(unsafe { continuation::new(thread, entry, 0, shape) }, size)?;
                }
                Ok(())
            }),
            ("continuation: a huge block of arguments", |thread| {
                let huge = vec![1; 1 << 20];
                // SAFETY: `entry` keeps to its values.
                let cont = unsafe { continuation::new(thread, entry, 0, SHAPE) }.map_err(|error| error.to_string())?;
                refused(continuation::bind(cont, &huge), values)?;
                refused(continuation::resume(cont, &HANDLERS, &huge, &mut [0]), values)?;
                refused(continuation::resume(cont, &HANDLERS, &[1], &mut []), values)?;
                let cont = suspended(cont)?;
                refused(continuation::bind(cont, &huge), values)?;
                finishes(cont)
            }),
        ],
    )
}

/// Memory whose base is not what a stack's must be.
struct Crooked(usize, usize);

// SAFETY: it is not, which is the mistake: nothing may be written before it is found out.
unsafe impl Stack for Crooked {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.1).unwrap_or(StackPointer::MIN)
    }

    fn limit(&self) -> StackPointer {
        StackPointer::new(self.0).unwrap_or(StackPointer::MIN)
    }
}

/// A34.
pub fn edges(class: &Class) -> Report {
    all(
        class,
        &[
            ("pool: a top that is not aligned", |_| {
                let block = vec![0x5a_u8; 64 << 10];
                let base = block.as_ptr().expose_provenance().next_multiple_of(16);
                for top in [base + 8, base + 4096 + 8, base + 4096 + 1, base + 4096 + 15] {
                    // SAFETY: it is refused.
                    refused(unsafe { pool::bare(base, top) }, size)?;
                }
                if block.iter().all(|&byte| byte == 0x5a) { Ok(()) } else { Err("something was written".into()) }
            }),
            ("coroutine: a stack whose base is not aligned", |_| {
                let block = vec![0x5a_u8; 64 << 10];
                let base = block.as_ptr().expose_provenance().next_multiple_of(16);
                for top in [base + (32 << 10) + 8, base + (32 << 10) + 1] {
                    let made = Coroutine::<(), (), (), Crooked>::try_with_stack(Crooked(base, top), |_, ()| ());
                    refused(made.map(|_| ()), size)?;
                }
                if block.iter().all(|&byte| byte == 0x5a) { Ok(()) } else { Err("something was written".into()) }
            }),
            ("continuation: values across the edges of its stack", |thread| {
                let lease = pool::lease(SIZE).map_err(|error| error.to_string())?;
                let (base, top) = (lease.base(), lease.top());
                drop(lease);
                let mut inside = Err("did not run on the stack that was given back last".to_string());
                within(thread, || {
                    let here = (&raw const inside).addr();
                    let mark = 0_u8;
                    if !(base..top).contains(&(&raw const mark).addr()) || here == 0 {
                        return;
                    }
                    inside = [base - 8, top - 8].into_iter().try_for_each(|place| {
                        let place = std::ptr::with_exposed_provenance_mut::<u64>(place);
                        // SAFETY: the library looks at where it lies, not at what lies there.
                        let across = unsafe { std::slice::from_raw_parts_mut(place, 2) };
                        refused(continuation::suspend(TAG, &[], across), size)
                    });
                })?;
                inside
            }),
        ],
    )
}
