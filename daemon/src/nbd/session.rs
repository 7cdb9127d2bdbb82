//! All connections of one attachment.
//!
//! Invariants: at most [`NBD_CONNECTIONS_PER_ATTACHMENT`] transmit at once; after [`Sessions::end_all`] has begun
//! nothing new starts, and when it returns nothing runs (I3); while a connection that has gone still has requests
//! running, none of the others starts a request, so no write of a lost connection lands after a newer one that was
//! acknowledged. That it has gone is looked up before a request starts, once a turn: the driver tells it as well, and may
//! tell it after it has told what came later. Kept by [`Seat`]: every connection holds one from before its first byte until
//! its last request has ended. They share one [`Budget`] of bytes in flight.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slab::Slab;

use libvol::limits::NBD_CONNECTIONS_PER_ATTACHMENT;
use libvol::runtime::{net::Stream, sync::Notify, timeout, turn_number};

use super::window::Budget;
use crate::seldom::Seldom;

/// Sockets of one attachment, those in the handshake included: as many again may be negotiating.
const SOCKETS_MAX: usize = 2 * NBD_CONNECTIONS_PER_ATTACHMENT;

/// For a poll that does not wait.
const AT_ONCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// See the module's text.
pub(crate) struct Sessions {
    phase: Cell<Phase>,
    members: RefCell<Slab<Entry>>,
    transmitting: Cell<usize>,
    /// Connections that have gone and still have requests running.
    leaving: Cell<usize>,
    /// The turn in which it was last looked up who has gone.
    looked: Cell<u64>,
    changed: Notify,
    budget: Rc<Budget>,
    /// Requests that failed, for the log.
    failures: Seldom,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Requests are answered with ESHUTDOWN.
    Draining,
    /// Connections are refused.
    Ended,
}

struct Entry {
    stream: Stream,
    /// Once it transmits.
    member: Option<Weak<dyn Member>>,
}

/// A transmitting connection, as its siblings see it.
pub(super) trait Member {
    /// Ends the conversation: nothing more is received, started or sent.
    fn cut(&self);
    /// The client has hung up. What it has sent may be older than what it sends over another connection next.
    fn hung_up(&self);
    /// Starts what had to wait for a sibling.
    fn resume(self: Rc<Self>);
    /// Whether every request has been answered and its reply sent.
    fn is_idle(&self) -> bool;
}

impl Sessions {
    /// No connections, and open for them.
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            phase: Cell::new(Phase::Open),
            members: RefCell::default(),
            transmitting: Cell::new(0),
            leaving: Cell::new(0),
            looked: Cell::new(0),
            changed: Notify::default(),
            budget: Rc::default(),
            failures: Seldom::default(),
        })
    }

    /// Connections that are past their handshake and whose last request has not ended.
    pub(crate) fn connections(&self) -> usize {
        self.transmitting.get()
    }

    /// Connections that have not agreed on an export yet.
    pub(crate) fn handshakes(&self) -> usize {
        self.members.borrow().len() - self.transmitting.get()
    }

    /// Connections that have gone and still have requests running.
    #[cfg(test)]
    pub(super) fn leaving_connections(&self) -> usize {
        self.leaving.get()
    }

    /// Answers new requests with ESHUTDOWN and waits until every earlier one has been answered, at most `at_most`.
    /// Connections stay open, so that clients can say goodbye; follow with [`Sessions::end_all`].
    pub(crate) async fn drain(&self, at_most: Duration) {
        if self.phase.get() == Phase::Open {
            self.phase.set(Phase::Draining);
        }
        let idle = self.changed.until(|| {
            let members = self.members();
            members.iter().all(|member| member.is_idle()).then_some(())
        });
        if timeout(at_most, idle).await.is_none() {
            tracing::info!("nbd: requests still running after {at_most:?} of draining");
        }
    }

    /// Refuses new connections, shuts all sockets down, drops requests that have not started, and waits until every
    /// request in flight has ended.
    pub(crate) async fn end_all(&self) {
        self.phase.set(Phase::Ended);
        for member in self.members() {
            member.cut();
        }
        for (_, entry) in &*self.members.borrow() {
            entry.stream.shutdown();
        }
        self.changed
            .until(|| self.members.borrow().is_empty().then_some(()))
            .await;
    }

    /// A place for a new connection; `None` when there is none, or the attachment ends.
    pub(super) fn enter(self: &Rc<Self>, stream: &Stream) -> Option<Seat> {
        let mut members = self.members.borrow_mut();
        if self.phase.get() == Phase::Ended || members.len() >= SOCKETS_MAX {
            return None;
        }
        let key = members.insert(Entry {
            stream: stream.clone(),
            member: None,
        });
        Some(Seat {
            sessions: self.clone(),
            key,
            transmits: Cell::new(false),
            leaves: Cell::new(false),
        })
    }

    /// Learns who has hung up. What is known of this turn's messages came before, so whoever hung up before sending one of
    /// them over another connection is found.
    fn look_who_has_gone(&self) {
        let now = turn_number();
        if self.transmitting.get() < 2 || self.looked.replace(now) == now {
            return;
        }
        let gone: Vec<Rc<dyn Member>> = {
            let members = self.members.borrow();
            let transmitting = || {
                members
                    .iter()
                    .filter_map(|(_, entry)| Some((entry, entry.member.as_ref()?)))
            };
            let gone = hung_up(transmitting().map(|(entry, _)| &entry.stream));
            let found = transmitting().zip(gone).filter(|(_, gone)| *gone);
            found.filter_map(|((_, member), _)| member.upgrade()).collect()
        };
        gone.iter().for_each(|member| member.hung_up());
    }

    fn members(&self) -> Vec<Rc<dyn Member>> {
        let members = self.members.borrow();
        let present = members.iter().filter_map(|(_, entry)| entry.member.as_ref());
        present.filter_map(Weak::upgrade).collect()
    }
}

/// Which of these have hung up, as far as it is known now; nothing when none has, or the poll fails: the driver, or the next
/// receive, will tell.
pub(super) fn hung_up<'a>(streams: impl Iterator<Item = &'a Stream>) -> Vec<bool> {
    let mut fds: Vec<PollFd<'_>> = streams
        .map(|stream| PollFd::new(stream.socket(), PollFlags::RDHUP))
        .collect();
    match poll(&mut fds, Some(&AT_ONCE)) {
        // RDHUP is all that was asked for; what is reported unasked is an end as well.
        Ok(found) if found > 0 => fds.iter().map(|fd| !fd.revents().is_empty()).collect(),
        _ => Vec::new(),
    }
}

/// One connection's place among its siblings, given back on drop.
pub(super) struct Seat {
    sessions: Rc<Sessions>,
    key: usize,
    transmits: Cell<bool>,
    leaves: Cell<bool>,
}

impl Seat {
    /// Claims one of the attachment's connections. `false` when all are taken.
    pub(super) fn claim(&self) -> bool {
        assert!(!self.transmits.get(), "claimed once");
        let transmitting = self.sessions.transmitting.get();
        if transmitting >= NBD_CONNECTIONS_PER_ATTACHMENT {
            return false;
        }
        self.sessions.transmitting.set(transmitting + 1);
        self.transmits.set(true);
        true
    }

    /// What all connections may have in flight together.
    pub(super) fn budget(&self) -> Rc<Budget> {
        self.sessions.budget.clone()
    }

    /// Failures of the attachment's requests: a client cannot flood the log, however often it connects.
    pub(super) fn failures(&self) -> &Seldom {
        &self.sessions.failures
    }

    /// Makes the connection known to its siblings.
    pub(super) fn introduce(&self, member: Weak<dyn Member>) {
        self.sessions.members.borrow_mut()[self.key].member = Some(member);
    }

    /// Whether requests get ESHUTDOWN.
    pub(super) fn draining(&self) -> bool {
        self.sessions.phase.get() != Phase::Open
    }

    /// Whether a request may start: the attachment lives, and no sibling that has gone still has one running.
    pub(super) fn may_start(&self) -> bool {
        self.sessions.look_who_has_gone();
        let alone = self.sessions.leaving.get() == 0 || self.leaves.get();
        alone && self.sessions.phase.get() != Phase::Ended
    }

    /// The client has gone, and requests may still be running.
    pub(super) fn leave(&self) {
        if !self.leaves.replace(true) {
            self.sessions.leaving.set(self.sessions.leaving.get() + 1);
        }
    }

    /// They have ended.
    pub(super) fn left(&self) {
        if self.leaves.replace(false) {
            self.sessions.leaving.set(self.sessions.leaving.get() - 1);
            if self.sessions.leaving.get() == 0 {
                for member in self.sessions.members() {
                    member.resume();
                }
            }
        }
    }

    /// Something that [`Sessions::drain`] waits for may have happened.
    pub(super) fn note_progress(&self) {
        if self.sessions.phase.get() == Phase::Draining {
            self.sessions.changed.notify_all();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.left();
        if self.transmits.get() {
            self.sessions
                .transmitting
                .set(self.sessions.transmitting.get() - 1);
        }
        let entry = self.sessions.members.borrow_mut().remove(self.key);
        drop(entry);
        self.sessions.changed.notify_all();
    }
}
