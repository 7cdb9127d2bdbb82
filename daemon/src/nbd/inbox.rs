//! Bytes received and not yet parsed.
//!
//! Small messages are received many at a time into one buffer and parsed in place; a long payload is received
//! straight into the buffer it is going to be sealed in. The buffer is fixed: a peer cannot make it grow. It holds
//! plaintext, and [`Buf`] zeroes itself when it is freed. A payload that has begun must go on: each of its receives has a
//! deadline. It deliberately knows no message.

use std::io;
use std::ops::Range;
use std::time::Duration;

use libvol::buf::Buf;
use libvol::limits::NBD_PAYLOAD_SECONDS;
use libvol::runtime::timeout;

use super::link::Link;

/// Between two pieces of a payload.
const PATIENCE: Duration = Duration::from_secs(NBD_PAYLOAD_SECONDS);

/// See the module's text.
pub(super) struct Inbox {
    link: Link,
    /// Lent to the driver while a receive is under way.
    buf: Option<Buf>,
    filled: Range<usize>,
}

impl Inbox {
    /// An inbox that holds at most `capacity` bytes.
    pub(super) fn new(link: impl Into<Link>, capacity: usize) -> Self {
        Self {
            link: link.into(),
            buf: Some(Buf::zeroed(capacity)),
            filled: 0..0,
        }
    }

    /// The link, for sending.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// The link, and what was received over it and not consumed.
    pub(super) fn into_parts(self) -> (Link, Vec<u8>) {
        let left = self.bytes().to_vec();
        (self.link, left)
    }

    /// Begins with what was received elsewhere; it fits.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let buf = self.buf.as_mut().expect("only lent inside receive");
        buf[..bytes.len()].copy_from_slice(bytes);
        self.filled = 0..bytes.len();
    }

    /// Goes on with a buffer of `capacity` bytes.
    pub(super) fn resize(&mut self, capacity: usize) {
        let mut buf = Buf::zeroed(capacity);
        buf[..self.bytes().len()].copy_from_slice(self.bytes());
        self.filled = 0..self.bytes().len();
        self.buf = Some(buf);
    }

    /// What is there.
    pub(super) fn bytes(&self) -> &[u8] {
        let buf = self.buf.as_ref().expect("only lent inside receive");
        &buf[self.filled.clone()]
    }

    /// Drops `len` bytes from the front.
    pub(super) fn consume(&mut self, len: usize) {
        assert!(len <= self.filled.len());
        self.filled.start += len;
    }

    /// Receives at most `at_most` bytes more, in one call. `false` means that the peer has closed.
    ///
    /// # Errors
    /// As `recv(2)`.
    pub(super) async fn receive(&mut self, at_most: usize) -> io::Result<bool> {
        let mut buf = self.buf.take().expect("one receive at a time");
        // What is left over is less than a message: cheap to move, and the whole buffer is free again.
        if self.filled.start > 0 {
            buf.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        let end = buf.len().min(self.filled.end.saturating_add(at_most));
        assert!(end > self.filled.end, "there is room for the next message");
        let (received, buf) = self.link.recv(buf, self.filled.end..end).await;
        self.buf = Some(buf);
        let received = received?;
        self.filled.end += received;
        Ok(received > 0)
    }

    /// Receives until at least `len` bytes are there. `false` means that the peer closed before.
    ///
    /// # Errors
    /// As `recv(2)`.
    pub(super) async fn fill(&mut self, len: usize) -> io::Result<bool> {
        while self.filled.len() < len {
            if !self.receive(usize::MAX).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// As [`Inbox::fill`], of a payload.
    ///
    /// # Errors
    /// As `recv(2)`; `TimedOut` when nothing comes for [`NBD_PAYLOAD_SECONDS`]. The inbox is then of no further use.
    pub(super) async fn fill_payload(&mut self, len: usize) -> io::Result<bool> {
        while self.filled.len() < len {
            let receive = timeout(PATIENCE, self.receive(usize::MAX));
            if !receive.await.ok_or_else(stopped)?? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Receives and drops `len` bytes. `false` means that the peer closed before.
    ///
    /// # Errors
    /// As `recv(2)`; `TimedOut` when nothing comes for [`NBD_PAYLOAD_SECONDS`].
    pub(super) async fn skip(&mut self, mut len: usize) -> io::Result<bool> {
        loop {
            let here = self.filled.len().min(len);
            self.consume(here);
            len -= here;
            if len == 0 {
                return Ok(true);
            }
            if !timeout(PATIENCE, self.receive(len)).await.ok_or_else(stopped)?? {
                return Ok(false);
            }
        }
    }

    /// Moves the next `len` bytes to the front of `into`: what is here is copied, the rest received in place.
    /// `None` means that the peer closed before.
    ///
    /// # Errors
    /// As `recv(2)`; `TimedOut` when nothing comes for [`NBD_PAYLOAD_SECONDS`]. The buffer is then the engine's, until it
    /// has cancelled the receive.
    pub(super) async fn receive_into(&mut self, mut into: Buf, len: usize) -> io::Result<Option<Buf>> {
        let mut have = self.filled.len().min(len);
        into[..have].copy_from_slice(&self.bytes()[..have]);
        self.consume(have);
        while have < len {
            let receive = self.link.recv(into, have..len);
            let (received, buf) = timeout(PATIENCE, receive).await.ok_or_else(stopped)?;
            into = buf;
            match received? {
                0 => return Ok(None),
                n => have += n,
            }
        }
        Ok(Some(into))
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "nothing more came")
}
