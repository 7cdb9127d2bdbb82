//! Writing an empty store.
//!
//! Order matters: the superblock copies come last, after everything else is durable, so that an interrupted format never
//! looks like a store; whatever superblock was there before goes first.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::FormatOptions;
use super::layout::{Layout, PAGE_BYTES, SUPERBLOCK_B_AT, SUPERBLOCK_REGION, Sizes};
use super::log::Frame;
use super::record::ExtentState;
use super::superblock::Superblock;
use super::table::Table;
use super::transfer::{SPAN_BYTES, write_zeros};
use crate::buf::Buf;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::ids::{Incarnation, Name, StoreId};
use crate::limits::{BLOCK, EXTENT_BYTES_MAX, EXTENT_BYTES_MIN, STORE_BYTES_MAX, STORE_BYTES_MIN};

/// Extents a new store must have room for: a volume, and something to scrub meanwhile.
const EXTENTS_MIN: u32 = 4;

/// Writes an empty store. All of its metadata regions are written and synced; data extents and checksum areas are left as
/// they are (a store whose bytes are not known to be zero starts with every extent PendingScrub).
///
/// # Errors
/// `Invalid` for sizes out of range (too small: the message says the least), `Io`.
pub async fn format(disk: &Disk, options: &FormatOptions) -> Result<StoreId> {
    let (size_bytes, extent_bytes) = (options.size_bytes, options.extent_bytes);
    check_sizes(&options.name, Some(size_bytes), extent_bytes)?;
    let sizes = Sizes::for_store(size_bytes / BLOCK * BLOCK, extent_bytes);
    format_with(disk, options, sizes).await
}

/// Whether a store of this size (if it is known yet) and extent size may be made.
///
/// # Errors
/// `Invalid` for sizes out of range (too small: the message says the least).
pub fn check_sizes(name: &Name, size_bytes: Option<u64>, extent_bytes: u64) -> Result<()> {
    if !extent_bytes.is_power_of_two() || !(EXTENT_BYTES_MIN..=EXTENT_BYTES_MAX).contains(&extent_bytes) {
        return Err(Error::invalid(format!(
            "store \"{name}\": extents of {extent_bytes} bytes; use a power of two from {} to {} MiB",
            EXTENT_BYTES_MIN >> 20,
            EXTENT_BYTES_MAX >> 20
        )));
    }
    let Some(size_bytes) = size_bytes else {
        return Ok(());
    };
    if size_bytes > STORE_BYTES_MAX {
        return Err(Error::invalid(format!(
            "store \"{name}\": {size_bytes} bytes are more than the {} TiB a store may have; make several",
            STORE_BYTES_MAX >> 40
        )));
    }
    let sizes = Sizes::for_store(size_bytes / BLOCK * BLOCK, extent_bytes);
    let least = Layout::bytes_for(EXTENTS_MIN, extent_bytes, sizes).max(STORE_BYTES_MIN);
    if size_bytes < least {
        return Err(Error::invalid(format!(
            "store \"{name}\": {size_bytes} bytes are too small; with {} MiB extents the least is {} MiB",
            extent_bytes >> 20,
            least.div_ceil(1 << 20)
        )));
    }
    Ok(())
}

/// [`format`] for the simulator: the smallest metadata regions, and no limits but the format's own. One page holds all slots
/// and tombstones, and the ring goes round after a few commits.
///
/// # Errors
/// As [`format`].
#[cfg(feature = "sim")]
pub async fn format_simulated(disk: &Disk, options: &FormatOptions) -> Result<StoreId> {
    let sizes = Sizes {
        slots: 8,
        tombstones: 55,
        log_bytes: 16 * BLOCK,
    };
    format_with(disk, options, sizes).await
}

/// [`format`] with chosen sizes of the metadata regions and no limits but the format's own.
pub(super) async fn format_with(disk: &Disk, options: &FormatOptions, sizes: Sizes) -> Result<StoreId> {
    let size_bytes = options.size_bytes / BLOCK * BLOCK;
    let Some(layout) = Layout::plan(size_bytes, options.extent_bytes, sizes) else {
        return Err(Error::invalid(format!("{size_bytes} bytes hold no extent")));
    };
    let store = StoreId::random();
    let zeros = Rc::new(Buf::zeroed(SPAN_BYTES));
    // An older store's superblock must not come back to life over new regions.
    write_zeros(disk, &zeros, 0, SUPERBLOCK_REGION).await?;
    disk.sync().await?;

    write_zeros(disk, &zeros, layout.slot_region.at, layout.slot_region.len).await?;
    write_zeros(disk, &zeros, layout.log.at, layout.log.len).await?;
    let first = Frame {
        lsn: 1,
        checkpoint: 0,
        entries: Vec::new(),
    };
    let first = Rc::new(first.encode(store));
    disk.write(layout.log.at, first.clone(), 0..first.len()).await?;
    let state = match options.zero_filled {
        true => ExtentState::Free,
        false => ExtentState::PendingScrub,
    };
    let table = Table::new(layout, store, state);
    let pages: Vec<u32> = (0..layout.pages()).collect();
    for run in pages.chunks(SPAN_BYTES / PAGE_BYTES) {
        let mut images = Buf::zeroed(run.len() * PAGE_BYTES);
        table.images(run, &mut images);
        let images = Rc::new(images);
        for copy in [0, 1] {
            let at = layout.page_at(run[0], copy);
            disk.write(at, images.clone(), 0..images.len()).await?;
        }
    }
    disk.sync().await?;

    let superblock = Superblock {
        store,
        installation: options.installation,
        name: options.name.clone(),
        zone: options.zone.clone(),
        layout,
        created_seconds: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
        sequence: 1,
        incarnation: Incarnation::NIL,
        commit_floor: 0,
    };
    let bytes = Rc::new(Buf::copy_of(&superblock.encode()));
    for at in [SUPERBLOCK_B_AT, 0] {
        disk.write(at, bytes.clone(), 0..bytes.len()).await?;
        disk.sync().await?;
    }
    Ok(store)
}
