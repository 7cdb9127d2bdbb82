//! How many requests the device works on at once.
//!
//! They are capped below the depth the client works at, so that while the device works on some, others are being received,
//! sealed or answered; with all of them at the device at once, device and client take turns idling.

use std::sync::OnceLock;

/// How far below the client's depth the device's is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DepthPolicy {
    /// The share, as numerator and denominator; `None` turns the cap off.
    pub(crate) share: Option<(usize, usize)>,
    /// Below this depth there is no cap: too little to overlap.
    pub(crate) from_depth: usize,
}

impl DepthPolicy {
    /// Two thirds, measured best of 1/2, 2/3 and none with fio at depth 32 on two cores.
    pub(crate) const MEASURED: Self = Self {
        share: Some((2, 3)),
        from_depth: 4,
    };

    /// The policy of this process: [`Self::MEASURED`], unless `VOLD_NBD_DEPTH_CAP` says `off` or another share
    /// (`3/4`), for measurements.
    pub(crate) fn of_process() -> Self {
        static POLICY: OnceLock<DepthPolicy> = OnceLock::new();
        *POLICY.get_or_init(|| {
            let set = std::env::var("VOLD_NBD_DEPTH_CAP").unwrap_or_default();
            if set.is_empty() {
                return Self::MEASURED;
            }
            Self::parse(&set).unwrap_or_else(|| {
                tracing::warn!(
                    "VOLD_NBD_DEPTH_CAP={set:?} is neither \"off\" nor a share like \"2/3\"; ignored"
                );
                Self::MEASURED
            })
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let share = if text == "off" {
            None
        } else {
            let (numerator, denominator) = text.split_once('/')?;
            let (numerator, denominator) = (numerator.parse().ok()?, denominator.parse().ok()?);
            (1 <= numerator && numerator <= denominator && denominator <= 1000).then_some(())?;
            Some((numerator, denominator))
        };
        Some(Self {
            share,
            ..Self::MEASURED
        })
    }
}

/// Follows the depth a client works at: the greatest number of unanswered requests, over this and the last period.
pub(crate) struct DepthCap {
    policy: DepthPolicy,
    greatest: usize,
    greatest_before: usize,
    observed: u32,
}

impl DepthCap {
    /// Requests of one period: long enough to see a client's full depth, short enough to forget it soon.
    const PERIOD: u32 = 128;

    /// No depth seen yet.
    pub(crate) fn new(policy: DepthPolicy) -> Self {
        Self {
            policy,
            greatest: 0,
            greatest_before: 0,
            observed: 0,
        }
    }

    /// A request came in, and with it `depth` are unanswered.
    pub(crate) fn observe(&mut self, depth: usize) {
        self.greatest = self.greatest.max(depth);
        self.observed += 1;
        if self.observed == Self::PERIOD {
            self.greatest_before = self.greatest;
            self.greatest = depth;
            self.observed = 0;
        }
    }

    /// Requests the device may work on at once.
    pub(crate) fn cap(&self) -> usize {
        let depth = self.greatest.max(self.greatest_before);
        match self.policy.share {
            Some((numerator, denominator)) if depth >= self.policy.from_depth => {
                (depth * numerator).div_ceil(denominator).max(1)
            }
            _ => usize::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cap_after(depths: impl IntoIterator<Item = usize>) -> usize {
        let mut cap = DepthCap::new(DepthPolicy::MEASURED);
        depths.into_iter().for_each(|depth| cap.observe(depth));
        cap.cap()
    }

    #[test]
    fn the_cap_is_two_thirds_of_the_greatest_depth_rounded_up() {
        for (depth, cap) in [(4, 3), (5, 4), (6, 4), (8, 6), (32, 22), (64, 43), (256, 171)] {
            assert_eq!(cap_after(1..=depth), cap, "depth {depth}");
        }
    }

    #[test]
    fn shallow_clients_are_not_capped() {
        assert_eq!(cap_after([]), usize::MAX);
        assert_eq!(cap_after([1, 2, 3, 3, 2, 1]), usize::MAX);
    }

    #[test]
    fn a_dip_does_not_lower_the_cap_and_a_lasting_change_does() {
        let period = DepthCap::PERIOD as usize;
        let deep = || std::iter::repeat_n(32, period);
        assert_eq!(cap_after(deep().chain(std::iter::repeat_n(2, period - 1))), 22);
        assert_eq!(cap_after(deep().chain(std::iter::repeat_n(8, 3 * period))), 6);
        // A depth that returns once a period is kept.
        let returning = (0..5 * period).map(|i| if i % period == 7 { 32 } else { 3 });
        assert_eq!(cap_after(returning), 22);
    }

    #[test]
    fn the_share_can_be_set_or_turned_off() {
        let share = |text| DepthPolicy::parse(text).map(|policy| policy.share);
        assert_eq!(share("off"), Some(None));
        assert_eq!(share("1/2"), Some(Some((1, 2))));
        for wrong in ["", "on", "3/2", "0/1", "1/0", "2", "-1/2", "1/2/3"] {
            assert_eq!(share(wrong), None, "{wrong:?}");
        }
        let mut off = DepthCap::new(DepthPolicy::parse("off").unwrap());
        off.observe(200);
        assert_eq!(off.cap(), usize::MAX);
    }
}
