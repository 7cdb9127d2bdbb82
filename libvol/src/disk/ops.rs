//! The operations an engine has in its hands: one table for both engines.
//!
//! Invariants: an [`Op`] stays in its slot from submission until the kernel (or a worker thread) has said that it
//! ended, whoever waits for it or not, so the memory and descriptors it owns outlive the transfer; a key is reused only
//! after its operation has ended and was polled or forgotten. Memory that an `Op` points to is on the heap, so
//! pointers taken from a slot stay good while the table grows.
//!
//! The table calls neither wakers nor destructors itself: it hands them to the engine, which runs them when nothing
//! is borrowed, since both can come back into the engine.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::runtime::{Done, FileSlot, Op, OpKey};

/// See the module's text. `X` is what the engine keeps beside each operation.
pub(super) struct OpTable<X> {
    slots: Slab<Slot<X>>,
    in_flight: usize,
}

struct Slot<X> {
    op: Op,
    extra: X,
    state: State,
}

enum State {
    Waiting(Option<Waker>),
    /// In flight, and nobody wants the result.
    Forgotten,
    Ended(io::Result<usize>),
}

/// What the engine does once nothing is borrowed.
pub(super) enum Ended {
    /// Call this waker.
    Wake(Waker),
    /// The result waits to be polled; nobody has asked yet.
    Nobody,
    /// Drop this: the operation was forgotten.
    Drop(Box<Op>),
}

/// What a forgotten operation leaves to be dropped, once nothing is borrowed.
#[expect(dead_code, reason = "held only to be dropped")]
pub(super) struct Remains(Option<Waker>, Option<Op>, Option<OwnedFd>);

impl<X> OpTable<X> {
    pub(super) fn new() -> Self {
        Self {
            slots: Slab::new(),
            in_flight: 0,
        }
    }

    /// Operations that have not ended.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn insert(&mut self, op: Op, extra: X) -> OpKey {
        self.in_flight += 1;
        OpKey(self.slots.insert(Slot {
            op,
            extra,
            state: State::Waiting(None),
        }))
    }

    /// An operation in flight and the engine's part of it.
    pub(super) fn get(&mut self, key: OpKey) -> (&mut Op, &mut X) {
        let slot = self.slots.get_mut(key.0).expect("a live key");
        (&mut slot.op, &mut slot.extra)
    }

    /// Whether nobody waits for `key`, which is in flight.
    pub(super) fn is_forgotten(&self, key: OpKey) -> bool {
        matches!(self.slots[key.0].state, State::Forgotten)
    }

    /// Keys of everything in flight.
    pub(super) fn keys_in_flight(&self) -> Vec<OpKey> {
        let in_flight = |slot: &Slot<X>| !matches!(slot.state, State::Ended(_));
        self.slots
            .iter()
            .filter(|(_, slot)| in_flight(slot))
            .map(|(key, _)| OpKey(key))
            .collect()
    }

    /// The operation has ended: nothing outside uses its memory any more.
    pub(super) fn end(&mut self, key: OpKey, result: io::Result<usize>) -> Ended {
        self.in_flight -= 1;
        let slot = self
            .slots
            .get_mut(key.0)
            .expect("ended once, and kept until then");
        match std::mem::replace(&mut slot.state, State::Ended(Ok(0))) {
            State::Waiting(waker) => {
                slot.state = State::Ended(result);
                waker.map_or(Ended::Nobody, Ended::Wake)
            }
            State::Forgotten => {
                let slot = self.slots.remove(key.0);
                drop(unclaimed_descriptor(&slot.op, &result));
                Ended::Drop(Box::new(slot.op))
            }
            State::Ended(_) => unreachable!("an operation ends once"),
        }
    }

    /// See [`crate::runtime::Driver::poll`]. A waker that was replaced comes back to be dropped.
    #[inline]
    pub(super) fn poll(&mut self, key: OpKey, cx: &mut Context<'_>) -> (Poll<Done>, Option<Waker>) {
        let slot = self.slots.get_mut(key.0).expect("a live key");
        match &mut slot.state {
            State::Waiting(Some(waker)) if waker.will_wake(cx.waker()) => (Poll::Pending, None),
            State::Waiting(waker) => (Poll::Pending, waker.replace(cx.waker().clone())),
            State::Ended(_) => {
                let Slot {
                    op,
                    state: State::Ended(result),
                    ..
                } = self.slots.remove(key.0)
                else {
                    unreachable!("matched above")
                };
                (Poll::Ready(Done { result, op }), None)
            }
            State::Forgotten => unreachable!("a forgotten key is not polled"),
        }
    }

    /// Nobody waits for `key` any more. Whether it is in flight still (then it goes when it ends), and what is to drop.
    pub(super) fn forget(&mut self, key: OpKey) -> (bool, Remains) {
        let slot = self.slots.get_mut(key.0).expect("a live key");
        match &mut slot.state {
            State::Waiting(waker) => {
                let waker = waker.take();
                slot.state = State::Forgotten;
                (true, Remains(waker, None, None))
            }
            State::Ended(_) => {
                let Slot {
                    op,
                    state: State::Ended(result),
                    ..
                } = self.slots.remove(key.0)
                else {
                    unreachable!("matched above")
                };
                let descriptor = unclaimed_descriptor(&op, &result);
                (false, Remains(None, Some(op), descriptor))
            }
            State::Forgotten => unreachable!("forgotten once"),
        }
    }

    /// Takes a forgotten operation out before it has ended; the engine knows that nothing uses it.
    pub(super) fn remove_idle(&mut self, key: OpKey) -> Op {
        self.in_flight -= 1;
        self.slots.remove(key.0).op
    }
}

impl<X> Drop for OpTable<X> {
    fn drop(&mut self) {
        for slot in self.slots.drain() {
            if let State::Ended(result) = &slot.state {
                drop(unclaimed_descriptor(&slot.op, result));
            }
        }
    }
}

impl Ended {
    /// Calls the waker, or the destructors. Nothing of the engine may be borrowed.
    pub(super) fn deliver(self) {
        match self {
            Ended::Wake(waker) => waker.wake(),
            Ended::Nobody => {}
            Ended::Drop(op) => drop(op),
        }
    }
}

/// The connection that an accept nobody waits for has made.
fn unclaimed_descriptor(op: &Op, result: &io::Result<usize>) -> Option<OwnedFd> {
    match (op, result) {
        (Op::Accept { .. }, Ok(fd)) => {
            let fd = i32::try_from(*fd).expect("a descriptor");
            // SAFETY: the kernel made this descriptor for the accept, and its result was given to nobody else.
            Some(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        _ => None,
    }
}

/// The file of a disk operation.
pub(super) fn file_of(op: &Op) -> Option<FileSlot> {
    match op {
        Op::Read { file, .. } | Op::Write { file, .. } | Op::Sync { file } => Some(*file),
        Op::Accept { .. } | Op::Recv { .. } | Op::Send { .. } | Op::Readable { .. } | Op::HangUp { .. } => {
            None
        }
    }
}
