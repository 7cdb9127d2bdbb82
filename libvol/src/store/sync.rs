//! Every sync of an open store, from whatever thread, goes through here, so that no failed one is ever got over.
//!
//! All runtimes share one open file description, and the kernel reports a failed writeback to one sync of it only: another
//! that ends later succeeds. So that nobody tells success from such a sync, syncs are numbered when they begin, and one that
//! has succeeded is *settled* only when every sync that had begun before it ended has been reaped by its owner, which
//! closes the fault latch first if it failed. A sync that begins after ours has ended cannot have taken our report, and is
//! not waited for: settling takes no longer than the syncs that are in flight anyway.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_channel::oneshot;

use super::handle::Shared;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::sabotage::{Rule, broken};

/// Which syncs are in flight, on any thread.
#[derive(Default)]
pub(super) struct SyncBook {
    /// Held for a few instructions twice a sync, which costs a device flush; never across a wait or a waker. No other lock
    /// is taken inside.
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    /// Number of the next sync.
    next: u64,
    /// Begun and not reaped, ascending.
    in_flight: VecDeque<u64>,
    /// Successes that wait until every sync below their bound is reaped, ascending.
    settling: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// A success that is not to be told yet: see [`Shared::settle`].
#[must_use]
pub(super) struct Unsettled(Option<oneshot::Receiver<()>>);

impl Unsettled {
    /// Whether nobody else's sync is waited for.
    pub(super) fn is_alone(&self) -> bool {
        self.0.is_none()
    }
}

impl SyncBook {
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> u64 {
        let mut book = self.lock();
        let number = book.next;
        book.next += 1;
        book.in_flight.push_back(number);
        number
    }

    /// The sync has ended, and the latch is closed if it failed.
    fn reap(&self, number: u64) -> Unsettled {
        let mut settled = Vec::new();
        let unsettled = {
            let mut book = self.lock();
            let at = book.in_flight.binary_search(&number);
            let at = at.expect("reaped once");
            let _ = book.in_flight.remove(at);
            let oldest = book.in_flight.front().copied().unwrap_or(book.next);
            while book.settling.front().is_some_and(|(bound, _)| *bound <= oldest) {
                settled.extend(book.settling.pop_front());
            }
            Unsettled((!book.in_flight.is_empty()).then(|| {
                let (sender, receiver) = oneshot::channel();
                let bound = book.next;
                book.settling.push_back((bound, sender));
                receiver
            }))
        };
        for (_, waiting) in settled {
            // Whoever does not wait any more needs no answer.
            let _ = waiting.send(());
        }
        unsettled
    }
}

/// One sync in flight. Dropped before it was reaped (its thread has ended), nobody will know its result: as bad as a failure.
struct InFlight<'a> {
    shared: &'a Shared,
    number: Option<u64>,
}

impl InFlight<'_> {
    fn reap(mut self) -> Unsettled {
        let number = self.number.take().expect("reaped once");
        self.shared.syncs.reap(number)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.shared
                .latch("a sync was given up before its result was known");
            drop(self.shared.syncs.reap(number));
        }
    }
}

impl Shared {
    /// Makes every write that completed before the call durable.
    ///
    /// # Errors
    /// `Io`, and the store is latched, because of `what`; `Unavailable` when it was latched before.
    pub(super) async fn sync(&self, disk: &Disk, what: &str) -> Result<()> {
        let unsettled = self.sync_unsettled(disk, what).await?;
        self.settle(unsettled, what).await
    }

    /// Syncs, and leaves to [`Shared::settle`] whether that may be told. The next sync may begin before.
    ///
    /// # Errors
    /// As [`Shared::sync`].
    pub(super) async fn sync_unsettled(&self, disk: &Disk, what: &str) -> Result<Unsettled> {
        self.check_fault()?;
        let in_flight = InFlight {
            shared: self,
            number: Some(self.syncs.begin()),
        };
        let mut synced = disk.sync().await;
        if broken(Rule::FailedSync) {
            synced = Ok(());
        }
        let failed = synced.err().map(|e| Error::from(e).context(what));
        if let Some(error) = &failed {
            // Before it counts as reaped: others may tell success from then on.
            self.latch(error.message());
        }
        let unsettled = in_flight.reap();
        match failed {
            None => Ok(unsettled),
            Some(error) => Err(self.named(error)),
        }
    }

    /// Waits until a sync's success may be told.
    ///
    /// # Errors
    /// `Io` when another sync has failed meanwhile, and ours may have succeeded only for that.
    pub(super) async fn settle(&self, unsettled: Unsettled, what: &str) -> Result<()> {
        if let Unsettled(Some(others)) = unsettled {
            // The sender goes only with the book, whose owner we borrow.
            others.await.expect("every sync is reaped");
        }
        match self.fault() {
            None => Ok(()),
            Some(reason) => Err(self.named(Error::io(format!("{what}: {reason}")))),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn is_settled(unsettled: &mut Unsettled) -> bool {
        let waiting = unsettled.0.as_mut();
        waiting.is_none_or(|others| others.now_or_never().is_some())
    }

    #[test]
    fn a_sync_alone_is_settled_at_once() {
        let book = SyncBook::default();
        for _ in 0..3 {
            let number = book.begin();
            assert!(book.reap(number).is_alone());
        }
    }

    #[test]
    fn a_success_waits_for_syncs_begun_before_it_ended_and_for_no_later_ones() {
        let book = SyncBook::default();
        let (before, ours, during) = (book.begin(), book.begin(), book.begin());
        let mut unsettled = book.reap(ours);
        let after = book.begin();
        assert!(!is_settled(&mut unsettled));
        drop(book.reap(during));
        assert!(!is_settled(&mut unsettled));
        let mut first = book.reap(before);
        assert!(is_settled(&mut unsettled));
        assert!(!is_settled(&mut first), "one more had begun by then");
        drop(book.reap(after));
        assert!(is_settled(&mut first));
    }

    #[test]
    fn overlapping_syncs_never_starve_a_success() {
        let book = SyncBook::default();
        let mut running = book.begin();
        let mut settling: Vec<Unsettled> = Vec::new();
        for _ in 0..10 {
            let next = book.begin();
            let unsettled = book.reap(running);
            settling.iter_mut().for_each(|before| assert!(is_settled(before)));
            settling = vec![unsettled];
            running = next;
        }
    }
}
