//! Steps of a store's opening in the catalog: what a store is by its lineage ([`crate::store::Lineage`] has the rules), what an old copy
//! means to the volumes on it, and what is to be destroyed on it once more.

use super::{DestroyRecord, Phase, StoreRecord, Tombstone, Tx, View, VolumeRecord};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Incarnation, Name, StoreId, VolumeId, VolumePath};
use crate::sabotage::{Rule, broken};
use crate::store::{Found, Member, Renewal, Verdict};

/// What an old copy of a store means to one of the volumes on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: it has no replica there, or is being made or destroyed.
    None,
    /// A replica, which other replicas can bring up to date.
    Replica,
    /// The last replica in sync.
    Last,
}

/// A store that is an old copy of itself.
#[derive(Clone, Debug)]
pub struct OldCopy {
    /// How that shows.
    pub why: String,
    /// The volumes that it has cost something.
    pub losses: Vec<(VolumePath, Loss)>,
}

/// A store that was judged.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Its name.
    pub name: Name,
    /// What the opening is to write to it.
    pub renewal: Renewal,
    /// Set when it is an old copy.
    pub old: Option<OldCopy>,
}

impl Tx<'_> {
    /// Judges a store by what is remembered of it, and writes down the consequences together with `fresh`, its new incarnation.
    ///
    /// # Errors
    /// `Refused` when it was opened after this catalog was written; the catalog's own.
    pub fn judge_store(&self, store: StoreId, found: &Found, fresh: Incarnation) -> Result<Judged> {
        let mut record = self.recorded_store(store)?;
        let old = match record.lineage.judge(found) {
            Verdict::Continues => None,
            Verdict::OldCopy(_) if broken(Rule::OldCopies) => None,
            Verdict::OldCopy(why) => {
                let losses = self.give_up_replicas(&record, &why)?;
                Some(OldCopy { why, losses })
            }
            Verdict::Ahead(why) => {
                return Err(Error::refused(format!(
                    "store {:?} was opened after this catalog was written ({why}): the catalog is an old copy; stop vold, and \
                     put the newer one back or move it away and rebuild it: vold rebuild-catalog",
                    record.name.as_str()
                )));
            }
        };
        let renewal = record.lineage.begin(found, fresh);
        self.update(&record)?;
        Ok(Judged {
            name: record.name,
            renewal,
            old,
        })
    }

    /// A store's opening has ended: it has this incarnation, durably, and has committed up to `lsn`.
    ///
    /// # Errors
    /// `Internal` when the store is not there; the catalog's own.
    pub fn confirm_store(&self, store: StoreId, incarnation: Incarnation, lsn: u64) -> Result<()> {
        let mut record = self.recorded_store(store)?;
        record.lineage.confirm(incarnation, lsn);
        self.update(&record)
    }

    /// The store of that incarnation has durably committed up to `lsn`. One that was removed meanwhile needs no floor.
    ///
    /// # Errors
    /// The catalog's own.
    pub fn raise_floor(&self, store: StoreId, incarnation: Incarnation, lsn: u64) -> Result<()> {
        if let Some(mut record) = self.get::<StoreRecord>(store)?
            && record.lineage.raise(incarnation, lsn)
        {
            self.update(&record)?;
        }
        Ok(())
    }

    fn recorded_store(&self, store: StoreId) -> Result<StoreRecord> {
        self.get(store)?
            .ok_or_else(|| Error::internal(format!("store {store} is gone from the catalog")))
    }

    /// Every replica on an old copy of `store` is given up, or noted as old where it is the last.
    fn give_up_replicas(&self, store: &StoreRecord, why: &str) -> Result<Vec<(VolumePath, Loss)>> {
        let reason = format!("store {:?} is an old copy: {why}", store.name.as_str());
        let mut losses = Vec::new();
        for mut volume in self.all::<VolumeRecord>()? {
            let loss = give_up(&mut volume, store.id, &reason);
            if loss != Loss::None {
                self.update(&volume)?;
                losses.push((volume.path, loss));
            }
        }
        Ok(losses)
    }
}

impl View<'_> {
    /// Whether nothing of a volume may be on a store any more. An old copy of it may lack the tombstone, or have been taken in the
    /// midst of the destruction; then it is destroyed there once more.
    ///
    /// # Errors
    /// The catalog's own.
    pub fn is_gone_from(&self, volume: VolumeId, store: StoreId) -> Result<bool> {
        let destruction = self.get::<DestroyRecord>(volume)?;
        let done =
            destruction.is_some_and(|job| job.stores.iter().any(|part| part.store == store && part.done));
        let gone = done || self.get::<Tombstone>(volume)?.is_some();
        Ok(gone && !broken(Rule::DestroyAgain))
    }
}

/// One volume's replica on an old copy is given up, or noted as old.
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
    use crate::catalog::ReplicaRecord;
    use crate::ids::{CustomerId, DatasetId};

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
