//! The keeper: one per store, on the store's home runtime, owner of all its metadata.
//!
//! Tasks: one answers requests, one appends group commits ([`super::commit`]), one scrubs ([`super::scrub`]); slow requests
//! (reservations that wait, volume slots) get a task of their own. They share the books through `RefCell`s that are never
//! borrowed across an await. Only durable changes are in the books, so whatever is read from them may be acted on.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_channel::{mpsc, oneshot};
use futures_util::StreamExt;

use super::batch::Step;
use super::books::Books;
use super::commit::Transaction;
use super::handle::{Reply, Request, Reserved, Shared};
use super::layout::Layout;
use super::log::Ring;
use super::recover::{Loaded, Repair, Slots, SuperblockRepair, load};
use super::superblock::{self, Renewed, Superblock};
use super::{Expect, Finding, Found, Renewal, Severity, StoreHandle, StoreInfo, slots};
use crate::disk::{Disk, DiskFile, classify};
use crate::error::{Error, Result};
use crate::ids::Incarnation;
use crate::limits::STORE_OPENING_MAX;
use crate::runtime::sync::{Notify, Semaphore};
use crate::runtime::{spawn, timeout};
use crate::sabotage::{Rule, broken};

/// A reservation gives up when the scrubber has freed nothing for so long.
const RESERVE_PATIENCE: Duration = Duration::from_secs(30);

/// See the module's text.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) disk: Disk,
    pub(super) layout: Layout,
    pub(super) superblock: Superblock,
    pub(super) superblock_repair: RefCell<Option<SuperblockRepair>>,
    pub(super) books: RefCell<Books>,
    pub(super) slots: RefCell<Slots>,
    /// One volume is added or destroyed at a time.
    pub(super) slot_lock: Rc<Semaphore>,
    pub(super) ring: RefCell<Ring>,
    /// The newest frame that is durable and in the books.
    pub(super) applied: Cell<u64>,
    pub(super) queue: RefCell<VecDeque<Transaction>>,
    /// A checkpoint has written its pages up to this lsn; the appender records it.
    pub(super) checkpoint_ready: Cell<Option<u64>>,
    pub(super) checkpoint_running: Cell<bool>,
    /// Something for the appender to look at.
    pub(super) work: Notify,
    /// The books have changed, a checkpoint was recorded, or the store has become faulty or is closing.
    pub(super) changed: Notify,
    /// Extents freed since the store was opened.
    pub(super) freed: Cell<u64>,
    pub(super) scrubbing: Cell<bool>,
    /// Nothing new is begun.
    pub(super) closing: Cell<bool>,
    /// Nobody but those who wait already commits any more.
    pub(super) draining: Cell<bool>,
    /// The appender has ended.
    pub(super) stopped: Cell<bool>,
}

/// Opens a store on its home runtime, recovers its metadata, and starts its keeper and scrubber. Leaves its lineage as it
/// is: who keeps account of it uses the two halves, [`begin_open`] and [`Opening::finish`].
///
/// # Errors
/// `Invalid` (not a vold store; truncated), `Unsupported` (unknown format version), `Refused` (another installation's,
/// or not the expected store), `Damaged`, `Io`; `Unavailable` when the device does not answer. Each says who, what, why, and
/// the next step.
pub async fn open(file: &DiskFile, expect: Expect) -> Result<StoreHandle> {
    begin_open(file, expect).await?.finish(None).await
}

/// The first half of [`open`]: reads everything, makes it durable, and writes nothing, so that the store can be judged.
///
/// # Errors
/// As [`open`].
pub async fn begin_open(file: &DiskFile, expect: Expect) -> Result<Opening> {
    answered(file.path(), read_all(file, expect)).await
}

/// Waits for a part of an opening, unless the device does not answer.
async fn answered<T>(path: &Path, part: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(STORE_OPENING_MAX, part).await.unwrap_or_else(|| {
        Err(Error::unavailable(format!(
            "{}: its device has not answered within {} seconds; look at the device",
            path.display(),
            STORE_OPENING_MAX.as_secs()
        )))
    })
}

async fn read_all(file: &DiskFile, expect: Expect) -> Result<Opening> {
    let disk = Disk::attach(file)?;
    let loaded = load(&disk, file, expect).await?;
    let (keeper, findings, requests) = Keeper::new(disk, file, loaded);
    keeper.log(&findings);
    // What was read a cut may still take back. What is decided by it, here and by others, stands on what is durable.
    let synced = keeper.shared.sync(&keeper.disk, "recovery").await;
    synced.map_err(|error| keeper.shared.named(error))?;
    Ok(Opening {
        keeper,
        findings,
        requests,
    })
}

/// A store that was read. Dropping it leaves the store as it is.
pub struct Opening {
    keeper: Rc<Keeper>,
    findings: Vec<Finding>,
    requests: mpsc::UnboundedReceiver<Request>,
}

impl Opening {
    /// What the store says of itself. All of it is durable.
    pub fn found(&self) -> Found {
        self.keeper.superblock.found(self.keeper.applied.get())
    }

    /// The second half of [`open`]: recovers the metadata, gives the store its new incarnation, and starts keeper and
    /// scrubber. Without a renewal the superblock's lineage stays as it is, and this opening cannot be told from the one
    /// before. [`StoreHandle::incarnation`] is what the store has in the end: where no second copy of its superblock can be
    /// written, the one before, since its only good copy is not risked.
    ///
    /// # Errors
    /// `Io`; the store then has the old incarnation or the new one.
    pub async fn finish(self, renewal: Option<Renewal>) -> Result<StoreHandle> {
        let Self {
            keeper,
            findings,
            requests,
        } = self;
        let recovered = answered(&keeper.shared.info.path, keeper.recover(findings, renewal)).await;
        recovered.map_err(|error| keeper.shared.named(error))?;
        let handle = StoreHandle {
            shared: keeper.shared.clone(),
        };
        keeper.scrubbing.set(true);
        spawn(keeper.clone().append_loop()).detach();
        spawn(keeper.clone().scrub_loop()).detach();
        spawn(keeper.run(requests)).detach();
        Ok(handle)
    }
}

impl Keeper {
    fn new(
        disk: Disk,
        file: &DiskFile,
        loaded: Loaded,
    ) -> (Rc<Self>, Vec<Finding>, mpsc::UnboundedReceiver<Request>) {
        let Loaded {
            superblock,
            superblock_repair,
            books,
            ring,
            slots,
            findings,
        } = loaded;
        let info = StoreInfo {
            id: superblock.store,
            name: superblock.name.clone(),
            zone: superblock.zone.clone(),
            installation: superblock.installation,
            path: file.path().to_owned(),
            extent_bytes: superblock.layout.extent_bytes,
            extents: superblock.layout.extents,
            medium: classify(file),
        };
        let (shared, requests) = Shared::new(info, superblock.layout, file.clone());
        shared.publish(books.space());
        shared.set_committed(ring.lsn());
        let keeper = Self {
            shared,
            disk,
            layout: superblock.layout,
            superblock,
            superblock_repair: RefCell::new(superblock_repair),
            books: RefCell::new(books),
            slots: RefCell::new(slots),
            slot_lock: Semaphore::new(1),
            applied: Cell::new(ring.lsn()),
            ring: RefCell::new(ring),
            queue: RefCell::default(),
            checkpoint_ready: Cell::new(None),
            checkpoint_running: Cell::new(false),
            work: Notify::default(),
            changed: Notify::default(),
            freed: Cell::new(0),
            scrubbing: Cell::new(false),
            closing: Cell::new(false),
            draining: Cell::new(false),
            stopped: Cell::new(false),
        };
        (Rc::new(keeper), findings, requests)
    }

    /// After reading, with what was read durable: replayed pages are written, slots and superblock are put right.
    async fn recover(&self, mut findings: Vec<Finding>, renewal: Option<Renewal>) -> Result<()> {
        let read = findings.len();
        self.checkpoint_now().await?;
        self.put_slots_right(&mut findings).await?;
        let incarnation = match renewal {
            Some(renewal) => self.renew(renewal, &mut findings).await?,
            None => {
                self.put_superblock_right(&mut findings).await?;
                self.superblock.incarnation
            }
        };
        self.shared.set_incarnation(incarnation);
        self.log(&findings[read..]);
        self.shared.set_findings(findings);
        Ok(())
    }

    fn log(&self, findings: &[Finding]) {
        let store = &self.shared.info.name;
        for finding in findings {
            match finding.severity {
                Severity::Note => tracing::info!(%store, "{}", finding.text),
                Severity::Damage => tracing::warn!(%store, "{}", finding.text),
            }
        }
    }

    /// Writes the superblock copy that is bad or older, from the other one. Where it cannot be written it is named, and costs
    /// nothing else. A failed sync ends it.
    async fn put_superblock_right(&self, findings: &mut Vec<Finding>) -> Result<()> {
        let repair = self.superblock_repair.borrow_mut().take();
        let Some(SuperblockRepair { at, bytes }) = repair else {
            return Ok(());
        };
        tracing::info!(store = %self.shared.info.name, "rewriting a bad or older superblock copy");
        match superblock::write_copy(&self.shared, &self.disk, at, &Rc::new(bytes)).await {
            Ok(()) => Ok(()),
            Err(error) if self.shared.fault().is_some() => Err(error),
            Err(error) => {
                findings.push(Finding::damage(format!(
                    "superblock copy {}: cannot be written ({error}); the store has one copy of it",
                    if at == 0 { "A" } else { "B" }
                )));
                Ok(())
            }
        }
    }

    /// Writes slot copies that are bad, and never the good one; erases what no volume is live in. A copy that cannot be
    /// written is named, and costs nothing else. A failed sync ends it.
    async fn put_slots_right(&self, findings: &mut Vec<Finding>) -> Result<()> {
        let (repair, stale) = {
            let mut slots = self.slots.borrow_mut();
            (
                std::mem::take(&mut slots.repair),
                std::mem::take(&mut slots.stale),
            )
        };
        for Repair {
            number,
            copy,
            sequence,
            slot,
        } in repair
        {
            let volume = slot.volume;
            tracing::info!(store = %self.shared.info.name, %volume, "rewriting a bad slot copy");
            let written = slots::write_copy(&self.shared, &self.disk, number, copy, sequence, &slot).await;
            if let Err(error) = written {
                if self.shared.fault().is_some() {
                    return Err(error);
                }
                findings.push(Finding::damage(format!(
                    "volume {volume}: slot {number}, copy {}: cannot be rewritten ({error}); its keys have one copy here",
                    copy + 1
                )));
            }
        }
        for number in stale.into_iter().filter(|_| !broken(Rule::StaleSlots)) {
            if let Err(error) = slots::erase(&self.shared, &self.disk, number).await {
                if self.shared.fault().is_some() {
                    return Err(error);
                }
                self.books.borrow_mut().retire_slot(number);
                findings.push(Finding::damage(format!(
                    "slot {number}: no volume is live in it, and it cannot be erased ({error}); it is not used again, and \
                     may hold wrapped keys of a destroyed volume"
                )));
            }
        }
        Ok(())
    }

    /// Makes this opening known to the superblock. After recovery: its floor is durable. Returns the incarnation that the
    /// store has then; a copy that cannot be written is named. A failed sync ends it.
    async fn renew(&self, renewal: Renewal, findings: &mut Vec<Finding>) -> Result<Incarnation> {
        assert!(renewal.sequence > self.superblock.sequence, "sequences rise");
        let next = Superblock {
            sequence: renewal.sequence,
            incarnation: renewal.incarnation,
            commit_floor: self.applied.get(),
            ..self.superblock.clone()
        };
        let Renewed { done, failure } =
            superblock::renew(&self.shared, &self.disk, &self.superblock, &next).await?;
        findings.extend(failure.map(Finding::damage));
        Ok(match done {
            true => next.incarnation,
            false => self.superblock.incarnation,
        })
    }

    async fn run(self: Rc<Self>, mut requests: mpsc::UnboundedReceiver<Request>) {
        while let Some(request) = requests.next().await {
            if let Request::Close(reply) = request {
                let result = self.clone().close().await;
                // Requests still queued are dropped with the receiver: their callers hear that the store is closed.
                drop(requests);
                let _ = reply.send(result);
                break;
            }
            self.answer(request);
        }
    }

    fn answer(self: &Rc<Self>, request: Request) {
        match request {
            Request::Reserve(count, reply) => self.clone().reserve(count, reply),
            Request::Unreserve(extents) => {
                self.books.borrow_mut().unreserve(&extents);
                self.books_changed();
            }
            Request::Commit(changes, reply) => {
                self.enqueue(changes.into_iter().map(Step::Change).collect(), reply);
            }
            Request::Rescrub(extents, reply) => {
                self.in_background(reply, async move |this| this.rescrub(extents).await);
            }
            Request::Beat(reply) => self.enqueue_transaction(Transaction {
                steps: Vec::new(),
                beat: true,
                reply,
            }),
            Request::ExtentsOf(dataset, reply) => {
                let books = self.books.borrow();
                let extents = books.check_dataset(dataset).map(|()| books.extents_of(dataset));
                let _ = reply.send(extents.map_err(|e| self.shared.named(e)));
            }
            Request::AddVolume(volume, reply) => self.in_background(reply, async move |this| {
                let (slot, record) = *volume;
                this.add_volume(slot, record).await
            }),
            Request::Volume(volume, reply) => {
                let _ = reply.send(self.volume_state(volume).map_err(|e| self.shared.named(e)));
            }
            Request::Volumes(reply) => {
                let books = self.books.borrow();
                let live = books.volumes().filter(|(_, entry)| !entry.tombstoned);
                let _ = reply.send(Ok(live.map(|(_, entry)| entry.record.volume).collect()));
            }
            Request::Remains(reply) => {
                let books = self.books.borrow();
                let remains = books.volumes().filter(|(_, entry)| entry.tombstoned);
                let _ = reply.send(Ok(remains.map(|(_, entry)| entry.record.volume).collect()));
            }
            Request::SetStores(volume, stores, reply) => {
                self.in_background(reply, async move |this| this.set_stores(volume, stores).await);
            }
            Request::Destroy(volume, give_up, reply) => {
                self.in_background(reply, async move |this| {
                    this.destroy_volume(volume, give_up).await
                });
            }
            Request::Progress(volume, reply) => {
                let _ = reply.send(self.scrub_progress(volume).map_err(|e| self.shared.named(e)));
            }
            Request::Scrubbed(volume, reply) => {
                self.in_background(reply, async move |this| this.scrubbed(volume).await);
            }
            Request::Faulty => {
                self.work.notify_all();
                self.changed.notify_all();
            }
            Request::Close(_) => unreachable!("handled by the loop"),
        }
    }

    fn in_background<T: 'static, F>(self: &Rc<Self>, reply: Reply<T>, work: F)
    where
        F: AsyncFnOnce(&Rc<Self>) -> Result<T> + 'static,
    {
        let this = self.clone();
        spawn(async move {
            let result = work(&this).await.map_err(|e| this.shared.named(e));
            drop(this);
            let _ = reply.send(result);
        })
        .detach();
    }

    /// Commits steps of the keeper's own.
    ///
    /// # Errors
    /// As [`StoreHandle::commit`].
    pub(super) async fn commit(&self, steps: Vec<Step>) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.enqueue(steps, reply);
        answer
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the store is closing")))
    }

    fn enqueue(&self, steps: Vec<Step>, reply: Reply<()>) {
        self.enqueue_transaction(Transaction {
            steps,
            beat: false,
            reply,
        });
    }

    fn enqueue_transaction(&self, transaction: Transaction) {
        if self.stopped.get() {
            let _ = transaction
                .reply
                .send(Err(Error::unavailable("the store is closed")));
            return;
        }
        self.queue.borrow_mut().push_back(transaction);
        self.work.notify_all();
    }

    /// The books have changed: counters for everyone, and a look for those who wait.
    pub(super) fn books_changed(&self) {
        self.shared.publish(self.books.borrow().space());
        self.changed.notify_all();
    }

    fn reserve(self: Rc<Self>, count: u32, reply: Reply<Reserved>) {
        if let Some(result) = self.try_reserve(count) {
            let _ = reply.send(result);
            return;
        }
        spawn(async move {
            loop {
                let freed = self.freed.get();
                let progress = self.changed.until(|| {
                    let result = self.try_reserve(count);
                    (result.is_some() || self.freed.get() != freed).then_some(result)
                });
                let result = match timeout(RESERVE_PATIENCE, progress).await {
                    Some(None) => continue,
                    Some(Some(result)) => result,
                    None => Err(self.no_space(count, "and the scrubber makes no progress")),
                };
                drop(self);
                let _ = reply.send(result);
                return;
            }
        })
        .detach();
    }

    /// `None` while waiting for the scrubber may help.
    fn try_reserve(&self, count: u32) -> Option<Result<Reserved>> {
        if let Err(error) = self.check_open() {
            return Some(Err(error));
        }
        let reserved = self.books.borrow_mut().reserve(count);
        if let Some(extents) = reserved {
            self.shared.publish(self.books.borrow().space());
            return Some(Ok(Reserved::new(extents, &self.shared)));
        }
        let space = self.books.borrow().space();
        let hopeless = u64::from(space.free) + u64::from(space.pending_scrub) < u64::from(count);
        hopeless.then(|| Err(self.no_space(count, "and too few are being scrubbed")))
    }

    fn no_space(&self, count: u32, why: &str) -> Error {
        let free = self.books.borrow().space().free;
        Error::no_space(format!(
            "store \"{}\": {count} extents of {} MiB needed, {free} free {why}; delete volumes or add a store",
            self.shared.info.name,
            self.layout.extent_bytes >> 20
        ))
    }

    /// # Errors
    /// `Unavailable` once the store is faulty or closing.
    pub(super) fn check_open(&self) -> Result<()> {
        self.shared.check_fault()?;
        match self.closing.get() {
            true => Err(Error::unavailable(format!(
                "store \"{}\" is closed",
                self.shared.info.name
            ))),
            false => Ok(()),
        }
    }

    /// Ends scrubber, slot work and appender in that order, since each may still commit, and checkpoints.
    async fn close(self: Rc<Self>) -> Result<()> {
        self.closing.set(true);
        self.shared.set_closed();
        self.changed.notify_all();
        self.changed.until(|| (!self.scrubbing.get()).then_some(())).await;
        let _no_more_slot_work = self.slot_lock.acquire(1).await;
        self.draining.set(true);
        self.work.notify_all();
        self.changed.until(|| self.stopped.get().then_some(())).await;
        if self.shared.check_fault().is_err() {
            return Ok(());
        }
        self.checkpoint_now().await.map_err(|e| self.shared.named(e))
    }
}
