//! The world's catalog: a register whose changes are all or nothing and durable at some point between call and return, as
//! the real one's are. It lives outside the simulated machine, so that a power cut leaves it as it is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use libvol::destroy::Ledger;
use libvol::disk::sim::Rng;
use libvol::ids::{CmkId, CustomerId, DatasetId, Epoch, KeyVersion, StoreId, VolumeId};
use libvol::keys::WrappedKey;
use libvol::runtime::sleep;
use libvol::store::{Member, VolumeRecord, VolumeSlot};

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
}

/// Begins every wrapped key of the world; the volume's number follows, little-endian.
pub const KEY_MARK: &[u8; 12] = b"wrapped-key:";

impl Entry {
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

    /// Its record on every store, with a size.
    pub fn record(&self, blocks: u64) -> VolumeRecord {
        VolumeRecord {
            volume: self.id(),
            size_bytes: blocks * libvol::limits::BLOCK,
            membership_epoch: Epoch(1),
            members: vec![Member::InSync; self.stores.len()],
        }
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

    /// Changes it durably, at some point between call and return.
    pub async fn change<T>(&self, rng: &mut Rng, change: impl FnOnce(&mut Records) -> T) -> T {
        sleep(Duration::from_micros(rng.below(300))).await;
        let result = change(&mut self.records());
        sleep(Duration::from_micros(rng.below(300))).await;
        result
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
