//! A guest for tests and fuzz targets: memory of a memfd, in which it lays out queues, chains and requests.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::mapping::Account;
use super::memory::{GuestMemory, Region};
use super::ring::RingAddresses;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// What a user address has more than its guest address.
pub(super) const USER: u64 = 0x7f00_0000_0000;

/// Where a guest of [`Guest::simple`] has its queue; its memory goes from 0 to [`END`].
pub(super) const QUEUE: RingAddresses = RingAddresses {
    desc: 0x1000,
    avail: 0x6000,
    used: 0x8000,
    log_used: None,
};
pub(super) const DATA: u64 = 0x1_0000;
pub(super) const END: u64 = 0x10_0000;

/// Of an attachment that has mapped nothing.
pub(super) fn account() -> Arc<Account> {
    Account::new()
}

/// Memory that can be passed.
pub(super) fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

/// See the module's text.
pub(super) struct Guest {
    pub(super) fd: OwnedFd,
    pub(super) memory: GuestMemory,
    offered: u16,
}

impl Guest {
    /// Regions of (guest address, length), one after the other in the file.
    pub(super) fn new(regions: &[(u64, u64)]) -> Self {
        let fd = memfd(regions.iter().map(|(_, len)| len).sum());
        let mut offset = 0;
        let mut described = Vec::new();
        for (guest, len) in regions {
            let region = Region {
                guest: *guest,
                user: guest + USER,
                len: *len,
                offset,
            };
            described.push((region, fd.try_clone().unwrap()));
            offset += len;
        }
        let memory = GuestMemory::set(&account(), described).unwrap();
        Self {
            fd,
            memory,
            offered: 0,
        }
    }

    /// One region with everything.
    pub(super) fn simple() -> Self {
        Self::new(&[(0, END)])
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(at, bytes, None).unwrap();
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    pub(super) fn get_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    pub(super) fn put_u16(&self, at: u64, number: u16) {
        self.put(at, &number.to_le_bytes());
    }

    /// One descriptor of a table.
    pub(super) fn descriptor(&self, table: u64, index: u16, (at, len): (u64, u32), flags: u16, next: u16) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// A chain in consecutive descriptors from `head` on: (address, length, whether it is to be written).
    pub(super) fn chain(&self, table: u64, head: u16, parts: &[(u64, u32, bool)]) {
        for (i, (at, len, writable)) in (head..).zip(parts) {
            let last = i + 1 == head + parts.len() as u16;
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, i, (*at, *len), flags, i + 1);
        }
    }

    /// Makes a head of [`QUEUE`] available.
    pub(super) fn offer(&mut self, size: u16, head: u16) {
        self.put_u16(QUEUE.avail + 4 + 2 * u64::from(self.offered % size), head);
        self.offered = self.offered.wrapping_add(1);
        self.put_u16(QUEUE.avail + 2, self.offered);
    }

    /// Begins with these indices, as a queue that has been used.
    pub(super) fn begin_at(&mut self, index: u16) {
        self.offered = index;
        self.put_u16(QUEUE.avail + 2, index);
        self.put_u16(QUEUE.used + 2, index);
    }
}
