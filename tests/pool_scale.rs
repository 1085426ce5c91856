//! Many stacks: what each takes, and how many mappings they need. A program of its own with one test: it measures the whole process.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use cfi_stack::pool::{self, Lease};

/// Bytes of resident memory and of page tables, and mappings.
fn footprint() -> (usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |line| line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10)
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    (field("VmRSS:") + field("VmPTE:"), maps)
}

fn touched(lease: Lease) -> Lease {
    // SAFETY: the word is the lease's.
    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(lease.top() - 8).write_volatile(1) };
    lease
}

/// Leases `count` stacks and says how many bytes each took, and how many mappings they took together.
fn take(count: usize, one: impl Fn() -> Lease) -> (Vec<Lease>, usize, usize) {
    let mut leases = Vec::with_capacity(count);
    // The list itself is not ours.
    leases.extend(std::iter::repeat_with(|| None).take(count));
    let before = footprint();
    leases.iter_mut().for_each(|place| *place = Some(touched(one())));
    let after = footprint();
    (leases.into_iter().flatten().collect(), (after.0 - before.0) / count, after.1.saturating_sub(before.1))
}

#[test]
fn a_hundred_thousand_stacks_are_light_and_need_few_mappings() {
    let emulated = std::env::var_os("QUICKCHECK_TESTS").is_some();
    drop(pool::lease(1).unwrap());
    // Guards that are mappings of their own run into `vm.max_map_count`.
    let cheap = pool::stats().cheap_guards;
    let count = if emulated || !cheap { 5_000 } else { 100_000 };
    let page = pool::lease(1).unwrap().size();
    let shadow = pool::lease(1).unwrap().has_shadow();

    let (guarded, bytes, mappings) = take(count, || pool::lease(1).unwrap());
    println!("{count} guarded stacks of {page} bytes: {bytes} bytes each, {mappings} mappings");
    if cheap {
        assert!(bytes <= if shadow { 2 * page + 400 } else { page + 400 }, "{bytes} bytes each");
        assert!(mappings <= 20 + count / 4_000, "{mappings} mappings");
    }
    drop(guarded);
    pool::trim();

    let (small, bytes, mappings) = take(count, || pool::lease_small(1024).unwrap());
    println!("{count} small stacks of 1024 bytes: {bytes} bytes each, {mappings} mappings");
    if cheap {
        assert!(bytes <= if shadow { page + 1347 + 64 } else { 1347 }, "{bytes} bytes each");
        assert!(mappings <= 20 + count / 4_000, "{mappings} mappings");
    }
    drop(small);

    // Again: out of the reserve, and nothing more is mapped.
    let before = footprint().1;
    let again: Vec<_> = (0..count).map(|_| touched(pool::lease(1).unwrap())).collect();
    assert!(footprint().1 <= before + 2);
    drop(again);
}
