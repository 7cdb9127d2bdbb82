//! Requests of the transmission phase, and the one door that validates them.
//!
//! ```text
//! compact:  | magic u32 | flags u16 | type u16 | cookie u64 | offset u64 | length u32 | payload (WRITE only) |
//! extended: | magic u32 | flags u16 | type u16 | cookie u64 | offset u64 | length u64 | payload (WRITE, and with PAYLOAD_LEN) |
//! payload of an extended BLOCK_STATUS: | length u64 | context u32 | … |
//! ```
//!
//! [`Header::decode`] only takes fields apart; [`Header::check`] is the only place where commands, flags and ranges
//! are judged. A [`Request`] is valid for its export at the size it was checked against, and exports never shrink.

use libvol::limits::NBD_PAYLOAD_MAX;

use super::reply::block_status_bytes_max;
use super::{Context, Contexts, Fields, Framing, WireError};

/// Bytes of a compact request without its payload: 4 + 2 + 2 + 8 + 8 + 4.
pub(in crate::nbd) const COMPACT_BYTES: usize = 28;
/// Bytes of an extended one.
pub(in crate::nbd) const EXTENDED_BYTES: usize = 32;
const MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;
/// Longest payload of a BLOCK_STATUS: its length, and every context once.
pub(in crate::nbd) const STATUS_PAYLOAD_MAX: usize = 8 + 4 * Context::ALL.len();

/// Bytes of a request without its payload.
pub(in crate::nbd) fn header_bytes(framing: Framing) -> usize {
    match framing {
        Framing::Simple | Framing::Structured => COMPACT_BYTES,
        Framing::Extended => EXTENDED_BYTES,
    }
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

const FLAG_FUA: u16 = 1 << 0;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_DF: u16 = 1 << 2;
const FLAG_REQ_ONE: u16 = 1 << 3;
const FLAG_FAST_ZERO: u16 = 1 << 4;
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// What comes back in the reply to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::nbd) struct Cookie {
    /// Whatever the client uses to tell its requests apart.
    pub(in crate::nbd) number: u64,
    /// The request's offset, which extended replies repeat.
    pub(in crate::nbd) offset: u64,
}

/// A request taken apart and not yet judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct Header {
    flags: u16,
    command: u16,
    /// See [`Cookie`].
    pub(in crate::nbd) cookie: Cookie,
    len: u64,
    framing: Framing,
    /// The contexts that the payload of a BLOCK_STATUS names.
    contexts: Option<Contexts>,
}

/// What a request is judged by.
#[derive(Clone, Copy, Debug)]
pub(in crate::nbd) struct Rules {
    /// The export's size in bytes at this moment (it may grow under a live connection).
    pub(in crate::nbd) size_bytes: u64,
    /// Nothing may be written.
    pub(in crate::nbd) read_only: bool,
    /// The contexts that were negotiated.
    pub(in crate::nbd) contexts: Contexts,
    /// The server is shutting down.
    pub(in crate::nbd) draining: bool,
}

/// A valid request. Ranges lie inside the export; lengths may be zero except where said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum Request {
    /// At most [`NBD_PAYLOAD_MAX`] bytes.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u32,
        /// All in one content chunk.
        unfragmented: bool,
    },
    /// At most [`NBD_PAYLOAD_MAX`] bytes; the payload follows on the stream.
    Write {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Everything replied to so far becomes durable.
    Flush,
    /// The range becomes a hole.
    Trim {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// A hint to read ahead.
    Cache,
    /// The range reads as zeros.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Durable before the reply.
        fua: bool,
        /// The space stays allocated.
        no_hole: bool,
    },
    /// Which parts are data; never empty.
    BlockStatus {
        /// Byte offset.
        offset: u64,
        /// Bytes, at least one.
        len: u64,
        /// Only the first run is wanted.
        one: bool,
        /// What is asked about.
        contexts: Contexts,
    },
}

/// Why a request is not served. The connection goes on: a payload is skipped, and the next request read.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::nbd) struct Refusal {
    /// The number in the reply.
    pub(in crate::nbd) error: WireError,
    /// The text beside it, where replies are structured.
    pub(in crate::nbd) text: String,
}

impl Header {
    /// Takes the fields of [`header_bytes`] bytes apart. `None` means a wrong magic: the stream is out of step and cannot be
    /// followed any more.
    pub(in crate::nbd) fn decode(framing: Framing, bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        let extended = framing == Framing::Extended;
        if fields.u32()? != if extended { EXTENDED_MAGIC } else { MAGIC } {
            return None;
        }
        let (flags, command) = (fields.u16()?, fields.u16()?);
        let (number, offset) = (fields.u64()?, fields.u64()?);
        Some(Self {
            flags,
            command,
            cookie: Cookie { number, offset },
            len: if extended {
                fields.u64()?
            } else {
                fields.u32()?.into()
            },
            framing,
            contexts: None,
        })
    }

    /// Whether the client says goodbye. Its other fields should be zero; nobody gains from insisting.
    pub(in crate::nbd) fn is_disconnect(&self) -> bool {
        self.command == DISCONNECT
    }

    /// Bytes that follow the header on the stream, whether the request is valid or not. A WRITE has its payload even when an
    /// extended one forgets to say so.
    pub(in crate::nbd) fn payload_len(&self) -> u64 {
        match self.command == WRITE || self.says_payload() {
            true => self.len,
            false => 0,
        }
    }

    fn is_extended(&self) -> bool {
        self.framing == Framing::Extended
    }

    fn says_payload(&self) -> bool {
        self.is_extended() && self.flags & FLAG_PAYLOAD_LEN != 0
    }

    /// Whether its payload says which contexts are meant, and of how many bytes: [`Header::with_contexts`] comes before
    /// [`Header::check`] then.
    pub(in crate::nbd) fn has_contexts(&self) -> bool {
        self.command == BLOCK_STATUS && self.says_payload()
    }

    /// A BLOCK_STATUS with what its payload says.
    ///
    /// # Errors
    /// The reply the client gets instead.
    pub(in crate::nbd) fn with_contexts(self, payload: &[u8], rules: &Rules) -> Result<Self, Refusal> {
        const MALFORMED: &str =
            "block-status: the payload is not a length and contexts that were negotiated, each once";
        let mut fields = Fields::new(payload);
        let malformed = || refusal(WireError::Invalid, MALFORMED);
        let len = fields.u64().ok_or_else(malformed)?;
        let mut contexts = Contexts::default();
        while !fields.is_empty() {
            let id = fields.u32().ok_or_else(malformed)?;
            let mut negotiated = rules.contexts.iter();
            let context = negotiated
                .find(|context| *context as u32 == id && !contexts.has(*context))
                .ok_or_else(malformed)?;
            contexts = contexts.with(context);
        }
        Ok(Self {
            len,
            contexts: Some(contexts),
            ..self
        })
    }

    /// Whether it is a read, whose reply is always structured once that is negotiated.
    pub(in crate::nbd) fn is_read(&self) -> bool {
        self.command == READ
    }

    /// Judges the request. Order: command, flags, permission, then range.
    ///
    /// # Errors
    /// The reply the client gets instead.
    pub(in crate::nbd) fn check(&self, rules: &Rules) -> Result<Request, Refusal> {
        let &Self {
            flags,
            command,
            cookie: Cookie { offset, .. },
            len,
            ..
        } = self;
        let (name, own_flags) = match command {
            READ if self.framing >= Framing::Structured => ("read", FLAG_DF),
            READ => ("read", 0),
            WRITE if self.is_extended() => ("write", FLAG_PAYLOAD_LEN),
            WRITE => ("write", 0),
            FLUSH => ("flush", 0),
            TRIM => ("trim", 0),
            CACHE => ("cache", 0),
            WRITE_ZEROES => ("write-zeroes", FLAG_NO_HOLE | FLAG_FAST_ZERO),
            BLOCK_STATUS if self.contexts.is_some() => ("block-status", FLAG_REQ_ONE | FLAG_PAYLOAD_LEN),
            BLOCK_STATUS => ("block-status", FLAG_REQ_ONE),
            _ => {
                let text = format!("command {command} is not known to this server");
                return refuse(WireError::Invalid, text);
            }
        };
        if rules.draining {
            return refuse(WireError::Shutdown, WireError::Shutdown.public_text());
        }
        // FUA is allowed on every command, and means nothing where nothing is written.
        let unknown = flags & !(own_flags | FLAG_FUA);
        if unknown != 0 {
            return refuse(
                WireError::Invalid,
                format!("{name}: flags {unknown:#06x} do not apply"),
            );
        }
        let writes = matches!(command, WRITE | TRIM | WRITE_ZEROES);
        if writes && rules.read_only {
            return refuse(
                WireError::NotPermitted,
                format!("{name}: the export is read-only"),
            );
        }
        if command == FLUSH {
            if offset != 0 || len != 0 {
                return refuse(WireError::Invalid, "flush: offset and length must be zero");
            }
            return Ok(Request::Flush);
        }
        let ends = offset.checked_add(len);
        if ends.is_none_or(|end| end > rules.size_bytes) {
            let error = match command {
                WRITE | WRITE_ZEROES => WireError::NoSpace,
                _ => WireError::Invalid,
            };
            let size = rules.size_bytes;
            return refuse(
                error,
                format!("{name}: {len} bytes at {offset} pass the end of the export ({size} bytes)"),
            );
        }

        let fua = flags & FLAG_FUA != 0;
        let no_hole = flags & FLAG_NO_HOLE != 0;
        let unfragmented = flags & FLAG_DF != 0;
        match command {
            READ | WRITE if len > NBD_PAYLOAD_MAX.into() => {
                let error = if unfragmented {
                    WireError::Overflow
                } else {
                    WireError::Invalid
                };
                let text = format!("{name}: {len} bytes are more than {NBD_PAYLOAD_MAX} in one request");
                refuse(error, text)
            }
            READ => Ok(Request::Read {
                offset,
                len: len as u32,
                unfragmented,
            }),
            WRITE => Ok(Request::Write {
                offset,
                len: len as u32,
                fua,
            }),
            TRIM => Ok(Request::Trim { offset, len, fua }),
            CACHE => Ok(Request::Cache),
            WRITE_ZEROES if no_hole && flags & FLAG_FAST_ZERO != 0 => refuse(
                WireError::NotSupported,
                "write-zeroes: allocated zeroes are not faster than a write",
            ),
            WRITE_ZEROES => Ok(Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
            }),
            BLOCK_STATUS if rules.contexts.is_empty() => refuse(
                WireError::Invalid,
                "block-status: negotiate a metadata context for this export first",
            ),
            BLOCK_STATUS if self.contexts.is_some_and(Contexts::is_empty) => {
                refuse(WireError::Invalid, "block-status: no context is asked about")
            }
            BLOCK_STATUS if len == 0 => refuse(WireError::Invalid, "block-status: the range is empty"),
            BLOCK_STATUS => Ok(Request::BlockStatus {
                offset,
                len,
                one: flags & FLAG_REQ_ONE != 0,
                contexts: self.contexts.unwrap_or(rules.contexts),
            }),
            _ => unreachable!("unknown commands are refused above"),
        }
    }

    /// Bytes that the request holds of the window: its payload's or its reply's, which take memory, or, of zeros that are to be
    /// written, what it has at the device at a time.
    pub(in crate::nbd) fn cost_bytes(&self) -> usize {
        match self.command {
            READ | WRITE => self.len.min(NBD_PAYLOAD_MAX.into()) as usize,
            WRITE_ZEROES if self.flags & FLAG_NO_HOLE != 0 => self.len.min(NBD_PAYLOAD_MAX.into()) as usize,
            BLOCK_STATUS => block_status_bytes_max(self.is_extended()),
            _ => 0,
        }
    }
}

impl Request {
    /// For messages.
    pub(in crate::nbd) fn name(&self) -> &'static str {
        match self {
            Request::Read { .. } => "read",
            Request::Write { .. } => "write",
            Request::Flush => "flush",
            Request::Trim { .. } => "trim",
            Request::Cache => "cache",
            Request::WriteZeroes { .. } => "write-zeroes",
            Request::BlockStatus { .. } => "block-status",
        }
    }

    /// Whether there is nothing to do but say so: ranges of no bytes.
    pub(in crate::nbd) fn is_trivial(&self) -> bool {
        match self {
            Request::Flush | Request::Cache | Request::BlockStatus { .. } => false,
            Request::Read { len, .. } | Request::Write { len, .. } => *len == 0,
            Request::Trim { len, .. } | Request::WriteZeroes { len, .. } => *len == 0,
        }
    }
}

fn refuse<T>(error: WireError, text: impl Into<String>) -> Result<T, Refusal> {
    Err(refusal(error, text))
}

fn refusal(error: WireError, text: impl Into<String>) -> Refusal {
    Refusal {
        error,
        text: text.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules() -> Rules {
        Rules {
            size_bytes: 1 << 20,
            read_only: false,
            contexts: Contexts::all(),
            draining: false,
        }
    }

    fn header(flags: u16, command: u16, offset: u64, len: u64) -> Header {
        Header {
            flags,
            command,
            cookie: Cookie { number: 1, offset },
            len,
            framing: Framing::Structured,
            contexts: None,
        }
    }

    fn error(header: Header, rules: Rules) -> Option<WireError> {
        header.check(&rules).err().map(|refusal| refusal.error)
    }

    #[test]
    fn the_drawing_of_a_request_is_what_is_decoded() {
        let mut bytes = [0; COMPACT_BYTES];
        bytes[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        bytes[4..6].copy_from_slice(&[0, 1]);
        bytes[6..8].copy_from_slice(&[0, 1]);
        bytes[8..16].copy_from_slice(b"a cookie");
        bytes[16..24].copy_from_slice(&4096u64.to_be_bytes());
        bytes[24..].copy_from_slice(&512u32.to_be_bytes());
        let header = Header::decode(Framing::Simple, &bytes).unwrap();
        let cookie = Cookie {
            number: u64::from_be_bytes(*b"a cookie"),
            offset: 4096,
        };
        assert_eq!(header.cookie, cookie);
        assert_eq!((header.payload_len(), header.cost_bytes()), (512, 512));
        let write = Request::Write {
            offset: 4096,
            len: 512,
            fua: true,
        };
        assert_eq!(header.check(&rules()), Ok(write));
        bytes[0] ^= 1;
        assert_eq!(Header::decode(Framing::Simple, &bytes), None);
    }

    #[test]
    fn permission_comes_before_range_and_shutdown_before_both() {
        let read_only = Rules {
            read_only: true,
            ..rules()
        };
        let draining = Rules {
            draining: true,
            ..read_only
        };
        let beyond = header(0, WRITE, u64::MAX, 9);
        assert_eq!(error(beyond, rules()), Some(WireError::NoSpace));
        assert_eq!(error(beyond, read_only), Some(WireError::NotPermitted));
        assert_eq!(error(beyond, draining), Some(WireError::Shutdown));
        assert_eq!(error(header(0, READ, 0, 1), read_only), None);
    }

    #[test]
    fn what_was_not_negotiated_is_invalid() {
        let simple = |header| Header {
            framing: Framing::Simple,
            ..header
        };
        let unfragmented = simple(header(FLAG_DF, READ, 0, 1));
        assert_eq!(error(unfragmented, rules()), Some(WireError::Invalid));
        let nothing = Rules {
            contexts: Contexts::default(),
            ..rules()
        };
        let status = simple(header(0, BLOCK_STATUS, 0, 1));
        assert_eq!(error(status, nothing), Some(WireError::Invalid));
        assert_eq!(error(header(FLAG_DF, READ, 0, 1), rules()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_and_what_is_accepted_lies_inside_the_export(
            bytes in any::<[u8; EXTENDED_BYTES]>(),
            extended: bool,
            payload in prop::collection::vec(prop_oneof![Just(0u8), 0u8..3, any::<u8>()], 0..24),
            magic in any::<bool>(),
            command in 0u16..10,
            plausible in any::<bool>(),
            size_bytes in 0u64..1 << 46,
            read_only in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if magic {
                bytes[..4].copy_from_slice(&if extended { EXTENDED_MAGIC } else { MAGIC }.to_be_bytes());
            }
            if plausible {
                bytes[4..6].fill(0);
                bytes[6..8].copy_from_slice(&command.to_be_bytes());
                bytes[16..18].fill(0);
            }
            let framing = if extended { Framing::Extended } else { Framing::Structured };
            let header = Header::decode(framing, &bytes[..header_bytes(framing)]);
            let Some(mut header) = header else { return Ok(()) };
            prop_assert!(header.cost_bytes() <= NBD_PAYLOAD_MAX as usize);
            let rules = Rules { size_bytes, read_only, ..rules() };
            if header.has_contexts() {
                match header.with_contexts(&payload, &rules) {
                    Ok(with) => header = with,
                    Err(refusal) => {
                        prop_assert_eq!(refusal.error, WireError::Invalid);
                        return Ok(());
                    }
                }
            }
            let (offset, len) = match header.check(&rules) {
                Err(refusal) => {
                    prop_assert!(!refusal.text.is_empty());
                    return Ok(());
                }
                Ok(Request::Flush | Request::Cache) => return Ok(()),
                Ok(Request::Read { offset, len, .. }) => (offset, len.into()),
                Ok(Request::BlockStatus { offset, len, contexts, .. }) => {
                    prop_assert!(!contexts.is_empty());
                    (offset, len)
                }
                Ok(Request::Write { offset, len, .. }) => {
                    prop_assert!(!read_only);
                    (offset, len.into())
                }
                Ok(Request::Trim { offset, len, .. } | Request::WriteZeroes { offset, len, .. }) => {
                    prop_assert!(!read_only);
                    (offset, len)
                }
            };
            prop_assert!(offset <= size_bytes && len <= size_bytes - offset);
        }
    }
}
