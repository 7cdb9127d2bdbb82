//! Opening after whatever happened: what the replicas' tables say, and what becomes of extents that are marked.
//!
//! Only replicas in sync are asked. One that is not at hand, or cannot tell its extents, is dropped before anything is
//! served: the others hold all that it does, and it may lack what they get.
//!
//! # The tables, extent by extent
//!
//! | it is on | marked there | how that came about | then |
//! |---|---|---|---|
//! | all replicas | on none | – | Clean |
//! | all replicas | on some or all | writes may have been under way | Unreconciled: every replica counts as marked |
//! | some replicas | on each of them | an allocation or a release was cut | released on those, too |
//! | some replicas | on some of them not | a store has lost a record | the replicas without it are dropped, for a full copy |
//!
//! Why *released* loses nothing, in the third row. An allocation was cut: no data was written, since no replica is written
//! before all have allocated; nothing of this extent was acknowledged after it was last absent, so zeros are right. A
//! release was cut: it began under the whole extent's exclusive lock, so every write acknowledged before was followed by a
//! trim or write-zeroes of the whole extent (or it held nothing but holes), and every later write waited for the release
//! and was not acknowledged. If the trim was acknowledged, the release was complete on all replicas, and what is left is a
//! cut allocation. A flush makes no difference: a trim that is not acknowledged may have happened, and it was never
//! undone, because nothing was readable in between but zeros. The reverse, copying the extent back to where it is
//! missing, would be as right for a cut release, but it needs free space.
//!
//! Why the fourth row cannot come about: marks are durable on every replica before any releases, and an allocation is
//! marked in the same commit; marks are cleared only on extents that all replicas have.
//!
//! # A marked extent, block by block
//!
//! | copies | a sum of an area (newest area first) matches | the block is then | counted unverified |
//! |---|---|---|---|
//! | equal | some area's | as it is | no |
//! | equal | none | as it is | yes |
//! | differ | one of the copies | that copy | no |
//! | differ | none | the first replica's copy | yes |
//! | none can be read | – | lost, until it is written again or the next opening can read it | no |
//!
//! A blank area (the extent was never cleaned) vouches for holes, as the oldest. Equal copies stay: a flushed write is on
//! all replicas, so it is never traded for what an older area knows. Copies differ only where a write was not followed by
//! a flush (or a medium is bad), and then any of them is allowed; what an area vouches for is preferred, since it is not
//! torn. The other copies are rewritten, the sums are computed anew, and the extent is Dirty with all its sums in memory:
//! the cleaner does the rest. What was rewritten is synced before anyone may read or write the extent: a cut meanwhile then
//! leads here again, to the same choice or to equal copies. Otherwise the next cut could undo the rewriting while it tears a
//! new write of the other copy, and the value that had lost, and that no reader has seen since, would be back.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join;

use super::core::{Core, uncancelled};
use super::extent::{Extent, State};
use super::heal::CHUNK_BLOCKS;
use super::range_lock::Mode;
use super::replicas::Role;
use super::sums::UNKNOWN;
use crate::crypto::seal::{HOLE, SealedBuf, block_sum, verify_block};
use crate::error::{Error, Kind, Result};
use crate::ids::{BlockIndex, DatasetId, ExtentIndex, ReplicaSet};
use crate::limits::{BLOCK_SIZE, VOLUME_EXTENTS_PER_COMMIT, VOLUME_PLACES_MAX};
use crate::runtime::sleep;
use crate::sabotage::{Rule, broken};
use crate::store::{Change, ExtentEntry, Member, SumArea, SumAreaRead, VolumeState};

/// A replica had no room for a mark: recovery of that extent waits so long.
const MARK_RETRY: Duration = Duration::from_secs(1);

/// What the replicas' tables say of one logical extent, by replica.
type Found = [Option<ExtentEntry>; VOLUME_PLACES_MAX];

/// What becomes of it. See the module's first table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Clean,
    Reconcile,
    Release,
    Contradiction,
}

fn fate(found: &[Option<ExtentEntry>]) -> Fate {
    let on_all = found.iter().all(Option::is_some);
    let mut marks = found.iter().flatten().map(|entry| entry.dirty);
    match (on_all, marks.clone().any(|dirty| dirty), marks.all(|dirty| dirty)) {
        (true, false, _) => Fate::Clean,
        (true, true, _) if broken(Rule::RecoverMarked) => Fate::Clean,
        (true, true, _) => Fate::Reconcile,
        (false, _, true) => Fate::Release,
        (false, _, false) => Fate::Contradiction,
    }
}

impl Core {
    /// Builds the map from the tables of the replicas in sync, drops those that cannot stay, and finishes what a cut has
    /// left between them.
    ///
    /// # Errors
    /// `Damaged`, `Unsupported` (another key version), or as the store's.
    pub(super) async fn load_map(self: &Rc<Self>) -> Result<()> {
        let found = self.load_tables().await?;
        let mut halves = Vec::new();
        for (index, found) in &found {
            let here: Vec<_> = self.in_sync().iter().map(|replica| found[replica]).collect();
            match fate(&here) {
                Fate::Clean => self.adopt(*index, found, State::Clean),
                Fate::Reconcile => self.adopt(*index, found, State::Unreconciled),
                Fate::Release => halves.push(*found),
                Fate::Contradiction => unreachable!("replicas without the extent have been dropped"),
            }
            let entries = || self.in_sync().iter().filter_map(|replica| found[replica]);
            if let Some(entry) = entries().find(|entry| entry.key_version != self.key_version) {
                return Err(Error::unsupported(format!(
                    "volume {}: extent {index} is sealed with key version {}, and only version {} is at hand",
                    self.label, entry.key_version, self.key_version
                )));
            }
            for (replica, seat) in self.seats.iter().enumerate() {
                let lacks = |entry: &ExtentEntry| {
                    (entry.dirty || entry.missed_by.contains(replica)) && !broken(Rule::MissedBits)
                };
                if !matches!(seat.role.get(), Role::InSync | Role::Vacant) && entries().any(|e| lacks(&e)) {
                    seat.missed.borrow_mut().all_of(index.0);
                }
            }
        }
        if self.dropping.get() > 0 {
            self.write_down_membership().await;
            self.check()?;
        }
        self.seal_membership().await?;
        self.release_halves(&halves).await
    }

    /// What the replicas in sync say of every extent. One that cannot say, or has lost a record that another has, is set to
    /// be dropped, as long as another is left.
    async fn load_tables(&self) -> Result<BTreeMap<ExtentIndex, Found>> {
        let dataset = self.dataset;
        let results = self
            .on(self.in_sync(), |_, io| async move {
                io.handle().extents_of(dataset).await
            })
            .await;
        let mut found: BTreeMap<ExtentIndex, Found> = BTreeMap::new();
        let mut silent = None;
        for (replica, entries) in results.into_iter() {
            match entries {
                Ok(entries) => {
                    for entry in entries {
                        found.entry(entry.logical).or_default()[replica] = Some(entry);
                    }
                }
                Err(error) => silent = silent.or(Some((replica, error))),
            }
        }
        if let Some((replica, error)) = silent {
            if self.in_sync().len() == 1 {
                return Err(error.context(format!("volume {}", self.label)));
            }
            self.expel(replica, &error.to_string());
            // The others, and whoever else is silent, are asked again.
            return Box::pin(self.load_tables()).await;
        }
        let contradiction = found.iter().find_map(|(index, found)| {
            let mut asked = self.in_sync().iter();
            let here: Vec<_> = self.in_sync().iter().map(|replica| found[replica]).collect();
            let without = asked.find(|replica| found[*replica].is_none())?;
            (fate(&here) == Fate::Contradiction).then_some((*index, without))
        });
        match contradiction {
            None => Ok(found),
            Some((index, replica)) => {
                let reason = format!("it has lost extent {index}, which others hold unmarked");
                self.expel(replica, &reason);
                Box::pin(self.load_tables()).await
            }
        }
    }

    /// A replica whose table cannot be relied on leaves, before anything is served.
    fn expel(&self, replica: usize, reason: &str) {
        let seat = &self.seats[replica];
        tracing::error!(volume = %self.label, store = %seat.name.borrow(), "replica dropped: {reason}");
        seat.role.set(Role::Dropping);
        seat.reason.replace(Some(reason.to_owned()));
        seat.full_copy.set(true);
        self.dropping.set(self.dropping.get() + 1);
    }

    /// Stores that do not know the present membership (a cut came between the register and them) hear of it before
    /// anything is served, or are dropped.
    async fn seal_membership(&self) -> Result<()> {
        let id = self.id;
        let results = self
            .on(
                self.in_sync(),
                |_, io| async move { io.handle().volume(id).await },
            )
            .await;
        let members = self.membership_now();
        let states: Vec<Member> = members.members.iter().map(|standing| standing.state).collect();
        let agree = |state: &VolumeState| match state {
            VolumeState::Live(record, _) => {
                record.membership_epoch == members.epoch && record.members == states
            }
            VolumeState::Tombstoned { .. } | VolumeState::Unknown => false,
        };
        if results.iter().all(|(_, state)| state.as_ref().is_ok_and(agree)) {
            return Ok(());
        }
        let told = self.write_members(&members).await;
        self.settle(told).await.map(drop)
    }

    fn adopt(&self, index: ExtentIndex, found: &Found, state: State) {
        let extent = self.extent_or_new(index);
        let entries = || {
            let in_sync = self.in_sync();
            in_sync
                .iter()
                .filter_map(|replica| Some((replica, found[replica]?)))
        };
        let marked = entries().filter(|(_, entry)| entry.dirty);
        extent
            .marked_on
            .set(marked.fold(ReplicaSet::NONE, |set, (replica, _)| set.with(replica)));
        extent.places.set(Self::places_of(
            entries().map(|(replica, entry)| (replica, entry.physical)),
        ));
        extent.state.set(state);
        self.allocated.set(self.allocated.get() + 1);
        if state == State::Unreconciled {
            self.recovering.set(self.recovering.get() + 1);
        }
    }

    /// Finishes cut allocations and releases.
    async fn release_halves(&self, halves: &[Found]) -> Result<()> {
        for batch in halves.chunks(VOLUME_EXTENTS_PER_COMMIT) {
            let results = self
                .on(self.in_sync(), |replica, io| {
                    let entries = batch.iter().filter_map(|found| found[replica]);
                    let changes: Vec<_> = entries.map(|entry| Change::Release(entry.physical)).collect();
                    async move {
                        match changes.is_empty() {
                            true => Ok(()),
                            false => io.handle().commit(changes).await,
                        }
                    }
                })
                .await;
            self.settle_or_stop(results).await?;
        }
        Ok(())
    }

    /// The background task: reconciles every marked extent that no request has asked for first.
    pub(super) async fn recover_in_background(self: Rc<Self>) {
        let waiting: Vec<Rc<Extent>> = {
            let extents = self.extents.borrow();
            let marked = extents
                .values()
                .filter(|extent| extent.state.get() == State::Unreconciled);
            marked.cloned().collect()
        };
        if waiting.is_empty() {
            return;
        }
        tracing::info!(volume = %self.label, extents = waiting.len(), "reconciling extents after an unclean stop");
        let waiting = RefCell::new(waiting);
        // Two at a time; requests for other extents get the other turns.
        join(self.reconcile_some(&waiting), self.reconcile_some(&waiting)).await;
        if self.check().is_ok() && self.recovering.get() == 0 {
            let unverified = self.unverified.get();
            tracing::info!(volume = %self.label, unverified_blocks = unverified, "all extents are reconciled");
        }
    }

    async fn reconcile_some(self: &Rc<Self>, waiting: &RefCell<Vec<Rc<Extent>>>) {
        loop {
            let next = waiting.borrow_mut().pop();
            let Some(extent) = next else { return };
            while extent.state.get() == State::Unreconciled {
                if self.stop.get() || self.check().is_err() {
                    return;
                }
                if self.reconcile_now(&extent).await.is_err() {
                    sleep(MARK_RETRY).await;
                }
            }
        }
    }

    /// Reconciles an extent, unless somebody else has begun to.
    ///
    /// # Errors
    /// `NoSpace` when a replica has no room for a mark (the extent stays Unreconciled); `Io`.
    pub(super) async fn reconcile_now(self: &Rc<Self>, extent: &Rc<Extent>) -> Result<()> {
        if extent.state.get() != State::Unreconciled {
            return Ok(());
        }
        extent.state.set(State::Reconciling);
        let (core, extent, running) = (self.clone(), extent.clone(), self.background.enter());
        uncancelled(async move {
            let result = core.reconcile(&extent).await;
            match &result {
                Ok(()) => {
                    core.recovering.set(core.recovering.get() - 1);
                    extent.last_write.set(core.tick.get());
                    core.turn(&extent, State::Dirty);
                }
                Err(error) if error.kind() == Kind::NoSpace => core.turn(&extent, State::Unreconciled),
                // Nothing else would bring the extent out of this state.
                Err(error) => {
                    core.fail(error);
                }
            }
            drop(running);
            result
        })
        .await
    }

    async fn reconcile(self: &Rc<Self>, extent: &Rc<Extent>) -> Result<()> {
        let _turn = self.reconciling.acquire(1).await;
        self.check()?;
        self.mark_the_rest(extent).await?;
        let _held = extent.lock.lock(0..self.shape.blocks, Mode::Exclusive).await;
        let areas = Areas::new(self.read_areas(extent).await?);
        let mut sums = self.holes();
        let mut rewritten = false;
        for start in (0..self.shape.blocks).step_by(CHUNK_BLOCKS as usize) {
            let end = self.shape.blocks.min(start + CHUNK_BLOCKS);
            let new = &mut sums[start as usize..end as usize];
            rewritten |= self.reconcile_chunk(extent, &areas, start..end, new).await?;
        }
        if rewritten && !broken(Rule::RecoverSyncs) {
            self.sync_all().await?;
        }
        extent.sequence.set(areas.newest_sequence());
        self.cache.put(extent, sums);
        Ok(())
    }

    /// Rewriting is writing: first every replica has the mark.
    async fn mark_the_rest(&self, extent: &Rc<Extent>) -> Result<()> {
        let places = extent.places.get();
        let unmarked = self.in_sync().minus(extent.marked_on.get());
        let mut results = self
            .on(unmarked, |replica, io| async move {
                self.commit_patiently(&io, &[Change::Mark(places[replica])]).await
            })
            .await;
        let mut refused = None;
        for (replica, result) in results.0.iter_mut().enumerate() {
            if let Some(Err(error)) = result.take_if(|result| matches!(result, Err(e) if Self::is_full(e))) {
                refused = Some(error);
            } else if matches!(result, Some(Ok(()))) {
                extent.marked_on.set(extent.marked_on.get().with(replica));
            }
        }
        // Those that are marked already have completed it.
        for replica in self.in_sync().and(extent.marked_on.get()).iter() {
            results.0[replica] = Some(Ok(()));
        }
        if results.iter().next().is_some() {
            self.settle_or_stop(results).await?;
        }
        refused.map_or(Ok(()), Err)
    }

    /// Makes the copies of some blocks equal; whether one was rewritten.
    async fn reconcile_chunk(
        &self,
        extent: &Extent,
        areas: &Areas,
        blocks: Range<u32>,
        sums: &mut [u32],
    ) -> Result<bool> {
        let copies = self.read_copies(extent, blocks.clone()).await?;
        let mut stale = vec![ReplicaSet::NONE; blocks.len()];
        let mut winners = self.pool.get(blocks.len() * BLOCK_SIZE);
        for (at, block) in blocks.clone().enumerate() {
            let number = self.shape.block_index(extent.index, block);
            let all: Vec<&[u8]> = copies.iter().filter_map(|copy| copy.block(at)).collect();
            let to = at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE;
            if all.is_empty() {
                self.lose(number);
                sums[at] = UNKNOWN;
                extent.unread.set(true);
                continue;
            }
            let chosen = choose(self.dataset, number, &all, areas.entries(block));
            if !chosen.verified {
                self.unverified.set(self.unverified.get() + 1);
            }
            let winner = all[chosen.copy];
            winners[to].copy_from_slice(winner);
            for copy in &copies {
                if copy.block(at) != Some(winner) && !broken(Rule::RecoverRewrites) {
                    stale[at] = stale[at].with(copy.replica);
                }
            }
            sums[at] = match verify_block(self.dataset, number, winner, HOLE) {
                true => HOLE,
                false => block_sum(self.dataset, number, winner),
            };
        }
        drop(copies);
        let sealed = SealedBuf::from_ciphertext(winners);
        let mut rewritten = false;
        self.note_missed(extent, blocks.clone());
        for replica in self.in_sync().iter() {
            for run in runs(stale.iter().map(|stale| stale.contains(replica))) {
                let bytes = run.start * BLOCK_SIZE..run.end * BLOCK_SIZE;
                let block = blocks.start + run.start as u32;
                let seat = &self.seats[replica];
                let place = extent.places.get()[replica];
                let written = seat
                    .guard(async { seat.io()?.write(place, block, &sealed, bytes).await })
                    .await;
                if let Err(error) = written {
                    self.drop_replica(replica, error).await?;
                    break;
                }
                rewritten = true;
            }
        }
        Ok(rewritten)
    }

    /// A write failed on every replica: nobody knows what they hold. What can be read is made equal and taken as it is; what
    /// cannot is lost until it is written again. The caller holds the blocks exclusively and the extent is marked.
    #[cold]
    pub(super) async fn settle_blocks(&self, extent: &Extent, blocks: Range<u32>) {
        let mut sums = vec![UNKNOWN; blocks.len()];
        let settled = self
            .reconcile_chunk(extent, &Areas(Vec::new()), blocks.clone(), &mut sums)
            .await;
        if let Err(error) = settled {
            tracing::error!(volume = %self.label, extent = %extent.index, "blocks of a failed write stay unknown: {error}");
        }
        extent.set_sums(blocks.start, &sums);
    }
}

/// The replicas' areas of one extent, newest first.
struct Areas(Vec<Area>);

enum Area {
    Valid(SumArea),
    Blank,
}

impl Areas {
    fn new(read: Vec<Option<SumAreaRead>>) -> Self {
        let usable = read.into_iter().flatten().filter_map(|area| match area {
            SumAreaRead::Valid(area) | SumAreaRead::Torn(area) => Some(Area::Valid(area)),
            SumAreaRead::Blank => Some(Area::Blank),
            // It has no say.
            SumAreaRead::Damaged(_) => None,
        });
        let mut areas: Vec<Area> = usable.collect();
        areas.sort_by_key(|area| std::cmp::Reverse(area.sequence()));
        Self(areas)
    }

    /// What they say of a block, newest first.
    fn entries(&self, block: u32) -> impl Iterator<Item = u32> {
        self.0.iter().map(move |area| match area {
            Area::Valid(area) => area.sums[block as usize],
            Area::Blank => HOLE,
        })
    }

    fn newest_sequence(&self) -> u64 {
        self.0.first().map_or(0, Area::sequence)
    }
}

impl Area {
    fn sequence(&self) -> u64 {
        match self {
            Area::Valid(area) => area.sequence,
            Area::Blank => 0,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Chosen {
    copy: usize,
    verified: bool,
}

/// The module's second table.
fn choose(
    dataset: DatasetId,
    block: BlockIndex,
    copies: &[&[u8]],
    entries: impl Iterator<Item = u32>,
) -> Chosen {
    let mut vouched = entries.filter_map(|sum| {
        let matches = |copy: &&[u8]| verify_block(dataset, block, copy, sum);
        copies.iter().position(matches)
    });
    let equal = copies.iter().all(|copy| *copy == copies[0]);
    match (equal, vouched.next()) {
        (true, vouched) => Chosen {
            copy: 0,
            verified: vouched.is_some(),
        },
        (false, Some(copy)) => Chosen { copy, verified: true },
        (false, None) => Chosen {
            copy: 0,
            verified: false,
        },
    }
}

/// Runs of `true`.
pub(super) fn runs(flags: impl Iterator<Item = bool>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, _) in flags.enumerate().filter(|(_, set)| *set) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{KeyVersion, PhysicalExtent};

    fn entry(dirty: bool) -> Option<ExtentEntry> {
        Some(ExtentEntry {
            logical: ExtentIndex(0),
            physical: PhysicalExtent(0),
            dirty,
            missed_by: ReplicaSet::NONE,
            key_version: KeyVersion(1),
        })
    }

    #[test]
    fn the_table_of_fates_holds_for_every_combination_on_one_to_three_replicas() {
        let (gone, clean, dirty) = (None, entry(false), entry(true));
        let cases: &[(&[Option<ExtentEntry>], Fate)] = &[
            (&[clean], Fate::Clean),
            (&[dirty], Fate::Reconcile),
            (&[clean, clean], Fate::Clean),
            (&[clean, dirty], Fate::Reconcile),
            (&[dirty, dirty], Fate::Reconcile),
            (&[gone, dirty], Fate::Release),
            (&[dirty, gone], Fate::Release),
            (&[gone, clean], Fate::Contradiction),
            (&[dirty, clean, clean], Fate::Reconcile),
            (&[dirty, gone, gone], Fate::Release),
            (&[dirty, gone, dirty], Fate::Release),
            (&[dirty, gone, clean], Fate::Contradiction),
            (&[gone, clean, gone], Fate::Contradiction),
        ];
        for (found, expected) in cases {
            assert_eq!(fate(found), *expected, "{found:?}");
        }
    }

    #[test]
    fn the_table_of_blocks_prefers_equal_copies_then_the_newest_area_then_the_first_replica() {
        let dataset = DatasetId::random();
        let number = BlockIndex(9);
        let (old, new, torn, hole) = ([1; BLOCK_SIZE], [2; BLOCK_SIZE], [3; BLOCK_SIZE], [0; BLOCK_SIZE]);
        let sum = |block: &[u8]| block_sum(dataset, number, block);
        let decide = |copies: &[&[u8]], entries: &[u32]| {
            let chosen = choose(dataset, number, copies, entries.iter().copied());
            (chosen.copy, chosen.verified)
        };
        assert_eq!(decide(&[&new, &new], &[sum(&new), sum(&old)]), (0, true));
        assert_eq!(
            decide(&[&new, &new], &[sum(&old)]),
            (0, false),
            "flushed data stays"
        );
        assert_eq!(decide(&[&torn, &old], &[sum(&old)]), (1, true));
        assert_eq!(
            decide(&[&old, &new], &[sum(&new), sum(&old)]),
            (1, true),
            "the newest area first"
        );
        assert_eq!(
            decide(&[&torn, &old], &[sum(&new), sum(&old)]),
            (1, true),
            "whole rather than torn"
        );
        assert_eq!(decide(&[&torn, &new], &[sum(&old)]), (0, false));
        assert_eq!(
            decide(&[&torn, &hole], &[HOLE]),
            (1, true),
            "a blank area vouches for holes"
        );
        assert_eq!(decide(&[&hole, &hole], &[HOLE]), (0, true));
        assert_eq!(decide(&[&torn], &[sum(&old)]), (0, false), "a single replica");
        assert_eq!(decide(&[&old, &torn, &old], &[]), (0, false));
    }
}
