//! The store on real files, with both engines, used from a thread that is not its home.

use std::time::Duration;

use super::*;
use crate::disk::{EngineChoice, OpenMode, make_driver};

const SIZE: u64 = 80 << 20;

fn on_runtime<T: 'static>(choice: EngineChoice, work: impl Future<Output = T> + 'static) -> T {
    let (driver, _) = make_driver(choice).unwrap();
    Runtime::new(driver).block_on(work)
}

fn whole_life(choice: EngineChoice) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let id = VolumeId::random();
    let (slot, record) = volume(id);
    let dataset = slot.dataset;
    let expect = Expect {
        installation: Some(options(true).installation),
        store: None,
    };
    {
        let path = path.clone();
        on_runtime(choice, async move {
            let file = DiskFile::create(&path, SIZE, true).unwrap();
            let options = FormatOptions {
                size_bytes: SIZE,
                extent_bytes: 4 << 20,
                ..options(true)
            };
            let disk = Disk::attach(&file).unwrap();
            format(&disk, &options).await.unwrap();
            let store = open(&file, expect).await.unwrap();
            store.add_volume(slot, record).await.unwrap();

            // A volume's shard is another thread with a runtime of its own.
            let (done, finished) = futures_channel::oneshot::channel();
            let shard = store.clone();
            let thread = std::thread::spawn(move || {
                on_runtime(choice, async move {
                    let io = attach(&shard);
                    let extents = allocate(&shard, dataset, 0, 3).await.unwrap();
                    let mut data = Buf::zeroed(8192);
                    data.fill(0xee);
                    let sealed = SealedBuf::from_ciphertext(data);
                    for extent in &extents {
                        io.write(*extent, 7, &sealed, 0..8192).await.unwrap();
                    }
                    io.flush().await.unwrap();
                    let (read, back) = io.read(extents[1], 7, Buf::zeroed(8192), 8192).await;
                    read.unwrap();
                    assert!(back.iter().all(|b| *b == 0xee));
                    shard.commit(vec![Change::Release(extents[2])]).await.unwrap();
                    let _ = done.send(());
                });
            });
            finished.await.unwrap();
            thread.join().unwrap();
            store.close().await.unwrap();
        });
    }
    on_runtime(choice, async move {
        let file = DiskFile::open(&path, OpenMode::ReadWrite, true, Duration::from_secs(10)).unwrap();
        let store = open(&file, expect).await.unwrap();
        let left = store.extents_of(dataset).await.unwrap();
        assert_eq!(
            left.iter().map(|e| (e.logical.0, e.dirty)).collect::<Vec<_>>(),
            [(0, true), (1, true)]
        );
        store.destroy_volume(id).await.unwrap();
        store.scrubbed(id).await.unwrap();
        assert_eq!(store.space().allocated + store.space().pending_scrub, 0);
        store.close().await.unwrap();
        drop((store, file));
        let file = DiskFile::open(&path, OpenMode::ReadOnly, true, Duration::from_secs(10)).unwrap();
        let report = check(&file, expect, CheckScope::Full).await.unwrap();
        assert_eq!(report.findings, []);
        let all = std::fs::read(&path).unwrap();
        assert!(!all.windows(16).any(|w| w == [0xee; 16]), "ciphertext is left");
    });
}

#[test]
fn a_store_lives_on_the_thread_pool_engine() {
    whole_life(EngineChoice::Threads);
}

#[test]
fn a_store_lives_on_the_preferred_engine() {
    whole_life(EngineChoice::Auto);
}
