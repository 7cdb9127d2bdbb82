//! Stores.
//!
//! Add: file made (or device opened) and locked → formatted → opened → record durable → answered. A failure before the
//! record removes a file that was made here. A crash there leaves a file that the catalog does not know; adding it again
//! is refused with that hint, so nothing of anybody's is overwritten.
//!
//! Remove: record gone (only when no volume and no unfinished destruction is on it) → closed. The file stays: it is the
//! operator's.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libvol::catalog::{DestroyRecord, Leaving, StoreFault, StoreRecord, VolumeRecord};
use libvol::control;
use libvol::disk::{Disk, DiskFile, MediumClass, OpenMode};
use libvol::ids::{Incarnation, Name, StoreId};
use libvol::limits::{EXTENT_BYTES_DEFAULT, STORE_CLOSING_MAX, STORES_MAX};
use libvol::runtime;
use libvol::store::{self, FormatOptions, Lineage, StoreHandle};
use libvol::{Error, Result};

use super::relocate::lost;
use super::signature::{PROBE_BYTES, recognise};
use super::{Operations, Seat, store_named};
use crate::process::{path_error, unix_seconds};

/// A store's medium must be sized in whole blocks of any device.
const SIZE_MULTIPLE: u64 = 4096;

impl Operations {
    /// Formats a file or device and takes it into use.
    ///
    /// # Errors
    /// `Invalid`, `Exists`, `Busy`, `ReadOnly`, `NoSpace`, `Unsupported`, `Io`, each naming the path and the next step.
    pub(crate) async fn store_add(&self, request: control::StoreAdd) -> Result<control::Store> {
        let _lock = self.stores_lock.lock().await;
        let path = PathBuf::from(&request.path);
        let extent_bytes = request.extent_bytes.unwrap_or(EXTENT_BYTES_DEFAULT);
        check_request(&request, &path, extent_bytes)?;
        self.look(|view| {
            if view.named::<StoreRecord>(request.name.as_str())?.is_some() {
                return Err(Error::exists(format!(
                    "store {:?} exists already; choose another name",
                    request.name.as_str()
                )));
            }
            let stores = view.all::<StoreRecord>()?;
            if stores.len() >= STORES_MAX {
                return Err(Error::no_space(format!(
                    "there are {STORES_MAX} stores, the most one daemon may have"
                )));
            }
            let real = path.canonicalize().unwrap_or_else(|_| path.clone());
            match stores
                .iter()
                .find(|s| s.path == path || s.path.canonicalize().is_ok_and(|p| p == real))
            {
                Some(other) => Err(Error::busy(format!(
                    "{}: is store {:?} already; choose another path",
                    path.display(),
                    other.name.as_str()
                ))),
                None => Ok(()),
            }
        })?;
        let (file, created) = tokio::task::block_in_place(|| medium(&request, &path))?;
        let added = self.format_and_record(&request, &path, file, extent_bytes).await;
        if added.is_err()
            && created
            && let Err(e) = std::fs::remove_file(&path)
        {
            tracing::warn!(
                "{}: the file of a store that was not added stays: {e}",
                path.display()
            );
        }
        let record = added?;
        tracing::info!(store = %record.name, path = %path.display(), "added");
        Ok(self.store_shown(record))
    }

    async fn format_and_record(
        &self,
        request: &control::StoreAdd,
        path: &Path,
        file: DiskFile,
        extent_bytes: u64,
    ) -> Result<StoreRecord> {
        let zone = request.zone.clone().unwrap_or_else(|| request.name.clone());
        let size_bytes = request
            .size_bytes
            .unwrap_or(file.size_bytes())
            .min(file.size_bytes());
        let options = FormatOptions {
            installation: self.catalog.installation(),
            name: request.name.clone(),
            zone: zone.clone(),
            size_bytes: size_bytes - size_bytes % SIZE_MULTIPLE,
            extent_bytes,
            zero_filled: !file.is_block_device(),
        };
        // Formatting needs no particular shard; the id it gives then decides where the store lives.
        let shard = self.shards.of_store(StoreId::random());
        let formatted = file.clone();
        let id = shard
            .call(move |_| async move {
                let disk = Disk::attach(&formatted)?;
                let id = store::format(&disk, &options).await;
                disk.detach();
                id
            })
            .await
            .map_err(|e| e.context(path.display()))?;
        let mut lineage = Lineage::default();
        let handle = self
            .open_file(id, file, |found| Ok(lineage.begin(&found, Incarnation::random())))
            .await?;
        lineage.confirm(handle.incarnation(), handle.committed_lsn());
        let record = StoreRecord {
            id,
            name: request.name.clone(),
            path: path.to_owned(),
            zone,
            extent_bytes: handle.info().extent_bytes,
            extents: handle.info().extents,
            allow_buffered: request.allow_buffered,
            fault: None,
            leaving: None,
            lineage,
            created_unix_seconds: unix_seconds(),
        };
        if let Err(e) = self.change(|tx| tx.insert(&record)) {
            self.close_store(&handle).await;
            return Err(e);
        }
        self.set_seat(id, Seat::Open(handle));
        Ok(record)
    }

    /// Opens a store of the catalog, waiting for an earlier daemon's I/O on it to end.
    pub(super) async fn open_recorded(
        &self,
        record: &StoreRecord,
        lock_wait: Duration,
    ) -> Result<StoreHandle> {
        if let Some(StoreFault { reason, .. }) = &record.fault {
            return Err(Error::unavailable(format!(
                "latched faulty: {reason}; look at the device, then: volctl store reopen {} (with vold stopped: vold clear-fault)",
                record.name
            )));
        }
        let (path, buffered_ok) = (record.path.clone(), record.allow_buffered);
        let file = tokio::task::spawn_blocking(move || {
            DiskFile::open(&path, OpenMode::ReadWrite, buffered_ok, lock_wait)
        })
        .await
        .map_err(|e| Error::internal(format!("opening a store: {e}")))??;
        self.open_known(record.id, file).await
    }

    /// Closes a store: every shard lets its data path go, then its keeper ends.
    pub(super) async fn close_store(&self, handle: &StoreHandle) {
        let id = handle.info().id;
        for shard in self.shards.iter() {
            let forgotten = shard
                .call(move |registry| async move {
                    registry.forget_store(id);
                    Ok(())
                })
                .await;
            if let Err(e) = forgotten {
                tracing::warn!(store = %handle.info().name, "data path not let go: {e}");
            }
        }
        let closing = handle.clone();
        let closed = self
            .shards
            .of_store(id)
            .call(move |_| async move {
                let closed = runtime::timeout(STORE_CLOSING_MAX, closing.close()).await;
                closed.unwrap_or_else(|| Err(Error::unavailable("its device does not answer")))
            })
            .await;
        if let Err(e) = closed {
            tracing::error!(store = %handle.info().name, "closed with an error: {e}");
        }
    }

    /// Takes a store out of use for good.
    ///
    /// # Errors
    /// `NotFound`; `Busy` naming a volume on it.
    pub(crate) async fn store_remove(&self, name: &Name) -> Result<()> {
        let _lock = self.stores_lock.lock().await;
        self.check_nothing_left(name).await?;
        let id = self.change(|tx| {
            let store = store_named(tx, name)?;
            let used_by = tx
                .all::<VolumeRecord>()?
                .into_iter()
                .find(|volume| volume.is_on(store.id));
            if let Some(volume) = used_by {
                return Err(Error::busy(format!(
                    "store {0:?} holds a replica of volume {1}; move its replicas off first: volctl store drain {0} (or, if it will not come back: volctl store remove {0} --lost)",
                    name.as_str(),
                    volume.path,
                )));
            }
            let destroying = tx.all::<DestroyRecord>()?.into_iter().find(|job| {
                job.finished_unix_seconds.is_none()
                    && job.stores.iter().any(|part| part.store == store.id && !part.done)
            });
            if let Some(job) = destroying {
                return Err(Error::busy(format!(
                    "store {:?} still holds extents of {}, which is being destroyed; wait for it: volctl destroy wait {}",
                    name.as_str(),
                    job.path,
                    job.volume
                )));
            }
            tx.remove::<StoreRecord>(store.id)?;
            Ok(store.id)
        })?;
        if let Seat::Open(handle) = self.seat(id) {
            self.close_store(&handle).await;
        }
        self.drop_seat(id);
        tracing::info!(store = %name, "removed; its file or device is left as it is");
        Ok(())
    }

    /// Whether what replicas have left on the store is gone.
    ///
    /// # Errors
    /// `Busy` while it is not, or nobody can tell; `Unavailable` when the store does not answer; `Invalid` for a lost store.
    async fn check_nothing_left(&self, name: &Name) -> Result<()> {
        let record = self.look(|view| store_named(view, name))?;
        if record.leaving == Some(Leaving::Lost) {
            return Err(Error::invalid(lost(name)));
        }
        let draining = record.leaving == Some(Leaving::Draining);
        let Seat::Open(handle) = self.seat(record.id) else {
            return match draining {
                false => Ok(()),
                true => Err(Error::busy(format!(
                    "store {0:?} is away, and what its replicas left there may not be overwritten; bring it back, or: volctl store remove {0} --lost",
                    name.as_str()
                ))),
            };
        };
        let used = self.look(|view| {
            Ok(view
                .all::<VolumeRecord>()?
                .iter()
                .any(|volume| volume.is_on(record.id)))
        })?;
        let space = handle.space();
        let volumes = self
            .ask_store(&handle, |store| async move { store.volumes().await })
            .await?;
        let left = !volumes.is_empty() || space.allocated > 0 || (draining && space.pending_scrub > 0);
        // Volumes that use it are named by the removal itself.
        match left && !used {
            false => Ok(()),
            true => Err(Error::busy(format!(
                "store {0:?}: what replicas or deleted volumes left there is still being overwritten; wait: volctl store drain {0} --wait",
                name.as_str()
            ))),
        }
    }

    /// All stores.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) fn store_list(&self) -> Result<Vec<control::Store>> {
        let records = self.look(|view| view.all::<StoreRecord>())?;
        Ok(records
            .into_iter()
            .map(|record| self.store_shown(record))
            .collect())
    }

    /// One store.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn store_show(&self, name: &Name) -> Result<control::Store> {
        Ok(self.store_shown(self.look(|view| store_named(view, name))?))
    }

    pub(super) fn store_shown(&self, record: StoreRecord) -> control::Store {
        let on_it = self.look(|view| {
            let mut volumes = view.all::<VolumeRecord>()?;
            volumes.retain(|volume| volume.is_on(record.id));
            Ok(volumes)
        });
        let on_it = on_it.unwrap_or_default();
        let mut shown = control::Store {
            id: record.id.to_string(),
            path: record.path.display().to_string(),
            zone: record.zone,
            state: control::StoreState::Offline,
            reason: None,
            replicas: on_it.len(),
            medium: "unknown".into(),
            medium_reason: "the store is not open".into(),
            extent_bytes: record.extent_bytes,
            total_bytes: u64::from(record.extents) * record.extent_bytes,
            free_bytes: 0,
            pending_scrub_bytes: 0,
            allocated_bytes: 0,
            name: record.name,
        };
        let latched = record.fault.map(|fault| fault.reason);
        match self.seat(record.id) {
            Seat::Open(handle) => {
                let (info, space) = (handle.info(), handle.space());
                let bytes = |extents: u32| u64::from(extents) * info.extent_bytes;
                shown.medium = match info.medium.class {
                    MediumClass::InPlace => "in_place",
                    MediumClass::NotInPlace => "not_in_place",
                    MediumClass::Unknown => "unknown",
                }
                .into();
                shown.medium_reason = info.medium.reason.clone();
                shown.total_bytes = bytes(space.total);
                shown.free_bytes = bytes(space.free);
                shown.pending_scrub_bytes = bytes(space.pending_scrub);
                shown.allocated_bytes = bytes(space.allocated);
                shown.reason = handle.fault().or(latched);
                shown.state = match shown.reason {
                    None => control::StoreState::Online,
                    Some(_) => control::StoreState::Faulty,
                };
            }
            Seat::Closed(reason) => {
                if latched.is_some() {
                    shown.state = control::StoreState::Faulty;
                }
                let draining = match record.leaving {
                    Some(Leaving::Draining) => format!("; draining: {}", self.leaving_shown(&on_it)),
                    _ => String::new(),
                };
                shown.reason = Some(format!("{reason}{draining}"));
            }
        }
        match (record.leaving, shown.state) {
            (Some(Leaving::Draining), control::StoreState::Online) => {
                let empty = on_it.is_empty() && shown.allocated_bytes + shown.pending_scrub_bytes == 0;
                (shown.state, shown.reason) = match empty {
                    true => (control::StoreState::Drained, None),
                    false => (control::StoreState::Draining, Some(self.leaving_shown(&on_it))),
                };
            }
            (Some(Leaving::Lost), _) => {
                shown.state = control::StoreState::Lost;
                shown.reason = Some(self.leaving_shown(&on_it));
            }
            _ => {}
        }
        shown
    }

    /// Writes down the faults that open stores have latched since the last look.
    ///
    /// # Errors
    /// The catalog's.
    pub(super) fn record_faults(&self) -> Result<()> {
        for (id, seat) in self.seats() {
            let Seat::Open(handle) = seat else { continue };
            let Some(reason) = handle.fault() else { continue };
            let recorded = |record: &Option<StoreRecord>| record.as_ref().is_none_or(|r| r.fault.is_some());
            if recorded(&self.look(|view| view.get::<StoreRecord>(id))?) {
                continue;
            }
            let fault = StoreFault {
                reason: reason.clone(),
                since_unix_seconds: unix_seconds(),
            };
            self.change(|tx| tx.latch_fault(id, fault))?;
            self.audit.did("store.fault", &handle.info().name, &reason);
            tracing::error!(store = %handle.info().name, "latched faulty, out of use until an operator acts: {reason}");
        }
        Ok(())
    }
}

fn check_request(request: &control::StoreAdd, path: &Path, extent_bytes: u64) -> Result<()> {
    let name = request.name.as_str();
    if !path.is_absolute() {
        return Err(Error::invalid(format!(
            "store {name:?}: {:?} is not an absolute path; the daemon has its own working directory",
            request.path
        )));
    }
    if request.path.contains('\0') {
        return Err(Error::invalid(format!(
            "store {name:?}: the path must not contain a NUL byte"
        )));
    }
    if path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(Error::invalid(format!(
            "store {name:?}: the path must not contain \"..\""
        )));
    }
    store::check_sizes(&request.name, request.size_bytes, extent_bytes)?;
    match request.size_bytes {
        Some(size) if size % SIZE_MULTIPLE != 0 => Err(Error::invalid(format!(
            "store {name:?}: {size} bytes is not a multiple of {SIZE_MULTIPLE}"
        ))),
        _ => Ok(()),
    }
}

/// The file (made here: `true`) or block device of a new store, open and locked.
fn medium(request: &control::StoreAdd, path: &Path) -> Result<(DiskFile, bool)> {
    let name = request.name.as_str();
    let existing = match std::fs::metadata(path) {
        Ok(metadata) => Some(metadata),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(path_error(path, "cannot be looked at", e)),
    };
    match existing {
        None => {
            let Some(size) = request.size_bytes else {
                return Err(Error::invalid(format!(
                    "store {name:?}: {} does not exist; give --size to create it",
                    path.display()
                )));
            };
            DiskFile::create(path, size, request.allow_buffered).map(|file| (file, true))
        }
        Some(existing) if existing.file_type().is_block_device() => {
            // Claimed first: what somebody uses is theirs, and no advice to clear it may be given.
            let file = DiskFile::open(path, OpenMode::ReadWrite, request.allow_buffered, Duration::ZERO)?;
            if let Some(what) = probe(path)? {
                return Err(Error::exists(format!(
                    "{}: the device holds {what}; if nobody needs it, clear it (wipefs --all, or zeros over its first MiB) and try again",
                    path.display()
                )));
            }
            match request.size_bytes {
                Some(size) if size > file.size_bytes() => Err(Error::invalid(format!(
                    "store {name:?}: {size} bytes asked for, and {} has {}",
                    path.display(),
                    file.size_bytes()
                ))),
                _ => Ok((file, false)),
            }
        }
        Some(existing) if existing.is_dir() => Err(Error::invalid(format!(
            "{0}: is a directory; give the path of the file to make in it, such as {0}/{name}.store",
            path.display().to_string().trim_end_matches('/')
        ))),
        Some(_) => Err(Error::exists(format!(
            "{}: exists already; a store makes its own file, so choose another path or move that one away",
            path.display()
        ))),
    }
}

/// What a block device holds, by its first bytes.
fn probe(path: &Path) -> Result<Option<&'static str>> {
    let mut start = Vec::with_capacity(PROBE_BYTES);
    File::open(path)
        .and_then(|file| file.take(PROBE_BYTES as u64).read_to_end(&mut start))
        .map_err(|e| path_error(path, "cannot be read", e))?;
    Ok(recognise(&start))
}
