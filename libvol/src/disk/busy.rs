//! When to look for completions for a while before sleeping.
//!
//! A thread that sleeps while its disks work is woken by an interrupt and a switch. With several transfers in flight the
//! next completion is often nearer than that, so the thread looks again and again, for a limited time; where looking does
//! not pay, it is done less and less often. With one or two transfers in flight there is nothing to win but latency, at
//! the price of a whole core: the thread sleeps.

use std::time::Duration;

/// Decides before each sleep, and learns from what came of it.
pub(super) struct BusyPoll {
    limit: Duration,
    misses: u32,
    /// Sleeps to come that are not put off.
    skip: u32,
}

impl BusyPoll {
    /// Fewer transfers in flight are not waited for awake.
    const FROM_TRANSFERS: usize = 3;
    /// After so many misses in a row the pauses between attempts grow no more: one attempt in 256 sleeps.
    const MISSES_COUNTED: u32 = 8;

    /// Looks for at most `limit` before a sleep; zero turns it off.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            misses: 0,
            skip: 0,
        }
    }

    /// How long to look before this sleep, with so many transfers in flight.
    pub(super) fn before_sleep(&mut self, transfers: usize) -> Option<Duration> {
        if self.limit.is_zero() || transfers < Self::FROM_TRANSFERS {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        Some(self.limit)
    }

    /// It took so long to find something, or to give up. Longer than twice the limit means that the processor was given to
    /// somebody else meanwhile, who needs it more.
    pub(super) fn ended(&mut self, found: bool, took: Duration) {
        if found && took <= 2 * self.limit {
            self.misses = 0;
        } else {
            self.misses = (self.misses + 1).min(Self::MISSES_COUNTED);
            self.skip = 1 << self.misses;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(200);

    /// Attempts in so many sleeps, none of which finds anything.
    fn vain_attempts(poll: &mut BusyPoll, sleeps: usize) -> usize {
        (0..sleeps)
            .filter(|_| {
                let looks = poll.before_sleep(8).is_some();
                if looks {
                    poll.ended(false, LIMIT);
                }
                looks
            })
            .count()
    }

    #[test]
    fn zero_and_few_transfers_mean_sleep() {
        assert_eq!(BusyPoll::new(Duration::ZERO).before_sleep(100), None);
        let mut poll = BusyPoll::new(LIMIT);
        assert_eq!((poll.before_sleep(0), poll.before_sleep(2)), (None, None));
        assert_eq!(poll.before_sleep(3), Some(LIMIT));
    }

    #[test]
    fn it_goes_on_while_it_pays() {
        let mut poll = BusyPoll::new(LIMIT);
        for _ in 0..1000 {
            assert_eq!(poll.before_sleep(8), Some(LIMIT));
            poll.ended(true, LIMIT / 10);
        }
    }

    #[test]
    fn misses_make_it_rare_and_a_find_brings_it_back() {
        let mut poll = BusyPoll::new(LIMIT);
        vain_attempts(&mut poll, 1000);
        let attempts = vain_attempts(&mut poll, 25_700);
        assert!((99..=101).contains(&attempts), "one in 257: {attempts}");
        while poll.before_sleep(8).is_none() {}
        poll.ended(true, LIMIT / 2);
        assert_eq!(poll.before_sleep(8), Some(LIMIT));
    }

    #[test]
    fn a_processor_that_others_need_is_left_to_them() {
        let mut poll = BusyPoll::new(LIMIT);
        assert!(poll.before_sleep(8).is_some());
        poll.ended(true, 3 * LIMIT);
        assert_eq!(poll.before_sleep(8), None, "somebody else ran in between");
    }
}
