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
