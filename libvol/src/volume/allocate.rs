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

use super::core::{Core, Each};
use super::extent::{Extent, ForWrite, Pinned, State};
use crate::error::{Error, Kind, Result};
use crate::ids::{ExtentIndex, PhysicalExtent};
use crate::limits::{VOLUME_EXTENTS_AHEAD, VOLUME_EXTENTS_PER_COMMIT};
use crate::runtime::{now, sleep, spawn};
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
        self.dirty.borrow().len() >= self.tuning.dirty_extents_max
    }

    /// This volume has as many marks as it may: waits for the cleaner.
    async fn wait_for_marks(&self) -> Result<()> {
        let _wanted = MarkWanted::new(self);
        self.wait_for(|| (!self.marks_full()).then_some(())).await
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
            || self
                .replicas
                .iter()
                .any(|io| io.handle().space().free < FREE_EXTENTS_FOR_AHEAD + count);
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
        if (batch.len() as u32) < ahead.div_ceil(2) {
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
            Err(error) if error.kind() == Kind::NoSpace => {
                for extent in batch {
                    let back = match extent.state.get() {
                        State::Allocating => State::Absent,
                        _ => State::Clean,
                    };
                    self.turn(extent, back);
                }
            }
            // The volume has stopped; whoever waits for these extents hears of it.
            Err(_) => {}
        }
        result
    }

    async fn commit_marks(self: &Rc<Self>, batch: &[Rc<Extent>]) -> Result<()> {
        let is_new = |extent: &&Rc<Extent>| extent.state.get() == State::Allocating;
        for extent in batch.iter().filter(|extent| !is_new(extent)) {
            self.load_sums(extent).await?;
        }
        let new_count = batch.iter().filter(is_new).count() as u32;
        let reserved = self.reserve(new_count).await?;
        let changes: Vec<Vec<Change>> = (0..self.replicas.len())
            .map(|replica| self.changes(batch, replica, &reserved[replica]))
            .collect();
        let changes = &changes;
        let results = self
            .on_all(|replica, io| self.commit_patiently(io, &changes[replica]))
            .await;
        self.check_commits(results, changes, &reserved).await?;
        for (new, extent) in batch.iter().filter(is_new).enumerate() {
            let places: Vec<PhysicalExtent> = reserved.iter().map(|extents| extents[new]).collect();
            extent.places.set(Self::places_of(&places));
            extent.sequence.set(0);
            self.allocated.set(self.allocated.get() + 1);
            self.cache.put(extent, self.holes());
        }
        Ok(())
    }

    fn changes(&self, batch: &[Rc<Extent>], replica: usize, reserved: &[PhysicalExtent]) -> Vec<Change> {
        let mut reserved = reserved.iter();
        let change = |extent: &Rc<Extent>| match extent.state.get() {
            State::Allocating => Change::Allocate {
                physical: *reserved.next().expect("one was reserved for each"),
                dataset: self.dataset,
                logical: extent.index,
                key_version: self.key_version,
            },
            _ => Change::Mark(extent.places.get()[replica]),
        };
        batch.iter().map(change).collect()
    }

    /// Sets extents aside on every replica, or on none.
    async fn reserve(&self, count: u32) -> Result<Vec<Vec<PhysicalExtent>>> {
        if count == 0 {
            return Ok(vec![Vec::new(); self.replicas.len()]);
        }
        let results = self.on_all(|_, io| io.handle().reserve(count)).await;
        let mut reserved = Vec::new();
        let mut refused = None;
        for (replica, result) in results.0.into_iter().flatten().enumerate() {
            match result {
                Ok(extents) => reserved.push((replica, extents)),
                Err(error) if error.kind() == Kind::NoSpace => refused = refused.or(Some(error)),
                Err(error) => refused = Some(self.fail(replica, &error)),
            }
        }
        match refused {
            None => Ok(reserved.into_iter().map(|(_, extents)| extents).collect()),
            Some(error) => {
                for (replica, extents) in reserved {
                    self.replicas[replica].handle().unreserve(extents);
                }
                Err(error)
            }
        }
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
            match io.handle().commit(changes.to_vec()).await {
                Err(error) if error.kind() == Kind::NoSpace && self.check().is_ok() && now() < deadline => {
                    wanted.get_or_insert_with(|| MarkWanted::new(self));
                    sleep(MARK_RETRY).await;
                }
                result => return result,
            }
        }
    }

    /// All commits went through, or all are taken back: refused for marks on some, undone on the others.
    async fn check_commits(
        &self,
        results: Each<Result<()>>,
        changes: &[Vec<Change>],
        reserved: &[Vec<PhysicalExtent>],
    ) -> Result<()> {
        let mut done = Vec::new();
        let mut refused: Vec<(usize, Error)> = Vec::new();
        for (replica, result) in results.0.into_iter().flatten().enumerate() {
            match result {
                Ok(()) => done.push(replica),
                Err(error) if error.kind() == Kind::NoSpace => refused.push((replica, error)),
                Err(error) => return Err(self.fail(replica, &error)),
            }
        }
        let mut why = None;
        for (replica, error) in refused {
            self.replicas[replica]
                .handle()
                .unreserve(reserved[replica].clone());
            why = Some(error);
        }
        let Some(why) = why else { return Ok(()) };
        for replica in done {
            let undo = changes[replica].iter().map(opposite).collect();
            let undone = self.replicas[replica].handle().commit(undo).await;
            undone.map_err(|error| self.fail(replica, &error))?;
        }
        Err(why)
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

fn opposite(change: &Change) -> Change {
    match change {
        Change::Allocate { physical, .. } => Change::Release(*physical),
        Change::Mark(physical) => Change::ClearMark(*physical),
        other => unreachable!("{other:?} sets no mark"),
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
