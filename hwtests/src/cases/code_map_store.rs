//! A21: stores to the code map: the words of the read-only page that holds its root, the table's header, the descriptor of a frame.

use crate::attack::{DEPTH, Scene, policy};
use crate::child::{Verdict, page, run};
use crate::class::Class;
use crate::managed;
use crate::memory::{peek, poke};
use crate::outcome::{Code, Report};
use crate::tally::Tally;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

unsafe extern "C" {
    /// The read-only page: mode, root of the code map, chunk directory.
    static cfi_stack_published: [u64; 4];
}

/// Where the root stands in it.
const ROOT: usize = 8;

/// A word that the attacker would like to change.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// None: a word of its own.
    Elsewhere,
    Mode,
    Root,
    Directory,
    /// The word of the table at so many bytes from its start.
    Table(usize),
    /// The last word of the table's mapping.
    End,
    /// The word so many bytes behind the one that says where `recurse` starts.
    Descriptor(usize),
}

/// A21.
pub fn rewritten(class: &Class) -> Report {
    let mut tally = Tally::new(class);
    tally.control("a store elsewhere", &run(|| store(Target::Elsewhere)));
    let in_table = [0, 8, 16, 24].map(Target::Table);
    let of_frame = [0, 8, 16, 24, 32, 40].map(Target::Descriptor);
    for target in
        [Target::Mode, Target::Root, Target::Directory, Target::End].into_iter().chain(in_table).chain(of_frame)
    {
        tally.attack(&format!("{target:?}"), &run(|| store(target)), &[Code::W]);
    }
    tally.report()
}

fn place(target: Target) -> Result<usize, String> {
    let published = (&raw const cfi_stack_published).expose_provenance();
    // SAFETY: readable, always.
    let root = unsafe { peek(published + ROOT) } as usize;
    let table = mapping_at(root).ok_or("the root leads to no mapping")?;
    match target {
        Target::Elsewhere => Ok(0),
        Target::Mode => Ok(published),
        Target::Root => Ok(published + ROOT),
        Target::Directory => Ok(published + 16),
        Target::Table(offset) => Ok(root + offset),
        Target::End => Ok(table.end - 8),
        Target::Descriptor(offset) => {
            let start = managed::recurse_a().start.address() as u64;
            let found = (root..table.end).step_by(8);
            // SAFETY: within the table's mapping, which is readable.
            let descriptor = found.into_iter().find(|&word| unsafe { peek(word) } == start);
            descriptor.map(|word| word + offset).ok_or("no descriptor says where `recurse` starts".into())
        }
    }
}

/// The mapping that holds an address.
fn mapping_at(address: usize) -> Option<Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().find_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let place = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
        place.contains(&address).then_some(place)
    })
}

fn store(target: Target) -> Verdict {
    let mut scene = Scene::new(policy())?;
    let place = place(target)?;
    if place == 0 {
        let mut word = 7;
        // SAFETY: a live local.
        unsafe { poke((&raw mut word).expose_provenance(), 8) };
        return scene.recurse_right(managed::recurse_a(), DEPTH).map(|()| Code::C);
    }
    page().store.store(place as u64, Relaxed);
    // SAFETY: that is the attack; the word stays the same where the store goes through.
    unsafe { poke(place, peek(place)) };
    Ok(Code::R)
}
