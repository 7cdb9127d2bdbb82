//! Getting an extent ready for writes: allocated and marked on every replica, its sums in memory.
//!
//! Space is reserved on all replicas before anything is committed, so a full store is `NoSpace` and changes nothing. Then
//! one commit per replica allocates and marks; only when all are durable does the extent become Dirty and a write go out.
//! A store without room for marks makes the cleaner work on the oldest extents, and the commit is tried again.
//!
//! A cut between the commits leaves the extent marked on some replicas; [`super::recover`] has the table for that.
//!
//! Writers that go through the volume in order get the next extents ready ahead, in the same commit: 1, 2, 4, then 8.
//! Unused ones hold nothing but holes, and the cleaner gives those back.

use std::rc::Rc;
use std::time::Duration;

use super::core::Core;
use super::extent::{Extent, ForWrite, Pinned, Places, State};
use super::replicas::{Each, Role};
use crate::error::{Error, Kind, Result};
use crate::ids::{ExtentIndex, PhysicalExtent, ReplicaSet};
use crate::limits::{VOLUME_EXTENTS_AHEAD, VOLUME_EXTENTS_PER_COMMIT};
use crate::runtime::{now, sleep, spawn};
use crate::sabotage::{Rule, broken};
use crate::store::{Change, StoreIo};

/// Free extents below which nothing is allocated ahead.
const FREE_EXTENTS_FOR_AHEAD: u32 = 64;

/// Between two tries of a commit that found no room for marks.
const MARK_RETRY: Duration = Duration::from_millis(10);

impl Core {
    /// The extent, ready for writes and pinned; allocated if need be.
    ///
    /// # Errors
    /// `NoSpace`; `Io`.
    #[inline]
    pub(super) async fn writable(self: &Rc<Self>, index: ExtentIndex) -> Result<Pinned> {
        let extent = self.extent_or_new(index);
        if let Some(pinned) = extent.pin() {
            if extent.ahead.get() {
                self.writer_came(&extent);
            }
            return Ok(pinned);
        }
        let pinned = Box::pin(self.become_writable(&extent, true)).await?;
        if extent.ahead.get() {
            self.writer_came(&extent);
        }
        Ok(pinned.expect("it was to be allocated"))
    }

    /// The same, but `None` when it is not allocated.
    ///
    /// # Errors
    /// `NoSpace` when no mark can be had; `Io`.
    pub(super) async fn writable_if_present(self: &Rc<Self>, index: ExtentIndex) -> Result<Option<Pinned>> {
        match self.extent(index) {
            None => Ok(None),
            Some(extent) => Box::pin(self.become_writable(&extent, false)).await,
        }
    }

    async fn become_writable(self: &Rc<Self>, extent: &Rc<Extent>, allocate: bool) -> Result<Option<Pinned>> {
        loop {
            self.check()?;
            if let Some(pinned) = extent.pin() {
                return Ok(Some(pinned));
            }
            match extent.state.get().for_write() {
                ForWrite::GoOn | ForWrite::CancelCleaning => unreachable!("it would be pinned"),
                ForWrite::Allocate if !allocate => return Ok(None),
                ForWrite::Allocate | ForWrite::Mark if self.marks_full() => self.wait_for_marks().await?,
                ForWrite::Allocate | ForWrite::Mark => self.mark_with_followers(extent).await?,
                ForWrite::Reconcile => self.reconcile_now(extent).await?,
                ForWrite::Wait => {
                    self.wait_for(|| (extent.state.get().for_write() != ForWrite::Wait).then_some(()))
                        .await?;
                }
            }
        }
    }

    fn marks_full(&self) -> bool {
        let dirty = self.dirty.borrow();
        // The cleaner gives back none of the others.
        let cleanable = || dirty.iter().filter(|extent| !extent.unread.get()).count();
        dirty.len() >= self.tuning.dirty_extents_max && cleanable() >= self.tuning.dirty_extents_max
    }

    /// This volume has as many marks as it may: waits for the cleaner.
    async fn wait_for_marks(&self) -> Result<()> {
        let _wanted = MarkWanted::new(self);
        self.wait_for(|| (!self.marks_full() || self.stop.get()).then_some(()))
            .await?;
        // Requests end before the cleaner does; a replica that catches up may not have.
        match self.marks_full() {
            true => Err(Error::unavailable(format!("volume {} is closing", self.label))),
            false => Ok(()),
        }
    }

    async fn mark_with_followers(self: &Rc<Self>, extent: &Rc<Extent>) -> Result<()> {
        let mut batch = vec![extent.clone()];
        let streak = self.note_sequence(extent.index);
        batch.extend(self.followers(extent.index, ahead_for(streak)));
        begin_marking(&batch);
        match self.make_dirty(&batch, 1).await {
            // What was wanted ahead may be what did not fit. The states are as before, and nobody has run since.
            Err(error) if error.kind() == Kind::NoSpace && batch.len() > 1 => {
                begin_marking(&batch[..1]);
                self.make_dirty(&batch[..1], 1).await
            }
            result => result,
        }
    }

    /// Counts how many extents in a row were first written in order.
    fn note_sequence(&self, index: ExtentIndex) -> u32 {
        let (last, streak) = self.sequence_at.get();
        let streak = match index.0.wrapping_sub(last) {
            0 => streak,
            1 => streak.saturating_add(1),
            _ => 0,
        };
        self.sequence_at.set((index.0, streak));
        streak
    }

    /// Up to `count` extents behind `index` that are not ready, unless space or marks are scarce.
    fn followers(&self, index: ExtentIndex, count: u32) -> Vec<Rc<Extent>> {
        let marks_after = self.dirty.borrow().len() + count as usize;
        let scarce = self.marks_wanted.get() > 0
            || marks_after > self.tuning.dirty_extents_max / 2
            || self.in_sync().iter().any(|replica| {
                let space = self.seats[replica].handle().map(|handle| handle.space());
                space.is_none_or(|space| space.free < FREE_EXTENTS_FOR_AHEAD + count)
            });
        if count == 0 || scarce {
            return Vec::new();
        }
        let end = self.size_bytes.get().div_ceil(self.shape.extent_bytes);
        (index.0 + 1..=index.0.saturating_add(count))
            .take_while(|i| u64::from(*i) < end)
            .map(|i| self.extent_or_new(ExtentIndex(i)))
            .filter(|extent| matches!(extent.state.get(), State::Absent | State::Clean))
            .collect()
    }

    /// A sequential writer reaches an extent made ready ahead: the next ones are made ready behind its back.
    #[cold]
    fn writer_came(self: &Rc<Self>, extent: &Rc<Extent>) {
        extent.ahead.set(false);
        let ahead = ahead_for(self.note_sequence(extent.index));
        let batch = self.followers(extent.index, ahead);
        // Half of the way is still ready: later is soon enough, and then for more at once.
        if batch.is_empty() || (batch.len() as u32) < ahead.div_ceil(2) {
            return;
        }
        let Ok(in_flight) = self.begin(0, 0) else { return };
        begin_marking(&batch);
        let core = self.clone();
        spawn(async move {
            // Without space, or stopped, the writer finds out by itself.
            let _ = core.make_dirty(&batch, 0).await;
            drop(in_flight);
        })
        .detach();
    }

    /// Marks clean extents of the list in one commit, as far as marks are at hand; who needs one later gets it alone.
    ///
    /// # Errors
    /// `Io`.
    pub(super) async fn mark_together(self: &Rc<Self>, extents: &[Rc<Extent>]) -> Result<()> {
        let clean = extents.iter().filter(|extent| extent.state.get() == State::Clean);
        let room = self
            .tuning
            .dirty_extents_max
            .saturating_sub(self.dirty.borrow().len());
        let batch: Vec<_> = clean.take(room.min(VOLUME_EXTENTS_PER_COMMIT)).cloned().collect();
        if batch.is_empty() {
            return Ok(());
        }
        begin_marking(&batch);
        match self.make_dirty(&batch, batch.len()).await {
            Err(error) if error.kind() == Kind::NoSpace => Ok(()),
            result => result,
        }
    }

    /// Takes extents in Allocating and Marking to Dirty, or, without space, back to where they were. Those from `ahead` on
    /// are for a writer that has not come yet.
    ///
    /// # Errors
    /// `NoSpace`; `Io`, the volume has then stopped.
    async fn make_dirty(self: &Rc<Self>, batch: &[Rc<Extent>], ahead: usize) -> Result<()> {
        let result = self.commit_marks(batch).await;
        match &result {
            Ok(()) => {
                for (place, extent) in batch.iter().enumerate() {
                    extent.last_write.set(self.tick.get());
                    extent.ahead.set(place >= ahead);
                    self.turn(extent, State::Dirty);
                }
            }
            // The volume has stopped; whoever waits for these extents hears of it.
            Err(_) if self.check().is_err() => {}
            // Nothing was committed, or it was taken back.
            Err(_) => {
                for extent in batch {
                    let back = match extent.state.get() {
                        State::Allocating => State::Absent,
                        _ => State::Clean,
                    };
                    self.turn(extent, back);
                }
            }
        }
        result
    }

    async fn commit_marks(self: &Rc<Self>, batch: &[Rc<Extent>]) -> Result<()> {
        let is_new = |extent: &Rc<Extent>| extent.state.get() == State::Allocating;
        for extent in batch.iter().filter(|extent| !is_new(extent)) {
            self.load_sums(extent).await?;
        }
        // Decided once: roles may change while it is under way. A replica that begins to join meanwhile is not among them,
        // and waits for this to end before it is believed to have everything.
        let _under_way = self.marking.begin();
        let gets: Vec<ReplicaSet> = batch.iter().map(|extent| self.gets(extent)).collect();
        let plan = Plan { batch, gets: &gets };
        let reserved = self.reserve(&plan).await?;
        let results = self
            .on(plan.replicas().and(self.taking_writes()), |replica, io| {
                let changes = plan.changes(self, replica, reserved.get(replica));
                async move { self.commit_patiently(&io, &changes).await }
            })
            .await;
        let done = self.check_commits(results, &plan, &reserved).await?;
        let mut left = reserved;
        for (extent, gets) in batch.iter().zip(&gets) {
            if !is_new(extent) {
                continue;
            }
            let mut places = Places::default();
            for replica in gets.iter() {
                if let Some(reserved) = &mut left.0[replica] {
                    places[replica] = reserved.remove(0);
                }
            }
            extent.places.set(places);
            extent.caught_up.set(gets.and(done));
            extent.sequence.set(0);
            self.allocated.set(self.allocated.get() + 1);
            self.cache.put(extent, self.holes());
            // Who was not asked, or has failed, may hold something else in its place.
            for replica in self.lacking(extent).iter() {
                self.seats[replica].missed.borrow_mut().all_of(extent.index.0);
            }
        }
        Ok(())
    }

    /// The replicas that an extent is about to be allocated or marked on. A replica that joins gets new ones, unless it
    /// still has an old one in its place.
    fn gets(&self, extent: &Extent) -> ReplicaSet {
        if extent.state.get() != State::Allocating {
            return self.targets(extent);
        }
        let mut gets = self.in_sync();
        for replica in self.joining().iter() {
            if !self.seats[replica].places.borrow().contains_key(&extent.index.0) {
                gets = gets.with(replica);
            }
        }
        gets
    }

    fn taking_writes(&self) -> ReplicaSet {
        self.in_sync().or(self.joining())
    }

    /// Sets extents aside for the new ones of the batch on every replica that gets them, or on none.
    ///
    /// # Errors
    /// `NoSpace` when a replica in sync has no room; `Io`.
    async fn reserve(&self, plan: &Plan<'_>) -> Result<Each<Vec<PhysicalExtent>>> {
        let mut results = self
            .on(plan.replicas().and(self.taking_writes()), |replica, io| {
                let count = plan.new_extents(replica);
                async move {
                    match count {
                        0 => Ok(Vec::new()),
                        count => io.handle().reserve(count).await,
                    }
                }
            })
            .await;
        match self.take_refused(&mut results) {
            None => self.settle_or_stop(results).await,
            Some(error) => {
                for (replica, result) in results.into_iter() {
                    if let (Ok(extents), Some(handle)) = (result, self.seats[replica].handle()) {
                        handle.unreserve(extents);
                    }
                }
                Err(error)
            }
        }
    }

    /// Takes out what was refused for lack of room. A replica that joins stops joining; one in sync refuses for all.
    fn take_refused<T>(&self, results: &mut Each<Result<T>>) -> Option<Error> {
        let mut refused = None;
        for (replica, result) in results.0.iter_mut().enumerate() {
            let full = result.take_if(|result| matches!(result, Err(error) if Self::is_full(error)));
            let Some(Err(error)) = full else { continue };
            match self.seats[replica].role.get() {
                Role::Joining => self.stop_joining(replica, &error.to_string()),
                Role::InSync => refused = refused.or(Some(error)),
                Role::Dropping | Role::Stale | Role::Vacant => {}
            }
        }
        refused
    }

    /// Commits changes that set marks; while the store has no room for them, the cleaner is urged on.
    ///
    /// # Errors
    /// As the store's commit; `NoSpace` when no mark came free for [`super::core::Tuning::mark_patience`].
    pub(super) async fn commit_patiently(&self, io: &StoreIo, changes: &[Change]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let deadline = now() + self.tuning.mark_patience;
        let mut wanted = None;
        loop {
            if broken(Rule::DurableFirst) {
                let (handle, changes) = (io.handle().clone(), changes.to_vec());
                spawn(async move { handle.commit(changes).await }).detach();
                return Ok(());
            }
            match io.handle().commit(changes.to_vec()).await {
                Err(error) if error.kind() == Kind::NoSpace && self.check().is_ok() && now() < deadline => {
                    wanted.get_or_insert_with(|| MarkWanted::new(self));
                    sleep(MARK_RETRY).await;
                }
                result => return result,
            }
        }
    }

    /// All commits went through, or all are taken back: refused for marks on some, undone on the others. Returns the
    /// replicas that have committed.
    async fn check_commits(
        &self,
        mut results: Each<Result<()>>,
        plan: &Plan<'_>,
        reserved: &Each<Vec<PhysicalExtent>>,
    ) -> Result<ReplicaSet> {
        let asked = results.places();
        let refused = self.take_refused(&mut results);
        for replica in asked.minus(results.places()).iter() {
            if let Some(handle) = self.seats[replica].handle() {
                handle.unreserve(reserved.get(replica).to_vec());
            }
        }
        let Some(why) = refused else {
            return Ok(self.settle_or_stop(results).await?.places());
        };
        let done = results.iter().filter(|(_, result)| result.is_ok());
        let done = done.fold(ReplicaSet::NONE, |set, (replica, _)| set.with(replica));
        let undone = self
            .on(done, |replica, io| {
                let changes = plan.changes(self, replica, reserved.get(replica));
                let undo: Vec<Change> = changes
                    .iter()
                    .map(|change| self.opposite(change, plan.batch, replica))
                    .collect();
                async move { io.handle().commit(undo).await }
            })
            .await;
        // Failures of the commits and of the undoing alike: who refused has completed what the others are taken back to.
        for (replica, result) in results.into_iter().chain(undone.into_iter()) {
            match result {
                Err(error) if self.seats[replica].role.get() == Role::Joining => {
                    self.stop_joining(replica, &error.to_string());
                }
                Err(error) => {
                    if let Err(last) = self.drop_replica(replica, error).await {
                        return Err(self.fail(&last));
                    }
                }
                Ok(()) => {}
            }
        }
        Err(why)
    }

    fn opposite(&self, change: &Change, batch: &[Rc<Extent>], replica: usize) -> Change {
        match change {
            Change::Allocate { physical, .. } => Change::Release(*physical),
            Change::Mark(physical) => {
                let extent = batch.iter().find(|extent| {
                    extent.state.get() == State::Marking && extent.places.get()[replica] == *physical
                });
                Change::ClearMark {
                    physical: *physical,
                    missed_by: extent.map_or(ReplicaSet::NONE, |extent| self.lacking(extent)),
                }
            }
            other => unreachable!("{other:?} sets no mark"),
        }
    }
}

/// Extents to allocate or mark, and on which replicas each.
struct Plan<'a> {
    batch: &'a [Rc<Extent>],
    gets: &'a [ReplicaSet],
}

impl Plan<'_> {
    fn replicas(&self) -> ReplicaSet {
        self.gets.iter().fold(ReplicaSet::NONE, |all, gets| all.or(*gets))
    }

    fn of(&self, replica: usize) -> impl Iterator<Item = &Rc<Extent>> {
        let each = self.batch.iter().zip(self.gets);
        each.filter_map(move |(extent, gets)| gets.contains(replica).then_some(extent))
    }

    fn new_extents(&self, replica: usize) -> u32 {
        let new = self
            .of(replica)
            .filter(|extent| extent.state.get() == State::Allocating);
        new.count() as u32
    }

    fn changes(&self, core: &Core, replica: usize, reserved: &[PhysicalExtent]) -> Vec<Change> {
        let mut reserved = reserved.iter();
        let change = |extent: &Rc<Extent>| match extent.state.get() {
            State::Allocating => Change::Allocate {
                physical: *reserved.next().expect("one was reserved for each"),
                dataset: core.dataset,
                logical: extent.index,
                key_version: core.key_version,
            },
            _ => Change::Mark(extent.places.get()[replica]),
        };
        let unmarked = |extent: &&Rc<Extent>| broken(Rule::Mark) && extent.state.get() == State::Marking;
        self.of(replica)
            .filter(|extent| !unmarked(extent))
            .map(change)
            .collect()
    }
}

fn begin_marking(batch: &[Rc<Extent>]) {
    for extent in batch {
        extent.state.set(match extent.state.get() {
            State::Absent => State::Allocating,
            State::Clean => State::Marking,
            other => unreachable!("{other:?} extents are not marked"),
        });
    }
}

/// Extents to have ready for a writer that came through so many in order.
fn ahead_for(streak: u32) -> u32 {
    match streak {
        0 => 0,
        _ => (1 << (streak - 1).min(16)).min(VOLUME_EXTENTS_AHEAD),
    }
}

/// Somebody waits for a mark, until this drops.
struct MarkWanted<'a>(&'a Core);

impl<'a> MarkWanted<'a> {
    fn new(core: &'a Core) -> Self {
        core.marks_wanted.set(core.marks_wanted.get() + 1);
        core.changed.notify_all();
        Self(core)
    }
}

impl Drop for MarkWanted<'_> {
    fn drop(&mut self) {
        self.0.marks_wanted.set(self.0.marks_wanted.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_ahead_doubles_up_to_its_limit() {
        let ahead: Vec<u32> = (0..7).map(ahead_for).collect();
        assert_eq!(ahead, [0, 1, 2, 4, 8, 8, 8]);
        assert_eq!(ahead_for(u32::MAX), VOLUME_EXTENTS_AHEAD);
    }
}
