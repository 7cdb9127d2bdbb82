//! Memory for keys: locked (never swapped), left out of core dumps, wiped in forked children, zeroed when freed,
//! invisible to `Debug`.
//!
//! Locked memory is scarce (RLIMIT_MEMLOCK, often 8 MiB a user) and comes by the page, so secrets share pages: an
//! *arena* of locked pages hands out runs of 64-byte slots. One page holds 64 CMKs or data keys, or the key schedules
//! of two open volumes.
//!
//! Invariants:
//! - every slot is zero whenever it is free: who frees it zeroes it first, under no assumption about its contents;
//! - a page without secrets is unmapped, and with it the lock on it.
//!
//! Deliberately not here: guard pages (the slots are reached only through checked references), and any way to copy a
//! secret without writing it out. Registers and the stack hold key bytes for moments; [`lock_all_memory`] is there for
//! hosts that must keep even those from swap.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use rustix::mm::{Advice, MapFlags, MlockAllFlags, ProtFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use zeroize::Zeroize;

use crate::error::{Error, Kind, Result};

/// `N` secret bytes in locked memory.
pub struct Secret<const N: usize> {
    memory: LockedBytes,
}

impl<const N: usize> Secret<N> {
    /// All zero.
    ///
    /// # Errors
    /// `NoSpace` when memory cannot be locked (RLIMIT_MEMLOCK); the message says how to raise it.
    pub fn zeroed() -> Result<Self> {
        Ok(Self {
            memory: LockedBytes::zeroed(N)?,
        })
    }

    /// From the operating system's random source.
    ///
    /// # Errors
    /// As [`Secret::zeroed`]; `Internal` when the random source fails.
    pub fn random() -> Result<Self> {
        let mut secret = Self::zeroed()?;
        fill_random(secret.expose_mut())?;
        Ok(secret)
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8; N] {
        self.memory.bytes().try_into().expect("made with length N")
    }

    /// The bytes, to fill in.
    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        self.memory.bytes_mut().try_into().expect("made with length N")
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Fills `bytes` from the operating system's random source.
///
/// # Errors
/// `Internal` when it fails, which a running Linux never shows.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes)
        .map_err(|e| Error::new(Kind::Internal, format!("the system's random source failed: {e}")))
}

/// A run of locked bytes whose length is known at run time only; [`Secret`] is its face for keys.
pub(crate) struct LockedBytes {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the run belongs to this value alone (the arena hands out each slot once), so it may move to, and be read
// from, any thread under the ordinary borrow rules.
unsafe impl Send for LockedBytes {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for LockedBytes {}

impl LockedBytes {
    /// `len` zero bytes, aligned to 64.
    pub(crate) fn zeroed(len: usize) -> Result<Self> {
        let slots = slots_for(len);
        let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
        let ptr = arena.take(slots)?;
        Ok(Self { ptr, len })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the run is mapped, initialised (zeroed at first) and ours until drop; self is borrowed.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// For foreign code that keeps a pointer to the run; valid as long as `self` lives, wherever it moves.
    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }
}

impl Drop for LockedBytes {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
        arena.give_back(self.ptr, slots_for(self.len));
    }
}

/// A cache line: no two secrets share one.
const SLOT_BYTES: usize = 64;

fn slots_for(len: usize) -> usize {
    len.div_ceil(SLOT_BYTES).max(1)
}

/// Locked pages by their address. A lock held for a short search; never on the data path.
static ARENA: Mutex<Arena> = Mutex::new(Arena {
    pages: BTreeMap::new(),
});

struct Arena {
    pages: BTreeMap<usize, Page>,
}

impl Arena {
    fn take(&mut self, slots: usize) -> Result<NonNull<u8>> {
        for page in self.pages.values_mut() {
            if let Some(ptr) = page.take(slots) {
                return Ok(ptr);
            }
        }
        let mut page = Page::map(slots * SLOT_BYTES)?;
        let ptr = page.take(slots).expect("mapped large enough");
        self.pages.insert(page.base.addr().get(), page);
        Ok(ptr)
    }

    fn give_back(&mut self, ptr: NonNull<u8>, slots: usize) {
        let addr = ptr.addr().get();
        let (&base, page) = self
            .pages
            .range_mut(..=addr)
            .next_back()
            .expect("handed out from a page here");
        page.give_back(addr, slots);
        if page.free == page.used.len() {
            self.pages.remove(&base);
        }
    }
}

/// One or more whole pages of memory, locked.
struct Page {
    base: NonNull<u8>,
    bytes: usize,
    used: Vec<bool>,
    free: usize,
}

// SAFETY: a Page is bookkeeping plus the sole ownership of its mapping; nothing in it is tied to a thread.
unsafe impl Send for Page {}

impl Page {
    fn map(least: usize) -> Result<Self> {
        let bytes = least.next_multiple_of(rustix::param::page_size());
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches no other memory.
        let raw = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|e| no_memory(bytes, e.into()))?;
        // From here on the mapping is unmapped by drop, also when a step below fails.
        let page = Self {
            base: NonNull::new(raw.cast()).expect("mmap never returns null"),
            bytes,
            used: vec![false; bytes / SLOT_BYTES],
            free: bytes / SLOT_BYTES,
        };
        // SAFETY: the range is the mapping just made; locking and advising change no contents (it is all zero, and
        // WIPEONFORK acts on a child's copy only).
        unsafe {
            rustix::mm::mlock(raw, bytes).map_err(|e| no_memory(bytes, e.into()))?;
            rustix::mm::madvise(raw, bytes, Advice::LinuxDontDump)
                .map_err(|e| not_advised("DONTDUMP", e.into()))?;
            rustix::mm::madvise(raw, bytes, Advice::LinuxWipeOnFork)
                .map_err(|e| not_advised("WIPEONFORK", e.into()))?;
        }
        Ok(page)
    }

    fn take(&mut self, slots: usize) -> Option<NonNull<u8>> {
        if self.free < slots {
            return None;
        }
        let first = self.used.windows(slots).position(|run| !run.contains(&true))?;
        self.used[first..first + slots].fill(true);
        self.free -= slots;
        // SAFETY: first + slots is within the page's slots, so the offset stays inside the mapping.
        Some(unsafe { self.base.add(first * SLOT_BYTES) })
    }

    fn give_back(&mut self, addr: usize, slots: usize) {
        let first = (addr - self.base.addr().get()) / SLOT_BYTES;
        let run = &mut self.used[first..first + slots];
        assert!(run.iter().all(|used| *used), "a secret's slots are freed once");
        run.fill(false);
        self.free += slots;
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let base: *mut c_void = self.base.as_ptr().cast();
        // SAFETY: the mapping is ours, no slot of it is handed out any more, and it is unmapped once.
        let unmapped = unsafe { rustix::mm::munmap(base, self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

fn no_memory(bytes: usize, source: io::Error) -> Error {
    let limit = match rustix::process::getrlimit(Resource::Memlock).current {
        Some(limit) => format!("{limit} bytes"),
        None => "unlimited".into(),
    };
    Error::with_source(
        Kind::NoSpace,
        format!(
            "cannot lock {bytes} more bytes of memory for keys (RLIMIT_MEMLOCK is {limit}); \
             raise it: LimitMEMLOCK= in the systemd unit, or `ulimit -l`"
        ),
        source,
    )
}

fn not_advised(advice: &str, source: io::Error) -> Error {
    Error::with_source(
        Kind::Unsupported,
        format!("the kernel refuses MADV_{advice} for key memory; vold needs Linux 4.14 or later"),
        source,
    )
}

/// Makes the process undumpable (PR_SET_DUMPABLE 0, RLIMIT_CORE 0): no core dump, no ptrace or `/proc/PID/mem` by
/// others of the same uid.
///
/// # Errors
/// `Internal` when the kernel refuses.
pub fn harden_process() -> Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| {
        Error::with_source(
            Kind::Internal,
            "cannot make the process undumpable (PR_SET_DUMPABLE)",
            io::Error::from(e),
        )
    })?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none).map_err(|e| {
        Error::with_source(
            Kind::Internal,
            "cannot forbid core dumps (RLIMIT_CORE)",
            io::Error::from(e),
        )
    })
}

/// Keeps the whole process out of swap, plaintext buffers and the stack included: every page is locked when it is
/// first touched. Optional; without it, only key memory is kept from swap.
///
/// # Errors
/// `Refused` when RLIMIT_MEMLOCK is not unlimited and cannot be made so: with a limit, locking everything would make
/// later allocations fail at any time.
pub fn lock_all_memory() -> Result<()> {
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    if rustix::process::getrlimit(Resource::Memlock).current.is_some() {
        rustix::process::setrlimit(Resource::Memlock, unlimited).map_err(|e| {
            Error::with_source(
                Kind::Refused,
                "memory other than keys may be swapped: RLIMIT_MEMLOCK is limited; set LimitMEMLOCK=infinity, \
                 or use encrypted swap or none",
                io::Error::from(e),
            )
        })?;
    }
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT).map_err(
        |e| {
            Error::with_source(
                Kind::Refused,
                "memory other than keys may be swapped: mlockall failed; use encrypted swap or none",
                io::Error::from(e),
            )
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's flags of the mapping that holds `addr`.
    fn vm_flags(addr: usize) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().unwrap().split_once('-');
            if let Some((start, end)) = range
                && let (Ok(start), Ok(end)) =
                    (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                inside = (start..end).contains(&addr);
            } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("no mapping holds {addr:#x}");
    }

    #[test]
    fn key_memory_is_locked_undumpable_and_wiped_on_fork() {
        let secret = Secret::<64>::random().unwrap();
        let flags = vm_flags(secret.expose().as_ptr().addr());
        for flag in ["lo", "dd", "wf"] {
            assert!(flags.iter().any(|f| f == flag), "{flag} missing in {flags:?}");
        }
    }

    #[test]
    fn a_forked_child_sees_zeros_where_the_parent_keeps_its_key() {
        let secret = Secret::<64>::random().unwrap();
        // SAFETY: the child only reads memory and leaves by _exit, both allowed after fork in a threaded process.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                let leaked = secret.expose().iter().any(|b| *b != 0);
                libc::_exit(i32::from(leaked));
            }
            let mut status = -1;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            status
        };
        assert_eq!(status, 0);
        assert!(secret.expose().iter().any(|b| *b != 0));
    }

    #[test]
    fn debug_shows_no_contents() {
        let mut secret = Secret::<3>::zeroed().unwrap();
        secret.expose_mut().copy_from_slice(b"abc");
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }

    #[test]
    fn freed_memory_comes_back_zero_and_no_two_secrets_overlap() {
        for round in 0..20u8 {
            let mut keys: Vec<Secret<64>> = (0..100).map(|_| Secret::zeroed().unwrap()).collect();
            let mut wide: Vec<Secret<1000>> = (0..10).map(|_| Secret::zeroed().unwrap()).collect();
            for (i, key) in keys.iter_mut().enumerate() {
                assert!(key.expose().iter().all(|b| *b == 0), "round {round}");
                key.expose_mut().fill(i as u8 + 1);
            }
            for key in &mut wide {
                assert!(key.expose().iter().all(|b| *b == 0), "round {round}");
                key.expose_mut().fill(0xee);
            }
            for (i, key) in keys.iter().enumerate() {
                assert!(key.expose().iter().all(|b| *b == i as u8 + 1));
            }
        }
    }

    #[test]
    fn a_secret_larger_than_a_page_gets_pages_of_its_own() {
        let mut secret = Secret::<10_000>::zeroed().unwrap();
        secret.expose_mut().fill(1);
        assert_eq!(secret.expose()[9_999], 1);
    }

    #[test]
    fn ten_thousand_keys_fit_the_default_limit() {
        // 10,000 x 64 bytes are 157 pages (640 KiB) of the usual 8 MiB; a page each would be 40 MiB.
        let keys: Vec<Secret<64>> = (0..10_000).map(|_| Secret::zeroed().unwrap()).collect();
        let mut pages: Vec<usize> = keys.iter().map(|k| k.expose().as_ptr().addr() / 4096).collect();
        pages.sort_unstable();
        pages.dedup();
        assert!(pages.len() <= 10_000 / 64 + 64, "{} pages", pages.len());
    }

    /// Runs `body` in a process of its own: this very test, told apart by an environment variable.
    fn in_a_child(test: &str, body: fn()) {
        if std::env::var_os("VOLD_TEST_CHILD").is_some() {
            return body();
        }
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("secret::tests::{test}"), "--nocapture"])
            .env("VOLD_TEST_CHILD", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    #[test]
    fn a_hardened_process_leaves_no_core_dump() {
        in_a_child("a_hardened_process_leaves_no_core_dump", || {
            harden_process().unwrap();
            let dumpable = rustix::process::dumpable_behavior().unwrap();
            assert_eq!(dumpable, DumpableBehavior::NotDumpable);
            let core = rustix::process::getrlimit(Resource::Core);
            assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
        });
    }

    #[test]
    fn a_full_lock_limit_is_an_error_that_says_what_to_raise() {
        in_a_child("a_full_lock_limit_is_an_error_that_says_what_to_raise", || {
            drop_ipc_lock();
            let little = Rlimit {
                current: Some(16 << 10),
                maximum: Some(16 << 10),
            };
            rustix::process::setrlimit(Resource::Memlock, little).unwrap();
            let mut held = Vec::new();
            let error = loop {
                assert!(held.len() < 64, "the limit was not reached");
                match Secret::<4096>::zeroed() {
                    Ok(secret) => held.push(secret),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), Kind::NoSpace);
            let text = error.to_string();
            assert!(
                text.contains("RLIMIT_MEMLOCK is 16384 bytes") && text.contains("LimitMEMLOCK"),
                "{text}"
            );
            // What was there before goes on working, and freeing makes room.
            held.pop();
            Secret::<4096>::zeroed().unwrap();
        });
    }

    #[test]
    fn locking_everything_covers_later_allocations_or_says_why_not() {
        in_a_child(
            "locking_everything_covers_later_allocations_or_says_why_not",
            || match lock_all_memory() {
                Ok(()) => {
                    let memory = vec![1u8; 1 << 20];
                    assert!(
                        vm_flags(memory.as_ptr().addr() + (1 << 19))
                            .iter()
                            .any(|f| f == "lo")
                    );
                }
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Refused);
                    assert!(error.message().contains("LimitMEMLOCK=infinity"), "{error}");
                }
            },
        );
    }

    /// CAP_IPC_LOCK would lift the limit; root in a test gives it up.
    fn drop_ipc_lock() {
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        let mut sets = capabilities(None).unwrap();
        sets.effective -= CapabilitySet::IPC_LOCK;
        sets.permitted -= CapabilitySet::IPC_LOCK;
        sets.inheritable -= CapabilitySet::IPC_LOCK;
        set_capabilities(None, sets).unwrap();
    }
}
