//! What a client is about to ask in its transmission phase, and what has to come of it: a second reading of the
//! protocol, written apart from the server's, numbers included.

use crate::nbd::proto::Framing;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
const CACHE: u16 = 5;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD: u16 = 32;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

/// The longest payload.
const LONGEST: u64 = 32 << 20;
/// What takes no payload is carried out in pieces of this size,
const PIECE: u64 = 1 << 30;
/// and zeros that must not be holes in pieces of this.
const WRITTEN_PIECE: u64 = 32 << 20;

/// Cookies are given by us, so that each reply is one request's: its index under this mask.
const COOKIE_MASK: u64 = 0x5bd1_e995_0000_0000;

/// Context 1, `base:allocation`.
pub(super) const ALLOCATION: u8 = 1;
/// Context 2, `qemu:allocation-depth`.
pub(super) const DEPTH: u8 = 2;

/// What was agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) framing: Framing,
    pub(super) read_only: bool,
    /// [`ALLOCATION`], [`DEPTH`].
    pub(super) contexts: u8,
    pub(super) size_bytes: u64,
    /// The device fails in places; see [`failure`].
    pub(super) failing: bool,
}

/// The conversation: requests that are whole, then what follows them.
#[derive(Debug, Default)]
pub(super) struct Script {
    pub(super) requests: Vec<Expected>,
    /// All of them as bytes, with our cookies.
    pub(super) wire: Vec<u8>,
    pub(super) ending: Ending,
    /// Bytes behind them.
    pub(super) tail: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    /// The tail is the beginning of a request, or nothing.
    #[default]
    Open,
    /// It begins with a goodbye.
    Goodbye,
    /// It begins with what nobody can follow.
    Violation,
}

/// A whole request.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) command: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) fua: bool,
    pub(super) no_hole: bool,
    pub(super) unfragmented: bool,
    pub(super) one: bool,
    /// Asked about by a BLOCK_STATUS.
    pub(super) contexts: u8,
    pub(super) payload: Vec<u8>,
    /// It gets to the device.
    pub(super) at_device: bool,
    /// The reply's error; 0 is success.
    pub(super) error: u32,
}

impl Script {
    /// Reads a client's bytes, and puts our cookies into them.
    pub(super) fn read(mut bytes: &[u8], terms: &Terms) -> Self {
        let mut script = Self::default();
        let extended = terms.framing == Framing::Extended;
        let header = if extended { 32 } else { 28 };
        while let Some(head) = bytes.get(..header) {
            if head[..4]
                != if extended {
                    *b"\x21\xe4\x1c\x71"
                } else {
                    *b"\x25\x60\x95\x13"
                }
            {
                script.ending = Ending::Violation;
                break;
            }
            let mut request = Expected::of(head);
            let (flags, command) = (be16(&head[4..]), request.command);
            if command == DISCONNECT {
                script.ending = Ending::Goodbye;
                break;
            }
            let carries = command == WRITE || extended && flags & PAYLOAD != 0;
            let payload = if carries { request.len } else { 0 };
            if payload > LONGEST {
                script.ending = Ending::Violation;
                break;
            }
            let Some(payload) = bytes.get(header..header + payload as usize) else {
                break;
            };
            request.judge(flags, payload, terms);
            let cookie = COOKIE_MASK ^ script.requests.len() as u64;
            script.wire.extend(&head[..8]);
            script.wire.extend(cookie.to_be_bytes());
            script.wire.extend(&head[16..]);
            script.wire.extend(payload);
            bytes = &bytes[header + payload.len()..];
            request.payload = payload.to_vec();
            script.requests.push(request);
        }
        script.tail = bytes.to_vec();
        script
    }

    /// The request that a reply's cookie belongs to.
    pub(super) fn of_cookie(&self, cookie: u64) -> usize {
        let index = cookie ^ COOKIE_MASK;
        assert!(
            index < self.requests.len() as u64,
            "a reply to nothing that was asked: cookie {cookie:#x}"
        );
        index as usize
    }
}

impl Expected {
    fn of(head: &[u8]) -> Self {
        Self {
            command: be16(&head[6..]),
            offset: be64(&head[16..]),
            len: match head.len() {
                28 => be32(&head[24..]).into(),
                _ => be64(&head[24..]),
            },
            fua: false,
            no_hole: false,
            unfragmented: false,
            one: false,
            contexts: 0,
            payload: Vec::new(),
            at_device: false,
            error: 0,
        }
    }

    fn judge(&mut self, flags: u16, payload: &[u8], terms: &Terms) {
        let extended = terms.framing == Framing::Extended;
        self.fua = flags & FUA != 0;
        self.no_hole = flags & NO_HOLE != 0;
        self.unfragmented = flags & DF != 0;
        self.one = flags & REQ_ONE != 0;
        self.contexts = terms.contexts;
        let mut named = None;
        if self.command == BLOCK_STATUS && extended && flags & PAYLOAD != 0 && payload.len() <= 16 {
            named = Self::named(payload, terms.contexts);
            let Some((len, contexts)) = named else {
                self.error = EINVAL;
                return;
            };
            (self.len, self.contexts) = (len, contexts);
        }
        self.error = self.refused(flags, named.is_some(), terms);
        if self.error != 0 {
            return;
        }
        self.at_device = match self.command {
            FLUSH => true,
            CACHE => false,
            _ => self.len > 0,
        };
        if self.at_device && terms.failing && self.command != FLUSH {
            self.error = self.failure();
        }
    }

    /// A length, and contexts that were negotiated, each once.
    fn named(payload: &[u8], negotiated: u8) -> Option<(u64, u8)> {
        let (len, ids) = payload.split_first_chunk::<8>()?;
        let mut contexts = 0;
        for id in ids.chunks(4) {
            let bit = match id {
                [0, 0, 0, 1] => ALLOCATION,
                [0, 0, 0, 2] => DEPTH,
                _ => return None,
            };
            if negotiated & bit == 0 || contexts & bit != 0 {
                return None;
            }
            contexts |= bit;
        }
        Some((u64::from_be_bytes(*len), contexts))
    }

    fn refused(&self, flags: u16, named: bool, terms: &Terms) -> u32 {
        let extended = terms.framing == Framing::Extended;
        let allowed = match self.command {
            READ if terms.framing == Framing::Simple => 0,
            READ => DF,
            WRITE if extended => PAYLOAD,
            WRITE_ZEROES => NO_HOLE | FAST_ZERO,
            BLOCK_STATUS if named => REQ_ONE | PAYLOAD,
            BLOCK_STATUS => REQ_ONE,
            WRITE | FLUSH | TRIM | CACHE => 0,
            _ => return EINVAL,
        };
        if flags & !(allowed | FUA) != 0 {
            return EINVAL;
        }
        let writes = matches!(self.command, WRITE | TRIM | WRITE_ZEROES);
        if writes && terms.read_only {
            return EPERM;
        }
        if self.command == FLUSH {
            return if self.offset == 0 && self.len == 0 {
                0
            } else {
                EINVAL
            };
        }
        if u128::from(self.offset) + u128::from(self.len) > u128::from(terms.size_bytes) {
            let no_space = matches!(self.command, WRITE | WRITE_ZEROES);
            return if no_space { ENOSPC } else { EINVAL };
        }
        match self.command {
            READ if self.len > LONGEST => {
                if self.unfragmented {
                    EOVERFLOW
                } else {
                    EINVAL
                }
            }
            WRITE_ZEROES if self.no_hole && flags & FAST_ZERO != 0 => ENOTSUP,
            BLOCK_STATUS if terms.contexts == 0 || self.contexts == 0 || self.len == 0 => EINVAL,
            _ => 0,
        }
    }

    /// Whether it is more than one call of the device.
    pub(super) fn is_in_pieces(&self) -> bool {
        let last = self.offset.saturating_add(self.len.saturating_sub(1));
        matches!(self.command, TRIM | WRITE_ZEROES)
            && self.at_device
            && self.offset / self.piece() != last / self.piece()
    }

    fn piece(&self) -> u64 {
        if self.command == WRITE_ZEROES && self.no_hole {
            WRITTEN_PIECE
        } else {
            PIECE
        }
    }

    /// The error of the first of its pieces that fails.
    fn failure(&self) -> u32 {
        if !matches!(self.command, TRIM | WRITE_ZEROES) {
            return failure(self.offset);
        }
        let mut at = self.offset;
        while at < self.offset + self.len {
            match failure(at) {
                0 => at = (at / self.piece() + 1) * self.piece(),
                error => return error,
            }
        }
        0
    }
}

/// How a failing device fails what begins there, as the client is to hear it; 0 is success.
pub(super) fn failure(offset: u64) -> u32 {
    match offset / 4096 % 8 {
        5 => EIO,
        6 => ENOSPC,
        _ => 0,
    }
}

pub(super) fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(*bytes.first_chunk().expect("long enough"))
}

pub(super) fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("long enough"))
}

pub(super) fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(*bytes.first_chunk().expect("long enough"))
}
