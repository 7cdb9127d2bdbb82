//! Volumes whose table record is lost: both copies of its page are bad.

use super::*;
use crate::disk::sim::Cut;
use crate::error::Kind;
use crate::store::layout::Layout;

/// One page of volume records, and nothing else in it.
const ONE_PAGE_OF_SLOTS: Sizes = Sizes { slots: 63, ..SIZES };
/// Stands for ciphertext.
const FILL: u8 = 0xa7;
const EXTENTS: u32 = 2;

fn layout() -> Layout {
    Layout::plan(STORE_BYTES, EXTENT_BYTES, ONE_PAGE_OF_SLOTS).unwrap()
}

/// A closed store with one volume with data, in slot 0.
fn with_one_volume(slot: &VolumeSlot) -> Media {
    let driver = SimDriver::new(1, vec![Media::zeroed(STORE_BYTES)]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    let slot = slot.clone();
    runtime.block_on(async move {
        let disk = Disk::attach(&file).unwrap();
        format::format_with(&disk, &options(true), ONE_PAGE_OF_SLOTS)
            .await
            .unwrap();
        let store = open(&file, Expect::default()).await.unwrap();
        let (_, record) = volume(slot.volume);
        let dataset = slot.dataset;
        store.add_volume(slot, record).await.unwrap();
        let io = attach(&store);
        let extents = allocate(&store, dataset, 0, EXTENTS).await.unwrap();
        for (logical, extent) in extents.iter().enumerate() {
            fill(&io, *extent, dataset, logical as u32, FILL).await.unwrap();
        }
        store.close().await.unwrap();
    });
    driver.media().remove(0)
}

fn lose_the_records(media: &mut Media) {
    for copy in [0, 1] {
        media.overwrite(layout().page_at(0, copy) + 100, &[0x77; 64]);
    }
}

/// Whether neither key nor data of the volume is left.
fn is_gone(media: &Media, slot: &VolumeSlot) -> bool {
    let mut all = vec![0; STORE_BYTES as usize];
    media.read(0, &mut all);
    let key = &slot.keys[0].1.bytes;
    let data = all
        .chunks(BLOCK_SIZE)
        .any(|block| block.iter().all(|b| *b == FILL));
    let slots = layout().slot_region;
    let mut slots = all[slots.at as usize..slots.end() as usize].windows(key.len());
    !data && !slots.any(|window| window == key)
}

#[test]
fn a_volume_is_not_called_unknown_while_records_of_volumes_cannot_be_read() {
    let (slot, _) = volume(VolumeId::random());
    let mut media = with_one_volume(&slot);
    lose_the_records(&mut media);
    for copy in [0, 1] {
        media.overwrite(layout().slot_at(0, copy) + 600, &[0x42; 3]);
    }
    let ids = [slot.volume, VolumeId::random()];
    with_store(2, media, async move |store| {
        for id in ids {
            assert_eq!(store.volume(id).await.unwrap_err().kind(), Kind::Damaged);
            assert_eq!(store.destroy_volume(id).await.unwrap_err().kind(), Kind::Damaged);
        }
    });
}

#[test]
fn a_destruction_whose_volumes_record_is_lost_at_any_point_ends_with_the_keys_gone_or_says_so() {
    let (slot, _) = volume(VolumeId::random());
    let media = with_one_volume(&slot);
    let destroy = |cut: Option<u64>, driver: &Rc<SimDriver>| {
        let runtime = Runtime::new(driver.clone());
        let (file, id, power) = (driver.file(0), slot.volume, driver.clone());
        runtime.block_on(async move {
            let work = async {
                let store = open(&file, Expect::default()).await.unwrap();
                if let Some(calls) = cut {
                    power.cut_after_calls(calls);
                }
                let begun = power.calls();
                store.destroy_volume(id).await.unwrap();
                store.scrubbed(id).await.unwrap();
                power.calls() - begun
            };
            let (work, cut) = (Box::pin(work), Box::pin(power.until_cut()));
            match futures_util::future::select(work, cut).await {
                futures_util::future::Either::Left((calls, _)) => calls,
                futures_util::future::Either::Right(_) => 0,
            }
        })
    };
    let calls = destroy(None, &SimDriver::new(3, vec![media.clone()]));
    let mut outcomes = [0, 0];
    for call in 1..=calls {
        for cut in [Cut::KeepAll, Cut::DropAll] {
            let driver = SimDriver::new(3, vec![media.clone()]);
            destroy(Some(call), &driver);
            let mut after = driver.media_after_cut(cut).remove(0);
            lose_the_records(&mut after);
            let id = slot.volume;
            let (result, after) = with_store(4, after, async move |store| {
                store.destroy_volume(id).await?;
                store.scrubbed(id).await
            });
            match result {
                Ok(()) => assert!(is_gone(&after, &slot), "call {call}, {cut:?}"),
                // The tombstone was not durable.
                Err(error) => assert_eq!(error.kind(), Kind::Damaged, "call {call}, {cut:?}"),
            }
            outcomes[usize::from(is_gone(&after, &slot))] += 1;
        }
    }
    // Without a durable tombstone (one append: a write and a sync) nothing says that the volume is to go.
    assert!(outcomes[0] <= 4 && outcomes[1] > 10, "{outcomes:?}");
}

#[test]
fn a_slot_that_names_two_volumes_is_not_erased_for_one_of_them() {
    let (slot, _) = volume(VolumeId::random());
    let (other, _) = volume(VolumeId::random());
    let mut media = with_one_volume(&slot);
    let mut copy = [0; 4096];
    with_one_volume(&other).read(layout().slot_at(0, 0), &mut copy);
    // Of the same store, as a slot that came back from an older copy of it would be.
    let mut superblock = [0; 4096];
    media.read(0, &mut superblock);
    copy[8..24].copy_from_slice(&superblock[16..32]);
    let crc = wire::crc32c(&copy[..4092]);
    copy[4092..].copy_from_slice(&crc.to_le_bytes());

    let driver = SimDriver::new(5, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let (file, id, power) = (driver.file(0), slot.volume, driver.clone());
    runtime.block_on(async move {
        let work = async {
            let store = open(&file, Expect::default()).await.unwrap();
            // Write and sync of the tombstone's frame, then the first write to the slot.
            power.cut_after_calls(3);
            store.destroy_volume(id).await
        };
        futures_util::future::select(Box::pin(work), Box::pin(power.until_cut())).await;
    });
    drop(runtime);
    media = driver.media_after_cut(Cut::DropAll).remove(0);
    lose_the_records(&mut media);
    media.overwrite(layout().slot_at(0, 0), &copy);
    let ((), media) = with_store(6, media, async move |store| {
        assert_eq!(store.destroy_volume(id).await.unwrap_err().kind(), Kind::Damaged);
    });
    let mut found = [0; 4096];
    media.read(layout().slot_at(0, 0), &mut found);
    assert_eq!(found, copy);
}
