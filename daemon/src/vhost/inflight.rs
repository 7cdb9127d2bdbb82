//! Which heads of a queue are in flight, in memory that the front-end keeps while this process crashes and comes back.
//!
//! The area is written in the order that the protocol prescribes, so that after a kill at any instruction a head is pending
//! unless its used entry is in the ring. A batch is always one head. What another process hands over is not believed: a
//! head, a link or a count that cannot be is [`BadMemory`].
//!
//! ```text
//! queue:  features 8 (0) | version 2 (1) | entries 2 | last_batch_head 2 | used_idx 2 | entry 16 each   (a multiple of 64)
//! entry:  inflight 1 | padding 5 | next 2 | counter 8
//! ```
//!
//! Source: vhost-user, "Inflight I/O tracking", split virtqueue. Numbers are in this machine's byte order, for the area
//! never leaves it.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use libvol::limits::{VHOST_QUEUE_SIZE_MAX, VHOST_QUEUES_MAX};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::fault::{BadMemory, Fault};
use super::mapping::{Account, Mapping};

const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
/// Queues begin at multiples of this, as they do for the protocol's other back-ends.
const QUEUE_ALIGN: usize = 64;
/// Behind the queues of an area that was made here: the cache's mode ([`super::cache_mode`]), and room.
const OWN_BYTES: u64 = 64;

// In a queue's header.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const ENTRIES: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
// In an entry.
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// One queue's part of the area.
pub(super) struct InflightArea {
    mapping: Rc<Mapping>,
    base: usize,
    size: u16,
    /// What the next head is marked with.
    counter: u64,
}

/// Bytes that so many queues of this size take.
///
/// # Errors
/// More or larger queues than there can be.
pub(super) fn area_bytes(queues: u16, size: u16) -> Result<u64, BadMemory> {
    if !(1..=VHOST_QUEUES_MAX).contains(&queues) {
        return Err(BadMemory::Refused("an inflight area of no queues, or too many"));
    }
    if !size.is_power_of_two() || size > VHOST_QUEUE_SIZE_MAX {
        return Err(BadMemory::Refused("an inflight area of queues of a wrong size"));
    }
    Ok(u64::from(queues) * queue_bytes(size) as u64)
}

fn queue_bytes(size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(size)).next_multiple_of(QUEUE_ALIGN)
}

/// A new area (GET_INFLIGHT_FD), and its length. It lies at the beginning of a file whose length nobody can change. No byte of
/// it is touched here: front-ends may ask for as many as they can keep, and memory is charged to who touches it first.
///
/// # Errors
/// As [`area_bytes`], or the system has none.
pub(super) fn create(queues: u16, size: u16) -> Result<(OwnedFd, u64), BadMemory> {
    let bytes = area_bytes(queues, size)? + OWN_BYTES;
    let make = || {
        let fd = memfd_create("vold-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, bytes)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    };
    let fd =
        make().map_err(|e: rustix::io::Errno| BadMemory::Os("no memory for an inflight area", e.into()))?;
    Ok((fd, bytes))
}

impl InflightArea {
    /// The area of every queue (SET_INFLIGHT_FD). What is all zeros is made ready.
    ///
    /// # Errors
    /// Its length or its content is not that of such queues.
    pub(super) fn adopt(
        account: &Arc<Account>,
        fd: &OwnedFd,
        offset: u64,
        len: u64,
        queues: u16,
        size: u16,
    ) -> Result<Vec<Self>, BadMemory> {
        let bytes = area_bytes(queues, size)?;
        if len < bytes {
            return Err(BadMemory::Refused("an inflight area shorter than its queues"));
        }
        // Less than 3 MiB.
        let mapping = Rc::new(Mapping::new(account, fd, offset, bytes as usize)?);
        let queues = 0..usize::from(queues);
        queues
            .map(|queue| {
                let area = Self {
                    mapping: mapping.clone(),
                    base: queue * queue_bytes(size),
                    size,
                    counter: 0,
                };
                area.make_ready()?;
                Ok(area)
            })
            .collect()
    }

    fn make_ready(&self) -> Result<(), BadMemory> {
        let version = self.mapping.load_u16(self.base + VERSION_AT)?;
        let entries = self.mapping.load_u16(self.base + ENTRIES)?;
        if self.mapping.load_u64(self.base + FEATURES)? != 0 {
            return Err(BadMemory::Refused("an inflight area with unknown features"));
        }
        match (version, entries) {
            (0, 0) => {
                self.mapping.store_u16(self.base + ENTRIES, self.size)?;
                Ok(self.mapping.store_u16(self.base + VERSION_AT, VERSION)?)
            }
            (VERSION, entries) if entries == self.size => Ok(()),
            // QEMU's own back-ends leave the count out of an area that nobody has used.
            (0, entries) if entries == self.size => {
                Ok(self.mapping.store_u16(self.base + VERSION_AT, VERSION)?)
            }
            _ => Err(BadMemory::Refused(
                "an inflight area of another version or queue size",
            )),
        }
    }

    /// The queue size that it is for.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Whether a page of it has gone.
    #[cfg(test)]
    pub(super) fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }

    /// When a queue starts whose ring says `used_idx`: settles what was under way when the last back-end ended, and gives
    /// the heads that are to be done again, in the order in which they were taken.
    ///
    /// # Errors
    /// The content makes no sense, or a page has gone.
    pub(super) fn recover(&mut self, used_idx: u16) -> Result<Vec<u16>, BadMemory> {
        let noted = self.mapping.load_u16(self.base + USED_IDX)?;
        let mut pending = self.marked()?;
        let batch = used_idx.wrapping_sub(noted);
        if batch != 0 && !pending.is_empty() {
            let given_back = self.last_batch(batch)?;
            for head in &given_back {
                self.mapping.store_u8(self.entry(*head)? + IN_FLIGHT, 0)?;
            }
            pending.retain(|(_, head)| !given_back.contains(head));
        }
        self.mapping.store_u16(self.base + USED_IDX, used_idx)?;
        pending.sort_unstable();
        self.counter = pending.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(pending.into_iter().map(|(_, head)| head).collect())
    }

    /// Nothing is in flight: the device was reset, and what was left is not done again.
    ///
    /// # Errors
    /// A page has gone.
    pub(super) fn forget(&self) -> Result<(), BadMemory> {
        for (_, head) in self.marked()? {
            self.mapping.store_u8(self.entry(head)? + IN_FLIGHT, 0)?;
        }
        Ok(())
    }

    /// Counter and head of all that are marked.
    fn marked(&self) -> Result<Vec<(u64, u16)>, BadMemory> {
        let mut marked = Vec::new();
        for head in 0..self.size {
            match self.mapping.load_u8(self.entry(head)? + IN_FLIGHT)? {
                0 => {}
                1 => marked.push((self.mapping.load_u64(self.entry(head)? + COUNTER)?, head)),
                _ => return Err(BadMemory::Refused("an inflight area with a mark that is none")),
            }
        }
        Ok(marked)
    }

    /// The heads of the last batch that was given back.
    fn last_batch(&self, batch: u16) -> Result<Vec<u16>, BadMemory> {
        if batch > self.size {
            return Err(BadMemory::Refused("an inflight area that is not of this ring"));
        }
        let mut heads = Vec::new();
        let mut head = self.mapping.load_u16(self.base + LAST_BATCH_HEAD)?;
        for _ in 0..batch {
            if head >= self.size || heads.contains(&head) {
                return Err(BadMemory::Refused(
                    "an inflight area whose last batch makes no sense",
                ));
            }
            heads.push(head);
            head = self.mapping.load_u16(self.entry(head)? + NEXT)?;
        }
        Ok(heads)
    }

    /// A head was taken: before anything is done for it.
    ///
    /// # Errors
    /// A page has gone, or the area has no such head.
    pub(super) fn started(&mut self, head: u16) -> Result<(), Fault> {
        let entry = self.entry(head)?;
        self.mapping.store_u64(entry + COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.mapping.store_u8(entry + IN_FLIGHT, 1)
    }

    /// A head is about to be given back: before its used entry is written.
    ///
    /// # Errors
    /// A page has gone, or the area has no such head.
    pub(super) fn about_to_use(&self, head: u16) -> Result<(), Fault> {
        let last = self.mapping.load_u16(self.base + LAST_BATCH_HEAD)?;
        self.mapping.store_u16(self.entry(head)? + NEXT, last)?;
        self.mapping.store_u16(self.base + LAST_BATCH_HEAD, head)
    }

    /// A head was given back, and `used_idx` is the ring's index now.
    ///
    /// # Errors
    /// A page has gone, or the area has no such head.
    pub(super) fn used(&self, head: u16, used_idx: u16) -> Result<(), Fault> {
        self.mapping.store_u8(self.entry(head)? + IN_FLIGHT, 0)?;
        self.mapping.store_u16(self.base + USED_IDX, used_idx)
    }

    /// Where a head's entry is. A queue may be larger than the area that it was given.
    fn entry(&self, head: u16) -> Result<usize, Fault> {
        match head < self.size {
            true => Ok(self.base + HEADER_BYTES + ENTRY_BYTES * usize::from(head)),
            false => Err(Fault::Ring("a head for which the inflight area has no place")),
        }
    }
}

#[cfg(test)]
mod tests;
