//! The scrubber: PendingScrub extents are overwritten with zeros, synced, read back, and only then free (I7).
//!
//! Whoever released an extent has ended all I/O on it, so nothing races with the zeros. Checksum areas go with the data. A
//! few extents share one sync and one commit; two are worked on at a time, so that serving goes on beside it.

use std::rc::Rc;

use futures_util::{TryStreamExt, stream};

use super::TRANSACTION_RECORDS_MAX;
use super::batch::Step;
use super::keeper::Keeper;
use super::transfer::{SPAN_BYTES, write_zeros};
use super::wire::is_zero;
use crate::buf::Buf;
use crate::error::{Error, Result};
use crate::ids::PhysicalExtent;
use crate::runtime::yield_now;
use crate::sabotage::{Rule, broken};

/// Extents between two syncs.
const EXTENTS_PER_ROUND: usize = 8;
/// Extents worked on at a time.
const EXTENTS_AT_A_TIME: usize = 2;

impl Keeper {
    /// Scrubs until the store is closing or faulty.
    pub(super) async fn scrub_loop(self: Rc<Self>) {
        let zeros = Rc::new(Buf::zeroed(self.scrub_span()));
        let mut cursor = 0;
        loop {
            let first = self
                .changed
                .until(|| match self.check_open() {
                    Err(_) => Some(None),
                    Ok(()) => self.books.borrow().next_pending(cursor).map(Some),
                })
                .await;
            let Some(first) = first else { break };
            let round = self.round(first);
            cursor = round.last().map_or(0, |extent| extent.0 + 1);
            if let Err(error) = self.scrub(&zeros, &round).await {
                // A commit that was refused because the store is closing is no fault; the extents stay PendingScrub.
                if self.check_open().is_ok() {
                    self.failed("scrub", error);
                }
                break;
            }
            yield_now().await;
        }
        self.scrubbing.set(false);
        self.work.notify_all();
        self.changed.notify_all();
    }

    /// Puts free extents through the scrubber once more, and waits for its end. They are set aside first, so that nobody is
    /// given one meanwhile.
    ///
    /// # Errors
    /// `Unavailable` once the store is faulty or closing.
    pub(super) async fn rescrub(&self, extents: Vec<PhysicalExtent>) -> Result<u32> {
        self.check_open()?;
        let taken = self.books.borrow_mut().reserve_these(&extents);
        for some in taken.chunks(TRANSACTION_RECORDS_MAX) {
            let committed = self.commit(some.iter().map(|extent| Step::Rescrub(*extent)).collect());
            if let Err(error) = committed.await {
                // What is committed is not reserved any more; the rest is free as it was.
                self.books.borrow_mut().unreserve(&taken);
                self.books_changed();
                return Err(error);
            }
        }
        self.changed
            .until(|| {
                let books = self.books.borrow();
                let scrubbed = |extent: &PhysicalExtent| !books.is_pending(*extent);
                match taken.iter().all(scrubbed) {
                    true => Some(Ok(())),
                    false => self.check_open().err().map(Err),
                }
            })
            .await?;
        Ok(taken.len() as u32)
    }

    /// The next few extents, each once.
    fn round(&self, first: PhysicalExtent) -> Vec<PhysicalExtent> {
        let books = self.books.borrow();
        let mut round = vec![first];
        while round.len() < EXTENTS_PER_ROUND {
            let after = round[round.len() - 1].0 + 1;
            match books.next_pending(after) {
                Some(next) if !round.contains(&next) => round.push(next),
                _ => break,
            }
        }
        round
    }

    async fn scrub(&self, zeros: &Rc<Buf>, round: &[PhysicalExtent]) -> Result<()> {
        if !broken(Rule::ScrubOverwrites) {
            each(round, |extent| self.overwrite(zeros, extent)).await?;
            if !broken(Rule::ScrubSyncs) {
                self.shared.sync(&self.disk, "scrub").await?;
            }
            if !broken(Rule::ScrubReadsBack) {
                each(round, |extent| self.read_back(extent)).await?;
            }
        }
        self.commit(round.iter().map(|extent| Step::Free(*extent)).collect())
            .await?;
        self.freed.set(self.freed.get() + round.len() as u64);
        self.changed.notify_all();
        let destroyed = self.books.borrow().volumes().any(|(_, entry)| entry.tombstoned);
        if destroyed && !self.closing.get() {
            let _one_at_a_time = self.slot_lock.acquire(1).await;
            self.free_slots().await?;
        }
        Ok(())
    }

    async fn overwrite(&self, zeros: &Rc<Buf>, extent: PhysicalExtent) -> Result<()> {
        let layout = &self.layout;
        write_zeros(&self.disk, zeros, layout.data_at(extent), layout.extent_bytes).await?;
        if broken(Rule::ScrubSums) {
            return Ok(());
        }
        write_zeros(&self.disk, zeros, layout.sums_at(extent), layout.sum_area_bytes()).await
    }

    /// Bytes of one transfer: no extent needs more than its own size.
    fn scrub_span(&self) -> usize {
        SPAN_BYTES.min(self.layout.extent_bytes as usize)
    }

    async fn read_back(&self, extent: PhysicalExtent) -> Result<()> {
        let layout = &self.layout;
        let span = self.scrub_span();
        let mut buf = Buf::zeroed(span);
        let spans = [
            (layout.data_at(extent), layout.extent_bytes),
            (layout.sums_at(extent), layout.sum_area_bytes()),
        ];
        for (at, len) in spans {
            if broken(Rule::ScrubSums) && at == spans[1].0 {
                break;
            }
            let mut done = 0;
            while done < len {
                let n = (span as u64).min(len - done) as usize;
                // What was in the buffer must not be taken for what the device returned.
                buf[..n].fill(0xff);
                let (result, back) = self.disk.read(at + done, buf, 0..n).await;
                buf = back;
                result?;
                if !is_zero(&buf[..n]) {
                    return Err(Error::io(format!(
                        "extent {extent}: {n} bytes at {} were overwritten with zeros and do not read back as zeros",
                        at + done
                    )));
                }
                done += n as u64;
            }
        }
        Ok(())
    }
}

async fn each<F: Future<Output = Result<()>>>(
    extents: &[PhysicalExtent],
    work: impl Fn(PhysicalExtent) -> F,
) -> Result<()> {
    stream::iter(extents.iter().map(|extent| Ok(work(*extent))))
        .try_buffer_unordered(EXTENTS_AT_A_TIME)
        .try_for_each(|()| async { Ok(()) })
        .await
}
