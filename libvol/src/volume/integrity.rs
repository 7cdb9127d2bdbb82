//! The integrity walk: everything the volume holds is read on every replica, in order, and healed where it is damaged.
//!
//! A read by a client looks at one replica's copy, and only where the client reads. The walk finds what nobody has asked
//! for yet, while another replica still has a good copy of it. Chunk by chunk (1 MiB of one extent):
//!
//! | what | looked at | counts as damage | then |
//! |---|---|---|---|
//! | block | every copy, against its sum in memory, blocks held shared | if it still mismatches when all copies are read again under the exclusive lock | healed as [`super::heal`] has it |
//! | checksum area of a clean extent | every copy, against the others and the sums in memory | if nobody has marked the extent meanwhile | the extent is marked, so that the cleaner writes all areas anew |
//! | checksum area of a marked extent | no copy | never: it may be older than the data, and is about to be written | – |
//!
//! Clients come first. The walk holds the blocks of one chunk only, so a write waits for the reading of one chunk at most,
//! and a read for none; while requests are in flight the walk rests after every chunk for as long as that chunk took.
//!
//! Extents that are not allocated are passed over; one that a crash left marked is reconciled first; one that is released
//! under the walk's feet has nothing left to verify. The walk keeps no state between two calls but the caller's cursor,
//! so it can be stopped, and gone on with, at any time and also after a restart.

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use super::core::Core;
use super::extent::{Extent, ForRead, State};
use super::heal::{CHUNK_BLOCKS, Copy};
use super::range_lock::Mode;
use super::sums::UNKNOWN;

use crate::crypto::seal::verify_block;
use crate::error::Result;
use crate::ids::ExtentIndex;
use crate::limits::BLOCK;
use crate::runtime::{now, sleep, yield_now};
use crate::store::SumAreaRead;

/// Places of the extent map looked up in one go when the walk looks for the next extent: some ten microseconds.
const LOOKUPS: u64 = 1024;

/// What a part of an integrity walk has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Byte of the volume to go on at; `None` once the end is reached.
    pub next: Option<u64>,
    /// Extents verified to their end.
    pub extents: u64,
    /// Bytes of data read and verified, on all replicas together.
    pub bytes: u64,
    /// Damaged copies of blocks rewritten from a good copy, and read back.
    pub healed_blocks: u64,
    /// Extents whose checksum area was damaged or old on a replica, and is being written anew.
    pub healed_areas: u64,
    /// Blocks that no replica has a good copy of.
    pub lost_blocks: u64,
}

impl Verified {
    fn is_nothing(&self) -> bool {
        self.bytes + self.healed_blocks + self.healed_areas + self.lost_blocks == 0
    }
}

/// Which copies of a block mismatch its sum, a bit each.
type Bad = u8;

impl Core {
    /// Goes on with a walk at byte `from` until `bytes` are verified (and always one chunk), the volume closes, or its end
    /// is reached.
    ///
    /// # Errors
    /// `Io`, `Unavailable`, `NoSpace` (no room for the marks of a reconciliation), if nothing was verified before; else
    /// the next call fails.
    pub(super) async fn verify(self: Rc<Self>, from: u64, bytes: u64) -> Result<Verified> {
        let mut verified = Verified {
            next: Some(from),
            ..Verified::default()
        };
        while let Some(at) = verified.next {
            let started = now();
            match self.verify_next(at, &mut verified).await {
                Err(error) if verified.is_nothing() => return Err(error),
                Err(_) => break,
                Ok(next) => verified.next = next,
            }
            if verified.bytes >= bytes {
                break;
            }
            self.give_way(now() - started).await;
        }
        Ok(verified)
    }

    /// Verifies the first chunk that there is at or behind a byte; returns where the next one may be.
    async fn verify_next(self: &Rc<Self>, at: u64, verified: &mut Verified) -> Result<Option<u64>> {
        let _in_flight = self.begin(0, 0)?;
        let Some((extent, first)) = self.next_allocated(at).await else {
            return Ok(None);
        };
        let blocks = first..self.shape.blocks.min(first + CHUNK_BLOCKS);
        let used = extent.recently_used.get();
        let in_use = extent.in_use();
        let seen = self.verify_chunk(&extent, blocks.clone(), verified).await;
        drop(in_use);
        // The walk comes by once and has no claim to memory that clients use.
        extent.recently_used.set(used);
        seen?;
        if blocks.end == self.shape.blocks {
            verified.extents += 1;
        }
        Ok(Some(
            u64::from(extent.index.0) * self.shape.extent_bytes + u64::from(blocks.end) * BLOCK,
        ))
    }

    /// The first allocated extent that does not end before a byte, and the block to begin with.
    async fn next_allocated(&self, at: u64) -> Option<(Rc<Extent>, u32)> {
        let within = ((at % self.shape.extent_bytes) / BLOCK) as u32;
        let first = at / self.shape.extent_bytes;
        let mut index = first;
        loop {
            // It may grow meanwhile.
            let end = self.size_bytes.get().div_ceil(self.shape.extent_bytes);
            let stop = end.min(index.saturating_add(LOOKUPS));
            let mut allocated = (index..stop).filter_map(|index| {
                let extent = self.extent(ExtentIndex(index as u32))?;
                (extent.state.get().for_read() != ForRead::Zeros).then_some(extent)
            });
            if let Some(extent) = allocated.next() {
                let begin = if u64::from(extent.index.0) == first {
                    within
                } else {
                    0
                };
                return Some((extent, begin));
            }
            if stop >= end {
                return None;
            }
            index = stop;
            yield_now().await;
        }
    }

    async fn verify_chunk(
        self: &Rc<Self>,
        extent: &Rc<Extent>,
        blocks: Range<u32>,
        verified: &mut Verified,
    ) -> Result<()> {
        if blocks.start == 0 {
            self.verify_areas(extent, verified).await?;
        }
        let Some((copies, bad)) = self.look_at(extent, blocks.clone()).await? else {
            return Ok(());
        };
        // One lock and one look again over all that is suspect: damage is rare, and comes in runs.
        let first = bad.iter().position(|bad| *bad != 0);
        let last = bad.iter().rposition(|bad| *bad != 0);
        if let (Some(first), Some(last)) = (first, last) {
            let suspect = blocks.start + first as u32..blocks.start + last as u32 + 1;
            self.heal_suspects(extent, suspect, verified).await?;
        }
        verified.bytes += blocks.len() as u64 * BLOCK * copies as u64;
        Ok(())
    }

    /// Reads all copies of blocks with the blocks held shared: how many copies there are, and which mismatch, block by
    /// block. `None` when the extent is gone.
    async fn look_at(
        self: &Rc<Self>,
        extent: &Rc<Extent>,
        blocks: Range<u32>,
    ) -> Result<Option<(usize, Vec<Bad>)>> {
        loop {
            match extent.state.get().for_read() {
                ForRead::Zeros => return Ok(None),
                ForRead::GoOn if extent.has_sums() => {}
                _ => {
                    Box::pin(self.become_readable(extent)).await?;
                    continue;
                }
            }
            let _held = extent.lock.lock(blocks.clone(), Mode::Shared).await;
            // A release may have come first.
            if extent.state.get().for_read() != ForRead::GoOn || !extent.has_sums() {
                continue;
            }
            return self.mismatches(extent, blocks).await.map(Some);
        }
    }

    /// The same for blocks that the caller holds, in an extent whose sums are in memory.
    async fn mismatches(&self, extent: &Extent, blocks: Range<u32>) -> Result<(usize, Vec<Bad>)> {
        let copies = self.read_copies(extent, blocks.clone()).await?;
        let bad = extent.with_sums(blocks.clone(), |sums| {
            let each = blocks.zip(sums).enumerate();
            each.map(|(at, (block, sum))| {
                let number = self.shape.block_index(extent.index, block);
                // What cannot be read matches nothing.
                let mismatches = |copy: &Copy| {
                    let bytes = copy.block(at);
                    bytes.is_none_or(|bytes| !verify_block(self.dataset, number, bytes, *sum))
                };
                let each = copies.iter().map(mismatches).enumerate();
                each.fold(0, |bits, (copy, bad)| bits | Bad::from(bad) << copy)
            })
            .collect()
        });
        Ok((
            copies.len(),
            bad.expect("an extent in use keeps its sums while its blocks are held"),
        ))
    }

    /// Decides about suspect blocks under their exclusive lock, heals, and counts what came of it.
    async fn heal_suspects(
        &self,
        extent: &Rc<Extent>,
        blocks: Range<u32>,
        verified: &mut Verified,
    ) -> Result<()> {
        let _held = extent.lock.lock(blocks.clone(), Mode::Exclusive).await;
        self.check()?;
        if extent.state.get().for_read() != ForRead::GoOn || !extent.has_sums() {
            // Released meanwhile.
            return Ok(());
        }
        let (copies, before) = self.mismatches(extent, blocks.clone()).await?;
        if before.iter().all(|bad| *bad == 0) {
            // Written meanwhile, or a bad transfer.
            return Ok(());
        }
        let all: Bad = (1 << copies) - 1;
        let lost = |bad: &[Bad]| bad.iter().filter(|bad| **bad == all).count() as u64;
        match self.heal_held(extent, blocks.clone()).await {
            Ok(_) => {}
            // It says that a block is lost; the others are healed all the same.
            Err(error) => match self.check() {
                Ok(()) if lost(&before) > 0 => {}
                _ => return Err(error),
            },
        }
        let (_, after) = self.mismatches(extent, blocks).await?;
        let healed = |(before, after): (&Bad, &Bad)| u64::from((before & !after).count_ones());
        verified.healed_blocks += before.iter().zip(&after).map(healed).sum::<u64>();
        verified.lost_blocks += lost(&after);
        Ok(())
    }

    /// Compares the extent's checksum areas, and has them written anew if one is damaged or old.
    async fn verify_areas(self: &Rc<Self>, extent: &Rc<Extent>, verified: &mut Verified) -> Result<()> {
        let had_sums = loop {
            // One block held is enough to keep a release, and with it another extent's area, away.
            let _held = extent.lock.lock(0..1, Mode::Shared).await;
            if extent.state.get() != State::Clean {
                return Ok(());
            }
            let (had_sums, sequence) = (extent.has_sums(), extent.sequence.get());
            let areas = self.read_areas(extent).await?;
            // Areas are written only while their sums are in memory, in other states, each time with a higher sequence.
            if extent.state.get() != State::Clean || (had_sums && extent.sequence.get() != sequence) {
                return Ok(());
            }
            if !had_sums && extent.has_sums() {
                // Loaded meanwhile, and perhaps written between the reading of two areas.
                continue;
            }
            if !self.areas_differ(extent, &areas) {
                return Ok(());
            }
            break had_sums;
        };
        if !had_sums {
            // Whoever loads them finds the same, decides which are right, and marks.
            self.load_sums(extent).await?;
        }
        match self.writable_if_present(extent.index).await {
            Ok(Some(_marked)) => {
                verified.healed_areas += 1;
                if had_sums {
                    tracing::warn!(
                        volume = %self.label, extent = %extent.index,
                        "checksum area is damaged on a replica; the extent is marked so that all are written anew"
                    );
                    self.healed_areas.set(self.healed_areas.get() + 1);
                }
                Ok(())
            }
            Ok(None) => Ok(()),
            // Without room for a mark it is left to the next walk.
            Err(_) => self.check(),
        }
    }

    /// Whether an area is not what it should be: as the sums in memory where they are, else as the newest of them. (When
    /// nothing is known of the extent, its blocks are lost, and are counted as that.)
    fn areas_differ(&self, extent: &Extent, areas: &[Option<SumAreaRead>]) -> bool {
        let valid = |area: &Option<SumAreaRead>| match area {
            Some(SumAreaRead::Valid(area)) => Some((area.sequence, area.sums.clone())),
            Some(SumAreaRead::Torn(_) | SumAreaRead::Blank | SumAreaRead::Damaged(_)) | None => None,
        };
        let right = if extent.has_sums() {
            let known = extent.copy_sums();
            let something = known.iter().any(|sum| *sum != UNKNOWN);
            something.then(|| (extent.sequence.get(), known))
        } else {
            areas
                .iter()
                .filter_map(valid)
                .max_by_key(|(sequence, _)| *sequence)
        };
        right.is_some_and(|right| areas.iter().any(|area| valid(area).as_ref() != Some(&right)))
    }

    /// Requests of clients go first.
    async fn give_way(&self, took: Duration) {
        match self.in_flight.count() {
            0 => yield_now().await,
            _ => sleep(took).await,
        }
    }
}
