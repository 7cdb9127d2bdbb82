//! NBD: the network block device protocol over stream sockets.
//!
//! | file | job |
//! |---|---|
//! | [`proto`] | bytes to values and back, without I/O; validates requests |
//! | [`inbox`], [`outbox`] | received bytes not yet parsed; replies not yet sent |
//! | [`handshake`] | from the greeting to an agreed export |
//! | [`window`] | how much one connection may have in flight |
//! | [`transmission`] | serves one connection's requests |
//! | [`session`] | all connections of one attachment: counting, cutting, draining |
//! | [`device`] | what transmission needs of a volume |
//!
//! This room knows requests and bytes. Who may see which export is decided by whoever implements [`Exports`]; it
//! deliberately knows no stores, no customers and no credentials. TLS will sit between the stream and inbox/outbox.

mod device;
mod handshake;
mod inbox;
mod outbox;
mod proto;
mod session;
mod transmission;
mod window;

#[cfg(test)]
mod tests;

use std::rc::Rc;
use std::time::Duration;

use libvol::limits::NBD_HANDSHAKE_SECONDS;
use libvol::runtime::{net::Stream, timeout};
use libvol::volume::Volume;

use device::Device;
use inbox::Inbox;
pub(crate) use session::Sessions;

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

/// The exports of one caller, asked again at every look-up and listing.
pub(crate) trait Exports<D = Rc<Volume>> {
    /// The export of that name; `None` when there is none, or none that this caller may know of.
    fn find(&self, name: &str) -> Option<Export<D>>;

    /// Names and descriptions of all that this caller may see.
    fn list(&self) -> Vec<(String, String)>;
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
    let Some(seat) = sessions.enter(&stream) else {
        tracing::debug!("nbd: connection refused: the attachment is ending or has too many connections");
        stream.shutdown();
        return;
    };
    let mut inbox = Inbox::new(stream.clone(), handshake::INBOX_BYTES);
    match timeout(deadline, handshake::negotiate(&mut inbox, &*exports, &seat)).await {
        Some(Ok(negotiated)) => {
            drop(exports);
            transmission::run(inbox, negotiated, seat).await;
        }
        Some(Err(end)) => tracing::debug!("nbd: handshake ended: {end}"),
        None => tracing::debug!("nbd: handshake not finished within {deadline:?}, dropped"),
    }
    stream.shutdown();
}
