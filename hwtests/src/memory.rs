//! Raw memory, as an attacker sees it, and what the kernel says about this process' mappings.

use std::ops::Range;

/// Reads a word through its address.
///
/// # Safety
/// The word is mapped readable and 8-byte aligned.
pub unsafe fn peek(address: usize) -> u64 {
    // SAFETY: the caller's; volatile, because an attacker may write there.
    unsafe { std::ptr::with_exposed_provenance::<u64>(address).read_volatile() }
}

/// Reads a word that may be gone: the kernel is asked to. Async-signal-safe.
pub fn peek_if_mapped(address: usize) -> Option<u64> {
    let mut ends = [0; 2];
    let mut word = [0; 8];
    let pointer = std::ptr::with_exposed_provenance::<libc::c_void>(address);
    // SAFETY: the kernel answers EFAULT where nothing is mapped; the buffer is eight bytes long.
    let read = unsafe {
        libc::pipe(ends.as_mut_ptr()) == 0
            && libc::write(ends[1], pointer, word.len()) == word.len() as isize
            && libc::read(ends[0], word.as_mut_ptr().cast(), word.len()) == word.len() as isize
    };
    // SAFETY: the pipe's ends, or standard input where there is no pipe: the process is about to end.
    unsafe {
        libc::close(ends[0]);
        libc::close(ends[1]);
    }
    read.then(|| u64::from_ne_bytes(word))
}

/// Writes a word through its address, as another thread would.
///
/// # Safety
/// The word is mapped writable, 8-byte aligned and meant to change; no Rust reference to it is in use.
pub unsafe fn poke(address: usize, word: u64) {
    // SAFETY: the caller's.
    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(word) }
}

/// A sum over `words` words that tells any two contents apart that a test could mix up (FNV-1a by words).
///
/// # Safety
/// The words are mapped readable, `address` 8-byte aligned.
pub unsafe fn sum(address: usize, words: usize) -> u64 {
    (0..words).fold(0xcbf2_9ce4_8422_2325, |sum, index| {
        // SAFETY: the caller's.
        let word = unsafe { peek(address + index * 8) };
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Addresses of the frame records from the youngest on, while they lie between it and `top`.
pub fn records(youngest: usize, top: usize) -> Vec<usize> {
    let mut records = vec![youngest];
    loop {
        let last = records[records.len() - 1];
        // SAFETY: the record lies in the segment that the step hook was shown.
        let next = unsafe { peek(last) } as usize;
        if next <= last || next >= top || !next.is_multiple_of(16) {
            return records;
        }
        records.push(next);
    }
}

/// Replaces private memory by shared memory with the same contents. Returns where a second view of it lies, which stays when
/// the first is unmapped.
pub fn share(address: usize, bytes: usize) -> usize {
    let at = std::ptr::with_exposed_provenance_mut(address);
    let (readable, writable) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: the callers' mapping, whose contents stay as they are; the rest is new.
    let view = unsafe {
        let file = libc::memfd_create(c"kept".as_ptr(), 0);
        assert!(file >= 0 && libc::write(file, at, bytes) == bytes as isize, "no shared memory");
        let first = libc::mmap(at, bytes, writable, libc::MAP_SHARED | libc::MAP_FIXED, file, 0);
        let second = libc::mmap(std::ptr::null_mut(), bytes, readable, libc::MAP_SHARED, file, 0);
        libc::close(file);
        assert!(first == at && second != libc::MAP_FAILED, "no view of shared memory");
        second
    };
    view.expose_provenance()
}

/// Takes the next `count` places where the kernel would map a small segment, for good: stacks made later lie elsewhere.
pub fn take_places(count: usize) {
    /// A page and the default guard.
    const SEGMENT: usize = 17 * 4096;
    for _ in 0..count {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SEGMENT,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
        }
    }
}

/// The mappings' number, and resident pages.
pub fn footprint() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    (maps.lines().count(), statm.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0))
}

/// The shadow stacks' mappings (`VmFlags: … ss`).
pub fn shadow_mappings() -> Vec<Range<usize>> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut found = Vec::new();
    let mut current = 0..0;
    for line in smaps.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if let Some((start, end)) = word.split_once('-')
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            current = start..end;
        } else if word == "VmFlags:" && line.split_whitespace().any(|flag| flag == "ss") {
            found.push(current.clone());
        }
    }
    found
}
