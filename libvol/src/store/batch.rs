//! A group commit in the making: transactions checked one after the other against the books and each other.
//!
//! A transaction that does not fit is left out whole and its caller told; the others are not affected. A change that the
//! table does not allow is a broken promise of ours and comes back as `Internal`.

use std::collections::{BTreeMap, HashMap};

use super::books::Books;
use super::log::Entry;
use super::record::{ExtentRecord, ExtentState, MEMBERS_MAX, Tombstone, VolumeEntry, is_volume_size};
use super::table::Record;
use super::{Change, VolumeRecord};
use crate::error::{Error, Result};
use crate::ids::{DatasetId, ExtentIndex, PhysicalExtent, ReplicaSet, VolumeId};
use crate::limits::DIRTY_MARKS_PER_STORE;

/// One step of a transaction: what volumes may ask for, and what only the store itself does.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Change(Change),
    /// A scrubbed extent becomes free.
    Free(PhysicalExtent),
    /// A free extent that was set aside is to be scrubbed once more.
    Rescrub(PhysicalExtent),
    /// A slot's record.
    Volume(u32, Option<VolumeEntry>),
    /// A tombstone's place.
    Tombstone(u32, Tombstone),
}

/// What is left to write of a group commit.
#[derive(Default)]
pub(super) struct Batch {
    records: BTreeMap<u32, Record>,
    owners: HashMap<(DatasetId, u32), Option<PhysicalExtent>>,
    dirty_added: i64,
    release: Option<DatasetId>,
}

/// What became of a transaction.
#[derive(Debug)]
pub(super) enum Added {
    /// It is part of the batch.
    Yes,
    /// It is sound but has no room in this frame.
    Later,
    /// It is refused.
    No(Error),
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty() && self.release.is_none()
    }

    /// The records, by table index, and the dataset to release. Only one of them is there.
    pub(super) fn parts(&self) -> (&BTreeMap<u32, Record>, Option<DatasetId>) {
        (&self.records, self.release)
    }

    /// The frame's contents.
    pub(super) fn entries(&self) -> Vec<Entry> {
        let images = self
            .records
            .iter()
            .map(|(index, record)| Entry::Image(*index, record.encode()));
        images.chain(self.release.map(Entry::ReleaseDataset)).collect()
    }

    /// Adds one transaction if it is sound and the batch stays within `records_max`.
    pub(super) fn add(&mut self, books: &Books, steps: &[Step], records_max: usize) -> Added {
        if self.release.is_some() {
            return Added::Later;
        }
        if let Some(Step::Change(Change::ReleaseDataset(dataset))) = steps.first() {
            // It changes records without naming them, so nothing else may share its frame.
            return match (steps.len(), self.is_empty()) {
                (1, true) => {
                    self.release = Some(*dataset);
                    Added::Yes
                }
                (1, false) => Added::Later,
                _ => Added::No(Error::internal("ReleaseDataset must be a transaction of its own")),
            };
        }
        let mut own = Transaction {
            books,
            batch: self,
            records: BTreeMap::new(),
            owners: HashMap::new(),
            dirty_added: 0,
        };
        for step in steps {
            if let Err(error) = own.step(step) {
                return Added::No(error);
            }
        }
        let marks = i64::from(books.space().dirty) + own.batch.dirty_added + own.dirty_added;
        if own.dirty_added > 0 && marks > DIRTY_MARKS_PER_STORE as i64 {
            return Added::No(Error::no_space(format!(
                "the store's {DIRTY_MARKS_PER_STORE} dirty marks are in use; clean extents first"
            )));
        }
        let Transaction {
            records,
            owners,
            dirty_added,
            ..
        } = own;
        let new = records
            .keys()
            .filter(|index| !self.records.contains_key(index))
            .count();
        if self.records.len() + new > records_max {
            return match self.is_empty() {
                true => Added::No(Error::internal(format!(
                    "a transaction of {new} records exceeds the {records_max} of one frame"
                ))),
                false => Added::Later,
            };
        }
        self.records.extend(records);
        self.owners.extend(owners);
        self.dirty_added += dirty_added;
        Added::Yes
    }
}

/// One transaction over the batch over the books.
struct Transaction<'a> {
    books: &'a Books,
    batch: &'a Batch,
    records: BTreeMap<u32, Record>,
    owners: HashMap<(DatasetId, u32), Option<PhysicalExtent>>,
    dirty_added: i64,
}

impl Transaction<'_> {
    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Volume(slot, entry) => {
                self.records.insert(*slot, Record::Volume(entry.clone()));
                Ok(())
            }
            Step::Tombstone(place, tombstone) => {
                let index = self.books.table().layout().tombstone_index(*place);
                self.records.insert(index, Record::Tombstone(Some(*tombstone)));
                Ok(())
            }
            Step::Free(extent) => {
                let record = self.extent(*extent)?;
                expect(*extent, &record, ExtentState::PendingScrub, "free")?;
                self.put(*extent, ExtentRecord::FREE);
                Ok(())
            }
            Step::Rescrub(extent) => {
                let record = self.extent(*extent)?;
                expect(*extent, &record, ExtentState::Free, "scrub again")?;
                if !self.books.is_reserved(*extent) {
                    return Err(Error::internal(format!(
                        "scrub extent {extent} again: it is not reserved"
                    )));
                }
                let state = ExtentState::PendingScrub;
                self.put(
                    *extent,
                    ExtentRecord {
                        state,
                        ..ExtentRecord::FREE
                    },
                );
                Ok(())
            }
            Step::Change(change) => self.change(change),
        }
    }

    fn change(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::Allocate {
                physical,
                dataset,
                logical,
                key_version,
            } => {
                let record = self.extent(*physical)?;
                expect(*physical, &record, ExtentState::Free, "allocate")?;
                if !self.books.is_reserved(*physical) {
                    return Err(Error::internal(format!(
                        "allocate extent {physical}: it is not reserved"
                    )));
                }
                if self.books.is_dead(*dataset) {
                    return Err(Error::refused(format!(
                        "dataset {dataset} is destroyed; it gets no more extents"
                    )));
                }
                if let Some(owner) = self.owner(*dataset, *logical) {
                    return Err(Error::internal(format!(
                        "allocate extent {physical}: {owner} holds logical extent {logical} of dataset {dataset}"
                    )));
                }
                self.owners.insert((*dataset, logical.0), Some(*physical));
                self.dirty_added += 1;
                self.put(
                    *physical,
                    ExtentRecord {
                        state: ExtentState::Allocated,
                        dirty: true,
                        missed_by: ReplicaSet::NONE,
                        dataset: *dataset,
                        logical: *logical,
                        key_version: *key_version,
                    },
                );
            }
            Change::Mark(physical) => self.mark(*physical, true, None)?,
            Change::ClearMark { physical, missed_by } => self.mark(*physical, false, Some(*missed_by))?,
            Change::Release(physical) => {
                let record = self.extent(*physical)?;
                expect(*physical, &record, ExtentState::Allocated, "release")?;
                self.owners.insert((record.dataset, record.logical.0), None);
                self.dirty_added -= i64::from(record.dirty);
                self.put(
                    *physical,
                    ExtentRecord {
                        state: ExtentState::PendingScrub,
                        dirty: false,
                        missed_by: ReplicaSet::NONE,
                        ..record
                    },
                );
            }
            Change::ReleaseDataset(_) => {
                return Err(Error::internal("ReleaseDataset must be a transaction of its own"));
            }
            Change::SetSize { volume, size_bytes } => self.set_volume(*volume, |record| {
                if !is_volume_size(*size_bytes) {
                    return Err(Error::invalid(format!(
                        "volume {volume}: a size of {size_bytes} bytes, which no volume has"
                    )));
                }
                record.size_bytes = *size_bytes;
                Ok(())
            })?,
            Change::SetMembers {
                volume,
                epoch,
                members,
            } => self.set_volume(*volume, |record| {
                if members.len() > MEMBERS_MAX {
                    return Err(Error::invalid(format!(
                        "volume {volume}: more than {MEMBERS_MAX} replicas"
                    )));
                }
                if *epoch < record.membership_epoch {
                    return Err(Error::refused(format!(
                        "volume {volume}: membership epoch {epoch} is superseded by {}",
                        record.membership_epoch
                    )));
                }
                record.membership_epoch = *epoch;
                record.members.clone_from(members);
                Ok(())
            })?,
        }
        Ok(())
    }

    fn mark(&mut self, extent: PhysicalExtent, dirty: bool, missed_by: Option<ReplicaSet>) -> Result<()> {
        let record = self.extent(extent)?;
        expect(extent, &record, ExtentState::Allocated, "mark")?;
        let missed_by = missed_by.unwrap_or(record.missed_by);
        if record.dirty != dirty {
            self.dirty_added += if dirty { 1 } else { -1 };
        }
        if record.dirty != dirty || record.missed_by != missed_by {
            self.put(
                extent,
                ExtentRecord {
                    dirty,
                    missed_by,
                    ..record
                },
            );
        }
        Ok(())
    }

    /// Changes a live volume's record.
    fn set_volume(
        &mut self,
        volume: VolumeId,
        change: impl FnOnce(&mut VolumeRecord) -> Result<()>,
    ) -> Result<()> {
        let Some((slot, entry)) = self.books.volume(volume) else {
            return Err(Error::not_found(format!("volume {volume} is not on this store")));
        };
        // Another change of it, or its destruction, may be in the same batch, before this.
        let staged = self.records.get(&slot).or_else(|| self.batch.records.get(&slot));
        let mut entry = match staged {
            Some(Record::Volume(Some(staged))) => staged.clone(),
            _ => entry.clone(),
        };
        if entry.tombstoned {
            return Err(Error::refused(format!(
                "volume {volume} is being destroyed; its record stays"
            )));
        }
        change(&mut entry.record)?;
        self.records.insert(slot, Record::Volume(Some(entry)));
        Ok(())
    }

    fn extent(&self, extent: PhysicalExtent) -> Result<ExtentRecord> {
        let layout = self.books.table().layout();
        if extent.0 >= layout.extents {
            return Err(Error::internal(format!(
                "extent {extent}: the store has {}",
                layout.extents
            )));
        }
        if self.books.quarantine().contains_key(&extent) {
            return Err(Error::damaged(format!(
                "extent {extent} is out of use: its record is damaged"
            )));
        }
        let index = layout.extent_index(extent);
        match self
            .records
            .get(&index)
            .or_else(|| self.batch.records.get(&index))
        {
            Some(Record::Extent(record)) => Ok(*record),
            Some(_) => unreachable!("an extent's index has an extent's record"),
            None => Ok(self
                .books
                .table()
                .extent(extent)
                .expect("unknown extents are quarantined")),
        }
    }

    fn owner(&self, dataset: DatasetId, logical: ExtentIndex) -> Option<PhysicalExtent> {
        let key = (dataset, logical.0);
        let staged = self.owners.get(&key).or_else(|| self.batch.owners.get(&key));
        staged
            .copied()
            .unwrap_or_else(|| self.books.owner(dataset, logical))
    }

    fn put(&mut self, extent: PhysicalExtent, record: ExtentRecord) {
        let index = self.books.table().layout().extent_index(extent);
        self.records.insert(index, Record::Extent(record));
    }
}

fn expect(extent: PhysicalExtent, record: &ExtentRecord, state: ExtentState, verb: &str) -> Result<()> {
    if record.state == state {
        return Ok(());
    }
    Err(Error::internal(format!(
        "{verb} extent {extent}: it is {:?}, not {state:?}",
        record.state
    )))
}

#[cfg(test)]
mod tests {
    use super::super::layout::{Layout, Sizes};
    use super::super::table::Table;
    use super::*;
    use crate::error::Kind;
    use crate::ids::{KeyVersion, StoreId};

    fn books() -> Books {
        let sizes = Sizes {
            slots: 8,
            tombstones: 63,
            log_bytes: 16 * 4096,
        };
        let layout = Layout::plan(64 << 20, 64 << 10, sizes).unwrap();
        Books::new(Table::new(layout, StoreId::random(), ExtentState::Free)).0
    }

    fn allocate(physical: PhysicalExtent, dataset: DatasetId, logical: u32) -> Step {
        Step::Change(Change::Allocate {
            physical,
            dataset,
            logical: ExtentIndex(logical),
            key_version: KeyVersion(1),
        })
    }

    fn refused(added: Added) -> Kind {
        match added {
            Added::No(error) => error.kind(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_reserved_extents_are_allocated_and_only_once() {
        let mut books = books();
        let dataset = DatasetId::random();
        let mut batch = Batch::default();
        assert_eq!(
            refused(batch.add(&books, &[allocate(PhysicalExtent(0), dataset, 0)], 100)),
            Kind::Internal
        );
        let got = books.reserve(3).unwrap();
        assert!(matches!(
            batch.add(&books, &[allocate(got[0], dataset, 0)], 100),
            Added::Yes
        ));
        assert_eq!(
            refused(batch.add(&books, &[allocate(got[0], dataset, 1)], 100)),
            Kind::Internal,
            "taken"
        );
        assert_eq!(
            refused(batch.add(&books, &[allocate(got[1], dataset, 0)], 100)),
            Kind::Internal,
            "owned"
        );
        let swap = [
            Step::Change(Change::Release(got[0])),
            allocate(got[1], dataset, 0),
        ];
        assert!(
            matches!(batch.add(&books, &swap, 100), Added::Yes),
            "rekey swaps in one commit"
        );
        books.apply(1, batch.parts().0);
        assert_eq!(books.owner(dataset, ExtentIndex(0)), Some(got[1]));
        let space = books.space();
        assert_eq!((space.allocated, space.pending_scrub, space.dirty), (1, 1, 1));
    }

    #[test]
    fn a_refused_transaction_leaves_nothing_behind() {
        let mut books = books();
        let got = books.reserve(1).unwrap();
        let mut batch = Batch::default();
        let steps = [
            allocate(got[0], DatasetId::random(), 0),
            Step::Change(Change::Mark(PhysicalExtent(500))),
        ];
        assert_eq!(refused(batch.add(&books, &steps, 100)), Kind::Internal);
        assert!(batch.is_empty() && batch.entries().is_empty());
    }

    #[test]
    fn an_extent_becomes_free_only_by_way_of_pending_scrub() {
        let mut books = books();
        let got = books.reserve(1).unwrap()[0];
        let mut batch = Batch::default();
        assert!(matches!(
            batch.add(&books, &[allocate(got, DatasetId::random(), 0)], 100),
            Added::Yes
        ));
        assert_eq!(
            refused(batch.add(&books, &[Step::Free(got)], 100)),
            Kind::Internal
        );
        assert!(matches!(
            batch.add(&books, &[Step::Change(Change::Release(got))], 100),
            Added::Yes
        ));
        assert_eq!(
            refused(batch.add(&books, &[allocate(got, DatasetId::random(), 1)], 100)),
            Kind::Internal
        );
        assert!(matches!(batch.add(&books, &[Step::Free(got)], 100), Added::Yes));
    }

    #[test]
    fn only_a_free_extent_that_was_set_aside_is_scrubbed_once_more() {
        let mut books = books();
        let mut batch = Batch::default();
        let extent = PhysicalExtent(3);
        assert_eq!(
            refused(batch.add(&books, &[Step::Rescrub(extent)], 100)),
            Kind::Internal
        );
        assert_eq!(
            books.reserve_these(&[extent, extent, PhysicalExtent(u32::MAX)]),
            [extent]
        );
        assert!(matches!(
            batch.add(&books, &[Step::Rescrub(extent)], 100),
            Added::Yes
        ));
        books.apply(1, batch.parts().0);
        assert!(books.is_pending(extent) && !books.is_reserved(extent));
        assert_eq!(books.space().pending_scrub, 1);
        let mut batch = Batch::default();
        assert_eq!(
            refused(batch.add(&books, &[Step::Rescrub(extent)], 100)),
            Kind::Internal
        );
    }

    #[test]
    fn what_exceeds_a_frame_waits_for_the_next_and_what_exceeds_any_is_refused() {
        let mut books = books();
        let got = books.reserve(4).unwrap();
        let dataset = DatasetId::random();
        let steps: Vec<_> = got
            .iter()
            .enumerate()
            .map(|(i, e)| allocate(*e, dataset, i as u32))
            .collect();
        let mut batch = Batch::default();
        assert_eq!(refused(batch.add(&books, &steps, 3)), Kind::Internal);
        assert!(matches!(batch.add(&books, &steps[..2], 3), Added::Yes));
        assert!(matches!(batch.add(&books, &steps[2..], 3), Added::Later));
    }

    #[test]
    fn marks_are_limited_and_a_cleared_one_makes_room() {
        let sizes = Sizes {
            slots: 8,
            tombstones: 63,
            log_bytes: 16 * 4096,
        };
        let marks = DIRTY_MARKS_PER_STORE as u32;
        let bytes = Layout::bytes_for(marks + 1, 16 << 10, sizes);
        let layout = Layout::plan(bytes, 16 << 10, sizes).unwrap();
        let mut books = Books::new(Table::new(layout, StoreId::random(), ExtentState::Free)).0;
        let got = books.reserve(marks + 1).unwrap();
        let dataset = DatasetId::random();
        let step = |(i, extent): (usize, &PhysicalExtent)| allocate(*extent, dataset, i as u32);
        let steps: Vec<_> = got.iter().enumerate().map(step).collect();
        let (last, most) = steps.split_last().unwrap();
        let mut batch = Batch::default();
        assert!(matches!(batch.add(&books, most, usize::MAX), Added::Yes));
        let one_more = || std::slice::from_ref(last);
        assert_eq!(
            refused(batch.add(&books, one_more(), usize::MAX)),
            Kind::NoSpace,
            "counts the batch"
        );
        books.apply(1, batch.parts().0);
        let mut batch = Batch::default();
        assert_eq!(
            refused(batch.add(&books, one_more(), usize::MAX)),
            Kind::NoSpace,
            "counts the books"
        );
        let clear = [Step::Change(Change::ClearMark {
            physical: got[0],
            missed_by: ReplicaSet::NONE,
        })];
        assert!(matches!(batch.add(&books, &clear, usize::MAX), Added::Yes));
        assert!(matches!(batch.add(&books, one_more(), usize::MAX), Added::Yes));
    }
}
