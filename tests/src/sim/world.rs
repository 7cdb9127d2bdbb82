//! Rounds: the power comes, a life begins ([`super::life`]), and ends by itself or by a cut; then the disks are looked at as
//! they lie ([`super::rest`]). Here is what outlives a cut: disks, catalog, and what the oracle knows.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};
use libvol::disk::Disk;
use libvol::disk::sim::{Event, FaultPlan, Media, Silent, SimDriver, SimFile};
use libvol::ids::{InstallationId, StoreId};
use libvol::limits::SECTOR_SIZE;
use libvol::runtime::{Runtime, sleep, spawn};
use libvol::store::{self, FormatOptions};

use super::Report;
use super::catalog::{self, CHANGE_MAX, Catalog, Entry, Phase};
use super::lies::allow_lost_zeros;
use super::life::Life;
use super::model::{Model, PLAINTEXT_MARK};
use super::plan::{Cut, EXTENT_BYTES, Faults, Plan, Round, STORES_MAX, Size, Trouble, stream};
use super::rest::{self, Damages};

/// No life takes longer than this, in virtual time.
const LIFE_MAX: Duration = Duration::from_secs(600);

/// Changes of the catalog that a life makes at least, as a rule.
const CHANGES: u64 = 6;

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
    /// The one disk that may fail, as long as it is not all right again.
    bad: usize,
    /// Something has gone wrong with it, and is not put right yet.
    troubled: bool,
    changes_cut: u64,
    /// Disks as they were some rounds ago.
    copies: [Option<Media>; STORES_MAX],
    log: Rc<Log>,
}

/// Sectors that silent damage was done to: disk, byte offset, bytes.
type Silently = Rc<RefCell<Vec<(usize, u64, Vec<u8>)>>>;

/// New catalogs, by number of extents, whether media are zeros, and number of stores.
type Catalogs = BTreeMap<(u64, bool, usize), SimFile>;

/// Freshly formatted stores, by number of extents and whether their media are zeros.
type Formatted = BTreeMap<(u64, bool), (Vec<Media>, Vec<StoreId>)>;

thread_local! {
    /// Made once.
    static FORMATTED: RefCell<Formatted> = const { RefCell::new(BTreeMap::new()) };
    static CATALOGS: RefCell<Catalogs> = const { RefCell::new(BTreeMap::new()) };
}

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

fn new_catalog(seed: u64, plan: &Plan, stores: &[StoreId]) -> Catalog {
    let key = (plan.extents, plan.zero_filled, stores.len());
    let file = CATALOGS.with(|made| {
        let made = &mut *made.borrow_mut();
        let file = made
            .entry(key)
            .or_insert_with(|| catalog::formatted(stores, plan.extents));
        file.clone()
    });
    Catalog::new(&file, stores.to_vec(), stream(seed, "catalog", &[]))
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
    ///
    /// # Panics
    /// When its catalog does not open.
    pub fn new(seed: u64, size: Size, faults: Faults, log: Rc<Log>) -> Self {
        let plan = Plan::new(seed, &faults);
        let (media, stores) = formatted(&plan);
        Self {
            seed,
            size,
            faults,
            media,
            catalog: new_catalog(seed, &plan, &stores),
            plan,
            stores,
            models: Models::default(),
            damages: Damages::default(),
            bad: 0,
            troubled: false,
            changes_cut: 0,
            copies: Default::default(),
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
            let round = Round::new(self.seed, number, last, &self.plan, &self.faults);
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
        report.changes_cut = self.changes_cut;
        report.old_copies = self.catalog.records().returns;
        report.trace_hash ^= self.catalog.trace_hash();
        report
    }

    /// One life. Whether the power was cut, and the trace's hash.
    fn round(&mut self, round: &Round, counters: &Rc<Counters>) -> (bool, u64) {
        let old_copy = self.choose_bad(round);
        let silent = self.plan_silent(round);
        let mut old_copy = old_copy.and_then(|copy| self.return_old(round, copy));
        let driver = SimDriver::new(round.engine_seed, std::mem::take(&mut self.media));
        self.log.add(&driver);
        driver.watch_writes(Some(Box::new(|slot, at, bytes| {
            let leaks = bytes.chunks_exact(16).position(|piece| piece == PLAINTEXT_MARK);
            assert_eq!(leaks, None, "plaintext goes to disk {}, byte {at}", slot.0);
        })));
        let returns = self.plan_trouble(&driver, round, old_copy.is_some());
        let silently = silent.map(|extents| allow_silent(&driver, extents));
        if round.trouble == Trouble::LostZeros {
            allow_lost_zeros(&driver);
        }
        if let Cut::AfterStart(calls) = round.cut {
            driver.cut_after_calls(calls);
        }
        let life = Life {
            seed: self.seed,
            size: self.size,
            plan: self.plan.clone(),
            round: *round,
            driver: driver.clone(),
            stores: self.stores.clone(),
            catalog: self.catalog.clone(),
            models: self.models.clone(),
            counters: counters.clone(),
            off_limits: match round.is_peaceful() {
                true => BTreeSet::new(),
                false => self.damages.off_limits(),
            },
            damaged_disks: match round.trouble {
                Trouble::Silent => BTreeSet::from([self.bad]),
                _ => self.damages.disks(),
            },
        };
        let change_cut = self.plan_change_cut(&driver, round);
        let runtime = Runtime::new(driver.clone());
        let catalog = self.catalog.clone();
        let (cut, bad, may_hang) = (driver.clone(), self.bad, round.trouble == Trouble::Vanishing);
        let ended = runtime.block_on(async move {
            if let Some(change_cut) = change_cut {
                spawn(change_cut).detach();
            }
            if let Some(after) = returns {
                let (driver, catalog) = (cut.clone(), catalog.clone());
                let back = async move {
                    sleep(after).await;
                    if old_copy.is_some() {
                        catalog.records().returned_as_old(bad);
                    }
                    driver.bring_back(bad, old_copy.take());
                };
                spawn(back).detach();
            }
            let end = async move {
                match select(Box::pin(cut.until_cut()), Box::pin(sleep(LIFE_MAX))).await {
                    Either::Left(_) => {}
                    Either::Right(_) => panic!("a life does not end"),
                }
            };
            match select(Box::pin(life.live()), Box::pin(end)).await {
                Either::Left((by_itself, _)) => {
                    assert!(by_itself || may_hang, "a store does not close");
                    true
                }
                Either::Right(_) => false,
            }
        });
        drop(runtime);
        driver.watch_writes(None);
        driver.allow_silent(None);
        match ended {
            true => {
                self.media = driver.media_after_exit();
                self.catalog.end_process();
            }
            false => {
                self.media = driver.media_after_cuts(|disk| round.unsynced[disk]);
                self.changes_cut += u64::from(self.catalog.lose_power(round.unsynced[0]));
            }
        }
        for (disk, at, bytes) in silently.map(|list| list.take()).unwrap_or_default() {
            self.add_damage(disk, at, &bytes);
        }
        (!ended, driver.trace_hash())
    }

    /// One disk at a time may fail; the next one only when it is all right again. With the old copy of it that returns.
    fn choose_bad(&mut self, round: &Round) -> Option<Media> {
        let mut records = self.catalog.records();
        let settled = |entry: &Entry| entry.phase == Phase::Ready && entry.is_whole();
        let is_over = records.faults.is_empty() && records.live.values().all(settled);
        // The catalog has not heard of an old copy that nobody has opened.
        self.troubled &= !is_over || records.returned_old.is_some();
        if !self.troubled && self.damages.is_empty() {
            let mut rng = stream(self.seed, "bad", &[u64::from(round.number)]);
            self.bad = rng.below(self.stores.len() as u64) as usize;
        }
        let is_mirrored = |entry: &Entry| entry.in_sync().iter().any(|disk| *disk != self.bad);
        let mut ready = records.live.values().filter(|entry| entry.phase == Phase::Ready);
        let old_copy = match round.trouble {
            Trouble::Old(_) if self.damages.is_empty() && ready.all(is_mirrored) => {
                self.copies[self.bad].clone()
            }
            _ => None,
        };
        self.troubled |= match round.trouble {
            Trouble::Errors | Trouble::Vanishing | Trouble::Away(_) | Trouble::LostZeros => true,
            Trouble::Old(_) => old_copy.is_some(),
            Trouble::None | Trouble::Silent => false,
        };
        records.suspect = self.troubled.then_some(self.bad);
        drop(records);
        if round.is_last {
            // The operator has looked at the device.
            self.catalog.clear_faults();
        }
        old_copy
    }

    /// An old copy returns before the round, or is to return in it: then it is given back.
    fn return_old(&mut self, round: &Round, copy: Media) -> Option<Media> {
        match round.trouble {
            Trouble::Old(Some(_)) => Some(copy),
            _ => {
                self.media[self.bad] = copy;
                self.catalog.records().returned_as_old(self.bad);
                None
            }
        }
    }

    /// In a quarter of the rounds with a cut, the power may go sooner: while the catalog is being changed.
    fn plan_change_cut(
        &self,
        driver: &Rc<SimDriver>,
        round: &Round,
    ) -> Option<impl Future<Output = ()> + 'static + use<>> {
        let mut rng = stream(self.seed, "change cut", &[u64::from(round.number)]);
        if round.cut == Cut::Never || !rng.one_in(4) {
            return None;
        }
        let ran = self.catalog.await_change(rng.below(CHANGES));
        let (driver, after) = (driver.clone(), rng.below(CHANGE_MAX.as_micros() as u64 / 3));
        Some(async move {
            if ran.await.is_ok() {
                sleep(Duration::from_micros(after)).await;
                driver.cut_now();
            }
        })
    }

    /// What goes wrong with the bad disk. If it is away, when it comes back.
    fn plan_trouble(&self, driver: &Rc<SimDriver>, round: &Round, returns_old: bool) -> Option<Duration> {
        let mut rng = stream(self.seed, "devices", &[u64::from(round.number)]);
        let away = Duration::from_millis(1 + rng.below(50));
        let kind = rng.below(3);
        let rate = |kinds: &[u64], n: u64| if kinds.contains(&kind) { n } else { 0 };
        let plan = match round.trouble {
            Trouble::None => return None,
            Trouble::Errors => FaultPlan {
                read_errors: rate(&[0, 1], 60),
                write_errors: rate(&[0, 2], 60),
                sync_errors: rate(&[0, 2], 30),
                slowness: [1, 1, 5][rng.below(3) as usize],
                budget: 1 + rng.below(3) as u32,
                ..FaultPlan::default()
            },
            Trouble::Vanishing => FaultPlan {
                hangs: rate(&[0], 200),
                vanishings: rate(&[1], 200),
                away,
                slowness: if kind == 2 { 10 } else { 1 },
                budget: 1,
                ..FaultPlan::default()
            },
            Trouble::Away(returns) => {
                driver.vanish(self.bad);
                return returns.map(Duration::from_millis);
            }
            Trouble::Old(Some(after)) if returns_old => {
                driver.vanish(self.bad);
                return Some(Duration::from_millis(after));
            }
            Trouble::Old(_) => return None,
            Trouble::LostZeros => FaultPlan {
                lost_writes: 2,
                budget: 1 + rng.below(3) as u32,
                ..FaultPlan::default()
            },
            Trouble::Silent => FaultPlan {
                lost_writes: rate(&[0, 1], 20),
                misdirected_writes: rate(&[0, 2], 20),
                budget: 1 + rng.below(3) as u32,
                ..FaultPlan::default()
            },
        };
        driver.plan_faults(self.bad, plan, rng.next_u64());
        None
    }

    /// Where silent damage may be done in this round: byte ranges of the bad disk whose extents are mirrored.
    fn plan_silent(&self, round: &Round) -> Option<Vec<Range<u64>>> {
        (round.trouble == Trouble::Silent).then(|| {
            let reports = rest::inspect(&self.media);
            let records = self.catalog.records();
            let extents = rest::mirrored(self.bad, &reports, &records);
            let ranges = extents
                .iter()
                .map(|(.., extent)| extent.at..extent.at + EXTENT_BYTES);
            ranges.collect()
        })
    }

    fn add_damage(&mut self, disk: usize, at: u64, bytes: &[u8]) {
        let reports = rest::inspect(&self.media[..]);
        let records = self.catalog.records();
        let extents = rest::mirrored(disk, &reports, &records);
        let here = extents
            .iter()
            .find(|(.., extent)| (extent.at..extent.at + EXTENT_BYTES).contains(&at));
        let owner = here.map(|(number, logical, _)| (*number, *logical));
        for (i, sector) in bytes.chunks_exact(SECTOR_SIZE).enumerate() {
            let bytes = sector.try_into().expect("a sector");
            let at = at + (i * SECTOR_SIZE) as u64;
            self.damages.add(disk, at, bytes, owner);
        }
    }

    /// Nothing runs: looks at the disks, and lets bits flip.
    fn rest(&mut self, number: u32, last: bool, report: &mut Report) {
        let reports = rest::inspect(&self.media);
        self.damages.prune(&self.media);
        rest::check(&self.media, &reports, &self.catalog.records(), &self.damages);
        rest::check_keys(&self.media, &self.catalog.records(), last);
        if last {
            rest::check_end(&reports, &self.catalog.records());
        }
        let mut rng = stream(self.seed, "flips", &[u64::from(number)]);
        if self.faults.bit_flips && !last && rng.one_in(3) {
            let places = rest::repairable(self.bad, &reports, &self.catalog.records());
            let media = &mut self.media[self.bad];
            report.flips += self.damages.flip_some(self.bad, media, &places, &mut rng);
        }
        if self.faults.writes_beside_damage {
            self.damages.forget_limits();
        }
        let mut rng = stream(self.seed, "copies", &[u64::from(number)]);
        if self.plan.lineage && self.damages.is_empty() && rng.one_in(3) {
            let disk = rng.below(self.media.len() as u64) as usize;
            self.copies[disk] = Some(self.media[disk].clone());
        }
    }
}

/// Lets silent damage be done within `extents`, and writes down where it was.
fn allow_silent(driver: &SimDriver, extents: Vec<Range<u64>>) -> Silently {
    let list = Silently::default();
    let noted = list.clone();
    driver.allow_silent(Some(Box::new(move |slot, silent, media, data| {
        let within = |at: u64, len: usize| {
            let end = at + len as u64;
            extents
                .iter()
                .any(|extent| extent.start <= at && end <= extent.end)
        };
        let old = |at: u64, len: usize| {
            let mut old = vec![0; len];
            media.read(at, &mut old);
            old
        };
        let note = |at: u64, bytes: Vec<u8>| noted.borrow_mut().push((slot.0 as usize, at, bytes));
        match silent {
            Silent::Lost { at, len } if within(at, len) => note(at, old(at, len)),
            Silent::Misdirected { at, len, to } if within(at, len) && within(to, len) => {
                note(at, old(at, len));
                note(to, data.to_vec());
            }
            // Which bit is not told: flips are done at rest.
            _ => return false,
        }
        true
    })));
    list
}
