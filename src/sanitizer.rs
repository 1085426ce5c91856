//! AddressSanitizer is told which stack runs (cargo feature `asan`).
//!
//! It takes the bounds of a stack for granted, keeps a fake stack per thread for locals that outlive their function, and clears what frames
//! have poisoned when control does not return. Each of these is wrong on another stack unless it hears of every switch
//! (`sanitizer/common_interface_defs.h`: `__sanitizer_start_switch_fiber` before, `__sanitizer_finish_switch_fiber` behind it).
//!
//! With the feature, in a program that the sanitizer is linked to, every switch goes through the stubs that keep everything, and takes a
//! lock. Else nothing happens here.

use crate::abi::Slot;
use crate::switch::{Entry, Thrown};
use std::ptr::NonNull;

#[cfg(all(feature = "asan", target_os = "linux"))]
pub(crate) use told::*;

/// Nobody is told.
#[cfg(not(all(feature = "asan", target_os = "linux")))]
mod untold {
    use super::*;

    #[inline(always)]
    pub(crate) fn is_told() -> bool {
        false
    }

    /// What a resume leaves behind.
    #[derive(Clone, Copy)]
    pub(crate) struct Left;

    #[inline(always)]
    pub(crate) fn prepared(_: NonNull<Slot>, entry: Entry, data: usize) -> (Entry, usize) {
        (entry, data)
    }

    #[inline(always)]
    pub(crate) fn resumes(_: NonNull<Slot>) -> Left {
        Left
    }

    #[inline(always)]
    pub(crate) fn is_back(_: Left) {}

    #[inline(always)]
    pub(crate) fn suspends(_: NonNull<Slot>, _: NonNull<Slot>) {}

    #[inline(always)]
    pub(crate) fn switches(_: NonNull<Slot>, _: NonNull<Slot>) {}

    #[inline(always)]
    pub(crate) fn is_resumed(_: NonNull<Slot>, _: NonNull<Slot>) {}

    #[inline(always)]
    pub(crate) fn throws<T>(
        _: NonNull<Slot>,
        _: NonNull<Slot>,
        arg: usize,
        f: Thrown,
        call: impl FnOnce(usize, Thrown) -> T,
    ) -> T {
        call(arg, f)
    }

    #[inline(always)]
    pub(crate) fn cancelled(_: NonNull<Slot>) {}
}
#[cfg(not(all(feature = "asan", target_os = "linux")))]
pub(crate) use untold::*;

#[cfg(all(feature = "asan", target_os = "linux"))]
mod told {
    use super::*;
    use std::collections::BTreeMap;
    use std::ffi::c_void;
    use std::ptr::{null, null_mut};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    type Start = unsafe extern "C" fn(save: *mut *mut c_void, bottom: *const c_void, size: usize);
    type Finish = unsafe extern "C" fn(saved: *mut c_void, old_bottom: *mut *const c_void, old_size: *mut usize);
    type Unpoison = unsafe extern "C" fn(address: *const c_void, size: usize);

    /// The address of a function that need not be linked: 0 if it is not.
    macro_rules! address_if_linked {
        ($name:literal) => {{
            let address: usize;
            // SAFETY: loads a word of the global offset table.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                std::arch::asm!(
                    concat!(".weak ", $name),
                    concat!("mov {}, [rip + ", $name, "@GOTPCREL]"),
                    out(reg) address,
                    options(pure, nomem, nostack, preserves_flags),
                );
                #[cfg(target_arch = "aarch64")]
                std::arch::asm!(
                    concat!(".weak ", $name),
                    concat!("adrp {0}, :got:", $name),
                    concat!("ldr {0}, [{0}, :got_lo12:", $name, "]"),
                    out(reg) address,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            address
        }};
    }

    /// Whether there is a sanitizer to tell.
    #[inline(always)]
    pub(crate) fn is_told() -> bool {
        address_if_linked!("__sanitizer_start_switch_fiber") != 0
    }

    /// Says that this thread leaves its stack for the one with these bounds. What is saved goes to [`finish`] when it comes back; without
    /// a place for it the stack that is left is done with.
    fn start(save: Option<&mut usize>, bounds: Bounds) {
        let address = address_if_linked!("__sanitizer_start_switch_fiber");
        if address != 0 {
            let mut saved = null_mut();
            let place = if save.is_some() { &raw mut saved } else { null_mut() };
            // SAFETY: the function of that name, as its header declares it; the bounds are those of a mapped stack.
            unsafe {
                let start: Start = std::mem::transmute(address);
                start(place, std::ptr::with_exposed_provenance(bounds.bottom), bounds.size);
            }
            if let Some(save) = save {
                *save = saved.expose_provenance();
            }
        }
    }

    /// Says that this thread has come to the stack for which that was saved. Gives the bounds of the one that it came from.
    fn finish(saved: usize) -> Bounds {
        let address = address_if_linked!("__sanitizer_finish_switch_fiber");
        let (mut bottom, mut size) = (null(), 0);
        if address != 0 {
            // SAFETY: as above; `start` has been called on the way here.
            unsafe {
                let finish: Finish = std::mem::transmute(address);
                finish(std::ptr::with_exposed_provenance_mut(saved), &mut bottom, &mut size);
            }
        }
        Bounds { bottom: bottom.addr(), size }
    }

    /// Frames that are dropped leave their poison behind.
    fn unpoison(slot: NonNull<Slot>) {
        let address = address_if_linked!("__asan_unpoison_memory_region");
        if address != 0 {
            let bounds = Bounds::of(slot);
            // SAFETY: as above; the slot's data area, on which no frame is.
            unsafe {
                let unpoison: Unpoison = std::mem::transmute(address);
                unpoison(std::ptr::with_exposed_provenance(bounds.bottom), bounds.size);
            }
        }
    }

    #[derive(Clone, Copy)]
    struct Bounds {
        bottom: usize,
        size: usize,
    }

    impl Bounds {
        fn of(slot: NonNull<Slot>) -> Bounds {
            // SAFETY: slots stay mapped; these words do not change while it is leased.
            let (base, top) =
                unsafe { ((&raw const (*slot.as_ptr()).base).read(), (&raw const (*slot.as_ptr()).top).read()) };
            Bounds { bottom: base, size: top - base }
        }
    }

    /// What must be known of a stack.
    struct Fiber {
        /// What it was prepared with.
        entry: Entry,
        data: usize,
        /// What was saved when it was left.
        saved: usize,
        /// Its resumer's stack.
        outside: Bounds,
        /// A symmetric switch has said what that is.
        is_given: bool,
        /// It was thrown into, and what was thrown has finished the switch.
        has_arrived: bool,
    }

    static FIBERS: Mutex<BTreeMap<usize, Fiber>> = Mutex::new(BTreeMap::new());

    fn fibers() -> MutexGuard<'static, BTreeMap<usize, Fiber>> {
        FIBERS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Panics
    /// When the slot was not prepared.
    fn with<T>(slot: NonNull<Slot>, look: impl FnOnce(&mut Fiber) -> T) -> T {
        look(fibers().get_mut(&slot.addr().get()).expect("prepared before it is switched to"))
    }

    /// What to prepare a slot with instead.
    pub(crate) fn prepared(slot: NonNull<Slot>, entry: Entry, data: usize) -> (Entry, usize) {
        if !is_told() {
            return (entry, data);
        }
        let outside = Bounds { bottom: 0, size: 0 };
        let fiber = Fiber { entry, data, saved: 0, outside, is_given: false, has_arrived: false };
        fibers().insert(slot.addr().get(), fiber);
        unpoison(slot);
        (entered, 0)
    }

    /// Runs what a slot was prepared with.
    unsafe extern "C" fn entered(arg: usize, _: usize, slot: *mut Slot) -> usize {
        let Some(here) = NonNull::new(slot) else { unreachable!("a stack runs without a slot") };
        arrive(here, here);
        let (entry, data) = with(here, |fiber| (fiber.entry, fiber.data));
        // SAFETY: what the slot was prepared with.
        let value = unsafe { entry(arg, data, slot) };
        let outside = with(here, |fiber| fiber.outside);
        start(None, outside);
        value
    }

    /// Behind a switch to the stack `last`, whose chain was resumed by way of `first`.
    fn arrive(last: NonNull<Slot>, first: NonNull<Slot>) {
        let from = finish(with(last, |fiber| fiber.saved));
        with(first, |fiber| {
            if !std::mem::take(&mut fiber.is_given) {
                fiber.outside = from;
            }
        });
    }

    /// What a resume leaves behind.
    #[derive(Clone, Copy)]
    pub(crate) struct Left(usize);

    /// Before `last` is resumed.
    pub(crate) fn resumes(last: NonNull<Slot>) -> Left {
        let mut saved = 0;
        start(Some(&mut saved), Bounds::of(last));
        Left(saved)
    }

    /// Behind that.
    pub(crate) fn is_back(left: Left) {
        finish(left.0);
    }

    /// Before the stack that runs, `last`'s, is left for the resumer of `first`.
    pub(crate) fn suspends(last: NonNull<Slot>, first: NonNull<Slot>) {
        if is_told() {
            let outside = with(first, |fiber| fiber.outside);
            leave(last, outside);
        }
    }

    fn leave(slot: NonNull<Slot>, bounds: Bounds) {
        let mut saved = 0;
        start(Some(&mut saved), bounds);
        with(slot, |fiber| (fiber.saved, fiber.has_arrived) = (saved, false));
    }

    /// Before `from` is left for `to`.
    pub(crate) fn switches(from: NonNull<Slot>, to: NonNull<Slot>) {
        if is_told() {
            let outside = with(from, |fiber| fiber.outside);
            with(to, |fiber| (fiber.outside, fiber.is_given) = (outside, true));
            leave(from, Bounds::of(to));
        }
    }

    /// Behind [`suspends`] or [`switches`].
    pub(crate) fn is_resumed(last: NonNull<Slot>, first: NonNull<Slot>) {
        if is_told() && !with(last, |fiber| std::mem::take(&mut fiber.has_arrived)) {
            arrive(last, first);
        }
    }

    struct Packet {
        last: NonNull<Slot>,
        first: NonNull<Slot>,
        arg: usize,
        f: Thrown,
    }

    /// Has `call` throw a function that finishes the switch and calls `f(arg)`.
    pub(crate) fn throws<T>(
        last: NonNull<Slot>,
        first: NonNull<Slot>,
        arg: usize,
        f: Thrown,
        call: impl FnOnce(usize, Thrown) -> T,
    ) -> T {
        if !is_told() {
            return call(arg, f);
        }
        let packet = Packet { last, first, arg, f };
        let left = resumes(last);
        let result = call((&raw const packet).expose_provenance(), thrown);
        is_back(left);
        result
    }

    unsafe extern "C-unwind" fn thrown(packet: usize) -> usize {
        // SAFETY: `throws` waits with it on its stack, until this one is suspended or finished.
        let Packet { last, first, arg, f } = unsafe { std::ptr::with_exposed_provenance::<Packet>(packet).read() };
        arrive(last, first);
        with(last, |fiber| fiber.has_arrived = true);
        // SAFETY: what the caller of `throw` vouches for.
        unsafe { f(arg) }
    }

    /// Nothing is on the stack any more. Its fake stack is given up by going there and away in words only.
    pub(crate) fn cancelled(slot: NonNull<Slot>) {
        if !is_told() {
            return;
        }
        let fiber = fibers().remove(&slot.addr().get());
        if let Some(Fiber { saved, .. }) = fiber
            && saved != 0
        {
            let mut here = 0;
            start(Some(&mut here), Bounds::of(slot));
            let bounds = finish(saved);
            start(None, bounds);
            finish(here);
        }
        unpoison(slot);
    }
}
