//! Does the world notice? Each rule is broken in turn, and seeds are run until a promise is.

use libvol::sabotage::{Rule, break_rule};

use super::{Faults, Size, run};

/// A broken rule must be noticed within so many seeds.
pub const SEEDS_MAX: u64 = 1000;

/// The first seed, from 0 on, whose history notices that the rule is broken, and what it says.
pub fn noticed(rule: Rule, seeds: u64) -> Option<(u64, String)> {
    break_rule(Some(rule));
    let failing = (0..seeds).find_map(|seed| {
        let failure = run(seed, Size::default(), Faults::default(), false).err()?;
        Some((seed, failure.violation))
    });
    break_rule(None);
    failing
}

/// The table for docs/RELIABILITY.md, a row a rule.
pub fn table(rows: &[(Rule, Option<(u64, String)>)]) -> String {
    let mut text = String::from("| broken rule | seeds until it was noticed |\n|---|---|\n");
    for (rule, failing) in rows {
        let seeds = match failing {
            Some((seed, _)) => (seed + 1).to_string(),
            None => "not noticed".to_owned(),
        };
        text.push_str(&format!("| {} | {seeds} |\n", rule.text()));
    }
    text
}
