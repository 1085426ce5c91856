//! The host functions that programs can import: `spectest` of the specification's suite, and the few of
//! `wasi_snapshot_preview1` that a C program needs to print and to end.

use crate::error::Error;
use crate::host::{Caller, Failure, HostFunction};
use crate::types::{FuncType, ValType};
use ValType::{F32, F64, I32, I64};
use std::io::Write;

/// A host function and its type.
pub struct Entry {
    /// The function.
    pub function: HostFunction,
    /// Its type.
    pub ty: FuncType,
}

const SUCCESS: u64 = 0;
const BAD_FILE: u64 = 8;
const FAULT: u64 = 21;
const NOT_SUPPORTED: u64 = 52;

/// The host function of this name.
pub fn find(module: &str, name: &str) -> Option<Entry> {
    let (function, params, results): (HostFunction, &[ValType], &[ValType]) = match (module, name) {
        ("spectest", "print") => (print, &[], &[]),
        ("spectest", "print_i32") => (print, &[I32], &[]),
        ("spectest", "print_i64") => (print, &[I64], &[]),
        ("spectest", "print_f32") => (print, &[F32], &[]),
        ("spectest", "print_f64") => (print, &[F64], &[]),
        ("spectest", "print_i32_f32") => (print, &[I32, F32], &[]),
        ("spectest", "print_f64_f64") => (print, &[F64, F64], &[]),
        ("wasi_snapshot_preview1", name) => match name {
            "fd_write" => (fd_write, &[I32, I32, I32, I32], &[I32]),
            "proc_exit" => (proc_exit, &[I32], &[]),
            "args_sizes_get" | "environ_sizes_get" => (sizes_get, &[I32, I32], &[I32]),
            "args_get" | "environ_get" => (nothing, &[I32, I32], &[I32]),
            "fd_close" => (nothing, &[I32], &[I32]),
            "sched_yield" => (nothing, &[], &[I32]),
            "fd_fdstat_get" => (fd_fdstat_get, &[I32, I32], &[I32]),
            "fd_read" => (refuse, &[I32, I32, I32, I32], &[I32]),
            "fd_seek" => (refuse, &[I32, I64, I32, I32], &[I32]),
            "fd_prestat_get" => (no_file, &[I32, I32], &[I32]),
            "fd_prestat_dir_name" => (no_file, &[I32, I32, I32], &[I32]),
            "clock_time_get" => (clock_time_get, &[I32, I64, I32], &[I32]),
            "random_get" => (random_get, &[I32, I32], &[I32]),
            _ => return None,
        },
        _ => return None,
    };
    Some(Entry { function, ty: FuncType { params: params.to_vec(), results: results.to_vec() } })
}

fn print(_: &Caller<'_>, _: &[u64], _: &mut [u64]) -> Result<(), Failure> {
    Ok(())
}

fn nothing(_: &Caller<'_>, _: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    results[0] = SUCCESS;
    Ok(())
}

fn refuse(_: &Caller<'_>, _: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    results[0] = NOT_SUPPORTED;
    Ok(())
}

fn no_file(_: &Caller<'_>, _: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    results[0] = BAD_FILE;
    Ok(())
}

fn proc_exit(_: &Caller<'_>, args: &[u64], _: &mut [u64]) -> Result<(), Failure> {
    Err(Failure::Exit(args[0] as i32))
}

/// Answers the status that a step through the program's memory came to; `None` is a wrong address.
fn answer(results: &mut [u64], status: Option<u64>) -> Result<(), Failure> {
    results[0] = status.unwrap_or(FAULT);
    Ok(())
}

fn sizes_get(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    let zero = 0u32.to_le_bytes();
    let write = |at| caller.memory?.write(at, &zero);
    answer(results, write(args[0]).and(write(args[1])).map(|()| SUCCESS))
}

fn fd_fdstat_get(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    if args[0] > 2 {
        return answer(results, Some(BAD_FILE));
    }
    // A character device that may be written.
    let mut stat = [0u8; 24];
    stat[0] = 2;
    stat[8] = 1 << 6;
    answer(results, caller.memory.and_then(|memory| memory.write(args[1], &stat)).map(|()| SUCCESS))
}

fn clock_time_get(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    let write = || caller.memory?.write(args[2], &nanoseconds.to_le_bytes());
    answer(results, write().map(|()| SUCCESS))
}

fn random_get(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    // Runs are compared with each other, so what is random elsewhere is always the same here.
    answer(results, caller.memory.and_then(|memory| memory.fill(args[0], 0x2a, args[1])).map(|()| SUCCESS))
}

/// One call writes no more than this, and says so: vectors may overlap, and their sum need not fit in memory.
const MOST_VECTORS: u64 = 1024;
/// See [`MOST_VECTORS`].
const MOST_BYTES: u64 = 16 << 20;

fn fd_write(caller: &Caller<'_>, args: &[u64], results: &mut [u64]) -> Result<(), Failure> {
    let gather = || {
        let memory = caller.memory?;
        let mut bytes = Vec::new();
        for i in 0..args[2].min(MOST_VECTORS) {
            let vector = args[1].checked_add(i.checked_mul(8)?)?;
            let (start, len) = (memory.read_u32(vector)?, memory.read_u32(vector + 4)?);
            let room = MOST_BYTES - bytes.len() as u64;
            bytes.extend(memory.read(start.into(), u64::from(len).min(room))?);
        }
        memory.write(args[3], &u32::try_from(bytes.len()).ok()?.to_le_bytes())?;
        Some(bytes)
    };
    let bytes = match (args[0], gather()) {
        (1 | 2, Some(bytes)) => bytes,
        (1 | 2, None) => return answer(results, None),
        _ => return answer(results, Some(BAD_FILE)),
    };
    let done = match &mut *caller.context.output.borrow_mut() {
        Some(kept) => kept.write_all(&bytes),
        None if args[0] == 1 => std::io::stdout().write_all(&bytes),
        None => std::io::stderr().write_all(&bytes),
    };
    done.map_err(|error| Failure::Because(Error::System(format!("cannot write the program's output: {error}"))))?;
    answer(results, Some(SUCCESS))
}
