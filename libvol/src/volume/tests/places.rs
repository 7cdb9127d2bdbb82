//! Replicas that move: a store is taken in and copied while the volume serves, another one leaves. Nothing is lost, whenever
//! the power goes.

use std::cell::{Cell, RefCell};

use super::*;
use crate::disk::sim::{Cut, Rng};
use crate::error::Kind;
use crate::runtime::spawn;
use crate::store::VolumeState;

const SIZE: u64 = 6 * EXTENT_BYTES;

/// Stores 0 and 1 have a replica each, store 2 none.
fn two_of_three() -> Rc<Memory> {
    Memory::new(2)
}

/// Brings store `from`'s io in at a place and waits until it is in sync.
async fn take_in(stores: &Stores, volume: &Volume, from: usize) -> usize {
    let info = stores.handle(from).info();
    let place = volume.add_replica(info.id, info.name.to_string()).await.unwrap();
    assert_eq!(
        volume.add_replica(info.id, info.name.to_string()).await.unwrap(),
        place,
        "asked again, it is there"
    );
    assert_eq!(stores.register.state(place), Member::Stale);
    volume
        .rejoin(place, stores.ios[from].clone(), true)
        .await
        .unwrap();
    while stores.register.state(place) != Member::InSync {
        assert_eq!(volume.failure(), None);
        sleep(Duration::from_millis(1)).await;
    }
    place
}

fn states(stores: &Stores) -> Vec<Member> {
    let register = stores.register.0.borrow();
    register.members.iter().map(|standing| standing.state).collect()
}

#[test]
fn a_replica_moves_while_the_volume_is_written_and_what_it_leaves_behind_is_destroyed() {
    let work = async |stores: Stores| {
        let volume = stores.volume(SIZE, Tuning::default()).await;
        write(&volume, 0, &pattern(1, SIZE as usize)).await.unwrap();
        let ended = Rc::new(Cell::new(false));
        let writer = {
            let (volume, ended) = (volume.clone(), ended.clone());
            spawn(async move {
                let mut rounds = 0u8;
                while !ended.get() {
                    rounds = rounds.wrapping_add(1);
                    for block in [0, 5, 9, 14, 23] {
                        write(&volume, block * BLOCK, &pattern(rounds, BLOCK as usize))
                            .await
                            .unwrap();
                    }
                    sleep(Duration::from_micros(200)).await;
                }
                rounds
            })
        };
        assert_eq!(take_in(&stores, &volume, 2).await, 2);
        volume.remove_replica(0).await.unwrap();
        assert_eq!(states(&stores), [Member::Vacant, Member::InSync, Member::InSync]);
        ended.set(true);
        let rounds = writer.await;
        let mut expected = pattern(1, SIZE as usize);
        for block in [0, 5, 9, 14, 23] {
            let at = (block * BLOCK) as usize;
            expected[at..at + BLOCK as usize].copy_from_slice(&pattern(rounds, BLOCK as usize));
        }
        // What is left on the first store goes, and only there.
        let store = stores.handle(0);
        store.give_up_volume(VolumeId::NIL).await.unwrap();
        store.scrubbed(VolumeId::NIL).await.unwrap();
        let gone = VolumeState::Tombstoned {
            extents_left: 0,
            given_up: true,
        };
        assert_eq!(store.volume(VolumeId::NIL).await.unwrap(), gone);
        assert!(stores.extents(0).await.is_empty());
        for _ in 0..4 {
            assert!(read(&volume, 0, SIZE as usize).await.unwrap() == expected);
        }
        volume.close().await.unwrap();
        let (old, new) = (stores.extents(1).await, stores.extents(2).await);
        assert_eq!(old.len(), new.len());
        for (a, b) in old.iter().zip(&new) {
            assert!(stores.raw(1, a.physical).await[..] == stores.raw(2, b.physical).await[..]);
        }
        let volume = stores.volume(SIZE, Tuning::default()).await;
        assert!(read(&volume, 0, SIZE as usize).await.unwrap() == expected);
        volume.close().await.unwrap();
        // The volume's own destruction takes the word back that it lives on elsewhere.
        store.destroy_volume(VolumeId::NIL).await.unwrap();
        let destroyed = VolumeState::Tombstoned {
            extents_left: 0,
            given_up: false,
        };
        assert_eq!(store.volume(VolumeId::NIL).await.unwrap(), destroyed);
    };
    with_register(1, fresh(3, 80), two_of_three(), work).0.unwrap();
}

#[test]
fn the_only_replica_in_sync_does_not_leave_and_places_are_limited() {
    let work = async |stores: Stores| {
        let volume = stores.volume(SIZE, Tuning::default()).await;
        volume.remove_replica(1).await.unwrap();
        volume.remove_replica(1).await.unwrap();
        let refused = volume.remove_replica(0).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Busy);
        assert_eq!(states(&stores), [Member::InSync, Member::Vacant]);
        for number in 0..3 {
            let place = volume.add_replica(StoreId::random(), format!("s{number}")).await;
            assert_eq!(place.unwrap(), number + 1, "the vacant one first");
        }
        let refused = volume
            .add_replica(StoreId::random(), "s".into())
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), Kind::NoSpace);
        volume.close().await.unwrap();
    };
    with_register(1, fresh(2, 80), two_of_three(), work).0.unwrap();
}

#[test]
fn who_takes_a_vacant_place_is_copied_whole_whatever_its_store_and_the_extents_say() {
    let work = async |stores: Stores| {
        let volume = stores.volume(SIZE, Tuning::default()).await;
        write(&volume, 0, &pattern(1, SIZE as usize)).await.unwrap();
        volume.flush().await.unwrap();
        // It leaves with all that was written, misses what follows, and comes back to its place.
        volume.remove_replica(0).await.unwrap();
        write(&volume, 3 * BLOCK, &pattern(2, 9 * BLOCK as usize))
            .await
            .unwrap();
        volume.trim(4 * EXTENT_BYTES, EXTENT_BYTES, false).await.unwrap();
        assert_eq!(take_in(&stores, &volume, 0).await, 0);
        volume.remove_replica(1).await.unwrap();
        let mut expected = pattern(1, SIZE as usize);
        expected[3 * BLOCK as usize..12 * BLOCK as usize].copy_from_slice(&pattern(2, 9 * BLOCK as usize));
        expected[4 * EXTENT_BYTES as usize..5 * EXTENT_BYTES as usize].fill(0);
        assert!(read(&volume, 0, SIZE as usize).await.unwrap() == expected);
        volume.close().await.unwrap();
    };
    with_register(1, fresh(2, 80), two_of_three(), work).0.unwrap();
}

/// The version of each block that was last acknowledged, and the last one sent.
type Versions = Rc<RefCell<Vec<(u8, u8)>>>;

/// A volume moves from store to store while it is written, until the power goes; then again, from what is left.
fn one_history(seed: u64) {
    let mut rng = Rng::new(seed);
    let blocks = SIZE / BLOCK;
    let versions: Versions = Rc::new(RefCell::new(vec![(0, 0); blocks as usize]));
    let register = two_of_three();
    let mut media = fresh(3, 80);
    for round in 0..6 {
        let (known, mut chance) = (versions.clone(), Rng::new(rng.next_u64()));
        let calls = 200 + rng.below(2500);
        let work = async move |stores: Stores| {
            if round < 5 {
                stores.driver.cut_after_calls(calls);
            }
            let volume = stores.volume(SIZE, Tuning::default()).await;
            check_versions(&volume, &known).await;
            let writer = spawn(write_versions(
                volume.clone(),
                known.clone(),
                Rng::new(chance.next_u64()),
            ));
            for _ in 0..3 {
                let held = states(&stores);
                // Here a store's place is its number.
                for place in 0..held.len() {
                    if volume.replicas()[place].state == Member::Stale {
                        let _ = volume.rejoin(place, stores.ios[place].clone(), true).await;
                    }
                }
                if held.len() < 3 {
                    let info = stores.handle(2).info();
                    volume.add_replica(info.id, info.name.to_string()).await.unwrap();
                    continue;
                }
                while (0..held.len()).any(|place| volume.replicas()[place].state == Member::Resyncing) {
                    sleep(Duration::from_micros(500)).await;
                }
                match held.iter().position(|state| *state == Member::Vacant) {
                    Some(place) => {
                        let info = stores.handle(place).info();
                        volume.add_replica(info.id, info.name.to_string()).await.unwrap();
                    }
                    None => volume.remove_replica(chance.below(3) as usize).await.unwrap(),
                }
            }
            writer.await;
            volume.close().await.unwrap();
            let volume = stores.volume(SIZE, Tuning::default()).await;
            check_versions(&volume, &known).await;
            volume.close().await.unwrap();
        };
        let (_, driver) = with_register(rng.next_u64(), media, register.clone(), work);
        media = driver.media_after_cut(Cut::random(&mut rng));
    }
}

async fn write_versions(volume: Rc<Volume>, versions: Versions, mut rng: Rng) {
    for _ in 0..60 {
        let block = rng.below(SIZE / BLOCK);
        let version = versions.borrow()[block as usize].1.wrapping_add(1).max(1);
        versions.borrow_mut()[block as usize].1 = version;
        write(&volume, block * BLOCK, &[version; BLOCK as usize])
            .await
            .unwrap();
        volume.flush().await.unwrap();
        versions.borrow_mut()[block as usize].0 = version;
        sleep(Duration::from_micros(rng.below(300))).await;
    }
}

/// Every block holds what was acknowledged last, or what was sent after that.
async fn check_versions(volume: &Volume, versions: &Versions) {
    for _ in 0..3 {
        let bytes = read(volume, 0, SIZE as usize).await.unwrap();
        for (number, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let (acknowledged, sent) = versions.borrow()[number];
            // A write under way at the cut may have landed in parts.
            let allowed = |byte: &u8| *byte == acknowledged || *byte == sent;
            assert!(
                block.iter().all(allowed),
                "block {number} is {}, acknowledged {acknowledged}, sent {sent}",
                block[0]
            );
        }
    }
}

#[test]
fn whenever_the_power_goes_during_a_move_nothing_flushed_is_lost() {
    for seed in 0..40 {
        let result = std::panic::catch_unwind(|| one_history(seed));
        if let Err(panic) = result {
            eprintln!("failing seed: places::one_history({seed})");
            std::panic::resume_unwind(panic);
        }
    }
}
