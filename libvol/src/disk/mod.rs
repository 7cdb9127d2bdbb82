//! Disks: the engines behind the runtime's seam, and the handle that stores work with.
//!
//! A [`Disk`] reads, writes and syncs whole aligned buffers; a short transfer is an error with a name. It deliberately
//! has no cache, no retry and no idea of formats.

mod busy;
mod file;
mod media;
mod message;
mod ops;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
#[cfg(test)]
mod tests;
mod threads;
mod uring;
mod wake;

pub use file::{Backing, DiskFile, OpenMode};
pub use media::{Medium, MediumClass, classify};
pub use threads::ThreadDriver;
pub use uring::UringDriver;

use std::fmt;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use crate::buf::Buf;
use crate::error::{Error, Kind, Result};
use crate::limits::BUSY_POLL_DEFAULT;
use crate::runtime::{Done, Driver, FileSlot, Op, runtime, submit};

/// Which engine to run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel allows it, else threads, with the reason logged.
    Auto,
    /// io_uring or fail.
    Uring,
    /// The thread pool.
    Threads,
}

/// An engine with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine {
    /// Which one.
    pub choice: EngineChoice,
    /// How long io_uring looks for completions before it sleeps, at most and where it pays; zero: never. The thread pool
    /// always sleeps.
    pub busy_poll: Duration,
}

impl From<EngineChoice> for Engine {
    fn from(choice: EngineChoice) -> Self {
        Self {
            choice,
            busy_poll: BUSY_POLL_DEFAULT,
        }
    }
}

/// Makes a driver for the current thread. Returns it with the line to log (which engine, and why).
///
/// # Errors
/// When the forced engine does not work here.
pub fn make_driver(engine: impl Into<Engine>) -> Result<(Rc<dyn Driver>, String)> {
    let Engine { choice, busy_poll } = engine.into();
    let uring = || -> io::Result<Rc<dyn Driver>> { Ok(Rc::new(UringDriver::new(busy_poll)?)) };
    let threads = || -> Result<Rc<dyn Driver>> {
        let driver = ThreadDriver::new()
            .map_err(|e| Error::with_source(Kind::Io, "the thread-pool I/O engine cannot start", e))?;
        Ok(Rc::new(driver))
    };
    match choice {
        EngineChoice::Uring => {
            let driver = uring().map_err(|e| {
                Error::with_source(
                    Kind::Unsupported,
                    "io_uring was asked for and is refused here; use --io-engine auto or threads",
                    e,
                )
            })?;
            Ok((driver, "I/O engine: io_uring (asked for)".into()))
        }
        EngineChoice::Threads => Ok((threads()?, "I/O engine: threads (asked for)".into())),
        EngineChoice::Auto => match uring() {
            Ok(driver) => Ok((driver, "I/O engine: io_uring".into())),
            Err(e) => Ok((
                threads()?,
                format!("I/O engine: threads, because io_uring is refused here: {e}"),
            )),
        },
    }
}

/// Why a disk operation failed.
#[derive(Debug)]
pub struct DiskError {
    /// `read`, `write` or `sync`.
    pub operation: &'static str,
    /// Byte offset on the device.
    pub at: u64,
    /// Bytes asked for.
    pub len: usize,
    /// The cause.
    pub cause: DiskErrorCause,
}

/// The two ways to fail.
#[derive(Debug)]
pub enum DiskErrorCause {
    /// The operating system said no.
    Os(io::Error),
    /// Fewer bytes than asked for were moved.
    PartialTransfer(usize),
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation,
            at,
            len,
            cause,
        } = self;
        match cause {
            DiskErrorCause::Os(e) => write!(f, "{operation} of {len} bytes at {at}: {e}"),
            DiskErrorCause::PartialTransfer(n) => {
                write!(f, "{operation} of {len} bytes at {at} moved only {n} bytes")
            }
        }
    }
}

impl std::error::Error for DiskError {}

impl From<DiskError> for Error {
    fn from(e: DiskError) -> Self {
        Error::new(Kind::Io, e.to_string())
    }
}

/// One file or block device on the current thread's engine.
pub struct Disk {
    driver: Rc<dyn Driver>,
    file: FileSlot,
}

impl Disk {
    /// Attaches an open file to the current thread's engine. The engine keeps the descriptor, so the store's lock
    /// lives as long as any transfer.
    ///
    /// # Errors
    /// When the engine's file table is full.
    pub fn attach(file: &DiskFile) -> Result<Self> {
        let driver = runtime();
        let slot = match file.backing() {
            Backing::Simulated(slot) => *slot,
            Backing::Os(descriptor) => driver.attach(descriptor.clone()).map_err(|e| {
                let message = format!("{}: cannot register with the I/O engine", file.path().display());
                Error::with_source(Kind::NoSpace, message, e)
            })?,
        };
        Ok(Self { driver, file: slot })
    }

    /// Fills `buf[range]` from byte `at`. Offset, range and buffer are multiples of 512 bytes where the medium needs it.
    pub async fn read(&self, at: u64, buf: Buf, range: Range<usize>) -> (Result<(), DiskError>, Buf) {
        let len = range.len();
        let Done {
            result,
            op: Op::Read { buf, .. },
        } = submit(
            &self.driver,
            Op::Read {
                file: self.file,
                at,
                buf,
                range,
            },
        )
        .await
        else {
            unreachable!("a driver hands back the operation it was given")
        };
        (whole("read", at, len, result), buf)
    }

    /// Writes `buf[range]` at byte `at`. Durable only after a later [`Disk::sync`].
    ///
    /// # Errors
    /// What the device said; the bytes on the medium are then old, new or torn at 512 bytes.
    pub async fn write(&self, at: u64, buf: Rc<Buf>, range: Range<usize>) -> Result<(), DiskError> {
        let len = range.len();
        let Done { result, .. } = submit(
            &self.driver,
            Op::Write {
                file: self.file,
                at,
                buf,
                range,
            },
        )
        .await;
        whole("write", at, len, result)
    }

    /// Makes every write that completed before this call durable.
    ///
    /// # Errors
    /// What the device said. Nothing may be assumed durable after that, ever (the kernel may drop dirty data).
    pub async fn sync(&self) -> Result<(), DiskError> {
        let Done { result, .. } = submit(&self.driver, Op::Sync { file: self.file }).await;
        result.map(|_| ()).map_err(|e| DiskError {
            operation: "sync",
            at: 0,
            len: 0,
            cause: DiskErrorCause::Os(e),
        })
    }

    /// The engine it runs on.
    pub fn driver(&self) -> &Rc<dyn Driver> {
        &self.driver
    }

    /// Gives the file back to the engine, as dropping does. With nothing in flight, its lock is free after that once
    /// every [`DiskFile`] of it is gone too; otherwise when the last operation has ended.
    pub fn detach(self) {}
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.driver.detach(self.file);
    }
}

fn whole(operation: &'static str, at: u64, len: usize, result: io::Result<usize>) -> Result<(), DiskError> {
    let cause = match result {
        Ok(n) if n == len => return Ok(()),
        Ok(n) => DiskErrorCause::PartialTransfer(n),
        Err(e) => DiskErrorCause::Os(e),
    };
    Err(DiskError {
        operation,
        at,
        len,
        cause,
    })
}
