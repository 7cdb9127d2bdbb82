//! Rounds: the power comes, a life begins ([`super::life`]), and ends by itself or by a cut; then the disks are looked at as
//! they lie ([`super::rest`]). Here is what outlives a cut: disks, catalog, and what the oracle knows.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};
use libvol::disk::Disk;
use libvol::disk::sim::{Event, FaultPlan, Media, SimDriver};
use libvol::ids::{InstallationId, StoreId};
use libvol::runtime::{Runtime, sleep};
use libvol::store::{self, FormatOptions};

use super::Report;
use super::catalog::Catalog;
use super::life::Life;
use super::model::{Model, PLAINTEXT_MARK};
use super::plan::{Cut, EXTENT_BYTES, Faults, Plan, Round, Size, stream};
use super::rest::{self, Damages};

/// With faults that volumes cannot answer yet, a life that hangs ends after this much virtual time.
const HORIZON: Duration = Duration::from_secs(5);

/// The engines of all rounds, for their traces.
pub struct Log {
    keep: bool,
    engines: RefCell<Vec<Rc<SimDriver>>>,
}

impl Log {
    /// Keeps traces or not.
    pub fn new(keep: bool) -> Self {
        Self {
            keep,
            engines: RefCell::default(),
        }
    }

    fn add(&self, engine: &Rc<SimDriver>) {
        if self.keep {
            engine.keep_trace();
            self.engines.borrow_mut().push(engine.clone());
        }
    }

    /// The events of each round.
    pub fn lives(&self) -> Vec<Vec<Event>> {
        self.engines
            .borrow()
            .iter()
            .map(|engine| engine.trace())
            .collect()
    }
}

/// What the oracle knows of one volume.
pub type Models = Rc<RefCell<BTreeMap<u32, Model>>>;

/// What a history has counted.
#[derive(Default)]
pub struct Counters {
    /// Requests acknowledged.
    pub acknowledged: Cell<u64>,
    /// Volumes destroyed.
    pub destroyed: Cell<u64>,
    /// A life has recovered everything and the oracle has agreed.
    pub verified: Cell<bool>,
}

/// What one seed's history consists of.
pub struct World {
    seed: u64,
    size: Size,
    faults: Faults,
    plan: Plan,
    media: Vec<Media>,
    stores: Vec<StoreId>,
    catalog: Catalog,
    models: Models,
    damages: Damages,
    log: Rc<Log>,
}

/// Freshly formatted stores, by number of extents and whether their media are zeros.
type Formatted = BTreeMap<(u64, bool), (Vec<Media>, Vec<StoreId>)>;

thread_local! {
    /// Made once.
    static FORMATTED: RefCell<Formatted> = const { RefCell::new(BTreeMap::new()) };
}

/// Most stores of a world.
const STORES_MAX: usize = 3;

fn formatted(plan: &Plan) -> (Vec<Media>, Vec<StoreId>) {
    let key = (plan.extents, plan.zero_filled);
    let (mut media, mut stores) = FORMATTED.with(|made| {
        let made = &mut *made.borrow_mut();
        made.entry(key).or_insert_with(|| format(plan)).clone()
    });
    media.truncate(plan.stores);
    stores.truncate(plan.stores);
    (media, stores)
}

fn format(plan: &Plan) -> (Vec<Media>, Vec<StoreId>) {
    let size_bytes = plan.store_bytes();
    let driver = SimDriver::new(1, vec![Media::zeroed(size_bytes); STORES_MAX]);
    let runtime = Runtime::new(driver.clone());
    let files: Vec<_> = (0..STORES_MAX).map(|slot| driver.file(slot)).collect();
    let zero_filled = plan.zero_filled;
    let stores = runtime.block_on(async move {
        let mut stores = Vec::new();
        for (slot, file) in files.iter().enumerate() {
            let options = FormatOptions {
                installation: InstallationId::NIL,
                name: format!("store-{slot}").parse().expect("a name"),
                zone: format!("zone-{slot}").parse().expect("a name"),
                size_bytes,
                extent_bytes: EXTENT_BYTES,
                zero_filled,
            };
            let disk = Disk::attach(file).expect("simulated");
            stores.push(store::format_simulated(&disk, &options).await.expect("formatted"));
        }
        stores
    });
    drop(runtime);
    (driver.media(), stores)
}

impl World {
    /// The world of a seed, before its first round.
    pub fn new(seed: u64, size: Size, faults: Faults, log: Rc<Log>) -> Self {
        let plan = Plan::new(seed, &faults);
        let (media, stores) = formatted(&plan);
        Self {
            seed,
            size,
            faults,
            plan,
            media,
            stores,
            catalog: Catalog::default(),
            models: Models::default(),
            damages: Damages::default(),
            log,
        }
    }

    /// All rounds.
    ///
    /// # Panics
    /// When a promise is broken.
    pub fn run(mut self) -> Report {
        let mut report = Report::default();
        // The last round was cut, and no recovery has been held to the oracle yet.
        let mut open = false;
        for number in 0..=self.size.rounds {
            let last = number == self.size.rounds;
            let round = Round::new(self.seed, number, last, &self.faults);
            let counters = Rc::new(Counters::default());
            let (cut, hash) = self.round(&round, &counters);
            // Of several cuts before the oracle could agree, only the last one was followed by a full recovery.
            if counters.verified.get() {
                report.crash_points += u64::from(open);
                open = false;
            }
            open |= cut;
            report.rounds += 1;
            report.acknowledged += counters.acknowledged.get();
            report.destroyed += counters.destroyed.get();
            report.trace_hash = report.trace_hash.rotate_left(7) ^ hash;
            self.rest(number, last, &mut report);
        }
        report
    }

    /// One life. Whether the power was cut, and the trace's hash.
    fn round(&mut self, round: &Round, counters: &Rc<Counters>) -> (bool, u64) {
        let driver = SimDriver::new(round.engine_seed, std::mem::take(&mut self.media));
        self.log.add(&driver);
        driver.watch_writes(Some(Box::new(|slot, at, bytes| {
            let leaks = bytes.chunks_exact(16).position(|piece| piece == PLAINTEXT_MARK);
            assert_eq!(leaks, None, "plaintext goes to disk {}, byte {at}", slot.0);
        })));
        self.plan_device_faults(&driver, round);
        if let Cut::AfterStart(calls) = round.cut {
            driver.cut_after_calls(calls);
        }
        let life = Life {
            seed: self.seed,
            size: self.size,
            faults: self.faults,
            plan: self.plan.clone(),
            round: *round,
            driver: driver.clone(),
            stores: self.stores.clone(),
            catalog: self.catalog.clone(),
            models: self.models.clone(),
            counters: counters.clone(),
            off_limits: self.damages.off_limits(),
            damaged_disks: self.damages.disks(),
        };
        let runtime = Runtime::new(driver.clone());
        let (cut, horizon) = (driver.clone(), self.faults.vanishing);
        let ended = runtime.block_on(async move {
            let end = async move {
                match horizon {
                    false => cut.until_cut().await,
                    true => {
                        select(Box::pin(cut.until_cut()), Box::pin(sleep(HORIZON))).await;
                    }
                }
            };
            match select(Box::pin(life.live()), Box::pin(end)).await {
                Either::Left(((), _)) => true,
                Either::Right(_) => false,
            }
        });
        drop(runtime);
        driver.watch_writes(None);
        self.media = match ended {
            true => driver.media(),
            false => driver.media_after_cut(round.unsynced),
        };
        (!ended, driver.trace_hash())
    }

    fn plan_device_faults(&self, driver: &Rc<SimDriver>, round: &Round) {
        let Faults {
            device_errors,
            vanishing,
            ..
        } = self.faults;
        let mut rng = stream(self.seed, "devices", &[u64::from(round.number)]);
        // The last round puts everything right.
        let last = round.number == self.size.rounds;
        if !(device_errors || vanishing) || last || rng.one_in(2) {
            return;
        }
        let rate = |on: bool, n: u64| if on { n } else { 0 };
        let plan = FaultPlan {
            read_errors: rate(device_errors, 300),
            write_errors: rate(device_errors, 100),
            sync_errors: rate(device_errors, 100),
            hangs: rate(vanishing, 400),
            vanishings: rate(vanishing, 400),
            away: Duration::from_millis(1 + rng.below(50)),
            returns_old: rate(vanishing, 4),
            slowness: [1, 1, 20][rng.below(3) as usize],
            budget: 2,
            ..FaultPlan::default()
        };
        let disk = rng.below(self.stores.len() as u64) as usize;
        driver.plan_faults(disk, plan, rng.next_u64());
    }

    /// Nothing runs: looks at the disks, and lets bits flip.
    fn rest(&mut self, number: u32, last: bool, report: &mut Report) {
        let reports = rest::inspect(&self.media);
        self.damages.prune(&self.media);
        rest::check(&self.media, &reports, &self.catalog.records(), &self.damages);
        if last || !(self.faults.device_errors || self.faults.vanishing) {
            rest::check_keys(&self.media, &self.catalog.records());
        }
        if last {
            rest::check_end(&reports, &self.catalog.records());
        }
        let mut rng = stream(self.seed, "flips", &[u64::from(number)]);
        if self.faults.bit_flips && !last && rng.one_in(3) {
            let places = rest::repairable(&reports, &self.catalog.records(), self.seed);
            report.flips += self.damages.flip_some(&mut self.media, &places, &mut rng);
        }
        if self.faults.writes_beside_damage {
            self.damages.forget_limits();
        }
    }
}
