//! `vold rebuild-catalog`: a new catalog from the stores and the keystore alone, after the old one was lost or damaged.
//!
//! Order: nothing is changed before every question is answered (old catalog unusable, stores of one installation, losses
//! accepted). Then: the new catalog under another name, durable → where a replica is given up, the stores that stay are told
//! so → the damaged catalog, if there is one, is moved aside → the new one is renamed into place. A cut leaves either no
//! catalog or a whole one, and the command can be repeated.
//!
//! Stores are read as opening reads them ([`libvol::store::inspect`]), without writing. What a store does not know is not
//! rebuilt: VMs, attachments, customers without volumes, the history of finished destructions.

mod plan;
mod volume;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use libvol::catalog::{Catalog, Phase, VolumeRecord};
use libvol::disk::{DiskFile, EngineChoice, OpenMode, make_driver};
use libvol::ids::StoreId;
use libvol::keys::LocalKeystore;
use libvol::limits::STORE_LOCK_WAIT;
use libvol::runtime::Runtime;
use libvol::store::{self, Change, Expect, Member};
use libvol::{Error, Kind, Result};

use crate::args::RebuildCatalog;
use crate::data_dir::DataDir;
use crate::process::{path_error, unix_seconds};
use plan::{Given, Plan};

/// Rebuilds the catalog and says what it holds.
///
/// # Errors
/// `Busy` while a daemon runs, `Exists` when the old catalog is sound, `NotFound` without keystore or store, `Refused`
/// when something would be lost and that is not accepted; what reading the stores and writing the catalog give.
pub(crate) fn run(args: &RebuildCatalog) -> Result<()> {
    let dirs = DataDir::take_for_rebuild(&args.data_dir)?;
    let damaged = check_old(&dirs.catalog())?;
    let given = inspect(&args.stores)?;
    let keys = LocalKeystore::open_or_create(&dirs.keys())?;
    for finding in keys.findings() {
        println!("note: {finding}");
    }
    let plan = plan::plan(&given, &keys.cmks(), unix_seconds())?;
    for note in &plan.notes {
        println!("note: {note}");
    }
    for loss in &plan.losses {
        println!("LOSS: {loss}");
    }
    if !plan.losses.is_empty() && !args.accept_loss {
        return Err(Error::refused(format!(
            "{} would be lost; nothing was changed. Give the stores that are missing, or, if there is no way to get them \
             back, --accept-loss",
            match plan.losses.len() {
                1 => "the above".to_owned(),
                n => format!("the {n} above"),
            }
        )));
    }
    let catalog = dirs.catalog();
    let new = catalog.with_extension("redb.new");
    write(&plan, &new)?;
    tell_stores(&plan, given)?;
    put_in_place(&new, &catalog, damaged)?;
    summary(&plan);
    Ok(())
}

/// Whether there is an old catalog, which then is damaged and to be moved aside.
///
/// # Errors
/// `Exists` when it is sound, `Unsupported` when a newer vold wrote it, `Io` when that cannot be told.
fn check_old(path: &Path) -> Result<bool> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(path_error(path, "cannot be read; move it away and try again", e)),
        Ok(_) => {}
    }
    let looked = Catalog::open_copy(path).and_then(|catalog| {
        let volumes = catalog.read(|view| {
            // Every record is parsed: a catalog that cannot be used is no reason to refuse.
            crate::check::Known::load(view).map(|known| known.volumes.len())
        })?;
        Ok(volumes)
    });
    let shown = path.display();
    match looked {
        Ok(volumes) => Err(Error::exists(format!(
            "{shown} is sound ({volumes} volumes); nothing was changed. To rebuild it all the same, move it away first: \
             mv {shown} {shown}.old"
        ))),
        Err(e) if e.kind() == Kind::Unsupported => Err(e),
        Err(e) => {
            println!("note: {e}");
            Ok(true)
        }
    }
}

/// Reads every store, without writing.
fn inspect(paths: &[PathBuf]) -> Result<Vec<Given>> {
    let paths: Vec<PathBuf> = paths.iter().map(|path| absolute(path)).collect::<Result<_>>()?;
    runtime()?.block_on(async move {
        let mut given = Vec::with_capacity(paths.len());
        for path in &paths {
            let file = open(path, OpenMode::ReadOnly)?;
            given.push(Given {
                inspection: store::inspect(&file, Expect::default()).await?,
                buffered: !file.is_direct(),
            });
        }
        Ok(given)
    })
}

fn runtime() -> Result<Runtime> {
    Ok(Runtime::new(make_driver(EngineChoice::Auto)?.0))
}

fn open(path: &Path, mode: OpenMode) -> Result<DiskFile> {
    DiskFile::open(path, mode, true, STORE_LOCK_WAIT).map_err(|e| match e.kind() {
        Kind::Busy => e.context("another process has it open"),
        _ => e,
    })
}

/// The path as the catalog will have it: the daemon has another working directory. Links are kept, a device's name by its
/// serial number among them.
fn absolute(path: &Path) -> Result<PathBuf> {
    let failed = |e| path_error(path, "cannot be resolved", e);
    let absolute = std::path::absolute(path).map_err(failed)?;
    match absolute.components().any(|part| part == Component::ParentDir) {
        true => absolute.canonicalize().map_err(failed),
        false => Ok(absolute),
    }
}

/// Writes the new catalog under its first name, durably.
fn write(plan: &Plan, path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(path_error(
                path,
                "what an interrupted rebuild left cannot be removed",
                e,
            ));
        }
        _ => {}
    }
    let installation = plan.installation.expect("at least one store is given");
    let catalog = Catalog::create(path, installation)?;
    catalog.write(|tx| {
        plan.stores.iter().try_for_each(|record| tx.insert(record))?;
        plan.customers.iter().try_for_each(|record| tx.insert(record))?;
        plan.volumes.iter().try_for_each(|record| tx.insert(record))?;
        plan.destroys.iter().try_for_each(|record| tx.insert(record))?;
        plan.tombstones.iter().try_for_each(|record| tx.insert(record))
    })?;
    drop(catalog);
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|e| path_error(path, "cannot be made durable", e))
}

/// Commits the new memberships to the stores that stay, one after the other. Repeatable.
fn tell_stores(plan: &Plan, given: Vec<Given>) -> Result<()> {
    let told: BTreeSet<StoreId> = plan.updates.iter().map(|(store, _)| *store).collect();
    if told.is_empty() {
        return Ok(());
    }
    let updates = plan.updates.clone();
    runtime()?.block_on(async move {
        let stores = given.iter().map(|g| &g.inspection.info);
        for info in stores.filter(|info| told.contains(&info.id)) {
            let file = open(&info.path, OpenMode::ReadWrite)?;
            let expect = Expect {
                installation: Some(info.installation),
                store: Some(info.id),
            };
            let handle = store::open(&file, expect).await?;
            let own = updates.iter().filter(|(store, _)| *store == info.id);
            for (_, record) in own {
                handle.commit(changes(record)).await?;
            }
            handle.close().await?;
        }
        Ok(())
    })
}

fn changes(record: &store::VolumeRecord) -> Vec<Change> {
    let volume = record.volume;
    vec![
        Change::SetSize {
            volume,
            size_bytes: record.size_bytes,
        },
        Change::SetMembers {
            volume,
            epoch: record.membership_epoch,
            members: record.members.clone(),
        },
    ]
}

/// From the first name to its own, the damaged one out of the way first.
fn put_in_place(new: &Path, catalog: &Path, damaged: bool) -> Result<()> {
    if damaged {
        let aside = (1..)
            .map(|n| catalog.with_extension(format!("redb.damaged-{n}")))
            .find(|path| path.symlink_metadata().is_err())
            .expect("numbers do not end");
        std::fs::rename(catalog, &aside).map_err(|e| path_error(catalog, "cannot be moved aside", e))?;
        println!("the damaged catalog is now {}", aside.display());
    }
    let dir = catalog.parent().unwrap_or(Path::new("."));
    std::fs::rename(new, catalog)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|e| path_error(new, "cannot be renamed into place", e))
}

fn summary(plan: &Plan) {
    for store in &plan.stores {
        println!("store {:?}: {}", store.name.as_str(), store.path.display());
    }
    for customer in &plan.customers {
        println!("customer {:?}", customer.name.as_str());
    }
    for volume in plan.volumes.iter().filter(|v| v.phase == Phase::Ready) {
        println!(
            "volume {}: {} bytes, membership epoch {}, {}",
            volume.path,
            volume.size_bytes,
            volume.membership_epoch,
            replicas(plan, volume)
        );
    }
    for destroy in &plan.destroys {
        println!(
            "volume {} ({}): was destroyed; the next start goes on with it",
            destroy.path, destroy.volume
        );
    }
    println!(
        "catalog rebuilt: {} stores, {} customers, {} volumes, {} destructions to go on with, {} tombstones",
        plan.stores.len(),
        plan.customers.len(),
        plan.volumes.len(),
        plan.destroys.len(),
        plan.tombstones.len()
    );
    println!(
        "VMs and attachments are not on the stores: create the VMs again (volctl vm create) and attach their volumes"
    );
}

fn replicas(plan: &Plan, volume: &VolumeRecord) -> String {
    let there = volume
        .replicas
        .iter()
        .filter(|replica| replica.state != Member::Vacant);
    let named = there.map(|replica| {
        let store = plan.stores.iter().find(|store| store.id == replica.store);
        let state = match replica.state {
            Member::InSync => "in sync",
            Member::Stale | Member::Resyncing | Member::Vacant => "STALE",
        };
        format!(
            "{:?} {state}",
            store.expect("a replica is on a store given").name.as_str()
        )
    });
    named.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
