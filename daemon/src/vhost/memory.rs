//! The guest's memory: its regions as one space of guest addresses, and the log of the pages that are written.
//!
//! A [`GuestMemory`] never changes. When regions come or go there is another one, and requests go on with that which they
//! began with; a region is unmapped when nobody uses it any more, and until then it counts ([`Account`]). Guest addresses are numbers from an untrusted side: every
//! access looks them up.
//!
//! Sources: vhost-user, "Memory region description", "Memory access", "Migration".

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use libvol::limits::{VHOST_LOG_BYTES_MAX, VHOST_MEMORY_BYTES_MAX, VHOST_REGIONS_MAX};

use super::fault::{BadMemory, Fault};
use super::mapping::{Account, Mapping};

/// What GET_MAX_MEM_SLOTS says.
pub(super) const REGIONS_MAX: usize = VHOST_REGIONS_MAX;

/// Page of the dirty log, by definition of the protocol.
const LOG_PAGE: u64 = 4096;

/// A region as a message describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Its first guest address.
    pub(super) guest: u64,
    /// The same in the front-end's own addresses.
    pub(super) user: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Where it begins in its file.
    pub(super) offset: u64,
}

/// See the module's text.
pub(super) struct GuestMemory {
    /// By guest address; none overlaps another.
    regions: Vec<Mapped>,
}

#[derive(Clone)]
struct Mapped {
    region: Region,
    mapping: Rc<Mapping>,
}

impl GuestMemory {
    /// A guest without memory.
    pub(super) fn empty() -> Self {
        Self { regions: Vec::new() }
    }

    /// All regions anew (SET_MEM_TABLE).
    ///
    /// # Errors
    /// One that is empty, overlaps another, goes beyond addresses or its file, or cannot be mapped; too many, or too much.
    pub(super) fn set(account: &Arc<Account>, regions: Vec<(Region, OwnedFd)>) -> Result<Self, BadMemory> {
        let mut memory = Self::empty();
        for (region, fd) in regions {
            memory.add(account, region, &fd)?;
        }
        Ok(memory)
    }

    /// With one region more (ADD_MEM_REG).
    ///
    /// # Errors
    /// As [`GuestMemory::set`].
    pub(super) fn with(
        &self,
        account: &Arc<Account>,
        region: Region,
        fd: OwnedFd,
    ) -> Result<Self, BadMemory> {
        let mut memory = Self {
            regions: self.regions.clone(),
        };
        memory.add(account, region, &fd)?;
        Ok(memory)
    }

    /// Without a region (REM_MEM_REG), which its addresses and its length name.
    ///
    /// # Errors
    /// There is none such.
    pub(super) fn without(&self, region: &Region) -> Result<Self, BadMemory> {
        let key = |region: &Region| (region.guest, region.user, region.len);
        let mut regions = self.regions.clone();
        regions.retain(|mapped| key(&mapped.region) != key(region));
        if regions.len() == self.regions.len() {
            return Err(BadMemory::Refused("there is no such memory region"));
        }
        Ok(Self { regions })
    }

    fn add(&mut self, account: &Arc<Account>, region: Region, fd: &OwnedFd) -> Result<(), BadMemory> {
        let Region {
            guest,
            user,
            len,
            offset,
        } = region;
        if len == 0 {
            return Err(BadMemory::Refused("a memory region of no bytes"));
        }
        let Some(end) = guest.checked_add(len) else {
            return Err(BadMemory::Refused(
                "a memory region beyond the last guest address",
            ));
        };
        if user.checked_add(len).is_none() {
            return Err(BadMemory::Refused("a memory region beyond the last user address"));
        }
        if self.regions.len() >= REGIONS_MAX {
            return Err(BadMemory::Refused("too many memory regions"));
        }
        let others: u64 = self.regions.iter().map(|mapped| mapped.region.len).sum();
        let within = others
            .checked_add(len)
            .filter(|sum| *sum <= VHOST_MEMORY_BYTES_MAX);
        let (Some(_), Ok(map_len)) = (within, usize::try_from(len)) else {
            return Err(BadMemory::Refused("more guest memory than is supported"));
        };
        let index = self.regions.partition_point(|mapped| mapped.region.guest < guest);
        let touches_lower = index > 0 && self.regions[index - 1].end() > guest;
        let touches_upper = self
            .regions
            .get(index)
            .is_some_and(|mapped| mapped.region.guest < end);
        if touches_lower || touches_upper {
            return Err(BadMemory::Refused("memory regions overlap"));
        }
        let mapping = Rc::new(Mapping::new(account, fd, offset, map_len)?);
        self.regions.insert(index, Mapped { region, mapping });
        Ok(())
    }

    /// How many regions there are.
    #[cfg(test)]
    pub(super) fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The guest address of a user address, in which the messages about rings speak.
    pub(super) fn guest_of_user(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|Mapped { region, .. }| {
            let within = user.checked_sub(region.user)?;
            (within < region.len).then(|| region.guest + within)
        })
    }

    /// Whether a page of any region has gone.
    #[cfg(test)]
    pub(super) fn is_broken(&self) -> bool {
        self.regions.iter().any(|mapped| mapped.mapping.is_broken())
    }

    /// Whether all these addresses are the guest's memory.
    ///
    /// # Errors
    /// They are not.
    pub(super) fn check(&self, at: u64, len: u64) -> Result<(), Fault> {
        self.pieces(at, len, |_, _, _| Ok(()))
    }

    /// Copies bytes out. They may be in regions side by side.
    ///
    /// # Errors
    /// Outside the memory, or a page has gone: `out` then holds anything.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Fault> {
        let mut rest = out;
        self.pieces(at, rest.len() as u64, |mapping, offset, len| {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            mapping.read(offset, here)
        })
    }

    /// Copies bytes in, and logs them.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    pub(super) fn write(&self, at: u64, bytes: &[u8], log: Option<&DirtyLog>) -> Result<(), Fault> {
        let mut rest = bytes;
        self.pieces(at, rest.len() as u64, |mapping, offset, len| {
            let (here, after) = rest.split_at(len);
            rest = after;
            mapping.write(offset, here)
        })?;
        if let Some(log) = log {
            log.mark(at, bytes.len() as u64);
        }
        Ok(())
    }

    /// Reads a little-endian number that the guest may write at the same time, and all that it wrote before.
    ///
    /// # Errors
    /// Outside the memory, not aligned, or a page has gone.
    pub(super) fn load_u16(&self, at: u64) -> Result<u16, Fault> {
        let (mapping, offset) = self.number(at, 2)?;
        mapping.load_u16(offset).map(u16::from_le)
    }

    /// Writes a little-endian number, after all that was written before.
    ///
    /// # Errors
    /// Outside the memory, not aligned, or a page has gone.
    pub(super) fn store_u16(&self, at: u64, number: u16) -> Result<(), Fault> {
        let (mapping, offset) = self.number(at, 2)?;
        mapping.store_u16(offset, number.to_le())
    }

    /// As [`GuestMemory::store_u16`].
    ///
    /// # Errors
    /// Outside the memory, not aligned, or a page has gone.
    pub(super) fn store_u32(&self, at: u64, number: u32) -> Result<(), Fault> {
        let (mapping, offset) = self.number(at, 4)?;
        mapping.store_u32(offset, number.to_le())
    }

    /// Where a number of `width` bytes is, all of it in one region.
    fn number(&self, at: u64, width: u64) -> Result<(&Mapping, usize), Fault> {
        match self.find(at) {
            Some((index, offset)) if self.regions[index].region.len - offset >= width => {
                Ok((&self.regions[index].mapping, offset as usize))
            }
            _ => Err(Fault::Outside { at, len: width }),
        }
    }

    /// Calls `each` with mapping, offset and length of every piece of a range, in order.
    fn pieces(
        &self,
        at: u64,
        len: u64,
        mut each: impl FnMut(&Mapping, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let outside = Fault::Outside { at, len };
        if len == 0 {
            return Ok(());
        }
        let (mut index, mut offset) = self.find(at).ok_or(outside)?;
        let mut left = len;
        loop {
            let Mapped { region, mapping } = &self.regions[index];
            let here = left.min(region.len - offset);
            // Both are below the mapping's length, a `usize`.
            each(mapping, offset as usize, here as usize)?;
            left -= here;
            if left == 0 {
                return Ok(());
            }
            let end = region.guest + region.len;
            index += 1;
            offset = 0;
            match self.regions.get(index) {
                Some(next) if next.region.guest == end => {}
                _ => return Err(outside),
            }
        }
    }

    /// The region of an address, and where it is in it.
    fn find(&self, at: u64) -> Option<(usize, u64)> {
        let above = self.regions.partition_point(|mapped| mapped.region.guest <= at);
        let index = above.checked_sub(1)?;
        let region = &self.regions[index].region;
        let offset = at - region.guest;
        (offset < region.len).then_some((index, offset))
    }
}

impl Mapped {
    /// The first guest address after it; it was checked when it was added.
    fn end(&self) -> u64 {
        self.region.guest + self.region.len
    }
}

/// The log of written guest pages (SET_LOG_BASE): a bit each, the lowest of a byte first. Others clear bits meanwhile.
pub(super) struct DirtyLog {
    bits: Mapping,
    ignored: Cell<u64>,
}

impl DirtyLog {
    /// Maps the log.
    ///
    /// # Errors
    /// As [`Mapping::new`], or it is too long.
    pub(super) fn new(
        account: &Arc<Account>,
        fd: &OwnedFd,
        offset: u64,
        len: usize,
    ) -> Result<Self, BadMemory> {
        if len as u64 > VHOST_LOG_BYTES_MAX {
            return Err(BadMemory::Refused("a log of more guest memory than is supported"));
        }
        Ok(Self {
            bits: Mapping::new(account, fd, offset, len)?,
            ignored: Cell::new(0),
        })
    }

    /// Notes that these addresses have been written. Pages beyond the log are counted and otherwise ignored.
    pub(super) fn mark(&self, at: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else { return };
        let (first, last) = (at / LOG_PAGE, at.saturating_add(last) / LOG_PAGE);
        let pages = self.bits.len() as u64 * 8;
        let beyond = (last + 1).saturating_sub(first.max(pages));
        self.ignored.set(self.ignored.get().saturating_add(beyond));
        let mut page = first;
        while page <= last && page < pages {
            let end = (last + 1).min(page - page % 8 + 8);
            let bits = (0xff_u16 << (page % 8)) & (0xff >> (7 - (end - 1) % 8));
            // Inside the mapping; that it has gone, `is_broken` tells.
            let _ = self.bits.set_bits((page / 8) as usize, bits as u8);
            page = end;
        }
    }

    /// Pages that were written and have no place in the log.
    #[cfg(test)]
    pub(super) fn ignored(&self) -> u64 {
        self.ignored.get()
    }

    /// Whether a page of the log has gone.
    pub(super) fn is_broken(&self) -> bool {
        self.bits.is_broken()
    }
}

#[cfg(test)]
mod tests;
