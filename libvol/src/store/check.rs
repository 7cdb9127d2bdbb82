//! The offline check: reads a whole store, writes nothing, and names what is wrong.
//!
//! It loads the metadata exactly as opening does, then holds data to checksums (allocated extents), to zero (free extents),
//! and replicas of one volume to each other. Extents with a dirty mark are unsettled after an unclean stop: the next open
//! reconciles them, so they are noted, not called damaged.

use std::collections::BTreeMap;

use futures_util::{StreamExt, stream};

use super::books::Books;
use super::layout::Layout;
use super::record::ExtentState;
use super::recover::load;
use super::transfer::{SPAN_BYTES, read};
use super::wire::is_zero;
use super::{Expect, Found, Member, SumAreaRead, VolumeSlot, sums};
use crate::crypto::seal::{HOLE, verify_block};
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Kind, Result};
use crate::ids::{BlockIndex, DatasetId, Epoch, ExtentIndex, Name, PhysicalExtent, StoreId, VolumeId};
use crate::limits::BLOCK_SIZE;

/// Extents read at a time: enough to keep a device busy, few enough to bound memory (a span each).
const EXTENTS_AT_A_TIME: usize = 8;
/// Damaged blocks named one by one in an extent before the rest is only counted.
const BLOCKS_NAMED: usize = 4;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// As it may be after an unclean stop; the next open puts it right.
    Note,
    /// Stored bytes contradict each other or cannot be read.
    Damage,
}

/// Something that is not as it should be, in one line that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What, where.
    pub text: String,
}

impl Finding {
    /// A finding of damage.
    pub fn damage(text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Damage,
            text: text.into(),
        }
    }

    /// A note.
    pub fn note(text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Note,
            text: text.into(),
        }
    }
}

/// How much to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckScope {
    /// Structure, ownership, and the checksums of allocated extents.
    Quick,
    /// Also that every free extent is zero.
    Full,
}

/// What a check found on one store.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// The store.
    pub store: StoreId,
    /// Its name.
    pub name: Name,
    /// By which it is told from an old copy of itself.
    pub found: Found,
    /// Everything that is not as it should be.
    pub findings: Vec<Finding>,
    /// Its live volumes.
    pub volumes: BTreeMap<VolumeId, VolumeReport>,
    /// Free extents that are not zero, or cannot be read: [`super::StoreHandle::rescrub`] is for them.
    pub unclean: Vec<PhysicalExtent>,
}

/// A live volume as one store has it.
#[derive(Clone, Debug)]
pub struct VolumeReport {
    /// Scope of its data key.
    pub dataset: DatasetId,
    /// Its size, as this store's record has it.
    pub size_bytes: u64,
    /// Its slot, unless both copies are bad.
    pub slot: Option<VolumeSlot>,
    /// Whether this store's record says that its replica is in sync.
    pub in_sync: bool,
    /// Membership epoch of this store's record.
    pub membership_epoch: Epoch,
    /// Its extents that are settled (not dirty).
    pub extents: BTreeMap<ExtentIndex, ExtentReport>,
    /// Its extents that the next open reconciles.
    pub dirty: Vec<ExtentIndex>,
}

/// Where an extent's ciphertext is, and its sums (all holes when the area is blank).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentReport {
    /// Where on the store.
    pub physical: PhysicalExtent,
    /// One sum a block; 0 is a hole.
    pub sums: Box<[u32]>,
    /// Byte offset of the data in the file.
    pub at: u64,
}

impl VolumeReport {
    /// What people call the volume: its path where a slot tells it, and its id.
    fn label(&self, id: VolumeId) -> String {
        match &self.slot {
            Some(slot) => format!("{}/{} ({id})", slot.customer_name, slot.volume_name),
            None => id.to_string(),
        }
    }
}

impl CheckReport {
    /// Whether nothing is damaged.
    pub fn is_clean(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.severity == Severity::Note)
    }
}

/// Checks one store. The file may be open read-only.
///
/// # Errors
/// As [`super::open`] when the store cannot be read at all (not a store, of a newer format, I/O); damage is no error here.
pub async fn check(file: &DiskFile, expect: Expect, scope: CheckScope) -> Result<CheckReport> {
    let disk = Disk::attach(file)?;
    let loaded = load(&disk, file, expect).await?;
    let (layout, books) = (loaded.superblock.layout, loaded.books);
    let mut report = CheckReport {
        store: loaded.superblock.store,
        name: loaded.superblock.name.clone(),
        found: loaded.superblock.found(loaded.ring.lsn()),
        findings: loaded.findings,
        volumes: BTreeMap::new(),
        unclean: Vec::new(),
    };
    for number in &loaded.slots.stale {
        let text =
            format!("slot {number}: not zero, of a volume that is not live; the next open overwrites it");
        report.findings.push(Finding::note(text));
    }
    for extent in books.quarantine().keys() {
        report.findings.push(Finding::damage(format!(
            "extent {extent}: out of use, its owner is not known"
        )));
    }
    for (_, entry) in books.volumes() {
        if entry.tombstoned {
            let text = format!("volume {}: its destruction is not finished", entry.record.volume);
            report.findings.push(Finding::note(text));
            continue;
        }
        let slot = match loaded.slots.live.get(&entry.record.volume) {
            Some(Ok(slot)) => Some(slot.clone()),
            _ => None,
        };
        let here = slot
            .as_ref()
            .and_then(|s| s.stores.iter().position(|s| *s == report.store));
        let volume = VolumeReport {
            dataset: entry.dataset,
            size_bytes: entry.record.size_bytes,
            membership_epoch: entry.record.membership_epoch,
            in_sync: here
                .and_then(|i| entry.record.members.get(i))
                .is_none_or(|m| *m == Member::InSync),
            slot,
            extents: BTreeMap::new(),
            dirty: Vec::new(),
        };
        report.volumes.insert(entry.record.volume, volume);
    }
    check_extents(&disk, &layout, &books, scope, &mut report).await;
    report
        .findings
        .sort_by_key(|finding| finding.severity == Severity::Note);
    Ok(report)
}

async fn check_extents(
    disk: &Disk,
    layout: &Layout,
    books: &Books,
    scope: CheckScope,
    report: &mut CheckReport,
) {
    let owners: BTreeMap<DatasetId, VolumeId> =
        report.volumes.iter().map(|(id, v)| (v.dataset, *id)).collect();
    let labels: BTreeMap<DatasetId, String> = report
        .volumes
        .iter()
        .map(|(id, v)| (v.dataset, format!("volume {}", v.label(*id))))
        .collect();
    let owner = |dataset: DatasetId| match labels.get(&dataset) {
        Some(label) => label.clone(),
        None => format!("dataset {dataset}"),
    };
    let owner = &owner;
    let dead = |dataset| books.is_dead(dataset);
    let known = (0..layout.extents).map(PhysicalExtent);
    let known = known.filter(|extent| !books.quarantine().contains_key(extent));
    let checks = known.filter_map(|extent| {
        let record = books.table().extent(extent)?;
        match record.state {
            ExtentState::PendingScrub => None,
            ExtentState::Free if scope == CheckScope::Quick => None,
            _ => Some(async move {
                let checked = check_extent(disk, layout, extent, &record, &owner(record.dataset)).await;
                (extent, record, checked)
            }),
        }
    });
    let mut results = stream::iter(checks).buffer_unordered(EXTENTS_AT_A_TIME);
    while let Some((extent, record, (found, sums))) = results.next().await {
        if record.state == ExtentState::Free && !found.is_empty() {
            report.unclean.push(extent);
        }
        report.findings.extend(found);
        if record.state != ExtentState::Allocated {
            continue;
        }
        let Some(volume) = owners
            .get(&record.dataset)
            .and_then(|id| report.volumes.get_mut(id))
        else {
            report.findings.push(match dead(record.dataset) {
                true => Finding::note(format!(
                    "extent {extent}: of a volume whose destruction is not finished"
                )),
                false => Finding::damage(format!(
                    "extent {extent}: of dataset {}, which no volume has",
                    record.dataset
                )),
            });
            continue;
        };
        if record.dirty {
            volume.dirty.push(record.logical);
            continue;
        }
        let at = layout.data_at(extent);
        let extent = ExtentReport {
            physical: extent,
            sums: sums.unwrap_or_default(),
            at,
        };
        volume.extents.insert(record.logical, extent);
    }
    for (id, volume) in &report.volumes {
        if !volume.dirty.is_empty() {
            let text = format!(
                "volume {}: {} extents need recovery after an unclean stop",
                volume.label(*id),
                volume.dirty.len()
            );
            report.findings.push(Finding::note(text));
        }
    }
}

/// Holds one extent's data to its record; `owner` is whose it is, for people. The sums come back where they are valid.
async fn check_extent(
    disk: &Disk,
    layout: &Layout,
    extent: PhysicalExtent,
    record: &super::record::ExtentRecord,
    owner: &str,
) -> (Vec<Finding>, Option<Box<[u32]>>) {
    let area = match read(disk, layout.sums_at(extent), layout.sum_area_bytes() as usize).await {
        Ok(area) => area,
        Err(error) => {
            return (
                vec![Finding::damage(format!(
                    "extent {extent}: checksum area: {error}"
                ))],
                None,
            );
        }
    };
    let blocks = layout.blocks_per_extent() as usize;
    let mut torn = None;
    let sums = match record.state {
        ExtentState::Free if is_zero(&area) => vec![HOLE; blocks].into(),
        ExtentState::Free => {
            let text = format!("extent {extent}: free, and its checksum area is not zero");
            return (vec![Finding::damage(text)], None);
        }
        _ if record.dirty => return (Vec::new(), None),
        _ => match sums::decode(layout, &area, record.dataset, record.logical) {
            SumAreaRead::Valid(area) => area.sums,
            SumAreaRead::Torn(area) => {
                torn = Some(Finding::damage(format!(
                    "extent {extent}: checksum area, of {owner}: its sums are not those that it was written with"
                )));
                area.sums
            }
            SumAreaRead::Blank => vec![HOLE; blocks].into(),
            SumAreaRead::Damaged(why) => {
                return (
                    vec![Finding::damage(format!(
                        "extent {extent}: checksum area, of {owner}: {why}"
                    ))],
                    None,
                );
            }
        },
    };
    let first = u64::from(record.logical.0) * blocks as u64;
    let (mut findings, mut wrong) = (Vec::from_iter(torn), 0);
    for span in (0..blocks).step_by(SPAN_BYTES / BLOCK_SIZE) {
        let len = (blocks - span).min(SPAN_BYTES / BLOCK_SIZE) * BLOCK_SIZE;
        let at = layout.data_at(extent) + (span * BLOCK_SIZE) as u64;
        let data = match read(disk, at, len).await {
            Ok(data) => data,
            Err(error) => {
                findings.push(Finding::damage(format!("extent {extent}: {error}")));
                continue;
            }
        };
        for (i, block) in data.chunks(BLOCK_SIZE).enumerate() {
            let index = BlockIndex(first + (span + i) as u64);
            if verify_block(record.dataset, index, block, sums[span + i]) {
                continue;
            }
            wrong += 1;
            if wrong <= BLOCKS_NAMED {
                let what = match record.state {
                    ExtentState::Free => "free, and not zero".to_owned(),
                    _ => format!("block {index} of {owner} does not match its checksum"),
                };
                let at = at + (i * BLOCK_SIZE) as u64;
                findings.push(Finding::damage(format!("extent {extent}, byte {at}: {what}")));
            }
        }
    }
    if wrong > BLOCKS_NAMED {
        findings.push(Finding::damage(format!(
            "extent {extent}: {wrong} wrong blocks in all"
        )));
    }
    (findings, Some(sums))
}

/// Holds the replicas of every volume to each other: settled extents of in-sync replicas must hold the same bytes. Of two
/// stores that disagree about the membership, the one with the higher epoch is believed. `stores` are files with their
/// reports.
///
/// # Errors
/// When a file cannot be attached to the engine.
pub async fn compare_replicas(stores: &[(&DiskFile, &CheckReport)]) -> Result<Vec<Finding>> {
    let disks: Vec<Disk> = stores
        .iter()
        .map(|(file, _)| Disk::attach(file))
        .collect::<Result<_>>()?;
    let mut replicas: BTreeMap<VolumeId, Vec<usize>> = BTreeMap::new();
    let newest = |id: &VolumeId| {
        let reports = stores.iter().filter_map(|(_, report)| report.volumes.get(id));
        reports.map(|volume| volume.membership_epoch).max()
    };
    for (index, (_, report)) in stores.iter().enumerate() {
        for (id, volume) in &report.volumes {
            if volume.in_sync && Some(volume.membership_epoch) == newest(id) {
                replicas.entry(*id).or_default().push(index);
            }
        }
    }
    let mut findings = Vec::new();
    for (volume, members) in replicas {
        let Some((first, others)) = members.split_first() else {
            continue;
        };
        for other in others {
            let pair = [*first, *other].map(|i| Side {
                disk: &disks[i],
                report: stores[i].1,
                volume: &stores[i].1.volumes[&volume],
            });
            compare(volume, &pair, &mut findings).await;
        }
    }
    Ok(findings)
}

struct Side<'a> {
    disk: &'a Disk,
    report: &'a CheckReport,
    volume: &'a VolumeReport,
}

async fn compare(volume: VolumeId, pair: &[Side<'_>; 2], findings: &mut Vec<Finding>) {
    let [a, b] = pair;
    let stores = format!("stores \"{}\" and \"{}\"", a.report.name, b.report.name);
    let volume = a.volume.label(volume);
    if a.volume.dataset != b.volume.dataset {
        findings.push(Finding::damage(format!(
            "volume {volume}: {stores} have different datasets for it"
        )));
        return;
    }
    let dirty = |logical: &ExtentIndex| pair.iter().any(|side| side.volume.dirty.contains(logical));
    let all = a.volume.extents.keys().chain(b.volume.extents.keys());
    let mut all: Vec<ExtentIndex> = all.filter(|logical| !dirty(logical)).copied().collect();
    all.sort_unstable();
    all.dedup();
    for logical in all {
        let differing = match differing_blocks(pair, logical).await {
            Ok(differing) => differing,
            Err(error) => {
                findings.push(Finding::damage(format!(
                    "volume {volume}, extent {logical}: {error}"
                )));
                continue;
            }
        };
        if let Some(first) = differing.first() {
            findings.push(Finding::damage(format!(
                "volume {volume}, logical extent {logical}: {stores} differ in {} blocks, the first is block {first} of the extent",
                differing.len()
            )));
        }
    }
}

/// Blocks of a logical extent that two replicas hold differently. An extent that one of them lacks reads as zeros.
async fn differing_blocks(pair: &[Side<'_>; 2], logical: ExtentIndex) -> Result<Vec<usize>> {
    let extents = [0, 1].map(|i| pair[i].volume.extents.get(&logical));
    let blocks = extents.iter().flatten().map(|e| e.sums.len()).max().unwrap_or(0);
    if extents.iter().flatten().any(|e| e.sums.len() != blocks) {
        return Err(Error::new(
            Kind::Damaged,
            "its checksum area is bad on one store, or extent sizes differ",
        ));
    }
    let mut differing = Vec::new();
    for span in (0..blocks).step_by(SPAN_BYTES / BLOCK_SIZE) {
        let len = (blocks - span).min(SPAN_BYTES / BLOCK_SIZE) * BLOCK_SIZE;
        let mut data = [None, None];
        for i in [0, 1] {
            if let Some(extent) = extents[i] {
                data[i] = Some(read(pair[i].disk, extent.at + (span * BLOCK_SIZE) as u64, len).await?);
            }
        }
        for block in 0..len / BLOCK_SIZE {
            let range = block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE;
            let equal = match &data {
                [Some(a), Some(b)] => a[range.clone()] == b[range],
                [Some(only), None] | [None, Some(only)] => is_zero(&only[range]),
                [None, None] => true,
            };
            if !equal {
                differing.push(span + block);
            }
        }
    }
    Ok(differing)
}
