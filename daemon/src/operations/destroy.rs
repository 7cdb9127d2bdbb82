//! Deletion, and the destructions under way.
//!
//! Delete: not attached → phase *destroying* and the destruction's record in one transaction (the intent) → the volume,
//! if open, stops → the job ([`libvol::destroy`]) starts → answered. The job's end, in one transaction: destruction
//! finished, tombstone written, volume's record gone. A crash anywhere after the intent: the next start runs the job.
//!
//! Progress is not kept here: what a store has reached is asked of the store.

use std::sync::Arc;

use async_trait::async_trait;
use libvol::catalog::{DestroyRecord, DestroyedStore, Phase, StoreRecord, VolumeRecord};
use libvol::control::{self, DestroyState, DestroyStep};
use libvol::destroy::{self, Ledger, Outcome, Part, Reached};
use libvol::ids::{Name, StoreId, VolumeId, VolumePath};
use libvol::store::scrubbed_bytes;
use libvol::{Error, Result, tenant};
use tokio::runtime::Handle;

use super::volume::holder;
use super::{Operations, Seat, locked_volume, volume_named};
use crate::process::unix_seconds;

impl Operations {
    /// Deletes a volume and starts its destruction.
    ///
    /// # Errors
    /// `Unsupported` without `now`; `NotFound`; `Busy` naming the VM that has it.
    pub(crate) async fn volume_delete(
        self: &Arc<Self>,
        path: &VolumePath,
        now: bool,
    ) -> Result<control::Destroy> {
        if !now {
            self.look(|view| volume_named(view, path))?;
            return Err(Error::unsupported(format!(
                "volume {path}: this build has no recycle bin to delete it to; use --now to destroy it at once, for good"
            )));
        }
        let (_lock, volume) = self.lock_volume(path).await?;
        let id = volume.id;
        let stores = self.stores_to_destroy_on(&volume).await?;
        let started = self.change(|tx| {
            let volume = locked_volume(tx, path, id)?;
            if volume.phase == Phase::Destroying {
                return Ok(false);
            }
            if volume.phase == Phase::Creating {
                return Err(Error::busy(format!("volume {path} is being created; try again")));
            }
            let held = holder(tx, volume.id)?;
            if tenant::may_destroy(held.as_ref().map(|(_, vm)| vm.id)).is_err()
                && let Some((_, vm)) = held
            {
                return Err(Error::busy(format!(
                    "volume {path} is attached to VM {:?}; detach it first: volctl detach {path} --vm {}",
                    vm.name.as_str(),
                    vm.name
                )));
            }
            tx.begin_destruction(volume, &stores, unix_seconds())?;
            Ok(true)
        })?;
        if started {
            tracing::info!(volume = %path, %id, "deleted; its destruction begins");
            self.shards
                .of_volume(id)
                .call(move |registry| async move {
                    registry.abandon(id).await;
                    Ok(())
                })
                .await?;
            self.start_destroying(id);
        }
        self.destroy_show(id).await
    }

    /// Starts the job in the background. At most once a volume in a run of the daemon, and again after its failure.
    pub(super) fn start_destroying(self: &Arc<Self>, id: VolumeId) {
        let operations = self.clone();
        self.in_background(async move {
            match operations.destroy(id).await {
                Ok(Outcome::Destroyed) => {
                    tracing::info!(volume = %id, "destroyed on every replica");
                    let name = operations.destroy_record(id).map_or_else(|_| String::new(), |job| job.path.to_string());
                    operations.audit.did("volume.destroyed", name, format!("volume {id}: every replica overwritten, read back and free"));
                }
                Ok(Outcome::Unfinished(stores)) => {
                    for (store, reason) in stores {
                        let name = operations.store_name(store);
                        tracing::warn!(volume = %id, store = %name, "destruction unfinished: {reason}; it goes on at the next start with that store");
                    }
                }
                Err(e) => tracing::error!(volume = %id, "destruction interrupted: {e}; it goes on at the next start"),
            }
        });
    }

    async fn destroy(self: &Arc<Self>, id: VolumeId) -> Result<Outcome> {
        let record = self.destroy_record(id)?;
        let parts = record
            .stores
            .iter()
            .map(|part| Part {
                store: part.store,
                done: part.done || part.lost,
                handle: match self.seat(part.store) {
                    Seat::Open(handle) => Some(handle),
                    Seat::Closed(_) => None,
                },
            })
            .collect();
        let ledger = CatalogLedger {
            operations: self.clone(),
            tokio: Handle::current(),
        };
        self.shards
            .of_volume(id)
            .call(move |_| async move { destroy::run(id, parts, &ledger).await })
            .await
    }

    fn destroy_record(&self, id: VolumeId) -> Result<DestroyRecord> {
        self.look(|view| view.get::<DestroyRecord>(id))?.ok_or_else(|| {
            Error::not_found(format!(
                "no destruction of a volume {id}; `volctl destroy list` shows them"
            ))
        })
    }

    /// All destructions, the newest first.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) async fn destroy_list(&self) -> Result<Vec<control::Destroy>> {
        let mut records = self.look(|view| view.all::<DestroyRecord>())?;
        records.sort_by_key(|record| (std::cmp::Reverse(record.started_unix_seconds), record.volume));
        let mut shown = Vec::with_capacity(records.len());
        for record in records {
            shown.push(self.destroy_shown(record).await?);
        }
        Ok(shown)
    }

    /// One destruction.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) async fn destroy_show(&self, id: VolumeId) -> Result<control::Destroy> {
        self.destroy_shown(self.destroy_record(id)?).await
    }

    async fn destroy_shown(&self, record: DestroyRecord) -> Result<control::Destroy> {
        let mut stores = Vec::with_capacity(record.stores.len());
        for part in &record.stores {
            stores.push(self.part_shown(record.volume, part).await?);
        }
        Ok(control::Destroy {
            volume_id: record.volume,
            volume: record.path,
            state: match record.finished_unix_seconds {
                Some(_) => DestroyState::Destroyed,
                None => DestroyState::Destroying,
            },
            stores,
            started_unix_seconds: record.started_unix_seconds,
            finished_unix_seconds: record.finished_unix_seconds,
        })
    }

    async fn part_shown(&self, volume: VolumeId, part: &DestroyedStore) -> Result<control::DestroyStore> {
        let store = self.look(|view| view.get::<StoreRecord>(part.store))?;
        let extent_bytes = store.as_ref().map_or(0, |s| s.extent_bytes);
        let (state, extents, extents_done) = if part.lost {
            (DestroyStep::Lost, part.extents, 0)
        } else if part.done {
            (DestroyStep::Done, part.extents, part.extents)
        } else {
            match self.reached(part.store, volume).await {
                None => (DestroyStep::Away, part.extents, 0),
                Some(Reached::Nothing) => {
                    (DestroyStep::Waiting, self.extents_on(part.store, volume).await, 0)
                }
                Some(Reached::Tombstone { extents }) => (DestroyStep::Keys, extents, 0),
                Some(Reached::Scrubbing {
                    extents,
                    extents_done,
                }) => (DestroyStep::Scrubbing, extents, extents_done),
                // Done on the store; the catalog is about to say so.
                Some(Reached::Gone { extents }) => (DestroyStep::Scrubbing, extents, extents),
            }
        };
        let bytes = |extents: u32| scrubbed_bytes(extents, extent_bytes);
        Ok(control::DestroyStore {
            store: self.store_name(part.store),
            state,
            extents: extents.into(),
            bytes_done: bytes(extents_done),
            bytes_total: bytes(extents),
        })
    }

    /// Extents a volume that is still live holds on a store; 0 when that cannot be told.
    async fn extents_on(&self, store: StoreId, volume: VolumeId) -> u32 {
        let record = self.look(|view| view.get::<VolumeRecord>(volume)).ok().flatten();
        let (Some(record), Seat::Open(handle)) = (record, self.seat(store)) else {
            return 0;
        };
        let extents = self.extents_of(&handle, record.dataset).await;
        extents.map_or(0, |extents| extents.len() as u32)
    }

    /// What a store has reached; `None` when it is away or does not answer.
    async fn reached(&self, store: StoreId, volume: VolumeId) -> Option<Reached> {
        let Seat::Open(handle) = self.seat(store) else {
            return None;
        };
        self.ask_store(&handle, move |handle| async move {
            destroy::reached(&handle, volume).await
        })
        .await
        .inspect_err(|e| tracing::debug!(%volume, %store, "progress not known: {e}"))
        .ok()
    }

    /// A store's name; of one that was removed since, the beginning of its id.
    pub(super) fn store_name(&self, id: StoreId) -> Name {
        let record = self.look(|view| view.get::<StoreRecord>(id)).ok().flatten();
        record.map_or_else(
            || {
                format!("removed-{}", &id.0.simple().to_string()[..8])
                    .parse()
                    .expect("letters, digits and a dash")
            },
            |record| record.name,
        )
    }
}

/// The catalog as the job's ledger. The job runs on a shard, which must not wait for the catalog's disk: commits go to
/// tokio's blocking threads.
struct CatalogLedger {
    operations: Arc<Operations>,
    tokio: Handle,
}

impl CatalogLedger {
    async fn record(&self, change: impl FnOnce(&Operations) -> Result<()> + Send + 'static) -> Result<()> {
        let operations = self.operations.clone();
        self.tokio
            .spawn_blocking(move || change(&operations))
            .await
            .map_err(|_| Error::unavailable("the daemon is shutting down"))?
    }
}

#[async_trait]
impl Ledger for CatalogLedger {
    async fn store_done(&self, volume: VolumeId, store: StoreId, extents: u32) -> Result<()> {
        self.record(move |operations| {
            operations
                .catalog
                .write(|tx| tx.destroyed_on(volume, store, extents))
        })
        .await
    }

    async fn finished(&self, volume: VolumeId) -> Result<()> {
        self.record(move |operations| {
            operations
                .catalog
                .write(|tx| tx.finish_destruction(volume, unix_seconds()))
        })
        .await
    }
}
