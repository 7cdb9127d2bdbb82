//! The seam between tasks and the outside world.
//!
//! A task submits an [`Op`] that owns every resource it uses; the driver keeps the op until the kernel (or the
//! simulator) is done with it and then hands it back. A dropped future leaves its op with the driver, so no memory
//! is freed or reused under a running transfer.

use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::buf::Buf;

/// A file known to one driver (a registered file of the ring, a disk of the simulator).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileSlot(pub u32);

/// An operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpKey(pub usize);

/// One operation with all it owns.
#[derive(Debug)]
pub enum Op {
    /// `pread` of `range.len()` bytes at byte `at` into `buf[range]`.
    Read {
        /// Which file.
        file: FileSlot,
        /// Byte offset in the file.
        at: u64,
        /// Destination.
        buf: Buf,
        /// Part of `buf` to fill.
        range: Range<usize>,
    },
    /// `pwrite` of `buf[range]` at byte `at`. Shared, since every replica is written from the same bytes.
    Write {
        /// Which file.
        file: FileSlot,
        /// Byte offset in the file.
        at: u64,
        /// Source.
        buf: Rc<Buf>,
        /// Part of `buf` to write.
        range: Range<usize>,
    },
    /// `fdatasync`: everything completed before is durable once this succeeds.
    Sync {
        /// Which file.
        file: FileSlot,
    },
    /// `accept4` on a listening socket; the result is the new descriptor.
    Accept {
        /// The listener.
        socket: Rc<OwnedFd>,
    },
    /// `recv` of up to `range.len()` bytes into `buf[range]`; 0 means the peer closed.
    Recv {
        /// The stream.
        socket: Rc<OwnedFd>,
        /// Destination.
        buf: Buf,
        /// Part of `buf` to fill.
        range: Range<usize>,
    },
    /// `sendmsg` of all parts, in order, without SIGPIPE; may be short. `skip` bytes are already sent.
    Send {
        /// The stream.
        socket: Rc<OwnedFd>,
        /// What to send.
        parts: Vec<SendPart>,
        /// Bytes of `parts` that earlier calls have sent.
        skip: usize,
    },
    /// Wait until the descriptor is readable (eventfds).
    Readable {
        /// What to wait for.
        fd: Rc<OwnedFd>,
    },
    /// Wait until the peer of a stream has closed it or its sending half, whatever is still to be received.
    HangUp {
        /// The stream.
        socket: Rc<OwnedFd>,
    },
}

/// A piece of an outgoing message.
#[derive(Debug)]
pub enum SendPart {
    /// A small header, held inline.
    Inline {
        /// The bytes.
        bytes: [u8; 48],
        /// How many of them.
        len: u8,
    },
    /// Text and the like.
    Bytes(Box<[u8]>),
    /// A slice of a buffer.
    Buf {
        /// The memory; it goes back to its pool when the message is sent.
        buf: Buf,
        /// Which part of it.
        range: Range<usize>,
    },
    /// That many zero bytes.
    Zeros(usize),
}

impl SendPart {
    /// A header of at most 48 bytes.
    pub fn inline(header: &[u8]) -> Self {
        let mut bytes = [0; 48];
        bytes[..header.len()].copy_from_slice(header);
        SendPart::Inline {
            bytes,
            len: header.len() as u8,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            SendPart::Inline { len, .. } => usize::from(*len),
            SendPart::Bytes(bytes) => bytes.len(),
            SendPart::Buf { range, .. } => range.len(),
            SendPart::Zeros(len) => *len,
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the slices that make up this part, zeros taken from a shared page.
    pub fn slices<'a>(&'a self, out: &mut Vec<&'a [u8]>) {
        static ZEROS: [u8; 65536] = [0; 65536];
        match self {
            SendPart::Inline { bytes, len } => out.push(&bytes[..usize::from(*len)]),
            SendPart::Bytes(bytes) => out.push(bytes),
            SendPart::Buf { buf, range } => out.push(&buf[range.clone()]),
            SendPart::Zeros(len) => {
                let mut left = *len;
                while left > 0 {
                    let n = left.min(ZEROS.len());
                    out.push(&ZEROS[..n]);
                    left -= n;
                }
            }
        }
    }
}

/// A finished operation: its result and everything it owned. The count is bytes moved, or a descriptor for `Accept`.
#[derive(Debug)]
pub struct Done {
    /// Bytes (or descriptor), or the operating system's error.
    pub result: io::Result<usize>,
    /// The operation handed back.
    pub op: Op,
}

/// How long [`Driver::turn`] may wait for something to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Only submit and reap.
    No,
    /// Until an event, or this long.
    AtMost(Duration),
    /// Until an event.
    Forever,
}

/// Wakes a driver that waits in [`Driver::turn`], from any thread.
pub trait Unpark: Send + Sync {
    /// Makes the current or next waiting `turn` return.
    fn unpark(&self);
}

/// An engine. All methods but [`Unpark::unpark`] are called on the runtime's own thread.
pub trait Driver {
    /// The engine's name for people: `io_uring`, `threads`, `sim`.
    fn name(&self) -> &'static str;

    /// Queues an operation; it starts at the next `turn` at the latest.
    fn submit(&self, op: Op) -> OpKey;

    /// The result if it is there; else the context's waker is called when it is. After `Ready` the key is spent.
    fn poll(&self, key: OpKey, cx: &mut Context<'_>) -> Poll<Done>;

    /// Nobody waits any more: the op is dropped once it has ended; socket and accept operations are cancelled.
    fn forget(&self, key: OpKey);

    /// Submits what is queued, waits as told, reaps what has ended and wakes the tasks.
    fn turn(&self, wait: Wait);

    /// Makes a file usable in operations; the engine holds the descriptor until `detach`.
    ///
    /// # Errors
    /// When the engine's table is full or the kernel refuses.
    fn attach(&self, file: Arc<OwnedFd>) -> io::Result<FileSlot>;

    /// Gives a file back: no operation on it may follow. It is closed when the last one in flight has ended.
    fn detach(&self, slot: FileSlot);

    /// Monotonic time since some fixed origin.
    fn now(&self) -> Duration;

    /// The waker for other threads.
    fn unparker(&self) -> Arc<dyn Unpark>;
}

/// Ends traffic on a socket so that its pending operations finish.
pub(crate) fn shutdown(socket: &OwnedFd, how: Shutdown) {
    let how = match how {
        Shutdown::Read => rustix::net::Shutdown::Read,
        Shutdown::Write => rustix::net::Shutdown::Write,
        Shutdown::Both => rustix::net::Shutdown::Both,
    };
    // A peer that is gone already is what we want; there is nothing to report.
    let _ = rustix::net::shutdown(socket, how);
}
