//! vhost-user messages over a socket: any request, any bytes, any descriptors. Numbers are the protocol's (QEMU,
//! docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types").

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::PATIENCE;

/// VHOST_USER_GET_FEATURES.
pub const GET_FEATURES: u32 = 1;
/// VHOST_USER_SET_FEATURES.
pub const SET_FEATURES: u32 = 2;
/// VHOST_USER_SET_OWNER.
pub const SET_OWNER: u32 = 3;
/// VHOST_USER_SET_MEM_TABLE.
pub const SET_MEM_TABLE: u32 = 5;
/// VHOST_USER_SET_LOG_BASE.
pub const SET_LOG_BASE: u32 = 6;
/// VHOST_USER_SET_VRING_NUM.
pub const SET_VRING_NUM: u32 = 8;
/// VHOST_USER_SET_VRING_ADDR.
pub const SET_VRING_ADDR: u32 = 9;
/// VHOST_USER_SET_VRING_BASE.
pub const SET_VRING_BASE: u32 = 10;
/// VHOST_USER_GET_VRING_BASE.
pub const GET_VRING_BASE: u32 = 11;
/// VHOST_USER_GET_VRING_BASE_SKIP_DRAIN.
pub const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
/// VHOST_USER_SET_VRING_KICK.
pub const SET_VRING_KICK: u32 = 12;
/// VHOST_USER_SET_VRING_CALL.
pub const SET_VRING_CALL: u32 = 13;
/// VHOST_USER_GET_PROTOCOL_FEATURES.
pub const GET_PROTOCOL_FEATURES: u32 = 15;
/// VHOST_USER_SET_PROTOCOL_FEATURES.
pub const SET_PROTOCOL_FEATURES: u32 = 16;
/// VHOST_USER_GET_QUEUE_NUM.
pub const GET_QUEUE_NUM: u32 = 17;
/// VHOST_USER_SET_VRING_ENABLE.
pub const SET_VRING_ENABLE: u32 = 18;
/// VHOST_USER_SET_BACKEND_REQ_FD.
pub const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_GET_CONFIG.
pub const GET_CONFIG: u32 = 24;
/// VHOST_USER_SET_VRING_ERR.
pub const SET_VRING_ERR: u32 = 14;
/// VHOST_USER_SET_CONFIG.
pub const SET_CONFIG: u32 = 25;
/// VHOST_USER_GET_INFLIGHT_FD.
pub const GET_INFLIGHT_FD: u32 = 31;
/// VHOST_USER_SET_INFLIGHT_FD.
pub const SET_INFLIGHT_FD: u32 = 32;
/// VHOST_USER_RESET_DEVICE.
pub const RESET_DEVICE: u32 = 34;
/// VHOST_USER_GET_MAX_MEM_SLOTS.
pub const GET_MAX_MEM_SLOTS: u32 = 36;
/// VHOST_USER_ADD_MEM_REG.
pub const ADD_MEM_REG: u32 = 37;
/// VHOST_USER_REM_MEM_REG.
pub const REM_MEM_REG: u32 = 38;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, which the back-end sends.
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// Feature bit of GET_FEATURES: there are protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Feature bit of GET_FEATURES: writes to guest memory are logged.
pub const F_LOG_ALL: u64 = 1 << 26;

/// Protocol feature MQ.
pub const PF_MQ: u64 = 1 << 0;
/// Protocol feature LOG_SHMFD.
pub const PF_LOG_SHMFD: u64 = 1 << 1;
/// Protocol feature REPLY_ACK.
pub const PF_REPLY_ACK: u64 = 1 << 3;
/// Protocol feature BACKEND_REQ.
pub const PF_BACKEND_REQ: u64 = 1 << 5;
/// Protocol feature CONFIG.
pub const PF_CONFIG: u64 = 1 << 9;
/// Protocol feature INFLIGHT_SHMFD.
pub const PF_INFLIGHT_SHMFD: u64 = 1 << 12;
/// Protocol feature RESET_DEVICE.
pub const PF_RESET_DEVICE: u64 = 1 << 13;
/// Protocol feature CONFIGURE_MEM_SLOTS.
pub const PF_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
/// Protocol feature GET_VRING_BASE_INFLIGHT.
pub const PF_GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
/// Protocol feature GET_VRING_BASE_SKIP_DRAIN.
pub const PF_GET_VRING_BASE_SKIP_DRAIN: u64 = 1 << 23;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// SCM_MAX_FD, the most that the kernel passes at once.
const DESCRIPTORS_MAX: usize = 253;

/// A message of the back-end.
#[derive(Debug)]
pub struct Message {
    /// Which.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Descriptors that came along.
    pub descriptors: Vec<OwnedFd>,
}

/// A connection.
pub struct Wire(UnixStream);

impl Wire {
    /// Connects.
    ///
    /// # Errors
    /// The socket's.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self::over(UnixStream::connect(socket)?))
    }

    /// Over a stream that is there already.
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        Self(stream)
    }

    /// Sends bytes that may be anything, with descriptors.
    ///
    /// # Errors
    /// The socket's.
    pub fn send_bytes(&self, mut bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        while !bytes.is_empty() {
            let sent = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
            bytes = &bytes[sent..];
            control.clear();
        }
        Ok(())
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&message(request, 0, payload), descriptors)
    }

    /// The next message of the back-end.
    ///
    /// # Errors
    /// The socket's; `UnexpectedEof` when the back-end hung up.
    pub fn receive(&self) -> io::Result<Message> {
        let mut descriptors = Vec::new();
        let mut header = [0; HEADER];
        self.fill(&mut header, &mut descriptors)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!(word(4) & 3, VERSION, "version of a message");
        assert!(word(8) <= 4096, "a message of {} bytes", word(8));
        let mut payload = vec![0; word(8) as usize];
        self.fill(&mut payload, &mut descriptors)?;
        Ok(Message {
            request: word(0),
            flags: word(4),
            payload,
            descriptors,
        })
    }

    fn fill(&self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes[filled..])],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            if received.bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            filled += received.bytes;
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(passed) = part {
                    descriptors.extend(passed);
                }
            }
        }
        Ok(())
    }

    /// A request that has an answer of its own; gives that.
    ///
    /// # Errors
    /// The socket's.
    pub fn ask(&self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<Message> {
        self.send(request, payload, descriptors)?;
        self.reply_to(request)
    }

    fn reply_to(&self, request: u32) -> io::Result<Message> {
        let reply = self.receive()?;
        assert_eq!(
            (reply.request, reply.flags & REPLY),
            (request, REPLY),
            "a reply to the request: {reply:?}"
        );
        Ok(reply)
    }

    /// A request that is answered with a number.
    ///
    /// # Errors
    /// The socket's.
    pub fn number(&self, request: u32) -> io::Result<u64> {
        let payload = self.ask(request, &[], &[])?.payload;
        Ok(u64::from_le_bytes(payload.try_into().expect("8 bytes")))
    }

    /// A request without an answer of its own, which is asked for with NEED_REPLY; gives it, 0 for success.
    ///
    /// # Errors
    /// The socket's.
    pub fn acknowledged(
        &self,
        request: u32,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<u64> {
        self.send_bytes(&message(request, NEED_REPLY, payload), descriptors)?;
        let payload = self.reply_to(request)?.payload;
        Ok(u64::from_le_bytes(payload.try_into().expect("8 bytes")))
    }

    /// The same where nothing but success will do.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// When the back-end says no.
    pub fn done(&self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let answer = self.acknowledged(request, payload, descriptors)?;
        assert_eq!(answer, 0, "request {request} was refused");
        Ok(())
    }

    /// Whether a request is refused: by its acknowledgement, or by the end of the connection.
    pub fn refuses(&self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        match self.acknowledged(request, payload, descriptors) {
            Ok(answer) => answer != 0,
            Err(e) => is_end(&e),
        }
    }

    /// Waits until the back-end has hung up. Messages that come before are taken.
    ///
    /// # Panics
    /// When it does not.
    pub fn ends(&self) {
        let mut bytes = [0; 4096];
        loop {
            match (&self.0).read(&mut bytes) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if is_end(&e) => return,
                Err(e) => panic!("the back-end must hang up: {e}"),
            }
        }
    }

    /// Whether the back-end has hung up by now.
    ///
    /// # Panics
    /// When the socket cannot be asked.
    pub fn has_ended(&self) -> bool {
        let mut byte = [0; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.0, &mut byte, flags) {
            Ok((_, received)) => received == 0,
            Err(e) => e != rustix::io::Errno::AGAIN,
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether an error says that the other side has hung up.
pub fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

/// A message as it goes over the wire.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = request.to_le_bytes().to_vec();
    bytes.extend((VERSION | flags).to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// A vring's state: its index and a number.
pub fn vring_state(index: u32, number: u32) -> [u8; 8] {
    (u64::from(index) | u64::from(number) << 32).to_le_bytes()
}

/// A memory region as it goes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address in the guest.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// Address in the front-end.
    pub user: u64,
    /// Offset within the descriptor.
    pub offset: u64,
}

impl Region {
    fn bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let words = [self.guest, self.len, self.user, self.offset];
        for (room, word) in bytes.chunks_exact_mut(8).zip(words) {
            room.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Payload of ADD_MEM_REG and REM_MEM_REG.
    pub fn single(&self) -> Vec<u8> {
        [&[0; 8][..], &self.bytes()].concat()
    }
}

/// Payload of SET_MEM_TABLE.
pub fn memory_table(regions: &[Region]) -> Vec<u8> {
    let mut bytes = (regions.len() as u64).to_le_bytes().to_vec();
    for region in regions {
        bytes.extend(region.bytes());
    }
    bytes
}
