//! Replies of the transmission phase.
//!
//! ```text
//! simple:     | magic u32 | error u32 | cookie u64 | data (a successful READ) |
//! structured: | magic u32 | flags u16 | type u16 | cookie u64 | length u32 | payload |
//! ```
//!
//! Encoders return headers; data follows from the buffers it was read into, without a copy.

use libvol::volume::BlockKind;

use super::request::Cookie;
use super::{WireError, Writer};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

const FLAG_DONE: u16 = 1;

const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = (1 << 15) + 1;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// Runs one BLOCK_STATUS reply may hold.
pub(in crate::nbd) const BLOCK_STATUS_RUNS_MAX: usize = 1024;
/// The reply of that many runs: a chunk header, the context's id, and 8 bytes a run.
pub(in crate::nbd) const BLOCK_STATUS_BYTES_MAX: usize = CHUNK_BYTES + 4 + 8 * BLOCK_STATUS_RUNS_MAX;
/// Bytes of a chunk before its payload: 4 + 2 + 2 + 8 + 4.
const CHUNK_BYTES: usize = 20;

/// A simple reply; `None` is success.
pub(in crate::nbd) fn simple(cookie: Cookie, error: Option<WireError>) -> [u8; 16] {
    Writer::new()
        .put(SIMPLE_MAGIC.to_be_bytes())
        .put(error.map_or(0, |e| e as u32).to_be_bytes())
        .put(cookie.0.to_be_bytes())
        .done()
}

fn chunk(done: bool, kind: u16, cookie: Cookie, payload_len: u32) -> [u8; CHUNK_BYTES] {
    Writer::new()
        .put(STRUCTURED_MAGIC.to_be_bytes())
        .put((if done { FLAG_DONE } else { 0 }).to_be_bytes())
        .put(kind.to_be_bytes())
        .put(cookie.0.to_be_bytes())
        .put(payload_len.to_be_bytes())
        .done()
}

/// Success without content: the structured reply to a read of no bytes.
pub(in crate::nbd) fn none(cookie: Cookie) -> [u8; CHUNK_BYTES] {
    chunk(true, TYPE_NONE, cookie, 0)
}

/// What precedes `len` bytes of data at `offset`.
pub(in crate::nbd) fn offset_data(cookie: Cookie, offset: u64, len: u32, done: bool) -> [u8; 28] {
    Writer::new()
        .put(chunk(done, TYPE_OFFSET_DATA, cookie, 8 + len))
        .put(offset.to_be_bytes())
        .done()
}

/// `len` zero bytes at `offset`, none of them sent.
pub(in crate::nbd) fn offset_hole(cookie: Cookie, offset: u64, len: u32, done: bool) -> [u8; 32] {
    Writer::new()
        .put(chunk(done, TYPE_OFFSET_HOLE, cookie, 12))
        .put(offset.to_be_bytes())
        .put(len.to_be_bytes())
        .done()
}

/// A final error chunk with its text.
pub(in crate::nbd) fn error(cookie: Cookie, error: WireError, text: &str) -> Box<[u8]> {
    let text = clip(text, 1024);
    let mut bytes = Vec::with_capacity(CHUNK_BYTES + 6 + text.len());
    bytes.extend(chunk(true, TYPE_ERROR, cookie, 6 + text.len() as u32));
    bytes.extend((error as u32).to_be_bytes());
    bytes.extend((text.len() as u16).to_be_bytes());
    bytes.extend(text.as_bytes());
    bytes.into()
}

/// The only chunk of a block-status reply: `runs` in order from the request's offset.
pub(in crate::nbd) fn block_status(cookie: Cookie, context: u32, runs: &[(u32, BlockKind)]) -> Box<[u8]> {
    assert!(!runs.is_empty() && runs.len() <= BLOCK_STATUS_RUNS_MAX);
    let payload_len = 4 + 8 * runs.len();
    let mut bytes = Vec::with_capacity(CHUNK_BYTES + payload_len);
    bytes.extend(chunk(true, TYPE_BLOCK_STATUS, cookie, payload_len as u32));
    bytes.extend(context.to_be_bytes());
    for (len, kind) in runs {
        let state = match kind {
            BlockKind::Data => 0,
            BlockKind::AllocatedZero => STATE_ZERO,
            BlockKind::Hole => STATE_HOLE | STATE_ZERO,
        };
        bytes.extend(len.to_be_bytes());
        bytes.extend(state.to_be_bytes());
    }
    bytes.into()
}

/// At most `max` bytes of `text`, cut between characters.
pub(super) fn clip(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);
    const COOKIE_BYTES: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    #[test]
    fn the_drawing_of_replies_is_what_is_encoded() {
        let simple_ok = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &COOKIE_BYTES].concat();
        assert_eq!(simple(COOKIE, None)[..], simple_ok);
        assert_eq!(simple(COOKIE, Some(WireError::NoSpace))[4..8], [0, 0, 0, 28]);

        let magic = [0x66, 0x8e, 0x33, 0xef];
        let data = [
            &magic[..],
            &[0, 1, 0, 1],
            &COOKIE_BYTES,
            &[0, 0, 2, 8],
            &[0, 0, 0, 0, 0, 0, 16, 0],
        ];
        assert_eq!(offset_data(COOKIE, 4096, 512, true)[..], data.concat());
        let hole = [
            &magic[..],
            &[0, 0, 0, 2],
            &COOKIE_BYTES,
            &[0, 0, 0, 12],
            &[0, 0, 0, 0, 0, 0, 16, 0],
            &[0, 0, 2, 0],
        ];
        assert_eq!(offset_hole(COOKIE, 4096, 512, false)[..], hole.concat());
        let failed = [
            &magic[..],
            &[0, 1, 0x80, 1],
            &COOKIE_BYTES,
            &[0, 0, 0, 9],
            &[0, 0, 0, 5],
            &[0, 3],
            b"why",
        ];
        assert_eq!(error(COOKIE, WireError::Io, "why")[..], failed.concat());
        let runs = [
            (4096, BlockKind::Data),
            (512, BlockKind::Hole),
            (8, BlockKind::AllocatedZero),
        ];
        let status = [
            &magic[..],
            &[0, 1, 0, 5],
            &COOKIE_BYTES,
            &[0, 0, 0, 28, 0, 0, 0, 1],
            &[0, 0, 16, 0, 0, 0, 0, 0],
            &[0, 0, 2, 0, 0, 0, 0, 3],
            &[0, 0, 0, 8, 0, 0, 0, 2],
        ];
        assert_eq!(block_status(COOKIE, 1, &runs)[..], status.concat());
    }

    #[test]
    fn the_largest_block_status_is_as_large_as_said() {
        let runs = vec![(512, BlockKind::Data); BLOCK_STATUS_RUNS_MAX];
        assert_eq!(block_status(COOKIE, 1, &runs).len(), BLOCK_STATUS_BYTES_MAX);
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(clip("äöü", 3), "ä");
        assert_eq!(clip("äöü", 0), "");
        assert_eq!(clip("abc", 9), "abc");
        let long = error(COOKIE, WireError::Io, &"ü".repeat(4000));
        assert_eq!(long.len(), CHUNK_BYTES + 6 + 1024);
    }
}
