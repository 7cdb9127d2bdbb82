//! Bytes to write and to find again: seeded, cheap, different everywhere.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

/// A generator whose seed is printed, so that a failure can be run again with `VOLD_TEST_SEED`.
pub fn seeded(what: &str) -> SmallRng {
    let seed = match std::env::var("VOLD_TEST_SEED") {
        Ok(text) => text.parse().expect("VOLD_TEST_SEED is a number"),
        Err(_) => rand::rng().random(),
    };
    println!("{what}: VOLD_TEST_SEED={seed}");
    SmallRng::seed_from_u64(seed)
}

/// `len` bytes that depend on the seed alone.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Readable text, different in every line, as a customer's plaintext that a search must not find.
pub fn text(tag: &str, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 64);
    let mut line = 0;
    while bytes.len() < len {
        writeln!(bytes, "{tag}: the quick brown customer record number {line:010}").expect("memory");
        line += 1;
    }
    bytes.truncate(len);
    bytes
}

/// A file of random bytes.
pub fn random_file(path: &Path, seed: u64, len: usize) {
    std::fs::write(path, bytes(seed, len)).expect("temp file");
}

/// A sparse file: `len` bytes, random data in some 64 KiB pieces, holes elsewhere.
pub fn sparse_file(path: &Path, seed: u64, len: u64) {
    const PIECE: u64 = 64 << 10;
    let file = File::create(path).expect("temp file");
    file.set_len(len).expect("temp file");
    let mut rng = SmallRng::seed_from_u64(seed);
    for piece in 0..len / PIECE {
        if rng.random_range(0..4) == 0 {
            file.write_all_at(&bytes(seed + 1 + piece, PIECE as usize), piece * PIECE)
                .expect("temp file");
        }
    }
}

/// How often `needle` occurs in a file.
///
/// # Panics
/// When the file cannot be read, or chance might produce the needle.
pub fn occurrences(path: &Path, needle: &[u8]) -> usize {
    assert!(needle.len() >= 8, "a needle that chance does not produce");
    const CHUNK: usize = 4 << 20;
    let mut file = File::open(path).expect("file to search");
    let mut window: Vec<u8> = Vec::with_capacity(CHUNK + needle.len());
    let mut found = 0;
    loop {
        let read = Read::by_ref(&mut file)
            .take(CHUNK as u64)
            .read_to_end(&mut window)
            .expect("file to search");
        found += count(&window, needle);
        if read == 0 {
            return found;
        }
        // What could begin a match that ends in the next chunk stays; it is too short to match by itself.
        let keep = (needle.len() - 1).min(window.len());
        window.drain(..window.len() - keep);
    }
}

/// Horspool's search: from the byte under the needle's end it knows how far the needle can move.
fn count(haystack: &[u8], needle: &[u8]) -> usize {
    let last = needle.len() - 1;
    let mut shifts = [needle.len(); 256];
    for (i, byte) in needle[..last].iter().enumerate() {
        shifts[usize::from(*byte)] = last - i;
    }
    let (mut at, mut found) = (0, 0);
    while let Some(end) = haystack.get(at + last) {
        if *end == needle[last] && haystack[at..at + last] == needle[..last] {
            found += 1;
        }
        at += shifts[usize::from(*end)];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occurrences_are_found_at_the_edges_across_chunks_and_overlapping() {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        let mut bytes = vec![0u8; 9 << 20];
        for at in [0, (4 << 20) - 3, (8 << 20) - 8, (9 << 20) - 8] {
            bytes[at..at + 8].copy_from_slice(b"needle!!");
        }
        bytes[100..110].fill(b'a');
        std::fs::write(file.path(), bytes).expect("temp file");
        assert_eq!(occurrences(file.path(), b"needle!!"), 4);
        assert_eq!(occurrences(file.path(), b"aaaaaaaa"), 3);
        assert_eq!(occurrences(file.path(), b"no needle"), 0);
    }
}
