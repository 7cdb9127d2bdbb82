//! The replicas of an open volume: which of them take writes and serve reads, and how one is dropped (I5).
//!
//! | role | takes writes | serves reads | ends when |
//! |---|---|---|---|
//! | InSync | all | yes | it fails a request that another one completes → Dropping |
//! | Dropping | none | no | its staleness is durable, in the register and on all that stay → Stale |
//! | Stale | none; they are remembered ([`super::missed`]) | no | its store is back ([`super::resync`]) → Joining |
//! | Joining | of extents it has caught up with, and new ones | no | it has all → InSync; it fails → Stale |
//! | Vacant | – | – | a store is taken in ([`super::places`]) → Stale |
//!
//! Nobody is told of success while a replica is Dropping: [`Core::settle`] waits, since a cut could bring back a replica
//! that does not know what it has missed. A request that no replica completes fails, and drops nobody: the last replica in
//! sync is never dropped. A request that does not end in time counts as failed; its store is latched, since the transfer
//! may still land ([`Seat::watch`]).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

use futures_util::future::{join, join3, join4};
use slab::Slab;

use super::core::Core;
use super::extent::{Extent, State};
use super::membership::{Membership, Standing};
use super::missed::Missed;
use crate::error::{Error, Kind, Result};
use crate::ids::{Epoch, PhysicalExtent, ReplicaSet, StoreId};
use crate::limits::VOLUME_PLACES_MAX;
use crate::runtime::spawn;
use crate::runtime::sync::Notify;
use crate::sabotage::{Rule, broken};
use crate::store::{Change, Member, StoreHandle, StoreIo};

/// See the module's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Vacant,
    InSync,
    Dropping,
    Stale,
    Joining,
}

/// One place of the volume's list of replicas.
pub(super) struct Seat {
    pub(super) role: Cell<Role>,
    pub(super) store: Cell<StoreId>,
    /// The store's name.
    pub(super) name: RefCell<String>,
    io: RefCell<Option<Rc<StoreIo>>>,
    /// Why it is not in sync.
    pub(super) reason: RefCell<Option<String>>,
    pub(super) full_copy: Cell<bool>,
    /// What it lacks, while it is not in sync.
    pub(super) missed: RefCell<Missed>,
    /// Joining: where the extents are that it has not caught up with.
    pub(super) places: RefCell<BTreeMap<u32, PhysicalExtent>>,
    pub(super) reads_in_flight: Cell<u32>,
    /// Bytes written to it to catch up, since it began to join.
    pub(super) copied_bytes: Cell<u64>,
    /// Counts how often it has begun to join: what an earlier time has left under way must not go on in a later one.
    pub(super) join: Cell<u64>,
    /// Joining: since when, and the extents it has caught up with since.
    pub(super) joined: Cell<Option<(std::time::Duration, u64)>>,
    /// A request of it did not end in time; all others are given up with it.
    gave_up: Cell<bool>,
    requests: RefCell<Slab<Request>>,
    /// The last of them has ended.
    pub(super) idle: Notify,
    /// The watch's clock.
    watch_tick: Cell<u32>,
}

/// A request in flight.
struct Request {
    since: u32,
    waker: Option<Waker>,
}

impl Seat {
    pub(super) fn vacant() -> Self {
        Self {
            role: Cell::new(Role::Vacant),
            store: Cell::new(StoreId::NIL),
            name: RefCell::default(),
            io: RefCell::default(),
            reason: RefCell::default(),
            full_copy: Cell::new(false),
            missed: RefCell::default(),
            places: RefCell::default(),
            reads_in_flight: Cell::new(0),
            copied_bytes: Cell::new(0),
            join: Cell::new(0),
            joined: Cell::new(None),
            gave_up: Cell::new(false),
            requests: RefCell::default(),
            idle: Notify::default(),
            watch_tick: Cell::new(0),
        }
    }

    /// Its store's data path.
    ///
    /// # Errors
    /// `Unavailable` once it was let go, which can happen to a replica out of sync at any time.
    #[inline]
    pub(super) fn io(&self) -> Result<Rc<StoreIo>> {
        self.io.borrow().clone().ok_or_else(|| self.let_go())
    }

    #[cold]
    fn let_go(&self) -> Error {
        Error::unavailable(format!("store \"{}\": it was let go", self.name.borrow()))
    }

    /// Its store's handle, while it has one.
    pub(super) fn handle(&self) -> Option<StoreHandle> {
        self.io.borrow().as_ref().map(|io| io.handle().clone())
    }

    pub(super) fn set_io(&self, io: Option<Rc<StoreIo>>) {
        self.gave_up.set(false);
        self.io.replace(io);
    }

    /// Runs a request of this replica's; given up when the watch says so. The transfer itself may then still be under way.
    pub(super) async fn guard<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let request = InFlight {
            seat: self,
            key: self.requests.borrow_mut().insert(Request {
                since: self.watch_tick.get(),
                waker: None,
            }),
        };
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(result) = work.as_mut().poll(cx) {
                return Poll::Ready(result);
            }
            if self.gave_up.get() {
                return Poll::Ready(Err(self.gone()));
            }
            let mut requests = self.requests.borrow_mut();
            match &mut requests[request.key].waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await
    }

    fn gone(&self) -> Error {
        Error::io(format!(
            "store \"{}\": a request did not end in time",
            self.name.borrow()
        ))
    }

    /// One tick of the watch: a request older than `ticks` gives up on the replica. Its store takes no more writes, for what
    /// is under way may still land.
    pub(super) fn watch(&self, ticks: u32) {
        let now = self.watch_tick.get().wrapping_add(1);
        self.watch_tick.set(now);
        let hung = |request: &Request| now.wrapping_sub(request.since) > ticks;
        if self.gave_up.get() || !self.requests.borrow().iter().any(|(_, request)| hung(request)) {
            return;
        }
        if let Some(io) = &*self.io.borrow()
            && !broken(Rule::HungStoreIsOut)
        {
            io.handle()
                .latch_fault("a request did not end in time; it may still land");
        }
        self.give_up();
    }

    /// Seconds until it has caught up, at the rate so far; `None` while nothing can be said.
    pub(super) fn seconds_left(&self) -> Option<u64> {
        let (started, done) = self.joined.get()?;
        let elapsed = crate::runtime::now().saturating_sub(started).as_secs_f64();
        let left = self.missed.borrow().len() as f64;
        (done > 0 && self.role.get() == Role::Joining).then(|| (elapsed * left / done as f64).ceil() as u64)
    }

    /// Whether none of its requests is in flight. (Those given up are not known here: their store is latched.)
    pub(super) fn is_idle(&self) -> bool {
        self.requests.borrow().is_empty()
    }

    /// All requests in flight end with an error.
    pub(super) fn give_up(&self) {
        self.gave_up.set(true);
        let wakers: Vec<Waker> = {
            let mut requests = self.requests.borrow_mut();
            requests
                .iter_mut()
                .filter_map(|(_, request)| request.waker.take())
                .collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

struct InFlight<'a> {
    seat: &'a Seat,
    key: usize,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut requests = self.seat.requests.borrow_mut();
        requests.remove(self.key);
        if requests.is_empty() {
            drop(requests);
            self.seat.idle.notify_all();
        }
    }
}

/// One value for each replica that was asked, at its place.
pub(super) struct Each<T>(pub(super) [Option<T>; VOLUME_PLACES_MAX]);

impl<T> Each<T> {
    pub(super) fn none() -> Self {
        Self([const { None }; VOLUME_PLACES_MAX])
    }

    /// Place and value of those that were asked.
    pub(super) fn into_iter(self) -> impl Iterator<Item = (usize, T)> {
        self.0
            .into_iter()
            .enumerate()
            .filter_map(|(replica, value)| Some((replica, value?)))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        let values = self.0.iter().enumerate();
        values.filter_map(|(replica, value)| Some((replica, value.as_ref()?)))
    }

    /// Which there are.
    pub(super) fn places(&self) -> ReplicaSet {
        self.iter()
            .fold(ReplicaSet::NONE, |set, (replica, _)| set.with(replica))
    }
}

impl<T> Each<Vec<T>> {
    /// One replica's; empty for one that was not asked.
    pub(super) fn get(&self, replica: usize) -> &[T] {
        self.0[replica].as_deref().unwrap_or_default()
    }
}

/// What is under way, by age: who must not overtake it waits for all that began before.
#[derive(Default)]
pub(super) struct UnderWay {
    next: Cell<u64>,
    running: RefCell<std::collections::BTreeSet<u64>>,
    changed: Notify,
}

impl UnderWay {
    pub(super) fn begin(self: &Rc<Self>) -> Turn {
        let number = self.next.get();
        self.next.set(number + 1);
        self.running.borrow_mut().insert(number);
        Turn(self.clone(), number)
    }

    /// Waits until all that has begun by now has ended.
    pub(super) async fn all_so_far(&self) {
        let now = self.next.get();
        self.changed
            .until(|| {
                self.running
                    .borrow()
                    .first()
                    .is_none_or(|first| *first >= now)
                    .then_some(())
            })
            .await;
    }
}

/// Under way until it drops.
pub(super) struct Turn(Rc<UnderWay>, u64);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.running.borrow_mut().remove(&self.1);
        self.0.changed.notify_all();
    }
}

impl Core {
    fn with_role(&self, role: Role) -> ReplicaSet {
        let mut set = ReplicaSet::NONE;
        for (replica, seat) in self.seats.iter().enumerate() {
            if seat.role.get() == role {
                set = set.with(replica);
            }
        }
        set
    }

    /// Replicas that serve reads and take all writes.
    #[inline]
    pub(super) fn in_sync(&self) -> ReplicaSet {
        self.with_role(Role::InSync)
    }

    #[inline]
    pub(super) fn joining(&self) -> ReplicaSet {
        self.with_role(Role::Joining)
    }

    /// Replicas that take the writes of an extent that is on them.
    #[inline]
    pub(super) fn targets(&self, extent: &Extent) -> ReplicaSet {
        self.in_sync().or(self.joining().and(extent.caught_up.get()))
    }

    /// Replicas that do not get what is written to the extent.
    pub(super) fn lacking(&self, extent: &Extent) -> ReplicaSet {
        let out = [Role::Dropping, Role::Stale].map(|role| self.with_role(role));
        let behind = self.joining().minus(extent.caught_up.get());
        out[0].or(out[1]).or(behind)
    }

    /// Does the same on several replicas at once and waits for all of them.
    pub(super) async fn on<T, F>(
        &self,
        replicas: ReplicaSet,
        each: impl Fn(usize, Rc<StoreIo>) -> F,
    ) -> Each<Result<T>>
    where
        F: Future<Output = Result<T>>,
    {
        let mut places = [0; VOLUME_PLACES_MAX];
        let count = replicas.len();
        for (place, replica) in places.iter_mut().zip(replicas.iter()) {
            *place = replica;
        }
        let ask = |nth: usize| {
            let seat = &self.seats[places[nth]];
            let work = seat.io().map(|io| each(places[nth], io));
            seat.guard(async move { work?.await })
        };
        let mut results = Each::none();
        match count {
            0 => {}
            1 => results.0[places[0]] = Some(ask(0).await),
            2 => {
                let (a, b) = join(ask(0), ask(1)).await;
                results.0[places[0]] = Some(a);
                results.0[places[1]] = Some(b);
            }
            3 => {
                let (a, b, c) = join3(ask(0), ask(1), ask(2)).await;
                for (nth, result) in [a, b, c].into_iter().enumerate() {
                    results.0[places[nth]] = Some(result);
                }
            }
            _ => {
                let (a, b, c, d) = join4(ask(0), ask(1), ask(2), ask(3)).await;
                for (nth, result) in [a, b, c, d].into_iter().enumerate() {
                    results.0[places[nth]] = Some(result);
                }
            }
        }
        results
    }

    /// Judges results: replicas that failed what another one completed are dropped, durably, before this returns. Returns
    /// the values of those that completed.
    ///
    /// # Errors
    /// `Io` when no replica in sync completed it (nobody is dropped then), or the volume has stopped.
    #[inline]
    pub(super) async fn settle<T>(&self, results: Each<Result<T>>) -> Result<Each<T>> {
        let mut values = Each::none();
        let mut failed = Vec::new();
        let mut completed = ReplicaSet::NONE;
        for (replica, result) in results.into_iter() {
            match result {
                Ok(value) => {
                    values.0[replica] = Some(value);
                    completed = completed.with(replica);
                }
                Err(error) => failed.push((replica, error)),
            }
        }
        if !failed.is_empty() || self.dropping.get() > 0 || completed.and(self.in_sync()).is_empty() {
            self.drop_failed(completed, failed).await?;
        }
        Ok(values)
    }

    #[cold]
    async fn drop_failed(&self, completed: ReplicaSet, failed: Vec<(usize, Error)>) -> Result<()> {
        let mut first = None;
        let mut leaving = Vec::new();
        for (replica, error) in failed {
            match self.seats[replica].role.get() {
                Role::Joining => self.stop_joining(replica, &error.to_string()),
                Role::InSync => leaving.push((replica, error.to_string())),
                // Somebody else has seen it first.
                Role::Dropping | Role::Stale | Role::Vacant => {}
            }
            first = first.or(Some(error));
        }
        if completed.and(self.in_sync()).is_empty() && !broken(Rule::KeepTheLast) {
            let error = first.map_or_else(
                || "the replica that completed it was dropped".into(),
                |e| e.to_string(),
            );
            return Err(Error::io(format!(
                "volume {}: no replica in sync could do it: {error}",
                self.label
            )));
        }
        for (replica, reason) in leaving {
            self.begin_drop(replica, reason);
        }
        if broken(Rule::StaleBeforeAnswer) {
            return Ok(());
        }
        self.wait_for(|| (self.dropping.get() == 0).then_some(())).await
    }

    /// As [`Core::settle`], for what the volume cannot go on without (its metadata, its flushes).
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    pub(super) async fn settle_or_stop<T>(&self, results: Each<Result<T>>) -> Result<Each<T>> {
        self.settle(results).await.map_err(|error| self.fail(&error))
    }

    /// The replica takes nothing more from now on; a task makes that durable.
    fn begin_drop(&self, replica: usize, reason: String) {
        let seat = &self.seats[replica];
        tracing::error!(volume = %self.label, store = %seat.name.borrow(), "replica dropped: {reason}");
        self.begin_leaving(replica, reason);
    }

    /// As when it is dropped, for a replica that is to go.
    pub(super) fn begin_leaving(&self, replica: usize, reason: String) {
        let seat = &self.seats[replica];
        assert!(
            self.in_sync().len() > 1,
            "the last replica in sync is never dropped"
        );
        seat.role.set(Role::Dropping);
        seat.reason.replace(Some(reason));
        self.miss_all_marked(seat);
        self.dropping.set(self.dropping.get() + 1);
        self.changed.notify_all();
        if let Some(core) = self.myself.upgrade() {
            let running = self.background.enter();
            spawn(async move {
                core.write_down_membership().await;
                drop(running);
            })
            .detach();
        }
    }

    /// What is marked now may differ on a replica that goes: it is compared when it comes back.
    fn miss_all_marked(&self, seat: &Seat) {
        if broken(Rule::MissMarked) {
            return;
        }
        let mut missed = seat.missed.borrow_mut();
        for extent in &*self.dirty.borrow() {
            missed.all_of(extent.index.0);
        }
        if self.recovering.get() > 0 {
            let waits =
                |extent: &&Rc<Extent>| matches!(extent.state.get(), State::Unreconciled | State::Reconciling);
            let extents = self.extents.borrow();
            extents
                .values()
                .filter(waits)
                .for_each(|extent| missed.all_of(extent.index.0));
        }
    }

    /// A replica that was catching up has failed; it was stale all the time.
    pub(super) fn stop_joining(&self, replica: usize, reason: &str) {
        let seat = &self.seats[replica];
        if seat.role.get() != Role::Joining {
            return;
        }
        let copied_bytes = seat.copied_bytes.get();
        tracing::warn!(volume = %self.label, store = %seat.name.borrow(), copied_bytes, "replica stops catching up: {reason}");
        seat.role.set(Role::Stale);
        seat.reason.replace(Some(reason.to_owned()));
        seat.places.borrow_mut().clear();
        self.miss_all_marked(seat);
        self.changed.notify_all();
    }

    /// Drops a replica that failed where the others are known to hold what it should, and waits until that is durable.
    ///
    /// # Errors
    /// `Io` when it is the last one in sync (it stays), or the volume has stopped.
    pub(super) async fn drop_replica(&self, replica: usize, error: Error) -> Result<()> {
        if self.seats[replica].role.get() == Role::InSync {
            if self.in_sync().len() == 1 {
                return Err(error.context(format!("volume {}", self.label)));
            }
            self.begin_drop(replica, error.to_string());
        }
        self.wait_for(|| (self.dropping.get() == 0).then_some(())).await
    }

    /// The membership as it stands in memory.
    pub(super) fn membership_now(&self) -> Membership {
        let members = self.seats[..self.places.get()].iter().map(|seat| Standing {
            store: seat.store.get(),
            state: match seat.role.get() {
                Role::InSync => Member::InSync,
                Role::Vacant => Member::Vacant,
                Role::Dropping | Role::Stale | Role::Joining => Member::Stale,
            },
            reason: seat.reason.borrow().clone(),
            full_copy: seat.full_copy.get(),
        });
        Membership {
            epoch: self.epoch.get(),
            members: members.collect(),
        }
    }

    /// Makes the present roles durable: in the register, then in every store that is in sync. Replicas that were Dropping
    /// when it began are Stale when it ends.
    pub(super) async fn write_down_membership(&self) {
        let _turn = self.membership.acquire(1).await;
        while self.check().is_ok() {
            let dropping = self.with_role(Role::Dropping);
            let next = Membership {
                epoch: Epoch(self.epoch.get().0 + 1),
                ..self.membership_now()
            };
            if let Err(error) = self.register.swap(self.id, self.epoch.get(), &next).await {
                self.fail(&error.context("its membership cannot be written down"));
                return;
            }
            self.epoch.set(next.epoch);
            let told = self.write_members(&next).await;
            for replica in dropping.iter() {
                let seat = &self.seats[replica];
                seat.role.set(Role::Stale);
                self.dropping.set(self.dropping.get() - 1);
                tracing::warn!(volume = %self.label, store = %seat.name.borrow(), epoch = %next.epoch, "replica is stale");
            }
            for (replica, told) in told.into_iter() {
                let Err(error) = told else { continue };
                if self.seats[replica].role.get() != Role::InSync {
                    continue;
                }
                if self.in_sync().len() == 1 {
                    self.fail(&error);
                    return;
                }
                self.begin_drop(replica, error.to_string());
            }
            self.changed.notify_all();
            if self.with_role(Role::Dropping).is_empty() {
                return;
            }
        }
    }

    /// Writes the membership to the stores in sync.
    pub(super) async fn write_members(&self, membership: &Membership) -> Each<Result<()>> {
        let members: Vec<Member> = membership.members.iter().map(|standing| standing.state).collect();
        let change = Change::SetMembers {
            volume: self.id,
            epoch: membership.epoch,
            members,
        };
        if broken(Rule::TellTheStores) {
            return Each::none();
        }
        self.on(self.in_sync(), |_, io| {
            let change = change.clone();
            async move { io.handle().commit(vec![change]).await }
        })
        .await
    }

    /// What is written to these blocks is missed by replicas that are out. The caller holds them exclusively.
    #[inline]
    pub(super) fn note_missed(&self, extent: &Extent, blocks: std::ops::Range<u32>) {
        let lacking = self.lacking(extent);
        if !lacking.is_empty() {
            self.note_missed_by(lacking, extent, blocks);
        }
    }

    #[cold]
    fn note_missed_by(&self, lacking: ReplicaSet, extent: &Extent, blocks: std::ops::Range<u32>) {
        for replica in lacking.iter() {
            let mut missed = self.seats[replica].missed.borrow_mut();
            missed.blocks(extent.index.0, blocks.clone(), self.shape.blocks);
        }
    }

    /// Whether an error means that the replica failed, not that there was no room.
    pub(super) fn is_full(error: &Error) -> bool {
        error.kind() == Kind::NoSpace
    }
}
