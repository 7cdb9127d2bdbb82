//! Where everything is: regions of a store, and the arithmetic of offsets.
//!
//! A layout is planned once, when a store is formatted, and then only read from the superblock; all bounds are checked
//! there, so offsets computed here are inside the file. It deliberately reads and writes nothing.

use crate::ids::PhysicalExtent;
use crate::limits::{BLOCK, BLOCK_SIZE, EXTENT_BYTES_MIN, STORE_BYTES_MAX};

/// Format version this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Copy B of the superblock.
pub(super) const SUPERBLOCK_B_AT: u64 = 64 << 10;
/// Both superblock copies and room around them.
pub(super) const SUPERBLOCK_REGION: u64 = 128 << 10;
/// One volume slot copy.
pub(super) const SLOT_BYTES: u64 = 4096;
/// One table page, header included.
pub(super) const PAGE_BYTES: usize = 4096;
/// One record.
pub(super) const RECORD_BYTES: usize = 64;
/// Records of one page: (4096 - 64) / 64.
pub(super) const RECORDS_PER_PAGE: u32 = 63;
/// Unit of the redo log: frames begin and end on it.
pub(super) const LOG_UNIT: usize = 4096;
/// Smallest ring the format can express.
const LOG_BYTES_MIN: u64 = 16 * LOG_UNIT as u64;
/// Largest ring: it is read in one piece when the store is opened.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// Most volume slots.
const SLOTS_MAX: u32 = 4096;
/// Most tombstones.
const TOMBSTONES_MAX: u32 = 1 << 20;
/// Most extents: the largest store in the smallest extents a store is made with, 64 Mi. Their table lives in memory.
const EXTENTS_MAX: u32 = (STORE_BYTES_MAX / EXTENT_BYTES_MIN) as u32;
/// Longest frame, unless a quarter of the ring is less: room for 3639 records.
pub(super) const FRAME_BYTES_MAX: usize = 64 * LOG_UNIT;
/// Header of a checksum area: one sector.
pub(super) const SUM_HEADER_BYTES: usize = 512;
/// The data region begins on a multiple of this, whatever the extent size.
const DATA_ALIGN: u64 = 4 << 20;

/// What the format can express; [`crate::limits`] has the narrower limits of the product.
pub(super) const EXTENT_BYTES_EXPRESSIBLE: std::ops::RangeInclusive<u64> = (16 << 10)..=(64 << 20);

/// One contiguous part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Region {
    pub(super) fn end(&self) -> u64 {
        self.at + self.len
    }
}

/// Counts and regions of one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) extent_bytes: u64,
    pub(super) extents: u32,
    pub(super) slots: u32,
    pub(super) tombstones: u32,
    pub(super) slot_region: Region,
    pub(super) log: Region,
    pub(super) table: Region,
    pub(super) sums: Region,
    pub(super) data: Region,
    pub(super) total_bytes: u64,
}

/// The sizes that are chosen, not computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) slots: u32,
    pub(super) tombstones: u32,
    pub(super) log_bytes: u64,
}

impl Sizes {
    /// Slots: one an extent, 64 to 4096 (a volume without an extent is no use). Tombstones stay for ever: 16 an extent,
    /// 4 Ki to 1 Mi. Log: 1/256 of the store, 1 to 16 MiB (4096 commits of the smallest kind).
    pub(super) fn for_store(size_bytes: u64, extent_bytes: u64) -> Self {
        let extents = size_bytes / extent_bytes;
        Self {
            slots: extents.clamp(64, SLOTS_MAX.into()) as u32,
            tombstones: (extents * 16).clamp(4096, TOMBSTONES_MAX.into()) as u32,
            log_bytes: (size_bytes / 256).clamp(1 << 20, LOG_BYTES_MAX) / BLOCK * BLOCK,
        }
    }
}

impl Layout {
    /// As many extents as fit `total_bytes`; `None` when not even one does.
    pub(super) fn plan(total_bytes: u64, extent_bytes: u64, sizes: Sizes) -> Option<Self> {
        // More extents need more metadata, so the largest count that fits is searched for.
        let fits = |extents: u32| Self::with_extents(extents, extent_bytes, sizes).data.end() <= total_bytes;
        let (mut good, mut bad) = (0, u32::try_from(total_bytes / extent_bytes + 1).ok()?);
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            if fits(middle) {
                good = middle;
            } else {
                bad = middle;
            }
        }
        let layout = Self::with_extents(good, extent_bytes, sizes);
        (good > 0).then_some(Self {
            total_bytes,
            ..layout
        })
    }

    /// The least bytes a store with `extents` extents needs.
    pub(super) fn bytes_for(extents: u32, extent_bytes: u64, sizes: Sizes) -> u64 {
        Self::with_extents(extents, extent_bytes, sizes).data.end()
    }

    fn with_extents(extents: u32, extent_bytes: u64, sizes: Sizes) -> Self {
        let mut at = SUPERBLOCK_REGION;
        let mut region = |len: u64| {
            let region = Region { at, len };
            at += len;
            region
        };
        let slot_region = region(2 * u64::from(sizes.slots) * SLOT_BYTES);
        let log = region(sizes.log_bytes);
        let records = u64::from(sizes.slots) + u64::from(sizes.tombstones) + u64::from(extents);
        let pages = records.div_ceil(u64::from(RECORDS_PER_PAGE));
        let table = region(2 * pages * PAGE_BYTES as u64);
        let sums = region(u64::from(extents) * sum_area_bytes(extent_bytes));
        let data = Region {
            at: at.next_multiple_of(DATA_ALIGN),
            len: u64::from(extents) * extent_bytes,
        };
        Self {
            extent_bytes,
            extents,
            slots: sizes.slots,
            tombstones: sizes.tombstones,
            slot_region,
            log,
            table,
            sums,
            data,
            total_bytes: data.end(),
        }
    }

    /// What is wrong with a layout read from a superblock whose CRC is right, if anything.
    pub(super) fn fault(&self) -> Option<String> {
        let Self {
            extent_bytes,
            extents,
            slots,
            tombstones,
            ..
        } = *self;
        if !extent_bytes.is_power_of_two() || !EXTENT_BYTES_EXPRESSIBLE.contains(&extent_bytes) {
            return Some(format!("extent size {extent_bytes}"));
        }
        if extents == 0 || slots == 0 || tombstones == 0 {
            return Some("no extents, slots or tombstones".into());
        }
        // What is read whole, or kept in memory, is no larger than what a store is ever made with.
        let counts = [
            ("extents", extents, EXTENTS_MAX),
            ("slots", slots, SLOTS_MAX),
            ("tombstones", tombstones, TOMBSTONES_MAX),
        ];
        if let Some((name, count, most)) = counts.into_iter().find(|(_, count, most)| count > most) {
            return Some(format!("{count} {name}, of {most} at most"));
        }
        let lengths = [
            ("slots", self.slot_region, 2 * u64::from(slots) * SLOT_BYTES),
            (
                "log",
                self.log,
                self.log.len.clamp(LOG_BYTES_MIN, LOG_BYTES_MAX) / BLOCK * BLOCK,
            ),
            (
                "table",
                self.table,
                2 * u64::from(self.pages()) * PAGE_BYTES as u64,
            ),
            (
                "checksum areas",
                self.sums,
                u64::from(extents) * self.sum_area_bytes(),
            ),
            ("data", self.data, u64::from(extents) * extent_bytes),
        ];
        let mut end = SUPERBLOCK_REGION;
        for (name, region, len) in lengths {
            let past = region.at.checked_add(region.len);
            if region.at < end || !region.at.is_multiple_of(BLOCK) || region.len != len || past.is_none() {
                return Some(format!("region {name} at {} of {} bytes", region.at, region.len));
            }
            end = region.end();
        }
        (end > self.total_bytes).then(|| format!("regions end at {end}, the store at {}", self.total_bytes))
    }

    /// Records of all three kinds.
    pub(super) fn records(&self) -> u32 {
        self.slots + self.tombstones + self.extents
    }

    /// Table pages (of each copy).
    pub(super) fn pages(&self) -> u32 {
        self.records().div_ceil(RECORDS_PER_PAGE)
    }

    /// Table index of an extent's record.
    pub(super) fn extent_index(&self, extent: PhysicalExtent) -> u32 {
        self.slots + self.tombstones + extent.0
    }

    /// Table index of the first tombstone.
    pub(super) fn tombstone_index(&self, tombstone: u32) -> u32 {
        self.slots + tombstone
    }

    /// Byte offset of a page's copy (0 or 1). The copies are two runs, so that local damage spares one.
    pub(super) fn page_at(&self, page: u32, copy: u8) -> u64 {
        let run = u64::from(self.pages()) * PAGE_BYTES as u64;
        self.table.at + u64::from(copy) * run + u64::from(page) * PAGE_BYTES as u64
    }

    /// Byte offset of a slot's copy (0 or 1).
    pub(super) fn slot_at(&self, slot: u32, copy: u8) -> u64 {
        let run = u64::from(self.slots) * SLOT_BYTES;
        self.slot_region.at + u64::from(copy) * run + u64::from(slot) * SLOT_BYTES
    }

    /// Units of the log ring.
    pub(super) fn log_units(&self) -> u32 {
        (self.log.len / LOG_UNIT as u64) as u32
    }

    /// Longest frame of this ring: a quarter of it at most.
    pub(super) fn frame_bytes_max(&self) -> usize {
        FRAME_BYTES_MAX.min(self.log_units() as usize / 4 * LOG_UNIT)
    }

    /// Byte offset of an extent's data.
    pub(super) fn data_at(&self, extent: PhysicalExtent) -> u64 {
        self.data.at + u64::from(extent.0) * self.extent_bytes
    }

    /// Byte offset of an extent's checksum area.
    pub(super) fn sums_at(&self, extent: PhysicalExtent) -> u64 {
        self.sums.at + u64::from(extent.0) * self.sum_area_bytes()
    }

    /// Bytes of one checksum area.
    pub(super) fn sum_area_bytes(&self) -> u64 {
        sum_area_bytes(self.extent_bytes)
    }

    /// Blocks of one extent.
    pub(super) fn blocks_per_extent(&self) -> u32 {
        (self.extent_bytes / BLOCK) as u32
    }
}

/// Bytes that scrubbing `extents` extents overwrites and reads back: their data and their checksum areas.
pub fn scrubbed_bytes(extents: u32, extent_bytes: u64) -> u64 {
    u64::from(extents) * (extent_bytes + sum_area_bytes(extent_bytes))
}

/// One header sector and 4 bytes a block, in whole blocks: 8 KiB for 4 MiB.
fn sum_area_bytes(extent_bytes: u64) -> u64 {
    let sums = extent_bytes / BLOCK * 4;
    (SUM_HEADER_BYTES as u64 + sums).next_multiple_of(BLOCK_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{
        EXTENT_BYTES_DEFAULT, EXTENT_BYTES_MAX, EXTENT_BYTES_MIN, STORE_BYTES_MAX, STORE_BYTES_MIN,
    };

    #[test]
    fn every_plan_passes_its_own_check_and_wastes_less_than_an_extent_and_the_alignment() {
        for extent_bytes in [EXTENT_BYTES_MIN, EXTENT_BYTES_DEFAULT, EXTENT_BYTES_MAX] {
            for size in [
                STORE_BYTES_MIN,
                100_000_000 / 4096 * 4096,
                1 << 30,
                1 << 40,
                STORE_BYTES_MAX,
            ] {
                let sizes = Sizes::for_store(size, extent_bytes);
                let Some(layout) = Layout::plan(size, extent_bytes, sizes) else {
                    assert!(size < Layout::bytes_for(1, extent_bytes, sizes));
                    continue;
                };
                assert_eq!(layout.fault(), None, "{layout:?}");
                assert!(layout.data.end() <= size);
                assert!(Layout::bytes_for(layout.extents + 1, extent_bytes, sizes) > size);
                assert!(layout.data.at.is_multiple_of(DATA_ALIGN));
            }
        }
    }

    #[test]
    fn a_checksum_area_is_8_kib_for_the_default_extent_and_always_holds_every_sum() {
        assert_eq!(sum_area_bytes(EXTENT_BYTES_DEFAULT), 8192);
        assert_eq!(scrubbed_bytes(3, EXTENT_BYTES_DEFAULT), 3 * ((4 << 20) + 8192));
        let mut extent_bytes = EXTENT_BYTES_MIN;
        while extent_bytes <= EXTENT_BYTES_MAX {
            assert!(sum_area_bytes(extent_bytes) >= 512 + extent_bytes / 4096 * 4);
            extent_bytes *= 2;
        }
    }

    #[test]
    fn a_layout_larger_than_any_store_is_made_with_is_refused() {
        let most = Sizes::for_store(STORE_BYTES_MAX, EXTENT_BYTES_MIN);
        let largest = Layout::plan(STORE_BYTES_MAX, EXTENT_BYTES_MIN, most).unwrap();
        assert_eq!(largest.fault(), None);
        assert_eq!(
            (most.slots, most.tombstones, most.log_bytes),
            (SLOTS_MAX, TOMBSTONES_MAX, LOG_BYTES_MAX)
        );
        // Each is in proportion to its regions, so only its size is wrong.
        let faulty = |extents, extent_bytes, sizes| {
            let layout = Layout::with_extents(extents, extent_bytes, sizes);
            layout.fault().expect("too large")
        };
        let long = 5 << 30;
        let fault = faulty(
            8,
            1 << 20,
            Sizes {
                log_bytes: long,
                ..most
            },
        );
        assert!(fault.contains("region log"), "{fault}");
        let fault = faulty(8, 1 << 20, Sizes { slots: 4097, ..most });
        assert!(fault.contains("4097 slots"), "{fault}");
        let tombstones = (1 << 20) + 1;
        let fault = faulty(8, 1 << 20, Sizes { tombstones, ..most });
        assert!(fault.contains("tombstones"), "{fault}");
        let fault = faulty(u32::MAX - (2 << 20), 16 << 10, most);
        assert!(fault.contains("extents, of 67108864"), "{fault}");
    }

    #[test]
    fn a_layout_whose_regions_overlap_or_leave_the_store_is_refused() {
        let good = Layout::plan(1 << 30, 4 << 20, Sizes::for_store(1 << 30, 4 << 20)).unwrap();
        let mut bad = good;
        bad.table.at -= 4096;
        assert!(bad.fault().is_some());
        let mut bad = good;
        bad.total_bytes = good.data.end() - 1;
        assert!(bad.fault().is_some());
        let mut bad = good;
        bad.data.at = u64::MAX - 4095;
        assert!(bad.fault().is_some());
        let mut bad = good;
        bad.extent_bytes = 0;
        assert!(bad.fault().is_some());
    }
}
