//! What a front door (NBD, vhost-user) needs of a volume, so that it can be tested without stores. Dispatch is static.

#[cfg(test)]
pub(crate) mod memory;

use std::rc::Rc;

use libvol::buf::BufPool;
use libvol::crypto::seal::PlainBuf;
use libvol::error::Result;
use libvol::volume::{BlockKind, PlainPart, Volume};

/// Ranges are inside the device; the contracts are those of [`Volume`]'s methods of the same names.
pub(crate) trait Device: 'static {
    fn size_bytes(&self) -> u64;
    fn pool(&self) -> &BufPool;
    async fn read(&self, offset: u64, len: u32) -> Result<Vec<PlainPart>>;
    async fn write(&self, offset: u64, payload: PlainBuf, len: u32, fua: bool) -> Result<()>;
    async fn flush(&self) -> Result<()>;
    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()>;
    async fn write_zeroes(&self, offset: u64, len: u64, fua: bool, no_hole: bool) -> Result<()>;
    async fn block_status(&self, offset: u64, len: u64, max_runs: usize) -> Result<Vec<(u64, BlockKind)>>;
}

impl Device for Rc<Volume> {
    fn size_bytes(&self) -> u64 {
        Volume::size_bytes(self)
    }
    fn pool(&self) -> &BufPool {
        Volume::pool(self)
    }
    async fn read(&self, offset: u64, len: u32) -> Result<Vec<PlainPart>> {
        Volume::read(self, offset, len).await
    }
    async fn write(&self, offset: u64, payload: PlainBuf, len: u32, fua: bool) -> Result<()> {
        Volume::write(self, offset, payload, len, fua).await
    }
    async fn flush(&self) -> Result<()> {
        Volume::flush(self).await
    }
    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        Volume::trim(self, offset, len, fua).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, fua: bool, no_hole: bool) -> Result<()> {
        Volume::write_zeroes(self, offset, len, fua, no_hole).await
    }
    async fn block_status(&self, offset: u64, len: u64, max_runs: usize) -> Result<Vec<(u64, BlockKind)>> {
        Volume::block_status(self, offset, len, max_runs).await
    }
}
