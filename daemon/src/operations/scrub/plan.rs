//! Which volume is scrubbed next, and how fast: arithmetic only.
//!
//! A volume is *due* one period after its last pass began, or after its creation; so passes spread over the period by
//! themselves, and no byte waits longer than two periods. A pass that the operator asked for goes before all that are due,
//! one that was interrupted before those that have not begun.

use std::time::Duration;

use libvol::catalog::{ScrubPass, ScrubRecord, VolumeRecord};
use libvol::ids::VolumeId;

/// Least that is verified a second without being asked: a small installation is through in hours, and one large volume
/// in no more than its period.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// Most that is verified with one call to a shard: a fraction of a second on any disk, so that a stop or a new request
/// does not wait.
const SLICE_BYTES_MAX: u64 = 16 << 20;

/// What the operator has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScrubSettings {
    /// The period of every volume's passes; `None`: only what is asked for.
    pub(crate) period: Option<Duration>,
    /// Bytes a second, on all replicas together, of passes nobody asked for; `None`: what the period takes.
    pub(crate) bytes_per_second: Option<u64>,
}

impl Default for ScrubSettings {
    /// Everything once in 14 days.
    fn default() -> Self {
        Self {
            period: Some(Duration::from_secs(14 * 86_400)),
            bytes_per_second: None,
        }
    }
}

impl ScrubSettings {
    /// Bytes a second with which `stored_bytes` (of all volumes, on all replicas) are verified once a period.
    pub(super) fn background_rate(&self, stored_bytes: u64) -> u64 {
        let fits = |period: Duration| stored_bytes.div_ceil(period.as_secs().max(1));
        self.bytes_per_second
            .unwrap_or_else(|| self.period.map_or(0, fits).max(BYTES_PER_SECOND_MIN))
    }
}

/// How much is verified before the next look around, at that rate (`None`: as fast as it goes).
pub(super) fn slice_bytes(bytes_per_second: Option<u64>) -> u64 {
    bytes_per_second.map_or(SLICE_BYTES_MAX, |rate| rate.clamp(1, SLICE_BYTES_MAX))
}

/// How long to rest after `bytes` took `took`.
pub(super) fn rest(bytes: u64, bytes_per_second: Option<u64>, took: Duration) -> Duration {
    let Some(rate) = bytes_per_second else {
        return Duration::ZERO;
    };
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).saturating_sub(took)
}

/// A pass that has verified nothing yet.
pub(super) fn new_pass(record: Option<&ScrubRecord>, requested: bool, now_unix_seconds: u64) -> ScrubPass {
    let earlier = record.and_then(|record| record.current.as_ref().or(record.last.as_ref()));
    ScrubPass {
        number: 1 + earlier.map_or(0, |pass| pass.number),
        requested,
        bytes_per_second: None,
        started_unix_seconds: now_unix_seconds,
        finished_unix_seconds: None,
        cursor: 0,
        total_bytes: 0,
        verified_bytes: 0,
        healed_blocks: 0,
        healed_areas: 0,
        lost_blocks: 0,
    }
}

/// Whose turn it is, if anybody's.
pub(super) fn next<'a>(
    volumes: impl Iterator<Item = (&'a VolumeRecord, Option<&'a ScrubRecord>)>,
    settings: &ScrubSettings,
    now_unix_seconds: u64,
) -> Option<VolumeId> {
    let turn = |(volume, record): (&'a VolumeRecord, Option<&'a ScrubRecord>)| {
        let current = record.and_then(|record| record.current.as_ref());
        let (rank, since) = match (current, settings.period) {
            (Some(pass), _) if pass.requested => (0, pass.started_unix_seconds),
            (_, None) => return None,
            (Some(pass), Some(_)) => (1, pass.started_unix_seconds),
            (None, Some(period)) => {
                let last = record.and_then(|record| record.last.as_ref());
                let began = last.map_or(0, |pass| pass.started_unix_seconds);
                let due = began.max(volume.created_unix_seconds) + period.as_secs();
                (now_unix_seconds >= due).then_some((2, due))?
            }
        };
        Some(((rank, since, &volume.path), volume.id))
    };
    let first = volumes.filter_map(turn).min_by_key(|(turn, _)| *turn);
    first.map(|(_, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::catalog::Phase;
    use libvol::ids::{CustomerId, DatasetId, Epoch};

    const DAY: u64 = 86_400;

    fn volume(name: &str, created_unix_seconds: u64) -> VolumeRecord {
        VolumeRecord {
            id: VolumeId::random(),
            path: format!("acme/{name}").parse().unwrap(),
            customer: CustomerId::random(),
            dataset: DatasetId::random(),
            size_bytes: 1 << 30,
            replicas: Vec::new(),
            replicas_wanted: 0,
            membership_epoch: Epoch(1),
            attachment_epoch: Epoch(0),
            phase: Phase::Ready,
            created_unix_seconds,
        }
    }

    fn record(volume: &VolumeRecord, current: Option<(bool, u64)>, last: Option<u64>) -> ScrubRecord {
        ScrubRecord {
            volume: volume.id,
            current: current.map(|(requested, started)| new_pass(None, requested, started)),
            last: last.map(|started| new_pass(None, false, started)),
        }
    }

    #[test]
    fn the_default_rate_verifies_everything_once_in_fourteen_days_and_never_crawls() {
        let settings = ScrubSettings::default();
        // 20 TiB in 1,209,600 s are 18,179,755.75 a second.
        assert_eq!(settings.background_rate(20 << 40), 18_179_756);
        assert!(settings.background_rate(20 << 40) * 14 * DAY >= 20 << 40);
        for small in [0, 1, 100 << 30, 1 << 40] {
            assert_eq!(settings.background_rate(small), 1 << 20, "{small}");
        }
        let weekly = ScrubSettings {
            period: Some(Duration::from_secs(7 * DAY)),
            ..settings
        };
        assert_eq!(weekly.background_rate(20 << 40), 36_359_512);
        let fixed = ScrubSettings {
            bytes_per_second: Some(5000),
            ..settings
        };
        assert_eq!(fixed.background_rate(u64::MAX), 5000);
    }

    #[test]
    fn a_rest_makes_up_for_what_was_faster_than_the_rate() {
        let ms = Duration::from_millis;
        assert_eq!(rest(1 << 20, Some(1 << 20), ms(0)), ms(1000));
        assert_eq!(rest(2 << 20, Some(1 << 20), ms(300)), ms(1700));
        assert_eq!(
            rest(1 << 20, Some(1 << 20), ms(5000)),
            ms(0),
            "slower than the rate"
        );
        assert_eq!(rest(u64::MAX, None, ms(0)), ms(0));
        assert!(
            rest(u64::MAX, Some(1), ms(0)) > ms(u64::from(u32::MAX)),
            "no overflow"
        );
        assert_eq!(slice_bytes(None), 16 << 20);
        assert_eq!(slice_bytes(Some(3 << 20)), 3 << 20, "a second's worth");
        assert_eq!(slice_bytes(Some(1 << 40)), 16 << 20);
        assert_eq!(slice_bytes(Some(0)), 1);
    }

    #[test]
    fn requests_go_first_then_interrupted_passes_then_what_is_due_longest() {
        let settings = ScrubSettings::default();
        let [a, b, c, d] = [("a", 0), ("b", 5), ("c", 0), ("d", 9)].map(|(name, at)| volume(name, at));
        let fresh = record(&c, None, Some(3 * DAY));
        let mut all = vec![(&a, None), (&b, None), (&c, Some(&fresh)), (&d, None)];
        let next_at =
            |all: &[(&VolumeRecord, Option<&ScrubRecord>)], now| next(all.iter().copied(), &settings, now);
        assert_eq!(next_at(&all, 14 * DAY - 1), None, "nothing is due");
        assert_eq!(next_at(&all, 14 * DAY), Some(a.id), "a period after its creation");
        assert_eq!(next_at(&all[1..], 17 * DAY), Some(b.id));
        assert_eq!(next_at(&all[2..3], 17 * DAY - 1), None);
        assert_eq!(
            next_at(&all[2..3], 17 * DAY),
            Some(c.id),
            "a period after its last pass began"
        );
        let interrupted = record(&b, Some((false, 2 * DAY)), None);
        all[1] = (&b, Some(&interrupted));
        assert_eq!(next_at(&all, 20 * DAY), Some(b.id));
        let (later, earlier) = (
            record(&c, Some((true, 9)), None),
            record(&d, Some((true, 8)), None),
        );
        (all[2], all[3]) = ((&c, Some(&later)), (&d, Some(&earlier)));
        assert_eq!(next_at(&all, 20 * DAY), Some(d.id), "first come, first served");
    }

    #[test]
    fn without_a_period_only_requests_are_served() {
        let settings = ScrubSettings {
            period: None,
            bytes_per_second: None,
        };
        let (a, b) = (volume("a", 0), volume("b", 0));
        let interrupted = record(&a, Some((false, 1)), None);
        let requested = record(&b, Some((true, 2)), None);
        let both = [(&a, Some(&interrupted)), (&b, Some(&requested))];
        assert_eq!(next(both.into_iter(), &settings, 99 * DAY), Some(b.id));
        assert_eq!(next(both[..1].iter().copied(), &settings, 99 * DAY), None);
    }

    #[test]
    fn passes_are_numbered_through() {
        let a = volume("a", 0);
        assert_eq!(new_pass(None, true, 1).number, 1);
        let mut record = record(&a, None, Some(1));
        assert_eq!(new_pass(Some(&record), true, 2).number, 2);
        record.current = Some(new_pass(Some(&record), false, 2));
        assert_eq!(new_pass(Some(&record), true, 3).number, 3);
    }
}
