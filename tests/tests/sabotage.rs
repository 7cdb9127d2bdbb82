//! The simulated world notices when a rule is broken: the switches of [`libvol::sabotage`], each within a bounded number of
//! seeds. Built only with the feature `sabotage`: `cargo nextest run -p vold-tests --features sabotage --test sabotage`.

use libvol::sabotage::Rule;
use vold_tests::sim::sabotage::{SEEDS_MAX, noticed};

/// Rules are shared out among so many tests, so that they run side by side.
const SHARES: usize = 2;

fn share(number: usize) {
    let mut missed = Vec::new();
    for rule in Rule::ALL.iter().skip(number).step_by(SHARES) {
        match noticed(*rule, SEEDS_MAX) {
            Some((seed, violation)) => println!("{rule:?}: seed {seed}: {violation}"),
            None => missed.push(*rule),
        }
    }
    assert!(
        missed.is_empty(),
        "broken, and not noticed by {SEEDS_MAX} seeds: {missed:?}"
    );
}

#[test]
fn every_broken_rule_of_the_first_share_is_noticed() {
    share(0);
}

#[test]
fn every_broken_rule_of_the_second_share_is_noticed() {
    share(1);
}
