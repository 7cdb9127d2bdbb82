//! A small NBD client over a Unix socket, or any other stream: fixed newstyle, simple replies, any number of requests in
//! flight.
//!
//! It exists because the suites must say things that ordinary clients do not: which bytes an option got in reply, which
//! writes were acknowledged. Numbers are the protocol's (NetworkBlockDevice/nbd, doc/proto.md).

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::PATIENCE;
use crate::vold::parse_uri;

/// NBD_OPT_EXPORT_NAME.
pub const OPT_EXPORT_NAME: u32 = 1;
/// NBD_OPT_ABORT.
pub const OPT_ABORT: u32 = 2;
/// NBD_OPT_LIST.
pub const OPT_LIST: u32 = 3;
/// NBD_OPT_STARTTLS.
pub const OPT_STARTTLS: u32 = 5;
/// NBD_OPT_INFO.
pub const OPT_INFO: u32 = 6;
/// NBD_OPT_GO.
pub const OPT_GO: u32 = 7;

/// NBD_OPT_STRUCTURED_REPLY.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// NBD_OPT_LIST_META_CONTEXT.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// NBD_OPT_SET_META_CONTEXT.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// NBD_OPT_EXTENDED_HEADERS.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// NBD_REP_ACK.
pub const REP_ACK: u32 = 1;
/// NBD_REP_SERVER.
pub const REP_SERVER: u32 = 2;
/// NBD_REP_INFO.
pub const REP_INFO: u32 = 3;
/// NBD_REP_META_CONTEXT.
pub const REP_META_CONTEXT: u32 = 4;
/// NBD_REP_ERR_UNSUP.
pub const REP_ERR_UNSUP: u32 = (1 << 31) | 1;
/// NBD_REP_ERR_INVALID.
pub const REP_ERR_INVALID: u32 = (1 << 31) | 3;
/// NBD_REP_ERR_TLS_REQD.
pub const REP_ERR_TLS_REQD: u32 = (1 << 31) | 5;
/// NBD_REP_ERR_UNKNOWN.
pub const REP_ERR_UNKNOWN: u32 = (1 << 31) | 6;
/// NBD_REP_ERR_TOO_BIG.
pub const REP_ERR_TOO_BIG: u32 = (1 << 31) | 9;

/// NBD_CMD_READ.
pub const CMD_READ: u16 = 0;
/// NBD_CMD_WRITE.
pub const CMD_WRITE: u16 = 1;
/// NBD_CMD_DISC.
pub const CMD_DISC: u16 = 2;
/// NBD_CMD_FLUSH.
pub const CMD_FLUSH: u16 = 3;
/// NBD_CMD_TRIM.
pub const CMD_TRIM: u16 = 4;
/// NBD_CMD_CACHE.
pub const CMD_CACHE: u16 = 5;
/// NBD_CMD_WRITE_ZEROES.
pub const CMD_WRITE_ZEROES: u16 = 6;

/// NBD_CMD_FLAG_FUA.
pub const FUA: u16 = 1;
/// NBD_CMD_FLAG_NO_HOLE.
pub const NO_HOLE: u16 = 2;
/// NBD_CMD_FLAG_FAST_ZERO.
pub const FAST_ZERO: u16 = 16;

/// NBD_EPERM.
pub const EPERM: u32 = 1;
/// NBD_EIO.
pub const EIO: u32 = 5;
/// NBD_EINVAL.
pub const EINVAL: u32 = 22;
/// NBD_ENOSPC.
pub const ENOSPC: u32 = 28;
/// NBD_ENOTSUP.
pub const ENOTSUP: u32 = 95;

/// NBD_FLAG_READ_ONLY.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// NBD_FLAG_SEND_CACHE.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// NBD_FLAG_SEND_FAST_ZERO.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// Client flags: fixed newstyle and no zeroes.
const NEWSTYLE_NO_ZEROES: u32 = 3;
/// Client flags: fixed newstyle, with the zeroes after EXPORT_NAME's answer.
const NEWSTYLE: u32 = 1;

const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option it answers.
    pub option: u32,
    /// NBD_REP_*.
    pub kind: u32,
    /// What follows.
    pub data: Vec<u8>,
}

/// A connection before an export is chosen.
pub struct Haggle<S = UnixStream>(S);

impl Haggle {
    /// Connects and exchanges greetings (fixed newstyle, no zeroes).
    ///
    /// # Errors
    /// The socket's; a server that hangs up.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Self::greet(socket, NEWSTYLE_NO_ZEROES)
    }

    /// Connects and takes an export with EXPORT_NAME, with or without agreeing to leave the 124 zeroes out.
    ///
    /// # Errors
    /// The socket's; a server that hangs up, which is how it refuses.
    pub fn export_name(socket: &Path, export: &str, no_zeroes: bool) -> io::Result<Client> {
        let flags = if no_zeroes { NEWSTYLE_NO_ZEROES } else { NEWSTYLE };
        let mut haggle = Self::greet(socket, flags)?;
        haggle.send(OPT_EXPORT_NAME, export.as_bytes())?;
        let mut answer = [0; 10];
        haggle.0.read_exact(&mut answer)?;
        if !no_zeroes {
            let mut zeroes = [1; 124];
            haggle.0.read_exact(&mut zeroes)?;
            assert_eq!(zeroes, [0; 124]);
        }
        Ok(Client::over(
            haggle.0,
            u64::from_be_bytes(answer[..8].try_into().expect("8 bytes")),
            u16::from_be_bytes(answer[8..].try_into().expect("2 bytes")),
        ))
    }

    fn greet(socket: &Path, client_flags: u32) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Self::greet_over(stream, client_flags)
    }
}

impl<S: Read + Write> Haggle<S> {
    /// Exchanges greetings over a new connection.
    ///
    /// # Errors
    /// The stream's; a server that hangs up.
    pub fn over(stream: S) -> io::Result<Self> {
        Self::greet_over(stream, NEWSTYLE_NO_ZEROES)
    }

    /// Goes on over a connection that has its greeting behind it.
    pub fn go_on(stream: S) -> Self {
        Self(stream)
    }

    fn greet_over(mut stream: S, client_flags: u32) -> io::Result<Self> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        assert_eq!(&greeting[8..16], IHAVEOPT);
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        assert_eq!(flags & 3, 3, "fixed newstyle and no zeroes are offered");
        stream.write_all(&client_flags.to_be_bytes())?;
        Ok(Self(stream))
    }

    /// Sends bytes that may be anything.
    ///
    /// # Errors
    /// The socket's.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// The socket itself.
    pub fn into_stream(self) -> S {
        self.0
    }

    /// The socket itself, lent.
    pub fn stream(&mut self) -> &mut S {
        &mut self.0
    }

    /// Sends an option.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        self.0.write_all(&option_bytes(option, data))
    }

    /// One reply.
    ///
    /// # Errors
    /// The socket's; `UnexpectedEof` when the server hung up.
    pub fn reply(&mut self) -> io::Result<OptionReply> {
        let mut head = [0; 20];
        self.0.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let magic = u64::from_be_bytes(head[..8].try_into().expect("8 bytes"));
        assert_eq!(magic, OPTION_REPLY_MAGIC);
        let mut data = vec![0; word(16) as usize];
        self.0.read_exact(&mut data)?;
        Ok(OptionReply {
            option: word(8),
            kind: word(12),
            data,
        })
    }

    /// Sends an option and collects replies up to the final one (an ACK or an error).
    ///
    /// # Errors
    /// The socket's.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<OptionReply>> {
        self.send(option, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.reply()?;
            let last = reply.kind == REP_ACK || reply.kind & (1 << 31) != 0;
            replies.push(reply);
            if last {
                return Ok(replies);
            }
        }
    }

    /// What the last reply to an option is.
    ///
    /// # Panics
    /// When the server hangs up instead.
    pub fn final_kind(&mut self, option: u32, data: &[u8]) -> u32 {
        let replies = self.ask(option, data).expect("the server answers");
        replies.last().expect("a final reply").kind
    }

    /// The names LIST gives.
    ///
    /// # Errors
    /// The socket's.
    pub fn list(&mut self) -> io::Result<Vec<String>> {
        let replies = self.ask(OPT_LIST, &[])?;
        Ok(replies
            .iter()
            .filter(|reply| reply.kind == REP_SERVER)
            .map(|reply| {
                let len = u32::from_be_bytes(reply.data[..4].try_into().expect("a length")) as usize;
                String::from_utf8(reply.data[4..4 + len].to_vec()).expect("UTF-8")
            })
            .collect())
    }

    /// GO for an export.
    ///
    /// # Errors
    /// The refusing reply, or the socket's error.
    pub fn go(mut self, export: &str) -> Result<Client<S>, GoError> {
        let replies = self.ask(OPT_GO, &go_data(export)).map_err(GoError::Connection)?;
        let last = replies.last().expect("a final reply");
        if last.kind != REP_ACK {
            return Err(GoError::Refused(last.clone()));
        }
        let info = replies
            .iter()
            .find(|reply| reply.kind == REP_INFO && reply.data[..2] == [0, 0])
            .expect("GO answers with the export's size and flags");
        Ok(Client::over(
            self.0,
            u64::from_be_bytes(info.data[2..10].try_into().expect("8 bytes")),
            u16::from_be_bytes(info.data[10..12].try_into().expect("2 bytes")),
        ))
    }
}

/// The server hangs up, and has nothing more to say.
///
/// # Panics
/// When it says something, or keeps the connection until the stream's patience ends.
pub fn hangs_up(mut stream: impl Read) {
    let mut rest = Vec::new();
    // A reset is a hang-up too: there were bytes that it did not want to read.
    if let Err(e) = stream.read_to_end(&mut rest) {
        assert_eq!(e.kind(), io::ErrorKind::ConnectionReset, "{e}");
    }
    assert_eq!(rest, [0; 0]);
}

/// An option as it goes over the wire.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = IHAVEOPT.to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A request as it goes over the wire, without its payload.
pub fn request_bytes(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn contexts_data(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

/// Data of GO and INFO: the name, and no particular information asked.
pub fn go_data(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 0]);
    data
}

/// Why GO gave no client.
#[derive(Debug)]
pub enum GoError {
    /// An error reply.
    Refused(OptionReply),
    /// The connection ended.
    Connection(io::Error),
}

/// A connection to an export.
pub struct Client<S = UnixStream> {
    stream: S,
    size: u64,
    flags: u16,
    next_cookie: u64,
    in_flight: HashMap<u64, usize>,
}

/// How a request ended: the protocol's error number.
pub type Outcome<T> = Result<T, u32>;

/// A finished request.
#[derive(Debug)]
pub struct Done {
    /// Which.
    pub cookie: u64,
    /// Its error, 0 when it succeeded.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

impl Client {
    /// Connects to what `volctl attach` printed.
    ///
    /// # Panics
    /// When it is refused.
    pub fn connect(uri: &str) -> Self {
        let (socket, export) = parse_uri(uri);
        Haggle::connect(&socket)
            .unwrap_or_else(|e| panic!("{uri}: {e}"))
            .go(&export)
            .unwrap_or_else(|e| panic!("{uri}: {e:?}"))
    }
}

impl<S: Read + Write> Client<S> {
    fn over(stream: S, size: u64, flags: u16) -> Self {
        Self {
            stream,
            size,
            flags,
            next_cookie: 0,
            in_flight: HashMap::new(),
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Transmission flags.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Requests without a reply yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Sends a request; gives its cookie. `payload` goes with writes only.
    ///
    /// # Errors
    /// The socket's.
    pub fn submit(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = request_bytes(command, flags, cookie, offset, len);
        bytes.extend(payload);
        self.stream.write_all(&bytes)?;
        self.in_flight
            .insert(cookie, if command == CMD_READ { len as usize } else { 0 });
        Ok(cookie)
    }

    /// The next reply, whichever request it answers.
    ///
    /// # Errors
    /// The socket's; `UnexpectedEof` when the server hung up.
    pub fn reply(&mut self) -> io::Result<Done> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(
            head[..4],
            SIMPLE_REPLY_MAGIC.to_be_bytes(),
            "structured replies were not asked for"
        );
        let error = u32::from_be_bytes(head[4..8].try_into().expect("4 bytes"));
        let cookie = u64::from_be_bytes(head[8..].try_into().expect("8 bytes"));
        let len = self.in_flight.remove(&cookie).expect("a reply to a request");
        let mut data = vec![0; if error == 0 { len } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Done { cookie, error, data })
    }

    fn call(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Outcome<Vec<u8>> {
        assert!(self.in_flight.is_empty(), "one at a time here");
        self.submit(command, flags, offset, len, payload)
            .expect("the server lives");
        let done = self.reply().expect("the server lives");
        if done.error == 0 {
            Ok(done.data)
        } else {
            Err(done.error)
        }
    }

    /// Any command, alone.
    ///
    /// # Errors
    /// The reply's.
    pub fn command(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> Outcome<()> {
        self.call(command, flags, offset, len, &[]).map(|_| ())
    }

    /// Reads.
    ///
    /// # Errors
    /// The reply's.
    pub fn read(&mut self, offset: u64, len: usize) -> Outcome<Vec<u8>> {
        self.call(CMD_READ, 0, offset, len as u32, &[])
    }

    /// Writes.
    ///
    /// # Errors
    /// The reply's.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Outcome<()> {
        self.call(CMD_WRITE, 0, offset, data.len() as u32, data)
            .map(|_| ())
    }

    /// Writes with force unit access.
    ///
    /// # Errors
    /// The reply's.
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> Outcome<()> {
        self.call(CMD_WRITE, FUA, offset, data.len() as u32, data)
            .map(|_| ())
    }

    /// Flushes.
    ///
    /// # Errors
    /// The reply's.
    pub fn flush(&mut self) -> Outcome<()> {
        self.command(CMD_FLUSH, 0, 0, 0)
    }

    /// Trims.
    ///
    /// # Errors
    /// The reply's.
    pub fn trim(&mut self, offset: u64, len: u32) -> Outcome<()> {
        self.command(CMD_TRIM, 0, offset, len)
    }

    /// Writes zeroes.
    ///
    /// # Errors
    /// The reply's.
    pub fn write_zeroes(&mut self, offset: u64, len: u32, flags: u16) -> Outcome<()> {
        self.command(CMD_WRITE_ZEROES, flags, offset, len)
    }

    /// Ends the connection in the protocol's way.
    pub fn disconnect(mut self) {
        let _ = self.submit(CMD_DISC, 0, 0, 0, &[]);
    }

    /// The socket itself, for bytes that may be anything.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// The socket itself, lent.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }
}
