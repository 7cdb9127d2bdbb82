//! The gate: the thread that receives connections over TCP. TLS and the greeting happen here, where no volume's requests wait
//! behind them; who has named a volume that it may see goes on at that volume's door, on its shard.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use libvol::disk::Engine;
use libvol::runtime::net::{Listener, Stream};
use libvol::runtime::{sleep, spawn};
use libvol::{Error, Kind, Result};
use rustix::net::getpeername;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay, set_tcp_user_timeout,
};

use super::switchboard::{Guest, Lobby, Switchboard};
use super::tls::{TlsFiles, identity};
use super::{Load, Shard, Shards};
use crate::nbd;
use crate::seldom::Seldom;

/// A peer that has been silent this long is asked whether it is there, and asked again.
const SILENCE: Duration = Duration::from_secs(15);
/// A connection whose peer has not acknowledged anything, or taken nothing of what is waiting for it, for so long has ended,
/// milliseconds.
const UNACKNOWLEDGED_MS: u32 = 120_000;

/// Listening, and not serving yet.
pub(crate) struct Bound {
    listeners: Vec<TcpListener>,
}

impl Bound {
    /// Takes the addresses.
    ///
    /// # Errors
    /// `Busy`, `Invalid` with the address.
    pub(crate) fn bind(addresses: &[SocketAddr]) -> Result<Self> {
        let listen = |address: &SocketAddr| {
            TcpListener::bind(address).map_err(|e| {
                let kind = match e.kind() {
                    std::io::ErrorKind::AddrInUse => Kind::Busy,
                    _ => Kind::Invalid,
                };
                Error::with_source(kind, format!("NBD cannot listen on {address}"), e)
            })
        };
        let listeners = addresses.iter().map(listen).collect::<Result<_>>()?;
        Ok(Self { listeners })
    }

    /// Sockets that whoever started the daemon has bound.
    pub(crate) fn add(&mut self, listeners: Vec<TcpListener>) {
        self.listeners.extend(listeners);
    }

    /// Whether there is no address.
    pub(crate) fn is_empty(&self) -> bool {
        self.listeners.is_empty()
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.listeners.iter().map(TcpListener::local_addr);
        addresses.filter_map(std::result::Result::ok).collect()
    }
}

/// See the module's text. Ends with the value.
pub(crate) struct Gate {
    shard: Shard,
    addresses: Vec<SocketAddr>,
    switchboard: Arc<Switchboard>,
    stopping: tokio::sync::watch::Sender<bool>,
}

struct Porch {
    switchboard: Arc<Switchboard>,
    tls: RefCell<TlsFiles>,
    closed: Cell<bool>,
    refused: Seldom,
    /// Nobody is let in, since its own files are no good.
    broken: Seldom,
    full: Seldom,
}

impl Gate {
    /// Begins to accept.
    ///
    /// # Errors
    /// When the thread cannot be started or a socket not be used.
    pub(crate) async fn open(bound: Bound, tls: TlsFiles, shards: &Shards, engine: Engine) -> Result<Self> {
        let (shard, _, _) = Shard::start(shards.count(), engine)?;
        let addresses = bound.addresses();
        let (stopping, mut stopped) = tokio::sync::watch::channel(false);
        let switchboard = shards.switchboard();
        let of_porch = switchboard.clone();
        shard
            .call(move |_| async move {
                let porch = Rc::new(Porch {
                    switchboard: of_porch,
                    tls: RefCell::new(tls),
                    closed: Cell::new(false),
                    refused: Seldom::default(),
                    broken: Seldom::default(),
                    full: Seldom::default(),
                });
                let mut listeners = Vec::new();
                for listener in bound.listeners {
                    let listener = Listener::tcp(listener)
                        .map_err(|e| Error::with_source(Kind::Io, "an NBD socket cannot be used", e))?;
                    let listener = Rc::new(listener);
                    spawn(porch.clone().accept(listener.clone())).detach();
                    listeners.push(listener);
                }
                spawn(async move {
                    let _ = stopped.wait_for(|stopping| *stopping).await;
                    porch.closed.set(true);
                    listeners.iter().for_each(|listener| listener.close());
                })
                .detach();
                Ok(())
            })
            .await?;
        Ok(Self {
            shard,
            addresses,
            switchboard,
            stopping,
        })
    }

    /// Where it listens.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What its thread carries.
    pub(crate) fn load(&self) -> impl Future<Output = Result<Load>> + use<> {
        let (load, strangers) = (self.shard.load(), self.switchboard.strangers());
        async move {
            Ok(Load {
                handshakes: strangers,
                ..load.await?
            })
        }
    }

    /// Accepts nobody any more. Connections that have not named a volume end with the thread.
    pub(crate) fn close(mut self) {
        let _ = self.stopping.send(true);
        self.shard.end();
    }
}

impl Porch {
    async fn accept(self: Rc<Self>, listener: Rc<Listener>) {
        while !self.closed.get() {
            match listener.accept().await {
                Ok(_) if self.closed.get() => break,
                Ok(stream) => self.receive(stream),
                Err(_) if self.closed.get() => break,
                Err(e) => {
                    tracing::warn!("nbd: cannot accept a connection over TCP: {e}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn receive(self: &Rc<Self>, stream: Stream) {
        // Without an address it has gone already.
        let Some(from) = peer_address(&stream) else { return };
        let Some(ticket) = self.switchboard.stranger(from) else {
            self.full.say(|times| {
                tracing::warn!(
                    times,
                    "nbd: a connection over TCP from {from} is dropped: too many, of that address or in all, have not said who they are"
                );
            });
            return;
        };
        let tls = match self.tls.borrow_mut().current() {
            Ok(tls) => {
                self.broken.reset();
                tls
            }
            Err(e) => {
                self.broken
                    .say(|times| tracing::error!(times, "nbd: nobody is let in over TCP: {e}"));
                return;
            }
        };
        set_up(&stream);
        let porch = self.clone();
        let receiving = async move {
            let received = nbd::receive(stream, tls, |certificate| porch.judge(certificate)).await;
            drop(ticket);
            if let Some((volume, moving, lobby)) = received {
                let Lobby { identity, ticket } = lobby;
                let guest = Guest {
                    moving,
                    identity,
                    ticket,
                };
                porch.switchboard.hand_over(volume, guest);
            }
        };
        spawn(receiving).detach();
    }

    fn judge(&self, certificate: &[u8]) -> Option<Lobby> {
        let Some(vm) = identity(certificate) else {
            self.refused.say(|times| {
                tracing::warn!(
                    times,
                    "nbd: a certificate names no VM (vold://CUSTOMER/VM) and is refused"
                );
            });
            return None;
        };
        let admitted = self.switchboard.admit(vm.clone());
        if admitted.is_none() {
            self.full.say(|times| {
                tracing::warn!(times, customer = %vm.customer, "nbd: too many connections of one customer over TCP");
            });
        }
        admitted
    }
}

/// Options of a connection's socket; one that cannot be set is done without.
fn set_up(stream: &Stream) {
    let socket = stream.socket();
    // Replies are gathered already.
    let _ = set_tcp_nodelay(socket, true);
    // A host that has lost its power says nothing, and its connection would keep its place.
    let _ = set_socket_keepalive(socket, true);
    let _ = set_tcp_keepidle(socket, SILENCE);
    let _ = set_tcp_keepintvl(socket, SILENCE);
    let _ = set_tcp_user_timeout(socket, UNACKNOWLEDGED_MS);
}

fn peer_address(stream: &Stream) -> Option<IpAddr> {
    let address = getpeername(stream.socket()).ok()??;
    SocketAddr::try_from(address).ok().map(|address| address.ip())
}
