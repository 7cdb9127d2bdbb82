//! One shared mapping of a descriptor that a front-end passed.
//!
//! Invariants: only files in memory (tmpfs, memfd, hugetlbfs) are mapped, for a page of any other can take its time, or for
//! ever, to come; every access is inside the mapping; nothing is ever borrowed from it, because guest and front-end change
//! it at any time: bytes are copied in and out by accesses that the compiler neither doubles nor trusts.
//!
//! The front-end can make the file shorter, and an access then raises SIGBUS. [`sigbus`] puts empty memory in the place of
//! what is accessed, and the access goes on there; it is told as [`Fault::Gone`], and after it there are no more. How much is
//! mapped at a time is bounded ([`account`]), and unmapped elsewhere ([`unmap`]).
//!
//! What is mapped is not there before it is touched, and who touches it first is charged for it, which may be this process.
//! It is not locked either: what of a guest may be swapped is decided where the guest runs, and bringing it back takes as long
//! as the swap takes.

mod account;
mod sigbus;
mod unmap;

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

use rustix::fs::{FileType, fcntl_get_seals, fstat, fstatfs};

use super::fault::{BadMemory, Fault};
pub(super) use account::Account;
use account::Charge;
use sigbus::Slot;
use unmap::Mapped;

/// From this length on the processor's own copying is quicker than a loop.
#[cfg(target_arch = "x86_64")]
const STRING_COPY_FROM: usize = 128;

/// `statfs(2)`'s types of the file systems whose files are memory.
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;

/// See the module's text.
pub(super) struct Mapping {
    /// What was asked for, which need not begin with a page.
    base: NonNull<u8>,
    len: usize,
    slot: &'static Slot,
    /// What was mapped: whole pages. Present until drop.
    mapped: Option<Mapped>,
}

impl Mapping {
    /// Maps `len` bytes from `offset`, for reading and writing.
    ///
    /// # Errors
    /// When the file is of another kind or too short, too much is mapped already, or the system refuses.
    pub(super) fn new(
        account: &Arc<Account>,
        fd: &OwnedFd,
        offset: u64,
        len: usize,
    ) -> Result<Self, BadMemory> {
        let page = check_file(fd, offset, len)?;
        sigbus::catch()?;
        let thread = unmap::thread()?;
        // Whole pages of the file around it.
        let lead = (offset % page as u64) as usize;
        let mapped_len = len
            .checked_add(lead)
            .and_then(|sum| sum.checked_next_multiple_of(page))
            .ok_or(BadMemory::Refused("memory longer than addresses go"))?;
        let start = libc::off_t::try_from(offset - lead as u64)
            .map_err(|_| BadMemory::Refused("an offset in the memory that no file has"))?;
        let charge = Charge::new(account, mapped_len)?;
        // SAFETY: a new mapping, placed by the kernel, changes nothing that exists.
        let raw = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                start,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(BadMemory::Os(
                "the memory cannot be mapped",
                std::io::Error::last_os_error(),
            ));
        }
        let first = NonNull::new(raw.cast::<u8>()).expect("the kernel places nothing at zero");
        // SAFETY: the mapping is ours; advice and unlocking change no contents. When they fail, it is only dumped or locked
        // as the rest of the process is.
        unsafe {
            libc::munlock(raw, mapped_len);
            libc::madvise(raw, mapped_len, libc::MADV_DONTDUMP);
            libc::madvise(raw, mapped_len, libc::MADV_DONTFORK);
        }
        let Some(slot) = Slot::claim(raw as usize, mapped_len, page) else {
            // SAFETY: made above, and nobody has its address.
            unsafe { libc::munmap(raw, mapped_len) };
            return Err(BadMemory::Refused("too many memory regions are mapped already"));
        };
        Ok(Self {
            // SAFETY: `lead` is less than `mapped_len`.
            base: unsafe { first.add(lead) },
            len,
            slot,
            mapped: Some(Mapped::new(
                (raw as usize, mapped_len),
                page,
                slot,
                thread,
                charge,
            )),
        })
    }

    /// How many bytes there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether a page went away while it was used.
    pub(super) fn is_broken(&self) -> bool {
        self.slot.is_broken()
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// Outside the mapping, or it is broken: `out` then holds anything.
    pub(super) fn read(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        let from = self.place(at, out.len())?;
        // SAFETY: `place` has checked that the source is inside the mapping, which lives as long as `self`; the target is
        // borrowed exclusively and is not of the mapping.
        unsafe { copy_out(from, out) };
        self.intact()
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// Outside the mapping, or it is broken.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Fault> {
        let to = self.place(at, bytes.len())?;
        // SAFETY: as in `read`, the other way round.
        unsafe { copy_in(to, bytes) };
        self.intact()
    }

    /// Sets these bits of one byte.
    ///
    /// # Errors
    /// Outside the mapping, or it is broken.
    pub(super) fn set_bits(&self, at: usize, bits: u8) -> Result<(), Fault> {
        let place = self.place(at, 1)?;
        // SAFETY: inside the mapping, which lives as long as `self`; others change it by atomic accesses or are not of this
        // program.
        unsafe { AtomicU8::from_ptr(place) }.fetch_or(bits, Ordering::SeqCst);
        self.intact()
    }

    /// Where `len` bytes are, if all pages are there as far as is known.
    fn place(&self, at: usize, len: usize) -> Result<*mut u8, Fault> {
        // Each page that is gone costs a signal: one access of a mapping at most has that.
        if self.is_broken() {
            return Err(Fault::Gone);
        }
        let outside = Fault::Outside {
            at: at as u64,
            len: len as u64,
        };
        match at.checked_add(len) {
            // SAFETY: inside the mapping, or one past its end.
            Some(end) if end <= self.len => Ok(unsafe { self.base.add(at) }.as_ptr()),
            _ => Err(outside),
        }
    }

    /// Where a whole number of `width` bytes is that can be accessed as one.
    fn aligned(&self, at: usize, width: usize) -> Result<*mut u8, Fault> {
        let place = self.place(at, width)?;
        if (place as usize).is_multiple_of(width) {
            Ok(place)
        } else {
            Err(Fault::Outside {
                at: at as u64,
                len: width as u64,
            })
        }
    }

    /// After an access: whether it was of the mapping.
    fn intact(&self) -> Result<(), Fault> {
        // The handler runs on this thread, inside the access.
        compiler_fence(Ordering::SeqCst);
        if self.is_broken() {
            Err(Fault::Gone)
        } else {
            Ok(())
        }
    }
}

/// Numbers in memory that others change: one access each, acquire and release, in this machine's byte order.
macro_rules! numbers {
    ($($(#[$loading:meta])* $load:ident $store:ident $number:ty, $atomic:ty;)*) => {
        impl Mapping {
            $(
                /// Reads a number.
                ///
                /// # Errors
                /// Outside the mapping, not aligned, or it is broken.
                $(#[$loading])*
                pub(super) fn $load(&self, at: usize) -> Result<$number, Fault> {
                    let place = self.aligned(at, size_of::<$number>())?;
                    // SAFETY: aligned and inside the mapping, which lives as long as `self`; it is only accessed
                    // atomically or from outside this program.
                    let number = unsafe { <$atomic>::from_ptr(place.cast()) }.load(Ordering::Acquire);
                    self.intact()?;
                    Ok(number)
                }

                /// Writes a number.
                ///
                /// # Errors
                /// Outside the mapping, not aligned, or it is broken.
                pub(super) fn $store(&self, at: usize, number: $number) -> Result<(), Fault> {
                    let place = self.aligned(at, size_of::<$number>())?;
                    // SAFETY: as for loads.
                    unsafe { <$atomic>::from_ptr(place.cast()) }.store(number, Ordering::Release);
                    self.intact()
                }
            )*
        }
    };
}

numbers! {
    load_u8 store_u8 u8, AtomicU8;
    load_u16 store_u16 u16, AtomicU16;
    #[cfg(test)]
    load_u32 store_u32 u32, AtomicU32;
    load_u64 store_u64 u64, AtomicU64;
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.mapped.take().expect("present until drop").unmap();
    }
}

/// Whether this may be mapped, and the size of its pages.
fn check_file(fd: &OwnedFd, offset: u64, len: usize) -> Result<usize, BadMemory> {
    const OTHER: BadMemory = BadMemory::Refused(
        "memory that is no memfd and no file of tmpfs or hugetlbfs; use a memory backend with share=on",
    );
    // First of all, and of anything. A file of another kind asks its file system, which may be a front-end's own (FUSE) and
    // never answer. Only files in memory have seals, and what they are is known without asking anybody.
    fcntl_get_seals(fd).map_err(|_| OTHER)?;
    let stat = fstat(fd).map_err(|e| BadMemory::Os("the memory's file", e.into()))?;
    let system = fstatfs(fd).map_err(|e| BadMemory::Os("the memory's file system", e.into()))?;
    // A device or a socket can lie on a tmpfs too.
    let page = match system.f_type as i64 {
        _ if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => None,
        TMPFS => Some(page_bytes()),
        HUGETLBFS => usize::try_from(system.f_bsize).ok(),
        _ => None,
    };
    let page = page.filter(|page| page.is_power_of_two()).ok_or(OTHER)?;
    if len == 0 {
        return Err(BadMemory::Refused("memory of no bytes"));
    }
    match offset.checked_add(len as u64) {
        Some(end) if end <= stat.st_size as u64 => Ok(page),
        _ => Err(BadMemory::Refused("memory that goes beyond the end of its file")),
    }
}

fn page_bytes() -> usize {
    // SAFETY: asks for a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// # Safety
/// `from` is valid for as many bytes as `out` has, and no part of it is `out`.
unsafe fn copy_out(from: *const u8, out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if out.len() >= STRING_COPY_FROM {
        // SAFETY: both are valid for as many bytes, as the caller and the borrow say.
        return unsafe { string_copy(from, out.as_mut_ptr(), out.len()) };
    }
    let lead = from.align_offset(8).min(out.len());
    let (head, rest) = out.split_at_mut(lead);
    let (words, tail) = rest.as_chunks_mut::<8>();
    // SAFETY (all three): inside what the caller says is valid; words are aligned after the lead.
    for (i, byte) in head.iter_mut().enumerate() {
        // SAFETY: see above.
        *byte = unsafe { AtomicU8::from_ptr(from.add(i).cast_mut()) }.load(Ordering::Relaxed);
    }
    for (i, word) in words.iter_mut().enumerate() {
        // SAFETY: see above.
        let source = unsafe { AtomicU64::from_ptr(from.add(lead + 8 * i).cast_mut().cast()) };
        *word = source.load(Ordering::Relaxed).to_ne_bytes();
    }
    let done = lead + 8 * words.len();
    for (i, byte) in tail.iter_mut().enumerate() {
        // SAFETY: see above.
        *byte = unsafe { AtomicU8::from_ptr(from.add(done + i).cast_mut()) }.load(Ordering::Relaxed);
    }
}

/// # Safety
/// `to` is valid for as many bytes as there are, and no part of it is of them.
unsafe fn copy_in(to: *mut u8, bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= STRING_COPY_FROM {
        // SAFETY: both are valid for as many bytes, as the caller and the borrow say.
        return unsafe { string_copy(bytes.as_ptr(), to, bytes.len()) };
    }
    let lead = to.align_offset(8).min(bytes.len());
    let (head, rest) = bytes.split_at(lead);
    let (words, tail) = rest.as_chunks::<8>();
    for (i, byte) in head.iter().enumerate() {
        // SAFETY: inside what the caller says is valid.
        unsafe { AtomicU8::from_ptr(to.add(i)) }.store(*byte, Ordering::Relaxed);
    }
    for (i, word) in words.iter().enumerate() {
        // SAFETY: as above, and aligned after the lead.
        let target = unsafe { AtomicU64::from_ptr(to.add(lead + 8 * i).cast()) };
        target.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
    }
    let done = lead + 8 * words.len();
    for (i, byte) in tail.iter().enumerate() {
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(to.add(done + i)) }.store(*byte, Ordering::Relaxed);
    }
}

/// Copying by the processor, of which the compiler knows nothing, so that it assumes nothing of memory that others change.
///
/// # Safety
/// Both are valid for `len` bytes and do not overlap.
#[cfg(target_arch = "x86_64")]
unsafe fn string_copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as the caller says; the direction flag is clear in Rust code, and the instruction goes on where a fault
    // interrupted it.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests;
