//! Damaged, foreign and cut-off stores: what opening and checking make of them.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::disk::sim::{Cut, Rng};
use crate::error::{Error, Kind};
use crate::store::layout::Layout;

/// A store with two volumes, and what belongs to whom.
pub(super) struct Content {
    pub(super) media: Media,
    pub(super) layout: Layout,
    pub(super) volumes: [(VolumeSlot, Vec<PhysicalExtent>); 2],
}

pub(super) const FILLS: [u8; 2] = [0xa1, 0xb2];

pub(super) fn with_content(clean: bool) -> Content {
    let volumes = [VolumeId::random(), VolumeId::random()].map(volume);
    let slots = volumes.clone().map(|(slot, _)| slot);
    let (extents, media) = with_store(1, formatted(true), async move |store| {
        let io = attach(&store);
        let mut all = Vec::new();
        for ((slot, record), byte) in volumes.into_iter().zip(FILLS) {
            let dataset = slot.dataset;
            store.add_volume(slot, record).await.unwrap();
            let mut extents = Vec::new();
            // In several commits, so that the volumes' extents alternate.
            for first in [0, 3, 6, 9, 12] {
                extents.extend(allocate(&store, dataset, first, 3).await.unwrap());
            }
            for (logical, extent) in extents.iter().enumerate() {
                fill(&io, *extent, dataset, logical as u32, byte).await.unwrap();
            }
            store
                .commit(extents.iter().map(|e| clear_mark(*e)).collect())
                .await
                .unwrap();
            all.push(extents);
        }
        if clean {
            store.close().await.unwrap();
        }
        all
    });
    let [first, second] = slots;
    let [one, two] = <[_; 2]>::try_from(extents).unwrap();
    Content {
        media,
        layout: Layout::plan(STORE_BYTES, EXTENT_BYTES, SIZES).unwrap(),
        volumes: [(first, one), (second, two)],
    }
}

fn try_open(media: Media, expect: Expect) -> Result<(), Error> {
    let driver = SimDriver::new(1, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move { open(&file, expect).await.map(drop) })
}

pub(super) fn checked(media: Media, scope: CheckScope) -> Result<CheckReport> {
    let driver = SimDriver::new(2, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move { check(&file, Expect::default(), scope).await })
}

fn damage_of(media: Media) -> Vec<String> {
    let findings = checked(media, CheckScope::Full).unwrap().findings;
    let damage = findings.into_iter().filter(|f| f.severity == Severity::Damage);
    damage.map(|f| f.text).collect()
}

/// Both copies of a page.
fn wipe_page(content: &mut Content, page: u32) {
    for copy in [0, 1] {
        content
            .media
            .overwrite(content.layout.page_at(page, copy) + 100, &[0x77; 64]);
    }
}

#[test]
fn what_is_not_a_store_or_not_this_one_is_refused_with_its_reason() {
    let kind = |media, expect| {
        let error = try_open(media, expect).unwrap_err();
        assert!(error.message().contains("sim:0"), "{error}");
        error.kind()
    };
    let any = Expect::default();
    assert_eq!(kind(Media::zeroed(STORE_BYTES), any), Kind::Invalid);
    assert_eq!(kind(Media::zeroed(4096), any), Kind::Invalid);
    let mut truncated = formatted(true);
    truncated.truncate(STORE_BYTES - 4096);
    assert_eq!(kind(truncated, any), Kind::Invalid);
    let other = Expect {
        installation: Some(InstallationId::random()),
        store: None,
    };
    assert_eq!(kind(formatted(true), other), Kind::Refused);
    let other = Expect {
        installation: None,
        store: Some(StoreId::random()),
    };
    assert_eq!(kind(formatted(true), other), Kind::Refused);
    let mut newer = formatted(true);
    for at in [8, 65536 + 8] {
        newer.overwrite(at, &9u32.to_le_bytes());
    }
    assert_eq!(kind(newer, any), Kind::Unsupported);
    let mut damaged = formatted(true);
    for at in [50, 65536 + 50] {
        damaged.overwrite(at, b"x");
    }
    assert_eq!(kind(damaged, any), Kind::Damaged);
}

#[test]
fn a_store_too_small_or_of_a_wrong_extent_size_is_not_made_and_the_message_says_the_least() {
    let attempt = |size_bytes, extent_bytes| {
        let driver = SimDriver::new(1, vec![Media::zeroed(1 << 30)]);
        let runtime = Runtime::new(driver.clone());
        let file = driver.file(0);
        let options = FormatOptions {
            size_bytes,
            extent_bytes,
            ..options(true)
        };
        runtime.block_on(async move { format(&Disk::attach(&file).unwrap(), &options).await })
    };
    for (size, extent) in [
        (0, 4 << 20),
        (63 << 20, 4 << 20),
        (64 << 20, 64 << 20),
        (1 << 30, 3 << 20),
        (1 << 30, 4096),
    ] {
        let error = attempt(size, extent).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{size} {extent}");
        assert!(error.message().contains("MiB"), "{error}");
    }
    for (size, extent) in [(64 << 20, 4 << 20), (64 << 20, 1 << 20), (1 << 30, 64 << 20)] {
        attempt(size, extent).unwrap();
    }
}

#[test]
fn a_damaged_page_hurts_the_datasets_of_its_records_and_no_others() {
    let mut content = with_content(true);
    // Extents 0 to 54 are in page 2 (with the last tombstones), 55 to 79 in page 3, which is all free.
    let unused = content.layout.extent_index(PhysicalExtent(60)) / 63;
    wipe_page(&mut content, unused);
    let volumes = content.volumes.clone();
    let damage = damage_of(content.media.clone());
    assert!(
        damage.iter().any(|text| text.contains("both copies")),
        "{damage:?}"
    );
    with_store(3, content.media.clone(), async move |store| {
        assert!(store.findings().iter().any(|f| f.severity == Severity::Damage));
        for (slot, extents) in volumes {
            let found = store.extents_of(slot.dataset).await.unwrap();
            assert_eq!(found.iter().map(|e| e.physical).collect::<Vec<_>>(), extents);
        }
        let free = store.space().free;
        assert!(
            store.reserve(free).await.unwrap().iter().all(|e| e.0 < 55),
            "unknown extents are not handed out"
        );
        assert_eq!(store.reserve(1).await.unwrap_err().kind(), Kind::NoSpace);
    });

    let mut content = with_content(true);
    wipe_page(&mut content, unused - 1);
    let volumes = content.volumes.clone();
    with_store(4, content.media, async move |store| {
        for (slot, _) in volumes {
            assert_eq!(
                store.extents_of(slot.dataset).await.unwrap_err().kind(),
                Kind::Damaged
            );
        }
        // Their sums name the owners of all that is not zero, so that a third dataset is not suspected.
        assert_eq!(store.extents_of(DatasetId::random()).await.unwrap(), []);
        let (slot, record) = volume(VolumeId::random());
        let error = store.add_volume(slot, record).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "tombstones cannot be read: {error}");
    });
}

#[test]
fn one_bad_copy_of_a_page_costs_nothing_is_named_and_is_written_again() {
    for clean in [true, false] {
        let content = with_content(clean);
        for page in 0..content.layout.pages() {
            for copy in [0, 1] {
                let mut media = content.media.clone();
                media.overwrite(content.layout.page_at(page, copy) + 1024, &[0x11; 512]);
                let report = checked(media.clone(), CheckScope::Full).unwrap();
                let name = format!("table page {page}, copy {}", copy + 1);
                let finding = report
                    .findings
                    .iter()
                    .find(|f| f.text.contains(&name))
                    .expect("named");
                // After a clean stop no power cut can have torn it.
                assert!(!clean || finding.severity == Severity::Damage, "{finding:?}");
                let volumes = content.volumes.clone();
                let ((), media) = with_store(9, media, async move |store| {
                    for (slot, extents) in volumes {
                        let found = store.extents_of(slot.dataset).await.unwrap();
                        assert_eq!(found.iter().map(|e| e.physical).collect::<Vec<_>>(), extents);
                        assert!(found.iter().all(|e| !e.dirty));
                        assert!(matches!(
                            store.volume(slot.volume).await.unwrap(),
                            VolumeState::Live(..)
                        ));
                    }
                });
                assert_eq!(damage_of(media), Vec::<String>::new(), "written again");
            }
        }
    }
}

#[test]
fn one_bad_superblock_copy_is_written_again_byte_by_byte_from_the_other() {
    let content = with_content(true);
    let mut whole = [vec![0; 4096], vec![0; 4096]];
    for (copy, bytes) in whole.iter_mut().enumerate() {
        content.media.read(copy as u64 * 65536, bytes);
    }
    assert!(whole[0] == whole[1]);
    for copy in [0, 1] {
        let damages: [(u64, Vec<u8>); 4] = [
            (50, vec![0x42; 3]),
            (0, vec![0; 4096]),
            // Reserved bytes are covered by the checksum as well.
            (3000, vec![1]),
            // Of a newer format, and torn: the older one is whole, so nothing had come of that yet.
            (8, vec![9]),
        ];
        for (at, bytes) in damages {
            let mut media = content.media.clone();
            media.overwrite(copy * 65536 + at, &bytes);
            let name = format!("superblock copy {}", if copy == 0 { "A" } else { "B" });
            let damage = damage_of(media.clone());
            assert!(damage.iter().any(|text| text.contains(&name)), "{damage:?}");
            let ((), media) = with_store(8, media, async |_| ());
            assert_eq!(damage_of(media.clone()), Vec::<String>::new(), "written again");
            for (copy, bytes) in whole.iter().enumerate() {
                let mut now = vec![0; 4096];
                media.read(copy as u64 * 65536, &mut now);
                assert!(now == *bytes);
            }
        }
    }
}

#[test]
fn free_extents_that_are_not_zero_are_named_and_scrubbed_when_asked_to() {
    let mut content = with_content(true);
    let free = content.layout.extents - 3;
    content.media.overwrite(
        content.layout.data_at(PhysicalExtent(free)) + 5000,
        b"left behind",
    );
    content
        .media
        .overwrite(content.layout.sums_at(PhysicalExtent(free + 1)), b"left behind");
    let report = checked(content.media.clone(), CheckScope::Full).unwrap();
    assert!(!report.is_clean());
    let unclean: BTreeSet<_> = report.unclean.iter().copied().collect();
    assert_eq!(unclean, BTreeSet::from([free, free + 1].map(PhysicalExtent)));
    let owned = content.volumes[0].1[0];
    let (mut asked, dataset) = (report.unclean, content.volumes[0].0.dataset);
    // What is not free is not touched, whoever asks.
    asked.extend([owned, PhysicalExtent(u32::MAX)]);
    let (space, media) = with_store(4, content.media, async move |store| {
        let before = store.space();
        assert_eq!(store.rescrub(asked).await.unwrap(), 2);
        assert_eq!(store.space(), before, "free again");
        let extents = store.extents_of(dataset).await.unwrap();
        assert!(extents.iter().any(|extent| extent.physical == owned));
        assert_eq!(store.rescrub(Vec::new()).await.unwrap(), 0);
        store.close().await.unwrap();
        before
    });
    assert_eq!(damage_of(media.clone()), Vec::<String>::new());
    let (after, _) = with_store(5, media, async |store| store.space());
    assert_eq!(after, space);
}

#[test]
fn whatever_a_cut_leaves_of_scrubbing_again_doing_it_once_more_ends_it() {
    let extent = PhysicalExtent(79);
    let mut cut_short = 0;
    for calls in 1..60 {
        let mut content = with_content(true);
        assert!(extent.0 < content.layout.extents);
        content
            .media
            .overwrite(content.layout.data_at(extent), &[0x55; 4096]);
        let driver = SimDriver::new(calls, vec![content.media]);
        let runtime = Runtime::new(driver.clone());
        let (file, cut) = (driver.file(0), driver.clone());
        driver.cut_after_calls(calls);
        let ended = runtime.block_on(async move {
            let scrubbing = std::pin::pin!(async {
                let store = open(&file, Expect::default()).await?;
                store.rescrub(vec![extent]).await
            });
            let cut = std::pin::pin!(cut.until_cut());
            match futures_util::future::select(scrubbing, cut).await {
                futures_util::future::Either::Left((result, _)) => result.is_ok(),
                futures_util::future::Either::Right(_) => false,
            }
        });
        cut_short += u32::from(!ended);
        let cut = Cut::random(&mut Rng::new(calls));
        let media = driver.media_after_cut(cut).remove(0);
        drop(runtime);
        let unclean = checked(media.clone(), CheckScope::Full).unwrap().unclean;
        assert!(
            !ended || unclean.is_empty(),
            "{calls} calls, {cut:?}: called done"
        );
        let ((), media) = with_store(calls, media, async move |store| {
            store.rescrub(unclean).await.unwrap();
            // All that waits for the scrubber is free by the time it can be had.
            let space = store.space();
            store.reserve(space.free + space.pending_scrub).await.unwrap();
        });
        assert_eq!(damage_of(media), Vec::<String>::new(), "{calls} calls, {cut:?}");
    }
    assert!(cut_short > 10);
}

#[test]
fn a_gap_in_the_log_is_named_and_the_store_does_not_open() {
    let mut content = with_content(false);
    let frames = |media: &Media| -> BTreeMap<u64, u64> {
        let mut ring = vec![0; content.layout.log.len as usize];
        media.read(content.layout.log.at, &mut ring);
        let units = ring
            .chunks(4096)
            .enumerate()
            .filter(|(_, unit)| unit.starts_with(b"VOLDFRAM"));
        units
            .map(|(i, unit)| {
                (
                    u64::from_le_bytes(unit[24..32].try_into().unwrap()),
                    i as u64 * 4096,
                )
            })
            .collect()
    };
    let found = frames(&content.media);
    let (head, _) = found.last_key_value().unwrap();
    let at = content.layout.log.at + found[&(head - 1)];
    content.media.overwrite(at + 70, &[0xff; 8]);
    let error = try_open(content.media, Expect::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(
        error
            .message()
            .contains(&format!("frames {} to {}", head - 1, head - 1)),
        "{error}"
    );
}

#[test]
fn one_bad_slot_copy_is_rewritten_and_two_cost_that_volume_only() {
    let content = with_content(true);
    let [(first, _), (second, _)] = content.volumes.clone();
    for copy in [0, 1] {
        let mut media = content.media.clone();
        media.overwrite(content.layout.slot_at(0, copy) + 600, &[0x42; 3]);
        let slot = first.clone();
        let ((), media) = with_store(5, media, async move |store| {
            let state = store.volume(slot.volume).await.unwrap();
            assert!(matches!(state, VolumeState::Live(_, found) if found == slot));
        });
        assert_eq!(damage_of(media), Vec::<String>::new(), "rewritten");
    }
    let mut media = content.media.clone();
    for copy in [0, 1] {
        media.overwrite(content.layout.slot_at(0, copy) + 600, &[0x42; 3]);
    }
    let ids = (first.volume, second.volume);
    with_store(6, media, async move |store| {
        assert_eq!(store.volume(ids.0).await.unwrap_err().kind(), Kind::Damaged);
        assert!(matches!(
            store.volume(ids.1).await.unwrap(),
            VolumeState::Live(..)
        ));
        store.destroy_volume(ids.0).await.unwrap();
        store.scrubbed(ids.0).await.unwrap();
    });
}

#[test]
fn a_destroyed_volumes_slot_put_back_from_an_old_copy_is_overwritten_and_not_believed() {
    let content = with_content(true);
    let (slot, _) = content.volumes[0].clone();
    let mut old = vec![0; 4096];
    content.media.read(content.layout.slot_at(0, 0), &mut old);
    let id = slot.volume;
    let ((), mut media) = with_store(7, content.media, async move |store| {
        store.destroy_volume(id).await.unwrap();
        store.close().await.unwrap();
    });
    for copy in [0, 1] {
        media.overwrite(content.layout.slot_at(0, copy), &old);
    }
    let ((), media) = with_store(8, media, async move |store| {
        assert!(matches!(
            store.volume(id).await.unwrap(),
            VolumeState::Tombstoned { .. }
        ));
    });
    for copy in [0, 1] {
        media.read(content.layout.slot_at(0, copy), &mut old);
        assert!(old.iter().all(|b| *b == 0));
    }
}

#[test]
fn the_check_names_flipped_data_dirty_free_space_and_bad_checksum_areas() {
    let content = with_content(true);
    assert_eq!(damage_of(content.media.clone()), Vec::<String>::new());
    let extent = content.volumes[0].1[4];
    let attempt = |at: u64, expected: &str| {
        let mut media = content.media.clone();
        media.overwrite(at, &[0x99]);
        let damage = damage_of(media);
        assert!(
            damage.iter().any(|text| text.contains(expected)),
            "{expected}: {damage:?}"
        );
    };
    attempt(
        content.layout.data_at(extent) + 5000,
        &format!("extent {extent}, byte"),
    );
    attempt(
        content.layout.sums_at(extent) + 20,
        &format!("extent {extent}: checksum area"),
    );
    attempt(
        content.layout.sums_at(extent) + 514,
        &format!("extent {extent}, byte"),
    );
    attempt(
        content.layout.data_at(PhysicalExtent(79)) + 1,
        "free, and not zero",
    );
    attempt(
        content.layout.sums_at(PhysicalExtent(79)) + 1,
        "free, and its checksum area",
    );
    let mut media = content.media.clone();
    media.overwrite(content.layout.data_at(PhysicalExtent(79)), &[1]);
    assert!(
        checked(media, CheckScope::Quick).unwrap().is_clean(),
        "quick does not read free space"
    );
}

#[test]
fn replicas_that_differ_are_named_with_the_block() {
    let content = with_content(true);
    let (slot, extents) = &content.volumes[0];
    let mut other = content.media.clone();
    // The block and its sum: each store is sound, and they differ.
    let block = [0x3c; 4096];
    let sum = block_sum(slot.dataset, BlockIndex(2 * BLOCKS as u64 + 1), &block);
    other.overwrite(content.layout.data_at(extents[2]) + 4096, &block);
    let at = content.layout.sums_at(extents[2]);
    let mut area = vec![0; 4096];
    other.read(at, &mut area);
    area[512 + 4..512 + 8].copy_from_slice(&sum.to_le_bytes());
    for (crc_at, covers) in [(44, 512..512 + 4 * BLOCKS), (508, 0..508)] {
        let crc = wire::crc32c(&area[covers]);
        area[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    }
    other.overwrite(at, &area);
    let compare = |media: Vec<Media>| {
        let driver = SimDriver::new(3, media);
        let runtime = Runtime::new(driver.clone());
        let files = [driver.file(0), driver.file(1)];
        runtime.block_on(async move {
            let a = check(&files[0], Expect::default(), CheckScope::Quick)
                .await
                .unwrap();
            let b = check(&files[1], Expect::default(), CheckScope::Quick)
                .await
                .unwrap();
            assert!(a.is_clean() && b.is_clean());
            compare_replicas(&[(&files[0], &a), (&files[1], &b)])
                .await
                .unwrap()
        })
    };
    assert_eq!(compare(vec![content.media.clone(), content.media.clone()]), []);
    let findings = compare(vec![content.media.clone(), other]);
    assert_eq!(findings.len(), 1, "{findings:?}");
    let text = &findings[0].text;
    assert!(
        text.contains(&slot.volume.to_string())
            && text.contains("logical extent 2")
            && text.contains("block 1"),
        "{text}"
    );
}
