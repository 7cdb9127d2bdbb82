//! Start and stop of everything the operations stand on.
//!
//! Start: shards → stores (one that cannot be opened is offline with its reason; the rest is served; one that is an old copy
//! gives up its replicas, and what it has brought back of destroyed volumes is destroyed again, see [`super::lineage`]) → unfinished
//! creations rolled back → interrupted resizes finished → attachments served again at their old sockets → destructions
//! resumed → volumes that a crash left dirty recovered in the background → integrity scrub.
//!
//! Stop (the API has ended): scrub ended, its progress saved → no new sessions → sessions ended → volumes flushed, cleaned, closed → stores closed →
//! shards ended.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use libvol::catalog::{AttachmentRecord, Catalog, DestroyRecord, Leaving, Phase, StoreRecord, VolumeRecord};
use libvol::disk::Engine;
use libvol::keys::KeyService;
use libvol::limits::STORE_LOCK_WAIT;
use libvol::{Error, Result};
use tokio::task::JoinSet;

use super::attach::remove_socket;
use super::locks::Locks;
use super::scrub::Scrubber;
use super::volume::holder;
use super::{Audit, Operations, Seat, Settings};
use crate::config::Tcp;
use crate::data_dir::DataDir;
use crate::passed::PassedDoors;
use crate::shard::{Bound, Gate, Shards, TlsFiles, Versions};

/// How often open stores are asked for faults. They tell by themselves; this is for a record that could not be made.
const FAULT_POLL: Duration = Duration::from_millis(250);
/// How often a background recovery is asked whether it has ended.
const RECOVERY_POLL: Duration = Duration::from_millis(200);

impl Operations {
    /// Brings everything up.
    ///
    /// # Errors
    /// What no daemon can run without: catalog, keystore, shards. Stores and volumes that fail are reported, not fatal.
    pub(crate) async fn start(
        dirs: DataDir,
        catalog: Catalog,
        keys: Arc<dyn KeyService>,
        shard_count: usize,
        engine: impl Into<Engine>,
        settings: Settings,
        passed: PassedDoors,
    ) -> Result<Arc<Self>> {
        let audit = libvol::audit::Log::open(&dirs.audit())?;
        let (claim, claims) = tokio::sync::mpsc::unbounded_channel();
        let operations = Arc::new(Self {
            dirs,
            catalog: Arc::new(catalog),
            keys,
            audit: Arc::new(Audit::new(audit)),
            shards: Shards::start(shard_count, engine.into())?,
            stores: RwLock::default(),
            failures: Mutex::new(HashMap::new()),
            volume_locks: Locks::default(),
            retries: super::replicas::Retries::default(),
            blocked: Mutex::default(),
            stores_lock: tokio::sync::Mutex::default(),
            faults: Arc::default(),
            scrubber: Scrubber::new(settings.scrub),
            resync_bytes_per_second: settings.resync_bytes_per_second,
            claims: claim,
            not_taken_over: Mutex::default(),
            passed,
            gate: Mutex::default(),
            background: Mutex::new(JoinSet::new()),
            started: Instant::now(),
        });
        operations.open_stores().await?;
        operations.take_up_volumes().await?;
        operations.clear_out_stores().await?;
        operations.resume_destroys()?;
        operations.watch_faults();
        operations.watch_replicas();
        operations.watch_healing();
        operations.start_scrubbing();
        operations.watch_floors();
        operations.watch_claims(claims);
        Ok(operations)
    }

    /// A daemon without its process, with its own catalog and keystore in that directory.
    ///
    /// # Errors
    /// As [`Operations::start`].
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) async fn start_in(data: &std::path::Path, shard_count: usize) -> Result<Arc<Self>> {
        let dirs = DataDir::take(data)?;
        let catalog = Catalog::open(&dirs.catalog())?;
        let keys = Arc::new(libvol::keys::LocalKeystore::open_or_create(&dirs.keys())?);
        let (engine, settings) = (libvol::disk::EngineChoice::Threads, Settings::default());
        Self::start(
            dirs,
            catalog,
            keys,
            shard_count,
            engine,
            settings,
            PassedDoors::default(),
        )
        .await
    }

    /// Serves NBD over TCP, if there are addresses; where.
    ///
    /// # Errors
    /// `Invalid` with what is wrong with the certificates; when the thread cannot be started.
    pub(crate) async fn listen(&self, bound: Bound, tcp: &Tcp, engine: Engine) -> Result<Option<String>> {
        if bound.is_empty() {
            return Ok(None);
        }
        let dir = tcp.tls_dir.as_ref().ok_or_else(|| {
            Error::invalid("sockets for NBD over TCP need TLS: give --tls-dir (or nbd.tls_dir)")
        })?;
        let gate = Gate::open(
            bound,
            TlsFiles::load(dir, Versions::of(tcp.tls_1_2))?,
            &self.shards,
            engine,
        )
        .await?;
        let texts: Vec<String> = gate.addresses().iter().map(ToString::to_string).collect();
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = Some(gate);
        Ok(Some(texts.join(", ")))
    }

    async fn open_stores(self: &Arc<Self>) -> Result<()> {
        let mut opening = JoinSet::new();
        for record in self.look(|view| view.all::<StoreRecord>())? {
            if record.leaving == Some(Leaving::Lost) {
                self.set_seat(record.id, Seat::Closed("given up as lost".into()));
                continue;
            }
            let operations = self.clone();
            opening.spawn(async move {
                let opened = operations.open_recorded(&record, STORE_LOCK_WAIT).await;
                (record, opened)
            });
        }
        while let Some(result) = opening.join_next().await {
            let (record, opened) = result.map_err(|e| Error::internal(format!("opening stores: {e}")))?;
            let seat = match opened {
                Ok(handle) => {
                    tracing::info!(store = %record.name, path = %record.path.display(), "open");
                    Seat::Open(handle)
                }
                Err(e) => {
                    tracing::error!(store = %record.name, path = %record.path.display(), "out of use: {e}");
                    Seat::Closed(e.to_string())
                }
            };
            self.set_seat(record.id, seat);
        }
        Ok(())
    }

    /// What moves that a crash interrupted have left on stores.
    async fn clear_out_stores(&self) -> Result<()> {
        for store in self.look(|view| view.all::<StoreRecord>())? {
            self.clear_out_or_warn(&store).await;
        }
        Ok(())
    }

    /// Every volume to where the catalog says it should be.
    async fn take_up_volumes(self: &Arc<Self>) -> Result<()> {
        let attachments = self.look(|view| view.all::<AttachmentRecord>())?;
        let kept: Vec<PathBuf> = attachments.iter().flat_map(|a| self.sockets(a)).collect();
        for path in self
            .dirs
            .sockets()
            .into_iter()
            .filter(|path| !kept.contains(path))
        {
            remove_socket(&path);
        }
        for record in self.look(|view| view.all::<VolumeRecord>())? {
            let _lock = self.volume_locks.lock(record.id).await;
            match record.phase {
                Phase::Destroying => {}
                Phase::Creating => match self.roll_back_creation(&record).await {
                    Ok(()) => {
                        tracing::info!(volume = %record.path, "its interrupted creation is rolled back")
                    }
                    Err(e) => {
                        tracing::warn!(volume = %record.path, "its interrupted creation stays for now: {e}")
                    }
                },
                Phase::Ready => {
                    if let Err(e) = self.take_up(&record).await {
                        tracing::error!(volume = %record.path, "not served: {e}");
                        self.set_failure(record.id, Some(e.to_string()));
                    }
                }
            }
        }
        Ok(())
    }

    async fn take_up(self: &Arc<Self>, record: &VolumeRecord) -> Result<()> {
        self.check_not_old(record)?;
        let held = self.look(|view| holder(view, record.id))?;
        let away = record.held().any(|(_, replica)| !self.is_open(replica.store));
        if away && held.is_none() {
            // `volume show` says which store is away; there is nothing to bring up.
            return Ok(());
        }
        let record = self.settle_size(record).await?;
        match held {
            Some((attachment, vm)) => {
                self.customer_of(&vm)?;
                self.serve(&record, &attachment, &vm).await?;
                if let Err(e) = self.serve_incoming(&record, &attachment, &vm).await {
                    tracing::error!(volume = %record.path, vm = %vm.name, "the attachment that is to take over is not served: {e}");
                }
                tracing::info!(volume = %record.path, vm = %vm.name, epoch = %attachment.epoch, "served again");
            }
            None if self.is_dirty(&record).await? => {
                self.open_volume(&record).await?;
                tracing::info!(volume = %record.path, "was not closed cleanly; recovering");
                self.close_when_idle(record);
            }
            None => {}
        }
        Ok(())
    }

    /// Whether a crash left write-intent marks.
    async fn is_dirty(&self, record: &VolumeRecord) -> Result<bool> {
        let dataset = record.dataset;
        for (_, handle) in self.stores_at_hand(record) {
            if handle.space().dirty == 0 {
                continue;
            }
            let extents = self.extents_of(&handle, dataset).await?;
            if extents.iter().any(|extent| extent.dirty) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for an open volume's recovery, and for replicas that catch up, then closes it unless somebody has use for it by
    /// then.
    pub(super) fn close_when_idle(self: &Arc<Self>, record: VolumeRecord) {
        let operations = self.clone();
        self.in_background(async move {
            let id = record.id;
            loop {
                match operations.report(id).await {
                    Ok(Some(report)) if report.served => return,
                    Ok(Some(report)) if report.failure.is_none() && report.is_busy() => {
                        tokio::time::sleep(RECOVERY_POLL).await;
                    }
                    Ok(Some(_)) => break,
                    Ok(None) | Err(_) => return,
                }
            }
            let _lock = operations.volume_locks.lock(id).await;
            // Under the lock: an attach or a deletion may have come first.
            if matches!(operations.report(id).await, Ok(Some(report)) if !report.served) {
                operations.close_volume(&record).await;
                tracing::info!(volume = %record.path, "closed again: nothing is left to be done");
            }
        });
    }

    fn resume_destroys(self: &Arc<Self>) -> Result<()> {
        for record in self.look(|view| view.all::<DestroyRecord>())? {
            if record.finished_unix_seconds.is_none() {
                tracing::info!(volume = %record.path, id = %record.volume, "its destruction goes on");
                self.start_destroying(record.volume);
            }
        }
        Ok(())
    }

    /// Writes faults down as soon as stores latch.
    ///
    /// The latch itself holds from the instant of the failure, in this process. It survives the process only once the catalog
    /// has it, a commit later: a crash in those milliseconds forgets it, and the next start opens the store like after any
    /// crash. Nothing was acknowledged on the failed sync, and recovery reads what the device has, past every cache.
    fn watch_faults(self: &Arc<Self>) {
        let operations = self.clone();
        self.in_background(async move {
            loop {
                if let Err(e) = operations.record_faults() {
                    tracing::error!("a store's fault cannot be recorded: {e}");
                }
                let _ = tokio::time::timeout(FAULT_POLL, operations.faults.notified()).await;
            }
        });
    }

    /// Brings everything down, clean.
    pub(crate) async fn stop(self: &Arc<Self>) {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(gate) = gate {
            tokio::task::block_in_place(|| gate.close());
        }
        self.stop_scrubbing().await;
        // The watcher and waits for scrubs end here; the scrubs themselves end with their stores and go on at the next start.
        let mut background = std::mem::take(
            &mut *self
                .background
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
        background.shutdown().await;
        let mut closing = JoinSet::new();
        for index in 0..self.shards.count() {
            let operations = self.clone();
            closing.spawn(async move { operations.close_volumes_of(index).await });
        }
        while closing.join_next().await.is_some() {}
        self.note_healing().await;
        if let Err(e) = self.record_faults() {
            tracing::error!("a store's fault cannot be recorded: {e}");
        }
        for (_, seat) in self.seats() {
            if let Seat::Open(handle) = seat {
                self.close_store(&handle).await;
            }
        }
        if let Err(e) = self.record_floors() {
            tracing::error!("what stores have committed cannot be recorded: {e}");
        }
        if let Ok(attachments) = self.look(|view| view.all::<AttachmentRecord>()) {
            for attachment in attachments {
                self.sockets(&attachment)
                    .for_each(|socket| remove_socket(&socket));
            }
        }
    }

    /// Closes all volumes of one shard, side by side.
    async fn close_volumes_of(&self, index: usize) {
        let Some(shard) = self.shards.iter().nth(index) else {
            return;
        };
        let open = match shard
            .call(|registry| async move { Ok(registry.open_volumes()) })
            .await
        {
            Ok(open) => open,
            Err(e) => {
                tracing::error!("shard {index}: {e}");
                return;
            }
        };
        let closed = open.into_iter().map(|id| async move {
            let closed = shard
                .call(move |registry| async move { registry.close(id).await })
                .await;
            if let Err(e) = closed {
                tracing::error!(volume = %id, "closed with an error, its next opening recovers: {e}");
            }
        });
        futures_util::future::join_all(closed).await;
    }
}
