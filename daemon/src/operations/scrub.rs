//! The integrity scrub: one task that walks all volumes, one at a time, so that damage is found while there is still a
//! good copy to heal it from.
//!
//! The catalog says what is to be done: a volume's [`ScrubRecord`] holds the pass that waits or runs, with its cursor, and
//! the last one that ended. A request is such a record and a wake-up, so it survives a restart like everything else. The
//! task chooses ([`plan`]), opens the volume if nobody has it open, and verifies slice after slice, resting in between as
//! the rate demands; it holds no lock meanwhile, so attaching, detaching and deleting find the volume as ever:
//!
//! | meanwhile | then |
//! |---|---|
//! | attached | the volume is open already; it stays open after the pass |
//! | detached, recovered | it is closed; the next slice opens it again |
//! | deleted | its record is gone, and the pass with it |
//! | asked for anew | the new pass takes its place, or the running one its new rate |
//! | another volume is asked for | a pass that nobody asked for waits at its cursor |
//! | it cannot be opened, or has stopped | the pass waits, with the reason, and is tried again |
//!
//! Progress is saved when anything was found, every minute, every GiB, and at a stop. A crash repeats what came after.

mod plan;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libvol::catalog::{Phase, ScrubPass, ScrubRecord, StoreRecord, VolumeRecord};
use libvol::control::{self, ScrubState};
use libvol::ids::VolumeId;
use libvol::limits::BLOCK;
use libvol::store::Member;
use libvol::volume::Verified;
use libvol::{Error, Kind, Result};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

pub(crate) use self::plan::ScrubSettings;
use super::volume::check_ready;
use super::{Operations, Seat, volume_named};
use crate::process::unix_seconds;

/// How often an idle scrub looks for volumes that have become due.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How long a volume that could not be scrubbed is left alone.
const HOLD_BACK: Duration = Duration::from_secs(60);
/// Progress is saved at the latest after this time, or this many bytes.
const SAVE_AFTER: Duration = Duration::from_secs(60);
/// See [`SAVE_AFTER`].
const SAVE_AFTER_BYTES: u64 = 1 << 30;
/// Openings in a row after which a volume that is closed again at once is left alone.
const OPENINGS_MAX: u32 = 3;

/// What the task and the requests share.
pub(super) struct Scrubber {
    settings: ScrubSettings,
    wake: Notify,
    stopping: AtomicBool,
    /// Counts requests, so that a pass nobody asked for sees that it has to wait.
    requests: AtomicU64,
    board: Mutex<Board>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Board {
    running: Option<(VolumeId, ScrubPass)>,
    held_back: HashMap<VolumeId, HeldBack>,
}

/// Why a volume is left alone, and how long.
struct HeldBack {
    reason: String,
    until: Instant,
}

impl Scrubber {
    pub(super) fn new(settings: ScrubSettings) -> Self {
        Self {
            settings,
            wake: Notify::new(),
            stopping: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            board: Mutex::default(),
            task: Mutex::default(),
        }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn task(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::Acquire)
    }

    /// Rests, unless there is news.
    async fn rest(&self, duration: Duration) {
        if !duration.is_zero() {
            let _ = tokio::time::timeout(duration, self.wake.notified()).await;
        }
    }

    fn hold_back(&self, volume: &dyn std::fmt::Display, id: VolumeId, error: &Error) {
        let reason = error.to_string();
        let held = HeldBack {
            reason: reason.clone(),
            until: Instant::now() + HOLD_BACK,
        };
        let before = self.board().held_back.insert(id, held);
        if before.is_none_or(|before| before.reason != reason) {
            tracing::warn!(%volume, "its integrity scrub waits: {reason}");
        }
    }
}

/// A pass's progress that a crash would repeat.
struct Unsaved {
    bytes: u64,
    since: Instant,
}

impl Unsaved {
    fn nothing() -> Self {
        Self {
            bytes: 0,
            since: Instant::now(),
        }
    }

    fn is_due(&self) -> bool {
        self.bytes >= SAVE_AFTER_BYTES || self.since.elapsed() >= SAVE_AFTER
    }
}

/// A volume during its turn.
struct Turn {
    id: VolumeId,
    pass: ScrubPass,
    /// Opened for the scrub only.
    opened: bool,
}

impl Operations {
    /// Starts the task.
    pub(super) fn start_scrubbing(self: &Arc<Self>) {
        let task = tokio::spawn(self.clone().scrub());
        let earlier = self.scrubber.task().replace(task);
        assert!(earlier.is_none(), "one scrub a daemon");
    }

    /// Ends the task; what it has reached is saved.
    pub(super) async fn stop_scrubbing(&self) {
        self.scrubber.stopping.store(true, Ordering::Release);
        self.scrubber.wake.notify_one();
        let task = self.scrubber.task().take();
        if let Some(task) = task
            && let Err(e) = task.await
        {
            tracing::error!("the integrity scrub ended badly: {e}");
        }
    }

    /// Asks for a pass over one volume or all. One that was asked for before goes on, at the new rate.
    ///
    /// # Errors
    /// `Invalid` (rate), `NotFound`, `Busy` (the volume is being made or destroyed).
    pub(crate) fn scrub_start(&self, request: &control::ScrubStart) -> Result<Vec<control::Scrub>> {
        if request.bytes_per_second.is_some_and(|rate| rate < BLOCK) {
            return Err(Error::invalid(format!(
                "a scrub verifies at least one block of {BLOCK} bytes a second; use a higher rate"
            )));
        }
        let asked: Vec<VolumeId> = match &request.volume {
            Some(path) => {
                let record = self.look(|view| volume_named(view, path))?;
                check_ready(&record)?;
                vec![record.id]
            }
            None => self.scrubbed_volumes()?.into_iter().map(|v| v.id).collect(),
        };
        let now = unix_seconds();
        self.change(|tx| {
            for id in &asked {
                // It may have been deleted since.
                if tx
                    .get::<VolumeRecord>(*id)?
                    .is_none_or(|volume| volume.phase != Phase::Ready)
                {
                    continue;
                }
                let mut record = tx.get::<ScrubRecord>(*id)?.unwrap_or(ScrubRecord {
                    volume: *id,
                    current: None,
                    last: None,
                });
                let mut pass = match &record.current {
                    Some(pass) if pass.requested => pass.clone(),
                    _ => plan::new_pass(Some(&record), true, now),
                };
                pass.bytes_per_second = request.bytes_per_second;
                record.current = Some(pass);
                tx.upsert(&record)?;
            }
            Ok(())
        })?;
        self.scrubber
            .board()
            .held_back
            .retain(|id, _| !asked.contains(id));
        self.scrubber.requests.fetch_add(1, Ordering::AcqRel);
        self.scrubber.wake.notify_one();
        let shown = self.scrubs_shown(|volume| asked.contains(&volume.id))?;
        tracing::info!(volumes = shown.len(), "integrity scrub asked for");
        Ok(shown)
    }

    /// Where every volume's scrub stands.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) fn scrub_status(&self) -> Result<Vec<control::Scrub>> {
        self.scrubs_shown(|_| true)
    }

    fn scrubbed_volumes(&self) -> Result<Vec<VolumeRecord>> {
        let volumes = self.look(|view| view.all::<VolumeRecord>())?;
        Ok(volumes.into_iter().filter(|v| v.phase == Phase::Ready).collect())
    }

    fn scrub_records(&self) -> Result<HashMap<VolumeId, ScrubRecord>> {
        let records = self.look(|view| view.all::<ScrubRecord>())?;
        Ok(records.into_iter().map(|r| (r.volume, r)).collect())
    }

    fn scrubs_shown(&self, wanted: impl Fn(&VolumeRecord) -> bool) -> Result<Vec<control::Scrub>> {
        let records = self.scrub_records()?;
        let board = self.scrubber.board();
        let volumes = self.scrubbed_volumes()?;
        let shown = volumes.iter().filter(|volume| wanted(volume)).map(|volume| {
            let record = records.get(&volume.id);
            let current = record.and_then(|record| record.current.as_ref());
            let last = record.and_then(|record| record.last.as_ref());
            let running = board.running.as_ref().filter(|(id, pass)| {
                // One that was asked for meanwhile takes its place with the next slice.
                *id == volume.id && current.is_some_and(|current| current.number == pass.number)
            });
            let pass = running.map(|(_, pass)| pass).or(current).or(last);
            let count = |count: fn(&ScrubPass) -> u64| pass.map_or(0, count);
            control::Scrub {
                volume: volume.path.clone(),
                state: match (running, current) {
                    (Some(_), _) => ScrubState::Running,
                    (None, Some(_)) => ScrubState::Queued,
                    (None, None) => ScrubState::Idle,
                },
                reason: current
                    .and(board.held_back.get(&volume.id))
                    .map(|held| held.reason.clone()),
                pass: count(|pass| pass.number),
                bytes_done: count(|pass| pass.verified_bytes),
                // The volume may have grown since.
                bytes_total: count(|pass| pass.total_bytes.max(pass.verified_bytes)),
                bytes_per_second: current.and_then(|pass| self.scrub_rate(pass)),
                started_unix_seconds: pass.map(|pass| pass.started_unix_seconds),
                last_finished_unix_seconds: last.and_then(|pass| pass.finished_unix_seconds),
                verified_bytes: count(|pass| pass.verified_bytes),
                healed_blocks: count(|pass| pass.healed_blocks),
                healed_areas: count(|pass| pass.healed_areas),
                lost_blocks: count(|pass| pass.lost_blocks),
            }
        });
        Ok(shown.collect())
    }

    /// Bytes a second that a pass may verify; `None`: no limit.
    fn scrub_rate(&self, pass: &ScrubPass) -> Option<u64> {
        if pass.requested {
            return pass.bytes_per_second;
        }
        let stored = |seat: &Seat| match seat {
            Seat::Open(handle) => u64::from(handle.space().allocated) * handle.info().extent_bytes,
            Seat::Closed(_) => 0,
        };
        let stored_bytes = self.seats().iter().map(|(_, seat)| stored(seat)).sum();
        Some(self.scrubber.settings.background_rate(stored_bytes))
    }

    /// The task.
    async fn scrub(self: Arc<Self>) {
        while !self.scrubber.stopping() {
            let requests = self.scrubber.requests();
            match self.next_to_scrub() {
                Ok(Some(volume)) => {
                    if let Err(e) = self.scrub_turn(&volume, requests).await {
                        self.scrubber.hold_back(&volume.path, volume.id, &e);
                    }
                }
                Ok(None) => self.scrubber.rest(LOOK_AGAIN).await,
                Err(e) => {
                    tracing::error!("the integrity scrub cannot go on: {e}");
                    self.scrubber.rest(LOOK_AGAIN).await;
                }
            }
        }
    }

    fn next_to_scrub(&self) -> Result<Option<VolumeRecord>> {
        let records = self.scrub_records()?;
        let volumes = self.scrubbed_volumes()?;
        let now = Instant::now();
        let mut board = self.scrubber.board();
        board
            .held_back
            .retain(|id, _| volumes.iter().any(|volume| volume.id == *id));
        let free = |volume: &&VolumeRecord| {
            let held = board.held_back.get(&volume.id);
            held.is_none_or(|held| held.until <= now)
        };
        let candidates = volumes
            .iter()
            .filter(free)
            .map(|volume| (volume, records.get(&volume.id)));
        let next = plan::next(candidates, &self.scrubber.settings, unix_seconds());
        Ok(next.and_then(|id| volumes.into_iter().find(|volume| volume.id == id)))
    }

    /// A volume's turn, to its end or to where it has to wait.
    async fn scrub_turn(&self, volume: &VolumeRecord, requests: u64) -> Result<()> {
        let id = volume.id;
        let Some(pass) = self.take_up_pass(id)? else {
            return Ok(());
        };
        let mut turn = Turn {
            id,
            pass,
            opened: false,
        };
        let walked = self.scrub_slices(&mut turn, requests).await;
        self.scrubber.board().running = None;
        if turn.opened {
            self.close_scrubbed(id).await;
        }
        if turn.pass.finished_unix_seconds.is_none() {
            self.save_pass(id, &turn.pass)?;
        } else {
            let ScrubPass {
                verified_bytes,
                healed_blocks,
                healed_areas,
                lost_blocks,
                ..
            } = turn.pass;
            tracing::info!(
                volume = %volume.path, verified_bytes, healed_blocks, healed_areas, lost_blocks,
                "integrity scrub finished"
            );
        }
        walked
    }

    /// The volume's current pass; a new one where there is none. `None` when the volume is going.
    fn take_up_pass(&self, id: VolumeId) -> Result<Option<ScrubPass>> {
        let record = self.look(|view| view.get::<ScrubRecord>(id))?;
        if let Some(pass) = record.and_then(|record| record.current) {
            return Ok(Some(pass));
        }
        self.change(|tx| {
            if tx
                .get::<VolumeRecord>(id)?
                .is_none_or(|volume| volume.phase != Phase::Ready)
            {
                return Ok(None);
            }
            let record = tx.get::<ScrubRecord>(id)?;
            let pass = plan::new_pass(record.as_ref(), false, unix_seconds());
            tx.upsert(&ScrubRecord {
                volume: id,
                current: Some(pass.clone()),
                last: record.and_then(|record| record.last),
            })?;
            Ok(Some(pass))
        })
    }

    async fn scrub_slices(&self, turn: &mut Turn, requests: u64) -> Result<()> {
        let id = turn.id;
        let mut unsaved = Unsaved::nothing();
        let mut openings = 0;
        while !self.scrubber.stopping() {
            let record = self.look(|view| view.get::<ScrubRecord>(id))?;
            let current = record.and_then(|record| record.current);
            let Some(current) = current.filter(|current| current.number == turn.pass.number) else {
                // Deleted, or asked for anew.
                return Ok(());
            };
            turn.pass.bytes_per_second = current.bytes_per_second;
            if !turn.pass.requested && self.scrubber.requests() != requests {
                return Ok(());
            }
            self.scrubber.board().running = Some((id, turn.pass.clone()));
            let rate = self.scrub_rate(&turn.pass);
            let began = Instant::now();
            let Some(seen) = self
                .verify_slice(id, turn.pass.cursor, plan::slice_bytes(rate))
                .await?
            else {
                openings += 1;
                if openings > OPENINGS_MAX {
                    return Err(Error::busy("the volume is opened and closed all the time"));
                }
                if !self.open_to_scrub(turn).await? {
                    return Ok(());
                }
                continue;
            };
            openings = 0;
            if turn.pass.total_bytes == 0 {
                turn.pass.total_bytes = self.bytes_to_scrub(id).await?;
            }
            let news = turn.pass.add(&seen);
            let Some(next) = seen.next else {
                return self.finish_pass(turn);
            };
            turn.pass.cursor = next;
            self.scrubber.board().running = Some((id, turn.pass.clone()));
            unsaved.bytes += seen.bytes;
            if news || unsaved.is_due() {
                self.save_pass(id, &turn.pass)?;
                unsaved = Unsaved::nothing();
            }
            self.scrubber
                .rest(plan::rest(seen.bytes, rate, began.elapsed()))
                .await;
        }
        Ok(())
    }

    /// Verifies some of an open volume; `None` when it is not open, or no longer.
    async fn verify_slice(&self, id: VolumeId, from: u64, bytes: u64) -> Result<Option<Verified>> {
        let seen = self
            .shards
            .of_volume(id)
            .call(move |registry| async move { registry.verify(id, from, bytes).await })
            .await;
        match seen {
            Err(e) if e.kind() == Kind::Unavailable => Ok(None),
            seen => seen,
        }
    }

    /// Opens a volume for its turn, unless it is open by now. `false` when the volume is going.
    async fn open_to_scrub(&self, turn: &mut Turn) -> Result<bool> {
        let id = turn.id;
        let _lock = self.volume_locks.lock(id).await;
        let record = self.look(|view| view.get::<VolumeRecord>(id))?;
        let Some(record) = record.filter(|record| record.phase == Phase::Ready) else {
            return Ok(false);
        };
        if self.report(id).await?.is_none() {
            // What the volume's own opening failed with is not to be covered up.
            if let Some(reason) = self.failure(id) {
                return Err(Error::unavailable(reason));
            }
            // Opening it would drop a replica that is away; reading is no reason to.
            let in_sync = record
                .replicas
                .iter()
                .filter(|replica| replica.state == Member::InSync);
            if let Some(away) = in_sync.into_iter().find(|replica| !self.is_open(replica.store)) {
                return Err(Error::unavailable(format!(
                    "store {:?} is away",
                    self.store_name(away.store).as_str()
                )));
            }
            self.try_open_volume(&record).await?;
            turn.opened = true;
        }
        Ok(true)
    }

    /// Closes a volume that was opened for its turn, unless somebody has use for it by now.
    async fn close_scrubbed(&self, id: VolumeId) {
        let _lock = self.volume_locks.lock(id).await;
        let served = match self.report(id).await {
            Ok(Some(report)) => report.served,
            Ok(None) | Err(_) => return,
        };
        if !served && let Ok(Some(record)) = self.look(|view| view.get::<VolumeRecord>(id)) {
            self.close_volume(&record).await;
        }
    }

    /// What an open volume holds on all replicas.
    async fn bytes_to_scrub(&self, id: VolumeId) -> Result<u64> {
        let Some(report) = self.report(id).await? else {
            return Ok(0);
        };
        let stores = self.look(|view| {
            let Some(volume) = view.get::<VolumeRecord>(id)? else {
                return Ok(Vec::new());
            };
            let stores = volume.held().map(|(_, r)| view.get::<StoreRecord>(r.store));
            stores.collect::<Result<Vec<_>>>()
        })?;
        let extents = stores.into_iter().flatten().map(|store| store.extent_bytes);
        Ok(extents.map(|bytes| report.stats.allocated_extents * bytes).sum())
    }

    /// Saves progress, if the pass is still the volume's current one.
    fn save_pass(&self, id: VolumeId, pass: &ScrubPass) -> Result<()> {
        self.change_pass(id, pass, |record, current| {
            record.current = Some(ScrubPass {
                // It may have been set meanwhile.
                bytes_per_second: current.bytes_per_second,
                ..pass.clone()
            });
        })
    }

    fn finish_pass(&self, turn: &mut Turn) -> Result<()> {
        let pass = &mut turn.pass;
        pass.finished_unix_seconds = Some(unix_seconds());
        pass.total_bytes = pass.verified_bytes;
        self.change_pass(turn.id, pass, |record, _| {
            record.last = Some(pass.clone());
            record.current = None;
        })
    }

    fn change_pass(
        &self,
        id: VolumeId,
        pass: &ScrubPass,
        change: impl FnOnce(&mut ScrubRecord, &ScrubPass),
    ) -> Result<()> {
        self.change(|tx| {
            // Gone with its volume, ended, or asked for anew: then there is nothing to keep.
            if let Some(mut record) = tx.get::<ScrubRecord>(id)?
                && let Some(current) = record.current.take_if(|current| current.number == pass.number)
            {
                change(&mut record, &current);
                tx.update(&record)?;
            }
            Ok(())
        })
    }
}

/// What a pass adds up.
trait Add {
    /// Adds what was seen; whether any damage is in it.
    fn add(&mut self, seen: &Verified) -> bool;
}

impl Add for ScrubPass {
    fn add(&mut self, seen: &Verified) -> bool {
        self.verified_bytes += seen.bytes;
        self.healed_blocks += seen.healed_blocks;
        self.healed_areas += seen.healed_areas;
        self.lost_blocks += seen.lost_blocks;
        seen.healed_blocks + seen.healed_areas + seen.lost_blocks > 0
    }
}
