//! Replicas that fail, are away and come back: nothing acknowledged is lost, and nobody is dropped without need.

use std::cell::{Cell, RefCell};

use super::crash::{Plan, check_in_pieces, one_worker};
use super::model::Model;
use super::*;
use crate::disk::sim::{Call, Cut, Rng};
use crate::error::Kind;
use crate::runtime::spawn;
use crate::store::VolumeState;

const EIO: i32 = 5;

/// Calls of one replica's disk fail from now on.
fn fail(stores: &Stores, replica: u32, which: impl Fn(Call) -> bool + 'static) {
    stores.driver.set_fault(Some(Box::new(move |slot, call| {
        (slot.0 == replica && which(call)).then_some(EIO)
    })));
}

/// Data lies behind the metadata.
fn is_data_write(call: Call) -> bool {
    matches!(call, Call::Write { at, .. } if at >= STORE_BYTES - 80 * EXTENT_BYTES)
}

async fn members_on(stores: &Stores, replica: usize) -> (u64, Vec<Member>) {
    match stores.handle(replica).volume(VolumeId::NIL).await.unwrap() {
        VolumeState::Live(record, _) => (record.membership_epoch.0, record.members),
        other => panic!("{other:?}"),
    }
}

/// Waits until a replica is in sync, durably.
async fn caught_up(stores: &Stores, volume: &Volume, place: usize) {
    while stores.register.state(place) != Member::InSync {
        assert_eq!(volume.failure(), None);
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn a_replica_that_fails_a_write_is_stale_durably_before_the_write_is_acknowledged() {
    simulate(2, async |stores| {
        let volume = stores.volume(4 * EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, EXTENT_BYTES as usize))
            .await
            .unwrap();
        fail(&stores, 1, is_data_write);
        write(&volume, BLOCK, &pattern(2, BLOCK as usize)).await.unwrap();
        assert_eq!(stores.register.state(1), Member::Stale);
        assert_eq!(
            members_on(&stores, 0).await,
            (2, vec![Member::InSync, Member::Stale])
        );
        assert_eq!(volume.failure(), None);
        assert!(volume.replicas()[1].reason.as_ref().unwrap().contains("extent"));
        // It serves nothing any more.
        for _ in 0..4 {
            assert!(read(&volume, BLOCK, BLOCK as usize).await.unwrap() == pattern(2, BLOCK as usize));
        }
        write(&volume, 2 * EXTENT_BYTES, &[1]).await.unwrap();
        volume.flush().await.unwrap();
        volume.close().await.unwrap();
    });
}

#[test]
fn a_failed_flush_drops_its_replica_and_the_others_go_on() {
    simulate(3, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        write(&volume, 0, &pattern(1, 5000)).await.unwrap();
        fail(&stores, 2, |call| call == Call::Sync);
        volume.flush().await.unwrap();
        assert!(stores.handle(2).fault().is_some());
        assert_eq!(stores.register.state(2), Member::Stale);
        assert_eq!(
            volume
                .replicas()
                .iter()
                .filter(|r| r.state == Member::InSync)
                .count(),
            2
        );
        volume.flush().await.unwrap();
    });
}

#[test]
fn the_last_replica_in_sync_is_never_dropped_and_serves_again_when_its_device_does() {
    for replicas in [1, 2] {
        simulate(replicas, async move |stores| {
            let volume = stores.volume(EXTENT_BYTES, IDLE).await;
            let bytes = pattern(1, EXTENT_BYTES as usize);
            write(&volume, 0, &bytes).await.unwrap();
            stores
                .driver
                .set_fault(Some(Box::new(|_, call| is_data_write(call).then_some(EIO))));
            let error = write(&volume, BLOCK, &pattern(2, BLOCK as usize))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), Kind::Io);
            stores.driver.set_fault(None);
            assert_eq!(volume.failure(), None);
            // Of two, one may be: when what the failed write left is settled, the other has what it should.
            let mut replicas = volume.replicas().into_iter();
            assert!(replicas.any(|replica| replica.state == Member::InSync));
            assert!(read(&volume, 0, BLOCK as usize).await.unwrap() == bytes[..BLOCK as usize]);
            write(&volume, BLOCK, &pattern(3, BLOCK as usize)).await.unwrap();
            assert!(read(&volume, BLOCK, BLOCK as usize).await.unwrap() == pattern(3, BLOCK as usize));
            volume.close().await.unwrap();
        });
    }
}

#[test]
fn blocks_of_a_write_that_failed_everywhere_read_the_same_from_every_replica() {
    for seed in 0..20 {
        with_stores(seed, fresh(2, 80), async |stores| {
            let volume = stores.volume(EXTENT_BYTES, IDLE).await;
            write(&volume, 0, &pattern(1, EXTENT_BYTES as usize))
                .await
                .unwrap();
            // Each of its first writes fails on both disks, with any of its sectors there or not; the settling works.
            let left = Cell::new(2);
            stores.driver.set_fault(Some(Box::new(move |_, call| {
                (is_data_write(call) && left.replace(left.get() - 1) > 0).then_some(EIO)
            })));
            write(&volume, 0, &pattern(2, EXTENT_BYTES as usize))
                .await
                .unwrap_err();
            stores.driver.set_fault(None);
            let first = read(&volume, 0, EXTENT_BYTES as usize).await.unwrap();
            for _ in 0..4 {
                assert!(read(&volume, 0, EXTENT_BYTES as usize).await.unwrap() == first);
            }
            volume.close().await.unwrap();
            stores.check_equal(true).await;
        })
        .0
        .unwrap();
    }
}

#[test]
fn a_read_error_is_answered_from_another_replica_and_rewritten() {
    simulate(2, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let bytes = pattern(1, EXTENT_BYTES as usize);
        write(&volume, 0, &bytes).await.unwrap();
        let bad = stores.disk_offset(1, 0, 2).await;
        let written = Rc::new(Cell::new(false));
        let seen = written.clone();
        stores.driver.set_fault(Some(Box::new(move |slot, call| {
            let touches = |at: u64, len: usize| slot.0 == 1 && at <= bad && bad < at + len as u64;
            match call {
                Call::Write { at, len } if touches(at, len) => {
                    seen.set(true);
                    None
                }
                Call::Read { at, len } if touches(at, len) && !seen.get() => Some(EIO),
                _ => None,
            }
        })));
        for _ in 0..6 {
            assert!(read(&volume, 0, EXTENT_BYTES as usize).await.unwrap() == bytes);
        }
        assert!(written.get());
        assert_eq!(volume.stats().healed_blocks, 1);
        assert!(
            volume
                .replicas()
                .iter()
                .all(|replica| replica.state == Member::InSync)
        );
    });
}

#[test]
fn a_read_error_on_the_only_replica_is_eio_for_exactly_those_blocks() {
    simulate(1, async |stores| {
        let volume = stores.volume(EXTENT_BYTES, IDLE).await;
        let bytes = pattern(1, EXTENT_BYTES as usize);
        write(&volume, 0, &bytes).await.unwrap();
        let bad = stores.disk_offset(0, 0, 2).await;
        stores.driver.set_fault(Some(Box::new(move |_, call| match call {
            Call::Read { at, len } if at <= bad && bad < at + len as u64 => Some(EIO),
            _ => None,
        })));
        assert_eq!(
            read(&volume, 0, EXTENT_BYTES as usize).await.unwrap_err().kind(),
            Kind::Io
        );
        for block in [0, 1, 3] {
            let at = block * BLOCK;
            let found = read(&volume, at, BLOCK as usize).await.unwrap();
            assert!(found == bytes[at as usize..][..BLOCK as usize]);
        }
        assert_eq!(volume.stats().lost_blocks, 1);
        stores.driver.set_fault(None);
        assert!(
            read(&volume, 0, EXTENT_BYTES as usize).await.unwrap() == bytes,
            "it was the cable"
        );
    });
}

#[test]
fn a_replica_that_comes_back_gets_what_it_missed_and_no_more() {
    simulate(2, async |stores| {
        let size = 40 * EXTENT_BYTES;
        let volume = stores.volume(size, EAGER).await;
        let mut bytes = pattern(1, size as usize);
        write(&volume, 0, &bytes).await.unwrap();
        volume.flush().await.unwrap();
        while stores.handle(1).space().dirty > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        fail(&stores, 1, is_data_write);
        let mut missed = 0;
        for i in [3u64, 9, 9, 20] {
            let at = i * EXTENT_BYTES + BLOCK;
            let new = pattern(i as u8 + 9, BLOCK as usize);
            bytes[at as usize..][..new.len()].copy_from_slice(&new);
            write(&volume, at, &new).await.unwrap();
            missed += BLOCK;
        }
        volume.trim(30 * EXTENT_BYTES, EXTENT_BYTES, false).await.unwrap();
        bytes[30 * EXTENT_BYTES as usize..][..EXTENT_BYTES as usize].fill(0);
        stores.driver.set_fault(None);
        volume.rejoin(1, stores.ios[1].clone(), false).await.unwrap();
        // It takes part again while it catches up.
        let new = pattern(99, 3 * EXTENT_BYTES as usize);
        bytes[..new.len()].copy_from_slice(&new);
        write(&volume, 0, &new).await.unwrap();
        caught_up(&stores, &volume, 1).await;
        let copied = volume.replicas()[1].copied_bytes;
        assert!(
            copied <= missed + missed / 10,
            "{copied} bytes copied, {missed} missed"
        );
        assert_eq!(stores.register.state(1), Member::InSync);
        for replica in 0..2 {
            let in_sync = vec![Member::InSync; 2];
            assert_eq!(members_on(&stores, replica).await, (3, in_sync));
        }
        assert!(read(&volume, 0, size as usize).await.unwrap() == bytes);
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    });
}

#[test]
fn what_was_missed_is_known_after_a_restart_too() {
    let register = Memory::new(2);
    let (_, driver) = with_register(1, fresh(2, 80), register.clone(), async |stores| {
        let volume = stores.volume(40 * EXTENT_BYTES, EAGER).await;
        write(&volume, 0, &pattern(1, 40 * EXTENT_BYTES as usize))
            .await
            .unwrap();
        fail(&stores, 1, is_data_write);
        write(&volume, 0, &pattern(2, BLOCK as usize)).await.unwrap();
        stores.driver.set_fault(None);
        // Marked and cleaned while the replica is out.
        sleep(Duration::from_millis(100)).await;
        write(&volume, 7 * EXTENT_BYTES, &pattern(3, BLOCK as usize))
            .await
            .unwrap();
        volume.close().await.unwrap();
        assert_eq!(stores.handle(0).space().dirty, 0);
    });
    with_register(2, driver.media(), register, async |stores| {
        let volume = stores.volume(40 * EXTENT_BYTES, EAGER).await;
        assert_eq!(volume.replicas()[1].state, Member::Stale);
        volume.rejoin(1, stores.ios[1].clone(), false).await.unwrap();
        caught_up(&stores, &volume, 1).await;
        assert_eq!(
            volume.replicas()[1].copied_bytes,
            2 * BLOCK,
            "compared, and only what differs is written"
        );
        volume.close().await.unwrap();
        stores.check_equal(true).await;
    })
    .0
    .unwrap();
}

#[test]
fn a_replica_in_sync_that_is_away_at_opening_is_dropped_before_anything_is_served() {
    simulate(2, async |stores| {
        let mut spec = stores.spec(EXTENT_BYTES);
        spec.replicas[0].io = None;
        let volume = Volume::open_tuned(spec, IDLE).await.unwrap();
        assert_eq!(stores.register.state(0), Member::Stale);
        assert_eq!(
            members_on(&stores, 1).await,
            (2, vec![Member::Stale, Member::InSync])
        );
        write(&volume, 0, &[7; 100]).await.unwrap();
        volume.rejoin(0, stores.ios[0].clone(), true).await.unwrap();
        caught_up(&stores, &volume, 0).await;
        volume.close().await.unwrap();
        stores.check_equal(true).await;
        let mut spec = stores.spec(EXTENT_BYTES);
        spec.replicas.iter_mut().for_each(|replica| replica.io = None);
        let error = Volume::open_tuned(spec, IDLE).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unavailable);
    });
}

#[test]
fn a_stale_replica_alone_is_not_served() {
    simulate(2, async |stores| {
        stores.register.0.borrow_mut().members[1].state = Member::Stale;
        let mut spec = stores.spec(EXTENT_BYTES);
        spec.replicas[0].io = None;
        let error = Volume::open_tuned(spec, IDLE).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unavailable);
    });
}

/// What one history chooses.
struct World {
    plan: Rc<Plan>,
    model: Rc<RefCell<Model>>,
    register: Rc<Memory>,
}

/// Requests in parallel, with cuts, while one replica fails, is away, comes back, and fails again.
fn run_one(seed: u64) {
    let mut rng = Rng::new(seed);
    let replicas = 2 + rng.below(2) as usize;
    let mut media = fresh(replicas, 80);
    let blocks = 1 + rng.below(10 * u64::from(EXTENT_BLOCKS));
    let world = Rc::new(World {
        plan: Rc::new(Plan {
            size: blocks * BLOCK,
            tuning: Tuning {
                dirty_extents_max: [2, 5, 1000][rng.below(3) as usize],
                sum_cache_bytes: [64, 1 << 20][rng.below(2) as usize],
                tick: Duration::from_micros([200, 5000, 1_000_000][rng.below(3) as usize]),
                idle_ticks: 2,
                ..IDLE
            },
            workers: 1 + rng.below(4) as usize,
            requests: 12,
            trims: !rng.one_in(4),
        }),
        model: Rc::new(RefCell::new(Model::zeroed((blocks * BLOCK) as usize))),
        register: Memory::new(replicas),
    });
    for round in 0..5 {
        let cut_after = (!rng.one_in(3)).then(|| 1 + rng.below(500));
        let cut = Cut::random(&mut rng);
        let round_seed = rng.next_u64();
        let this = world.clone();
        let work = async move |stores: Stores| {
            if let Some(calls) = cut_after {
                stores.driver.cut_after_calls(calls);
            }
            one_round(stores, this, round > 0, round_seed).await;
        };
        let (ended, driver) = with_register(round_seed, media, world.register.clone(), work);
        media = match ended {
            Some(()) => {
                world.model.borrow_mut().closed();
                // A store that was opened anew meanwhile may have had writes under way; they end with the process.
                driver.media_after_exit()
            }
            None => driver.media_after_cut(cut),
        };
    }
    let this = world.clone();
    let work = async move |stores: Stores| {
        let volume = stores.volume(this.plan.size, this.plan.tuning).await;
        let found = read(&volume, 0, this.plan.size as usize).await.unwrap();
        this.model.borrow_mut().check_after_cut(&found);
        for place in 0..stores.ios.len() {
            if volume.replicas()[place].state == Member::Stale {
                volume
                    .rejoin(place, stores.ios[place].clone(), false)
                    .await
                    .unwrap();
                caught_up(&stores, &volume, place).await;
            }
        }
        while volume.stats().recovering_extents > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        volume.close().await.unwrap();
        stores.check_equal(true).await;
        assert_eq!(volume.stats().lost_blocks, 0);
        let volume = stores.volume(this.plan.size, this.plan.tuning).await;
        assert!(read(&volume, 0, this.plan.size as usize).await.unwrap() == found);
        assert_eq!(volume.stats().lost_blocks + volume.stats().healed_blocks, 0);
        volume.close().await.unwrap();
    };
    with_register(seed, media, world.register.clone(), work)
        .0
        .unwrap();
}

async fn one_round(mut stores: Stores, world: Rc<World>, again: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let replicas = stores.ios.len();
    // One replica is the weak one of this round: the one that is out already, if any.
    let out = (0..replicas).find(|replica| world.register.state(*replica) != Member::InSync);
    let weak = out.unwrap_or_else(|| rng.below(replicas as u64) as usize);
    let mut spec = stores.spec(world.plan.size);
    if rng.one_in(4) {
        spec.replicas[weak].io = None;
    }
    let volume = Volume::open_tuned(spec, world.plan.tuning).await.unwrap();
    if again && rng.one_in(2) {
        let found = read(&volume, 0, world.plan.size as usize).await.unwrap();
        world.model.borrow_mut().check_after_cut(&found);
    } else if again {
        check_in_pieces(&volume, &world.model, &mut rng).await;
    }
    let workers: Vec<_> = (0..world.plan.workers)
        .map(|_| {
            let rng = Rng::new(rng.next_u64());
            spawn(one_worker(
                volume.clone(),
                world.plan.clone(),
                world.model.clone(),
                rng,
            ))
        })
        .collect();
    let trouble = {
        let (volume, stores) = (volume.clone(), stores.clone());
        let rng = Rng::new(rng.next_u64());
        spawn(async move { trouble(volume, stores, weak, rng).await })
    };
    for worker in workers {
        worker.await;
    }
    stores.ios[weak] = trouble.await;
    volume.close().await.unwrap();
    assert_eq!(volume.failure(), None);
}

/// The weak replica's life: it fails in some way for a while, is opened anew, comes back. Returns its data path.
async fn trouble(volume: Rc<Volume>, stores: Stores, weak: usize, mut rng: Rng) -> Rc<StoreIo> {
    let mut io = stores.ios[weak].clone();
    for _ in 0..1 + rng.below(3) {
        sleep(Duration::from_micros(rng.below(3000))).await;
        let (kind, every) = (rng.below(4), 1 + rng.below(3));
        let count = Cell::new(0);
        fail(&stores, weak as u32, move |call| {
            count.set(count.get() + 1);
            let hit = match kind {
                0 => is_data_write(call),
                1 => call == Call::Sync,
                2 => matches!(call, Call::Write { .. }),
                _ => !is_data_write(call) || matches!(call, Call::Read { .. }),
            };
            hit && u64::is_multiple_of(count.get(), every)
        });
        sleep(Duration::from_micros(rng.below(20_000))).await;
        stores.driver.set_fault(None);
        if rng.one_in(4) {
            continue;
        }
        if io.handle().fault().is_some() {
            // As an operator does: look, close, open anew.
            if volume.let_go(weak).await.is_err() {
                // Nobody has needed it since; the next request finds out.
                volume.flush().await.unwrap();
                volume.let_go(weak).await.unwrap();
            }
            let _ = io.handle().close().await;
            let Ok(handle) = store::open(&stores.driver.file(weak), Expect::default()).await else {
                continue;
            };
            io = StoreIo::attach(&handle).unwrap();
        }
        if volume.replicas()[weak].state == Member::Stale {
            let _ = volume.rejoin(weak, io.clone(), rng.one_in(4)).await;
            if rng.one_in(2) {
                while volume.replicas()[weak].state == Member::Resyncing {
                    sleep(Duration::from_micros(100)).await;
                }
            }
        }
    }
    io
}

#[test]
fn while_one_replica_fails_and_returns_nothing_is_lost_and_no_client_sees_an_error() {
    for seed in 0..60 {
        run_seed(seed);
    }
}

fn run_seed(seed: u64) {
    let result = std::panic::catch_unwind(|| run_one(seed));
    if let Err(panic) = result {
        eprintln!("failing seed: membership::run_one({seed})");
        std::panic::resume_unwind(panic);
    }
}

/// More of the same: `VOLD_SEEDS=1000..2000 cargo test -p libvol --release many_failing_replicas -- --ignored`.
#[test]
#[ignore = "as long as one likes"]
fn many_failing_replicas() {
    let range = std::env::var("VOLD_SEEDS").unwrap_or_else(|_| "1000..3000".into());
    let (from, to) = range.split_once("..").expect("FROM..TO");
    for seed in from.parse().unwrap()..to.parse().unwrap() {
        run_seed(seed);
    }
}
