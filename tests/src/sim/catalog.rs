//! The world's catalog: the daemon's own, its database on a simulated file, which every power cut and every end of the
//! process goes through, and which is opened anew after that.
//!
//! A change takes its time: it waits, then its transaction runs at one instant, with all that it asks of the file in the
//! file's journal; then it waits again, and only then does it return and does anybody see it. A power cut before that finds
//! the file anywhere within the journal. What is found then must be the state after a transaction: of the last one that
//! returned, or of a later one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_channel::oneshot;
use libvol::catalog::{CustomerRecord, Judged, ReplicaRecord, StoreFault, StoreRecord, Tx, VolumeRecord};
use libvol::destroy::Ledger;
use libvol::disk::sim::{Cut, Rng, SimFile};
use libvol::error::Error;
use libvol::ids::{Epoch, Incarnation, InstallationId, Name, StoreId, VolumeId, VolumePath};
use libvol::limits::BLOCK;
use libvol::runtime::{sleep, spawn};
use libvol::store::{self, Lineage, Member, StoreHandle};
use libvol::volume::{Membership, Register, Standing};

pub use super::records::{Entry, KEY_MARK, Phase, Records};
use super::records::{Found, cmk_id, customer_id, dataset_id, volume_id};

/// The time of day, which stands still.
const NOON: u64 = 43_200;

/// Longest wait of a change before its transaction, and after it.
pub const CHANGE_MAX: Duration = Duration::from_micros(300);

fn pause(rng: &mut Rng) -> Duration {
    Duration::from_micros(rng.below(CHANGE_MAX.as_micros() as u64))
}

/// The daemon's catalog, open.
type Real = libvol::catalog::Catalog;

/// The catalog's file and the process that has it open.
struct Machine {
    file: SimFile,
    catalog: Option<Real>,
    stores: Vec<StoreId>,
    /// What somebody has seen.
    seen: Found,
    /// After each later transaction: how far the file's journal had come, and what the catalog had.
    under_way: VecDeque<(u64, Found)>,
    /// The next volume's number.
    next: u32,
    /// Who is told when so many more transactions have run, before the last of them returns.
    awaited: Option<(u64, oneshot::Sender<()>)>,
    /// Chance for what nobody else has chance for.
    rng: Rng,
}

impl Machine {
    fn open(&self) -> &Real {
        self.catalog.as_ref().expect("open whenever somebody asks")
    }

    /// Runs a change at this instant; how far the journal has come then.
    fn run<T>(&mut self, change: impl FnOnce(&Real) -> libvol::Result<T>) -> (libvol::Result<T>, u64) {
        let result = change(self.open());
        let found = read(self.open());
        let mark = self.file.mark();
        self.under_way.push_back((mark, found));
        self.awaited = match self.awaited.take() {
            Some((0, told)) => {
                // Nobody hears of it once the life has ended.
                let _ = told.send(());
                None
            }
            Some((left, told)) => Some((left - 1, told)),
            None => None,
        };
        (result, mark)
    }

    /// What the last transaction has left.
    fn latest(&self) -> &Found {
        self.under_way.back().map_or(&self.seen, |(_, found)| found)
    }

    /// Everything up to there has returned.
    fn returned(&mut self, mark: u64) {
        self.file.settle(mark);
        while self.under_way.front().is_some_and(|(at, _)| *at <= mark) {
            (_, self.seen) = self.under_way.pop_front().expect("looked at");
        }
    }

    /// Opens the file anew. What it has must be what was seen, or all of some changes that were under way.
    fn reopen(&mut self, file: SimFile) {
        // A database whose file is gone can write nothing.
        self.catalog = None;
        self.file = file;
        let catalog = Real::open_simulated(&self.file, InstallationId::NIL);
        self.catalog = Some(catalog.unwrap_or_else(|error| panic!("the catalog does not open: {error}")));
        let found = read(self.open());
        assert!(
            found == self.seen || self.under_way.iter().any(|(_, later)| *later == found),
            "the catalog has {found:?}; the last change that returned left {:?}, and later ones {:?}",
            self.seen,
            self.under_way
        );
        self.seen = found;
        self.under_way.clear();
    }
}

fn read(catalog: &Real) -> Found {
    let found = catalog.read(Found::read);
    found.unwrap_or_else(|error| panic!("the catalog cannot be read: {error}"))
}

/// A new catalog with these stores, as a file to be copied.
pub fn formatted(stores: &[StoreId], extents: u64) -> SimFile {
    let file = SimFile::default();
    let catalog = Real::open_simulated(&file, InstallationId::NIL).expect("a new catalog");
    let filled = catalog.write(|tx| {
        tx.insert(&CustomerRecord {
            id: customer_id(),
            name: name("acme".into()),
            cmk: cmk_id(),
            created_unix_seconds: NOON,
        })?;
        let mut all = stores.iter().enumerate();
        all.try_for_each(|(disk, id)| tx.insert(&store(disk, *id, extents)))
    });
    filled.expect("a new catalog takes records");
    drop(catalog);
    file.copy()
}

fn name(text: String) -> Name {
    text.parse().expect("a name")
}

fn store(disk: usize, id: StoreId, extents: u64) -> StoreRecord {
    StoreRecord {
        id,
        name: name(format!("store-{disk}")),
        path: Path::new("/simulated").join(disk.to_string()),
        zone: name(format!("zone-{disk}")),
        extent_bytes: super::plan::EXTENT_BYTES,
        extents: extents as u32,
        allow_buffered: false,
        fault: None,
        leaving: None,
        lineage: Lineage::default(),
        created_unix_seconds: NOON,
    }
}

/// See the module's text.
#[derive(Clone)]
pub struct Catalog {
    machine: Arc<Mutex<Machine>>,
    shown: Arc<Mutex<Records>>,
}

impl Catalog {
    /// Opens it on a copy of `formatted`.
    ///
    /// # Panics
    /// When it does not open.
    pub fn new(formatted: &SimFile, stores: Vec<StoreId>, rng: Rng) -> Self {
        let file = formatted.copy();
        let catalog = Real::open_simulated(&file, InstallationId::NIL).expect("a formatted catalog");
        let machine = Machine {
            seen: read(&catalog),
            file,
            catalog: Some(catalog),
            stores,
            under_way: VecDeque::new(),
            next: 0,
            awaited: None,
            rng,
        };
        Self {
            machine: Arc::new(Mutex::new(machine)),
            shown: Arc::default(),
        }
    }

    /// Looks at it.
    pub fn records(&self) -> MutexGuard<'_, Records> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self) {
        let machine = self.machine();
        self.records().show(&machine.seen, &machine.stores);
    }

    /// The record of a volume that is not gone.
    pub fn entry(&self, number: u32) -> Option<Entry> {
        self.records().live.get(&number).cloned()
    }

    /// The power goes: what is not durable may be lost. Whether a change was under way.
    ///
    /// # Panics
    /// When the catalog does not open afterwards, lacks a change that has returned, or has half of another.
    pub fn lose_power(&self, cut: Cut) -> bool {
        let mut machine = self.machine();
        let was_under_way = !machine.under_way.is_empty();
        let file = machine.file.clone();
        let file = file.after_cut(cut, &mut machine.rng);
        machine.reopen(file);
        drop(machine);
        self.show();
        was_under_way
    }

    /// The process ends, by itself or killed, and the machine goes on.
    ///
    /// # Panics
    /// As [`Catalog::lose_power`].
    pub fn end_process(&self) {
        let mut machine = self.machine();
        let last = machine.under_way.back().map(|(mark, _)| *mark);
        last.into_iter().for_each(|mark| machine.returned(mark));
        if machine.rng.one_in(2) {
            machine.catalog = None;
        }
        let file = machine.file.after_exit();
        machine.reopen(file);
        drop(machine);
        self.show();
    }

    /// Hears of the `n`th transaction from now on, from 0, when it has run and nobody has seen it yet.
    pub fn await_change(&self, n: u64) -> oneshot::Receiver<()> {
        let (told, ran) = oneshot::channel();
        self.machine().awaited = Some((n, told));
        ran
    }

    /// Equal for equal histories.
    pub fn trace_hash(&self) -> u64 {
        self.machine().file.trace_hash()
    }

    /// Changes it durably, at some point between call and return.
    async fn change<T>(
        &self,
        rng: &mut Rng,
        change: impl FnOnce(&Tx<'_>) -> libvol::Result<T>,
    ) -> libvol::Result<T> {
        self.run(rng, |machine| machine.run(|catalog| catalog.write(change)))
            .await
    }

    async fn run<T>(
        &self,
        rng: &mut Rng,
        change: impl FnOnce(&mut Machine) -> (libvol::Result<T>, u64),
    ) -> libvol::Result<T> {
        sleep(pause(rng)).await;
        let (result, mark) = change(&mut self.machine());
        sleep(pause(rng)).await;
        self.machine().returned(mark);
        self.show();
        result
    }

    /// Changes it, and waits for nothing.
    fn change_at_once<T>(&self, change: impl FnOnce(&Tx<'_>) -> libvol::Result<T>) -> T {
        let mut machine = self.machine();
        let (result, mark) = machine.run(|catalog| catalog.write(change));
        machine.returned(mark);
        drop(machine);
        self.show();
        done(result)
    }

    /// The intent of a volume's creation.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn create(&self, rng: &mut Rng, replicas: &[usize], blocks: u64) -> Entry {
        let make = |machine: &mut Machine| {
            let number = machine.next;
            machine.next += 1;
            let stores: Vec<StoreId> = replicas.iter().map(|disk| machine.stores[*disk]).collect();
            let record = created(number, &stores, blocks);
            let entry = Entry::of(&record, None, &machine.stores);
            // Should it never be durable, nothing of it may be anywhere.
            self.records().gone.insert(number, entry.clone());
            let (result, mark) = machine.run(|catalog| catalog.write(|tx| tx.insert(&record)));
            (result.map(|()| entry), mark)
        };
        done(self.run(rng, make).await)
    }

    /// A volume's creation is through.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn set_ready(&self, rng: &mut Rng, number: u32) {
        done(
            self.change(rng, |tx| tx.set_phase(volume_id(number), Phase::Ready))
                .await,
        );
    }

    /// A volume's creation is undone.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn remove_created(&self, rng: &mut Rng, number: u32) {
        done(self.change(rng, |tx| tx.forget_created(volume_id(number))).await);
    }

    /// A volume's new size.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn set_size(&self, rng: &mut Rng, number: u32, blocks: u64) {
        done(
            self.change(rng, |tx| tx.set_size(volume_id(number), blocks * BLOCK))
                .await,
        );
    }

    /// The intent of a volume's destruction.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn begin_destruction(&self, rng: &mut Rng, number: u32) {
        let begin = |tx: &Tx<'_>| {
            let record = tx.get::<VolumeRecord>(volume_id(number))?.expect("it serves");
            let stores = record.stores();
            tx.begin_destruction(record, &stores, NOON)
        };
        done(self.change(rng, begin).await);
    }

    /// What a disk's store is by its lineage, with the consequences of that.
    ///
    /// # Panics
    /// When the catalog refuses: it is never an old copy itself.
    pub async fn judge_store(&self, rng: &mut Rng, disk: usize, found: &store::Found) -> Judged {
        let store = self.machine().stores[disk];
        let mut fresh = [0; 16];
        for word in fresh.chunks_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        let fresh = Incarnation::from_bytes(fresh);
        done(self.change(rng, |tx| tx.judge_store(store, found, fresh)).await)
    }

    /// A disk's store is open.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn confirm_store(&self, rng: &mut Rng, disk: usize, handle: &StoreHandle) {
        let store = self.machine().stores[disk];
        let (incarnation, lsn) = (handle.incarnation(), handle.committed_lsn());
        done(
            self.change(rng, |tx| tx.confirm_store(store, incarnation, lsn))
                .await,
        );
    }

    /// Whether nothing of a volume may be on a disk any more.
    ///
    /// # Panics
    /// When the catalog cannot be read.
    pub fn is_gone_from(&self, volume: VolumeId, disk: usize) -> bool {
        let machine = self.machine();
        let store = machine.stores[disk];
        done(machine.open().read(|view| view.is_gone_from(volume, store)))
    }

    /// Latches the fault of a disk's store.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn latch_fault(&self, rng: &mut Rng, disk: usize, reason: String) {
        let store = self.machine().stores[disk];
        let fault = StoreFault {
            reason,
            since_unix_seconds: NOON,
        };
        done(self.change(rng, |tx| tx.latch_fault(store, fault)).await);
    }

    /// The operator says that a disk's store may be used again.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub async fn clear_fault(&self, rng: &mut Rng, disk: usize) {
        let store = self.machine().stores[disk];
        done(self.change(rng, |tx| clear_fault(tx, store)).await);
    }

    /// The same for all stores, while the daemon is stopped.
    ///
    /// # Panics
    /// When the catalog refuses.
    pub fn clear_faults(&self) {
        let stores = self.machine().stores.clone();
        self.change_at_once(|tx| stores.iter().try_for_each(|store| clear_fault(tx, *store)));
    }

    /// A change by a job that may move between threads: it is made in a task of its own.
    fn change_aside(
        &self,
        change: impl FnOnce(&Tx<'_>) -> libvol::Result<()> + 'static,
    ) -> oneshot::Receiver<libvol::Result<()>> {
        let (told, result) = oneshot::channel();
        let catalog = self.clone();
        let mut rng = Rng::new(self.machine().rng.next_u64());
        let change = async move {
            // Nobody hears of it where the job was given up.
            let _ = told.send(catalog.change(&mut rng, change).await);
        };
        spawn(change).detach();
        result
    }
}

/// The world's changes are none that a catalog refuses.
fn done<T>(result: libvol::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("the catalog refuses a change: {error}"))
}

fn created(number: u32, stores: &[StoreId], blocks: u64) -> VolumeRecord {
    VolumeRecord {
        id: volume_id(number),
        path: VolumePath {
            customer: name("acme".into()),
            name: name(format!("vol-{number}")),
        },
        customer: customer_id(),
        dataset: dataset_id(number),
        size_bytes: blocks * BLOCK,
        replicas: stores.iter().copied().map(ReplicaRecord::in_sync).collect(),
        replicas_wanted: stores.len(),
        membership_epoch: Epoch(1),
        attachment_epoch: Epoch(0),
        phase: Phase::Creating,
        created_unix_seconds: NOON,
    }
}

fn clear_fault(tx: &Tx<'_>, store: StoreId) -> libvol::Result<()> {
    let mut record = tx.get::<StoreRecord>(store)?.expect("one of ours");
    record.fault = None;
    tx.update(&record)
}

/// The catalog as one volume writes its membership to it.
pub struct VolumeRegister {
    /// Where.
    pub catalog: Catalog,
    /// Chance for how long it takes.
    pub rng: RefCell<Rng>,
}

#[async_trait(?Send)]
impl Register for VolumeRegister {
    async fn swap(&self, volume: VolumeId, from: Epoch, to: &Membership) -> libvol::Result<()> {
        let mut rng = Rng::new(self.rng.borrow_mut().next_u64());
        let swap = |machine: &mut Machine| {
            let volumes = &mut machine.latest().volumes.iter();
            let before = volumes.find(|record| record.id == volume);
            let before = before.map(|record| Entry::of(record, None, &machine.stores));
            let (result, mark) = machine.run(|catalog| catalog.swap_membership(volume, from, to));
            if result.is_ok() {
                let before = before.expect("what was swapped was there");
                assert_eq!(
                    before.membership.epoch, from,
                    "{volume}: swapped from another epoch"
                );
                check_step(&before, to, self.catalog.records().suspect);
            }
            (result, mark)
        };
        self.catalog.run(&mut rng, swap).await
    }
}

/// Nobody is dropped without need, and never the last one.
fn check_step(entry: &Entry, to: &Membership, suspect: Option<usize>) {
    let number = entry.number;
    assert!(to.epoch > entry.membership.epoch, "volume {number}: epochs rise");
    let in_sync = |standing: &Standing| standing.state == Member::InSync;
    assert!(
        to.members.iter().any(in_sync),
        "volume {number}: no replica is left in sync: {to:?}"
    );
    for (place, disk) in entry.replicas.iter().enumerate() {
        let dropped = in_sync(&entry.membership.members[place]) && !in_sync(&to.members[place]);
        assert!(
            !dropped || suspect == Some(*disk),
            "volume {number}: the replica on disk {disk} is dropped without need: {:?}",
            to.members[place].reason
        );
    }
}

#[async_trait]
impl Ledger for Catalog {
    async fn store_done(&self, volume: VolumeId, store: StoreId, extents: u32) -> libvol::Result<()> {
        heard(self.change_aside(move |tx| tx.destroyed_on(volume, store, extents))).await
    }

    async fn finished(&self, volume: VolumeId) -> libvol::Result<()> {
        heard(self.change_aside(move |tx| tx.finish_destruction(volume, NOON))).await
    }
}

async fn heard(result: oneshot::Receiver<libvol::Result<()>>) -> libvol::Result<()> {
    result
        .await
        .map_err(|_| Error::unavailable("the daemon is shutting down"))?
}
