//! Volumes on a store: adding, looking up, destroying.
//!
//! Destruction, in order, each step durable before the next: tombstone; both slot copies overwritten and read back;
//! that noted in the tombstone; all extents PendingScrub in one commit; when the last is free, the slot may be used again.
//! Every step may be repeated, so a destruction that was interrupted is simply begun again. The tombstone stays for ever.
//!
//! A replica that is given up, because others have taken its place, goes the same way; its tombstone says so, and the
//! volume's own destruction later takes that word back.

use super::batch::Step;
use super::keeper::Keeper;
use super::record::{MEMBERS_MAX, Tombstone, VolumeEntry, is_volume_size};
use super::{Change, ScrubProgress, VolumeRecord, VolumeSlot, VolumeState, slots};
use crate::error::{Error, Result};
use crate::ids::{StoreId, VolumeId};

/// Where a tombstoned volume's wrapped keys are.
enum Keys {
    /// In this slot, until it is overwritten.
    InSlot(u32),
    /// Nowhere: what may have held them reads as zeros, or is another volume's.
    Gone,
}

impl Keeper {
    pub(super) async fn add_volume(&self, slot: VolumeSlot, record: VolumeRecord) -> Result<()> {
        slots::check_fits(&slot)?;
        let volume = slot.volume;
        let fits = record.members.len() <= MEMBERS_MAX && is_volume_size(record.size_bytes);
        if record.volume != volume || !fits {
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
            let given_up = books
                .tombstone(volume)
                .is_some_and(|(_, tombstone)| tombstone.given_up);
            return Err(Error::refused(match given_up {
                true => format!("volume {volume}: its replica here was given up; use another store"),
                false => format!("volume {volume} was destroyed here; it never comes back"),
            }));
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
            return Ok(VolumeState::Tombstoned {
                extents_left: books.left_of(tombstone.dataset),
                given_up: tombstone.given_up,
            });
        }
        if let Some((_, entry)) = books.volume(volume) {
            if entry.tombstoned {
                // Its own tombstone cannot be read; what it would have said is not relied on.
                return Ok(VolumeState::Tombstoned {
                    extents_left: books.left_of(entry.dataset),
                    given_up: false,
                });
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
        match self.why_not_sure(volume) {
            Some(error) => Err(error),
            None => Ok(VolumeState::Unknown),
        }
    }

    /// Why a volume of which nothing is found may be, or have been, here all the same.
    fn why_not_sure(&self, volume: VolumeId) -> Option<Error> {
        let books = self.books.borrow();
        let what = match (books.has_unknown_volumes(), books.has_unknown_tombstones()) {
            (true, _) => "some volume records",
            (false, true) => "some tombstones",
            (false, false) => return None,
        };
        Some(Error::damaged(format!(
            "volume {volume}: not found here, and {what} cannot be read; run `vold check`"
        )))
    }

    /// Writes the slot anew with another list of stores, copy by copy, each with the next sequence.
    pub(super) async fn set_stores(&self, volume: VolumeId, stores: Vec<StoreId>) -> Result<()> {
        let _one_at_a_time = self.slot_lock.acquire(1).await;
        self.check_open()?;
        let VolumeState::Live(_, slot) = self.volume_state(volume)? else {
            return Err(Error::not_found(format!("volume {volume} is not on this store")));
        };
        if slot.stores == stores {
            return Ok(());
        }
        let slot = VolumeSlot { stores, ..slot };
        slots::check_fits(&slot)?;
        let number = self.books.borrow().volume(volume).map(|(number, _)| number);
        let number = number.ok_or_else(|| Error::internal(format!("volume {volume} has no record")))?;
        slots::rewrite(&self.shared, &self.disk, number, &slot).await?;
        self.slots.borrow_mut().live.insert(volume, Ok(slot));
        Ok(())
    }

    /// With `give_up` only this replica goes, and the tombstone says so.
    pub(super) async fn destroy_volume(&self, volume: VolumeId, give_up: bool) -> Result<()> {
        let _one_at_a_time = self.slot_lock.acquire(1).await;
        self.check_open()?;
        let Some((keys, place, mut tombstone)) = self.commit_tombstone(volume, give_up).await? else {
            return Ok(());
        };
        if !tombstone.keys_done {
            if let Keys::InSlot(slot) = keys {
                // A copy that cannot be overwritten stays this destruction's trouble: nothing else depends on it.
                slots::erase(&self.shared, &self.disk, slot).await?;
                let mut slots = self.slots.borrow_mut();
                slots.unknown.remove(&volume);
                slots.anyones.retain(|number| *number != slot);
            }
            tombstone.keys_done = true;
            self.commit(vec![Step::Tombstone(place, tombstone)]).await?;
        }
        if self.books.borrow().allocated_of(tombstone.dataset) > 0 {
            let release = Change::ReleaseDataset(tombstone.dataset);
            self.commit(vec![Step::Change(release)]).await?;
        }
        self.free_slots().await
    }

    /// Makes sure that the volume's tombstone is durable; where its keys are, and the tombstone with its place. `None` when
    /// everything was done before.
    async fn commit_tombstone(
        &self,
        volume: VolumeId,
        give_up: bool,
    ) -> Result<Option<(Keys, u32, Tombstone)>> {
        self.take_back_give_up(volume, give_up).await?;
        let (slot, place, entry, tombstone) = {
            let books = self.books.borrow();
            match (books.volume(volume), books.tombstone(volume)) {
                (None, Some((_, done))) if done.keys_done && books.allocated_of(done.dataset) == 0 => {
                    return Ok(None);
                }
                (None, Some((place, tombstone))) => {
                    let keys = match tombstone.keys_done {
                        true => Keys::Gone,
                        false => self.find_keys(volume)?,
                    };
                    return Ok(Some((keys, place, *tombstone)));
                }
                (Some((slot, _)), Some((place, tombstone))) => {
                    return Ok(Some((Keys::InSlot(slot), place, *tombstone)));
                }
                (None, None) => {
                    if let Some(slot) = self.slots.borrow().unknown.get(&volume) {
                        return Err(Error::damaged(format!(
                            "volume {volume}: its record (slot {slot}) is damaged; run `vold check`"
                        )));
                    }
                    let not_found = || Error::not_found(format!("volume {volume} is not on this store"));
                    return Err(self.why_not_sure(volume).unwrap_or_else(not_found));
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
                        given_up: give_up,
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
        Ok(Some((Keys::InSlot(slot), place, tombstone)))
    }

    /// The volume itself is destroyed now, after its replica here was given up.
    async fn take_back_give_up(&self, volume: VolumeId, give_up: bool) -> Result<()> {
        let tombstone = self
            .books
            .borrow()
            .tombstone(volume)
            .map(|(place, tombstone)| (place, *tombstone));
        match tombstone {
            Some((place, tombstone)) if tombstone.given_up && !give_up => {
                let destroyed = Tombstone {
                    given_up: false,
                    ..tombstone
                };
                self.commit(vec![Step::Tombstone(place, destroyed)]).await
            }
            _ => Ok(()),
        }
    }

    /// Where the keys of a tombstoned volume are whose own record is lost, so that only the slots can tell.
    ///
    /// # Errors
    /// `Damaged` when they cannot.
    fn find_keys(&self, volume: VolumeId) -> Result<Keys> {
        let slots = self.slots.borrow();
        let Some(slot) = slots.unknown.get(&volume) else {
            // Slots of known records hold their own volumes' keys, or were overwritten when the store was opened.
            return match slots.anyones.first() {
                None if !self.books.borrow().has_retired_slots() => Ok(Keys::Gone),
                _ => Err(Error::damaged(format!(
                    "volume {volume}: its record is damaged, and slots that may hold its keys cannot be told from others; \
                     run `vold check`"
                ))),
            };
        };
        match slots.unknown.values().filter(|other| *other == slot).count() {
            1 => Ok(Keys::InSlot(*slot)),
            _ => Err(Error::damaged(format!(
                "volume {volume}: its record is damaged, and slot {slot} names another volume as well; run `vold check`"
            ))),
        }
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
            .until(|| {
                let books = self.books.borrow();
                let Some((_, tombstone)) = books.tombstone(volume) else {
                    return Some(self.scrub_progress(volume).map(drop));
                };
                match tombstone.keys_done && books.left_of(tombstone.dataset) == 0 {
                    // What is out of use is not scrubbed: it may hold this volume's ciphertext, and that must not be
                    // called done.
                    true => Some(books.check_dataset(tombstone.dataset)),
                    false => self.check_open().err().map(Err),
                }
            })
            .await
    }
}
