//! The stores of a life: opened, watched, and brought back, as the daemon does it (its `operations/store.rs`, `start.rs`
//! and `replicas.rs`).
//!
//! A store that cannot be opened is out of use and tried again and again. One that latches as faulty is written down in the
//! catalog, and stays out until the operator says otherwise: open volumes let go of it, it is closed, its fault is
//! forgotten, and it is opened anew. A file with a call that hangs keeps its lock, so such a store cannot be opened again
//! before the process ends.

use std::rc::Rc;
use std::time::Duration;

use libvol::catalog::Loss;
use libvol::disk::DiskFile;
use libvol::disk::sim::Rng;
use libvol::error::Error;
use libvol::limits::STORE_CLOSING_MAX;
use libvol::runtime::{sleep, timeout};
use libvol::store::{self, Expect, Finding, Found, Renewal, Severity, StoreHandle, StoreIo};

use super::life::{Running, STUCK};
use super::rest::is_torn_superblock;

/// Between two looks at stores and replicas.
pub const LOOK: Duration = Duration::from_millis(2);

/// A store in use.
#[derive(Clone)]
pub struct Open {
    /// Its keeper.
    pub handle: StoreHandle,
    /// Its data path.
    pub io: Rc<StoreIo>,
}

impl Running {
    /// A store in use, faulty or not.
    pub(super) fn seat(&self, disk: usize) -> Option<Open> {
        self.seats[disk].borrow().clone()
    }

    /// A store in use and well.
    pub(super) fn well(&self, disk: usize) -> Option<Open> {
        self.seat(disk).filter(|open| open.handle.fault().is_none())
    }

    /// Opens every store that is not latched faulty.
    pub(super) async fn open_stores(&self) {
        for disk in 0..self.seats.len() {
            if let Err(error) = self.open_store(disk).await {
                self.tolerate_on(disk, &error);
            }
        }
    }

    async fn open_store(&self, disk: usize) -> libvol::Result<()> {
        if let Some(reason) = self.life.catalog.records().faults.get(&disk) {
            return Err(Error::unavailable(format!("latched faulty: {reason}")));
        }
        // The process's own lock, held by what it cannot let go.
        if self.life.driver.hangs(disk) || self.unclosed.borrow().contains(&disk) {
            return Err(Error::unavailable("in use by another process"));
        }
        let expect = Expect {
            installation: None,
            store: Some(self.life.stores[disk]),
        };
        let file = self.life.driver.file(disk);
        let handle = match self.life.plan.lineage {
            true => self.open_judged(disk, &file, expect).await?,
            false => store::open(&file, expect).await?,
        };
        let is_bad = |f: &&Finding| f.severity == Severity::Damage && !is_torn_superblock(f);
        if let Some(finding) = handle.findings().iter().find(is_bad) {
            self.tolerate_on(disk, &Error::damaged(finding.text.clone()));
        }
        let io = StoreIo::attach(&handle).expect("simulated");
        self.seats[disk].replace(Some(Open { handle, io }));
        Ok(())
    }

    /// Opens a store whose lineage the catalog keeps.
    async fn open_judged(&self, disk: usize, file: &DiskFile, expect: Expect) -> libvol::Result<StoreHandle> {
        let mut rng = self.rng("open", disk as u32);
        let opening = store::begin_open(file, expect).await?;
        let renewal = self.judge(disk, &opening.found(), &mut rng).await;
        let handle = opening.finish(Some(renewal)).await?;
        self.life.catalog.confirm_store(&mut rng, disk, &handle).await;
        match self.destroy_again_on(disk, &handle).await {
            Ok(()) => self.life.catalog.records().opened_anew(disk),
            // The next opening tries anew.
            Err(error) => self.tolerate_on(disk, &error),
        }
        Ok(handle)
    }

    async fn judge(&self, disk: usize, found: &Found, rng: &mut Rng) -> Renewal {
        let judged = self.life.catalog.judge_store(rng, disk, found).await;
        if let Some(old) = judged.old {
            self.life
                .driver
                .note(|| format!("disk {disk}: an old copy: {}", old.why));
            self.tolerate_on(disk, &Error::damaged(old.why));
            let last = old.losses.iter().find(|(_, loss)| *loss == Loss::Last);
            assert_eq!(
                last, None,
                "disk {disk}: a volume's last replica in sync is on an old copy"
            );
        }
        judged.renewal
    }

    /// What was destroyed before and is there again, or still, is destroyed once more.
    async fn destroy_again_on(&self, disk: usize, handle: &StoreHandle) -> libvol::Result<()> {
        let found = async { Ok((handle.volumes().await?, handle.remains().await?)) };
        let (live, remains) = self.patiently(disk, found).await?;
        for volume in live.into_iter().chain(remains) {
            if self.life.catalog.is_gone_from(volume, disk) {
                self.patiently(disk, handle.destroy_volume(volume)).await?;
            }
        }
        Ok(())
    }

    /// Waits until nothing is left to be overwritten on disks that were old copies.
    ///
    /// # Panics
    /// When that takes too long.
    pub(super) async fn until_scrubbed(&self) {
        let old = self.life.catalog.records().ever_old.clone();
        for open in old.iter().filter_map(|disk| self.seat(*disk)) {
            let scrubbed = async {
                while open.handle.space().pending_scrub > 0 {
                    sleep(LOOK).await;
                }
            };
            assert!(
                timeout(STUCK, scrubbed).await.is_some(),
                "what was destroyed is not overwritten"
            );
        }
    }

    /// What the daemon's background tasks do for stores.
    pub(super) async fn watch_stores(&self) {
        let mut rng = self.rng("operator", 0);
        let mut looks = 0u32;
        // Some operators are quick, some come in another life.
        let patience = [3, 20, 100, 1_000_000][rng.below(4) as usize];
        loop {
            sleep(LOOK).await;
            looks += 1;
            for disk in 0..self.seats.len() {
                self.record_fault(disk).await;
                if self.seat(disk).is_none() && looks.is_multiple_of(8) {
                    // Why it stays away may have changed; it is tried again.
                    if let Err(error) = self.open_store(disk).await {
                        self.tolerate_on(disk, &error);
                    }
                }
            }
            if looks.is_multiple_of(patience) {
                for disk in 0..self.seats.len() {
                    self.reopen_store(disk).await;
                }
            }
        }
    }

    async fn record_fault(&self, disk: usize) {
        let Some(reason) = self.seat(disk).and_then(|open| open.handle.fault()) else {
            return;
        };
        if self.life.catalog.records().faults.contains_key(&disk) {
            return;
        }
        let mut rng = self.rng("fault", disk as u32);
        self.life.catalog.latch_fault(&mut rng, disk, reason).await;
    }

    /// The operator's word that a faulty store may be used again.
    async fn reopen_store(&self, disk: usize) {
        if !self.life.catalog.records().faults.contains_key(&disk) {
            return;
        }
        if let Some(open) = self.seat(disk) {
            if !self.let_go_of(disk).await {
                return;
            }
            self.life.driver.note(|| format!("disk {disk}: opened anew"));
            self.seats[disk].replace(None);
            self.close_store(disk, open).await;
        }
        let mut rng = self.rng("reopen", disk as u32);
        self.life.catalog.clear_fault(&mut rng, disk).await;
        if let Err(error) = self.open_store(disk).await {
            self.tolerate_on(disk, &error);
        }
    }

    /// Every open volume lets go of the store. Whether they could.
    async fn let_go_of(&self, disk: usize) -> bool {
        let numbers: Vec<u32> = self.life.catalog.records().live.keys().copied().collect();
        for number in numbers {
            let Some(entry) = self.life.catalog.entry(number) else {
                continue;
            };
            let Some(place) = entry.replicas.iter().position(|on| *on == disk) else {
                continue;
            };
            let _lock = self.lock(number).await;
            let Some(volume) = self.volume(number) else {
                continue;
            };
            if volume.let_go(place).await.is_err() {
                // Nobody has needed the replica since its store failed: whoever flushes finds out.
                if volume.flush().await.is_err() || volume.let_go(place).await.is_err() {
                    return false;
                }
            }
        }
        true
    }

    /// Closes a store. Whether its file is let go.
    pub(super) async fn close_store(&self, disk: usize, open: Open) -> bool {
        let Open { handle, io } = open;
        drop(io);
        match timeout(STORE_CLOSING_MAX, handle.close()).await {
            Some(Ok(())) => true,
            Some(Err(error)) => {
                self.tolerate_on(disk, &error);
                true
            }
            None => {
                assert!(
                    self.life.driver.hangs(disk),
                    "disk {disk}: its store does not close"
                );
                self.unclosed.borrow_mut().insert(disk);
                false
            }
        }
    }

    /// Closes all of them. Whether the process could end by itself.
    pub(super) async fn close_stores(&self) -> bool {
        let mut all = true;
        for disk in 0..self.seats.len() {
            self.record_fault(disk).await;
            if let Some(open) = self.seats[disk].take() {
                all &= self.close_store(disk, open).await;
            }
        }
        all
    }
}
