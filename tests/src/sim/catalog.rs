//! The world's catalog: a register whose changes are all or nothing and durable at some point between call and return, as
//! the real one's are. It lives outside the simulated machine, so that a power cut leaves it as it is.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use libvol::destroy::Ledger;
use libvol::disk::sim::Rng;
use libvol::error::Error;
use libvol::ids::{CmkId, CustomerId, DatasetId, Epoch, KeyVersion, StoreId, VolumeId};
use libvol::keys::WrappedKey;
use libvol::runtime::sleep;
use libvol::store::{Member, VolumeRecord, VolumeSlot};
use libvol::volume::{Membership, Register, Standing};

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its creation has begun.
    Creating,
    /// It serves.
    Ready,
    /// Its destruction has begun; there is no way back.
    Destroying,
}

/// A volume's record.
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
    /// A volume that is about to be made.
    pub fn new(number: u32, replicas: Vec<usize>, stores: Vec<StoreId>, blocks: u64) -> Self {
        let in_sync = |store: &StoreId| Standing {
            store: *store,
            state: Member::InSync,
            reason: None,
            full_copy: false,
        };
        Self {
            number,
            membership: Membership {
                epoch: Epoch(1),
                members: stores.iter().map(in_sync).collect(),
            },
            replicas,
            stores,
            blocks,
            phase: Phase::Creating,
            done: Vec::new(),
        }
    }

    /// Its id.
    pub fn id(&self) -> VolumeId {
        VolumeId::from_bytes(id_bytes(1, self.number))
    }

    /// Its dataset.
    pub fn dataset(&self) -> DatasetId {
        DatasetId::from_bytes(id_bytes(2, self.number))
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
            cmk: CmkId::from_bytes([3; 16]),
            bytes: self.wrapped_key(),
        };
        VolumeSlot {
            volume: self.id(),
            customer: CustomerId::from_bytes([4; 16]),
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
            size_bytes: self.blocks * libvol::limits::BLOCK,
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

fn id_bytes(kind: u8, number: u32) -> [u8; 16] {
    let mut bytes = [kind; 16];
    bytes[12..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// All records.
#[derive(Default)]
pub struct Records {
    /// Volumes by number.
    pub live: BTreeMap<u32, Entry>,
    /// Those that were destroyed to the end, or whose creation was rolled back.
    pub gone: BTreeMap<u32, Entry>,
    /// The next volume's number.
    pub next: u32,
    /// Disks whose stores are latched faulty until an operator acts.
    pub faults: BTreeMap<usize, String>,
    /// The one disk that may fail now; no other replica may be dropped.
    pub suspect: Option<usize>,
}

impl Records {
    /// The record of an id.
    pub fn by_id(&self, id: VolumeId) -> Option<&Entry> {
        self.live.values().find(|entry| entry.id() == id)
    }
}

/// See the module's text.
#[derive(Clone, Default)]
pub struct Catalog(Arc<Mutex<Records>>);

impl Catalog {
    /// Looks at it.
    pub fn records(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The record of a volume that is not gone.
    pub fn entry(&self, number: u32) -> Option<Entry> {
        self.records().live.get(&number).cloned()
    }

    /// Changes it durably, at some point between call and return.
    pub async fn change<T>(&self, rng: &mut Rng, change: impl FnOnce(&mut Records) -> T) -> T {
        sleep(Duration::from_micros(rng.below(300))).await;
        let result = change(&mut self.records());
        sleep(Duration::from_micros(rng.below(300))).await;
        result
    }
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
        let swap = |records: &mut Records| {
            let suspect = records.suspect;
            let entry = records.live.values_mut().find(|entry| entry.id() == volume);
            let entry = entry.ok_or_else(|| Error::internal("the volume is gone from the catalog"))?;
            if entry.membership.epoch != from || to.members.len() != entry.replicas.len() {
                return Err(Error::busy("its membership is of another epoch"));
            }
            check_step(entry, to, suspect);
            entry.membership = to.clone();
            Ok(())
        };
        self.catalog.change(&mut rng, swap).await
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
    async fn store_done(&self, volume: VolumeId, store: StoreId, _extents: u32) -> libvol::Result<()> {
        let mut records = self.records();
        let entry = records.live.values_mut().find(|entry| entry.id() == volume);
        entry.expect("its record stays until it is gone").done.push(store);
        Ok(())
    }

    async fn finished(&self, volume: VolumeId) -> libvol::Result<()> {
        let mut records = self.records();
        let number = records.by_id(volume).expect("finished once").number;
        let entry = records.live.remove(&number).expect("found above");
        assert_eq!(
            (entry.phase, entry.done.len()),
            (Phase::Destroying, entry.stores.len()),
            "volume {number} is called destroyed before all its stores are done"
        );
        records.gone.insert(number, entry);
        Ok(())
    }
}
