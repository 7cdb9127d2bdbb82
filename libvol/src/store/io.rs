//! A store's data path on one runtime: reads and writes of extents and checksum areas, and grouped syncs.
//!
//! Offsets come from the layout; extents and blocks are the caller's and were checked where requests came in, so a range
//! outside an extent is a broken invariant. Writes take sealed bytes only. There is no cache and no retry here.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use super::StoreHandle;
use super::layout::Layout;
use super::sync::Unsettled;
use super::{SumArea, SumAreaRead, sums};
use crate::buf::{Buf, BufPool};
use crate::crypto::seal::SealedBuf;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::ids::{DatasetId, ExtentIndex, PhysicalExtent};
use crate::limits::{BLOCK, BLOCK_SIZE};
use crate::runtime::spawn;
use crate::runtime::sync::Notify;
use crate::sabotage::{Rule, broken};

/// Idle memory kept for checksum areas.
const SUM_BUFFER_BYTES: usize = 1 << 20;

/// A store's data path on one runtime: reads and writes of extents, and grouped syncs. Its owner drops it when nothing is in
/// flight any more.
pub struct StoreIo {
    inner: Rc<Inner>,
    /// Checksum areas hold no plaintext, so volumes may share their buffers.
    sum_buffers: BufPool,
}

struct Inner {
    handle: StoreHandle,
    disk: Disk,
    syncs: Syncs,
}

/// Grouped syncs: numbered, one in flight at a time.
#[derive(Default)]
struct Syncs {
    /// Syncs submitted so far.
    started: Cell<u64>,
    /// The last one that succeeded and is settled ([`super::sync`]).
    finished: Cell<u64>,
    /// The last one anybody waits for.
    wanted: Cell<u64>,
    running: Cell<bool>,
    done: Notify,
}

impl StoreIo {
    /// The data path on the current thread's runtime.
    ///
    /// # Errors
    /// When the engine's file table is full.
    pub fn attach(handle: &StoreHandle) -> Result<Rc<Self>> {
        Ok(Rc::new(Self {
            inner: Rc::new(Inner {
                handle: handle.clone(),
                disk: Disk::attach(&handle.shared.file)?,
                syncs: Syncs::default(),
            }),
            sum_buffers: BufPool::new(SUM_BUFFER_BYTES),
        }))
    }

    /// The store.
    pub fn handle(&self) -> &StoreHandle {
        &self.inner.handle
    }

    fn layout(&self) -> &Layout {
        &self.inner.handle.shared.layout
    }

    /// Byte offset of a run of blocks of an extent.
    fn offset(&self, extent: PhysicalExtent, block: u32, len: usize) -> u64 {
        let layout = self.layout();
        let within = u64::from(block) * BLOCK;
        assert!(extent.0 < layout.extents, "extent {extent} of {}", layout.extents);
        assert!(len.is_multiple_of(BLOCK_SIZE) && within + len as u64 <= layout.extent_bytes);
        layout.data_at(extent) + within
    }

    fn error(&self, extent: PhysicalExtent, error: impl Into<Error>) -> Error {
        let error: Error = error.into();
        self.inner
            .handle
            .shared
            .named(error.context(format!("extent {extent}")))
    }

    /// Reads `len` bytes (whole blocks) of an extent from block `block` on into the front of `buf`. The buffer comes back.
    pub async fn read(&self, extent: PhysicalExtent, block: u32, buf: Buf, len: usize) -> (Result<()>, Buf) {
        let at = self.offset(extent, block, len);
        let (result, buf) = self.inner.disk.read(at, buf, 0..len).await;
        (result.map_err(|e| self.error(extent, e)), buf)
    }

    /// Writes `sealed[range]` (whole blocks) to an extent from block `block` on.
    ///
    /// # Errors
    /// `Io`, `Unavailable` when the store is faulty.
    pub async fn write(
        &self,
        extent: PhysicalExtent,
        block: u32,
        sealed: &SealedBuf,
        range: Range<usize>,
    ) -> Result<()> {
        self.inner.handle.shared.check_fault()?;
        let at = self.offset(extent, block, range.len());
        let written = self.inner.disk.write(at, sealed.shared(), range).await;
        written.map_err(|e| self.error(extent, e))
    }

    /// Reads an extent's checksum area.
    ///
    /// # Errors
    /// `Io`.
    pub async fn read_sums(
        &self,
        extent: PhysicalExtent,
        dataset: DatasetId,
        logical: ExtentIndex,
    ) -> Result<SumAreaRead> {
        let layout = self.layout();
        assert!(extent.0 < layout.extents, "extent {extent} of {}", layout.extents);
        let len = layout.sum_area_bytes() as usize;
        let buf = self.sum_buffers.get(len);
        let (result, buf) = self.inner.disk.read(layout.sums_at(extent), buf, 0..len).await;
        result.map_err(|e| self.error(extent, e))?;
        Ok(sums::decode(layout, &buf[..len], dataset, logical))
    }

    /// Writes an extent's checksum area (durable after the next flush).
    ///
    /// # Errors
    /// As [`StoreIo::write`].
    pub async fn write_sums(&self, extent: PhysicalExtent, area: &SumArea) -> Result<()> {
        self.inner.handle.shared.check_fault()?;
        let layout = self.layout();
        assert!(extent.0 < layout.extents, "extent {extent} of {}", layout.extents);
        let len = layout.sum_area_bytes() as usize;
        let mut buf = self.sum_buffers.get(len);
        sums::encode(layout, area, &mut buf[..len]);
        let at = layout.sums_at(extent);
        let written = self.inner.disk.write(at, Rc::new(buf), 0..len).await;
        written.map_err(|e| self.error(extent, e))
    }

    /// Makes every write that completed before the call durable. Callers share a sync that is not yet submitted, and never
    /// join one that is. A failure, on any thread, latches the store as faulty before anyone is told of success.
    ///
    /// # Errors
    /// `Io`, `Unavailable`.
    pub async fn flush(&self) -> Result<()> {
        let Inner { handle, syncs, .. } = &*self.inner;
        handle.shared.check_fault()?;
        let joins = syncs.running.get() && broken(Rule::JoinNoRunningSync);
        let ticket = syncs.started.get() + u64::from(!joins);
        syncs.wanted.set(ticket);
        if !syncs.running.replace(true) {
            spawn(self.inner.clone().sync_while_wanted()).detach();
        }
        syncs
            .done
            .until(|| {
                let done = syncs.finished.get() >= ticket;
                (done || handle.shared.fault().is_some()).then_some(())
            })
            .await;
        // Latched meanwhile, by this sync or any other.
        let Some(reason) = handle.shared.fault() else {
            return Ok(());
        };
        Err(Error::new(
            Kind::Io,
            format!("store \"{}\": flush: {reason}", handle.info().name),
        ))
    }
}

impl Inner {
    /// Its own task, so that a caller who stops waiting leaves the others theirs.
    async fn sync_while_wanted(self: Rc<Self>) {
        let syncs = &self.syncs;
        while syncs.wanted.get() > syncs.started.get() && self.handle.shared.check_fault().is_ok() {
            // Submitted below before anybody else runs: who comes after that gets the next one.
            let number = syncs.started.get() + 1;
            syncs.started.set(number);
            match self.handle.shared.sync_unsettled(&self.disk, "data").await {
                // Nobody else's sync was in flight: as most often.
                Ok(unsettled) if unsettled.is_alone() => self.settled(number, unsettled).await,
                // The next sync need not wait for the others'.
                Ok(unsettled) => {
                    let this = self.clone();
                    spawn(async move { this.settled(number, unsettled).await }).detach();
                }
                // It is latched, and everybody looks at the latch.
                Err(_) => syncs.done.notify_all(),
            }
        }
        syncs.running.set(false);
        syncs.done.notify_all();
    }

    /// A sync has succeeded: says so as soon as that may be believed.
    async fn settled(&self, number: u64, unsettled: Unsettled) {
        let settled = self.handle.shared.settle(unsettled, "data").await;
        let syncs = &self.syncs;
        if settled.is_ok() {
            // A later one covers as much, and may have been first.
            syncs.finished.set(syncs.finished.get().max(number));
        }
        syncs.done.notify_all();
    }
}
