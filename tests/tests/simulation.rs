//! The simulated world's bounded set: at least 500 seeds, the same ones every time. `make soak` runs on from there.

use vold_tests::scale;
use vold_tests::sim::{Faults, Report, Size, run, run_one};

/// Threads of the seeds' tests: each takes every so many seeds.
const SHARES: u64 = 4;

fn share(number: u64) {
    let mut total = Report::default();
    for seed in (number..scale(512, 4096)).step_by(SHARES as usize) {
        let report = run_one(seed);
        total.crash_points += report.crash_points;
        total.changes_cut += report.changes_cut;
        total.old_copies += report.old_copies;
        total.flips += report.flips;
        total.destroyed += report.destroyed;
        total.acknowledged += report.acknowledged;
    }
    println!("share {number} of {SHARES}: {total:?}");
    // A world in which nothing happens promises nothing.
    assert!(
        total.crash_points > 300
            && total.changes_cut > 30
            && total.flips > 50
            && total.destroyed > 30
            && total.old_copies > 5,
        "{total:?}"
    );
}

#[test]
fn no_promise_is_broken_by_seeds_of_the_first_share() {
    share(0);
}

#[test]
fn no_promise_is_broken_by_seeds_of_the_second_share() {
    share(1);
}

#[test]
fn no_promise_is_broken_by_seeds_of_the_third_share() {
    share(2);
}

#[test]
fn no_promise_is_broken_by_seeds_of_the_fourth_share() {
    share(3);
}

#[test]
fn a_seed_replays_call_by_call_with_and_without_a_trace() {
    for seed in 0..10 {
        let hash = |trace| {
            let report = run(seed, Size::default(), Faults::default(), trace);
            report.unwrap_or_else(|failure| panic!("{failure}"))
        };
        assert_eq!(hash(false), hash(true), "seed {seed}");
    }
    let [a, b] = [0, 1].map(|seed| run_one(seed).trace_hash);
    assert_ne!(a, b);
}

/// A seed in the world in which it was found: its history is the same.
fn run_of_old(seed: u64) {
    if let Err(failure) = run(seed, Size::default(), Faults::of_old(), false) {
        panic!("{failure}");
    }
}

/// A release was under way on a replica that stopped catching up and began anew: the extent's place was given to another one
/// and believed to be still its own.
#[test]
fn a_seed_that_found_a_place_believed_to_be_two_extents_stays_clean() {
    run_of_old(21363);
}

/// A failed sync takes an acknowledged write that was not flushed, and a write after that is refused: what is left of the block is no
/// value to be read, since a newer one was acknowledged.
#[test]
fn a_seed_in_which_a_refused_write_made_an_older_value_readable_stays_clean() {
    run_of_old(89391);
}

/// A mistake of the world, not of vold: a bit flipped in a sector whose healing was not synced, so that what a cut brought back
/// was damage that nobody had noted.
#[test]
fn a_seed_in_which_healing_that_was_not_synced_was_damaged_again_stays_clean() {
    run_of_old(149_806);
}

/// A write was refused by a store that had failed, and part of it had landed: reads went on to show the hole that was there
/// before, and the next opening what had landed. Now the blocks are EIO until then.
#[test]
fn a_seed_in_which_a_refused_write_landed_under_a_hole_that_was_shown_stays_clean() {
    run_of_old(268_215);
}
