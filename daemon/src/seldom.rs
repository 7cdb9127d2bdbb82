//! Log lines that a client can cause as often as it likes.

use std::cell::Cell;

/// Counts what a client can cause as often as it likes.
#[derive(Default)]
pub(crate) struct Seldom(Cell<u64>);

impl Seldom {
    /// Says it the 1st, 2nd, 4th, 8th … time, with the count.
    pub(crate) fn say(&self, say: impl FnOnce(u64)) {
        let times = self.0.get() + 1;
        self.0.set(times);
        if times.is_power_of_two() {
            say(times);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_repeats_is_said_ever_more_seldom() {
        let (seldom, mut said) = (Seldom::default(), Vec::new());
        for _ in 0..1_000_000 {
            seldom.say(|times| said.push(times));
        }
        let powers: Vec<u64> = (0..20).map(|power| 1 << power).collect();
        assert_eq!(said, powers);
    }
}
