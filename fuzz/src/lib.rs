//! Decisions out of bytes, for all targets.

/// A source of decisions: `pick(n)` gives a number below `n`. It takes no more bytes than the choice needs, so that most of an input's changes are
/// changes of meaning; decisions that there are no bytes left for are all 0.
pub fn picker(data: &[u8]) -> impl FnMut(u64) -> u64 {
    let mut bytes = data.iter();
    move |n| {
        let needed = (u64::BITS - (n - 1).leading_zeros()).div_ceil(8);
        let number = (0..needed).fold(0_u64, |number, _| number << 8 | u64::from(bytes.next().copied().unwrap_or(0)));
        number % n
    }
}
