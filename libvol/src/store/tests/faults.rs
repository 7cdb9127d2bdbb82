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
