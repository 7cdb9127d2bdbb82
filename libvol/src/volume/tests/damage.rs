//! Damaged media: what is healed, what is lost, and that nothing else suffers.

use super::*;
use crate::error::Kind;

/// Damages one bit of a block of the volume on one replica's disk.
pub(super) async fn flip(stores: &Stores, replica: usize, logical: u32, block: u32) {
    let at = stores.disk_offset(replica, logical, block).await;
    stores.driver.with_disk(replica, |disk| {
        let mut bytes = vec![0; BLOCK as usize];
        disk.read(at, &mut bytes);
        bytes[1234] ^= 0x10;
        disk.overwrite(at, &bytes);
    });
}

/// Reads a range often enough to have met every replica.
async fn read_all_ways(volume: &Volume, offset: u64, len: usize) -> Vec<u8> {
    let first = read(volume, offset, len).await.unwrap();
    for _ in 0..5 {
        assert!(read(volume, offset, len).await.unwrap() == first);
    }
    first
}

#[test]
fn a_damaged_copy_is_answered_from_another_replica_and_healed() {
    for reopen in [false, true] {
        simulate(2, async move |stores| {
            let size = 2 * EXTENT_BYTES;
            let mut volume = stores.volume(size, IDLE).await;
            let bytes = pattern(5, size as usize);
            write(&volume, 0, &bytes).await.unwrap();
            if reopen {
                volume.close().await.unwrap();
                volume = stores.volume(size, IDLE).await;
            }
            flip(&stores, 0, 0, 1).await;
            flip(&stores, 1, 1, 3).await;
            assert!(read_all_ways(&volume, 0, size as usize).await == bytes);
            let stats = volume.stats();
            assert_eq!((stats.healed_blocks, stats.lost_blocks), (2, 0));
            stores.check_equal(false).await;
            volume.close().await.unwrap();
        });
    }
}

#[test]
fn a_block_without_a_good_copy_gives_eio_for_exactly_that_block_until_it_is_written() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let bytes = pattern(5, EXTENT_BYTES as usize);
        write(&volume, 0, &bytes).await.unwrap();
        flip(&stores, 0, 0, 2).await;
        flip(&stores, 1, 0, 2).await;
        let block = |i: u64| (i * BLOCK, BLOCK as usize);
        for i in [0, 1, 3] {
            let (at, len) = block(i);
            assert!(read_all_ways(&volume, at, len).await == bytes[at as usize..][..len]);
        }
        for (at, len) in [block(2), (2 * BLOCK + 7, 1), (0, EXTENT_BYTES as usize)] {
            let error = read(&volume, at, len).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Io);
            assert!(error.message().contains("block 2 "), "{error}");
        }
        assert_eq!(volume.stats().lost_blocks, 1);
        assert_eq!(volume.failure(), None);
        assert_eq!(
            write(&volume, 2 * BLOCK + 1, &[1]).await.unwrap_err().kind(),
            Kind::Io,
            "nothing to merge with"
        );
        volume.close().await.unwrap();
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        assert_eq!(
            read(&volume, 2 * BLOCK, 1).await.unwrap_err().kind(),
            Kind::Io,
            "it stays lost"
        );
        write(&volume, 2 * BLOCK, &pattern(9, BLOCK as usize))
            .await
            .unwrap();
        assert_eq!(volume.stats().lost_blocks, 0);
        assert!(read(&volume, 2 * BLOCK, BLOCK as usize).await.unwrap() == pattern(9, BLOCK as usize));
    });
}

#[test]
fn a_sub_block_write_heals_what_it_merges_with() {
    simulate(3, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let mut bytes = pattern(5, EXTENT_BYTES as usize);
        write(&volume, 0, &bytes).await.unwrap();
        for replica in [0, 1] {
            flip(&stores, replica, 0, 0).await;
        }
        for at in [3usize, 4, 5] {
            write(&volume, at as u64, &[0xee]).await.unwrap();
            bytes[at] = 0xee;
        }
        assert!(read_all_ways(&volume, 0, EXTENT_BYTES as usize).await == bytes);
        stores.check_equal(false).await;
    });
}

/// Overwrites a checksum area on one replica with `bytes`.
pub(super) async fn damage_area(
    stores: &Stores,
    replica: usize,
    logical: u32,
    change: impl FnOnce(&mut [u8]),
) {
    // An area is found by its header: magic, dataset and logical extent come first.
    let mut header = b"VOLDSUMS".to_vec();
    header.extend_from_slice(DATASET.as_bytes());
    header.extend_from_slice(&logical.to_le_bytes());
    stores.driver.with_disk(replica, |disk| {
        let mut bytes = vec![0; BLOCK as usize];
        let at = (0..disk.size_bytes() / BLOCK).map(|i| i * BLOCK).find(|at| {
            disk.read(*at, &mut bytes);
            bytes.starts_with(&header)
        });
        change(&mut bytes);
        disk.overwrite(at.expect("an area"), &bytes);
    });
}

async fn cleaned(stores: &Stores, bytes: &[u8]) {
    let volume = stores.volume(EXTENT_BYTES, IDLE).await;
    write(&volume, 0, bytes).await.unwrap();
    volume.close().await.unwrap();
}

#[test]
fn a_damaged_or_lost_area_is_read_from_another_replica_and_written_anew() {
    for blank in [false, true] {
        simulate(2, async move |stores| {
            let bytes = pattern(5, 3 * BLOCK as usize);
            cleaned(&stores, &bytes).await;
            damage_area(
                &stores,
                0,
                0,
                |area| if blank { area.fill(0) } else { area[30] ^= 1 },
            )
            .await;
            let volume = stores.volume(EXTENT_BYTES, EAGER).await;
            assert!(read_all_ways(&volume, 0, bytes.len()).await == bytes);
            crate::runtime::sleep(Duration::from_millis(100)).await;
            volume.close().await.unwrap();
            stores.check_equal(true).await;
        });
    }
}

#[test]
fn an_entry_that_differs_between_areas_is_settled_by_the_data() {
    simulate(2, async |stores| {
        let bytes = pattern(5, 3 * BLOCK as usize);
        cleaned(&stores, &bytes).await;
        // A hole's entry for block 1 on one replica; nonsense for block 3, a hole, on the other.
        damage_area(&stores, 0, 0, |area| area[512 + 4..512 + 8].fill(0)).await;
        damage_area(&stores, 1, 0, |area| area[512 + 12..512 + 16].fill(9)).await;
        let volume = stores.volume(EXTENT_BYTES, EAGER).await;
        assert!(read_all_ways(&volume, 0, bytes.len()).await == bytes);
        assert!(
            read(&volume, 3 * BLOCK, BLOCK as usize)
                .await
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        crate::runtime::sleep(Duration::from_millis(100)).await;
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn an_extent_that_has_lost_every_area_gives_eio_until_it_is_written() {
    simulate(2, async |stores| {
        cleaned(&stores, &pattern(5, 3 * BLOCK as usize)).await;
        damage_area(&stores, 0, 0, |area| area.fill(0)).await;
        damage_area(&stores, 1, 0, |area| area[3] ^= 1).await;
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        for block in 0..4 {
            assert_eq!(
                read(&volume, block * BLOCK, 1).await.unwrap_err().kind(),
                Kind::Io,
                "block {block}"
            );
        }
        write(&volume, BLOCK, &pattern(7, BLOCK as usize)).await.unwrap();
        volume.trim(3 * BLOCK, BLOCK, false).await.unwrap();
        volume.close().await.unwrap();
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        assert!(read(&volume, BLOCK, BLOCK as usize).await.unwrap() == pattern(7, BLOCK as usize));
        assert_eq!(read(&volume, 3 * BLOCK, 1).await.unwrap(), [0]);
        assert_eq!(read(&volume, 0, 1).await.unwrap_err().kind(), Kind::Io);
    });
}

#[test]
fn a_lost_sector_of_sums_is_no_hole() {
    for replicas in [1, 2] {
        simulate(replicas, async move |stores| {
            let bytes = pattern(5, 3 * BLOCK as usize);
            cleaned(&stores, &bytes).await;
            damage_area(&stores, 0, 0, |area| area[512..1024].fill(0)).await;
            let volume = stores.volume(EXTENT_BYTES, IDLE).await;
            if replicas == 2 {
                assert!(read_all_ways(&volume, 0, bytes.len()).await == bytes);
                return;
            }
            for block in 0..3 {
                let error = read(&volume, block * BLOCK, 1).await.unwrap_err();
                assert_eq!(error.kind(), Kind::Io, "block {block}: not zeros");
            }
            assert_eq!(
                read(&volume, 3 * BLOCK, 1).await.unwrap(),
                [0],
                "its data bears it out"
            );
        });
    }
}

#[test]
fn a_replica_that_does_not_know_the_volume_any_more_is_dropped_and_the_other_serves() {
    let mut media = fresh(2, 80);
    let [_, _, _, (table, len), ..] = crate::store::tests::regions_small(STORE_BYTES, EXTENT_BYTES);
    // Both copies of the page with the volume's record.
    for copy in [table, table + len / 2] {
        media[1].overwrite(copy + 100, &[0x77; 64]);
    }
    let served = with_stores(1, media, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        assert_eq!(stores.register.state(1), Member::Stale);
        write(&volume, 0, &pattern(5, 100)).await.unwrap();
        assert!(read(&volume, 0, 100).await.unwrap() == pattern(5, 100));
        volume.close().await.unwrap();
    });
    served.0.unwrap();
}

#[test]
fn a_lost_write_of_a_block_is_damage_in_both_directions() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let bytes = pattern(5, 3 * BLOCK as usize);
        write(&volume, 0, &bytes).await.unwrap();
        // The sum says data, the device returns zeros; the sum says hole, the device returns data.
        let at = stores.disk_offset(0, 0, 0).await;
        stores.driver.with_disk(0, |disk| {
            disk.overwrite(at, &[0; BLOCK as usize]);
            disk.overwrite(at + 3 * BLOCK, &[7; BLOCK as usize]);
        });
        let mut expected = bytes.clone();
        expected.resize(EXTENT_BYTES as usize, 0);
        assert!(read_all_ways(&volume, 0, EXTENT_BYTES as usize).await == expected);
        assert_eq!(volume.stats().healed_blocks, 2);
        stores.check_equal(false).await;
    });
}

#[test]
fn a_replica_that_has_lost_the_record_of_a_clean_extent_is_dropped_for_a_full_copy() {
    simulate(2, async |stores| {
        cleaned(&stores, &pattern(5, BLOCK as usize)).await;
        let entry = stores.extents(1).await[0];
        stores
            .handle(1)
            .commit(vec![crate::store::Change::Release(entry.physical)])
            .await
            .unwrap();
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let standing = stores.register.0.borrow().members[1].clone();
        assert_eq!((standing.state, standing.full_copy), (Member::Stale, true));
        assert!(standing.reason.unwrap().contains("lost extent 0"));
        for _ in 0..4 {
            let found = read(&volume, 0, BLOCK as usize).await.unwrap();
            assert!(found == pattern(5, BLOCK as usize));
        }
    });
}
