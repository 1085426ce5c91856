use super::*;
use crate::slab::{Chunk, class_of_shift, map_single, unmap_single};
use crate::system::injection;
use std::sync::mpsc;

/// Whether the kernel can read a byte there for us: an access of ours would end the test.
fn readable(address: usize) -> bool {
    let mut ends = [0; 2];
    // SAFETY: a pipe of our own; the kernel says EFAULT where the address is not readable.
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        let written = libc::write(ends[1], std::ptr::with_exposed_provenance(address), 1);
        libc::close(ends[0]);
        libc::close(ends[1]);
        written == 1
    }
}

/// How the process ends that does what `attack` says.
fn end_of(attack: impl Fn()) -> i32 {
    /// Seconds after which a child hangs: another thread had a lock when it was made. Then another one is.
    const PATIENCE: u32 = 10;
    loop {
        // SAFETY: the child runs `attack` and leaves, at the latest when its time is up.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::alarm(PATIENCE);
                libc::close(2);
                attack();
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            status
        };
        if !(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGALRM) {
            return status;
        }
    }
}

/// Mappings of this process that share a byte with the range; `None` where nobody says.
fn mappings(from: usize, to: usize) -> Option<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let inside = |line: &&str| {
        let (start, rest) = line.split_once('-').unwrap();
        let bound = |hex| usize::from_str_radix(hex, 16).unwrap();
        bound(start) < to && bound(rest.split_once(' ').unwrap().0) > from
    };
    Some(maps.lines().filter(inside).count())
}

#[test]
fn a_stack_that_is_given_back_comes_again() {
    let first = lease(4096).unwrap();
    let (base, slot) = (first.base(), first.slot());
    assert!(first.size() >= 4096 && first.size().is_power_of_two());
    drop(first);
    let second = lease(100).unwrap();
    assert_eq!((second.base(), second.slot()), (base, slot));
}

#[test]
fn sizes_are_rounded_up_and_guards_lie_below() {
    let page = system::page_size();
    for (asked, expected) in
        [(1, page), (page, page), (page + 1, 2 * page), (1 << 20, 1 << 20), ((1 << 20) + 1, 2 << 20)]
    {
        let leases: Vec<_> = (0..3).map(|_| lease(asked).unwrap()).collect();
        for lease in &leases {
            assert_eq!(lease.size(), expected.max(page));
            assert!(lease.top().is_multiple_of(16));
            assert!(!readable(lease.base() - 1) && !readable(lease.base() - page.min(expected)), "{asked}");
            // SAFETY: both words are the lease's.
            unsafe {
                crate::segment::write_word(lease.top() - 8, 1);
                crate::segment::write_word(lease.base(), 2);
                assert_eq!(crate::segment::read_word(lease.top() - 8), 1);
            }
        }
    }
    for asked in [1, 512, 513, page / 2] {
        let (one, other) = (lease_small(asked).unwrap(), lease_small(asked).unwrap());
        assert!(one.size() >= asked && one.size() <= page / 2);
        assert!(one.top() <= other.base() || other.top() <= one.base());
    }
}

#[test]
fn impossible_sizes_are_typed_errors() {
    for bytes in [0, usize::MAX, usize::MAX / 2 + 1, MAXIMUM + 1] {
        assert!(matches!(lease(bytes), Err(Error::Size { .. })), "{bytes:#x}");
    }
    // No address space has room for so many.
    let most: Vec<_> = (0..5).map(|_| lease(MAXIMUM)).collect();
    assert!(most.iter().any(|lease| matches!(lease, Err(Error::Memory { .. }))));
    for bytes in [0, system::page_size() / 2 + 1, usize::MAX] {
        assert!(matches!(lease_small(bytes), Err(Error::Size { .. })), "{bytes:#x}");
    }
    for (base, top) in [(0, 64), (64, 64), (128, 64), (usize::MAX - 15, 0), (4096, 8192 + 8), (16, usize::MAX - 15)] {
        // SAFETY: refused before any of it is looked at.
        assert!(matches!(unsafe { bare(base, top) }, Err(Error::Size { .. })), "{base:#x} {top:#x}");
    }
}

#[test]
fn a_data_area_of_the_callers_has_a_slot_of_its_own() {
    let mut areas = vec![[0_u128; 256]; 40];
    let bounds: Vec<_> = areas.iter_mut().map(|area| area.as_mut_ptr_range()).collect();
    // SAFETY: the areas live as long as the leases and nobody else uses them.
    let bind =
        |index: usize| unsafe { bare(bounds[index].start.expose_provenance(), bounds[index].end.addr()) }.unwrap();
    for _ in 0..3 {
        let leases: Vec<_> = (0..areas.len()).map(bind).collect();
        for (lease, area) in leases.iter().zip(&bounds) {
            assert_eq!((lease.base(), lease.top()), (area.start.addr(), area.end.addr()));
        }
    }
    let (slot, identity) = {
        let lease = bind(7);
        // SAFETY: leased.
        (lease.slot(), unsafe { lease.slot().as_ref() }.identity)
    };
    let again = bind(7);
    // SAFETY: leased.
    assert_eq!((again.slot(), unsafe { again.slot().as_ref() }.identity), (slot, identity), "it was kept");
}

#[test]
fn generations_go_on_in_a_slot_that_is_bound_again() {
    let shape = Shape::large(8 << 20, false);
    let slot = map_single(&shape, None).unwrap();
    // SAFETY: it is free and ours alone.
    let (chunk, identity) = unsafe {
        (*slot.as_ptr()).own.generation = 77;
        ((*slot.as_ptr()).chunk, (*slot.as_ptr()).identity)
    };
    unmap_single(chunk).unwrap();
    // Other tests take released slots too.
    let mut taken = Vec::new();
    let again = loop {
        let next = map_single(&shape, None).unwrap();
        taken.push(next);
        if next == slot || taken.len() == 100 {
            break next;
        }
    };
    if again == slot {
        // SAFETY: as above.
        unsafe {
            assert_eq!((*slot.as_ptr()).own.generation, 77);
            assert_ne!((*slot.as_ptr()).identity, identity);
        }
    }
    for slot in taken {
        // SAFETY: as above.
        unmap_single(unsafe { (*slot.as_ptr()).chunk }).unwrap();
    }
}

#[test]
fn stacks_go_from_thread_to_thread() {
    let (sender, receiver) = mpsc::channel::<Lease>();
    let receiving =
        std::thread::spawn(move || receiver.iter().map(|lease| lease.slot().addr().get()).collect::<Vec<_>>());
    let mut sent = Vec::new();
    for round in 0..2_000 {
        let lease = lease(if round % 2 == 0 { 8192 } else { 16384 }).unwrap();
        sent.push(lease.slot().addr().get());
        sender.send(lease).unwrap();
    }
    drop(sender);
    assert_eq!(receiving.join().unwrap(), sent);
    // What the ended thread kept can be had here.
    let before = stats();
    let leases: Vec<_> = (0..100).map(|_| lease(8192).unwrap()).collect();
    let of = |stats: &Stats| {
        stats.classes.iter().filter(|class| class.bytes == 8192).map(|class| class.chunks).sum::<usize>()
    };
    assert!(of(&stats()) <= of(&before) + 1);
    drop(leases);
}

#[test]
fn a_stack_that_something_is_on_stays_out_of_the_pools_and_is_listed() {
    let forgotten = lease(32 << 10).unwrap();
    let slot = forgotten.slot();
    // SAFETY: leased; nothing is really on it.
    let fields = unsafe { slot.as_ref() };
    fields.state.store(slot_state::SUSPENDED, Ordering::Relaxed);
    let here = std::panic::Location::caller();
    fields.created.store(std::ptr::from_ref(here).cast_mut(), Ordering::Relaxed);
    let found = || leaks().into_iter().find(|leak| leak.slot == slot);
    let leak = found().unwrap();
    assert!(leak.suspended && !leak.abandoned && leak.created == Some(here) && leak.bytes == 32 << 10);
    assert!(suspended().any(|other| other == slot));
    drop(forgotten);
    assert!(found().unwrap().abandoned);
    assert!((0..100).map(|_| lease(32 << 10).unwrap()).collect::<Vec<_>>().iter().all(|lease| lease.slot() != slot));
    fields.state.store(slot_state::DONE, Ordering::Relaxed);
    // SAFETY: the lease is gone, and nobody leased the stack again.
    unsafe { release_raw(slot.as_ptr()) }.unwrap();
    assert!(found().is_none());
}

#[test]
fn raw_slots_are_given_back_once() {
    let slot = lease(64 << 10).unwrap().into_raw();
    // SAFETY: leased.
    let state = unsafe { &slot.as_ref().state };
    // SAFETY: the slot is ours until it is given back, and refused afterwards: no other test uses this class.
    unsafe {
        for busy in [slot_state::RUNNING, slot_state::SUSPENDED] {
            state.store(busy, Ordering::Relaxed);
            assert!(matches!(release_raw(slot.as_ptr()), Err(Error::Slot(_))));
        }
        state.store(slot_state::READY, Ordering::Relaxed);
        assert_eq!(release_raw(slot.as_ptr()), Ok(()));
        assert_eq!(release_raw(slot.as_ptr()), Err(Error::Slot("it is free already")));
        for address in [0, 8, 64, slot.addr().get() + 1, slot.addr().get() + 64, usize::MAX] {
            let address = std::ptr::with_exposed_provenance_mut(address);
            assert_eq!(release_raw(address), Err(Error::Slot("it is no slot of a pool")));
        }
    }
}

#[test]
fn a_quota_goes_down_with_its_leases() {
    let quota = Quota::new(2, usize::MAX);
    let (one, other) = (lease_for(&quota, 4096).unwrap(), lease_small_for(&quota, 512).unwrap());
    assert_eq!(lease_for(&quota, 4 << 20).unwrap_err(), Error::Quota { what: "stacks", needed: 1, left: 0 });
    let raw = one.into_raw();
    std::thread::spawn(move || drop(other)).join().unwrap();
    assert_eq!(quota.stacks(), 1);
    // SAFETY: ours.
    unsafe { release_raw(raw.as_ptr()) }.unwrap();
    assert_eq!((quota.stacks(), quota.bytes()), (0, 0));
    assert!(matches!(lease_for(&quota, 0), Err(Error::Size { .. })));
    injection::fail_from(Some(0));
    assert!(matches!(lease_for(&quota, 16 << 20), Err(Error::Memory { .. })));
    injection::fail_from(None);
    assert_eq!((quota.stacks(), quota.bytes()), (0, 0));
}

#[test]
fn trim_takes_the_memory_of_idle_stacks() {
    let lease = lease(256 << 10).unwrap();
    let (slot, word) = (lease.slot(), lease.top() - 8);
    // SAFETY: the lease's.
    unsafe { crate::segment::write_word(word, 42) };
    drop(lease);
    trim();
    // No other test uses this class.
    let again = super::lease(256 << 10).unwrap();
    assert_eq!(again.slot(), slot);
    // SAFETY: the lease's.
    assert_eq!(unsafe { crate::segment::read_word(word) }, 0);
}

/// A free list that lies: what the attacker makes it name, and that the process ends by it.
#[test]
fn a_lying_free_list_ends_the_process() {
    fn point_list_at(slot: *mut Slot, class: u8) {
        CACHE.with(|cache| cache.lists[usize::from(class | cache.flag.get())].head.set(slot));
    }
    let page = system::page_size();
    let class = class_of(page, system::page_shift());
    let live = lease(page).unwrap();
    let larger = lease(4 * page).unwrap().into_raw();
    // SAFETY: ours; it is given back, so that it is free, and stays mapped.
    unsafe { release_raw(larger.as_ptr()) }.unwrap();
    let own = Box::leak(Box::new([0_u64; 64])).as_mut_ptr().cast::<Slot>();
    let abort = |status: i32| libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT;
    let named: [(&str, *mut Slot); 4] = [
        ("a live stack", live.slot().as_ptr()),
        ("its own memory", own),
        ("the middle of a slot", live.slot().as_ptr().wrapping_byte_add(64)),
        ("a free stack of another class", larger.as_ptr()),
    ];
    for (what, slot) in named {
        let end = end_of(|| {
            point_list_at(slot, class);
            let _ = std::hint::black_box(lease(page));
        });
        assert!(abort(end), "{what}: {end:#x}");
    }
    // A copy of a live slot with the state of a free one is still at no slot's address.
    let end = end_of(|| {
        // SAFETY: own is as large as four slots.
        unsafe { own.copy_from_nonoverlapping(live.slot().as_ptr(), 1) };
        // SAFETY: written above.
        unsafe { &*own }.state.store(slot_state::FREE, Ordering::Relaxed);
        point_list_at(own, class);
        let _ = std::hint::black_box(lease(page));
    });
    assert!(abort(end), "a copy: {end:#x}");
    // A lease whose slot was given back behind its back, and bounds rewritten while it was free.
    let end = end_of(|| {
        // SAFETY: it stays mapped.
        unsafe { live.slot().as_ref() }.state.store(slot_state::FREE, Ordering::Relaxed);
        release(live.slot().as_ptr());
    });
    assert!(abort(end), "a second release: {end:#x}");
    let end = end_of(|| {
        release(live.slot().as_ptr());
        // SAFETY: it stays mapped.
        unsafe { (*live.slot().as_ptr()).top += 4096 };
        let _ = std::hint::black_box(lease(page));
    });
    assert!(abort(end), "bounds: {end:#x}");
    assert_eq!(end_of(|| release(live.slot().as_ptr())), 0, "the control");
}

/// Adjacent shadow stacks on a kernel that has them: one mapping, a token in each, a guard below each, and each only once.
#[test]
fn adjacent_shadow_stacks_share_a_mapping_and_have_guards() {
    let shape = Shape::of_class(class_of_shift(system::page_shift()) | CLASS_SHADOW);
    let Ok(probe) = crate::shadow::ShadowStack::map(4096) else {
        eprintln!("this kernel has no shadow stacks");
        return;
    };
    drop(probe);
    let mut chunk = Chunk::map(&shape, 128).unwrap();
    assert_eq!(chunk.count, 256);
    let count = 200;
    let slots: Vec<_> = (0..count).map(|_| chunk.carve(&shape).unwrap().unwrap()).collect();
    let page = system::page_size();
    // SAFETY: just made.
    let tops: Vec<_> = slots.iter().map(|slot| unsafe { slot.as_ref() }.shadow_top).collect();
    for (index, &top) in tops.iter().enumerate() {
        assert_eq!(top, tops[0] + index * shape.shadow_span());
        assert!(crate::shadow::is_idle(top));
        assert!(readable(top - 8) && readable(top - shape.room));
        let guard = top - shape.room - shape.shadow_guard;
        assert!(!readable(guard) && !readable(guard + shape.shadow_guard - page), "no guard below {index}");
    }
    if system::cheap_guards() {
        assert_eq!(mappings(tops[0] - shape.shadow_span(), tops[count - 1]), Some(1));
        // SAFETY: just made.
        let data: Vec<_> = slots.iter().map(|slot| unsafe { (slot.as_ref().base, slot.as_ref().top) }).collect();
        assert_eq!(mappings(data[0].0 - shape.guard, data[count - 1].1), Some(1));
    }
    // What is mapped where the next one belongs is not replaced: the stack is left out. QEMU user mode (seen on 11.1.3), which has no cheap
    // guards either, sometimes maps over it when another thread maps too.
    if !system::cheap_guards() {
        eprintln!("not asked what happens where something is mapped: not a kernel's own shadow stacks");
        return;
    }
    let next = tops[count - 1];
    let area = std::ptr::with_exposed_provenance_mut::<libc::c_void>(next);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: maps where nothing is.
    let taken = unsafe { libc::mmap(area, page, libc::PROT_READ, flags, -1, 0) };
    assert_eq!(taken, area);
    assert_eq!(chunk.carve(&shape).unwrap(), None);
    let after = chunk.carve(&shape).unwrap().unwrap();
    // SAFETY: just made.
    assert!(crate::shadow::is_idle(unsafe { after.as_ref() }.shadow_top));
}
