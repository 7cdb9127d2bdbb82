//! The client's end: bytes out at some pace, bytes in until the server hangs up, plain or under TLS.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use libvol::buf::Buf;
use libvol::runtime::{SendPart, net::Stream, spawn};
use rustls::ClientConnection;

/// A client that has got so much goes.
pub(super) const ENOUGH_BYTES: usize = 2 << 20;

/// Received at once.
const RECEIVE_BYTES: usize = 16 << 10;

/// See the module's text.
pub(super) struct Client {
    stream: Stream,
    tls: Option<RefCell<ClientConnection>>,
    /// Received under TLS and not opened.
    sealed: RefCell<Vec<u8>>,
    /// Lent to the engine while a receive is under way.
    buf: RefCell<Option<Buf>>,
}

/// How bytes are cut when they are sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    Whole,
    /// In pieces of this many bytes.
    Pieces(usize),
    /// The first 64 bytes one by one.
    SlowStart,
}

impl Pace {
    pub(super) fn of(number: u8) -> Self {
        match number % 4 {
            0 => Self::Whole,
            1 => Self::Pieces(29),
            2 => Self::Pieces(509),
            _ => Self::SlowStart,
        }
    }

    fn cut(self, bytes: &[u8]) -> Vec<&[u8]> {
        match self {
            Self::Whole => vec![bytes],
            // Not more than a thousand, or there is nothing else than sending.
            Self::Pieces(len) => bytes.chunks(len.max(bytes.len() / 1000)).collect(),
            Self::SlowStart => {
                let (slow, rest) = bytes.split_at(bytes.len().min(64));
                slow.chunks(1).chain([rest]).collect()
            }
        }
    }
}

/// The client's end and the server's.
pub(super) fn pair() -> (Rc<Client>, Stream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let stream = |socket| Stream::new(OwnedFd::from(socket));
    (Rc::new(Client::over(stream(theirs), None)), stream(ours))
}

impl Client {
    fn over(stream: Stream, tls: Option<ClientConnection>) -> Self {
        Self {
            stream,
            tls: tls.map(RefCell::new),
            sealed: RefCell::default(),
            buf: RefCell::new(Some(Buf::zeroed(RECEIVE_BYTES))),
        }
    }

    /// Goes on under TLS. `None` when the server does not want to.
    pub(super) async fn encrypt(self: Rc<Self>, session: ClientConnection) -> Option<Rc<Self>> {
        let client = Self::over(self.stream.clone(), Some(session));
        let tls = client.tls.as_ref()?;
        loop {
            client.send_sealed(tls).await.then_some(())?;
            if !tls.borrow().is_handshaking() {
                return Some(Rc::new(client));
            }
            client.open_more(tls).await.then_some(())?;
        }
    }

    /// `false` when the server has gone.
    pub(super) async fn send(&self, bytes: &[u8]) -> bool {
        match &self.tls {
            None => self.send_raw(bytes).await,
            Some(tls) => {
                let written = tls.borrow_mut().writer().write_all(bytes);
                written.is_ok() && self.send_sealed(tls).await
            }
        }
    }

    /// Past TLS, if there is any.
    pub(super) async fn send_raw(&self, bytes: &[u8]) -> bool {
        bytes.is_empty()
            || self
                .stream
                .send(vec![SendPart::Bytes(bytes.into())])
                .await
                .is_ok()
    }

    async fn send_sealed(&self, tls: &RefCell<ClientConnection>) -> bool {
        let mut sealed = Vec::new();
        while tls.borrow().wants_write() {
            let written = tls.borrow_mut().write_tls(&mut sealed);
            written.expect("written to memory");
        }
        self.send_raw(&sealed).await
    }

    /// Opens more of what the server has sealed. `false` when that was all, or makes no sense.
    async fn open_more(&self, tls: &RefCell<ClientConnection>) -> bool {
        if self.sealed.borrow().is_empty() {
            let received = self.receive_raw().await;
            *self.sealed.borrow_mut() = received;
        }
        let (mut tls, mut sealed) = (tls.borrow_mut(), self.sealed.borrow_mut());
        let mut rest = &sealed[..];
        let opened = tls.read_tls(&mut rest).is_ok_and(|opened| opened > 0);
        let left = rest.len();
        let done = sealed.len() - left;
        sealed.drain(..done);
        opened && tls.process_new_packets().is_ok()
    }

    /// What comes next; nothing means that the server has hung up.
    pub(super) async fn receive(&self) -> Vec<u8> {
        let Some(tls) = &self.tls else {
            return self.receive_raw().await;
        };
        let mut more = true;
        loop {
            let mut bytes = vec![0; 16 << 10];
            let read = tls.borrow_mut().reader().read(&mut bytes);
            match read {
                Ok(read) => {
                    bytes.truncate(read);
                    return bytes;
                }
                Err(e) if more && e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return Vec::new(),
            }
            // What was opened before an end is read first.
            more = self.open_more(tls).await;
        }
    }

    async fn receive_raw(&self) -> Vec<u8> {
        let buf = self.buf.borrow_mut().take().expect("one receive at a time");
        let (received, buf) = self.stream.recv(buf, 0..RECEIVE_BYTES).await;
        let bytes = buf[..received.unwrap_or(0)].to_vec();
        *self.buf.borrow_mut() = Some(buf);
        bytes
    }

    /// Exactly so many bytes, or fewer at the end.
    pub(super) async fn receive_exactly(&self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let (received, buf) = self.stream.recv(Buf::zeroed(len), 0..len - bytes.len()).await;
            match received {
                Ok(n) if n > 0 => bytes.extend(&buf[..n]),
                _ => break,
            }
        }
        bytes
    }

    /// All that comes until the server hangs up, or until it is enough.
    pub(super) async fn receive_all(&self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let more = self.receive().await;
            if more.is_empty() {
                return all;
            }
            all.extend(more);
            if all.len() > ENOUGH_BYTES {
                self.leave();
            }
        }
    }

    /// Sends the bytes beside whatever else goes on, then hangs up if told so.
    pub(super) fn feed(
        self: &Rc<Self>,
        bytes: Vec<u8>,
        pace: Pace,
        then_hang_up: bool,
    ) -> libvol::runtime::Task<()> {
        let client = self.clone();
        spawn(async move {
            for piece in pace.cut(&bytes) {
                if !client.send(piece).await {
                    return;
                }
            }
            if then_hang_up {
                client.hang_up();
            }
        })
    }

    /// Says goodbye under TLS.
    pub(super) async fn close_notify(&self) {
        if let Some(tls) = &self.tls {
            tls.borrow_mut().send_close_notify();
            self.send_sealed(tls).await;
        }
    }

    /// Nothing more will be sent.
    pub(super) fn hang_up(&self) {
        // A socket that is gone already is no matter.
        let _ = rustix::net::shutdown(self.stream.socket(), rustix::net::Shutdown::Write);
    }

    /// Nothing more will be sent or taken.
    pub(super) fn leave(&self) {
        self.stream.shutdown();
    }
}
