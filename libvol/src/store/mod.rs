//! A store: one file or block device, one failure domain, self-describing.
//!
//! ```text
//! | superblock x2 | volume slots x2 | redo log (ring) | table (each page x2) | checksum areas | data extents |
//! ```
//!
//! One *keeper* task per store owns all metadata (table, log, slots, free list) on the store's home runtime; volumes
//! on any runtime talk to it through a [`StoreHandle`]. Data and checksum areas are read and written directly through
//! each runtime's own [`StoreIo`]. This room knows extents, marks and slots; it deliberately knows no customers, no
//! plaintext and no replication.

mod batch;
mod bitmap;
mod books;
mod check;
mod commit;
mod format;
mod handle;
mod inspect;
mod io;
mod keeper;
mod layout;
mod lineage;
mod log;
mod record;
mod recover;
mod scrub;
mod slots;
mod sums;
mod superblock;
mod sync;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod transfer;
mod volumes;
mod wire;

pub use check::{
    CheckReport, CheckScope, ExtentReport, Finding, Severity, VolumeReport, check, compare_replicas,
};
#[cfg(feature = "sim")]
pub use format::format_simulated;
pub use format::{check_sizes, format};
pub use handle::StoreHandle;
pub use inspect::{Inspection, LiveVolume, Remains, Word, inspect};
pub use io::StoreIo;
pub use keeper::{Opening, begin_open, open};
pub use layout::{FORMAT_VERSION, scrubbed_bytes};
pub use lineage::{Found, Lineage, Renewal, Verdict};

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::Medium;
use crate::ids::{
    CustomerId, DatasetId, Epoch, ExtentIndex, InstallationId, KeyVersion, Name, PhysicalExtent, ReplicaSet,
    StoreId, VolumeId,
};
use crate::keys::WrappedKey;

/// What `store add` is told.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Whose store it will be.
    pub installation: InstallationId,
    /// Its name, for messages and for rebuilding a catalog.
    pub name: Name,
    /// Its failure domain.
    pub zone: Name,
    /// Bytes of the file or device to use.
    pub size_bytes: u64,
    /// Extent size, a power of two within the limits.
    pub extent_bytes: u64,
    /// Whether the data area is known to be zero (a fresh file); else every extent starts as PendingScrub.
    pub zero_filled: bool,
}

/// Facts of an open store that never change while it is open.
#[derive(Clone, Debug)]
pub struct StoreInfo {
    /// Its id.
    pub id: StoreId,
    /// Its name.
    pub name: Name,
    /// Its failure domain.
    pub zone: Name,
    /// Whose it is.
    pub installation: InstallationId,
    /// Where it is.
    pub path: PathBuf,
    /// Extent size.
    pub extent_bytes: u64,
    /// Data extents.
    pub extents: u32,
    /// The medium.
    pub medium: Medium,
}

/// Space and state, readable at any time from any thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreSpace {
    /// Extents in all.
    pub total: u32,
    /// Free (verified zero) and not reserved.
    pub free: u32,
    /// Waiting for the scrubber.
    pub pending_scrub: u32,
    /// Holding data.
    pub allocated: u32,
    /// Extents with a write-intent mark.
    pub dirty: u32,
}

/// One extent of a dataset, as the table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentEntry {
    /// Where in the dataset.
    pub logical: ExtentIndex,
    /// Where on the store.
    pub physical: PhysicalExtent,
    /// Write-intent mark.
    pub dirty: bool,
    /// Replicas that lacked writes to it when its mark was last cleared.
    pub missed_by: ReplicaSet,
    /// Version of the data key its blocks are sealed with.
    pub key_version: KeyVersion,
}

/// Changes one transaction may hold: they go into one frame of the log, and the smallest ring's frames have room for 3639.
pub const TRANSACTION_RECORDS_MAX: usize = 3072;

/// A change of metadata. A list of them is one transaction: all or nothing, durable when [`StoreHandle::commit`] returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A reserved extent becomes the dataset's, marked dirty.
    Allocate {
        /// The reserved extent.
        physical: PhysicalExtent,
        /// Whose.
        dataset: DatasetId,
        /// Which logical extent.
        logical: ExtentIndex,
        /// Data key version.
        key_version: KeyVersion,
    },
    /// Sets the write-intent mark of an allocated extent.
    Mark(PhysicalExtent),
    /// Clears it, and notes which replicas lack writes to the extent by then.
    ClearMark {
        /// The extent.
        physical: PhysicalExtent,
        /// Replicas out of sync that have not caught up with it.
        missed_by: ReplicaSet,
    },
    /// An allocated extent becomes PendingScrub.
    Release(PhysicalExtent),
    /// All allocated extents of a dataset become PendingScrub (destruction).
    ReleaseDataset(DatasetId),
    /// The volume's size.
    SetSize {
        /// Which volume.
        volume: VolumeId,
        /// Its size.
        size_bytes: u64,
    },
    /// The volume's membership. Refused below the epoch that is there (a superseded owner).
    SetMembers {
        /// Which volume.
        volume: VolumeId,
        /// Membership epoch.
        epoch: Epoch,
        /// State of each replica, in the order of the slot's `stores`.
        members: Vec<Member>,
    },
}

/// The mutable facts of a volume that every replica's store carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Which volume.
    pub volume: VolumeId,
    /// Its size.
    pub size_bytes: u64,
    /// Membership epoch.
    pub membership_epoch: Epoch,
    /// State of each replica, in the order of the slot's `stores`.
    pub members: Vec<Member>,
}

/// Membership state of one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Member {
    /// Holds every acknowledged write.
    InSync,
    /// Missed a write.
    Stale,
    /// Catching up.
    Resyncing,
    /// The place is empty: its replica has moved to another store.
    Vacant,
}

/// The immutable facts of a volume and its wrapped keys, as its slot has them. Wrapped keys live only here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSlot {
    /// Which volume.
    pub volume: VolumeId,
    /// Whose.
    pub customer: CustomerId,
    /// Its customer's name, for rebuilding a catalog.
    pub customer_name: Name,
    /// Its name, for rebuilding a catalog.
    pub volume_name: Name,
    /// Scope of its data key.
    pub dataset: DatasetId,
    /// Stores of its replicas, in order.
    pub stores: Vec<StoreId>,
    /// Wrapped data keys by version.
    pub keys: Vec<(KeyVersion, WrappedKey)>,
}

/// Where a volume stands on a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeState {
    /// Here, with its record and slot.
    Live(VolumeRecord, VolumeSlot),
    /// Its tombstone is committed; keys and extents are being, or have been, overwritten. Extents not yet free.
    Tombstoned {
        /// Extents still PendingScrub.
        extents_left: u32,
        /// Only this store's replica has gone; the volume lives on elsewhere.
        given_up: bool,
    },
    /// Never was here.
    Unknown,
}

/// Progress of a destruction on one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Extents the volume held here when its destruction began.
    pub extents: u32,
    /// Of them overwritten, read back and free.
    pub extents_done: u32,
    /// Whether the key slot copies are overwritten and read back.
    pub keys_done: bool,
}

/// Whose store, and which, the opener expects. `None` accepts any.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expect {
    /// The installation.
    pub installation: Option<InstallationId>,
    /// The store.
    pub store: Option<StoreId>,
}

/// The checksum area of one extent in memory: header facts and one sum a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumArea {
    /// Scope of the data key.
    pub dataset: DatasetId,
    /// Which logical extent.
    pub logical: ExtentIndex,
    /// Rises with every write of the area.
    pub sequence: u64,
    /// Version of the data key.
    pub key_version: KeyVersion,
    /// One sum a block; 0 is a hole.
    pub sums: Box<[u32]>,
}

/// What a checksum area on disk turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SumAreaRead {
    /// A valid header that names this dataset and extent, and the sums that it was written with.
    Valid(SumArea),
    /// Such a header, and other sums: a write of the area was torn, or they are damaged.
    Torn(SumArea),
    /// All zero: never written since the extent was freed (every block is a hole, unless marked dirty).
    Blank,
    /// Neither; the text says what is wrong.
    Damaged(String),
}
