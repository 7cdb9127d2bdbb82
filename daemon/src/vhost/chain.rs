//! A chain of descriptors: from its head to the parts of guest memory that it names.
//!
//! Every descriptor is read once and what was read is kept, so that whatever the guest writes afterwards changes nothing.
//! What is here is checked: every part is guest memory and has bytes, all that are read come before all that are written,
//! and the walk has ended after a bounded number of descriptors. How the guest has cut its bytes into parts means nothing:
//! who uses a chain counts bytes.
//!
//! Source: VIRTIO 1.2, 2.7.5 "The Virtqueue Descriptor Table" and 2.7.5.3 "Indirect Descriptors". The guest may use
//! indirect tables whether or not it has said that it does.

use libvol::limits::VHOST_QUEUE_SIZE_MAX;

use super::fault::Fault;
use super::memory::{DirtyLog, GuestMemory};

/// Bytes of a descriptor: address 8, length 4, flags 2, next 2.
pub(super) const DESCRIPTOR_BYTES: u64 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Some guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Its first address.
    pub(super) at: u64,
    /// Bytes; not zero.
    pub(super) len: u32,
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// Those to read, then those to write.
    parts: Vec<Part>,
    /// How many are to read.
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
}

struct Descriptor {
    at: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Chain {
    /// Follows the chain that begins with descriptor `head` of a table of `size`.
    ///
    /// # Errors
    /// It cannot be followed, or names what is no memory.
    pub(super) fn walk(memory: &GuestMemory, table: u64, size: u16, head: u16) -> Result<Self, Fault> {
        let mut chain = Self::default();
        if let Some(indirect) = chain.follow(memory, table, size, head, Level::Ring)? {
            let bytes = u64::from(indirect.len);
            let entries = bytes / DESCRIPTOR_BYTES;
            if bytes % DESCRIPTOR_BYTES != 0 || entries == 0 || entries > u64::from(VHOST_QUEUE_SIZE_MAX) {
                return Err(Fault::Chain("an indirect table of a wrong length"));
            }
            memory.check(indirect.at, bytes)?;
            chain.follow(memory, indirect.at, entries as u16, 0, Level::Indirect)?;
        }
        Ok(chain)
    }

    /// Takes all of one table's descriptors; gives the indirect one that it ends with.
    fn follow(
        &mut self,
        memory: &GuestMemory,
        table: u64,
        size: u16,
        head: u16,
        level: Level,
    ) -> Result<Option<Descriptor>, Fault> {
        let mut index = head;
        for _ in 0..size {
            if index >= size {
                return Err(Fault::Chain("a descriptor outside its table"));
            }
            let descriptor = Descriptor::read(memory, table, index)?;
            if descriptor.flags & INDIRECT != 0 {
                return match level {
                    Level::Indirect => Err(Fault::Chain("an indirect table inside another")),
                    Level::Ring if descriptor.flags & NEXT != 0 => Err(Fault::Chain(
                        "an indirect table that is not the last of its chain",
                    )),
                    Level::Ring => Ok(Some(descriptor)),
                };
            }
            self.push(memory, &descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(None);
            }
            index = descriptor.next;
        }
        Err(Fault::Chain("a chain longer than its table: it loops"))
    }

    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), Fault> {
        let Descriptor { at, len, flags, .. } = *descriptor;
        let writable = flags & WRITE != 0;
        if !writable && self.parts.len() > self.readable {
            return Err(Fault::Chain("something to read after something to write"));
        }
        memory.check(at, u64::from(len))?;
        if len == 0 {
            return Ok(());
        }
        self.parts.push(Part { at, len });
        // At most two tables of 1024 parts of 4 GiB: no sum can wrap.
        if writable {
            self.writable_bytes += u64::from(len);
        } else {
            self.readable += 1;
            self.readable_bytes += u64::from(len);
        }
        Ok(())
    }

    /// Bytes that the guest has for us.
    pub(super) fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes that the guest wants from us.
    pub(super) fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// How many parts it has.
    pub(super) fn parts(&self) -> usize {
        self.parts.len()
    }

    /// The address of the last byte to write.
    pub(super) fn last_writable(&self) -> Option<u64> {
        let last = self.parts[self.readable..].last()?;
        Some(last.at + u64::from(last.len) - 1)
    }

    /// Copies bytes out of those to read, from the `skip`th on.
    ///
    /// # Errors
    /// There are not as many, or the memory has gone.
    pub(super) fn read(&self, memory: &GuestMemory, skip: u64, out: &mut [u8]) -> Result<(), Fault> {
        let mut rest = out;
        each(&self.parts[..self.readable], skip, rest.len(), |at, len| {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            memory.read(at, here)
        })
    }

    /// Copies bytes into those to write, from the `skip`th on.
    ///
    /// # Errors
    /// There are not as many, or the memory has gone.
    pub(super) fn write(
        &self,
        memory: &GuestMemory,
        log: Option<&DirtyLog>,
        skip: u64,
        bytes: &[u8],
    ) -> Result<(), Fault> {
        let mut rest = bytes;
        each(&self.parts[self.readable..], skip, rest.len(), |at, len| {
            let (here, after) = rest.split_at(len);
            rest = after;
            memory.write(at, here, log)
        })
    }
}

/// Where the descriptors are that are followed.
#[derive(Clone, Copy)]
enum Level {
    Ring,
    Indirect,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: u64, index: u16) -> Result<Self, Fault> {
        let place = table.checked_add(DESCRIPTOR_BYTES * u64::from(index));
        let place = place.ok_or(Fault::Outside {
            at: table,
            len: DESCRIPTOR_BYTES,
        })?;
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        memory.read(place, &mut bytes)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Self {
            at: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// Calls `with` for the pieces of `len` bytes of these parts after the first `skip`.
fn each(
    parts: &[Part],
    mut skip: u64,
    mut len: usize,
    mut with: impl FnMut(u64, usize) -> Result<(), Fault>,
) -> Result<(), Fault> {
    for part in parts {
        if len == 0 {
            return Ok(());
        }
        let part_len = u64::from(part.len);
        if skip >= part_len {
            skip -= part_len;
            continue;
        }
        let here = (part_len - skip).min(len as u64) as usize;
        with(part.at + skip, here)?;
        skip = 0;
        len -= here;
    }
    match len {
        0 => Ok(()),
        _ => Err(Fault::Chain("a chain shorter than what belongs into it")),
    }
}

#[cfg(test)]
mod tests;
