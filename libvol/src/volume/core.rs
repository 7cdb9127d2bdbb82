//! What all parts of an open volume share: its facts, its extents, its replicas, and the one way it stops.
//!
//! A replica that fails is dropped ([`super::replicas`]); a write that no replica completes gives EIO and its blocks are
//! settled. What the volume cannot go on without (metadata, flushes, its membership) and that no replica can do stops it
//! for good: every request from then on, and every one that waits, gets EIO; marks stay, and the next open recovers. Full
//! stores are no failure.
//!
//! Cancellation: a caller may drop the future of any request. What must not stop half-way runs inside [`uncancelled`].

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use super::extent::{Extent, ExtentMap, Places, State};
use super::membership::Register;
use super::replicas::{Role, Seat, UnderWay};
use super::sums::{SumCache, UNKNOWN};
use super::{VolumeSpec, VolumeStats};
use crate::buf::{Buf, BufPool};
use crate::crypto::seal::{SealedBuf, Sealer};
use crate::error::{Error, Kind, Result};
use crate::ids::{
    BlockIndex, DatasetId, Epoch, ExtentIndex, KeyVersion, PhysicalExtent, ReplicaSet, VolumeId,
};
use crate::limits::{
    BLOCK, BLOCK_SIZE, DIRTY_MARKS_PER_STORE, REPLICA_DEADLINE_SECONDS, REPLICAS_MAX,
    RESYNC_BYTES_PER_SECOND_DEFAULT, VOLUME_BYTES_IN_FLIGHT, VOLUME_PLACES_MAX, VOLUME_POOL_BYTES_IDLE,
    VOLUME_RECOVERY_EXTENTS, VOLUME_SUM_CACHE_BYTES,
};
use crate::runtime::spawn;
use crate::runtime::sync::{InFlight, InFlightGuard, Notify, Semaphore};
use crate::sabotage::{Rule, broken};
use crate::store::{Member, StoreIo};

/// Numbers that an operator may set, and that tests choose smaller than production does.
#[derive(Clone, Copy, Debug)]
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
    /// How long a request to a replica may take before it counts as failed.
    pub deadline: Duration,
    /// Bytes a second that a replica which catches up is written with, at most.
    pub resync_bytes_per_second: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            dirty_extents_max: DIRTY_MARKS_PER_STORE,
            sum_cache_bytes: VOLUME_SUM_CACHE_BYTES,
            tick: Duration::from_secs(1),
            idle_ticks: 5,
            mark_patience: Duration::from_secs(60),
            deadline: Duration::from_secs(REPLICA_DEADLINE_SECONDS),
            resync_bytes_per_second: RESYNC_BYTES_PER_SECOND_DEFAULT,
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
    /// Itself, for tasks it starts.
    pub(super) myself: Weak<Self>,
    pub(super) seats: [Seat; VOLUME_PLACES_MAX],
    /// Places of the slot's list of stores.
    pub(super) places: Cell<usize>,
    /// Membership epoch.
    pub(super) epoch: Cell<Epoch>,
    pub(super) register: Rc<dyn Register>,
    /// The membership is changed by one at a time.
    pub(super) membership: Rc<Semaphore>,
    /// Allocations and marks being committed.
    pub(super) marking: Rc<UnderWay>,
    /// Replicas in role Dropping: nobody is told of success meanwhile.
    pub(super) dropping: Cell<usize>,
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
    next_read: Cell<usize>,
    failure: OnceCell<String>,
}

impl Core {
    pub(super) fn new(spec: VolumeSpec, tuning: Tuning) -> Result<Rc<Self>> {
        let at_hand = spec
            .replicas
            .iter()
            .filter(|replica| replica.state == Member::InSync);
        let at_hand: Vec<&Rc<StoreIo>> = at_hand.filter_map(|replica| replica.io.as_ref()).collect();
        if at_hand.is_empty() || spec.replicas.len() > VOLUME_PLACES_MAX {
            return Err(Error::unavailable(format!(
                "volume {}: none of its replicas in sync (1 to {REPLICAS_MAX}) is at hand; bring a store back",
                spec.label,
            )));
        }
        let extent_bytes = at_hand[0].handle().info().extent_bytes;
        if let Some(other) = at_hand
            .iter()
            .find(|io| io.handle().info().extent_bytes != extent_bytes)
        {
            return Err(Error::invalid(format!(
                "volume {}: store \"{}\" has extents of {} bytes, store \"{}\" of {extent_bytes}; replicas need equal ones",
                spec.label,
                other.handle().info().name,
                other.handle().info().extent_bytes,
                at_hand[0].handle().info().name,
            )));
        }
        let seats: [Seat; VOLUME_PLACES_MAX] = std::array::from_fn(|_| Seat::vacant());
        let mut dropping = 0;
        for (seat, replica) in seats.iter().zip(&spec.replicas) {
            let role = match (replica.state, &replica.io) {
                (Member::Vacant, _) => Role::Vacant,
                (Member::InSync, Some(_)) => Role::InSync,
                // Others hold all it holds: it is dropped before anything is served.
                (Member::InSync, None) => {
                    dropping += 1;
                    Role::Dropping
                }
                (Member::Stale, Some(_)) if broken(Rule::StaleIsOut) => Role::InSync,
                (Member::Stale | Member::Resyncing, _) => Role::Stale,
            };
            let away = || "its store was away when the volume was opened".to_owned();
            let reason = replica.reason.clone().or_else(|| replica.io.is_none().then(away));
            seat.role.set(role);
            seat.store.set(replica.store);
            seat.name.replace(replica.name.clone());
            seat.reason.replace(reason.filter(|_| role != Role::InSync));
            seat.full_copy.set(replica.full_copy && role != Role::InSync);
            if role == Role::InSync {
                seat.set_io(replica.io.clone());
            }
        }
        let blocks = (extent_bytes / BLOCK) as u32;
        // Sums of dirty extents cannot leave memory; they get half of the cache.
        let pinnable = tuning.sum_cache_bytes / 2 / (4 * blocks as usize);
        let tuning = Tuning {
            dirty_extents_max: tuning.dirty_extents_max.min(pinnable).max(1),
            ..tuning
        };
        Ok(Rc::new_cyclic(|myself| Self {
            id: spec.id,
            label: spec.label,
            dataset: spec.dataset,
            key_version: spec.key_version,
            sealer: spec.sealer,
            shape: Shape { extent_bytes, blocks },
            tuning,
            size_bytes: Cell::new(spec.size_bytes),
            myself: myself.clone(),
            seats,
            places: Cell::new(spec.replicas.len()),
            epoch: Cell::new(spec.membership_epoch),
            register: spec.register.clone(),
            membership: Semaphore::new(1),
            marking: Rc::default(),
            dropping: Cell::new(dropping),
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

    /// The volume stops. Returns what the requests get.
    #[cold]
    pub(super) fn fail(&self, error: &Error) -> Error {
        let reason = format!("{error}; mend the store and reopen the volume");
        if self.failure.set(reason).is_ok() {
            tracing::error!(volume = %self.label, %error, "volume has stopped");
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

    /// Writes `sealed[range]` to every replica that takes writes of the extent, from block `block` on. The caller holds the
    /// blocks exclusively and the extent is marked.
    ///
    /// # Errors
    /// `Io` when no replica in sync completed it: the blocks are then settled, as far as they can be read.
    pub(super) async fn write_all(
        &self,
        extent: &Extent,
        block: u32,
        sealed: &SealedBuf,
        range: Range<usize>,
    ) -> Result<()> {
        let blocks = block..block + (range.len() / BLOCK_SIZE) as u32;
        let places = extent.places.get();
        self.note_missed(extent, blocks.clone());
        let results = self
            .on(some_of(self.targets(extent), Rule::WriteAll), |replica, io| {
                let range = range.clone();
                async move { io.write(places[replica], block, sealed, range).await }
            })
            .await;
        match self.settle(results).await {
            Ok(_) => Ok(()),
            Err(error) => {
                if self.check().is_ok() {
                    tracing::error!(volume = %self.label, extent = %extent.index, "a write failed everywhere: {error}");
                    match self.takes_writes_somewhere() {
                        true => self.settle_blocks(extent, blocks).await,
                        // Some of it may have landed: neither what was there before nor what is there now may be shown.
                        false => extent.set_sums(blocks.start, &vec![UNKNOWN; blocks.len()]),
                    }
                }
                Err(error)
            }
        }
    }

    /// Whether some replica in sync has a store that is not latched faulty. Where none has, a sync has failed, and with it
    /// acknowledged writes may have gone that were not flushed: what the devices hold is then no new truth, and blocks that
    /// do not match their sums are lost, not older.
    fn takes_writes_somewhere(&self) -> bool {
        let mut handles = self
            .in_sync()
            .iter()
            .filter_map(|replica| self.seats[replica].handle());
        handles.any(|handle| handle.fault().is_none())
    }

    /// Reads blocks from one replica in sync: the one with the fewest reads in flight.
    ///
    /// # Errors
    /// `Io`: that replica cannot be read. The caller asks all of them ([`super::heal`]).
    pub(super) async fn read_one(&self, places: Places, block: u32, count: u32) -> Result<Buf> {
        let len = count as usize * BLOCK_SIZE;
        self.check()?;
        let reading = self.choose_replica();
        let seat = &self.seats[reading.replica];
        let io = seat.io()?;
        let place = places[reading.replica];
        seat.guard(async {
            let (result, buf) = io.read(place, block, self.pool.get(len), len).await;
            result.map(|()| buf)
        })
        .await
    }

    fn choose_replica(&self) -> Reading<'_> {
        let in_sync = self.in_sync();
        let next = self.next_read.get();
        let mut best: Option<usize> = None;
        for nth in 0..VOLUME_PLACES_MAX {
            let replica = (next + nth) % VOLUME_PLACES_MAX;
            let busy = |replica: usize| self.seats[replica].reads_in_flight.get();
            if in_sync.contains(replica) && best.is_none_or(|best| busy(replica) < busy(best)) {
                best = Some(replica);
            }
        }
        let replica = best.expect("the last replica in sync is never dropped");
        self.next_read.set(replica + 1);
        let in_flight = &self.seats[replica].reads_in_flight;
        in_flight.set(in_flight.get() + 1);
        Reading { replica, in_flight }
    }

    /// Makes every write that completed before the call durable on every replica that takes writes.
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    pub(super) async fn sync_all(&self) -> Result<()> {
        if broken(Rule::FlushSyncs) {
            return Ok(());
        }
        let replicas = some_of(self.in_sync().or(self.joining()), Rule::FlushAll);
        let results = self.on(replicas, |_, io| async move { io.flush().await }).await;
        self.settle_or_stop(results).await.map(drop)
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

    /// Where an extent lies, from what is known of each replica.
    pub(super) fn places_of(per_replica: impl Iterator<Item = (usize, PhysicalExtent)>) -> Places {
        let mut places = Places::default();
        for (replica, place) in per_replica {
            places[replica] = place;
        }
        places
    }
}

/// All of them; with the rule broken, only the first.
#[inline]
fn some_of(replicas: ReplicaSet, rule: Rule) -> ReplicaSet {
    match replicas.iter().next() {
        Some(first) if broken(rule) => ReplicaSet::only(first),
        _ => replicas,
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
