//! Grouped syncs and the fault latch.

use std::cell::Cell;

use super::*;
use crate::disk::sim::{Call, Cut};
use crate::error::Kind;
use crate::runtime::{spawn, yield_now};

/// A store on a simulated disk whose syncs are counted and may fail.
fn over_counted_syncs<F>(work: F)
where
    F: AsyncFnOnce(StoreHandle, Rc<Cell<u32>>, Rc<Cell<bool>>) + 'static,
{
    let driver = SimDriver::new(21, vec![formatted(true)]);
    let (syncs, failing) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    let (counter, fails) = (syncs.clone(), failing.clone());
    let hooked = driver.clone();
    runtime.block_on(async move {
        let store = open(&file, Expect::default()).await.unwrap();
        hooked.set_fault(Some(Box::new(move |_, call| {
            let sync = call == Call::Sync;
            counter.set(counter.get() + u32::from(sync));
            (sync && fails.get()).then_some(5)
        })));
        work(store, syncs, failing).await;
    });
}

#[test]
fn callers_share_a_sync_that_is_not_submitted_and_never_join_one_that_is() {
    over_counted_syncs(async |store, syncs, _| {
        let io = attach(&store);
        let flush = || {
            let io = io.clone();
            spawn(async move { io.flush().await })
        };
        let first: Vec<_> = (0..10).map(|_| flush()).collect();
        // Everybody has asked, and the sync is submitted.
        yield_now().await;
        yield_now().await;
        let second: Vec<_> = (0..10).map(|_| flush()).collect();
        for flush in first {
            flush.await.unwrap();
        }
        assert_eq!(syncs.get(), 1);
        for flush in second {
            flush.await.unwrap();
        }
        assert_eq!(syncs.get(), 2);
    });
}

#[test]
fn a_flush_covers_every_write_that_completed_before_it_even_while_another_sync_runs() {
    for seed in 0..40 {
        let driver = SimDriver::new(seed, vec![formatted(true)]);
        let runtime = Runtime::new(driver.clone());
        let file = driver.file(0);
        let extents = runtime.block_on(async move {
            let store = open(&file, Expect::default()).await.unwrap();
            let io = attach(&store);
            let extents = store.reserve(8).await.unwrap();
            let tasks: Vec<_> = extents
                .iter()
                .map(|extent| {
                    let (io, extent) = (io.clone(), *extent);
                    spawn(async move {
                        let mut data = Buf::zeroed(BLOCK_SIZE);
                        data.fill(extent.0 as u8 + 1);
                        let sealed = SealedBuf::from_ciphertext(data);
                        io.write(extent, 0, &sealed, 0..BLOCK_SIZE).await.unwrap();
                        io.flush().await.unwrap();
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            extents
        });
        drop(runtime);
        let media = driver.media_after_cut(Cut::DropAll).remove(0);
        let layout = layout::Layout::plan(STORE_BYTES, EXTENT_BYTES, SIZES).unwrap();
        for extent in extents {
            let mut data = [0; BLOCK_SIZE];
            media.read(layout.data_at(extent), &mut data);
            assert!(data.iter().all(|b| *b == extent.0 as u8 + 1), "seed {seed}");
        }
    }
}

#[test]
fn a_failed_sync_is_heard_by_all_and_stops_writes_for_good_while_reads_go_on() {
    over_counted_syncs(async |store, _, failing| {
        let io = attach(&store);
        let extents = allocate(&store, DatasetId::random(), 0, 1).await.unwrap();
        failing.set(true);
        let flushes: Vec<_> = (0..5)
            .map(|_| {
                let io = io.clone();
                spawn(async move { io.flush().await })
            })
            .collect();
        for flush in flushes {
            assert_eq!(flush.await.unwrap_err().kind(), Kind::Io);
        }
        failing.set(false);
        assert!(store.fault().is_some());
        assert_eq!(io.flush().await.unwrap_err().kind(), Kind::Unavailable);
        let sealed = SealedBuf::zeros(BLOCK_SIZE);
        let write = io.write(extents[0], 0, &sealed, 0..BLOCK_SIZE).await;
        assert_eq!(write.unwrap_err().kind(), Kind::Unavailable);
        let commit = store.commit(vec![clear_mark(extents[0])]).await;
        assert_eq!(commit.unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(store.reserve(1).await.unwrap_err().kind(), Kind::Unavailable);
        let (read, _) = io.read(extents[0], 0, Buf::zeroed(BLOCK_SIZE), BLOCK_SIZE).await;
        read.unwrap();
        store.close().await.unwrap();
    });
}

#[test]
fn a_failed_commit_is_an_error_for_all_who_shared_it_and_latches_the_store() {
    over_counted_syncs(async |store, _, failing| {
        let dataset = DatasetId::random();
        let extents = allocate(&store, dataset, 0, 4).await.unwrap();
        failing.set(true);
        let commits: Vec<_> = extents
            .iter()
            .map(|extent| {
                let (store, extent) = (store.clone(), *extent);
                spawn(async move { store.commit(vec![clear_mark(extent)]).await })
            })
            .collect();
        for commit in commits {
            let kind = commit.await.unwrap_err().kind();
            assert!(matches!(kind, Kind::Io | Kind::Unavailable), "{kind:?}");
        }
        assert!(store.fault().unwrap().contains("redo log"));
        let dirty = store.extents_of(dataset).await.unwrap();
        assert!(dirty.iter().all(|e| e.dirty), "nothing took effect");
    });
}

#[test]
fn whoever_asked_hears_of_the_fault_as_it_latches_or_at_once() {
    over_counted_syncs(async |store, _, failing| {
        let heard = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        let ask = || {
            let heard = heard.clone();
            store.on_fault(move || {
                heard.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            });
        };
        let count = || heard.load(std::sync::atomic::Ordering::Relaxed);
        ask();
        ask();
        let io = attach(&store);
        io.flush().await.unwrap();
        assert_eq!(count(), 0);
        failing.set(true);
        io.flush().await.unwrap_err();
        assert_eq!(count(), 2);
        ask();
        assert_eq!(count(), 3, "it has latched before");
        store.latch_fault("again");
        assert_eq!(count(), 3, "once each");
    });
}
