//! vhost-user-blk: a virtio block device whose rings and data are in the guest's memory.
//!
//! | file | job |
//! |---|---|
//! | [`message`] | bytes to values and back, without I/O |
//! | [`channel`] | the front-end's socket: messages with descriptors |
//! | [`notify`] | kicks and calls |
//! | [`meter`] | what a front-end costs the thread in kicks, calls and messages |
//! | [`config`] | what the device offers: features and the configuration space |
//! | [`sessions`] | the front-ends of one attachment: one at a time |
//! | [`session`] | one front-end's messages |
//! | [`front`] | one front-end as its queues see it |
//! | [`queue`] | one started queue: from kicks to requests, and back to calls |
//! | [`fault`] | why a guest's memory or ring cannot be used |
//! | [`mapping`] | one shared mapping of a passed descriptor |
//! | [`memory`] | the guest's regions as one address space; the log of pages written |
//! | [`chain`] | from a descriptor to the checked parts of its chain |
//! | [`ring`] | one split virtqueue |
//! | [`request`] | from a chain to one checked block request |
//! | [`inflight`] | which requests are in flight, where a crash leaves it |
//! | [`cache_mode`] | whether the guest writes back or through, kept there as well |
//!
//! A front-end (QEMU, which its guest may have taken over) is hostile in every byte, and the worst that it reaches is that its
//! own device is disconnected: nothing that it passes blocks or kills the shard's thread, which other tenants share.
//!
//! What is left of that is the kernel's: while a front-end has a hole made into its memory (fallocate(2)), or that is brought back
//! from swap, an access to it waits, and the thread with it (240 ms for a hole of 2 GiB). docs/SECURITY.md has the whole list.
//!
//! This room knows requests and bytes. Who may connect is decided by whoever calls [`serve`]; it deliberately knows no
//! stores, no customers and no credentials.

mod cache_mode;
mod chain;
mod channel;
mod config;
mod fault;
mod front;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), expect(dead_code, reason = "some of it is for tests alone"))]
mod guest;
mod inflight;

mod mapping;
mod memory;
mod message;
mod meter;
mod notify;
mod queue;
mod request;
mod ring;
mod session;
mod sessions;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::rc::Rc;

use libvol::volume::Volume;

use crate::device::Device;
use crate::leavings::Incoming;
use crate::seldom::Seldom;

use notify::Signals;
pub(crate) use sessions::{Sessions, Takeover};

/// Bytes of what a device calls itself (VIRTIO 1.2, 5.2.6).
pub(crate) const SERIAL_BYTES: usize = request::ID_BYTES;

/// Whether a guest has its cache written back, or through. It sets that once, for all front-ends that come after one another; after a
/// start of this process, nothing is known before one has come.
pub(crate) type Writeback = Rc<Cell<Option<bool>>>;

/// What a front-end gets. `D` is the volume, and stands open only for tests.
pub(crate) struct Export<D = Rc<Volume>> {
    /// `customer/name`, for people.
    pub(crate) name: String,
    /// What the device calls itself to its guest.
    pub(crate) serial: [u8; SERIAL_BYTES],
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// How the guest has set its cache.
    pub(crate) writeback: Writeback,
    /// It has come here from another process, where it may have set that.
    pub(crate) moved: bool,
    /// The bytes.
    pub(crate) volume: D,
    /// Counts devices that their front-ends broke.
    pub(crate) broken: Rc<Seldom>,
}

/// Whether this thread can serve vhost-user.
///
/// # Errors
/// What it lacks.
pub(crate) fn check_thread() -> std::io::Result<()> {
    Signals::of_thread().map(drop)
}

/// Serves one front-end to its end. Returns when the last of its requests has ended and what it left behind is closed.
pub(crate) async fn serve<D: Device>(incoming: Incoming, export: Export<D>, sessions: Rc<Sessions>) {
    let Some(seat) = sessions.enter().await else {
        tracing::debug!(
            volume = export.name,
            "vhost-user: a front-end is turned away: there is one, or the attachment ends"
        );
        return;
    };
    session::run(incoming, export, seat).await;
}
