//! The catalog: the control plane's durable records, in one redb file on the host's file system.
//!
//! Who exists (customers, VMs), what exists (stores, volumes), who uses what (attachments), what is being or has
//! been destroyed, and when each volume was verified last. A change is one [`Catalog::write`] transaction and is durable when the call returns; redb has one
//! writer, so a transaction's checks and changes are one step. Names are unique by an index that the same transaction
//! maintains.
//!
//! It deliberately holds no keys, wrapped or not (those live only in the stores' volume slots), no extents, and no
//! policy: callers decide inside their transactions what may be changed.

mod changes;
mod membership;
mod opening;
mod records;
#[cfg(any(test, feature = "sim"))]
mod simulated;
mod table;

pub use opening::{Judged, Loss, OldCopy};
pub use records::{
    AttachmentRecord, CustomerRecord, DestroyRecord, DestroyedStore, Leaving, Phase, ReplicaRecord,
    ScrubPass, ScrubRecord, StoreFault, StoreRecord, Tombstone, VmRecord, VolumeRecord,
};
pub use table::{Record, Tx, View};

use std::path::{Path, PathBuf};

use redb::backends::InMemoryBackend;
use redb::{Builder, Database, Durability, ReadableDatabase, StorageBackend};

use crate::error::{Error, Kind, Result};
use crate::ids::InstallationId;
use crate::sabotage::{Rule, broken};

/// Layout of the records; a catalog of a higher one is refused.
pub const CATALOG_VERSION: u64 = 1;

/// An open catalog.
pub struct Catalog {
    database: Database,
    path: PathBuf,
    installation: InstallationId,
}

impl Catalog {
    /// Opens the catalog at `path`; makes an empty one, with a fresh installation id, where there is none.
    ///
    /// # Errors
    /// `Damaged` when pages do not match their checksums, `Unsupported` for a newer layout, `Busy` when another process
    /// has it open, `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        let database = builder().create(path).map_err(|e| failed(path, e))?;
        Self::begin(database, path, Some(InstallationId::random()))
    }

    /// Makes an empty catalog of a given installation, for one that is rebuilt from its stores.
    ///
    /// # Errors
    /// `Exists` when there is a file at `path`; `Io`, `NoSpace`.
    pub fn create(path: &Path, installation: InstallationId) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(Error::exists(format!(
                "{}: exists already; move it away first",
                path.display()
            )));
        }
        let database = builder().create(path).map_err(|e| failed(path, e))?;
        Self::begin(database, path, Some(installation))
    }

    /// Opens a copy in memory, for offline checks: every page is verified, what a crash left is repaired in the copy, and
    /// the file itself is not touched.
    ///
    /// # Errors
    /// As [`Catalog::open`]; `NotFound` when there is no such file.
    pub fn open_copy(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => Kind::NotFound,
                _ => Kind::Io,
            };
            Error::with_source(kind, format!("{}: cannot be read", path.display()), e)
        })?;
        if bytes.is_empty() {
            return Err(Error::damaged(format!(
                "{}: the catalog is empty",
                path.display()
            )));
        }
        let memory = InMemoryBackend::new();
        memory
            .set_len(bytes.len() as u64)
            .and_then(|()| memory.write(0, &bytes))
            .map_err(|e| failed(path, e))?;
        let database = builder()
            .create_with_backend(memory)
            .map_err(|e| failed(path, e))?;
        Self::begin(database, path, None)
    }

    /// What every open does last; a file without contents becomes `fresh`'s catalog.
    fn begin(database: Database, path: &Path, fresh: Option<InstallationId>) -> Result<Self> {
        let mut catalog = Self {
            database,
            path: path.to_owned(),
            installation: InstallationId::NIL,
        };
        let found = catalog.read(|view| Ok((view.number("version")?, view.id("installation")?)))?;
        catalog.installation = match (found, fresh) {
            ((Some(version), _), _) if version > CATALOG_VERSION => {
                return Err(Error::unsupported(format!(
                    "{}: the catalog has layout {version}, this vold knows up to {CATALOG_VERSION}; use a newer vold",
                    path.display()
                )));
            }
            ((Some(_), Some(id)), _) => InstallationId(id),
            ((None, None), Some(id)) => {
                catalog.write(|tx| {
                    tx.create_tables()?;
                    tx.set_number("version", CATALOG_VERSION)?;
                    tx.set_id("installation", id.0)
                })?;
                id
            }
            _ => {
                return Err(Error::damaged(format!(
                    "{}: not a vold catalog (no version or installation id); restore it, or rebuild it from the stores",
                    path.display()
                )));
            }
        };
        Ok(catalog)
    }

    /// Which installation this is; stores carry the same id.
    pub fn installation(&self) -> InstallationId {
        self.installation
    }

    /// Looks at one consistent state.
    ///
    /// # Errors
    /// `Damaged`, `Io`, and what `look` returns.
    pub fn read<T>(&self, look: impl FnOnce(&View<'_>) -> Result<T>) -> Result<T> {
        let transaction = self.database.begin_read().map_err(|e| failed(&self.path, e))?;
        look(&View::of_read(&transaction, &self.path))
    }

    /// Changes it: all that `change` did is durable when this returns `Ok`, and nothing of it happened otherwise.
    ///
    /// # Errors
    /// `Damaged`, `Io`, and what `change` returns.
    pub fn write<T>(&self, change: impl FnOnce(&Tx<'_>) -> Result<T>) -> Result<T> {
        let mut transaction = self.database.begin_write().map_err(|e| failed(&self.path, e))?;
        // After a kill the next open then loads the allocator's state instead of walking every page.
        transaction.set_quick_repair(true);
        if broken(Rule::CatalogDurable) {
            transaction.set_quick_repair(false);
            transaction
                .set_durability(Durability::None)
                .map_err(|e| failed(&self.path, e))?;
        }
        let result = change(&Tx::new(&transaction, &self.path));
        match result {
            Ok(value) => {
                transaction.commit().map_err(|e| failed(&self.path, e))?;
                Ok(value)
            }
            Err(e) => {
                transaction.abort().map_err(|e| failed(&self.path, e))?;
                Err(e)
            }
        }
    }
}

fn builder() -> Builder {
    let mut builder = Database::builder();
    // Without it redb trusts a file that was closed cleanly, and may panic on a damaged page.
    builder.set_check_integrity_on_open(true);
    builder.set_cache_size(16 << 20);
    builder
}

/// redb's errors in our terms.
fn failed(path: &Path, error: impl Into<redb::Error>) -> Error {
    let error = error.into();
    let path = path.display();
    match error {
        redb::Error::DatabaseAlreadyOpen => Error::busy(format!(
            "{path}: the catalog is open in another process; stop that vold first"
        )),
        redb::Error::Io(e) => {
            let kind = match e.kind() {
                std::io::ErrorKind::StorageFull => Kind::NoSpace,
                std::io::ErrorKind::InvalidData => Kind::Damaged,
                _ => Kind::Io,
            };
            Error::with_source(kind, format!("{path}: the catalog cannot be read or written"), e)
        }
        redb::Error::UpgradeRequired(version) => Error::unsupported(format!(
            "{path}: the catalog's file has redb format {version}, which this vold does not read"
        )),
        e => Error::with_source(
            Kind::Damaged,
            format!("{path}: the catalog is damaged; restore it from a copy, or rebuild it from the stores"),
            e,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{CmkId, CustomerId};

    fn customer(name: &str) -> CustomerRecord {
        CustomerRecord {
            id: CustomerId::random(),
            name: name.parse().unwrap(),
            cmk: CmkId::random(),
            created_unix_seconds: 1,
        }
    }

    #[test]
    fn a_committed_record_and_the_installation_id_survive_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        let acme = customer("acme");
        let catalog = Catalog::open(&path).unwrap();
        let installation = catalog.installation();
        catalog.write(|tx| tx.insert(&acme)).unwrap();
        drop(catalog);
        for catalog in [Catalog::open_copy(&path).unwrap(), Catalog::open(&path).unwrap()] {
            assert_eq!(catalog.installation(), installation);
            let found: CustomerRecord = catalog.read(|v| v.named("acme")).unwrap().unwrap();
            assert_eq!(found.id, acme.id);
        }
    }

    #[test]
    fn a_catalog_of_a_given_installation_is_made_once_and_never_over_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        let installation = InstallationId::random();
        drop(Catalog::create(&path, installation).unwrap());
        assert_eq!(Catalog::open(&path).unwrap().installation(), installation);
        let again = Catalog::create(&path, InstallationId::random()).map(drop);
        assert_eq!(again.unwrap_err().kind(), Kind::Exists);
    }

    #[test]
    fn a_file_copied_while_it_is_open_opens_as_after_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        let killed = dir.path().join("killed.redb");
        let catalog = Catalog::open(&path).unwrap();
        catalog.write(|tx| tx.insert(&customer("acme"))).unwrap();
        std::fs::copy(&path, &killed).unwrap();
        for catalog in [
            Catalog::open_copy(&killed).unwrap(),
            Catalog::open(&killed).unwrap(),
        ] {
            assert!(
                catalog
                    .read(|v| v.named::<CustomerRecord>("acme"))
                    .unwrap()
                    .is_some()
            );
        }
    }

    #[test]
    fn a_refused_transaction_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("c")).unwrap();
        let refused: Result<()> = catalog.write(|tx| {
            tx.insert(&customer("acme"))?;
            Err(Error::refused("no"))
        });
        assert_eq!(refused.unwrap_err().kind(), Kind::Refused);
        assert_eq!(catalog.read(|v| v.count::<CustomerRecord>()).unwrap(), 0);
        assert!(
            catalog
                .read(|v| v.named::<CustomerRecord>("acme"))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_name_belongs_to_one_record_until_that_is_removed_or_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("c")).unwrap();
        let mut first = customer("acme");
        catalog.write(|tx| tx.insert(&first)).unwrap();
        let taken = catalog.write(|tx| tx.insert(&customer("acme"))).unwrap_err();
        assert_eq!(taken.kind(), Kind::Exists);
        first.name = "other".parse().unwrap();
        catalog.write(|tx| tx.update(&first)).unwrap();
        let second = customer("acme");
        catalog.write(|tx| tx.insert(&second)).unwrap();
        catalog
            .write(|tx| tx.remove::<CustomerRecord>(second.id))
            .unwrap();
        catalog.write(|tx| tx.insert(&customer("acme"))).unwrap();
        let names: Vec<String> = catalog
            .read(|v| v.all::<CustomerRecord>())
            .unwrap()
            .into_iter()
            .map(|c| c.name.to_string())
            .collect();
        assert_eq!(names, ["acme", "other"]);
    }

    #[test]
    fn garbage_in_place_of_a_catalog_is_an_error_and_not_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        std::fs::write(&path, vec![0x5a; 1 << 16]).unwrap();
        assert!(Catalog::open(&path).is_err());
        assert!(Catalog::open_copy(&path).is_err());
        assert_eq!(
            std::fs::read(&path).unwrap(),
            vec![0x5a; 1 << 16],
            "left as it was"
        );
    }

    #[test]
    fn a_flipped_bit_in_a_page_is_reported_as_damage_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        let catalog = Catalog::open(&path).unwrap();
        catalog.write(|tx| tx.insert(&customer("acme"))).unwrap();
        drop(catalog);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes
            .windows(6)
            .rposition(|w| w == b"\"acme\"")
            .expect("the record's JSON");
        bytes[at + 2] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let copy = Catalog::open_copy(&path).map(|_| ());
        assert_eq!(copy.unwrap_err().kind(), Kind::Damaged);
        let open = Catalog::open(&path).map(|_| ());
        assert_eq!(open.unwrap_err().kind(), Kind::Damaged);
    }
}
