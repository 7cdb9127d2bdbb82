//! What a volume may answer: a register a 512-byte sector, with a value of its own for every write.
//!
//! Every request is an interval of time; of two writes the later one is known only where one ended before the other
//! began, or where a read has told. From that:
//!
//! - a read may return any write, unless a later one had been acknowledged, or read, before the read began;
//! - after a power cut any write may be there, unless a later one is durable: acknowledged with FUA, or acknowledged or
//!   read before a flush began that was acknowledged;
//! - what recovery has settled on is durable.
//!
//! A sector's bytes name their volume, their place and their value, so that another volume's bytes, or those of another
//! place, are told as such.

use std::collections::BTreeMap;
use std::ops::Range;

use libvol::limits::SECTOR_SIZE;

/// Begins every sector of data; must never be seen on a disk.
pub const PLAINTEXT_MARK: [u8; 16] = *b"<sim plaintext!>";

/// Not yet.
const NEVER: u64 = u64::MAX;

/// One write, or trim (value 0).
#[derive(Clone, Debug)]
struct Write {
    value: u64,
    began: u64,
    ended: u64,
    /// When it was acknowledged.
    applied: u64,
    durable: bool,
}

/// A write as one sector knows it.
#[derive(Clone, Debug)]
struct Entry {
    write: u32,
    /// When a read first returned it.
    seen: u64,
    /// A flush began after that and was acknowledged.
    durable: bool,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    entries: Vec<Entry>,
    /// Pairs of writes that overlapped, the earlier first, as reads told.
    order: Vec<(u32, u32)>,
}

/// See the module's text.
pub struct Model {
    volume: u32,
    sectors: Vec<Sector>,
    /// The first one is zeros, from the beginning of time.
    writes: Vec<Write>,
    clock: u64,
    next_value: u64,
}

/// A write under way.
#[derive(Debug)]
pub struct Started(u32);

/// A read under way.
#[derive(Debug)]
pub struct Reading {
    began: u64,
    sectors: Range<usize>,
}

/// A flush under way.
#[derive(Debug)]
pub struct Flushing {
    began: u64,
}

impl Model {
    /// A volume of zeros.
    pub fn new(volume: u32, sectors: usize) -> Self {
        let mut model = Self {
            volume,
            sectors: Vec::new(),
            writes: vec![settled(0)],
            clock: 0,
            next_value: 1,
        };
        model.grow(sectors);
        model
    }

    /// Its sectors.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// More sectors, of zeros. Fewer change nothing.
    pub fn grow(&mut self, sectors: usize) {
        let zeros = Sector {
            entries: vec![entry(0)],
            order: Vec::new(),
        };
        self.sectors.resize(sectors.max(self.sectors.len()), zeros);
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write of a new value begins; its bytes are put into `payload`.
    pub fn start_write(&mut self, sectors: Range<usize>, payload: &mut [u8]) -> Started {
        let value = self.next_value;
        self.next_value += 1;
        for (sector, bytes) in sectors.clone().zip(payload.chunks_mut(SECTOR_SIZE)) {
            fill(self.volume, sector, value, bytes);
        }
        self.start(sectors, value)
    }

    /// A trim or write-zeroes begins.
    pub fn start_zeros(&mut self, sectors: Range<usize>) -> Started {
        self.start(sectors, 0)
    }

    fn start(&mut self, sectors: Range<usize>, value: u64) -> Started {
        let write = self.writes.len() as u32;
        let began = self.tick();
        self.writes.push(Write {
            value,
            began,
            ended: NEVER,
            applied: NEVER,
            durable: false,
        });
        for sector in &mut self.sectors[sectors] {
            sector.entries.push(entry(write));
        }
        Started(write)
    }

    /// It was acknowledged; with `fua`, as durable.
    pub fn acknowledge(&mut self, started: Started, fua: bool) {
        let now = self.tick();
        let write = &mut self.writes[started.0 as usize];
        (write.ended, write.applied, write.durable) = (now, now, fua);
    }

    /// It was refused: nobody knows how far it came, but it has ended.
    pub fn fail(&mut self, started: Started) {
        let now = self.tick();
        self.writes[started.0 as usize].ended = now;
    }

    /// A flush begins.
    pub fn start_flush(&mut self) -> Flushing {
        Flushing { began: self.tick() }
    }

    /// It was acknowledged.
    pub fn flushed(&mut self, flush: Flushing) {
        self.tick();
        for write in self.writes.iter_mut().filter(|write| write.applied < flush.began) {
            write.durable = true;
        }
        let entries = self.sectors.iter_mut().flat_map(|sector| &mut sector.entries);
        for entry in entries.filter(|entry| entry.seen < flush.began) {
            entry.durable = true;
        }
    }

    /// A read begins.
    pub fn start_read(&mut self, sectors: Range<usize>) -> Reading {
        Reading {
            began: self.tick(),
            sectors,
        }
    }

    /// It returned `bytes`.
    ///
    /// # Panics
    /// When a sector is none that may be there.
    pub fn check_read(&mut self, read: Reading, bytes: &[u8]) {
        let now = self.tick();
        for (number, bytes) in read.sectors.zip(bytes.chunks(SECTOR_SIZE)) {
            let value = self.value_of(number, bytes, "a read");
            let sector = &self.sectors[number];
            let may = |entry: &&Entry| {
                let superseded = |later: &Entry| {
                    self.applied(later) < read.began && self.is_before(sector, entry.write, later.write)
                };
                !sector.entries.iter().any(superseded)
            };
            let allowed: Vec<u32> = sector
                .entries
                .iter()
                .filter(may)
                .map(|entry| entry.write)
                .collect();
            let is = |write: &&u32| self.writes[**write as usize].value == value;
            let mut matching = allowed.iter().filter(is);
            let Some(write) = matching.next().copied() else {
                panic!(
                    "volume {}, sector {number}: a read returned value {value}, {}",
                    self.volume,
                    self.describe(number, &allowed)
                );
            };
            if matching.next().is_some() {
                // Zeros of several trims: which one is not told.
                continue;
            }
            // What had ended before the read began came before what it returned.
            let earlier = allowed.into_iter().filter(|other| {
                let ended = self.writes[*other as usize].ended;
                *other != write && ended < read.began && !self.is_before(sector, *other, write)
            });
            let earlier: Vec<(u32, u32)> = earlier.map(|other| (other, write)).collect();
            let sector = &mut self.sectors[number];
            sector.order.extend(earlier);
            let entry = sector.entries.iter_mut().find(|entry| entry.write == write);
            let entry = entry.expect("found above");
            entry.seen = entry.seen.min(now);
        }
    }

    /// The power went, or the volume was closed; it is open again, and `sectors` read as `bytes`. From now on exactly this
    /// is there.
    ///
    /// # Panics
    /// When a sector is none that may be there.
    pub fn check_after_cut(&mut self, bytes: &[u8]) {
        assert_eq!(
            bytes.len(),
            self.len() * SECTOR_SIZE,
            "volume {}: its size",
            self.volume
        );
        let mut writes = vec![settled(0)];
        let mut by_value = BTreeMap::from([(0, 0)]);
        for number in 0..self.len() {
            let bytes = &bytes[number * SECTOR_SIZE..][..SECTOR_SIZE];
            let value = self.value_of(number, bytes, "after the cut");
            let sector = &self.sectors[number];
            let may = |candidate: &&Entry| {
                let superseded = |later: &Entry| {
                    let durable = later.durable || self.writes[later.write as usize].durable;
                    durable && self.is_before(sector, candidate.write, later.write)
                };
                !sector.entries.iter().any(superseded)
            };
            let mut allowed = sector.entries.iter().filter(may);
            if !allowed
                .clone()
                .any(|entry| self.writes[entry.write as usize].value == value)
            {
                let allowed: Vec<u32> = allowed.by_ref().map(|entry| entry.write).collect();
                panic!(
                    "volume {}, sector {number}: value {value} after the cut, {}",
                    self.volume,
                    self.describe(number, &allowed)
                );
            }
            let write = *by_value.entry(value).or_insert_with(|| {
                writes.push(settled(value));
                writes.len() as u32 - 1
            });
            let sector = &mut self.sectors[number];
            sector.entries.clear();
            sector.entries.push(entry(write));
            sector.order.clear();
        }
        self.writes = writes;
    }

    fn applied(&self, entry: &Entry) -> u64 {
        self.writes[entry.write as usize].applied.min(entry.seen)
    }

    fn is_before(&self, sector: &Sector, a: u32, b: u32) -> bool {
        self.writes[a as usize].ended < self.writes[b as usize].began || sector.order.contains(&(a, b))
    }

    fn describe(&self, sector: usize, allowed: &[u32]) -> String {
        let entries = self.sectors[sector].entries.iter().map(|entry| {
            let write = &self.writes[entry.write as usize];
            let state = match (write.applied, write.ended) {
                (NEVER, NEVER) => "under way",
                (NEVER, _) => "refused",
                _ if write.durable || entry.durable => "durable",
                _ => "acknowledged",
            };
            let may = if allowed.contains(&entry.write) {
                ""
            } else {
                ", superseded"
            };
            format!("{} ({state}{may})", write.value)
        });
        format!("of: {}", entries.collect::<Vec<_>>().join(", "))
    }

    /// Which value a sector holds.
    fn value_of(&self, sector: usize, bytes: &[u8], when: &str) -> u64 {
        if bytes.iter().all(|byte| *byte == 0) {
            return 0;
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
        let (volume, place, value) = (word(2), word(3), word(4));
        let mut expected = [0; SECTOR_SIZE];
        fill(self.volume, sector, value, &mut expected);
        assert!(
            bytes == expected,
            "volume {}, sector {sector}, {when}: {}",
            self.volume,
            match bytes[..16] == PLAINTEXT_MARK {
                true => format!("bytes of volume {volume}, sector {place}, value {value}, or part of them"),
                false => "bytes that nobody wrote".to_owned(),
            }
        );
        value
    }
}

fn settled(value: u64) -> Write {
    Write {
        value,
        began: 0,
        ended: 0,
        applied: 0,
        durable: true,
    }
}

fn entry(write: u32) -> Entry {
    Entry {
        write,
        seen: NEVER,
        durable: false,
    }
}

/// A sector's bytes: the mark, volume, place and value, and words that follow from them.
fn fill(volume: u32, sector: usize, value: u64, bytes: &mut [u8]) {
    let mut word = u64::from(volume) << 40 ^ (sector as u64) << 20 ^ value;
    for (at, bytes) in bytes.chunks_exact_mut(8).enumerate() {
        word = word
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let content = match at {
            0 | 1 => {
                bytes.copy_from_slice(&PLAINTEXT_MARK[at * 8..at * 8 + 8]);
                continue;
            }
            2 => u64::from(volume),
            3 => sector as u64,
            4 => value,
            _ => word,
        };
        bytes.copy_from_slice(&content.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(model: &mut Model, fua: bool) -> [u8; SECTOR_SIZE] {
        let mut bytes = [0; SECTOR_SIZE];
        let started = model.start_write(0..1, &mut bytes);
        model.acknowledge(started, fua);
        bytes
    }

    fn flush(model: &mut Model) {
        let flush = model.start_flush();
        model.flushed(flush);
    }

    #[test]
    fn an_unflushed_write_may_be_lost_and_kept() {
        for lost in [false, true] {
            let mut model = Model::new(1, 1);
            let bytes = write(&mut model, false);
            model.check_after_cut(if lost { &[0; SECTOR_SIZE] } else { &bytes });
        }
    }

    #[test]
    #[should_panic(expected = "value 1 after the cut")]
    fn a_flushed_write_does_not_revert() {
        let mut model = Model::new(1, 1);
        let old = write(&mut model, false);
        write(&mut model, false);
        flush(&mut model);
        model.check_after_cut(&old);
    }

    #[test]
    #[should_panic(expected = "value 1 after the cut")]
    fn a_fua_write_does_not_revert() {
        let mut model = Model::new(1, 1);
        let old = write(&mut model, false);
        write(&mut model, true);
        model.check_after_cut(&old);
    }

    #[test]
    #[should_panic(expected = "a read returned value 1")]
    fn a_read_returns_no_overwritten_value() {
        let mut model = Model::new(1, 1);
        let old = write(&mut model, false);
        write(&mut model, false);
        let read = model.start_read(0..1);
        model.check_read(read, &old);
    }

    #[test]
    #[should_panic(expected = "value 0 after the cut")]
    fn what_was_read_and_then_flushed_does_not_revert_though_never_acknowledged() {
        let mut model = Model::new(1, 1);
        let mut bytes = [0; SECTOR_SIZE];
        let _under_way = model.start_write(0..1, &mut bytes);
        let read = model.start_read(0..1);
        model.check_read(read, &bytes);
        flush(&mut model);
        model.check_after_cut(&[0; SECTOR_SIZE]);
    }

    #[test]
    #[should_panic(expected = "a read returned value 1")]
    fn of_two_overlapping_writes_the_one_that_was_read_last_stays() {
        let mut model = Model::new(1, 1);
        let (mut a, mut b) = ([0; SECTOR_SIZE], [0; SECTOR_SIZE]);
        let (first, second) = (model.start_write(0..1, &mut a), model.start_write(0..1, &mut b));
        model.acknowledge(first, false);
        model.acknowledge(second, false);
        let read = model.start_read(0..1);
        model.check_read(read, &b);
        let read = model.start_read(0..1);
        model.check_read(read, &a);
    }

    #[test]
    #[should_panic(expected = "bytes of volume 2, sector 0, value 1")]
    fn another_volumes_bytes_are_told_as_such() {
        let foreign = write(&mut Model::new(2, 1), false);
        Model::new(1, 1).check_after_cut(&foreign);
    }

    #[test]
    #[should_panic(expected = "bytes of volume 1, sector 0")]
    fn a_torn_sector_is_no_value() {
        let mut model = Model::new(1, 1);
        let mut bytes = write(&mut model, false);
        bytes[300..].fill(0);
        model.check_after_cut(&bytes);
    }
}
