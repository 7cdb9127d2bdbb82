//! The table in memory: every record, and the pages they live in on disk.
//!
//! One index space: volume records (one a slot), tombstones, extents. A page has 63 records and two copies. A checkpoint
//! writes one copy, syncs, writes the other, syncs, and only then may the log forget: so *either* copy with the log has
//! everything, whether the other one was torn by a power cut or rotted later. A page both copies of which are bad hurts its
//! own records only: they are *unknown*, are never guessed, and the page is never written again. Who owns what is derived
//! in [`super::books`].

use std::collections::{BTreeSet, HashMap};

use super::layout::{Layout, PAGE_BYTES, RECORD_BYTES, RECORDS_PER_PAGE};
use super::log::{Entry, Frame};
use super::record::{ExtentRecord, ExtentState, Image, Tombstone, VolumeEntry};
use super::wire::{crc32c_without, structure};
use crate::ids::{DatasetId, ExtentIndex, KeyVersion, PhysicalExtent, ReplicaSet, StoreId};

structure! {
    /// Header of a table page.
    fields, 64,
    MAGIC "magic" 0 8,
    STORE "store id" 8 16,
    PAGE "page number" 24 4,
    RESERVED_1 "reserved" 28 4,
    LSN "lsn" 32 8,
    CRC "crc" 40 4,
    RESERVED_2 "reserved" 44 20,
}

pub(super) const MAGIC: [u8; 8] = *b"VOLDPAGE";
const _: () = assert!(fields::SIZE + RECORDS_PER_PAGE as usize * RECORD_BYTES == PAGE_BYTES);

/// One record of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Volume(Option<VolumeEntry>),
    Tombstone(Option<Tombstone>),
    Extent(ExtentRecord),
}

impl Record {
    pub(super) fn encode(&self) -> Image {
        match self {
            Record::Volume(entry) => VolumeEntry::encode(entry.as_ref()),
            Record::Tombstone(tombstone) => Tombstone::encode(tombstone.as_ref()),
            Record::Extent(extent) => extent.encode(),
        }
    }
}

/// An extent's record in 16 bytes: the dataset is a number of the table's own.
#[derive(Clone, Copy, Debug)]
struct Compact {
    dataset: u32,
    logical: u32,
    key_version: u32,
    state: ExtentState,
    dirty: bool,
    missed_by: ReplicaSet,
}

/// What is known of a page on disk.
#[derive(Clone, Copy, Debug)]
struct Page {
    /// The newest frame that changed it (in memory).
    lsn: u64,
    /// The copy that was read; the other one is written first.
    copy: u8,
    /// Both copies are bad.
    unknown: bool,
}

/// See the module's text.
pub(super) struct Table {
    layout: Layout,
    store: StoreId,
    volumes: Vec<Option<VolumeEntry>>,
    tombstones: HashMap<u32, Tombstone>,
    extents: Vec<Compact>,
    datasets: Datasets,
    pages: Vec<Page>,
    changed: BTreeSet<u32>,
}

/// Numbers for dataset ids; 0 is none.
struct Datasets {
    ids: Vec<DatasetId>,
    numbers: HashMap<DatasetId, u32>,
}

impl Datasets {
    fn number(&mut self, id: DatasetId) -> u32 {
        *self.numbers.entry(id).or_insert_with(|| {
            self.ids.push(id);
            self.ids.len() as u32 - 1
        })
    }
}

impl Table {
    /// A table of a fresh store: no volumes, every extent in the same state.
    pub(super) fn new(layout: Layout, store: StoreId, extents: ExtentState) -> Self {
        let page = Page {
            lsn: 0,
            copy: 0,
            unknown: false,
        };
        let blank = Compact {
            dataset: 0,
            logical: 0,
            key_version: 0,
            state: extents,
            dirty: false,
            missed_by: ReplicaSet::NONE,
        };
        Self {
            layout,
            store,
            volumes: vec![None; layout.slots as usize],
            tombstones: HashMap::new(),
            extents: vec![blank; layout.extents as usize],
            datasets: Datasets {
                ids: vec![DatasetId::NIL],
                numbers: HashMap::from([(DatasetId::NIL, 0)]),
            },
            pages: vec![page; layout.pages() as usize],
            changed: BTreeSet::new(),
        }
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The record at `index`; `None` when its page is unknown.
    pub(super) fn get(&self, index: u32) -> Option<Record> {
        if self.pages[(index / RECORDS_PER_PAGE) as usize].unknown {
            return None;
        }
        let Layout {
            slots, tombstones, ..
        } = self.layout;
        Some(if index < slots {
            Record::Volume(self.volumes[index as usize].clone())
        } else if index < slots + tombstones {
            Record::Tombstone(self.tombstones.get(&(index - slots)).copied())
        } else {
            let extent = PhysicalExtent(index - slots - tombstones);
            Record::Extent(self.extent(extent).expect("its page is known"))
        })
    }

    /// An extent's record; `None` when its page is unknown.
    pub(super) fn extent(&self, extent: PhysicalExtent) -> Option<ExtentRecord> {
        if self.is_unknown(self.layout.extent_index(extent)) {
            return None;
        }
        let compact = self.extents[extent.0 as usize];
        Some(ExtentRecord {
            state: compact.state,
            dirty: compact.dirty,
            missed_by: compact.missed_by,
            dataset: self.datasets.ids[compact.dataset as usize],
            logical: ExtentIndex(compact.logical),
            key_version: KeyVersion(compact.key_version),
        })
    }

    /// A slot's volume; `None` when the slot is unused or its page unknown.
    pub(super) fn volume(&self, slot: u32) -> Option<&VolumeEntry> {
        self.volumes[slot as usize].as_ref()
    }

    /// Tombstones by their place.
    pub(super) fn tombstones(&self) -> impl Iterator<Item = (u32, &Tombstone)> {
        self.tombstones
            .iter()
            .map(|(place, tombstone)| (*place, tombstone))
    }

    /// A place's tombstone.
    pub(super) fn tombstone(&self, place: u32) -> Option<&Tombstone> {
        self.tombstones.get(&place)
    }

    /// Whether the record's page is unknown.
    pub(super) fn is_unknown(&self, index: u32) -> bool {
        self.pages[(index / RECORDS_PER_PAGE) as usize].unknown
    }

    /// A record changed, by the frame `lsn`.
    ///
    /// # Panics
    /// If the record is of another kind than its place, or its page unknown.
    pub(super) fn set(&mut self, lsn: u64, index: u32, record: &Record) {
        let Layout {
            slots, tombstones, ..
        } = self.layout;
        match record {
            Record::Volume(entry) => {
                assert!(index < slots);
                self.volumes[index as usize] = entry.clone();
            }
            Record::Tombstone(tombstone) => {
                assert!((slots..slots + tombstones).contains(&index));
                match tombstone {
                    Some(tombstone) => self.tombstones.insert(index - slots, *tombstone),
                    None => self.tombstones.remove(&(index - slots)),
                };
            }
            Record::Extent(extent) => {
                self.extents[(index - slots - tombstones) as usize] = Compact {
                    dataset: self.datasets.number(extent.dataset),
                    logical: extent.logical.0,
                    key_version: extent.key_version.0,
                    state: extent.state,
                    dirty: extent.dirty,
                    missed_by: extent.missed_by,
                };
            }
        }
        self.touch(lsn, index / RECORDS_PER_PAGE);
    }

    /// Every extent allocated to `dataset` (in known pages that are not later) becomes PendingScrub, by the frame
    /// `lsn`. Returns them, and whether each was dirty.
    pub(super) fn release_dataset(&mut self, lsn: u64, dataset: DatasetId) -> Vec<(PhysicalExtent, bool)> {
        let Some(&number) = self.datasets.numbers.get(&dataset) else {
            return Vec::new();
        };
        let first = self.layout.extent_index(PhysicalExtent(0));
        let mut released = Vec::new();
        for (extent, compact) in self.extents.iter_mut().enumerate() {
            let page = (first + extent as u32) / RECORDS_PER_PAGE;
            let page = &self.pages[page as usize];
            // A later page is only met in replay: it has this change already.
            if page.unknown
                || compact.dataset != number
                || compact.state != ExtentState::Allocated
                || page.lsn > lsn
            {
                continue;
            }
            compact.state = ExtentState::PendingScrub;
            released.push((PhysicalExtent(extent as u32), std::mem::take(&mut compact.dirty)));
        }
        for (extent, _) in &released {
            self.touch(lsn, (first + extent.0) / RECORDS_PER_PAGE);
        }
        released
    }

    fn touch(&mut self, lsn: u64, page: u32) {
        let state = &mut self.pages[page as usize];
        assert!(!state.unknown && lsn >= state.lsn, "page {page}");
        state.lsn = lsn;
        self.changed.insert(page);
    }

    /// Replays the frames of the log that pages on disk do not have yet.
    ///
    /// # Errors
    /// What is damaged, as text.
    pub(super) fn replay(&mut self, frames: &[Frame]) -> Result<(), String> {
        // A page's own lsn says which frames it has; compare with what was on disk, not with what replay makes of it.
        let on_disk: Vec<u64> = self.pages.iter().map(|page| page.lsn).collect();
        for frame in frames {
            for entry in &frame.entries {
                match entry {
                    Entry::Image(index, image) => {
                        if *index >= self.layout.records() {
                            return Err(format!(
                                "redo log: frame {} changes record {index}, which is not there",
                                frame.lsn
                            ));
                        }
                        let page = (index / RECORDS_PER_PAGE) as usize;
                        if self.pages[page].unknown || on_disk[page] >= frame.lsn {
                            continue;
                        }
                        let record = self.decode(*index, image).ok_or_else(|| {
                            format!("redo log: frame {} has an impossible record {index}", frame.lsn)
                        })?;
                        self.set(frame.lsn, *index, &record);
                    }
                    // Replay is in order, so a page that the frame is news to is in the state right before it.
                    Entry::ReleaseDataset(dataset) => drop(self.release_dataset(frame.lsn, *dataset)),
                }
            }
        }
        let head = frames.last().map_or(0, |frame| frame.lsn);
        match on_disk.iter().max() {
            Some(newest) if *newest > head => Err(format!(
                "redo log: a table page has lsn {newest}, the newest frame {head}; frames are lost"
            )),
            _ => Ok(()),
        }
    }

    fn decode(&self, index: u32, image: &Image) -> Option<Record> {
        let Layout {
            slots, tombstones, ..
        } = self.layout;
        if index < slots {
            VolumeEntry::decode(image).map(Record::Volume)
        } else if index < slots + tombstones {
            Tombstone::decode(image).map(Record::Tombstone)
        } else {
            ExtentRecord::decode(image).map(Record::Extent)
        }
    }

    fn records_of(&self, page: u32) -> std::ops::Range<u32> {
        let first = page * RECORDS_PER_PAGE;
        first..(first + RECORDS_PER_PAGE).min(self.layout.records())
    }

    /// Takes a page from its two copies on disk. When both are bad its records become unknown; otherwise the good one is
    /// taken, and what is wrong with the other one comes back.
    pub(super) fn load(&mut self, page: u32, copies: [&[u8]; 2]) -> Vec<String> {
        let [first, second] = copies.map(|bytes| self.read_page(page, bytes));
        let mut findings: Vec<String> = [&first, &second]
            .iter()
            .enumerate()
            .filter_map(|(copy, read)| {
                let why = read.as_ref().err()?;
                Some(format!("table page {page}, copy {}: {why}", copy + 1))
            })
            .collect();
        let (copy, (lsn, records)) = match (first, second) {
            (Ok(first), Ok(second)) => {
                if first.0 != second.0 {
                    findings.push(format!(
                        "table page {page}: its copies have lsn {} and {}",
                        first.0, second.0
                    ));
                }
                // Of equal copies the first.
                if second.0 > first.0 {
                    (1, second)
                } else {
                    (0, first)
                }
            }
            (Ok(first), Err(_)) => (0, first),
            (Err(_), Ok(second)) => (1, second),
            (Err(_), Err(_)) => {
                self.pages[page as usize].unknown = true;
                let what = self.describe(page);
                findings.push(format!("table page {page}: both copies are bad; {what} unknown"));
                return findings;
            }
        };
        self.pages[page as usize].lsn = lsn;
        self.pages[page as usize].copy = copy;
        for (index, record) in self.records_of(page).zip(&records) {
            self.set(lsn, index, record);
        }
        self.changed.remove(&page);
        findings
    }

    /// The newest frame that changed the page.
    pub(super) fn page_lsn(&self, page: u32) -> u64 {
        self.pages[page as usize].lsn
    }

    /// The next checkpoint writes the page, since one of its copies is bad or older.
    pub(super) fn heal(&mut self, page: u32) {
        if !self.pages[page as usize].unknown {
            self.changed.insert(page);
        }
    }

    /// What a page holds, for people.
    fn describe(&self, page: u32) -> String {
        let records = self.records_of(page);
        let Layout {
            slots, tombstones, ..
        } = self.layout;
        let parts = [
            ("volume slots", 0, slots),
            ("tombstones", slots, slots + tombstones),
            ("extents", slots + tombstones, self.layout.records()),
        ];
        let named = parts.iter().filter_map(|(name, first, end)| {
            let (from, to) = (records.start.max(*first), records.end.min(*end));
            (from < to).then(|| format!("{name} {} to {}", from - first, to - 1 - first))
        });
        named.collect::<Vec<_>>().join(" and ") + " are"
    }

    fn read_page(&self, page: u32, bytes: &[u8]) -> Result<(u64, Vec<Record>), &'static str> {
        if fields::MAGIC.of(bytes) != MAGIC {
            return Err("not a table page");
        }
        if crc32c_without(bytes, &fields::CRC) != fields::CRC.u32(bytes) {
            return Err("wrong checksum");
        }
        if fields::STORE.of(bytes) != self.store.as_bytes() || fields::PAGE.u32(bytes) != page {
            return Err("of another place");
        }
        let (images, _) = bytes[fields::SIZE..].as_chunks::<RECORD_BYTES>();
        let records = self.records_of(page).zip(images);
        let records = records
            .map(|(index, image)| self.decode(index, image))
            .collect::<Option<_>>();
        Ok((fields::LSN.u64(bytes), records.ok_or("an impossible record")?))
    }

    /// The page as it is in memory now, into `out`.
    fn encode_page(&self, page: u32, out: &mut [u8]) {
        out.fill(0);
        fields::MAGIC.put(out, &MAGIC);
        fields::STORE.put(out, self.store.as_bytes());
        fields::PAGE.put_u32(out, page);
        fields::LSN.put_u64(out, self.pages[page as usize].lsn);
        let (images, _) = out[fields::SIZE..].as_chunks_mut::<RECORD_BYTES>();
        for (index, image) in self.records_of(page).zip(images) {
            *image = self.get(index).expect("only known pages are written").encode();
        }
        let crc = crc32c_without(out, &fields::CRC);
        fields::CRC.put_u32(out, crc);
    }

    /// Pages that the current copies on disk do not have, in order.
    pub(super) fn changed(&self) -> Vec<u32> {
        self.changed.iter().copied().collect()
    }

    /// A checkpoint begins to write `pages`: what changes from now on is for the next one.
    pub(super) fn take_changed(&mut self, pages: &[u32]) {
        for page in pages {
            self.changed.remove(page);
        }
    }

    /// Encodes `pages` as they are now into `out`.
    pub(super) fn images(&self, pages: &[u32], out: &mut [u8]) {
        for (page, out) in pages.iter().zip(out.chunks_exact_mut(PAGE_BYTES)) {
            self.encode_page(*page, out);
        }
    }

    /// The copy of `page` that was read last; it is the last to be overwritten.
    pub(super) fn good_copy(&self, page: u32) -> u8 {
        self.pages[page as usize].copy
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Sizes;
    use super::*;

    fn table() -> Table {
        let sizes = Sizes {
            slots: 8,
            tombstones: 63,
            log_bytes: 16 * 4096,
        };
        let layout = Layout::plan(16 << 20, 64 << 10, sizes).unwrap();
        Table::new(layout, StoreId::random(), ExtentState::Free)
    }

    fn allocated(dataset: DatasetId, logical: u32) -> Record {
        Record::Extent(ExtentRecord {
            state: ExtentState::Allocated,
            dirty: false,
            missed_by: ReplicaSet::NONE,
            dataset,
            logical: ExtentIndex(logical),
            key_version: KeyVersion(1),
        })
    }

    fn page_of(table: &Table, page: u32) -> Vec<u8> {
        let mut out = vec![0; PAGE_BYTES];
        table.encode_page(page, &mut out);
        out
    }

    #[test]
    fn the_newer_of_two_good_copies_wins_and_a_torn_one_leaves_the_other() {
        let mut table = table();
        let index = table.layout.extent_index(PhysicalExtent(3));
        let page = index / RECORDS_PER_PAGE;
        let old = page_of(&table, page);
        let dataset = DatasetId::random();
        table.set(5, index, &allocated(dataset, 1));
        let mut new = page_of(&table, page);

        assert!(table.load(page, [&new, &new]).is_empty());
        assert_eq!(table.load(page, [&old, &new]).len(), 1, "the older one is named");
        assert_eq!(table.get(index), Some(allocated(dataset, 1)));
        assert_eq!(table.good_copy(page), 1);
        new[600] ^= 1;
        assert_eq!(table.load(page, [&old, &new]).len(), 1);
        assert_eq!(table.get(index), Some(Record::Extent(ExtentRecord::FREE)));
    }

    #[test]
    fn a_page_with_two_bad_copies_makes_its_own_records_unknown_and_no_others() {
        let mut table = table();
        let page = table.layout.pages() - 1;
        let findings = table.load(page, [&[0; PAGE_BYTES], &[1; PAGE_BYTES]]);
        assert!(findings.iter().any(|f| f.contains("extents")), "{findings:?}");
        let unknown: Vec<u32> = (0..table.layout.records())
            .filter(|i| table.get(*i).is_none())
            .collect();
        assert_eq!(unknown, table.records_of(page).collect::<Vec<_>>());
    }

    #[test]
    fn replay_changes_only_pages_that_do_not_have_the_frame() {
        let mut table = table();
        let first = table.layout.extent_index(PhysicalExtent(0));
        let (early, late) = (first, first + 2 * RECORDS_PER_PAGE);
        let dataset = DatasetId::random();
        table.set(9, late, &allocated(dataset, 2));
        let frames = [
            Frame {
                lsn: 8,
                checkpoint: 7,
                entries: vec![
                    Entry::Image(early, allocated(dataset, 1).encode()),
                    Entry::Image(late, allocated(dataset, 9).encode()),
                ],
            },
            Frame {
                lsn: 9,
                checkpoint: 7,
                entries: vec![],
            },
        ];
        table.replay(&frames).unwrap();
        assert_eq!(table.get(early), Some(allocated(dataset, 1)));
        assert_eq!(
            table.get(late),
            Some(allocated(dataset, 2)),
            "the page had a later state"
        );
        table.set(12, late, &allocated(dataset, 2));
        assert!(table.replay(&frames).unwrap_err().contains("lost"));
    }
}
