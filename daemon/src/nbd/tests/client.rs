//! A client that takes the protocol literally: it checks magics, cookies and flags, and reassembles replies.
//!
//! Its numbers are written out here once more, on purpose: sharing the server's would hide a wrong one.

use libvol::runtime::{SendPart, net::Stream};

use crate::nbd::inbox::Inbox;

pub(super) const FUA: u16 = 1;
pub(super) const NO_HOLE: u16 = 2;
pub(super) const DF: u16 = 4;
pub(super) const REQ_ONE: u16 = 8;
pub(super) const FAST_ZERO: u16 = 16;
pub(super) const PAYLOAD_LEN: u16 = 32;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISC: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const EOVERFLOW: u32 = 75;
pub(super) const ENOTSUP: u32 = 95;
pub(super) const ESHUTDOWN: u32 = 108;

pub(super) struct Client {
    inbox: Inbox,
}

/// A piece of a structured reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    None,
    Data(u64, Vec<u8>),
    Hole(u64, u32),
    Status(u32, Vec<(u32, u32)>),
    StatusExt(u32, Vec<(u64, u64)>),
    Error(u32, String),
}

/// A whole reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) cookie: u64,
    pub(super) simple: bool,
    /// What extended replies repeat.
    pub(super) offset: Option<u64>,
    /// 0, or the error.
    pub(super) error: u32,
    pub(super) text: String,
    pub(super) chunks: Vec<Chunk>,
}

impl Answer {
    /// The bytes of a read of `len` bytes at `offset`, each described exactly once.
    pub(super) fn data(&self, offset: u64, len: usize) -> Vec<u8> {
        assert_eq!(self.error, 0, "{}", self.text);
        let mut bytes = vec![None; len];
        for chunk in &self.chunks {
            let (at, piece) = match chunk {
                Chunk::Data(at, piece) => (*at, piece.clone()),
                Chunk::Hole(at, hole) => (*at, vec![0; *hole as usize]),
                Chunk::None => continue,
                other => panic!("not content: {other:?}"),
            };
            for (i, byte) in piece.into_iter().enumerate() {
                let place = &mut bytes[(at - offset) as usize + i];
                assert!(place.replace(byte).is_none(), "described twice");
            }
        }
        bytes.into_iter().map(|b| b.expect("described")).collect()
    }
}

impl Client {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            inbox: Inbox::new(stream, 1 << 20),
        }
    }

    pub(super) async fn send(&self, bytes: &[u8]) {
        let sent = self.inbox.link().send(vec![SendPart::Bytes(bytes.into())]);
        sent.await.expect("the server listens");
    }

    /// Sends what may never be read.
    pub(super) async fn try_send(&self, bytes: &[u8]) -> bool {
        self.inbox
            .link()
            .send(vec![SendPart::Bytes(bytes.into())])
            .await
            .is_ok()
    }

    pub(super) async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            if self.inbox.bytes().is_empty() {
                assert!(
                    self.inbox.receive(usize::MAX).await.unwrap(),
                    "the server hung up"
                );
            }
            let here = self.inbox.bytes().len().min(len - out.len());
            out.extend_from_slice(&self.inbox.bytes()[..here]);
            self.inbox.consume(here);
        }
        out
    }

    async fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).await.try_into().unwrap())
    }
    async fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).await.try_into().unwrap())
    }
    async fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).await.try_into().unwrap())
    }

    /// Reads on until the server hangs up; how many bytes there still were.
    pub(super) async fn hangup(&mut self) -> usize {
        let mut rest = 0;
        loop {
            rest += self.inbox.bytes().len();
            self.inbox.consume(self.inbox.bytes().len());
            if !self.inbox.receive(usize::MAX).await.unwrap_or(false) {
                return rest;
            }
        }
    }

    /// Closes both directions.
    pub(super) fn drop_connection(&self) {
        self.inbox.link().shutdown();
    }

    /// Closes one direction: a hang-up in this protocol, which knows a goodbye for the other meaning.
    pub(super) fn stop_sending(&self) {
        let socket = self.inbox.link().stream().socket();
        rustix::net::shutdown(socket, rustix::net::Shutdown::Write).unwrap();
    }

    pub(super) async fn greet(&mut self, flags: u32) {
        assert_eq!(self.take(16).await, b"NBDMAGICIHAVEOPT");
        assert_eq!(self.u16().await, 3, "fixed newstyle, and zeroes can be declined");
        self.send(&flags.to_be_bytes()).await;
    }

    pub(super) async fn ask(&self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.send(&bytes).await;
    }

    /// All replies to an option, the last one included.
    pub(super) async fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.ask(option, data).await;
        self.option_replies(option).await
    }

    pub(super) async fn option_replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64().await, 0x3e889045565a9);
            assert_eq!(self.u32().await, option);
            let kind = self.u32().await;
            let len = self.u32().await;
            replies.push((kind, self.take(len as usize).await));
            if kind == 1 || kind >= 1 << 31 {
                return replies;
            }
        }
    }

    /// From the greeting into transmission.
    pub(super) async fn start(&mut self, name: &str, structured: bool, contexts: bool) {
        self.greet(3).await;
        if structured {
            assert_eq!(self.option(8, &[]).await, [(1, vec![])]);
        }
        if contexts {
            let replies = self.option(10, &context_query(name, &["base:allocation"])).await;
            assert_eq!(replies.len(), 2);
            assert_eq!(
                replies[0].1,
                [&1u32.to_be_bytes()[..], b"base:allocation"].concat()
            );
        }
        let replies = self.option(7, &export_query(name, &[])).await;
        assert_eq!(replies.last().unwrap().0, 1, "{replies:?}");
    }

    pub(super) async fn request(&self, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
        self.send(&request(flags, command, cookie, offset, len)).await;
    }

    pub(super) async fn write(&self, flags: u16, cookie: u64, offset: u64, payload: &[u8]) {
        let mut bytes = request(flags, WRITE, cookie, offset, payload.len() as u32);
        bytes.extend(payload);
        self.send(&bytes).await;
    }

    /// The next reply. `read_len` is what a simple reply to a read carries.
    pub(super) async fn answer(&mut self, read_len: usize) -> Answer {
        let mut answer = Answer {
            cookie: 0,
            simple: false,
            offset: None,
            error: 0,
            text: String::new(),
            chunks: vec![],
        };
        loop {
            match self.u32().await {
                0x6744_6698 => {
                    assert!(answer.chunks.is_empty(), "a simple reply is whole");
                    answer.simple = true;
                    answer.error = self.u32().await;
                    answer.cookie = self.u64().await;
                    if answer.error == 0 && read_len > 0 {
                        answer.chunks = vec![Chunk::Data(0, self.take(read_len).await)];
                    }
                    return answer;
                }
                magic @ (0x668e_33ef | 0x6e8a_278c) => {
                    let (flags, kind) = (self.u16().await, self.u16().await);
                    let cookie = self.u64().await;
                    assert!(
                        answer.chunks.is_empty() || answer.cookie == cookie,
                        "not interleaved"
                    );
                    answer.cookie = cookie;
                    let len = match magic {
                        0x668e_33ef => self.u32().await as usize,
                        _ => {
                            answer.offset = Some(self.u64().await);
                            self.u64().await as usize
                        }
                    };
                    let payload = self.take(len).await;
                    let chunk = chunk(kind, &payload);
                    if let Chunk::Error(error, text) = &chunk {
                        (answer.error, answer.text) = (*error, text.clone());
                    }
                    answer.chunks.push(chunk);
                    assert!(flags <= 1, "only DONE is known");
                    if flags == 1 {
                        return answer;
                    }
                }
                magic => panic!("out of step: {magic:#x}"),
            }
        }
    }

    /// From the greeting into transmission with extended headers and these contexts.
    pub(super) async fn start_extended(&mut self, name: &str, contexts: &[&str]) {
        self.greet(3).await;
        assert_eq!(self.option(11, &[]).await, [(1, vec![])]);
        let replies = self.option(10, &context_query(name, contexts)).await;
        assert_eq!(replies.len(), contexts.len() + 1);
        let replies = self.option(7, &export_query(name, &[])).await;
        assert_eq!(replies.last().unwrap().0, 1, "{replies:?}");
    }

    /// Extended request with its payload, and the reply.
    pub(super) async fn call_extended(
        &mut self,
        flags: u16,
        command: u16,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> Answer {
        let mut bytes = request_extended(flags, command, 79, offset, len);
        bytes.extend(payload);
        self.send(&bytes).await;
        let answer = self.answer(0).await;
        assert_eq!(
            (answer.cookie, answer.simple, answer.offset),
            (79, false, Some(offset))
        );
        answer
    }

    /// Request and reply of something that carries no data.
    pub(super) async fn call(&mut self, flags: u16, command: u16, offset: u64, len: u32) -> Answer {
        self.request(flags, command, 77, offset, len).await;
        let answer = self.answer(0).await;
        assert_eq!(answer.cookie, 77);
        answer
    }

    /// Writes and waits for the reply.
    pub(super) async fn put(&mut self, flags: u16, offset: u64, payload: &[u8]) -> Answer {
        self.write(flags, 78, offset, payload).await;
        let answer = self.answer(0).await;
        assert_eq!(answer.cookie, 78);
        answer
    }

    /// Proves that the stream is in step: a write, and a read of what it wrote.
    pub(super) async fn prove_in_step(&mut self) {
        static NEXT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(1);
        let byte = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(self.put(0, 100, &[byte; 50]).await.error, 0);
        let read = self.call(0, READ, 99, 52).await;
        assert_eq!(read.data(99, 52)[1..51], [byte; 50]);
    }
}

/// A request as it goes over the wire, without its payload.
pub(super) fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let start = request_start(0x2560_9513, flags, command, cookie, offset);
    [&start[..], &len.to_be_bytes()].concat()
}

/// The same, extended.
pub(super) fn request_extended(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let start = request_start(0x21e4_1c71, flags, command, cookie, offset);
    [&start[..], &len.to_be_bytes()].concat()
}

/// What both have in front of the length.
fn request_start(magic: u32, flags: u16, command: u16, cookie: u64, offset: u64) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes
}

fn chunk(kind: u16, payload: &[u8]) -> Chunk {
    let u32_at = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
    match kind {
        0 => {
            assert!(payload.is_empty());
            Chunk::None
        }
        1 => {
            assert!(payload.len() > 8, "a chunk describes at least a byte");
            Chunk::Data(u64_at(0), payload[8..].to_vec())
        }
        2 => {
            assert_eq!(payload.len(), 12);
            assert!(u32_at(8) > 0);
            Chunk::Hole(u64_at(0), u32_at(8))
        }
        5 => {
            let runs = payload[4..].chunks_exact(8);
            assert!(runs.remainder().is_empty() && runs.len() > 0);
            let word = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
            Chunk::Status(u32_at(0), runs.map(|r| (word(&r[..4]), word(&r[4..]))).collect())
        }
        6 => {
            let runs = payload[8..].chunks_exact(16);
            assert!(runs.remainder().is_empty() && runs.len() == u32_at(4) as usize && runs.len() > 0);
            let word = |b: &[u8]| u64::from_be_bytes(b.try_into().unwrap());
            Chunk::StatusExt(u32_at(0), runs.map(|r| (word(&r[..8]), word(&r[8..]))).collect())
        }
        0x8001 => {
            let len = u16::from_be_bytes(payload[4..6].try_into().unwrap());
            assert_eq!(payload.len(), 6 + usize::from(len));
            assert_ne!(u32_at(0), 0);
            Chunk::Error(u32_at(0), String::from_utf8(payload[6..].to_vec()).unwrap())
        }
        other => panic!("chunk type {other:#x}"),
    }
}

/// Data of INFO and GO.
pub(super) fn export_query(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend(info.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) fn context_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}
