//! The catalog on a simulated file, for the crash tests: the database is the very same, only its file is not.

use std::io;
use std::path::Path;

use redb::StorageBackend;

use super::{Catalog, builder, failed};
use crate::disk::sim::SimFile;
use crate::error::Result;
use crate::ids::InstallationId;

/// For messages.
const PATH: &str = "catalog.redb (simulated)";

impl Catalog {
    /// Opens the catalog on a simulated file, as after a power cut or a process's end; makes an empty one of that installation
    /// where the file is empty.
    ///
    /// # Errors
    /// As [`Catalog::open`].
    pub fn open_simulated(file: &SimFile, fresh: InstallationId) -> Result<Self> {
        let path = Path::new(PATH);
        let database = builder()
            .create_with_backend(file.clone())
            .map_err(|e| failed(path, e))?;
        Self::begin(database, path, Some(fresh))
    }
}

impl StorageBackend for SimFile {
    fn len(&self) -> io::Result<u64> {
        SimFile::len(self)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        SimFile::read(self, offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        SimFile::set_len(self, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        SimFile::sync(self)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        SimFile::write(self, offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::CustomerRecord;
    use crate::disk::sim::{Cut, Rng};
    use crate::ids::{CmkId, CustomerId};

    const CUTS: [Cut; 4] = [Cut::KeepAll, Cut::DropAll, Cut::WholeWrites, Cut::TornSectors];

    fn add(catalog: &Catalog, name: &str) {
        let record = CustomerRecord {
            id: CustomerId::from_bytes([name.as_bytes()[0]; 16]),
            name: name.parse().unwrap(),
            cmk: CmkId::from_bytes([1; 16]),
            created_unix_seconds: 1,
        };
        catalog.write(|tx| tx.insert(&record)).unwrap();
    }

    fn names(catalog: &Catalog) -> Vec<String> {
        let all = catalog.read(|view| view.all::<CustomerRecord>()).unwrap();
        all.iter().map(|record| record.name.to_string()).collect()
    }

    fn open(file: &SimFile) -> Catalog {
        Catalog::open_simulated(file, InstallationId::NIL).unwrap()
    }

    /// One customer that somebody has seen, two more that nobody has.
    fn changed() -> (SimFile, Catalog) {
        let file = SimFile::default();
        let catalog = open(&file);
        add(&catalog, "a");
        file.settle(file.mark());
        add(&catalog, "b");
        add(&catalog, "c");
        (file, catalog)
    }

    #[test]
    fn a_cut_leaves_all_or_nothing_of_each_change_in_their_order_and_all_that_was_seen() {
        for cut in CUTS {
            let mut left = [0; 3];
            for seed in 0..150 {
                let (file, catalog) = changed();
                let found = file.after_cut(cut, &mut Rng::new(seed));
                drop(catalog);
                let names = names(&open(&found));
                assert_eq!(names, ["a", "b", "c"][..names.len()], "{cut:?}, seed {seed}");
                left[names.len() - 1] += 1;
            }
            assert!(left.iter().all(|count| *count > 0), "{cut:?}: {left:?}");
        }
    }

    #[test]
    fn a_cut_of_the_opening_after_a_cut_loses_nothing() {
        for cut in CUTS {
            for seed in 0..100 {
                let (file, catalog) = changed();
                file.settle(file.mark());
                let mut rng = Rng::new(seed);
                let found = file.after_cut(cut, &mut rng);
                drop(catalog);
                let opened = open(&found);
                let again = found.after_cut(cut, &mut rng);
                drop(opened);
                assert_eq!(names(&open(&again)), ["a", "b", "c"], "{cut:?}, seed {seed}");
            }
        }
    }

    #[test]
    fn a_process_that_ends_with_and_without_closing_the_catalog_loses_nothing() {
        for closes in [false, true] {
            let (file, catalog) = changed();
            let mut catalog = Some(catalog);
            if closes {
                catalog = None;
            }
            let found = file.after_exit();
            drop(catalog);
            assert_eq!(names(&open(&found)), ["a", "b", "c"]);
        }
    }
}
