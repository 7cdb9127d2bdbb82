//! Unmapping, which takes as long as there are pages: for a guest's whole memory that is seconds, and no shard waits for it.
//!
//! Small mappings are unmapped at once, large ones by one thread of the process. What waits for it keeps its place in the
//! table of mappings, so that there is an end to how much that is. The file is the thread's to close too, if nobody else has
//! it any more.

use std::ptr;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use super::sigbus::Slot;

/// Up to this length a mapping is unmapped at once: 4,096 pages, well below a millisecond.
const AT_ONCE_BYTES: usize = 16 << 20;

/// Addresses that are mapped, until drop.
pub(super) struct Mapped {
    start: usize,
    len: usize,
    slot: &'static Slot,
}

impl Mapped {
    /// Owns a mapping, and its place in the table. Nothing may borrow from it.
    pub(super) fn new(start: usize, len: usize, slot: &'static Slot) -> Self {
        Self { start, len, slot }
    }

    /// Unmaps it, here or elsewhere.
    pub(super) fn unmap(self) {
        if self.len > AT_ONCE_BYTES
            && let Some(thread) = thread()
        {
            // When there is no thread any more, it comes back and is dropped here.
            let _ = thread.send(self);
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Before the addresses can be anybody else's.
        self.slot.retire();
        // SAFETY: the mapping, or what stands in its place, is ours alone and is unmapped once; nothing borrows from it.
        let result = unsafe { libc::munmap(ptr::without_provenance_mut(self.start), self.len) };
        debug_assert_eq!(result, 0);
    }
}

/// Where large ones go; `None` when the process can have no more threads.
fn thread() -> Option<&'static Sender<Mapped>> {
    static THREAD: OnceLock<Option<Sender<Mapped>>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        let (sender, mappings) = channel::<Mapped>();
        let thread = std::thread::Builder::new().name("vhost-unmap".into());
        let begun = thread.spawn(move || mappings.into_iter().for_each(drop));
        begun.ok().map(|_| sender)
    });
    thread.as_ref()
}
