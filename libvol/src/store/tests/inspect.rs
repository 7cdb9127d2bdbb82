//! What a store tells a rebuild.

use super::*;

fn inspected(media: Media) -> Inspection {
    let driver = SimDriver::new(3, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move { inspect(&file, Expect::default()).await.unwrap() })
}

#[test]
fn live_volumes_come_with_record_slot_and_extents_destroyed_ones_as_remains() {
    let [live, dead, dying] = [VolumeId::random(), VolumeId::random(), VolumeId::random()].map(volume);
    let expected = live.clone();
    let datasets = [dead.0.dataset, dying.0.dataset];
    let ids = [dead.0.volume, dying.0.volume];
    let (before, media) = with_store(1, formatted(true), async move |store| {
        for (n, (slot, record)) in [live, dead, dying].into_iter().enumerate() {
            let dataset = slot.dataset;
            store.add_volume(slot, record).await.unwrap();
            allocate(&store, dataset, 0, n as u32 + 2).await.unwrap();
        }
        store.destroy_volume(ids[0]).await.unwrap();
        store.scrubbed(ids[0]).await.unwrap();
        store.give_up_volume(ids[1]).await.unwrap();
        // Not closed, and the scrubber not waited for: as after a cut.
        store.info().clone()
    });
    let seen = inspected(media.clone());
    assert_eq!(
        (seen.info.id, &seen.info.name, &seen.info.zone, seen.info.extents),
        (before.id, &before.name, &before.zone, before.extents)
    );
    assert_eq!(seen.info.installation, before.installation);
    let volumes: Vec<_> = seen.volumes.into_iter().collect();
    let (slot, record) = expected;
    let live = LiveVolume {
        record,
        dataset: slot.dataset,
        slot: Some(slot.clone()),
        extents: 2,
    };
    assert_eq!(volumes, [(slot.volume, live)]);
    assert_eq!(seen.tombstones.len(), 2);
    let [gone, going] = ids.map(|id| seen.tombstones[&id]);
    assert_eq!(
        (gone.dataset, gone.extents, gone.finished),
        (datasets[0], 3, true)
    );
    assert_eq!((going.dataset, going.extents), (datasets[1], 4));
    assert_eq!((gone.word, going.word), (Word::Destroyed, Word::GivenUp));
    assert!(!going.finished, "its extents are not free yet");
    assert!(seen.unreadable_volumes.is_empty() && !seen.unreadable_tombstones);
    // It wrote nothing.
    let again = inspected(media);
    assert_eq!(again.tombstones.len(), 2);
}

#[test]
fn a_lost_page_makes_its_volumes_unreadable_and_says_when_tombstones_are_gone() {
    let id = VolumeId::random();
    let (_, mut media) = with_store(1, formatted(true), async move |store| {
        let (slot, record) = volume(id);
        store.add_volume(slot, record).await.unwrap();
        store.close().await.unwrap();
    });
    let layout = layout::Layout::plan(STORE_BYTES, EXTENT_BYTES, SIZES).unwrap();
    // The first page has all volume records and some of the tombstones.
    for copy in [0, 1] {
        media.overwrite(layout.page_at(0, copy) + 100, &[0x77; 64]);
    }
    let seen = inspected(media);
    assert!(seen.volumes.is_empty());
    assert!(seen.unreadable_volumes.contains(&id));
    assert!(seen.unreadable_tombstones);
    assert!(seen.findings.iter().any(|f| f.severity == Severity::Damage));
}

#[test]
fn a_volume_whose_slot_copies_are_both_bad_is_there_without_its_slot() {
    let id = VolumeId::random();
    let (_, mut media) = with_store(1, formatted(true), async move |store| {
        let (slot, record) = volume(id);
        store.add_volume(slot, record).await.unwrap();
        store.close().await.unwrap();
    });
    let layout = layout::Layout::plan(STORE_BYTES, EXTENT_BYTES, SIZES).unwrap();
    for copy in [0, 1] {
        media.overwrite(layout.slot_at(0, copy) + 60, &[0x77; 64]);
    }
    let seen = inspected(media);
    assert_eq!(seen.volumes[&id].slot, None);
    assert_eq!(seen.volumes[&id].record.volume, id);
}
