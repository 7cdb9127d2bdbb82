//! NBD: the network block device protocol over stream sockets.
//!
//! | file | job |
//! |---|---|
//! | [`proto`] | bytes to values and back, without I/O; validates requests |
//! | [`link`] | the stream, plain or under TLS |
//! | [`inbox`], [`outbox`] | received bytes not yet parsed; replies not yet sent |
//! | [`handshake`] | from the greeting to an agreed export |
//! | [`window`] | how much one connection may have in flight |
//! | [`transmission`] | serves one connection's requests |
//! | [`session`] | all connections of one attachment: counting, cutting, draining |
//!
//! A connection over a Unix socket stays where it came in ([`serve`]). One over TCP is received where there is no volume
//! ([`receive`]), begins TLS before anything is told or done, and goes on ([`go_on`]) where the volume is that it asks for.
//!
//! This room knows requests and bytes. Who may see which export is decided by whoever implements [`Exports`]; it
//! deliberately knows no stores, no customers and no credentials.

mod handshake;
mod inbox;
mod link;
mod outbox;
mod proto;
mod session;
mod transmission;
mod window;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libvol::ids::VolumeId;
use libvol::limits::NBD_HANDSHAKE_SECONDS;
use libvol::runtime::{net::Stream, timeout};
use libvol::volume::Volume;
use rustls::{ServerConfig, ServerConnection};

use handshake::{Encryption, End, Negotiation};
use inbox::Inbox;
use link::{Detached, Link};
pub(crate) use session::Sessions;

use crate::device::Device;

/// Something a client can use. `D` is the volume, and stands open only for tests.
pub(crate) struct Export<D = Rc<Volume>> {
    /// The name clients ask for.
    pub(crate) name: String,
    /// Words for people.
    pub(crate) description: String,
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// The bytes.
    pub(crate) volume: D,
}

/// What a name leads to.
pub(crate) enum Lookup<D = Rc<Volume>> {
    /// An export that is served here.
    Here(Export<D>),
    /// One of that volume, which is served elsewhere.
    Elsewhere(VolumeId),
    /// None, or none that this caller may know of.
    Missing,
}

/// The exports of one caller, asked again at every look-up and listing.
pub(crate) trait Exports<D = Rc<Volume>> {
    /// The export of that name.
    fn find(&self, name: &str) -> Lookup<D>;

    /// Names and descriptions of all that this caller may see.
    fn list(&self) -> Vec<(String, String)>;
}

/// A connection in its handshake, on its way to where the volume is that it asks for.
pub(crate) struct Moving {
    link: Detached,
    /// Received and not yet parsed.
    bytes: Vec<u8>,
    negotiation: Negotiation,
    deadline: Instant,
}

/// Serves one connection from greeting to end. Returns when the last of its requests has ended.
pub(crate) async fn serve(stream: Stream, exports: Rc<dyn Exports>, sessions: Rc<Sessions>) {
    let deadline = Duration::from_secs(NBD_HANDSHAKE_SECONDS);
    serve_device(stream, exports, sessions, deadline).await;
}

async fn serve_device<D: Device>(
    stream: Stream,
    exports: Rc<dyn Exports<D>>,
    sessions: Rc<Sessions>,
    deadline: Duration,
) {
    let inbox = Inbox::new(stream, handshake::INBOX_BYTES);
    let elsewhere = serve_from(
        inbox,
        Negotiation::new(Encryption::None),
        exports,
        sessions,
        deadline,
    )
    .await;
    drop(elsewhere);
}

/// Goes on with a connection that has come from elsewhere, to its end, or until it asks for another volume.
pub(crate) async fn go_on(
    moving: Moving,
    exports: Rc<dyn Exports>,
    sessions: Rc<Sessions>,
) -> Option<(VolumeId, Moving)> {
    go_on_device(moving, exports, sessions).await
}

async fn go_on_device<D: Device>(
    moving: Moving,
    exports: Rc<dyn Exports<D>>,
    sessions: Rc<Sessions>,
) -> Option<(VolumeId, Moving)> {
    let mut inbox = Inbox::new(Link::attach(moving.link), handshake::INBOX_BYTES);
    inbox.put(&moving.bytes);
    let deadline = moving.deadline;
    let left = deadline.saturating_duration_since(Instant::now());
    let (volume, inbox, negotiation) = serve_from(inbox, moving.negotiation, exports, sessions, left).await?;
    Some((volume, detach(inbox, negotiation, deadline)?))
}

/// Serves a connection. It comes back when it asks for a volume elsewhere, with that volume.
async fn serve_from<D: Device>(
    mut inbox: Inbox,
    mut negotiation: Negotiation,
    exports: Rc<dyn Exports<D>>,
    sessions: Rc<Sessions>,
    deadline: Duration,
) -> Option<(VolumeId, Inbox, Negotiation)> {
    let link = inbox.link().clone();
    let Some(seat) = sessions.enter(link.stream()) else {
        tracing::debug!("nbd: connection refused: the attachment is ending or has too many connections");
        link.shutdown();
        return None;
    };
    match timeout(deadline, negotiation.run(&mut inbox, &*exports, Some(&seat))).await {
        Some(Ok(negotiated)) => {
            drop(exports);
            transmission::run(inbox, negotiated, seat).await;
        }
        Some(Err(End::Elsewhere(volume))) => return Some((volume, inbox, negotiation)),
        Some(Err(end)) => tracing::debug!("nbd: handshake ended: {end}"),
        None => tracing::debug!("nbd: handshake not finished within {deadline:?}, dropped"),
    }
    link.say_goodbye().await;
    link.shutdown();
    None
}

/// Receives a connection where there is no volume: greeting, TLS, and whatever the client asks until it names an export.
/// `judge` decides by the peer's certificate (DER) what it may see; `None` ends the connection.
///
/// Gives the volume that it asks for, its way there, and what `judge` gave.
pub(crate) async fn receive<E: Exports>(
    stream: Stream,
    tls: Arc<ServerConfig>,
    judge: impl FnOnce(&[u8]) -> Option<E>,
) -> Option<(VolumeId, Moving, E)> {
    let deadline = Instant::now() + Duration::from_secs(NBD_HANDSHAKE_SECONDS);
    let raw = stream.clone();
    let received = timeout(
        Duration::from_secs(NBD_HANDSHAKE_SECONDS),
        receive_encrypted(stream, tls, judge),
    );
    match received.await {
        Some(Ok((volume, inbox, negotiation, exports))) => {
            return Some((volume, detach(inbox, negotiation, deadline)?, exports));
        }
        Some(Err(end)) => tracing::debug!("nbd: handshake over TCP ended: {end}"),
        None => tracing::debug!("nbd: handshake over TCP not finished in time, dropped"),
    }
    raw.shutdown();
    None
}

async fn receive_encrypted<E: Exports>(
    stream: Stream,
    tls: Arc<ServerConfig>,
    judge: impl FnOnce(&[u8]) -> Option<E>,
) -> Result<(VolumeId, Inbox, Negotiation, E), End> {
    let mut inbox = Inbox::new(stream.clone(), handshake::INBOX_BYTES);
    let mut negotiation = Negotiation::new(Encryption::Required);
    match negotiation.run::<Rc<Volume>>(&mut inbox, &Nothing, None).await {
        Err(End::StartTls) => {}
        Err(end) => return Err(end),
        Ok(_) => return Err(End::Violation("an export before TLS")),
    }
    drop(inbox);
    let session = ServerConnection::new(tls).map_err(|_| End::Refused("TLS cannot begin"))?;
    let link = Link::with_tls(stream, session);
    link.handshake().await?;
    let certificate = link.peer_certificate().ok_or(End::Refused("no certificate"))?;
    let exports =
        judge(&certificate).ok_or(End::Refused("the certificate gives no right to anything here"))?;
    let mut negotiation = negotiation.encrypted();
    let mut inbox = Inbox::new(link.clone(), handshake::INBOX_BYTES);
    match negotiation.run::<Rc<Volume>>(&mut inbox, &exports, None).await {
        Err(End::Elsewhere(volume)) => {
            drop(link);
            Ok((volume, inbox, negotiation, exports))
        }
        ended => {
            link.say_goodbye().await;
            Err(ended
                .err()
                .unwrap_or(End::Violation("an export where there is none")))
        }
    }
}

fn detach(inbox: Inbox, negotiation: Negotiation, deadline: Instant) -> Option<Moving> {
    let (link, bytes) = inbox.into_parts();
    match link.detach() {
        Ok(Some(link)) => Some(Moving {
            link,
            bytes,
            negotiation,
            deadline,
        }),
        Ok(None) => {
            tracing::error!("nbd: a connection is in use and cannot move");
            None
        }
        Err(e) => {
            tracing::warn!("nbd: a connection cannot move: {e}");
            None
        }
    }
}

/// What a caller may see before it has said who it is.
struct Nothing;

impl Exports for Nothing {
    fn find(&self, _: &str) -> Lookup {
        Lookup::Missing
    }

    fn list(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}
