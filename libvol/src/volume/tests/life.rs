//! What requests do, on volumes that nothing happens to.

use super::*;
use crate::error::Kind;
use crate::runtime::{sleep, spawn};

#[test]
fn any_byte_range_reads_back_as_written_and_everything_else_as_zeros() {
    for replicas in 1..=3 {
        simulate(replicas, async |stores| {
            let size = 5 * EXTENT_BYTES + 2 * BLOCK;
            let volume = stores.volume(size, IDLE).await;
            let mut model = vec![0; size as usize];
            let ranges = [
                (0, 1),
                (4095, 2),
                (100, 4096),
                (EXTENT_BYTES - 1, 2),
                (EXTENT_BYTES, EXTENT_BYTES),
                (7, 40_000),
            ];
            for (seed, (offset, len)) in ranges.into_iter().chain([(size - 1, 1)]).enumerate() {
                let bytes = pattern(seed as u8, len as usize);
                write(&volume, offset, &bytes).await.unwrap();
                model[offset as usize..][..len as usize].copy_from_slice(&bytes);
                assert!(
                    read(&volume, 0, size as usize).await.unwrap() == model,
                    "after {offset}+{len}"
                );
            }
            for (offset, len) in [
                (1, 1),
                (4000, 200),
                (EXTENT_BYTES as usize - 5, 10),
                (3, size as usize - 7),
            ] {
                assert!(read(&volume, offset as u64, len).await.unwrap() == model[offset..offset + len]);
            }
            volume.close().await.unwrap();
            stores.check_equal(true).await;
            let volume = stores.volume(size, IDLE).await;
            assert!(
                read(&volume, 0, size as usize).await.unwrap() == model,
                "after reopening"
            );
            assert_eq!(volume.stats().unverified_blocks, 0);
        });
    }
}

#[test]
fn nothing_readable_is_on_the_disks() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let secret = b"the quick brown fox jumps over the lazy dog";
        write(&volume, 5000, secret).await.unwrap();
        volume.close().await.unwrap();
        for replica in 0..2 {
            let raw = stores
                .raw(replica, stores.extents(replica).await[0].physical)
                .await;
            assert!(raw.iter().any(|byte| *byte != 0));
            assert!(!raw.windows(8).any(|window| window == &secret[..8]));
        }
    });
}

#[test]
fn requests_outside_the_volume_are_refused_and_empty_ones_are_fine() {
    simulate(1, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        assert_eq!(
            write(&volume, EXTENT_BYTES - 1, &[1, 2])
                .await
                .unwrap_err()
                .kind(),
            Kind::Invalid
        );
        assert_eq!(
            volume.read(u64::MAX, 1).await.err().unwrap().kind(),
            Kind::Invalid
        );
        assert_eq!(
            volume.trim(0, u64::MAX, false).await.unwrap_err().kind(),
            Kind::Invalid
        );
        write(&volume, EXTENT_BYTES, &[]).await.unwrap();
        assert!(read(&volume, 0, 0).await.unwrap().is_empty());
        volume.trim(5, 0, true).await.unwrap();
        assert_eq!(volume.stats().allocated_extents, 0);
    });
}

#[test]
fn a_volume_grows_while_it_is_open() {
    simulate(2, async |stores| {
        let volume = stores.volume(BLOCK, IDLE).await;
        write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
        assert!(write(&volume, BLOCK, &[1]).await.is_err());
        volume.grow(3 * EXTENT_BYTES);
        assert_eq!(volume.size_bytes(), 3 * EXTENT_BYTES);
        assert!(
            read(&volume, BLOCK, 3 * (EXTENT_BYTES as usize) - BLOCK as usize)
                .await
                .unwrap()
                .iter()
                .all(|b| *b == 0)
        );
        write(&volume, 3 * EXTENT_BYTES - 1, &[9]).await.unwrap();
        assert_eq!(read(&volume, 3 * EXTENT_BYTES - 1, 1).await.unwrap(), [9]);
        assert_eq!(
            read(&volume, 0, BLOCK as usize).await.unwrap(),
            pattern(1, BLOCK as usize)
        );
    });
}

#[test]
fn a_trim_zeroes_its_range_and_gives_whole_extents_back() {
    simulate(2, async |stores| {
        let size = 6 * EXTENT_BYTES + BLOCK;
        let volume = stores.volume(size, IDLE).await;
        let mut model = pattern(3, size as usize);
        write(&volume, 0, &model).await.unwrap();
        assert_eq!(volume.stats().allocated_extents, 7);
        let (start, end) = (EXTENT_BYTES / 2 + 100, 3 * EXTENT_BYTES + 50);
        volume.trim(start, end - start, false).await.unwrap();
        model[start as usize..end as usize].fill(0);
        assert!(read(&volume, 0, size as usize).await.unwrap() == model);
        assert_eq!(volume.stats().allocated_extents, 5);
        // The end of the volume makes a short extent whole.
        volume
            .write_zeroes(6 * EXTENT_BYTES, BLOCK, true, false)
            .await
            .unwrap();
        model[6 * EXTENT_BYTES as usize..].fill(0);
        assert_eq!(volume.stats().allocated_extents, 4);
        // What is released can be written again.
        write(&volume, EXTENT_BYTES + 3, &[7; 10]).await.unwrap();
        model[EXTENT_BYTES as usize + 3..][..10].fill(7);
        assert!(read(&volume, 0, size as usize).await.unwrap() == model);
        volume.close().await.unwrap();
        stores.check_equal(true).await;
        let volume = stores.volume(size, IDLE).await;
        assert!(read(&volume, 0, size as usize).await.unwrap() == model);
    });
}

#[test]
fn trimming_what_was_never_written_costs_nothing() {
    simulate(2, async |stores| {
        let volume = stores.volume(64 << 40, IDLE).await;
        let calls = stores.driver.calls();
        volume.trim(12345, 1 << 30, false).await.unwrap();
        volume.write_zeroes(1 << 40, 1 << 30, false, false).await.unwrap();
        assert_eq!(
            (stores.driver.calls(), volume.stats().allocated_extents),
            (calls, 0)
        );
    });
}

#[test]
fn zeroes_without_holes_take_space_and_read_as_zeros() {
    simulate(2, async |stores| {
        let volume = stores.volume(3 * EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, 3 * EXTENT_BYTES as usize))
            .await
            .unwrap();
        volume.trim(0, 3 * EXTENT_BYTES, false).await.unwrap();
        volume
            .write_zeroes(100, 2 * EXTENT_BYTES, true, true)
            .await
            .unwrap();
        assert_eq!(volume.stats().allocated_extents, 3);
        assert!(
            read(&volume, 0, 3 * EXTENT_BYTES as usize)
                .await
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        let runs = volume.block_status(0, 3 * EXTENT_BYTES, 10).await.unwrap();
        assert_eq!(runs[0], (2 * EXTENT_BYTES + BLOCK, BlockKind::Data));
    });
}

#[test]
fn block_status_tells_data_from_allocated_zeros_from_holes() {
    simulate(2, async |stores| {
        let volume = stores.volume(4 * EXTENT_BYTES, IDLE).await;
        write(&volume, EXTENT_BYTES + BLOCK, &pattern(1, BLOCK as usize))
            .await
            .unwrap();
        let all = [
            (EXTENT_BYTES, BlockKind::Hole),
            (BLOCK, BlockKind::AllocatedZero),
            (BLOCK, BlockKind::Data),
            (2 * BLOCK, BlockKind::AllocatedZero),
            (2 * EXTENT_BYTES, BlockKind::Hole),
        ];
        assert_eq!(volume.block_status(0, 4 * EXTENT_BYTES, 10).await.unwrap(), all);
        assert_eq!(
            volume.block_status(0, 4 * EXTENT_BYTES, 3).await.unwrap(),
            all[..3]
        );
        let middle = volume
            .block_status(EXTENT_BYTES + BLOCK + 10, BLOCK, 9)
            .await
            .unwrap();
        assert_eq!(
            middle,
            [(BLOCK - 10, BlockKind::Data), (10, BlockKind::AllocatedZero)]
        );
        volume.close().await.unwrap();
        let volume = stores.volume(4 * EXTENT_BYTES, IDLE).await;
        assert_eq!(
            volume.block_status(0, 4 * EXTENT_BYTES, 10).await.unwrap(),
            all,
            "from the areas"
        );
    });
}

#[test]
fn a_full_store_refuses_new_space_and_loses_nothing() {
    let media = fresh(1, 12)
        .into_iter()
        .chain(fresh(2, 80).into_iter().skip(1))
        .collect();
    let work = async |stores: Stores| {
        let volume = stores.volume(60 * EXTENT_BYTES, IDLE).await;
        let mut written = 0;
        let refused = loop {
            match write(
                &volume,
                written * EXTENT_BYTES,
                &pattern(written as u8, EXTENT_BYTES as usize),
            )
            .await
            {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), Kind::NoSpace, "{refused}");
        assert_eq!(volume.failure(), None);
        assert!(written >= 12, "{written} extents");
        // Nothing stays reserved on the store that has room.
        crate::runtime::sleep(Duration::from_millis(1)).await;
        assert_eq!(
            stores.handle(1).space().free,
            stores.handle(1).space().total - written as u32
        );
        write(&volume, 0, &[1]).await.unwrap();
        for extent in 1..written {
            let bytes = read(&volume, extent * EXTENT_BYTES, EXTENT_BYTES as usize)
                .await
                .unwrap();
            assert!(
                bytes == pattern(extent as u8, EXTENT_BYTES as usize),
                "extent {extent}"
            );
        }
        // Space given back is space again, once it is scrubbed.
        volume.trim(0, 2 * EXTENT_BYTES, false).await.unwrap();
        write(&volume, written * EXTENT_BYTES, &[2]).await.unwrap();
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    };
    with_stores(1, media, work).0.unwrap();
}

#[test]
fn a_flush_that_no_replica_can_do_stops_the_volume_with_its_marks_kept() {
    let (_, driver) = with_stores(1, fresh(2, 80), async |stores| {
        let volume = stores.volume(4 * EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, EXTENT_BYTES as usize))
            .await
            .unwrap();
        volume.flush().await.unwrap();
        write(&volume, BLOCK, &pattern(2, BLOCK as usize)).await.unwrap();
        stores.driver.set_fault(Some(Box::new(|_, call| {
            matches!(call, crate::disk::sim::Call::Sync).then_some(5)
        })));
        let error = volume.flush().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(
            volume.failure().unwrap().contains("store-0"),
            "{:?}",
            volume.failure()
        );
        stores.driver.set_fault(None);
        for error in [
            read(&volume, 0, 1).await.unwrap_err(),
            write(&volume, 0, &[1]).await.unwrap_err(),
            volume.flush().await.unwrap_err(),
            volume.trim(0, 1, false).await.unwrap_err(),
            volume.close().await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Io, "{error}");
        }
        for replica in 0..2 {
            assert!(stores.extents(replica).await[0].dirty);
        }
    });
    with_stores(2, driver.media(), async |stores| {
        let volume = stores.volume(4 * EXTENT_BYTES, IDLE).await;
        let bytes = read(&volume, 0, EXTENT_BYTES as usize).await.unwrap();
        let (old, new) = (pattern(1, EXTENT_BYTES as usize), pattern(2, BLOCK as usize));
        for (i, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let at = i * BLOCK as usize;
            // The failed block: each sector as before or as sent.
            let allowed = |sector: usize| {
                let sector = sector * 512..(sector + 1) * 512;
                block[sector.clone()] == old[at..][sector.clone()]
                    || i == 1 && block[sector.clone()] == new[sector]
            };
            assert!((0..8).all(allowed), "block {i}");
        }
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn a_write_whose_caller_goes_away_still_ends_whole_on_every_replica() {
    simulate(3, async |stores| {
        let size = 3 * EXTENT_BYTES;
        let volume = stores.volume(size, IDLE).await;
        for round in 0..40u64 {
            let task = spawn({
                let volume = volume.clone();
                async move { write(&volume, 10, &pattern(round as u8, size as usize - 20)).await }
            });
            sleep(Duration::from_micros(round * 23)).await;
            drop(task);
            let reader = spawn({
                let volume = volume.clone();
                async move { read(&volume, 0, size as usize).await }
            });
            sleep(Duration::from_micros(round * 7)).await;
            drop(reader);
        }
        volume.close().await.unwrap();
        stores.check_equal(true).await;
        let volume = stores.volume(size, IDLE).await;
        let last = read(&volume, 10, size as usize - 20).await.unwrap();
        assert!(last == pattern(39, size as usize - 20));
    });
}

#[test]
fn a_closing_volume_refuses_requests_and_waits_for_those_under_way() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let under_way = spawn({
            let volume = volume.clone();
            async move { write(&volume, 0, &pattern(1, EXTENT_BYTES as usize)).await }
        });
        crate::runtime::yield_now().await;
        volume.close().await.unwrap();
        under_way.await.unwrap();
        assert_eq!(
            write(&volume, 0, &[1]).await.unwrap_err().kind(),
            Kind::Unavailable
        );
        assert_eq!(read(&volume, 0, 1).await.unwrap_err().kind(), Kind::Unavailable);
        stores.check_equal(true).await;
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &[1]).await.unwrap();
        volume.abandon().await;
        assert!(stores.extents(0).await[0].dirty, "abandoned, not cleaned");
    });
}
