//! Who owns what: the table with everything derived from it, kept in step with every change.
//!
//! Invariants: a physical extent has one owner, and (dataset, logical extent) one physical extent; an extent is free,
//! reserved, allocated, waiting for scrub, or out of use (quarantined), and only one of them. What recovery finds
//! contradictory is quarantined and named: neither handed out nor served. Only committed changes get here.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::bitmap::Bitmap;
use super::record::{ExtentRecord, ExtentState, Tombstone, VolumeEntry};
use super::table::{Record, Table};
use super::{ExtentEntry, StoreSpace};
use crate::error::{Error, Result};
use crate::ids::{DatasetId, ExtentIndex, PhysicalExtent, VolumeId};

/// Whose a quarantined extent may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspect {
    /// Its checksum area names this dataset, or the table does.
    Dataset(DatasetId),
    /// Data and checksum area are zero: whoever owns it reads a hole, as without it.
    Nobody,
    /// Anybody's.
    Anyone,
}

/// See the module's text.
pub(super) struct Books {
    table: Table,
    free: Bitmap,
    reserved: Bitmap,
    pending: Bitmap,
    allocated: u32,
    dirty: u32,
    owned: HashMap<DatasetId, HashMap<u32, PhysicalExtent>>,
    pending_of: HashMap<DatasetId, u32>,
    quarantine: BTreeMap<PhysicalExtent, Suspect>,
    slots: HashMap<VolumeId, u32>,
    tombstones: HashMap<VolumeId, u32>,
    dead_datasets: HashSet<DatasetId>,
    /// Slots that cannot be written: out of use until the store is opened again.
    retired_slots: HashSet<u32>,
    /// Where the last reservation ended: sequential writers get neighbours.
    cursor: u32,
}

impl Books {
    /// Derives everything from a recovered table, cross-checks it, and returns what does not fit together. Extents of
    /// unknown pages are quarantined as anyone's; the caller may learn more.
    pub(super) fn new(table: Table) -> (Self, Vec<String>) {
        let layout = *table.layout();
        let mut books = Self {
            table,
            free: Bitmap::new(layout.extents),
            reserved: Bitmap::new(layout.extents),
            pending: Bitmap::new(layout.extents),
            allocated: 0,
            dirty: 0,
            owned: HashMap::new(),
            pending_of: HashMap::new(),
            quarantine: BTreeMap::new(),
            slots: HashMap::new(),
            tombstones: HashMap::new(),
            dead_datasets: HashSet::new(),
            retired_slots: HashSet::new(),
            cursor: 0,
        };
        let mut findings = Vec::new();
        for slot in 0..layout.slots {
            if let Some(entry) = books.table.volume(slot)
                && let Some(other) = books.slots.insert(entry.record.volume, slot)
            {
                findings.push(format!(
                    "volume {}: in slots {other} and {slot}",
                    entry.record.volume
                ));
            }
        }
        for (place, tombstone) in books.table.tombstones() {
            books.tombstones.insert(tombstone.volume, place);
            books.dead_datasets.insert(tombstone.dataset);
        }
        for extent in (0..layout.extents).map(PhysicalExtent) {
            let Some(record) = books.table.extent(extent) else {
                books.quarantine.insert(extent, Suspect::Anyone);
                continue;
            };
            if let Some(other) = books.enter(extent, &record) {
                findings.push(format!(
                    "extents {other} and {extent}: both claim logical extent {} of dataset {}; neither is used",
                    record.logical, record.dataset
                ));
                books.quarantine.insert(other, Suspect::Dataset(record.dataset));
                books.quarantine.insert(extent, Suspect::Dataset(record.dataset));
            }
        }
        (books, findings)
    }

    /// Counts an extent; returns another one that has the same owner and place.
    fn enter(&mut self, extent: PhysicalExtent, record: &ExtentRecord) -> Option<PhysicalExtent> {
        match record.state {
            ExtentState::Free => {
                self.free.insert(extent.0);
                None
            }
            ExtentState::PendingScrub => {
                self.pending.insert(extent.0);
                *self.pending_of.entry(record.dataset).or_default() += 1;
                None
            }
            ExtentState::Allocated => {
                self.allocated += 1;
                self.dirty += u32::from(record.dirty);
                let owned = self.owned.entry(record.dataset).or_default();
                owned.insert(record.logical.0, extent)
            }
        }
    }

    fn leave(&mut self, extent: PhysicalExtent, record: &ExtentRecord) {
        match record.state {
            ExtentState::Free => {
                self.free.remove(extent.0);
                self.reserved.remove(extent.0);
            }
            ExtentState::PendingScrub => {
                self.pending.remove(extent.0);
                if let Some(count) = self.pending_of.get_mut(&record.dataset) {
                    *count -= 1;
                    if *count == 0 {
                        self.pending_of.remove(&record.dataset);
                    }
                }
            }
            ExtentState::Allocated => {
                self.allocated -= 1;
                self.dirty -= u32::from(record.dirty);
                if let Some(owned) = self.owned.get_mut(&record.dataset) {
                    owned.remove(&record.logical.0);
                    if owned.is_empty() {
                        self.owned.remove(&record.dataset);
                    }
                }
            }
        }
    }

    /// A frame is durable: its records take effect.
    pub(super) fn apply(&mut self, lsn: u64, records: &BTreeMap<u32, Record>) {
        let layout = *self.table.layout();
        let extent_of = |index: u32| PhysicalExtent(index - layout.extent_index(PhysicalExtent(0)));
        // Two extents may swap owners in one frame: all leave before any enters.
        for (index, record) in records {
            if let Record::Extent(_) = record {
                let extent = extent_of(*index);
                let old = self
                    .table
                    .extent(extent)
                    .expect("changes of unknown records are refused");
                self.leave(extent, &old);
            }
        }
        for (index, record) in records {
            match record {
                Record::Extent(new) => {
                    let other = self.enter(extent_of(*index), new);
                    assert_eq!(other, None, "the batch has checked that an extent has one owner");
                }
                Record::Volume(entry) => {
                    if let Some(old) = self.table.volume(*index) {
                        self.slots.remove(&old.record.volume);
                    }
                    if let Some(entry) = entry {
                        self.slots.insert(entry.record.volume, *index);
                    }
                }
                Record::Tombstone(tombstone) => {
                    let tombstone = tombstone.as_ref().expect("tombstones stay for ever");
                    self.tombstones.insert(tombstone.volume, index - layout.slots);
                    self.dead_datasets.insert(tombstone.dataset);
                }
            }
            self.table.set(lsn, *index, record);
        }
    }

    /// A frame that releases a dataset is durable.
    pub(super) fn release_dataset(&mut self, lsn: u64, dataset: DatasetId) {
        self.owned.remove(&dataset);
        for (extent, was_dirty) in self.table.release_dataset(lsn, dataset) {
            self.quarantine.remove(&extent);
            self.allocated -= 1;
            self.dirty -= u32::from(was_dirty);
            self.pending.insert(extent.0);
            *self.pending_of.entry(dataset).or_default() += 1;
        }
    }

    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    pub(super) fn table_mut(&mut self) -> &mut Table {
        &mut self.table
    }

    /// What is out of use, and whose it may be.
    pub(super) fn quarantine(&self) -> &BTreeMap<PhysicalExtent, Suspect> {
        &self.quarantine
    }

    /// More was learnt about a quarantined extent.
    pub(super) fn suspect(&mut self, extent: PhysicalExtent, suspect: Suspect) {
        self.quarantine.insert(extent, suspect);
    }

    /// Why nothing may be said about a dataset's extents: some that are out of use may be its own.
    ///
    /// # Errors
    /// `Damaged`.
    pub(super) fn check_dataset(&self, dataset: DatasetId) -> Result<()> {
        let mut suspects = self.quarantine.iter();
        let suspect =
            suspects.find(|(_, s)| matches!(s, Suspect::Anyone) || **s == Suspect::Dataset(dataset));
        match suspect {
            None => Ok(()),
            Some((extent, _)) => Err(Error::damaged(format!(
                "dataset {dataset}: the table no longer tells whose extent {extent} is, and it may be one of these; \
                 use another replica, and run `vold check`"
            ))),
        }
    }

    pub(super) fn space(&self) -> StoreSpace {
        StoreSpace {
            total: self.table.layout().extents,
            free: self.free.count(),
            pending_scrub: self.pending.count(),
            allocated: self.allocated,
            dirty: self.dirty,
        }
    }

    /// Sets `count` free extents aside; `None` when there are fewer.
    pub(super) fn reserve(&mut self, count: u32) -> Option<Vec<PhysicalExtent>> {
        if self.free.count() < count {
            return None;
        }
        let take = |_| {
            let extent = self.free.next(self.cursor).expect("counted");
            self.free.remove(extent);
            self.reserved.insert(extent);
            self.cursor = extent + 1;
            PhysicalExtent(extent)
        };
        Some((0..count).map(take).collect())
    }

    /// Sets those of `extents` aside that are free; the others are not the caller's.
    pub(super) fn reserve_these(&mut self, extents: &[PhysicalExtent]) -> Vec<PhysicalExtent> {
        let mut taken = Vec::new();
        for extent in extents {
            if extent.0 < self.table.layout().extents && self.free.remove(extent.0) {
                self.reserved.insert(extent.0);
                taken.push(*extent);
            }
        }
        taken
    }

    /// Whether an extent waits for the scrubber.
    pub(super) fn is_pending(&self, extent: PhysicalExtent) -> bool {
        self.pending.contains(extent.0)
    }

    pub(super) fn unreserve(&mut self, extents: &[PhysicalExtent]) {
        for extent in extents {
            if self.reserved.remove(extent.0) {
                self.free.insert(extent.0);
            }
        }
    }

    pub(super) fn is_reserved(&self, extent: PhysicalExtent) -> bool {
        self.reserved.contains(extent.0)
    }

    /// The extent that holds a dataset's logical extent.
    pub(super) fn owner(&self, dataset: DatasetId, logical: ExtentIndex) -> Option<PhysicalExtent> {
        self.owned.get(&dataset)?.get(&logical.0).copied()
    }

    /// A dataset's allocated extents by logical index.
    pub(super) fn extents_of(&self, dataset: DatasetId) -> Vec<ExtentEntry> {
        let Some(owned) = self.owned.get(&dataset) else {
            return Vec::new();
        };
        let entry = |physical: &PhysicalExtent| {
            let record = self.table.extent(*physical).expect("owned extents are known");
            ExtentEntry {
                logical: record.logical,
                physical: *physical,
                dirty: record.dirty,
                missed_by: record.missed_by,
                key_version: record.key_version,
            }
        };
        let mut entries: Vec<_> = owned.values().map(entry).collect();
        entries.sort_unstable_by_key(|entry| entry.logical);
        entries
    }

    /// Allocated extents of a dataset.
    pub(super) fn allocated_of(&self, dataset: DatasetId) -> u32 {
        self.owned.get(&dataset).map_or(0, |owned| owned.len() as u32)
    }

    /// Extents that still hold bytes of a dataset.
    pub(super) fn left_of(&self, dataset: DatasetId) -> u32 {
        self.allocated_of(dataset) + self.pending_of.get(&dataset).copied().unwrap_or(0)
    }

    /// The next extent to scrub at or after `from`, going round.
    pub(super) fn next_pending(&self, from: u32) -> Option<PhysicalExtent> {
        self.pending.next(from).map(PhysicalExtent)
    }

    /// A volume's slot and record, live or tombstoned.
    pub(super) fn volume(&self, volume: VolumeId) -> Option<(u32, &VolumeEntry)> {
        let slot = *self.slots.get(&volume)?;
        Some((slot, self.table.volume(slot)?))
    }

    /// Every volume record in use.
    pub(super) fn volumes(&self) -> impl Iterator<Item = (u32, &VolumeEntry)> {
        let slots = 0..self.table.layout().slots;
        slots.filter_map(|slot| Some((slot, self.table.volume(slot)?)))
    }

    /// A volume's tombstone and its place.
    pub(super) fn tombstone(&self, volume: VolumeId) -> Option<(u32, &Tombstone)> {
        let place = *self.tombstones.get(&volume)?;
        Some((place, self.table.tombstone(place)?))
    }

    /// Whether the dataset's volume has a tombstone.
    pub(super) fn is_dead(&self, dataset: DatasetId) -> bool {
        self.dead_datasets.contains(&dataset)
    }

    /// An unused slot whose record is known, and which can be written as far as is known.
    pub(super) fn unused_slot(&self) -> Option<u32> {
        let usable = |slot: &u32| !self.table.is_unknown(*slot) && !self.retired_slots.contains(slot);
        let mut usable = (0..self.table.layout().slots).filter(usable);
        usable.find(|slot| self.table.volume(*slot).is_none())
    }

    /// A slot that cannot be written is not handed out.
    pub(super) fn retire_slot(&mut self, slot: u32) {
        self.retired_slots.insert(slot);
    }

    /// Whether some slot that no volume is live in could not be erased.
    pub(super) fn has_retired_slots(&self) -> bool {
        !self.retired_slots.is_empty()
    }

    /// A place for one more tombstone.
    pub(super) fn tombstone_place(&self) -> Option<u32> {
        let layout = self.table.layout();
        let used = self.tombstones.len() as u32;
        // Places are taken in order, so the first free one is near the count.
        let places = (used..layout.tombstones).chain(0..used);
        let mut places = places.filter(|place| !self.table.is_unknown(layout.tombstone_index(*place)));
        places.find(|place| self.table.tombstone(*place).is_none())
    }

    /// Places left for tombstones, after every live volume has got its own.
    pub(super) fn tombstones_left(&self) -> u32 {
        let layout = self.table.layout();
        let known =
            (0..layout.tombstones).filter(|place| !self.table.is_unknown(layout.tombstone_index(*place)));
        let live = self.volumes().filter(|(_, entry)| !entry.tombstoned).count();
        (known.count() as u32).saturating_sub((self.tombstones.len() + live) as u32)
    }

    /// Whether some volume records cannot be read, so that nobody can tell whether a volume is here.
    pub(super) fn has_unknown_volumes(&self) -> bool {
        (0..self.table.layout().slots).any(|slot| self.table.is_unknown(slot))
    }

    /// Whether some tombstones cannot be read, so that nobody can tell whether a volume was destroyed.
    pub(super) fn has_unknown_tombstones(&self) -> bool {
        let layout = self.table.layout();
        (0..layout.tombstones).any(|place| self.table.is_unknown(layout.tombstone_index(place)))
    }
}
