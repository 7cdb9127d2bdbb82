//! A volume: one customer's bytes over one to three replicas.
//!
//! Requests come in with plaintext and byte ranges, already validated against the size; sealed blocks go out to the
//! stores. This room owns the range lock, the marks' life cycle, the checksum cache, recovery and healing. It
//! deliberately knows no protocol, no customer policy and no store format.
//!
//! # Why no acknowledged write is lost
//!
//! | promise | kept by | in |
//! |---|---|---|
//! | it is on every replica's device before the reply | all device writes are awaited; one failure stops the volume | [`write`] |
//! | it lands in space that is the volume's, whatever is cut | allocation is durable on every replica before the first write on any | [`allocate`] |
//! | after a cut, all that may differ is looked at | the extent's mark is durable on every replica before the first write on any, and cleared only after data and sums are synced on all | [`extent`], [`clean`] |
//! | a flushed write is never traded for an older one | equal copies stay, whatever an older area says | [`recover`] |
//! | replicas hold the same bytes | overlapping writes are ordered by the range lock, which is held until every replica has answered | [`range_lock`], [`write`] |
//! | no request is cut short with a lock given up too early | what changes anything runs on when its caller goes away | [`core::uncancelled`] |
//! | damage is seen, and healed from a copy that matches | every read is verified against sums that only completed writes change | [`read`], [`heal`], [`sums`] |
//! | a trim is done on all replicas or on none | marked like a write; a release found half done is finished | [`trim`], [`recover`] |
//!
//! # The life of a write
//!
//! [`Volume::write`] → sealed in one pass over the request ([`write`]) → part by part: extent found in the map, ready and
//! pinned ([`extent`], else [`allocate`], [`recover`], [`sums`]) → blocks locked ([`range_lock`]) → one device write per
//! replica → new sums, unlock → with FUA one sync per replica → reply. Later: idle → [`clean`].
//!
//! # The life of a read
//!
//! [`Volume::read`] → part by part: not in the map, or all holes: zeros; else blocks locked shared → one replica read →
//! verified and decrypted in place ([`read`]) → reply; on a mismatch, once more under the exclusive lock ([`heal`]).
//!
//! # Order
//!
//! Mark, then range lock; nobody waits for a mark while it holds a lock. A request holds one lock at a time; only a
//! release of several extents holds more, ascending. The cleaner takes no range locks.

mod allocate;
mod clean;
mod core;
mod extent;
mod heal;
mod range_lock;
mod read;
mod recover;
mod split;
mod status;
mod sums;
#[cfg(test)]
mod tests;
mod trim;
mod write;

use std::ops::Range;
use std::rc::Rc;

#[cfg(feature = "sim")]
pub use self::core::Tuning;
#[cfg(not(feature = "sim"))]
use self::core::Tuning;
use self::core::{Core, uncancelled};
use crate::buf::BufPool;
use crate::crypto::seal::{PlainBuf, Sealer};
use crate::error::Result;
use crate::ids::{DatasetId, KeyVersion, VolumeId};
use crate::runtime::spawn;
use crate::store::StoreIo;

/// What opening a volume takes.
pub struct VolumeSpec {
    /// Its id.
    pub id: VolumeId,
    /// For messages: `customer/name`.
    pub label: String,
    /// Scope of its key.
    pub dataset: DatasetId,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Cipher for that version.
    pub sealer: Sealer,
    /// The key version new extents get.
    pub key_version: KeyVersion,
    /// One per replica, at least one, all with the same extent size.
    pub replicas: Vec<Rc<StoreIo>>,
}

/// A piece of read data.
pub enum PlainPart {
    /// Bytes of a buffer.
    Data(PlainBuf, Range<usize>),
    /// That many zeros.
    Zeros(usize),
}

/// Kind of an extent of `block_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// Data.
    Data,
    /// Allocated, reads as zeros.
    AllocatedZero,
    /// Not allocated, reads as zeros.
    Hole,
}

/// What the volume counts since it was opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct VolumeStats {
    /// Extents allocated (logical).
    pub allocated_extents: u64,
    /// Blocks found damaged and rewritten from a good copy.
    pub healed_blocks: u64,
    /// Checksum areas found damaged or old on a replica, and marked to be written anew from another's.
    pub healed_areas: u64,
    /// Blocks no replica has a good copy of, as far as read.
    pub lost_blocks: u64,
    /// Blocks accepted by recovery without a matching checksum.
    pub unverified_blocks: u64,
    /// Extents still to be reconciled after a crash.
    pub recovering_extents: u64,
}

/// An open volume on its shard. Dropped without [`Volume::close`], it is as after a crash: its background tasks end by
/// themselves, marks stay, and the next open recovers.
pub struct Volume {
    core: Rc<Core>,
}

impl Volume {
    /// Loads the extent maps of all replicas and starts recovery of dirty extents and the cleaner in the background.
    ///
    /// # Errors
    /// `Damaged` when the replicas' maps contradict each other in clean extents; `Io`; `Unavailable`.
    pub async fn open(spec: VolumeSpec) -> Result<Rc<Self>> {
        Self::open_with(spec, Tuning::default()).await
    }

    /// The same with other numbers than production's.
    ///
    /// # Errors
    /// As [`Volume::open`].
    #[cfg(feature = "sim")]
    pub async fn open_tuned(spec: VolumeSpec, tuning: Tuning) -> Result<Rc<Self>> {
        Self::open_with(spec, tuning).await
    }

    async fn open_with(spec: VolumeSpec, tuning: Tuning) -> Result<Rc<Self>> {
        let core = Core::new(spec, tuning)?;
        core.load_map().await?;
        let running = (core.background.enter(), core.background.enter());
        let (cleaning, recovering) = (
            core.clone().clean_in_background(),
            core.clone().recover_in_background(),
        );
        spawn(async move {
            cleaning.await;
            drop(running.0);
        })
        .detach();
        spawn(async move {
            recovering.await;
            drop(running.1);
        })
        .detach();
        Ok(Rc::new(Self { core }))
    }

    /// Its id.
    pub fn id(&self) -> VolumeId {
        self.core.id
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.core.size_bytes.get()
    }

    /// Buffers for this volume's requests: receive write payloads into these.
    pub fn pool(&self) -> &BufPool {
        &self.core.pool
    }

    /// Reads any byte range inside the volume.
    ///
    /// # Errors
    /// `Io` when a block of the range has no good copy or the volume has stopped; `Invalid` outside the volume;
    /// `Unavailable` when it is closing. So for all requests.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Vec<PlainPart>> {
        self.core.read(offset, len).await
    }

    /// Writes `payload[..len]` at `offset`, any byte range inside the volume. When it returns, every replica's device has
    /// the bytes; with `fua` they survive a power cut. Once begun it runs to its end, even if the future is dropped.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub async fn write(self: &Rc<Self>, offset: u64, payload: PlainBuf, len: u32, fua: bool) -> Result<()> {
        uncancelled(self.core.clone().write(offset, payload, len, fua)).await
    }

    /// Every write acknowledged before this call survives a power cut once it returns.
    ///
    /// # Errors
    /// `Io`.
    pub async fn flush(&self) -> Result<()> {
        let core = self.core.clone();
        uncancelled(async move {
            let _in_flight = core.begin(0, 0)?;
            core.sync_all().await
        })
        .await
    }

    /// Makes the range read as zeros and gives back whole extents.
    ///
    /// # Errors
    /// `NoSpace` when no write-intent mark comes free in time, `Io`.
    pub async fn trim(self: &Rc<Self>, offset: u64, len: u64, fua: bool) -> Result<()> {
        uncancelled(self.core.clone().trim(offset, len, fua)).await
    }

    /// Makes the range read as zeros; with `no_hole` the space stays (or becomes) allocated.
    ///
    /// # Errors
    /// `NoSpace` (with `no_hole`, or when no write-intent mark comes free in time), `Io`.
    pub async fn write_zeroes(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> Result<()> {
        uncancelled(self.core.clone().write_zeroes(offset, len, fua, no_hole)).await
    }

    /// Runs of equal kind covering the range from its start, at most `max_runs` (the last run may then end early).
    ///
    /// # Errors
    /// `Io`.
    pub async fn block_status(
        &self,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> Result<Vec<(u64, BlockKind)>> {
        self.core.block_status(offset, len, max_runs).await
    }

    /// The new size is already durable; requests up to it are accepted from now on. A smaller size changes nothing.
    pub fn grow(&self, size_bytes: u64) {
        let size = &self.core.size_bytes;
        size.set(size.get().max(size_bytes));
    }

    /// Why the volume has stopped (a device error on a replica), once it has.
    pub fn failure(&self) -> Option<String> {
        self.core.failure()
    }

    /// Counters.
    pub fn stats(&self) -> VolumeStats {
        self.core.stats()
    }

    /// Refuses new requests, waits for those in flight, flushes, writes checksum areas, clears all marks. Extents that
    /// still wait for recovery stay marked, and the next open goes on with them.
    ///
    /// # Errors
    /// `Io`; marks then stay and the next open recovers.
    pub async fn close(&self) -> Result<()> {
        let core = self.core.clone();
        uncancelled(async move {
            core.quiesce().await;
            core.clean_all().await
        })
        .await
    }

    /// Refuses new requests and waits for those in flight, without cleaning: the volume is about to be destroyed.
    pub async fn abandon(&self) {
        let core = self.core.clone();
        uncancelled(async move { core.quiesce().await }).await;
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.core.closing.set(true);
        self.core.end_background();
    }
}
