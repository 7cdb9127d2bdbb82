//! The sums of an open volume's blocks: loaded from the checksum areas, kept in memory under a byte limit.
//!
//! In memory they are the truth for marked extents (their areas may be older) and stay there until the cleaner has
//! written them; for clean ones they are a copy of the areas and may go at any time.
//!
//! Loading a clean extent reads the areas of all replicas, because a lost write of an area can only be seen by comparing:
//!
//! | newest valid areas | sums taken | afterwards |
//! |---|---|---|
//! | on all replicas, equal | those | – |
//! | on some; the others older, blank or damaged | those | extent is marked, so that the cleaner writes all areas anew |
//! | on several, but an entry differs | the one that the data of some replica matches, if that is one | likewise |
//! | on some, none of them whole | theirs; where they differ or say hole, as in the row before | likewise |
//! | none, and one cannot be read | none: EIO, and the next request tries again | – |
//! | none | none: every block counts as damaged ([`UNKNOWN`]) until it is written again | – |
//!
//! The last row: a mark is cleared only after every replica's area is durable, so a clean extent without any area has
//! lost it. Then nothing vouches for its data, nor for its holes (a lost write reads as zeros too), and a wrong answer is
//! worse than EIO. An older area is never used beside a newer one: it vouches for old data.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use super::core::{Core, uncancelled};
use super::extent::{Extent, State};
use crate::crypto::seal::{HOLE, verify_block};
use crate::error::{Error, Result};
use crate::store::{SumArea, SumAreaRead};

/// Sum of a block that nothing is known of. A block's own sum is this with probability 2^-32, so reading it finds damage.
pub(super) const UNKNOWN: u32 = 0xdead_b10c;

/// What the cache looks at, at most, when it makes room: it must not scan everything for every load.
const EVICTIONS_LOOKED_AT: usize = 64;

/// Counts the bytes of all sums in memory, and drops those of clean extents that were not used for longest.
pub(super) struct SumCache {
    bytes: Cell<usize>,
    bytes_max: usize,
    /// Extents with sums in memory, oldest first, with a second chance for those used since.
    queue: RefCell<VecDeque<Rc<Extent>>>,
}

impl SumCache {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            bytes: Cell::new(0),
            bytes_max,
            queue: RefCell::default(),
        }
    }

    /// The extent's sums, from now on in memory.
    pub(super) fn put(&self, extent: &Rc<Extent>, sums: Box<[u32]>) {
        self.count(extent.replace_sums(Some(sums)));
        if !extent.in_cache.replace(true) {
            self.queue.borrow_mut().push_back(extent.clone());
        }
        self.make_room();
    }

    /// The extent is gone, and its sums with it.
    pub(super) fn forget(&self, extent: &Extent) {
        self.count(extent.replace_sums(None));
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes.get()
    }

    fn count(&self, change: isize) {
        let bytes = self.bytes.get().checked_add_signed(change);
        self.bytes.set(bytes.expect("no more goes out than came in"));
    }

    fn make_room(&self) {
        let mut queue = self.queue.borrow_mut();
        let mut looks = EVICTIONS_LOOKED_AT.min(2 * queue.len());
        while self.bytes.get() > self.bytes_max && looks > 0 {
            looks -= 1;
            let Some(extent) = queue.pop_front() else { return };
            let evict = extent.may_evict() && !extent.recently_used.replace(false);
            if evict || !extent.has_sums() {
                extent.in_cache.set(false);
                self.count(extent.replace_sums(None));
            } else {
                queue.push_back(extent);
            }
        }
    }
}

impl Core {
    /// Brings the sums of a clean extent into memory. They stay there only while the extent is in use or marked.
    ///
    /// # Errors
    /// `Io`.
    pub(super) async fn load_sums(self: &Rc<Self>, extent: &Rc<Extent>) -> Result<()> {
        // An extent stays in these two states while its sums are being loaded: marking it loads them first.
        while !extent.has_sums() && matches!(extent.state.get(), State::Clean | State::Marking) {
            if extent.loading.get() {
                self.wait_for(|| (!extent.loading.get()).then_some(())).await?;
                continue;
            }
            extent.loading.set(true);
            let (core, this, in_flight) = (self.clone(), extent.clone(), self.in_flight.enter());
            uncancelled(async move {
                let result = core.load_areas(&this).await;
                this.loading.set(false);
                core.changed.notify_all();
                drop(in_flight);
                result
            })
            .await?;
        }
        Ok(())
    }

    async fn load_areas(self: &Rc<Self>, extent: &Rc<Extent>) -> Result<()> {
        let areas = self.read_areas(extent).await?;
        let newest = areas.iter().filter_map(dated).map(|area| area.sequence).max();
        let Some(newest) = newest else {
            if areas.iter().any(Option::is_none) {
                // It may be readable another time; giving up on its sums could not be undone.
                return Err(Error::io(format!(
                    "volume {}: no replica's checksum area of extent {} can be read",
                    self.label, extent.index
                )));
            }
            tracing::error!(
                volume = %self.label, extent = %extent.index,
                "no replica has a checksum area of this clean extent; its blocks give EIO until they are written again"
            );
            self.cache
                .put(extent, vec![UNKNOWN; self.shape.blocks as usize].into());
            return Ok(());
        };
        let is_newest = |area: &&SumArea| area.sequence == newest;
        let whole: Vec<&SumArea> = areas.iter().filter_map(valid).filter(is_newest).collect();
        let torn = whole.is_empty();
        let current: Vec<&SumArea> = match torn {
            true => areas.iter().filter_map(dated).filter(is_newest).collect(),
            false => whole,
        };
        let mut sums = current[0].sums.clone();
        let mut repair = torn || current.len() < areas.len();
        if torn || current.iter().any(|area| area.sums != sums) {
            repair = true;
            for block in 0..self.shape.blocks {
                let entries: Vec<u32> = current.iter().map(|area| area.sums[block as usize]).collect();
                // A hole of an area that is not whole may be a lost sum.
                if entries.iter().any(|entry| *entry != entries[0]) || (torn && entries[0] == HOLE) {
                    sums[block as usize] = self.settle_entry(extent, block, &entries).await?;
                }
            }
        }
        extent.sequence.set(newest);
        self.cache.put(extent, sums);
        if repair {
            tracing::warn!(
                volume = %self.label, extent = %extent.index,
                "checksum areas of the replicas differ; the extent is marked so that all are written anew"
            );
            self.mark_for_repair(extent);
        }
        Ok(())
    }

    /// Reads the extent's area from every replica in sync; `None` where it cannot be read.
    ///
    /// # Errors
    /// `Io` when the volume has stopped.
    pub(super) async fn read_areas(&self, extent: &Extent) -> Result<Vec<Option<SumAreaRead>>> {
        self.check()?;
        let places = extent.places.get();
        let (dataset, index) = (self.dataset, extent.index);
        let results = self
            .on(self.in_sync(), |replica, io| async move {
                io.read_sums(places[replica], dataset, index).await
            })
            .await;
        let mut areas = Vec::new();
        for (replica, result) in results.into_iter() {
            let why = match result {
                // The store checks the header; that it has one sum a block is part of its format.
                Ok(SumAreaRead::Valid(area) | SumAreaRead::Torn(area))
                    if area.sums.len() != self.shape.blocks as usize =>
                {
                    "it is for another extent size".to_owned()
                }
                Ok(SumAreaRead::Damaged(why)) => why,
                Ok(sound) => {
                    areas.push(Some(sound));
                    continue;
                }
                Err(error) => {
                    areas.push(None);
                    let store = &*self.seats[replica].name.borrow();
                    tracing::warn!(volume = %self.label, extent = %index, %store, "checksum area cannot be read: {error}");
                    continue;
                }
            };
            let store = &*self.seats[replica].name.borrow();
            tracing::warn!(volume = %self.label, extent = %index, %store, "checksum area is damaged: {why}");
            areas.push(Some(SumAreaRead::Damaged(why)));
        }
        Ok(areas)
    }

    /// Areas of the same age disagree about a block: its data decides, if they speak for one entry only.
    async fn settle_entry(&self, extent: &Extent, block: u32, entries: &[u32]) -> Result<u32> {
        let copies = self.read_copies(extent, block..block + 1).await?;
        let number = self.shape.block_index(extent.index, block);
        let mut agreed = None;
        for entry in entries {
            if copies
                .iter()
                .filter_map(|copy| copy.block(0))
                .any(|copy| verify_block(self.dataset, number, copy, *entry))
            {
                match agreed {
                    Some(other) if other != *entry => return Ok(UNKNOWN),
                    _ => agreed = Some(*entry),
                }
            }
        }
        Ok(agreed.unwrap_or(UNKNOWN))
    }

    /// Marks an extent in the background; the cleaner then writes its areas anew.
    fn mark_for_repair(self: &Rc<Self>, extent: &Rc<Extent>) {
        let Ok(in_flight) = self.begin(0, 0) else { return };
        let (core, index) = (self.clone(), extent.index);
        crate::runtime::spawn(async move {
            // A volume that stops, or a store without room for a mark, leaves it to the next load.
            if let Ok(Some(_)) = core.writable_if_present(index).await {
                core.healed_areas.set(core.healed_areas.get() + 1);
            }
            drop(in_flight);
        })
        .detach();
    }

    /// Whether all of these blocks are holes; `None` when the sums are not in memory.
    #[inline]
    pub(super) fn all_holes(&self, extent: &Extent, blocks: std::ops::Range<u32>) -> Option<bool> {
        extent.with_sums(blocks, |sums| sums.iter().all(|sum| *sum == HOLE))
    }

    /// A fresh extent's sums.
    pub(super) fn holes(&self) -> Box<[u32]> {
        vec![HOLE; self.shape.blocks as usize].into()
    }
}

/// A whole area.
fn valid(area: &Option<SumAreaRead>) -> Option<&SumArea> {
    match area {
        Some(SumAreaRead::Valid(area)) => Some(area),
        Some(SumAreaRead::Torn(_) | SumAreaRead::Blank | SumAreaRead::Damaged(_)) | None => None,
    }
}

/// An area that says how old it is.
fn dated(area: &Option<SumAreaRead>) -> Option<&SumArea> {
    match area {
        Some(SumAreaRead::Valid(area) | SumAreaRead::Torn(area)) => Some(area),
        Some(SumAreaRead::Blank | SumAreaRead::Damaged(_)) | None => None,
    }
}

/// The sums of a few blocks: inline up to 8 (32 KiB), on the heap beyond.
pub(super) struct SumRun {
    inline: [u32; 8],
    heap: Vec<u32>,
    len: usize,
}

impl SumRun {
    pub(super) fn new(len: usize) -> Self {
        Self {
            inline: [HOLE; 8],
            heap: if len > 8 { vec![HOLE; len] } else { Vec::new() },
            len,
        }
    }

    pub(super) fn get(&self) -> &[u32] {
        if self.len > 8 {
            &self.heap
        } else {
            &self.inline[..self.len]
        }
    }

    pub(super) fn get_mut(&mut self) -> &mut [u32] {
        if self.len > 8 {
            &mut self.heap
        } else {
            &mut self.inline[..self.len]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ExtentIndex;

    #[test]
    fn the_cache_drops_clean_sums_that_were_not_used_and_never_dirty_ones() {
        let cache = SumCache::new(4 * 16);
        let extents: Vec<_> = (0..8).map(|i| Extent::new(ExtentIndex(i))).collect();
        for (i, extent) in extents.iter().enumerate() {
            extent.state.set(if i < 2 { State::Dirty } else { State::Clean });
            cache.put(extent, vec![1; 4].into());
        }
        assert_eq!(cache.bytes(), 64);
        let kept: Vec<_> = (0..8).filter(|i| extents[*i].has_sums()).collect();
        assert_eq!(kept.len(), 4);
        assert!(kept.starts_with(&[0, 1]), "{kept:?}");
    }

    #[test]
    fn a_run_of_sums_holds_as_many_as_asked() {
        for len in [0, 1, 8, 9, 1000] {
            let mut run = SumRun::new(len);
            run.get_mut().fill(3);
            assert_eq!(run.get(), vec![3; len]);
        }
    }
}
