//! Healing: what a mismatch or an error on read turns out to be, and what becomes of it (I8).
//!
//! Under the exclusive lock of the blocks every replica in sync is read again, block by block where a long read fails, and
//! each block decided on by its own. A copy that cannot be read counts as one that does not match:
//!
//! | copies that match the sum | then |
//! |---|---|
//! | all | nothing is wrong (a bad transfer) |
//! | some | the others are rewritten from one of them, read back and verified; a replica that cannot be is dropped |
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
use crate::ids::{BlockIndex, PhysicalExtent};
use crate::limits::{BLOCK_SIZE, VOLUME_LOST_BLOCKS_MAX};
use crate::sabotage::{Rule, broken};

/// Blocks looked at in one go, on every replica: 1 MiB.
pub(super) const CHUNK_BLOCKS: u32 = 256;

impl Core {
    /// Reads blocks that a reader found damaged, heals what can be healed, and returns their plaintext; `None` when the
    /// extent has been released meanwhile. The caller keeps the extent in use.
    ///
    /// # Errors
    /// `Io` when a block is lost, or the volume has stopped.
    pub(super) async fn heal(&self, extent: &Extent, blocks: Range<u32>) -> Result<Option<PlainBuf>> {
        let _held = match broken(Rule::HealLocks) {
            true => None,
            false => Some(extent.lock.lock(blocks.clone(), Mode::Exclusive).await),
        };
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
            let copies = self.read_copies(extent, chunk.clone()).await?;
            for block in chunk {
                let number = self.shape.block_index(extent.index, block);
                let sum = sums[(block - blocks.start) as usize];
                let at = (block - start) as usize;
                let matching = |copy: &&Copy| {
                    copy.block(at)
                        .is_some_and(|bytes| verify_block(self.dataset, number, bytes, sum))
                };
                let Some(winner) = copies.iter().find(matching) else {
                    self.lose(number);
                    lost = lost.or(Some(number));
                    continue;
                };
                let bytes = winner.block(at).expect("it matches");
                let to = (block - blocks.start) as usize * BLOCK_SIZE;
                good[to..to + BLOCK_SIZE].copy_from_slice(bytes);
                for copy in copies.iter().filter(|copy| !matching(copy)) {
                    self.rewrite(extent, copy.replica, block, bytes, sum).await?;
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

    /// Gives a replica the good copy of a block and looks whether it has taken it. A replica that fails is dropped.
    ///
    /// # Errors
    /// `Io` when the volume has stopped.
    async fn rewrite(
        &self,
        extent: &Extent,
        replica: usize,
        block: u32,
        good: &[u8],
        sum: u32,
    ) -> Result<()> {
        let seat = &self.seats[replica];
        if !self.in_sync().contains(replica) {
            return Ok(());
        }
        let place = extent.places.get()[replica];
        let number = self.shape.block_index(extent.index, block);
        let sealed = SealedBuf::from_ciphertext(Buf::copy_of(good));
        let rewritten = seat
            .guard(async {
                let io = seat.io()?;
                io.write(place, block, &sealed, 0..BLOCK_SIZE).await?;
                let (result, back) = io.read(place, block, self.pool.get(BLOCK_SIZE), BLOCK_SIZE).await;
                result.map(|()| back)
            })
            .await;
        let store = seat.name.borrow().clone();
        match rewritten {
            Err(error) => return self.drop_replica(replica, error).await,
            Ok(back) if verify_block(self.dataset, number, &back, sum) => {
                self.healed.set(self.healed.get() + 1);
                tracing::warn!(volume = %self.label, block = number.0, %store, "damaged block rewritten from a good copy");
            }
            Ok(_) => tracing::error!(
                volume = %self.label, block = number.0, %store,
                "a damaged block reads wrong again after rewriting; replace the device"
            ),
        }
        Ok(())
    }

    /// Reads blocks from every replica in sync; those that one of them cannot read are left out of its copy.
    ///
    /// # Errors
    /// `Io` when the volume has stopped.
    pub(super) async fn read_copies(&self, extent: &Extent, blocks: Range<u32>) -> Result<Vec<Copy>> {
        self.check()?;
        let places = extent.places.get();
        let len = blocks.len() * BLOCK_SIZE;
        let results = self
            .on(self.in_sync(), |replica, io| async move {
                let (result, buf) = io
                    .read(places[replica], blocks.start, self.pool.get(len), len)
                    .await;
                result.map(|()| buf)
            })
            .await;
        let mut copies = Vec::with_capacity(results.0.len());
        for (replica, result) in results.into_iter() {
            copies.push(match result {
                Ok(buf) => Copy {
                    replica,
                    buf,
                    unreadable: Vec::new(),
                },
                Err(error) => {
                    self.read_singly(replica, places[replica], blocks.clone(), &error)
                        .await
                }
            });
        }
        Ok(copies)
    }

    /// A long read failed: block by block, to know which it is.
    #[cold]
    async fn read_singly(
        &self,
        replica: usize,
        place: PhysicalExtent,
        blocks: Range<u32>,
        error: &Error,
    ) -> Copy {
        let seat = &self.seats[replica];
        tracing::warn!(volume = %self.label, store = %seat.name.borrow(), "cannot be read: {error}");
        let mut copy = Copy {
            replica,
            buf: self.pool.get(blocks.len() * BLOCK_SIZE),
            unreadable: vec![true; blocks.len()],
        };
        if blocks.len() > 1 {
            for (at, block) in blocks.enumerate() {
                let read = seat.guard(async {
                    let io = seat.io()?;
                    let (result, buf) = io.read(place, block, self.pool.get(BLOCK_SIZE), BLOCK_SIZE).await;
                    result.map(|()| buf)
                });
                if let Ok(buf) = read.await {
                    copy.buf[at * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&buf[..BLOCK_SIZE]);
                    copy.unreadable[at] = false;
                }
            }
        }
        copy
    }

    pub(super) fn lose(&self, block: BlockIndex) {
        let mut lost = self.lost.borrow_mut();
        if lost.len() < VOLUME_LOST_BLOCKS_MAX && lost.insert(block.0) {
            tracing::error!(volume = %self.label, block = block.0, "no replica has a good copy of this block");
        }
    }
}

/// Blocks as one replica has them.
pub(super) struct Copy {
    pub(super) replica: usize,
    buf: Buf,
    /// Blocks that could not be read; empty when all could.
    unreadable: Vec<bool>,
}

impl Copy {
    /// The `at`th block, if it could be read.
    pub(super) fn block(&self, at: usize) -> Option<&[u8]> {
        let readable = !self.unreadable.get(at).is_some_and(|unreadable| *unreadable);
        readable.then(|| &self.buf[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE])
    }
}
