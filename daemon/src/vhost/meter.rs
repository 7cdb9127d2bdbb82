//! What a front-end costs the shard's thread where the kernel works for it: kicks that are read, calls, messages either way.
//!
//! Whoever watches a descriptor is woken within the operation, by whoever carries it out, and a front-end can have each of its
//! descriptors watched so often that this takes long: 23 ms were measured for 200,000 watchers, which one process can have. So the
//! thread's time is measured in such operations, and what is beyond ordinary is a debt that time pays off. It is the attachment's:
//! a front-end that comes again comes with it.
//!
//! To ask for the thread's own time is a system call, and almost no operation is slow. So it is asked for after a slow one, and
//! noted every half of a millisecond: what the thread has done between the note and the operation is known well enough.

use std::cell::Cell;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// An operation that takes less is ordinary: there are some microseconds to be done, and an interrupt may come in between.
const SLOW: Duration = Duration::from_micros(200);
/// How old a note of the thread's time may be.
const NOTED_FOR: Duration = Duration::from_micros(500);
/// A front-end may have this share of a thread's time for good: a twenty-fifth.
const SHARE: u32 = 25;
/// And so much at once.
const DEBT_MAX: Duration = Duration::from_millis(100);
/// One operation counts no more than this: where the host of this machine gives the processor to others, that may count as the
/// thread's time, and several such times in a row are still nobody's doing.
const COST_MAX: Duration = Duration::from_millis(10);
/// Who owes the most is borne again after five seconds.
const OWED_MAX: Duration = Duration::from_millis(300);

/// See the module's text.
pub(super) struct Meter {
    /// What was owed at that time.
    debt: Cell<(Duration, Instant)>,
}

impl Meter {
    /// Nothing owed.
    pub(super) fn new() -> Self {
        Self {
            debt: Cell::new((Duration::ZERO, Instant::now())),
        }
    }

    /// Carries an operation out.
    pub(super) fn spend<T>(&self, operation: impl FnOnce() -> T) -> T {
        thread_local! {
            static NOTED: Cell<Option<Noted>> = const { Cell::new(None) };
        }
        let begun = Instant::now();
        let noted = match NOTED.get() {
            Some(noted) if begun - noted.at < NOTED_FOR => noted,
            _ => Noted::now(),
        };
        let result = operation();
        NOTED.set(Some(match begun.elapsed() < SLOW {
            true => noted,
            false => {
                let now = Noted::now();
                // Somebody else may have had the processor for most of it.
                let own = (now.thread - noted.thread).saturating_sub(begun - noted.at);
                if own >= SLOW {
                    self.charge(own, now.at);
                }
                now
            }
        }));
        result
    }

    /// Whether that can go on.
    pub(super) fn is_bearable(&self) -> bool {
        // (Most owe nothing, and need no clock.)
        self.debt.get().0 <= DEBT_MAX || self.owed(Instant::now()) <= DEBT_MAX
    }

    fn owed(&self, now: Instant) -> Duration {
        let (debt, since) = self.debt.get();
        debt.saturating_sub(now.saturating_duration_since(since) / SHARE)
    }

    fn charge(&self, cost: Duration, now: Instant) {
        let debt = self.owed(now) + cost.min(COST_MAX);
        self.debt.set((debt.min(OWED_MAX), now));
    }
}

#[derive(Clone, Copy)]
struct Noted {
    at: Instant,
    /// What the thread had used of processors then.
    thread: Duration,
}

impl Noted {
    fn now() -> Self {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Self {
            at: Instant::now(),
            // It is never negative, nor a second in nanoseconds.
            thread: Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(time: Duration) {
        let begun = Noted::now().thread;
        while Noted::now().thread - begun < time {}
    }

    #[test]
    fn what_is_ordinary_costs_nothing_and_sleeping_neither() {
        let meter = Meter::new();
        for _ in 0..10_000 {
            meter.spend(|| ());
        }
        meter.spend(|| std::thread::sleep(Duration::from_millis(200)));
        assert_eq!(meter.debt.get().0, Duration::ZERO);
    }

    #[test]
    fn slow_operations_are_borne_for_a_while_however_many_quick_ones_are_in_between() {
        let meter = Meter::new();
        let mut slow = Duration::ZERO;
        while meter.is_bearable() {
            (0..100).for_each(|_| meter.spend(|| ()));
            meter.spend(|| work(Duration::from_millis(5)));
            slow += Duration::from_millis(5);
            assert!(slow < Duration::from_secs(1), "for ever");
        }
        assert!(slow >= DEBT_MAX, "{slow:?}");
    }

    #[test]
    fn a_debt_is_paid_by_time() {
        let meter = Meter::new();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        for second in 0..1000 {
            meter.charge(Duration::from_millis(9), after(second));
            meter.charge(Duration::from_millis(9), after(second));
            assert!(meter.owed(after(second)) <= DEBT_MAX, "after {second} s");
        }
        for second in 1000..1100 {
            (0..6).for_each(|_| meter.charge(Duration::from_millis(10), after(second)));
        }
        assert!(meter.owed(after(1100)) > DEBT_MAX);
        // Nothing has to happen for that.
        assert!(meter.owed(after(1110)) <= DEBT_MAX);
    }

    #[test]
    fn one_that_took_an_age_is_borne() {
        let meter = Meter::new();
        for _ in 0..9 {
            assert!(meter.is_bearable());
            meter.charge(Duration::from_secs(60), Instant::now());
        }
        (0..3).for_each(|_| meter.charge(Duration::from_secs(60), Instant::now()));
        assert!(!meter.is_bearable());
    }
}
