//! What a shard holds: the data paths of stores, the open volumes, and their doors.
//!
//! The control plane holds a volume's lock over every change here, so two changes of one volume never overlap.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join_all;
use libvol::crypto::seal::Sealer;
use libvol::ids::{DatasetId, Epoch, KeyVersion, StoreId, VolumeId};
use libvol::runtime::live_tasks;
use libvol::secret::Secret;
use libvol::store::{Member, StoreHandle, StoreIo};
use libvol::volume::{
    Register, ReplicaSpec, ReplicaStatus, Tuning, Verified, Volume, VolumeSpec, VolumeStats,
};
use libvol::{Error, Result};

use super::door::{Door, DoorSpec, Manner};
use crate::vhost::Writeback;

/// What opening a volume takes, in a form that may cross threads.
pub(crate) struct OpenSpec {
    /// Its id.
    pub(crate) id: VolumeId,
    /// For messages: `customer/name`.
    pub(crate) label: String,
    /// Scope of its key.
    pub(crate) dataset: DatasetId,
    /// Size in bytes.
    pub(crate) size_bytes: u64,
    /// The data key.
    pub(crate) key: Secret<64>,
    /// Its version.
    pub(crate) key_version: KeyVersion,
    /// Its replicas, in the order of the slot.
    pub(crate) replicas: Vec<OpenReplica>,
    /// Membership epoch.
    pub(crate) membership_epoch: Epoch,
    /// How fast a replica of it catches up, at most.
    pub(crate) resync_bytes_per_second: u64,
    /// Where the membership is written down.
    pub(crate) register: Arc<dyn Register + Send + Sync>,
}

/// One replica of a volume that is opened.
pub(crate) struct OpenReplica {
    /// Its store.
    pub(crate) store: StoreId,
    /// The store's name.
    pub(crate) name: String,
    /// The store, unless it is away.
    pub(crate) handle: Option<StoreHandle>,
    /// Its state.
    pub(crate) state: Member,
    /// Nothing it holds can be relied on.
    pub(crate) full_copy: bool,
    /// Why it is not in sync.
    pub(crate) reason: Option<String>,
}

/// An open volume's state for people.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// Counters.
    pub(crate) stats: VolumeStats,
    /// Its replicas, in the order of the slot.
    pub(crate) replicas: Vec<ReplicaStatus>,
    /// Why it has stopped.
    pub(crate) failure: Option<String>,
    /// Live connections.
    pub(crate) connections: usize,
    /// Whether it has a door: an attachment is served.
    pub(crate) served: bool,
    /// Connections of the attachment that is to take over, if there is one.
    pub(crate) incoming: Option<usize>,
}

impl Report {
    /// Whether it still recovers, or a replica catches up.
    pub(crate) fn is_busy(&self) -> bool {
        let catches_up = |replica: &ReplicaStatus| replica.state == Member::Resyncing;
        self.stats.recovering_extents > 0 || self.replicas.iter().any(catches_up)
    }
}

/// What a thread of the data plane carries at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Connections that serve requests.
    pub(crate) connections: usize,
    /// Connections in their handshake.
    pub(crate) handshakes: usize,
    /// Tasks.
    pub(crate) tasks: usize,
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.handshakes += other.handshakes;
        self.tasks += other.tasks;
    }
}

/// Stores and volumes of one shard.
#[derive(Default)]
pub(crate) struct Registry {
    stores: RefCell<HashMap<StoreId, Rc<StoreIo>>>,
    volumes: RefCell<HashMap<VolumeId, Entry>>,
    /// What volumes that are closed have mended, until it is taken.
    mended: RefCell<HashMap<VolumeId, Mended>>,
}

/// What a volume has found damaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mended {
    /// Blocks rewritten from a good copy.
    pub(crate) healed_blocks: u64,
    /// Checksum areas written anew.
    pub(crate) healed_areas: u64,
    /// Blocks without a good copy.
    pub(crate) lost_blocks: u64,
}

impl Mended {
    fn of(stats: &VolumeStats) -> Self {
        Self {
            healed_blocks: stats.healed_blocks,
            healed_areas: stats.healed_areas,
            lost_blocks: stats.lost_blocks,
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            healed_blocks: self.healed_blocks - earlier.healed_blocks,
            healed_areas: self.healed_areas - earlier.healed_areas,
            lost_blocks: self.lost_blocks - earlier.lost_blocks,
        }
    }
}

impl AddAssign for Mended {
    fn add_assign(&mut self, other: Self) {
        self.healed_blocks += other.healed_blocks;
        self.healed_areas += other.healed_areas;
        self.lost_blocks += other.lost_blocks;
    }
}

struct Entry {
    volume: Rc<Volume>,
    door: Option<Rc<Door>>,
    /// The door of the attachment that is to take over.
    incoming: Option<Rc<Door>>,
    /// How the guest has set its cache; that moves with it.
    writeback: Writeback,
    /// What of its counters was taken.
    taken: Cell<Mended>,
}

impl Registry {
    /// Opens a volume, unless it is open.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub(crate) async fn open(&self, spec: OpenSpec) -> Result<()> {
        if self.volumes.borrow().contains_key(&spec.id) {
            return Ok(());
        }
        let replica = |replica: OpenReplica| {
            Ok(ReplicaSpec {
                io: replica.handle.map(|handle| self.store_io(&handle)).transpose()?,
                store: replica.store,
                name: replica.name,
                state: replica.state,
                full_copy: replica.full_copy,
                reason: replica.reason,
            })
        };
        let replicas = spec
            .replicas
            .into_iter()
            .map(replica)
            .collect::<Result<Vec<_>>>()?;
        let sealer = Sealer::new(spec.dataset, &spec.key)?;
        // From here on the key lives in the cipher's schedule only.
        drop(spec.key);
        let tuning = Tuning {
            resync_bytes_per_second: spec.resync_bytes_per_second,
            ..Tuning::default()
        };
        let spec = VolumeSpec {
            id: spec.id,
            label: spec.label,
            dataset: spec.dataset,
            size_bytes: spec.size_bytes,
            sealer,
            key_version: spec.key_version,
            replicas,
            membership_epoch: spec.membership_epoch,
            register: Rc::new(spec.register),
        };
        let id = spec.id;
        let volume = Volume::open_tuned(spec, tuning).await?;
        let entry = Entry {
            volume,
            door: None,
            incoming: None,
            writeback: Writeback::default(),
            taken: Cell::default(),
        };
        let earlier = self.volumes.borrow_mut().insert(id, entry);
        assert!(earlier.is_none(), "the volume's lock is held over its opening");
        Ok(())
    }

    /// Lets the VM of an attachment in. One that is to take over may describe its device meanwhile.
    ///
    /// # Errors
    /// When the socket cannot be used.
    pub(crate) fn open_door(&self, spec: DoorSpec) -> Result<()> {
        let id = spec.facts.volume;
        let mut volumes = self.volumes.borrow_mut();
        let entry = volumes
            .get_mut(&id)
            .ok_or_else(|| Error::internal(format!("volume {id} is not open on its shard")))?;
        let place = match spec.takeover {
            None => &mut entry.door,
            Some(_) => &mut entry.incoming,
        };
        assert!(place.is_none(), "one attachment a volume, and one to come");
        *place = Some(Door::open(spec, entry.volume.clone(), entry.writeback.clone())?);
        Ok(())
    }

    /// An attachment's door, if it is open.
    pub(super) fn door(&self, id: VolumeId) -> Option<Rc<Door>> {
        self.volumes.borrow().get(&id)?.door.clone()
    }

    /// Ends the sessions of the attachment, and of one that is to take over: from `epoch` on nothing of them is let in, and
    /// when this returns, nothing of them is in flight (I3).
    pub(crate) async fn close_door(&self, id: VolumeId, epoch: Epoch) {
        let doors = match self.volumes.borrow_mut().get_mut(&id) {
            None => return,
            Some(entry) => [entry.door.take(), entry.incoming.take()],
        };
        close_all(doors.into_iter().flatten(), epoch).await;
    }

    /// Ends those of the attachment that was to take over.
    pub(crate) async fn close_incoming(&self, id: VolumeId, epoch: Epoch) {
        let door = self
            .volumes
            .borrow_mut()
            .get_mut(&id)
            .and_then(|e| e.incoming.take());
        close_all(door, epoch).await;
    }

    /// The attachment of that epoch, which was to take over, does: when this returns, nothing of the one before is in flight, nor
    /// will be (I3). One that has is left as it is.
    ///
    /// # Errors
    /// `Unavailable` when there is none (any more); the one before has ended all the same, for the record is the other's already.
    pub(crate) async fn take_over(&self, id: VolumeId, epoch: Epoch) -> Result<()> {
        let gone = || Error::unavailable(format!("volume {id} has no attachment that is to take over"));
        let old = {
            let volumes = self.volumes.borrow();
            volumes.get(&id).ok_or_else(gone)?.door.clone()
        };
        if old.as_ref().is_some_and(|door| door.epoch() == epoch) {
            return Ok(());
        }
        // Whatever becomes of the second: the volume is the first's no more.
        close_all(old, epoch).await;
        // Both stood there meanwhile, for a daemon that stops.
        let mut volumes = self.volumes.borrow_mut();
        let entry = volumes.get_mut(&id).ok_or_else(gone)?;
        entry.door = entry.incoming.take_if(|door| door.epoch() == epoch);
        match entry.door {
            Some(_) => Ok(()),
            None => Err(gone()),
        }
    }

    /// Closes a volume, its sessions first if it has any (the daemon stops): flushed, clean, gone from here.
    ///
    /// # Errors
    /// As [`Volume::close`]; the volume is gone from here all the same, and its next open recovers.
    pub(crate) async fn close(&self, id: VolumeId) -> Result<()> {
        let Some(entry) = self.volumes.borrow_mut().remove(&id) else {
            return Ok(());
        };
        let doors = [&entry.incoming, &entry.door].into_iter().flatten();
        join_all(doors.map(|door| door.close(Manner::AtOnce))).await;
        let closed = entry.volume.close().await;
        self.keep_mended(id, &entry);
        closed
    }

    /// Ends a volume's I/O without cleaning: it is about to be destroyed.
    pub(crate) async fn abandon(&self, id: VolumeId) {
        let Some(entry) = self.volumes.borrow_mut().remove(&id) else {
            return;
        };
        assert!(entry.door.is_none(), "an attached volume is not destroyed");
        entry.volume.abandon().await;
        self.keep_mended(id, &entry);
    }

    /// The new size is durable.
    pub(crate) fn grow(&self, id: VolumeId, size_bytes: u64) {
        if let Some(entry) = self.volumes.borrow().get(&id) {
            entry.volume.grow(size_bytes);
            for door in [&entry.door, &entry.incoming].into_iter().flatten() {
                door.resized();
            }
        }
    }

    /// Lets a stale replica of an open volume catch up.
    ///
    /// # Errors
    /// As [`Volume::rejoin`].
    pub(crate) async fn rejoin(
        &self,
        id: VolumeId,
        place: usize,
        handle: &StoreHandle,
        full_copy: bool,
    ) -> Result<()> {
        let Some(volume) = self.volume(id) else {
            return Ok(());
        };
        volume.rejoin(place, self.store_io(handle)?, full_copy).await
    }

    /// An open volume lets go of a replica's store, which has failed.
    ///
    /// # Errors
    /// As [`Volume::let_go`].
    pub(crate) async fn let_go(&self, id: VolumeId, place: usize) -> Result<()> {
        let Some(volume) = self.volume(id) else {
            return Ok(());
        };
        if volume.let_go(place).await.is_err() {
            // Nobody has needed the replica since its store failed: whoever flushes finds out.
            volume.flush().await?;
        }
        volume.let_go(place).await
    }

    /// An open volume takes a store in as one more replica.
    ///
    /// # Errors
    /// As [`Volume::add_replica`]; `Unavailable` when it is not open.
    pub(crate) async fn add_replica(&self, id: VolumeId, store: StoreId, name: String) -> Result<()> {
        self.must_be_open(id)?.add_replica(store, name).await.map(drop)
    }

    /// A replica of an open volume leaves.
    ///
    /// # Errors
    /// As [`Volume::remove_replica`]; `Unavailable` when it is not open.
    pub(crate) async fn remove_replica(&self, id: VolumeId, place: usize) -> Result<()> {
        self.must_be_open(id)?.remove_replica(place).await
    }

    fn must_be_open(&self, id: VolumeId) -> Result<Rc<Volume>> {
        self.volume(id)
            .ok_or_else(|| Error::unavailable(format!("volume {id} is not open")))
    }

    fn volume(&self, id: VolumeId) -> Option<Rc<Volume>> {
        self.volumes.borrow().get(&id).map(|entry| entry.volume.clone())
    }

    /// How an open volume fares; `None` when it is not open.
    pub(crate) fn report(&self, id: VolumeId) -> Option<Report> {
        let volumes = self.volumes.borrow();
        let entry = volumes.get(&id)?;
        Some(Report {
            stats: entry.volume.stats(),
            replicas: entry.volume.replicas(),
            failure: entry.volume.failure(),
            connections: entry.door.as_ref().map_or(0, |door| door.connections()),
            served: entry.door.is_some(),
            incoming: entry.incoming.as_ref().map(|door| door.connections()),
        })
    }

    /// What its thread carries; asked by a task that does not count.
    pub(crate) fn load(&self) -> Load {
        let volumes = self.volumes.borrow();
        let mut load = Load {
            tasks: live_tasks() - 1,
            ..Load::default()
        };
        let doors = volumes.values().flat_map(|entry| [&entry.door, &entry.incoming]);
        for door in doors.flatten() {
            load.connections += door.connections();
            load.handshakes += door.handshakes();
        }
        load
    }

    /// Goes on with the integrity walk of an open volume; `None` when it is not open.
    ///
    /// # Errors
    /// As [`Volume::verify_extents`].
    pub(crate) async fn verify(&self, id: VolumeId, from: u64, bytes: u64) -> Result<Option<Verified>> {
        let volume = self.volumes.borrow().get(&id).map(|entry| entry.volume.clone());
        match volume {
            None => Ok(None),
            Some(volume) => volume.verify_extents(from, bytes).await.map(Some),
        }
    }

    /// What volumes have mended since this was last asked.
    pub(crate) fn take_mended(&self) -> Vec<(VolumeId, Mended)> {
        let mut mended: Vec<_> = self.mended.take().into_iter().collect();
        for (id, entry) in self.volumes.borrow().iter() {
            let now = Mended::of(&entry.volume.stats());
            let new = now.since(entry.taken.replace(now));
            if new != Mended::default() {
                mended.push((*id, new));
            }
        }
        mended
    }

    /// A volume goes: what it has mended is taken later.
    fn keep_mended(&self, id: VolumeId, entry: &Entry) {
        self.add_mended(id, Mended::of(&entry.volume.stats()).since(entry.taken.get()));
    }

    /// It may have been opened and closed before since that was last taken.
    fn add_mended(&self, id: VolumeId, new: Mended) {
        if new != Mended::default() {
            *self.mended.borrow_mut().entry(id).or_default() += new;
        }
    }

    /// All open volumes.
    pub(crate) fn open_volumes(&self) -> Vec<VolumeId> {
        self.volumes.borrow().keys().copied().collect()
    }

    /// Lets a store's data path go; no open volume uses it.
    pub(crate) fn forget_store(&self, id: StoreId) {
        self.stores.borrow_mut().remove(&id);
    }

    fn store_io(&self, handle: &StoreHandle) -> Result<Rc<StoreIo>> {
        let id = handle.info().id;
        if let Some(io) = self.stores.borrow().get(&id) {
            return Ok(io.clone());
        }
        let io = StoreIo::attach(handle)?;
        self.stores.borrow_mut().insert(id, io.clone());
        Ok(io)
    }
}

/// None of them lets anybody in any more, and then all end, none waiting for another.
async fn close_all(doors: impl IntoIterator<Item = Rc<Door>>, epoch: Epoch) {
    let doors: Vec<_> = doors.into_iter().collect();
    doors.iter().for_each(|door| door.supersede(epoch));
    join_all(doors.iter().map(|door| door.close(Manner::Gently))).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_volume_has_mended_counts_from_every_time_it_was_open() {
        let registry = Registry::default();
        let id = VolumeId::random();
        let mended = |healed_blocks, healed_areas, lost_blocks| Mended {
            healed_blocks,
            healed_areas,
            lost_blocks,
        };
        registry.add_mended(id, mended(1, 2, 3));
        registry.add_mended(id, Mended::default());
        registry.add_mended(id, mended(10, 20, 30));
        assert_eq!(registry.take_mended(), [(id, mended(11, 22, 33))]);
        assert!(registry.take_mended().is_empty());
    }
}
