//! Smoke test, to be replaced by the battery.
#![allow(missing_docs)]
use cfi_stack::engine::Activation;
use cfi_stack::thread::Thread;
use cfi_stack::{Policy, Stack};
use cfi_start as _;
mod managed;
extern "C" fn zero(_: usize, _: usize, _: usize) -> u64 { 0 }
fn main() {
    print!("{}", cfi_stack::features::detect());
    let _map = managed::register();
    let thread = Thread::attach().unwrap();
    let act = Activation::new();
    for always in [false, true] {
        let mut stack = Stack::new(&thread, Policy { relocate_always: always, ..Policy::default() }).unwrap();
        for f in [managed::recurse_a(), managed::recurse_b()] {
        for n in [0, 5, 100, 1000] {
            let out = unsafe { stack.enter(&thread, &act, f.start, [&raw const act as usize, n, zero as *const () as usize, 0]) };
            println!("{n} {:?} want {} {:?}", out, managed::recursion_sum(n as u64), stack.stats());
        }
        }
        let out = unsafe { stack.enter(&thread, &act, managed::leave().start, [&raw const act as usize, 3000, 77, 0]) };
        println!("{:?} {:?}", out, stack.stats());
        let mut block = [0u64; 192];
        for (i, w) in block.iter_mut().enumerate().take(96) { *w = 0x0101010101010101u64.wrapping_mul(i as u64 + 1); }
        let out = unsafe { stack.enter(&thread, &act, managed::registers().start, [&raw const act as usize, 0, 0, block.as_mut_ptr() as usize]) };
        println!("{:?} {:?}", out, stack.stats());
    }
    let mut stack = Stack::new(&thread, Policy { maximum: 65536, ..Policy::default() }).unwrap();
    let out = unsafe { stack.enter(&thread, &act, managed::recurse_a().start, [&raw const act as usize, 1000000, zero as *const () as usize, 0]) };
    println!("{out:?}");
    let out = unsafe { stack.enter(&thread, &act, managed::recurse_a().start, [&raw const act as usize, 100, zero as *const () as usize, 0]) };
    println!("{out:?}");
}
