//! The integrity walk: finds what nobody reads, counts it exactly, and is never wrong about a volume in use.

use std::cell::{Cell, RefCell};

use super::damage::{damage_area, flip};
use super::model::Model;
use super::*;
use crate::disk::sim::Rng;
use crate::error::Kind;
use crate::runtime::{Task, sleep, spawn};

/// One walk from the beginning to the end, `bytes` a call.
async fn walk(volume: &Volume, bytes: u64) -> Verified {
    let mut total = Verified::default();
    let mut from = 0;
    loop {
        let part = volume.verify_extents(from, bytes).await.unwrap();
        total.extents += part.extents;
        total.bytes += part.bytes;
        total.healed_blocks += part.healed_blocks;
        total.healed_areas += part.healed_areas;
        total.lost_blocks += part.lost_blocks;
        let Some(next) = part.next else { return total };
        assert!(next >= from, "{from} is followed by {next}");
        from = next;
    }
}

/// What a walk of that many extents sees where all is well.
fn sound(extents: u64, replicas: u64) -> Verified {
    Verified {
        extents,
        bytes: extents * replicas * EXTENT_BYTES,
        ..Verified::default()
    }
}

/// A volume of three full extents with nothing between the first and the others, open.
async fn filled(stores: &Stores, tuning: Tuning, clean: bool) -> (Rc<Volume>, Vec<u8>) {
    let size = 9 * EXTENT_BYTES;
    let mut volume = stores.volume(size, tuning).await;
    let mut bytes = vec![0; size as usize];
    // Descending, so that nothing is allocated ahead.
    for extent in [7, 6, 0] {
        let at = extent as usize * EXTENT_BYTES as usize;
        let data = pattern(extent as u8 + 1, EXTENT_BYTES as usize);
        write(&volume, at as u64, &data).await.unwrap();
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    if clean {
        volume.close().await.unwrap();
        volume = stores.volume(size, tuning).await;
    }
    (volume, bytes)
}

#[test]
fn damage_in_any_replica_is_healed_without_any_read_of_a_client() {
    for (replicas, clean) in [(2, false), (2, true), (3, false), (3, true)] {
        simulate(replicas, async move |stores| {
            let (volume, bytes) = filled(&stores, IDLE, clean).await;
            assert_eq!(walk(&volume, 1).await, sound(3, replicas as u64));
            for replica in 0..replicas {
                flip(&stores, replica, 6, replica as u32).await;
                flip(&stores, replica, 7, replica as u32 + 1).await;
            }
            let found = walk(&volume, u64::MAX).await;
            let expected = Verified {
                healed_blocks: 2 * replicas as u64,
                ..sound(3, replicas as u64)
            };
            assert_eq!(found, expected);
            assert_eq!(volume.stats().healed_blocks, 2 * replicas as u64);
            stores.check_equal(false).await;
            assert_eq!(walk(&volume, u64::MAX).await, sound(3, replicas as u64));
            assert!(read(&volume, 0, bytes.len()).await.unwrap() == bytes);
            volume.close().await.unwrap();
            stores.check_equal(true).await;
        });
    }
}

#[test]
fn several_damaged_copies_of_one_block_are_healed_from_the_last_good_one() {
    simulate(3, async |stores| {
        let (volume, _) = filled(&stores, IDLE, true).await;
        for replica in [0, 2] {
            flip(&stores, replica, 7, 3).await;
        }
        let found = walk(&volume, u64::MAX).await;
        assert_eq!((found.healed_blocks, found.lost_blocks), (2, 0));
        stores.check_equal(true).await;
    });
}

#[test]
fn a_block_damaged_on_every_replica_is_counted_lost_once_and_its_neighbours_are_healed() {
    simulate(2, async |stores| {
        let (volume, bytes) = filled(&stores, IDLE, true).await;
        for (replica, block) in [(0, 0), (0, 1), (1, 1), (1, 2)] {
            flip(&stores, replica, 6, block).await;
        }
        for healed_blocks in [2, 0] {
            let found = walk(&volume, 1).await;
            let expected = Verified {
                healed_blocks,
                lost_blocks: 1,
                ..sound(3, 2)
            };
            assert_eq!(found, expected);
        }
        assert_eq!(volume.stats().lost_blocks, 1);
        assert_eq!(volume.failure(), None);
        let lost = 6 * EXTENT_BYTES + BLOCK;
        assert_eq!(read(&volume, lost, 1).await.unwrap_err().kind(), Kind::Io);
        let data = &bytes[lost as usize..][..BLOCK as usize];
        write(&volume, lost, data).await.unwrap();
        assert_eq!(walk(&volume, 1).await, sound(3, 2));
        assert!(read(&volume, 0, bytes.len()).await.unwrap() == bytes);
    });
}

#[test]
fn one_replica_has_nothing_to_heal_from() {
    simulate(1, async |stores| {
        let (volume, _) = filled(&stores, IDLE, true).await;
        flip(&stores, 0, 0, 3).await;
        let expected = Verified {
            lost_blocks: 1,
            ..sound(3, 1)
        };
        assert_eq!(walk(&volume, u64::MAX).await, expected);
    });
}

#[test]
fn data_where_a_hole_should_be_is_damage_like_a_hole_where_data_should_be() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(5, 3 * BLOCK as usize)).await.unwrap();
        let at = stores.disk_offset(0, 0, 0).await;
        stores.driver.with_disk(0, |disk| {
            disk.overwrite(at, &[0; BLOCK as usize]);
            disk.overwrite(at + 3 * BLOCK, &[7; BLOCK as usize]);
        });
        assert_eq!(walk(&volume, 1).await.healed_blocks, 2);
        stores.check_equal(false).await;
    });
}

#[test]
fn a_damaged_area_of_either_replica_is_written_anew_whether_its_sums_are_in_memory_or_not() {
    for (replica, in_memory) in [(0, false), (0, true), (1, false), (1, true)] {
        for change in [
            |area: &mut [u8]| area[30] ^= 1,
            |area: &mut [u8]| area.fill(0),
            |area: &mut [u8]| area[512 + 4..512 + 8].fill(9),
        ] {
            simulate(2, async move |stores| {
                let (volume, bytes) = filled(&stores, EAGER, true).await;
                if in_memory {
                    assert!(read(&volume, 0, bytes.len()).await.unwrap() == bytes);
                }
                damage_area(&stores, replica, 6, change).await;
                let expected = Verified {
                    healed_areas: 1,
                    ..sound(3, 2)
                };
                assert_eq!(walk(&volume, 1).await, expected);
                assert_eq!(volume.stats().healed_areas, 1);
                // The cleaner writes them.
                sleep(Duration::from_millis(100)).await;
                assert_eq!(walk(&volume, 1).await, sound(3, 2));
                volume.close().await.unwrap();
                stores.check_equal(true).await;
            });
        }
    }
}

#[test]
fn an_extent_without_any_area_is_lost_block_by_block_unless_memory_still_knows_its_sums() {
    for in_memory in [false, true] {
        simulate(2, async move |stores| {
            let (volume, bytes) = filled(&stores, IDLE, true).await;
            if in_memory {
                assert!(read(&volume, 0, bytes.len()).await.unwrap() == bytes);
            }
            for replica in [0, 1] {
                damage_area(&stores, replica, 6, |area| area[3] ^= 1).await;
            }
            let found = walk(&volume, u64::MAX).await;
            let expected = match in_memory {
                false => (u64::from(EXTENT_BLOCKS), 0),
                true => (0, 1),
            };
            assert_eq!((found.lost_blocks, found.healed_areas), expected);
            volume.close().await.unwrap();
            stores.check_equal(!in_memory).await;
        });
    }
}

#[test]
fn older_areas_of_marked_extents_are_no_damage() {
    simulate(2, async |stores| {
        let (volume, _) = filled(&stores, IDLE, true).await;
        write(&volume, 6 * EXTENT_BYTES, &pattern(99, 5000))
            .await
            .unwrap();
        assert_eq!(walk(&volume, u64::MAX).await, sound(3, 2));
    });
}

#[test]
fn what_was_released_or_never_allocated_is_passed_over_and_a_cursor_may_point_anywhere() {
    simulate(2, async |stores| {
        let (volume, _) = filled(&stores, IDLE, true).await;
        volume.trim(6 * EXTENT_BYTES, EXTENT_BYTES, false).await.unwrap();
        assert_eq!(walk(&volume, 1).await, sound(2, 2));
        let from = async |from| volume.verify_extents(from, u64::MAX).await.unwrap();
        // In the middle of extent 7, whose first half is not looked at.
        let found = from(7 * EXTENT_BYTES + 2 * BLOCK + 1).await;
        assert_eq!((found.extents, found.bytes), (1, EXTENT_BYTES));
        assert_eq!(from(8 * EXTENT_BYTES).await, Verified::default());
        for beyond in [9 * EXTENT_BYTES, u64::MAX] {
            assert_eq!(from(beyond).await, Verified::default());
        }
    });
}

#[test]
fn a_budget_ends_a_call_after_a_chunk_and_the_next_goes_on_behind_it() {
    simulate(2, async |stores| {
        let (volume, _) = filled(&stores, IDLE, true).await;
        let first = volume.verify_extents(0, 1).await.unwrap();
        assert_eq!((first.extents, first.next), (1, Some(EXTENT_BYTES)));
        let second = volume
            .verify_extents(EXTENT_BYTES, 4 * EXTENT_BYTES)
            .await
            .unwrap();
        assert_eq!((second.extents, second.next), (2, Some(8 * EXTENT_BYTES)));
        let end = volume.verify_extents(8 * EXTENT_BYTES, 1).await.unwrap();
        assert_eq!(end, Verified::default());
    });
}

#[test]
fn an_extent_that_a_crash_left_marked_is_reconciled_and_then_verified() {
    let (_, driver) = with_stores(3, fresh(2, 80), async |stores| {
        let (_volume, _) = filled(&stores, IDLE, false).await;
        stores.driver.cut_after_calls(1);
        stores.ios[0].flush().await.unwrap();
    });
    let media = driver.media_after_cut(crate::disk::sim::Cut::random(&mut Rng::new(3)));
    let verified = async |stores: Stores| {
        let volume = stores.volume(9 * EXTENT_BYTES, IDLE).await;
        assert_eq!(walk(&volume, 1).await, sound(3, 2));
        assert_eq!(volume.stats().recovering_extents, 0);
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    };
    with_stores(3, media, verified).0.unwrap();
}

#[test]
fn a_closing_volume_ends_the_walk_without_losing_what_it_found() {
    simulate(2, async |stores| {
        let (volume, _) = filled(&stores, IDLE, true).await;
        flip(&stores, 0, 0, 0).await;
        let walking = {
            let volume = volume.clone();
            spawn(async move { volume.verify_extents(0, u64::MAX).await.unwrap() })
        };
        // Until it is under way.
        crate::runtime::yield_now().await;
        volume.close().await.unwrap();
        let found = walking.await;
        assert_eq!(found.healed_blocks, 1);
        assert_eq!(found.next, Some(EXTENT_BYTES), "there is more to do");
        let after = volume.verify_extents(EXTENT_BYTES, 1).await;
        assert_eq!(after.unwrap_err().kind(), Kind::Unavailable);
    });
}

/// Workers that write, trim and read at random while walks go round and round: not one false alarm, whatever the order
/// of events.
#[test]
fn writes_under_the_walks_feet_are_never_taken_for_damage() {
    for seed in 0..40 {
        run_one(seed);
    }
}

fn run_one(seed: u64) {
    let result = std::panic::catch_unwind(|| walk_under_load(seed));
    if let Err(panic) = result {
        eprintln!("failing seed: run_one({seed})");
        std::panic::resume_unwind(panic);
    }
}

fn walk_under_load(seed: u64) {
    let mut rng = Rng::new(seed);
    let replicas = 1 + rng.below(3) as usize;
    let size = (1 + rng.below(10 * u64::from(EXTENT_BLOCKS))) * BLOCK;
    let tuning = Tuning {
        dirty_extents_max: [2, 5, 1000][rng.below(3) as usize],
        sum_cache_bytes: [64, 1 << 20][rng.below(2) as usize],
        tick: Duration::from_micros([50, 200, 5000][rng.below(3) as usize]),
        idle_ticks: 1,
        ..IDLE
    };
    let work = async move |stores: Stores| {
        let volume = stores.volume(size, tuning).await;
        let model = Rc::new(RefCell::new(Model::zeroed(size as usize)));
        let busy = Rc::new(Cell::new(3));
        let workers: Vec<Task<()>> = (0..busy.get())
            .map(|_| {
                let (volume, model, busy) = (volume.clone(), model.clone(), busy.clone());
                let rng = Rng::new(rng.next_u64());
                spawn(async move {
                    worker(&volume, &model, rng).await;
                    busy.set(busy.get() - 1);
                })
            })
            .collect();
        let mut walks = 0;
        while busy.get() > 0 || walks == 0 {
            let found = walk(&volume, 1 + rng.below(4 * EXTENT_BYTES)).await;
            let harm = (found.healed_blocks, found.healed_areas, found.lost_blocks);
            assert_eq!(harm, (0, 0, 0), "after {walks} walks");
            walks += 1;
            sleep(Duration::from_micros(rng.below(300))).await;
        }
        for worker in workers {
            worker.await;
        }
        let reading = model.borrow_mut().start_read(0..size as usize);
        let bytes = read(&volume, 0, size as usize).await.unwrap();
        model.borrow_mut().check_read(reading, &bytes);
        let stats = volume.stats();
        assert_eq!(
            (stats.healed_blocks, stats.healed_areas, stats.lost_blocks),
            (0, 0, 0)
        );
        let allocated = stats.allocated_extents;
        assert_eq!(walk(&volume, u64::MAX).await.extents, allocated);
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    };
    with_stores(seed, fresh(replicas, 80), work).0.unwrap();
}

async fn worker(volume: &Rc<Volume>, model: &RefCell<Model>, mut rng: Rng) {
    let size = volume.size_bytes();
    for _ in 0..25 {
        let unit = [1, 512, BLOCK, EXTENT_BYTES][rng.below(4) as usize];
        let start = rng.below(size) / unit * unit;
        let len = (1 + rng.below(2 * EXTENT_BYTES)).next_multiple_of(unit);
        let range = start as usize..(start + len).min(size) as usize;
        match rng.below(10) {
            0..=5 => {
                let value = 1 + rng.below(63) as u8;
                let payload = Model::bytes_of(value, range.clone());
                let started = model.borrow_mut().start(range, value);
                write(volume, start, &payload).await.unwrap();
                model.borrow_mut().acknowledge(started, false);
            }
            6..=7 => {
                let started = model.borrow_mut().start(range.clone(), 0);
                volume.trim(start, range.len() as u64, false).await.unwrap();
                model.borrow_mut().acknowledge(started, false);
            }
            8 => {
                let reading = model.borrow_mut().start_read(range.clone());
                let bytes = read(volume, start, range.len()).await.unwrap();
                model.borrow_mut().check_read(reading, &bytes);
            }
            _ => volume.flush().await.unwrap(),
        }
        if rng.one_in(2) {
            sleep(Duration::from_micros(rng.below(2_000))).await;
        }
    }
}
