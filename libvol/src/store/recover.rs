//! Reading a store's metadata: superblock, log, table, slots. Writes nothing, so that the offline check uses it as well.
//!
//! Cases at open, in this order:
//!
//! | found | done |
//! |---|---|
//! | no, damaged, foreign or newer superblock; truncated file | refused, each with its own words |
//! | one bad or older copy of the superblock | the other one suffices; it is written again. No damage where the last opening was cut while it wrote it |
//! | gap in the log between checkpoint and newest frame | refused: committed changes are lost |
//! | newest frame below the superblock's commit floor | reported: the newest commits are lost |
//! | torn frame after the newest valid one | never committed; its place is written again |
//! | one bad or older copy of a page | the other copy and the log suffice; both are written again |
//! | both copies bad | the page's records are unknown and out of use; everything else serves |
//! | one bad copy of a live volume's slot | rewritten from the good one; named when it cannot be |
//! | two bad copies | that volume cannot be opened here |
//! | a slot without a live record that is not zero | overwritten: it never was, or was destroyed; named and not used when it cannot be |
//! | two extents with one owner and place | both out of use |

use std::collections::HashMap;
use std::path::Path;

use super::books::{Books, Suspect};
use super::layout::{Layout, PAGE_BYTES, RECORDS_PER_PAGE, SLOT_BYTES, SUPERBLOCK_B_AT, SUPERBLOCK_REGION};
use super::log::{Ring, scan};
use super::record::ExtentState;
use super::slots::{self, SlotCopy};
use super::sums;
use super::superblock::{Copy, Superblock, choose};
use super::table::Table;
use super::transfer::{SPAN_BYTES, read, read_around_damage};
use super::wire::is_zero;
use super::{Expect, Finding, Severity, VolumeSlot};
use crate::buf::Buf;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::ids::{PhysicalExtent, VolumeId};
use crate::sabotage::{Rule, broken};

/// A store's metadata in memory, as of its newest durable commit.
pub(super) struct Loaded {
    pub(super) superblock: Superblock,
    pub(super) superblock_repair: Option<SuperblockRepair>,
    pub(super) books: Books,
    pub(super) ring: Ring,
    pub(super) slots: Slots,
    /// What is not as it should be.
    pub(super) findings: Vec<Finding>,
}

/// A superblock copy that is bad or older, and what has to be written there: the good one's bytes, fields that this version
/// does not know included.
pub(super) struct SuperblockRepair {
    pub(super) at: u64,
    pub(super) bytes: Buf,
}

/// What the volume slots hold.
#[derive(Default)]
pub(super) struct Slots {
    /// Slots of live volumes; a text where both copies are bad.
    pub(super) live: HashMap<VolumeId, Result<VolumeSlot, String>>,
    /// Copies of live volumes' slots that are bad or older than the other one.
    pub(super) repair: Vec<Repair>,
    /// Slots without a live record that are not zero.
    pub(super) stale: Vec<u32>,
    /// Volumes named by slots whose records are unknown.
    pub(super) unknown: HashMap<VolumeId, u32>,
    /// Slots whose records are unknown, and which have a copy that may be anybody's.
    pub(super) anyones: Vec<u32>,
}

/// A slot copy to write anew.
pub(super) struct Repair {
    pub(super) number: u32,
    pub(super) copy: u8,
    /// Sequence and contents of the good copy.
    pub(super) sequence: u64,
    pub(super) slot: VolumeSlot,
}

/// Reads everything.
///
/// # Errors
/// As [`super::open`].
pub(super) async fn load(disk: &Disk, file: &DiskFile, expect: Expect) -> Result<Loaded> {
    let path = file.path().display().to_string();
    let read_so_far = read_superblock(disk, file.path(), file.size_bytes(), expect).await?;
    let (superblock, superblock_repair, mut findings) = read_so_far;
    let layout = superblock.layout;
    let damaged = |what: String| {
        Error::damaged(format!(
            "{path}: {what}; stop vold and let `vold check` list what is hurt, or give the store up: volctl store remove --lost {}",
            superblock.name
        ))
    };
    let log = read(disk, layout.log.at, layout.log.len as usize);
    let log = log.await.map_err(|e| e.context(format!("{path}: redo log")))?;
    let scanned = scan(superblock.store, &log).map_err(damaged)?;
    drop(log);
    if scanned.ring.lsn() < superblock.commit_floor {
        findings.push(Finding::damage(format!(
            "redo log: its newest commit is {}, and there was {} when the store was last opened",
            scanned.ring.lsn(),
            superblock.commit_floor
        )));
    }

    let mut table = Table::new(layout, superblock.store, ExtentState::Free);
    let (unknown, one_bad) = read_pages(disk, &layout, &mut table).await;
    findings.extend(unknown);
    table.replay(&scanned.frames).map_err(damaged)?;
    for (page, wrong) in one_bad {
        let severity = match table.page_lsn(page) > scanned.ring.checkpoint() {
            // A checkpoint may have been writing it when the power went: the log still has what changed.
            true => Severity::Note,
            // Nobody was: the copy has rotted. The other one is as good.
            false => Severity::Damage,
        };
        findings.extend(wrong.into_iter().map(|text| Finding { severity, text }));
        table.heal(page);
    }
    let (mut books, contradictions) = Books::new(table);
    findings.extend(contradictions.into_iter().map(Finding::damage));
    identify_unknown(disk, &mut books).await;
    let slots = read_slots(disk, &superblock, &books, &mut findings).await;
    Ok(Loaded {
        superblock,
        superblock_repair,
        books,
        ring: scanned.ring,
        slots,
        findings,
    })
}

/// The superblock, after every check that needs nothing else; and what is wrong with the copies.
pub(super) async fn read_superblock(
    disk: &Disk,
    path: &Path,
    size_bytes: u64,
    expect: Expect,
) -> Result<(Superblock, Option<SuperblockRepair>, Vec<Finding>)> {
    let path = path.display().to_string();
    if size_bytes < SUPERBLOCK_REGION {
        return Err(Error::invalid(format!(
            "{path} is not a vold store (only {size_bytes} bytes); check the path, or make one with `volctl store add`"
        )));
    }
    let (bytes, unreadable) = read_around_damage(disk, 0, SUPERBLOCK_REGION as usize).await;
    if u64::from(unreadable) == SUPERBLOCK_REGION / SLOT_BYTES {
        return Err(Error::io(format!(
            "{path}: the superblock cannot be read; check the device"
        )));
    }
    let places = [0, SUPERBLOCK_B_AT];
    let copies = places.map(|at| &bytes[at as usize..][..SLOT_BYTES as usize]);
    let (superblock, findings) = choose(&path, copies.map(Superblock::decode))?;
    let severity = match copies.iter().all(|copy| superblock.is_of_an_opening(copy)) {
        true => Severity::Note,
        false => Severity::Damage,
    };
    let total = superblock.layout.total_bytes;
    if size_bytes < total {
        return Err(Error::invalid(format!(
            "{path} is truncated: store \"{}\" has {total} bytes, the file only {size_bytes}; put the whole file back, or give the store up: volctl store remove --lost {}",
            superblock.name, superblock.name
        )));
    }
    if let Some(installation) = expect.installation
        && installation != superblock.installation
    {
        return Err(Error::refused(format!(
            "{path} belongs to another installation ({}, this one is {installation}); \
             use it there, or overwrite its first 128 KiB to give it up",
            superblock.installation
        )));
    }
    if let Some(store) = expect.store
        && store != superblock.store
    {
        return Err(Error::refused(format!(
            "{path} is store {} (\"{}\"), not the expected {store}; correct the path",
            superblock.store, superblock.name
        )));
    }
    let best = Copy::Good(superblock.clone());
    let good = copies.iter().position(|copy| Superblock::decode(copy) == best);
    let other = 1 - good.expect("the superblock is one of the copies");
    let repair = (copies[0] != copies[1]).then(|| SuperblockRepair {
        at: places[other],
        bytes: Buf::copy_of(copies[1 - other]),
    });
    let findings = findings.into_iter().map(|text| Finding { severity, text });
    Ok((superblock, repair, findings.collect()))
}

/// Reads every page. What is unknown comes back as damage, and pages with one bad or older copy with what is wrong.
async fn read_pages(
    disk: &Disk,
    layout: &Layout,
    table: &mut Table,
) -> (Vec<Finding>, Vec<(u32, Vec<String>)>) {
    let (mut unknown, mut one_bad) = (Vec::new(), Vec::new());
    let pages: Vec<u32> = (0..layout.pages()).collect();
    for run in pages.chunks(SPAN_BYTES / PAGE_BYTES) {
        let len = run.len() * PAGE_BYTES;
        let (first, _) = read_around_damage(disk, layout.page_at(run[0], 0), len).await;
        let (second, _) = read_around_damage(disk, layout.page_at(run[0], 1), len).await;
        let copies = first.chunks(PAGE_BYTES).zip(second.chunks(PAGE_BYTES));
        for (page, (first, second)) in run.iter().zip(copies) {
            let wrong = table.load(*page, [first, second]);
            if table.is_unknown(*page * RECORDS_PER_PAGE) {
                unknown.extend(wrong.into_iter().map(Finding::damage));
            } else if !wrong.is_empty() {
                one_bad.push((*page, wrong));
            }
        }
    }
    (unknown, one_bad)
}

/// Learns from the checksum areas whose the extents of unknown pages may be, so that only those datasets are refused.
async fn identify_unknown(disk: &Disk, books: &mut Books) {
    let layout = *books.table().layout();
    let unknown: Vec<PhysicalExtent> = books
        .quarantine()
        .iter()
        .filter(|(_, suspect)| **suspect == Suspect::Anyone)
        .map(|(extent, _)| *extent)
        .collect();
    for extent in unknown {
        let (area, _) =
            read_around_damage(disk, layout.sums_at(extent), layout.sum_area_bytes() as usize).await;
        let suspect = match sums::owner(&layout, &area) {
            Ok((dataset, _)) => Suspect::Dataset(dataset),
            Err(_) if is_zero(&area) && is_zero_extent(disk, &layout, extent).await => Suspect::Nobody,
            Err(_) => Suspect::Anyone,
        };
        books.suspect(extent, suspect);
    }
}

/// Whether all data of an extent reads as zeros.
pub(super) async fn is_zero_extent(disk: &Disk, layout: &Layout, extent: PhysicalExtent) -> bool {
    let mut done = 0;
    while done < layout.extent_bytes {
        let n = (SPAN_BYTES as u64).min(layout.extent_bytes - done);
        match read(disk, layout.data_at(extent) + done, n as usize).await {
            Ok(piece) if is_zero(&piece) => done += n,
            _ => return false,
        }
    }
    true
}

async fn read_slots(
    disk: &Disk,
    superblock: &Superblock,
    books: &Books,
    findings: &mut Vec<Finding>,
) -> Slots {
    let layout = &superblock.layout;
    let mut slots = Slots::default();
    let numbers: Vec<u32> = (0..layout.slots).collect();
    for run in numbers.chunks(SPAN_BYTES / SLOT_BYTES as usize) {
        let len = run.len() * SLOT_BYTES as usize;
        let (first, _) = read_around_damage(disk, layout.slot_at(run[0], 0), len).await;
        let (second, _) = read_around_damage(disk, layout.slot_at(run[0], 1), len).await;
        let copies = first
            .chunks(SLOT_BYTES as usize)
            .zip(second.chunks(SLOT_BYTES as usize));
        for (number, (first, second)) in run.iter().zip(copies) {
            let copies = [first, second].map(|bytes| slots::decode(superblock.store, *number, bytes));
            slots.take(*number, copies, books, findings);
        }
    }
    slots
}

impl Slots {
    fn take(&mut self, number: u32, copies: [SlotCopy; 2], books: &Books, findings: &mut Vec<Finding>) {
        if books.table().is_unknown(number) {
            for copy in copies {
                match copy {
                    SlotCopy::Valid(_, slot) => {
                        self.unknown.insert(slot.volume, number);
                    }
                    SlotCopy::Zero => {}
                    SlotCopy::Damaged(_) => self.anyones.push(number),
                }
            }
            return;
        }
        let live = books.table().volume(number);
        let live = live.filter(|entry| !entry.tombstoned || broken(Rule::TombstonedSlots));
        let Some(entry) = live else {
            if copies != [SlotCopy::Zero, SlotCopy::Zero] {
                self.stale.push(number);
            }
            return;
        };
        let volume = entry.record.volume;
        let belongs = |slot: &VolumeSlot| slot.volume == volume && slot.dataset == entry.dataset;
        let mut best: Option<(u64, VolumeSlot)> = None;
        for (index, copy) in copies.iter().enumerate() {
            let why = match copy {
                SlotCopy::Valid(sequence, slot) if belongs(slot) => {
                    if best.as_ref().is_none_or(|(best, _)| sequence > best) {
                        best = Some((*sequence, slot.clone()));
                    }
                    continue;
                }
                SlotCopy::Valid(..) => "of another volume",
                SlotCopy::Zero => "zero",
                SlotCopy::Damaged(why) => why,
            };
            findings.push(Finding::damage(format!(
                "volume {volume}: slot {number}, copy {}: {why}",
                index + 1
            )));
        }
        let Some((sequence, slot)) = best else {
            let text = format!("both copies of slot {number} are bad, so its keys are lost here");
            findings.push(Finding::damage(format!("volume {volume}: {text}")));
            self.live.insert(volume, Err(text));
            return;
        };
        let good = SlotCopy::Valid(sequence, slot.clone());
        for (index, copy) in copies.iter().enumerate() {
            if *copy != good {
                self.repair.push(Repair {
                    number,
                    copy: index as u8,
                    sequence,
                    slot: slot.clone(),
                });
            }
        }
        self.live.insert(volume, Ok(slot));
    }
}
