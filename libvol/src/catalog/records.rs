//! What the catalog remembers, one type a noun. Serialised as JSON, so that a person can read a copy of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::table::Record;
use crate::control::Protocol;
use crate::ids::{
    AttachmentId, CmkId, CustomerId, DatasetId, Epoch, Name, StoreId, VmId, VolumeId, VolumePath,
};
use crate::store::{Lineage, Member};

/// A store that belongs to this installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRecord {
    /// Its id, as in its superblock.
    pub id: StoreId,
    /// Its name.
    pub name: Name,
    /// Absolute path of its file or device.
    pub path: PathBuf,
    /// Its failure domain.
    pub zone: Name,
    /// Extent size.
    pub extent_bytes: u64,
    /// Data extents.
    pub extents: u32,
    /// The operator accepted a file system without O_DIRECT.
    pub allow_buffered: bool,
    /// Latched when a sync or metadata write failed: not opened again until an operator acts.
    pub fault: Option<StoreFault>,
    /// Its replicas are to go elsewhere.
    #[serde(default)]
    pub leaving: Option<Leaving>,
    /// What an old copy of it is told by.
    #[serde(default)]
    pub lineage: Lineage,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
}

/// How a store is being given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Leaving {
    /// Its replicas move off while they serve.
    Draining,
    /// It will not come back: its replicas are replaced from the others, then its record goes.
    Lost,
}

/// Why a store is latched faulty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreFault {
    /// What failed.
    pub reason: String,
    /// Seconds since 1970.
    pub since_unix_seconds: u64,
}

/// A customer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomerRecord {
    /// Its id.
    pub id: CustomerId,
    /// Its name.
    pub name: Name,
    /// The master key its volumes' data keys are wrapped by.
    pub cmk: CmkId,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name, unique on the host.
    pub name: Name,
    /// Whose it is; never changes.
    pub customer: CustomerId,
    /// Unix uid its QEMU runs as.
    pub uid: u32,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
}

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Intent: slots may be on some of its stores. Rolled back at the next start.
    Creating,
    /// In use.
    Ready,
    /// Its destruction has begun and will be carried to the end.
    Destroying,
}

/// One replica of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// On which store.
    pub store: StoreId,
    /// Its membership state.
    pub state: Member,
    /// Nothing it holds can be relied on (an old copy of its store, or a new replica): resync copies everything. On a replica
    /// that is in sync it means that there is no other to copy from: the volume is not opened until an operator has acted.
    #[serde(default)]
    pub full_copy: bool,
    /// Why it is not in sync, for people.
    #[serde(default)]
    pub reason: Option<String>,
}

impl ReplicaRecord {
    /// A replica that holds every acknowledged write.
    pub fn in_sync(store: StoreId) -> Self {
        Self {
            store,
            state: Member::InSync,
            full_copy: false,
            reason: None,
        }
    }

    /// The volume's last replica in sync, and an old copy: not served until an operator has acted.
    pub fn is_old_and_last(&self) -> bool {
        self.state == Member::InSync && self.full_copy
    }
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its full name.
    pub path: VolumePath,
    /// Whose it is; never changes.
    pub customer: CustomerId,
    /// Scope of its data key.
    pub dataset: DatasetId,
    /// Its size.
    pub size_bytes: u64,
    /// Its replicas, in the order of its slots. While one moves there is one more; a place may be vacant.
    pub replicas: Vec<ReplicaRecord>,
    /// How many replicas it is to have.
    pub replicas_wanted: usize,
    /// Rises with every change of membership.
    pub membership_epoch: Epoch,
    /// Rises with every attach and detach.
    pub attachment_epoch: Epoch,
    /// Where it is in its life.
    pub phase: Phase,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
}

impl VolumeRecord {
    /// Places that are not vacant, and their replicas.
    pub fn held(&self) -> impl Iterator<Item = (usize, &ReplicaRecord)> {
        let places = self.replicas.iter().enumerate();
        places.filter(|(_, replica)| replica.state != Member::Vacant)
    }

    /// The place of its replica on a store.
    pub fn replica_on(&self, store: StoreId) -> Option<usize> {
        let mut held = self.held();
        held.find(|(_, replica)| replica.store == store)
            .map(|(place, _)| place)
    }

    /// Whether it has a replica on a store.
    pub fn is_on(&self, store: StoreId) -> bool {
        self.replica_on(store).is_some()
    }

    /// Whether its replica on a store is in sync.
    pub fn is_in_sync_on(&self, store: StoreId) -> bool {
        let place = self.replica_on(store);
        place.is_some_and(|place| self.replicas[place].state == Member::InSync)
    }

    /// The stores as its slots name them: by place, nil for a vacant one.
    pub fn stores(&self) -> Vec<StoreId> {
        let store = |replica: &ReplicaRecord| match replica.state {
            Member::Vacant => StoreId::NIL,
            _ => replica.store,
        };
        self.replicas.iter().map(store).collect()
    }
}

/// An attachment; at most one a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRecord {
    /// Its id.
    pub id: AttachmentId,
    /// The volume.
    pub volume: VolumeId,
    /// The VM.
    pub vm: VmId,
    /// The VM's customer when it was attached: the volume's.
    pub customer: CustomerId,
    /// The volume's attachment epoch that this attachment began.
    pub epoch: Epoch,
    /// Data protocol.
    pub protocol: Protocol,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The one that takes over from it as soon as its device starts: the VM moves to another process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<AttachmentId>,
    /// It has taken over from another.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moved: bool,
}

impl AttachmentRecord {
    /// The attachment that takes over from this one, as it will be. Only a successor and an end raise the epoch while there is
    /// an attachment, and an end takes the successor with it.
    pub fn succeeded(&self) -> Option<Self> {
        Some(Self {
            id: self.successor?,
            epoch: Epoch(self.epoch.0 + 1),
            successor: None,
            moved: true,
            ..self.clone()
        })
    }
}

/// What a destruction has reached on one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestroyedStore {
    /// The store.
    pub store: StoreId,
    /// Extents the volume held there, once known.
    pub extents: u32,
    /// Every key copy and extent there is overwritten, verified and free.
    pub done: bool,
    /// The store was given up as lost before that: nothing can be said of what it holds.
    #[serde(default)]
    pub lost: bool,
}

/// A destruction, from its intent on; kept after its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestroyRecord {
    /// The volume's id.
    pub volume: VolumeId,
    /// Its name when it was deleted.
    pub path: VolumePath,
    /// Whose it was.
    pub customer: CustomerId,
    /// By store.
    pub stores: Vec<DestroyedStore>,
    /// Seconds since 1970.
    pub started_unix_seconds: u64,
    /// Seconds since 1970, once every store is done.
    pub finished_unix_seconds: Option<u64>,
}

/// One integrity scrub of a volume, from its request or beginning on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubPass {
    /// Its number among the volume's passes, from 1.
    pub number: u64,
    /// Asked for by the operator; the daemon's own otherwise.
    pub requested: bool,
    /// Bytes to verify a second at most, as asked for.
    pub bytes_per_second: Option<u64>,
    /// Seconds since 1970.
    pub started_unix_seconds: u64,
    /// Seconds since 1970, once its end was reached.
    pub finished_unix_seconds: Option<u64>,
    /// Byte of the volume up to which it is verified.
    pub cursor: u64,
    /// Bytes to verify on all replicas together, as far as known when it began.
    pub total_bytes: u64,
    /// Bytes read and verified, on all replicas together.
    pub verified_bytes: u64,
    /// Damaged copies of blocks that were rewritten from a good one.
    pub healed_blocks: u64,
    /// Extents with a damaged checksum area that is written anew.
    pub healed_areas: u64,
    /// Blocks that no replica has a good copy of.
    pub lost_blocks: u64,
}

/// What is known of a volume's integrity scrubs. There is none before the first; it goes with the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// The volume.
    pub volume: VolumeId,
    /// The pass that waits, runs, or was interrupted; it goes on from its cursor.
    pub current: Option<ScrubPass>,
    /// The last one that reached the end.
    pub last: Option<ScrubPass>,
}

/// Remains of a destroyed volume, for ever: ids only, so that nothing can bring it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The volume's id.
    pub volume: VolumeId,
    /// Scope of its data key.
    pub dataset: DatasetId,
}

impl Record for StoreRecord {
    type Id = StoreId;
    const NOUN: &'static str = "store";
    const TABLE: &'static str = "stores";
    fn id(&self) -> StoreId {
        self.id
    }
    fn unique(&self) -> Option<String> {
        Some(self.name.to_string())
    }
}

impl Record for CustomerRecord {
    type Id = CustomerId;
    const NOUN: &'static str = "customer";
    const TABLE: &'static str = "customers";
    fn id(&self) -> CustomerId {
        self.id
    }
    fn unique(&self) -> Option<String> {
        Some(self.name.to_string())
    }
}

impl Record for VmRecord {
    type Id = VmId;
    const NOUN: &'static str = "VM";
    const TABLE: &'static str = "vms";
    fn id(&self) -> VmId {
        self.id
    }
    fn unique(&self) -> Option<String> {
        Some(self.name.to_string())
    }
}

impl Record for VolumeRecord {
    type Id = VolumeId;
    const NOUN: &'static str = "volume";
    const TABLE: &'static str = "volumes";
    fn id(&self) -> VolumeId {
        self.id
    }
    fn unique(&self) -> Option<String> {
        Some(self.path.to_string())
    }
}

impl Record for AttachmentRecord {
    type Id = AttachmentId;
    const NOUN: &'static str = "attachment of volume";
    const TABLE: &'static str = "attachments";
    fn id(&self) -> AttachmentId {
        self.id
    }
    /// One attachment a volume.
    fn unique(&self) -> Option<String> {
        Some(self.volume.to_string())
    }
}

impl Record for DestroyRecord {
    type Id = VolumeId;
    const NOUN: &'static str = "destruction";
    const TABLE: &'static str = "destroys";
    fn id(&self) -> VolumeId {
        self.volume
    }
    fn unique(&self) -> Option<String> {
        None
    }
}

impl Record for ScrubRecord {
    type Id = VolumeId;
    const NOUN: &'static str = "scrub of volume";
    const TABLE: &'static str = "scrubs";
    fn id(&self) -> VolumeId {
        self.volume
    }
    fn unique(&self) -> Option<String> {
        None
    }
}

impl Record for Tombstone {
    type Id = VolumeId;
    const NOUN: &'static str = "tombstone";
    const TABLE: &'static str = "tombstones";
    fn id(&self) -> VolumeId {
        self.volume
    }
    fn unique(&self) -> Option<String> {
        None
    }
}

macro_rules! id_is_uuid {
    ($($id:ident),*) => {$(
        impl From<$id> for Uuid {
            fn from(id: $id) -> Uuid {
                id.0
            }
        }
    )*};
}

id_is_uuid!(StoreId, CustomerId, VmId, VolumeId, AttachmentId);
