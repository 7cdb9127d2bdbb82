//! How much one connection may have in flight, and how much all of an attachment may together.
//!
//! Two limits, for two reasons. Requests and payload bytes between being received and having their reply sent are
//! bounded, so that a client that sends without reading costs bounded memory: at the limit nothing is received. Bytes are
//! bounded twice, for the connection and, by the shared [`Budget`], for the attachment; a connection that has nothing in
//! flight may bring one request whatever the others have. So nobody starves, and the sum is bounded too
//! ([`VOLUME_BYTES_IN_FLIGHT`] has the arithmetic).
//!
//! Requests at the device are capped below the depth the client works at, so that while the device works on some,
//! others are being received, sealed or answered; with all of them at the device at once, device and client take
//! turns idling.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::OnceLock;

use libvol::limits::{NBD_BYTES_IN_FLIGHT, NBD_REQUESTS_IN_FLIGHT, VOLUME_BYTES_IN_FLIGHT};
use libvol::runtime::sync::Notify;

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

/// How far below the client's depth the device's is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DepthPolicy {
    /// The share, as numerator and denominator; `None` turns the cap off.
    pub(super) share: Option<(usize, usize)>,
    /// Below this depth there is no cap: too little to overlap.
    pub(super) from_depth: usize,
}

impl DepthPolicy {
    /// Two thirds, measured best of 1/2, 2/3 and none with fio at depth 32 on two cores.
    pub(super) const MEASURED: Self = Self {
        share: Some((2, 3)),
        from_depth: 4,
    };

    /// The policy of this process: [`Self::MEASURED`], unless `VOLD_NBD_DEPTH_CAP` says `off` or another share
    /// (`3/4`), for measurements.
    pub(super) fn of_process() -> Self {
        static POLICY: OnceLock<DepthPolicy> = OnceLock::new();
        *POLICY.get_or_init(|| {
            let set = std::env::var("VOLD_NBD_DEPTH_CAP").unwrap_or_default();
            if set.is_empty() {
                return Self::MEASURED;
            }
            Self::parse(&set).unwrap_or_else(|| {
                tracing::warn!(
                    "VOLD_NBD_DEPTH_CAP={set:?} is neither \"off\" nor a share like \"2/3\"; ignored"
                );
                Self::MEASURED
            })
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let share = if text == "off" {
            None
        } else {
            let (numerator, denominator) = text.split_once('/')?;
            let (numerator, denominator) = (numerator.parse().ok()?, denominator.parse().ok()?);
            (1 <= numerator && numerator <= denominator && denominator <= 1000).then_some(())?;
            Some((numerator, denominator))
        };
        Some(Self {
            share,
            ..Self::MEASURED
        })
    }
}

/// Follows the depth a client works at: the greatest number of unanswered requests, over this and the last period.
pub(super) struct DepthCap {
    policy: DepthPolicy,
    greatest: usize,
    greatest_before: usize,
    observed: u32,
}

impl DepthCap {
    /// Requests of one period: long enough to see a client's full depth, short enough to forget it soon.
    const PERIOD: u32 = 128;

    /// No depth seen yet.
    pub(super) fn new(policy: DepthPolicy) -> Self {
        Self {
            policy,
            greatest: 0,
            greatest_before: 0,
            observed: 0,
        }
    }

    /// A request came in, and with it `depth` are unanswered.
    pub(super) fn observe(&mut self, depth: usize) {
        self.greatest = self.greatest.max(depth);
        self.observed += 1;
        if self.observed == Self::PERIOD {
            self.greatest_before = self.greatest;
            self.greatest = depth;
            self.observed = 0;
        }
    }

    /// Requests the device may work on at once.
    pub(super) fn cap(&self) -> usize {
        let depth = self.greatest.max(self.greatest_before);
        match self.policy.share {
            Some((numerator, denominator)) if depth >= self.policy.from_depth => {
                (depth * numerator).div_ceil(denominator).max(1)
            }
            _ => usize::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn cap_after(depths: impl IntoIterator<Item = usize>) -> usize {
        let mut cap = DepthCap::new(DepthPolicy::MEASURED);
        depths.into_iter().for_each(|depth| cap.observe(depth));
        cap.cap()
    }

    #[test]
    fn the_cap_is_two_thirds_of_the_greatest_depth_rounded_up() {
        for (depth, cap) in [(4, 3), (5, 4), (6, 4), (8, 6), (32, 22), (64, 43), (256, 171)] {
            assert_eq!(cap_after(1..=depth), cap, "depth {depth}");
        }
    }

    #[test]
    fn shallow_clients_are_not_capped() {
        assert_eq!(cap_after([]), usize::MAX);
        assert_eq!(cap_after([1, 2, 3, 3, 2, 1]), usize::MAX);
    }

    #[test]
    fn a_dip_does_not_lower_the_cap_and_a_lasting_change_does() {
        let period = DepthCap::PERIOD as usize;
        let deep = || std::iter::repeat_n(32, period);
        assert_eq!(cap_after(deep().chain(std::iter::repeat_n(2, period - 1))), 22);
        assert_eq!(cap_after(deep().chain(std::iter::repeat_n(8, 3 * period))), 6);
        // A depth that returns once a period is kept.
        let returning = (0..5 * period).map(|i| if i % period == 7 { 32 } else { 3 });
        assert_eq!(cap_after(returning), 22);
    }

    #[test]
    fn the_share_can_be_set_or_turned_off() {
        let share = |text| DepthPolicy::parse(text).map(|policy| policy.share);
        assert_eq!(share("off"), Some(None));
        assert_eq!(share("1/2"), Some(Some((1, 2))));
        for wrong in ["", "on", "3/2", "0/1", "1/0", "2", "-1/2", "1/2/3"] {
            assert_eq!(share(wrong), None, "{wrong:?}");
        }
        let mut off = DepthCap::new(DepthPolicy::parse("off").unwrap());
        off.observe(200);
        assert_eq!(off.cap(), usize::MAX);
    }

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
