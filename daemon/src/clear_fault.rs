//! `vold clear-fault`: an operator's word that a store may be used again as it is, whose sync or metadata write failed, or
//! which is an old copy and holds the last replica in sync of a volume.
//!
//! Offline, so that a running daemon never sees a latch open under it. The next start opens the store like after any
//! unclean stop: its dirty extents are reconciled. What a failed device lost beyond them, the checksums find on read; what an
//! old copy lacks, nothing finds.

use libvol::catalog::{Catalog, StoreRecord, VolumeRecord};
use libvol::{Error, Result};

use crate::args::ClearFault;
use crate::data_dir::DataDir;

/// What kept a store or its volumes out of use.
#[derive(Debug, PartialEq, Eq)]
struct Cleared {
    /// Why the store was latched.
    fault: Option<String>,
    /// Volumes, by name, whose last replica was an old copy there.
    volumes: Vec<String>,
}

/// Clears it in the catalog.
///
/// # Errors
/// `Busy` while a daemon runs; `NotFound` for an unknown directory or store; `Invalid` when there is nothing to clear.
pub(crate) fn run(args: &ClearFault) -> Result<()> {
    let dirs = DataDir::take_existing(&args.data_dir)?;
    let name = args.store.as_str();
    let cleared = clear(&Catalog::open(&dirs.catalog())?, name)?;
    if let Some(fault) = cleared.fault {
        println!("store {name:?}: cleared; it had failed with: {fault}");
    }
    for volume in cleared.volumes {
        println!(
            "store {name:?}: what it holds of volume {volume} is served as it is from the next start on"
        );
    }
    Ok(())
}

fn clear(catalog: &Catalog, name: &str) -> Result<Cleared> {
    catalog.write(|tx| {
        let mut store = tx
            .named::<StoreRecord>(name)?
            .ok_or_else(|| Error::not_found(format!("there is no store {name:?}")))?;
        let fault = store.fault.take().map(|fault| fault.reason);
        tx.update(&store)?;
        let mut volumes = Vec::new();
        for mut volume in tx.all::<VolumeRecord>()? {
            let mut replicas = volume.replicas.iter_mut();
            let Some(replica) = replicas.find(|r| r.store == store.id && r.is_old_and_last()) else {
                continue;
            };
            replica.full_copy = false;
            replica.reason = None;
            tx.update(&volume)?;
            volumes.push(volume.path.to_string());
        }
        if fault.is_none() && volumes.is_empty() {
            return Err(Error::invalid(format!(
                "store {name:?} is not latched faulty, and holds no last replica that is an old copy; there is nothing to clear"
            )));
        }
        Ok(Cleared { fault, volumes })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::Kind;
    use libvol::catalog::{Phase, ReplicaRecord, StoreFault};
    use libvol::ids::{CustomerId, DatasetId, Epoch, StoreId, VolumeId};
    use libvol::store::{Lineage, Member};

    fn store() -> StoreRecord {
        StoreRecord {
            id: StoreId::random(),
            name: "a".parse().unwrap(),
            path: "/a".into(),
            zone: "a".parse().unwrap(),
            extent_bytes: 4 << 20,
            extents: 1,
            allow_buffered: false,
            leaving: None,
            lineage: Lineage::default(),
            fault: Some(StoreFault {
                reason: "sync: Input/output error".into(),
                since_unix_seconds: 1,
            }),
            created_unix_seconds: 1,
        }
    }

    #[test]
    fn a_latch_is_cleared_once_and_durably() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        let catalog = Catalog::open(&path).unwrap();
        let store = store();
        catalog.write(|tx| tx.insert(&store)).unwrap();
        assert_eq!(clear(&catalog, "b").unwrap_err().kind(), Kind::NotFound);
        let cleared = clear(&catalog, "a").unwrap();
        assert_eq!(cleared.fault.as_deref(), Some("sync: Input/output error"));
        assert_eq!(cleared.volumes, [""; 0]);
        assert_eq!(clear(&catalog, "a").unwrap_err().kind(), Kind::Invalid);
        drop(catalog);
        let kept = Catalog::open(&path)
            .unwrap()
            .read(|v| v.named::<StoreRecord>("a"))
            .unwrap()
            .unwrap();
        assert_eq!(kept, StoreRecord { fault: None, ..store });
    }

    #[test]
    fn an_old_copy_is_accepted_for_the_volumes_that_have_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("catalog.redb")).unwrap();
        let store = StoreRecord {
            fault: None,
            ..store()
        };
        let volume = |name: &str, state| VolumeRecord {
            id: VolumeId::random(),
            path: format!("acme/{name}").parse().unwrap(),
            customer: CustomerId::random(),
            dataset: DatasetId::random(),
            size_bytes: 4096,
            replicas: vec![ReplicaRecord {
                state,
                full_copy: true,
                reason: Some("old".into()),
                ..ReplicaRecord::in_sync(store.id)
            }],
            replicas_wanted: 1,
            membership_epoch: Epoch(1),
            attachment_epoch: Epoch(0),
            phase: Phase::Ready,
            created_unix_seconds: 1,
        };
        let (last, stale) = (volume("last", Member::InSync), volume("stale", Member::Stale));
        catalog
            .write(|tx| {
                tx.insert(&store)?;
                tx.insert(&last)?;
                tx.insert(&stale)
            })
            .unwrap();
        let cleared = clear(&catalog, "a").unwrap();
        assert_eq!(
            (cleared.fault, cleared.volumes),
            (None, vec!["acme/last".to_owned()])
        );
        let kept = |id| catalog.read(|v| v.get::<VolumeRecord>(id)).unwrap().unwrap();
        assert_eq!(kept(last.id).replicas, [ReplicaRecord::in_sync(store.id)]);
        assert_eq!(kept(stale.id), stale);
        assert_eq!(clear(&catalog, "a").unwrap_err().kind(), Kind::Invalid);
    }
}
