//! The eventfd by which other threads wake an engine that waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::EventfdFlags;

use crate::runtime::Unpark;

/// An eventfd. Every wake makes it readable; reading it makes it quiet again.
#[derive(Debug)]
pub(super) struct WakeFd(OwnedFd);

impl WakeFd {
    /// A blocking descriptor: io_uring waits for it with a pending read, others look before they read.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?))
    }

    /// Takes all wakes so far. Only after a poll has said that there is one.
    pub(super) fn drain(&self) {
        let mut count = [0; 8];
        // Nothing but a wake that somebody else has drained could make this fail, and that is what is wanted.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl Unpark for WakeFd {
    fn unpark(&self) {
        // The counter overflows only after 2^64 - 2 wakes that nobody has read.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl AsFd for WakeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for WakeFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
