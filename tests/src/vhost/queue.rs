//! The driver's side of a split virtqueue, laid out by hand (VIRTIO 1.2, 2.7 "Split Virtqueues").
//!
//! It waits for calls and for nothing else, and kicks only when the device asks for it: a notification that is lost makes a
//! test fail. Descriptors may be written as a driver must not write them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::memory::Memory;
use crate::PATIENCE;

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY.
const QUIET: u16 = 1;
const DESCRIPTOR: u64 = 16;

/// A piece of memory in a chain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The guest's address.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Part {
    /// One that the device reads.
    pub fn readable(at: u64, len: u32) -> Self {
        let writable = false;
        Self { at, len, writable }
    }

    /// One that the device writes.
    pub fn writable(at: u64, len: u32) -> Self {
        let writable = true;
        Self { at, len, writable }
    }

    fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// One virtqueue.
pub struct Queue {
    /// Its number.
    pub index: u32,
    /// Descriptors.
    pub size: u16,
    /// The descriptor table's address.
    pub descriptors: u64,
    /// The available ring's address.
    pub available: u64,
    /// The used ring's address.
    pub used: u64,
    event_idx: bool,
    free: Vec<u16>,
    offered: u16,
    kicked: u16,
    seen: u16,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Queue {
    /// An empty one in this memory.
    ///
    /// # Panics
    /// When there is no room.
    pub fn new(memory: &mut Memory, index: u32, size: u16, event_idx: bool) -> Self {
        let n = u64::from(size);
        Self {
            index,
            size,
            descriptors: memory.room(DESCRIPTOR * n, 16),
            available: memory.room(6 + 2 * n, 2),
            used: memory.room(6 + 8 * n, 4),
            event_idx,
            free: (0..size).rev().collect(),
            offered: 0,
            kicked: 0,
            seen: 0,
            kick: new_eventfd(),
            call: new_eventfd(),
        }
    }

    /// What is written to, to kick.
    pub fn kick_descriptor(&self) -> &OwnedFd {
        &self.kick
    }

    /// What the device signals.
    pub fn call_descriptor(&self) -> &OwnedFd {
        &self.call
    }

    /// Another call descriptor, to be told to the device.
    pub fn set_call_descriptor(&mut self, call: OwnedFd) {
        self.call = call;
    }

    /// How many descriptors nobody has.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Where the device goes on in the available ring when it has forgotten where it was: nothing before it is unanswered,
    /// but for what is in the inflight area.
    pub fn used_index(&self, memory: &Memory) -> u16 {
        memory.u16(self.used + 2)
    }

    /// The head of the next chain.
    ///
    /// # Panics
    /// When there are no descriptors.
    pub fn next_head(&self) -> u16 {
        *self.free.last().expect("a free descriptor")
    }

    /// Puts anything into the descriptor table.
    pub fn write_descriptor(&self, memory: &Memory, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let place = self.descriptors + DESCRIPTOR * u64::from(index);
        memory.write(place, &descriptor(at, len, flags, next));
    }

    /// Takes descriptors for a chain of these parts; gives them, the head first.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn chain(&mut self, memory: &Memory, parts: &[Part]) -> Vec<u16> {
        let taken: Vec<u16> = parts
            .iter()
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (i, part) in parts.iter().enumerate() {
            let (flags, next) = match taken.get(i + 1) {
                Some(next) => (part.flags() | NEXT, *next),
                None => (part.flags(), 0),
            };
            self.write_descriptor(memory, taken[i], part.at, part.len, flags, next);
        }
        taken
    }

    /// The same in a table of its own at `table`, with one descriptor of the queue.
    ///
    /// # Panics
    /// When there is none left.
    pub fn indirect_chain(&mut self, memory: &Memory, table: u64, parts: &[Part]) -> Vec<u16> {
        let mut bytes = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            let (flags, next) = if i + 1 < parts.len() {
                (part.flags() | NEXT, i as u16 + 1)
            } else {
                (part.flags(), 0)
            };
            bytes.extend(descriptor(part.at, part.len, flags, next));
        }
        memory.write(table, &bytes);
        let head = self.free.pop().expect("a free descriptor");
        self.write_descriptor(memory, head, table, bytes.len() as u32, INDIRECT, 0);
        vec![head]
    }

    /// Gives descriptors back.
    pub fn release(&mut self, descriptors: Vec<u16>) {
        self.free.extend(descriptors.into_iter().rev());
    }

    /// Makes a chain available. The device is told of it by [`Self::notify`].
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let slot = u64::from(self.offered % self.size);
        memory.write(self.available + 4 + 2 * slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.set_available_index(memory, self.offered);
    }

    /// Sets the available ring's index, to anything.
    pub fn set_available_index(&self, memory: &Memory, index: u16) {
        fence(Ordering::SeqCst);
        memory.write(self.available + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// Kicks if the device wants to be told of what was offered since the last time.
    pub fn notify(&mut self, memory: &Memory) {
        let (old, new) = (self.kicked, self.offered);
        self.kicked = new;
        let wanted = if self.event_idx {
            let event = memory.u16(self.used + 4 + 8 * u64::from(self.size));
            // (VIRTIO 1.2, 2.7.10: the event lies in what was added.)
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            memory.u16(self.used) & QUIET == 0
        };
        if wanted && new != old {
            self.kick();
        }
    }

    /// Kicks in any case.
    ///
    /// # Panics
    /// When the descriptor does not take it.
    pub fn kick(&self) {
        match rustix::io::write(&self.kick, &1u64.to_ne_bytes()) {
            // A count that is full is a kick already.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(e) => panic!("a kick: {e}"),
        }
    }

    /// Another answered chain, if there is one.
    ///
    /// # Panics
    /// When the used ring's index has jumped.
    pub fn take_used(&mut self, memory: &Memory) -> Option<Used> {
        let index = self.used_index(memory);
        if index == self.seen {
            return None;
        }
        let ahead = index.wrapping_sub(self.seen);
        assert!(ahead <= self.size, "the used index jumped by {ahead}");
        fence(Ordering::SeqCst);
        let place = self.used + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        let head = memory.u32(place);
        assert!(head < u32::from(self.size), "a used head of {head}");
        Some(Used {
            head: head as u16,
            len: memory.u32(place + 4),
        })
    }

    /// Another answered chain; waits for the device's call.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait_used(&mut self, memory: &Memory) -> Used {
        self.used_before(memory, || false)
            .unwrap_or_else(|| panic!("waited {PATIENCE:?} in vain for a call of queue {}", self.index))
    }

    /// The same, but gives up when `over`.
    ///
    /// # Panics
    /// When the descriptor cannot be waited for.
    pub fn used_before(&mut self, memory: &Memory, over: impl Fn() -> bool) -> Option<Used> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.take_used(memory) {
                return Some(used);
            }
            // Asks for a call with the next one, and looks once more, before it sleeps.
            if self.event_idx {
                memory.write(
                    self.available + 4 + 2 * u64::from(self.size),
                    &self.seen.to_le_bytes(),
                );
                fence(Ordering::SeqCst);
                if let Some(used) = self.take_used(memory) {
                    return Some(used);
                }
            }
            loop {
                if over() || Instant::now() > deadline {
                    return None;
                }
                if has_called(&self.call) {
                    break;
                }
            }
        }
    }

    /// Whether the device has called since this was asked last.
    pub fn was_called(&self) -> bool {
        let mut count = [0; 8];
        is_readable(&self.call, 0) && rustix::io::read(&self.call, &mut count).is_ok()
    }

    /// Forgets what was offered and answered, for a ring that starts anew.
    pub fn clear(&mut self, memory: &Memory) {
        memory.write(self.available, &vec![0; 6 + 2 * usize::from(self.size)]);
        memory.write(self.used, &vec![0; 6 + 8 * usize::from(self.size)]);
        (self.offered, self.kicked, self.seen) = (0, 0, 0);
        self.free = (0..self.size).rev().collect();
    }
}

/// Waits a little for a call.
fn has_called(call: &OwnedFd) -> bool {
    let mut count = [0; 8];
    is_readable(call, 20_000_000) && rustix::io::read(call, &mut count).is_ok()
}

fn is_readable(descriptor: &OwnedFd, wait_ns: i64) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(descriptor.as_fd(), PollFlags::IN)];
    let wait = Timespec {
        tv_sec: 0,
        tv_nsec: wait_ns,
    };
    poll(&mut polled, Some(&wait)).is_ok_and(|ready| ready > 0)
}

fn descriptor(at: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// An eventfd that does not block.
///
/// # Panics
/// When the kernel has none.
pub fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}
