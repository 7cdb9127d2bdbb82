//! Writes. The life of one part of a write, in order:
//!
//! 1. the extent is allocated and marked on **every** replica, durably, and pinned so that the mark stays;
//! 2. its blocks are locked exclusively (never the other way round: nobody waits for a mark while it holds a lock);
//! 3. the sealed bytes go to all replicas at once, from the same memory, one device write each;
//! 4. when all have succeeded, the new sums take effect, the lock is released, and the part is done.
//!
//! Whole blocks are sealed before step 1, in place. A block that is written only in part is read, verified, merged and
//! sealed between steps 2 and 3. The whole of it is not cancellable: a lock must not be released under a device write.

use std::ops::Range;
use std::rc::Rc;

use super::core::Core;
use super::extent::{Pinned, State};
use super::range_lock::Mode;
use super::split::{Part, parts};
use super::sums::SumRun;
use crate::buf::Buf;
use crate::crypto::seal::{PlainBuf, SealedBuf};
use crate::error::{Error, Result};
use crate::ids::{BlockIndex, ExtentIndex};
use crate::limits::{BLOCK, BLOCK_SIZE, VOLUME_BYTES_IN_FLIGHT};

impl Core {
    pub(super) async fn write(
        self: Rc<Self>,
        offset: u64,
        payload: PlainBuf,
        len: u32,
        fua: bool,
    ) -> Result<()> {
        let len = len as usize;
        if payload.0.len() < len {
            return Err(Error::invalid(format!(
                "volume {}: a write of {len} bytes came with {}",
                self.label,
                payload.0.len()
            )));
        }
        let _in_flight = self.begin(offset, len as u64)?;
        let _permits = self.bytes.acquire(len.min(VOLUME_BYTES_IN_FLIGHT)).await;
        self.write_bytes(offset, payload, len).await?;
        if fua {
            self.sync_all().await?;
        }
        Ok(())
    }

    /// Writes `payload[..len]` at `offset`.
    pub(super) async fn write_bytes(
        self: &Rc<Self>,
        offset: u64,
        payload: PlainBuf,
        len: usize,
    ) -> Result<()> {
        let mut buf = payload.0;
        if offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK_SIZE) {
            buf.truncate(len);
            let mut sums = SumRun::new(len / BLOCK_SIZE);
            let sealed = self
                .sealer
                .seal(BlockIndex(offset / BLOCK), PlainBuf(buf), sums.get_mut());
            for part in parts(self.shape, offset, len as u64) {
                let range = part.at as usize..part.at as usize + part.len;
                let sums = &sums.get()[range.start / BLOCK_SIZE..range.end / BLOCK_SIZE];
                self.write_blocks(part.extent, part.blocks(), &sealed, range, sums)
                    .await?;
            }
            return Ok(());
        }
        // Bytes move within their blocks, so each part gets memory of its own.
        for part in parts(self.shape, offset, len as u64) {
            let mut own = self.pool.get(part.blocks().len() * BLOCK_SIZE);
            own[part.head()..part.head() + part.len].copy_from_slice(&buf[part.at as usize..][..part.len]);
            Box::pin(self.write_merged(part, own)).await?;
        }
        Ok(())
    }

    async fn write_blocks(
        self: &Rc<Self>,
        extent: ExtentIndex,
        blocks: Range<u32>,
        sealed: &SealedBuf,
        range: Range<usize>,
        sums: &[u32],
    ) -> Result<()> {
        loop {
            let pinned = self.writable(extent).await?;
            let _held = pinned.extent().lock.lock(blocks.clone(), Mode::Exclusive).await;
            // A trim that came first may have released the extent.
            if pinned.extent().state.get() == State::Dirty {
                return self.write_held(&pinned, blocks.start, sealed, range, sums).await;
            }
        }
    }

    /// Steps 3 and 4 of the module's list.
    pub(super) async fn write_held(
        &self,
        pinned: &Pinned,
        block: u32,
        sealed: &SealedBuf,
        range: Range<usize>,
        sums: &[u32],
    ) -> Result<()> {
        let extent = pinned.extent();
        self.write_all(extent, block, sealed, range).await?;
        extent.set_sums(block, sums);
        extent.last_write.set(self.tick.get());
        self.found(self.shape.block_index(extent.index, block), sums.len() as u32);
        Ok(())
    }

    /// Writes a part whose first or last block is covered only in part. `own` has the part's blocks, the new bytes in place.
    async fn write_merged(self: &Rc<Self>, part: Part, mut own: Buf) -> Result<()> {
        let blocks = part.blocks();
        loop {
            let pinned = self.writable(part.extent).await?;
            let extent = pinned.extent();
            let _held = extent.lock.lock(blocks.clone(), Mode::Exclusive).await;
            if extent.state.get() != State::Dirty {
                continue;
            }
            for edge in part.edges().into_iter().flatten() {
                let old = self.read_held(extent, edge).await?;
                let block = (edge - blocks.start) as usize * BLOCK_SIZE..;
                let (new, kept) = (
                    part.head()..part.head() + part.len,
                    block.start..block.start + BLOCK_SIZE,
                );
                for range in [
                    kept.start..new.start.min(kept.end),
                    new.end.max(kept.start)..kept.end,
                ] {
                    if range.is_empty() {
                        continue;
                    }
                    match &old {
                        Some(old) => {
                            let from = range.start - kept.start..range.end - kept.start;
                            own[range].copy_from_slice(&old.0[from]);
                        }
                        None => own[range].fill(0),
                    }
                }
            }
            let mut sums = SumRun::new(blocks.len());
            let len = own.len();
            let first = self.shape.block_index(part.extent, blocks.start);
            let sealed = self.sealer.seal(first, PlainBuf(own), sums.get_mut());
            return self
                .write_held(&pinned, blocks.start, &sealed, 0..len, sums.get())
                .await;
        }
    }
}
