//! What the daemon does, one file a noun. An operation checks its request, decides by [`libvol::tenant`]'s policy, and
//! changes catalog, stores and shards in an order that a crash at any point leaves repairable; each file states its own.
//!
//! Rules for all of them: what the catalog says is durable before the answer; nothing is served that the catalog does
//! not show; a volume's operations run one at a time (its lock); the catalog's single writer decides races on names.
//!
//! It deliberately knows no HTTP and no NBD.

mod attach;
mod audit;
mod customer;
mod destroy;
mod lineage;
mod locks;
mod place;
mod relocate;
mod replicas;
mod scrub;
mod signature;
mod start;
mod status;
mod store;
mod takeover;
mod vm;
mod volume;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use libvol::catalog::{Catalog, CustomerRecord, StoreRecord, Tx, View, VmRecord, VolumeRecord};
use libvol::ids::{DatasetId, Name, StoreId, VolumeId, VolumePath};
use libvol::keys::KeyService;
use libvol::limits::{RESYNC_BYTES_PER_SECOND_DEFAULT, STORE_ANSWER_MAX};
use libvol::store::{ExtentEntry, StoreHandle};
use libvol::{Error, Result};
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinSet;

use crate::data_dir::DataDir;
use crate::passed::PassedDoors;
use crate::seldom::Seldom;
use crate::shard::{Gate, Report, Shards};
pub(crate) use audit::Audit;
use locks::Locks;
pub(crate) use scrub::ScrubSettings;

/// How fast the background works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// When and how fast volumes are verified.
    pub(crate) scrub: ScrubSettings,
    /// How fast a replica catches up, at most.
    pub(crate) resync_bytes_per_second: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            scrub: ScrubSettings::default(),
            resync_bytes_per_second: RESYNC_BYTES_PER_SECOND_DEFAULT,
        }
    }
}

/// A store of the catalog, as it stands in this process.
#[derive(Clone)]
enum Seat {
    /// Open.
    Open(StoreHandle),
    /// Not open, for that reason.
    Closed(String),
}

/// The daemon's state and everything it can be asked to do.
pub(crate) struct Operations {
    dirs: DataDir,
    catalog: Arc<Catalog>,
    keys: Arc<dyn KeyService>,
    pub(crate) audit: Arc<Audit>,
    shards: Shards,
    stores: RwLock<HashMap<StoreId, Seat>>,
    /// Why volumes that should be open are not.
    failures: Mutex<HashMap<VolumeId, String>>,
    volume_locks: Locks<VolumeId>,
    /// When replicas out of sync are tried again.
    retries: replicas::Retries,
    /// Why volumes' replicas cannot move, as of the last look.
    blocked: Mutex<HashMap<VolumeId, String>>,
    /// Held over adding and removing stores.
    stores_lock: tokio::sync::Mutex<()>,
    /// A store has latched as faulty: wakes whoever writes that down.
    faults: Arc<tokio::sync::Notify>,
    /// Walks all volumes in the background.
    scrubber: scrub::Scrubber,
    resync_bytes_per_second: u64,
    /// Sockets of others that lead to volumes.
    passed: PassedDoors,
    /// Attachments that are to take over ask for it here.
    claims: tokio::sync::mpsc::UnboundedSender<takeover::Claim>,
    not_taken_over: Mutex<Seldom>,
    /// NBD over TCP, if it is served.
    gate: Mutex<Option<Gate>>,
    /// Destructions and recoveries under way.
    background: Mutex<JoinSet<()>>,
    started: Instant,
}

impl Operations {
    /// Looks at the catalog.
    fn look<T>(&self, look: impl FnOnce(&View<'_>) -> Result<T>) -> Result<T> {
        self.catalog.read(look)
    }

    /// Changes the catalog; durable when it returns. The commit waits for the disk, so the thread says so to tokio.
    fn change<T>(&self, change: impl FnOnce(&Tx<'_>) -> Result<T>) -> Result<T> {
        tokio::task::block_in_place(|| self.catalog.write(change))
    }

    /// Locks a volume, and looks it up only then: what it returns stays as it is while the lock is held, but for a
    /// destruction under way, which ends when it ends.
    ///
    /// # Errors
    /// `NotFound`; `Busy` when another volume has the name by then.
    async fn lock_volume(&self, path: &VolumePath) -> Result<(OwnedMutexGuard<()>, VolumeRecord)> {
        let id = self.look(|view| volume_named(view, path))?.id;
        let lock = self.volume_locks.lock(id).await;
        let record = self.look(|view| locked_volume(view, path, id))?;
        Ok((lock, record))
    }

    fn seat(&self, store: StoreId) -> Seat {
        let stores = self.stores.read().unwrap_or_else(PoisonError::into_inner);
        stores
            .get(&store)
            .cloned()
            .unwrap_or_else(|| Seat::Closed("the store is not in the catalog".into()))
    }

    fn seats(&self) -> Vec<(StoreId, Seat)> {
        let stores = self.stores.read().unwrap_or_else(PoisonError::into_inner);
        stores.iter().map(|(id, seat)| (*id, seat.clone())).collect()
    }

    fn set_seat(&self, store: StoreId, seat: Seat) {
        let opened = match &seat {
            Seat::Open(handle) => Some(handle.clone()),
            Seat::Closed(_) => None,
        };
        let mut stores = self.stores.write().unwrap_or_else(PoisonError::into_inner);
        stores.insert(store, seat);
        drop(stores);
        if let Some(handle) = opened {
            let faults = self.faults.clone();
            handle.on_fault(move || faults.notify_one());
        }
    }

    fn drop_seat(&self, store: StoreId) {
        let mut stores = self.stores.write().unwrap_or_else(PoisonError::into_inner);
        stores.remove(&store);
    }

    /// The open store, or why it is not in use.
    fn open_store(&self, record: &StoreRecord) -> Result<StoreHandle> {
        let reason = match self.seat(record.id) {
            Seat::Open(handle) => match handle.fault() {
                None => return Ok(handle),
                Some(fault) => format!("is faulty: {fault}"),
            },
            Seat::Closed(reason) => format!("is not in use: {reason}"),
        };
        Err(Error::unavailable(format!(
            "store {:?} {reason}",
            record.name.as_str()
        )))
    }

    /// Has a store do something on its shard. It goes on even when nobody waits for it any longer.
    ///
    /// # Errors
    /// As `work`; `Unavailable` when its device does not answer.
    async fn ask_store<T, F, Fut>(&self, handle: &StoreHandle, work: F) -> Result<T>
    where
        F: FnOnce(StoreHandle) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T>> + 'static,
        T: Send + 'static,
    {
        let asked = handle.clone();
        let answer = self.shards.of_store(handle.info().id).call(move |_| work(asked));
        answer_within(STORE_ANSWER_MAX, &handle.info().name, answer).await
    }

    /// What a store holds of a dataset.
    ///
    /// # Errors
    /// As [`Operations::ask_store`].
    async fn extents_of(&self, handle: &StoreHandle, dataset: DatasetId) -> Result<Vec<ExtentEntry>> {
        self.ask_store(
            handle,
            move |store| async move { store.extents_of(dataset).await },
        )
        .await
    }

    /// The open stores of all of a volume's replicas, in its order.
    ///
    /// # Errors
    /// `Unavailable` with the first that is away.
    fn replica_stores(&self, volume: &VolumeRecord) -> Result<Vec<StoreHandle>> {
        volume
            .held()
            .map(|(_, replica)| {
                let record = self
                    .look(|view| view.get::<StoreRecord>(replica.store))?
                    .ok_or_else(|| {
                        Error::internal(format!(
                            "volume {}: its store {} is not in the catalog",
                            volume.path, replica.store
                        ))
                    })?;
                self.open_store(&record)
            })
            .collect::<Result<Vec<_>>>()
            .map_err(|e| e.context(format!("volume {}", volume.path)))
    }

    /// Asks an open volume how it fares.
    async fn report(&self, volume: VolumeId) -> Result<Option<Report>> {
        self.shards
            .of_volume(volume)
            .call(move |registry| async move { Ok(registry.report(volume)) })
            .await
    }

    fn failure(&self, volume: VolumeId) -> Option<String> {
        self.failures().get(&volume).cloned()
    }

    fn set_failure(&self, volume: VolumeId, reason: Option<String>) {
        let mut failures = self.failures();
        match reason {
            Some(reason) => failures.insert(volume, reason),
            None => failures.remove(&volume),
        };
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<VolumeId, String>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts work that outlives its request.
    fn in_background(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        let mut background = self.background.lock().unwrap_or_else(PoisonError::into_inner);
        // Finished ones are let go here, so that the set stays as small as the work under way.
        while let Some(ended) = background.try_join_next() {
            if let Err(e) = ended {
                tracing::error!("work in the background ended badly: {e}");
            }
        }
        background.spawn(work);
    }
}

async fn answer_within<T>(
    wait: Duration,
    store: &Name,
    answer: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::time::timeout(wait, answer).await.unwrap_or_else(|_| {
        Err(Error::unavailable(format!(
            "store {:?} has not answered for {} s: its device hangs; look at the device (volctl status, the kernel's log)",
            store.as_str(),
            wait.as_secs()
        )))
    })
}

fn customer_named(view: &View<'_>, name: &Name) -> Result<CustomerRecord> {
    view.named(name.as_str())?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no customer {:?}; `volctl customer list` shows them",
            name.as_str()
        ))
    })
}

fn vm_named(view: &View<'_>, name: &Name) -> Result<VmRecord> {
    view.named(name.as_str())?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no VM {:?}; `volctl vm list` shows them",
            name.as_str()
        ))
    })
}

fn store_named(view: &View<'_>, name: &Name) -> Result<StoreRecord> {
    view.named(name.as_str())?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no store {:?}; `volctl store list` shows them",
            name.as_str()
        ))
    })
}

fn volume_named(view: &View<'_>, path: &VolumePath) -> Result<VolumeRecord> {
    view.named(path.to_string())?.ok_or_else(|| {
        Error::not_found(format!(
            "there is no volume {path}; `volctl volume list` shows them"
        ))
    })
}

/// The volume of that name, if it is still the one whose lock is held.
fn locked_volume(view: &View<'_>, path: &VolumePath, locked: VolumeId) -> Result<VolumeRecord> {
    let record = volume_named(view, path)?;
    if record.id != locked {
        return Err(Error::busy(format!(
            "volume {path} changed meanwhile: it was destroyed, and another one has its name; try again"
        )));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use libvol::Kind;
    use libvol::catalog::Phase;
    use libvol::control::{self, Protocol};
    use libvol::ids::Epoch;

    use super::*;

    fn record(path: &VolumePath, customer: &CustomerRecord) -> VolumeRecord {
        VolumeRecord {
            id: VolumeId::random(),
            path: path.clone(),
            customer: customer.id,
            dataset: DatasetId::random(),
            size_bytes: 4096,
            replicas: Vec::new(),
            replicas_wanted: 0,
            membership_epoch: Epoch(1),
            attachment_epoch: Epoch(0),
            phase: Phase::Ready,
            created_unix_seconds: 0,
        }
    }

    #[tokio::test]
    async fn a_store_that_does_not_answer_is_named_and_not_waited_for() {
        let store: Name = "a".parse().unwrap();
        let hangs = std::future::pending::<Result<()>>();
        let error = answer_within(Duration::from_millis(5), &store, hangs)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.message().contains("store \"a\""), "{error}");
        let answers = answer_within(Duration::from_secs(60), &store, async { Ok(1) });
        assert_eq!(answers.await.unwrap(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_for_a_volume_whose_name_passes_to_another_does_nothing_to_that_one() {
        let dir = tempfile::tempdir().unwrap();
        let operations = Operations::start_in(dir.path(), 1).await.unwrap();
        let name: Name = "acme".parse().unwrap();
        operations
            .customer_create(control::CustomerCreate { name: name.clone() })
            .await
            .unwrap();
        let customer = operations.look(|view| customer_named(view, &name)).unwrap();
        let path: VolumePath = "acme/web".parse().unwrap();
        let vm: Name = "vm1".parse().unwrap();
        for what in ["attach", "detach", "resize", "delete"] {
            let (old, new) = (record(&path, &customer), record(&path, &customer));
            operations.change(|tx| tx.insert(&old)).unwrap();
            let lock = operations.volume_locks.lock(old.id).await;
            let waiting = tokio::spawn({
                let (operations, path, vm) = (operations.clone(), path.clone(), vm.clone());
                async move {
                    match what {
                        "attach" => {
                            let request = control::Attach {
                                volume: path,
                                vm,
                                via: Protocol::Nbd,
                                read_only: false,
                                incoming: false,
                            };
                            operations.attach(request).await.map(drop)
                        }
                        "detach" => {
                            operations
                                .detach(control::Detach {
                                    volume: path,
                                    vm,
                                    incoming: false,
                                })
                                .await
                        }
                        "resize" => {
                            let request = control::VolumeResize { size_bytes: 4096 };
                            operations.volume_resize(&path, request).await.map(drop)
                        }
                        _ => operations.volume_delete(&path, true).await.map(drop),
                    }
                }
            });
            while operations.volume_locks.holders(&old.id) < 2 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            let renamed = operations.change(|tx| {
                tx.remove::<VolumeRecord>(old.id)?;
                tx.insert(&new)
            });
            renamed.unwrap();
            drop(lock);
            let refusal = waiting.await.unwrap().expect_err(what);
            assert_eq!(refusal.kind(), Kind::Busy, "{what}: {refusal}");
            assert!(
                refusal.message().contains("changed meanwhile"),
                "{what}: {refusal}"
            );
            let untouched = operations.look(|view| volume_named(view, &path)).unwrap();
            assert_eq!(untouched, new, "{what}");
            operations.change(|tx| tx.remove::<VolumeRecord>(new.id)).unwrap();
        }
        operations.stop().await;
    }
}
