//! Group commit and checkpoint.
//!
//! One append is in flight at a time. Everything queued meanwhile shares the next frame. A transaction takes effect in
//! the books, and its caller hears of it, only after the frame's sync. A checkpoint writes the changed pages, first one copy
//! and then the other, while commits go on: a page image may be later than the checkpoint's lsn, never than the durable log.

use std::rc::Rc;

use super::batch::{Added, Batch, Step};
use super::handle::Reply;
use super::keeper::Keeper;
use super::layout::PAGE_BYTES;
use super::log::{Frame, records_in, units_for};
use crate::buf::Buf;
use crate::error::{Error, Kind, Result};
use crate::runtime::spawn;
use crate::sabotage::{Rule, broken};

/// Pages encoded at a time: 256 KiB.
const PAGES_PER_STEP: usize = 64;

/// Steps that wait for their commit, and who waits for them.
pub(super) struct Transaction {
    pub(super) steps: Vec<Step>,
    /// A frame is due even if nothing changes.
    pub(super) beat: bool,
    pub(super) reply: Reply<()>,
}

impl Keeper {
    /// Appends until the store is closing and nobody waits any more.
    pub(super) async fn append_loop(self: Rc<Self>) {
        loop {
            self.work
                .until(|| {
                    let some = self.checkpoint_ready.get().is_some() || !self.queue.borrow().is_empty();
                    (some || self.may_stop()).then_some(())
                })
                .await;
            if let Err(error) = self.record_checkpoint().await {
                // It is latched and logged already; whoever commits next hears of it.
                debug_assert!(self.shared.check_fault().is_err(), "{error}");
            }
            if self.queue.borrow().is_empty() {
                if self.may_stop() {
                    break;
                }
                continue;
            }
            self.commit_some().await;
        }
        self.stopped.set(true);
        self.changed.notify_all();
    }

    /// Nothing is left to append, and nobody is left who might want to.
    fn may_stop(&self) -> bool {
        self.draining.get() && !self.checkpoint_running.get() && self.queue.borrow().is_empty()
    }

    /// Makes one frame of what is queued.
    async fn commit_some(self: &Rc<Self>) {
        let (batch, replies, beat) = self.stage();
        if replies.is_empty() {
            return;
        }
        let result = match batch.is_empty() && !beat {
            // Everything asked for is so already, durably.
            true => self.shared.check_fault(),
            false => self.commit_batch(&batch).await,
        };
        self.books_changed();
        for reply in replies {
            let _ = reply.send(match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(Error::new(error.kind(), error.to_string())),
            });
        }
    }

    /// Takes transactions from the queue while they fit one frame; those that are refused hear it at once. Also whether a
    /// frame is due even if nothing changes.
    fn stage(&self) -> (Batch, Vec<Reply<()>>, bool) {
        let records_max = records_in(self.layout.frame_bytes_max());
        let books = self.books.borrow();
        let mut queue = self.queue.borrow_mut();
        let mut batch = Batch::default();
        let mut replies = Vec::new();
        let mut beat = false;
        while let Some(transaction) = queue.pop_front() {
            let added = match self.shared.check_fault() {
                Err(error) => Added::No(error),
                Ok(()) => batch.add(&books, &transaction.steps, records_max),
            };
            match added {
                Added::Yes => {
                    beat |= transaction.beat;
                    replies.push(transaction.reply);
                }
                Added::No(error) => drop(transaction.reply.send(Err(self.shared.named(error)))),
                Added::Later => {
                    queue.push_front(transaction);
                    break;
                }
            }
        }
        (batch, replies, beat)
    }

    async fn commit_batch(self: &Rc<Self>, batch: &Batch) -> Result<()> {
        let entries = batch.entries();
        let units = units_for(entries.len());
        while !self.ring.borrow().fits(units) {
            self.start_checkpoint();
            let ready = || {
                let some = self.checkpoint_ready.get().is_some() || self.shared.check_fault().is_err();
                some.then_some(())
            };
            self.work.until(ready).await;
            self.shared.check_fault()?;
            self.record_checkpoint().await?;
        }
        let checkpoint = self.ring.borrow().checkpoint();
        let lsn = self.append(checkpoint, entries).await?;
        let (records, release) = batch.parts();
        let mut books = self.books.borrow_mut();
        books.apply(lsn, records);
        if let Some(dataset) = release {
            books.release_dataset(lsn, dataset);
        }
        drop(books);
        self.set_applied(lsn);
        if self.ring.borrow().half_full() {
            self.start_checkpoint();
        }
        Ok(())
    }

    /// One frame, durable when this returns.
    async fn append(&self, checkpoint: u64, entries: Vec<super::log::Entry>) -> Result<u64> {
        // After a frame that failed none may follow: it would make the failed one a gap.
        self.shared.check_fault()?;
        let units = units_for(entries.len());
        let (lsn, at) = {
            let mut ring = self.ring.borrow_mut();
            let at = ring
                .append(units)
                .ok_or_else(|| Error::damaged("redo log: no room to record a checkpoint"))?;
            (ring.lsn(), self.layout.log.at + at)
        };
        let frame = Frame {
            lsn,
            checkpoint,
            entries,
        };
        let bytes = Rc::new(frame.encode(self.superblock.store));
        let written = async {
            self.disk.write(at, bytes.clone(), 0..bytes.len()).await?;
            match broken(Rule::CommitSyncs) {
                true => Ok(()),
                false => self.shared.sync(&self.disk, "redo log").await,
            }
        };
        match written.await {
            Ok(()) => Ok(lsn),
            Err(error) => Err(self.failed("redo log", error)),
        }
    }

    /// The frame with that lsn is durable and in the books.
    fn set_applied(&self, lsn: u64) {
        self.applied.set(lsn);
        self.shared.set_committed(lsn);
    }

    /// A metadata write or sync has failed: nothing on the device may be taken for durable any more.
    pub(super) fn failed(&self, what: &str, error: Error) -> Error {
        // Who failed because the latch was closed already keeps the first reason.
        if self.shared.check_fault().is_err() {
            return error;
        }
        let error = error.context(what);
        self.shared.latch(&error.to_string());
        self.work.notify_all();
        self.changed.notify_all();
        self.shared.named(error)
    }

    fn start_checkpoint(self: &Rc<Self>) {
        if self.checkpoint_running.replace(true) {
            return;
        }
        let this = self.clone();
        spawn(async move {
            match this.write_pages().await {
                Ok(lsn) => this.checkpoint_ready.set(Some(lsn)),
                Err(error) => {
                    this.checkpoint_running.set(false);
                    this.failed("checkpoint", error);
                }
            }
            this.work.notify_all();
        })
        .detach();
    }

    /// Writes a frame that says which checkpoint is done, if one is: from then on older frames may be overwritten.
    async fn record_checkpoint(&self) -> Result<()> {
        let Some(lsn) = self.checkpoint_ready.take() else {
            return Ok(());
        };
        let recorded = self.append(lsn, Vec::new()).await;
        if let Ok(frame) = recorded {
            self.set_applied(frame);
            self.ring.borrow_mut().checkpointed(lsn);
        }
        self.checkpoint_running.set(false);
        self.changed.notify_all();
        recorded.map(|_| ())
    }

    /// A whole checkpoint while no appender runs (at open and close).
    pub(super) async fn checkpoint_now(&self) -> Result<()> {
        if let Err(error) = self.shared.check_fault() {
            return Err(Error::new(Kind::Unavailable, error.to_string()));
        }
        let lsn = self
            .write_pages()
            .await
            .map_err(|e| self.failed("checkpoint", e))?;
        self.checkpoint_ready.set(Some(lsn));
        self.record_checkpoint().await
    }

    /// Writes every page that has changed, one copy after the other. Returns the lsn that both copies on disk have now.
    async fn write_pages(&self) -> Result<u64> {
        let lsn = self.applied.get();
        let changed = {
            let mut books = self.books.borrow_mut();
            let changed = books.table().changed();
            books.table_mut().take_changed(&changed);
            changed
        };
        // A copy that was found bad goes first: while it is written, the good one is not touched.
        for good in [false, true] {
            for pages in changed.chunks(PAGES_PER_STEP) {
                self.write_copies(pages, good).await?;
            }
            if !broken(Rule::CheckpointSyncs) {
                self.shared.sync(&self.disk, "checkpoint").await?;
            }
        }
        Ok(lsn)
    }

    /// Writes the good copy of each page, or the other one.
    async fn write_copies(&self, pages: &[u32], good: bool) -> Result<()> {
        let mut images = Buf::zeroed(pages.len() * PAGE_BYTES);
        let copies: Vec<u8> = {
            let books = self.books.borrow();
            books.table().images(pages, &mut images);
            let good = good || broken(Rule::AlternatePages);
            let copy = |page: &u32| books.table().good_copy(*page) ^ u8::from(!good);
            pages.iter().map(copy).collect()
        };
        let images = Rc::new(images);
        for (first, count) in runs(pages, &copies) {
            let at = self.layout.page_at(pages[first], copies[first]);
            let range = first * PAGE_BYTES..(first + count) * PAGE_BYTES;
            self.disk.write(at, images.clone(), range).await?;
        }
        Ok(())
    }
}

/// Positions and lengths of runs of neighbouring pages that go to the same copy.
fn runs(pages: &[u32], copies: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (position, page) in pages.iter().enumerate() {
        match runs.last_mut() {
            Some((first, count))
                if pages[*first] + *count as u32 == *page && copies[*first] == copies[position] =>
            {
                *count += 1;
            }
            _ => runs.push((position, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_pages_of_one_copy_share_a_write() {
        assert_eq!(runs(&[1, 2, 3, 5, 6], &[0; 5]), [(0, 3), (3, 2)]);
        assert_eq!(runs(&[1, 2, 3], &[0, 1, 0]), [(0, 1), (1, 1), (2, 1)]);
        assert_eq!(runs(&[], &[]), []);
    }
}
