//! What a seed chooses. Every choice has a stream of chance of its own, named by where it is made, so that a smaller history
//! keeps the choices that are left.

use std::fmt;
use std::time::Duration;

use libvol::disk::sim::{self, Rng};
use libvol::limits::BLOCK;
use libvol::volume::Tuning;

/// Blocks of an extent: everything crosses boundaries.
pub const EXTENT_BLOCKS: u64 = 4;
/// Bytes of an extent.
pub const EXTENT_BYTES: u64 = EXTENT_BLOCKS * BLOCK;
/// Most stores of a world.
pub const STORES_MAX: usize = 3;
/// Where data begins on a store.
pub const DATA_AT: u64 = 4 << 20;

/// How large histories are, at most. What shrinking reduces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Volumes at a time.
    pub volumes: u32,
    /// Workers on each.
    pub workers: u32,
    /// Requests of each worker in a round.
    pub requests: u32,
    /// Rounds, each ended by a power cut or a clean close; one more without a cut follows.
    pub rounds: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            volumes: 3,
            workers: 3,
            requests: 8,
            rounds: 12,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            volumes,
            workers,
            requests,
            rounds,
        } = self;
        write!(
            f,
            "{volumes} volumes, {workers} workers, {requests} requests, {rounds} rounds"
        )
    }
}

impl Size {
    /// The options that make the soak run this size.
    pub fn options(&self) -> String {
        let Self {
            volumes,
            workers,
            requests,
            rounds,
        } = self;
        match *self == Self::default() {
            true => String::new(),
            false => {
                format!(" --volumes {volumes} --workers {workers} --requests {requests} --rounds {rounds}")
            }
        }
    }
}

/// Which kinds of faults there are. Power cuts tear, drop and reorder what is not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    /// The power goes at any disk call.
    pub power_cuts: bool,
    /// Bits flip at rest, on one replica of a volume, in blocks of clean extents.
    pub bit_flips: bool,
    /// A round that ends in a cut may also write to an extent with damage that was not found yet. That is more than is
    /// promised: a cut during a write of the damaged block itself leaves no copy that any sum knows.
    pub writes_beside_damage: bool,
    /// Stores too small for their volumes.
    pub full_stores: bool,
    /// Read, write and sync errors on one disk.
    pub device_errors: bool,
    /// One disk hangs, is slow, or goes away and returns.
    pub vanishing: bool,
    /// Writes to one disk get lost or land elsewhere, in rounds that end in peace.
    pub lost_writes: bool,
    /// The zeros that one disk is to overwrite released extents with get lost.
    pub lost_zeros: bool,
    /// The power goes right after a membership has changed.
    pub cuts_at_changes: bool,
    /// Extents are given back and allocated anew while a replica catches up.
    pub churn_beside_resync: bool,
    /// One disk returns as it was some rounds ago.
    pub old_copies: bool,
    /// A power cut does different things to different disks.
    pub cuts_apart: bool,
    /// Histories in which little but a few blocks is written, so that cut follows cut without a sync between.
    pub calm: bool,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            power_cuts: true,
            bit_flips: true,
            writes_beside_damage: false,
            full_stores: true,
            device_errors: true,
            vanishing: true,
            lost_writes: true,
            lost_zeros: true,
            cuts_at_changes: true,
            churn_beside_resync: true,
            old_copies: true,
            cuts_apart: true,
            calm: true,
        }
    }
}

impl Faults {
    /// Those that there were when the first seeds of `tests/tests/simulation.rs` were found: they replay their histories.
    pub fn of_old() -> Self {
        Self {
            lost_zeros: false,
            cuts_at_changes: false,
            churn_beside_resync: false,
            old_copies: false,
            cuts_apart: false,
            calm: false,
            ..Self::default()
        }
    }
}

/// A stream of chance for one purpose.
pub fn stream(seed: u64, purpose: &str, numbers: &[u64]) -> Rng {
    let mut rng = Rng::new(seed);
    let mut mixed = rng.next_u64();
    for number in purpose.bytes().map(u64::from).chain(numbers.iter().copied()) {
        mixed = Rng::new(mixed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).next_u64();
    }
    Rng::new(mixed)
}

/// What holds for a whole history.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Stores.
    pub stores: usize,
    /// Extents of each.
    pub extents: u64,
    /// Whether their media begin as known zeros.
    pub zero_filled: bool,
    /// How volumes are opened.
    pub tuning: Tuning,
    /// Whether there are trims: they make much disappear that could show a mistake.
    pub trims: bool,
    /// The catalog keeps account of the stores' lineage, and old copies of disks may return.
    pub lineage: bool,
    /// Most rounds are calm ([`Round::is_calm`]).
    pub calm: bool,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64, faults: &Faults) -> Self {
        let mut rng = stream(seed, "plan", &[]);
        let roomy = 40;
        let tuning = Tuning {
            dirty_extents_max: [2, 5, 1000][rng.below(3) as usize],
            sum_cache_bytes: [64, 1 << 20][rng.below(2) as usize],
            tick: Duration::from_micros([300, 5000, 1_000_000][rng.below(3) as usize]),
            idle_ticks: 2,
            deadline: Duration::from_millis(400),
            resync_bytes_per_second: [u64::MAX, 20 << 20][rng.below(2) as usize],
            ..Tuning::default()
        };
        let mut flavour = stream(seed, "flavour", &[]);
        let (lineage, calm) = (flavour.one_in(3), flavour.one_in(6));
        Self {
            lineage: faults.old_copies && lineage,
            calm: faults.calm && calm,
            stores: 2 + rng.below(2) as usize,
            extents: match faults.full_stores {
                true => [10, roomy, roomy][rng.below(3) as usize],
                false => roomy,
            },
            zero_filled: !rng.one_in(8),
            tuning,
            trims: !rng.one_in(4),
        }
    }

    /// Bytes of each store.
    pub fn store_bytes(&self) -> u64 {
        DATA_AT + self.extents * EXTENT_BYTES
    }
}

/// When the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Not in this round.
    Never,
    /// So many disk calls after power-on: often before or during recovery.
    AfterStart(u64),
    /// So many disk calls after all volumes were recovered and held to the oracle: in the midst of work.
    AfterRecovery(u64),
}

/// What happens to the one disk that may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// Calls fail.
    Errors,
    /// It goes away, hangs, or is slow.
    Vanishing,
    /// It is not there when the round begins, and comes back after so many milliseconds, if ever in this round.
    Away(Option<u64>),
    /// Writes get lost or land elsewhere.
    Silent,
    /// Zeros of the scrubber get lost.
    LostZeros,
    /// It is there as it was some rounds ago: from the beginning, or, after so many milliseconds away, in the midst of the
    /// round. Only where every volume has a replica in sync elsewhere; else nothing.
    Old(Option<u64>),
}

/// What holds for one round.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Its number.
    pub number: u32,
    /// It ends in peace, and everything is put right.
    pub is_last: bool,
    /// When the power goes.
    pub cut: Cut,
    /// It also goes so many disk calls after a membership has changed.
    pub cut_at_change: Option<u64>,
    /// What the cut does to what is not synced, by disk.
    pub unsynced: [sim::Cut; STORES_MAX],
    /// Seed of the engine.
    pub engine_seed: u64,
    /// What happens to the one disk that may fail.
    pub trouble: Trouble,
    /// Nothing is made, trimmed or destroyed: extents keep their owners.
    pub is_frugal: bool,
    /// Extents are given back and allocated anew while a replica catches up.
    pub churns: bool,
    /// Nobody makes, destroys, flushes, trims or reopens, and only the first blocks of volumes are written.
    pub is_calm: bool,
}

impl Round {
    /// The round of a seed; the last one ends in peace.
    pub fn new(seed: u64, number: u32, is_last: bool, plan: &Plan, faults: &Faults) -> Self {
        let mut rng = stream(seed, "round", &[u64::from(number)]);
        let limit = [40, 150, 500][rng.below(3) as usize];
        let after = 1 + rng.below(limit);
        let cut = match rng.below(8) {
            _ if is_last || !faults.power_cuts => Cut::Never,
            0 => Cut::Never,
            1..=2 => Cut::AfterStart(after),
            _ => Cut::AfterRecovery(after),
        };
        let unsynced = [sim::Cut::random(&mut rng); STORES_MAX];
        let engine_seed = rng.next_u64();
        let away = [None, Some(rng.below(100))][rng.below(2) as usize];
        let trouble = match rng.below(8) {
            _ if is_last => Trouble::None,
            0..=1 if faults.device_errors => Trouble::Errors,
            2..=3 if faults.vanishing => Trouble::Vanishing,
            4 if faults.vanishing => Trouble::Away(away),
            5 if faults.lost_writes => Trouble::Silent,
            6 if faults.lost_zeros => Trouble::LostZeros,
            _ => Trouble::None,
        };
        let is_frugal = trouble == Trouble::Silent;
        let mut rng = stream(seed, "change", &[u64::from(number)]);
        let calls = 1 + rng.below(4);
        let at_change = faults.cuts_at_changes && matches!(cut, Cut::AfterRecovery(_)) && rng.one_in(2);
        let round = Self {
            number,
            is_last,
            // Damage is promised to be found only where its sum is durable: once the volume is closed.
            cut: if is_frugal { Cut::Never } else { cut },
            cut_at_change: (at_change && !is_frugal).then_some(calls),
            unsynced,
            engine_seed,
            trouble,
            is_frugal,
            churns: faults.churn_beside_resync && !is_frugal,
            is_calm: false,
        };
        let mut rng = stream(seed, "newer faults", &[u64::from(number)]);
        round
            .with_old_copy(&mut rng, plan)
            .calmed(&mut rng, plan)
            .cut_apart(&mut rng, faults)
    }

    /// In a quarter of the rounds an old copy, and no other trouble.
    fn with_old_copy(mut self, rng: &mut Rng, plan: &Plan) -> Self {
        let (old, away) = (rng.one_in(4), [None, Some(rng.below(60))][rng.below(2) as usize]);
        if plan.lineage && old && !self.is_last && !self.is_frugal {
            self.trouble = Trouble::Old(away);
        }
        self
    }

    /// Three of four rounds of a calm history are calm, and cut soon; nothing else goes wrong in them.
    fn calmed(mut self, rng: &mut Rng, plan: &Plan) -> Self {
        let (calm, calls) = (!rng.one_in(4), 1 + rng.below(40));
        if plan.calm && calm && !self.is_last && !matches!(self.trouble, Trouble::Old(_)) {
            (self.is_calm, self.is_frugal, self.churns) = (true, false, false);
            self.trouble = Trouble::None;
            self.cut = Cut::AfterRecovery(calls);
            self.cut_at_change = None;
        }
        self
    }

    /// In half of the rounds each disk loses something else.
    fn cut_apart(mut self, rng: &mut Rng, faults: &Faults) -> Self {
        let apart = rng.one_in(2);
        let cuts = std::array::from_fn(|_| sim::Cut::random(rng));
        if faults.cuts_apart && apart {
            self.unsynced = cuts;
        }
        self
    }

    /// Whether all volumes are closed at its end, and no write is cut short.
    pub fn is_peaceful(&self) -> bool {
        self.cut == Cut::Never && matches!(self.trouble, Trouble::None | Trouble::Silent)
    }
}
