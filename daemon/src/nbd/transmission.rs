//! Serves the requests of one connection.
//!
//! ```text
//! socket → inbox → Header → check → Request ─┬→ task at the device → outbox → one sender → socket
//!                                   refused ─┴──────────────────────↗
//! ```
//!
//! One reader parses everything that one receive brought; each request runs as a task of its own; replies gather
//! while tasks run and leave in one message. Invariants: the stream stays in step after every refusal; a failed
//! request never drops the connection; a request's place in the window is held until its reply has been sent;
//! [`Window::device_cap`] requests at most are at the device, the others wait in order; once the connection is cut,
//! nothing that waits starts, and what runs, runs to its end. A hang-up is noticed when it happens, also while the window
//! is full and nothing is received: from then on no sibling starts a request before this connection's have ended.
//!
//! A flush needs no special order: it covers writes that were replied to before it came, and those are complete.

mod replies;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use futures_util::future::{Either, select};

use libvol::crypto::seal::PlainBuf;
use libvol::error::{Error, Kind, Result};
use libvol::limits::{BLOCK_SIZE, NBD_PAYLOAD_MAX};
use libvol::runtime::{spawn, sync::Notify, timeout, yield_now};

use super::handshake::Negotiated;
use super::inbox::Inbox;
use super::link::Link;
use super::outbox::Outbox;
use super::proto::reply::BLOCK_STATUS_RUNS_MAX;
use super::proto::request::{Cookie, Header, Refusal, Request, Rules, STATUS_PAYLOAD_MAX, header_bytes};
use super::proto::{Contexts, Framing, WireError};
use super::session::{Member, Seat, hung_up};
use super::window::Window;
use crate::depth::DepthPolicy;
use crate::device::Device;

/// Small requests are received this many bytes at a time: 64 writes of 4 KiB.
const INBOX_BYTES: usize = 256 << 10;
/// After a write at least this long the next receive takes a header only, so that the payload after it can be
/// received where it is going to be sealed. Below, copying is cheaper than a system call more.
const BULK_BYTES: u32 = 64 << 10;
/// Bytes that BLOCK_STATUS looks at in one request.
const STATUS_BYTES_MAX: u64 = 256 << 30;
/// Trims, and zeros that may be holes, are carried out in pieces of this size: mostly records of extents change.
const PIECE_BYTES: u64 = 1 << 30;
/// Zeros that are written take the device's time.
const WRITTEN_PIECE_BYTES: u64 = NBD_PAYLOAD_MAX as u64;
/// A client that has said goodbye gets this long to take its last replies.
const FAREWELL: Duration = Duration::from_secs(10);

/// Serves until the client leaves or is cut off, then until the last of its requests has ended.
pub(super) async fn run<D: Device>(mut inbox: Inbox, negotiated: Negotiated<D>, seat: Seat) {
    let Negotiated {
        export,
        framing,
        contexts,
    } = negotiated;
    let connection = Rc::new(Connection {
        link: inbox.link().clone(),
        device: export.volume,
        name: export.name,
        read_only: export.read_only,
        framing,
        contexts,
        window: Window::new(DepthPolicy::of_process(), seat.budget()),
        outbox: Outbox::default(),
        waiting: RefCell::default(),
        running: Cell::new(0),
        receiving: Cell::new(true),
        cut: Cell::new(false),
        cut_off: Notify::default(),
        ended: RefCell::default(),
        seat,
    });
    // Whichever way this future ends, a connection without a reader starts nothing more.
    let cut_on_drop = CutOnDrop(connection.clone());
    let member: Rc<dyn Member> = connection.clone();
    connection.seat.introduce(Rc::downgrade(&member));
    drop(member);

    inbox.resize(INBOX_BYTES);
    let _watcher = spawn(watch_for_hang_up(connection.clone()));
    let sender = spawn(send_replies(connection.clone()));
    let end = connection.receive_requests(&mut inbox).await;
    drop(inbox);
    tracing::debug!(export = connection.name, "nbd: transmission ended: {end:?}");
    connection.stop_receiving();
    if end == End::Goodbye && timeout(FAREWELL, sender).await.is_none() {
        tracing::debug!(
            export = connection.name,
            "nbd: the client did not take its last replies"
        );
    }
    drop(cut_on_drop);
    connection.all_ended().await;
}

/// How a transmission ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client said so.
    Goodbye,
    /// It hung up, or was cut off.
    Lost,
    /// Its bytes cannot be followed.
    Violation(&'static str),
}

impl End {
    /// Of an error in the middle of a payload.
    fn of_payload(e: &io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::TimedOut => End::Violation("a payload that stopped coming"),
            _ => End::Lost,
        }
    }
}

struct Connection<D> {
    link: Link,
    device: D,
    name: String,
    read_only: bool,
    framing: Framing,
    contexts: Contexts,
    window: Window,
    outbox: Outbox,
    /// Accepted requests that have not started.
    waiting: RefCell<VecDeque<Job>>,
    /// Requests at the device.
    running: Cell<usize>,
    receiving: Cell<bool>,
    cut: Cell<bool>,
    cut_off: Notify,
    ended: RefCell<Option<Waker>>,
    seat: Seat,
}

/// An accepted request with what it needs.
struct Job {
    cookie: Cookie,
    cost_bytes: usize,
    request: Request,
    payload: Option<PlainBuf>,
}

struct CutOnDrop<D: Device>(Rc<Connection<D>>);

impl<D: Device> Drop for CutOnDrop<D> {
    fn drop(&mut self) {
        self.0.cut();
    }
}

impl<D: Device> Connection<D> {
    /// The reader.
    async fn receive_requests(self: &Rc<Self>, inbox: &mut Inbox) -> End {
        let mut bulk = false;
        loop {
            let needed = header_bytes(self.framing);
            let Some(bytes) = inbox.bytes().get(..needed) else {
                let at_most = if bulk {
                    needed - inbox.bytes().len()
                } else {
                    usize::MAX
                };
                match inbox.receive(at_most).await {
                    Ok(true) if !self.cut.get() => continue,
                    _ => return End::Lost,
                }
            };
            let Some(header) = Header::decode(self.framing, bytes) else {
                return End::Violation("not a request");
            };
            inbox.consume(needed);
            if header.is_disconnect() {
                return End::Goodbye;
            }
            if header.payload_len() > NBD_PAYLOAD_MAX.into() {
                return End::Violation("a payload of more than 32 MiB");
            }
            if let Err(end) = self.make_room(header.cost_bytes()).await {
                return end;
            }
            if let Err(end) = self.receive_request(inbox, header).await {
                return end;
            }
            bulk = header.payload_len() >= BULK_BYTES.into();
        }
    }

    async fn receive_request(self: &Rc<Self>, inbox: &mut Inbox, header: Header) -> Result<(), End> {
        let (cookie, cost_bytes) = (header.cookie, header.cost_bytes());
        let mut payload_len = header.payload_len() as usize;
        self.window.enter(cost_bytes);
        let judged = match header.has_contexts() && payload_len <= STATUS_PAYLOAD_MAX {
            false => header.check(&self.rules()),
            true => {
                let judged = self.receive_contexts(inbox, header, payload_len).await?;
                payload_len = 0;
                judged
            }
        };
        match judged {
            Err(refusal) => {
                match inbox.skip(payload_len).await {
                    Ok(true) => {}
                    Ok(false) => return Err(End::Lost),
                    Err(e) => return Err(End::of_payload(&e)),
                }
                self.reply_error(cookie, refusal.error, &refusal.text, cost_bytes);
            }
            Ok(request) if request.is_trivial() => self.reply_success(cookie, header.is_read(), cost_bytes),
            Ok(request) => {
                let payload = if payload_len == 0 {
                    None
                } else {
                    // Whole blocks, so that a sub-block write can be completed in place.
                    let buf = self.device.pool().get(payload_len.next_multiple_of(BLOCK_SIZE));
                    match inbox.receive_into(buf, payload_len).await {
                        Ok(Some(buf)) => Some(PlainBuf(buf)),
                        Ok(None) => return Err(End::Lost),
                        Err(e) => return Err(End::of_payload(&e)),
                    }
                };
                self.admit(Job {
                    cookie,
                    cost_bytes,
                    request,
                    payload,
                });
            }
        }
        Ok(())
    }

    /// A BLOCK_STATUS whose payload says what it is about.
    async fn receive_contexts(
        &self,
        inbox: &mut Inbox,
        header: Header,
        payload_len: usize,
    ) -> Result<Result<Request, Refusal>, End> {
        match inbox.fill_payload(payload_len).await {
            Ok(true) => {}
            Ok(false) => return Err(End::Lost),
            Err(e) => return Err(End::of_payload(&e)),
        }
        let rules = self.rules();
        let header = header.with_contexts(&inbox.bytes()[..payload_len], &rules);
        inbox.consume(payload_len);
        Ok(header.and_then(|header| header.check(&rules)))
    }

    fn rules(&self) -> Rules {
        Rules {
            size_bytes: self.device.size_bytes(),
            read_only: self.read_only,
            contexts: self.contexts,
            draining: self.seat.draining(),
        }
    }

    /// Back-pressure: while the window is full nothing is received.
    async fn make_room(&self, cost_bytes: usize) -> Result<(), End> {
        if !self.window.has_room(cost_bytes) {
            self.window.room(cost_bytes).await;
            // What the client sent may have lain in the socket for long. If it has hung up meanwhile, it may have
            // sent newer writes over another connection, and these are too late.
            if hung_up(std::iter::once(self.link.stream())).contains(&true) {
                return Err(End::Lost);
            }
        }
        if self.cut.get() { Err(End::Lost) } else { Ok(()) }
    }

    /// Starts the request now or when its turn comes.
    fn admit(self: &Rc<Self>, job: Job) {
        if self.cut.get() {
            return;
        }
        self.waiting.borrow_mut().push_back(job);
        self.start_waiting();
    }

    fn start_waiting(self: &Rc<Self>) {
        let cap = self.window.device_cap();
        while self.running.get() < cap && self.seat.may_start() {
            let Some(job) = self.waiting.borrow_mut().pop_front() else {
                break;
            };
            self.running.set(self.running.get() + 1);
            spawn(serve_request(self.clone(), job)).detach();
        }
    }

    /// It was about to start, and a sibling has gone meanwhile.
    fn put_back(&self, job: Job) {
        self.waiting.borrow_mut().push_front(job);
        self.running.set(self.running.get() - 1);
    }

    /// A request has left the device.
    fn finished(self: &Rc<Self>) {
        self.running.set(self.running.get() - 1);
        self.start_waiting();
        self.settle();
    }

    /// The client has gone, or has nothing more to ask.
    fn stop_receiving(&self) {
        if self.receiving.replace(false) {
            self.seat.leave();
        }
        self.settle();
    }

    /// What happens when the reader has ended and no request is left.
    fn settle(&self) {
        if self.running.get() > 0 || !self.waiting.borrow().is_empty() {
            return;
        }
        if !self.receiving.get() {
            self.outbox.close();
            self.seat.left();
        }
        let waker = self.ended.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn all_ended(&self) {
        poll_fn(|cx| {
            if self.running.get() == 0 {
                return Poll::Ready(());
            }
            *self.ended.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn perform(&self, job: Job) {
        let Job {
            cookie,
            cost_bytes,
            request,
            payload,
        } = job;
        let done = match request {
            Request::Read {
                offset,
                len,
                unfragmented,
            } => match self.device.read(offset, len).await {
                Ok(parts) => return self.reply_data(cookie, offset, len, unfragmented, parts, cost_bytes),
                Err(e) => Err(e),
            },
            Request::Write { offset, len, fua } => {
                let payload = payload.expect("received with its request");
                self.device.write(offset, payload, len, fua).await
            }
            Request::Flush => self.device.flush().await,
            Request::Trim { offset, len, fua } => {
                self.in_pieces(offset, len, PIECE_BYTES, async |at, piece, last| {
                    self.device.trim(at, piece, fua && last).await
                })
                .await
            }
            Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
            } => {
                let at_most = if no_hole { WRITTEN_PIECE_BYTES } else { PIECE_BYTES };
                self.in_pieces(offset, len, at_most, async |at, piece, last| {
                    self.device.write_zeroes(at, piece, fua && last, no_hole).await
                })
                .await
            }
            Request::BlockStatus {
                offset,
                len,
                one,
                contexts,
            } => {
                let max_runs = if one { 1 } else { BLOCK_STATUS_RUNS_MAX };
                // An answer about less than was asked is one.
                let len = len.min(STATUS_BYTES_MAX);
                match self
                    .unless_cut(self.device.block_status(offset, len, max_runs))
                    .await
                {
                    Ok(runs) => return self.reply_block_status(cookie, contexts, len, runs, cost_bytes),
                    Err(e) => Err(e),
                }
            }
            Request::Cache => Ok(()),
        };
        match done {
            Ok(()) => self.reply_success(cookie, false, cost_bytes),
            // Nobody is there to hear of it.
            Err(_) if self.cut.get() => {}
            Err(e) => {
                let error = self.log_failure(&request, &e);
                self.reply_error(cookie, error, error.public_text(), cost_bytes);
            }
        }
    }

    /// Carries out what may cover the whole device, piece by piece. The last piece is told that it is.
    async fn in_pieces(
        &self,
        offset: u64,
        len: u64,
        at_most: u64,
        carry_out: impl AsyncFn(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let end = offset + len;
        for (at, piece) in pieces(offset, len, at_most) {
            carry_out(at, piece, at + piece == end).await?;
            self.between_pieces().await?;
        }
        Ok(())
    }

    /// What `work` gives, unless the connection is cut before that. Only for what changes nothing: it is dropped then.
    async fn unless_cut<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let cut = self.cut_off.until(|| self.cut.get().then_some(()));
        match select(pin!(work), pin!(cut)).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => Err(Error::unavailable("the connection was cut")),
        }
    }

    /// Whoever cuts the connection waits for a piece, and not for the rest; so do other requests.
    async fn between_pieces(&self) -> Result<()> {
        yield_now().await;
        match self.cut.get() {
            true => Err(Error::unavailable("the connection was cut")),
            false => Ok(()),
        }
    }

    fn log_failure(&self, request: &Request, e: &Error) -> WireError {
        self.seat.failures().say(|failures| {
            tracing::warn!(
                export = self.name,
                failures,
                "nbd: {} failed: {e}",
                request.name()
            );
        });
        if e.kind() == Kind::Unavailable && self.seat.draining() {
            return WireError::Shutdown;
        }
        WireError::of(e.kind())
    }
}

impl<D: Device> Member for Connection<D> {
    fn cut(&self) {
        if self.cut.replace(true) {
            return;
        }
        let dropped = self.waiting.take();
        drop(dropped);
        self.cut_off.notify_all();
        self.window.close();
        self.outbox.discard();
        self.link.shutdown();
        self.stop_receiving();
    }

    fn hung_up(&self) {
        if self.receiving.get() {
            self.seat.leave();
        }
        self.window.close();
    }

    fn resume(self: Rc<Self>) {
        self.start_waiting();
    }

    fn is_idle(&self) -> bool {
        self.window.requests() == 0 || self.cut.get()
    }
}

async fn serve_request<D: Device>(connection: Rc<Connection<D>>, job: Job) {
    // Between spawn and now: cut, so it does not start, or a sibling has gone, so it waits.
    if !connection.cut.get() {
        if !connection.seat.may_start() {
            return connection.put_back(job);
        }
        connection.perform(job).await;
    }
    connection.finished();
}

/// Waits for the hang-up beside the reader, which may be waiting for room, or have much to receive before the end.
async fn watch_for_hang_up<D: Device>(connection: Rc<Connection<D>>) {
    connection.link.hung_up().await;
    connection.hung_up();
}

/// The sender.
async fn send_replies<D: Device>(connection: Rc<Connection<D>>) {
    while let Some(parts) = connection.outbox.next_batch().await {
        let count = parts.len();
        if let Err(e) = connection.link.send(parts).await {
            tracing::debug!(export = connection.name, "nbd: replies cannot be sent: {e}");
            connection.cut();
            return;
        }
        if connection.cut.get() {
            return;
        }
        let sent = connection.outbox.sent(count);
        connection.window.release(sent.replies, sent.cost_bytes);
        connection.seat.note_progress();
    }
}

/// A range in pieces of at most `at_most` bytes, cut where that divides the device, so that whole extents, whose size divides
/// it too, stay whole.
fn pieces(offset: u64, len: u64, at_most: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = (at_most - at % at_most).min(end - at);
        at += piece;
        (piece > 0).then_some((at - piece, piece))
    })
}
