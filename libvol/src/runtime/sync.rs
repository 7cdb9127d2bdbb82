//! Waiting between tasks of one runtime: no atomics, first come first served.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Wakes everyone who waits for a condition, in the order in which they began to wait; they look again.
#[derive(Default)]
pub struct Notify {
    waiting: RefCell<Vec<(u64, Waker)>>,
    next_ticket: Cell<u64>,
}

impl Notify {
    /// Wakes all.
    pub fn notify_all(&self) {
        let mut waiting = self.waiting.take();
        // Those who looked in vain before have come back behind younger ones.
        waiting.sort_by_key(|(ticket, _)| *ticket);
        for (_, waker) in waiting {
            waker.wake();
        }
    }

    /// Waits until `condition` returns `Some`, looking again after every [`Notify::notify_all`].
    pub fn until<T, F: FnMut() -> Option<T>>(&self, condition: F) -> Until<'_, F> {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        Until {
            notify: self,
            condition,
            ticket,
        }
    }
}

/// See [`Notify::until`]. Dropping it leaves nothing behind.
pub struct Until<'a, F> {
    notify: &'a Notify,
    condition: F,
    ticket: u64,
}

impl<T, F: FnMut() -> Option<T> + Unpin> Future for Until<'_, F> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if let Some(value) = (self.condition)() {
            return Poll::Ready(value);
        }
        let mut waiting = self.notify.waiting.borrow_mut();
        // Newest first: a waiter that polls again without being woken has come recently, or waits alone.
        match waiting.iter_mut().rfind(|(ticket, _)| *ticket == self.ticket) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => waiting.push((self.ticket, cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl<F> Drop for Until<'_, F> {
    fn drop(&mut self) {
        self.notify
            .waiting
            .borrow_mut()
            .retain(|(ticket, _)| *ticket != self.ticket);
    }
}

/// Counts permits; waiters are served strictly in order, so a large request is not starved by small ones.
pub struct Semaphore {
    state: RefCell<SemaphoreState>,
}

struct SemaphoreState {
    permits: usize,
    next_ticket: u64,
    waiting: VecDeque<(u64, usize, Option<Waker>)>,
}

/// Permits, given back on drop.
pub struct Permits {
    semaphore: Rc<Semaphore>,
    count: usize,
}

impl Semaphore {
    /// A semaphore with that many permits.
    pub fn new(permits: usize) -> Rc<Self> {
        Rc::new(Self {
            state: RefCell::new(SemaphoreState {
                permits,
                next_ticket: 0,
                waiting: VecDeque::new(),
            }),
        })
    }

    /// Permits free now.
    pub fn available(&self) -> usize {
        self.state.borrow().permits
    }

    /// Waits for `count` permits.
    pub fn acquire(self: &Rc<Self>, count: usize) -> Acquire {
        Acquire {
            semaphore: self.clone(),
            count,
            ticket: None,
        }
    }

    fn serve(&self) {
        let mut state = self.state.borrow_mut();
        if let Some((_, count, waker)) = state.waiting.front_mut()
            && let Some(waker) = waker.take()
        {
            if *count <= state.permits {
                drop(state);
                waker.wake();
            } else {
                state.waiting[0].2 = Some(waker);
            }
        }
    }
}

/// See [`Semaphore::acquire`].
pub struct Acquire {
    semaphore: Rc<Semaphore>,
    count: usize,
    ticket: Option<u64>,
}

impl Future for Acquire {
    type Output = Permits;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Permits> {
        let this = &mut *self;
        let mut state = this.semaphore.state.borrow_mut();
        let first = match this.ticket {
            None => state.waiting.is_empty(),
            Some(ticket) => state.waiting.front().is_some_and(|w| w.0 == ticket),
        };
        if first && state.permits >= this.count {
            state.permits -= this.count;
            if this.ticket.take().is_some() {
                state.waiting.pop_front();
            }
            drop(state);
            this.semaphore.serve();
            return Poll::Ready(Permits {
                semaphore: this.semaphore.clone(),
                count: this.count,
            });
        }
        let waker = Some(cx.waker().clone());
        match this.ticket {
            None => {
                let ticket = state.next_ticket;
                state.next_ticket += 1;
                state.waiting.push_back((ticket, this.count, waker));
                this.ticket = Some(ticket);
            }
            Some(ticket) => {
                if let Some(entry) = state.waiting.iter_mut().find(|w| w.0 == ticket) {
                    entry.2 = waker;
                }
            }
        }
        Poll::Pending
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.semaphore
                .state
                .borrow_mut()
                .waiting
                .retain(|w| w.0 != ticket);
            self.semaphore.serve();
        }
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.semaphore.state.borrow_mut().permits += self.count;
        self.semaphore.serve();
    }
}

/// A count that someone waits to see at zero (operations in flight).
#[derive(Default)]
pub struct InFlight {
    count: Cell<usize>,
    idle: Notify,
}

/// One operation in flight; ends on drop.
pub struct InFlightGuard(Rc<InFlight>);

impl InFlight {
    /// Counts one more until the guard drops.
    pub fn enter(self: &Rc<Self>) -> InFlightGuard {
        self.count.set(self.count.get() + 1);
        InFlightGuard(self.clone())
    }

    /// How many are in flight.
    pub fn count(&self) -> usize {
        self.count.get()
    }

    /// Waits until none is.
    pub async fn idle(&self) {
        self.idle.until(|| (self.count.get() == 0).then_some(())).await;
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        if self.0.count.get() == 0 {
            self.0.idle.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Woken {
        fn times(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn poll_with<F: Future + Unpin>(future: &mut F, woken: &Arc<Woken>) -> Poll<F::Output> {
        let waker = Waker::from(woken.clone());
        Pin::new(future).poll(&mut Context::from_waker(&waker))
    }

    #[test]
    fn a_waiter_looks_again_after_every_notice_until_it_is_content() {
        let (notify, value) = (Notify::default(), Cell::new(0));
        let woken = Arc::new(Woken::default());
        let mut until = notify.until(|| (value.get() == 2).then(|| value.get()));
        for round in 1..=2 {
            assert_eq!(poll_with(&mut until, &woken), Poll::Pending);
            assert_eq!(poll_with(&mut until, &woken), Poll::Pending);
            assert_eq!(notify.waiting.borrow().len(), 1, "polling twice waits once");
            value.set(round);
            notify.notify_all();
            assert_eq!(woken.times(), round);
        }
        assert_eq!(poll_with(&mut until, &woken), Poll::Ready(2));
    }

    #[test]
    fn a_waiter_that_gave_up_leaves_nothing_behind() {
        let notify = Notify::default();
        let woken = Arc::new(Woken::default());
        for _ in 0..10 {
            let mut until = notify.until(|| None::<()>);
            assert!(poll_with(&mut until, &woken).is_pending());
        }
        assert!(notify.waiting.borrow().is_empty());
        notify.notify_all();
        assert_eq!(woken.times(), 0);
    }

    #[test]
    fn waiters_are_woken_in_the_order_in_which_they_came() {
        struct Logged(u64, Arc<std::sync::Mutex<Vec<u64>>>);
        impl Wake for Logged {
            fn wake(self: Arc<Self>) {
                self.1.lock().unwrap().push(self.0);
            }
        }
        let notify = Notify::default();
        let log = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut waiters: Vec<_> = (0..4).map(|_| notify.until(|| None::<()>)).collect();
        for order in [[0, 1, 2, 3], [2, 0, 3, 1]] {
            for id in order {
                let waker = Waker::from(Arc::new(Logged(id as u64, log.clone())));
                let polled = Pin::new(&mut waiters[id]).poll(&mut Context::from_waker(&waker));
                assert!(polled.is_pending());
            }
            notify.notify_all();
            assert_eq!(std::mem::take(&mut *log.lock().unwrap()), [0, 1, 2, 3]);
        }
    }

    #[test]
    fn a_large_request_is_served_before_small_ones_behind_it() {
        let semaphore = Semaphore::new(4);
        let woken = Arc::new(Woken::default());
        let Poll::Ready(held) = poll_with(&mut semaphore.acquire(3), &woken) else {
            panic!("free permits")
        };
        let mut large = semaphore.acquire(4);
        let mut small = semaphore.acquire(1);
        assert!(poll_with(&mut large, &woken).is_pending());
        assert!(
            poll_with(&mut small, &woken).is_pending(),
            "one is free, but not its turn"
        );
        assert_eq!(woken.times(), 0);
        drop(held);
        assert_eq!(woken.times(), 1);
        let Poll::Ready(all) = poll_with(&mut large, &woken) else {
            panic!("all permits are free")
        };
        assert!(poll_with(&mut small, &woken).is_pending());
        drop(all);
        assert!(poll_with(&mut small, &woken).is_ready());
        assert_eq!(semaphore.available(), 4);
    }

    #[test]
    fn a_waiter_that_gives_up_after_its_wake_passes_it_on() {
        let semaphore = Semaphore::new(1);
        let (first_woken, second_woken) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
        let Poll::Ready(held) = poll_with(&mut semaphore.acquire(1), &first_woken) else {
            panic!("free permits")
        };
        let mut first = semaphore.acquire(1);
        let mut second = semaphore.acquire(1);
        assert!(poll_with(&mut first, &first_woken).is_pending());
        assert!(poll_with(&mut second, &second_woken).is_pending());
        drop(held);
        assert_eq!((first_woken.times(), second_woken.times()), (1, 0));
        drop(first);
        assert_eq!(second_woken.times(), 1);
        assert!(poll_with(&mut second, &second_woken).is_ready());
    }

    #[test]
    fn idle_comes_when_the_last_operation_ends() {
        let in_flight = Rc::new(InFlight::default());
        let woken = Arc::new(Woken::default());
        let (one, two) = (in_flight.enter(), in_flight.enter());
        let mut idle = Box::pin(in_flight.idle());
        assert!(poll_with(&mut idle, &woken).is_pending());
        drop(one);
        assert_eq!((woken.times(), in_flight.count()), (0, 1));
        drop(two);
        assert_eq!(woken.times(), 1);
        assert!(poll_with(&mut idle, &woken).is_ready());
    }
}
