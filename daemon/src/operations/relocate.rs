//! Replicas on the move: stores that are drained, and stores that are lost.
//!
//! Nothing of a move is kept but what is to be: a volume's number of replicas, and which stores are leaving. Each look takes
//! every volume one step nearer to that, under its lock, so a crash anywhere is followed by the step that is missing:
//!
//! | what is found | step |
//! |---|---|
//! | more replicas in sync than wanted, or one on a lost store that others do without | one on a leaving store leaves; its place becomes vacant |
//! | fewer replicas than wanted on stores that stay | a store of another zone is taken in, to be copied ([`super::replicas`]) |
//! | more replicas than wanted, and none on a leaving store | a drain was called off: the last one that is not in sync leaves |
//! | a volume on a store where it has no replica by the catalog, of an older membership than the catalog's | what is left there is destroyed (draining stores are looked at all the time, others when they are opened) |
//! | a lost store without replicas | its record goes |
//!
//! Membership is the volume's to write; slots' lists of stores follow it ([`Operations::settle_slots`]).

mod target;

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use libvol::catalog::{
    DestroyRecord, Leaving, Phase, ReplicaRecord, StoreRecord, Tombstone, View, VolumeRecord,
};
use libvol::control;
use libvol::ids::{Name, StoreId, VolumeId};
use libvol::store::{self, Member, StoreHandle};
use libvol::{Error, Result};

use super::{Operations, Seat, store_named};

/// Volumes that a refusal names.
const NAMED_MAX: usize = 5;

/// A step of a volume.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The replica at this place leaves.
    Leave(usize),
    /// One more store is needed.
    TakeIn,
    /// It is as it should be, or something under way has to end first.
    Wait,
}

/// The next step of a volume, by how its stores are leaving.
fn next_step(volume: &VolumeRecord, leaving: impl Fn(StoreId) -> Option<Leaving>) -> Step {
    let in_sync = |replica: &ReplicaRecord| replica.state == Member::InSync;
    let held: Vec<(usize, &ReplicaRecord)> = volume.held().collect();
    let all_in_sync = held.iter().filter(|(_, replica)| in_sync(replica)).count();
    let may_leave = |replica: &ReplicaRecord| {
        let without = all_in_sync - usize::from(in_sync(replica));
        match leaving(replica.store) {
            Some(Leaving::Lost) => without >= 1,
            Some(Leaving::Draining) => without >= volume.replicas_wanted,
            None => false,
        }
    };
    if let Some((place, _)) = held.iter().find(|(_, replica)| may_leave(replica)) {
        return Step::Leave(*place);
    }
    let stays = held
        .iter()
        .filter(|(_, replica)| leaving(replica.store).is_none())
        .count();
    if stays < volume.replicas_wanted {
        return Step::TakeIn;
    }
    if held.len() == stays && stays > volume.replicas_wanted {
        let surplus = held.iter().rev().find(|(_, replica)| !in_sync(replica));
        if let Some((place, _)) = surplus.or(held.last()) {
            return Step::Leave(*place);
        }
    }
    Step::Wait
}

impl Operations {
    /// Begins, or calls off, to move all replicas off a store.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a lost one.
    pub(crate) async fn store_drain(&self, name: &Name, cancel: bool) -> Result<control::Store> {
        let _lock = self.stores_lock.lock().await;
        let record = self.change(|tx| {
            let mut record = store_named(tx, name)?;
            if record.leaving == Some(Leaving::Lost) {
                return Err(Error::invalid(lost(name)));
            }
            record.leaving = (!cancel).then_some(Leaving::Draining);
            tx.update(&record)?;
            Ok(record)
        })?;
        match cancel {
            false => tracing::info!(store = %name, "drained from now on"),
            true => {
                tracing::info!(store = %name, "no longer drained");
                // What has left it goes all the same.
                self.clear_out_or_warn(&record).await;
            }
        }
        Ok(self.store_shown(record))
    }

    /// Gives up a store that will not come back: its replicas are replaced, unfinished destructions there are written off.
    ///
    /// # Errors
    /// `NotFound`; `Busy` when it is in use, or holds the last replica in sync of a volume, which it names.
    pub(crate) async fn store_remove_lost(self: &Arc<Self>, name: &Name) -> Result<()> {
        let _lock = self.stores_lock.lock().await;
        let record = self.look(|view| store_named(view, name))?;
        if record.leaving == Some(Leaving::Lost) {
            return Ok(());
        }
        if let Seat::Open(handle) = self.seat(record.id) {
            if handle.fault().is_none() {
                return Err(Error::busy(format!(
                    "store {0:?} is in use, not lost; move its replicas off instead: volctl store drain {0}",
                    name.as_str()
                )));
            }
            self.look(|view| check_not_last(view, &record))?;
            self.let_go_of(&record).await?;
            self.close_store(&handle).await;
            self.set_seat(record.id, Seat::Closed("being given up as lost".into()));
        }
        let unfinished = self.change(|tx| {
            check_not_last(tx, &record)?;
            let mut store = store_named(tx, name)?;
            store.leaving = Some(Leaving::Lost);
            tx.update(&store)?;
            let mut unfinished = Vec::new();
            for mut job in tx.all::<DestroyRecord>()? {
                let on_it =
                    |part: &&mut libvol::catalog::DestroyedStore| part.store == store.id && !part.done;
                if let Some(part) = job.stores.iter_mut().find(on_it) {
                    part.lost = true;
                    tx.update(&job)?;
                    unfinished.push(job.volume);
                }
            }
            Ok(unfinished)
        })?;
        self.set_seat(record.id, Seat::Closed("given up as lost".into()));
        tracing::warn!(store = %name, "given up as lost; its replicas are replaced from the others");
        for volume in unfinished {
            self.start_destroying(volume);
        }
        Ok(())
    }

    /// One look: every volume with a replica on a leaving store, or with too many, takes a step.
    pub(super) async fn relocate_replicas(self: &Arc<Self>) -> Result<()> {
        let (stores, volumes) =
            self.look(|view| Ok((view.all::<StoreRecord>()?, view.all::<VolumeRecord>()?)))?;
        let leaving = |store: StoreId| stores.iter().find(|record| record.id == store)?.leaving;
        for volume in volumes.iter().filter(|volume| volume.phase == Phase::Ready) {
            if next_step(volume, leaving) == Step::Wait {
                self.note_blocked(volume.id, None);
                continue;
            }
            match self.step(volume.id, leaving).await {
                Ok(left) => {
                    self.note_blocked(volume.id, None);
                    if let Some(store) = left.and_then(|id| stores.iter().find(|store| store.id == id)) {
                        self.clear_out_or_warn(store).await;
                    }
                }
                Err(e) => {
                    tracing::debug!(volume = %volume.path, "a replica cannot move: {e}");
                    self.note_blocked(volume.id, Some(e.to_string()));
                }
            }
        }
        for store in &stores {
            match store.leaving {
                None => {}
                Some(Leaving::Draining) => self.clear_out_or_warn(store).await,
                Some(Leaving::Lost) => {
                    if let Err(e) = self.forget_lost(store).await {
                        tracing::warn!(store = %store.name, "cannot be forgotten yet: {e}");
                    }
                }
            }
        }
        Ok(())
    }

    /// One step of a volume; the store that a replica has left, if that was it.
    async fn step(
        self: &Arc<Self>,
        id: VolumeId,
        leaving: impl Fn(StoreId) -> Option<Leaving>,
    ) -> Result<Option<StoreId>> {
        let _lock = self.volume_locks.lock(id).await;
        let record = self.look(|view| view.get::<VolumeRecord>(id))?;
        let Some(record) = record.filter(|record| record.phase == Phase::Ready) else {
            return Ok(None);
        };
        let target = match next_step(&record, &leaving) {
            Step::Wait => return Ok(None),
            Step::Leave(_) => None,
            Step::TakeIn => Some(self.target(&record, &leaving).await?),
        };
        if self.report(id).await?.is_none() {
            self.open_volume(&record).await?;
            tracing::info!(volume = %record.path, "opened to move a replica");
            self.close_when_idle(record.clone());
        }
        // Opening it may have changed it: replicas whose stores are away are out now.
        let record = self
            .look(|view| view.get::<VolumeRecord>(id))?
            .ok_or_else(|| Error::internal(format!("volume {id} is gone from the catalog")))?;
        let mut left = None;
        match (next_step(&record, &leaving), target) {
            (Step::Leave(place), _) => {
                left = Some(record.replicas[place].store);
                let store = self.store_name(record.replicas[place].store);
                self.shards
                    .of_volume(id)
                    .call(move |registry| async move { registry.remove_replica(id, place).await })
                    .await?;
                tracing::info!(volume = %record.path, %store, "its replica there has been replaced, and has left");
            }
            (Step::TakeIn, Some(target)) => {
                let (store, name) = (target.info().id, target.info().name.to_string());
                tracing::info!(volume = %record.path, store = %name, "gets a replica there");
                self.shards
                    .of_volume(id)
                    .call(move |registry| async move { registry.add_replica(id, store, name).await })
                    .await?;
            }
            (Step::TakeIn, None) | (Step::Wait, _) => return Ok(None),
        }
        let record = self.look(|view| view.get::<VolumeRecord>(id))?;
        if let Some(record) = record
            && let Err(e) = self.settle_slots(&record).await
        {
            tracing::warn!(volume = %record.path, "a slot keeps an older list of stores: {e}");
        }
        Ok(left)
    }

    /// Slots name the stores that the catalog does. The volume's lock is held.
    ///
    /// # Errors
    /// As the stores; a store that fails is put right at the next opening.
    pub(super) async fn settle_slots(&self, record: &VolumeRecord) -> Result<()> {
        for (_, handle) in self.stores_at_hand(record) {
            let stores = record.stores();
            match self.state_on(&handle, record.id).await {
                Ok(store::VolumeState::Live(_, slot)) if slot.stores != stores => {}
                // Not there yet, or not readable: nothing to put right.
                _ => continue,
            }
            let id = record.id;
            self.ask_store(
                &handle,
                move |store| async move { store.set_stores(id, stores).await },
            )
            .await?;
        }
        Ok(())
    }

    /// As [`Operations::clear_out`]; what fails is tried again when the store is opened.
    pub(super) async fn clear_out_or_warn(&self, store: &StoreRecord) {
        if let Err(e) = self.clear_out(store).await {
            tracing::warn!(store = %store.name, "what volumes have left there stays for now: {e}");
        }
    }

    /// What volumes that have moved, or were destroyed, left on a store; also where that was begun and interrupted. One that
    /// fails does not keep the others.
    ///
    /// # Errors
    /// The first one's.
    pub(super) async fn clear_out(&self, store: &StoreRecord) -> Result<()> {
        let Ok(handle) = self.open_store(store) else {
            return Ok(());
        };
        let left = self.ask_store(&handle, |store| async move {
            let mut left = store.volumes().await?;
            left.extend(store.remains().await?);
            Ok(left)
        });
        let mut failed = None;
        for id in left.await? {
            if let Err(e) = self.clear_out_volume(store, &handle, id).await {
                failed = failed.or(Some(e.context(format!("volume {id}"))));
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn clear_out_volume(&self, store: &StoreRecord, handle: &StoreHandle, id: VolumeId) -> Result<()> {
        let _lock = self.volume_locks.lock(id).await;
        let (volume, destroyed) =
            self.look(|view| Ok((view.get::<VolumeRecord>(id)?, view.get::<Tombstone>(id)?)))?;
        let shard = self.shards.of_store(store.id);
        let here = handle.clone();
        match (volume, destroyed) {
            (Some(volume), _) if volume.phase == Phase::Ready && !volume.is_on(store.id) => {
                let is_left = match self.state_on(handle, id).await? {
                    // A store that knows of a newer membership has something to say; the catalog is then the older one.
                    store::VolumeState::Live(record, _) => {
                        record.membership_epoch < volume.membership_epoch
                            && self.is_whole_elsewhere(&volume).await
                    }
                    store::VolumeState::Tombstoned { given_up, .. } => given_up,
                    store::VolumeState::Unknown => false,
                };
                if is_left {
                    shard
                        .call(move |_| async move { here.give_up_volume(id).await })
                        .await?;
                    tracing::info!(volume = %volume.path, store = %store.name, "what it left there is being overwritten");
                }
                Ok(())
            }
            (None, Some(_)) => {
                shard
                    .call(move |_| async move { here.destroy_volume(id).await })
                    .await
            }
            // In use, being made or destroyed; or unknown, and then not ours to judge.
            _ => Ok(()),
        }
    }

    /// Whether a replica that can be relied on is at hand: only then what another one has left may go.
    async fn is_whole_elsewhere(&self, volume: &VolumeRecord) -> bool {
        for (replica, handle) in self.stores_at_hand(volume) {
            if replica.state == Member::InSync
                && !replica.full_copy
                && matches!(
                    self.state_on(&handle, volume.id).await,
                    Ok(store::VolumeState::Live(..))
                )
            {
                return true;
            }
        }
        false
    }

    /// A lost store's record goes with the last replica on it.
    async fn forget_lost(&self, store: &StoreRecord) -> Result<()> {
        let _lock = self.stores_lock.lock().await;
        let gone = self.change(|tx| {
            let used = tx
                .all::<VolumeRecord>()?
                .iter()
                .any(|volume| volume.is_on(store.id));
            if used || tx.get::<StoreRecord>(store.id)?.is_none() {
                return Ok(false);
            }
            tx.remove::<StoreRecord>(store.id)?;
            Ok(true)
        })?;
        if gone {
            self.drop_seat(store.id);
            self.audit
                .did("store.forgotten", &store.name, "its replicas are replaced");
            tracing::warn!(store = %store.name, "forgotten; should it ever come back, it is not used");
        }
        Ok(())
    }

    /// The stores that a volume is to be destroyed on: its replicas', and others in use that still have something of it. (One
    /// that a replica has left and that is away destroys what is there when it is next opened.)
    pub(super) async fn stores_to_destroy_on(&self, volume: &VolumeRecord) -> Result<Vec<StoreId>> {
        let mut stores: Vec<StoreId> = volume.held().map(|(_, replica)| replica.store).collect();
        for store in &self.look(|view| view.all::<StoreRecord>())? {
            if stores.contains(&store.id) {
                continue;
            }
            // One that cannot say is asked by the job itself.
            if let Ok(handle) = self.open_store(store)
                && !matches!(
                    self.state_on(&handle, volume.id).await,
                    Ok(store::VolumeState::Unknown)
                )
            {
                stores.push(store.id);
            }
        }
        Ok(stores)
    }

    fn note_blocked(&self, volume: VolumeId, why: Option<String>) {
        let mut blocked = self.blocked.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => blocked.insert(volume, why),
            None => blocked.remove(&volume),
        };
    }

    /// How far a leaving store is: how many replicas are on it, and why one does not move.
    pub(super) fn leaving_shown(&self, on_it: &[VolumeRecord]) -> String {
        let blocked = self.blocked.lock().unwrap_or_else(PoisonError::into_inner);
        let why = on_it.iter().find_map(|volume| {
            let why = blocked.get(&volume.id)?;
            Some(format!("; {}: {why}", volume.path))
        });
        let count = on_it.len();
        format!(
            "{count} replica{} still to be replaced{}",
            if count == 1 { "" } else { "s" },
            why.unwrap_or_default()
        )
    }
}

/// What is said of a store that was given up.
pub(super) fn lost(name: &Name) -> String {
    format!(
        "store {:?} was given up as lost; its replicas are being replaced, and then it goes by itself: volctl status",
        name.as_str()
    )
}

/// Whether every volume with a replica on the store has another one in sync, on a store that is not lost.
///
/// # Errors
/// `Busy`, naming volumes.
fn check_not_last(view: &View<'_>, record: &StoreRecord) -> Result<()> {
    let stores = view.all::<StoreRecord>()?;
    let lost: HashSet<StoreId> = stores
        .iter()
        .filter(|store| store.leaving == Some(Leaving::Lost))
        .map(|store| store.id)
        .collect();
    let only_here: Vec<String> = view
        .all::<VolumeRecord>()?
        .iter()
        .filter(|volume| volume.phase == Phase::Ready)
        .filter(|volume| is_last_in_sync(volume, record.id, &lost))
        .map(|volume| volume.path.to_string())
        .collect();
    if !only_here.is_empty() {
        let more = only_here.len().saturating_sub(NAMED_MAX);
        let named = only_here[..only_here.len().min(NAMED_MAX)].join(", ");
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        return Err(Error::busy(format!(
            "store {:?} has the last replica in sync of {named}{more}; bring the store back, or delete those volumes first (their data is lost)",
            record.name.as_str()
        )));
    }
    Ok(())
}

/// Whether nobody else has all acknowledged writes of a volume; nobody on a lost store counts.
fn is_last_in_sync(volume: &VolumeRecord, store: StoreId, lost: &HashSet<StoreId>) -> bool {
    let whole = |replica: &ReplicaRecord| {
        replica.state == Member::InSync && !replica.full_copy && !lost.contains(&replica.store)
    };
    let mut others = volume.held().filter(|(_, replica)| replica.store != store);
    volume.is_in_sync_on(store) && !others.any(|(_, replica)| whole(replica))
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::ids::{CustomerId, Epoch};

    /// A volume with replicas in these states on stores of their own.
    fn volume(wanted: usize, states: &[Member]) -> (VolumeRecord, Vec<StoreId>) {
        let stores: Vec<StoreId> = states.iter().map(|_| StoreId::random()).collect();
        let replica = |(store, state): (&StoreId, &Member)| ReplicaRecord {
            state: *state,
            ..ReplicaRecord::in_sync(*store)
        };
        let volume = VolumeRecord {
            id: VolumeId::random(),
            path: "acme/web".parse().unwrap(),
            customer: CustomerId::random(),
            dataset: libvol::ids::DatasetId::random(),
            size_bytes: 4096,
            replicas: stores.iter().zip(states).map(replica).collect(),
            replicas_wanted: wanted,
            membership_epoch: Epoch(1),
            attachment_epoch: Epoch(0),
            phase: Phase::Ready,
            created_unix_seconds: 1,
        };
        (volume, stores)
    }

    fn step(wanted: usize, states: &[Member], leaving: &[(usize, Leaving)]) -> Step {
        let (volume, stores) = volume(wanted, states);
        next_step(&volume, |store| {
            let place = stores.iter().position(|other| *other == store)?;
            leaving
                .iter()
                .find(|(other, _)| *other == place)
                .map(|(_, how)| *how)
        })
    }

    use Leaving::{Draining, Lost};
    use Member::{InSync, Resyncing, Stale, Vacant};

    #[test]
    fn a_draining_replica_leaves_only_when_its_successor_is_in_sync() {
        let draining = [(0, Draining)];
        assert_eq!(step(2, &[InSync, InSync], &draining), Step::TakeIn);
        assert_eq!(step(2, &[InSync, InSync, Stale], &draining), Step::Wait);
        assert_eq!(step(2, &[InSync, InSync, Resyncing], &draining), Step::Wait);
        assert_eq!(step(2, &[InSync, InSync, InSync], &draining), Step::Leave(0));
        assert_eq!(step(2, &[Vacant, InSync, InSync], &draining), Step::Wait);
        assert_eq!(step(1, &[InSync], &draining), Step::TakeIn);
        assert_eq!(step(1, &[InSync, InSync], &draining), Step::Leave(0));
        // One that is out of sync is not missed.
        assert_eq!(step(2, &[Stale, InSync], &draining), Step::TakeIn);
        assert_eq!(step(2, &[Stale, InSync, InSync], &draining), Step::Leave(0));
    }

    #[test]
    fn replicas_of_two_draining_stores_move_one_after_the_other() {
        let draining = [(0, Draining), (1, Draining)];
        assert_eq!(step(3, &[InSync, InSync, InSync], &draining), Step::TakeIn);
        assert_eq!(
            step(3, &[InSync, InSync, InSync, InSync], &draining),
            Step::Leave(0)
        );
        assert_eq!(
            step(3, &[Vacant, InSync, InSync, InSync], &draining),
            Step::TakeIn
        );
    }

    #[test]
    fn a_lost_replica_leaves_at_once_unless_nobody_else_has_everything() {
        let lost = [(0, Lost)];
        assert_eq!(step(2, &[Stale, InSync], &lost), Step::Leave(0));
        assert_eq!(step(2, &[InSync, InSync], &lost), Step::Leave(0));
        assert_eq!(step(2, &[Vacant, InSync], &lost), Step::TakeIn);
        assert_ne!(step(2, &[InSync, Stale], &lost), Step::Leave(0));
    }

    #[test]
    fn a_drain_that_was_called_off_leaves_as_many_as_wanted() {
        assert_eq!(step(2, &[InSync, InSync, Stale], &[]), Step::Leave(2));
        assert_eq!(step(2, &[InSync, InSync, InSync], &[]), Step::Leave(2));
        assert_eq!(step(2, &[InSync, InSync], &[]), Step::Wait);
        assert_eq!(step(2, &[InSync, Stale], &[]), Step::Wait);
    }

    #[test]
    fn the_last_replica_in_sync_is_known_as_such() {
        let (volume, stores) = volume(2, &[InSync, Stale]);
        let none = HashSet::new();
        assert!(is_last_in_sync(&volume, stores[0], &none) && !is_last_in_sync(&volume, stores[1], &none));
        // Two stores are given up one after the other.
        let (volume, stores) = self::volume(2, &[InSync, InSync]);
        assert!(!is_last_in_sync(&volume, stores[0], &none));
        assert!(is_last_in_sync(&volume, stores[1], &HashSet::from([stores[0]])));
    }
}
