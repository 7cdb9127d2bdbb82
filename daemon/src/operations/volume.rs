//! Volumes: create, list, show, resize; and opening one on its shard.
//!
//! Create: record with phase *creating* (the intent: a name and its stores) → data key → slot and record on every store →
//! phase *ready* → answered. Whatever stops it in between is rolled back through the stores' destroy path, at once or at
//! the next start, so no key of a volume that never was stays behind. Wrapped keys go to the stores' slots and nowhere
//! else.
//!
//! Resize (grow only): every store's record → catalog → the open volume. A crash in between leaves some stores with the
//! larger size, which the next start carries on to all and to the catalog: nobody can have written beyond the old size,
//! and space is allocated on first write, so going on is as right as going back, and simpler.

use std::sync::Arc;

use libvol::catalog::{
    AttachmentRecord, CustomerRecord, Leaving, Phase, ReplicaRecord, StoreRecord, View, VmRecord,
    VolumeRecord,
};
use libvol::control;
use libvol::destroy::{Reached, reached};
use libvol::ids::{DatasetId, Epoch, KeyVersion, VolumeId, VolumePath};
use libvol::keys::KeyContext;
use libvol::limits::{BLOCK, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUMES_PER_CUSTOMER};
use libvol::store::{self, Change, Member, StoreHandle, VolumeSlot};
use libvol::{Error, Kind, Result};

use super::place::{Candidate, place};
use super::replicas::CatalogRegister;
use super::{Operations, Seat, customer_named, volume_named};
use crate::process::unix_seconds;
use crate::shard::{OpenReplica, OpenSpec};

/// Version of a new volume's first data key.
const FIRST_KEY: KeyVersion = KeyVersion(1);

impl Operations {
    /// Makes a volume.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `NotFound` (customer), `NoSpace` (zones, slots), `Io`.
    pub(crate) async fn volume_create(
        self: &Arc<Self>,
        request: control::VolumeCreate,
    ) -> Result<control::Volume> {
        check_size(&request.volume, request.size_bytes)?;
        let candidates = self.candidates()?;
        let id = VolumeId::random();
        let _lock = self.volume_locks.lock(id).await;
        let (record, customer) = self.change(|tx| {
            let customer = customer_named(tx, &request.volume.customer)?;
            if let Some(taken) = tx.named::<VolumeRecord>(request.volume.to_string())? {
                return Err(match taken.phase {
                    Phase::Destroying => Error::busy(format!(
                        "volume {} is being destroyed; wait for it (volctl destroy wait {}), or choose another name",
                        taken.path, taken.id
                    )),
                    Phase::Ready | Phase::Creating => Error::exists(format!(
                        "volume {} exists already; choose another name",
                        taken.path
                    )),
                });
            }
            let mine = tx
                .all::<VolumeRecord>()?
                .iter()
                .filter(|v| v.customer == customer.id)
                .count();
            if mine >= VOLUMES_PER_CUSTOMER {
                return Err(Error::no_space(format!(
                    "customer {:?} has {VOLUMES_PER_CUSTOMER} volumes, the most one may have",
                    customer.name.as_str()
                )));
            }
            let stores = place(&candidates, request.replicas)
                .map_err(|e| e.context(format!("volume {}", request.volume)))?;
            for store in &stores {
                if tx.get::<StoreRecord>(*store)?.is_none() {
                    return Err(Error::busy("a store was removed meanwhile; try again"));
                }
            }
            let record = VolumeRecord {
                id,
                path: request.volume.clone(),
                customer: customer.id,
                dataset: DatasetId::random(),
                size_bytes: request.size_bytes,
                replicas_wanted: stores.len(),
                replicas: stores
                    .into_iter()
                    .map(ReplicaRecord::in_sync)
                    .collect(),
                membership_epoch: Epoch(1),
                attachment_epoch: Epoch(0),
                phase: Phase::Creating,
                created_unix_seconds: unix_seconds(),
            };
            tx.insert(&record)?;
            Ok((record, customer))
        })?;
        let finished = match self.put_on_stores(&record, &customer).await {
            Ok(()) => self.set_phase(record.id, Phase::Ready),
            Err(e) => Err(e),
        };
        if let Err(e) = finished {
            if let Err(left) = self.roll_back_creation(&record).await {
                tracing::warn!(volume = %record.path, "what is left of its creation is rolled back at the next start: {left}");
            }
            return Err(e);
        }
        tracing::info!(volume = %record.path, id = %record.id, size_bytes = record.size_bytes, replicas = record.replicas.len(), "created");
        self.volume_show(&record.path).await
    }

    pub(super) fn candidates(&self) -> Result<Vec<Candidate>> {
        let records = self.look(|view| view.all::<StoreRecord>())?;
        Ok(records
            .iter()
            .filter_map(|record| {
                let handle = self.open_store(record).ok()?;
                record.leaving.is_none().then_some(())?;
                Some(Candidate {
                    id: record.id,
                    zone: record.zone.clone(),
                    free_bytes: u64::from(handle.space().free) * record.extent_bytes,
                    extent_bytes: record.extent_bytes,
                })
            })
            .collect())
    }

    async fn put_on_stores(&self, record: &VolumeRecord, customer: &CustomerRecord) -> Result<()> {
        let context = KeyContext {
            volume: record.id,
            customer: record.customer,
        };
        // The key itself is dropped, and zeroed, at once: the volume's first opening unwraps it.
        let (_, wrapped) = self.keys.create_data_key(customer.cmk, context).await?;
        let slot = VolumeSlot {
            volume: record.id,
            customer: record.customer,
            customer_name: record.path.customer.clone(),
            volume_name: record.path.name.clone(),
            dataset: record.dataset,
            stores: record.stores(),
            keys: vec![(FIRST_KEY, wrapped)],
        };
        for handle in self.replica_stores(record)? {
            let (slot, facts) = (slot.clone(), store_record(record, record.size_bytes));
            self.ask_store(&handle, move |store| async move {
                store.add_volume(slot, facts).await
            })
            .await?;
        }
        Ok(())
    }

    pub(super) fn set_phase(&self, id: VolumeId, phase: Phase) -> Result<()> {
        self.change(|tx| tx.set_phase(id, phase))
    }

    /// Undoes an unfinished creation: slots on stores are overwritten, then the record goes. The volume never held data.
    pub(super) async fn roll_back_creation(&self, record: &VolumeRecord) -> Result<()> {
        let id = record.id;
        for handle in self.stores_to_roll_back(record)? {
            let undo = async move |store: StoreHandle| match reached(&store, id).await? {
                Reached::Gone { .. } | Reached::Scrubbing { .. } => Ok(()),
                Reached::Nothing | Reached::Tombstone { .. } => store.destroy_volume(id).await,
            };
            self.ask_store(&handle, undo).await?;
        }
        self.change(|tx| tx.forget_created(id))
    }

    /// The stores of a creation to be undone; those given up as lost are nobody's any more.
    fn stores_to_roll_back(&self, record: &VolumeRecord) -> Result<Vec<StoreHandle>> {
        let known = self.look(|view| {
            let lost = |store: &StoreRecord| store.leaving == Some(Leaving::Lost);
            let mut known = record.clone();
            let mut kept = Vec::new();
            for replica in known.replicas {
                if view
                    .get::<StoreRecord>(replica.store)?
                    .is_some_and(|store| !lost(&store))
                {
                    kept.push(replica);
                }
            }
            known.replicas = kept;
            Ok(known)
        })?;
        self.replica_stores(&known)
    }

    /// All volumes.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) async fn volume_list(&self) -> Result<Vec<control::Volume>> {
        let records = self.look(|view| view.all::<VolumeRecord>())?;
        let mut shown = Vec::with_capacity(records.len());
        for record in records.into_iter().filter(|r| r.phase != Phase::Creating) {
            shown.push(self.volume_shown(record).await?);
        }
        Ok(shown)
    }

    /// One volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn volume_show(&self, path: &VolumePath) -> Result<control::Volume> {
        let record = self.look(|view| volume_named(view, path))?;
        self.volume_shown(record).await
    }

    /// Grows a volume.
    ///
    /// # Errors
    /// `Invalid` for a smaller or misaligned size; `Busy` while it is made or destroyed; `Unavailable`, `Io`.
    pub(crate) async fn volume_resize(
        &self,
        path: &VolumePath,
        request: control::VolumeResize,
    ) -> Result<control::Volume> {
        let size = request.size_bytes;
        check_size(path, size)?;
        let (_lock, record) = self.lock_volume(path).await?;
        check_ready(&record)?;
        if size < record.size_bytes {
            return Err(Error::invalid(format!(
                "volume {path} has {} bytes and cannot shrink to {size}; create a smaller one and copy",
                record.size_bytes
            )));
        }
        if size > record.size_bytes {
            self.set_size(&record, size).await?;
            tracing::info!(volume = %path, size_bytes = size, "grown");
        }
        self.volume_show(path).await
    }

    /// Makes a size durable on all stores and in the catalog, then known to the open volume.
    pub(super) async fn set_size(&self, record: &VolumeRecord, size: u64) -> Result<()> {
        let id = record.id;
        let (mut told, mut failed) = (false, None);
        for (replica, handle) in self.stores_at_hand(record) {
            let grown = Change::SetSize {
                volume: id,
                size_bytes: size,
            };
            let name = handle.info().name.clone();
            let written = self
                .ask_store(
                    &handle,
                    move |store| async move { store.commit(vec![grown]).await },
                )
                .await;
            match written {
                Ok(()) => told |= replica.state == Member::InSync,
                // It hears of the size when it catches up, or at the next start.
                Err(e) => {
                    tracing::warn!(volume = %record.path, store = %name, "not told of the new size: {e}");
                    failed = failed.or(Some(e));
                }
            }
        }
        if let Some(e) = failed.filter(|_| !told) {
            return Err(e);
        }
        self.change(|tx| tx.set_size(id, size))?;
        self.shards
            .of_volume(id)
            .call(move |registry| async move {
                registry.grow(id, size);
                Ok(())
            })
            .await
    }

    /// Opens a volume on its shard, unless it is open. Its lock is held.
    ///
    /// # Errors
    /// `Unavailable` when a store is away; the key service's, the store's and the volume's.
    pub(super) async fn open_volume(&self, record: &VolumeRecord) -> Result<()> {
        let opened = self.try_open_volume(record).await;
        let reason = opened.as_ref().err().map(ToString::to_string);
        self.set_failure(record.id, reason);
        opened
    }

    /// The same, but a failure is the caller's to tell of.
    ///
    /// # Errors
    /// As [`Operations::open_volume`].
    pub(super) async fn try_open_volume(&self, record: &VolumeRecord) -> Result<()> {
        let at_hand = self.stores_at_hand(record);
        // Read after the seats: what a store was found to be is in the catalog before the store is in use.
        let record = &self
            .look(|view| view.get::<VolumeRecord>(record.id))?
            .ok_or_else(|| Error::not_found(format!("volume {} is gone", record.path)))?;
        self.check_not_old(record)?;
        let in_sync = |replica: &ReplicaRecord| replica.state == Member::InSync;
        if let Some(away) = record.replicas.iter().find(|replica| in_sync(replica))
            && !at_hand
                .iter()
                .any(|(replica, _)| record.is_in_sync_on(replica.store))
        {
            // Says which, and why.
            let record = self.look(|view| view.get::<StoreRecord>(away.store))?;
            let record = record.ok_or_else(|| Error::internal("a replica's store is not in the catalog"))?;
            self.open_store(&record)?;
        }
        let slot = self.slot_on(record, &at_hand).await?;
        if let Err(e) = self.settle_slots(record).await {
            tracing::warn!(volume = %record.path, "a slot keeps an older list of stores: {e}");
        }
        let (key_version, wrapped) = slot
            .keys
            .iter()
            .max_by_key(|(version, _)| *version)
            .ok_or_else(|| Error::damaged(format!("volume {}: its slot holds no key", record.path)))?;
        let context = KeyContext {
            volume: record.id,
            customer: record.customer,
        };
        let key = self
            .keys
            .unwrap_data_key(wrapped, context)
            .await
            .map_err(|e| e.context(format!("volume {}", record.path)))?;
        let replicas = record.replicas.iter().map(|replica| OpenReplica {
            store: replica.store,
            name: self.store_name(replica.store).to_string(),
            handle: at_hand
                .iter()
                .find_map(|(other, handle)| (other.store == replica.store).then(|| handle.clone())),
            state: replica.state,
            full_copy: replica.full_copy,
            reason: replica.reason.clone(),
        });
        let spec = OpenSpec {
            id: record.id,
            label: record.path.to_string(),
            dataset: record.dataset,
            size_bytes: record.size_bytes,
            key,
            key_version: *key_version,
            replicas: replicas.collect(),
            membership_epoch: record.membership_epoch,
            resync_bytes_per_second: self.resync_bytes_per_second,
            register: Arc::new(CatalogRegister {
                catalog: self.catalog.clone(),
                audit: self.audit.clone(),
                runtime: tokio::runtime::Handle::current(),
            }),
        };
        self.shards
            .of_volume(record.id)
            .call(move |registry| async move { registry.open(spec).await })
            .await
    }

    /// The volume's slot, from the first store with a replica in sync that can read it, checked against the catalog.
    pub(super) async fn slot(&self, record: &VolumeRecord) -> Result<VolumeSlot> {
        self.slot_on(record, &self.stores_at_hand(record)).await
    }

    async fn slot_on(
        &self,
        record: &VolumeRecord,
        stores: &[(ReplicaRecord, StoreHandle)],
    ) -> Result<VolumeSlot> {
        let mut last = None;
        let in_sync = stores
            .iter()
            .filter(|(replica, _)| record.is_in_sync_on(replica.store));
        for (_, handle) in in_sync {
            match self.state_on(handle, record.id).await {
                Ok(store::VolumeState::Live(_, slot)) => {
                    if slot.customer != record.customer || slot.dataset != record.dataset {
                        return Err(Error::damaged(format!(
                            "volume {}: store {:?} has it as another customer's or dataset's; run `vold check`",
                            record.path,
                            handle.info().name.as_str()
                        )));
                    }
                    return Ok(slot);
                }
                Ok(other) => {
                    return Err(Error::damaged(format!(
                        "volume {}: store {:?} does not hold it ({}); run `vold check`",
                        record.path,
                        handle.info().name.as_str(),
                        if other == store::VolumeState::Unknown {
                            "unknown there"
                        } else {
                            "destroyed there"
                        }
                    )));
                }
                // Both copies of the slot are bad here: another replica has the same.
                Err(e) if e.kind() == Kind::Damaged => {
                    tracing::warn!(volume = %record.path, store = %handle.info().name, "{e}");
                    last = Some(e);
                }
                Err(e) => return Err(e),
            }
        }
        Err(last.unwrap_or_else(|| {
            Error::unavailable(format!(
                "volume {}: no store with a replica in sync is in use",
                record.path
            ))
        }))
    }

    /// Where a volume stands on a store.
    pub(super) async fn state_on(&self, handle: &StoreHandle, id: VolumeId) -> Result<store::VolumeState> {
        self.ask_store(handle, move |store| async move { store.volume(id).await })
            .await
    }

    /// Closes a volume on its shard. Its lock is held.
    pub(super) async fn close_volume(&self, record: &VolumeRecord) {
        let id = record.id;
        let closed = self
            .shards
            .of_volume(id)
            .call(move |registry| async move { registry.close(id).await })
            .await;
        if let Err(e) = closed {
            tracing::error!(volume = %record.path, "closed with an error, its next opening recovers: {e}");
        }
    }

    async fn volume_shown(&self, record: VolumeRecord) -> Result<control::Volume> {
        let report = self.report(record.id).await?;
        let (attachment, stores) = self.look(|view| {
            let stores = record
                .held()
                .map(|(place, r)| Ok((place, view.get::<StoreRecord>(r.store)?)));
            Ok((holder(view, record.id)?, stores.collect::<Result<Vec<_>>>()?))
        })?;
        let mut replicas = Vec::with_capacity(record.replicas.len());
        let mut away = None;
        let mut first_open = None;
        let mut serves = false;
        for (place, store) in stores {
            let Some(store) = store else { continue };
            let in_sync = record.replicas[place].state == Member::InSync;
            match self.open_store(&store) {
                Ok(handle) => {
                    serves |= in_sync;
                    first_open.get_or_insert((handle, store.extent_bytes));
                }
                Err(e) if in_sync => {
                    away.get_or_insert(e.to_string());
                }
                Err(_) => {}
            }
            replicas.push(self.replica_shown(&record, place, &store, report.as_ref()));
        }
        let away = away.filter(|_| !serves);
        let failure = report.as_ref().and_then(|r| r.failure.clone());
        let reason = failure.or(away).or_else(|| self.failure(record.id));
        let state = match record.phase {
            Phase::Destroying => control::VolumeState::Destroying,
            _ if reason.is_some() => control::VolumeState::Failed,
            _ if attachment.is_some() => control::VolumeState::Attached,
            _ => control::VolumeState::Available,
        };
        let allocated_bytes = match (&report, first_open) {
            (Some(report), Some((_, extent_bytes))) => report.stats.allocated_extents * extent_bytes,
            (None, Some((handle, extent_bytes))) if record.phase == Phase::Ready => {
                let extents = self.extents_of(&handle, record.dataset).await?;
                extents.len() as u64 * extent_bytes
            }
            _ => 0,
        };
        let stats = report.map(|r| r.stats).unwrap_or_default();
        Ok(control::Volume {
            id: record.id,
            name: record.path.name,
            customer: record.path.customer,
            size_bytes: record.size_bytes,
            state,
            reason: reason.filter(|_| state == control::VolumeState::Failed),
            epoch: record.attachment_epoch.0,
            replicas,
            allocated_bytes,
            attached_to: attachment.map(|(_, vm)| vm.name),
            healed_blocks: stats.healed_blocks,
            healed_areas: stats.healed_areas,
            unverified_blocks: stats.unverified_blocks,
            recovering_extents: stats.recovering_extents,
            created_unix_seconds: record.created_unix_seconds,
        })
    }

    /// Stores' larger sizes, of a resize that a crash interrupted, are carried on to all. Run at start.
    pub(super) async fn settle_size(&self, record: &VolumeRecord) -> Result<VolumeRecord> {
        let mut sizes = Vec::new();
        for (_, handle) in self.stores_at_hand(record) {
            match self.state_on(&handle, record.id).await {
                Ok(store::VolumeState::Live(facts, _)) => sizes.push(facts.size_bytes),
                Ok(_) => {}
                Err(e) => {
                    tracing::warn!(volume = %record.path, store = %handle.info().name, "does not tell its size: {e}");
                }
            }
        }
        let largest = settled_size(&record.path, record.size_bytes, &sizes)?;
        let mut settled = record.clone();
        if sizes.iter().any(|size| *size != largest) || record.size_bytes != largest {
            tracing::info!(volume = %record.path, size_bytes = largest, "an interrupted resize is finished");
            self.set_size(record, largest).await?;
            settled.size_bytes = largest;
        }
        Ok(settled)
    }

    /// Whether a store is open and well.
    pub(super) fn is_open(&self, store: libvol::ids::StoreId) -> bool {
        matches!(self.seat(store), Seat::Open(handle) if handle.fault().is_none())
    }
}

/// Whether a volume is neither being made nor being destroyed.
pub(super) fn check_ready(record: &VolumeRecord) -> Result<()> {
    let path = &record.path;
    match record.phase {
        Phase::Ready => Ok(()),
        Phase::Creating => Err(Error::busy(format!(
            "volume {path} is being created; if that was interrupted, it is rolled back when vold starts with its stores"
        ))),
        Phase::Destroying => Err(Error::busy(format!(
            "volume {path} is being destroyed; follow it with: volctl destroy wait {}",
            record.id
        ))),
    }
}

/// The attachment of a volume and its VM.
pub(super) fn holder(view: &View<'_>, volume: VolumeId) -> Result<Option<(AttachmentRecord, VmRecord)>> {
    let Some(attachment) = view.named::<AttachmentRecord>(volume.to_string())? else {
        return Ok(None);
    };
    let vm = view.get::<VmRecord>(attachment.vm)?.ok_or_else(|| {
        Error::damaged(format!(
            "attachment {}: its VM is not in the catalog",
            attachment.id
        ))
    })?;
    Ok(Some((attachment, vm)))
}

/// A volume's record on every store, with that size.
fn store_record(record: &VolumeRecord, size_bytes: u64) -> store::VolumeRecord {
    store::VolumeRecord {
        volume: record.id,
        size_bytes,
        membership_epoch: record.membership_epoch,
        members: record.replicas.iter().map(|r| r.state).collect(),
    }
}

/// The largest of the sizes that catalog and stores have, if a volume can have it.
fn settled_size(path: &VolumePath, recorded: u64, on_stores: &[u64]) -> Result<u64> {
    let largest = on_stores.iter().copied().fold(recorded, u64::max);
    check_size(path, largest).map(|()| largest).map_err(|e| {
        Error::damaged(format!(
            "{e}; that is what a store or the catalog holds: run `vold check`"
        ))
    })
}

fn check_size(path: &VolumePath, size: u64) -> Result<()> {
    let what = if !size.is_multiple_of(BLOCK) {
        format!("is not a multiple of {BLOCK}")
    } else if size < VOLUME_BYTES_MIN {
        format!("is too small; a volume has at least {VOLUME_BYTES_MIN}")
    } else if size > VOLUME_BYTES_MAX {
        format!(
            "is too large; a volume has at most {} TiB",
            VOLUME_BYTES_MAX >> 40
        )
    } else {
        return Ok(());
    };
    Err(Error::invalid(format!(
        "volume {path}: a size of {size} bytes {what}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resize_is_finished_with_the_largest_size_and_never_with_an_impossible_one() {
        let path = "acme/web".parse().unwrap();
        assert_eq!(settled_size(&path, 8192, &[8192, 16384]).unwrap(), 16384);
        assert_eq!(settled_size(&path, 8192, &[]).unwrap(), 8192);
        for impossible in [8193, VOLUME_BYTES_MAX + BLOCK, u64::MAX] {
            let error = settled_size(&path, 8192, &[impossible, 8192]).unwrap_err();
            assert_eq!(error.kind(), Kind::Damaged);
            assert!(error.message().contains("acme/web"), "{error}");
        }
    }

    #[test]
    fn a_size_is_a_positive_multiple_of_a_block_up_to_the_cap() {
        let path = "acme/web".parse().unwrap();
        for good in [4096, 8192, VOLUME_BYTES_MAX] {
            assert!(check_size(&path, good).is_ok(), "{good}");
        }
        for bad in [0, 1, 4095, 4097, VOLUME_BYTES_MAX + 4096, u64::MAX] {
            assert_eq!(check_size(&path, bad).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }
}
