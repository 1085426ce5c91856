//! How a value travels in the one word that a switch passes: as itself where it fits, else as the address where it lies.

use std::arch::asm;
use std::mem::{ManuallyDrop, MaybeUninit};

/// Whether a `T` travels as itself.
pub(super) const fn fits<T>() -> bool {
    size_of::<T>() <= size_of::<usize>() && align_of::<T>() <= align_of::<usize>()
}

/// The word for `value`. The value must stay where it is until the word was [`receive`]d, which takes it.
#[inline(always)]
pub(super) fn send<T>(value: &ManuallyDrop<T>) -> usize {
    if size_of::<T>() == 0 {
        return 0;
    }
    let value = std::ptr::from_ref(value).cast::<T>();
    if !fits::<T>() {
        return value.expose_provenance();
    }
    let mut word = MaybeUninit::<usize>::zeroed();
    // SAFETY: the word is as large and as aligned as a T can be here. The instruction that is none makes a number of it: whatever T's
    // padding is, and exposing pointers as `expose_provenance` does, since nobody can see what became of them.
    unsafe {
        word.as_mut_ptr().cast::<T>().copy_from_nonoverlapping(value, 1);
        asm!("/* {0} */", inlateout(reg) word, options(nostack, preserves_flags));
        word.assume_init()
    }
}

/// Takes the value that `word` stands for.
///
/// # Safety
/// `word` is [`send`]'s of a `T` that is where it was and that nobody else takes.
#[inline(always)]
pub(super) unsafe fn receive<T>(word: usize) -> T {
    if size_of::<T>() == 0 {
        // SAFETY: an owned value without bytes was sent; it is there wherever one looks.
        return unsafe { std::ptr::dangling::<T>().read() };
    }
    if !fits::<T>() {
        // SAFETY: the caller's: it is the address of a T that is now ours.
        return unsafe { std::ptr::with_exposed_provenance::<T>(word).read() };
    }
    let mut word = MaybeUninit::new(word);
    // SAFETY: these are the bytes of a T. As in `send`, the instruction gives pointers their provenance again.
    unsafe {
        asm!("/* {0} */", inlateout(reg) word, options(nostack, preserves_flags));
        word.as_ptr().cast::<T>().read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn goes_through<T: Clone + PartialEq + std::fmt::Debug>(value: T) {
        let sent = ManuallyDrop::new(value.clone());
        // SAFETY: taken once.
        assert_eq!(unsafe { receive::<T>(send(&sent)) }, value);
    }

    #[test]
    fn values_of_every_size_go_through() {
        goes_through(());
        goes_through([0_u128; 0]);
        goes_through(7_u8);
        goes_through((1_u8, -2_i32));
        goes_through(Some(3.5_f32));
        goes_through(Box::new(5));
        goes_through("two words");
        goes_through(vec![String::from("on the heap")]);
        goes_through([1_u128; 33]);
    }
}
