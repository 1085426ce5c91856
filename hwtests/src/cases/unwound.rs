//! A46: control leaves a native callee of managed code in a way that no stub has.
//!
//! Callees of `exit` must not unwind. What that comes to is the same everywhere: the process ends, before a frame of managed code is
//! unwound. A longjmp asks nobody: where the C library gives the shadow stack back the stack that was jumped out of stays in use, and is
//! refused from then on.

use crate::attack::{Scene, policy};
use crate::child::{End, How, Verdict, page, run};
use crate::class::{Class, Column};
use crate::managed;
use crate::outcome::{Code, Report};
use crate::stepper::function_at;
use crate::tally::Tally;
use cfi_stack::{Error, Exit, thread};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

/// Managed frames under the callee.
const DEPTH: usize = 5;
/// Where the child counts the frames that a forced unwind has passed, of the callee and the stubs, and of managed code.
const NATIVE: usize = 0;
const MANAGED: usize = 1;

type Callee = extern "C-unwind" fn(usize, usize, usize) -> u64;

unsafe extern "C" {
    fn _Unwind_GetIP(context: *mut c_void) -> usize;
    fn attacked_guard(buffer: *mut c_void, f: unsafe extern "C-unwind" fn(usize), context: usize) -> u64;
}

unsafe extern "C-unwind" {
    fn _longjmp(buffer: *mut c_void, value: i32) -> !;
    fn _Unwind_ForcedUnwind(exception: *mut c_void, stop: Stop, argument: *mut c_void) -> i32;
    fn pthread_testcancel();
    fn pthread_cancel(thread: libc::pthread_t) -> i32;
}

type Stop = extern "C" fn(i32, i32, u64, *mut c_void, *mut c_void, *mut c_void) -> i32;

/// A46.
pub fn all(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("a panic that the callee catches", &run(|| enter(catches)));
    ends_at_the_stub(&mut tally, "a panic", &run(|| enter(panics)));
    let end = run(|| enter(is_forced));
    ends_at_the_stub(&mut tally, "a forced unwind", &end);
    if end.notes[NATIVE] != 2 {
        // The callee's own frame and that of exit.
        tally.fail(format!("a forced unwind passed {} native frames", end.notes[NATIVE]));
    }
    let end = run(|| enter(panics_in_nounwind));
    // Rust's own line is the last but for its stack backtrace.
    if end.how == How::Caught && end.signal == libc::SIGABRT && end.stderr.contains("cannot unwind") {
        tally.seen("a panic in an `extern \"C\"` function: Rust's own end, SIGABRT", Code::X, &end);
    } else {
        tally.fail(format!("a panic in an `extern \"C\"` function: {end}"));
    }
    let end = run(cancelled);
    ends_at_the_stub(&mut tally, "pthread_cancel", &end);
    let end = run(jumped);
    let code = if class.column() == Column::Cet { Code::S } else { Code::E };
    tally.attack("longjmp", &end, &[code]);
    tally.report()
}

fn ends_at_the_stub(tally: &mut Tally<'_>, what: &str, end: &End) {
    let line = "cfi-stack: unwinding has come to a stub";
    let told = end.stderr.lines().filter(|text| text.starts_with(line)).count();
    if end.how == How::Caught && end.signal == libc::SIGABRT && told == 1 && end.notes[MANAGED] == 0 {
        tally.seen(&format!("{what}: one line, SIGABRT"), Code::X, end);
    } else {
        tally.fail(format!("{what}: {end}"));
    }
}

fn enter(callee: Callee) -> Verdict {
    let mut scene = Scene::new(policy())?;
    match scene.enter(managed::recurse_a(), DEPTH, callee as usize, 0) {
        Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(DEPTH as u64) => {
            scene.recurse_right(managed::recurse_a(), crate::attack::DEPTH).map(|()| Code::C)
        }
        other => Err(format!("{other:x?}")),
    }
}

extern "C-unwind" fn catches(_: usize, _: usize, _: usize) -> u64 {
    std::panic::set_hook(Box::new(|_| {}));
    u64::from(std::panic::catch_unwind(|| panic!("caught")).is_ok())
}

extern "C-unwind" fn panics(_: usize, _: usize, _: usize) -> u64 {
    std::panic::set_hook(Box::new(|_| {}));
    panic!("through a stub")
}

extern "C" fn nounwind() {
    panic!("not through a stub")
}

extern "C-unwind" fn panics_in_nounwind(_: usize, _: usize, _: usize) -> u64 {
    nounwind();
    0
}

/// Counts the frames that are passed.
extern "C" fn passes(_: i32, actions: i32, _: u64, _: *mut c_void, context: *mut c_void, _: *mut c_void) -> i32 {
    /// _UA_END_OF_STACK
    const END: i32 = 16;
    // SAFETY: the unwinder's context.
    let start = function_at(unsafe { _Unwind_GetIP(context) }.wrapping_sub(1));
    let is_managed = start == managed::recurse_a().start.address();
    page().notes[if is_managed { MANAGED } else { NATIVE }].fetch_add(1, Relaxed);
    // Only where nobody has stopped it: that is no end of this case.
    if actions & END == 0 { 0 } else { END }
}

extern "C-unwind" fn is_forced(_: usize, _: usize, _: usize) -> u64 {
    let mut exception = [0_u64; 8];
    // SAFETY: an exception object of zeroes, whose class nobody knows; the callback only counts.
    unsafe { _Unwind_ForcedUnwind(exception.as_mut_ptr().cast(), passes, std::ptr::null_mut()) as u64 }
}

extern "C-unwind" fn is_cancelled(_: usize, _: usize, _: usize) -> u64 {
    // SAFETY: cancels this thread, here.
    unsafe {
        pthread_cancel(libc::pthread_self());
        pthread_testcancel();
    }
    0
}

extern "C" fn on_a_thread(_: *mut c_void) -> *mut c_void {
    let ended = enter(is_cancelled);
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("the thread went on: {ended:?}\n").as_bytes());
    std::ptr::null_mut()
}

/// A thread of the C library's is cancelled in a native callee.
fn cancelled() -> Verdict {
    let mut thread = 0;
    // SAFETY: a new thread, waited for; its function takes nothing.
    unsafe {
        let made = libc::pthread_create(&mut thread, std::ptr::null(), on_a_thread, std::ptr::null_mut());
        assert_eq!(made, 0, "no thread");
        libc::pthread_join(thread, std::ptr::null_mut());
    }
    Err("the thread has ended".into())
}

/// Room for a jmp_buf of any C library here.
static mut BUFFER: [u64; 64] = [0; 64];

extern "C-unwind" fn jumps(_: usize, _: usize, _: usize) -> u64 {
    // SAFETY: `attacked_guard`'s frame is live.
    unsafe { _longjmp((&raw mut BUFFER).cast(), 1) }
}

unsafe extern "C-unwind" fn entered(scene: usize) {
    // SAFETY: `jumped` passes its own live scene.
    let scene = unsafe { &mut *std::ptr::with_exposed_provenance_mut::<Scene>(scene) };
    let _ = scene.enter(managed::recurse_a(), DEPTH, jumps as Callee as usize, 0);
}

fn jumped() -> Verdict {
    let mut scene = std::mem::ManuallyDrop::new(Scene::new(policy())?);
    let place = (&raw mut *scene).expose_provenance();
    // SAFETY: the frames that are jumped over are `enter`'s own, which the case means to break off.
    let jumped = unsafe { attacked_guard((&raw mut BUFFER).cast(), entered, place) };
    if jumped != 1 {
        return Err("nobody jumped".into());
    }
    overwrite();
    match scene.recurse(managed::recurse_a(), DEPTH) {
        Err(Error::Busy) => {}
        other => return Err(format!("the stack that was jumped out of: {other:x?}")),
    }
    if thread::current_activation() != Some(NonNull::from(&*scene.activation)) {
        return Err("nobody knows of the activation that was jumped out of".into());
    }
    // Another stack is not concerned.
    let mut other = cfi_stack::Stack::new(&scene.thread, policy()).map_err(|error| error.to_string())?;
    let activation = cfi_stack::engine::Activation::new();
    let act = (&raw const activation).expose_provenance();
    let arguments = [act, crate::attack::DEPTH, crate::attack::zero_address(), 0];
    // SAFETY: the hand-made functions follow the engine's rules; the thread is ours.
    match unsafe { other.enter(&scene.thread, &activation, managed::recurse_a().start, arguments) } {
        Ok(Exit::Returned(sum)) if sum == managed::recursion_sum(crate::attack::DEPTH as u64) => {}
        other => return Err(format!("another stack: {other:x?}")),
    }
    // With the stack that was jumped out of goes what the thread knows of it.
    drop(std::mem::ManuallyDrop::into_inner(scene));
    match thread::current_activation() {
        None => Ok(Code::E),
        Some(activation) => Err(format!("{activation:?} still runs")),
    }
}

/// Where the frames lay that were jumped over other words lie now.
#[inline(never)]
fn overwrite() {
    std::hint::black_box([0x5a_u8; 64 << 10]);
}
