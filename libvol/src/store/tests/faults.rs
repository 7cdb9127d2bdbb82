//! Devices that fail: a sync whose error one thread alone hears of, a slot copy that takes no writes.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_channel::oneshot;

use super::*;
use crate::disk::sim::Call;
use crate::disk::{DiskFile, EngineChoice, make_driver};
use crate::error::Kind;
use crate::runtime::{Done, Driver, FileSlot, Op, OpKey, Unpark, Wait, timeout};

const EIO: i32 = 5;

/// An engine whose first sync fails, and whose thread stops between taking that error from the kernel and acting on it.
struct StalledSync {
    inner: Rc<dyn Driver>,
    stall: RefCell<Option<(oneshot::Sender<()>, mpsc::Receiver<()>)>>,
}

impl Driver for StalledSync {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn submit(&self, op: Op) -> OpKey {
        self.inner.submit(op)
    }

    fn poll(&self, key: OpKey, cx: &mut Context<'_>) -> Poll<Done> {
        let Poll::Ready(mut done) = self.inner.poll(key, cx) else {
            return Poll::Pending;
        };
        if matches!(done.op, Op::Sync { .. })
            && let Some((taken, go_on)) = self.stall.take()
        {
            taken.send(()).unwrap();
            // Without an answer the test has failed, and ends.
            let _ = go_on.recv();
            done.result = Err(io::Error::from_raw_os_error(EIO));
        }
        Poll::Ready(done)
    }

    fn forget(&self, key: OpKey) {
        self.inner.forget(key);
    }

    fn turn(&self, wait: Wait) {
        self.inner.turn(wait);
    }

    fn attach(&self, file: Arc<OwnedFd>) -> io::Result<FileSlot> {
        self.inner.attach(file)
    }

    fn detach(&self, slot: FileSlot) {
        self.inner.detach(slot);
    }

    fn now(&self) -> Duration {
        self.inner.now()
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        self.inner.unparker()
    }
}

/// The kernel reports a failed writeback to one sync of a file only. The thread that got the report has not latched the
/// store yet; syncs of others, begun meanwhile, succeed.
fn nobody_reports_success_before_the_latch(choice: EngineChoice) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let (driver, _) = make_driver(choice).unwrap();
    Runtime::new(driver).block_on(async move {
        let size_bytes = 80 << 20;
        let file = DiskFile::create(&path, size_bytes, true).unwrap();
        let options = FormatOptions {
            size_bytes,
            extent_bytes: 4 << 20,
            ..options(true)
        };
        format(&Disk::attach(&file).unwrap(), &options).await.unwrap();
        let store = open(&file, Expect::default()).await.unwrap();
        let extents = allocate(&store, DatasetId::random(), 0, 1).await.unwrap();
        let io = attach(&store);

        let (taken, is_taken) = oneshot::channel();
        let (go_on, may_go_on) = mpsc::channel();
        let shard = store.clone();
        let thread = std::thread::spawn(move || {
            let driver = Rc::new(StalledSync {
                inner: make_driver(choice).unwrap().0,
                stall: RefCell::new(Some((taken, may_go_on))),
            });
            Runtime::new(driver).block_on(async move {
                let io = attach(&shard);
                assert_eq!(io.flush().await.unwrap_err().kind(), Kind::Io);
            });
        });
        is_taken.await.unwrap();
        let mut flush = Box::pin(io.flush());
        let mut commit = Box::pin(store.commit(vec![Change::Release(extents[0])]));
        let patience = Duration::from_millis(200);
        assert!(timeout(patience, flush.as_mut()).await.is_none(), "a flush");
        assert!(timeout(patience, commit.as_mut()).await.is_none(), "a commit");
        assert_eq!(store.fault(), None);
        go_on.send(()).unwrap();
        assert_eq!(flush.await.unwrap_err().kind(), Kind::Io);
        commit.await.unwrap_err();
        assert!(store.fault().is_some());
        thread.join().unwrap();
        drop(io);
        store.close().await.unwrap();
    });
}

#[test]
fn nobody_reports_success_before_the_latch_on_the_thread_pool_engine() {
    nobody_reports_success_before_the_latch(EngineChoice::Threads);
}

#[test]
fn nobody_reports_success_before_the_latch_on_the_preferred_engine() {
    nobody_reports_success_before_the_latch(EngineChoice::Auto);
}

#[test]
fn a_scrubbers_failed_sync_latches_the_store_even_while_it_closes() {
    let driver = SimDriver::new(31, vec![formatted(true)]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    runtime.block_on(async move {
        let store = open(&file, Expect::default()).await.unwrap();
        let extents = allocate(&store, DatasetId::random(), 0, 2).await.unwrap();
        let release = extents.iter().map(|extent| Change::Release(*extent));
        store.commit(release.collect()).await.unwrap();
        let failed = Rc::new(Cell::new(false));
        let hooked = failed.clone();
        driver.set_fault(Some(Box::new(move |_, call| {
            (call == Call::Sync && !hooked.replace(true)).then_some(EIO)
        })));
        store.close().await.unwrap();
        assert!(failed.get(), "the scrubber was at work");
        let fault = store.fault().expect("latched");
        assert!(fault.contains("scrub"), "{fault}");
    });
}

/// A store whose volume in slot 0 is live, or destroyed with its slot's copies put back; damage to them is the test's.
fn with_a_volume(destroyed: bool) -> (Media, layout::Layout, VolumeId) {
    let layout = layout::Layout::plan(STORE_BYTES, EXTENT_BYTES, SIZES).unwrap();
    let id = VolumeId::random();
    let ((), mut media) = with_store(1, formatted(true), async move |store| {
        let (slot, record) = volume(id);
        store.add_volume(slot, record).await.unwrap();
        store.close().await.unwrap();
    });
    if destroyed {
        let mut copy = [0; 4096];
        media.read(layout.slot_at(0, 0), &mut copy);
        ((), media) = with_store(2, media, async move |store| {
            store.destroy_volume(id).await.unwrap();
            store.close().await.unwrap();
        });
        for place in [0, 1] {
            media.overwrite(layout.slot_at(0, place), &copy);
        }
    }
    (media, layout, id)
}

/// Opens a store on a disk that fails calls as `fails` says.
fn with_failing<F>(media: Media, fails: impl FnMut(Call) -> bool + 'static, work: F)
where
    F: AsyncFnOnce(Result<StoreHandle>) + 'static,
{
    let mut fails = fails;
    let driver = SimDriver::new(3, vec![media]);
    let runtime = Runtime::new(driver.clone());
    let file = driver.file(0);
    driver.set_fault(Some(Box::new(move |_, call| fails(call).then_some(EIO))));
    runtime.block_on(async move { work(open(&file, Expect::default()).await).await });
}

fn writes_at(call: Call, place: u64) -> bool {
    matches!(call, Call::Write { at, .. } if at == place)
}

fn names_damage(store: &StoreHandle, text: &str) -> bool {
    let mut findings = store.findings().iter();
    findings.any(|f| f.severity == Severity::Damage && f.text.contains(text))
}

#[test]
fn a_slot_copy_that_cannot_be_rewritten_is_named_and_costs_nothing_else() {
    for bad in [0, 1] {
        let (mut media, layout, id) = with_a_volume(false);
        media.overwrite(layout.slot_at(0, bad) + 600, &[0x42; 3]);
        let (bad_at, good_at) = (layout.slot_at(0, bad), layout.slot_at(0, 1 - bad));
        let good_written = Rc::new(Cell::new(false));
        let seen = good_written.clone();
        let fails = move |call| {
            seen.set(seen.get() || writes_at(call, good_at));
            writes_at(call, bad_at)
        };
        with_failing(media, fails, async move |store| {
            let store = store.unwrap();
            assert!(!good_written.get(), "the good copy is left alone");
            let text = format!("copy {}: cannot be rewritten", bad + 1);
            assert!(names_damage(&store, &text), "{:?}", store.findings());
            let state = store.volume(id).await.unwrap();
            assert!(matches!(state, VolumeState::Live(..)));
            let (slot, record) = volume(VolumeId::random());
            store.add_volume(slot, record).await.unwrap();
            assert_eq!(store.fault(), None);
            store.close().await.unwrap();
        });
    }
}

#[test]
fn a_stale_slot_that_cannot_be_erased_is_named_and_not_used_again() {
    for bad in [0, 1] {
        let (media, layout, id) = with_a_volume(true);
        let at = layout.slot_at(0, bad);
        with_failing(
            media,
            move |call| writes_at(call, at),
            async move |store| {
                let store = store.unwrap();
                assert!(names_damage(&store, "slot 0"), "{:?}", store.findings());
                let state = store.volume(id).await.unwrap();
                assert!(matches!(state, VolumeState::Tombstoned { .. }));
                let (slot, record) = volume(VolumeId::random());
                store.add_volume(slot, record).await.unwrap();
                assert_eq!(store.fault(), None);
                store.close().await.unwrap();
            },
        );
    }
}

#[test]
fn a_sync_that_fails_while_a_slot_copy_is_rewritten_is_not_got_over() {
    let (mut media, layout, _) = with_a_volume(false);
    media.overwrite(layout.slot_at(0, 0) + 600, &[0x42; 3]);
    let (at, mut rewritten) = (layout.slot_at(0, 0), false);
    let fails = move |call| {
        rewritten |= writes_at(call, at);
        rewritten && call == Call::Sync
    };
    with_failing(media, fails, async move |store| {
        assert_eq!(store.map(drop).unwrap_err().kind(), Kind::Io);
    });
}

#[test]
fn one_slot_copy_that_cannot_be_erased_does_not_spare_the_other_nor_stop_the_store() {
    for bad in [0, 1] {
        let (media, layout, id) = with_a_volume(false);
        let at = layout.slot_at(0, bad);
        let driver = SimDriver::new(3, vec![media]);
        let runtime = Runtime::new(driver.clone());
        let file = driver.file(0);
        runtime.block_on(async move {
            let store = open(&file, Expect::default()).await.unwrap();
            driver.set_fault(Some(Box::new(move |_, call| writes_at(call, at).then_some(EIO))));
            assert_eq!(store.destroy_volume(id).await.unwrap_err().kind(), Kind::Io);
            let mut other = [0xff; 4096];
            driver.with_disk(0, |disk| disk.read(layout.slot_at(0, 1 - bad), &mut other));
            assert!(other.iter().all(|byte| *byte == 0));
            assert_eq!(store.fault(), None);
            assert!(!store.scrub_progress(id).await.unwrap().keys_done);
            // The copy can be written again: the same call ends what the first one began.
            driver.set_fault(None);
            store.destroy_volume(id).await.unwrap();
            store.scrubbed(id).await.unwrap();
            store.close().await.unwrap();
        });
    }
}

#[test]
fn a_slot_that_cannot_be_written_costs_one_creation_and_no_more() {
    let layout = layout::Layout::plan(STORE_BYTES, EXTENT_BYTES, SIZES).unwrap();
    for bad in [0, 1] {
        let at = layout.slot_at(0, bad);
        with_failing(
            formatted(true),
            move |call| writes_at(call, at),
            async move |store| {
                let store = store.unwrap();
                let (slot, record) = volume(VolumeId::random());
                let added = store.add_volume(slot.clone(), record.clone()).await;
                assert_eq!(added.unwrap_err().kind(), Kind::Io);
                assert_eq!(store.fault(), None);
                assert_eq!(store.volume(slot.volume).await.unwrap(), VolumeState::Unknown);
                store.add_volume(slot, record).await.unwrap();
                store.close().await.unwrap();
            },
        );
    }
}

#[test]
fn a_device_that_does_not_answer_is_not_waited_for_without_end() {
    let (media, _, _) = with_a_volume(false);
    // Reads of the metadata, and what recovery writes and syncs.
    for calls in 0..8 {
        let driver = SimDriver::new(3, vec![media.clone()]);
        let runtime = Runtime::new(driver.clone());
        let file = driver.file(0);
        driver.hang_after(0, calls);
        runtime.block_on(async move {
            let opened = timeout(Duration::from_secs(100_000), open(&file, Expect::default())).await;
            let error = opened.expect("it ends").map(drop).unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable);
            assert!(error.message().contains("not answered"), "{error}");
        });
    }
}
