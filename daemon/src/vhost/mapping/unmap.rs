//! Unmapping, which no shard waits for: it takes as long as there are pages, and whoever unmaps the last of a file, however
//! little of it, gives all of the file's memory back. For a guest's that is seconds.
//!
//! Every mapping is unmapped by one thread of the process, a piece at a time: the lock of the process's addresses is held
//! for no longer, and a shard that needs it waits for no more. What waits for the thread keeps its place in the table of
//! mappings and in its attachment's account, so that there is an end to how much that is. If the thread should end, mappings
//! stay for ever.

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use super::account::Charge;
use super::sigbus::Slot;
use crate::vhost::fault::BadMemory;

/// So much is unmapped at once, or one page if that is larger: 8,192 pages, below a millisecond.
const PIECE_BYTES: usize = 32 << 20;

/// Addresses that are mapped, until drop.
pub(super) struct Mapped {
    start: usize,
    len: usize,
    page: usize,
    slot: &'static Slot,
    thread: &'static Sender<Mapped>,
    /// Given back after all else.
    _charge: Charge,
}

impl Mapped {
    /// Owns a mapping of whole pages, its place in the table and what it is counted as. Nothing may borrow from it.
    pub(super) fn new(
        (start, len): (usize, usize),
        page: usize,
        slot: &'static Slot,
        thread: &'static Sender<Mapped>,
        charge: Charge,
    ) -> Self {
        Self {
            start,
            len,
            page,
            slot,
            thread,
            _charge: charge,
        }
    }

    /// Has it unmapped.
    pub(super) fn unmap(self) {
        if let Err(back) = self.thread.send(self) {
            std::mem::forget(back.0);
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Before the addresses can be anybody else's.
        self.slot.retire();
        let end = self.start + self.len;
        for start in (self.start..end).step_by(PIECE_BYTES.max(self.page)) {
            let len = PIECE_BYTES.max(self.page).min(end - start);
            // SAFETY: the mapping, or what stands in its place, is ours alone and each piece is unmapped once; nothing
            // borrows from it.
            let result = unsafe { libc::munmap(ptr::without_provenance_mut(start), len) };
            debug_assert_eq!(result, 0);
        }
    }
}

/// The thread, which is there before there is anything for it to do.
///
/// # Errors
/// The process can have no more threads.
pub(super) fn thread() -> Result<&'static Sender<Mapped>, BadMemory> {
    static THREAD: OnceLock<Option<Sender<Mapped>>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        let (sender, mappings) = channel::<Mapped>();
        let thread = std::thread::Builder::new().name("vhost-unmap".into());
        let begun = thread.spawn(move || mappings.into_iter().for_each(drop));
        begun.ok().map(|_| sender)
    });
    thread.as_ref().ok_or_else(|| {
        BadMemory::Os(
            "there is no thread that would unmap the memory",
            io::Error::from_raw_os_error(libc::EAGAIN),
        )
    })
}
