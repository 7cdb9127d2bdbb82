//! Healing: what a mismatch on read turns out to be, and what becomes of it (I8).
//!
//! Under the exclusive lock of the blocks every replica is read again, and each block decided on by its own:
//!
//! | copies that match the sum | then |
//! |---|---|
//! | all | nothing is wrong (a bad transfer) |
//! | some | the others are rewritten from one of them, read back and verified |
//! | none | the block is lost: requests that touch it get EIO, all else goes on |
//!
//! The sum in memory alone decides. An area on disk is never asked here: for a marked extent it may be older, and would
//! vouch for old data. No mark is needed for the rewriting: it only makes a copy equal to what its sum says, and a cut in
//! the middle leaves it as damaged as it was. A write clears the damage of a lost block, since it brings a new sum.

use std::ops::Range;

use super::core::Core;
use super::extent::{Extent, ForRead};
use super::range_lock::Mode;
use crate::buf::Buf;
use crate::crypto::seal::{PlainBuf, SealedBuf, verify_block};
use crate::error::{Error, Result};
use crate::ids::BlockIndex;
use crate::limits::{BLOCK_SIZE, REPLICAS_MAX, VOLUME_LOST_BLOCKS_MAX};

/// Blocks looked at in one go, on every replica: 1 MiB.
pub(super) const CHUNK_BLOCKS: u32 = 256;

impl Core {
    /// Reads blocks that a reader found damaged, heals what can be healed, and returns their plaintext; `None` when the
    /// extent has been released meanwhile. The caller keeps the extent in use.
    ///
    /// # Errors
    /// `Io` when a block is lost, or the volume has stopped.
    pub(super) async fn heal(&self, extent: &Extent, blocks: Range<u32>) -> Result<Option<PlainBuf>> {
        let _held = extent.lock.lock(blocks.clone(), Mode::Exclusive).await;
        self.check()?;
        match extent.state.get().for_read() {
            ForRead::GoOn => self.heal_held(extent, blocks).await.map(Some),
            ForRead::Zeros => Ok(None),
            ForRead::Reconcile | ForRead::Wait => unreachable!("both hold the whole extent exclusively"),
        }
    }

    /// The same for blocks that the caller holds exclusively.
    ///
    /// # Errors
    /// As [`Core::heal`].
    pub(super) async fn heal_held(&self, extent: &Extent, blocks: Range<u32>) -> Result<PlainBuf> {
        let sums = extent.with_sums(blocks.clone(), <[u32]>::to_vec);
        let sums = sums.expect("an extent in use keeps its sums");
        let mut good = self.pool.get(blocks.len() * BLOCK_SIZE);
        let mut lost = None;
        for start in blocks.clone().step_by(CHUNK_BLOCKS as usize) {
            let chunk = start..blocks.end.min(start + CHUNK_BLOCKS);
            let copies = self
                .read_all(extent.places.get(), start, chunk.len() as u32)
                .await?;
            for block in chunk {
                let number = self.shape.block_index(extent.index, block);
                let sum = sums[(block - blocks.start) as usize];
                let within = (block - start) as usize * BLOCK_SIZE;
                let copy = |replica: usize| &copies[replica][within..within + BLOCK_SIZE];
                let mut matches = [false; REPLICAS_MAX];
                for (replica, matches) in matches.iter_mut().enumerate().take(copies.len()) {
                    *matches = verify_block(self.dataset, number, copy(replica), sum);
                }
                let Some(winner) = matches.iter().position(|matches| *matches) else {
                    self.lose(number);
                    lost = lost.or(Some(number));
                    continue;
                };
                let to = (block - blocks.start) as usize * BLOCK_SIZE;
                good[to..to + BLOCK_SIZE].copy_from_slice(copy(winner));
                for replica in (0..copies.len()).filter(|replica| !matches[*replica]) {
                    self.rewrite(extent, replica, block, copy(winner), sum).await?;
                }
            }
        }
        if let Some(number) = lost {
            return Err(self.lost_error(number));
        }
        let first = self.shape.block_index(extent.index, blocks.start);
        self.sealer.open(first, good, &sums).map_err(|_| {
            let label = &self.label;
            Error::internal(format!(
                "volume {label}: verified blocks do not verify; the host's memory may be bad"
            ))
        })
    }

    /// Gives a replica the good copy of a block and looks whether it has taken it.
    async fn rewrite(
        &self,
        extent: &Extent,
        replica: usize,
        block: u32,
        good: &[u8],
        sum: u32,
    ) -> Result<()> {
        let io = &self.replicas[replica];
        let place = extent.places.get()[replica];
        let number = self.shape.block_index(extent.index, block);
        let sealed = SealedBuf::from_ciphertext(Buf::copy_of(good));
        let written = io.write(place, block, &sealed, 0..BLOCK_SIZE).await;
        written.map_err(|error| self.fail(replica, &error))?;
        let (result, back) = io.read(place, block, self.pool.get(BLOCK_SIZE), BLOCK_SIZE).await;
        result.map_err(|error| self.fail(replica, &error))?;
        let store = &io.handle().info().name;
        if verify_block(self.dataset, number, &back, sum) {
            self.healed.set(self.healed.get() + 1);
            tracing::warn!(volume = %self.label, block = number.0, %store, "damaged block rewritten from a good copy");
        } else {
            tracing::error!(
                volume = %self.label, block = number.0, %store,
                "a damaged block reads wrong again after rewriting; replace the device"
            );
        }
        Ok(())
    }

    fn lose(&self, block: BlockIndex) {
        let mut lost = self.lost.borrow_mut();
        if lost.len() < VOLUME_LOST_BLOCKS_MAX && lost.insert(block.0) {
            tracing::error!(volume = %self.label, block = block.0, "no replica has a good copy of this block");
        }
    }
}
