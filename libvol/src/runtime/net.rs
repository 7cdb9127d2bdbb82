//! Stream sockets on the driver.

use std::io;
use std::net::{Shutdown, TcpListener};
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::driver::{Done, Driver, Op, SendPart, shutdown};
use super::{runtime, submit};
use crate::buf::Buf;

/// A listening socket. Clones share it.
#[derive(Clone)]
pub struct Listener {
    driver: Rc<dyn Driver>,
    socket: Rc<OwnedFd>,
}

impl Listener {
    /// Takes over a bound, listening Unix socket.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn unix(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::over(listener.into()))
    }

    /// Takes over a bound, listening TCP socket.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn tcp(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::over(listener.into()))
    }

    fn over(socket: OwnedFd) -> Self {
        Self {
            driver: runtime(),
            socket: Rc::new(socket),
        }
    }

    /// The next connection.
    ///
    /// # Errors
    /// As `accept4(2)`; `EINVAL` after [`Listener::close`].
    pub async fn accept(&self) -> io::Result<Stream> {
        let Done { result, .. } = submit(
            &self.driver,
            Op::Accept {
                socket: self.socket.clone(),
            },
        )
        .await;
        let fd = i32::try_from(result?).expect("a descriptor");
        // SAFETY: the driver returns a fresh descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Stream::new(fd))
    }

    /// The next connection, of which none is lost when this is dropped before: for a socket that others go on with.
    ///
    /// # Errors
    /// As `accept4(2)`; `EINVAL` when nothing will ever come, since somebody has shut the socket down.
    pub async fn accept_when_ready(&self) -> io::Result<Stream> {
        loop {
            let fd = self.socket.clone();
            // What is wrong with it, the accept tells.
            let _ = submit(&self.driver, Op::Readable { fd }).await;
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(connection) => return Ok(Stream::new(connection)),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) if self.has_ended() => return Err(Errno::INVAL.into()),
                Err(Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // An end and an error are always reported.
        poll(&mut fds, Some(&at_once)).is_ok_and(|found| found > 0)
    }

    /// The socket, unless it [is shared](Self::is_shared).
    pub fn into_socket(self) -> Option<OwnedFd> {
        Rc::into_inner(self.socket)
    }

    /// Whether somebody else has it, an operation under way for example.
    pub fn is_shared(&self) -> bool {
        Rc::strong_count(&self.socket) > 1
    }

    /// Makes pending and later accepts fail.
    pub fn close(&self) {
        shutdown(&self.socket, Shutdown::Both);
    }
}

/// A connected stream. Clones share the socket.
#[derive(Clone)]
pub struct Stream {
    driver: Rc<dyn Driver>,
    socket: Rc<OwnedFd>,
}

impl Stream {
    /// A stream of the current thread's runtime over a connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            driver: runtime(),
            socket: Rc::new(socket),
        }
    }

    /// The descriptor, for `getsockopt`.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether clones of it, or operations, hold the socket as well.
    pub fn is_shared(&self) -> bool {
        Rc::strong_count(&self.socket) > 1
    }

    /// Receives up to `range.len()` bytes into `buf[range]`; 0 means the peer has closed. The buffer comes back.
    pub async fn recv(&self, buf: Buf, range: Range<usize>) -> (io::Result<usize>, Buf) {
        let op = Op::Recv {
            socket: self.socket.clone(),
            buf,
            range,
        };
        let Done {
            result,
            op: Op::Recv { buf, .. },
        } = submit(&self.driver, op).await
        else {
            unreachable!("a driver hands back the operation it was given")
        };
        (result, buf)
    }

    /// Sends all parts in order, however many calls it takes.
    ///
    /// # Errors
    /// As `sendmsg(2)`; the stream is then of no further use.
    pub async fn send(&self, mut parts: Vec<SendPart>) -> io::Result<()> {
        let total: usize = parts.iter().map(SendPart::len).sum();
        let mut sent = 0;
        while sent < total {
            let op = Op::Send {
                socket: self.socket.clone(),
                parts,
                skip: sent,
            };
            let Done {
                result,
                op: Op::Send { parts: back, .. },
            } = submit(&self.driver, op).await
            else {
                unreachable!("a driver hands back the operation it was given")
            };
            parts = back;
            match result? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => sent += n,
            }
        }
        Ok(())
    }

    /// The socket, unless somebody else uses it.
    pub fn into_socket(self) -> Option<OwnedFd> {
        Rc::into_inner(self.socket)
    }

    /// Waits until there is something to receive, or the stream has ended.
    pub async fn readable(&self) {
        let fd = self.socket.clone();
        // As for a hang-up: the next receive tells.
        let _ = submit(&self.driver, Op::Readable { fd }).await;
    }

    /// Waits until the peer has closed the stream or its sending half, or the stream was shut down. Bytes that it sent
    /// before may still be there to be received.
    pub async fn hung_up(&self) {
        let socket = self.socket.clone();
        // A wait that fails tells nothing more than one that ends: the next receive will.
        let _ = submit(&self.driver, Op::HangUp { socket }).await;
    }

    /// Ends the conversation: pending receives return 0, pending sends fail.
    pub fn shutdown(&self) {
        shutdown(&self.socket, Shutdown::Both);
    }
}
