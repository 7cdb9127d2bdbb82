//! The volumes of a life: made, opened, grown, destroyed, and their replicas brought back, in the daemon's order of steps
//! (its `operations/volume.rs`, `destroy.rs` and `replicas.rs`).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_channel::oneshot;
use libvol::Kind;
use libvol::crypto::seal::Sealer;
use libvol::destroy::{self, Outcome, Part, Reached};
use libvol::disk::sim::Rng;
use libvol::error::Error;
use libvol::ids::{Epoch, KeyVersion, StoreId};
use libvol::limits::BLOCK;
use libvol::runtime::{now, sleep, timeout};
use libvol::secret::Secret;
use libvol::store::{Change, Member, VolumeRecord, VolumeState};
use libvol::volume::{ReplicaSpec, Volume, VolumeSpec};

use super::catalog::{Entry, Phase, VolumeRegister};
use super::life::{BLOCK_SECTORS, Running, STUCK};
use super::model::Model;
use super::plan::EXTENT_BLOCKS;
use super::stores::LOOK;
use super::watched::Watched;
use super::work;

/// Largest volume, in blocks.
const BLOCKS_MAX: u64 = 8 * EXTENT_BLOCKS;
/// A replica that failed again is tried again after this, then after twice that, and so on.
const BACKOFF_MIN: Duration = Duration::from_millis(4);
const BACKOFF_MAX: Duration = Duration::from_millis(200);

/// When a replica (volume, place) is tried again, and the pause after that.
type Retries = BTreeMap<(u32, usize), (Duration, Duration)>;

impl Running {
    pub(super) async fn create(self: Rc<Self>, mut rng: Rng) {
        sleep(Duration::from_micros(rng.below(5000))).await;
        let mut replicas: Vec<usize> = (0..self.seats.len())
            .filter(|disk| self.well(*disk).is_some())
            .collect();
        let count = replicas.len();
        if count == 0 {
            return;
        }
        for i in (1..count).rev() {
            replicas.swap(i, rng.below(i as u64 + 1) as usize);
        }
        replicas.truncate(1 + rng.below(count as u64) as usize);
        let blocks = 1 + rng.below(BLOCKS_MAX);
        let mut entry = self.life.catalog.create(&mut rng, &replicas, blocks).await;
        for disk in &entry.replicas {
            if let Err(error) = self.put_on(*disk, &entry, entry.record()).await {
                if error.kind() == Kind::Busy {
                    // Nobody knows what it will be; the next life rolls it back.
                    return;
                }
                if error.kind() != Kind::NoSpace {
                    self.tolerate_on(*disk, &error);
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
        self.life.catalog.set_ready(&mut rng, number).await;
        entry.phase = Phase::Ready;
        self.life.driver.note(|| {
            format!(
                "volume {number}: created, {blocks} blocks on disks {:?}",
                entry.replicas
            )
        });
        self.serve(entry, None).await;
    }

    async fn put_on(&self, disk: usize, entry: &Entry, record: VolumeRecord) -> libvol::Result<()> {
        let Some(open) = self.seat(disk) else {
            return Err(Error::unavailable("its store is away"));
        };
        self.patiently(disk, open.handle.add_volume(entry.slot(), record))
            .await
    }

    /// Undoes a creation that was interrupted, as the daemon does: with all of its stores, or not now.
    pub(super) async fn roll_back(&self, entry: &Entry) {
        let id = entry.id();
        let away = entry.replicas.iter().find(|disk| self.seat(**disk).is_none());
        if let Some(disk) = away {
            return self.tolerate_on(*disk, &Error::unavailable("its store is away"));
        }
        for disk in &entry.replicas {
            let Some(open) = self.seat(*disk) else { return };
            let undo = async {
                match destroy::reached(&open.handle, id).await? {
                    Reached::Gone { .. } | Reached::Scrubbing { .. } => Ok(()),
                    Reached::Nothing | Reached::Tombstone { .. } => open.handle.destroy_volume(id).await,
                }
            };
            if let Err(error) = self.patiently(*disk, undo).await {
                return self.tolerate_on(*disk, &error);
            }
        }
        let number = entry.number;
        let mut rng = self.rng("roll back", number);
        self.life.catalog.remove_created(&mut rng, number).await;
        self.life.models.borrow_mut().remove(&number);
    }

    /// Runs a volume's destruction job as far as it goes in this life.
    pub(super) async fn destroy(&self, number: u32) {
        let entry = self
            .life
            .catalog
            .entry(number)
            .expect("its record stays until it is gone");
        let part = |(disk, store): (&usize, &StoreId)| Part {
            store: *store,
            done: entry.done.contains(store),
            handle: self.seat(*disk).map(|open| open.handle),
        };
        let parts = entry.replicas.iter().zip(&entry.stores).map(part).collect();
        let job = destroy::run(entry.id(), parts, &self.life.catalog);
        match timeout(STUCK, job).await {
            Some(Ok(Outcome::Destroyed)) => {
                let counters = &self.life.counters;
                counters.destroyed.set(counters.destroyed.get() + 1);
                self.life.models.borrow_mut().remove(&number);
                self.life.driver.note(|| format!("volume {number}: destroyed"));
            }
            Some(Ok(Outcome::Unfinished(left))) => {
                for (store, why) in left {
                    let disk = self.life.stores.iter().position(|id| *id == store);
                    self.tolerate_on(disk.expect("one of ours"), &Error::io(why));
                }
            }
            Some(Err(error)) => panic!("volume {number}: {error}"),
            None => assert!(
                entry.replicas.iter().any(|disk| self.life.driver.hangs(*disk)),
                "volume {number}: its destruction does not end"
            ),
        }
    }

    /// Makes a size durable on all stores at hand and in the catalog. Whether it is. A replica that cannot hear of it does so
    /// when it is back.
    pub(super) async fn set_size(&self, number: u32, blocks: u64, rng: &mut Rng) -> bool {
        let Some(entry) = self.life.catalog.entry(number) else {
            return false;
        };
        let in_sync = entry.in_sync();
        let mut told = 0;
        for disk in &entry.replicas {
            let Some(open) = self.well(*disk) else { continue };
            let change = Change::SetSize {
                volume: entry.id(),
                size_bytes: blocks * BLOCK,
            };
            match self.patiently(*disk, open.handle.commit(vec![change])).await {
                Ok(()) => told += u32::from(in_sync.contains(disk)),
                Err(error) => self.tolerate_on(*disk, &error),
            }
        }
        if told == 0 {
            self.tolerate(number, &Error::unavailable("no replica in sync has the new size"));
            return false;
        }
        self.life.catalog.set_size(rng, number, blocks).await;
        self.grow_model(number, blocks);
        true
    }

    fn grow_model(&self, number: u32, blocks: u64) {
        let mut models = self.life.models.borrow_mut();
        let model = models.get_mut(&number).expect("it serves");
        model.grow(blocks as usize * BLOCK_SECTORS);
    }

    /// A resize that was cut has left some stores with the larger size: it is carried on.
    async fn carry_on_resize(&self, entry: &Entry) -> bool {
        let mut largest = entry.blocks;
        let mut differ = false;
        for disk in &entry.replicas {
            let Some(open) = self.well(*disk) else { continue };
            match self.patiently(*disk, open.handle.volume(entry.id())).await {
                Ok(VolumeState::Live(record, _)) => {
                    differ |= record.size_bytes != entry.blocks * BLOCK;
                    largest = largest.max(record.size_bytes / BLOCK);
                }
                Ok(VolumeState::Unknown) if self.lacks(*disk, entry) => {}
                Ok(other) => panic!("volume {} on disk {disk}: {other:?}", entry.number),
                Err(error) => self.tolerate_on(*disk, &error),
            }
        }
        let mut rng = self.rng("carry on", entry.number);
        if differ && !self.set_size(entry.number, largest, &mut rng).await {
            return false;
        }
        // Durable in the catalog, and the cut came before the model heard of it.
        self.grow_model(entry.number, largest);
        true
    }

    /// Opens a volume. Its lock is held.
    pub(super) async fn open(&self, number: u32) -> Option<Rc<Volume>> {
        let entry = self.life.catalog.entry(number)?;
        if !self.has_slot(&entry).await {
            return None;
        }
        let mut key = Secret::<64>::zeroed().expect("locked memory");
        let mut rng = Rng::new(u64::from(number) + 1);
        for word in key.expose_mut().chunks_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
        let members = entry.membership.members.iter();
        let replicas = entry.replicas.iter().zip(&entry.stores).zip(members);
        let replica =
            |((disk, store), member): ((&usize, &StoreId), &libvol::volume::Standing)| ReplicaSpec {
                store: *store,
                name: format!("store-{disk}"),
                io: self.well(*disk).map(|open| open.io),
                state: member.state,
                full_copy: member.full_copy,
                reason: member.reason.clone(),
            };
        let spec = VolumeSpec {
            id: entry.id(),
            label: format!("acme/vol-{number}"),
            dataset: entry.dataset(),
            size_bytes: entry.blocks * BLOCK,
            sealer: Sealer::new(entry.dataset(), &key).expect("two different halves"),
            key_version: KeyVersion(1),
            replicas: replicas.map(replica).collect(),
            membership_epoch: entry.membership.epoch,
            register: Rc::new(Watched {
                register: VolumeRegister {
                    catalog: self.life.catalog.clone(),
                    rng: RefCell::new(self.rng("register", number)),
                },
                driver: self.life.driver.clone(),
                cut: self.life.round.cut_at_change,
            }),
        };
        match timeout(STUCK, Volume::open_tuned(spec, self.life.plan.tuning)).await {
            Some(Ok(volume)) => {
                self.volumes.borrow_mut().insert(number, volume.clone());
                Some(volume)
            }
            Some(Err(error)) => {
                self.tolerate(number, &error);
                None
            }
            None => panic!("volume {number}: its opening does not end"),
        }
    }

    /// Whether a store with a replica in sync can tell the volume's keys.
    async fn has_slot(&self, entry: &Entry) -> bool {
        for disk in entry.in_sync() {
            let Some(open) = self.well(disk) else { continue };
            match self.patiently(disk, open.handle.volume(entry.id())).await {
                Ok(VolumeState::Live(_, slot)) => {
                    assert_eq!(slot, entry.slot());
                    return true;
                }
                Ok(other) => panic!("volume {} on disk {disk}: {other:?}", entry.number),
                Err(error) => self.tolerate_on(disk, &error),
            }
        }
        let error = Error::unavailable("no store with a replica in sync is in use");
        self.tolerate(entry.number, &error);
        false
    }

    /// A volume from its opening to the end of the round. `told` hears whether the oracle has agreed with all of it.
    pub(super) async fn serve(self: Rc<Self>, entry: Entry, told: Option<oneshot::Sender<bool>>) {
        let number = entry.number;
        let volume = {
            let _lock = self.lock(number).await;
            if !self.carry_on_resize(&entry).await {
                return;
            }
            self.open(number).await
        };
        let Some(volume) = volume else { return };
        if let Some(told) = told {
            let agreed = self.verify(number, &volume).await;
            let _ = told.send(agreed);
            if !agreed {
                self.volumes.borrow_mut().remove(&number);
                return;
            }
        }
        work::sessions(self, number, volume).await;
    }

    /// What the daemon's background task does for replicas that are out.
    pub(super) async fn watch_replicas(&self) {
        let mut retries = Retries::new();
        loop {
            sleep(LOOK).await;
            let open: Vec<u32> = self.volumes.borrow().keys().copied().collect();
            for number in open {
                let Some(entry) = self.life.catalog.entry(number) else {
                    continue;
                };
                for (place, member) in entry.membership.members.iter().enumerate() {
                    if member.state == Member::InSync {
                        retries.remove(&(number, place));
                        continue;
                    }
                    if let Err(error) = self.bring_back(number, place, &mut retries).await {
                        self.life.driver.note(|| {
                            format!("volume {number}: the replica at {place} stays out of sync: {error}")
                        });
                    }
                }
            }
        }
    }

    /// Lets one replica join, if it is stale and its store in use.
    async fn bring_back(&self, number: u32, place: usize, retries: &mut Retries) -> libvol::Result<()> {
        let due = |retries: &Retries| retries.get(&(number, place)).is_none_or(|(at, _)| *at <= now());
        if !due(retries) {
            return Ok(());
        }
        let _lock = self.lock(number).await;
        let entry = self.life.catalog.entry(number);
        let entry = entry.filter(|entry| entry.phase == Phase::Ready);
        let (Some(entry), Some(volume)) = (entry, self.volume(number)) else {
            return Ok(());
        };
        let disk = entry.replicas[place];
        let Some(open) = self.well(disk) else {
            return Ok(());
        };
        if volume.replicas()[place].state != Member::Stale {
            return Ok(());
        }
        let pause = retries
            .get(&(number, place))
            .map_or(BACKOFF_MIN, |(_, pause)| (*pause * 2).min(BACKOFF_MAX));
        retries.insert((number, place), (now() + pause, pause));
        let full_copy = match self.patiently(disk, open.handle.volume(entry.id())).await? {
            VolumeState::Live(..) => entry.membership.members[place].full_copy,
            VolumeState::Unknown => {
                let record = VolumeRecord {
                    membership_epoch: Epoch(0),
                    members: vec![Member::Stale; entry.replicas.len()],
                    ..entry.record()
                };
                self.put_on(disk, &entry, record).await?;
                true
            }
            VolumeState::Tombstoned { .. } => panic!("volume {number} is destroyed on disk {disk}"),
        };
        self.life
            .driver
            .note(|| format!("volume {number}: disk {disk} rejoins, full copy {full_copy}"));
        self.patiently(disk, volume.rejoin(place, open.io, full_copy))
            .await
    }

    /// Waits until every replica is in sync again, for so long at most. Whether they are.
    pub(super) async fn until_whole(&self, number: u32, volume: &Volume, limit: Duration) -> bool {
        let end = now() + limit;
        loop {
            let Some(entry) = self.life.catalog.entry(number) else {
                return false;
            };
            let states = volume.replicas();
            if entry.is_whole() && states.iter().all(|replica| replica.state == Member::InSync) {
                return true;
            }
            if now() >= end || volume.failure().is_some() {
                return false;
            }
            sleep(LOOK).await;
        }
    }
}
