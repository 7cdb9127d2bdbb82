//! Stores mutated at random, on their own: what opening and reading make of them.

use std::collections::BTreeSet;

use super::damage::{Content, FILLS, checked, with_content};
use super::*;
use crate::crypto::seal::{HOLE, verify_block};
use crate::disk::sim::Rng;
use crate::error::Kind;
use crate::store::layout::Layout;

/// One random mutation: flips, zeros, noise or a truncation, mostly where metadata is. Whether the log was hit.
fn mutate(media: &mut Media, layout: &Layout, rng: &mut Rng) -> bool {
    let mut log_hit = false;
    if rng.one_in(50) {
        media.truncate(rng.below(STORE_BYTES));
        return log_hit;
    }
    let regions = [
        (0, 128 << 10),
        (layout.slot_region.at, layout.slot_region.len),
        (layout.log.at, layout.log.len),
        (layout.table.at, layout.table.len),
        (layout.sums.at, layout.sums.len),
        (layout.data.at, layout.data.len),
    ];
    for _ in 0..1 + rng.below(3) {
        let (at, len) = regions[rng.below(6) as usize];
        let at = at + rng.below(len);
        // The longest mutation is 20 KiB.
        log_hit |= at + (20 << 10) > layout.log.at && at < layout.log.end();
        match rng.below(4) {
            0..=1 => {
                let mut byte = [0];
                media.read(at, &mut byte);
                media.overwrite(at, &[byte[0] ^ (1 << rng.below(8))]);
            }
            2 => media.overwrite(at / 512 * 512, &vec![0; 512 * (1 + rng.below(40) as usize)]),
            _ => {
                let noise: Vec<u8> = (0..1 + rng.below(600)).map(|_| rng.next_u64() as u8).collect();
                media.overwrite(at, &noise);
            }
        }
    }
    log_hit
}

/// Opens a mutated store and reads whatever it serves.
///
/// Damage that takes the newest frames of the log of a store that was not closed cannot be told from a power cut before
/// them (FORMAT.md says so): what is served is then older, and still never another dataset's.
fn run_one(content: &Content, clean: bool, seed: u64) -> bool {
    let mut rng = Rng::new(seed);
    let mut media = content.media.clone();
    let whole = !mutate(&mut media, &content.layout, &mut rng) || clean;
    // Any outcome but a panic; its findings are looked at elsewhere.
    let _ = checked(media.clone(), CheckScope::Quick);
    let driver = SimDriver::new(seed, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    let volumes = content.volumes.clone();
    runtime.block_on(async move {
        let Ok(store) = open(&file, Expect::default()).await else {
            return false;
        };
        let io = attach(&store);
        let mut owned = BTreeSet::new();
        for ((slot, extents), byte) in volumes.iter().zip(FILLS) {
            owned.extend(extents.iter().copied());
            match store.volume(slot.volume).await {
                Ok(VolumeState::Live(_, found)) => {
                    assert_eq!(found, *slot, "a slot that is believed is right")
                }
                Ok(other) => assert!(!whole, "a live volume became {other:?}"),
                Err(error) => assert_eq!(error.kind(), Kind::Damaged),
            }
            let served = match store.extents_of(slot.dataset).await {
                Ok(served) => served,
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Damaged);
                    continue;
                }
            };
            let expected: Vec<_> = extents.iter().copied().enumerate().collect();
            let found: Vec<_> = served
                .iter()
                .map(|e| (e.logical.0 as usize, e.physical))
                .collect();
            if whole {
                assert_eq!(found, expected, "what is served is served whole");
            }
            assert!(
                found.iter().all(|extent| expected.contains(extent)),
                "what is served is the dataset's own"
            );
            for entry in served {
                let area = io
                    .read_sums(entry.physical, slot.dataset, entry.logical)
                    .await
                    .unwrap();
                let SumAreaRead::Valid(area) = area else { continue };
                let len = EXTENT_BYTES as usize;
                let (read, data) = io.read(entry.physical, 0, Buf::zeroed(len), len).await;
                read.unwrap();
                for (i, (block, sum)) in data.chunks(BLOCK_SIZE).zip(&area.sums).enumerate() {
                    let index = BlockIndex(u64::from(entry.logical.0) * BLOCKS as u64 + i as u64);
                    if *sum != HOLE && verify_block(slot.dataset, index, block, *sum) {
                        assert!(
                            block.iter().all(|b| *b == byte),
                            "a verified block is the one that was written"
                        );
                    }
                }
            }
        }
        let free = store.space().free;
        let reserved = store.reserve(free).await.unwrap_or_default();
        assert!(
            !whole || reserved.iter().all(|e| !owned.contains(e)),
            "an owned extent was handed out"
        );
        true
    })
}

#[test]
fn a_store_mutated_at_random_never_panics_and_never_serves_another_datasets_extent() {
    let mut opened = 0;
    for clean in [true, false] {
        let content = with_content(clean);
        for seed in 0..1000 {
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_one(&content, clean, seed)));
            match outcome {
                Ok(served) => opened += u32::from(served),
                Err(panic) => {
                    eprintln!(
                        "failing seed: {seed}, clean {clean} (mutations::run_one(&with_content({clean}), {clean}, {seed}))"
                    );
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
    // Redundancy is there to be used: most small damage leaves a store that opens.
    assert!(opened > 1000, "{opened} of 2000");
}
