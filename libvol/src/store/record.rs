//! The 64-byte records of the table: volumes, tombstones, extents.
//!
//! A record is parsed once into its type; a state or reference that cannot be makes the bytes damaged, never a guess.

use super::layout::RECORD_BYTES;
use super::wire::structure;
use super::{Member, VolumeRecord};
use crate::ids::{DatasetId, Epoch, ExtentIndex, KeyVersion, ReplicaSet, VolumeId};
use crate::limits::{BLOCK, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};

/// Raw bytes of one record.
pub(super) type Image = [u8; RECORD_BYTES];

structure! {
    /// Volume record.
    volume_fields, 64,
    STATE "state" 0 1,
    MEMBERS "member count" 1 1,
    MEMBER_STATES "member states" 2 6,
    VOLUME "volume id" 8 16,
    DATASET "dataset id" 24 16,
    SIZE_BYTES "size in bytes" 40 8,
    EPOCH "membership epoch" 48 8,
    RESERVED "reserved" 56 8,
}

structure! {
    /// Tombstone record.
    tombstone_fields, 64,
    STATE "state" 0 1,
    FLAGS "flags" 1 1,
    RESERVED_1 "reserved" 2 2,
    EXTENTS "extents" 4 4,
    VOLUME "volume id" 8 16,
    DATASET "dataset id" 24 16,
    RESERVED_2 "reserved" 40 24,
}

structure! {
    /// Extent record.
    extent_fields, 64,
    STATE "state" 0 1,
    FLAGS "flags" 1 1,
    MISSED_BY "missed by" 2 1,
    RESERVED_1 "reserved" 3 1,
    REFERENCES "reference count" 4 4,
    DATASET "dataset id" 8 16,
    LOGICAL "logical extent" 24 4,
    KEY_VERSION "key version" 28 4,
    RESERVED_2 "reserved" 32 32,
}

/// State byte of an empty volume or tombstone record. An extent's is never 0, so zeroed pages are no table.
const EMPTY: u8 = 0;
const LIVE: u8 = 1;
const TOMBSTONED: u8 = 2;
const TOMBSTONE: u8 = 1;
const KEYS_DONE: u8 = 1;
const GIVEN_UP: u8 = 2;
const FREE: u8 = 1;
const ALLOCATED: u8 = 2;
const PENDING_SCRUB: u8 = 3;
const DIRTY: u8 = 1;

/// Replicas a volume record has room for.
pub(super) const MEMBERS_MAX: usize = 6;

/// A volume's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VolumeEntry {
    pub(super) record: VolumeRecord,
    pub(super) dataset: DatasetId,
    /// Its tombstone is committed; the slot's copies must never be believed again.
    pub(super) tombstoned: bool,
}

/// A tombstone; it stays for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tombstone {
    pub(super) volume: VolumeId,
    pub(super) dataset: DatasetId,
    /// Extents the volume held (allocated or waiting for scrub) when the tombstone was committed.
    pub(super) extents: u32,
    /// Both slot copies are overwritten and read back.
    pub(super) keys_done: bool,
    /// Only this store's replica has gone; the volume lives on elsewhere.
    pub(super) given_up: bool,
}

/// State of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentState {
    Free,
    Allocated,
    PendingScrub,
}

/// An extent's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExtentRecord {
    pub(super) state: ExtentState,
    pub(super) dirty: bool,
    /// Replicas that lack writes to it (beside its being dirty).
    pub(super) missed_by: ReplicaSet,
    pub(super) dataset: DatasetId,
    pub(super) logical: ExtentIndex,
    pub(super) key_version: KeyVersion,
}

impl ExtentRecord {
    pub(super) const FREE: Self = Self {
        state: ExtentState::Free,
        dirty: false,
        missed_by: ReplicaSet::NONE,
        dataset: DatasetId::NIL,
        logical: ExtentIndex(0),
        key_version: KeyVersion(0),
    };

    pub(super) fn encode(&self) -> Image {
        use extent_fields as f;
        let mut image = [0; RECORD_BYTES];
        let (state, references) = match self.state {
            ExtentState::Free => (FREE, 0),
            ExtentState::Allocated => (ALLOCATED, 1),
            ExtentState::PendingScrub => (PENDING_SCRUB, 0),
        };
        f::STATE.put_u8(&mut image, state);
        f::FLAGS.put_u8(&mut image, if self.dirty { DIRTY } else { 0 });
        f::MISSED_BY.put_u8(&mut image, self.missed_by.0);
        f::REFERENCES.put_u32(&mut image, references);
        f::DATASET.put(&mut image, self.dataset.as_bytes());
        f::LOGICAL.put_u32(&mut image, self.logical.0);
        f::KEY_VERSION.put_u32(&mut image, self.key_version.0);
        image
    }

    pub(super) fn decode(image: &Image) -> Option<Self> {
        use extent_fields as f;
        let state = match f::STATE.u8(image) {
            FREE => ExtentState::Free,
            ALLOCATED => ExtentState::Allocated,
            PENDING_SCRUB => ExtentState::PendingScrub,
            _ => return None,
        };
        Some(Self {
            state,
            dirty: f::FLAGS.u8(image) & DIRTY != 0,
            missed_by: ReplicaSet(f::MISSED_BY.u8(image)),
            dataset: DatasetId::from_bytes(f::DATASET.id(image)),
            logical: ExtentIndex(f::LOGICAL.u32(image)),
            key_version: KeyVersion(f::KEY_VERSION.u32(image)),
        })
    }
}

impl Tombstone {
    pub(super) fn encode(this: Option<&Self>) -> Image {
        use tombstone_fields as f;
        let mut image = [0; RECORD_BYTES];
        if let Some(this) = this {
            f::STATE.put_u8(&mut image, TOMBSTONE);
            let flag = |on: bool, bit: u8| if on { bit } else { 0 };
            let flags = flag(this.keys_done, KEYS_DONE) | flag(this.given_up, GIVEN_UP);
            f::FLAGS.put_u8(&mut image, flags);
            f::EXTENTS.put_u32(&mut image, this.extents);
            f::VOLUME.put(&mut image, this.volume.as_bytes());
            f::DATASET.put(&mut image, this.dataset.as_bytes());
        }
        image
    }

    /// `None` for bytes that cannot be; `Some(None)` for an empty place.
    pub(super) fn decode(image: &Image) -> Option<Option<Self>> {
        use tombstone_fields as f;
        match f::STATE.u8(image) {
            EMPTY => Some(None),
            TOMBSTONE => Some(Some(Self {
                volume: VolumeId::from_bytes(f::VOLUME.id(image)),
                dataset: DatasetId::from_bytes(f::DATASET.id(image)),
                extents: f::EXTENTS.u32(image),
                keys_done: f::FLAGS.u8(image) & KEYS_DONE != 0,
                given_up: f::FLAGS.u8(image) & GIVEN_UP != 0,
            })),
            _ => None,
        }
    }
}

impl VolumeEntry {
    pub(super) fn encode(this: Option<&Self>) -> Image {
        use volume_fields as f;
        let mut image = [0; RECORD_BYTES];
        let Some(this) = this else { return image };
        let record = &this.record;
        assert!(record.members.len() <= MEMBERS_MAX, "checked when it came in");
        f::STATE.put_u8(&mut image, if this.tombstoned { TOMBSTONED } else { LIVE });
        f::MEMBERS.put_u8(&mut image, record.members.len() as u8);
        for (byte, member) in image[f::MEMBER_STATES.at..].iter_mut().zip(&record.members) {
            *byte = match member {
                Member::InSync => 1,
                Member::Stale => 2,
                Member::Resyncing => 3,
                Member::Vacant => 4,
            };
        }
        f::VOLUME.put(&mut image, record.volume.as_bytes());
        f::DATASET.put(&mut image, this.dataset.as_bytes());
        f::SIZE_BYTES.put_u64(&mut image, record.size_bytes);
        f::EPOCH.put_u64(&mut image, record.membership_epoch.0);
        image
    }

    /// `None` for bytes that cannot be; `Some(None)` for an unused record.
    pub(super) fn decode(image: &Image) -> Option<Option<Self>> {
        use volume_fields as f;
        let tombstoned = match f::STATE.u8(image) {
            EMPTY => return Some(None),
            LIVE => false,
            TOMBSTONED => true,
            _ => return None,
        };
        let size_bytes = f::SIZE_BYTES.u64(image);
        if !is_volume_size(size_bytes) {
            return None;
        }
        let states = f::MEMBER_STATES.of(image);
        let members = states.get(..usize::from(f::MEMBERS.u8(image)))?;
        let members = members.iter().map(|byte| match byte {
            1 => Some(Member::InSync),
            2 => Some(Member::Stale),
            3 => Some(Member::Resyncing),
            4 => Some(Member::Vacant),
            _ => None,
        });
        Some(Some(Self {
            record: VolumeRecord {
                volume: VolumeId::from_bytes(f::VOLUME.id(image)),
                size_bytes,
                membership_epoch: Epoch(f::EPOCH.u64(image)),
                members: members.collect::<Option<_>>()?,
            },
            dataset: DatasetId::from_bytes(f::DATASET.id(image)),
            tombstoned,
        }))
    }
}

/// Whether a volume can have that size.
pub(super) fn is_volume_size(size_bytes: u64) -> bool {
    size_bytes.is_multiple_of(BLOCK) && (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_written() {
        let extent = ExtentRecord {
            state: ExtentState::Allocated,
            dirty: true,
            missed_by: ReplicaSet(0b101),
            dataset: DatasetId::random(),
            logical: ExtentIndex(77),
            key_version: KeyVersion(3),
        };
        assert_eq!(ExtentRecord::decode(&extent.encode()), Some(extent));
        let tombstone = Tombstone {
            volume: VolumeId::random(),
            dataset: DatasetId::random(),
            extents: 9,
            keys_done: true,
            given_up: true,
        };
        assert_eq!(
            Tombstone::decode(&Tombstone::encode(Some(&tombstone))),
            Some(Some(tombstone))
        );
        assert_eq!(Tombstone::decode(&Tombstone::encode(None)), Some(None));
        let volume = VolumeEntry {
            record: VolumeRecord {
                volume: VolumeId::random(),
                size_bytes: 1 << 30,
                membership_epoch: Epoch(4),
                members: vec![Member::InSync, Member::Stale, Member::Resyncing],
            },
            dataset: DatasetId::random(),
            tombstoned: false,
        };
        assert_eq!(
            VolumeEntry::decode(&VolumeEntry::encode(Some(&volume))),
            Some(Some(volume))
        );
    }

    #[test]
    fn impossible_states_are_damage_and_never_a_record() {
        assert_eq!(ExtentRecord::decode(&[0; 64]), None, "a zeroed extent record");
        for state in 4..=255 {
            let mut image = [0; 64];
            image[0] = state;
            assert_eq!(ExtentRecord::decode(&image), None);
            assert_eq!(Tombstone::decode(&image), None);
            assert_eq!(VolumeEntry::decode(&image), None);
        }
        let mut image = [0; 64];
        image[0] = LIVE;
        image[1] = 200;
        assert_eq!(
            VolumeEntry::decode(&image),
            None,
            "more members than there is room for"
        );
    }
    #[test]
    fn a_size_that_no_volume_has_is_damage() {
        let with_size = |size_bytes| {
            let entry = VolumeEntry {
                record: VolumeRecord {
                    volume: VolumeId::random(),
                    size_bytes,
                    membership_epoch: Epoch(1),
                    members: vec![Member::InSync],
                },
                dataset: DatasetId::random(),
                tombstoned: false,
            };
            VolumeEntry::decode(&VolumeEntry::encode(Some(&entry))).is_some()
        };
        for good in [VOLUME_BYTES_MIN, 1 << 30, VOLUME_BYTES_MAX] {
            assert!(with_size(good), "{good}");
        }
        for bad in [
            0,
            512,
            BLOCK + 1,
            VOLUME_BYTES_MAX + BLOCK,
            u64::MAX - BLOCK + 1,
            u64::MAX,
        ] {
            assert!(!with_size(bad), "{bad}");
        }
    }
}
