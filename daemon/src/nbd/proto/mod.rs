//! The NBD protocol as bytes: decoding what a client sends and encoding what it gets. No I/O.
//!
//! Source: the NBD project's `doc/proto.md` (fixed newstyle handshake, structured replies) and its extension `EXTENDED_HEADERS`
//! (branch `extension-ext-header`); `qemu:allocation-depth` as in QEMU's `docs/interop/nbd.rst`. Integers are big-endian.
//! Everything decoded here comes from an untrusted peer: decoding returns a value or a refusal and never panics.
//! Deliberately absent: the oldstyle handshake.

pub(super) mod option;
pub(super) mod reply;
pub(super) mod request;

use libvol::error::Kind;

/// How requests and replies look, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Framing {
    /// Compact requests; simple replies, without a word of why.
    Simple,
    /// Compact requests; structured replies to reads, block status and errors.
    Structured,
    /// Requests with 64-bit lengths; every reply in chunks of their kind.
    Extended,
}

/// A metadata context: what BLOCK_STATUS can be asked about. Its number is its id on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Context {
    /// `base:allocation`: data, zeros, holes.
    Allocation = 1,
    /// `qemu:allocation-depth`: 1 where something is stored, 0 where not.
    Depth = 2,
}

impl Context {
    /// All of them, in the order of their ids.
    pub(super) const ALL: [Self; 2] = [Self::Allocation, Self::Depth];

    /// Its name on the wire.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Depth => "qemu:allocation-depth",
        }
    }

    /// Its namespace, with the colon.
    pub(super) fn namespace(self) -> &'static str {
        match self {
            Self::Allocation => "base:",
            Self::Depth => "qemu:",
        }
    }
}

/// A set of metadata contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Contexts(u8);

impl Contexts {
    /// All that there are.
    pub(super) fn all() -> Self {
        Context::ALL.into_iter().fold(Self::default(), Self::with)
    }

    /// This one too.
    pub(super) fn with(self, context: Context) -> Self {
        Self(self.0 | 1 << context as u32)
    }

    /// Those in either.
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether it is in the set.
    pub(super) fn has(self, context: Context) -> bool {
        self.0 & 1 << context as u32 != 0
    }

    /// Whether there is none.
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// In the order of their ids.
    pub(super) fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |context| self.has(*context))
    }
}

/// Takes big-endian fields off the front of untrusted bytes.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Puts big-endian fields into a fixed-size message: the encoders' counterpart of [`Fields`].
pub(super) struct Writer<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Writer<N> {
    pub(super) fn new() -> Self {
        Self {
            bytes: [0; N],
            len: 0,
        }
    }

    pub(super) fn put<const M: usize>(mut self, field: [u8; M]) -> Self {
        self.bytes[self.len..self.len + M].copy_from_slice(&field);
        self.len += M;
        self
    }

    pub(super) fn done(self) -> [u8; N] {
        assert_eq!(self.len, N, "every byte of a message is written");
        self.bytes
    }
}

/// The error numbers of the protocol. They resemble Linux's, and are the protocol's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum WireError {
    /// EPERM: a write to a read-only export.
    NotPermitted = 1,
    /// EIO.
    Io = 5,
    /// EINVAL: unknown command or flag, a read past the end.
    Invalid = 22,
    /// ENOSPC: a write past the end, or no space in the stores.
    NoSpace = 28,
    /// EOVERFLOW: a read that must not be fragmented and is too long for that.
    Overflow = 75,
    /// ENOTSUP: fast zeroes that cannot be fast.
    NotSupported = 95,
    /// ESHUTDOWN: the server is going away; the client must disconnect.
    Shutdown = 108,
}

impl WireError {
    /// The one translation from the engine's errors to the protocol's.
    pub(super) fn of(kind: Kind) -> Self {
        match kind {
            Kind::Invalid => WireError::Invalid,
            Kind::NoSpace => WireError::NoSpace,
            Kind::ReadOnly | Kind::Refused => WireError::NotPermitted,
            Kind::Unsupported => WireError::NotSupported,
            // A stopped volume is a failed device to the guest; an orderly shutdown answers before it gets here.
            Kind::Unavailable
            | Kind::Io
            | Kind::Damaged
            | Kind::Internal
            | Kind::Exists
            | Kind::NotFound
            | Kind::Busy => WireError::Io,
        }
    }

    /// What a client may be told. The engine's own message names stores and paths, which are no tenant's business.
    pub(super) fn public_text(self) -> &'static str {
        match self {
            WireError::NotPermitted => "the export may not be written",
            WireError::Io => "input/output error; the operator's log has the cause",
            WireError::Invalid => "the request is not valid",
            WireError::NoSpace => "no space left in the stores; ask the operator to add some",
            WireError::Overflow => "too long for one unfragmented reply; ask for less or allow fragments",
            WireError::NotSupported => "not supported",
            WireError::Shutdown => "the server is shutting down; disconnect and come back",
        }
    }
}
