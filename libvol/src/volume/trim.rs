//! Trim and write-zeroes: making holes, and giving whole extents back.
//!
//! A whole extent (all of its blocks that the volume has) is released: marked on every replica like for a write, locked
//! whole, out of the cleaner's hands, then one commit per replica moves it to PendingScrub. A cut between those commits
//! leaves it on some replicas, marked; [`super::recover`] then finishes the release.
//!
//! Part of an extent is overwritten with zeros, and its sums become holes. Blocks covered in part are merged like any
//! write. What is no data already is left alone: holes stay untouched, unallocated extents unallocated.
//!
//! The cleaner gives back extents that hold nothing but holes (trimmed piece by piece, or allocated ahead for nothing).

use std::ops::Range;
use std::rc::Rc;

use super::core::Core;
use super::extent::{Extent, Pinned, State};
use super::range_lock::Mode;
use super::split::{Part, parts};
use crate::crypto::seal::{HOLE, PlainBuf, SealedBuf};
use crate::error::Result;
use crate::ids::{PhysicalExtent, ReplicaSet};
use crate::limits::{BLOCK_SIZE, VOLUME_EXTENTS_PER_COMMIT};
use crate::sabotage::{Rule, broken};
use crate::store::Change;

/// Zeros written with one device call: 1 MiB.
const ZEROS_BYTES: usize = 1 << 20;

impl Core {
    pub(super) async fn trim(self: Rc<Self>, offset: u64, len: u64, fua: bool) -> Result<()> {
        let _in_flight = self.begin(offset, len)?;
        self.make_holes(offset, len).await?;
        if fua {
            self.sync_all().await?;
        }
        Ok(())
    }

    pub(super) async fn write_zeroes(
        self: Rc<Self>,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> Result<()> {
        let _in_flight = self.begin(offset, len)?;
        if no_hole {
            self.write_zero_blocks(offset, len).await?;
        } else {
            self.make_holes(offset, len).await?;
        }
        if fua {
            self.sync_all().await?;
        }
        Ok(())
    }

    /// Zeros that take up space: written like data, a piece at a time.
    async fn write_zero_blocks(self: &Rc<Self>, offset: u64, len: u64) -> Result<()> {
        let _permits = self.bytes.acquire(ZEROS_BYTES).await;
        let mut done = 0;
        while done < len {
            // Pieces after the first begin at a multiple of their size.
            let to_boundary = ZEROS_BYTES as u64 - (offset + done) % ZEROS_BYTES as u64;
            let piece = to_boundary.min(len - done) as usize;
            let mut zeros = self.pool.get(piece);
            zeros.fill(0);
            self.write_bytes(offset + done, PlainBuf(zeros), piece).await?;
            done += piece as u64;
        }
        Ok(())
    }

    async fn make_holes(self: &Rc<Self>, offset: u64, len: u64) -> Result<()> {
        let batch_max = VOLUME_EXTENTS_PER_COMMIT
            .min(self.tuning.dirty_extents_max / 2)
            .max(1);
        let mut whole = Vec::new();
        for part in parts(self.shape, offset, len) {
            let Some(extent) = self.extent(part.extent) else {
                continue;
            };
            if !self.is_whole(&part) {
                self.make_hole(&part).await?;
                continue;
            }
            if extent.state.get() != State::Absent {
                whole.push((extent, part));
            }
            if whole.len() == batch_max {
                self.release(&whole).await?;
                whole.clear();
            }
        }
        if whole.is_empty() {
            Ok(())
        } else {
            self.release(&whole).await
        }
    }

    /// Whether the part is all that the volume has of its extent.
    fn is_whole(&self, part: &Part) -> bool {
        let extent_at = u64::from(part.extent.0) * self.shape.extent_bytes;
        let in_volume = (self.size_bytes.get() - extent_at).min(self.shape.extent_bytes);
        part.start == 0 && part.len as u64 >= in_volume
    }

    /// Gives extents back, in ascending order, as one commit per replica. The volume may have grown by the time they are
    /// locked; what the part then does not cover stays.
    ///
    /// # Errors
    /// `NoSpace` when no marks can be had; `Io`.
    async fn release(self: &Rc<Self>, whole: &[(Rc<Extent>, Part)]) -> Result<()> {
        {
            // Pins of several releases at once could leave nothing for the cleaner to free marks with.
            let _turn = self.releasing.acquire(1).await;
            let extents: Vec<_> = whole.iter().map(|(extent, _)| extent.clone()).collect();
            self.mark_together(&extents).await?;
            let mut pinned = Vec::with_capacity(extents.len());
            for extent in &extents {
                pinned.extend(self.writable_if_present(extent.index).await?);
            }
            let still_whole = |extent: &Extent| {
                let mut parts = whole.iter().filter(|(other, _)| other.index == extent.index);
                parts.all(|(_, part)| self.is_whole(part))
            };
            self.release_pinned(pinned, still_whole).await?;
        }
        for (_, part) in whole.iter().filter(|(_, part)| !self.is_whole(part)) {
            self.make_hole(part).await?;
        }
        Ok(())
    }

    /// The cleaner's way: gives back those of the extents that hold nothing but holes. Never waits for a mark.
    ///
    /// # Errors
    /// `Io`.
    pub(super) async fn release_holes(self: &Rc<Self>, extents: &[Rc<Extent>]) -> Result<()> {
        if self.releasing.available() == 0 {
            return Ok(());
        }
        let _turn = self.releasing.acquire(1).await;
        let mut pinned: Vec<Pinned> = extents.iter().filter_map(Extent::pin).collect();
        pinned.sort_by_key(|pinned| pinned.extent().index);
        let holes = |extent: &Extent| {
            extent.pins() == 1 && self.all_holes(extent, 0..self.shape.blocks) == Some(true)
        };
        self.release_pinned(pinned, holes).await
    }

    /// Releases those that are `wanted` once they are locked.
    async fn release_pinned(&self, pinned: Vec<Pinned>, wanted: impl Fn(&Extent) -> bool) -> Result<()> {
        let mut held = Vec::with_capacity(pinned.len());
        for pinned in &pinned {
            let extent = pinned.extent();
            if !broken(Rule::ReleaseLocks) {
                held.push(extent.lock.lock(0..self.shape.blocks, Mode::Exclusive).await);
            }
            self.wait_for(|| (!extent.cleaner_holds.get()).then_some(()))
                .await?;
        }
        let leaves = |extent: &Extent| extent.state.get() == State::Dirty && wanted(extent);
        let leaving: Vec<&Rc<Extent>> = pinned
            .iter()
            .map(Pinned::extent)
            .filter(|extent| leaves(extent))
            .collect();
        if leaving.is_empty() {
            return Ok(());
        }
        leaving
            .iter()
            .for_each(|extent| extent.state.set(State::Releasing));
        let replicas = leaving
            .iter()
            .fold(ReplicaSet::NONE, |all, extent| all.or(self.targets(extent)));
        let results = self
            .on(replicas, |replica, io| {
                let theirs = leaving
                    .iter()
                    .filter(|extent| self.targets(extent).contains(replica));
                let places: Vec<_> = theirs.map(|extent| extent.places.get()[replica]).collect();
                let changes = places.iter().map(|place| Change::Release(*place)).collect();
                async move {
                    if broken(Rule::UnmapMarked) {
                        let clear = |place: &PhysicalExtent| Change::ClearMark {
                            physical: *place,
                            missed_by: ReplicaSet::NONE,
                        };
                        io.handle().commit(places.iter().map(clear).collect()).await?;
                    }
                    io.handle().commit(changes).await
                }
            })
            .await;
        self.settle_or_stop(results).await?;
        for extent in leaving {
            self.found(self.shape.block_index(extent.index, 0), self.shape.blocks);
            self.cache.forget(extent);
            extent.ahead.set(false);
            self.allocated.set(self.allocated.get() - 1);
            self.turn(extent, State::Absent);
        }
        Ok(())
    }

    /// Makes a hole of part of an extent.
    async fn make_hole(self: &Rc<Self>, part: &Part) -> Result<()> {
        let blocks = part.blocks();
        loop {
            if let Some(extent) = self.extent(part.extent)
                && self.all_holes(&extent, blocks.clone()) == Some(true)
            {
                return Ok(());
            }
            let Some(pinned) = self.writable_if_present(part.extent).await? else {
                return Ok(());
            };
            let extent = pinned.extent();
            let _held = extent.lock.lock(blocks.clone(), Mode::Exclusive).await;
            if extent.state.get() != State::Dirty {
                continue;
            }
            let mut inner = blocks;
            for edge in part.edges().into_iter().flatten() {
                self.zero_within(&pinned, edge, part).await?;
                if edge == inner.start {
                    inner.start += 1;
                } else {
                    inner.end -= 1;
                }
            }
            self.zero_blocks(&pinned, inner).await?;
            extent.last_write.set(self.tick.get());
            return Ok(());
        }
    }

    /// Zeros the bytes of one block that the part covers. The caller holds the block exclusively.
    async fn zero_within(&self, pinned: &Pinned, block: u32, part: &Part) -> Result<()> {
        let extent = pinned.extent();
        let Some(mut plain) = self.read_held(extent, block).await? else {
            return Ok(());
        };
        let block_at = u64::from(block) * BLOCK_SIZE as u64;
        let from = part.start.saturating_sub(block_at) as usize;
        let to = (part.start + part.len as u64 - block_at).min(BLOCK_SIZE as u64) as usize;
        plain.0[from..to].fill(0);
        let mut sums = [HOLE];
        let sealed = self
            .sealer
            .seal(self.shape.block_index(extent.index, block), plain, &mut sums);
        self.write_held(pinned, block, &sealed, 0..BLOCK_SIZE, &sums)
            .await
    }

    /// Makes holes of blocks that the caller holds exclusively; those that are holes are left alone.
    async fn zero_blocks(&self, pinned: &Pinned, blocks: Range<u32>) -> Result<()> {
        let extent = pinned.extent();
        let mut zeros: Option<SealedBuf> = None;
        let mut at = blocks.start;
        while at < blocks.end {
            let run = extent.with_sums(at..blocks.end, next_data_run);
            let run = run.expect("a marked extent's sums are in memory");
            let run = at + run.start..at + run.end.min(run.start + (ZEROS_BYTES / BLOCK_SIZE) as u32);
            if run.is_empty() {
                break;
            }
            let len = run.len() * BLOCK_SIZE;
            let zeros = match &zeros {
                Some(zeros) if zeros.len() >= len => zeros,
                _ => zeros.insert(SealedBuf::zeros(len)),
            };
            self.write_all(extent, run.start, zeros, 0..len).await?;
            extent.set_holes(run.clone());
            self.found(self.shape.block_index(extent.index, run.start), run.len() as u32);
            at = run.end;
        }
        Ok(())
    }
}

/// The first run of blocks that are no holes; empty when all are.
fn next_data_run(sums: &[u32]) -> Range<u32> {
    let start = sums.iter().position(|sum| *sum != HOLE).unwrap_or(sums.len());
    let len = sums[start..].iter().position(|sum| *sum == HOLE);
    let end = len.map_or(sums.len(), |len| start + len);
    start as u32..end as u32
}
