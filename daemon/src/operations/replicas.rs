//! Replicas that are out of sync: their membership in the catalog, and their way back.
//!
//! The catalog is the register of every volume's membership. A volume changes it while it is open
//! ([`libvol::volume`]'s rules); nobody else does.
//!
//! Way back: a store that could not be opened is tried again and again, unless it is latched faulty (that takes an
//! operator: [`Operations::store_reopen`]); a stale replica whose store is in use joins its volume. A volume that nobody
//! has attached is opened for that, and closed when it has caught up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use libvol::catalog::{Catalog, Leaving, Phase, ReplicaRecord, StoreRecord, VolumeRecord};
use libvol::control;
use libvol::ids::{Epoch, Name, VolumeId};
use libvol::limits::STORE_LOCK_WAIT;
use libvol::store::{self, Member, StoreHandle};
use libvol::volume::{Membership, Register};
use libvol::{Error, Result};
use tokio::sync::oneshot;

use super::relocate::lost;
use super::{Audit, Operations, Seat, store_named};

/// How often replicas that are out are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A replica that failed again is tried again after this, then after twice that, and so on.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);

/// The catalog, as volumes on any thread write their membership to it.
pub(super) struct CatalogRegister {
    pub(super) catalog: Arc<Catalog>,
    pub(super) audit: Arc<Audit>,
    /// Where the commit waits for the disk.
    pub(super) runtime: tokio::runtime::Handle,
}

#[async_trait(?Send)]
impl Register for CatalogRegister {
    async fn swap(&self, volume: VolumeId, from: Epoch, to: &Membership) -> Result<()> {
        let (catalog, audit, to) = (self.catalog.clone(), self.audit.clone(), to.clone());
        let (done, written) = oneshot::channel();
        self.runtime.spawn_blocking(move || {
            let swapped = catalog.swap_membership(volume, from, &to);
            let is_new = swapped.is_ok();
            // Clients wait for the membership, not for its line.
            let _ = done.send(swapped);
            if is_new {
                audit.membership(&catalog, volume, &to);
            }
        });
        written
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the control plane is shutting down")))
    }
}

/// When a replica is tried again.
#[derive(Default)]
pub(super) struct Retries(Mutex<HashMap<(VolumeId, usize), (Instant, Duration)>>);

impl Retries {
    fn is_due(&self, replica: (VolumeId, usize)) -> bool {
        let retries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        retries.get(&replica).is_none_or(|(at, _)| *at <= Instant::now())
    }

    /// It has been tried.
    fn tried(&self, replica: (VolumeId, usize)) {
        let mut retries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = retries
            .get(&replica)
            .map_or(BACKOFF_MIN, |(_, pause)| (*pause * 2).min(BACKOFF_MAX));
        retries.insert(replica, (Instant::now() + pause, pause));
    }

    /// It is in sync, or its store is a new one.
    fn forget(&self, which: impl Fn(&(VolumeId, usize)) -> bool) {
        let mut retries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        retries.retain(|replica, _| !which(replica));
    }
}

impl Operations {
    /// The background task that brings stores and replicas back.
    pub(super) fn watch_replicas(self: &Arc<Self>) {
        let operations = self.clone();
        self.in_background(async move {
            let mut looks = 0u32;
            loop {
                tokio::time::sleep(LOOK).await;
                looks = looks.wrapping_add(1);
                if looks.is_multiple_of(8) {
                    operations.open_absent_stores().await;
                }
                if let Err(e) = operations.bring_replicas_back().await {
                    tracing::error!("replicas that are out of sync cannot be looked at: {e}");
                }
                if let Err(e) = operations.relocate_replicas().await {
                    tracing::error!("stores that are being emptied cannot be looked at: {e}");
                }
            }
        });
    }

    /// Tries stores that are in the catalog and not in use, unless they are latched faulty.
    async fn open_absent_stores(&self) {
        let Ok(records) = self.look(|view| view.all::<StoreRecord>()) else {
            return;
        };
        for record in records.into_iter().filter(|record| record.fault.is_none()) {
            let lost = record.leaving == Some(Leaving::Lost);
            if lost || !matches!(self.seat(record.id), Seat::Closed(_)) || !record.path.exists() {
                continue;
            }
            let _lock = self.stores_lock.lock().await;
            // It may have been given up, removed or opened meanwhile.
            let unchanged = matches!(self.look(|view| view.get::<StoreRecord>(record.id)), Ok(Some(now)) if now == record);
            if !unchanged || !matches!(self.seat(record.id), Seat::Closed(_)) {
                continue;
            }
            match self.open_recorded(&record, Duration::ZERO).await {
                Ok(handle) => {
                    tracing::info!(store = %record.name, "back in use");
                    self.set_seat(record.id, Seat::Open(handle));
                    self.clear_out_or_warn(&record).await;
                }
                // Logged when it was found out of use; why may have changed.
                Err(e) => self.set_seat(record.id, Seat::Closed(e.to_string())),
            }
        }
    }

    async fn bring_replicas_back(self: &Arc<Self>) -> Result<()> {
        let records = self.look(|view| view.all::<VolumeRecord>())?;
        let out = |replica: &ReplicaRecord| !matches!(replica.state, Member::InSync | Member::Vacant);
        self.retries.forget(|(id, place)| {
            let record = records.iter().find(|record| record.id == *id);
            record.is_none_or(|record| record.replicas.get(*place).is_none_or(|replica| !out(replica)))
        });
        for record in records {
            if record.phase != Phase::Ready || !record.replicas.iter().any(out) {
                continue;
            }
            let due = record.replicas.iter().enumerate().any(|(place, replica)| {
                out(replica) && self.is_open(replica.store) && self.retries.is_due((record.id, place))
            });
            if !due {
                continue;
            }
            let _lock = self.volume_locks.lock(record.id).await;
            let Some(record) = self.look(|view| view.get::<VolumeRecord>(record.id))? else {
                continue;
            };
            if record.phase != Phase::Ready {
                continue;
            }
            if self.report(record.id).await?.is_none() {
                if let Err(e) = self.open_volume(&record).await {
                    tracing::warn!(volume = %record.path, "cannot be opened to bring a replica back: {e}");
                    record
                        .replicas
                        .iter()
                        .enumerate()
                        .for_each(|(place, _)| self.retries.tried((record.id, place)));
                    continue;
                }
                tracing::info!(volume = %record.path, "opened to bring a replica back");
                self.close_when_idle(record.clone());
            }
            for place in 0..record.replicas.len() {
                if let Err(e) = self.bring_back(&record, place).await {
                    tracing::warn!(volume = %record.path, place, "a replica stays out of sync: {e}");
                }
            }
        }
        Ok(())
    }

    /// Lets one replica join, if it is stale and its store in use. The volume is open, its lock held.
    async fn bring_back(&self, record: &VolumeRecord, place: usize) -> Result<()> {
        let id = record.id;
        let stale = |report: &crate::shard::Report| report.replicas[place].state == Member::Stale;
        if !self.report(id).await?.as_ref().is_some_and(stale) || !self.retries.is_due((id, place)) {
            return Ok(());
        }
        let Seat::Open(handle) = self.seat(record.replicas[place].store) else {
            return Ok(());
        };
        // Read after the seat: what the store was found to be is in the catalog before the store is in use.
        let relied_on = |record: VolumeRecord| !record.replicas[place].full_copy;
        let found = self.look(|view| view.get::<VolumeRecord>(id))?;
        if handle.fault().is_some() {
            return Ok(());
        }
        self.retries.tried((id, place));
        let full_copy = match self.state_on(&handle, id).await? {
            store::VolumeState::Live(..) => !found.is_some_and(relied_on),
            store::VolumeState::Unknown => {
                self.put_replica_on(record, &handle).await?;
                true
            }
            store::VolumeState::Tombstoned { .. } => {
                return Err(Error::refused(format!(
                    "store {:?} has destroyed it or given it up; use another store",
                    handle.info().name.as_str()
                )));
            }
        };
        self.shards
            .of_volume(id)
            .call(move |registry| async move { registry.rejoin(id, place, &handle, full_copy).await })
            .await
    }

    /// A volume's slot on a store that does not know it: the keys as the other replicas have them.
    async fn put_replica_on(&self, record: &VolumeRecord, handle: &StoreHandle) -> Result<()> {
        let slot = store::VolumeSlot {
            stores: record.stores(),
            ..self.slot(record).await?
        };
        let facts = store::VolumeRecord {
            volume: record.id,
            size_bytes: record.size_bytes,
            // The others' is higher: alone, this one is never believed.
            membership_epoch: Epoch(0),
            members: vec![Member::Stale; record.replicas.len()],
        };
        self.ask_store(
            handle,
            move |store| async move { store.add_volume(slot, facts).await },
        )
        .await
    }

    /// An operator's word that a faulty store may be used again: it is closed, opened anew, and its replicas catch up.
    ///
    /// # Errors
    /// `NotFound`; `Busy` when it holds the last replica in sync of an open volume; as opening it, and then it is offline.
    pub(crate) async fn store_reopen(&self, name: &Name) -> Result<control::Store> {
        let _lock = self.stores_lock.lock().await;
        let record = self.look(|view| store_named(view, name))?;
        if record.leaving == Some(Leaving::Lost) {
            return Err(Error::invalid(lost(name)));
        }
        if let Seat::Open(handle) = self.seat(record.id) {
            if handle.fault().is_none() && record.fault.is_none() {
                return Err(Error::invalid(format!(
                    "store {:?} is in use and not faulty; there is nothing to reopen",
                    name.as_str()
                )));
            }
            self.let_go_of(&record).await?;
            self.close_store(&handle).await;
            self.record_floors()?;
            self.set_seat(record.id, Seat::Closed("being opened anew".into()));
        }
        let cleared = self.change(|tx| {
            let mut record = store_named(tx, name)?;
            record.fault = None;
            tx.update(&record)?;
            Ok(record)
        })?;
        let opened = self.open_recorded(&cleared, STORE_LOCK_WAIT).await;
        let seat = match &opened {
            Ok(handle) => Seat::Open(handle.clone()),
            Err(e) => Seat::Closed(e.to_string()),
        };
        self.set_seat(record.id, seat);
        opened?;
        self.retries.forget(|_| true);
        tracing::info!(store = %name, "opened anew, on an operator's word");
        self.store_show(name)
    }

    /// Every open volume lets go of the store.
    pub(super) async fn let_go_of(&self, store: &StoreRecord) -> Result<()> {
        for record in self.look(|view| view.all::<VolumeRecord>())? {
            let Some(place) = record.replica_on(store.id) else {
                continue;
            };
            let _lock = self.volume_locks.lock(record.id).await;
            let id = record.id;
            self.shards
                .of_volume(id)
                .call(move |registry| async move { registry.let_go(id, place).await })
                .await
                .map_err(|e| {
                    Error::busy(format!(
                        "{e}; if it is the last one: detach the volume, or stop vold and use: vold clear-fault --data-dir DIR --store {}",
                        store.name
                    ))
                })?;
        }
        Ok(())
    }

    /// How a replica stands, for people.
    pub(super) fn replica_shown(
        &self,
        record: &VolumeRecord,
        place: usize,
        store: &StoreRecord,
        report: Option<&crate::shard::Report>,
    ) -> control::Replica {
        let replica = &record.replicas[place];
        let open = self.open_store(store);
        let status = report.and_then(|report| report.replicas.get(place));
        let state = match (&open, status.map_or(replica.state, |status| status.state)) {
            (Err(_), _) => "away",
            (_, Member::InSync) => "in_sync",
            (_, Member::Stale) => "stale",
            (_, Member::Resyncing) => "resyncing",
            (_, Member::Vacant) => "vacant",
        };
        let known = status.and_then(|status| status.reason.clone());
        let reason = match &open {
            Err(away) => Some(away.to_string()),
            Ok(_) => known.or_else(|| replica.reason.clone()),
        };
        let left = status.map(|status| status.missed_extents * store.extent_bytes);
        let resyncs = state == "resyncing";
        control::Replica {
            store: store.name.clone(),
            state: state.into(),
            reason: reason.filter(|_| state != "in_sync"),
            resync_left_bytes: left.filter(|_| resyncs),
            resync_seconds_left: status.filter(|_| resyncs).and_then(|status| status.seconds_left),
        }
    }

    /// The stores in use that hold a replica of the volume, with its record.
    pub(super) fn stores_at_hand(&self, volume: &VolumeRecord) -> Vec<(ReplicaRecord, StoreHandle)> {
        let at_hand = |(_, replica): (usize, &ReplicaRecord)| match self.seat(replica.store) {
            Seat::Open(handle) if handle.fault().is_none() => Some((replica.clone(), handle)),
            _ => None,
        };
        volume.held().filter_map(at_hand).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::ids::{CustomerId, DatasetId, StoreId};
    use libvol::volume::Standing;

    fn volume() -> VolumeRecord {
        VolumeRecord {
            id: VolumeId::random(),
            path: "acme/web".parse().unwrap(),
            customer: CustomerId::random(),
            dataset: DatasetId::random(),
            size_bytes: 4096,
            replicas: vec![
                ReplicaRecord::in_sync(StoreId::random()),
                ReplicaRecord::in_sync(StoreId::random()),
            ],
            replicas_wanted: 2,
            membership_epoch: Epoch(1),
            attachment_epoch: Epoch(0),
            phase: Phase::Ready,
            created_unix_seconds: 1,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_membership_replaces_the_one_of_its_epoch_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Arc::new(Catalog::open(&dir.path().join("catalog.redb")).unwrap());
        let record = volume();
        catalog.write(|tx| tx.insert(&record)).unwrap();
        let register = CatalogRegister {
            catalog: catalog.clone(),
            audit: Arc::new(Audit::new(libvol::audit::Log::open(dir.path()).unwrap())),
            runtime: tokio::runtime::Handle::current(),
        };
        let standing = |place: usize, state, reason: Option<&str>| Standing {
            store: record.replicas[place].store,
            state,
            reason: reason.map(Into::into),
            full_copy: false,
        };
        let new = Standing {
            store: StoreId::random(),
            state: Member::Stale,
            reason: None,
            full_copy: true,
        };
        let next = Membership {
            epoch: Epoch(2),
            members: vec![
                standing(0, Member::InSync, None),
                standing(1, Member::Stale, Some("gone")),
                new.clone(),
            ],
        };
        register.swap(record.id, Epoch(1), &next).await.unwrap();
        let refused = register.swap(record.id, Epoch(1), &next).await.unwrap_err();
        assert_eq!(refused.kind(), libvol::Kind::Busy);
        let kept = catalog
            .read(|view| view.get::<VolumeRecord>(record.id))
            .unwrap()
            .unwrap();
        assert_eq!(kept.membership_epoch, Epoch(2));
        assert_eq!(kept.replicas[1].state, Member::Stale);
        assert_eq!(kept.replicas[1].reason.as_deref(), Some("gone"));
        assert_eq!(kept.replicas[2].store, new.store, "a place was added");
        assert!(kept.replicas[2].full_copy);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_known_to_be_an_old_copy_stays_one_until_it_is_in_sync_or_another_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        let mut record = volume();
        record.replicas[1].state = Member::Stale;
        record.replicas[1].full_copy = true;
        catalog.write(|tx| tx.insert(&record)).unwrap();
        let old = record.replicas[1].store;
        let mut epoch = 1;
        let mut full_copy_after = |store, state| {
            let standing = |store, state| Standing {
                store,
                state,
                reason: None,
                full_copy: false,
            };
            let to = Membership {
                epoch: Epoch(epoch + 1),
                members: vec![
                    standing(record.replicas[0].store, Member::InSync),
                    standing(store, state),
                ],
            };
            catalog.swap_membership(record.id, Epoch(epoch), &to).unwrap();
            epoch += 1;
            let kept = catalog.read(|view| view.get::<VolumeRecord>(record.id)).unwrap();
            kept.unwrap().replicas[1].full_copy
        };
        assert!(
            full_copy_after(old, Member::Stale),
            "an open volume does not know of it"
        );
        assert!(full_copy_after(old, Member::Stale));
        assert!(!full_copy_after(old, Member::InSync));
        assert!(
            !full_copy_after(old, Member::Stale),
            "it missed what its missed bits say"
        );
        assert!(!full_copy_after(StoreId::random(), Member::Stale));
    }

    #[test]
    fn a_replica_that_fails_again_is_tried_less_and_less_often() {
        let retries = Retries::default();
        let replica = (VolumeId::random(), 1);
        assert!(retries.is_due(replica));
        let mut pauses = Vec::new();
        for _ in 0..12 {
            retries.tried(replica);
            pauses.push(retries.0.lock().unwrap()[&replica].1);
            assert!(!retries.is_due(replica));
        }
        assert_eq!(pauses[..3], [1, 2, 4].map(Duration::from_secs));
        assert_eq!(pauses[11], BACKOFF_MAX);
        retries.forget(|_| true);
        assert!(retries.is_due(replica));
    }
}
