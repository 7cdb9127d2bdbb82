//! What all parts of an open volume share: its facts, its extents, its replicas, and the one way it fails.
//!
//! Failure: a device error on any replica stops the volume for good; every request from then on, and every one that waits,
//! gets EIO; marks stay, and the next open recovers. Full stores are no failure.
//!
//! Cancellation: a caller may drop the future of any request. What must not stop half-way runs inside [`uncancelled`].

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{join, join3};

use super::extent::{Extent, ExtentMap, Places, State};
use super::sums::SumCache;
use super::{VolumeSpec, VolumeStats};
use crate::buf::{Buf, BufPool};
use crate::crypto::seal::{SealedBuf, Sealer};
use crate::error::{Error, Kind, Result};
use crate::ids::{BlockIndex, DatasetId, ExtentIndex, KeyVersion, PhysicalExtent, VolumeId};
use crate::limits::{
    BLOCK, BLOCK_SIZE, DIRTY_MARKS_PER_STORE, REPLICAS_MAX, VOLUME_BYTES_IN_FLIGHT, VOLUME_POOL_BYTES_IDLE,
    VOLUME_RECOVERY_EXTENTS, VOLUME_SUM_CACHE_BYTES,
};
use crate::runtime::spawn;
use crate::runtime::sync::{InFlight, InFlightGuard, Notify, Semaphore};
use crate::store::StoreIo;

/// Numbers that tests choose smaller than production does.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(feature = "sim"),
    expect(unreachable_pub, reason = "public with the feature sim")
)]
pub struct Tuning {
    /// Extents of this volume that may be marked at a time, at most; memory for pinned sums may allow fewer.
    pub dirty_extents_max: usize,
    /// Bytes of sums in memory.
    pub sum_cache_bytes: usize,
    /// The cleaner's clock.
    pub tick: Duration,
    /// Ticks without a write before an extent is cleaned.
    pub idle_ticks: u32,
    /// How long a request waits for dirty marks before it gets `NoSpace`.
    pub mark_patience: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            dirty_extents_max: DIRTY_MARKS_PER_STORE,
            sum_cache_bytes: VOLUME_SUM_CACHE_BYTES,
            tick: Duration::from_secs(1),
            idle_ticks: 5,
            mark_patience: Duration::from_secs(60),
        }
    }
}

/// Extent size in its several units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Bytes of an extent, a power of two.
    pub(super) extent_bytes: u64,
    /// Blocks of an extent.
    pub(super) blocks: u32,
}

impl Shape {
    /// Number of the extent's block within the volume.
    pub(super) fn block_index(self, extent: ExtentIndex, block: u32) -> BlockIndex {
        BlockIndex(u64::from(extent.0) * u64::from(self.blocks) + u64::from(block))
    }
}

/// See the module's text.
pub(super) struct Core {
    pub(super) id: VolumeId,
    pub(super) label: String,
    pub(super) dataset: DatasetId,
    pub(super) key_version: KeyVersion,
    pub(super) sealer: Sealer,
    pub(super) shape: Shape,
    pub(super) tuning: Tuning,
    pub(super) size_bytes: Cell<u64>,
    pub(super) replicas: Vec<Rc<StoreIo>>,
    pub(super) pool: BufPool,
    pub(super) extents: RefCell<ExtentMap>,
    pub(super) cache: SumCache,
    /// Extents with a mark of ours, in no order; some may have lost it meanwhile.
    pub(super) dirty: RefCell<Vec<Rc<Extent>>>,
    /// A state of an extent, the failure, or a wish to the cleaner has changed: everyone who waits looks again.
    pub(super) changed: Notify,
    /// Requests and their offspring.
    pub(super) in_flight: Rc<InFlight>,
    pub(super) bytes: Rc<Semaphore>,
    /// One release of whole extents at a time: it pins many extents at once.
    pub(super) releasing: Rc<Semaphore>,
    /// Extents being reconciled.
    pub(super) reconciling: Rc<Semaphore>,
    pub(super) closing: Cell<bool>,
    /// Cleaner and recovery end as soon as they can.
    pub(super) stop: Cell<bool>,
    /// Background tasks that still run.
    pub(super) background: Rc<InFlight>,
    /// Somebody waits for a mark: clean the oldest, idle or not.
    pub(super) marks_wanted: Cell<usize>,
    /// The cleaner's clock.
    pub(super) tick: Cell<u32>,
    /// The extent that was last written for the first time, and how many before it came in order.
    pub(super) sequence_at: Cell<(u32, u32)>,
    /// Blocks without a good copy, by number within the volume.
    pub(super) lost: RefCell<BTreeSet<u64>>,
    pub(super) healed: Cell<u64>,
    /// Extents whose checksum areas are written anew because a replica's was damaged or old.
    pub(super) healed_areas: Cell<u64>,
    pub(super) unverified: Cell<u64>,
    pub(super) allocated: Cell<u64>,
    pub(super) recovering: Cell<u64>,
    reads_in_flight: [Cell<u32>; REPLICAS_MAX],
    next_read: Cell<usize>,
    failure: OnceCell<String>,
}

impl Core {
    pub(super) fn new(spec: VolumeSpec, tuning: Tuning) -> Result<Rc<Self>> {
        let replicas = spec.replicas;
        if replicas.is_empty() || replicas.len() > REPLICAS_MAX {
            return Err(Error::invalid(format!(
                "volume {}: {} replicas; 1 to {REPLICAS_MAX} are possible",
                spec.label,
                replicas.len()
            )));
        }
        let extent_bytes = replicas[0].handle().info().extent_bytes;
        if let Some(other) = replicas
            .iter()
            .find(|io| io.handle().info().extent_bytes != extent_bytes)
        {
            return Err(Error::invalid(format!(
                "volume {}: store \"{}\" has extents of {} bytes, store \"{}\" of {extent_bytes}; replicas need equal ones",
                spec.label,
                other.handle().info().name,
                other.handle().info().extent_bytes,
                replicas[0].handle().info().name,
            )));
        }
        let blocks = (extent_bytes / BLOCK) as u32;
        // Sums of dirty extents cannot leave memory; they get half of the cache.
        let pinnable = tuning.sum_cache_bytes / 2 / (4 * blocks as usize);
        let tuning = Tuning {
            dirty_extents_max: tuning.dirty_extents_max.min(pinnable).max(1),
            ..tuning
        };
        Ok(Rc::new(Self {
            id: spec.id,
            label: spec.label,
            dataset: spec.dataset,
            key_version: spec.key_version,
            sealer: spec.sealer,
            shape: Shape { extent_bytes, blocks },
            tuning,
            size_bytes: Cell::new(spec.size_bytes),
            replicas,
            pool: BufPool::new(VOLUME_POOL_BYTES_IDLE),
            extents: RefCell::default(),
            cache: SumCache::new(tuning.sum_cache_bytes),
            dirty: RefCell::default(),
            changed: Notify::default(),
            in_flight: Rc::default(),
            bytes: Semaphore::new(VOLUME_BYTES_IN_FLIGHT),
            releasing: Semaphore::new(1),
            reconciling: Semaphore::new(VOLUME_RECOVERY_EXTENTS),
            closing: Cell::new(false),
            stop: Cell::new(false),
            background: Rc::default(),
            marks_wanted: Cell::new(0),
            tick: Cell::new(0),
            // No extent follows this one.
            sequence_at: Cell::new((u32::MAX - 1, 0)),
            lost: RefCell::default(),
            healed: Cell::new(0),
            healed_areas: Cell::new(0),
            unverified: Cell::new(0),
            allocated: Cell::new(0),
            recovering: Cell::new(0),
            reads_in_flight: Default::default(),
            next_read: Cell::new(0),
            failure: OnceCell::new(),
        }))
    }

    /// A request begins.
    ///
    /// # Errors
    /// `Unavailable` when the volume is closing, `Io` when it has stopped, `Invalid` outside the volume.
    pub(super) fn begin(&self, offset: u64, len: u64) -> Result<InFlightGuard> {
        self.check()?;
        if self.closing.get() {
            return Err(Error::unavailable(format!("volume {} is closing", self.label)));
        }
        let size = self.size_bytes.get();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::invalid(format!(
                "volume {}: bytes {offset}+{len} are outside its {size} bytes",
                self.label
            )));
        }
        Ok(self.in_flight.enter())
    }

    /// # Errors
    /// `Io` once the volume has stopped.
    #[inline]
    pub(super) fn check(&self) -> Result<()> {
        match self.failure.get() {
            None => Ok(()),
            Some(reason) => Err(Error::io(format!("volume {} has stopped: {reason}", self.label))),
        }
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    /// A replica failed: the volume stops. Returns what the requests get.
    #[cold]
    pub(super) fn fail(&self, replica: usize, error: &Error) -> Error {
        let store = &self.replicas[replica].handle().info().name;
        let reason = format!("replica on store \"{store}\": {error}; mend the store and reopen the volume");
        if self.failure.set(reason).is_ok() {
            tracing::error!(volume = %self.label, %store, %error, "volume has stopped: a replica failed");
        }
        self.changed.notify_all();
        self.check().expect_err("it has just failed")
    }

    /// Ends all activity: new requests are refused, those in flight and the background tasks are waited for. The cleaner
    /// goes last, since a request may wait for it.
    pub(super) async fn quiesce(&self) {
        self.closing.set(true);
        self.in_flight.idle().await;
        self.end_background();
        self.background.idle().await;
    }

    pub(super) fn end_background(&self) {
        self.stop.set(true);
        self.changed.notify_all();
    }

    /// The extent, if it was ever written or looked for.
    #[inline]
    pub(super) fn extent(&self, index: ExtentIndex) -> Option<Rc<Extent>> {
        self.extents.borrow().get(&index).cloned()
    }

    pub(super) fn extent_or_new(&self, index: ExtentIndex) -> Rc<Extent> {
        let mut extents = self.extents.borrow_mut();
        extents.entry(index).or_insert_with(|| Extent::new(index)).clone()
    }

    /// An extent changes its state; who waits for it looks again.
    pub(super) fn turn(&self, extent: &Rc<Extent>, state: State) {
        extent.state.set(state);
        if state == State::Dirty && !extent.listed_dirty.replace(true) {
            self.dirty.borrow_mut().push(extent.clone());
        }
        self.changed.notify_all();
    }

    /// Forgets extents that have lost their marks.
    pub(super) fn prune_dirty(&self) {
        self.dirty.borrow_mut().retain(|extent| {
            let keep = !matches!(extent.state.get(), State::Clean | State::Absent);
            extent.listed_dirty.set(keep);
            keep
        });
    }

    /// Waits until `condition` returns `Some`, or the volume has stopped.
    ///
    /// # Errors
    /// `Io` once the volume has stopped.
    pub(super) async fn wait_for<T>(&self, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
        self.changed
            .until(|| match self.check() {
                Err(stopped) => Some(Err(stopped)),
                Ok(()) => condition().map(Ok),
            })
            .await
    }

    /// Does the same on every replica at once and waits for all of them.
    pub(super) async fn on_all<'a, T, F>(&'a self, each: impl Fn(usize, &'a StoreIo) -> F) -> Each<T>
    where
        F: Future<Output = T> + 'a,
    {
        match &*self.replicas {
            [a] => Each([Some(each(0, a).await), None, None]),
            [a, b] => {
                let (a, b) = join(each(0, a), each(1, b)).await;
                Each([Some(a), Some(b), None])
            }
            [a, b, c] => {
                let (a, b, c) = join3(each(0, a), each(1, b), each(2, c)).await;
                Each([Some(a), Some(b), Some(c)])
            }
            _ => unreachable!("checked when the volume was opened"),
        }
    }

    /// The results of all replicas, or the volume stops.
    ///
    /// # Errors
    /// `Io`.
    #[inline]
    pub(super) fn settle<T>(&self, results: Each<Result<T>>) -> Result<Vec<T>> {
        let mut values = Vec::with_capacity(self.replicas.len());
        for (replica, result) in results.0.into_iter().flatten().enumerate() {
            values.push(result.map_err(|error| self.fail(replica, &error))?);
        }
        Ok(values)
    }

    /// As [`Core::settle`] where there is nothing to return.
    ///
    /// # Errors
    /// `Io`.
    #[inline]
    pub(super) fn settle_all(&self, results: Each<Result<()>>) -> Result<()> {
        for (replica, result) in results.0.into_iter().flatten().enumerate() {
            result.map_err(|error| self.fail(replica, &error))?;
        }
        Ok(())
    }

    /// Writes `sealed[range]` to every replica from block `block` on. The caller holds the blocks exclusively and the
    /// extent is marked.
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    pub(super) async fn write_all(
        &self,
        places: Places,
        block: u32,
        sealed: &SealedBuf,
        range: Range<usize>,
    ) -> Result<()> {
        let results = self
            .on_all(|replica, io| {
                let range = range.clone();
                async move { io.write(places[replica], block, sealed, range).await }
            })
            .await;
        self.settle_all(results)
    }

    /// Reads blocks from one replica: the one with the fewest reads in flight.
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    pub(super) async fn read_one(&self, places: Places, block: u32, count: u32) -> Result<Buf> {
        let len = count as usize * BLOCK_SIZE;
        let reading = self.choose_replica();
        let replica = reading.replica;
        let (result, buf) = self.replicas[replica]
            .read(places[replica], block, self.pool.get(len), len)
            .await;
        drop(reading);
        result.map_err(|error| self.fail(replica, &error))?;
        Ok(buf)
    }

    /// Reads blocks from every replica.
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    pub(super) async fn read_all(&self, places: Places, block: u32, count: u32) -> Result<Vec<Buf>> {
        let len = count as usize * BLOCK_SIZE;
        let results = self
            .on_all(|replica, io| async move {
                let (result, buf) = io.read(places[replica], block, self.pool.get(len), len).await;
                result.map(|()| buf)
            })
            .await;
        self.settle(results)
    }

    fn choose_replica(&self) -> Reading<'_> {
        let count = self.replicas.len();
        let mut best = self.next_read.get() % count;
        for replica in 0..count {
            if self.reads_in_flight[replica].get() < self.reads_in_flight[best].get() {
                best = replica;
            }
        }
        self.next_read.set(best + 1);
        let in_flight = &self.reads_in_flight[best];
        in_flight.set(in_flight.get() + 1);
        Reading {
            replica: best,
            in_flight,
        }
    }

    /// Makes every write that completed before the call durable on every replica.
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    pub(super) async fn sync_all(&self) -> Result<()> {
        let results = self.on_all(|_, io| io.flush()).await;
        self.settle_all(results)
    }

    pub(super) fn stats(&self) -> VolumeStats {
        VolumeStats {
            allocated_extents: self.allocated.get(),
            healed_blocks: self.healed.get(),
            healed_areas: self.healed_areas.get(),
            lost_blocks: self.lost.borrow().len() as u64,
            unverified_blocks: self.unverified.get(),
            recovering_extents: self.recovering.get(),
        }
    }

    /// A request for a block that no replica has a good copy of.
    #[cold]
    pub(super) fn lost_error(&self, block: BlockIndex) -> Error {
        Error::new(
            Kind::Io,
            format!(
                "volume {}: block {block} (byte {}) has no good copy on any replica; restore it from a backup",
                self.label,
                block.0 * BLOCK
            ),
        )
    }

    /// Written or trimmed blocks are no longer lost.
    #[inline]
    pub(super) fn found(&self, first: BlockIndex, count: u32) {
        if !self.lost.borrow().is_empty() {
            let end = first.0 + u64::from(count);
            self.lost
                .borrow_mut()
                .retain(|block| !(first.0..end).contains(block));
        }
    }

    /// Placeholder places with one entry a replica.
    pub(super) fn places_of(per_replica: &[PhysicalExtent]) -> Places {
        let mut places = Places::default();
        places[..per_replica.len()].copy_from_slice(per_replica);
        places
    }
}

/// A read in flight on one replica.
struct Reading<'a> {
    replica: usize,
    in_flight: &'a Cell<u32>,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.in_flight.set(self.in_flight.get() - 1);
    }
}

/// One value a replica, in order.
pub(super) struct Each<T>(pub(super) [Option<T>; REPLICAS_MAX]);

/// Runs `work` to its end even if the caller drops the future: then it goes on as a task of its own. Until then it is
/// polled in place, without a hop through the run queue.
pub(super) fn uncancelled<F: Future + 'static>(work: F) -> Uncancelled<F> {
    Uncancelled(Some(Box::pin(work)))
}

/// See [`uncancelled`].
pub(super) struct Uncancelled<F: Future + 'static>(Option<Pin<Box<F>>>);

impl<F: Future + 'static> Future for Uncancelled<F> {
    type Output = F::Output;
    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let work = self.0.as_mut().expect("not polled after completion");
        let result = work.as_mut().poll(cx);
        if result.is_ready() {
            self.0 = None;
        }
        result
    }
}

impl<F: Future + 'static> Drop for Uncancelled<F> {
    fn drop(&mut self) {
        if let Some(work) = self.0.take() {
            spawn(async move {
                let _ = work.await;
            })
            .detach();
        }
    }
}
