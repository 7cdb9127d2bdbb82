//! Marks: their order with writes, their number, and what a cut between commits leaves.

use super::*;
use crate::disk::sim::{Call, Cut};
use crate::runtime::{now, sleep, spawn};
use crate::store::{Change, SumAreaRead};
use std::cell::{Cell, RefCell};

#[test]
fn idle_extents_are_cleaned_and_marked_again_by_the_next_write() {
    simulate(2, async |stores| {
        let volume = stores.volume(2 * EXTENT_BYTES, EAGER).await;
        for round in 0..3 {
            write(&volume, 0, &pattern(round, BLOCK as usize)).await.unwrap();
            assert!(stores.extents(0).await[0].dirty && stores.extents(1).await[0].dirty);
            sleep(Duration::from_millis(200)).await;
            stores.check_equal(true).await;
        }
        let area = stores.ios[0].read_sums(
            stores.extents(0).await[0].physical,
            DATASET,
            crate::ids::ExtentIndex(0),
        );
        assert!(matches!(area.await.unwrap(), SumAreaRead::Valid(area) if area.sequence == 3));
    });
}

#[test]
fn an_extent_that_is_written_all_the_time_keeps_its_mark() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, EAGER).await;
        let until = now() + Duration::from_millis(100);
        let mut round = 0;
        while now() < until {
            round += 1;
            write(
                &volume,
                BLOCK * (round % 4),
                &pattern(round as u8, BLOCK as usize),
            )
            .await
            .unwrap();
            for replica in 0..2 {
                assert!(
                    stores.extents(replica).await[0].dirty,
                    "a write was acknowledged just now"
                );
            }
        }
    });
}

#[test]
fn a_limit_on_dirty_extents_makes_writers_wait_for_the_cleaner_not_fail() {
    simulate(2, async |stores| {
        let tuning = Tuning {
            dirty_extents_max: 2,
            ..IDLE
        };
        let volume = stores.volume(30 * EXTENT_BYTES, tuning).await;
        let writers: Vec<_> = (0..30)
            .map(|i| {
                let volume = volume.clone();
                let stores = stores.clone();
                spawn(async move {
                    write(&volume, i * EXTENT_BYTES + 5, &pattern(i as u8, 100))
                        .await
                        .unwrap();
                    // Markings begun together may overshoot by their number, never by all.
                    stores.handle(0).space().dirty
                })
            })
            .collect();
        for writer in writers {
            writer.await;
        }
        for i in 0..30 {
            assert!(read(&volume, i * EXTENT_BYTES + 5, 100).await.unwrap() == pattern(i as u8, 100));
        }
        volume.trim(0, 30 * EXTENT_BYTES, false).await.unwrap();
        assert_eq!(volume.stats().allocated_extents, 0);
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn sums_beyond_the_cache_are_loaded_again_when_needed() {
    simulate(2, async |stores| {
        let tuning = Tuning {
            sum_cache_bytes: 4 * 16,
            ..EAGER
        };
        let volume = stores.volume(40 * EXTENT_BYTES, tuning).await;
        for i in 0..40 {
            write(&volume, i * EXTENT_BYTES, &pattern(i as u8, 5000))
                .await
                .unwrap();
        }
        sleep(Duration::from_millis(500)).await;
        for i in 0..40 {
            assert!(read(&volume, i * EXTENT_BYTES, 5000).await.unwrap() == pattern(i as u8, 5000));
        }
        assert!(
            volume.core.cache.bytes() <= 4 * 16,
            "{}",
            volume.core.cache.bytes()
        );
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn the_mark_is_durable_on_every_replica_before_data_goes_to_any() {
    for seed in 0..10 {
        let media = fresh(2, 80);
        // The data regions begin where the first extent's ciphertext is found.
        let data_writes: Rc<RefCell<Vec<(u32, u64)>>> = Rc::default();
        let syncs: Rc<Cell<[u32; 2]>> = Rc::default();
        let work = {
            let (data_writes, syncs) = (data_writes.clone(), syncs.clone());
            async move |stores: Stores| {
                let volume = stores.volume(EXTENT_BYTES, IDLE).await;
                let data_from = STORE_BYTES - 80 * EXTENT_BYTES;
                let (writes, synced) = (data_writes.clone(), syncs.clone());
                stores.driver.set_fault(Some(Box::new(move |slot, call| {
                    match call {
                        Call::Sync => {
                            let mut counts = synced.get();
                            counts[slot.0 as usize] += 1;
                            synced.set(counts);
                        }
                        Call::Write { at, .. } if at >= data_from => {
                            assert!(
                                synced.get().iter().all(|count| *count > 0),
                                "data before the mark"
                            );
                            writes.borrow_mut().push((slot.0, at));
                        }
                        _ => {}
                    }
                    None
                })));
                write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
                stores.driver.set_fault(None);
            }
        };
        with_stores(seed, media, work).0.unwrap();
        assert_eq!(data_writes.borrow().len(), 2);
    }
}

#[test]
fn sequential_writers_find_extents_ready_and_what_they_leave_unused_is_given_back() {
    with_stores(1, fresh(2, 200), async |stores| {
        let volume = stores.volume(100 * EXTENT_BYTES, IDLE).await;
        for i in 0..20 {
            write(
                &volume,
                i * EXTENT_BYTES,
                &pattern(i as u8, EXTENT_BYTES as usize),
            )
            .await
            .unwrap();
        }
        assert!(volume.stats().allocated_extents > 20, "some are ready ahead");
        let next = stores
            .extents(1)
            .await
            .into_iter()
            .find(|entry| entry.logical.0 == 20);
        assert!(
            next.is_some_and(|entry| entry.dirty),
            "allocated and marked before its write"
        );
        write(&volume, 20 * EXTENT_BYTES, &pattern(20, EXTENT_BYTES as usize))
            .await
            .unwrap();
        volume.close().await.unwrap();
        assert_eq!(stores.extents(0).await.len(), 21);
        stores.check_equal(true).await;
    })
    .0
    .unwrap();
}

/// Commits on one store only, as a cut between the replicas' commits leaves them.
async fn commit(stores: &Stores, replica: usize, change: Change) {
    stores.handle(replica).commit(vec![change]).await.unwrap();
}

#[test]
fn a_cut_between_the_commits_of_an_allocation_leaves_the_extent_zero() {
    simulate(3, async |stores| {
        for replica in [0, 2] {
            let physical = stores.handle(replica).reserve(1).await.unwrap()[0];
            let allocate = Change::Allocate {
                physical,
                dataset: DATASET,
                logical: crate::ids::ExtentIndex(1),
                key_version: KeyVersion(1),
            };
            commit(&stores, replica, allocate).await;
        }
        let volume = stores.volume(3 * EXTENT_BYTES, IDLE).await;
        assert!(
            read(&volume, 0, 3 * EXTENT_BYTES as usize)
                .await
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        assert_eq!(volume.stats().allocated_extents, 0);
        stores.check_equal(true).await;
        write(&volume, EXTENT_BYTES, &[1]).await.unwrap();
        assert_eq!(read(&volume, EXTENT_BYTES, 1).await.unwrap(), [1]);
    });
}

#[test]
fn a_cut_between_the_commits_of_a_release_finishes_it() {
    simulate(2, async |stores| {
        let volume = stores.volume(2 * EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, 2 * EXTENT_BYTES as usize))
            .await
            .unwrap();
        volume.abandon().await;
        let physical = stores.extents(1).await[0].physical;
        commit(&stores, 1, Change::Release(physical)).await;
        let volume = stores.volume(2 * EXTENT_BYTES, IDLE).await;
        assert!(
            read(&volume, 0, EXTENT_BYTES as usize)
                .await
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        let rest = read(&volume, EXTENT_BYTES, EXTENT_BYTES as usize).await.unwrap();
        assert!(rest == pattern(1, 2 * EXTENT_BYTES as usize)[EXTENT_BYTES as usize..]);
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn a_mark_on_one_replica_only_reconciles_all() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, EXTENT_BYTES as usize))
            .await
            .unwrap();
        volume.close().await.unwrap();
        commit(&stores, 1, Change::Mark(stores.extents(1).await[0].physical)).await;
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        assert_eq!(volume.stats().recovering_extents, 1);
        assert!(read(&volume, 0, EXTENT_BYTES as usize).await.unwrap() == pattern(1, EXTENT_BYTES as usize));
        assert!(
            stores.extents(0).await[0].dirty,
            "marked before anything is rewritten"
        );
        let stats = volume.stats();
        assert_eq!((stats.recovering_extents, stats.unverified_blocks), (0, 0));
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn recovery_goes_on_in_the_background_without_requests() {
    let (_, driver) = with_stores(1, fresh(2, 80), async |stores| {
        let volume = stores.volume(20 * EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, 20 * EXTENT_BYTES as usize))
            .await
            .unwrap();
        stores.driver.cut_after_calls(1);
        let _ = volume.flush().await;
    });
    with_stores(2, driver.media_after_cut(Cut::TornSectors), async |stores| {
        let volume = stores.volume(20 * EXTENT_BYTES, EAGER).await;
        assert_eq!(volume.stats().recovering_extents, 20);
        while volume.stats().recovering_extents > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        sleep(Duration::from_secs(1)).await;
        stores.check_equal(true).await;
    })
    .0
    .unwrap();
}

#[test]
fn the_mark_of_a_failed_write_stays() {
    simulate(2, async |stores| {
        // The cleaner sleeps, and would take any extent when it wakes.
        let tuning = Tuning {
            idle_ticks: 0,
            ..IDLE
        };
        let volume = stores.volume(EXTENT_BYTES, tuning).await;
        write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
        stores.driver.set_fault(Some(Box::new(|slot, call| {
            let fails = slot.0 == 1 && matches!(call, Call::Write { .. });
            fails.then_some(5)
        })));
        let failed = write(&volume, 0, &pattern(2, BLOCK as usize)).await;
        stores.driver.set_fault(None);
        assert!(failed.is_err());
        sleep(Duration::from_secs(1)).await;
        for replica in 0..2 {
            let extents = stores.extents(replica).await;
            assert!(
                extents[0].dirty,
                "replica {replica}: one has the write, the other not"
            );
        }
    });
}
