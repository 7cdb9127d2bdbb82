//! The front-ends of one attachment: one at a time.
//!
//! Invariants: a front-end is served only after every request of the one before has ended, so no write of a lost connection
//! lands after a newer one (I3); while one is there, another is turned away; after [`Sessions::end_all`] has begun nothing
//! new is served, and when it returns no request runs. One that comes while the last is on its way out waits, and there is
//! place for one.
//!
//! Front-ends of an attachment that is to succeed another may describe their device, and start it when the other has ended.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use libvol::Result;
use libvol::runtime::net::{Listener, Stream};
use libvol::runtime::sync::{InFlight, Notify};
use libvol::runtime::{spawn, timeout, yield_now};

use super::mapping::Account;
use super::meter::Meter;
use crate::leavings::{Incoming, Leavings};

/// A front-end that is served.
pub(super) trait Member {
    /// Its queues are not looked at any more.
    fn drain(&self);
    /// Its accepted requests.
    fn in_flight(&self) -> Rc<InFlight>;
    /// Ends the conversation.
    fn cut(&self);
    /// Whether it has hung up.
    fn has_gone(&self) -> bool;
    /// The configuration space is another. One whose device does not run is told when it does.
    fn configuration_changed(&self);
}

/// Takes the volume over from the attachment that has it. When it is done, nothing of that is in flight.
pub(crate) type Takeover = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<()>>>>>;

/// See the module's text.
pub(crate) struct Sessions {
    /// What has to happen before a device starts.
    takeover: RefCell<Option<Rc<Takeover>>>,
    ended: Cell<bool>,
    /// The one place is taken, from a front-end's coming until what it left behind is closed.
    taken: Cell<bool>,
    /// One waits for it.
    awaited: Cell<bool>,
    /// Until the last request has ended.
    member: RefCell<Option<Rc<dyn Member>>>,
    changed: Notify,
    leavings: Rc<Leavings>,
    /// What they have mapped, those that have gone included.
    account: Arc<Account>,
    /// What they cost the thread, likewise.
    meter: Rc<Meter>,
}

impl Sessions {
    /// No front-end, and open for one. The first device that starts takes the volume over, if it is another's.
    pub(crate) fn new(takeover: Option<Takeover>) -> Rc<Self> {
        Rc::new(Self {
            takeover: RefCell::new(takeover.map(Rc::new)),
            ended: Cell::default(),
            taken: Cell::default(),
            awaited: Cell::default(),
            member: RefCell::default(),
            changed: Notify::default(),
            leavings: Rc::default(),
            account: Account::new(),
            meter: Rc::new(Meter::new()),
        })
    }

    /// Takes a connection over, whether or not it will be served.
    pub(crate) fn incoming(&self, stream: Stream) -> Incoming {
        Incoming::new(stream, self.leavings.clone())
    }

    /// Lets a closed listener go, with the connections that nobody has accepted: their front-ends may have passed anything.
    pub(crate) fn leave_listener(&self, listener: Listener) {
        let leavings = self.leavings.clone();
        spawn(async move {
            while listener.is_shared() {
                yield_now().await;
            }
            if let Some(socket) = listener.into_socket() {
                leavings.put(socket);
            }
        })
        .detach();
    }

    /// What front-ends leave behind.
    pub(super) fn leavings(&self) -> &Rc<Leavings> {
        &self.leavings
    }

    /// Waits until another connection may be accepted: too many that have gone may still have to be closed.
    pub(crate) async fn room(&self) {
        self.leavings.room().await;
    }

    /// Front-ends that are there, or whose last request has not ended.
    pub(crate) fn connections(&self) -> usize {
        usize::from(self.member.borrow().is_some())
    }

    /// The volume has grown.
    pub(crate) fn resized(&self) {
        if let Some(member) = self.member() {
            member.configuration_changed();
        }
    }

    /// Refuses new front-ends, looks at no queue any more, lets what was taken from them be answered, at most so long, then
    /// cuts the front-end off and waits until every request has ended. What has not been answered, a front-end brings again.
    pub(crate) async fn end_all(&self, at_most: Duration) {
        self.ended.set(true);
        self.changed.notify_all();
        if let Some(member) = self.member() {
            member.drain();
            if timeout(at_most, member.in_flight().idle()).await.is_none() {
                tracing::info!("vhost-user: requests still running after {at_most:?} of draining");
            }
            member.cut();
        }
        self.changed
            .until(|| self.member.borrow().is_none().then_some(()))
            .await;
    }

    /// Waits until a device may start; gives whether the volume has been taken over for it.
    pub(super) async fn may_start(&self) -> Result<bool> {
        let takeover = self.takeover.borrow().clone();
        let Some(takeover) = takeover else {
            return Ok(false);
        };
        takeover().await?;
        self.takeover.take();
        Ok(true)
    }

    /// Whether the volume is still another attachment's: what a front-end says of it is not the guest's word.
    pub(super) fn is_to_take_over(&self) -> bool {
        self.takeover.borrow().is_some()
    }

    fn member(&self) -> Option<Rc<dyn Member>> {
        self.member.borrow().clone()
    }

    /// The place for a front-end that comes. `None` when there is another, or the attachment ends.
    pub(super) async fn enter(self: &Rc<Self>) -> Option<Seat> {
        if self.taken.get() {
            let is_there = self.member().is_some_and(|member| !member.has_gone());
            if is_there || self.awaited.replace(true) {
                return None;
            }
            let awaits = Awaits(self);
            let free = || !self.taken.get() || self.ended.get();
            self.changed.until(|| free().then_some(())).await;
            drop(awaits);
        }
        // (Who has cost too much waits until that is paid off.)
        if self.ended.get() || !self.meter.is_bearable() {
            return None;
        }
        self.taken.set(true);
        Some(Seat {
            sessions: self.clone(),
        })
    }
}

/// Somebody waits for the place.
struct Awaits<'a>(&'a Sessions);

impl Drop for Awaits<'_> {
    fn drop(&mut self) {
        self.0.awaited.set(false);
    }
}

/// A front-end's place, given back on drop.
pub(super) struct Seat {
    sessions: Rc<Sessions>,
}

impl Seat {
    /// Those of its attachment.
    pub(super) fn sessions(&self) -> Rc<Sessions> {
        self.sessions.clone()
    }

    /// Where it leaves what it leaves.
    pub(super) fn leavings(&self) -> Rc<Leavings> {
        self.sessions.leavings().clone()
    }

    /// What its costs are counted to.
    pub(super) fn meter(&self) -> Rc<Meter> {
        self.sessions.meter.clone()
    }

    /// What its mappings are counted to.
    pub(super) fn account(&self) -> Arc<Account> {
        self.sessions.account.clone()
    }

    /// Makes the front-end known.
    pub(super) fn introduce(&self, member: Rc<dyn Member>) {
        let earlier = self.sessions.member.borrow_mut().replace(member);
        assert!(earlier.is_none(), "one front-end at a time");
    }

    /// Its last request has ended.
    pub(super) fn requests_ended(&self) {
        let member = self.sessions.member.take();
        drop(member);
        self.sessions.changed.notify_all();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.requests_ended();
        self.sessions.taken.set(false);
        self.sessions.changed.notify_all();
    }
}
