//! Replies to one connection's requests, as its framing has them, into its outbox.

use libvol::crypto::seal::PlainBuf;
use libvol::runtime::SendPart;
use libvol::volume::{BlockKind, PlainPart};

use super::Connection;
use crate::device::Device;
use crate::nbd::proto::reply;
use crate::nbd::proto::request::Cookie;
use crate::nbd::proto::{Contexts, Framing, WireError};

impl<D: Device> Connection<D> {
    /// Success without data. With compact headers only reads need a structured reply; the simple one is shorter for others.
    pub(super) fn reply_success(&self, cookie: Cookie, is_read: bool, cost_bytes: usize) {
        let mut out = self.outbox.reply(cost_bytes);
        match self.framing {
            Framing::Structured if !is_read => out.header(&reply::simple(cookie, None)),
            Framing::Simple => out.header(&reply::simple(cookie, None)),
            framing => out.header(&reply::none(framing, cookie)),
        }
    }

    pub(super) fn reply_error(&self, cookie: Cookie, error: WireError, text: &str, cost_bytes: usize) {
        let mut out = self.outbox.reply(cost_bytes);
        match self.framing {
            Framing::Simple => out.header(&reply::simple(cookie, Some(error))),
            framing => out.part(SendPart::Bytes(reply::error(framing, cookie, error, text))),
        }
    }

    pub(super) fn reply_data(
        &self,
        cookie: Cookie,
        offset: u64,
        len: u32,
        unfragmented: bool,
        parts: Vec<PlainPart>,
        cost_bytes: usize,
    ) {
        let total: usize = parts.iter().map(part_len).sum();
        assert_eq!(total, len as usize, "a volume reads what it was asked for");
        let mut out = self.outbox.reply(cost_bytes);
        let framing = self.framing;
        if framing == Framing::Simple {
            out.header(&reply::simple(cookie, None));
            parts.into_iter().for_each(|part| out.part(send_part(part)));
            return;
        }
        let whole = unfragmented && !parts.iter().all(is_zeros);
        if whole {
            out.header(&reply::offset_data(framing, cookie, offset, len, true));
            parts.into_iter().for_each(|part| out.part(send_part(part)));
            return;
        }
        // Neighbours of one kind make one chunk.
        let end = offset + u64::from(len);
        let mut at = offset;
        let mut parts = parts.into_iter();
        while let Some(first) = parts.as_slice().first() {
            let zeros = is_zeros(first);
            let alike = parts.as_slice().iter().take_while(|part| is_zeros(part) == zeros);
            let (count, run) = alike.fold((0, 0), |(count, run), part| (count + 1, run + part_len(part)));
            let run = run as u32;
            let chunk_at = at;
            at += u64::from(run);
            let done = at == end;
            let mut alike = parts.by_ref().take(count);
            if zeros {
                alike.for_each(drop);
                out.header(&reply::offset_hole(framing, cookie, chunk_at, run, done));
            } else {
                out.header(&reply::offset_data(framing, cookie, chunk_at, run, done));
                alike.by_ref().for_each(|part| out.part(send_part(part)));
            }
        }
    }

    pub(super) fn reply_block_status(
        &self,
        cookie: Cookie,
        contexts: Contexts,
        len: u64,
        runs: Vec<(u64, BlockKind)>,
        cost_bytes: usize,
    ) {
        let total: u64 = runs.iter().map(|(run, _)| run).sum();
        assert!(total <= len, "a volume describes what it was asked for");
        let chunks = reply::block_status(self.framing, cookie, contexts, &runs);
        self.outbox.reply(cost_bytes).part(SendPart::Bytes(chunks));
    }
}

fn is_zeros(part: &PlainPart) -> bool {
    matches!(part, PlainPart::Zeros(_))
}

fn part_len(part: &PlainPart) -> usize {
    match part {
        PlainPart::Data(_, range) => range.len(),
        PlainPart::Zeros(len) => *len,
    }
}

fn send_part(part: PlainPart) -> SendPart {
    match part {
        PlainPart::Data(PlainBuf(buf), range) => SendPart::Buf { buf, range },
        PlainPart::Zeros(len) => SendPart::Zeros(len),
    }
}
