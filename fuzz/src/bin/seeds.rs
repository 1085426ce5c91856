//! Writes inputs for a fuzzer to begin with: `seeds DIRECTORY`. They are decisions at random, always the same, from a few up to more than any target takes.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(std::io::Error::other("usage: seeds DIRECTORY"));
    };
    std::fs::create_dir_all(&directory)?;
    let mut state = 1_u64;
    for seed in 0..48 {
        let length = 16 << (seed % 8);
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                // Every third one decides for what comes first, mostly.
                if seed % 3 == 2 && state >> 60 < 10 { 0 } else { (state >> 33) as u8 }
            })
            .collect();
        std::fs::write(directory.join(format!("seed-{seed}")), bytes)?;
    }
    Ok(())
}
