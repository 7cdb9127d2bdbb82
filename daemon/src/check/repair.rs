//! `vold check --repair`: puts right what can be put right without guessing, on stores that are really open.
//!
//! | what | by |
//! |---|---|
//! | a bad copy of superblock, table page or volume slot; committed changes that only the log has | opening the store |
//! | a free extent that is not zero | scrubbing it once more |
//! | marks that an unclean stop left | opening the volume: recovery |
//! | a block or checksum area that one replica has damaged | walking the whole volume: healed from a replica that matches |
//!
//! Left alone, and said: stores that are latched faulty, old copies of themselves or cannot be opened, and volumes with a replica there (recovering on
//! some of the replicas would decide for the others); volumes being made or destroyed (the next start goes on); blocks and
//! pages of which there is no good copy; what the catalog and the stores disagree on. A replica that the catalog calls
//! stale takes no part: nothing is healed from it, and extents that recovery settles without it are noted as missed by it,
//! as when the daemon runs. It catches up when vold runs. A tombstoned slot is not a slot any more: opening overwrites it.

use std::collections::BTreeMap;
use std::rc::Rc;

use async_trait::async_trait;
use libvol::catalog::{Catalog, Phase, ReplicaRecord, StoreFault, StoreRecord, VolumeRecord};
use libvol::crypto::seal::Sealer;
use libvol::disk::{DiskFile, OpenMode};
use libvol::ids::{Epoch, Incarnation, PhysicalExtent, StoreId, VolumeId};
use libvol::keys::{KeyContext, KeyService, LocalKeystore};
use libvol::limits::STORE_LOCK_WAIT;
use libvol::store::{self, Expect, Member, StoreHandle, StoreIo, Verdict, VolumeSlot, VolumeState};
use libvol::volume::{Membership, Register, ReplicaSpec, Volume, VolumeSpec};
use libvol::{Error, Kind, Result};

use super::cross::Known;
use super::runtime;
use crate::data_dir::DataDir;
use crate::process::unix_seconds;

/// The catalog, for volumes that are open on the only thread there is.
struct Direct(Rc<Catalog>);

#[async_trait(?Send)]
impl Register for Direct {
    async fn swap(&self, volume: VolumeId, from: Epoch, to: &Membership) -> Result<()> {
        self.0.swap_membership(volume, from, to)
    }
}

/// Bytes that one call of the walk verifies before it is asked to go on.
const WALK_BYTES: u64 = 64 << 20;

/// Repairs; what was done or could not be, a line each, is printed as it happens. `unclean` are the free extents that are not
/// zero. A store that fails meanwhile is latched faulty in the catalog, as by the daemon.
///
/// # Errors
/// Only what stands in the way of all repairs. Everything else is a line, and found again by the check that follows.
pub(super) fn repair(
    dirs: &DataDir,
    known: Known,
    expect: impl Fn(&StoreRecord) -> Expect + 'static,
    unclean: BTreeMap<StoreId, Vec<PhysicalExtent>>,
) -> Result<()> {
    let keys = match dirs.has_keystore() {
        true => LocalKeystore::open_or_create(&dirs.keys()),
        false => Err(Error::not_found("the keystore is not there")),
    };
    let catalog = Rc::new(Catalog::open(&dirs.catalog())?);
    let register = Rc::new(Direct(catalog.clone()));
    let closed = runtime()?.block_on(async move {
        let mut handles = BTreeMap::new();
        for record in &known.stores {
            let name = record.name.as_str();
            match open_store(record, expect(record)).await {
                Ok(handle) => drop(handles.insert(record.id, handle)),
                Err(e) => println!("not repaired: store {name:?}: {e}"),
            }
        }
        for (id, handle) in &handles {
            let extents = unclean.get(id).cloned().unwrap_or_default();
            let name = handle.info().name.as_str();
            match handle.rescrub(extents).await {
                Ok(0) => {}
                Ok(n) => println!("store {name:?}: {n} free extents overwritten, read back and free again"),
                Err(e) => println!("not repaired: {e}"),
            }
        }
        for volume in known.volumes.iter().filter(|v| v.phase == Phase::Ready) {
            let walked = match &keys {
                Ok(keys) => walk(volume, &handles, keys, register.clone()).await,
                Err(e) => Err(Error::new(e.kind(), e.to_string())),
            };
            match walked {
                Ok(line) => println!("volume {}: {line}", volume.path),
                Err(e) => println!("not repaired: volume {}: {e}", volume.path),
            }
        }
        for handle in handles.values() {
            if let Err(e) = handle.close().await {
                println!("not repaired: {e}");
            }
        }
        let closed = handles.iter().map(|(id, handle)| Closed {
            store: *id,
            incarnation: handle.incarnation(),
            committed_lsn: handle.committed_lsn(),
            fault: handle.fault(),
        });
        closed.collect::<Vec<_>>()
    });
    note_down(&catalog, closed)
}

/// What the catalog has to know of a store that was open.
struct Closed {
    store: StoreId,
    incarnation: Incarnation,
    committed_lsn: u64,
    fault: Option<String>,
}

/// Writes down what stores have committed, by which an old copy is told, and which have failed and why: no start may use one
/// of those before an operator has looked at it.
fn note_down(catalog: &Catalog, closed: Vec<Closed>) -> Result<()> {
    catalog.write(|tx| {
        for closed in closed {
            let Some(mut store) = tx.get::<StoreRecord>(closed.store)? else {
                continue;
            };
            store.lineage.raise(closed.incarnation, closed.committed_lsn);
            if let Some(reason) = closed.fault {
                println!("store {:?}: latched faulty: {reason}", store.name.as_str());
                store.fault.get_or_insert(StoreFault {
                    reason,
                    since_unix_seconds: unix_seconds(),
                });
            }
            tx.update(&store)?;
        }
        Ok(())
    })
}

async fn open_store(record: &StoreRecord, expect: Expect) -> Result<StoreHandle> {
    if let Some(fault) = &record.fault {
        return Err(Error::unavailable(format!(
            "it is latched faulty ({}); look at the device, then: vold clear-fault --data-dir DIR --store {}",
            fault.reason, record.name
        )));
    }
    let file = DiskFile::open(
        &record.path,
        OpenMode::ReadWrite,
        record.allow_buffered,
        STORE_LOCK_WAIT,
    )?;
    let opening = store::begin_open(&file, expect).await?;
    match record.lineage.judge(&opening.found()) {
        Verdict::Continues => opening.finish(None).await,
        Verdict::OldCopy(why) => Err(Error::refused(format!(
            "it is an old copy ({why}); start vold, which brings its replicas up to date"
        ))),
        Verdict::Ahead(why) => Err(Error::refused(format!(
            "it was opened after this catalog was written ({why}); put the newer catalog back"
        ))),
    }
}

/// Opens a volume on its in-sync replicas, lets recovery come to its end, verifies and heals every copy of everything, and
/// closes it clean; what came of it, in one line. All in-sync replicas have to be there: nobody is dropped for being away.
async fn walk(
    record: &VolumeRecord,
    handles: &BTreeMap<StoreId, StoreHandle>,
    keys: &dyn KeyService,
    register: Rc<dyn Register>,
) -> Result<String> {
    if record.replicas.iter().any(ReplicaRecord::is_old_and_last) {
        return Err(Error::refused(
            "its last replica in sync is on an old copy of a store",
        ));
    }
    let in_sync = record.replicas.iter().filter(|r| r.state == Member::InSync);
    let stores: Vec<&StoreHandle> = in_sync
        .map(|replica| handles.get(&replica.store))
        .collect::<Option<_>>()
        .ok_or_else(|| {
            Error::unavailable("one of its stores is not there, so the whole volume is left alone")
        })?;
    let slot = slot(record, &stores).await?;
    let newest = slot.keys.iter().max_by_key(|(version, _)| *version);
    let (key_version, wrapped) = newest.ok_or_else(|| Error::damaged("its slot holds no key"))?;
    let context = KeyContext {
        volume: record.id,
        customer: record.customer,
    };
    let key = keys.unwrap_data_key(wrapped, context).await?;
    let sealer = Sealer::new(record.dataset, &key)?;
    drop(key);
    let replicas = record.replicas.iter().map(|replica| seat(replica, handles));
    let volume = Volume::open(VolumeSpec {
        id: record.id,
        label: record.path.to_string(),
        dataset: record.dataset,
        size_bytes: record.size_bytes,
        sealer,
        key_version: *key_version,
        replicas: replicas.collect::<Result<_>>()?,
        membership_epoch: record.membership_epoch,
        register,
    })
    .await?;
    let verified = verify(&volume).await;
    // Areas found damaged are written, and marks cleared, here.
    let closed = volume.close().await;
    let line = verified?;
    closed?;
    Ok(line + &out_of_sync(&volume, handles))
}

/// A replica as the volume is to know it; the stores of those that are not in sync stay out of it.
fn seat(replica: &ReplicaRecord, handles: &BTreeMap<StoreId, StoreHandle>) -> Result<ReplicaSpec> {
    let handle = handles.get(&replica.store);
    let handle = handle.filter(|_| replica.state == Member::InSync);
    Ok(ReplicaSpec {
        store: replica.store,
        name: store_name(replica.store, handles),
        io: handle.map(StoreIo::attach).transpose()?,
        state: replica.state,
        full_copy: replica.full_copy,
        reason: replica.reason.clone(),
    })
}

fn store_name(store: StoreId, handles: &BTreeMap<StoreId, StoreHandle>) -> String {
    let handle = handles.get(&store);
    handle.map_or_else(|| store.to_string(), |handle| handle.info().name.to_string())
}

/// The replicas that have still to catch up, if any, one that failed under the repair among them.
fn out_of_sync(volume: &Volume, handles: &BTreeMap<StoreId, StoreHandle>) -> String {
    let replicas = volume.replicas().into_iter();
    let out = replicas.filter(|replica| !matches!(replica.state, Member::InSync | Member::Vacant));
    out.map(|replica| {
        format!(
            "; its replica on store {:?} is out of sync ({}) and catches up when vold runs",
            store_name(replica.store, handles),
            replica.reason.unwrap_or_default()
        )
    })
    .collect()
}

async fn verify(volume: &Volume) -> Result<String> {
    let (mut extents, mut areas, mut blocks, mut lost) = (0, 0, 0, 0);
    let mut next = Some(0);
    while let Some(from) = next {
        let verified = volume.verify_extents(from, WALK_BYTES).await?;
        extents += verified.extents;
        areas += verified.healed_areas;
        blocks += verified.healed_blocks;
        lost += verified.lost_blocks;
        next = verified.next;
    }
    Ok(format!(
        "{extents} extents verified on every replica; {blocks} blocks and {areas} checksum areas healed, {lost} blocks have no good copy"
    ))
}

/// The volume's slot, from the first store that can read it, if it is the catalog's volume.
async fn slot(record: &VolumeRecord, stores: &[&StoreHandle]) -> Result<VolumeSlot> {
    let mut last = Error::damaged("it has no replica in sync");
    for store in stores {
        match store.volume(record.id).await {
            Ok(VolumeState::Live(_, slot))
                if (slot.customer, slot.dataset) == (record.customer, record.dataset) =>
            {
                return Ok(slot);
            }
            Ok(_) => {
                return Err(Error::damaged(format!(
                    "store {:?} does not hold it as the catalog says",
                    store.info().name.as_str()
                )));
            }
            // Both copies of the slot are bad there: another replica has the same.
            Err(e) if e.kind() == Kind::Damaged => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::store::{Found, Lineage};

    #[test]
    fn a_store_that_fails_under_repair_is_latched_and_what_it_had_committed_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        let incarnation = Incarnation::random();
        let found = Found {
            incarnation,
            sequence: 2,
            lsn: 7,
        };
        let store = |name: &str| StoreRecord {
            id: StoreId::random(),
            name: name.parse().unwrap(),
            path: format!("/{name}").into(),
            zone: name.parse().unwrap(),
            extent_bytes: 4 << 20,
            extents: 1,
            allow_buffered: false,
            fault: None,
            lineage: Lineage::of(&found),
            leaving: None,
            created_unix_seconds: 1,
        };
        let (failed, well) = (store("a"), store("b"));
        catalog
            .write(|tx| {
                tx.insert(&failed)?;
                tx.insert(&well)
            })
            .unwrap();
        for reason in ["sync: Input/output error", "later"] {
            // One that was removed is nobody's business any more.
            let closed = |store| Closed {
                store,
                incarnation,
                committed_lsn: 12,
                fault: Some(reason.to_owned()),
            };
            // One that was removed is nobody's business any more.
            note_down(&catalog, vec![closed(failed.id), closed(StoreId::random())]).unwrap();
        }
        let now = |name: &str| {
            let found = catalog.read(|view| view.named::<StoreRecord>(name)).unwrap();
            found.unwrap()
        };
        let fault = now("a").fault.unwrap();
        assert_eq!(fault.reason, "sync: Input/output error");
        assert_eq!(now("b"), well);
        assert_eq!((now("a").lineage.floor_lsn, well.lineage.floor_lsn), (12, 7));
    }
}
