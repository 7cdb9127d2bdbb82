//! The stream of a connection: plain, or under TLS.
//!
//! Under TLS one record layer sits between socket and inbox/outbox: what is received is opened into the caller's buffer, what
//! is sent is sealed a piece at a time, so that memory is bounded by a piece and a few records whatever the peer does. Reading
//! and writing go on side by side; each holds the record layer only between two waits. It deliberately knows no certificate:
//! who the peer is, is decided by whoever began the TLS session.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use libvol::buf::Buf;
use libvol::runtime::sync::Semaphore;
use libvol::runtime::{SendPart, net::Stream, timeout};
use rustls::ServerConnection;

/// Ciphertext received at once: four full records.
const CIPHER_BYTES: usize = 64 << 10;
/// How long a last word may take to leave.
pub(super) const GOODBYE: Duration = Duration::from_secs(1);
/// Plaintext sealed before it is sent.
const SEAL_BYTES: usize = 256 << 10;

/// See the module's text. Clones share the connection.
#[derive(Clone)]
pub(crate) struct Link {
    stream: Stream,
    tls: Option<Rc<Tls>>,
}

struct Tls {
    session: RefCell<ServerConnection>,
    /// Room for ciphertext; lent to the driver while a receive is under way.
    cipher: RefCell<Option<Buf>>,
    /// What of it has not been taken yet.
    filled: Cell<(usize, usize)>,
    /// One message goes out at a time.
    sending: Rc<Semaphore>,
}

/// What opening a piece of ciphertext has brought.
struct Opened {
    asks_for_an_answer: bool,
    is_the_end: bool,
}

impl Tls {
    /// Opens what is in `start..end` of the ciphertext, as far as the record layer takes it. `None` when nothing is there.
    fn open(&self, start: usize, end: usize) -> io::Result<Option<Opened>> {
        let (mut session, cipher) = (self.session.borrow_mut(), self.cipher.borrow());
        let cipher = cipher
            .as_ref()
            .ok_or_else(|| io::Error::other("two receives at once"))?;
        let mut rest = &cipher[start..end];
        if rest.is_empty() {
            return Ok(None);
        }
        let taken = session.read_tls(&mut rest)?;
        self.filled.set((start + taken, end));
        let state = session
            .process_new_packets()
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Some(Opened {
            asks_for_an_answer: state.tls_bytes_to_write() > 0,
            is_the_end: state.peer_has_closed() && state.plaintext_bytes_to_read() == 0,
        }))
    }
}

/// A link on its way to another thread.
pub(crate) struct Detached {
    socket: OwnedFd,
    session: Option<Box<ServerConnection>>,
    /// Ciphertext that was received and not opened.
    cipher: Vec<u8>,
}

impl From<Stream> for Link {
    fn from(stream: Stream) -> Self {
        Self { stream, tls: None }
    }
}

impl Link {
    /// Goes on under TLS. Its handshake has not happened yet.
    pub(super) fn with_tls(stream: Stream, session: ServerConnection) -> Self {
        Self::over(stream, session, &[])
    }

    fn over(stream: Stream, mut session: ServerConnection, received: &[u8]) -> Self {
        session.set_buffer_limit(Some(SEAL_BYTES));
        let mut cipher = Buf::zeroed(CIPHER_BYTES);
        cipher[..received.len()].copy_from_slice(received);
        let tls = Tls {
            session: RefCell::new(session),
            cipher: RefCell::new(Some(cipher)),
            filled: Cell::new((0, received.len())),
            sending: Semaphore::new(1),
        };
        Self {
            stream,
            tls: Some(Rc::new(tls)),
        }
    }

    /// Makes it ready for another thread. Nothing may be under way on it; `None` when something is.
    pub(super) fn detach(self) -> io::Result<Option<Detached>> {
        let socket = self.stream.socket().try_clone()?;
        let Some(tls) = self.tls else {
            return Ok(Some(Detached {
                socket,
                session: None,
                cipher: Vec::new(),
            }));
        };
        let Ok(tls) = Rc::try_unwrap(tls) else {
            return Ok(None);
        };
        let (start, end) = tls.filled.get();
        let cipher = match &*tls.cipher.borrow() {
            Some(cipher) => cipher[start..end].to_vec(),
            None => return Ok(None),
        };
        Ok(Some(Detached {
            socket,
            session: Some(Box::new(tls.session.into_inner())),
            cipher,
        }))
    }

    /// Takes it up on this thread.
    pub(crate) fn attach(detached: Detached) -> Self {
        let stream = Stream::new(detached.socket);
        match detached.session {
            None => stream.into(),
            Some(session) => Self::over(stream, *session, &detached.cipher),
        }
    }

    /// The stream beneath.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Receives up to `range.len()` bytes into `buf[range]`; 0 means that the peer has closed. The buffer comes back.
    pub(super) async fn recv(&self, mut buf: Buf, range: Range<usize>) -> (io::Result<usize>, Buf) {
        let Some(tls) = &self.tls else {
            return self.stream.recv(buf, range).await;
        };
        loop {
            let read = tls.session.borrow_mut().reader().read(&mut buf[range.clone()]);
            match read {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // A peer that hangs up without a word of TLS: whatever it had sent is here by now.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return (Ok(0), buf),
                done => return (done, buf),
            }
            match self.open_more(tls).await {
                Ok(true) => {}
                Ok(false) => return (Ok(0), buf),
                Err(e) => return (Err(e), buf),
            }
        }
    }

    /// Finishes the TLS handshake.
    ///
    /// # Errors
    /// `InvalidData` with what TLS has against the peer; as the socket.
    pub(super) async fn handshake(&self) -> io::Result<()> {
        let Some(tls) = &self.tls else { return Ok(()) };
        while tls.session.borrow().is_handshaking() {
            let opened = self.open_more(tls).await;
            // What went wrong is told to the peer before the connection ends.
            let told = self.send_sealed(tls).await;
            if !opened? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            told?;
        }
        // The client's Finished may have come with the server's last words still to be said.
        self.send_sealed(tls).await
    }

    /// The peer's own certificate (DER).
    pub(super) fn peer_certificate(&self) -> Option<Vec<u8>> {
        let session = self.tls.as_ref()?.session.borrow();
        Some(session.peer_certificates()?.first()?.to_vec())
    }

    /// Takes ciphertext, receiving it if none is there, and opens it. `false` when the peer has closed.
    async fn open_more(&self, tls: &Tls) -> io::Result<bool> {
        let (start, end) = tls.filled.get();
        let (start, end) = match start < end {
            true => (start, end),
            false => {
                let cipher = tls.cipher.borrow_mut().take();
                let cipher = cipher.ok_or_else(|| io::Error::other("two receives at once"))?;
                let (received, cipher) = self.stream.recv(cipher, 0..CIPHER_BYTES).await;
                *tls.cipher.borrow_mut() = Some(cipher);
                (0, received?)
            }
        };
        let Some(opened) = tls.open(start, end)? else {
            return Ok(false);
        };
        // A key update asks for an answer. During the handshake whoever drives it sends.
        if opened.asks_for_an_answer && !tls.session.borrow().is_handshaking() {
            self.send_sealed(tls).await?;
        }
        Ok(!opened.is_the_end)
    }

    /// Sends all parts in order.
    ///
    /// # Errors
    /// As `sendmsg(2)`; the link is then of no further use.
    pub(super) async fn send(&self, parts: Vec<SendPart>) -> io::Result<()> {
        let Some(tls) = &self.tls else {
            return self.stream.send(parts).await;
        };
        let mut slices = Vec::new();
        parts.iter().for_each(|part| part.slices(&mut slices));
        let mut slices: Vec<IoSlice<'_>> = slices.into_iter().map(IoSlice::new).collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            // Gathered, so that small replies share a record.
            let sealed = tls.session.borrow_mut().writer().write_vectored(rest)?;
            IoSlice::advance_slices(&mut rest, sealed);
            self.send_sealed(tls).await?;
        }
        Ok(())
    }

    /// Sends what is sealed.
    async fn send_sealed(&self, tls: &Tls) -> io::Result<()> {
        let _turn = tls.sending.acquire(1).await;
        loop {
            let mut sealed = Vec::new();
            {
                let mut session = tls.session.borrow_mut();
                while session.wants_write() {
                    session.write_tls(&mut sealed)?;
                }
            }
            if sealed.is_empty() {
                return Ok(());
            }
            self.stream.send(vec![SendPart::Bytes(sealed.into())]).await?;
        }
    }

    /// Says goodbye under TLS, so that a peer can tell an end from a cut. One that takes nothing does not keep the connection
    /// by that.
    pub(super) async fn say_goodbye(&self) {
        if let Some(tls) = &self.tls {
            tls.session.borrow_mut().send_close_notify();
            let _ = timeout(GOODBYE, self.send_sealed(tls)).await;
        }
    }

    /// Ends the conversation: pending receives return 0, pending sends fail.
    pub(super) fn shutdown(&self) {
        self.stream.shutdown();
    }

    /// See [`Stream::hung_up`].
    pub(super) async fn hung_up(&self) {
        self.stream.hung_up().await;
    }
}
