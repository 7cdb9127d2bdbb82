//! The job over two real stores on simulated disks.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use futures_util::future::{Either, select};

use super::*;
use crate::buf::Buf;
use crate::crypto::seal::SealedBuf;
use crate::disk::Disk;
use crate::disk::sim::{Cut, Media, Rng, SimDriver};
use crate::ids::{CmkId, CustomerId, DatasetId, Epoch, ExtentIndex, InstallationId, KeyVersion};
use crate::keys::WrappedKey;
use crate::runtime::Runtime;
use crate::store::{self, Change, Expect, FormatOptions, Member, StoreIo, VolumeRecord, VolumeSlot};

const STORE_BYTES: u64 = crate::limits::STORE_BYTES_MIN;
const EXTENT_BYTES: u64 = crate::limits::EXTENT_BYTES_MIN;
const EXTENTS: u32 = 2;
/// Stands for the wrapped key; no other bytes of a store look like it.
const KEY: &[u8; 32] = b"the wrapped data key, 32 bytes..";
/// Stands for ciphertext.
const DATA: u8 = 0xc5;

/// What survives a power cut beside the disks: the catalog's part.
#[derive(Default)]
struct Notes {
    done: Vec<(StoreId, u32)>,
    finished: bool,
}

struct TestLedger(Arc<Mutex<Notes>>);

#[async_trait]
impl Ledger for TestLedger {
    async fn store_done(&self, _: VolumeId, store: StoreId, extents: u32) -> Result<()> {
        self.0.lock().unwrap().done.push((store, extents));
        Ok(())
    }

    async fn finished(&self, _: VolumeId) -> Result<()> {
        let mut notes = self.0.lock().unwrap();
        assert!(!notes.finished, "finished once");
        notes.finished = true;
        Ok(())
    }
}

/// Two stores that hold a volume with data, closed.
fn with_volume(volume: VolumeId) -> (Vec<Media>, Vec<StoreId>) {
    let driver = SimDriver::new(1, vec![Media::zeroed(STORE_BYTES), Media::zeroed(STORE_BYTES)]);
    let runtime = Runtime::new(driver.clone());
    let files = [driver.file(0), driver.file(1)];
    let ids = runtime.block_on(async move {
        let mut handles = Vec::new();
        for (file, name) in files.iter().zip(["a", "b"]) {
            let disk = Disk::attach(file).unwrap();
            let options = FormatOptions {
                installation: InstallationId::random(),
                name: name.parse().unwrap(),
                zone: name.parse().unwrap(),
                size_bytes: STORE_BYTES,
                extent_bytes: EXTENT_BYTES,
                zero_filled: true,
            };
            store::format(&disk, &options).await.unwrap();
            disk.detach();
            handles.push(store::open(file, Expect::default()).await.unwrap());
        }
        let ids: Vec<StoreId> = handles.iter().map(|h| h.info().id).collect();
        let slot = VolumeSlot {
            volume,
            customer: CustomerId::random(),
            customer_name: "acme".parse().unwrap(),
            volume_name: "web".parse().unwrap(),
            dataset: DatasetId::random(),
            stores: ids.clone(),
            keys: vec![(
                KeyVersion(1),
                WrappedKey {
                    cmk: CmkId::random(),
                    bytes: KEY.to_vec(),
                },
            )],
        };
        for handle in &handles {
            let record = VolumeRecord {
                volume,
                size_bytes: 1 << 30,
                membership_epoch: Epoch(1),
                members: vec![Member::InSync; 2],
            };
            handle.add_volume(slot.clone(), record).await.unwrap();
            let io = StoreIo::attach(handle).unwrap();
            let extents = handle.reserve(EXTENTS).await.unwrap();
            let allocate = |(i, physical)| Change::Allocate {
                physical,
                dataset: slot.dataset,
                logical: ExtentIndex(i as u32),
                key_version: KeyVersion(1),
            };
            let changes = extents.iter().copied().enumerate().map(allocate).collect();
            handle.commit(changes).await.unwrap();
            for extent in extents {
                let mut data = Buf::zeroed(EXTENT_BYTES as usize);
                data.fill(DATA);
                let len = data.len();
                io.write(extent, 0, &SealedBuf::from_ciphertext(data), 0..len)
                    .await
                    .unwrap();
            }
            io.flush().await.unwrap();
            handle.close().await.unwrap();
        }
        ids
    });
    drop(runtime);
    (driver.media(), ids)
}

/// Runs the job once over those of the disks that are `there`, until it ends or the power goes.
fn run_once(
    driver: &Rc<SimDriver>,
    volume: VolumeId,
    ids: &[StoreId],
    there: [bool; 2],
    notes: &Arc<Mutex<Notes>>,
) -> Option<Outcome> {
    let runtime = Runtime::new(driver.clone());
    let files = [driver.file(0), driver.file(1)];
    let (ids, ledger, power) = (ids.to_vec(), TestLedger(notes.clone()), driver.clone());
    let work = async move {
        let mut parts = Vec::new();
        for (i, id) in ids.iter().enumerate() {
            let done = ledger.0.lock().unwrap().done.iter().any(|(done, _)| done == id);
            parts.push(Part {
                store: *id,
                done,
                handle: match there[i] {
                    true => Some(store::open(&files[i], Expect::default()).await.unwrap()),
                    false => None,
                },
            });
        }
        run(volume, parts, &ledger).await.unwrap()
    };
    let outcome = runtime.block_on(async move {
        match select(Box::pin(work), Box::pin(power.until_cut())).await {
            Either::Left((outcome, _)) => Some(outcome),
            Either::Right(_) => None,
        }
    });
    drop(runtime);
    outcome
}

/// Whether a disk holds nothing of the volume's key or data. A slot is one block, so a key never crosses two.
fn is_gone(media: &Media) -> bool {
    let mut all = vec![0; STORE_BYTES as usize];
    media.read(0, &mut all);
    let zero = [0; 4096];
    all.chunks_exact(4096)
        .filter(|block| **block != zero)
        .all(|block| {
            let data = block.iter().all(|byte| *byte == DATA);
            let key = block.windows(KEY.len()).any(|window| window == KEY);
            !data && !key
        })
}

#[test]
fn a_job_ends_when_both_stores_are_overwritten_and_not_before() {
    let volume = VolumeId::random();
    let (media, ids) = with_volume(volume);
    assert!(
        media.iter().all(|disk| !is_gone(disk)),
        "the test sees what it looks for"
    );
    let notes = Arc::default();
    let driver = SimDriver::new(2, media);
    let outcome = run_once(&driver, volume, &ids, [true, false], &notes).unwrap();
    assert!(
        matches!(&outcome, Outcome::Unfinished(left) if left.len() == 1 && left[0].0 == ids[1]),
        "{outcome:?}"
    );
    assert_eq!(notes.lock().unwrap().done, [(ids[0], EXTENTS)]);
    assert!(!notes.lock().unwrap().finished);
    let media = driver.media();
    assert!(is_gone(&media[0]) && !is_gone(&media[1]));

    let driver = SimDriver::new(3, media);
    let outcome = run_once(&driver, volume, &ids, [true, true], &notes).unwrap();
    assert_eq!(outcome, Outcome::Destroyed);
    assert_eq!(notes.lock().unwrap().done, [(ids[0], EXTENTS), (ids[1], EXTENTS)]);
    assert!(notes.lock().unwrap().finished);
    assert!(driver.media().iter().all(is_gone));
}

#[test]
fn a_volume_that_never_reached_a_store_is_destroyed_there_at_once() {
    let volume = VolumeId::random();
    let (media, ids) = with_volume(VolumeId::random());
    let notes = Arc::default();
    let driver = SimDriver::new(4, media);
    let outcome = run_once(&driver, volume, &ids, [true, true], &notes);
    assert_eq!(outcome, Some(Outcome::Destroyed));
    assert_eq!(notes.lock().unwrap().done, [(ids[0], 0), (ids[1], 0)]);
    assert!(
        driver.media().iter().all(|disk| !is_gone(disk)),
        "another volume's bytes stay"
    );
}

#[test]
fn a_faulty_store_does_not_say_that_a_volume_never_was_there() {
    let (media, ids) = with_volume(VolumeId::random());
    let driver = SimDriver::new(6, media);
    let runtime = Runtime::new(driver.clone());
    let (file, disk) = (driver.file(0), driver.clone());
    runtime.block_on(async move {
        let handle = store::open(&file, Expect::default()).await.unwrap();
        let volume = VolumeId::random();
        let slot = VolumeSlot {
            volume,
            customer: CustomerId::random(),
            customer_name: "acme".parse().unwrap(),
            volume_name: "db".parse().unwrap(),
            dataset: DatasetId::random(),
            stores: ids,
            keys: Vec::new(),
        };
        let record = VolumeRecord {
            volume,
            size_bytes: 1 << 30,
            membership_epoch: Epoch(1),
            members: vec![Member::InSync; 2],
        };
        assert_eq!(
            reached(&handle, volume).await.unwrap(),
            Reached::Gone { extents: 0 }
        );
        disk.set_fault(Some(Box::new(|_, call| {
            (call == crate::disk::sim::Call::Sync).then_some(5)
        })));
        assert!(handle.add_volume(slot, record).await.is_err());
        // Its slot, and even its record, may be durable all the same.
        let error = reached(&handle, volume).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
    });
    drop(runtime);
}

#[test]
fn a_power_cut_at_any_call_leaves_a_job_that_the_next_run_finishes() {
    let volume = VolumeId::random();
    let (media, ids) = with_volume(volume);
    let calls = {
        let driver = SimDriver::new(5, media.clone());
        run_once(&driver, volume, &ids, [true, true], &Arc::default()).unwrap();
        driver.calls()
    };
    // A step that meets every phase; the stores' own suite cuts at every single call.
    for (seed, cut) in (1..=calls).step_by(1.max(calls as usize / 12)).enumerate() {
        let seed = 100 + seed as u64;
        run_one(seed, cut, volume, &media, &ids);
    }
}

fn run_one(seed: u64, cut: u64, volume: VolumeId, media: &[Media], ids: &[StoreId]) {
    let notes: Arc<Mutex<Notes>> = Arc::default();
    let driver = SimDriver::new(seed, media.to_vec());
    driver.cut_after_calls(cut);
    run_once(&driver, volume, ids, [true, true], &notes);
    let after = driver.media_after_cut(Cut::random(&mut Rng::new(seed)));
    for (i, id) in ids.iter().enumerate() {
        if notes.lock().unwrap().done.iter().any(|(done, _)| done == id) {
            assert!(
                is_gone(&after[i]),
                "seed {seed}, cut {cut}: called done and is not"
            );
        }
    }
    let driver = SimDriver::new(seed + 1000, after);
    if !notes.lock().unwrap().finished {
        let outcome = run_once(&driver, volume, ids, [true, true], &notes);
        assert_eq!(outcome, Some(Outcome::Destroyed), "seed {seed}, cut {cut}");
    }
    assert!(driver.media().iter().all(is_gone), "seed {seed}, cut {cut}");
    let extents: Vec<u32> = notes
        .lock()
        .unwrap()
        .done
        .iter()
        .map(|(_, extents)| *extents)
        .collect();
    assert_eq!(extents, [EXTENTS; 2], "seed {seed}, cut {cut}");
}
