//! Requests of the transmission phase, and the one door that validates them.
//!
//! ```text
//! | magic u32 | flags u16 | type u16 | cookie u64 | offset u64 | length u32 | payload (WRITE only) |
//! ```
//!
//! [`Header::decode`] only takes fields apart; [`Header::check`] is the only place where commands, flags and ranges
//! are judged. A [`Request`] is valid for its export at the size it was checked against, and exports never shrink.

use libvol::limits::NBD_PAYLOAD_MAX;

use super::{Fields, WireError};

/// Bytes of a request without its payload: 4 + 2 + 2 + 8 + 8 + 4.
pub(in crate::nbd) const HEADER_BYTES: usize = 28;
const MAGIC: u32 = 0x2560_9513;

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

/// Whatever the client uses to tell its requests apart; it comes back in the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::nbd) struct Cookie(pub(in crate::nbd) u64);

/// A request taken apart and not yet judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct Header {
    flags: u16,
    command: u16,
    /// See [`Cookie`].
    pub(in crate::nbd) cookie: Cookie,
    offset: u64,
    len: u32,
}

/// What a request is judged by.
#[derive(Clone, Copy, Debug)]
pub(in crate::nbd) struct Rules {
    /// The export's size in bytes at this moment (it may grow under a live connection).
    pub(in crate::nbd) size_bytes: u64,
    /// Nothing may be written.
    pub(in crate::nbd) read_only: bool,
    /// Structured replies were negotiated.
    pub(in crate::nbd) structured: bool,
    /// `base:allocation` was negotiated.
    pub(in crate::nbd) allocation_context: bool,
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
        len: u32,
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
        len: u32,
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
        len: u32,
        /// Only the first run is wanted.
        one: bool,
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
    /// Takes the fields apart. `None` means a wrong magic: the stream is out of step and cannot be followed any more.
    pub(in crate::nbd) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        if fields.u32()? != MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: Cookie(fields.u64()?),
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }

    /// Whether the client says goodbye. Its other fields should be zero; nobody gains from insisting.
    pub(in crate::nbd) fn is_disconnect(&self) -> bool {
        self.command == DISCONNECT
    }

    /// Bytes that follow the header on the stream, whether the request is valid or not.
    pub(in crate::nbd) fn payload_len(&self) -> u32 {
        if self.command == WRITE { self.len } else { 0 }
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
            offset,
            len,
            ..
        } = self;
        let (name, own_flags) = match command {
            READ if rules.structured => ("read", FLAG_DF),
            READ => ("read", 0),
            WRITE => ("write", 0),
            FLUSH => ("flush", 0),
            TRIM => ("trim", 0),
            CACHE => ("cache", 0),
            WRITE_ZEROES => ("write-zeroes", FLAG_NO_HOLE | FLAG_FAST_ZERO),
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
        let ends = offset.checked_add(u64::from(len));
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
            READ if len > NBD_PAYLOAD_MAX => {
                let error = if unfragmented {
                    WireError::Overflow
                } else {
                    WireError::Invalid
                };
                let text = format!("read: {len} bytes are more than {NBD_PAYLOAD_MAX} in one request");
                refuse(error, text)
            }
            READ => Ok(Request::Read {
                offset,
                len,
                unfragmented,
            }),
            WRITE => Ok(Request::Write { offset, len, fua }),
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
            BLOCK_STATUS if !rules.allocation_context => refuse(
                WireError::Invalid,
                "block-status: negotiate base:allocation for this export first",
            ),
            BLOCK_STATUS if len == 0 => refuse(WireError::Invalid, "block-status: the range is empty"),
            BLOCK_STATUS => Ok(Request::BlockStatus {
                offset,
                len,
                one: flags & FLAG_REQ_ONE != 0,
            }),
            _ => unreachable!("unknown commands are refused above"),
        }
    }

    /// Bytes of memory that serving the request takes: its payload, or its reply's.
    pub(in crate::nbd) fn cost_bytes(&self) -> usize {
        match self.command {
            READ => self.len.min(NBD_PAYLOAD_MAX) as usize,
            WRITE => self.len as usize,
            BLOCK_STATUS => super::reply::BLOCK_STATUS_BYTES_MAX,
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

    /// Whether there is nothing to do but say so: hints, and ranges of no bytes.
    pub(in crate::nbd) fn is_trivial(&self) -> bool {
        match self {
            Request::Flush | Request::Cache | Request::BlockStatus { .. } => false,
            Request::Read { len, .. }
            | Request::Write { len, .. }
            | Request::Trim { len, .. }
            | Request::WriteZeroes { len, .. } => *len == 0,
        }
    }
}

fn refuse<T>(error: WireError, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal {
        error,
        text: text.into(),
    })
}

/// A request as a client writes it, for tests.
#[cfg(test)]
pub(in crate::nbd) fn encode(
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
) -> [u8; HEADER_BYTES] {
    super::Writer::new()
        .put(MAGIC.to_be_bytes())
        .put(flags.to_be_bytes())
        .put(command.to_be_bytes())
        .put(cookie.to_be_bytes())
        .put(offset.to_be_bytes())
        .put(len.to_be_bytes())
        .done()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules {
        size_bytes: 1 << 20,
        read_only: false,
        structured: true,
        allocation_context: true,
        draining: false,
    };

    fn header(flags: u16, command: u16, offset: u64, len: u32) -> Header {
        Header::decode(&encode(flags, command, 1, offset, len)).expect("the right magic")
    }

    fn error(header: Header, rules: Rules) -> Option<WireError> {
        header.check(&rules).err().map(|refusal| refusal.error)
    }

    #[test]
    fn the_drawing_of_a_request_is_what_is_decoded() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        bytes[4..6].copy_from_slice(&[0, 1]);
        bytes[6..8].copy_from_slice(&[0, 1]);
        bytes[8..16].copy_from_slice(b"a cookie");
        bytes[16..24].copy_from_slice(&4096u64.to_be_bytes());
        bytes[24..].copy_from_slice(&512u32.to_be_bytes());
        let header = Header::decode(&bytes).unwrap();
        assert_eq!(header.cookie, Cookie(u64::from_be_bytes(*b"a cookie")));
        assert_eq!((header.payload_len(), header.cost_bytes()), (512, 512));
        let write = Request::Write {
            offset: 4096,
            len: 512,
            fua: true,
        };
        assert_eq!(header.check(&RULES), Ok(write));
        bytes[0] ^= 1;
        assert_eq!(Header::decode(&bytes), None);
    }

    #[test]
    fn permission_comes_before_range_and_shutdown_before_both() {
        let read_only = Rules {
            read_only: true,
            ..RULES
        };
        let draining = Rules {
            draining: true,
            ..read_only
        };
        let beyond = header(0, WRITE, u64::MAX, 9);
        assert_eq!(error(beyond, RULES), Some(WireError::NoSpace));
        assert_eq!(error(beyond, read_only), Some(WireError::NotPermitted));
        assert_eq!(error(beyond, draining), Some(WireError::Shutdown));
        assert_eq!(error(header(0, READ, 0, 1), read_only), None);
    }

    #[test]
    fn what_was_not_negotiated_is_invalid() {
        let simple = Rules {
            structured: false,
            allocation_context: false,
            ..RULES
        };
        assert_eq!(
            error(header(FLAG_DF, READ, 0, 1), simple),
            Some(WireError::Invalid)
        );
        assert_eq!(
            error(header(0, BLOCK_STATUS, 0, 1), simple),
            Some(WireError::Invalid)
        );
        assert_eq!(error(header(FLAG_DF, READ, 0, 1), RULES), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_and_what_is_accepted_lies_inside_the_export(
            bytes in any::<[u8; HEADER_BYTES]>(),
            magic in any::<bool>(),
            command in 0u16..10,
            plausible in any::<bool>(),
            size_bytes in 0u64..1 << 46,
            read_only in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if magic {
                bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
            }
            if plausible {
                bytes[4..6].fill(0);
                bytes[6..8].copy_from_slice(&command.to_be_bytes());
                bytes[16..18].fill(0);
            }
            let Some(header) = Header::decode(&bytes) else { return Ok(()) };
            prop_assert!(header.cost_bytes() <= u32::MAX as usize);
            let rules = Rules { size_bytes, read_only, ..RULES };
            let (offset, len) = match header.check(&rules) {
                Err(refusal) => {
                    prop_assert!(!refusal.text.is_empty());
                    return Ok(());
                }
                Ok(Request::Flush | Request::Cache) => return Ok(()),
                Ok(Request::Read { offset, len, .. } | Request::BlockStatus { offset, len, .. }) => (offset, len),
                Ok(
                    Request::Write { offset, len, .. }
                    | Request::Trim { offset, len, .. }
                    | Request::WriteZeroes { offset, len, .. },
                ) => {
                    prop_assert!(!read_only);
                    (offset, len)
                }
            };
            prop_assert!(offset <= size_bytes && u64::from(len) <= size_bytes - offset);
        }
    }
}
