//! Small helpers over [`Disk`] that metadata code shares: reading spans, and getting around unreadable blocks.

use std::rc::Rc;

use crate::buf::Buf;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::limits::BLOCK_SIZE;

/// Bytes of one large metadata or scrub transfer.
pub(super) const SPAN_BYTES: usize = 1 << 20;

/// What an unreadable block is taken for: no structure of this format looks like that.
const UNREADABLE: u8 = 0xff;

/// Reads `len` bytes at `at`.
///
/// # Errors
/// `Io`.
pub(super) async fn read(disk: &Disk, at: u64, len: usize) -> Result<Buf> {
    let (result, buf) = disk.read(at, Buf::zeroed(len), 0..len).await;
    result?;
    Ok(buf)
}

/// Reads like [`read`], in large pieces; blocks that the device cannot read come back as 0xff bytes and are counted.
pub(super) async fn read_around_damage(disk: &Disk, at: u64, len: usize) -> (Buf, u32) {
    // The rule, without a second buffer: one piece, and all of it can be read.
    if len <= SPAN_BYTES
        && let Ok(all) = read(disk, at, len).await
    {
        return (all, 0);
    }
    let mut all = Buf::zeroed(len);
    let mut unreadable = 0;
    let mut done = 0;
    while done < len {
        let n = SPAN_BYTES.min(len - done);
        let from = at + done as u64;
        match read(disk, from, n).await {
            Ok(piece) => all[done..done + n].copy_from_slice(&piece),
            Err(_) => {
                for block in (0..n).step_by(BLOCK_SIZE) {
                    let part = &mut all[done + block..][..BLOCK_SIZE.min(n - block)];
                    match read(disk, from + block as u64, part.len()).await {
                        Ok(piece) => part.copy_from_slice(&piece),
                        Err(_) => {
                            part.fill(UNREADABLE);
                            unreadable += 1;
                        }
                    }
                }
            }
        }
        done += n;
    }
    (all, unreadable)
}

/// Writes zeros over `len` bytes at `at`, from one shared span of zeros.
///
/// # Errors
/// `Io`.
pub(super) async fn write_zeros(disk: &Disk, zeros: &Rc<Buf>, at: u64, len: u64) -> Result<()> {
    let mut done = 0;
    while done < len {
        let n = (zeros.len() as u64).min(len - done);
        disk.write(at + done, zeros.clone(), 0..n as usize)
            .await
            .map_err(Error::from)?;
        done += n;
    }
    Ok(())
}
