//! What a store tells about itself and its volumes, for rebuilding a catalog: read as opening reads it, nothing written.
//!
//! It looks at metadata only (superblock, log, table, slots). Whether data matches its checksums is [`super::check()`]'s
//! job. It deliberately decides nothing: which of several stores is to be believed, the caller says.

use std::collections::{BTreeMap, BTreeSet};

use super::books::Books;
use super::recover::{Loaded, load};
use super::{Expect, Finding, Found, StoreInfo, VolumeRecord, VolumeSlot};
use crate::disk::{Disk, DiskFile, classify};
use crate::error::Result;
use crate::ids::{DatasetId, VolumeId};

/// A store's description of itself and of what is on it.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Its facts.
    pub info: StoreInfo,
    /// By which it is told from an old copy of itself.
    pub found: Found,
    /// When it was made, seconds since 1970.
    pub created_unix_seconds: u64,
    /// Its live volumes.
    pub volumes: BTreeMap<VolumeId, LiveVolume>,
    /// Volumes that were destroyed here, or are being destroyed.
    pub tombstones: BTreeMap<VolumeId, Remains>,
    /// Volumes that have a slot here and of which the table no longer tells anything.
    pub unreadable_volumes: BTreeSet<VolumeId>,
    /// Whether some tombstones cannot be read, so that nobody can tell what was destroyed here.
    pub unreadable_tombstones: bool,
    /// Everything that is not as it should be.
    pub findings: Vec<Finding>,
}

/// A live volume as one store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveVolume {
    /// Its size, membership epoch and the members' states, as this store has them.
    pub record: VolumeRecord,
    /// Scope of its data key.
    pub dataset: DatasetId,
    /// Its slot, unless both copies are bad.
    pub slot: Option<VolumeSlot>,
    /// Extents that are allocated to it here.
    pub extents: u32,
}

/// What is left of a destroyed volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remains {
    /// Scope of its data key.
    pub dataset: DatasetId,
    /// Extents it held here.
    pub extents: u32,
    /// Whether its keys and extents here are all overwritten, read back and free.
    pub finished: bool,
    /// What its tombstone says.
    pub word: Word,
}

/// What a tombstone says of its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It was destroyed.
    Destroyed,
    /// Only its replica on this store was given up.
    GivenUp,
    /// The tombstone cannot be read, so it may be either.
    Unknown,
}

/// Looks at one store. The file may be open read-only.
///
/// # Errors
/// As [`super::open`] when the store cannot be read at all (not a store, of a newer format, I/O).
pub async fn inspect(file: &DiskFile, expect: Expect) -> Result<Inspection> {
    let disk = Disk::attach(file)?;
    let Loaded {
        superblock,
        books,
        slots,
        ring,
        findings,
        ..
    } = load(&disk, file, expect).await?;
    let slot_of = |volume| slots.live.get(volume).and_then(|slot| slot.as_ref().ok());
    let live = books.volumes().filter(|(_, entry)| !entry.tombstoned);
    let volumes = live.map(|(_, entry)| {
        let volume = LiveVolume {
            record: entry.record.clone(),
            dataset: entry.dataset,
            slot: slot_of(&entry.record.volume).cloned(),
            extents: books.allocated_of(entry.dataset),
        };
        (entry.record.volume, volume)
    });
    Ok(Inspection {
        volumes: volumes.collect(),
        tombstones: tombstones(&books),
        unreadable_volumes: slots.unknown.keys().copied().collect(),
        unreadable_tombstones: books.has_unknown_tombstones(),
        findings,
        found: superblock.found(ring.lsn()),
        created_unix_seconds: superblock.created_seconds,
        info: StoreInfo {
            id: superblock.store,
            name: superblock.name,
            zone: superblock.zone,
            installation: superblock.installation,
            path: file.path().to_owned(),
            extent_bytes: superblock.layout.extent_bytes,
            extents: superblock.layout.extents,
            medium: classify(file),
        },
    })
}

fn tombstones(books: &Books) -> BTreeMap<VolumeId, Remains> {
    let recorded = books.table().tombstones().map(|(_, tombstone)| {
        let remains = Remains {
            dataset: tombstone.dataset,
            extents: tombstone.extents,
            // The slot's record goes when keys and extents are gone, and not before.
            finished: books.volume(tombstone.volume).is_none(),
            word: match tombstone.given_up {
                true => Word::GivenUp,
                false => Word::Destroyed,
            },
        };
        (tombstone.volume, remains)
    });
    // A record that says "tombstoned" counts even where the tombstone itself cannot be read.
    let marked = books.volumes().filter(|(_, entry)| entry.tombstoned);
    let marked = marked.map(|(_, entry)| {
        let remains = Remains {
            dataset: entry.dataset,
            extents: books.left_of(entry.dataset),
            finished: false,
            word: Word::Unknown,
        };
        (entry.record.volume, remains)
    });
    marked.chain(recorded).collect()
}
