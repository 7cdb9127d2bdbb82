//! The range lock of one extent: 4 KiB-granular, shared or exclusive, first come first served (I6).
//!
//! A claim is granted when it conflicts neither with a claim that is held nor with an earlier one that waits, so nobody is
//! overtaken on the blocks he waits for, and requests for other blocks pass. Uncontended, a claim is one push and one
//! removal on a short list that keeps its memory: no allocation.
//!
//! Deliberately not here: any order between extents. A request holds the lock of one extent at a time (a release of
//! several extents takes them ascending), and nobody waits for a mark while it holds one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::sabotage::{Rule, broken};

/// How much company a claim bears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// With other shared claims.
    Shared,
    /// Alone.
    Exclusive,
}

/// See the module's text.
#[derive(Default)]
pub(super) struct RangeLock {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    held: Vec<Claim>,
    waiting: VecDeque<(Claim, Option<Waker>)>,
    next_id: u64,
}

#[derive(Clone, Copy)]
struct Claim {
    id: u64,
    first: u32,
    end: u32,
    mode: Mode,
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        let overlap = self.first < other.end && other.first < self.end;
        overlap && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

impl RangeLock {
    /// Claims blocks of the extent; the claim joins the queue when the future is first polled.
    pub(super) fn lock(&self, blocks: Range<u32>, mode: Mode) -> Locking<'_> {
        let claim = Claim {
            id: 0,
            first: blocks.start,
            end: blocks.end,
            mode: if broken(Rule::RangeLock) {
                Mode::Shared
            } else {
                mode
            },
        };
        Locking {
            lock: self,
            claim,
            queued: false,
        }
    }

    fn release(&self, id: u64) {
        let mut state = self.state.borrow_mut();
        let place = state.held.iter().position(|claim| claim.id == id);
        state
            .held
            .swap_remove(place.expect("a claim is held until its guard drops"));
        if !state.waiting.is_empty() {
            let woken = state.grant();
            drop(state);
            woken.into_iter().for_each(Waker::wake);
        }
    }
}

impl State {
    /// Grants, in order, every waiting claim that conflicts with nothing before it.
    fn grant(&mut self) -> Vec<Waker> {
        let mut woken = Vec::new();
        let mut place = 0;
        while place < self.waiting.len() {
            let claim = self.waiting[place].0;
            let earlier = self.waiting.iter().take(place).map(|(claim, _)| claim);
            if self
                .held
                .iter()
                .chain(earlier)
                .any(|other| other.conflicts(&claim))
            {
                place += 1;
                continue;
            }
            let (claim, waker) = self.waiting.remove(place).expect("within the queue");
            self.held.push(claim);
            woken.extend(waker);
        }
        woken
    }
}

/// A claim on its way. Dropping it gives the claim up.
pub(super) struct Locking<'a> {
    lock: &'a RangeLock,
    claim: Claim,
    queued: bool,
}

impl<'a> Future for Locking<'a> {
    type Output = Guard<'a>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Guard<'a>> {
        let this = &mut *self;
        let mut state = this.lock.state.borrow_mut();
        if this.queued {
            if let Some((_, waker)) = state
                .waiting
                .iter_mut()
                .find(|(claim, _)| claim.id == this.claim.id)
            {
                *waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            this.queued = false;
        } else {
            this.claim.id = state.next_id;
            state.next_id += 1;
            let waiting = state.waiting.iter().map(|(claim, _)| claim);
            if state
                .held
                .iter()
                .chain(waiting)
                .any(|other| other.conflicts(&this.claim))
            {
                state.waiting.push_back((this.claim, Some(cx.waker().clone())));
                this.queued = true;
                return Poll::Pending;
            }
            state.held.push(this.claim);
        }
        Poll::Ready(Guard {
            lock: this.lock,
            id: this.claim.id,
        })
    }
}

impl Drop for Locking<'_> {
    fn drop(&mut self) {
        if !self.queued {
            return;
        }
        let mut state = self.lock.state.borrow_mut();
        let place = state
            .waiting
            .iter()
            .position(|(claim, _)| claim.id == self.claim.id);
        match place {
            // Others may have waited for this one only.
            Some(place) => {
                state.waiting.remove(place);
                let woken = state.grant();
                drop(state);
                woken.into_iter().for_each(Waker::wake);
            }
            // Granted, and nobody took it.
            None => {
                drop(state);
                self.lock.release(self.claim.id);
            }
        }
    }
}

/// A held claim; given back on drop.
pub(super) struct Guard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use futures_util::task::noop_waker_ref;
    use std::pin::pin;

    fn try_now<'a>(locking: &mut Pin<&mut Locking<'a>>) -> Option<Guard<'a>> {
        match locking.as_mut().poll(&mut Context::from_waker(noop_waker_ref())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn shared_claims_overlap_and_exclusive_ones_wait() {
        let lock = RangeLock::default();
        let a = lock.lock(0..4, Mode::Shared).now_or_never().unwrap();
        let b = lock.lock(2..6, Mode::Shared).now_or_never().unwrap();
        let mut writer = pin!(lock.lock(3..5, Mode::Exclusive));
        assert!(try_now(&mut writer).is_none());
        drop(a);
        assert!(try_now(&mut writer).is_none());
        drop(b);
        assert!(try_now(&mut writer).is_some());
    }

    #[test]
    fn claims_on_other_blocks_pass_those_that_wait() {
        let lock = RangeLock::default();
        let held = lock.lock(0..1, Mode::Exclusive).now_or_never().unwrap();
        let mut waits = pin!(lock.lock(0..2, Mode::Exclusive));
        assert!(try_now(&mut waits).is_none());
        assert!(lock.lock(2..3, Mode::Exclusive).now_or_never().is_some());
        drop(held);
    }

    #[test]
    fn a_waiting_writer_is_not_starved_by_readers_that_keep_coming() {
        let lock = RangeLock::default();
        let mut reader = lock.lock(0..1, Mode::Shared).now_or_never();
        let mut writer = pin!(lock.lock(0..1, Mode::Exclusive));
        assert!(try_now(&mut writer).is_none());
        let mut late = pin!(lock.lock(0..1, Mode::Shared));
        assert!(try_now(&mut late).is_none(), "it came after the writer");
        drop(reader.take());
        let writing = try_now(&mut writer).expect("the writer's turn");
        assert!(try_now(&mut late).is_none());
        drop(writing);
        assert!(try_now(&mut late).is_some());
    }

    #[test]
    fn a_claim_that_is_given_up_lets_those_behind_it_pass() {
        let lock = RangeLock::default();
        let _reader = lock.lock(0..1, Mode::Shared).now_or_never().unwrap();
        let mut writer = Box::pin(lock.lock(0..1, Mode::Exclusive));
        assert!((&mut writer).now_or_never().is_none());
        let mut late = pin!(lock.lock(0..1, Mode::Shared));
        assert!(try_now(&mut late).is_none());
        drop(writer);
        assert!(try_now(&mut late).is_some());
    }

    #[test]
    fn a_claim_granted_and_never_taken_is_given_back() {
        let lock = RangeLock::default();
        let held = lock.lock(0..1, Mode::Exclusive).now_or_never().unwrap();
        let mut waits = Box::pin(lock.lock(0..1, Mode::Exclusive));
        assert!((&mut waits).now_or_never().is_none());
        drop(held);
        drop(waits);
        assert!(lock.lock(0..1, Mode::Exclusive).now_or_never().is_some());
    }
}
