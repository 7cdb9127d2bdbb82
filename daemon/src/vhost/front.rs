//! One front-end as its queues and their requests see it: memory, agreed features, limits, and whether it is still there.
//!
//! Invariants: what a front-end has in flight is bounded in requests and in bytes, and what comes beyond stays in its queues
//! (I10); [`DepthCap`] bounds what of it is at the device at once. Once the front-end has been cut off, nothing that waits
//! starts, and what runs runs to its end and touches the guest's memory no more: its front-end may have given that to
//! something else. What of it was not answered stays marked in the inflight area, and is done again for whoever brings that.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use libvol::limits::{SECTOR_SIZE, VHOST_REQUESTS_IN_FLIGHT, VOLUME_BYTES_IN_FLIGHT};
use libvol::runtime::net::Stream;
use libvol::runtime::spawn;
use libvol::runtime::sync::{InFlight, Notify, Permits, Semaphore};

use super::channel::send_now;
use super::config::{RANGES_MAX, feature};
use super::memory::{DirtyLog, GuestMemory};
use super::message::config_has_changed;
use super::meter::Meter;
use super::queue::{CallPlace, Job};
use super::request::Rules;
use super::sessions::Member;
use super::{Export, SERIAL_BYTES};
use crate::depth::{DepthCap, DepthPolicy};
use crate::device::Device;
use crate::seldom::Seldom;

/// See the module's text.
pub(super) struct Front<D> {
    export: Export<D>,
    stream: Stream,
    meter: Rc<Meter>,
    phase: Cell<Phase>,
    changed: Notify,
    features: Cell<u64>,
    /// Queues that have been started.
    queues: Rc<InFlight>,
    memory: RefCell<Rc<GuestMemory>>,
    log: RefCell<Option<Rc<DirtyLog>>>,
    backend_channel: RefCell<Option<OwnedFd>>,
    /// Places for requests and for their bytes.
    requests: Rc<Semaphore>,
    bytes: Rc<Semaphore>,
    depth: RefCell<DepthCap>,
    /// Accepted requests that have not started.
    waiting: RefCell<VecDeque<Job<D>>>,
    /// Requests at the device.
    running: Cell<usize>,
    /// All accepted requests.
    in_flight: Rc<InFlight>,
    failures: Seldom,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Queues are not looked at any more.
    Draining,
    /// It has gone.
    Cut,
}

impl<D: Device> Front<D> {
    /// A front-end that has said nothing yet.
    pub(super) fn new(export: Export<D>, stream: Stream, meter: Rc<Meter>) -> Rc<Self> {
        Rc::new(Self {
            export,
            stream,
            meter,
            phase: Cell::new(Phase::Open),
            changed: Notify::default(),
            features: Cell::new(0),
            queues: Rc::default(),
            memory: RefCell::new(Rc::new(GuestMemory::empty())),
            log: RefCell::default(),
            backend_channel: RefCell::default(),
            requests: Semaphore::new(VHOST_REQUESTS_IN_FLIGHT),
            bytes: Semaphore::new(VOLUME_BYTES_IN_FLIGHT),
            depth: RefCell::new(DepthCap::new(DepthPolicy::of_process())),
            waiting: RefCell::default(),
            running: Cell::new(0),
            in_flight: Rc::default(),
            failures: Seldom::default(),
        })
    }

    /// What it costs the thread.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The volume.
    pub(super) fn device(&self) -> &D {
        &self.export.volume
    }

    /// `customer/name`, for people.
    pub(super) fn name(&self) -> &str {
        &self.export.name
    }

    /// Whether writes are refused.
    pub(super) fn read_only(&self) -> bool {
        self.export.read_only
    }

    /// What the device calls itself to the guest.
    pub(super) fn serial(&self) -> &[u8; SERIAL_BYTES] {
        &self.export.serial
    }

    /// Agreed device features.
    pub(super) fn features(&self) -> u64 {
        self.features.get()
    }

    /// The front-end has agreed to these.
    pub(super) fn agree(&self, features: u64) {
        self.features.set(features);
    }

    /// Counts its queues, from start to stop.
    pub(super) fn queues(&self) -> &Rc<InFlight> {
        &self.queues
    }

    /// Whether a write may be acknowledged before it is durable (VIRTIO 1.2, 5.2.6.2): never to a guest that cannot flush.
    pub(super) fn writes_back(&self) -> bool {
        let features = self.features.get();
        let may_be_set = features & feature::BLK_CONFIG_WCE != 0;
        features & feature::BLK_FLUSH != 0 && (!may_be_set || self.writeback())
    }

    /// What the cache's mode was set to.
    pub(super) fn writeback(&self) -> bool {
        self.export.writeback.get().unwrap_or(!self.export.moved)
    }

    /// Whoever owns the device starts it. A guest that has come here from elsewhere may have set what nobody has told: then it is through,
    /// which keeps either promise.
    pub(super) fn settle_writeback(&self, has_moved: bool) {
        let writeback = &self.export.writeback;
        writeback.set(writeback.get().or(Some(!has_moved && !self.export.moved)));
    }

    /// The cache's mode as the configuration space has it. Front-ends read that before they agree on anything, and then it
    /// is what was set; for a guest that may set it and cannot flush, it is through (VIRTIO 1.2, 5.2.5.2).
    pub(super) fn writeback_in_space(&self) -> bool {
        let settable = self.features.get() & feature::BLK_CONFIG_WCE != 0;
        self.writeback() && (!settable || self.writes_back())
    }

    /// The guest sets the cache's mode. It outlives resets, and front-ends: it is told once.
    pub(super) fn set_writeback(&self, on: bool) {
        self.export.writeback.set(Some(on));
    }

    /// What requests are judged by now. The volume may grow meanwhile.
    pub(super) fn rules(&self) -> Rules {
        let ranges = |bit| (self.features.get() & bit != 0).then_some(RANGES_MAX);
        Rules {
            capacity_sectors: self.device().size_bytes() / SECTOR_SIZE as u64,
            read_only: self.read_only(),
            discard: ranges(feature::BLK_DISCARD),
            write_zeroes: ranges(feature::BLK_WRITE_ZEROES),
        }
    }

    /// The guest's memory as it is now.
    pub(super) fn memory(&self) -> Rc<GuestMemory> {
        self.memory.borrow().clone()
    }

    /// It is another from now on; requests go on with that which they began with.
    pub(super) fn set_memory(&self, memory: GuestMemory) {
        let earlier = self.memory.replace(Rc::new(memory));
        drop(earlier);
    }

    /// Where written pages are noted, while they are.
    pub(super) fn log(&self) -> Option<Rc<DirtyLog>> {
        match self.features.get() & feature::LOG_ALL {
            0 => None,
            _ => self.log.borrow().clone(),
        }
    }

    /// Written pages are noted there from now on, when that is agreed on.
    pub(super) fn set_log(&self, log: Option<DirtyLog>) {
        let earlier = self.log.replace(log.map(Rc::new));
        drop(earlier);
    }

    /// Messages of the back-end go there; the one before comes back.
    pub(super) fn set_backend_channel(&self, socket: Option<OwnedFd>) -> Option<OwnedFd> {
        self.backend_channel.replace(socket)
    }

    /// Whether queues may be looked at.
    pub(super) fn is_open(&self) -> bool {
        self.phase.get() == Phase::Open
    }

    /// Whether it has gone: the guest's memory is not to be touched.
    pub(super) fn is_cut(&self) -> bool {
        self.phase.get() == Phase::Cut
    }

    /// The guest or its front-end has broken the device.
    pub(super) fn fail(&self, why: impl Display) {
        if self.is_cut() {
            return;
        }
        self.export.broken.say(|times| {
            tracing::warn!(
                volume = self.name(),
                times,
                "vhost-user: the device is disconnected: {why}"
            );
        });
        self.cut_off();
    }

    /// The guest has broken a ring. Whoever wants to know of its faults is told, once and before the end (vhost-user,
    /// VHOST_USER_SET_VRING_ERR); it cannot be waited for, nor helped, when that fails.
    pub(super) fn fail_ring(&self, faults: &CallPlace, why: impl Display) {
        if self.is_cut() {
            return;
        }
        if let Some(faults) = &*faults.borrow()
            && let Err(e) = self.meter.spend(|| faults.try_call())
        {
            tracing::debug!(volume = self.name(), "vhost-user: a fault cannot be told: {e}");
        }
        self.fail(why);
    }

    /// A request has failed at the volume; the guest gets an error.
    pub(super) fn note_failure(&self, what: &str, why: impl Display) {
        self.failures.say(|times| {
            tracing::warn!(
                volume = self.name(),
                failures = times,
                "vhost-user: {what} failed: {why}"
            );
        });
    }

    /// Nothing more is started or answered, and the socket is shut down.
    pub(super) fn cut_off(&self) {
        if self.phase.replace(Phase::Cut) == Phase::Cut {
            return;
        }
        let dropped = self.waiting.take();
        drop(dropped);
        self.meter.spend(|| self.stream.shutdown());
        self.changed.notify_all();
    }

    /// Waits until it has been cut off.
    pub(super) async fn cut(&self) {
        self.changed.until(|| self.is_cut().then_some(())).await;
    }

    /// Waits until no request is in flight.
    pub(super) async fn all_ended(&self) {
        self.in_flight.idle().await;
    }

    /// Places for a request that brings or takes so many bytes. Who asks first gets them first.
    pub(super) async fn places(&self, bytes: usize) -> (Permits, Permits) {
        let request = self.requests.acquire(1).await;
        let bytes = self.bytes.acquire(bytes.min(VOLUME_BYTES_IN_FLIGHT)).await;
        (request, bytes)
    }

    /// Counts a request from its acceptance to its end.
    pub(super) fn in_flight(&self) -> &Rc<InFlight> {
        &self.in_flight
    }

    /// Starts a request now, or when its turn comes.
    pub(super) fn admit(self: &Rc<Self>, job: Job<D>) {
        if self.is_cut() {
            return;
        }
        self.depth.borrow_mut().observe(self.in_flight.count());
        self.waiting.borrow_mut().push_back(job);
        self.start_waiting();
    }

    /// Requests of which that is so never start.
    pub(super) fn forget_waiting(&self, is_so: impl Fn(&Job<D>) -> bool) {
        let (dropped, kept): (VecDeque<_>, VecDeque<_>) = self.waiting.take().into_iter().partition(is_so);
        self.waiting.replace(kept);
        drop(dropped);
    }

    fn start_waiting(self: &Rc<Self>) {
        let cap = self.depth.borrow().cap();
        while self.running.get() < cap {
            let Some(job) = self.waiting.borrow_mut().pop_front() else {
                break;
            };
            self.running.set(self.running.get() + 1);
            let front = self.clone();
            spawn(async move {
                job.run().await;
                front.running.set(front.running.get() - 1);
                front.start_waiting();
            })
            .detach();
        }
    }
}

impl<D: Device> Member for Front<D> {
    fn drain(&self) {
        if self.phase.get() == Phase::Open {
            self.phase.set(Phase::Draining);
        }
    }

    fn in_flight(&self) -> Rc<InFlight> {
        self.in_flight.clone()
    }

    fn cut(&self) {
        self.cut_off();
    }

    fn has_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.socket(), PollFlags::RDHUP)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // A poll that fails tells nothing; the session itself will.
        self.is_cut() || poll(&mut fds, Some(&at_once)).is_ok_and(|found| found > 0)
    }

    fn configuration_changed(&self) {
        // Front-ends do not listen to a device that does not run. They are told when it does.
        if self.queues.count() == 0 {
            return;
        }
        let channel = self.backend_channel.borrow();
        let Some(channel) = &*channel else { return };
        let told = self
            .meter
            .spend(|| send_now(channel.as_fd(), &config_has_changed(), None));
        if let Err(end) = told {
            tracing::debug!(
                volume = self.name(),
                "vhost-user: the front-end is not told of a change: {end:?}"
            );
        }
    }
}
