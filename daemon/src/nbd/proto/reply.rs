//! Replies of the transmission phase.
//!
//! ```text
//! simple:     | magic u32 | error u32 | cookie u64 | data (a successful READ) |
//! structured: | magic u32 | flags u16 | type u16 | cookie u64 | length u32 | payload |
//! extended:   | magic u32 | flags u16 | type u16 | cookie u64 | offset u64 (the request's) | length u64 | payload |
//! ```
//!
//! Encoders return headers; data follows from the buffers it was read into, without a copy.

use libvol::volume::BlockKind;

use super::request::Cookie;
use super::{Context, Contexts, Framing, WireError, Writer};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

const FLAG_DONE: u16 = 1;

const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_BLOCK_STATUS_EXT: u16 = 6;
const TYPE_ERROR: u16 = (1 << 15) + 1;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// Runs one BLOCK_STATUS reply may hold, of each context.
pub(in crate::nbd) const BLOCK_STATUS_RUNS_MAX: usize = 1024;

/// The reply of that many runs of every context: chunk headers, contexts' ids, and 8 or 16 bytes a run.
pub(in crate::nbd) const fn block_status_bytes_max(extended: bool) -> usize {
    let one = match extended {
        false => CHUNK_BYTES + 4 + 8 * BLOCK_STATUS_RUNS_MAX,
        true => EXTENDED_CHUNK_BYTES + 8 + 16 * BLOCK_STATUS_RUNS_MAX,
    };
    Context::ALL.len() * one
}

/// Bytes of a chunk before its payload: 4 + 2 + 2 + 8 + 4.
const CHUNK_BYTES: usize = 20;
/// Bytes of an extended one: 4 + 2 + 2 + 8 + 8 + 8.
const EXTENDED_CHUNK_BYTES: usize = 32;
/// The longest of the headers below: an extended chunk with offset and length of a hole.
const HEAD_BYTES_MAX: usize = EXTENDED_CHUNK_BYTES + 12;

/// A simple reply; `None` is success.
pub(in crate::nbd) fn simple(cookie: Cookie, error: Option<WireError>) -> [u8; 16] {
    Writer::new()
        .put(SIMPLE_MAGIC.to_be_bytes())
        .put(error.map_or(0, |e| e as u32).to_be_bytes())
        .put(cookie.number.to_be_bytes())
        .done()
}

/// The beginning of a reply, of a length that depends on the framing.
#[derive(Clone, Copy)]
pub(in crate::nbd) struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: usize,
}

impl std::ops::Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Head {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len();
    }

    /// A chunk's header; `fields` are the beginning of its payload of `payload_len` bytes.
    fn chunk(
        framing: Framing,
        done: bool,
        kind: u16,
        cookie: Cookie,
        payload_len: u32,
        fields: &[u8],
    ) -> Self {
        let mut head = Self {
            bytes: [0; HEAD_BYTES_MAX],
            len: 0,
        };
        let extended = framing == Framing::Extended;
        let magic = if extended {
            EXTENDED_MAGIC
        } else {
            STRUCTURED_MAGIC
        };
        head.put(&magic.to_be_bytes());
        head.put(&(if done { FLAG_DONE } else { 0 }).to_be_bytes());
        head.put(&kind.to_be_bytes());
        head.put(&cookie.number.to_be_bytes());
        match extended {
            false => head.put(&payload_len.to_be_bytes()),
            true => {
                head.put(&cookie.offset.to_be_bytes());
                head.put(&u64::from(payload_len).to_be_bytes());
            }
        }
        head.put(fields);
        head
    }
}

/// Success without content.
pub(in crate::nbd) fn none(framing: Framing, cookie: Cookie) -> Head {
    Head::chunk(framing, true, TYPE_NONE, cookie, 0, &[])
}

/// What precedes `len` bytes of data at `offset`.
pub(in crate::nbd) fn offset_data(
    framing: Framing,
    cookie: Cookie,
    offset: u64,
    len: u32,
    done: bool,
) -> Head {
    Head::chunk(
        framing,
        done,
        TYPE_OFFSET_DATA,
        cookie,
        8 + len,
        &offset.to_be_bytes(),
    )
}

/// `len` zero bytes at `offset`, none of them sent.
pub(in crate::nbd) fn offset_hole(
    framing: Framing,
    cookie: Cookie,
    offset: u64,
    len: u32,
    done: bool,
) -> Head {
    let fields: [u8; 12] = Writer::new()
        .put(offset.to_be_bytes())
        .put(len.to_be_bytes())
        .done();
    Head::chunk(framing, done, TYPE_OFFSET_HOLE, cookie, 12, &fields)
}

/// A final error chunk with its text.
pub(in crate::nbd) fn error(framing: Framing, cookie: Cookie, error: WireError, text: &str) -> Box<[u8]> {
    let text = clip(text, 1024);
    let head = Head::chunk(framing, true, TYPE_ERROR, cookie, 6 + text.len() as u32, &[]);
    let mut bytes = Vec::with_capacity(head.len() + 6 + text.len());
    bytes.extend(&*head);
    bytes.extend((error as u32).to_be_bytes());
    bytes.extend((text.len() as u16).to_be_bytes());
    bytes.extend(text.as_bytes());
    bytes.into()
}

/// A block-status reply: `runs` in order from the request's offset, in a chunk for each context.
pub(in crate::nbd) fn block_status(
    framing: Framing,
    cookie: Cookie,
    contexts: Contexts,
    runs: &[(u64, BlockKind)],
) -> Box<[u8]> {
    assert!(!runs.is_empty() && runs.len() <= BLOCK_STATUS_RUNS_MAX && !contexts.is_empty());
    let last = contexts.iter().last();
    let mut bytes = Vec::with_capacity(block_status_bytes_max(framing == Framing::Extended));
    for context in contexts.iter() {
        let done = Some(context) == last;
        let states = runs.iter().map(|(len, kind)| (*len, state(context, *kind)));
        match framing {
            Framing::Simple | Framing::Structured => {
                let payload_len = 4 + 8 * runs.len() as u32;
                bytes.extend(&*Head::chunk(
                    framing,
                    done,
                    TYPE_BLOCK_STATUS,
                    cookie,
                    payload_len,
                    &[],
                ));
                bytes.extend((context as u32).to_be_bytes());
                for (len, state) in states {
                    let len = u32::try_from(len).expect("a compact request asks for less than 4 GiB");
                    bytes.extend(len.to_be_bytes());
                    bytes.extend(state.to_be_bytes());
                }
            }
            Framing::Extended => {
                let payload_len = 8 + 16 * runs.len() as u32;
                bytes.extend(&*Head::chunk(
                    framing,
                    done,
                    TYPE_BLOCK_STATUS_EXT,
                    cookie,
                    payload_len,
                    &[],
                ));
                bytes.extend((context as u32).to_be_bytes());
                bytes.extend((runs.len() as u32).to_be_bytes());
                for (len, state) in states {
                    bytes.extend(len.to_be_bytes());
                    bytes.extend(u64::from(state).to_be_bytes());
                }
            }
        }
    }
    bytes.into()
}

fn state(context: Context, kind: BlockKind) -> u32 {
    match (context, kind) {
        (Context::Allocation, BlockKind::Data) => 0,
        (Context::Allocation, BlockKind::AllocatedZero) => STATE_ZERO,
        (Context::Allocation, BlockKind::Hole) => STATE_HOLE | STATE_ZERO,
        (Context::Depth, BlockKind::Data | BlockKind::AllocatedZero) => 1,
        (Context::Depth, BlockKind::Hole) => 0,
    }
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

    const COOKIE: Cookie = Cookie {
        number: 0x0102_0304_0506_0708,
        offset: 0x1112_1314_1516_1718,
    };
    const S: Framing = Framing::Structured;
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
        assert_eq!(offset_data(S, COOKIE, 4096, 512, true)[..], data.concat());
        let hole = [
            &magic[..],
            &[0, 0, 0, 2],
            &COOKIE_BYTES,
            &[0, 0, 0, 12],
            &[0, 0, 0, 0, 0, 0, 16, 0],
            &[0, 0, 2, 0],
        ];
        assert_eq!(offset_hole(S, COOKIE, 4096, 512, false)[..], hole.concat());
        let failed = [
            &magic[..],
            &[0, 1, 0x80, 1],
            &COOKIE_BYTES,
            &[0, 0, 0, 9],
            &[0, 0, 0, 5],
            &[0, 3],
            b"why",
        ];
        assert_eq!(error(S, COOKIE, WireError::Io, "why")[..], failed.concat());
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
        assert_eq!(
            block_status(S, COOKIE, Contexts::default().with(Context::Allocation), &runs)[..],
            status.concat()
        );
    }

    #[test]
    fn extended_replies_repeat_the_offset_and_have_64_bit_lengths() {
        let magic = [0x6e, 0x8a, 0x27, 0x8c];
        let offset = [0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18];
        let hole = [
            &magic[..],
            &[0, 1, 0, 2],
            &COOKIE_BYTES,
            &offset,
            &[0, 0, 0, 0, 0, 0, 0, 12],
            &[0, 0, 0, 0, 0, 0, 16, 0],
            &[0, 0, 2, 0],
        ];
        assert_eq!(
            offset_hole(Framing::Extended, COOKIE, 4096, 512, true)[..],
            hole.concat()
        );
        let runs = [(1 << 40, BlockKind::Hole), (4096, BlockKind::Data)];
        let depth = Contexts::default().with(Context::Depth);
        let status = [
            &magic[..],
            &[0, 1, 0, 6],
            &COOKIE_BYTES,
            &offset,
            &[0, 0, 0, 0, 0, 0, 0, 40],
            &[0, 0, 0, 2, 0, 0, 0, 2],
            &[0, 0, 1, 0, 0, 0, 0, 0],
            &[0; 8],
            &[0, 0, 0, 0, 0, 0, 16, 0],
            &[0, 0, 0, 0, 0, 0, 0, 1],
        ];
        assert_eq!(
            block_status(Framing::Extended, COOKIE, depth, &runs)[..],
            status.concat()
        );
        // Of several chunks only the last one ends the reply.
        let both = block_status(Framing::Structured, COOKIE, Contexts::all(), &runs[1..]);
        assert_eq!((both[5], both[20 + 4 + 8 + 5]), (0, 1));
    }

    #[test]
    fn the_largest_block_status_is_as_large_as_said() {
        let runs = vec![(512, BlockKind::Data); BLOCK_STATUS_RUNS_MAX];
        for framing in [Framing::Structured, Framing::Extended] {
            let len = block_status(framing, COOKIE, Contexts::all(), &runs).len();
            assert_eq!(len, block_status_bytes_max(framing == Framing::Extended));
        }
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(clip("äöü", 3), "ä");
        assert_eq!(clip("äöü", 0), "");
        assert_eq!(clip("abc", 9), "abc");
        let long = error(S, COOKIE, WireError::Io, &"ü".repeat(4000));
        assert_eq!(long.len(), CHUNK_BYTES + 6 + 1024);
    }
}
