//! What the world reads out of its catalog: volumes by number, those that are gone, faults by disk. What only the oracle
//! needs stands beside it.

use std::collections::{BTreeMap, BTreeSet};

pub use libvol::catalog::Phase;
use libvol::catalog::{self, DestroyRecord, ReplicaRecord, StoreRecord, Tombstone, View};
use libvol::disk::sim::Rng;
use libvol::ids::{CmkId, CustomerId, DatasetId, KeyVersion, StoreId, VolumeId};
use libvol::keys::WrappedKey;
use libvol::limits::BLOCK;
use libvol::store::{Member, VolumeRecord, VolumeSlot};
use libvol::volume::{Membership, Standing};

/// What the catalog has of one volume.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its number; never used again.
    pub number: u32,
    /// Slots of the disks its replicas are on.
    pub replicas: Vec<usize>,
    /// The same stores by id.
    pub stores: Vec<StoreId>,
    /// Size in blocks.
    pub blocks: u64,
    /// Phase.
    pub phase: Phase,
    /// Stores that are done with its destruction.
    pub done: Vec<StoreId>,
    /// How its replicas stand.
    pub membership: Membership,
}

/// Begins every wrapped key of the world; the volume's number follows, little-endian.
pub const KEY_MARK: &[u8; 12] = b"wrapped-key:";

impl Entry {
    /// What the catalog says of a volume.
    ///
    /// # Panics
    /// When it is on a store that is not one of the world's.
    pub fn of(record: &catalog::VolumeRecord, destruction: Option<&DestroyRecord>, all: &[StoreId]) -> Self {
        let stores = record.stores();
        let disk = |store: &StoreId| all.iter().position(|id| id == store).expect("one of ours");
        let standing = |replica: &ReplicaRecord| Standing {
            store: replica.store,
            state: replica.state,
            reason: replica.reason.clone(),
            full_copy: replica.full_copy,
        };
        let parts = destruction.iter().flat_map(|record| &record.stores);
        Self {
            number: number(record.id),
            replicas: stores.iter().map(disk).collect(),
            stores,
            blocks: record.size_bytes / BLOCK,
            phase: record.phase,
            done: parts.filter(|part| part.done).map(|part| part.store).collect(),
            membership: Membership {
                epoch: record.membership_epoch,
                members: record.replicas.iter().map(standing).collect(),
            },
        }
    }

    /// Its id.
    pub fn id(&self) -> VolumeId {
        volume_id(self.number)
    }

    /// Its dataset.
    pub fn dataset(&self) -> DatasetId {
        dataset_id(self.number)
    }

    /// What stands for its wrapped data key: no other bytes of a store look like it.
    pub fn wrapped_key(&self) -> Vec<u8> {
        let mut key = KEY_MARK.to_vec();
        key.extend_from_slice(&self.number.to_le_bytes());
        let mut rng = Rng::new(u64::from(self.number));
        key.extend((0..4).flat_map(|_| rng.next_u64().to_le_bytes()));
        key
    }

    /// Its slot on every store.
    pub fn slot(&self) -> VolumeSlot {
        let name = |text: String| text.parse().expect("a name");
        let wrapped = WrappedKey {
            cmk: cmk_id(),
            bytes: self.wrapped_key(),
        };
        VolumeSlot {
            volume: self.id(),
            customer: customer_id(),
            customer_name: name("acme".into()),
            volume_name: name(format!("vol-{}", self.number)),
            dataset: self.dataset(),
            stores: self.stores.clone(),
            keys: vec![(KeyVersion(1), wrapped)],
        }
    }

    /// Its record on every store when it is made.
    pub fn record(&self) -> VolumeRecord {
        VolumeRecord {
            volume: self.id(),
            size_bytes: self.blocks * BLOCK,
            membership_epoch: self.membership.epoch,
            members: self
                .membership
                .members
                .iter()
                .map(|member| member.state)
                .collect(),
        }
    }

    /// Disks of its replicas in sync.
    pub fn in_sync(&self) -> BTreeSet<usize> {
        let each = self.replicas.iter().zip(&self.membership.members);
        let in_sync = each.filter(|(_, member)| member.state == Member::InSync);
        in_sync.map(|(disk, _)| *disk).collect()
    }

    /// Whether all of its replicas are.
    pub fn is_whole(&self) -> bool {
        self.in_sync().len() == self.replicas.len()
    }
}

/// A volume's id.
pub fn volume_id(number: u32) -> VolumeId {
    VolumeId::from_bytes(id_bytes(1, number))
}

/// The volume's number in its id.
fn number(volume: VolumeId) -> u32 {
    volume.0.as_u128() as u32
}

/// A volume's dataset.
pub fn dataset_id(number: u32) -> DatasetId {
    DatasetId::from_bytes(id_bytes(2, number))
}

/// The one customer.
pub fn customer_id() -> CustomerId {
    CustomerId::from_bytes([4; 16])
}

/// The customer's master key.
pub fn cmk_id() -> CmkId {
    CmkId::from_bytes([3; 16])
}

fn id_bytes(kind: u8, number: u32) -> [u8; 16] {
    let mut bytes = [kind; 16];
    bytes[12..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// All that the catalog has, as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Volumes.
    pub volumes: Vec<catalog::VolumeRecord>,
    /// Destructions, those that are over as well.
    pub destructions: Vec<DestroyRecord>,
    /// Tombstones.
    pub tombstones: Vec<Tombstone>,
    /// Stores.
    pub stores: Vec<StoreRecord>,
}

impl Found {
    /// Reads all of it.
    ///
    /// # Errors
    /// The catalog's.
    pub fn read(view: &View<'_>) -> libvol::Result<Self> {
        Ok(Self {
            volumes: view.all()?,
            destructions: view.all()?,
            tombstones: view.all()?,
            stores: view.all()?,
        })
    }

    fn destruction(&self, volume: VolumeId) -> Option<&DestroyRecord> {
        self.destructions.iter().find(|record| record.volume == volume)
    }
}

/// All records.
#[derive(Default)]
pub struct Records {
    /// Volumes by number.
    pub live: BTreeMap<u32, Entry>,
    /// Those that were destroyed to the end, or whose creation was rolled back or never was.
    pub gone: BTreeMap<u32, Entry>,
    /// Disks whose stores are latched faulty until an operator acts.
    pub faults: BTreeMap<usize, String>,
    /// The one disk that may fail now; no other replica may be dropped.
    pub suspect: Option<usize>,
    /// A disk that has returned as it was, and has not been opened to the end since: nothing on it counts.
    pub returned_old: Option<usize>,
    /// Disks that have done so: what was destroyed on them again may still have to be overwritten.
    pub ever_old: BTreeSet<usize>,
    /// How often that has happened.
    pub returns: u64,
}

impl Records {
    /// A disk has returned as it was some rounds ago.
    pub fn returned_as_old(&mut self, disk: usize) {
        self.returned_old = Some(disk);
        self.ever_old.insert(disk);
        self.returns += 1;
    }

    /// A disk's store was opened by its lineage, and nothing is left there of what is gone: the catalog knows what it is worth.
    pub fn opened_anew(&mut self, disk: usize) {
        self.returned_old = self.returned_old.filter(|old| *old != disk);
    }

    /// The record of an id.
    pub fn by_id(&self, id: VolumeId) -> Option<&Entry> {
        self.live.values().find(|entry| entry.id() == id)
    }

    /// Shows what the catalog has.
    ///
    /// # Panics
    /// When a volume that is gone came to its end in another way than its last phase and its tombstone say.
    pub fn show(&mut self, found: &Found, stores: &[StoreId]) {
        let before = std::mem::take(&mut self.live);
        for record in &found.volumes {
            let entry = Entry::of(record, found.destruction(record.id), stores);
            self.gone.remove(&entry.number);
            self.live.insert(entry.number, entry);
        }
        let left = before
            .into_iter()
            .filter(|(number, _)| !self.live.contains_key(number));
        self.gone.extend(left);
        for (number, entry) in &self.gone {
            let is_buried = found
                .tombstones
                .iter()
                .any(|tombstone| tombstone.volume == entry.id());
            let destruction = found.destruction(entry.id());
            let is_over = destruction.is_some_and(|record| record.finished_unix_seconds.is_some());
            // A creation may have been undone, or never have been durable.
            let may_be_buried = is_buried || entry.phase == Phase::Creating;
            assert!(
                is_over == (entry.phase == Phase::Destroying) && may_be_buried,
                "volume {number} went from phase {:?}: tombstone {is_buried}, destruction finished {is_over}",
                entry.phase
            );
        }
        let faults = stores.iter().enumerate().filter_map(|(disk, id)| {
            let record = found.stores.iter().find(|record| record.id == *id)?;
            Some((disk, record.fault.as_ref()?.reason.clone()))
        });
        self.faults = faults.collect();
    }
}
