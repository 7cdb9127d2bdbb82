//! Replies on their way out.
//!
//! Finished requests put the parts of their replies here, in any order among requests; one sender takes all that is
//! ready in one vectored message, bounded in bytes and slices. Replies leave in the order they came, whole. A reply
//! counts as sent, and its request's window is given back, only when the socket has taken its last byte.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use libvol::runtime::SendPart;

/// A message is cut after the part that reaches this many bytes, so that buffers come back while the rest waits.
const BATCH_BYTES: usize = 1 << 20;
/// Slices of one message, below the kernel's 1024.
const BATCH_SLICES: usize = 512;
/// Zeros are sent in slices of this size.
const ZEROS_SLICE: usize = 64 << 10;
/// Room in an inline part.
const INLINE_BYTES: usize = 48;

/// See the module's text.
#[derive(Default)]
pub(super) struct Outbox {
    queue: RefCell<Queue>,
    closed: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

#[derive(Default)]
struct Queue {
    parts: VecDeque<SendPart>,
    /// Ends of replies, in parts put and sent since the beginning.
    ends: VecDeque<ReplyEnd>,
    parts_put: u64,
    parts_sent: u64,
}

struct ReplyEnd {
    after_part: u64,
    cost_bytes: usize,
}

/// A reply being put together; complete on drop.
pub(super) struct Reply<'a> {
    outbox: &'a Outbox,
    queue: std::cell::RefMut<'a, Queue>,
    cost_bytes: usize,
}

/// Replies that a message completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// How many.
    pub(super) replies: usize,
    /// What their requests cost.
    pub(super) cost_bytes: usize,
}

impl Outbox {
    /// Starts a reply to a request that cost `cost_bytes`. Ends with the returned value, before any `await`.
    pub(super) fn reply(&self, cost_bytes: usize) -> Reply<'_> {
        Reply {
            outbox: self,
            queue: self.queue.borrow_mut(),
            cost_bytes,
        }
    }

    /// The next message, as soon as there is one; `None` when closed and empty.
    pub(super) async fn next_batch(&self) -> Option<Vec<SendPart>> {
        poll_fn(|cx| {
            let batch = self.queue.borrow_mut().batch();
            if !batch.is_empty() {
                return Poll::Ready(Some(batch));
            }
            if self.closed.get() {
                return Poll::Ready(None);
            }
            *self.waiting.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// A message of that many parts was sent.
    pub(super) fn sent(&self, parts: usize) -> Sent {
        let mut queue = self.queue.borrow_mut();
        queue.parts_sent += parts as u64;
        let mut sent = Sent::default();
        while let Some(end) = queue.ends.front()
            && end.after_part <= queue.parts_sent
        {
            sent.replies += 1;
            sent.cost_bytes += end.cost_bytes;
            queue.ends.pop_front();
        }
        sent
    }

    /// No replies will follow; what is here is still sent.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.wake();
    }

    /// Nobody is there to read: drops what is here and all that follows.
    pub(super) fn discard(&self) {
        self.closed.set(true);
        let dropped = std::mem::take(&mut *self.queue.borrow_mut());
        drop(dropped);
        self.wake();
    }

    fn wake(&self) {
        let waker = self.waiting.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Queue {
    fn batch(&mut self) -> Vec<SendPart> {
        let (mut count, mut bytes, mut slices) = (0, 0, 0);
        for part in &self.parts {
            let more = match part {
                SendPart::Zeros(len) => len.div_ceil(ZEROS_SLICE),
                _ => 1,
            };
            if count > 0 && (bytes >= BATCH_BYTES || slices + more > BATCH_SLICES) {
                break;
            }
            count += 1;
            bytes += part.len();
            slices += more;
        }
        self.parts.drain(..count).collect()
    }
}

impl Reply<'_> {
    /// A header. Neighbours share an inline part, so that small replies take a slice for several.
    pub(super) fn header(&mut self, header: &[u8]) {
        if let Some(SendPart::Inline { bytes, len }) = self.queue.parts.back_mut() {
            let used = usize::from(*len);
            if used + header.len() <= INLINE_BYTES {
                bytes[used..used + header.len()].copy_from_slice(header);
                *len += header.len() as u8;
                return;
            }
        }
        self.part(SendPart::inline(header));
    }

    /// Anything else.
    pub(super) fn part(&mut self, part: SendPart) {
        if !part.is_empty() {
            self.queue.parts.push_back(part);
            self.queue.parts_put += 1;
        }
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        if self.outbox.closed.get() {
            self.queue.parts.clear();
            return;
        }
        let end = ReplyEnd {
            after_part: self.queue.parts_put,
            cost_bytes: self.cost_bytes,
        };
        self.queue.ends.push_back(end);
        self.outbox.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(parts: &[SendPart]) -> Vec<u8> {
        let mut slices = Vec::new();
        parts.iter().for_each(|part| part.slices(&mut slices));
        slices.concat()
    }

    fn batch(outbox: &Outbox) -> Vec<SendPart> {
        outbox.queue.borrow_mut().batch()
    }

    #[test]
    fn small_replies_share_a_slice_and_leave_in_order() {
        let outbox = Outbox::default();
        for i in 0..7u8 {
            outbox.reply(10).header(&[i; 16]);
        }
        let parts = batch(&outbox);
        assert_eq!(parts.len(), 3, "three replies of 16 bytes in each 48");
        assert_eq!(flat(&parts), (0..7).flat_map(|i| [i; 16]).collect::<Vec<u8>>());
        let sent = outbox.sent(2);
        assert_eq!((sent.replies, sent.cost_bytes), (6, 60));
        let sent = outbox.sent(1);
        assert_eq!((sent.replies, sent.cost_bytes), (1, 10));
    }

    #[test]
    fn a_reply_counts_as_sent_only_with_its_last_part() {
        let outbox = Outbox::default();
        let mut reply = outbox.reply(5);
        reply.header(b"head");
        reply.part(SendPart::Zeros(BATCH_BYTES));
        reply.part(SendPart::Zeros(0));
        reply.part(SendPart::Bytes(b"tail".as_slice().into()));
        drop(reply);
        outbox.reply(7).header(b"next");
        assert_eq!(
            batch(&outbox).len(),
            2,
            "cut behind the part that filled the message"
        );
        assert_eq!(outbox.sent(2), Sent::default());
        assert_eq!(flat(&batch(&outbox)), b"tailnext");
        let both = Sent {
            replies: 2,
            cost_bytes: 12,
        };
        assert_eq!(outbox.sent(2), both);
    }

    #[test]
    fn a_message_is_bounded_in_slices_and_a_part_too_large_goes_alone() {
        let outbox = Outbox::default();
        for _ in 0..BATCH_SLICES + 3 {
            outbox.reply(0).part(SendPart::Bytes([1].as_slice().into()));
        }
        outbox.reply(0).part(SendPart::Zeros(64 << 20));
        assert_eq!(batch(&outbox).len(), BATCH_SLICES);
        assert_eq!(batch(&outbox).len(), 3);
        assert_eq!(batch(&outbox).len(), 1);
        assert!(batch(&outbox).is_empty());
    }

    #[test]
    fn what_comes_after_a_discard_is_dropped() {
        let outbox = Outbox::default();
        outbox.reply(1).header(b"a");
        outbox.discard();
        assert!(batch(&outbox).is_empty());
        outbox.reply(1).header(b"b");
        assert!(batch(&outbox).is_empty() && outbox.queue.borrow().ends.is_empty());
    }
}
