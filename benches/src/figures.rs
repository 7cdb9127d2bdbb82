//! Numbers of runs: one sample, medians over rounds, ratios of samples that were taken next to each other.

/// What one run of one load against one server gave.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Requests a second.
    pub iops: f64,
    /// 10^6 bytes a second.
    pub mb_per_s: f64,
    /// Median completion latency, µs.
    pub p50_us: f64,
    /// 99th percentile of completion latency, µs.
    pub p99_us: f64,
    /// The server process' CPU time (user and system) per request, µs; none for loads without a server.
    pub cpu_us: Option<f64>,
}

/// The middle value; the mean of the two middle ones for an even count. Not a number for none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Median of each column.
pub fn medians(samples: &[Sample]) -> Sample {
    let of = |column: fn(&Sample) -> f64| median(samples.iter().map(column));
    let cpu: Vec<f64> = samples.iter().filter_map(|sample| sample.cpu_us).collect();
    Sample {
        iops: of(|s| s.iops),
        mb_per_s: of(|s| s.mb_per_s),
        p50_us: of(|s| s.p50_us),
        p99_us: of(|s| s.p99_us),
        cpu_us: (!cpu.is_empty()).then(|| median(cpu)),
    }
}

/// Ratio of throughputs as (least, median, greatest) over the rounds. Each round compares neighbours in time, so that a
/// disk that slows down during the run slows both.
pub fn ratios(samples: &[Sample], base: &[Sample]) -> Option<(f64, f64, f64)> {
    let each: Vec<f64> = samples
        .iter()
        .zip(base)
        .map(|(sample, base)| sample.iops / base.iops)
        .collect();
    let least = each.iter().copied().reduce(f64::min)?;
    let greatest = each.iter().copied().reduce(f64::max)?;
    Some((least, median(each), greatest))
}

/// A median ratio beside the least that it must be.
#[derive(Clone, Copy, Debug)]
pub struct Verdict {
    /// The load's name.
    pub load: &'static str,
    /// The least.
    pub floor: f64,
    /// What was measured.
    pub ratio: f64,
}

impl Verdict {
    /// Whether the floor is reached. Nothing measured reaches none.
    pub fn met(&self) -> bool {
        self.ratio >= self.floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(iops: f64, cpu_us: Option<f64>) -> Sample {
        Sample {
            iops,
            mb_per_s: iops * 2.0,
            p50_us: 1.0,
            p99_us: 2.0,
            cpu_us,
        }
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_middle_values() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median([]).is_nan());
    }

    #[test]
    fn columns_are_taken_apart_and_missing_cpu_stays_missing() {
        let with = [
            sample(1.0, Some(9.0)),
            sample(5.0, Some(1.0)),
            sample(3.0, Some(2.0)),
        ];
        let middle = medians(&with);
        assert_eq!(
            (middle.iops, middle.mb_per_s, middle.cpu_us),
            (3.0, 6.0, Some(2.0))
        );
        assert_eq!(medians(&[sample(1.0, None)]).cpu_us, None);
    }

    #[test]
    fn a_floor_is_met_by_itself_and_by_more_and_not_by_nothing() {
        for (ratio, met) in [(1.19, false), (1.2, true), (3.0, true), (f64::NAN, false)] {
            let verdict = Verdict {
                load: "",
                floor: 1.2,
                ratio,
            };
            assert_eq!(verdict.met(), met, "{ratio}");
        }
    }

    #[test]
    fn ratios_compare_each_round_with_its_own_base() {
        let (fast, slow) = (
            [sample(20.0, None), sample(30.0, None)],
            [sample(10.0, None), sample(10.0, None)],
        );
        assert_eq!(ratios(&fast, &slow), Some((2.0, 2.5, 3.0)));
        assert_eq!(ratios(&[], &[]), None);
    }
}
