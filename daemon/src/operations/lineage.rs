//! Old copies of stores: told when a store is opened, before anything is served ([`libvol::store::Lineage`] has the rules).
//!
//! Open: store read → judged; verdict, its consequences and the new incarnation durable in one catalog transaction → store
//! written → incarnation confirmed in the catalog → in use. A crash in between: the next start finds the incarnation before
//! or the one that was meant, and the consequences are there.
//!
//! What an old copy leads to: each of its replicas is *stale* and needs a full copy, which brings it back online like any
//! other that is out of sync ([`super::replicas`]). Where it is the last in sync of its volume there is nothing to copy
//! from: the record stays in sync, is noted as old, and the volume is not opened until an operator has acted. The store itself
//! is used on. Volumes that were destroyed after the copy was taken are destroyed on it again; that is asked of every store
//! whenever it is opened, so it needs no record.
//!
//! A store that is opened while its volumes are served (it was away, or is reopened) has no replica in sync in any of them,
//! so their memberships do not change here. That nothing can be relied on is in the catalog before the store is in use, and
//! a volume's own memory of it does not take that away ([`libvol::catalog::Catalog::swap_membership`]).
//!
//! While stores are open, what they have committed is noted in the catalog every few seconds, and when they are closed.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use libvol::catalog::{Loss, OldCopy, StoreRecord, VolumeRecord};
use libvol::disk::DiskFile;
use libvol::ids::{Incarnation, StoreId};
use libvol::limits::LINEAGE_FLOOR_SECONDS;
use libvol::store::{self, Expect, Found, Renewal, StoreHandle};
use libvol::{Error, Result};
use tokio::sync::oneshot;

use super::{Operations, Seat};

/// How often the catalog hears what stores have committed.
const FLOOR_PERIOD: Duration = Duration::from_secs(LINEAGE_FLOOR_SECONDS);

impl Operations {
    /// Opens a store on its home shard. `judge` decides by what was found, and makes durable what the decision needs, before
    /// anything is written to the store.
    ///
    /// # Errors
    /// As [`store::open`], and what `judge` says.
    pub(super) async fn open_file(
        &self,
        id: StoreId,
        file: DiskFile,
        judge: impl FnOnce(Found) -> Result<Renewal>,
    ) -> Result<StoreHandle> {
        let expect = Expect {
            installation: Some(self.catalog.installation()),
            store: Some(id),
        };
        let (tell, told) = oneshot::channel();
        let (allow, allowed) = oneshot::channel();
        let opening = self.shards.of_store(id).call(move |_| async move {
            let opening = store::begin_open(&file, expect).await?;
            let _ = tell.send(opening.found());
            match allowed.await {
                Ok(renewal) => opening.finish(Some(renewal)).await,
                Err(_) => Err(Error::refused("the store was judged and is not opened")),
            }
        });
        let judging = async move {
            // The opening that ends before it has found anything says why itself.
            let Ok(found) = told.await else { return Ok(()) };
            let _ = allow.send(judge(found)?);
            Ok(())
        };
        let (opened, judged) = tokio::join!(opening, judging);
        judged.and(opened)
    }

    /// Opens a store of the catalog that was opened before.
    ///
    /// # Errors
    /// As [`store::open`]; `Refused` when the catalog is older than the store.
    pub(super) async fn open_known(&self, id: StoreId, file: DiskFile) -> Result<StoreHandle> {
        let handle = self.open_file(id, file, |found| self.judge(id, &found)).await?;
        let confirmed = self.change(|tx| tx.confirm_store(id, handle.incarnation(), handle.committed_lsn()));
        if let Err(e) = confirmed {
            self.close_store(&handle).await;
            return Err(e);
        }
        if let Err(e) = self.destroy_again_on(id, &handle).await {
            tracing::error!(store = %handle.info().name, "what was destroyed before cannot be destroyed again: {e}; the next opening tries anew");
        }
        Ok(handle)
    }

    /// Judges a store by the catalog, and makes the consequences durable together with the new incarnation.
    fn judge(&self, id: StoreId, found: &Found) -> Result<Renewal> {
        let judged = self.change(|tx| tx.judge_store(id, found, Incarnation::random()))?;
        let name = judged.name;
        if let Some(OldCopy { why, losses }) = judged.old {
            tracing::error!(store = %name, "is an OLD COPY: {why}; no data of it is served");
            for (volume, loss) in losses {
                match loss {
                    Loss::None => {}
                    Loss::Replica => {
                        tracing::warn!(store = %name, %volume, "its replica is stale and needs a full copy");
                    }
                    Loss::Last => {
                        tracing::error!(store = %name, %volume, "its last replica in sync is on the old copy: it is not served until an operator acts");
                    }
                }
            }
        }
        Ok(judged.renewal)
    }

    /// Refuses a volume whose last replica in sync is an old copy.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) fn check_not_old(&self, volume: &VolumeRecord) -> Result<()> {
        let Some(replica) = volume.replicas.iter().find(|replica| replica.is_old_and_last()) else {
            return Ok(());
        };
        let store = self.store_name(replica.store);
        let why = replica.reason.as_deref().unwrap_or("no reason known");
        Err(Error::unavailable(format!(
            "volume {}: its last replica in sync is not served: {why}; put the right file or device back and restart vold. \
             To use what is there as it is, stop vold, then: vold clear-fault --data-dir DIR --store {store}",
            volume.path
        )))
    }

    /// Destroys once more what was destroyed before and is on a store again, or still: an old copy may lack tombstones, or
    /// have been taken in the middle of a destruction. Scrubbing goes on in the background.
    async fn destroy_again_on(&self, id: StoreId, handle: &StoreHandle) -> Result<()> {
        let (live, remains) = self
            .ask_store(handle, |store| async move {
                Ok((store.volumes().await?, store.remains().await?))
            })
            .await?;
        for volume in live.iter().chain(&remains) {
            if !self.look(|view| view.is_gone_from(*volume, id))? {
                continue;
            }
            if live.contains(volume) {
                tracing::error!(store = %handle.info().name, %volume, "was destroyed and is there again: it is destroyed once more");
            }
            let volume = *volume;
            self.ask_store(
                handle,
                move |store| async move { store.destroy_volume(volume).await },
            )
            .await?;
        }
        Ok(())
    }

    /// Keeps the catalog's floors up with the stores.
    pub(super) fn watch_floors(self: &Arc<Self>) {
        let operations = self.clone();
        self.in_background(async move {
            loop {
                tokio::time::sleep(FLOOR_PERIOD).await;
                operations.beat_stores().await;
                if let Err(e) = operations.record_floors() {
                    tracing::error!("what stores have committed cannot be recorded: {e}");
                }
            }
        });
    }

    /// A store with dirty extents may have been written to without a commit since its floor was noted: it gets one.
    async fn beat_stores(&self) {
        let mut beats = Vec::new();
        for (id, seat) in self.seats() {
            let Seat::Open(handle) = seat else { continue };
            if handle.space().dirty == 0 || handle.fault().is_some() {
                continue;
            }
            let name = handle.info().name.clone();
            let beat = self
                .shards
                .of_store(id)
                .call(move |_| async move { handle.beat().await });
            // A device that hangs must not keep the others' floors down.
            beats.push(async move {
                if let Ok(Err(e)) = tokio::time::timeout(FLOOR_PERIOD, beat).await {
                    tracing::warn!(store = %name, "no commit to note in the catalog: {e}");
                }
            });
        }
        join_all(beats).await;
    }

    /// Notes in the catalog what stores have committed, where that is news.
    ///
    /// # Errors
    /// The catalog's.
    pub(super) fn record_floors(&self) -> Result<()> {
        let committed: Vec<(StoreId, Incarnation, u64)> = self
            .seats()
            .into_iter()
            .filter_map(|(id, seat)| match seat {
                Seat::Open(handle) => Some((id, handle.incarnation(), handle.committed_lsn())),
                Seat::Closed(_) => None,
            })
            .collect();
        let risen = self.look(|view| {
            let mut risen = Vec::new();
            for (id, incarnation, lsn) in committed {
                if let Some(record) = view.get::<StoreRecord>(id)?
                    && record.lineage.floor_lsn < lsn
                {
                    risen.push((id, incarnation, lsn));
                }
            }
            Ok(risen)
        })?;
        if risen.is_empty() {
            return Ok(());
        }
        self.change(|tx| {
            for (id, incarnation, lsn) in risen {
                tx.raise_floor(id, incarnation, lsn)?;
            }
            Ok(())
        })
    }
}
