//! Reads: unallocated extents and holes are zeros without I/O; all else is read from one replica, verified and decrypted.
//!
//! A reader holds its blocks shared, so the sums it verifies against are those of the bytes it reads. A mismatch, or
//! an error of the replica asked, says nothing yet; [`super::heal`] finds out under the exclusive lock.

use std::rc::Rc;

use super::PlainPart;
use super::core::{Core, uncancelled};
use super::extent::{Extent, ForRead};
use super::range_lock::Mode;
use super::split::{Part, parts};
use crate::crypto::seal::{HOLE, PlainBuf};
use crate::error::Result;
use crate::limits::VOLUME_BYTES_IN_FLIGHT;

impl Core {
    pub(super) async fn read(self: &Rc<Self>, offset: u64, len: u32) -> Result<Vec<PlainPart>> {
        let _in_flight = self.begin(offset, u64::from(len))?;
        let _permits = self
            .bytes
            .acquire((len as usize).min(VOLUME_BYTES_IN_FLIGHT))
            .await;
        let mut out = Vec::with_capacity(1);
        for part in parts(self.shape, offset, u64::from(len)) {
            match (self.read_part(&part).await?, out.last_mut()) {
                (PlainPart::Zeros(more), Some(PlainPart::Zeros(zeros))) => *zeros += more,
                (piece, _) => out.push(piece),
            }
        }
        Ok(out)
    }

    async fn read_part(self: &Rc<Self>, part: &Part) -> Result<PlainPart> {
        let zeros = PlainPart::Zeros(part.len);
        let Some(extent) = self.extent(part.extent) else {
            return Ok(zeros);
        };
        let _in_use = extent.in_use();
        let blocks = part.blocks();
        let opened = loop {
            match extent.state.get().for_read() {
                ForRead::Zeros => return Ok(zeros),
                ForRead::GoOn if extent.has_sums() => {}
                _ => {
                    Box::pin(self.become_readable(&extent)).await?;
                    continue;
                }
            }
            let _held = extent.lock.lock(blocks.clone(), Mode::Shared).await;
            // A release or a reconciliation may have come first.
            match (
                extent.state.get().for_read(),
                self.all_holes(&extent, blocks.clone()),
            ) {
                (ForRead::Zeros, _) | (ForRead::GoOn, Some(true)) => return Ok(zeros),
                (ForRead::GoOn, Some(false)) => {}
                _ => continue,
            }
            let count = blocks.len() as u32;
            let Ok(buf) = self.read_one(extent.places.get(), blocks.start, count).await else {
                break None;
            };
            let first = self.shape.block_index(extent.index, blocks.start);
            break extent
                .with_sums(blocks.clone(), |sums| self.sealer.open(first, buf, sums))
                .expect("an extent in use keeps its sums")
                .ok();
        };
        let plain = match opened {
            Some(plain) => Some(plain),
            None => {
                let (core, extent) = (self.clone(), extent.clone());
                let guards = (extent.in_use(), self.in_flight.enter());
                uncancelled(async move {
                    let healed = core.heal(&extent, blocks).await;
                    drop(guards);
                    healed
                })
                .await?
            }
        };
        Ok(match plain {
            Some(plain) => PlainPart::Data(plain, part.head()..part.head() + part.len),
            None => zeros,
        })
    }

    /// Waits for a release to end, reconciles, loads sums: whatever stands between a reader and the extent.
    pub(super) async fn become_readable(self: &Rc<Self>, extent: &Rc<Extent>) -> Result<()> {
        self.check()?;
        match extent.state.get().for_read() {
            ForRead::Zeros => Ok(()),
            ForRead::GoOn => self.load_sums(extent).await,
            ForRead::Reconcile => self.reconcile_now(extent).await,
            ForRead::Wait => {
                self.wait_for(|| (extent.state.get().for_read() != ForRead::Wait).then_some(()))
                    .await
            }
        }
    }

    /// One block's plaintext, for a write or trim that changes a part of it; `None` is zeros. The caller holds it
    /// exclusively and the extent is marked.
    ///
    /// # Errors
    /// `Io`, also when no replica has a good copy.
    pub(super) async fn read_held(&self, extent: &Extent, block: u32) -> Result<Option<PlainBuf>> {
        let blocks = block..block + 1;
        let sum = extent.with_sums(blocks.clone(), |sums| sums[0]);
        let sum = sum.expect("a marked extent's sums are in memory");
        if sum == HOLE {
            return Ok(None);
        }
        let read = self.read_one(extent.places.get(), block, 1).await;
        let first = self.shape.block_index(extent.index, block);
        match read
            .ok()
            .and_then(|buf| self.sealer.open(first, buf, &[sum]).ok())
        {
            Some(plain) => Ok(Some(plain)),
            None => self.heal_held(extent, blocks).await.map(Some),
        }
    }
}
