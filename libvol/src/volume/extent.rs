//! One extent of a volume in memory: where it lies, how its mark stands, and the sums of its blocks.
//!
//! The mark's life, as a table. *Marked* means that the write-intent mark is durable on every replica; only then may any
//! replica be written or unmapped.
//!
//! | state | on the stores | a write or unmap | a read | ends when |
//! |---|---|---|---|---|
//! | Absent | nowhere | allocates | zeros | – |
//! | Allocating | on some, marked there | waits | zeros | committed on all → Dirty; no space → Absent |
//! | Clean | on all, no mark | marks | goes on | – |
//! | Marking | on all, marked on some | waits | goes on | committed on all → Dirty; refused → Clean |
//! | Dirty | on all, marked | goes on | goes on | the cleaner takes it → Cleaning |
//! | Cleaning | on all, marked | → Dirty, goes on | goes on | areas and data synced → Clearing |
//! | Clearing | on all, marked on some | waits | goes on | committed on all → Clean |
//! | Releasing | on some, marked there | waits | waits | committed on all → Absent |
//! | Unreconciled | on all, marked on some | reconciles first | reconciles first | someone takes it → Reconciling |
//! | Reconciling | on all, marked on some | waits | waits | copies equal, sums known → Dirty |
//!
//! Invariants: a pinned extent ([`Pinned`]) is not cleaned, so a mark outlives every write that relies on it; sums stay in
//! memory in every state but Clean, and in Clean while the extent is in use ([`Use`]).

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::rc::Rc;

use super::range_lock::RangeLock;
use crate::crypto::seal::HOLE;
use crate::ids::{ExtentIndex, PhysicalExtent, ReplicaSet};
use crate::limits::VOLUME_PLACES_MAX;

/// See the module's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Absent,
    Allocating,
    Clean,
    Marking,
    Dirty,
    Cleaning,
    Clearing,
    Releasing,
    Unreconciled,
    Reconciling,
}

/// What a write or unmap does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForWrite {
    GoOn,
    CancelCleaning,
    Allocate,
    Mark,
    Reconcile,
    Wait,
}

/// What a read does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForRead {
    GoOn,
    Zeros,
    Reconcile,
    Wait,
}

impl State {
    pub(super) fn for_write(self) -> ForWrite {
        match self {
            State::Absent => ForWrite::Allocate,
            State::Clean => ForWrite::Mark,
            State::Dirty => ForWrite::GoOn,
            State::Cleaning => ForWrite::CancelCleaning,
            State::Unreconciled => ForWrite::Reconcile,
            State::Allocating | State::Marking | State::Clearing | State::Releasing | State::Reconciling => {
                ForWrite::Wait
            }
        }
    }

    pub(super) fn for_read(self) -> ForRead {
        match self {
            State::Absent | State::Allocating => ForRead::Zeros,
            State::Clean | State::Marking | State::Dirty | State::Cleaning | State::Clearing => ForRead::GoOn,
            State::Unreconciled => ForRead::Reconcile,
            State::Releasing | State::Reconciling => ForRead::Wait,
        }
    }
}

/// Where an extent lies, by replica.
pub(super) type Places = [PhysicalExtent; VOLUME_PLACES_MAX];

/// See the module's text.
pub(super) struct Extent {
    pub(super) index: ExtentIndex,
    pub(super) state: Cell<State>,
    /// Valid in every state but Absent and Allocating.
    pub(super) places: Cell<Places>,
    /// Orders the requests for its blocks.
    pub(super) lock: RangeLock,
    /// One a block; `None` when they are not in memory.
    sums: RefCell<Option<Box<[u32]>>>,
    /// Sequence of the newest checksum area written or read.
    pub(super) sequence: Cell<u64>,
    /// Somebody is reading the checksum areas.
    pub(super) loading: Cell<bool>,
    /// Area writes of the cleaner may be in flight, whatever the state has become meanwhile.
    pub(super) cleaner_holds: Cell<bool>,
    /// Marked ahead of a sequential writer, which has not come yet.
    pub(super) ahead: Cell<bool>,
    /// Replicas whose mark is durable. Only meaningful in Unreconciled.
    pub(super) marked_on: Cell<ReplicaSet>,
    /// Replicas in role Joining that have caught up with this extent and take its writes.
    pub(super) caught_up: Cell<ReplicaSet>,
    /// Recovery could not read some block on any replica: the mark stays, so that the next opening tries again.
    pub(super) unread: Cell<bool>,
    /// Cleaner's tick of the last write.
    pub(super) last_write: Cell<u32>,
    /// Used since the cache last looked.
    pub(super) recently_used: Cell<bool>,
    /// It is on the cache's list.
    pub(super) in_cache: Cell<bool>,
    /// It is on the list of dirty extents.
    pub(super) listed_dirty: Cell<bool>,
    pins: Cell<u32>,
    uses: Cell<u32>,
}

impl Extent {
    pub(super) fn new(index: ExtentIndex) -> Rc<Self> {
        Rc::new(Self {
            index,
            state: Cell::new(State::Absent),
            places: Cell::default(),
            lock: RangeLock::default(),
            sums: RefCell::default(),
            sequence: Cell::new(0),
            loading: Cell::new(false),
            cleaner_holds: Cell::new(false),
            ahead: Cell::new(false),
            marked_on: Cell::default(),
            caught_up: Cell::default(),
            unread: Cell::new(false),
            last_write: Cell::new(0),
            recently_used: Cell::new(false),
            in_cache: Cell::new(false),
            listed_dirty: Cell::new(false),
            pins: Cell::new(0),
            uses: Cell::new(0),
        })
    }

    /// Keeps the mark until the pin drops, if the extent is marked now. Cancels a cleaning.
    #[inline]
    pub(super) fn pin(self: &Rc<Self>) -> Option<Pinned> {
        match self.state.get().for_write() {
            ForWrite::GoOn => {}
            ForWrite::CancelCleaning => self.state.set(State::Dirty),
            _ => return None,
        }
        self.pins.set(self.pins.get() + 1);
        Some(Pinned(self.clone()))
    }

    pub(super) fn pins(&self) -> u32 {
        self.pins.get()
    }

    /// Keeps the sums in memory until the guard drops.
    #[inline]
    pub(super) fn in_use(self: &Rc<Self>) -> Use {
        self.uses.set(self.uses.get() + 1);
        self.recently_used.set(true);
        Use(self.clone())
    }

    pub(super) fn has_sums(&self) -> bool {
        self.sums.borrow().is_some()
    }

    /// Whether the sums may be dropped: they are on disk and nobody works with them.
    pub(super) fn may_evict(&self) -> bool {
        self.state.get() == State::Clean
            && self.uses.get() == 0
            && self.pins.get() == 0
            && !self.loading.get()
    }

    /// Looks at the sums of some blocks; `None` when they are not in memory.
    #[inline]
    pub(super) fn with_sums<T>(&self, blocks: Range<u32>, look: impl FnOnce(&[u32]) -> T) -> Option<T> {
        let sums = self.sums.borrow();
        let sums = sums.as_ref()?;
        Some(look(&sums[blocks.start as usize..blocks.end as usize]))
    }

    /// The blocks now have these sums. The caller holds them exclusively.
    #[inline]
    pub(super) fn set_sums(&self, first: u32, new: &[u32]) {
        let mut sums = self.sums.borrow_mut();
        let sums = sums.as_mut().expect("a marked extent's sums are in memory");
        sums[first as usize..][..new.len()].copy_from_slice(new);
    }

    /// The blocks are holes now. The caller holds them exclusively.
    pub(super) fn set_holes(&self, blocks: Range<u32>) {
        let mut sums = self.sums.borrow_mut();
        let sums = sums.as_mut().expect("a marked extent's sums are in memory");
        sums[blocks.start as usize..blocks.end as usize].fill(HOLE);
    }

    /// A copy of all sums.
    pub(super) fn copy_sums(&self) -> Box<[u32]> {
        let sums = self.sums.borrow();
        sums.as_ref()
            .expect("a marked extent's sums are in memory")
            .clone()
    }

    /// Puts sums in or takes them out; returns the change in bytes. Only the cache calls this.
    pub(super) fn replace_sums(&self, new: Option<Box<[u32]>>) -> isize {
        let bytes =
            |sums: &Option<Box<[u32]>>| sums.as_ref().map_or(0, |sums| size_of_val::<[u32]>(sums)) as isize;
        let added = bytes(&new);
        let old = self.sums.replace(new);
        added - bytes(&old)
    }
}

/// An extent that stays marked.
pub(super) struct Pinned(Rc<Extent>);

impl Pinned {
    pub(super) fn extent(&self) -> &Rc<Extent> {
        &self.0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.0.pins.set(self.0.pins.get() - 1);
    }
}

/// An extent whose sums stay in memory.
pub(super) struct Use(Rc<Extent>);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.uses.set(self.0.uses.get() - 1);
    }
}

/// Extents by logical index. An entry, once made, stays while the volume is open.
pub(super) type ExtentMap =
    std::collections::HashMap<ExtentIndex, Rc<Extent>, BuildHasherDefault<IndexHasher>>;

/// Hash of a 32-bit index: one multiplication spreads it over the high bits, one fold brings them down again. Indices are
/// the volume's own and dense; nobody gains from making them collide but himself.
#[derive(Default)]
pub(super) struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((self.0 as u32) << 8 | u32::from(*byte));
        }
    }

    fn write_u32(&mut self, index: u32) {
        // 2^64 / golden ratio, odd (Knuth, TAOCP 3, 6.4).
        let spread = u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = spread ^ (spread >> 32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_during_cleaning_cancels_it_and_a_pin_holds_only_marked_extents() {
        let extent = Extent::new(ExtentIndex(7));
        for state in [
            State::Absent,
            State::Clean,
            State::Marking,
            State::Clearing,
            State::Releasing,
            State::Unreconciled,
        ] {
            extent.state.set(state);
            assert!(extent.pin().is_none(), "{state:?}");
        }
        extent.state.set(State::Cleaning);
        let pinned = extent.pin().expect("marked");
        assert_eq!((extent.state.get(), extent.pins()), (State::Dirty, 1));
        drop(pinned);
        assert_eq!(extent.pins(), 0);
    }

    #[test]
    fn sums_are_evicted_only_when_clean_and_unused() {
        let extent = Extent::new(ExtentIndex(0));
        extent.state.set(State::Dirty);
        assert!(!extent.may_evict());
        extent.state.set(State::Clean);
        let used = extent.in_use();
        assert!(!extent.may_evict());
        drop(used);
        assert!(extent.may_evict());
    }
}
