//! Catching up: a replica that was out of sync comes back.
//!
//! 1. What was under way on it from before has ended; what it holds and the volume does not is released on it.
//! 2. It becomes Joining. Extents that it cannot have missed count as caught up at once: they are clean, it has them,
//!    unmarked, and nothing says that it lacks a write. All else is missed, with a full copy everything.
//! 3. The missed ones, oldest first: marked like for a write, allocated or marked on it, locked whole, and what it lacks
//!    copied from the others, verified; where only *all* is known, its copy is compared first and only blocks that differ
//!    are written. From then on it takes the extent's writes, and the cleaner brings its checksum area and clears its mark.
//! 4. When nothing is missed and no allocation that left it out is under way, it is synced, and if still nothing is missed
//!    it becomes InSync, in memory first: from then on its failures are those of a replica in sync. Then the membership is
//!    written down.
//!
//! A replica that fails on the way is Stale as before. What it had caught up with stays so, until it is written again.
//! A cut leaves it stale, too: nothing it holds is believed before step 4 is durable.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use futures_util::{StreamExt, stream};

use super::core::Core;
use super::extent::{Extent, Pinned, State};
use super::heal::CHUNK_BLOCKS;
use super::missed::Lack;
use super::range_lock::Mode;
use super::replicas::Role;
use crate::buf::Buf;
use crate::crypto::seal::SealedBuf;
use crate::error::{Error, Result};
use crate::ids::{ExtentIndex, PhysicalExtent, ReplicaSet};
use crate::limits::{BLOCK_SIZE, VOLUME_EXTENTS_PER_COMMIT, VOLUME_RESYNC_EXTENTS};
use crate::runtime::{now, sleep, spawn};
use crate::sabotage::{Rule, broken};
use crate::store::{Change, ExtentEntry, StoreIo, VolumeState};

impl Core {
    /// Begins to bring a stale replica back over its store's data path. Returns when it is Joining; the rest happens in the
    /// background.
    ///
    /// # Errors
    /// `Invalid` for a place that is not stale; `Io`, `Damaged` as its store: it stays stale.
    pub(super) async fn start_joining(
        self: &Rc<Self>,
        replica: usize,
        io: Rc<StoreIo>,
        full_copy: bool,
    ) -> Result<()> {
        self.check()?;
        let seat = &self.seats[replica];
        if seat.role.get() != Role::Stale {
            return Err(Error::invalid(format!(
                "volume {}: replica {replica} is not stale",
                self.label
            )));
        }
        if io.handle().info().extent_bytes != self.shape.extent_bytes {
            return Err(Error::invalid(format!(
                "volume {}: store \"{}\" has extents of another size",
                self.label,
                io.handle().info().name
            )));
        }
        // What it was sent while it took part before may not be in its table yet: a release that comes after the look would
        // take away a place that is then believed to be the extent's.
        seat.idle.until(|| seat.is_idle().then_some(())).await;
        if seat.role.get() != Role::Stale || self.stop.get() {
            return Err(Error::unavailable(format!("volume {} is closing", self.label)));
        }
        seat.full_copy.set(seat.full_copy.get() || full_copy);
        seat.name.replace(io.handle().info().name.to_string());
        seat.set_io(Some(io.clone()));
        let entries = loop {
            let entries = seat.guard(io.handle().extents_of(self.dataset)).await?;
            let (surplus, here): (Vec<_>, Vec<_>) =
                entries.into_iter().partition(|e| self.is_absent(e.logical));
            if surplus.is_empty() {
                break here;
            }
            for batch in surplus.chunks(VOLUME_EXTENTS_PER_COMMIT) {
                let changes = batch
                    .iter()
                    .map(|entry| Change::Release(entry.physical))
                    .collect();
                seat.guard(io.handle().commit(changes)).await?;
            }
        };
        if seat.role.get() != Role::Stale || self.stop.get() {
            return Err(Error::unavailable(format!("volume {} is closing", self.label)));
        }
        self.take_stock(replica, &entries);
        tracing::info!(
            volume = %self.label, store = %seat.name.borrow(), extents = seat.missed.borrow().len(),
            full_copy = seat.full_copy.get(), "replica catches up"
        );
        let (core, running, join) = (self.clone(), self.background.enter(), seat.join.get());
        spawn(async move {
            if let Err(error) = core.catch_up(replica, join).await
                && core.seats[replica].join.get() == join
            {
                core.stop_joining(replica, &error.to_string());
            }
            drop(running);
        })
        .detach();
        Ok(())
    }

    fn is_absent(&self, index: ExtentIndex) -> bool {
        self.extent(index)
            .is_none_or(|extent| extent.state.get() == State::Absent)
    }

    /// Step 2, at one point in time.
    fn take_stock(&self, replica: usize, entries: &[ExtentEntry]) {
        let seat = &self.seats[replica];
        let mut here: BTreeMap<u32, &ExtentEntry> =
            entries.iter().map(|entry| (entry.logical.0, entry)).collect();
        let mut missed = seat.missed.borrow_mut();
        let mut places = seat.places.borrow_mut();
        places.clear();
        let extents = self.extents.borrow();
        // In order, so that a run can be repeated.
        let mut present: Vec<&Rc<Extent>> = extents
            .values()
            .filter(|extent| extent.state.get() != State::Absent)
            .collect();
        present.sort_by_key(|extent| extent.index);
        for extent in present {
            let index = extent.index.0;
            let entry = here.remove(&index);
            let sure =
                !seat.full_copy.get() && extent.state.get() == State::Clean && missed.of(index).is_none();
            let mut caught_up = extent.caught_up.get().without(replica);
            // Its own mark says the same as the map of what it missed, and stays while it is out: one of the two would do.
            let marked = |entry: &ExtentEntry| entry.dirty && !broken(Rule::MissMarked);
            match entry {
                Some(entry) if sure && !marked(entry) && entry.key_version == self.key_version => {
                    let mut all = extent.places.get();
                    all[replica] = entry.physical;
                    extent.places.set(all);
                    caught_up = caught_up.with(replica);
                }
                // With only some blocks missed, the rest of it is what the others have.
                Some(entry) if !seat.full_copy.get() && !marked(entry) && missed.of(index).is_some() => {
                    places.insert(index, entry.physical);
                }
                Some(entry) => {
                    places.insert(index, entry.physical);
                    missed.all_of(index);
                }
                None => missed.all_of(index),
            }
            extent.caught_up.set(caught_up);
        }
        // What is left is of extents that are absent: they went between the look and now. Released at the end.
        places.extend(here.into_values().map(|entry| (entry.logical.0, entry.physical)));
        seat.copied_bytes.set(0);
        seat.joined.set(Some((now(), 0)));
        seat.join.set(seat.join.get() + 1);
        seat.role.set(Role::Joining);
    }

    /// Steps 3 and 4. Ends early when the replica is not Joining any more.
    async fn catch_up(self: &Rc<Self>, replica: usize, join: u64) -> Result<()> {
        let seat = &self.seats[replica];
        let joins = || self.joins(replica, join) && !self.stop.get() && self.check().is_ok();
        self.marking.all_so_far().await;
        let started = now();
        while joins() {
            let batch = seat.missed.borrow().oldest(VOLUME_EXTENTS_PER_COMMIT);
            if !batch.is_empty() {
                self.catch_up_with(replica, join, &batch).await?;
                self.pace(replica, started).await;
                continue;
            }
            self.release_surplus(replica).await?;
            // Who was allocated without this replica, since something else was still in its place, shows as missed by then.
            if !broken(Rule::ResyncWaits) {
                self.marking.all_so_far().await;
            }
            let io = seat.io()?;
            if !broken(Rule::ResyncSyncs) {
                seat.guard(async move { io.flush().await }).await?;
            }
            if !joins() || !seat.missed.borrow().is_empty() || !seat.places.borrow().is_empty() {
                continue;
            }
            seat.role.set(Role::InSync);
            seat.reason.replace(None);
            seat.full_copy.set(false);
            self.settle_size_on(replica).await;
            self.write_down_membership().await;
            tracing::info!(
                volume = %self.label, store = %seat.name.borrow(), epoch = %self.epoch.get(),
                copied_bytes = seat.copied_bytes.get(), "replica is in sync again"
            );
            return Ok(());
        }
        Err(Error::unavailable(
            "the volume is closing, or the replica has failed",
        ))
    }

    /// Holds the rate: what was copied so far may have taken no less time than this.
    async fn pace(&self, replica: usize, started: Duration) {
        let bytes = self.seats[replica].copied_bytes.get();
        let nanos =
            u128::from(bytes) * 1_000_000_000 / u128::from(self.tuning.resync_bytes_per_second.max(1));
        let due = started + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let left = due.saturating_sub(now());
        if !left.is_zero() {
            sleep(left).await;
        }
    }

    /// Whether that attempt to join is still under way.
    fn joins(&self, replica: usize, join: u64) -> bool {
        let seat = &self.seats[replica];
        seat.role.get() == Role::Joining && seat.join.get() == join
    }

    async fn catch_up_with(self: &Rc<Self>, replica: usize, join: u64, batch: &[u32]) -> Result<()> {
        let extents: Vec<Rc<Extent>> = batch
            .iter()
            .filter_map(|index| self.extent(ExtentIndex(*index)))
            .collect();
        self.mark_together(&extents).await?;
        let each = stream::iter(batch).map(|index| async move {
            let index = ExtentIndex(*index);
            match self.writable_if_present(index).await? {
                Some(pinned) => self.catch_up_extent(replica, join, &pinned).await,
                None => {
                    // Trimmed meanwhile. Its place on the replica goes at the end.
                    if self.is_absent(index) {
                        self.seats[replica].missed.borrow_mut().caught_up(index.0);
                    }
                    Ok(())
                }
            }
        });
        let results: Vec<Result<()>> = each.buffer_unordered(VOLUME_RESYNC_EXTENTS).collect().await;
        results.into_iter().collect()
    }

    async fn catch_up_extent(&self, replica: usize, join: u64, pinned: &Pinned) -> Result<()> {
        let extent = pinned.extent();
        let seat = &self.seats[replica];
        let _held = extent.lock.lock(0..self.shape.blocks, Mode::Exclusive).await;
        let index = extent.index.0;
        if extent.state.get() != State::Dirty || !self.joins(replica, join) {
            return Ok(());
        }
        let Some(lack) = seat.missed.borrow().of(index).cloned() else {
            return Ok(());
        };
        let known = seat.places.borrow().get(&index).copied();
        let (place, lack) = match known {
            Some(place) => (self.mark_on(replica, place).await?, lack),
            None => (self.allocate_on(replica, extent.index).await?, Lack::All),
        };
        for run in lack.runs(self.shape.blocks) {
            for start in run.clone().step_by(CHUNK_BLOCKS as usize) {
                let blocks = start..run.end.min(start + CHUNK_BLOCKS);
                if !self.joins(replica, join) {
                    return Ok(());
                }
                self.copy_blocks(replica, extent, place, blocks, lack == Lack::All)
                    .await?;
            }
        }
        // The failure of a source may have made it stale meanwhile, with all that is marked: this extent among them.
        if !self.joins(replica, join) {
            return Ok(());
        }
        let mut places = extent.places.get();
        places[replica] = place;
        extent.places.set(places);
        extent.caught_up.set(extent.caught_up.get().with(replica));
        extent.last_write.set(self.tick.get());
        seat.places.borrow_mut().remove(&index);
        seat.missed.borrow_mut().caught_up(index);
        seat.joined
            .set(seat.joined.get().map(|(since, done)| (since, done + 1)));
        Ok(())
    }

    async fn mark_on(&self, replica: usize, place: PhysicalExtent) -> Result<PhysicalExtent> {
        if broken(Rule::ResyncMarks) {
            return Ok(place);
        }
        let seat = &self.seats[replica];
        let io = seat.io()?;
        seat.guard(async { self.commit_patiently(&io, &[Change::Mark(place)]).await })
            .await?;
        Ok(place)
    }

    async fn allocate_on(&self, replica: usize, logical: ExtentIndex) -> Result<PhysicalExtent> {
        let seat = &self.seats[replica];
        let io = seat.io()?;
        let place = seat.guard(io.handle().reserve(1)).await?[0];
        let allocate = Change::Allocate {
            physical: place,
            dataset: self.dataset,
            logical,
            key_version: self.key_version,
        };
        let committed = seat
            .guard(async { self.commit_patiently(&io, &[allocate]).await })
            .await;
        if committed.is_err() {
            io.handle().unreserve(vec![place]);
        }
        committed?;
        seat.places.borrow_mut().insert(logical.0, place);
        Ok(place)
    }

    /// Copies blocks that the caller holds exclusively; with `compare` only those that differ.
    async fn copy_blocks(
        &self,
        replica: usize,
        extent: &Extent,
        place: PhysicalExtent,
        blocks: Range<u32>,
        compare: bool,
    ) -> Result<()> {
        let seat = &self.seats[replica];
        let join = seat.join.get();
        let len = blocks.len() * BLOCK_SIZE;
        let source = self.read_good(extent, blocks.clone()).await?;
        // Meanwhile nothing of it was in flight on the replica, so it may have been let go, and its space be another's.
        if !self.joins(replica, join) {
            return Err(Error::unavailable("the replica was let go while it caught up"));
        }
        let io = seat.io()?;
        let mut wanted = vec![true; blocks.len()];
        if compare {
            let read = seat.guard(async {
                let (result, buf) = io.read(place, blocks.start, self.pool.get(len), len).await;
                result.map(|()| buf)
            });
            // What cannot be read there is written.
            if let Ok(theirs) = read.await {
                for (at, wanted) in wanted.iter_mut().enumerate() {
                    let bytes = at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE;
                    *wanted = theirs[bytes.clone()] != source[bytes];
                }
            }
        }
        let sealed = SealedBuf::from_ciphertext(source);
        for run in super::recover::runs(wanted.into_iter()) {
            let bytes = run.start * BLOCK_SIZE..run.end * BLOCK_SIZE;
            let block = blocks.start + run.start as u32;
            seat.copied_bytes
                .set(seat.copied_bytes.get() + bytes.len() as u64);
            seat.guard(async { io.write(place, block, &sealed, bytes).await })
                .await?;
        }
        Ok(())
    }

    /// Blocks' ciphertext as their sums say; a block without a good copy as the first replica that can be read has it, so
    /// that it stays as lost as it is.
    async fn read_good(&self, extent: &Extent, blocks: Range<u32>) -> Result<Buf> {
        let count = blocks.len() as u32;
        let number = |at: usize| self.shape.block_index(extent.index, blocks.start + at as u32);
        let good = |at: usize, bytes: &[u8]| {
            let block = blocks.start + at as u32;
            let sum = extent.with_sums(block..block + 1, |sums| sums[0]);
            let sum = sum.expect("a marked extent's sums are in memory");
            crate::crypto::seal::verify_block(self.dataset, number(at), bytes, sum)
        };
        if let Ok(buf) = self.read_one(extent.places.get(), blocks.start, count).await
            && (0..blocks.len()).all(|at| good(at, &buf[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE]))
        {
            return Ok(buf);
        }
        // Heals on the way; which blocks are lost shows below.
        let _ = self.heal_held(extent, blocks.clone()).await;
        let copies = self.read_copies(extent, blocks.clone()).await?;
        let mut out = self.pool.get(blocks.len() * BLOCK_SIZE);
        for at in 0..blocks.len() {
            let readable = || copies.iter().filter_map(|copy| copy.block(at));
            let best = readable()
                .find(|bytes| good(at, bytes))
                .or_else(|| readable().next());
            let to = &mut out[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE];
            match best {
                Some(bytes) => to.copy_from_slice(bytes),
                None => to.fill(0),
            }
        }
        Ok(out)
    }

    /// What the replica still has of extents that are gone.
    async fn release_surplus(&self, replica: usize) -> Result<()> {
        let seat = &self.seats[replica];
        let surplus: Vec<(u32, PhysicalExtent)> = {
            let places = seat.places.borrow();
            let gone = places
                .iter()
                .filter(|(index, _)| self.is_absent(ExtentIndex(**index)));
            gone.map(|(index, place)| (*index, *place)).collect()
        };
        for batch in surplus.chunks(VOLUME_EXTENTS_PER_COMMIT) {
            let io = seat.io()?;
            let changes = batch.iter().map(|(_, place)| Change::Release(*place)).collect();
            seat.guard(io.handle().commit(changes)).await?;
            // One that was allocated anew meanwhile is missed, and is now allocated there like any other.
            for (index, _) in batch {
                seat.places.borrow_mut().remove(index);
            }
        }
        Ok(())
    }

    /// A size that it has missed. Its failure is that of a replica in sync.
    async fn settle_size_on(&self, replica: usize) {
        let (volume, size_bytes) = (self.id, self.size_bytes.get());
        let results = self
            .on(ReplicaSet::only(replica), |_, io| async move {
                if let Ok(VolumeState::Live(record, _)) = io.handle().volume(volume).await
                    && record.size_bytes == size_bytes
                {
                    return Ok(());
                }
                let change = Change::SetSize { volume, size_bytes };
                io.handle().commit(vec![change]).await
            })
            .await;
        for (replica, result) in results.into_iter() {
            if let Err(error) = result {
                // Dropped, or the last one: then the next request shows it.
                let _ = self.drop_replica(replica, error).await;
            }
        }
    }
}
