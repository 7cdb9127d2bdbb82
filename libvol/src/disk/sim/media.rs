//! A simulated disk: what reads see, what is durable, and what lies between.
//!
//! A write counts from the moment it is submitted: until a sync that began after its completion succeeds, a power cut
//! may leave any of its 512-byte sectors old or new, independently, and in any order with other unsynced writes.

use std::collections::HashMap;

use super::rng::Rng;
use crate::limits::{BLOCK, BLOCK_SIZE, SECTOR_SIZE};

/// Sparse bytes; absent blocks are zero.
#[derive(Clone, Default)]
struct Bytes(HashMap<u64, Box<[u8; BLOCK_SIZE]>>);

impl Bytes {
    fn read(&self, at: u64, out: &mut [u8]) {
        each_piece(at, out.len(), |block, within, range| match self.0.get(&block) {
            Some(bytes) => out[range.clone()].copy_from_slice(&bytes[within..within + range.len()]),
            None => out[range].fill(0),
        });
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        each_piece(at, data.len(), |block, within, range| {
            let bytes = self.0.entry(block).or_insert_with(|| Box::new([0; BLOCK_SIZE]));
            bytes[within..within + range.len()].copy_from_slice(&data[range]);
        });
    }
}

fn each_piece(at: u64, len: usize, mut piece: impl FnMut(u64, usize, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let position = at + done as u64;
        let within = (position % BLOCK) as usize;
        let n = (BLOCK_SIZE - within).min(len - done);
        piece(position / BLOCK, within, done..done + n);
        done += n;
    }
}

/// A write that no sync has covered yet.
#[derive(Clone)]
struct Unsynced {
    id: u64,
    at: u64,
    data: Vec<u8>,
    completed: bool,
}

/// One disk.
#[derive(Clone)]
pub struct Media {
    size_bytes: u64,
    durable: Bytes,
    current: Bytes,
    unsynced: Vec<Unsynced>,
    next_id: u64,
}

/// How a power cut treats what is not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Everything submitted landed.
    KeepAll,
    /// Nothing unsynced landed.
    DropAll,
    /// Each write landed whole or not at all.
    WholeWrites,
    /// Each sector of each write landed or not.
    TornSectors,
}

impl Cut {
    /// Any of the four.
    pub fn random(rng: &mut Rng) -> Self {
        [Cut::KeepAll, Cut::DropAll, Cut::WholeWrites, Cut::TornSectors][rng.below(4) as usize]
    }
}

impl Media {
    /// A disk of zeros.
    pub fn zeroed(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            durable: Bytes::default(),
            current: Bytes::default(),
            unsynced: Vec::new(),
            next_id: 0,
        }
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Cuts the disk short, as a truncated file.
    pub fn truncate(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }

    /// What a read sees now.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        self.current.read(at, out);
    }

    /// Changes bytes behind everybody's back, durably: damage.
    pub fn overwrite(&mut self, at: u64, data: &[u8]) {
        self.current.write(at, data);
        self.durable.write(at, data);
    }

    /// A write is on its way to the disk; its id.
    pub(super) fn begin_write(&mut self, at: u64, data: &[u8]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.unsynced.push(Unsynced {
            id,
            at,
            data: data.to_vec(),
            completed: false,
        });
        id
    }

    /// The device says that the write is done: reads see it.
    pub(super) fn complete_write(&mut self, id: u64) {
        let Self {
            unsynced, current, ..
        } = self;
        if let Some(write) = unsynced.iter_mut().find(|w| w.id == id) {
            write.completed = true;
            current.write(write.at, &write.data);
        }
    }

    /// The write failed: nobody knows which of its sectors landed, so each may have.
    pub(super) fn fail_write(&mut self, id: u64, rng: &mut Rng) {
        if let Some(index) = self.unsynced.iter().position(|w| w.id == id) {
            let Unsynced { at, data, .. } = self.unsynced[index].clone();
            self.unsynced.remove(index);
            for (i, sector) in data.chunks(SECTOR_SIZE).enumerate() {
                if rng.one_in(2) {
                    let sector_at = at + (i * SECTOR_SIZE) as u64;
                    self.overwrite(sector_at, sector);
                }
            }
        }
    }

    /// A sync begins: it covers what has completed by now.
    pub(super) fn begin_sync(&self) -> Vec<u64> {
        self.unsynced
            .iter()
            .filter(|w| w.completed)
            .map(|w| w.id)
            .collect()
    }

    /// The sync has succeeded.
    pub(super) fn complete_sync(&mut self, covered: &[u64]) {
        let Self {
            unsynced, durable, ..
        } = self;
        unsynced.retain(|write| {
            let durable_now = covered.contains(&write.id);
            if durable_now {
                durable.write(write.at, &write.data);
            }
            !durable_now
        });
    }

    /// The power goes: what is left on the medium.
    #[must_use]
    pub fn after_cut(&self, cut: Cut, rng: &mut Rng) -> Self {
        let mut durable = self.durable.clone();
        let mut order: Vec<&Unsynced> = self.unsynced.iter().collect();
        if !matches!(cut, Cut::KeepAll) {
            for i in (1..order.len()).rev() {
                order.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        for write in order {
            match cut {
                Cut::DropAll => {}
                Cut::KeepAll => durable.write(write.at, &write.data),
                Cut::WholeWrites if rng.one_in(2) => durable.write(write.at, &write.data),
                Cut::WholeWrites => {}
                Cut::TornSectors => {
                    for (i, sector) in write.data.chunks(SECTOR_SIZE).enumerate() {
                        if rng.one_in(2) {
                            durable.write(write.at + (i * SECTOR_SIZE) as u64, sector);
                        }
                    }
                }
            }
        }
        Self {
            current: durable.clone(),
            durable,
            unsynced: Vec::new(),
            ..*self
        }
    }
}
