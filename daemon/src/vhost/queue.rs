//! One started queue: from a kick to requests at the device, and back to used entries and a call.
//!
//! ```text
//! kick → ring → chain → request ─┬→ job, in order → task at the device → memory → used ring → one call for many
//!                        refused ─┴────────────────────────────────────────────↗
//! ```
//!
//! A queue is looked at when it starts, whether or not somebody kicks: what a guest asked an earlier back-end is still there.
//! Heads that one left in flight come first, in the order in which they were taken. Invariants: a head is marked in the
//! inflight area before anything is done for it, and unmarked only after its used entry is in the ring; a queue that stops
//! has given back every head that it took. A fault of the guest's memory or rings cuts its front-end off, and nothing else.
//!
//! One that is suspended stops at once, and leaves heads marked, for whoever brings the area to do again. From then on nothing of them
//! touches the guest's memory, the ring or the area. What is at the device already cannot be called back: it is carried out, and
//! counts as in flight until it has been, so whoever does it again waits for that (I3). Doing it twice is then as after a crash: the
//! guest has seen no end of the request, so it may be carried out at any time until it does, and nothing newer of the guest's can
//! have come after it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;

use libvol::buf::Buf;
use libvol::crypto::seal::PlainBuf;
use libvol::error::{Error, Result};
use libvol::limits::{BLOCK_SIZE, VHOST_PIECE_BYTES_MAX};
use libvol::runtime::sync::{InFlight, InFlightGuard, Notify, Permits};
use libvol::runtime::{Task, sleep, spawn, yield_now};
use libvol::volume::PlainPart;

use super::config::feature;
use super::fault::{BadMemory, Fault};
use super::front::Front;
use super::inflight::InflightArea;
use super::memory::GuestMemory;
use super::notify::{Call, Kick};
use super::request::{BlockRequest, Kind, Parsed, STATUS_IOERR, STATUS_OK};
use super::ring::{Ring, RingAddresses};
use crate::device::Device;

/// Heads taken before other tasks get a turn.
const HEADS_A_TURN: usize = 32;
/// Parts of chains, likewise: a chain has up to 2,047.
const PARTS_A_TURN: usize = 512;

/// After so many kicks for nothing, the next one is not looked for at once: an eventfd can be made so that it never is quiet.
const IN_VAIN_MAX: usize = 64;
/// But after this.
const IN_VAIN_PAUSE: Duration = Duration::from_millis(1);

/// Why a front-end is not borne any longer; see [`super::meter`].
pub(super) const TOO_SLOW: &str = "to read its kicks, to call it and to answer it takes too long";

/// Bytes copied for a request before other tasks get a turn: some hundred microseconds.
const BYTES_A_TURN: usize = 1 << 20;

/// Where a queue calls, or tells of its faults; it is replaced while the queue runs.
pub(super) type CallPlace = Rc<RefCell<Option<Call>>>;

/// What a queue is started with.
pub(super) struct Setup {
    /// Entries.
    pub(super) size: u16,
    /// Where it is.
    pub(super) addresses: RingAddresses,
    /// The available entry to go on at, unless the inflight area knows better.
    pub(super) base: u16,
    /// Its part of the inflight area.
    pub(super) area: Option<InflightArea>,
    /// Where it is kicked.
    pub(super) kick: Kick,
    /// Where it calls.
    pub(super) call: CallPlace,
    /// Where it tells that it is broken.
    pub(super) faults: CallPlace,
}

/// A queue that has been started.
pub(super) struct Started<D> {
    queue: Rc<Queue<D>>,
    worker: Task<()>,
    _counted: InFlightGuard,
}

struct Queue<D> {
    front: Rc<Front<D>>,
    ring: RefCell<Ring>,
    area: RefCell<Option<InflightArea>>,
    /// Heads that an earlier back-end left.
    left: RefCell<VecDeque<u16>>,
    call: CallPlace,
    faults: CallPlace,
    call_is_due: Cell<bool>,
    enabled: Cell<bool>,
    stopping: Cell<bool>,
    /// Heads that are in flight stay so.
    suspended: Cell<bool>,
    /// Raised when there is something new to the worker, apart from kicks.
    news: Cell<u64>,
    changed: Notify,
    in_flight: Rc<InFlight>,
}

impl<D: Device> Started<D> {
    /// Starts a queue, enabled.
    ///
    /// # Errors
    /// Its setup, its memory or its inflight area cannot be used.
    pub(super) fn new(front: &Rc<Front<D>>, setup: Setup) -> Result<Self, BadMemory> {
        let Setup {
            size,
            addresses,
            base,
            mut area,
            kick,
            call,
            faults,
        } = setup;
        let memory = front.memory();
        let event_idx = front.features() & feature::RING_EVENT_IDX != 0;
        let mut ring = Ring::new(size, addresses, base, event_idx, &memory)?;
        let mut left = Vec::new();
        if let Some(area) = &mut area {
            // An area may be for more than the guest has chosen: front-ends ask for it before they know. What a larger queue
            // left in it, the ring refuses.
            if area.size() < size {
                return Err(BadMemory::Refused("an inflight area for smaller queues"));
            }
            left = area.recover(ring.used_index())?;
            ring.resume(&left)?;
        }
        if !left.is_empty() {
            tracing::debug!(
                volume = front.name(),
                "vhost-user: {} requests are done again",
                left.len()
            );
        }
        let queue = Rc::new(Queue {
            front: front.clone(),
            ring: RefCell::new(ring),
            area: RefCell::new(area),
            left: RefCell::new(left.into()),
            call,
            faults,
            call_is_due: Cell::new(false),
            enabled: Cell::new(true),
            stopping: Cell::new(false),
            suspended: Cell::new(false),
            news: Cell::new(0),
            changed: Notify::default(),
            in_flight: Rc::default(),
        });
        // What an earlier back-end gave back, it may not have called for.
        queue.call_soon();
        let worker = spawn(queue.clone().work(kick));
        Ok(Self {
            queue,
            worker,
            _counted: front.queues().enter(),
        })
    }

    /// It is looked at.
    pub(super) fn enable(&self) {
        self.queue.enabled.set(true);
        self.queue.tell();
    }

    /// It is not looked at any more; what it took is still given back.
    pub(super) fn pause(&self) {
        self.queue.enabled.set(false);
        self.queue.tell();
    }

    /// The same. Waits until what it took has been given back, or its front-end has gone.
    pub(super) async fn disable(&self) {
        self.pause();
        select(pin!(self.queue.in_flight.idle()), pin!(self.queue.front.cut())).await;
        self.queue.call_now();
    }

    /// Writes to the used ring are logged there from now on, or not any more.
    pub(super) fn log_used_at(&self, at: Option<u64>) {
        self.queue.ring.borrow_mut().log_used_at(at);
    }

    /// Stops it: takes nothing more, and waits until what it took has been given back, or its front-end has gone. Gives where
    /// it stands, and its part of the inflight area.
    pub(super) async fn stop(self) -> (u16, Option<InflightArea>) {
        let queue = self.queue;
        queue.stopping.set(true);
        queue.tell();
        let ended = async {
            self.worker.await;
            queue.in_flight.idle().await;
        };
        select(pin!(ended), pin!(queue.front.cut())).await;
        queue.call_now();
        let base = queue.ring.borrow().base();
        (base, queue.area.take())
    }

    /// Whether there is a place where what is in flight can be left.
    pub(super) fn can_suspend(&self) -> bool {
        self.queue.area.borrow().is_some()
    }

    /// Stops it at once, with what is in flight left to whoever brings the area. Gives where it stands, its part of the area, and what
    /// counts the requests that are still at the device.
    pub(super) fn suspend(self) -> (u16, Option<InflightArea>, Rc<InFlight>) {
        let queue = self.queue;
        queue.suspended.set(true);
        queue.stopping.set(true);
        drop(self.worker);
        queue.front.forget_waiting(|job| Rc::ptr_eq(&job.queue, &queue));
        queue.call_now();
        let base = queue.ring.borrow().base();
        (base, queue.area.take(), queue.in_flight.clone())
    }
}

impl<D: Device> Queue<D> {
    fn tell(&self) {
        self.news.set(self.news.get() + 1);
        self.changed.notify_all();
    }

    fn may_take(&self) -> bool {
        self.enabled.get() && !self.stopping.get() && self.front.is_open()
    }

    async fn work(self: Rc<Self>, kick: Kick) {
        let mut in_vain = 0;
        loop {
            let news = self.news.get();
            match self.take_available().await {
                Err(fault) => return self.front.fail_ring(&self.faults, fault),
                Ok(0) => in_vain += 1,
                Ok(_) => in_vain = 0,
            }
            if self.stopping.get() || self.front.is_cut() {
                return;
            }
            let told = self.changed.until(|| (self.news.get() != news).then_some(()));
            let kicked = async {
                if in_vain >= IN_VAIN_MAX {
                    sleep(IN_VAIN_PAUSE).await;
                }
                kick.wait(self.front.meter()).await;
            };
            select(pin!(kicked), told).await;
            if !self.front.meter().is_bearable() {
                return self.front.fail(TOO_SLOW);
            }
        }
    }

    /// Takes what there is, and has the guest kick for more. Gives how many there were.
    async fn take_available(self: &Rc<Self>) -> Result<usize, Fault> {
        let mut taken: usize = 0;
        let mut parts = 0;
        loop {
            let memory = self.front.memory();
            // A queue that stops says where it stands, and those are behind it.
            let takes_left = self.may_take() || (self.stopping.get() && !self.front.is_cut());
            let left = match takes_left {
                true => self.left.borrow_mut().pop_front(),
                false => None,
            };
            if let Some(head) = left {
                parts += self.take(head, &memory).await?;
            } else if !self.may_take() {
                break;
            } else {
                let next = self.ring.borrow_mut().next(&memory)?;
                let Some(head) = next else {
                    let log = self.front.log();
                    match self.ring.borrow_mut().ask_for_kicks(&memory, log.as_deref())? {
                        true => continue,
                        false => break,
                    }
                };
                if taken == 0 {
                    let log = self.front.log();
                    self.ring.borrow_mut().refuse_kicks(&memory, log.as_deref())?;
                }
                if let Some(area) = &mut *self.area.borrow_mut() {
                    area.started(head)?;
                }
                parts += self.take(head, &memory).await?;
            }
            taken += 1;
            if taken.is_multiple_of(HEADS_A_TURN) || parts >= PARTS_A_TURN {
                parts = 0;
                yield_now().await;
            }
        }
        Ok(taken)
    }

    /// A head that is marked as in flight. Gives how many parts its chain may have.
    async fn take(self: &Rc<Self>, head: u16, memory: &Rc<GuestMemory>) -> Result<usize, Fault> {
        let parsed = Parsed::read(memory, &self.ring.borrow(), head, &self.front.rules())?;
        match parsed {
            Parsed::Refused(refusal) => {
                let len = refusal.finish(memory, self.front.log().as_deref())?;
                self.give_back(head, len)?;
                Ok(PARTS_A_TURN)
            }
            Parsed::Request(request) => {
                // Counted before it waits, so that a queue that stops waits for it.
                let counted = [self.in_flight.enter(), self.front.in_flight().enter()];
                let parts = request.parts();
                let at_once = u64::from(request.data_len()).min(VHOST_PIECE_BYTES_MAX);
                let places = self.front.places(at_once as usize).await;
                self.front.admit(Job {
                    queue: self.clone(),
                    request,
                    memory: memory.clone(),
                    _places: places,
                    _counted: counted,
                });
                Ok(parts)
            }
        }
    }

    /// Puts a head into the used ring, and calls soon.
    fn give_back(self: &Rc<Self>, head: u16, len: u32) -> Result<(), Fault> {
        let (memory, log) = (self.front.memory(), self.front.log());
        let (area, mut ring) = (self.area.borrow(), self.ring.borrow_mut());
        if let Some(area) = &*area {
            area.about_to_use(head)?;
        }
        ring.push_used(&memory, log.as_deref(), head, len)?;
        if log.is_some_and(|log| log.is_broken()) {
            return Err(Fault::Gone);
        }
        if let Some(area) = &*area {
            area.used(head, ring.used_index())?;
        }
        drop((area, ring));
        self.call_soon();
        Ok(())
    }

    /// Calls after what is ready to run now: it may give back more.
    fn call_soon(self: &Rc<Self>) {
        if self.call_is_due.replace(true) {
            return;
        }
        let queue = self.clone();
        spawn(async move { queue.call_now() }).detach();
    }

    fn call_now(&self) {
        if !self.call_is_due.replace(false) || self.front.is_cut() {
            return;
        }
        let wanted = self.ring.borrow_mut().wants_call(&self.front.memory());
        match wanted {
            Ok(false) => {}
            // Without one the guest looks by itself.
            Ok(true) => {
                if let Some(call) = &*self.call.borrow() {
                    self.front.meter().spend(|| call.call());
                }
                if !self.front.meter().is_bearable() {
                    self.front.fail(TOO_SLOW);
                }
            }
            Err(fault) => self.front.fail_ring(&self.faults, fault),
        }
    }
}

/// An accepted request with what it needs.
pub(super) struct Job<D> {
    queue: Rc<Queue<D>>,
    request: BlockRequest,
    memory: Rc<GuestMemory>,
    _places: (Permits, Permits),
    _counted: [InFlightGuard; 2],
}

/// What a read that finds nothing gives.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl<D: Device> Job<D> {
    /// Whether nobody waits for it: its front-end has gone, or its queue is suspended.
    fn is_off(&self) -> bool {
        self.queue.suspended.get() || self.queue.front.is_cut()
    }

    /// Carries it out and answers it, unless its front-end goes before, or leaves it.
    pub(super) async fn run(self) {
        let front = &self.queue.front;
        if self.is_off() {
            return;
        }
        let performed = self.perform().await;
        if self.is_off() {
            return;
        }
        if let Err(fault) = performed.and_then(|status| self.answer(status)) {
            front.fail_ring(&self.queue.faults, fault);
        }
    }

    fn answer(&self, status: u8) -> Result<(), Fault> {
        let log = self.queue.front.log();
        let len = self.request.finish(&self.memory, log.as_deref(), status)?;
        self.queue.give_back(self.request.head, len)
    }

    /// Gives its status.
    async fn perform(&self) -> Result<u8, Fault> {
        let front = &self.queue.front;
        let device = front.device();
        let fua = !front.writes_back();
        let (what, done) = match &self.request.kind {
            Kind::Read { offset, len } => {
                let mut done = Ok(());
                for (at, len) in pieces(*len) {
                    match device.read(*offset + u64::from(at), len).await {
                        Ok(_) if self.is_off() => return Ok(STATUS_IOERR),
                        Ok(parts) => {
                            self.bring(at as usize, &parts).await?;
                            if self.is_off() {
                                return Ok(STATUS_IOERR);
                            }
                        }
                        Err(e) => {
                            done = Err(e);
                            break;
                        }
                    }
                }
                ("read", done)
            }
            Kind::Write { offset, len } => {
                let mut done = Ok(());
                for (at, len) in pieces(*len) {
                    let Some(buf) = self.fetch(at as usize, len as usize).await? else {
                        return Ok(STATUS_IOERR);
                    };
                    done = device
                        .write(*offset + u64::from(at), PlainBuf(buf), len, fua)
                        .await;
                    if done.is_err() {
                        break;
                    }
                }
                ("write", done)
            }
            Kind::Flush => ("flush", device.flush().await),
            Kind::Discard { ranges } => {
                let trim =
                    async |&(offset, len): &(u64, u64), last| device.trim(offset, len, fua && last).await;
                ("discard", self.each(ranges, trim).await)
            }
            Kind::WriteZeroes { ranges } => {
                let zero = async |&(offset, len, may_unmap): &(u64, u64, bool), last| {
                    device.write_zeroes(offset, len, fua && last, !may_unmap).await
                };
                ("write-zeroes", self.each(ranges, zero).await)
            }
            Kind::GetId { len } => {
                let serial = &front.serial()[..*len as usize];
                self.request
                    .scatter(&self.memory, front.log().as_deref(), 0, serial)?;
                ("identification", Ok(()))
            }
        };
        Ok(match done {
            Ok(()) => STATUS_OK,
            Err(_) if self.is_off() => STATUS_IOERR,
            Err(e) => {
                front.note_failure(what, e);
                STATUS_IOERR
            }
        })
    }

    /// Carries out one range after the other: whoever cuts the session waits for one, and not for the rest. The last is told
    /// that it is.
    async fn each<R>(&self, ranges: &[R], carry_out: impl AsyncFn(&R, bool) -> Result<()>) -> Result<()> {
        for (index, range) in ranges.iter().enumerate() {
            if self.is_off() {
                return Err(Error::unavailable("the front-end has gone"));
            }
            carry_out(range, index + 1 == ranges.len()).await?;
            yield_now().await;
        }
        Ok(())
    }

    /// Copies a piece of what is to be written out of the guest, with turns for others in between; nothing when nobody
    /// waits for it any more.
    async fn fetch(&self, at: usize, len: usize) -> Result<Option<Buf>, Fault> {
        let front = &self.queue.front;
        // Whole blocks, so that a sub-block write can be completed in place.
        let mut buf = front.device().pool().get(len.next_multiple_of(BLOCK_SIZE));
        for from in (0..len).step_by(BYTES_A_TURN) {
            if at + from > 0 {
                yield_now().await;
                if self.is_off() {
                    return Ok(None);
                }
            }
            let to = len.min(from + BYTES_A_TURN);
            self.request
                .gather_from(&self.memory, at + from, &mut buf[from..to])?;
        }
        Ok(Some(buf))
    }

    /// Copies what was read to the guest, to the `at`th place of the answer, with turns for others in between.
    async fn bring(&self, mut at: usize, parts: &[PlainPart]) -> Result<(), Fault> {
        let front = &self.queue.front;
        let mut in_turn = 0;
        for part in parts {
            let mut left = part_len(part);
            while left > 0 && !self.is_off() {
                let log = front.log();
                let here = match part {
                    PlainPart::Data(buf, range) => {
                        let here = left.min(BYTES_A_TURN);
                        let from = range.end - left;
                        self.request
                            .scatter(&self.memory, log.as_deref(), at, &buf.0[from..from + here])?;
                        here
                    }
                    PlainPart::Zeros(_) => {
                        let here = left.min(ZEROS.len());
                        self.request
                            .scatter(&self.memory, log.as_deref(), at, &ZEROS[..here])?;
                        here
                    }
                };
                (at, left, in_turn) = (at + here, left - here, in_turn + here);
                if in_turn >= BYTES_A_TURN {
                    in_turn = 0;
                    yield_now().await;
                }
            }
        }
        Ok(())
    }
}

/// A request's data as it is read or written: offset and length of each piece. Others' requests come in between.
fn pieces(len: u32) -> impl Iterator<Item = (u32, u32)> {
    const PIECE: u32 = VHOST_PIECE_BYTES_MAX as u32;
    (0..len)
        .step_by(PIECE as usize)
        .map(move |at| (at, PIECE.min(len - at)))
}

fn part_len(part: &PlainPart) -> usize {
    match part {
        PlainPart::Data(_, range) => range.len(),
        PlainPart::Zeros(len) => *len,
    }
}
