//! Reads what the server says in the transmission phase, chunk by chunk, and holds it to the script and to what the device
//! did. Written apart from the server's encoder.

use std::rc::Rc;

use libvol::volume::BlockKind;

use super::device::{Fake, Pieces};
use super::script::{ALLOCATION, BLOCK_STATUS, DEPTH, Expected, READ, Script, Terms, be16, be32, be64};
use crate::nbd::proto::Framing;

/// See the module's text.
pub(super) struct Replies {
    script: Rc<Script>,
    terms: Terms,
    device: Rc<Fake>,
    bytes: Vec<u8>,
    /// Bytes of `bytes` that were read.
    read: usize,
    so_far: Vec<SoFar>,
    finished: usize,
}

/// Of a reply.
#[derive(Default)]
struct SoFar {
    finished: bool,
    pieces: Pieces,
    /// What was described, data and holes: how far, from the request's offset on.
    described: u64,
    contents: usize,
    /// Context and runs.
    statuses: Vec<(u32, Vec<(u64, u64)>)>,
}

impl Replies {
    pub(super) fn new(script: Rc<Script>, terms: Terms, device: Rc<Fake>) -> Self {
        let so_far = script.requests.iter().map(|_| SoFar::default()).collect();
        Self {
            script,
            terms,
            device,
            bytes: Vec::new(),
            read: 0,
            so_far,
            finished: 0,
        }
    }

    /// Whether every whole request has its reply.
    pub(super) fn all_here(&self) -> bool {
        self.finished == self.script.requests.len()
    }

    /// Whether the last chunk is whole.
    pub(super) fn ends_between(&self) -> bool {
        self.read == self.bytes.len()
    }

    /// Takes what came.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        if self.read > 1 << 16 {
            self.bytes.drain(..self.read);
            self.read = 0;
        }
        self.bytes.extend(bytes);
        while let Some(len) = self.chunk() {
            self.read += len;
        }
    }

    /// Reads a chunk; its length. `None` when it is not whole yet.
    fn chunk(&mut self) -> Option<usize> {
        let bytes = &self.bytes[self.read..];
        let magic = bytes.first_chunk::<4>()?;
        match magic {
            b"\x67\x44\x66\x98" => self.simple(),
            b"\x66\x8e\x33\xef" if self.terms.framing == Framing::Structured => self.structured(20),
            b"\x6e\x8a\x27\x8c" if self.terms.framing == Framing::Extended => self.structured(32),
            other => panic!("out of step: a reply that begins with {other:02x?}"),
        }
    }

    fn simple(&mut self) -> Option<usize> {
        let bytes = &self.bytes[self.read..];
        let header = bytes.get(..16)?;
        let (error, index) = (be32(&header[4..]), self.script.of_cookie(be64(&header[8..])));
        let request = &self.script.requests[index];
        match self.terms.framing {
            Framing::Simple => {}
            Framing::Structured => assert!(
                request.command != READ && (request.command != BLOCK_STATUS || error != 0),
                "a simple reply where only a structured one will do"
            ),
            Framing::Extended => panic!("a simple reply after extended headers"),
        }
        let len = match request.command == READ && error == 0 {
            true => request.len as usize,
            false => 0,
        };
        let data = bytes.get(16..16 + len)?;
        let pieces = match len {
            0 => Pieces::new(),
            _ => vec![(request.offset, data.to_vec())],
        };
        let so_far = &mut self.so_far[index];
        so_far.described = len as u64;
        so_far.pieces = pieces;
        self.finish(index, error);
        Some(16 + len)
    }

    fn structured(&mut self, header_bytes: usize) -> Option<usize> {
        let bytes = &self.bytes[self.read..];
        let header = bytes.get(..header_bytes)?;
        let (flags, kind) = (be16(&header[4..]), be16(&header[6..]));
        let index = self.script.of_cookie(be64(&header[8..]));
        let request = &self.script.requests[index];
        let len = match header_bytes {
            20 => u64::from(be32(&header[16..])),
            _ => {
                // A request's own offset, as the client wrote it.
                assert_eq!(
                    be64(&header[16..]),
                    request.offset,
                    "the offset of another request"
                );
                be64(&header[24..])
            }
        };
        assert!(len <= (32 << 20) + 8, "a chunk of {len} bytes");
        let payload = bytes.get(header_bytes..header_bytes + len as usize)?.to_vec();
        assert!(!self.so_far[index].finished, "two replies to one request");
        assert!(flags <= 1, "chunk flags {flags:#x}");
        let error = self.content(index, kind, &payload);
        match flags == 1 {
            true => self.finish(index, error),
            false => assert_eq!(error, 0, "an error that does not end the reply"),
        }
        Some(header_bytes + payload.len())
    }

    /// A chunk's payload; the error in it.
    fn content(&mut self, index: usize, kind: u16, payload: &[u8]) -> u32 {
        let (request, so_far) = (&self.script.requests[index], &mut self.so_far[index]);
        match kind {
            0 => assert!(payload.is_empty(), "a chunk of nothing with something in it"),
            1 | 2 => {
                assert_eq!(request.command, READ, "content for what is no read");
                let at = be64(payload);
                let len = match kind {
                    1 => payload.len() as u64 - 8,
                    _ => {
                        assert_eq!(payload.len(), 12);
                        be32(&payload[8..]).into()
                    }
                };
                assert!(len > 0, "a chunk describes at least a byte");
                assert_eq!(at, request.offset + so_far.described, "content out of its place");
                so_far.described += len;
                so_far.contents += 1;
                assert!(so_far.described <= request.len, "more than was asked for");
                if kind == 1 {
                    so_far.pieces.push((at, payload[8..].to_vec()));
                }
            }
            5 | 6 => {
                assert_eq!(request.command, BLOCK_STATUS, "a status for what asked none");
                let extended = self.terms.framing == Framing::Extended;
                assert_eq!(kind, if extended { 6 } else { 5 });
                let runs: Vec<(u64, u64)> = match extended {
                    false => payload[4..]
                        .chunks(8)
                        .map(|run| (be32(run).into(), be32(&run[4..]).into()))
                        .collect(),
                    true => payload[8..]
                        .chunks(16)
                        .map(|run| (be64(run), be64(&run[8..])))
                        .collect(),
                };
                assert!(!extended || be32(&payload[4..]) as usize == runs.len());
                so_far.statuses.push((be32(payload), runs));
            }
            0x8001 => {
                let text = str::from_utf8(&payload[6..]).expect("a text");
                assert_eq!(be16(&payload[4..]) as usize, text.len());
                assert!(!text.contains("secret-store"), "what no client may hear: {text}");
                assert_ne!(be32(payload), 0, "an error that is none");
                return be32(payload);
            }
            other => panic!("a chunk of type {other:#x}"),
        }
        0
    }

    fn finish(&mut self, index: usize, error: u32) {
        let (request, so_far) = (&self.script.requests[index], &mut self.so_far[index]);
        assert!(!so_far.finished, "two replies to one request");
        so_far.finished = true;
        self.finished += 1;
        assert_eq!(error, request.error, "the answer to {request:?}");
        assert!(
            !request.at_device || self.device.has_done(index),
            "replied to before it was done: {request:?}"
        );
        let reply = std::mem::take(so_far);
        so_far.finished = true;
        match request.command {
            READ if error == 0 => reply.check_read(request, self.terms.framing, &self.device),
            BLOCK_STATUS if error == 0 => reply.check_status(request, &self.device),
            _ => assert!(
                reply.contents == 0 && reply.statuses.is_empty() && reply.pieces.is_empty(),
                "content for {request:?}"
            ),
        }
    }
}

impl SoFar {
    fn check_read(self, request: &Expected, framing: Framing, device: &Fake) {
        assert_eq!(self.described, request.len, "not all that was read: {request:?}");
        if request.len == 0 {
            return;
        }
        assert!(
            framing == Framing::Simple || !request.unfragmented || self.contents == 1,
            "fragments where none were wanted"
        );
        let read = device.take_read(request.offset, request.len, |data| same(&self.pieces, data));
        assert!(read, "not what the device has read: {request:?}");
    }

    fn check_status(self, request: &Expected, device: &Fake) {
        let states = |context: u32, kind: BlockKind| match (context, kind) {
            (1, BlockKind::Data) | (2, BlockKind::Hole) => 0,
            (1, BlockKind::AllocatedZero) => 2,
            (1, BlockKind::Hole) => 3,
            (2, _) => 1,
            _ => panic!("a status of context {context}"),
        };
        let ids: Vec<u32> = self.statuses.iter().map(|(id, _)| *id).collect();
        let asked: Vec<u32> = [(ALLOCATION, 1), (DEPTH, 2)]
            .iter()
            .filter(|(bit, _)| request.contexts & bit != 0)
            .map(|(_, id)| *id)
            .collect();
        assert_eq!(ids, asked, "contexts of {request:?}");
        for (_, runs) in &self.statuses {
            let total: u64 = runs.iter().map(|(len, _)| len).sum();
            assert!(runs.iter().all(|(len, _)| *len > 0) && total <= request.len);
            assert!(
                !request.one || runs.len() == 1,
                "more than one run of {request:?}"
            );
        }
        let status = device.take_status(request.offset, request.len, |kinds| {
            self.statuses.iter().all(|(id, runs)| {
                let said = kinds.iter().map(|(len, kind)| (*len, states(*id, *kind)));
                said.eq(runs.iter().copied())
            })
        });
        assert!(status, "not what the device has said: {request:?}");
    }
}

/// Whether what was sent, in order, is this data, in order, with zeros around it.
fn same(sent: &Pieces, data: &Pieces) -> bool {
    let mut data = data.iter().map(|(at, bytes)| (*at, &bytes[..])).peekable();
    for (at, bytes) in sent {
        let (mut at, mut rest) = (*at, &bytes[..]);
        while !rest.is_empty() {
            let zeros = match data.peek().map(|(next, _)| next.checked_sub(at)) {
                Some(Some(gap)) => usize::try_from(gap).unwrap_or(usize::MAX).min(rest.len()),
                // Data that was not sent: another read of the same place.
                Some(None) => return false,
                None => rest.len(),
            };
            if zeros > 0 {
                if !all_zeros(&rest[..zeros]) {
                    return false;
                }
                (at, rest) = (at + zeros as u64, &rest[zeros..]);
                continue;
            }
            // What was sent in one piece may have been read in several.
            let Some((_, piece)) = data.next() else {
                return false;
            };
            if rest.get(..piece.len()) != Some(piece) {
                return false;
            }
            (at, rest) = (at + piece.len() as u64, &rest[piece.len()..]);
        }
    }
    data.next().is_none()
}

fn all_zeros(bytes: &[u8]) -> bool {
    static ZEROS: [u8; 4096] = [0; 4096];
    bytes
        .chunks(ZEROS.len())
        .all(|chunk| *chunk == ZEROS[..chunk.len()])
}
