//! The memory that a front-end shares: a memfd, read and written with system calls. So nothing here is unsafe, and a test
//! may take pages away and go on living.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use super::wire::Region;

/// Where the guest has it. Neither this nor [`USER`] is the offset in the file, so that none passes for another.
pub const GUEST: u64 = 0x4000_0000;
/// Where the front-end says that it has it.
pub const USER: u64 = 0x7e00_0000_0000;

/// Guest memory; addresses are the guest's.
pub struct Memory {
    file: File,
    region: Region,
    taken: u64,
}

impl Memory {
    /// So many bytes of zeros.
    ///
    /// # Panics
    /// When the kernel has no memory.
    pub fn new(len: u64) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory"));
        file.set_len(len).expect("memory");
        let region = Region {
            guest: GUEST,
            len,
            user: USER,
            offset: 0,
        };
        Self {
            file,
            region,
            taken: 0,
        }
    }

    /// As it is told to the back-end.
    pub fn region(&self) -> Region {
        self.region
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The guest's address of the end.
    pub fn end(&self) -> u64 {
        self.region.guest + self.region.len
    }

    /// The front-end's address of a guest's.
    pub fn user(&self, at: u64) -> u64 {
        at - self.region.guest + self.region.user
    }

    /// Room that nobody else takes.
    ///
    /// # Panics
    /// When there is no more.
    pub fn room(&mut self, len: u64, align: u64) -> u64 {
        let start = self.taken.next_multiple_of(align);
        self.taken = start + len;
        assert!(self.taken <= self.region.len, "the test's memory is too small");
        self.region.guest + start
    }

    /// Writes.
    ///
    /// # Panics
    /// When the address is outside.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.file
            .write_all_at(bytes, at - self.region.guest)
            .expect("guest memory");
    }

    /// Reads. What was truncated away is zeros.
    ///
    /// # Panics
    /// When the address is outside.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            let offset = at - self.region.guest + filled as u64;
            match self
                .file
                .read_at(&mut bytes[filled..], offset)
                .expect("guest memory")
            {
                0 => break,
                read => filled += read,
            }
        }
        bytes
    }

    /// A little-endian number of 16 bits.
    pub fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().expect("2 bytes"))
    }

    /// A little-endian number of 32 bits.
    pub fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at, 4).try_into().expect("4 bytes"))
    }

    /// Takes all pages from `len` on away; [`Self::restore`] gives new ones.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn truncate(&self, len: u64) {
        self.file.set_len(len).expect("own memory");
    }

    /// As long as before, with zeros where pages were taken away.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn restore(&self) {
        self.file.set_len(self.region.len).expect("own memory");
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
