//! The `msghdr` of an outgoing message, in memory that does not move.
//!
//! Owned by the engine beside its `Op::Send`, and only good while that op is kept. Reused, so that steady traffic
//! allocates nothing.

use std::ptr;

use crate::runtime::SendPart;

/// `IOV_MAX` of Linux: the most pieces one `sendmsg` takes. What does not fit goes with the next call.
const PIECES_MAX: usize = 1024;
/// Source of the zeros of [`SendPart::Zeros`].
static ZEROS: [u8; 65536] = [0; 65536];

/// See the module's text.
pub(super) struct Message {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
}

impl Message {
    pub(super) fn new() -> Box<Self> {
        // SAFETY: an all-zero msghdr is valid: no name, no pieces, no control data.
        let header = unsafe { std::mem::zeroed() };
        Box::new(Self {
            header,
            pieces: Vec::new(),
        })
    }

    /// Points at `parts` behind their first `skip` bytes. The caller keeps `parts` unchanged while the header is used.
    pub(super) fn point_at(self: &mut Box<Self>, parts: &[SendPart], mut skip: usize) -> *const libc::msghdr {
        self.pieces.clear();
        for part in parts {
            let len = part.len();
            if skip >= len {
                skip -= len;
                continue;
            }
            match part {
                SendPart::Inline { bytes, .. } => self.push(&bytes[skip..len]),
                SendPart::Bytes(bytes) => self.push(&bytes[skip..]),
                SendPart::Buf { buf, range } => self.push(&buf[range.start + skip..range.end]),
                SendPart::Zeros(_) => {
                    let mut left = len - skip;
                    while left > 0 && self.pieces.len() < PIECES_MAX {
                        let piece = left.min(ZEROS.len());
                        self.push(&ZEROS[..piece]);
                        left -= piece;
                    }
                }
            }
            skip = 0;
            if self.pieces.len() >= PIECES_MAX {
                break;
            }
        }
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = self.pieces.len();
        ptr::from_ref(&self.header)
    }

    fn push(&mut self, bytes: &[u8]) {
        self.pieces.push(libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::Buf;

    fn flattened(message: &Message) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in &message.pieces {
            // SAFETY: the tests keep the parts alive and unchanged.
            out.extend_from_slice(unsafe {
                std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), piece.iov_len)
            });
        }
        out
    }

    #[test]
    fn every_number_of_bytes_sent_before_leaves_exactly_the_rest() {
        let parts = vec![
            SendPart::inline(b"head"),
            SendPart::Bytes(b"text".to_vec().into()),
            SendPart::Zeros(3),
            SendPart::Buf {
                buf: Buf::copy_of(b"..body.."),
                range: 2..6,
            },
            SendPart::Zeros(0),
        ];
        let whole = b"headtext\0\0\0body";
        let mut message = Message::new();
        for skip in 0..=whole.len() {
            message.point_at(&parts, skip);
            assert_eq!(flattened(&message), &whole[skip..], "after {skip} bytes");
        }
    }

    #[test]
    fn no_call_takes_more_pieces_than_the_kernel_allows() {
        let parts: Vec<_> = (0..3000).map(|_| SendPart::inline(b"x")).collect();
        let mut message = Message::new();
        message.point_at(&parts, 0);
        assert_eq!(message.pieces.len(), PIECES_MAX);
        message.point_at(&parts, 2990);
        assert_eq!(message.pieces.len(), 10);
        message.point_at(&[SendPart::Zeros(1 << 30)], 5);
        assert_eq!(message.pieces.len(), PIECES_MAX);
    }
}
