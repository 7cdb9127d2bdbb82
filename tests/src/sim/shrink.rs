//! A failing history made smaller: fewer rounds, volumes, workers, requests, as long as some promise is still broken.
//!
//! Greedy and bounded: each dimension is cut down by halves, then by one, until nothing helps any more. Not every smaller
//! history fails in the same way; any failure is as good for finding the cause.

use super::{Failure, Faults, Size, run};

/// Histories tried, at most.
const TRIES_MAX: u32 = 400;

/// One of the four numbers of a size.
type Part = fn(&mut Size) -> &mut u32;

const PARTS: [Part; 4] = [
    |size| &mut size.rounds,
    |size| &mut size.volumes,
    |size| &mut size.workers,
    |size| &mut size.requests,
];

/// The smallest failing history found, with its trace.
pub fn shrink(failure: Failure, faults: Faults) -> Failure {
    let seed = failure.seed;
    let mut smallest = failure;
    let mut tries = 0;
    loop {
        let before = smallest.size;
        for part in PARTS {
            reduce(&mut smallest, part, faults, &mut tries);
        }
        if smallest.size == before || tries >= TRIES_MAX {
            break;
        }
    }
    match run(seed, smallest.size, faults, true) {
        Err(traced) => *traced,
        Ok(_) => {
            smallest
                .violation
                .push_str(" (it did not fail again with a trace kept)");
            smallest
        }
    }
}

fn reduce(smallest: &mut Failure, part: Part, faults: Faults, tries: &mut u32) {
    let mut step = *part(&mut smallest.size) / 2;
    while step > 0 && *tries < TRIES_MAX {
        let mut size = smallest.size;
        let number = part(&mut size);
        if *number <= step {
            step /= 2;
            continue;
        }
        *number -= step;
        *tries += 1;
        match run(smallest.seed, size, faults, false) {
            Err(failure) => *smallest = *failure,
            Ok(_) => step /= 2,
        }
    }
}
