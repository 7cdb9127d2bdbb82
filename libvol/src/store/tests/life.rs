//! What a store does while nothing goes wrong.

use super::*;
use crate::error::Kind;

#[test]
fn what_was_committed_is_there_after_close_and_open() {
    let dataset = DatasetId::random();
    let (extents, media) = with_store(1, formatted(true), async move |store| {
        let extents = allocate(&store, dataset, 10, 3).await.unwrap();
        store.commit(vec![clear_mark(extents[1])]).await.unwrap();
        store.commit(vec![Change::Release(extents[2])]).await.unwrap();
        store.close().await.unwrap();
        extents
    });
    let ((), _) = with_store(2, media, async move |store| {
        let found = store.extents_of(dataset).await.unwrap();
        let found: Vec<_> = found.iter().map(|e| (e.logical.0, e.physical, e.dirty)).collect();
        assert_eq!(found, [(10, extents[0], true), (11, extents[1], false)]);
        assert_eq!(store.space().allocated, 2);
        assert_eq!(store.space().dirty, 1);
    });
}

#[test]
fn many_commits_go_round_the_ring_and_all_are_there() {
    let dataset = DatasetId::random();
    let ((), media) = with_store(3, formatted(true), async move |store| {
        let extents = allocate(&store, dataset, 0, 40).await.unwrap();
        for round in 0..60 {
            for extent in &extents[..round % 7 + 1] {
                store.commit(vec![clear_mark(*extent)]).await.unwrap();
                store.commit(vec![Change::Mark(*extent)]).await.unwrap();
            }
        }
        store.commit(vec![clear_mark(extents[5])]).await.unwrap();
        // No close: the log has to bring the rest back.
    });
    let ((), _) = with_store(4, media, async move |store| {
        let dirty = store.extents_of(dataset).await.unwrap();
        assert_eq!(
            dirty
                .iter()
                .filter(|e| !e.dirty)
                .map(|e| e.logical.0)
                .collect::<Vec<_>>(),
            [5]
        );
    });
}

#[test]
fn a_released_extent_is_zero_before_it_is_free() {
    let dataset = DatasetId::random();
    with_store(5, formatted(true), async move |store| {
        let io = attach(&store);
        let extents = allocate(&store, dataset, 0, 2).await.unwrap();
        for (logical, extent) in extents.iter().enumerate() {
            fill(&io, *extent, dataset, logical as u32, 0xab).await.unwrap();
        }
        let free = store.space().free;
        store.commit(vec![Change::Release(extents[0])]).await.unwrap();
        let all = store.reserve(free + 1).await.unwrap();
        assert!(all.contains(&extents[0]));
        let (read, buf) = io
            .read(
                extents[0],
                0,
                Buf::zeroed(EXTENT_BYTES as usize),
                EXTENT_BYTES as usize,
            )
            .await;
        read.unwrap();
        assert!(buf.iter().all(|b| *b == 0));
        let sums = io.read_sums(extents[0], dataset, ExtentIndex(0)).await.unwrap();
        assert_eq!(sums, SumAreaRead::Blank);
        assert!(matches!(
            io.read_sums(extents[1], dataset, ExtentIndex(1)).await.unwrap(),
            SumAreaRead::Valid(_)
        ));
    });
}

#[test]
fn a_full_store_says_no_space_at_once_and_waits_while_extents_are_scrubbed() {
    with_store(6, formatted(true), async |store| {
        let dataset = DatasetId::random();
        let free = store.space().free;
        let extents = allocate(&store, dataset, 0, free).await.unwrap();
        assert_eq!(store.reserve(1).await.unwrap_err().kind(), Kind::NoSpace);
        store.commit(vec![Change::Release(extents[3])]).await.unwrap();
        assert_eq!(store.reserve(1).await.unwrap(), [extents[3]]);
    });
}

#[test]
fn a_reservation_given_back_or_never_received_is_free_again() {
    with_store(7, formatted(true), async |store| {
        let free = store.space().free;
        let extents = store.reserve(5).await.unwrap();
        assert_eq!(store.space().free, free - 5);
        store.unreserve(extents);
        drop(store.reserve(7));
        store.extents_of(DatasetId::random()).await.unwrap();
        assert_eq!(store.reserve(free).await.unwrap().len(), free as usize);
    });
}

#[test]
fn extents_that_are_not_known_to_be_zero_are_scrubbed_before_they_are_free() {
    let mut media = formatted(false);
    media.overwrite(STORE_BYTES - EXTENT_BYTES, &[0x5a; 4096]);
    let ((), media) = with_store(8, media, async |store| {
        let total = store.space().total;
        assert_eq!(store.reserve(total).await.unwrap().len(), total as usize);
        store.close().await.unwrap();
    });
    let mut data = vec![1; 80 * EXTENT_BYTES as usize];
    media.read(4 << 20, &mut data);
    assert!(data.iter().all(|b| *b == 0));
}

#[test]
fn a_volume_is_found_after_reopening_with_its_record_and_keys() {
    let id = VolumeId::random();
    let (slot, record) = volume(id);
    let expected = (slot.clone(), record.clone());
    let ((), media) = with_store(9, formatted(true), async move |store| {
        store.add_volume(slot.clone(), record.clone()).await.unwrap();
        assert_eq!(
            store.add_volume(slot, record.clone()).await.unwrap_err().kind(),
            Kind::Exists
        );
        let mut grown = record;
        grown.size_bytes *= 2;
        grown.members[1] = Member::Stale;
        store
            .commit(vec![
                Change::SetSize {
                    volume: grown.volume,
                    size_bytes: grown.size_bytes,
                },
                Change::SetMembers {
                    volume: grown.volume,
                    epoch: grown.membership_epoch,
                    members: grown.members,
                },
            ])
            .await
            .unwrap();
    });
    let ((), _) = with_store(10, media, async move |store| {
        let VolumeState::Live(record, slot) = store.volume(id).await.unwrap() else {
            panic!("live")
        };
        assert_eq!(slot, expected.0);
        assert_eq!((record.size_bytes, record.members[1]), (2 << 30, Member::Stale));
        assert_eq!(store.volumes().await.unwrap(), [id]);
        assert_eq!(
            store.volume(VolumeId::random()).await.unwrap(),
            VolumeState::Unknown
        );
    });
}

#[test]
fn a_destroyed_volume_leaves_no_key_and_no_data_and_never_comes_back() {
    let id = VolumeId::random();
    let (slot, record) = volume(id);
    let (dataset, key) = (slot.dataset, slot.keys[0].1.bytes.clone());
    let again = (slot.clone(), record.clone());
    let ((), media) = with_store(11, formatted(true), async move |store| {
        store.add_volume(slot, record).await.unwrap();
        let io = attach(&store);
        for (logical, extent) in allocate(&store, dataset, 0, 12).await.unwrap().iter().enumerate() {
            fill(&io, *extent, dataset, logical as u32, 0xcd).await.unwrap();
        }
        store.destroy_volume(id).await.unwrap();
        store.destroy_volume(id).await.unwrap();
        store.scrubbed(id).await.unwrap();
        let progress = store.scrub_progress(id).await.unwrap();
        assert_eq!(
            (progress.extents, progress.extents_done, progress.keys_done),
            (12, 12, true)
        );
        store.close().await.unwrap();
    });
    let mut all = vec![0; STORE_BYTES as usize];
    media.read(0, &mut all);
    assert!(!all.windows(key.len()).any(|w| w == key), "a wrapped key is left");
    assert!(!all.windows(64).any(|w| w == [0xcd; 64]), "ciphertext is left");
    with_store(12, media, async move |store| {
        assert_eq!(
            store.volume(id).await.unwrap(),
            VolumeState::Tombstoned {
                extents_left: 0,
                given_up: false
            }
        );
        assert_eq!(
            store.add_volume(again.0, again.1).await.unwrap_err().kind(),
            Kind::Refused
        );
        assert_eq!(store.scrub_progress(id).await.unwrap().extents_done, 12);
        assert_eq!(
            store.destroy_volume(VolumeId::random()).await.unwrap_err().kind(),
            Kind::NotFound
        );
        store.destroy_volume(id).await.unwrap();
        store.scrubbed(id).await.unwrap();
    });
}

#[test]
fn slots_are_used_again_and_a_store_without_a_free_slot_says_so() {
    with_store(13, formatted(true), async |store| {
        let mut ids = Vec::new();
        for _ in 0..SIZES.slots {
            let (slot, record) = volume(VolumeId::random());
            ids.push(slot.volume);
            store.add_volume(slot, record).await.unwrap();
        }
        let (slot, record) = volume(VolumeId::random());
        assert_eq!(
            store
                .add_volume(slot.clone(), record.clone())
                .await
                .unwrap_err()
                .kind(),
            Kind::NoSpace
        );
        store.destroy_volume(ids[3]).await.unwrap();
        store.add_volume(slot, record).await.unwrap();
    });
}

#[test]
fn a_place_for_its_tombstone_is_kept_for_every_volume() {
    with_store(14, formatted(true), async |store| {
        for _ in 0..SIZES.tombstones {
            let (slot, record) = volume(VolumeId::random());
            let id = slot.volume;
            store.add_volume(slot, record).await.unwrap();
            store.destroy_volume(id).await.unwrap();
        }
        let (slot, record) = volume(VolumeId::random());
        let error = store.add_volume(slot, record).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(error.message().contains("tombstone"), "{error}");
    });
}

#[test]
fn closing_waits_for_what_was_asked_and_refuses_the_rest() {
    let dataset = DatasetId::random();
    let ((), media) = with_store(15, formatted(true), async move |store| {
        let extents = store.reserve(10).await.unwrap();
        let change = |i: usize| Change::Allocate {
            physical: extents[i],
            dataset,
            logical: ExtentIndex(i as u32),
            key_version: KeyVersion(1),
        };
        let commits: Vec<_> = (0..10)
            .map(|i| {
                let (store, change) = (store.clone(), change(i));
                crate::runtime::spawn(async move { store.commit(vec![change]).await })
            })
            .collect();
        crate::runtime::yield_now().await;
        store.close().await.unwrap();
        for commit in commits {
            commit.await.unwrap();
        }
        assert_eq!(store.commit(vec![]).await.unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(store.reserve(1).await.unwrap_err().kind(), Kind::Unavailable);
        store.close().await.unwrap();
    });
    with_store(16, media, async move |store| {
        assert_eq!(store.extents_of(dataset).await.unwrap().len(), 10);
    });
}
