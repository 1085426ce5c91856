//! Generators and a little scheduler on coroutines: what a user of the safe face writes.
//!
//! ```text
//! $ cargo run --example generators
//! primes: 2 3 5 7 11 13 17 19 23 29
//! in order: 1 2 3 4 5 6 7 8 9
//! tasks: a0 b0 c0 a1 b1 c1 b2 c2 c3
//! suspended and forgotten: 0
//! ```

use cfi_stack::coroutine::{Coroutine, Yielder};
use std::collections::VecDeque;

/// Prime numbers for ever; who has seen enough drops it, and it is unwound where it waits.
fn primes() -> Coroutine<(), u32, ()> {
    Coroutine::new(|yielder, ()| {
        let mut found: Vec<u32> = Vec::new();
        for number in 2.. {
            if found.iter().all(|prime| number % prime != 0) {
                found.push(number);
                yielder.suspend(number);
            }
        }
    })
}

enum Tree {
    Leaf,
    Node(Box<Tree>, u32, Box<Tree>),
}

impl Tree {
    fn insert(self, value: u32) -> Tree {
        match self {
            Tree::Leaf => Tree::Node(Box::new(Tree::Leaf), value, Box::new(Tree::Leaf)),
            Tree::Node(left, here, right) if value < here => Tree::Node(Box::new(left.insert(value)), here, right),
            Tree::Node(left, here, right) => Tree::Node(left, here, Box::new(right.insert(value))),
        }
    }

    /// Suspends from any depth: no stack of its own making keeps the place.
    fn walk(&self, yielder: &Yielder<(), u32>) {
        if let Tree::Node(left, here, right) = self {
            left.walk(yielder);
            yielder.suspend(*here);
            right.walk(yielder);
        }
    }
}

/// As an iterator.
struct Iter(Coroutine<(), u32, ()>);

impl Iterator for Iter {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0.done() { None } else { self.0.resume(()).as_yield() }
    }
}

fn joined<T: ToString>(all: impl IntoIterator<Item = T>) -> String {
    all.into_iter().map(|one| one.to_string()).collect::<Vec<_>>().join(" ")
}

fn main() {
    println!("primes: {}", joined(Iter(primes()).take(10)));

    let tree = [5, 2, 8, 1, 9, 3, 7, 4, 6].into_iter().fold(Tree::Leaf, Tree::insert);
    println!("in order: {}", joined(Iter(Coroutine::new(move |yielder, ()| tree.walk(yielder)))));

    let task = |name: char, turns: u32| {
        Coroutine::new(move |yielder: &Yielder<(), String>, ()| {
            for turn in 0..turns {
                yielder.suspend(format!("{name}{turn}"));
            }
        })
    };
    let mut ready: VecDeque<Coroutine<(), String, ()>> = [task('a', 2), task('b', 3), task('c', 4)].into();
    let mut log = Vec::new();
    while let Some(mut next) = ready.pop_front() {
        if let Some(said) = next.resume(()).as_yield() {
            log.push(said);
            ready.push_back(next);
        }
    }
    println!("tasks: {}", joined(log));
    println!("suspended and forgotten: {}", cfi_stack::pool::leaks().len());
}
