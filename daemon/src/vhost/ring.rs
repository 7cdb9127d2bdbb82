//! One split virtqueue: taking heads that the guest has made available, and giving them back used.
//!
//! Invariants: what the guest writes is only believed as far as it is checked. Never are more than `size` heads in flight,
//! and never one twice; an available index that says otherwise is a fault. A used entry is written before the index that
//! covers it. The ring keeps no pointers: it is found anew in the memory it is used with.
//!
//! ```text
//! available: flags 2, index 2, heads 2 each, used_event 2      used: flags 2, index 2, (head 4, bytes 4) each, avail_event 2
//! ```
//!
//! Source: VIRTIO 1.2, 2.7 "Split Virtqueues"; for the log, vhost-user "Migration".

use std::sync::atomic::{Ordering, fence};

use libvol::limits::VHOST_QUEUE_SIZE_MAX;

use super::chain::{Chain, DESCRIPTOR_BYTES};
use super::fault::Fault;
use super::memory::{DirtyLog, GuestMemory};

/// In the available ring's flags: the guest wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: the device wants no kicks.
const NO_NOTIFY: u16 = 1;
/// Bytes of a ring before its entries.
const RING_HEADER_BYTES: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;

/// Where a queue's three parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    /// The descriptor table.
    pub(super) desc: u64,
    /// The available ring.
    pub(super) avail: u64,
    /// The used ring.
    pub(super) used: u64,
    /// Where writes to the used ring are logged, if they are (VHOST_VRING_F_LOG).
    pub(super) log_used: Option<u64>,
}

/// See the module's text.
pub(super) struct Ring {
    size: u16,
    addresses: RingAddresses,
    event_idx: bool,
    /// The next available entry to take.
    next_avail: u16,
    /// What the guest was last seen to have made available.
    seen_avail: u16,
    /// The next used entry to write: our own count, which the guest cannot change.
    next_used: u16,
    /// The used index when it was last asked whether to call. `None`: never.
    called_at: Option<u16>,
    /// Which heads are in flight, and how many.
    taken: Vec<bool>,
    in_flight: u16,
}

impl Ring {
    /// A queue that goes on at available entry `base`, and at the used entry that its memory says.
    ///
    /// # Errors
    /// Size, alignment or addresses are wrong, or the two indices cannot be of one queue.
    pub(super) fn new(
        size: u16,
        addresses: RingAddresses,
        base: u16,
        event_idx: bool,
        memory: &GuestMemory,
    ) -> Result<Self, Fault> {
        if !size.is_power_of_two() || size > VHOST_QUEUE_SIZE_MAX {
            return Err(Fault::Ring("a queue size that is no power of two, or too large"));
        }
        let RingAddresses {
            desc, avail, used, ..
        } = addresses;
        if desc % 16 != 0 || avail % 2 != 0 || used % 4 != 0 {
            return Err(Fault::Ring("a queue that is not aligned"));
        }
        let entries = u64::from(size);
        // With the event index at the end, used or not: the layout has it.
        memory.check(desc, DESCRIPTOR_BYTES * entries)?;
        memory.check(avail, RING_HEADER_BYTES + 2 * entries + 2)?;
        memory.check(used, RING_HEADER_BYTES + USED_ENTRY_BYTES * entries + 2)?;
        let next_used = memory.load_u16(used + 2)?;
        let ring = Self {
            size,
            addresses,
            event_idx,
            next_avail: base,
            seen_avail: base,
            next_used,
            called_at: None,
            taken: vec![false; usize::from(size)],
            in_flight: 0,
        };
        if ring.distance(base) > size {
            return Err(Fault::Ring("a queue whose used index is not near its base"));
        }
        Ok(ring)
    }

    /// Goes on after a crash with these heads, which were in flight. Available entries after them come next, whatever base
    /// was given: a front-end whose back-end has crashed does not know it.
    ///
    /// # Errors
    /// A head that is none of the queue, or is there twice.
    pub(super) fn resume(&mut self, pending: &[u16]) -> Result<(), Fault> {
        self.taken.fill(false);
        self.in_flight = 0;
        for head in pending {
            self.enter(*head)?;
        }
        // All different and below the size, so no more than that.
        self.next_avail = self.next_used.wrapping_add(pending.len() as u16);
        self.seen_avail = self.next_avail;
        Ok(())
    }

    /// The next head that the guest has made available.
    ///
    /// # Errors
    /// The guest's index has jumped, its head is none of the queue or in flight already, or the memory has gone.
    pub(super) fn next(&mut self, memory: &GuestMemory) -> Result<Option<u16>, Fault> {
        if self.seen_avail == self.next_avail {
            self.look(memory)?;
        }
        if self.seen_avail == self.next_avail {
            return Ok(None);
        }
        let slot = u64::from(self.next_avail % self.size);
        let head = memory.load_u16(self.addresses.avail + RING_HEADER_BYTES + 2 * slot)?;
        self.enter(head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Follows a head's descriptors.
    ///
    /// # Errors
    /// As [`Chain::walk`].
    pub(super) fn chain(&self, memory: &GuestMemory, head: u16) -> Result<Chain, Fault> {
        Chain::walk(memory, self.addresses.desc, self.size, head)
    }

    /// Writes to the used ring are logged there from now on, or not any more.
    pub(super) fn log_used_at(&mut self, at: Option<u64>) {
        self.addresses.log_used = at;
    }

    /// Where another back-end would go on when nothing is in flight (GET_VRING_BASE).
    pub(super) fn base(&self) -> u16 {
        self.next_avail
    }

    /// The used index as it was last written.
    pub(super) fn used_index(&self) -> u16 {
        self.next_used
    }

    /// Heads taken and not given back.
    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        usize::from(self.in_flight)
    }

    /// Gives a head back, with the number of bytes written for it: the entry, then the index.
    ///
    /// # Errors
    /// The memory has gone.
    ///
    /// # Panics
    /// The head is not in flight.
    pub(super) fn push_used(
        &mut self,
        memory: &GuestMemory,
        log: Option<&DirtyLog>,
        head: u16,
        len: u32,
    ) -> Result<(), Fault> {
        let taken = &mut self.taken[usize::from(head)];
        assert!(*taken, "a head that is given back was taken");
        *taken = false;
        self.in_flight -= 1;
        let entry = RING_HEADER_BYTES + USED_ENTRY_BYTES * u64::from(self.next_used % self.size);
        memory.store_u32(self.addresses.used + entry, u32::from(head))?;
        memory.store_u32(self.addresses.used + entry + 4, len)?;
        self.log(log, entry, USED_ENTRY_BYTES);
        self.next_used = self.next_used.wrapping_add(1);
        memory.store_u16(self.addresses.used + 2, self.next_used)?;
        self.log(log, 2, 2);
        Ok(())
    }

    /// Whether the guest is to be interrupted for what was given back since this was last asked. The first time it is: what
    /// an earlier back-end gave back, it may not have called for.
    ///
    /// # Errors
    /// The memory has gone.
    pub(super) fn wants_call(&mut self, memory: &GuestMemory) -> Result<bool, Fault> {
        let Some(before) = self.called_at.replace(self.next_used) else {
            return Ok(true);
        };
        let given_back = self.next_used.wrapping_sub(before);
        if given_back == 0 {
            return Ok(false);
        }
        // The guest writes its wish and then reads the used index; we have written the index and now read the wish.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event =
                memory.load_u16(self.addresses.avail + RING_HEADER_BYTES + 2 * u64::from(self.size))?;
            // Whether the entry that it waits for is among those: [before, next_used).
            Ok(event.wrapping_sub(before) < given_back)
        } else {
            Ok(memory.load_u16(self.addresses.avail)? & NO_INTERRUPT == 0)
        }
    }

    /// Asks the guest to kick for what comes next. Gives whether something came meanwhile, for which it may not have
    /// kicked.
    ///
    /// # Errors
    /// The guest's index has jumped, or the memory has gone.
    pub(super) fn ask_for_kicks(
        &mut self,
        memory: &GuestMemory,
        log: Option<&DirtyLog>,
    ) -> Result<bool, Fault> {
        if self.event_idx {
            let place = RING_HEADER_BYTES + USED_ENTRY_BYTES * u64::from(self.size);
            memory.store_u16(self.addresses.used + place, self.next_avail)?;
            self.log(log, place, 2);
        } else {
            memory.store_u16(self.addresses.used, 0)?;
            self.log(log, 0, 2);
        }
        fence(Ordering::SeqCst);
        self.look(memory)?;
        Ok(self.seen_avail != self.next_avail)
    }

    /// Tells the guest that it need not kick. With event indices there is nothing to tell: the index it was asked to kick
    /// at lies behind it.
    ///
    /// # Errors
    /// The memory has gone.
    pub(super) fn refuse_kicks(&mut self, memory: &GuestMemory, log: Option<&DirtyLog>) -> Result<(), Fault> {
        if !self.event_idx {
            memory.store_u16(self.addresses.used, NO_NOTIFY)?;
            self.log(log, 0, 2);
        }
        Ok(())
    }

    /// Reads what the guest has made available.
    fn look(&mut self, memory: &GuestMemory) -> Result<(), Fault> {
        let index = memory.load_u16(self.addresses.avail + 2)?;
        // It can only have moved on from what was taken, and the queue has `size` places.
        let taken = self.distance(self.next_avail);
        if self.distance(index) > self.size || self.distance(index) < taken {
            return Err(Fault::Ring("an available index that has jumped"));
        }
        self.seen_avail = index;
        Ok(())
    }

    /// How far an available index is ahead of what was given back.
    fn distance(&self, index: u16) -> u16 {
        index.wrapping_sub(self.next_used)
    }

    fn enter(&mut self, head: u16) -> Result<(), Fault> {
        match self.taken.get_mut(usize::from(head)) {
            None => Err(Fault::Ring("a head outside its queue")),
            Some(true) => Err(Fault::Ring("a head that is in flight already")),
            Some(taken) => {
                *taken = true;
                self.in_flight += 1;
                Ok(())
            }
        }
    }

    fn log(&self, log: Option<&DirtyLog>, offset: u64, len: u64) {
        if let (Some(log), Some(base)) = (log, self.addresses.log_used) {
            log.mark(base.saturating_add(offset), len);
        }
    }
}

#[cfg(test)]
mod tests;
