//! Continuations that run a closure.

use cfi_stack::Error;
use cfi_stack::continuation::{self, Cont, Handler, On, Outcome, Shape, Woken};
use cfi_stack::thread::Thread;

/// What a closure ends with: its results, or an exception's word.
pub type Ended = Result<Vec<u64>, usize>;
type Body = Box<dyn FnOnce(&[u64]) -> Ended>;

unsafe extern "C-unwind" fn run(data: usize, values: *mut u64, count: usize) -> usize {
    // SAFETY: `with` made it of a box, and a continuation runs once.
    let body = unsafe { Box::from_raw(std::ptr::with_exposed_provenance_mut::<Body>(data)) };
    let args = match count {
        0 => Vec::new(),
        // SAFETY: so many arguments stand there.
        _ => unsafe { std::slice::from_raw_parts(values, count) }.to_vec(),
    };
    match body(&args) {
        Ok(results) => {
            // SAFETY: the closure gives as many results as were declared.
            unsafe { std::ptr::copy_nonoverlapping(results.as_ptr(), values, results.len()) };
            0
        }
        Err(word) => word,
    }
}

/// A continuation of a shape that runs a closure.
#[track_caller]
pub fn with(shape: Shape, body: impl FnOnce(&[u64]) -> Ended + 'static) -> Cont {
    let thread = Thread::attach().unwrap();
    let body: *mut Body = Box::into_raw(Box::new(Box::new(body)));
    // SAFETY: `run` takes the box; the tests' closures give as many results as they declare, and migrate only where they may.
    unsafe { continuation::new(&thread, run, body.expose_provenance(), shape) }.unwrap()
}

/// With so many parameters and results.
#[track_caller]
pub fn cont(params: usize, results: usize, body: impl FnOnce(&[u64]) -> Vec<u64> + 'static) -> Cont {
    with(shape(params, results), move |args| Ok(body(args)))
}

pub fn shape(params: usize, results: usize) -> Shape {
    Shape { size: 128 << 10, params, results, may_migrate: false }
}

pub fn on(tag: u64) -> Handler {
    Handler { tag, on: On::Suspend }
}

pub fn on_switch(tag: u64) -> Handler {
    Handler { tag, on: On::Switch }
}

/// How a continuation came back, with its values.
#[derive(Debug, PartialEq)]
pub enum Back {
    Returned(Vec<u64>),
    Suspended(u64, Vec<u64>, Cont),
    Thrown(usize),
}

impl Back {
    pub fn suspended(self) -> (u64, Vec<u64>, Cont) {
        match self {
            Back::Suspended(tag, values, cont) => (tag, values, cont),
            other => panic!("{other:?}"),
        }
    }
}

fn back(outcome: Outcome, mut values: Vec<u64>) -> Back {
    match outcome {
        Outcome::Returned { count } => {
            values.truncate(count);
            Back::Returned(values)
        }
        Outcome::Suspended { tag, count, cont } => {
            values.truncate(count);
            Back::Suspended(tag, values, cont)
        }
        Outcome::Thrown { word } => Back::Thrown(word),
    }
}

pub fn resume(cont: Cont, handlers: &[Handler], args: &[u64]) -> Result<Back, Error> {
    let mut values = vec![0; 16];
    let outcome = continuation::resume(cont, handlers, args, &mut values)?;
    Ok(back(outcome, values))
}

pub fn throw(
    cont: Cont,
    handlers: &[Handler],
    f: unsafe extern "C-unwind" fn(usize) -> usize,
    arg: usize,
) -> Result<Back, Error> {
    let mut values = vec![0; 16];
    // SAFETY: the tests' functions are valid for their arguments, and the closures let panics through.
    let outcome = unsafe { continuation::throw(cont, handlers, f, arg, &mut values) }?;
    Ok(back(outcome, values))
}

fn woken(woken: Woken, mut values: Vec<u64>) -> Vec<u64> {
    match woken {
        Woken::Resumed { count } => {
            values.truncate(count);
            values
        }
        Woken::Thrown { word } => vec![u64::MAX, word as u64],
    }
}

pub fn suspend(tag: u64, payload: &[u64]) -> Result<Vec<u64>, Error> {
    let mut values = vec![0; 16];
    Ok(woken(continuation::suspend(tag, payload, &mut values)?, values))
}

pub fn switch(to: Cont, tag: u64, args: &[u64]) -> Result<Vec<u64>, Error> {
    let mut values = vec![0; 16];
    Ok(woken(continuation::switch(to, tag, args, &mut values)?, values))
}
