//! The front-end's socket: messages with descriptors, in both directions, without ever blocking.
//!
//! Waiting is the runtime's; receiving and sending are tried and not waited for. A front-end that does not read its replies
//! until the socket is full has broken the protocol, which has at most a few of them under way.
//!
//! Descriptors are the dangerous part: to close the last reference to somebody else's file can take as long as that
//! somebody likes. So none is closed here, not even one too many, and the kernel closes none either: there is always room
//! for as many as one message can carry.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use libvol::runtime::net::Stream;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::message::{HEADER_BYTES, Header, Violation};
use super::meter::Meter;
use crate::leavings::Leavings;

/// Descriptors that one message can carry: the kernel's SCM_MAX_FD.
const DESCRIPTORS_MAX: usize = 253;

/// How a conversation ends.
#[derive(Debug)]
pub(super) enum End {
    /// The front-end has gone, or was cut off.
    Gone,
    /// Its bytes cannot be followed.
    Violation(&'static str),
    /// What it asks is not done, and it does not wait to be told.
    Refused(String),
    /// The socket failed.
    Failed(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the front-end has gone"),
            Self::Violation(what) => f.write_str(what),
            Self::Refused(what) => f.write_str(what),
            Self::Failed(e) => write!(f, "its socket failed: {e}"),
        }
    }
}

impl From<Violation> for End {
    fn from(Violation(what): Violation) -> Self {
        End::Violation(what)
    }
}

/// A message as it came.
pub(super) struct Received {
    /// Its header.
    pub(super) header: Header,
    /// As long as the header says.
    pub(super) payload: Vec<u8>,
    /// What came with it.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// See the module's text.
pub(super) struct Channel {
    stream: Stream,
    meter: Rc<Meter>,
}

impl Channel {
    /// A channel over a connected stream. What it costs is counted.
    pub(super) fn new(stream: Stream, meter: Rc<Meter>) -> Self {
        Self { stream, meter }
    }

    /// The next message. Descriptors of one that stays incomplete go to `leavings`.
    ///
    /// # Errors
    /// How the conversation ends.
    pub(super) async fn receive(&self, leavings: &Leavings) -> Result<Received, End> {
        let mut descriptors = Vec::new();
        let received = self.receive_parts(&mut descriptors).await;
        match received {
            Ok((header, payload)) => Ok(Received {
                header,
                payload,
                descriptors,
            }),
            Err(end) => {
                leavings.put_all(descriptors);
                Err(end)
            }
        }
    }

    async fn receive_parts(&self, descriptors: &mut Vec<OwnedFd>) -> Result<(Header, Vec<u8>), End> {
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header, descriptors).await?;
        let header = Header::decode(&header)?;
        let mut payload = vec![0; header.payload_bytes];
        self.fill(&mut payload, descriptors).await?;
        Ok((header, payload))
    }

    async fn fill(&self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<(), End> {
        let mut filled = 0;
        while filled < bytes.len() {
            let socket = self.stream.socket().as_fd();
            let received = self
                .meter
                .spend(|| receive_now(socket, &mut bytes[filled..], descriptors));
            match received {
                Ok(0) => return Err(End::Gone),
                Ok(count) => filled += count,
                Err(Errno::AGAIN) => self.stream.readable().await,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(End::Gone),
                Err(e) => return Err(End::Failed(e.into())),
            }
            if descriptors.len() > DESCRIPTORS_MAX {
                return Err(End::Violation("too many descriptors with one message"));
            }
        }
        Ok(())
    }

    /// Sends a message, all of it and now.
    ///
    /// # Errors
    /// How the conversation ends.
    pub(super) fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<(), End> {
        let socket = self.stream.socket().as_fd();
        self.meter.spend(|| send_now(socket, bytes, descriptor))
    }
}

/// Sends a message over any stream socket of the Unix domain.
pub(super) fn send_now(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), End> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "there is room for one");
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        return match sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
            // A stream takes small messages whole or not at all.
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) | Err(Errno::AGAIN) => Err(End::Violation("replies that are not read")),
            Err(Errno::INTR) => continue,
            Err(Errno::PIPE | Errno::CONNRESET) => Err(End::Gone),
            Err(e) => Err(End::Failed(e.into())),
        };
    }
}

/// What has been received, if something has.
pub(super) fn receive_now(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    // With room for all that can come, only a full table of descriptors cuts some off.
    match received.flags.contains(ReturnFlags::CTRUNC) {
        true => Err(Errno::MFILE),
        false => Ok(received.bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use libvol::disk::{EngineChoice, make_driver};
    use libvol::runtime::{Runtime, spawn, yield_now};
    use rustix::event::{EventfdFlags, eventfd};

    use super::super::message::reply;
    use super::*;

    fn on_both<F: Future<Output = ()> + 'static>(test: impl Fn(UnixStream, Channel) -> F) {
        for engine in [EngineChoice::Threads, EngineChoice::Uring] {
            let runtime = Runtime::new(
                make_driver(engine)
                    .expect("both engines run where the tests run")
                    .0,
            );
            let (ours, theirs) = UnixStream::pair().unwrap();
            let channel = Channel::new(Stream::new(ours.into()), Rc::new(Meter::new()));
            runtime.block_on(test(theirs, channel));
        }
    }

    /// A request with a payload: the shape of a reply, without its flag.
    fn request(number: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = reply(number, payload);
        bytes[4..8].copy_from_slice(&1u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn messages_come_whole_however_they_are_cut_and_descriptors_stay_with_theirs() {
        on_both(|theirs, channel| async move {
            let leavings = Leavings::default();
            let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let (first, second) = (request(2, &7u64.to_ne_bytes()), request(12, &3u64.to_ne_bytes()));
            let sender = spawn(async move {
                let mut bytes = first;
                let cut = bytes.len();
                bytes.extend(second);
                for (at, byte) in bytes.iter().enumerate() {
                    let with = (at == cut).then(|| event.as_fd());
                    send_now(theirs.as_fd(), &[*byte], with).unwrap();
                    yield_now().await;
                }
            });
            let first = channel.receive(&leavings).await.unwrap();
            assert_eq!(
                (first.header.request, first.payload.len(), first.descriptors.len()),
                (2, 8, 0)
            );
            let second = channel.receive(&leavings).await.unwrap();
            assert_eq!((second.header.request, second.descriptors.len()), (12, 1));
            sender.await;
            assert!(matches!(channel.receive(&leavings).await, Err(End::Gone)));
        });
    }

    #[test]
    fn what_comes_with_half_a_message_is_left_to_be_closed_elsewhere() {
        on_both(|theirs, channel| async move {
            let leavings = Leavings::default();
            let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let bytes = request(12, &3u64.to_ne_bytes());
            send_now(theirs.as_fd(), &bytes[..14], Some(event.as_fd())).unwrap();
            drop(theirs);
            assert!(matches!(channel.receive(&leavings).await, Err(End::Gone)));
            leavings.all_closed().await;
        });
    }

    #[test]
    fn a_front_end_that_reads_no_replies_ends_the_conversation_and_blocks_nobody() {
        on_both(|theirs, channel| async move {
            let bytes = reply(1, &[0; 8]);
            let sent = (0..1_000_000).find_map(|_| channel.send(&bytes, None).err());
            assert!(matches!(sent, Some(End::Violation(_))), "{sent:?}");
            drop(theirs);
        });
    }
}
