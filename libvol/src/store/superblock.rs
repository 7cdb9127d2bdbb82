//! The superblock: what a store is, whose, and where its regions are; in two copies. Written when the store is formatted,
//! and at every opening, which changes its lineage ([`super::lineage`]) and nothing else.
//!
//! Reading tells five cases apart for each copy, so that the message can say what to do: good, of a newer format, damaged,
//! absent. A copy of a newer format with a right checksum wins over an older good one: an upgrade was on its way.

use std::rc::Rc;

use super::handle::Shared;
use super::layout::{FORMAT_VERSION, Layout, Region, SUPERBLOCK_B_AT};
use super::lineage::Found;
use super::transfer::{read, read_around_damage};
use super::wire::{crc32c, structure};
use crate::buf::Buf;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::ids::{Incarnation, InstallationId, Name, StoreId};

structure! {
    /// One superblock copy.
    fields, 4096,
    MAGIC "magic" 0 8,
    VERSION "format version" 8 4,
    RESERVED_1 "reserved" 12 4,
    STORE "store id" 16 16,
    INSTALLATION "installation id" 32 16,
    NAME "name" 48 64,
    ZONE "zone" 112 64,
    EXTENT_BYTES "extent size" 176 8,
    EXTENTS "extents" 184 4,
    SLOTS "volume slots" 188 4,
    TOMBSTONES "tombstone capacity" 192 4,
    RESERVED_2 "reserved" 196 4,
    TOTAL "total size" 200 8,
    SLOTS_AT "slot region offset" 208 8,
    SLOTS_LEN "slot region length" 216 8,
    LOG_AT "log offset" 224 8,
    LOG_LEN "log length" 232 8,
    TABLE_AT "table offset" 240 8,
    TABLE_LEN "table length" 248 8,
    SUMS_AT "checksum areas offset" 256 8,
    SUMS_LEN "checksum areas length" 264 8,
    DATA_AT "data offset" 272 8,
    DATA_LEN "data length" 280 8,
    CREATED "creation time" 288 8,
    SEQUENCE "sequence" 296 8,
    INCARNATION "incarnation" 304 16,
    COMMIT_FLOOR "commit floor" 320 8,
    RESERVED_3 "reserved" 328 3764,
    CRC "crc" 4092 4,
}

/// First bytes of every superblock.
pub(super) const MAGIC: [u8; 8] = *b"VOLDSUPR";

/// A superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) store: StoreId,
    pub(super) installation: InstallationId,
    pub(super) name: Name,
    pub(super) zone: Name,
    pub(super) layout: Layout,
    /// Seconds since 1970, for people.
    pub(super) created_seconds: u64,
    /// The higher copy wins.
    pub(super) sequence: u64,
    /// Of the last opening; nil before the first.
    pub(super) incarnation: Incarnation,
    /// The newest lsn when that opening had recovered.
    pub(super) commit_floor: u64,
}

/// What one copy turned out to be.
#[derive(Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "two of them are ever made, at open")]
pub(super) enum Copy {
    Good(Superblock),
    /// Of a later format; whether its checksum is right.
    Newer(u32, bool),
    /// Ours by its magic, but wrong; what.
    Damaged(String),
    /// Not ours.
    Absent,
}

impl Superblock {
    /// What the store says of itself, with `lsn` its newest commit.
    pub(super) fn found(&self, lsn: u64) -> Found {
        Found {
            incarnation: self.incarnation,
            sequence: self.sequence,
            lsn,
        }
    }

    pub(super) fn encode(&self) -> [u8; fields::SIZE] {
        let mut bytes = [0; fields::SIZE];
        let out = &mut bytes;
        let layout = &self.layout;
        fields::MAGIC.put(out, &MAGIC);
        fields::VERSION.put_u32(out, FORMAT_VERSION);
        fields::STORE.put(out, self.store.as_bytes());
        fields::INSTALLATION.put(out, self.installation.as_bytes());
        fields::NAME.put_name(out, &self.name);
        fields::ZONE.put_name(out, &self.zone);
        fields::EXTENT_BYTES.put_u64(out, layout.extent_bytes);
        fields::EXTENTS.put_u32(out, layout.extents);
        fields::SLOTS.put_u32(out, layout.slots);
        fields::TOMBSTONES.put_u32(out, layout.tombstones);
        fields::TOTAL.put_u64(out, layout.total_bytes);
        for (at, len, region) in REGIONS.iter().zip(regions(layout)).map(|((a, l), r)| (a, l, r)) {
            at.put_u64(out, region.at);
            len.put_u64(out, region.len);
        }
        fields::CREATED.put_u64(out, self.created_seconds);
        fields::SEQUENCE.put_u64(out, self.sequence);
        fields::INCARNATION.put(out, self.incarnation.as_bytes());
        fields::COMMIT_FLOOR.put_u64(out, self.commit_floor);
        let crc = crc32c(&out[..fields::CRC.at]);
        fields::CRC.put_u32(out, crc);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Copy {
        if fields::MAGIC.of(bytes) != MAGIC {
            return Copy::Absent;
        }
        let sound = crc32c(&bytes[..fields::CRC.at]) == fields::CRC.u32(bytes);
        let version = fields::VERSION.u32(bytes);
        if version > FORMAT_VERSION {
            return Copy::Newer(version, sound);
        }
        if !sound {
            return Copy::Damaged("its checksum is wrong".into());
        }
        if version != FORMAT_VERSION {
            return Copy::Damaged(format!("format version {version} never was"));
        }
        let (Some(name), Some(zone)) = (fields::NAME.name(bytes), fields::ZONE.name(bytes)) else {
            return Copy::Damaged("name or zone is not a valid name".into());
        };
        let [slot_region, log, table, sums, data] = REGIONS.map(|(at, len)| Region {
            at: at.u64(bytes),
            len: len.u64(bytes),
        });
        let layout = Layout {
            extent_bytes: fields::EXTENT_BYTES.u64(bytes),
            extents: fields::EXTENTS.u32(bytes),
            slots: fields::SLOTS.u32(bytes),
            tombstones: fields::TOMBSTONES.u32(bytes),
            slot_region,
            log,
            table,
            sums,
            data,
            total_bytes: fields::TOTAL.u64(bytes),
        };
        if let Some(fault) = layout.fault() {
            return Copy::Damaged(format!("impossible layout: {fault}"));
        }
        let sequence = fields::SEQUENCE.u64(bytes);
        // No store is opened 2^62 times; what claims so would overflow later sums.
        if sequence >= 1 << 62 {
            return Copy::Damaged(format!("impossible sequence {sequence}"));
        }
        Copy::Good(Self {
            store: StoreId::from_bytes(fields::STORE.id(bytes)),
            installation: InstallationId::from_bytes(fields::INSTALLATION.id(bytes)),
            name,
            zone,
            layout,
            created_seconds: fields::CREATED.u64(bytes),
            sequence,
            incarnation: Incarnation::from_bytes(fields::INCARNATION.id(bytes)),
            commit_floor: fields::COMMIT_FLOOR.u64(bytes),
        })
    }
}

/// What became of a renewal.
pub(super) struct Renewed {
    /// At least one copy is the new superblock.
    pub(super) done: bool,
    /// Which copy could not be written, and why.
    pub(super) failure: Option<String>,
}

impl Superblock {
    /// Whether a copy is what openings write, whole or cut short: this superblock but for its lineage and its checksum. They
    /// are in different sectors, so a cut may leave one without the other; rot seldom hits one alone and all of it, with a
    /// sequence that can be.
    pub(super) fn is_of_an_opening(&self, copy: &[u8]) -> bool {
        let mut own = self.encode();
        let lineage = [fields::SEQUENCE, fields::INCARNATION, fields::COMMIT_FLOOR];
        let is_another = lineage.iter().any(|field| field.of(&own) != field.of(copy));
        let sequence = fields::SEQUENCE.u64(copy);
        // No store is opened 2^32 times between two of its copies.
        let may_be = sequence != self.sequence
            && sequence.abs_diff(self.sequence) < 1 << 32
            && fields::INCARNATION.of(copy) != self.incarnation.as_bytes();
        for field in lineage.into_iter().chain([fields::CRC]) {
            field.put(&mut own, field.of(copy));
        }
        own[..] == *copy && (may_be || !is_another)
    }
}

/// Writes `next` over both copies, one after the other, each durable and read back before the next. The copy that does not
/// hold `now` goes first, so that a good one is there at every moment; where it cannot be written, the other one is left
/// alone.
///
/// # Errors
/// `Io` when a sync fails (the store is latched); one of the two is still there.
pub(super) async fn renew(
    shared: &Shared,
    disk: &Disk,
    now: &Superblock,
    next: &Superblock,
) -> Result<Renewed> {
    let (first, _) = read_around_damage(disk, 0, fields::SIZE).await;
    let order = match Superblock::decode(&first) {
        Copy::Good(held) if held == *now => [SUPERBLOCK_B_AT, 0],
        _ => [0, SUPERBLOCK_B_AT],
    };
    let bytes = Rc::new(Buf::copy_of(&next.encode()));
    let mut done = false;
    for at in order {
        match write_copy(shared, disk, at, &bytes).await {
            Ok(()) => done = true,
            Err(error) if shared.fault().is_some() => return Err(error),
            Err(error) => {
                return Ok(Renewed {
                    done,
                    failure: Some(format!(
                        "superblock copy {}: cannot be written ({error}); the store has one copy of it",
                        if at == 0 { "A" } else { "B" }
                    )),
                });
            }
        }
    }
    Ok(Renewed { done, failure: None })
}

/// Writes one copy, syncs and reads it back.
///
/// # Errors
/// `Io`. The store is latched only if the sync failed.
pub(super) async fn write_copy(shared: &Shared, disk: &Disk, at: u64, bytes: &Rc<Buf>) -> Result<()> {
    disk.write(at, bytes.clone(), 0..bytes.len()).await?;
    shared.sync(disk, "superblock").await?;
    match read(disk, at, bytes.len()).await?[..] == bytes[..] {
        true => Ok(()),
        false => Err(Error::io("it reads back other bytes than were written")),
    }
}

const REGIONS: [(super::wire::Field, super::wire::Field); 5] = [
    (fields::SLOTS_AT, fields::SLOTS_LEN),
    (fields::LOG_AT, fields::LOG_LEN),
    (fields::TABLE_AT, fields::TABLE_LEN),
    (fields::SUMS_AT, fields::SUMS_LEN),
    (fields::DATA_AT, fields::DATA_LEN),
];

fn regions(layout: &Layout) -> [Region; 5] {
    [
        layout.slot_region,
        layout.log,
        layout.table,
        layout.sums,
        layout.data,
    ]
}

/// The superblock of a store from its two copies, and what is wrong with the other copy.
///
/// # Errors
/// `Unsupported` for a newer format, `Damaged` when what is left is not usable, `Invalid` when neither copy is ours.
pub(super) fn choose(path: &str, copies: [Copy; 2]) -> Result<(Superblock, Vec<String>)> {
    if let Some(version) = newest(&copies, true) {
        return Err(unsupported(path, version));
    }
    let mut findings = Vec::new();
    let mut best: Option<Superblock> = None;
    for (copy, letter) in copies.iter().zip(["A", "B"]) {
        match copy {
            Copy::Good(superblock) => {
                if best.as_ref().is_none_or(|b| superblock.sequence > b.sequence) {
                    best = Some(superblock.clone());
                }
            }
            Copy::Newer(version, _) => {
                findings.push(format!(
                    "superblock copy {letter}: version {version} with a wrong checksum"
                ));
            }
            Copy::Damaged(why) => findings.push(format!("superblock copy {letter}: {why}")),
            Copy::Absent => findings.push(format!("superblock copy {letter}: not there")),
        }
    }
    if let Some(best) = best {
        return Ok((best, findings));
    }
    if let Some(version) = newest(&copies, false) {
        return Err(unsupported(path, version));
    }
    if copies.iter().all(|copy| *copy == Copy::Absent) {
        return Err(Error::invalid(format!(
            "{path} is not a vold store (no superblock); check the path, or make one with `volctl store add`"
        )));
    }
    Err(Error::damaged(format!(
        "{path}: both superblock copies are unusable ({}); put the file or device back as it was, or give the store up: volctl store remove --lost NAME",
        findings.join("; ")
    )))
}

fn newest(copies: &[Copy], sound_only: bool) -> Option<u32> {
    let version = |copy: &Copy| match copy {
        Copy::Newer(version, sound) if *sound || !sound_only => Some(*version),
        _ => None,
    };
    copies.iter().filter_map(version).max()
}

fn unsupported(path: &str, version: u32) -> Error {
    Error::new(
        crate::error::Kind::Unsupported,
        format!(
            "{path} has store format version {version}; this vold reads up to version {FORMAT_VERSION}; \
             start the vold that wrote it, or a newer one"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::layout::Sizes;
    use super::*;
    use crate::error::Kind;

    fn example() -> Superblock {
        Superblock {
            store: StoreId::random(),
            installation: InstallationId::random(),
            name: "nvme1".parse().unwrap(),
            zone: "rack-1".parse().unwrap(),
            layout: Layout::plan(1 << 30, 4 << 20, Sizes::for_store(1 << 30, 4 << 20)).unwrap(),
            created_seconds: 1_700_000_000,
            sequence: 1,
            incarnation: Incarnation::random(),
            commit_floor: 7,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let superblock = example();
        assert_eq!(Superblock::decode(&superblock.encode()), Copy::Good(superblock));
    }

    #[test]
    fn one_good_copy_is_enough_and_the_bad_one_is_named() {
        let good = example();
        let mut bad = good.encode();
        bad[300] ^= 1;
        let (chosen, findings) = choose("x", [Superblock::decode(&bad), Copy::Good(good.clone())]).unwrap();
        assert_eq!(chosen, good);
        assert!(findings[0].contains("copy A"), "{findings:?}");
    }

    #[test]
    fn a_copy_that_an_opening_tore_is_told_from_a_damaged_one() {
        let old = example();
        let new = Superblock {
            sequence: 2,
            incarnation: Incarnation::random(),
            commit_floor: 9,
            ..old.clone()
        };
        let mut torn = new.encode();
        torn[512..].copy_from_slice(&old.encode()[512..]);
        assert!(matches!(Superblock::decode(&torn), Copy::Damaged(_)));
        assert!(old.is_of_an_opening(&torn) && new.is_of_an_opening(&torn));
        let mut rotten = old.encode();
        rotten[300..316].iter_mut().for_each(|byte| *byte ^= 0xff);
        assert!(!old.is_of_an_opening(&rotten), "no such sequence");
        let mut rotten = old.encode();
        rotten[310] ^= 1;
        assert!(!old.is_of_an_opening(&rotten), "its incarnation alone");
        torn[50] ^= 1;
        assert!(!old.is_of_an_opening(&torn));
        assert!(!old.is_of_an_opening(&[0; fields::SIZE]));
    }

    #[test]
    fn a_newer_format_is_refused_with_both_versions_named() {
        let mut newer = example().encode();
        fields::VERSION.put_u32(&mut newer, 7);
        let copies = || [Superblock::decode(&newer), Superblock::decode(&newer)];
        let error = choose("x", copies()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("version 7") && error.message().contains("version 1"));

        let crc = crc32c(&newer[..fields::CRC.at]);
        fields::CRC.put_u32(&mut newer, crc);
        let error = choose("x", [Superblock::decode(&newer), Copy::Good(example())]).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "half upgraded");
    }

    #[test]
    fn a_right_checksum_does_not_make_a_layout_possible() {
        let mut forged = example();
        // All in proportion: a log of 5 GiB, which no transfer could read, and everything after it moved.
        let more = (5 << 30) - forged.layout.log.len;
        forged.layout.log.len += more;
        for region in [
            &mut forged.layout.table,
            &mut forged.layout.sums,
            &mut forged.layout.data,
        ] {
            region.at += more;
        }
        forged.layout.total_bytes += more;
        let Copy::Damaged(why) = Superblock::decode(&forged.encode()) else {
            panic!("believed");
        };
        assert!(why.contains("log"), "{why}");
    }

    #[test]
    fn foreign_bytes_and_damage_are_told_apart() {
        let error = choose("x", [Copy::Absent, Copy::Absent]).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        let error = choose("x", [Copy::Absent, Copy::Damaged("torn".into())]).unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged);
    }
}
