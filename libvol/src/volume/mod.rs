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
//! | it is on every replica's device before the reply | all device writes are awaited; a replica that fails one is stale, durably, before the reply | [`write`], [`replicas`] |
//! | it lands in space that is the volume's, whatever is cut | allocation is durable on every replica before the first write on any | [`allocate`] |
//! | after a cut, all that may differ is looked at | the extent's mark is durable on every replica before the first write on any, and cleared only after data and sums are synced on all | [`extent`], [`clean`] |
//! | a flushed write is never traded for an older one | equal copies stay, whatever an older area says | [`recover`] |
//! | replicas hold the same bytes | overlapping writes are ordered by the range lock, which is held until every replica has answered | [`range_lock`], [`write`] |
//! | no request is cut short with a lock given up too early | what changes anything runs on when its caller goes away | [`core::uncancelled`] |
//! | damage is seen, and healed from a copy that matches | every read is verified against sums that only completed writes change | [`read`], [`heal`], [`sums`] |
//! | a replica that moves is given up only when its successor holds everything | places are added and vacated one by one, each durable | [`places`] |
//! | damage that nobody reads is seen, too | a walk verifies every copy of every block | [`integrity`] |
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
mod integrity;
mod membership;
mod missed;
mod places;
mod range_lock;
mod read;
mod recover;
mod replicas;
mod resync;
mod split;
mod status;
mod sums;
#[cfg(test)]
mod tests;
mod trim;
mod write;

use std::ops::Range;
use std::rc::Rc;

use self::core::{Core, uncancelled};
use self::replicas::Role;

pub use self::core::Tuning;
pub use self::integrity::Verified;
pub use self::membership::{Membership, Register, Standing};
use crate::buf::BufPool;
use crate::crypto::seal::{PlainBuf, Sealer};
use crate::error::Result;
use crate::ids::{DatasetId, Epoch, KeyVersion, StoreId, VolumeId};
use crate::runtime::{sleep, spawn};
use crate::store::{Member, StoreIo};

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
    /// In the order of the slot's `stores`. At least one that is in sync has its store at hand, all with the same extent size.
    pub replicas: Vec<ReplicaSpec>,
    /// Membership epoch.
    pub membership_epoch: Epoch,
    /// Where the membership is written down.
    pub register: Rc<dyn Register>,
}

/// One replica of a volume that is opened.
pub struct ReplicaSpec {
    /// Its store.
    pub store: StoreId,
    /// The store's name.
    pub name: String,
    /// The store's data path; `None` when it is away. A replica in sync whose store is away is dropped at once.
    pub io: Option<Rc<StoreIo>>,
    /// Its state.
    pub state: Member,
    /// Nothing that it holds can be relied on.
    pub full_copy: bool,
    /// Why it is not in sync.
    pub reason: Option<String>,
}

/// A replica of an open volume, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its store.
    pub store: StoreId,
    /// Its state now; `Resyncing` while it catches up.
    pub state: Member,
    /// Why it is not in sync.
    pub reason: Option<String>,
    /// Extents it still has to catch up with.
    pub missed_extents: u64,
    /// Bytes written to it since it began to catch up.
    pub copied_bytes: u64,
    /// Seconds until it has caught up, at the rate so far.
    pub seconds_left: Option<u64>,
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
    /// Loads the extent maps of all replicas in sync, drops those that are away, and starts recovery of dirty extents and the cleaner in the background.
    ///
    /// # Errors
    /// `Damaged`; `Io`; `Unavailable` when no replica in sync is at hand.
    pub async fn open(spec: VolumeSpec) -> Result<Rc<Self>> {
        Self::open_tuned(spec, Tuning::default()).await
    }

    /// The same with other numbers.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub async fn open_tuned(spec: VolumeSpec, tuning: Tuning) -> Result<Rc<Self>> {
        let core = Core::new(spec, tuning)?;
        // Opening and closing ask the replicas, too.
        spawn(watch(Rc::downgrade(&core))).detach();
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

    /// Goes on with an integrity walk: from the first allocated extent at or behind byte `from`, every replica's copy of
    /// every block and checksum area is read, verified and, if damaged, healed, until `bytes` are verified (one chunk of
    /// up to 1 MiB a replica at least) or the volume ends. Requests of clients go first. What is verified is what the
    /// volume holds when the walk comes by.
    ///
    /// # Errors
    /// `Io` when the volume has stopped (a lost block is no error here, it is counted); `Unavailable` when it is closing;
    /// `NoSpace` when an extent is to be reconciled and a store has no room for its mark.
    pub async fn verify_extents(&self, from: u64, bytes: u64) -> Result<Verified> {
        uncancelled(self.core.clone().verify(from, bytes)).await
    }

    /// The new size is already durable; requests up to it are accepted from now on. A smaller size changes nothing.
    pub fn grow(&self, size_bytes: u64) {
        let size = &self.core.size_bytes;
        size.set(size.get().max(size_bytes));
    }

    /// Brings a stale replica back, over its store's data path: it catches up in the background while the volume serves.
    ///
    /// # Errors
    /// `Invalid` for a place that is not stale; else as its store, and it stays stale.
    pub async fn rejoin(&self, place: usize, io: Rc<StoreIo>, full_copy: bool) -> Result<()> {
        let core = self.core.clone();
        uncancelled(async move {
            let _in_flight = core.begin(0, 0)?;
            core.start_joining(place, io, full_copy).await
        })
        .await
    }

    /// Lets go of the store of a replica that is out of sync, so that it can be closed and opened anew; waits until no
    /// request of it is in flight.
    ///
    /// # Errors
    /// `Invalid` for a replica that is in sync.
    pub async fn let_go(&self, place: usize) -> Result<()> {
        let core = self.core.clone();
        uncancelled(async move {
            let seat = &core.seats[place];
            core.stop_joining(place, "its store is opened anew");
            if seat.role.get() == Role::InSync {
                return Err(crate::error::Error::invalid(format!(
                    "volume {}: the replica on store \"{}\" is in sync",
                    core.label,
                    seat.name.borrow()
                )));
            }
            core.let_go_of(seat).await;
            Ok(())
        })
        .await
    }

    /// Takes a store in as a place for one more replica, stale and to be copied whole; [`Volume::rejoin`] brings it in sync.
    /// Returns its place: the one it has, a vacant one, or a new one.
    ///
    /// # Errors
    /// `NoSpace` when all places are taken; `Io` when it cannot be written down.
    pub async fn add_replica(&self, store: StoreId, name: String) -> Result<usize> {
        let core = self.core.clone();
        uncancelled(async move {
            let _in_flight = core.begin(0, 0)?;
            core.take_in(store, name).await
        })
        .await
    }

    /// Makes a replica's place vacant; when this returns, nothing of the volume is in flight on its store. What is there is
    /// the caller's to destroy.
    ///
    /// # Errors
    /// `Busy` for the last one in sync; `Io` when it cannot be written down.
    pub async fn remove_replica(&self, place: usize) -> Result<()> {
        let core = self.core.clone();
        uncancelled(async move {
            let _in_flight = core.begin(0, 0)?;
            core.make_vacant(place).await
        })
        .await
    }

    /// How the replicas stand, in the order of the slot's `stores`.
    pub fn replicas(&self) -> Vec<ReplicaStatus> {
        let seats = &self.core.seats[..self.core.places.get()];
        let status = |seat: &replicas::Seat| ReplicaStatus {
            store: seat.store.get(),
            state: match seat.role.get() {
                Role::InSync => Member::InSync,
                Role::Dropping | Role::Stale => Member::Stale,
                Role::Joining => Member::Resyncing,
                Role::Vacant => Member::Vacant,
            },
            reason: seat.reason.borrow().clone(),
            missed_extents: seat.missed.borrow().len() as u64,
            copied_bytes: seat.copied_bytes.get(),
            seconds_left: seat.seconds_left(),
        };
        seats.iter().map(status).collect()
    }

    /// Membership epoch.
    pub fn membership_epoch(&self) -> Epoch {
        self.core.epoch.get()
    }

    /// Why the volume has stopped (nothing that it cannot go on without could be done on any replica), once it has.
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

/// Looks for requests to replicas that do not end, as long as there is anything of the volume.
async fn watch(core: std::rc::Weak<Core>) {
    /// Looks per deadline.
    const LOOKS: u32 = 8;
    loop {
        let Some(pause) = core.upgrade().map(|core| core.tuning.deadline / LOOKS) else {
            return;
        };
        sleep(pause).await;
        let Some(core) = core.upgrade() else { return };
        core.seats.iter().for_each(|seat| seat.watch(LOOKS));
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.core.closing.set(true);
        self.core.end_background();
    }
}
