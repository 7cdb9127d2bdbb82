//! One round's life: what a daemon does from its start to its end. Stores open, what a cut has left of creations and
//! destructions is finished, volumes open and are held to the oracle, workers work, volumes are made, grown, reopened and
//! destroyed meanwhile, and all is closed. The power may go at any disk call.

use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use libvol::Kind;
use libvol::buf::Buf;
use libvol::crypto::seal::Sealer;
use libvol::destroy::{self, Outcome, Part, Reached};
use libvol::disk::sim::{Rng, SimDriver};
use libvol::ids::{KeyVersion, PhysicalExtent, StoreId};
use libvol::limits::{BLOCK, BLOCK_SIZE, SECTOR_SIZE};
use libvol::runtime::{Task, sleep, spawn};
use libvol::secret::Secret;
use libvol::store::{self, Change, Expect, Severity, StoreHandle, StoreIo, VolumeState};
use libvol::volume::{PlainPart, Volume, VolumeSpec};

use super::catalog::{Catalog, Entry, Phase};
use super::model::Model;
use super::plan::{Cut, EXTENT_BLOCKS, EXTENT_BYTES, Faults, Plan, Round, Size, stream};
use super::work;
use super::world::{Counters, Models};

/// Largest volume, in blocks.
const BLOCKS_MAX: u64 = 8 * EXTENT_BLOCKS;
/// Sectors of a block.
pub const BLOCK_SECTORS: usize = BLOCK_SIZE / SECTOR_SIZE;

/// A life, and what it works with.
pub struct Life {
    /// The history's seed.
    pub seed: u64,
    /// Its size.
    pub size: Size,
    /// Its kinds of faults.
    pub faults: Faults,
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
    /// Damaged extents (volume, logical extent) that are not written in a round that is cut.
    pub off_limits: BTreeSet<(u32, u32)>,
    /// Disks with damage on them.
    pub damaged_disks: BTreeSet<usize>,
}

/// A life with its stores open.
pub struct Running {
    /// What it was given.
    pub life: Life,
    handles: Vec<StoreHandle>,
    ios: Vec<Rc<StoreIo>>,
}

impl Life {
    /// Lives.
    ///
    /// # Panics
    /// When a promise is broken.
    pub async fn live(self) {
        let (mut handles, mut ios) = (Vec::new(), Vec::new());
        for slot in 0..self.stores.len() {
            let handle = match store::open(&self.driver.file(slot), Expect::default()).await {
                Ok(handle) => handle,
                Err(_) if self.devices_fail() => return,
                Err(error) => panic!("store {slot} does not open: {error}"),
            };
            let bad = handle.findings().iter().find(|f| f.severity == Severity::Damage);
            assert!(bad.is_none() || self.devices_fail(), "store {slot}: {bad:?}");
            ios.push(StoreIo::attach(&handle).expect("simulated"));
            handles.push(handle);
        }
        let running = Rc::new(Running {
            life: self,
            handles,
            ios,
        });
        running.clone().run().await;
        for handle in &running.handles {
            let closed = handle.close().await;
            assert!(closed.is_ok() || running.life.devices_fail(), "{closed:?}");
        }
    }

    fn devices_fail(&self) -> bool {
        self.faults.device_errors || self.faults.vanishing
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
            if !rng.one_in(3) {
                let running = self.clone();
                let seed = rng.next_u64();
                tasks.push(spawn(async move { running.create(Rng::new(seed)).await }));
            }
        }
        oracle.await;
        for task in tasks.into_iter().chain(working) {
            task.await;
        }
    }

    pub(super) fn rng(&self, purpose: &str, number: u32) -> Rng {
        let numbers = [u64::from(self.life.round.number), u64::from(number)];
        stream(self.life.seed, purpose, &numbers)
    }

    /// An error that may come because a device fails, where devices may.
    pub(super) fn tolerate(&self, error: &libvol::Error) {
        let device = matches!(error.kind(), Kind::Io | Kind::Unavailable);
        assert!(device && self.life.devices_fail(), "{error}");
    }

    /// What stores say of volumes agrees with the catalog; nothing that is gone comes back.
    async fn check_stores(&self) {
        for (slot, handle) in self.handles.iter().enumerate() {
            let Ok(volumes) = handle.volumes().await else {
                continue;
            };
            for volume in volumes {
                assert!(
                    self.life.catalog.records().by_id(volume).is_some(),
                    "store {slot} has volume {volume}, which is gone or never was"
                );
            }
        }
        let (live, gone): (Vec<Entry>, Vec<Entry>) = {
            let records = self.life.catalog.records();
            (
                records.live.values().cloned().collect(),
                records.gone.values().cloned().collect(),
            )
        };
        for entry in live.iter().filter(|entry| entry.phase == Phase::Ready) {
            for slot in &entry.replicas {
                match self.handles[*slot].volume(entry.id()).await {
                    Ok(VolumeState::Live(_, found)) => assert_eq!(found, entry.slot()),
                    other => assert!(
                        self.life.devices_fail(),
                        "volume {} on store {slot}: {other:?}",
                        entry.number
                    ),
                }
            }
        }
        for entry in gone {
            for slot in &entry.replicas {
                let state = self.handles[*slot].volume(entry.id()).await;
                let gone = matches!(
                    state,
                    Ok(VolumeState::Tombstoned { extents_left: 0 } | VolumeState::Unknown)
                );
                assert!(
                    gone || self.life.devices_fail(),
                    "volume {} is gone, and store {slot} says {state:?}",
                    entry.number
                );
            }
        }
    }

    async fn create(self: Rc<Self>, mut rng: Rng) {
        sleep(Duration::from_micros(rng.below(5000))).await;
        let count = self.life.stores.len();
        let mut replicas: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            replicas.swap(i, rng.below(i as u64 + 1) as usize);
        }
        replicas.truncate(1 + rng.below(count as u64) as usize);
        let blocks = 1 + rng.below(BLOCKS_MAX);
        let stores = replicas.iter().map(|slot| self.life.stores[*slot]).collect();
        let make = |records: &mut super::catalog::Records| {
            let number = records.next;
            records.next += 1;
            let entry = Entry {
                number,
                replicas,
                stores,
                blocks,
                phase: Phase::Creating,
                done: Vec::new(),
            };
            records.live.insert(number, entry.clone());
            entry
        };
        let mut entry = self.life.catalog.change(&mut rng, make).await;
        for slot in &entry.replicas {
            if let Err(error) = self.handles[*slot]
                .add_volume(entry.slot(), entry.record(blocks))
                .await
            {
                if error.kind() != Kind::NoSpace {
                    self.tolerate(&error);
                }
                return self.roll_back(&entry).await;
            }
        }
        let number = entry.number;
        let sectors = blocks as usize * BLOCK_SECTORS;
        self.life
            .models
            .borrow_mut()
            .insert(number, Model::new(number, sectors));
        let ready = |records: &mut super::catalog::Records| {
            records.live.get_mut(&number).expect("made above").phase = Phase::Ready;
        };
        self.life.catalog.change(&mut rng, ready).await;
        entry.phase = Phase::Ready;
        self.life.driver.note(|| {
            format!(
                "volume {number}: created, {blocks} blocks on disks {:?}",
                entry.replicas
            )
        });
        self.serve(entry, None).await;
    }

    /// Undoes a creation that was interrupted, as the daemon does.
    async fn roll_back(&self, entry: &Entry) {
        let id = entry.id();
        for slot in &entry.replicas {
            let handle = &self.handles[*slot];
            let undone = match destroy::reached(handle, id).await {
                Ok(Reached::Gone { .. } | Reached::Scrubbing { .. }) => Ok(()),
                Ok(Reached::Nothing | Reached::Tombstone { .. }) => handle.destroy_volume(id).await,
                Err(error) => Err(error),
            };
            if let Err(error) = undone {
                return self.tolerate(&error);
            }
        }
        let number = entry.number;
        let remove = |records: &mut super::catalog::Records| {
            let entry = records.live.remove(&number).expect("rolled back once");
            records.gone.insert(number, entry);
        };
        self.life
            .catalog
            .change(&mut self.rng("roll back", number), remove)
            .await;
        self.life.models.borrow_mut().remove(&number);
    }

    /// Runs a volume's destruction job to its end.
    pub(super) async fn destroy(&self, number: u32) {
        let entry = self.life.catalog.records().live.get(&number).cloned();
        let entry = entry.expect("its record stays until it is gone");
        let part = |(slot, store): (&usize, &StoreId)| Part {
            store: *store,
            done: entry.done.contains(store),
            handle: Some(self.handles[*slot].clone()),
        };
        let parts = entry.replicas.iter().zip(&entry.stores).map(part).collect();
        match destroy::run(entry.id(), parts, &self.life.catalog).await {
            Ok(Outcome::Destroyed) => {
                let counters = &self.life.counters;
                counters.destroyed.set(counters.destroyed.get() + 1);
                self.life.models.borrow_mut().remove(&number);
                self.life.driver.note(|| format!("volume {number}: destroyed"));
            }
            Ok(Outcome::Unfinished(left)) => {
                assert!(self.life.devices_fail(), "volume {number}: {left:?}");
            }
            Err(error) => panic!("volume {number}: {error}"),
        }
    }

    /// Makes a size durable on all stores and in the catalog. Whether it is.
    pub(super) async fn set_size(&self, entry: &Entry, blocks: u64, rng: &mut Rng) -> bool {
        for slot in &entry.replicas {
            let change = Change::SetVolume(entry.record(blocks));
            if let Err(error) = self.handles[*slot].commit(vec![change]).await {
                self.tolerate(&error);
                return false;
            }
        }
        let number = entry.number;
        let set = |records: &mut super::catalog::Records| {
            records.live.get_mut(&number).expect("it serves").blocks = blocks;
        };
        self.life.catalog.change(rng, set).await;
        let mut models = self.life.models.borrow_mut();
        let model = models.get_mut(&number).expect("it serves");
        model.grow(blocks as usize * BLOCK_SECTORS);
        true
    }

    /// A resize that was cut has left some stores with the larger size: it is carried on.
    async fn carry_on_resize(&self, entry: &mut Entry) -> bool {
        let mut largest = entry.blocks;
        let mut differ = false;
        for slot in &entry.replicas {
            let Ok(VolumeState::Live(record, _)) = self.handles[*slot].volume(entry.id()).await else {
                return false;
            };
            differ |= record.size_bytes != entry.blocks * BLOCK;
            largest = largest.max(record.size_bytes / BLOCK);
        }
        if differ
            && !self
                .set_size(entry, largest, &mut self.rng("carry on", entry.number))
                .await
        {
            return false;
        }
        entry.blocks = largest;
        // Durable in the catalog, and the cut came before the model heard of it.
        let mut models = self.life.models.borrow_mut();
        let model = models.get_mut(&entry.number).expect("it serves");
        model.grow(largest as usize * BLOCK_SECTORS);
        true
    }

    /// Opens a volume.
    pub(super) async fn open(&self, entry: &Entry) -> Option<Rc<Volume>> {
        let mut key = Secret::<64>::zeroed().expect("locked memory");
        let mut rng = Rng::new(u64::from(entry.number) + 1);
        for word in key.expose_mut().chunks_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        let spec = VolumeSpec {
            id: entry.id(),
            label: format!("acme/vol-{}", entry.number),
            dataset: entry.dataset(),
            size_bytes: entry.blocks * BLOCK,
            sealer: Sealer::new(entry.dataset(), &key).expect("two different halves"),
            key_version: KeyVersion(1),
            replicas: entry
                .replicas
                .iter()
                .map(|slot| self.ios[*slot].clone())
                .collect(),
        };
        match Volume::open_tuned(spec, self.life.plan.tuning).await {
            Ok(volume) => Some(volume),
            Err(error) => {
                self.tolerate(&error);
                None
            }
        }
    }

    /// A volume from its opening to the end of the round. `told` hears whether the oracle has agreed with all of it.
    async fn serve(self: Rc<Self>, mut entry: Entry, told: Option<futures_channel::oneshot::Sender<bool>>) {
        if !self.carry_on_resize(&mut entry).await {
            return;
        }
        let Some(volume) = self.open(&entry).await else {
            return;
        };
        if let Some(told) = told {
            let agreed = self.verify(&entry, &volume).await;
            let _ = told.send(agreed);
            if !agreed {
                return;
            }
        }
        work::sessions(self, entry, volume).await;
    }

    /// Holds all of a freshly opened volume to the oracle, and its replicas to each other.
    pub(super) async fn verify(&self, entry: &Entry, volume: &Rc<Volume>) -> bool {
        let mut rng = self.rng("verify", entry.number);
        let size = volume.size_bytes() as usize;
        // In pieces of any order, so that recovery on demand and in the background meet.
        let piece = match rng.one_in(2) {
            true => size,
            false => SECTOR_SIZE * (1 + rng.below(3 * EXTENT_BYTES / SECTOR_SIZE as u64) as usize),
        };
        let mut starts: Vec<usize> = (0..size).step_by(piece).collect();
        for i in (1..starts.len()).rev() {
            starts.swap(i, rng.below(i as u64 + 1) as usize);
        }
        let mut found = vec![0; size];
        for start in starts {
            let range = start..size.min(start + piece);
            if let Err(error) = read(volume, range.clone(), &mut found[range]).await {
                self.tolerate(&error);
                return false;
            }
        }
        {
            let mut models = self.life.models.borrow_mut();
            let model = models.get_mut(&entry.number).expect("it serves");
            model.check_after_cut(&found);
        }
        while volume.stats().recovering_extents > 0 && volume.failure().is_none() {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(volume.stats().lost_blocks, 0, "volume {}", entry.number);
        self.compare_replicas(entry).await
    }

    /// In-sync replicas have the same extents with the same ciphertext; nothing is being written. The cleaner may give back
    /// extents of holes between two looks, so some look must find them equal.
    async fn compare_replicas(&self, entry: &Entry) -> bool {
        if entry
            .replicas
            .iter()
            .any(|slot| self.life.damaged_disks.contains(slot))
        {
            // Damage is found when it is read; it is held to the others at rest.
            return true;
        }
        let mut difference = String::new();
        for _ in 0..5 {
            match self.difference(entry).await {
                None => return false,
                Some(found) if found.is_empty() => return true,
                Some(found) => difference = found,
            }
            sleep(Duration::from_millis(5)).await;
        }
        panic!("volume {}: {difference}", entry.number);
    }

    /// How its replicas differ; empty when they do not. `None` when a device fails.
    async fn difference(&self, entry: &Entry) -> Option<String> {
        let mut first: Option<Vec<(u32, Buf)>> = None;
        for slot in &entry.replicas {
            let extents = self.handles[*slot].extents_of(entry.dataset()).await.ok()?;
            let mut contents = Vec::new();
            for extent in extents {
                contents.push((extent.logical.0, self.raw(*slot, extent.physical).await?));
            }
            let Some(first) = &first else {
                first = Some(contents);
                continue;
            };
            let logical = |all: &[(u32, Buf)]| all.iter().map(|(at, _)| *at).collect::<Vec<_>>();
            let (a, b) = (logical(first), logical(&contents));
            let disks = format!("disks {} and {slot}", entry.replicas[0]);
            if a != b {
                return Some(format!("{disks} have extents {a:?} and {b:?}"));
            }
            let mut pairs = first.iter().zip(&contents);
            if let Some(((at, _), _)) = pairs.find(|((_, a), (_, b))| a[..] != b[..]) {
                return Some(format!("extent {at} differs on {disks}"));
            }
        }
        Some(String::new())
    }

    async fn raw(&self, slot: usize, extent: PhysicalExtent) -> Option<Buf> {
        let len = EXTENT_BYTES as usize;
        let (result, buf) = self.ios[slot].read(extent, 0, Buf::zeroed(len), len).await;
        match result {
            Ok(()) => Some(buf),
            Err(error) => {
                self.tolerate(&error);
                None
            }
        }
    }
}

/// Reads bytes of a volume.
///
/// # Errors
/// The volume's.
pub async fn read(volume: &Volume, range: Range<usize>, out: &mut [u8]) -> libvol::Result<()> {
    let mut at = 0;
    for part in volume.read(range.start as u64, range.len() as u32).await? {
        match part {
            PlainPart::Data(plain, bytes) => {
                out[at..at + bytes.len()].copy_from_slice(&plain.0[bytes.clone()]);
                at += bytes.len();
            }
            PlainPart::Zeros(zeros) => {
                out[at..at + zeros].fill(0);
                at += zeros;
            }
        }
    }
    assert_eq!(at, range.len(), "a read is whole");
    Ok(())
}
