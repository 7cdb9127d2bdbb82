//! The door of an attachment: its socket, who is let in, and the sessions of those who were.
//!
//! Every connection is judged anew by its peer's credentials and the volume's attachment epoch (I2), and so is every
//! export it asks for. Who is turned away learns nothing; the log has the reason, as far as that is not a client's way to
//! fill it: what a client can cause at will is logged the 1st, 2nd, 4th, 8th … time, and what it says is clipped.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use libvol::control::Protocol;
use libvol::ids::{Epoch, VolumeId};
use libvol::limits::NBD_CONNECTIONS_PER_ATTACHMENT;
use libvol::runtime::net::{Listener, Stream};
use libvol::runtime::{Task, sleep, spawn};
use libvol::tenant::{self, AttachmentFacts, Peer};
use libvol::volume::Volume;
use libvol::{Error, Kind, Result};
use rustix::io::ioctl_fionread;
use tokio::sync::oneshot;

use super::switchboard::{Guest, Switchboard};
use crate::leavings::{Leavings, pass_descriptors};
use crate::nbd::{self, Export, Exports, Lookup};
use crate::seldom::Seldom;
use crate::vhost;

/// How long sessions that end gently may take to answer what they have begun.
const GENTLE: Duration = Duration::from_secs(2);

/// Connections of one door that are logged for everybody to see; later ones are for debugging. As many as QEMU makes with
/// the most connections an attachment may have.
const CONNECTS_LOGGED: u64 = NBD_CONNECTIONS_PER_ATTACHMENT as u64;
/// Characters of a client's text that are logged.
const CLIENT_TEXT_CHARS: usize = 64;

/// How sessions end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// What has begun is answered, what comes then is answered with ESHUTDOWN: the volume is taken away.
    Gently,
    /// NBD connections are cut. QEMU holds unanswered requests and sends them again once the daemon is back, where an
    /// error would reach the guest: the daemon stops.
    AtOnce,
}

/// Asks the control plane to let this attachment take the volume over; the answer comes when nothing of the other is in flight.
pub(crate) type AskTakeover = Arc<dyn Fn() -> oneshot::Receiver<Result<()>> + Send + Sync>;

/// Whose a listening socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// The attachment's.
    Own,
    /// Somebody else's, from before.
    Passed,
}

/// What a door is made of.
pub(crate) struct DoorSpec {
    /// Whose attachment, of what.
    pub(crate) facts: AttachmentFacts,
    /// The export's name: `customer/name`.
    pub(crate) export: String,
    /// The VM's name.
    pub(crate) vm: String,
    /// What is spoken over its socket.
    pub(crate) protocol: Protocol,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// It has taken over from another attachment.
    pub(crate) moved: bool,
    /// Bound, listening, owned by the VM's uid.
    pub(crate) listener: UnixListener,
    /// Bound and listening, and somebody else's: it stays as it is.
    pub(crate) also: Option<UnixListener>,
    /// The VM's other attachment has the volume until this one's device starts.
    pub(crate) takeover: Option<AskTakeover>,
    /// Where VMs that come over TLS learn of it.
    pub(crate) switchboard: Arc<Switchboard>,
}

/// An open door.
pub(crate) struct Door {
    facts: AttachmentFacts,
    export: String,
    vm: String,
    read_only: bool,
    moved: bool,
    /// The attachment epoch, as sessions are judged by; raised first when the attachment ends.
    current: Cell<Epoch>,
    /// How the guest has set its cache.
    writeback: vhost::Writeback,
    closed: Cell<bool>,
    volume: Rc<Volume>,
    listener: RefCell<Option<Listener>>,
    accepting: RefCell<Vec<Task<()>>>,
    sessions: Sessions,
    switchboard: Arc<Switchboard>,
    connected: Cell<u64>,
    turned_away: Seldom,
    not_shown: Seldom,
}

/// The sessions of those who were let in, by what they speak.
enum Sessions {
    Nbd(Rc<nbd::Sessions>),
    VhostUser(Rc<vhost::Sessions>, Rc<Seldom>),
}

impl Door {
    /// Starts to accept connections.
    ///
    /// # Errors
    /// When the socket cannot be used, or this host cannot serve the protocol.
    pub(crate) fn open(spec: DoorSpec, volume: Rc<Volume>, writeback: vhost::Writeback) -> Result<Rc<Self>> {
        let sessions = match spec.protocol {
            Protocol::Nbd => Sessions::Nbd(nbd::Sessions::new()),
            Protocol::VhostUser => {
                vhost::check_thread().map_err(|e| {
                    let message = "vhost-user needs the kernel's asynchronous I/O (io_setup), which is refused here; raise \
                                   fs.aio-max-nr, allow it in the service's sandbox, or attach with --via nbd";
                    Error::with_source(Kind::Unsupported, message, e)
                })?;
                Sessions::VhostUser(vhost::Sessions::new(spec.takeover.map(takeover)), Rc::default())
            }
        };
        let listener = Listener::unix(spec.listener)
            .map_err(|e| Error::with_source(Kind::Io, "an attachment's socket cannot be used", e))?;
        let door = Rc::new(Self {
            current: Cell::new(spec.facts.epoch),
            facts: spec.facts,
            export: spec.export,
            vm: spec.vm,
            read_only: spec.read_only,
            moved: spec.moved,
            writeback,
            closed: Cell::new(false),
            volume,
            listener: RefCell::new(Some(listener.clone())),
            accepting: RefCell::default(),
            sessions,
            switchboard: spec.switchboard,
            connected: Cell::default(),
            turned_away: Seldom::default(),
            not_shown: Seldom::default(),
        });
        // Over TLS there is only NBD.
        if matches!(door.sessions, Sessions::Nbd(_)) {
            door.switchboard
                .open(&door.facts.vm, &door.export, door.facts.volume);
        }
        door.listen(listener, Whose::Own);
        match spec.also.map(Listener::unix) {
            None => {}
            Some(Ok(listener)) => door.listen(listener, Whose::Passed),
            Some(Err(e)) => tracing::error!(volume = %door.export, "the passed socket cannot be used: {e}"),
        }
        Ok(door)
    }

    /// Live connections.
    pub(crate) fn connections(&self) -> usize {
        match &self.sessions {
            Sessions::Nbd(sessions) => sessions.connections(),
            Sessions::VhostUser(sessions, _) => sessions.connections(),
        }
    }

    /// Connections in their handshake.
    pub(crate) fn handshakes(&self) -> usize {
        match &self.sessions {
            Sessions::Nbd(sessions) => sessions.handshakes(),
            Sessions::VhostUser(..) => 0,
        }
    }

    /// The epoch of its attachment.
    pub(crate) fn epoch(&self) -> Epoch {
        self.facts.epoch
    }

    /// Its attachment has ended, or another's epoch has begun: nobody is let in any more.
    pub(crate) fn supersede(&self, epoch: Epoch) {
        self.current.set(epoch);
    }

    /// The volume has grown: who can be told is.
    pub(crate) fn resized(&self) {
        if let Sessions::VhostUser(sessions, _) = &self.sessions {
            sessions.resized();
        }
    }

    /// Accepts nobody any more and ends all sessions; when it returns, none of their requests is in flight.
    pub(crate) async fn close(&self, manner: Manner) {
        self.closed.set(true);
        if matches!(self.sessions, Sessions::Nbd(_)) {
            self.switchboard.close(&self.facts.vm, self.facts.volume);
        }
        // No accept is under way from here on; the socket of others stays open.
        self.accepting.take();
        let listener = self.listener.take();
        if let Some(listener) = &listener {
            listener.close();
        }
        match &self.sessions {
            Sessions::Nbd(sessions) => {
                if manner == Manner::Gently {
                    sessions.drain(GENTLE).await;
                }
                sessions.end_all().await;
            }
            Sessions::VhostUser(sessions, _) => {
                if let Some(listener) = listener {
                    sessions.leave_listener(listener);
                }
                // Requests stay in the guest's queues, so there is but one manner.
                sessions.end_all(GENTLE).await;
            }
        }
    }

    fn listen(self: &Rc<Self>, listener: Listener, whose: Whose) {
        let accepting = spawn(self.clone().accept(listener, whose));
        self.accepting.borrow_mut().push(accepting);
    }

    async fn accept(self: Rc<Self>, listener: Listener, whose: Whose) {
        // Of those who are turned away: what they have sent may take long to close. None of that waits for another's socket.
        let strangers = Leavings::default();
        while !self.closed.get() {
            strangers.room().await;
            if let Sessions::VhostUser(sessions, _) = &self.sessions {
                sessions.room().await;
            }
            match listener.accept_when_ready().await {
                Ok(stream) => {
                    if let Err(stranger) = self.admit(stream, whose) {
                        strangers.put_all(stranger.into_socket());
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
                    tracing::error!(volume = %self.export, vm = %self.vm, "nobody can come any more, the socket was shut down: {e}");
                    break;
                }
                Err(e) => {
                    // Out of descriptors, most likely: the backlog waits, the next look is soon enough.
                    tracing::warn!(volume = %self.export, vm = %self.vm, "cannot accept a connection: {e}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Serves a connection; who is turned away comes back.
    fn admit(self: &Rc<Self>, stream: Stream, whose: Whose) -> std::result::Result<(), Stream> {
        if whose == Whose::Passed {
            let takes = matches!(self.sessions, Sessions::VhostUser(..));
            pass_descriptors(stream.socket(), takes);
        }
        let Some(peer) = self.judge(&stream) else {
            return Err(stream);
        };
        match &self.sessions {
            Sessions::Nbd(sessions) => {
                // The server speaks first. What is there already may have descriptors with it, from when they were taken.
                if whose == Whose::Passed && !ioctl_fionread(stream.socket()).is_ok_and(|bytes| bytes == 0) {
                    self.turned_away.say(|times| {
                        tracing::warn!(volume = %self.export, vm = %self.vm, times, "a client that speaks first is turned away");
                    });
                    return Err(stream);
                }
                let exports = Rc::new(Shown {
                    door: self.clone(),
                    peer,
                });
                spawn(nbd::serve(stream, exports, sessions.clone())).detach();
            }
            Sessions::VhostUser(sessions, broken) => {
                let export = vhost::Export {
                    name: self.export.clone(),
                    serial: serial(self.facts.volume),
                    read_only: self.read_only,
                    writeback: self.writeback.clone(),
                    moved: self.moved,
                    volume: self.volume.clone(),
                    broken: broken.clone(),
                };
                let incoming = sessions.incoming(stream);
                spawn(vhost::serve(incoming, export, sessions.clone())).detach();
            }
        }
        Ok(())
    }

    /// Who has come, if it may.
    fn judge(&self, stream: &Stream) -> Option<Peer> {
        let peer = match rustix::net::sockopt::socket_peercred(stream.socket()) {
            Ok(peer) => peer,
            Err(e) => {
                self.turned_away.say(|times| {
                    tracing::warn!(volume = %self.export, vm = %self.vm, times, "a peer without credentials is turned away: {e}");
                });
                return None;
            }
        };
        let (uid, pid) = (peer.uid.as_raw(), peer.pid.as_raw_nonzero());
        let who = Peer::Uid(uid);
        if let Err(why) = tenant::may_connect(&self.facts, &who, self.current.get()) {
            self.turned_away.say(|times| {
                tracing::warn!(volume = %self.export, vm = %self.vm, uid, pid, times, "a connection is turned away: {why}");
            });
            return None;
        }
        self.log_connection(&format!("uid {uid}, pid {pid}"));
        Some(who)
    }

    /// Goes on with a VM that has come over TLS and asks for this volume.
    pub(crate) fn take(self: &Rc<Self>, guest: Guest) {
        let who = Peer::Vm(guest.identity.clone());
        if let Err(why) = tenant::may_connect(&self.facts, &who, self.current.get()) {
            // It was detached meanwhile, most likely.
            tracing::debug!(volume = %self.export, vm = %self.vm, "a guest is turned away: {why}");
            return;
        }
        let Sessions::Nbd(sessions) = &self.sessions else {
            // It was attached anew meanwhile, another way.
            return;
        };
        self.log_connection("over TLS");
        let exports = Rc::new(Shown {
            door: self.clone(),
            peer: who,
        });
        let Guest {
            moving,
            identity,
            ticket,
        } = guest;
        let going_on = nbd::go_on(moving, exports, sessions.clone());
        let switchboard = self.switchboard.clone();
        let serving = async move {
            if let Some((volume, moving)) = going_on.await {
                let guest = Guest {
                    moving,
                    identity,
                    ticket,
                };
                switchboard.hand_over(volume, guest);
            }
        };
        spawn(serving).detach();
    }

    fn log_connection(&self, how: &str) {
        self.connected.set(self.connected.get() + 1);
        match self.connected.get() {
            times @ ..=CONNECTS_LOGGED => {
                tracing::info!(volume = %self.export, vm = %self.vm, times, "connected, {how}");
            }
            times => tracing::debug!(volume = %self.export, vm = %self.vm, times, "connected, {how}"),
        }
    }
}

/// Asks, and waits for the answer.
fn takeover(ask: AskTakeover) -> vhost::Takeover {
    Box::new(move || {
        let answer = ask();
        let stops = |_| Err(Error::unavailable("the daemon stops"));
        Box::pin(async move { answer.await.unwrap_or_else(stops) })
    })
}

/// What one connection may see: its attachment's volume, as long as the attachment stands.
struct Shown {
    door: Rc<Door>,
    peer: Peer,
}

impl Shown {
    fn description(&self) -> String {
        format!("volume of VM {}", self.door.vm)
    }
}

impl Exports for Shown {
    fn find(&self, name: &str) -> Lookup {
        let door = &self.door;
        let is_ours = match &self.peer {
            Peer::Uid(_) => true,
            // A VM may have several volumes; the empty name is then none of them.
            Peer::Vm(vm) => match door.switchboard.find(vm, name) {
                Some(volume) if volume != door.facts.volume => return Lookup::Elsewhere(volume),
                found => found.is_some(),
            },
        };
        if !is_ours
            || door.closed.get()
            || !tenant::may_find(&door.facts, &door.export, name, &self.peer, door.current.get())
        {
            door.not_shown.say(|times| {
                let name = clipped(name);
                tracing::info!(volume = %door.export, vm = %door.vm, times, "export {name:?} asked for and not shown");
            });
            return Lookup::Missing;
        }
        Lookup::Here(Export {
            name: door.export.clone(),
            description: self.description(),
            read_only: door.read_only,
            volume: door.volume.clone(),
        })
    }

    fn list(&self) -> Vec<(String, String)> {
        let door = &self.door;
        if let Peer::Vm(vm) = &self.peer {
            return door.switchboard.list(vm);
        }
        match tenant::may_connect(&door.facts, &self.peer, door.current.get()) {
            Ok(()) if !door.closed.get() => vec![(door.export.clone(), self.description())],
            _ => Vec::new(),
        }
    }
}

/// What a vhost-user device calls itself: the beginning of the volume's id, as far as there is place.
fn serial(volume: VolumeId) -> [u8; vhost::SERIAL_BYTES] {
    let mut serial = [0; vhost::SERIAL_BYTES];
    let id = volume.0.simple().to_string();
    serial.copy_from_slice(&id.as_bytes()[..vhost::SERIAL_BYTES]);
    serial
}

/// The beginning of a client's text.
fn clipped(text: &str) -> &str {
    let end = text.char_indices().nth(CLIENT_TEXT_CHARS);
    end.map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_says_is_clipped_between_characters() {
        assert_eq!(clipped("acme/web"), "acme/web");
        assert_eq!(clipped(&"x".repeat(64)).len(), 64);
        assert_eq!(clipped(&"x".repeat(4096)).len(), 64);
        assert_eq!(clipped(&"ü".repeat(2048)), "ü".repeat(64));
    }
}
