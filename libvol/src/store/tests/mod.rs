//! The store over the simulated disk, through its public interface.

mod crash;
mod damage;
mod drawing;
mod faults;
mod inspect;
mod life;
mod lineage;
mod lost;
mod mutations;
mod real;
mod syncs;

use std::rc::Rc;

use super::layout::Sizes;
use super::*;
use crate::buf::Buf;
use crate::crypto::seal::{SealedBuf, block_sum};
use crate::disk::sim::{Media, SimDriver};
use crate::disk::{Disk, DiskFile};
use crate::error::Result;
use crate::ids::{BlockIndex, Epoch, Incarnation};
use crate::limits::BLOCK_SIZE;
use crate::runtime::Runtime;

/// A small store: the ring goes round after a few commits, the table has a handful of pages.
pub(super) const SIZES: Sizes = Sizes {
    slots: 8,
    tombstones: 126,
    log_bytes: 16 * 4096,
};
pub(super) const EXTENT_BYTES: u64 = 16 << 10;
pub(super) const BLOCKS: usize = EXTENT_BYTES as usize / BLOCK_SIZE;
/// 4 MiB before the data, 80 extents: two pages of records and a bit.
pub(super) const STORE_BYTES: u64 = (4 << 20) + 80 * EXTENT_BYTES;

/// Formats with the same small metadata regions and any extent size.
pub(crate) async fn format_small(disk: &Disk, options: &FormatOptions) -> Result<StoreId> {
    format::format_with(disk, options, SIZES).await
}

pub(super) fn options(zero_filled: bool) -> FormatOptions {
    FormatOptions {
        installation: InstallationId::from_bytes([7; 16]),
        name: "test".parse().unwrap(),
        zone: "a".parse().unwrap(),
        size_bytes: STORE_BYTES,
        extent_bytes: EXTENT_BYTES,
        zero_filled,
    }
}

/// Clears a mark that no replica has missed.
pub(super) fn clear_mark(physical: PhysicalExtent) -> Change {
    Change::ClearMark {
        physical,
        missed_by: ReplicaSet::NONE,
    }
}

/// A formatted store's medium.
pub(super) fn formatted(zero_filled: bool) -> Media {
    let driver = SimDriver::new(1, vec![Media::zeroed(STORE_BYTES)]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move {
        let disk = Disk::attach(&file).unwrap();
        format::format_with(&disk, &options(zero_filled), SIZES)
            .await
            .unwrap();
    });
    driver.media().remove(0)
}

/// Opens a store as one that keeps account of its lineage does. Its incarnation is drawn from `seed`.
pub(super) async fn open_anew(file: &DiskFile, seed: u64) -> Result<StoreHandle> {
    let opening = begin_open(file, Expect::default()).await?;
    let renewal = Lineage::default().begin(&opening.found(), incarnation(seed));
    opening.finish(Some(renewal)).await
}

pub(super) fn incarnation(seed: u64) -> Incarnation {
    Incarnation::from_bytes(u128::from(seed).to_be_bytes())
}

/// Opens the medium, runs `work` over it, and returns the medium as reads see it afterwards.
pub(super) fn with_store<T: 'static, F>(seed: u64, media: Media, work: F) -> (T, Media)
where
    F: AsyncFnOnce(StoreHandle) -> T + 'static,
{
    let driver = SimDriver::new(seed, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    let result = runtime.block_on(async move {
        let store = open(&file, Expect::default()).await.unwrap();
        work(store).await
    });
    drop(runtime);
    (result, driver.media().remove(0))
}

pub(super) fn volume(id: VolumeId) -> (VolumeSlot, VolumeRecord) {
    let slot = slots::tests::example(id);
    let record = VolumeRecord {
        volume: id,
        size_bytes: 1 << 30,
        membership_epoch: Epoch(1),
        members: vec![Member::InSync, Member::InSync],
    };
    (slot, record)
}

/// Allocates `count` extents to `dataset` from logical extent `first` on.
pub(super) async fn allocate(
    store: &StoreHandle,
    dataset: DatasetId,
    first: u32,
    count: u32,
) -> Result<Vec<PhysicalExtent>> {
    let extents = store.reserve(count).await?;
    let change = |(i, physical): (usize, &PhysicalExtent)| Change::Allocate {
        physical: *physical,
        dataset,
        logical: ExtentIndex(first + i as u32),
        key_version: KeyVersion(1),
    };
    store
        .commit(extents.iter().enumerate().map(change).collect())
        .await?;
    Ok(extents)
}

/// Fills an extent with `byte`, data and sums, as a volume would.
pub(super) async fn fill(
    io: &StoreIo,
    extent: PhysicalExtent,
    dataset: DatasetId,
    logical: u32,
    byte: u8,
) -> Result<()> {
    let mut data = Buf::zeroed(EXTENT_BYTES as usize);
    data.fill(byte);
    let first = u64::from(logical) * BLOCKS as u64;
    let sum = |(i, block): (usize, &[u8])| block_sum(dataset, BlockIndex(first + i as u64), block);
    let area = SumArea {
        dataset,
        logical: ExtentIndex(logical),
        sequence: 1,
        key_version: KeyVersion(1),
        sums: data.chunks(BLOCK_SIZE).enumerate().map(sum).collect(),
    };
    let len = data.len();
    let sealed = SealedBuf::from_ciphertext(data);
    io.write(extent, 0, &sealed, 0..len).await?;
    io.write_sums(extent, &area).await?;
    io.flush().await
}

pub(super) fn attach(store: &StoreHandle) -> Rc<StoreIo> {
    StoreIo::attach(store).unwrap()
}

/// The regions of a store of [`format_small`]: superblocks, slots, log, table, checksum areas, data; offset and length.
pub(crate) fn regions_small(size_bytes: u64, extent_bytes: u64) -> [(u64, u64); 6] {
    let layout = layout::Layout::plan(size_bytes, extent_bytes, SIZES).unwrap();
    let superblocks = layout::Region {
        at: 0,
        len: layout::SUPERBLOCK_REGION,
    };
    [
        superblocks,
        layout.slot_region,
        layout.log,
        layout.table,
        layout.sums,
        layout.data,
    ]
    .map(|region| (region.at, region.len))
}
