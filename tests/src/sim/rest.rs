//! The disks as they lie between two rounds: held to what must be true whenever the power goes, and damaged a little.
//!
//! | looked at | how |
//! |---|---|
//! | structure, sums of settled extents, zeros in free ones | [`libvol::store::check`], full |
//! | replicas of one volume | settled on all: same sums, same bytes |
//! | volumes that are gone | not listed, and their wrapped keys nowhere |
//!
//! Damage is done only where it can be repaired: to blocks of extents that are settled on every replica in sync, on the one
//! disk that may fail. It is outstanding until its bytes are overwritten.

use std::collections::{BTreeMap, BTreeSet};

use libvol::disk::sim::{Media, Rng, SimDriver};
use libvol::limits::{BLOCK, BLOCK_SIZE, SECTOR_SIZE};
use libvol::runtime::Runtime;
use libvol::store::{self, CheckReport, CheckScope, Expect, ExtentReport, Finding, Severity, VolumeReport};

use super::catalog::{Entry, KEY_MARK, Phase, Records};
use super::plan::{DATA_AT, EXTENT_BYTES};

/// Where volume slots may be: behind the superblocks, two copies of eight.
const SLOTS: std::ops::Range<u64> = (128 << 10)..(128 << 10) + 2 * 8 * BLOCK;

/// A block that may be damaged.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    number: u32,
    logical: u32,
    at: u64,
}

/// A sector that is damaged. Sectors, since what heals a block may be torn.
struct Damage {
    disk: usize,
    /// Byte offset of the sector.
    at: u64,
    bytes: [u8; SECTOR_SIZE],
    /// Volume and logical extent.
    owner: Option<(u32, u32)>,
}

/// All damage outstanding.
#[derive(Default)]
pub struct Damages {
    all: Vec<Damage>,
    unlimited: bool,
}

impl Damages {
    /// Forgets what has been healed, overwritten or scrubbed, durably: healing is not synced, so a cut may undo it.
    pub fn prune(&mut self, media: &[Media]) {
        self.all.retain(|damage| {
            let media = &media[damage.disk];
            let (mut now, mut durable) = ([0; SECTOR_SIZE], [0; SECTOR_SIZE]);
            media.read(damage.at, &mut now);
            media.read_durable(damage.at, &mut durable);
            now == damage.bytes || durable == damage.bytes
        });
    }

    /// Extents that must not be written in a round that may cut a write short.
    pub fn off_limits(&self) -> BTreeSet<(u32, u32)> {
        let extents = self.all.iter().filter_map(|damage| damage.owner);
        extents.filter(|_| !self.unlimited).collect()
    }

    /// No extent is off limits.
    pub fn forget_limits(&mut self) {
        self.unlimited = true;
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Disks with damage on them.
    pub fn disks(&self) -> BTreeSet<usize> {
        self.all.iter().map(|damage| damage.disk).collect()
    }

    /// A sector holds other bytes than it should.
    pub fn add(&mut self, disk: usize, at: u64, bytes: [u8; SECTOR_SIZE], owner: Option<(u32, u32)>) {
        self.all.retain(|damage| damage.disk != disk || damage.at != at);
        self.all.push(Damage {
            disk,
            at,
            bytes,
            owner,
        });
    }

    /// Flips one to three bits of a disk. How many. Sectors with damage outstanding are left alone: after a healing that is not
    /// synced, reads see one thing, and a cut may bring back another.
    pub fn flip_some(&mut self, disk: usize, media: &mut Media, places: &[Place], rng: &mut Rng) -> u64 {
        if places.is_empty() {
            return 0;
        }
        let mut count = 0;
        for _ in 0..1 + rng.below(3) {
            let place = places[rng.below(places.len() as u64) as usize];
            let (byte, bit) = (place.at + rng.below(BLOCK), rng.below(8) as u8);
            let at = byte / SECTOR_SIZE as u64 * SECTOR_SIZE as u64;
            if self
                .all
                .iter()
                .any(|damage| damage.disk == disk && damage.at == at)
            {
                continue;
            }
            media.flip_bit(byte, bit);
            count += 1;
            let mut bytes = [0; SECTOR_SIZE];
            media.read(at, &mut bytes);
            self.add(disk, at, bytes, Some((place.number, place.logical)));
        }
        count
    }

    fn explains(&self, disk: usize, text: &str) -> bool {
        let here = self.all.iter().filter(|damage| damage.disk == disk);
        let mut names = here.map(|damage| format!("extent {}", (damage.at - DATA_AT) / EXTENT_BYTES));
        names.any(|name| {
            let rest = text.strip_prefix(&name);
            rest.is_some_and(|rest| rest.starts_with([':', ',']))
        })
    }

    /// Whether the block at that byte offset is.
    fn is_damaged(&self, disk: usize, at: u64) -> bool {
        let mut all = self.all.iter();
        all.any(|damage| damage.disk == disk && damage.at / BLOCK * BLOCK == at)
    }
}

fn block(media: &Media, at: u64) -> [u8; BLOCK_SIZE] {
    let mut bytes = [0; BLOCK_SIZE];
    media.read(at, &mut bytes);
    bytes
}

/// The offline check of every disk.
pub fn inspect(media: &[Media]) -> Vec<CheckReport> {
    let driver = SimDriver::new(1, media.to_vec());
    let runtime = Runtime::new(driver.clone());
    let files: Vec<_> = (0..media.len()).map(|slot| driver.file(slot)).collect();
    runtime.block_on(async move {
        let mut reports = Vec::new();
        for file in &files {
            let report = store::check(file, Expect::default(), CheckScope::Full).await;
            reports.push(report.unwrap_or_else(|error| panic!("the check of a store fails: {error}")));
        }
        reports
    })
}

/// One of the two copies of a superblock, cut short while an opening wrote it. The next opening writes it again. Without a
/// good copy a store cannot be opened.
pub fn is_torn_superblock(finding: &Finding) -> bool {
    finding.text.starts_with("superblock copy ")
}

/// What must be true whenever the power goes.
///
/// # Panics
/// When it is not.
pub fn check(media: &[Media], reports: &[CheckReport], records: &Records, damages: &Damages) {
    for (disk, report) in reports.iter().enumerate() {
        for finding in &report.findings {
            assert!(
                finding.severity == Severity::Note
                    || is_torn_superblock(finding)
                    || damages.explains(disk, &finding.text),
                "disk {disk}: {}",
                finding.text
            );
        }
        for volume in report
            .volumes
            .keys()
            .filter(|_| records.returned_old != Some(disk))
        {
            assert!(
                records.by_id(*volume).is_some(),
                "disk {disk} has volume {volume}, which is gone or never was"
            );
        }
    }
    for entry in records.live.values() {
        compare(&replicas(entry, reports, records), entry.number, media, damages);
    }
}

/// No key is left of a volume that is gone. One that never served may be left where its slot could not
/// be erased: its store does that when it is opened next, at the latest before the history ends.
///
/// # Panics
/// When one is.
pub fn check_keys(media: &[Media], records: &Records, last: bool) {
    for (disk, media) in media.iter().enumerate() {
        if records.returned_old == Some(disk) {
            continue;
        }
        for number in keys_on(media) {
            let entry = records.live.get(&number);
            let may = entry.is_some_and(|entry| {
                let here = entry.replicas.iter().position(|on| *on == disk);
                here.is_some_and(|i| !entry.done.contains(&entry.stores[i]))
            });
            let gone = records.gone.get(&number);
            let never_was = gone.is_some_and(|entry| entry.phase == Phase::Creating);
            assert!(
                may || never_was && !last,
                "the wrapped key of volume {number}, which is gone, is left on disk {disk}"
            );
        }
    }
}

/// Volumes whose wrapped keys are in slots.
fn keys_on(media: &Media) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for at in SLOTS.step_by(BLOCK_SIZE) {
        let bytes = block(media, at);
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let mut candidates = (0..BLOCK_SIZE - KEY_MARK.len() - 4).filter(|at| bytes[*at] == KEY_MARK[0]);
        let key = candidates.find(|at| bytes[*at..].starts_with(KEY_MARK));
        let number = key.map(|at| at + KEY_MARK.len());
        found.extend(number.map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))));
    }
    found
}

/// Replicas in sync of a volume, on the disks they are on.
fn replicas<'a>(
    entry: &'a Entry,
    reports: &'a [CheckReport],
    records: &Records,
) -> Vec<(usize, &'a VolumeReport)> {
    let mut in_sync = entry.in_sync();
    in_sync.retain(|disk| records.returned_old != Some(*disk));
    let disks = entry.replicas.iter().filter(|disk| in_sync.contains(*disk));
    let found = disks.filter_map(|disk| {
        let volume = reports[*disk].volumes.get(&entry.id())?;
        Some((*disk, volume))
    });
    found.collect()
}

fn compare(all: &[(usize, &VolumeReport)], number: u32, media: &[Media], damages: &Damages) {
    let Some(((first_disk, first), others)) = all.split_first() else {
        return;
    };
    for (logical, a) in &first.extents {
        for (disk, other) in others {
            let Some(b) = other.extents.get(logical) else {
                continue;
            };
            assert!(
                a.sums == b.sums,
                "volume {number}, extent {logical}: checksum areas differ on disks {first_disk} and {disk}"
            );
            for i in 0..a.sums.len() as u64 {
                let (at, bt) = (a.at + i * BLOCK, b.at + i * BLOCK);
                if damages.is_damaged(*first_disk, at) || damages.is_damaged(*disk, bt) {
                    continue;
                }
                assert!(
                    block(&media[*first_disk], at) == block(&media[*disk], bt),
                    "volume {number}, extent {logical}, block {i}: differs on disks {first_disk} and {disk}"
                );
            }
        }
    }
}

/// What must be true after a round that ended in peace.
///
/// # Panics
/// When it is not.
pub fn check_end(reports: &[CheckReport], records: &Records) {
    for entry in records.live.values() {
        assert_eq!(
            entry.phase,
            Phase::Ready,
            "volume {}: its creation or destruction is not finished",
            entry.number
        );
        let all = replicas(entry, reports, records);
        assert_eq!(
            all.len(),
            entry.in_sync().len(),
            "volume {}: replicas",
            entry.number
        );
        for (disk, volume) in &all {
            assert!(
                volume.dirty.is_empty(),
                "volume {}: extents {:?} are marked on disk {disk} after a clean end",
                entry.number,
                volume.dirty
            );
            let logical = |volume: &VolumeReport| volume.extents.keys().copied().collect::<Vec<_>>();
            assert_eq!(
                logical(all[0].1),
                logical(volume),
                "volume {}: extents on its replicas",
                entry.number
            );
        }
    }
}

/// The extents of volumes with replicas in sync on the disk and on another, settled on all of them.
pub fn mirrored<'a>(
    disk: usize,
    reports: &'a [CheckReport],
    records: &'a Records,
) -> Vec<(u32, u32, &'a ExtentReport)> {
    let mut extents = Vec::new();
    let volumes = records.live.values();
    for entry in volumes.filter(|entry| entry.phase == Phase::Ready && entry.in_sync().len() > 1) {
        let all: BTreeMap<usize, &VolumeReport> = replicas(entry, reports, records).into_iter().collect();
        let Some(here) = all.get(&disk) else { continue };
        for (logical, extent) in &here.extents {
            assert_eq!(extent.at, DATA_AT + u64::from(extent.physical.0) * EXTENT_BYTES);
            if all.values().all(|volume| volume.extents.contains_key(logical)) {
                extents.push((entry.number, logical.0, extent));
            }
        }
    }
    extents
}

/// Blocks of a disk whose damage can be repaired: mirrored, with data.
pub fn repairable(disk: usize, reports: &[CheckReport], records: &Records) -> Vec<Place> {
    let mut places = Vec::new();
    for (number, logical, extent) in mirrored(disk, reports, records) {
        let data = extent.sums.iter().enumerate().filter(|(_, sum)| **sum != 0);
        places.extend(data.map(|(block, _)| Place {
            number,
            logical,
            at: extent.at + block as u64 * BLOCK,
        }));
    }
    places
}
