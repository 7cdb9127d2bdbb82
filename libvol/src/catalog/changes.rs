//! Steps of a volume's life and of a store's fault in the catalog, inside a transaction of whoever decides on them.

use super::{DestroyRecord, DestroyedStore, Leaving, Phase, ScrubRecord, StoreFault, StoreRecord, Tombstone};
use super::{Tx, VolumeRecord};
use crate::error::{Error, Result};
use crate::ids::{StoreId, VolumeId};

impl Tx<'_> {
    /// A volume's next phase, when its creation is through.
    ///
    /// # Errors
    /// `Internal` when the volume is not there; the catalog's own.
    pub fn set_phase(&self, volume: VolumeId, phase: Phase) -> Result<()> {
        let mut record = self.recorded_volume(volume)?;
        record.phase = phase;
        self.update(&record)
    }

    /// The end of a creation that was undone. Its tombstone stays: an old copy of a store may have its slot once more.
    ///
    /// # Errors
    /// `Internal` when the volume is not there; the catalog's own.
    pub fn forget_created(&self, volume: VolumeId) -> Result<()> {
        let dataset = self.recorded_volume(volume)?.dataset;
        self.insert(&Tombstone { volume, dataset })?;
        self.remove::<VolumeRecord>(volume)
    }

    /// A volume's new size, which its stores have heard of.
    ///
    /// # Errors
    /// `Internal` when the volume is not there; the catalog's own.
    pub fn set_size(&self, volume: VolumeId, size_bytes: u64) -> Result<()> {
        let mut record = self.recorded_volume(volume)?;
        record.size_bytes = size_bytes;
        self.update(&record)
    }

    /// The intent of a destruction: the volume's phase, and the record that says where it has to be carried out. Stores given
    /// up as lost are not waited for.
    ///
    /// # Errors
    /// The catalog's own.
    pub fn begin_destruction(&self, mut volume: VolumeRecord, stores: &[StoreId], now: u64) -> Result<()> {
        volume.phase = Phase::Destroying;
        self.update(&volume)?;
        if self.get::<ScrubRecord>(volume.id)?.is_some() {
            self.remove::<ScrubRecord>(volume.id)?;
        }
        let part = |store: &StoreId| {
            let record = self.get::<StoreRecord>(*store)?;
            Ok(DestroyedStore {
                store: *store,
                extents: 0,
                done: false,
                lost: record.is_some_and(|store| store.leaving == Some(Leaving::Lost)),
            })
        };
        self.insert(&DestroyRecord {
            volume: volume.id,
            path: volume.path,
            customer: volume.customer,
            stores: stores.iter().map(part).collect::<Result<_>>()?,
            started_unix_seconds: now,
            finished_unix_seconds: None,
        })
    }

    /// Nothing of the volume is left on a store, where it held so many extents.
    ///
    /// # Errors
    /// `Internal` when there is no such destruction; the catalog's own.
    pub fn destroyed_on(&self, volume: VolumeId, store: StoreId, extents: u32) -> Result<()> {
        let mut record = self.recorded_destruction(volume)?;
        for part in record.stores.iter_mut().filter(|part| part.store == store) {
            part.done = true;
            part.extents = extents;
        }
        self.update(&record)
    }

    /// The end of a destruction: its record says so, a tombstone is written, the volume's record goes.
    ///
    /// # Errors
    /// `Internal` when there is no such destruction; the catalog's own.
    ///
    /// # Panics
    /// When a store is not done.
    pub fn finish_destruction(&self, volume: VolumeId, now: u64) -> Result<()> {
        let mut record = self.recorded_destruction(volume)?;
        let over = |part: &DestroyedStore| part.done || part.lost;
        assert!(record.stores.iter().all(over), "every store is done");
        record.finished_unix_seconds = Some(now);
        self.update(&record)?;
        // A crash between the last store's end and here may find the rest done already.
        if let Some(gone) = self.get::<VolumeRecord>(volume)? {
            self.insert(&Tombstone {
                volume,
                dataset: gone.dataset,
            })?;
            self.remove::<VolumeRecord>(volume)?;
        }
        Ok(())
    }

    /// Latches a store as faulty. A store that was removed meanwhile needs no fault.
    ///
    /// # Errors
    /// The catalog's own.
    pub fn latch_fault(&self, store: StoreId, fault: StoreFault) -> Result<()> {
        let Some(mut record) = self.get::<StoreRecord>(store)? else {
            return Ok(());
        };
        record.fault = Some(fault);
        self.update(&record)
    }

    fn recorded_volume(&self, volume: VolumeId) -> Result<VolumeRecord> {
        self.get(volume)?
            .ok_or_else(|| Error::internal(format!("volume {volume} is gone from the catalog")))
    }

    fn recorded_destruction(&self, volume: VolumeId) -> Result<DestroyRecord> {
        self.get(volume)?
            .ok_or_else(|| Error::internal(format!("no destruction of {volume} in the catalog")))
    }
}
