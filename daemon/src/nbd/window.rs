//! How much one connection may have in flight, and how much all of an attachment may together.
//!
//! Two limits, for two reasons. Requests and payload bytes between being received and having their reply sent are
//! bounded, so that a client that sends without reading costs bounded memory: at the limit nothing is received. Bytes are
//! bounded twice, for the connection and, by the shared [`Budget`], for the attachment; a connection that has nothing in
//! flight may bring one request whatever the others have. So nobody starves, and the sum is bounded too
//! ([`VOLUME_BYTES_IN_FLIGHT`] has the arithmetic).
//!
//! Requests at the device are capped below the depth the client works at ([`crate::depth`]).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use libvol::limits::{NBD_BYTES_IN_FLIGHT, NBD_REQUESTS_IN_FLIGHT, VOLUME_BYTES_IN_FLIGHT};
use libvol::runtime::sync::Notify;

use crate::depth::{DepthCap, DepthPolicy};

/// Request bytes that all connections of one attachment have in flight.
#[derive(Default)]
pub(super) struct Budget {
    bytes: Cell<usize>,
    /// Some were given back, or one of the windows has other news.
    changed: Notify,
}

/// The limits and the present use of them.
pub(super) struct Window {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    closed: Cell<bool>,
    budget: Rc<Budget>,
    depth: RefCell<DepthCap>,
}

impl Window {
    /// An empty window of one of the connections that share `budget`. What it holds of it is given back on drop.
    pub(super) fn new(policy: DepthPolicy, budget: Rc<Budget>) -> Self {
        Self {
            requests: Cell::new(0),
            bytes: Cell::new(0),
            closed: Cell::new(false),
            budget,
            depth: RefCell::new(DepthCap::new(policy)),
        }
    }

    /// Whether a request that takes `cost_bytes` may come in. A single request always may, whatever it costs.
    pub(super) fn has_room(&self, cost_bytes: usize) -> bool {
        let requests = self.requests.get();
        requests == 0
            || (requests < NBD_REQUESTS_IN_FLIGHT
                && self.bytes.get() + cost_bytes <= NBD_BYTES_IN_FLIGHT
                && (cost_bytes == 0 || self.budget.bytes.get() + cost_bytes <= VOLUME_BYTES_IN_FLIGHT))
    }

    /// Waits for room, or for the window to close.
    pub(super) async fn room(&self, cost_bytes: usize) {
        let settled = || self.has_room(cost_bytes) || self.closed.get();
        self.budget.changed.until(|| settled().then_some(())).await;
    }

    /// A request came in.
    pub(super) fn enter(&self, cost_bytes: usize) {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + cost_bytes);
        self.budget.bytes.set(self.budget.bytes.get() + cost_bytes);
        self.depth.borrow_mut().observe(self.requests.get());
    }

    /// The replies to `requests` requests have been sent.
    pub(super) fn release(&self, requests: usize, cost_bytes: usize) {
        self.requests.set(self.requests.get() - requests);
        self.bytes.set(self.bytes.get() - cost_bytes);
        self.budget.give_back(cost_bytes);
    }

    /// Requests received whose reply has not been sent.
    pub(super) fn requests(&self) -> usize {
        self.requests.get()
    }

    /// Requests the device may work on at once.
    pub(super) fn device_cap(&self) -> usize {
        self.depth.borrow().cap()
    }

    /// Nobody needs to wait any more.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.budget.changed.notify_all();
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes.get());
    }
}

impl Budget {
    fn give_back(&self, bytes: usize) {
        self.bytes.set(self.bytes.get() - bytes);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn requests_and_bytes_are_limited_and_a_lone_request_always_fits() {
        let window = Window::new(DepthPolicy::MEASURED, Rc::default());
        assert!(window.has_room(usize::MAX));
        for _ in 0..NBD_REQUESTS_IN_FLIGHT {
            assert!(window.has_room(0));
            window.enter(0);
        }
        assert!(!window.has_room(0));
        window.release(1, 0);
        assert!(window.has_room(0));

        let window = Window::new(DepthPolicy::MEASURED, Rc::default());
        window.enter(NBD_BYTES_IN_FLIGHT - 1);
        assert!(window.has_room(1) && !window.has_room(2));
    }

    #[test]
    fn who_waits_for_room_goes_on_when_there_is_some_or_never_will_be() {
        let mut cx = Context::from_waker(Waker::noop());
        let window = Window::new(DepthPolicy::MEASURED, Rc::default());
        window.enter(NBD_BYTES_IN_FLIGHT);
        window.enter(0);
        let mut room = pin!(window.room(1));
        assert!(room.as_mut().poll(&mut cx).is_pending());
        window.release(1, 0);
        assert!(room.as_mut().poll(&mut cx).is_pending());
        window.release(1, NBD_BYTES_IN_FLIGHT);
        assert!(room.as_mut().poll(&mut cx).is_ready());

        window.enter(NBD_BYTES_IN_FLIGHT);
        let mut room = pin!(window.room(1));
        assert!(room.as_mut().poll(&mut cx).is_pending());
        window.close();
        assert!(room.as_mut().poll(&mut cx).is_ready());
    }
    #[test]
    fn windows_share_a_budget_and_give_back_what_they_hold_when_they_go() {
        let mut cx = Context::from_waker(Waker::noop());
        let budget = Rc::<Budget>::default();
        let window = || Window::new(DepthPolicy::MEASURED, budget.clone());
        let (full, other) = (window(), window());
        full.enter(NBD_BYTES_IN_FLIGHT);
        other.enter(NBD_BYTES_IN_FLIGHT - 8192);
        assert!(other.has_room(8192));
        // One that has nothing may bring anything, and then nothing more that costs.
        let third = window();
        assert!(third.has_room(1 << 30));
        third.enter(4096);
        assert!(third.has_room(4096) && !third.has_room(4097) && !other.has_room(8192));
        third.enter(4096);
        assert!(third.has_room(0) && !third.has_room(1));
        let mut room = pin!(third.room(1));
        assert!(room.as_mut().poll(&mut cx).is_pending());
        drop(full);
        assert!(room.as_mut().poll(&mut cx).is_ready());
        drop(other);
        assert_eq!(budget.bytes.get(), 8192);
    }
}
