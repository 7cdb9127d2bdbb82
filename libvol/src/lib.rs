//! The vold engine: thin, mirrored, checksummed, always-encrypted volumes over plain files and block devices.
//!
//! Rooms, each importing only rooms above it:
//!
//! | room | job |
//! |---|---|
//! | [`limits`], [`ids`], [`error`] | numbers, names, and the one error type |
//! | [`control`] | API request and response types, shared with `volctl` (feature-free) |
//! | [`sabotage`] | rules that a test breaks on purpose, in builds for that test |
//! | [`buf`], [`secret`] | aligned I/O memory; locked, zeroing key memory |
//! | [`crypto`] | XTS, seal/open, key wrap |
//! | [`runtime`] | single-threaded executor and the `Driver` seam: everything that waits goes through it |
//! | [`disk`] | the engines behind the seam (io_uring, thread pool) and the `Disk` handle; media classification |
//! | [`keys`] | key service |
//! | [`store`] | superblock, slots, redo log, extent table, checksum areas, marks, scrub |
//! | [`volume`] | read, write, flush, trim; range lock; replicas; recovery |
//! | [`catalog`] | durable control-plane records |
//! | [`tenant`] | pure policy |
//! | [`audit`] | hash-chained log of what was done |
//! | [`destroy`] | the destruction job |

pub mod control;
pub mod error;
pub mod ids;
pub mod limits;

#[cfg(feature = "engine")]
pub mod audit;
#[cfg(feature = "engine")]
pub mod buf;
#[cfg(feature = "engine")]
pub mod catalog;
#[cfg(feature = "engine")]
pub mod crypto;
#[cfg(feature = "engine")]
pub mod destroy;
#[cfg(feature = "engine")]
pub mod disk;
#[cfg(feature = "engine")]
pub mod keys;
#[cfg(feature = "engine")]
pub mod runtime;
#[cfg(feature = "engine")]
pub mod sabotage;
#[cfg(feature = "engine")]
pub mod secret;
#[cfg(feature = "engine")]
pub mod store;
#[cfg(feature = "engine")]
pub mod tenant;
#[cfg(feature = "engine")]
pub mod volume;

pub use error::{Error, Kind, Result};
