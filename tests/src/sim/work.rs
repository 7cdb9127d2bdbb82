//! Workers on one volume, and what happens to the volume meanwhile: it grows, is closed and opened again, or destroyed.

use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use libvol::Kind;
use libvol::crypto::seal::PlainBuf;
use libvol::disk::sim::Rng;
use libvol::limits::{BLOCK, SECTOR_SIZE};
use libvol::runtime::{sleep, spawn, timeout};
use libvol::store::Member;
use libvol::volume::Volume;

use super::life::{BLOCK_SECTORS, Flag, Running, STUCK};
use super::model::Model;
use super::plan::EXTENT_BLOCKS;
use super::verify::read;

/// In the last round every replica comes back within this.
const RESYNC_MAX: Duration = Duration::from_secs(30);

/// Sectors of an extent.
const EXTENT_SECTORS: u64 = EXTENT_BLOCKS * BLOCK_SECTORS as u64;

/// Of so few free extents an empty store that two volumes compete for may be left.
const FEW: u32 = 2;

/// What happens to a volume while its workers work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Nothing,
    Grow,
    Reopen,
    Destroy,
}

/// Works on an open volume until the round ends for it.
pub(super) async fn sessions(running: Rc<Running>, number: u32, mut volume: Rc<Volume>) {
    let mut rng = running.rng("sessions", number);
    for session in 0..2 {
        let turn = any_turn(&running, &mut rng);
        let closing = Flag::default();
        let workers: Vec<_> = (0..1 + rng.below(u64::from(running.life.size.workers)) as u32)
            .map(|worker| {
                let worker = Worker {
                    running: running.clone(),
                    volume: volume.clone(),
                    number,
                    closing: closing.clone(),
                    rng: running.rng("worker", number << 8 | session << 4 | worker),
                };
                spawn(worker.work())
            })
            .collect();
        if turn != Turn::Nothing {
            sleep(Duration::from_micros(rng.below(20_000))).await;
        }
        let mut ended = false;
        match turn {
            Turn::Nothing => {}
            Turn::Grow => grow(&running, number, &volume, &mut rng).await,
            Turn::Reopen => {
                closing.raise();
                ended = !close(&running, number, &volume).await;
            }
            Turn::Destroy => {
                closing.raise();
                begin_destroying(&running, number, &volume, &mut rng).await;
            }
        }
        for worker in workers {
            worker.await;
        }
        match turn {
            _ if ended => return,
            Turn::Destroy => return running.destroy(number).await,
            Turn::Reopen => {
                let opened = {
                    let _lock = running.lock(number).await;
                    running.open(number).await
                };
                let Some(opened) = opened else { return };
                volume = opened;
                if !running.verify(number, &volume).await {
                    break;
                }
            }
            Turn::Nothing | Turn::Grow => break,
        }
    }
    let limit = match (running.life.round.is_last, rng.one_in(2)) {
        (true, _) => RESYNC_MAX,
        (false, true) => Duration::from_millis(200),
        (false, false) => Duration::ZERO,
    };
    let whole = running.until_whole(number, &volume, limit).await;
    assert!(
        whole || !running.life.round.is_last || lacks_room(&running, number),
        "volume {number}: a replica stays out of sync: {:?}",
        volume.replicas()
    );
    close(&running, number, &volume).await;
}

/// Whether a store is too full for a replica that is out.
fn lacks_room(running: &Running, number: u32) -> bool {
    let Some(entry) = running.life.catalog.entry(number) else {
        return false;
    };
    let in_sync = entry.in_sync();
    let mut out = entry.replicas.iter().filter(|disk| !in_sync.contains(*disk));
    out.any(|disk| {
        running
            .well(*disk)
            .is_some_and(|open| open.handle.space().free < FEW)
    })
}

fn any_turn(running: &Running, rng: &mut Rng) -> Turn {
    let turn = [
        Turn::Nothing,
        Turn::Nothing,
        Turn::Nothing,
        Turn::Grow,
        Turn::Reopen,
        Turn::Reopen,
        Turn::Destroy,
    ][rng.below(7) as usize];
    match turn {
        _ if running.life.round.is_calm => Turn::Nothing,
        Turn::Destroy if running.life.round.is_frugal => Turn::Nothing,
        turn => turn,
    }
}

async fn begin_destroying(running: &Running, number: u32, volume: &Volume, rng: &mut Rng) {
    let _lock = running.lock(number).await;
    running.life.catalog.begin_destruction(rng, number).await;
    running.volumes.borrow_mut().remove(&number);
    ends(number, "its requests", volume.abandon()).await;
    running
        .life
        .driver
        .note(|| format!("volume {number}: destruction begins"));
}

async fn grow(running: &Running, number: u32, volume: &Volume, rng: &mut Rng) {
    let _lock = running.lock(number).await;
    let Some(entry) = running.life.catalog.entry(number) else {
        return;
    };
    let blocks = entry.blocks + 1 + rng.below(2 * EXTENT_BLOCKS);
    if running.set_size(number, blocks, rng).await {
        volume.grow(blocks * BLOCK);
    }
}

/// Closes a volume: what was acknowledged is durable then. Whether it closed.
async fn close(running: &Running, number: u32, volume: &Volume) -> bool {
    let _lock = running.lock(number).await;
    running.volumes.borrow_mut().remove(&number);
    let mut flush = None;
    // What ends while it closes is flushed, too: the flush begins when nothing is in flight any more.
    ends(number, "its requests", volume.abandon()).await;
    with_model(running, number, |model| flush = Some(model.start_flush()));
    match ends(number, "its closing", volume.close()).await {
        Ok(()) => {
            assert_eq!(volume.failure(), None);
            if let Some(flush) = flush {
                with_model(running, number, |model| model.flushed(flush));
            }
            running.life.driver.note(|| format!("volume {number}: closed"));
            true
        }
        Err(error) => {
            running.tolerate(number, &error);
            false
        }
    }
}

/// What a volume does ends, whatever hangs.
async fn ends<T>(number: u32, what: &str, work: impl Future<Output = T>) -> T {
    let Some(result) = timeout(STUCK, work).await else {
        panic!("volume {number}: {what} does not end");
    };
    result
}

fn with_model<T>(running: &Running, number: u32, look: impl FnOnce(&mut Model) -> T) -> T {
    let mut models = running.life.models.borrow_mut();
    look(models.get_mut(&number).expect("it serves"))
}

struct Worker {
    running: Rc<Running>,
    volume: Rc<Volume>,
    number: u32,
    /// The volume refuses requests from now on.
    closing: Flag,
    rng: Rng,
}

impl Worker {
    async fn work(mut self) {
        for _ in 0..self.running.life.size.requests {
            if !self.request().await {
                return;
            }
            if self.rng.one_in(5) {
                sleep(Duration::from_micros(self.rng.below(20_000))).await;
            }
        }
    }

    fn model<T>(&self, look: impl FnOnce(&mut Model) -> T) -> T {
        with_model(&self.running, self.number, look)
    }

    /// One request; whether to go on.
    async fn request(&mut self) -> bool {
        if self.running.life.round.churns && self.is_joining() && self.rng.one_in(2) {
            return self.churn().await;
        }
        if self.running.life.round.is_calm {
            return self.calm_request().await;
        }
        let range = self.any_range();
        let trims = self.running.life.plan.trims && !self.running.life.round.is_frugal;
        let kind = self.rng.below(if trims { 12 } else { 9 });
        if self.rng.one_in(30) {
            return self.walk().await;
        }
        let fua = self.rng.one_in(4);
        let no_hole = self.rng.one_in(3);
        if kind > 3 && self.is_off_limits(&range) {
            return self.read(range).await;
        }
        match kind {
            0 => self.flush().await,
            1..=3 => self.read(range).await,
            4..=8 => self.write(range, fua).await,
            kind => self.zero(range, kind, fua, no_hole).await,
        }
    }

    /// A read or a write of the first blocks, which nothing makes durable.
    async fn calm_request(&mut self) -> bool {
        let blocks = (self.volume.size_bytes() / BLOCK).min(2);
        let start = self.rng.below(blocks) as usize * BLOCK_SECTORS;
        let range = start..start + BLOCK_SECTORS;
        match self.rng.one_in(3) || self.is_off_limits(&range) {
            true => self.read(range).await,
            false => self.write(range, false).await,
        }
    }

    /// Whether a replica catches up.
    fn is_joining(&self) -> bool {
        let mut replicas = self.volume.replicas().into_iter();
        replicas.any(|replica| replica.state == Member::Resyncing)
    }

    /// Gives an extent back and writes it soon after: the replica that catches up may still hold the old one in its place.
    async fn churn(&mut self) -> bool {
        let size = self.volume.size_bytes() / SECTOR_SIZE as u64;
        let start = self.rng.below(size) / EXTENT_SECTORS * EXTENT_SECTORS;
        let range = start as usize..(start + EXTENT_SECTORS).min(size) as usize;
        if self.is_off_limits(&range) {
            return self.read(range).await;
        }
        if !self.zero(range.clone(), 9, false, false).await {
            return false;
        }
        sleep(Duration::from_micros(self.rng.below(3000))).await;
        self.write(range, false).await
    }

    fn note(&self, what: &str, range: &Range<usize>) {
        self.running.life.driver.note(|| {
            format!(
                "volume {}: {what} sectors {}..{}",
                self.number, range.start, range.end
            )
        });
    }

    async fn flush(&mut self) -> bool {
        let flush = self.model(Model::start_flush);
        let result = ends(self.number, "a flush", self.volume.flush()).await;
        match result {
            Ok(()) => {
                self.model(|model| model.flushed(flush));
                self.note("flushed", &(0..0));
                true
            }
            Err(error) => self.refused(&error),
        }
    }

    /// A walk of the integrity scrub over all of the volume.
    async fn walk(&mut self) -> bool {
        let work = self.volume.verify_extents(0, self.volume.size_bytes());
        match ends(self.number, "a scrub", work).await {
            Ok(_) => true,
            Err(error) => self.refused(&error),
        }
    }

    async fn read(&mut self, range: Range<usize>) -> bool {
        let reading = self.model(|model| model.start_read(range.clone()));
        let bytes = range.start * SECTOR_SIZE..range.end * SECTOR_SIZE;
        let mut found = vec![0; bytes.len()];
        let work = read(&self.volume, bytes, &mut found);
        match ends(self.number, "a read", work).await {
            Ok(()) => {
                self.note("read", &range);
                self.model(|model| model.check_read(reading, &found));
                self.acknowledged();
                true
            }
            Err(error) => self.refused(&error),
        }
    }

    async fn write(&mut self, range: Range<usize>, fua: bool) -> bool {
        let len = range.len() * SECTOR_SIZE;
        let mut payload = self.volume.pool().get(len);
        let started = self.model(|model| model.start_write(range.clone(), &mut payload));
        self.note(&format!("writes {started:?} fua {fua}"), &range);
        let offset = (range.start * SECTOR_SIZE) as u64;
        let work = self.volume.write(offset, PlainBuf(payload), len as u32, fua);
        let result = ends(self.number, "a write", work).await;
        self.settle(started, result, fua, &range)
    }

    async fn zero(&mut self, range: Range<usize>, kind: u64, fua: bool, no_hole: bool) -> bool {
        let started = self.model(|model| model.start_zeros(range.clone()));
        self.note(&format!("zeros {started:?} fua {fua}"), &range);
        let (offset, len) = (
            (range.start * SECTOR_SIZE) as u64,
            (range.len() * SECTOR_SIZE) as u64,
        );
        let result = match kind {
            9 => ends(self.number, "a trim", self.volume.trim(offset, len, fua)).await,
            _ => {
                let work = self.volume.write_zeroes(offset, len, fua, no_hole);
                ends(self.number, "a write of zeros", work).await
            }
        };
        self.settle(started, result, fua, &range)
    }

    fn settle(
        &mut self,
        started: super::model::Started,
        result: libvol::Result<()>,
        fua: bool,
        range: &Range<usize>,
    ) -> bool {
        match result {
            Ok(()) => {
                self.note(&format!("acknowledged {started:?}"), range);
                self.model(|model| model.acknowledge(started, fua));
                self.acknowledged();
                true
            }
            Err(error) => {
                self.model(|model| model.fail(started));
                self.refused(&error)
            }
        }
    }

    fn acknowledged(&self) {
        let count = &self.running.life.counters.acknowledged;
        count.set(count.get() + 1);
    }

    /// Whether to go on after a refusal.
    fn refused(&self, error: &libvol::Error) -> bool {
        match error.kind() {
            Kind::NoSpace => true,
            Kind::Unavailable if self.closing.is_up() => false,
            _ => {
                self.running.tolerate(self.number, error);
                false
            }
        }
    }

    /// Damage that has not been found yet: see [`super::plan::Faults::writes_beside_damage`].
    fn is_off_limits(&self, range: &Range<usize>) -> bool {
        let life = &self.running.life;
        let extents = range.start as u64 / EXTENT_SECTORS..=(range.end as u64 - 1) / EXTENT_SECTORS;
        extents
            .into_iter()
            .any(|extent| life.off_limits.contains(&(self.number, extent as u32)))
    }

    /// One sector to three extents, often with an edge on a boundary.
    fn any_range(&mut self) -> Range<usize> {
        let size = self.volume.size_bytes() / SECTOR_SIZE as u64;
        let rng = &mut self.rng;
        let unit = [1, BLOCK_SECTORS as u64, EXTENT_SECTORS][rng.below(3) as usize];
        let start = rng.below(size) / unit * unit;
        let len_max = [2, BLOCK_SECTORS as u64, EXTENT_SECTORS, 3 * EXTENT_SECTORS][rng.below(4) as usize];
        let len = (1 + rng.below(len_max)).next_multiple_of(unit);
        start as usize..(start + len).min(size) as usize
    }
}
