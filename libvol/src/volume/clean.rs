//! The cleaner: takes marks away again once nothing is written to an extent for a while.
//!
//! For a batch of extents nobody is writing to:
//!
//! 1. Dirty → Cleaning; their checksum areas, one sequence higher, go to every replica;
//! 2. every replica is synced, data and areas;
//! 3. those that no write has touched meanwhile: Cleaning → Clearing, and one commit per replica clears their marks, and
//!    notes which replicas are out and so lack what was written;
//! 4. → Clean.
//!
//! A write that comes before step 3 makes its extent Dirty again, and its mark stays; one that comes during step 3 waits
//! and marks again. An extent with blocks that recovery could not read keeps its mark: an area that
//! knows nothing of them would give up for good what the device may return another time. When marks are scarce (this volume has as many as it may, or the store nearly so) the extents that
//! were written least recently are cleaned, idle or not.

use std::rc::Rc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;

use super::core::Core;
use super::extent::{Extent, State};
use crate::error::Result;
use crate::ids::ReplicaSet;
use crate::limits::{DIRTY_MARKS_PER_STORE, VOLUME_EXTENTS_PER_COMMIT};
use crate::runtime::{now, sleep, timeout};
use crate::sabotage::{Rule, broken};
use crate::store::{Change, SumArea};

/// Area writes in flight on each replica.
const AREAS_AT_A_TIME: usize = 16;

/// When marks are scarce and every extent is being written to, the cleaner looks again after this.
const SCARCE_RETRY: Duration = Duration::from_millis(5);

impl Core {
    /// The background task. Ends when told to stop, or with the volume.
    pub(super) async fn clean_in_background(self: Rc<Self>) {
        let started = now();
        while !self.stop.get() && self.check().is_ok() {
            let urged = self
                .changed
                .until(|| (self.stop.get() || self.check().is_err() || self.marks_scarce()).then_some(()));
            let urged = timeout(self.tuning.tick, urged).await.is_some();
            let ticks = (now() - started).as_nanos() / self.tuning.tick.as_nanos().max(1);
            self.tick.set(ticks as u32);
            // Those who stopped waiting have left their wakers behind.
            self.changed.notify_all();
            if self.stop.get() {
                break;
            }
            match self.clean_some().await {
                Ok(0) if urged => sleep(SCARCE_RETRY).await,
                Ok(_) => {}
                // Logged where it was seen; the volume has stopped.
                Err(_) => break,
            }
        }
    }

    /// Somebody waits for a mark of this volume's. (Scarcity on a shared store is looked at with every tick.)
    fn marks_scarce(&self) -> bool {
        self.marks_wanted.get() > 0
    }

    /// Cleans what has been idle long enough, and under pressure the oldest. Returns how many extents it took.
    async fn clean_some(self: &Rc<Self>) -> Result<usize> {
        let scarce = self.marks_scarce()
            || self
                .in_sync()
                .iter()
                .filter_map(|replica| self.seats[replica].handle())
                .any(|handle| store_is_crowded(handle.space().dirty));
        let now = self.tick.get();
        let (mut idle, mut busy): (Vec<_>, Vec<_>) = self
            .cleanable()
            .partition(|extent| now.wrapping_sub(extent.last_write.get()) >= self.tuning.idle_ticks);
        if scarce && idle.len() < VOLUME_EXTENTS_PER_COMMIT {
            busy.sort_by_key(|extent| std::cmp::Reverse(now.wrapping_sub(extent.last_write.get())));
            busy.truncate(VOLUME_EXTENTS_PER_COMMIT - idle.len());
        } else {
            busy.clear();
        }
        let mut taken = 0;
        if !scarce {
            taken += idle.len();
            idle = self.without_holes(idle).await?;
        }
        idle.append(&mut busy);
        for batch in idle.chunks(VOLUME_EXTENTS_PER_COMMIT) {
            if self.stop.get() {
                break;
            }
            self.clean(batch).await?;
            taken += batch.len();
        }
        Ok(taken)
    }

    /// Everything, for a clean end: requests and background tasks have ended.
    ///
    /// # Errors
    /// `Io`.
    pub(super) async fn clean_all(self: &Rc<Self>) -> Result<()> {
        self.check()?;
        let all: Vec<Rc<Extent>> = self.cleanable().collect();
        let all = self.without_holes(all).await?;
        for batch in all.chunks(VOLUME_EXTENTS_PER_COMMIT) {
            self.clean(batch).await?;
        }
        // What keeps its mark was not synced with the others.
        let clean = self.dirty.borrow().is_empty();
        match clean {
            true => Ok(()),
            false => self.sync_all().await,
        }
    }

    fn cleanable(&self) -> impl Iterator<Item = Rc<Extent>> + use<> {
        self.prune_dirty();
        let dirty = self.dirty.borrow().clone();
        dirty
            .into_iter()
            .filter(|extent| extent.state.get() == State::Dirty && extent.pins() == 0 && !extent.unread.get())
    }

    /// Gives back the extents without data, and returns the others.
    async fn without_holes(self: &Rc<Self>, extents: Vec<Rc<Extent>>) -> Result<Vec<Rc<Extent>>> {
        let blocks = self.shape.blocks;
        let is_hole = |extent: &Rc<Extent>| self.all_holes(extent, 0..blocks) == Some(true);
        let (holes, others): (Vec<_>, Vec<_>) = extents.into_iter().partition(is_hole);
        for batch in holes.chunks(VOLUME_EXTENTS_PER_COMMIT) {
            self.release_holes(batch).await?;
        }
        Ok(others)
    }

    /// See the module's steps.
    ///
    /// # Errors
    /// `Io`; the volume has then stopped.
    async fn clean(&self, batch: &[Rc<Extent>]) -> Result<()> {
        let ready = |extent: &&Rc<Extent>| extent.state.get() == State::Dirty && extent.pins() == 0;
        let batch: Vec<&Rc<Extent>> = batch.iter().filter(ready).collect();
        for extent in &batch {
            extent.state.set(State::Cleaning);
            extent.ahead.set(false);
            extent.cleaner_holds.set(true);
        }
        let writes = stream::iter(&batch).map(|extent| async move {
            let result = self.write_area(extent).await;
            extent.cleaner_holds.set(false);
            self.changed.notify_all();
            result
        });
        let written: Vec<Result<()>> = writes.buffer_unordered(AREAS_AT_A_TIME).collect().await;
        written.into_iter().collect::<Result<()>>()?;
        if !broken(Rule::SyncBeforeClear) {
            self.sync_all().await?;
        }
        let untouched: Vec<&Rc<Extent>> = batch
            .into_iter()
            .filter(|extent| {
                let touched = broken(Rule::ClearUntouched) && extent.state.get() == State::Dirty;
                extent.state.get() == State::Cleaning || touched
            })
            .collect();
        if untouched.is_empty() {
            return Ok(());
        }
        untouched
            .iter()
            .for_each(|extent| extent.state.set(State::Clearing));
        // Who does not get what is written now has not got what was; the note goes with the mark.
        let clear = |extent: &Extent, replica: usize| Change::ClearMark {
            physical: extent.places.get()[replica],
            missed_by: self.lacking(extent),
        };
        let replicas = untouched
            .iter()
            .fold(ReplicaSet::NONE, |all, extent| all.or(self.targets(extent)));
        let results = self
            .on(replicas, |replica, io| {
                let theirs = untouched
                    .iter()
                    .filter(|extent| self.targets(extent).contains(replica));
                let changes: Vec<Change> = theirs.map(|extent| clear(extent, replica)).collect();
                async move { io.handle().commit(changes).await }
            })
            .await;
        self.settle_or_stop(results).await?;
        untouched.iter().for_each(|extent| extent.state.set(State::Clean));
        self.prune_dirty();
        self.changed.notify_all();
        Ok(())
    }

    async fn write_area(&self, extent: &Rc<Extent>) -> Result<()> {
        // Released while its batch was under way: nothing to write any more.
        if extent.state.get() != State::Cleaning || broken(Rule::AreaBeforeClear) {
            return Ok(());
        }
        let sequence = extent.sequence.get() + 1;
        extent.sequence.set(sequence);
        let area = SumArea {
            dataset: self.dataset,
            logical: extent.index,
            sequence,
            key_version: self.key_version,
            sums: extent.copy_sums(),
        };
        let (area, places) = (&area, extent.places.get());
        let results = self
            .on(self.targets(extent), |replica, io| async move {
                io.write_sums(places[replica], area).await
            })
            .await;
        self.settle_or_stop(results).await.map(drop)
    }
}

/// Three quarters of the marks are in use: those who share the store make room before anyone is refused.
fn store_is_crowded(dirty: u32) -> bool {
    dirty as usize > DIRTY_MARKS_PER_STORE / 4 * 3
}
