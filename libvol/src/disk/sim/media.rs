//! A simulated disk: what reads see, what is durable, and what lies between.
//!
//! A write counts from the moment it is submitted: until a sync that began after its completion succeeds, a power cut
//! may leave any of its 512-byte sectors old or new, independently, and in any order with other unsynced writes.

use std::sync::Arc;

use super::rng::Rng;
use crate::limits::{BLOCK, BLOCK_SIZE, SECTOR_SIZE};

/// Sparse bytes, a block a place; absent blocks are zero. Blocks are shared between copies until one of them changes, so
/// that a snapshot, or what a power cut leaves, costs a pointer a block.
#[derive(Clone, Default)]
pub(super) struct Bytes(Vec<Option<Arc<[u8; BLOCK_SIZE]>>>);

impl Bytes {
    fn block(&self, block: u64) -> Option<&Arc<[u8; BLOCK_SIZE]>> {
        self.0.get(block as usize)?.as_ref()
    }

    pub(super) fn read(&self, at: u64, out: &mut [u8]) {
        each_piece(at, out.len(), |block, within, range| match self.block(block) {
            Some(bytes) => out[range.clone()].copy_from_slice(&bytes[within..within + range.len()]),
            None => out[range].fill(0),
        });
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        each_piece(at, data.len(), |block, within, range| {
            let data = &data[range];
            let block = block as usize;
            if block >= self.0.len() {
                self.0.resize(block + 1, None);
            }
            match (&mut self.0[block], <&[u8; BLOCK_SIZE]>::try_from(data)) {
                (place @ None, _) if data.iter().all(|byte| *byte == 0) => *place = None,
                (place, Ok(whole)) => match place.as_mut().and_then(Arc::get_mut) {
                    Some(bytes) => *bytes = *whole,
                    None => *place = Some(Arc::new(*whole)),
                },
                (place, Err(_)) => {
                    let bytes = place.get_or_insert_with(|| Arc::new([0; BLOCK_SIZE]));
                    Arc::make_mut(bytes)[within..within + data.len()].copy_from_slice(data);
                }
            }
        });
    }
}

impl Bytes {
    /// Puts a whole block in its place.
    pub(super) fn put(&mut self, block: u64, bytes: &Arc<[u8; BLOCK_SIZE]>) {
        let block = block as usize;
        if block >= self.0.len() {
            self.0.resize(block + 1, None);
        }
        self.0[block] = Some(bytes.clone());
    }

    /// Everything from `len` on is zero from now on.
    pub(super) fn clip(&mut self, len: u64) {
        let blocks = len.div_ceil(BLOCK) as usize;
        self.0.truncate(blocks);
        let tail = (blocks as u64 * BLOCK - len) as usize;
        if blocks == self.0.len() && tail > 0 {
            self.write(len, &[0; BLOCK_SIZE][..tail]);
        }
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

/// A write that no sync has covered yet. Completed ones are kept in the order in which they completed.
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

    /// What is left if the power goes and nothing unsynced has landed.
    pub fn read_durable(&self, at: u64, out: &mut [u8]) {
        self.durable.read(at, out);
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

    /// The device says that the write is done, and it never gets anywhere.
    pub(super) fn lose_write(&mut self, id: u64) {
        self.unsynced.retain(|write| write.id != id);
    }

    /// The write goes to another place than it was meant for.
    pub(super) fn misdirect_write(&mut self, id: u64, to: u64) {
        if let Some(write) = self.unsynced.iter_mut().find(|write| write.id == id) {
            write.at = to;
        }
    }

    /// A sync failed: of what it should have covered each write is durable or gone for good, and reads see which.
    pub(super) fn fail_sync(&mut self, covered: &[u64], rng: &mut Rng) {
        let Self {
            unsynced,
            durable,
            current,
            ..
        } = self;
        let (settled, left): (Vec<Unsynced>, Vec<Unsynced>) = unsynced
            .drain(..)
            .partition(|write| covered.binary_search(&write.id).is_ok());
        *unsynced = left;
        for write in settled.iter().filter(|_| rng.one_in(2)) {
            durable.write(write.at, &write.data);
        }
        for write in &settled {
            let mut now = vec![0; write.data.len()];
            durable.read(write.at, &mut now);
            current.write(write.at, &now);
        }
        for write in unsynced.iter().filter(|write| write.completed) {
            current.write(write.at, &write.data);
        }
    }

    /// Byte offset of any block that is not zero; `None` when all are.
    pub(super) fn any_block(&self, rng: &mut Rng) -> Option<u64> {
        let blocks = &self.current.0;
        let start = rng.below(blocks.len().max(1) as u64) as usize;
        let places = (start..blocks.len()).chain(0..start);
        let mut places = places.filter(|block| blocks[*block].is_some());
        places.next().map(|block| block as u64 * BLOCK)
    }

    /// A bit changes by itself.
    pub fn flip_bit(&mut self, at: u64, bit: u8) {
        let mut byte = [0];
        self.current.read(at, &mut byte);
        self.overwrite(at, &[byte[0] ^ 1 << bit]);
    }

    /// The device says that the write is done: reads see it, over what completed before.
    pub(super) fn complete_write(&mut self, id: u64) {
        if let Some(index) = self.unsynced.iter().position(|write| write.id == id) {
            let mut write = self.unsynced.remove(index);
            write.completed = true;
            self.current.write(write.at, &write.data);
            self.unsynced.push(write);
        }
    }

    /// The write failed: nobody knows which of its sectors landed, so each may have, and is as unsynced as any.
    pub(super) fn fail_write(&mut self, id: u64, rng: &mut Rng) {
        let Some(index) = self.unsynced.iter().position(|write| write.id == id) else {
            return;
        };
        let Unsynced { at, data, .. } = self.unsynced.remove(index);
        for (i, sector) in data.chunks(SECTOR_SIZE).enumerate() {
            if rng.one_in(2) {
                let id = self.begin_write(at + (i * SECTOR_SIZE) as u64, sector);
                self.complete_write(id);
            }
        }
    }

    /// Whoever had writes under way is gone: each ends like one that failed.
    pub(super) fn end_writes(&mut self, rng: &mut Rng) {
        let under_way = self.unsynced.iter().filter(|write| !write.completed);
        let ids: Vec<u64> = under_way.map(|write| write.id).collect();
        ids.into_iter().for_each(|id| self.fail_write(id, rng));
    }

    /// A sync begins: it covers what has completed by now. Ascending.
    pub(super) fn begin_sync(&self) -> Vec<u64> {
        let completed = self.unsynced.iter().filter(|write| write.completed);
        let mut ids: Vec<u64> = completed.map(|write| write.id).collect();
        ids.sort_unstable();
        ids
    }

    /// The sync has succeeded.
    pub(super) fn complete_sync(&mut self, covered: &[u64]) {
        let Self {
            unsynced, durable, ..
        } = self;
        unsynced.retain(|write| {
            let durable_now = covered.binary_search(&write.id).is_ok();
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
