//! Volumes on a store: adding, looking up, destroying.
//!
//! Destruction, in order, each step durable before the next: tombstone; both slot copies overwritten and read back;
//! that noted in the tombstone; all extents PendingScrub in one commit; when the last is free, the slot may be used again.
//! Every step may be repeated, so a destruction that was interrupted is simply begun again. The tombstone stays for ever.

use super::batch::Step;
use super::keeper::Keeper;
use super::record::{MEMBERS_MAX, Tombstone, VolumeEntry};
use super::{Change, ScrubProgress, VolumeRecord, VolumeSlot, VolumeState, slots};
use crate::error::{Error, Result};
use crate::ids::VolumeId;

impl Keeper {
    pub(super) async fn add_volume(&self, slot: VolumeSlot, record: VolumeRecord) -> Result<()> {
        slots::check_fits(&slot)?;
        let volume = slot.volume;
        if record.volume != volume || record.members.len() > MEMBERS_MAX {
            return Err(Error::invalid(format!(
                "volume {volume}: its record does not fit its slot"
            )));
        }
        let _one_at_a_time = self.slot_lock.acquire(1).await;
        self.check_open()?;
        let number = self.slot_for(&slot)?;
        if let Err(error) = slots::write(&self.shared, &self.disk, number, 1, &slot).await {
            // No record says that the slot counts, so only the slot is lost; what it got goes now, or at the next open.
            self.books.borrow_mut().retire_slot(number);
            let _ = slots::erase(&self.shared, &self.disk, number).await;
            return Err(error);
        }
        let entry = VolumeEntry {
            record,
            dataset: slot.dataset,
            tombstoned: false,
        };
        self.commit(vec![Step::Volume(number, Some(entry))]).await?;
        self.slots.borrow_mut().live.insert(volume, Ok(slot));
        Ok(())
    }

    /// The slot a new volume gets, after every reason to refuse it.
    fn slot_for(&self, slot: &VolumeSlot) -> Result<u32> {
        let books = self.books.borrow();
        let volume = slot.volume;
        if books.tombstone(volume).is_some() || books.is_dead(slot.dataset) {
            return Err(Error::refused(format!(
                "volume {volume} was destroyed here; it never comes back"
            )));
        }
        if books.has_unknown_tombstones() {
            return Err(Error::damaged(format!(
                "volume {volume}: some tombstones cannot be read, so nobody can tell whether it was destroyed; \
                 use another store, and run `vold check`"
            )));
        }
        let taken =
            |(_, entry): (u32, &VolumeEntry)| entry.record.volume == volume || entry.dataset == slot.dataset;
        if books.volumes().any(taken) || self.slots.borrow().unknown.contains_key(&volume) {
            return Err(Error::exists(format!("volume {volume} is on this store already")));
        }
        if books.tombstones_left() == 0 {
            return Err(Error::no_space(format!(
                "volume {volume}: no place is left for its future tombstone ({} places); add a store",
                self.layout.tombstones
            )));
        }
        books.unused_slot().ok_or_else(|| {
            Error::no_space(format!(
                "volume {volume}: all {} volume slots are in use; delete volumes or add a store",
                self.layout.slots
            ))
        })
    }

    pub(super) fn volume_state(&self, volume: VolumeId) -> Result<VolumeState> {
        let books = self.books.borrow();
        if let Some((_, tombstone)) = books.tombstone(volume) {
            let extents_left = books.left_of(tombstone.dataset);
            return Ok(VolumeState::Tombstoned { extents_left });
        }
        if let Some((_, entry)) = books.volume(volume) {
            if entry.tombstoned {
                let extents_left = books.left_of(entry.dataset);
                return Ok(VolumeState::Tombstoned { extents_left });
            }
            return match self.slots.borrow().live.get(&volume) {
                Some(Ok(slot)) => Ok(VolumeState::Live(entry.record.clone(), slot.clone())),
                Some(Err(why)) => Err(Error::damaged(format!(
                    "volume {volume}: {why}; use another replica"
                ))),
                None => Err(Error::internal(format!(
                    "volume {volume} has a record and no slot"
                ))),
            };
        }
        if let Some(slot) = self.slots.borrow().unknown.get(&volume) {
            return Err(Error::damaged(format!(
                "volume {volume}: its record (slot {slot}) is damaged; use another replica, and run `vold check`"
            )));
        }
        if books.has_unknown_tombstones() {
            return Err(Error::damaged(format!(
                "volume {volume}: not here, and some tombstones cannot be read; run `vold check`"
            )));
        }
        Ok(VolumeState::Unknown)
    }

    pub(super) async fn destroy_volume(&self, volume: VolumeId) -> Result<()> {
        let _one_at_a_time = self.slot_lock.acquire(1).await;
        self.check_open()?;
        let Some((slot, place, mut tombstone)) = self.commit_tombstone(volume).await? else {
            return Ok(());
        };
        if !tombstone.keys_done {
            // A copy that cannot be overwritten stays this destruction's trouble: nothing else depends on it.
            slots::erase(&self.shared, &self.disk, slot).await?;
            tombstone.keys_done = true;
            self.commit(vec![Step::Tombstone(place, tombstone)]).await?;
        }
        if self.books.borrow().allocated_of(tombstone.dataset) > 0 {
            let release = Change::ReleaseDataset(tombstone.dataset);
            self.commit(vec![Step::Change(release)]).await?;
        }
        self.free_slots().await
    }

    /// Makes sure that the volume's tombstone is durable; the slot to overwrite and the tombstone with its place. `None`
    /// when the slot is free again: everything was done before.
    async fn commit_tombstone(&self, volume: VolumeId) -> Result<Option<(u32, u32, Tombstone)>> {
        let (slot, place, entry, tombstone) = {
            let books = self.books.borrow();
            match (books.volume(volume), books.tombstone(volume)) {
                (None, Some(_)) => return Ok(None),
                (Some((slot, _)), Some((place, tombstone))) => return Ok(Some((slot, place, *tombstone))),
                (None, None) => {
                    if let Some(slot) = self.slots.borrow().unknown.get(&volume) {
                        return Err(Error::damaged(format!(
                            "volume {volume}: its record (slot {slot}) is damaged; run `vold check`"
                        )));
                    }
                    return Err(Error::not_found(format!("volume {volume} is not on this store")));
                }
                (Some((slot, entry)), None) => {
                    let place = books.tombstone_place().ok_or_else(|| {
                        // A place was kept for every volume; only damage can have taken it.
                        Error::damaged(format!("volume {volume}: no readable place for its tombstone"))
                    })?;
                    let tombstone = Tombstone {
                        volume,
                        dataset: entry.dataset,
                        extents: books.left_of(entry.dataset),
                        keys_done: false,
                    };
                    let entry = VolumeEntry {
                        tombstoned: true,
                        ..entry.clone()
                    };
                    (slot, place, entry, tombstone)
                }
            }
        };
        let steps = vec![Step::Volume(slot, Some(entry)), Step::Tombstone(place, tombstone)];
        self.commit(steps).await?;
        self.slots.borrow_mut().live.remove(&volume);
        Ok(Some((slot, place, tombstone)))
    }

    /// Slots of destroyed volumes whose last extent is free may be used again. The caller holds the slot lock.
    pub(super) async fn free_slots(&self) -> Result<()> {
        let done: Vec<Step> = {
            let books = self.books.borrow();
            let finished = |entry: &VolumeEntry| {
                let keys_done = |(_, t): (u32, &Tombstone)| t.keys_done;
                entry.tombstoned
                    && books.left_of(entry.dataset) == 0
                    && books.tombstone(entry.record.volume).is_some_and(keys_done)
            };
            let done = books.volumes().filter(|(_, entry)| finished(entry));
            done.map(|(slot, _)| Step::Volume(slot, None)).collect()
        };
        match done.is_empty() {
            true => Ok(()),
            false => self.commit(done).await,
        }
    }

    pub(super) fn scrub_progress(&self, volume: VolumeId) -> Result<ScrubProgress> {
        let books = self.books.borrow();
        let Some((_, tombstone)) = books.tombstone(volume) else {
            return Err(Error::not_found(format!(
                "volume {volume} has no tombstone on this store"
            )));
        };
        Ok(ScrubProgress {
            extents: tombstone.extents,
            extents_done: tombstone.extents.saturating_sub(books.left_of(tombstone.dataset)),
            keys_done: tombstone.keys_done,
        })
    }

    pub(super) async fn scrubbed(&self, volume: VolumeId) -> Result<()> {
        self.changed
            .until(|| match self.scrub_progress(volume) {
                Ok(progress) if progress.keys_done && progress.extents_done == progress.extents => {
                    Some(Ok(()))
                }
                Ok(_) => self.check_open().err().map(Err),
                Err(error) => Some(Err(error)),
            })
            .await?;
        let books = self.books.borrow();
        match books.tombstone(volume) {
            // What is out of use is not scrubbed: it may hold this volume's ciphertext, and that must not be called done.
            Some((_, tombstone)) => books.check_dataset(tombstone.dataset),
            None => Ok(()),
        }
    }
}
