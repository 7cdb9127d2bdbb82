//! The fuzz targets over their seeds, and over seeded changes of them: the same each time, and bounded.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use super::{api, handshake, tls, transmission, virtqueue};

/// How many changed inputs of each target; `VOLD_TEST_FULL` tries thirty times as many.
fn count(quick: u64) -> u64 {
    match std::env::var_os("VOLD_TEST_FULL") {
        Some(_) => 30 * quick,
        None => quick,
    }
}

#[test]
fn a_handshake_goes_as_foreseen_whatever_the_client_says() {
    run_all("handshake", handshake, count(6000));
}

#[test]
fn requests_are_answered_as_foreseen_whatever_the_client_says() {
    run_all("transmission", transmission, count(6000));
}

#[test]
fn nothing_is_told_or_done_before_tls_whatever_the_client_says() {
    run_all("tls", tls, count(1000));
}

#[test]
fn calls_are_answered_in_shape_whatever_they_say() {
    run_all("api", api, count(1500));
}

#[test]
fn requests_in_a_guests_memory_are_read_as_foreseen_whatever_is_there() {
    run_all("virtqueue", virtqueue, count(6000));
}

fn run_all(name: &str, target: fn(&[u8]), changes: u64) {
    let seeds = seeds(name);
    for (seed, input) in &seeds {
        run_input(target, input, &format!("{name}: seed {seed}"));
    }
    let inputs: Vec<&[u8]> = seeds.iter().map(|(_, input)| &input[..]).collect();
    for number in 0..changes {
        run_one(name, target, &inputs, number);
    }
}

/// One changed input, by its number.
fn run_one(name: &str, target: fn(&[u8]), seeds: &[&[u8]], number: u64) {
    let input = changed(seeds, &mut Chance(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
    run_input(target, &input, &format!("{name}: changed input {number}"));
}

fn run_input(target: fn(&[u8]), input: &[u8], what: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("{what} fails: {}", input.escape_ascii());
        resume_unwind(panic);
    }
}

fn seeds(name: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fuzz/seeds")
        .join(name);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut seeds: Vec<(String, Vec<u8>)> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{}: no seeds", dir.display());
    seeds
}

/// Numbers from a seed (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % end.max(1)
    }
}

/// A seed, changed in one to eight places.
fn changed(seeds: &[&[u8]], chance: &mut Chance) -> Vec<u8> {
    const WORDS: [u64; 10] = [
        0,
        1,
        7,
        0xff,
        0x1000,
        0xffff,
        0x200_0000,
        0xffff_ffff,
        1 << 40,
        u64::MAX,
    ];
    let mut input = seeds[chance.below(seeds.len())].to_vec();
    for _ in 0..=chance.below(8) {
        let at = chance.below(input.len());
        let len = chance.below(24).min(input.len() - at);
        match chance.below(8) {
            0 if at < input.len() => input[at] ^= 1 << chance.below(8),
            1 if at < input.len() => input[at] = chance.below(256) as u8,
            2 => drop(input.drain(at..at + len)),
            3 => {
                let copy = input[at..at + len].to_vec();
                let to = chance.below(input.len());
                input.splice(to..to, copy);
            }
            4 => {
                let other = seeds[chance.below(seeds.len())];
                let from = chance.below(other.len());
                let piece = &other[from..other.len().min(from + chance.below(64))];
                input.splice(at..at, piece.iter().copied());
            }
            5 => {
                let word = WORDS[chance.below(WORDS.len())].to_be_bytes();
                let width = [2, 4, 8][chance.below(3)];
                for (byte, new) in input.iter_mut().skip(at).zip(&word[8 - width..]) {
                    *byte = *new;
                }
            }
            6 => input.truncate(at.max(2)),
            // The first two bytes choose what the rest is for.
            _ if input.len() > 1 => {
                let which = chance.below(2);
                input[which] = chance.below(256) as u8;
            }
            _ => {}
        }
    }
    input
}
