//! One round's life: what a daemon does from its start to its end. Stores open, what a cut has left of creations and
//! destructions is finished, volumes open and are held to the oracle, workers work, volumes are made, grown, reopened and
//! destroyed meanwhile, replicas are dropped and brought back, and all is closed. The power may go at any disk call.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, join, select};
use libvol::disk::sim::{Rng, SimDriver};
use libvol::error::{Error, Kind};
use libvol::ids::StoreId;
use libvol::limits::{BLOCK_SIZE, SECTOR_SIZE};
use libvol::runtime::{Task, sleep, spawn, timeout};
use libvol::store::VolumeState;
use libvol::volume::Volume;

use super::catalog::{Catalog, Entry, Phase};
use super::plan::{Cut, Plan, Round, Size, stream};
use super::stores::Open;
use super::world::{Counters, Models};

/// Sectors of a block.
pub const BLOCK_SECTORS: usize = BLOCK_SIZE / SECTOR_SIZE;
/// Longest that anything may take where no call hangs: time is virtual, and nothing waits for so long.
pub const STUCK: Duration = Duration::from_secs(10);

/// A life, and what it works with.
pub struct Life {
    /// The history's seed.
    pub seed: u64,
    /// Its size.
    pub size: Size,
    /// What holds for the history.
    pub plan: Plan,
    /// What holds for the round.
    pub round: Round,
    /// The machine.
    pub driver: Rc<SimDriver>,
    /// Ids of the stores, by disk.
    pub stores: Vec<StoreId>,
    /// The catalog.
    pub catalog: Catalog,
    /// What the oracle knows.
    pub models: Models,
    /// What is counted.
    pub counters: Rc<Counters>,
    /// Damaged extents (volume, logical extent) that are not written in this round.
    pub off_limits: BTreeSet<(u32, u32)>,
    /// Disks with damage on them.
    pub damaged_disks: BTreeSet<usize>,
}

/// A life under way.
pub struct Running {
    /// What it was given.
    pub life: Life,
    /// Stores in use, by disk.
    pub(super) seats: Vec<RefCell<Option<Open>>>,
    /// Disks whose stores were closed and did not end: their files are still locked.
    pub(super) unclosed: RefCell<BTreeSet<usize>>,
    /// Volumes that are open.
    pub(super) volumes: RefCell<BTreeMap<u32, Rc<Volume>>>,
    /// Volumes that somebody opens, closes or changes.
    locked: RefCell<BTreeSet<u32>>,
}

/// The right to open, close or change a volume.
pub(super) struct VolumeLock<'a>(&'a Running, u32);

impl Drop for VolumeLock<'_> {
    fn drop(&mut self) {
        self.0.locked.borrow_mut().remove(&self.1);
    }
}

impl Life {
    /// Lives. Whether it ended by itself: else the process was killed with a call that hangs.
    ///
    /// # Panics
    /// When a promise is broken.
    pub async fn live(self) -> bool {
        let disks = self.stores.len();
        let running = Rc::new(Running {
            life: self,
            seats: std::iter::repeat_with(RefCell::default).take(disks).collect(),
            unclosed: RefCell::default(),
            volumes: RefCell::default(),
            locked: RefCell::default(),
        });
        running.open_stores().await;
        {
            let background = join(running.watch_stores(), running.watch_replicas());
            let work = running.clone().run();
            match select(Box::pin(work), Box::pin(background)).await {
                Either::Left(((), _)) => {}
                Either::Right(_) => unreachable!("it looks for ever"),
            }
        }
        running.close_stores().await
    }
}

impl Running {
    async fn run(self: Rc<Self>) {
        self.check_stores().await;
        let entries: Vec<Entry> = self.life.catalog.records().live.values().cloned().collect();
        let mut tasks: Vec<Task<()>> = Vec::new();
        let mut verified: Vec<Task<bool>> = Vec::new();
        let mut volumes = Vec::new();
        for entry in entries {
            let running = self.clone();
            match entry.phase {
                Phase::Creating => tasks.push(spawn(async move { running.roll_back(&entry).await })),
                Phase::Destroying => tasks.push(spawn(async move { running.destroy(entry.number).await })),
                Phase::Ready => volumes.push(entry),
            }
        }
        let mut working = Vec::new();
        for entry in volumes {
            let running = self.clone();
            let (told, verdict) = futures_channel::oneshot::channel();
            verified.push(spawn(async move { verdict.await.unwrap_or(false) }));
            working.push(spawn(async move { running.serve(entry, Some(told)).await }));
        }
        // Half of the time workers begin before all volumes have been looked at.
        let running = self.clone();
        let oracle = spawn(async move {
            let mut all = !verified.is_empty();
            for verdict in verified {
                all &= verdict.await;
            }
            running.life.counters.verified.set(all);
            if let Cut::AfterRecovery(calls) = running.life.round.cut {
                running.life.driver.cut_after_calls(calls);
            }
        });
        let mut rng = self.rng("create", 0);
        let live = self.life.catalog.records().live.len() as u32;
        for _ in live..self.life.size.volumes {
            let makes = !self.life.round.is_frugal && !self.life.round.is_calm;
            if makes && !rng.one_in(3) {
                let running = self.clone();
                let seed = rng.next_u64();
                tasks.push(spawn(async move { running.create(Rng::new(seed)).await }));
            }
        }
        oracle.await;
        for task in tasks.into_iter().chain(working) {
            task.await;
        }
        if self.life.round.is_last {
            self.until_scrubbed().await;
        }
    }

    pub(super) fn rng(&self, purpose: &str, number: u32) -> Rng {
        let numbers = [u64::from(self.life.round.number), u64::from(number)];
        stream(self.life.seed, purpose, &numbers)
    }

    /// An open volume.
    pub(super) fn volume(&self, number: u32) -> Option<Rc<Volume>> {
        self.volumes.borrow().get(&number).cloned()
    }

    pub(super) async fn lock(&self, number: u32) -> VolumeLock<'_> {
        while !self.locked.borrow_mut().insert(number) {
            sleep(Duration::from_micros(50)).await;
        }
        VolumeLock(self, number)
    }

    /// Whether a replica in sync is on a disk that does not fail: then every request must be answered.
    pub(super) fn must_answer(&self, number: u32) -> bool {
        let records = self.life.catalog.records();
        let entry = records.live.get(&number);
        entry.is_some_and(|entry| entry.in_sync().iter().any(|disk| records.suspect != Some(*disk)))
    }

    /// An error of a volume, which may only come when all of its replicas in sync are on the disk that fails.
    pub(super) fn tolerate(&self, number: u32, error: &Error) {
        let device = matches!(error.kind(), Kind::Io | Kind::Unavailable);
        assert!(
            device && !self.must_answer(number),
            "volume {number}: {:?}: {error}",
            error.kind()
        );
    }

    /// An error of a store, which may only come from the disk that fails.
    pub(super) fn tolerate_on(&self, disk: usize, error: &Error) {
        let suspect = self.life.catalog.records().suspect;
        assert_eq!(suspect, Some(disk), "disk {disk}: {:?}: {error}", error.kind());
    }

    /// What is asked of a store, given up when its disk hangs.
    ///
    /// # Errors
    /// The store's; `Busy` when it hangs.
    pub(super) async fn patiently<T>(
        &self,
        disk: usize,
        asked: impl Future<Output = libvol::Result<T>>,
    ) -> libvol::Result<T> {
        match timeout(STUCK, asked).await {
            Some(result) => result,
            None => {
                assert!(
                    self.life.driver.hangs(disk),
                    "disk {disk}: a request does not end"
                );
                Err(Error::busy("it hangs"))
            }
        }
    }

    /// Whether a disk is an old copy on which not everything that is gone could be destroyed again.
    fn is_still_old(&self, disk: usize) -> bool {
        self.life.catalog.records().returned_old == Some(disk)
    }

    /// Whether a disk that was an old copy may not know the volume: a copy of all of it is still to come.
    pub(super) fn lacks(&self, disk: usize, entry: &Entry) -> bool {
        let was_old = self.life.catalog.records().ever_old.contains(&disk);
        was_old && !entry.in_sync().contains(&disk)
    }

    /// What stores say of volumes agrees with the catalog; nothing that is gone comes back.
    async fn check_stores(&self) {
        let (live, gone): (Vec<Entry>, Vec<Entry>) = {
            let records = self.life.catalog.records();
            (
                records.live.values().cloned().collect(),
                records.gone.values().cloned().collect(),
            )
        };
        let ever_old = self.life.catalog.records().ever_old.clone();
        for disk in 0..self.seats.len() {
            let Some(open) = self.seat(disk) else { continue };
            if self.is_still_old(disk) {
                continue;
            }
            match open.handle.volumes().await {
                Ok(volumes) => volumes.iter().for_each(|volume| {
                    assert!(
                        live.iter().any(|entry| entry.id() == *volume),
                        "store {disk} has volume {volume}, which is gone or never was"
                    );
                }),
                Err(error) => self.tolerate_on(disk, &error),
            }
        }
        for entry in live.iter().filter(|entry| entry.phase == Phase::Ready) {
            for disk in &entry.replicas {
                let Some(open) = self.seat(*disk) else { continue };
                match open.handle.volume(entry.id()).await {
                    Ok(VolumeState::Live(_, found)) => assert_eq!(found, entry.slot()),
                    // It is younger than the copy.
                    Ok(VolumeState::Unknown) if self.lacks(*disk, entry) => {}
                    Ok(other) => panic!("volume {} on store {disk}: {other:?}", entry.number),
                    Err(error) => self.tolerate_on(*disk, &error),
                }
            }
        }
        for entry in gone {
            for disk in entry.replicas.iter().filter(|disk| !self.is_still_old(**disk)) {
                let Some(open) = self.seat(*disk) else { continue };
                match open.handle.volume(entry.id()).await {
                    Ok(VolumeState::Tombstoned { extents_left: 0, .. } | VolumeState::Unknown) => {}
                    Ok(VolumeState::Tombstoned { .. }) if ever_old.contains(disk) => {}
                    Ok(state) => panic!("volume {} is gone, and store {disk} says {state:?}", entry.number),
                    Err(error) => self.tolerate_on(*disk, &error),
                }
            }
        }
    }
}

/// A flag that a task waits for.
#[derive(Clone, Default)]
pub(super) struct Flag(Rc<Cell<bool>>);

impl Flag {
    pub(super) fn raise(&self) {
        self.0.set(true);
    }

    pub(super) fn is_up(&self) -> bool {
        self.0.get()
    }
}
