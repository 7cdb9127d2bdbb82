//! The executor: a run queue, a timer heap, and an inbox for other threads.
//!
//! Invariants: a task is polled only on its own thread; a job sent from another thread runs in the order of arrival;
//! a panic in a task unwinds out of `block_on`, and whoever owns the thread ends the process (a broken invariant must
//! not leave half a data plane serving); when a runtime is dropped, every future of its tasks has been dropped before
//! its driver goes.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_task::Runnable;
use futures_channel::oneshot;
use slab::Slab;

use super::Task;
use super::driver::{Driver, Unpark, Wait};
use crate::error::{Error, Result};

thread_local! {
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

/// Tasks polled before the driver gets a turn, so that a busy queue cannot starve completions.
const TASKS_PER_TURN: usize = 64;

struct Inner {
    driver: Rc<dyn Driver>,
    ready: RefCell<VecDeque<Runnable>>,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    next_timer: Cell<u64>,
    /// Turns that have begun.
    turns: Cell<u64>,
    /// A waker of every task whose future is alive, so that the end of the runtime reaches those that wait for nothing
    /// it knows of.
    live: RefCell<Slab<Waker>>,
    inbox: Arc<Inbox>,
}

/// What other threads may touch.
struct Inbox {
    unpark: Arc<dyn Unpark>,
    pending: AtomicBool,
    queue: Mutex<InboxQueue>,
}

#[derive(Default)]
struct InboxQueue {
    woken: Vec<Runnable>,
    jobs: VecDeque<Box<dyn FnOnce() + Send>>,
    closed: bool,
}

impl Inbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, InboxQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            self.unpark.unpark();
        }
    }

    /// A task of this runtime became ready: straight to the run queue on its own thread, by the inbox from others.
    fn schedule(self: &Arc<Self>, runnable: Runnable) {
        let mut runnable = Some(runnable);
        // A waker can outlive the thread's variables (it may sit in one of them); then it is as from another thread.
        let _ = CURRENT.try_with(|current| {
            if let Some(inner) = &*current.borrow()
                && Arc::ptr_eq(&inner.inbox, self)
                && let Some(runnable) = runnable.take()
            {
                inner.ready.borrow_mut().push_back(runnable);
            }
        });
        if let Some(runnable) = runnable {
            self.lock().woken.push(runnable);
            self.notify();
        }
    }
}

/// A runtime on the current thread.
pub struct Runtime {
    inner: Rc<Inner>,
}

impl Runtime {
    /// A runtime over `driver`; the thread must have none yet.
    ///
    /// # Panics
    /// If the thread already has a runtime.
    pub fn new(driver: Rc<dyn Driver>) -> Self {
        let inbox = Arc::new(Inbox {
            unpark: driver.unparker(),
            pending: AtomicBool::new(false),
            queue: Mutex::default(),
        });
        let inner = Rc::new(Inner {
            driver,
            ready: RefCell::default(),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            turns: Cell::new(0),
            live: RefCell::default(),
            inbox,
        });
        CURRENT.with(|current| {
            let mut current = current.borrow_mut();
            assert!(current.is_none(), "one runtime a thread");
            *current = Some(inner.clone());
        });
        Self { inner }
    }

    /// The way in for other threads.
    pub fn remote(&self) -> Remote {
        Remote(self.inner.inbox.clone())
    }

    /// The engine.
    pub fn driver(&self) -> &Rc<dyn Driver> {
        &self.inner.driver
    }

    /// Runs until `future` is done and returns its result. Other tasks run meanwhile, and stay for the next call.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(Cell::new(None));
        let finished = Rc::new(Cell::new(false));
        let task = spawn({
            let (result, finished) = (result.clone(), finished.clone());
            async move {
                result.set(Some(future.await));
                finished.set(true);
            }
        });
        while !finished.get() {
            self.turn(&finished);
        }
        drop(task);
        result.take().expect("set before finished")
    }

    fn turn(&self, stop: &Cell<bool>) {
        let inner = &self.inner;
        inner.turns.set(inner.turns.get() + 1);
        inner.take_inbox();
        for _ in 0..TASKS_PER_TURN {
            let Some(runnable) = inner.ready.borrow_mut().pop_front() else {
                break;
            };
            runnable.run();
        }
        inner.fire_timers();
        let wait = if stop.get()
            || !inner.ready.borrow().is_empty()
            || inner.inbox.pending.load(Ordering::Acquire)
        {
            Wait::No
        } else {
            match inner.timers.borrow().first_key_value() {
                Some(((at, _), _)) => Wait::AtMost(at.saturating_sub(inner.driver.now())),
                None => Wait::Forever,
            }
        };
        inner.driver.turn(wait);
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Dropping a task can wake, cancel or even start others, so this goes on until no future is left. The thread's
        // runtime stays set meanwhile: futures give their operations back to the driver.
        loop {
            let inner = &self.inner;
            let wakers = inner
                .live
                .borrow()
                .iter()
                .map(|(_, waker)| waker.clone())
                .collect::<Vec<_>>();
            for waker in &wakers {
                waker.wake_by_ref();
            }
            let (woken, jobs) = {
                let mut queue = inner.inbox.lock();
                queue.closed = true;
                (std::mem::take(&mut queue.woken), std::mem::take(&mut queue.jobs))
            };
            let ready = inner.ready.take();
            let timers = inner.timers.take();
            let nothing_left = wakers.is_empty() && woken.is_empty() && jobs.is_empty() && ready.is_empty();
            let dropped = !woken.is_empty() || !ready.is_empty();
            drop((woken, jobs, ready, timers));
            if nothing_left {
                break;
            }
            if !dropped {
                // Another thread has woken a task and is about to put it into the inbox.
                std::thread::yield_now();
            }
        }
        CURRENT.with(|current| current.borrow_mut().take());
    }
}

impl Inner {
    fn take_inbox(&self) {
        if !self.inbox.pending.swap(false, Ordering::AcqRel) {
            return;
        }
        let (woken, jobs) = {
            let mut queue = self.inbox.lock();
            (std::mem::take(&mut queue.woken), std::mem::take(&mut queue.jobs))
        };
        self.ready.borrow_mut().extend(woken);
        for job in jobs {
            job();
        }
    }

    fn fire_timers(&self) {
        if self.timers.borrow().is_empty() {
            return;
        }
        let now = self.driver.now();
        loop {
            let mut timers = self.timers.borrow_mut();
            let Some(first) = timers.first_entry() else { break };
            if first.key().0 > now {
                break;
            }
            let waker = first.remove();
            drop(timers);
            waker.wake();
        }
    }
}

fn current() -> Rc<Inner> {
    CURRENT
        .with(|current| current.borrow().clone())
        .expect("called on a runtime's thread")
}

/// The engine of the current thread's runtime.
///
/// # Panics
/// Outside a runtime.
pub fn runtime() -> Rc<dyn Driver> {
    current().driver.clone()
}

/// Starts a task on the current thread's runtime.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    let inner = current();
    let inbox = inner.inbox.clone();
    let mut live = inner.live.borrow_mut();
    let entry = live.vacant_entry();
    let future = Registered {
        future,
        id: entry.key(),
        inner: inner.clone(),
    };
    let (runnable, task) = async_task::spawn_local(future, move |runnable| inbox.schedule(runnable));
    entry.insert(runnable.waker());
    drop(live);
    runnable.schedule();
    task
}

/// A task's future with its place among the live ones, given up with it.
struct Registered<F> {
    future: F,
    id: usize,
    inner: Rc<Inner>,
}

impl<F: Future> Future for Registered<F> {
    type Output = F::Output;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: `future` is pinned with the whole: it is never moved out, and `Drop` below does not touch it.
        unsafe { self.map_unchecked_mut(|task| &mut task.future) }.poll(cx)
    }
}

impl<F> Drop for Registered<F> {
    fn drop(&mut self) {
        let waker = self.inner.live.borrow_mut().try_remove(self.id);
        drop(waker);
    }
}

/// Tasks of the current thread's runtime that have not ended, the calling one included.
pub fn live_tasks() -> usize {
    current().live.borrow().len()
}

/// The number of this turn: tasks that run under one number know of the same completions.
pub fn turn_number() -> u64 {
    current().turns.get()
}

/// Time since the driver's origin.
pub fn now() -> Duration {
    current().driver.now()
}

/// Waits at least `duration`.
pub fn sleep(duration: Duration) -> Sleep {
    let inner = current();
    let at = inner.driver.now() + duration;
    let id = inner.next_timer.get();
    inner.next_timer.set(id + 1);
    Sleep { inner, key: (at, id) }
}

/// See [`sleep`].
pub struct Sleep {
    inner: Rc<Inner>,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.inner.driver.now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.inner
            .timers
            .borrow_mut()
            .insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.inner.timers.borrow_mut().remove(&self.key);
    }
}

/// `Some` result of `future`, or `None` if `duration` passes first (the future is then dropped).
pub async fn timeout<T>(duration: Duration, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut sleep = pin!(sleep(duration));
    poll_fn(|cx| {
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(value));
        }
        sleep.as_mut().poll(cx).map(|()| None)
    })
    .await
}

/// Lets every other ready task run once.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Sends work to a runtime from other threads.
#[derive(Clone)]
pub struct Remote(Arc<Inbox>);

impl Remote {
    /// Runs `make()` on the runtime's thread as a task and waits for its result.
    ///
    /// # Errors
    /// `Unavailable` when the runtime has ended, before or meanwhile.
    pub async fn call<T, F, Fut>(&self, make: F) -> Result<T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (tx, rx) = oneshot::channel();
        self.post(move || {
            spawn(async move {
                // The caller may have stopped waiting; the work is done all the same.
                let _ = tx.send(make().await);
            })
            .detach();
        })?;
        rx.await
            .map_err(|_| Error::unavailable("the data plane is shutting down"))
    }

    /// Runs `job` on the runtime's thread, without waiting.
    ///
    /// # Errors
    /// `Unavailable` when the runtime has ended.
    pub fn post(&self, job: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut queue = self.0.lock();
        if queue.closed {
            return Err(Error::unavailable("the data plane is shutting down"));
        }
        queue.jobs.push_back(Box::new(job));
        drop(queue);
        self.0.notify();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    use crate::disk::{EngineChoice, make_driver};

    fn runtime() -> Runtime {
        Runtime::new(make_driver(EngineChoice::Threads).unwrap().0)
    }

    /// Tells when it is dropped.
    struct Told(Rc<Cell<usize>>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }

    #[test]
    fn tasks_run_in_the_order_in_which_they_became_ready() {
        let order = Rc::new(RefCell::new(Vec::new()));
        let seen = order.clone();
        runtime().block_on(async move {
            let tasks: Vec<_> = (0..5)
                .map(|i| {
                    let order = order.clone();
                    spawn(async move {
                        order.borrow_mut().push(i);
                        yield_now().await;
                        order.borrow_mut().push(i + 10);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
        });
        assert_eq!(*seen.borrow(), [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]);
    }

    #[test]
    fn tasks_stay_from_one_block_on_to_the_next() {
        let runtime = runtime();
        let count = Rc::new(Cell::new(0));
        let inside = count.clone();
        runtime.block_on(async move {
            spawn(async move {
                for _ in 0..3 {
                    inside.set(inside.get() + 1);
                    sleep(Duration::from_millis(2)).await;
                }
            })
            .detach();
        });
        runtime.block_on(async { sleep(Duration::from_millis(50)).await });
        assert_eq!(count.get(), 3);
    }

    #[test]
    fn a_dropped_handle_cancels_its_task() {
        let told = Rc::new(Cell::new(0));
        let inside = Told(told.clone());
        runtime().block_on(async move {
            let task = spawn(async move {
                let _told = inside;
                std::future::pending::<()>().await;
            });
            yield_now().await;
            drop(task);
            yield_now().await;
        });
        assert_eq!(told.get(), 1);
    }

    #[test]
    fn the_end_of_a_runtime_reaches_every_task_and_those_they_start_while_dying() {
        struct Successor(Rc<Cell<usize>>);
        impl Drop for Successor {
            fn drop(&mut self) {
                let told = Told(self.0.clone());
                spawn(async move {
                    let _told = told;
                    std::future::pending::<()>().await;
                })
                .detach();
            }
        }
        let told = Rc::new(Cell::new(0));
        let runtime = runtime();
        let inside = told.clone();
        runtime.block_on(async move {
            for i in 0..100 {
                let told = Told(inside.clone());
                let successor = Successor(inside.clone());
                spawn(async move {
                    let _held = (told, successor);
                    match i % 3 {
                        0 => std::future::pending().await,
                        1 => sleep(Duration::from_secs(1000)).await,
                        _ => loop {
                            yield_now().await;
                        },
                    }
                })
                .detach();
            }
            yield_now().await;
        });
        drop(runtime);
        assert_eq!(told.get(), 200);
    }

    #[test]
    fn calls_after_the_end_are_refused_and_calls_under_way_fail() {
        let runtime = runtime();
        let remote = runtime.remote();
        let (started, wait_for_start) = mpsc::channel();
        let caller = std::thread::spawn({
            let remote = remote.clone();
            move || {
                Runtime::new(make_driver(EngineChoice::Threads).unwrap().0).block_on(async move {
                    remote
                        .call(move || async move {
                            started.send(()).unwrap();
                            std::future::pending::<()>().await;
                        })
                        .await
                })
            }
        });
        runtime.block_on(async move {
            while wait_for_start.try_recv().is_err() {
                sleep(Duration::from_millis(1)).await;
            }
        });
        drop(runtime);
        let error = caller.join().unwrap().expect_err("the runtime is gone");
        assert_eq!(error.kind(), crate::Kind::Unavailable);
        let error = remote
            .post(|| panic!("never run"))
            .expect_err("the runtime is gone");
        assert_eq!(error.kind(), crate::Kind::Unavailable);
    }

    #[test]
    fn wakes_from_other_threads_while_the_runtime_ends_are_harmless() {
        for _ in 0..50 {
            let runtime = runtime();
            let (wakers, received) = mpsc::channel::<Waker>();
            let storm = std::thread::spawn(move || {
                let wakers: Vec<_> = received.iter().collect();
                for _ in 0..200 {
                    wakers.iter().for_each(Waker::wake_by_ref);
                }
            });
            let told = Rc::new(Cell::new(0));
            let inside = told.clone();
            runtime.block_on(async move {
                for _ in 0..8 {
                    let (told, wakers) = (Told(inside.clone()), wakers.clone());
                    spawn(async move {
                        let _told = told;
                        poll_fn(|cx| {
                            let _ = wakers.send(cx.waker().clone());
                            Poll::<()>::Pending
                        })
                        .await
                    })
                    .detach();
                }
                drop(wakers);
                yield_now().await;
            });
            drop(runtime);
            assert_eq!(told.get(), 8);
            storm.join().unwrap();
        }
    }

    #[test]
    fn a_timeout_drops_what_was_too_slow() {
        let told = Rc::new(Cell::new(0));
        let slow = Told(told.clone());
        let outcome = runtime().block_on(async move {
            let never = async move {
                let _slow = slow;
                std::future::pending::<()>().await;
            };
            let missed = timeout(Duration::from_millis(2), never).await;
            let made = timeout(Duration::from_secs(1000), async { 7 }).await;
            (missed, made)
        });
        assert_eq!(outcome, (None, Some(7)));
        assert_eq!(told.get(), 1);
        CURRENT.with(|current| assert!(current.borrow().is_none()));
    }
}
