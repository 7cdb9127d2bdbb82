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
use libvol::catalog::{DestroyRecord, Phase, StoreRecord, Tombstone, Tx, VolumeRecord};
use libvol::disk::DiskFile;
use libvol::ids::{Epoch, Incarnation, StoreId, VolumeId, VolumePath};
use libvol::limits::LINEAGE_FLOOR_SECONDS;
use libvol::store::{self, Expect, Found, Member, Renewal, StoreHandle, Verdict};
use libvol::{Error, Result};
use tokio::sync::oneshot;

use super::{Operations, Seat};

/// How often the catalog hears what stores have committed.
const FLOOR_PERIOD: Duration = Duration::from_secs(LINEAGE_FLOOR_SECONDS);

/// What an old copy of a store means to one of the volumes on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Nothing: it has no replica there, or is being made or destroyed.
    None,
    /// A replica, which other replicas can bring up to date.
    Replica,
    /// The last replica in sync.
    Last,
}

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
        let confirmed = self.change(|tx| {
            let mut record = recorded(tx, id)?;
            record
                .lineage
                .confirm(handle.incarnation(), handle.committed_lsn());
            tx.update(&record)
        });
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
        let (renewal, name, old) = self.change(|tx| {
            let mut record = recorded(tx, id)?;
            let old = match record.lineage.judge(found) {
                Verdict::Continues => None,
                Verdict::OldCopy(why) => {
                    let losses = give_up_replicas(tx, &record, &why)?;
                    Some((why, losses))
                }
                Verdict::Ahead(why) => {
                    return Err(Error::refused(format!(
                        "store {:?} was opened after this catalog was written ({why}): the catalog is an old copy; stop vold, \
                         and put the newer one back or move it away and rebuild it: vold rebuild-catalog",
                        record.name.as_str()
                    )));
                }
            };
            let renewal = record.lineage.begin(found, Incarnation::random());
            tx.update(&record)?;
            Ok((renewal, record.name, old))
        })?;
        if let Some((why, losses)) = old {
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
        Ok(renewal)
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
        let asked = handle.clone();
        let (live, remains) = self
            .shards
            .of_store(id)
            .call(move |_| async move { Ok((asked.volumes().await?, asked.remains().await?)) })
            .await?;
        for volume in live.iter().chain(&remains) {
            if !self.look(|view| {
                let destruction = view.get::<DestroyRecord>(*volume)?;
                let done = destruction
                    .is_some_and(|job| job.stores.iter().any(|part| part.store == id && part.done));
                Ok(done || view.get::<Tombstone>(*volume)?.is_some())
            })? {
                continue;
            }
            if live.contains(volume) {
                tracing::error!(store = %handle.info().name, %volume, "was destroyed and is there again: it is destroyed once more");
            }
            self.destroy_on(handle, *volume).await?;
        }
        Ok(())
    }

    async fn destroy_on(&self, handle: &StoreHandle, volume: VolumeId) -> Result<()> {
        let store = handle.clone();
        self.shards
            .of_store(handle.info().id)
            .call(move |_| async move { store.destroy_volume(volume).await })
            .await
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
                // It may have been removed meanwhile.
                if let Some(mut record) = tx.get::<StoreRecord>(id)?
                    && record.lineage.raise(incarnation, lsn)
                {
                    tx.update(&record)?;
                }
            }
            Ok(())
        })
    }
}

fn recorded(tx: &Tx<'_>, id: StoreId) -> Result<StoreRecord> {
    tx.get::<StoreRecord>(id)?
        .ok_or_else(|| Error::internal(format!("store {id} is gone from the catalog")))
}

/// Every replica on an old copy of `store` is given up, or noted as old where it is the last.
fn give_up_replicas(tx: &Tx<'_>, store: &StoreRecord, why: &str) -> Result<Vec<(VolumePath, Loss)>> {
    let reason = format!("store {:?} is an old copy: {why}", store.name.as_str());
    let mut losses = Vec::new();
    for mut volume in tx.all::<VolumeRecord>()? {
        let loss = give_up(&mut volume, store.id, &reason);
        if loss != Loss::None {
            tx.update(&volume)?;
            losses.push((volume.path, loss));
        }
    }
    Ok(losses)
}

/// The same for one volume.
fn give_up(volume: &mut VolumeRecord, store: StoreId, reason: &str) -> Loss {
    let good_elsewhere = volume
        .replicas
        .iter()
        .any(|r| r.store != store && r.state == Member::InSync && !r.full_copy);
    let Some(place) = volume.replica_on(store) else {
        return Loss::None;
    };
    let replica = &mut volume.replicas[place];
    // An unfinished creation is rolled back, and a destruction goes on: neither serves anything.
    if volume.phase != Phase::Ready {
        return Loss::None;
    }
    replica.full_copy = true;
    replica.reason = Some(reason.to_owned());
    if replica.state == Member::InSync && !good_elsewhere {
        return Loss::Last;
    }
    if replica.state == Member::InSync {
        volume.membership_epoch = Epoch(volume.membership_epoch.0 + 1);
    }
    replica.state = Member::Stale;
    Loss::Replica
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::catalog::ReplicaRecord;
    use libvol::ids::{CustomerId, DatasetId};

    fn store(n: usize) -> StoreId {
        StoreId::from_bytes([n as u8; 16])
    }

    fn volume(states: &[Member]) -> VolumeRecord {
        let replica = |(n, state): (usize, &Member)| ReplicaRecord {
            state: *state,
            ..ReplicaRecord::in_sync(store(n))
        };
        VolumeRecord {
            id: VolumeId::random(),
            path: "acme/web".parse().unwrap(),
            customer: CustomerId::random(),
            dataset: DatasetId::random(),
            size_bytes: 4096,
            replicas: states.iter().enumerate().map(replica).collect(),
            replicas_wanted: states.len(),
            membership_epoch: Epoch(4),
            attachment_epoch: Epoch(0),
            phase: Phase::Ready,
            created_unix_seconds: 1,
        }
    }

    #[test]
    fn a_replica_on_an_old_copy_is_stale_needs_a_full_copy_and_if_it_was_in_sync_raises_the_epoch() {
        for (states, epoch) in [
            (&[Member::InSync, Member::InSync][..], 5),
            // Its volume may be open, and owns its epoch.
            (&[Member::Stale, Member::InSync], 4),
            (&[Member::Resyncing, Member::InSync, Member::InSync], 4),
        ] {
            let mut volume = volume(states);
            assert_eq!(give_up(&mut volume, store(0), "old"), Loss::Replica);
            let replica = &volume.replicas[0];
            assert_eq!((replica.state, replica.full_copy), (Member::Stale, true));
            assert_eq!(replica.reason.as_deref(), Some("old"));
            assert_eq!(volume.membership_epoch, Epoch(epoch));
            assert_eq!(volume.replicas[1].state, Member::InSync);
        }
    }

    #[test]
    fn the_last_replica_in_sync_stays_a_member_and_is_noted_as_old() {
        for states in [
            &[Member::InSync][..],
            &[Member::InSync, Member::Stale],
            &[Member::InSync, Member::Resyncing, Member::Stale],
        ] {
            let mut volume = volume(states);
            assert_eq!(give_up(&mut volume, store(0), "old"), Loss::Last);
            assert_eq!(volume.replicas[0].state, Member::InSync);
            assert!(volume.replicas[0].is_old_and_last());
            assert_eq!(volume.membership_epoch, Epoch(4));
        }
    }

    #[test]
    fn of_two_old_copies_the_second_is_the_last() {
        let mut volume = volume(&[Member::InSync, Member::InSync]);
        assert_eq!(give_up(&mut volume, store(0), "old"), Loss::Replica);
        assert_eq!(give_up(&mut volume, store(1), "old too"), Loss::Last);
        // And the first, old once more, does not become the one to copy from.
        assert_eq!(give_up(&mut volume, store(0), "older"), Loss::Replica);
        assert!(volume.replicas[1].is_old_and_last());
    }

    #[test]
    fn other_volumes_and_those_that_serve_nothing_are_left_alone() {
        let mut elsewhere = volume(&[Member::InSync]);
        assert_eq!(give_up(&mut elsewhere, store(2), "old"), Loss::None);
        let mut moved = volume(&[Member::Vacant, Member::InSync]);
        assert_eq!(give_up(&mut moved, store(0), "old"), Loss::None);
        assert_eq!(moved.replicas[0].state, Member::Vacant);
        for phase in [Phase::Creating, Phase::Destroying] {
            let mut unused = volume(&[Member::InSync, Member::InSync]);
            unused.phase = phase;
            let before = unused.clone();
            assert_eq!(give_up(&mut unused, store(0), "old"), Loss::None);
            assert_eq!(unused, before);
        }
    }
}
