//! The store as other tasks and threads see it: facts, counters, the fault latch, and requests to the keeper.
//!
//! A request is a message with a oneshot for its answer. A caller that stops waiting changes nothing: the keeper finishes
//! what it has begun, and reserved extents whose receiver is gone come back by themselves.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use futures_channel::{mpsc, oneshot};

use super::layout::Layout;
use super::sync::SyncBook;
use super::{
    Change, ExtentEntry, Finding, ScrubProgress, StoreInfo, StoreSpace, VolumeRecord, VolumeSlot, VolumeState,
};
use crate::disk::DiskFile;
use crate::error::{Error, Kind, Result};
use crate::ids::{DatasetId, Incarnation, PhysicalExtent, StoreId, VolumeId};

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// What a keeper is asked.
pub(super) enum Request {
    Reserve(u32, Reply<Reserved>),
    Unreserve(Vec<PhysicalExtent>),
    Commit(Vec<Change>, Reply<()>),
    Rescrub(Vec<PhysicalExtent>, Reply<u32>),
    Beat(Reply<()>),
    ExtentsOf(DatasetId, Reply<Vec<ExtentEntry>>),
    AddVolume(Box<(VolumeSlot, VolumeRecord)>, Reply<()>),
    Volume(VolumeId, Reply<VolumeState>),
    Volumes(Reply<Vec<VolumeId>>),
    Remains(Reply<Vec<VolumeId>>),
    SetStores(VolumeId, Vec<StoreId>, Reply<()>),
    /// The volume, and whether only this replica goes.
    Destroy(VolumeId, bool, Reply<()>),
    Progress(VolumeId, Reply<ScrubProgress>),
    Scrubbed(VolumeId, Reply<()>),
    /// The fault latch has closed: whoever waits for progress should look.
    Faulty,
    Close(Reply<()>),
}

type OnFault = Box<dyn FnOnce() + Send>;

/// What keeper, handles and data paths share.
pub(super) struct Shared {
    pub(super) info: StoreInfo,
    pub(super) layout: Layout,
    pub(super) file: DiskFile,
    /// Set once the store has recovered, before anybody has a handle.
    findings: OnceLock<Vec<Finding>>,
    pub(super) syncs: SyncBook,
    space: SpaceCounters,
    committed_lsn: AtomicU64,
    /// Set with the findings.
    incarnation: OnceLock<Incarnation>,
    fault: OnceLock<String>,
    /// Called when the latch closes. Nothing is called or locked while this is held.
    on_fault: Mutex<Vec<OnFault>>,
    closed: AtomicBool,
    sender: mpsc::UnboundedSender<Request>,
}

#[derive(Default)]
struct SpaceCounters {
    free: AtomicU32,
    pending_scrub: AtomicU32,
    allocated: AtomicU32,
    dirty: AtomicU32,
}

impl Shared {
    pub(super) fn new(
        info: StoreInfo,
        layout: Layout,
        file: DiskFile,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Request>) {
        let (sender, receiver) = mpsc::unbounded();
        let shared = Self {
            info,
            layout,
            file,
            findings: OnceLock::new(),
            syncs: SyncBook::default(),
            space: SpaceCounters::default(),
            committed_lsn: AtomicU64::new(0),
            incarnation: OnceLock::new(),
            fault: OnceLock::new(),
            on_fault: Mutex::default(),
            closed: AtomicBool::new(false),
            sender,
        };
        (Arc::new(shared), receiver)
    }

    /// Why the store takes no more writes, as the error to give.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) fn check_fault(&self) -> Result<()> {
        match self.fault.get() {
            Some(reason) => Err(Error::unavailable(format!(
                "store \"{}\" takes no more writes: {reason}",
                self.info.name
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn latch(&self, reason: &str) {
        if self.fault.set(reason.to_owned()).is_ok() {
            tracing::error!(store = %self.info.name, reason, "store is faulty and takes no more writes");
            let _ = self.sender.unbounded_send(Request::Faulty);
            self.tell_fault();
        }
    }

    pub(super) fn fault(&self) -> Option<&String> {
        self.fault.get()
    }

    /// Calls those who want to hear of the fault. After the latch has closed.
    fn tell_fault(&self) {
        let waiting = std::mem::take(&mut *self.on_fault.lock().unwrap_or_else(PoisonError::into_inner));
        for tell in waiting {
            tell();
        }
    }

    pub(super) fn set_findings(&self, findings: Vec<Finding>) {
        let set = self.findings.set(findings);
        assert!(set.is_ok(), "a store recovers once");
    }

    pub(super) fn publish(&self, space: StoreSpace) {
        self.space.free.store(space.free, Ordering::Relaxed);
        self.space
            .pending_scrub
            .store(space.pending_scrub, Ordering::Relaxed);
        self.space.allocated.store(space.allocated, Ordering::Relaxed);
        self.space.dirty.store(space.dirty, Ordering::Relaxed);
    }

    pub(super) fn set_incarnation(&self, incarnation: Incarnation) {
        let first = self.incarnation.set(incarnation).is_ok();
        assert!(first, "a store is opened once");
    }

    pub(super) fn set_committed(&self, lsn: u64) {
        self.committed_lsn.store(lsn, Ordering::Release);
    }

    pub(super) fn set_closed(&self) {
        self.closed.store(true, Ordering::Release);
    }

    fn gone(&self) -> Error {
        Error::unavailable(format!("store \"{}\" is closed", self.info.name))
    }

    /// An error of this store, its name in front, once.
    pub(super) fn named(&self, error: Error) -> Error {
        let name = format!("store \"{}\"", self.info.name);
        match error.message().starts_with(&name) {
            true => error,
            false => error.context(name),
        }
    }
}

/// Reserved extents on their way to the caller.
pub(super) struct Reserved {
    extents: Vec<PhysicalExtent>,
    sender: mpsc::UnboundedSender<Request>,
}

impl Reserved {
    pub(super) fn new(extents: Vec<PhysicalExtent>, shared: &Shared) -> Self {
        Self {
            extents,
            sender: shared.sender.clone(),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.extents.is_empty() {
            let extents = std::mem::take(&mut self.extents);
            let _ = self.sender.unbounded_send(Request::Unreserve(extents));
        }
    }
}

/// A store as seen from any thread: sends requests to its keeper. Cheap to clone.
#[derive(Clone)]
pub struct StoreHandle {
    pub(super) shared: Arc<Shared>,
}

impl StoreHandle {
    /// Its facts.
    pub fn info(&self) -> &StoreInfo {
        &self.shared.info
    }

    /// Space now.
    pub fn space(&self) -> StoreSpace {
        let space = &self.shared.space;
        StoreSpace {
            total: self.shared.info.extents,
            free: space.free.load(Ordering::Relaxed),
            pending_scrub: space.pending_scrub.load(Ordering::Relaxed),
            allocated: space.allocated.load(Ordering::Relaxed),
            dirty: space.dirty.load(Ordering::Relaxed),
        }
    }

    /// The newest commit that is durable. Rises only; after [`StoreHandle::close`] it is the store's last.
    pub fn committed_lsn(&self) -> u64 {
        self.shared.committed_lsn.load(Ordering::Acquire)
    }

    /// The incarnation that the store has, by its superblock.
    pub fn incarnation(&self) -> Incarnation {
        *self.shared.incarnation.get().unwrap_or(&Incarnation::NIL)
    }

    /// What was found wrong when the store was opened; all else serves.
    pub fn findings(&self) -> &[Finding] {
        self.shared.findings.get().map_or(&[], Vec::as_slice)
    }

    /// Why the store takes no more writes (a sync or metadata write failed), once that has happened. Latched.
    pub fn fault(&self) -> Option<String> {
        self.shared.fault().cloned()
    }

    /// Latches the store as faulty: every later commit, write and flush is refused. Called by whoever sees a sync fail.
    pub fn latch_fault(&self, reason: &str) {
        self.shared.latch(reason);
    }

    /// Calls `tell` once when the store latches as faulty, at once if it has. On whatever thread sees the fault, so it
    /// only wakes somebody.
    pub fn on_fault(&self, tell: impl FnOnce() + Send + 'static) {
        let shared = &self.shared;
        let mut waiting = shared.on_fault.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(Box::new(tell));
        drop(waiting);
        // The latch may have closed just before, and told those who were there then.
        if shared.fault().is_some() {
            shared.tell_fault();
        }
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.shared
            .sender
            .unbounded_send(request(reply))
            .map_err(|_| self.shared.gone())?;
        answer.await.unwrap_or_else(|_| Err(self.shared.gone()))
    }

    /// Sets `count` free extents aside. They are the caller's until allocated or given back.
    ///
    /// # Errors
    /// `NoSpace` when fewer are free and none is pending scrub; waits, bounded, while some are.
    pub async fn reserve(&self, count: u32) -> Result<Vec<PhysicalExtent>> {
        let mut reserved = self.ask(|reply| Request::Reserve(count, reply)).await?;
        Ok(std::mem::take(&mut reserved.extents))
    }

    /// Gives reserved extents back unused.
    pub fn unreserve(&self, extents: Vec<PhysicalExtent>) {
        // A closed store has forgotten its reservations.
        let _ = self.shared.sender.unbounded_send(Request::Unreserve(extents));
    }

    /// One durable transaction; concurrent callers share one log append and one sync. At most
    /// [`TRANSACTION_RECORDS_MAX`](super::TRANSACTION_RECORDS_MAX) records change (one a change); `ReleaseDataset` stands alone.
    ///
    /// # Errors
    /// `Unavailable` when the store is faulty; `Io` (the store is then latched faulty); `NoSpace` when the dirty-mark limit
    /// ([`crate::limits::DIRTY_MARKS_PER_STORE`]) would be exceeded (nothing is changed).
    pub async fn commit(&self, changes: Vec<Change>) -> Result<()> {
        self.ask(|reply| Request::Commit(changes, reply)).await
    }

    /// Free extents that turned out not to be zero go back to PendingScrub, durably, and through the scrubber. Returns when
    /// they are free again: overwritten, synced and read back (I7). Those that are not free (any more) are passed over: the
    /// result is how many were scrubbed.
    ///
    /// # Errors
    /// `Io` when scrubbing fails (the store is then latched faulty), `Unavailable`.
    pub async fn rescrub(&self, extents: Vec<PhysicalExtent>) -> Result<u32> {
        self.ask(|reply| Request::Rescrub(extents, reply)).await
    }

    /// Commits nothing, durably: [`StoreHandle::committed_lsn`] rises. Data is written in place without a commit, so this is
    /// how a store that was written to is told from a copy that was taken before.
    ///
    /// # Errors
    /// As [`StoreHandle::commit`].
    pub async fn beat(&self) -> Result<()> {
        self.ask(Request::Beat).await
    }

    /// All allocated extents of a dataset, by logical index.
    ///
    /// # Errors
    /// `Damaged` when an extent whose record is lost may be one of them; `Unavailable`.
    pub async fn extents_of(&self, dataset: DatasetId) -> Result<Vec<ExtentEntry>> {
        self.ask(|reply| Request::ExtentsOf(dataset, reply)).await
    }

    /// Adds a volume: slot copies written, synced and read back one after the other, then its record committed.
    ///
    /// # Errors
    /// `NoSpace` (no slot, or no room for its future tombstone), `Refused` (tombstoned), `Exists`, `Io` (a slot that cannot
    /// be written is not tried again).
    pub async fn add_volume(&self, slot: VolumeSlot, record: VolumeRecord) -> Result<()> {
        let volume = Box::new((slot, record));
        self.ask(|reply| Request::AddVolume(volume, reply)).await
    }

    /// Where a volume stands here.
    ///
    /// # Errors
    /// `Damaged` when both slot copies are bad, or when nothing is found and records that may be the volume's cannot be read;
    /// `Unavailable`.
    pub async fn volume(&self, volume: VolumeId) -> Result<VolumeState> {
        self.ask(|reply| Request::Volume(volume, reply)).await
    }

    /// All live volumes.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn volumes(&self) -> Result<Vec<VolumeId>> {
        self.ask(Request::Volumes).await
    }

    /// All volumes whose destruction was begun here and has not come to its end.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn remains(&self) -> Result<Vec<VolumeId>> {
        self.ask(Request::Remains).await
    }

    /// Destruction, first part: commits the tombstone, overwrites both slot copies with zeros, syncs, reads back, and moves
    /// all extents of the dataset to PendingScrub in one commit. Repeatable at any point of interruption.
    /// The caller has ended all I/O of the volume.
    ///
    /// # Errors
    /// `NotFound` when the volume never was here; `Damaged` when its record is lost, and with it where its keys are; `Io`
    /// when a key copy cannot be overwritten (the store goes on), `Unavailable`.
    pub async fn destroy_volume(&self, volume: VolumeId) -> Result<()> {
        self.ask(|reply| Request::Destroy(volume, false, reply)).await
    }

    /// The same for this store's replica alone, whose place others have taken: keys and extents here go, the volume stays.
    /// It does not come back to this store.
    ///
    /// # Errors
    /// As [`StoreHandle::destroy_volume`].
    pub async fn give_up_volume(&self, volume: VolumeId) -> Result<()> {
        self.ask(|reply| Request::Destroy(volume, true, reply)).await
    }

    /// Writes down the stores of a volume's replicas, in the order of their places; nil for a vacant one. One slot copy
    /// after the other, so that a cut leaves the old list or the new one.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for more than a slot has room for; `Damaged`, `Io`, `Unavailable`.
    pub async fn set_stores(&self, volume: VolumeId, stores: Vec<StoreId>) -> Result<()> {
        self.ask(|reply| Request::SetStores(volume, stores, reply)).await
    }

    /// Destruction, second part: how far the scrubber is with that volume's extents. Also after a restart.
    ///
    /// # Errors
    /// `NotFound` when the volume has no tombstone here, `Unavailable`.
    pub async fn scrub_progress(&self, volume: VolumeId) -> Result<ScrubProgress> {
        self.ask(|reply| Request::Progress(volume, reply)).await
    }

    /// Waits until every extent of the tombstoned volume is free.
    ///
    /// # Errors
    /// `NotFound` without a tombstone, `Damaged` when an extent whose record is lost may be one of them, `Io` when
    /// scrubbing fails, `Unavailable`.
    pub async fn scrubbed(&self, volume: VolumeId) -> Result<()> {
        self.ask(|reply| Request::Scrubbed(volume, reply)).await
    }

    /// Checkpoints, ends keeper and scrubber, and lets the file go once every [`StoreIo`](super::StoreIo) is dropped.
    /// Closing twice is fine.
    ///
    /// # Errors
    /// `Io`; the store is consistent all the same.
    pub async fn close(&self) -> Result<()> {
        match self.ask(Request::Close).await {
            Err(error) if error.kind() == Kind::Unavailable && self.shared.closed.load(Ordering::Acquire) => {
                Ok(())
            }
            result => result,
        }
    }
}
