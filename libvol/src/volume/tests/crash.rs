//! Random requests of random byte ranges, several at a time, with power cuts, reopening and full stores.

use std::cell::RefCell;

use super::model::Model;
use super::*;
use crate::disk::sim::{Cut, Rng};
use crate::error::Kind;
use crate::runtime::{Task, sleep, spawn};

const SEEDS: u64 = 60;

#[test]
fn after_any_power_cut_every_block_is_as_some_allowed_history_left_it() {
    for seed in 0..SEEDS {
        run_one(seed);
    }
}

/// Two cuts: the first leaves a new block on one replica only, and recovery decides for the old one, which is then read. The
/// second one must not bring the new block back: nobody would know it from another write that was cut.
#[test]
fn what_recovery_has_chosen_is_durable_before_anyone_reads_it() {
    let len = BLOCK as usize;
    let (places, driver) = with_stores(1, fresh(2, 80), async |stores: Stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, BLOCK as usize)).await.unwrap();
        [
            stores.disk_offset(0, 0, 0).await,
            stores.disk_offset(1, 0, 0).await,
        ]
    });
    let places = places.unwrap();
    let mut media = driver.media();
    media[1].overwrite(places[1], &vec![0; len]);
    let (ended, driver) = with_stores(2, media, async move |stores: Stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let hole = read(&volume, 0, len).await.unwrap();
        assert!(hole == vec![0; len], "the blank area vouches for the hole");
        stores.driver.cut_after_calls(1);
        volume.flush().await
    });
    assert!(ended.is_none(), "the power went before the flush");
    for (disk, at) in driver.media_after_cut(Cut::DropAll).iter().zip(places) {
        let mut left = vec![1; len];
        disk.read(at, &mut left);
        assert!(left == vec![0; len]);
    }
}

/// More of the same: `VOLD_SEEDS=100000..200000 cargo test -p libvol --release many_power_cuts -- --ignored`.
#[test]
#[ignore = "as long as one likes"]
fn many_power_cuts() {
    let range = std::env::var("VOLD_SEEDS").unwrap_or_else(|_| "1000..3000".into());
    let (from, to) = range.split_once("..").expect("FROM..TO");
    for seed in from.parse().unwrap()..to.parse().unwrap() {
        run_one(seed);
    }
}

/// What one seed chooses.
struct Plan {
    size: u64,
    tuning: Tuning,
    workers: usize,
    requests: usize,
    trims: bool,
}

fn run_one(seed: u64) {
    let result = std::panic::catch_unwind(|| run_rounds(seed));
    if let Err(panic) = result {
        eprintln!("failing seed: run_one({seed})");
        std::panic::resume_unwind(panic);
    }
}

fn run_rounds(seed: u64) {
    let mut rng = Rng::new(seed);
    let replicas = 1 + rng.below(3) as usize;
    // Sometimes too small for the volume.
    let mut media = fresh(replicas, [8, 80, 80][rng.below(3) as usize]);
    let blocks = 1 + rng.below(10 * u64::from(EXTENT_BLOCKS));
    let plan = Rc::new(Plan {
        size: blocks * BLOCK,
        tuning: Tuning {
            dirty_extents_max: [2, 5, 1000][rng.below(3) as usize],
            sum_cache_bytes: [64, 1 << 20][rng.below(2) as usize],
            tick: Duration::from_micros([200, 5000, 1_000_000][rng.below(3) as usize]),
            idle_ticks: 2,
            mark_patience: Duration::from_secs(60),
        },
        workers: 1 + rng.below(4) as usize,
        requests: 12,
        trims: !rng.one_in(4),
    });
    let model = Rc::new(RefCell::new(Model::zeroed(plan.size as usize)));
    for round in 0..5 {
        let cut_after = (!rng.one_in(4)).then(|| rng.below(400));
        let cut = Cut::random(&mut rng);
        let round_seed = rng.next_u64();
        let (ended, driver) = {
            let (plan, model) = (plan.clone(), model.clone());
            let work = async move |stores: Stores| {
                if let Some(calls) = cut_after {
                    stores.driver.cut_after_calls(calls + 1);
                }
                one_round(stores, plan, model, round > 0, round_seed).await;
            };
            with_stores(round_seed, media, work)
        };
        media = match ended {
            Some(()) => {
                model.borrow_mut().closed();
                driver.media()
            }
            None => driver.media_after_cut(cut),
        };
    }
    // The last time without a cut: everything is there, the replicas are equal, nothing is marked.
    let work = async move |stores: Stores| {
        let volume = stores.volume(plan.size, plan.tuning).await;
        let found = read(&volume, 0, plan.size as usize).await.unwrap();
        model.borrow_mut().check_after_cut(&found);
        while volume.stats().recovering_extents > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        volume.close().await.unwrap();
        stores.check_equal(true).await;
        let volume = stores.volume(plan.size, plan.tuning).await;
        assert!(
            read(&volume, 0, plan.size as usize).await.unwrap() == found,
            "after a clean close"
        );
        assert_eq!(volume.stats().lost_blocks + volume.stats().healed_blocks, 0);
    };
    with_stores(seed, media, work).0.unwrap();
}

/// Opens, checks what the last round left, works, closes; the power may go at any point.
async fn one_round(stores: Stores, plan: Rc<Plan>, model: Rc<RefCell<Model>>, again: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let volume = stores.volume(plan.size, plan.tuning).await;
    // Half of the time requests come while recovery is still under way.
    if again && rng.one_in(2) {
        let found = read(&volume, 0, plan.size as usize).await.unwrap();
        model.borrow_mut().check_after_cut(&found);
    } else if again {
        check_in_pieces(&volume, &model, &mut rng).await;
    }
    let workers: Vec<Task<()>> = (0..plan.workers)
        .map(|_| {
            let (volume, plan, model, rng) = (
                volume.clone(),
                plan.clone(),
                model.clone(),
                Rng::new(rng.next_u64()),
            );
            spawn(async move { one_worker(volume, plan, model, rng).await })
        })
        .collect();
    for worker in workers {
        worker.await;
    }
    volume.close().await.unwrap();
    assert_eq!(volume.failure(), None);
}

/// Reads the volume in pieces in random order, recovering on demand.
async fn check_in_pieces(volume: &Volume, model: &RefCell<Model>, rng: &mut Rng) {
    let size = volume.size_bytes() as usize;
    let piece = 1 + rng.below(3 * EXTENT_BYTES) as usize;
    let mut starts: Vec<usize> = (0..size).step_by(piece).collect();
    for i in (1..starts.len()).rev() {
        starts.swap(i, rng.below(i as u64 + 1) as usize);
    }
    let mut found = vec![0; size];
    for start in starts {
        let len = piece.min(size - start);
        found[start..start + len].copy_from_slice(&read(volume, start as u64, len).await.unwrap());
    }
    model.borrow_mut().check_after_cut(&found);
}

async fn one_worker(volume: Rc<Volume>, plan: Rc<Plan>, model: Rc<RefCell<Model>>, mut rng: Rng) {
    for _ in 0..plan.requests {
        let range = any_range(&mut rng, plan.size);
        let (offset, len) = (range.start as u64, range.len());
        let fua = rng.one_in(4);
        match rng.below(if plan.trims { 11 } else { 8 }) {
            0 => {
                let flush = model.borrow_mut().start_flush();
                volume.flush().await.unwrap();
                model.borrow_mut().flushed(flush);
            }
            1..=3 => {
                let reading = model.borrow_mut().start_read(range.clone());
                let found = read(&volume, offset, len).await.unwrap();
                model.borrow_mut().check_read(reading, &found);
            }
            4..=7 => {
                let value = 1 + rng.below(63) as u8;
                let mut payload = volume.pool().get(len);
                payload.copy_from_slice(&Model::bytes_of(value, range.clone()));
                let started = model.borrow_mut().start(range, value);
                let result = volume.write(offset, PlainBuf(payload), len as u32, fua).await;
                settle(&model, started, result, fua);
            }
            8 => {
                let started = model.borrow_mut().start(range, 0);
                let result = volume.trim(offset, len as u64, fua).await;
                settle(&model, started, result, fua);
            }
            _ => {
                let started = model.borrow_mut().start(range, 0);
                let result = volume.write_zeroes(offset, len as u64, fua, rng.one_in(3)).await;
                settle(&model, started, result, fua);
            }
        }
        if rng.one_in(5) {
            sleep(Duration::from_micros(rng.below(20_000))).await;
        }
    }
}

fn settle(model: &RefCell<Model>, started: super::model::Started, result: Result<()>, fua: bool) {
    match result {
        Ok(()) => model.borrow_mut().acknowledge(started, fua),
        Err(error) => {
            assert_eq!(error.kind(), Kind::NoSpace, "{error}");
            model.borrow_mut().fail(started);
        }
    }
}

/// One byte to three extents, often with an edge on a boundary.
fn any_range(rng: &mut Rng, size: u64) -> Range<usize> {
    let unit = [1, 512, BLOCK, EXTENT_BYTES][rng.below(4) as usize];
    let start = rng.below(size) / unit * unit;
    let len_max = [10, BLOCK, EXTENT_BYTES, 3 * EXTENT_BYTES][rng.below(4) as usize];
    let len = (1 + rng.below(len_max)).next_multiple_of(unit);
    start as usize..(start + len).min(size) as usize
}
