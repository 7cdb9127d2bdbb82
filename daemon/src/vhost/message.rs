//! vhost-user messages: bytes to values and back, without I/O.
//!
//! A message is a header of 12 bytes and a payload of exactly the size that its kind has (QEMU docs/interop/vhost-user,
//! "Message Specification"); everything is in the byte order of the host. What comes out of here has the right size and
//! names as many descriptors as its kind takes. Whether a queue's number, an address or a value makes sense is judged by
//! the session.

use super::memory::{REGIONS_MAX, Region};

/// Bytes of a header: request, flags, size of the payload.
pub(super) const HEADER_BYTES: usize = 12;
/// Bytes of the configuration space that messages can speak of.
pub(super) const CONFIG_BYTES_MAX: usize = 256;
/// Bytes of a region in a payload.
const REGION_BYTES: usize = 32;
/// The largest payload of the kinds below: a memory table with its count and padding.
pub(super) const PAYLOAD_BYTES_MAX: usize = 8 + REGIONS_MAX * REGION_BYTES;
const _: () = assert!(PAYLOAD_BYTES_MAX >= CONFIG_HEADER_BYTES + CONFIG_BYTES_MAX);
/// Offset, size and flags before a piece of configuration.
const CONFIG_HEADER_BYTES: usize = 12;

const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// In the payload of SET_VRING_KICK and the like: which queue, and that no descriptor comes with it.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;
/// In SET_VRING_ADDR: writes to the used ring are logged.
const VRING_FLAG_LOG: u32 = 1;

/// A back-end's message over its own channel: the configuration has changed ("Back-end message types").
const BACKEND_CONFIG_CHANGE: u32 = 2;

/// Numbers of the front-end's messages ("Front-end message types").
pub(super) mod number {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_LOG_FD: u32 = 7;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    pub(crate) const SET_STATUS: u32 = 39;
    pub(crate) const GET_STATUS: u32 = 40;
    pub(crate) const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
}

/// Why bytes are no message that can be followed. The conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation(pub(super) &'static str);

/// The front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// What is asked.
    pub(super) request: u32,
    /// The front-end waits for a reply, also to what has none by itself.
    pub(super) need_reply: bool,
    /// Bytes that follow.
    pub(super) payload_bytes: usize,
}

impl Header {
    /// From the first bytes of a message.
    ///
    /// # Errors
    /// When it is of another version, a reply, or longer than any message.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Violation> {
        let mut reader = Reader(bytes);
        let (request, flags, size) = (reader.u32()?, reader.u32()?, reader.u32()?);
        if flags & VERSION_MASK != VERSION {
            return Err(Violation("a message of another version"));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(Violation("a reply where nothing was asked"));
        }
        let payload_bytes = size as usize;
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(Violation("a message that is too long"));
        }
        Ok(Self {
            request,
            need_reply: flags & FLAG_NEED_REPLY != 0,
            payload_bytes,
        })
    }
}

/// Addresses of a ring, in the front-end's own address space; where the used ring is logged is a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UserAddresses {
    /// Descriptor table.
    pub(super) desc: u64,
    /// Available ring.
    pub(super) avail: u64,
    /// Used ring.
    pub(super) used: u64,
    /// Guest address that stands for the used ring in the dirty log.
    pub(super) log_used: Option<u64>,
}

/// An area for what is in flight, as both of its messages describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InflightShape {
    /// Its bytes.
    pub(super) len: u64,
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// Queues it is made for.
    pub(super) queues: u16,
    /// Their size.
    pub(super) queue_size: u16,
}

impl InflightShape {
    /// Its fields without padding, and as a C compiler pads the structure. Both are in use.
    const BYTES: [usize; 2] = [20, 24];

    fn read(payload: &[u8]) -> Result<Self, Violation> {
        let mut reader = Reader(payload);
        Ok(Self {
            len: reader.u64()?,
            offset: reader.u64()?,
            queues: reader.u16()?,
            queue_size: reader.u16()?,
        })
    }

    /// As a payload of `payload_bytes`, the size that the front-end's own had.
    pub(super) fn encode(&self, payload_bytes: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(payload_bytes);
        bytes.extend(self.len.to_ne_bytes());
        bytes.extend(self.offset.to_ne_bytes());
        bytes.extend(self.queues.to_ne_bytes());
        bytes.extend(self.queue_size.to_ne_bytes());
        bytes.resize(payload_bytes, 0);
        bytes
    }
}

/// What a front-end asks. Queues are given by their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<Region>),
    SetLogBase {
        len: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum {
        queue: u32,
        size: u32,
    },
    SetVringAddr {
        queue: u32,
        addresses: UserAddresses,
    },
    SetVringBase {
        queue: u32,
        base: u32,
    },
    /// It is stopped: after what is in flight, or at once.
    GetVringBase {
        queue: u32,
        skip_drain: bool,
    },
    SetVringKick {
        queue: u32,
        has_fd: bool,
    },
    SetVringCall {
        queue: u32,
        has_fd: bool,
    },
    SetVringErr {
        queue: u32,
        has_fd: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        queue: u32,
        on: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        len: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd(InflightShape),
    SetInflightFd(InflightShape),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(Region),
    RemMemReg(Region),
    SetStatus(u64),
    GetStatus,
    /// One that this back-end offers nothing for.
    Unknown(u32),
}

impl Message {
    /// From its header and payload.
    ///
    /// # Errors
    /// When the payload has not the size of its kind, or does not agree with itself.
    pub(super) fn decode(header: &Header, payload: &[u8]) -> Result<Self, Violation> {
        let mut reader = Reader(payload);
        let message = match header.request {
            number::GET_FEATURES => Self::GetFeatures,
            number::SET_FEATURES => Self::SetFeatures(reader.u64()?),
            number::SET_OWNER => Self::SetOwner,
            number::RESET_OWNER => Self::ResetOwner,
            number::SET_MEM_TABLE => {
                let count = reader.u32()? as usize;
                reader.skip(4)?;
                if count > REGIONS_MAX {
                    return Err(Violation("a memory table of too many regions"));
                }
                let regions = (0..count).map(|_| reader.region());
                Self::SetMemTable(regions.collect::<Result<_, _>>()?)
            }
            number::SET_LOG_BASE => Self::SetLogBase {
                len: reader.u64()?,
                offset: reader.u64()?,
            },
            number::SET_LOG_FD => Self::SetLogFd,
            number::SET_VRING_NUM => Self::SetVringNum {
                queue: reader.u32()?,
                size: reader.u32()?,
            },
            number::SET_VRING_ADDR => {
                let (queue, flags) = (reader.u32()?, reader.u32()?);
                // The order on the wire is this one, and no other's.
                let (desc, used, avail, log) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
                Self::SetVringAddr {
                    queue,
                    addresses: UserAddresses {
                        desc,
                        avail,
                        used,
                        log_used: (flags & VRING_FLAG_LOG != 0).then_some(log),
                    },
                }
            }
            number::SET_VRING_BASE => Self::SetVringBase {
                queue: reader.u32()?,
                base: reader.u32()?,
            },
            number::GET_VRING_BASE | number::GET_VRING_BASE_SKIP_DRAIN => {
                let queue = reader.u32()?;
                reader.skip(4)?;
                Self::GetVringBase {
                    queue,
                    skip_drain: header.request == number::GET_VRING_BASE_SKIP_DRAIN,
                }
            }
            number::SET_VRING_KICK => {
                let (queue, has_fd) = reader.queue_and_fd()?;
                Self::SetVringKick { queue, has_fd }
            }
            number::SET_VRING_CALL => {
                let (queue, has_fd) = reader.queue_and_fd()?;
                Self::SetVringCall { queue, has_fd }
            }
            number::SET_VRING_ERR => {
                let (queue, has_fd) = reader.queue_and_fd()?;
                Self::SetVringErr { queue, has_fd }
            }
            number::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            number::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(reader.u64()?),
            number::GET_QUEUE_NUM => Self::GetQueueNum,
            number::SET_VRING_ENABLE => {
                let queue = reader.u32()?;
                match reader.u32()? {
                    on @ (0 | 1) => Self::SetVringEnable { queue, on: on == 1 },
                    _ => return Err(Violation("a queue neither enabled nor disabled")),
                }
            }
            number::SET_BACKEND_REQ_FD => Self::SetBackendReqFd,
            number::GET_CONFIG => {
                let (offset, len, flags) = reader.config(payload.len())?;
                reader.skip(len as usize)?;
                Self::GetConfig { offset, len, flags }
            }
            number::SET_CONFIG => {
                let (offset, len, _) = reader.config(payload.len())?;
                Self::SetConfig {
                    offset,
                    bytes: reader.bytes(len as usize)?.to_vec(),
                }
            }
            number::GET_INFLIGHT_FD | number::SET_INFLIGHT_FD => {
                if !InflightShape::BYTES.contains(&payload.len()) {
                    return Err(Violation(
                        "a message whose payload has another size than its kind",
                    ));
                }
                let shape = InflightShape::read(payload)?;
                reader.skip(payload.len())?;
                match header.request {
                    number::GET_INFLIGHT_FD => Self::GetInflightFd(shape),
                    _ => Self::SetInflightFd(shape),
                }
            }
            number::RESET_DEVICE => Self::ResetDevice,
            number::GET_MAX_MEM_SLOTS => Self::GetMaxMemSlots,
            number::ADD_MEM_REG => {
                reader.skip(8)?;
                Self::AddMemReg(reader.region()?)
            }
            number::REM_MEM_REG => {
                reader.skip(8)?;
                Self::RemMemReg(reader.region()?)
            }
            number::SET_STATUS => Self::SetStatus(reader.u64()?),
            number::GET_STATUS => Self::GetStatus,
            other => return Ok(Self::Unknown(other)),
        };
        match reader.0 {
            [] => Ok(message),
            _ => Err(Violation(
                "a message whose payload has another size than its kind",
            )),
        }
    }

    /// Whether that many descriptors may come with it.
    pub(super) fn takes_descriptors(&self, count: usize) -> bool {
        match self {
            Self::SetMemTable(regions) => count == regions.len(),
            Self::SetVringKick { has_fd, .. }
            | Self::SetVringCall { has_fd, .. }
            | Self::SetVringErr { has_fd, .. } => count == usize::from(*has_fd),
            Self::SetLogBase { .. }
            | Self::SetLogFd
            | Self::SetBackendReqFd
            | Self::SetInflightFd(_)
            | Self::AddMemReg(_) => count == 1,
            // Some send one all the same; it is of no use.
            Self::RemMemReg(_) => count <= 1,
            Self::Unknown(_) => true,
            _ => count == 0,
        }
    }

    /// Whether a reply belongs to it, asked for or not.
    pub(super) fn has_reply(&self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::SetLogBase { .. }
                | Self::GetVringBase { .. }
                | Self::GetProtocolFeatures
                | Self::GetQueueNum
                | Self::GetConfig { .. }
                | Self::GetInflightFd(_)
                | Self::GetMaxMemSlots
                | Self::GetStatus
        )
    }
}

/// A reply to `request`.
pub(super) fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    encode(request, VERSION | FLAG_REPLY, payload)
}

/// The reply to GET_VRING_BASE, and to GET_VRING_BASE_SKIP_DRAIN.
pub(super) fn vring_base(queue: u32, base: u16) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&queue.to_ne_bytes());
    bytes[4..].copy_from_slice(&u32::from(base).to_ne_bytes());
    bytes
}

/// The reply to GET_CONFIG.
pub(super) fn config(offset: u32, flags: u32, config: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(CONFIG_HEADER_BYTES + config.len());
    bytes.extend(offset.to_ne_bytes());
    bytes.extend((config.len() as u32).to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(config);
    bytes
}

/// The back-end's own message that the configuration has changed; no answer is asked for.
pub(super) fn config_has_changed() -> Vec<u8> {
    encode(BACKEND_CONFIG_CHANGE, VERSION, &[])
}

fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend(request.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend((payload.len() as u32).to_ne_bytes());
    bytes.extend(payload);
    bytes
}

/// What is left of a payload.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Violation> {
        let (bytes, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(Violation("a message whose payload is too short"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn skip(&mut self, len: usize) -> Result<(), Violation> {
        self.bytes(len).map(drop)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Violation> {
        Ok(self.bytes(N)?.try_into().expect("as long as asked"))
    }

    fn u16(&mut self) -> Result<u16, Violation> {
        self.array().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, Violation> {
        self.array().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Violation> {
        self.array().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<Region, Violation> {
        Ok(Region {
            guest: self.u64()?,
            len: self.u64()?,
            user: self.u64()?,
            offset: self.u64()?,
        })
    }

    fn queue_and_fd(&mut self) -> Result<(u32, bool), Violation> {
        let value = self.u64()?;
        if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
            return Err(Violation("unknown bits beside a queue's number"));
        }
        Ok(((value & VRING_INDEX_MASK) as u32, value & VRING_NO_FD == 0))
    }

    /// Offset, length and flags of a piece of configuration, which agree with the payload's length and the space's.
    fn config(&mut self, payload_bytes: usize) -> Result<(u32, u32, u32), Violation> {
        let (offset, len, flags) = (self.u32()?, self.u32()?, self.u32()?);
        let end = u64::from(offset) + u64::from(len);
        if CONFIG_HEADER_BYTES as u64 + u64::from(len) != payload_bytes as u64
            || end > CONFIG_BYTES_MAX as u64
        {
            return Err(Violation("a piece of configuration outside of it"));
        }
        Ok((offset, len, flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        for (at, value) in [(0, request), (4, flags), (8, size)] {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    fn decode(request: u32, payload: &[u8]) -> Result<Message, Violation> {
        let header = Header::decode(&header(request, VERSION, payload.len() as u32))?;
        Message::decode(&header, payload)
    }

    /// Words of 64 bits in the host's order.
    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn pair(first: u32, second: u32) -> Vec<u8> {
        [first.to_ne_bytes(), second.to_ne_bytes()].concat()
    }

    #[test]
    fn a_header_says_what_how_long_and_whether_a_reply_is_waited_for() {
        let plain = Header::decode(&header(11, VERSION, 8)).unwrap();
        assert_eq!(
            (plain.request, plain.need_reply, plain.payload_bytes),
            (11, false, 8)
        );
        assert!(
            Header::decode(&header(11, VERSION | FLAG_NEED_REPLY, 8))
                .unwrap()
                .need_reply
        );
        for (flags, size) in [
            (0, 8),
            (2, 8),
            (3, 8),
            (VERSION | FLAG_REPLY, 8),
            (VERSION, 1 << 20),
            (VERSION, u32::MAX),
        ] {
            assert!(
                Header::decode(&header(11, flags, size)).is_err(),
                "{flags:#x} {size}"
            );
        }
    }

    #[test]
    fn every_kind_has_one_size_and_no_other() {
        use number::*;
        let sizes: &[(u32, usize)] = &[
            (GET_FEATURES, 0),
            (SET_FEATURES, 8),
            (SET_OWNER, 0),
            (RESET_OWNER, 0),
            (SET_MEM_TABLE, 8),
            (SET_LOG_BASE, 16),
            (SET_LOG_FD, 0),
            (SET_VRING_NUM, 8),
            (SET_VRING_ADDR, 40),
            (SET_VRING_BASE, 8),
            (GET_VRING_BASE, 8),
            (GET_VRING_BASE_SKIP_DRAIN, 8),
            (SET_VRING_KICK, 8),
            (SET_VRING_CALL, 8),
            (SET_VRING_ERR, 8),
            (GET_PROTOCOL_FEATURES, 0),
            (SET_PROTOCOL_FEATURES, 8),
            (GET_QUEUE_NUM, 0),
            (SET_VRING_ENABLE, 8),
            (SET_BACKEND_REQ_FD, 0),
            (GET_CONFIG, 12),
            (SET_CONFIG, 12),
            (RESET_DEVICE, 0),
            (GET_MAX_MEM_SLOTS, 0),
            (ADD_MEM_REG, 40),
            (REM_MEM_REG, 40),
            (SET_STATUS, 8),
            (GET_STATUS, 0),
        ];
        for &(request, size) in sizes {
            for len in 0..64 {
                let decoded = decode(request, &vec![0; len]);
                assert_eq!(
                    decoded.is_ok(),
                    len == size,
                    "request {request}, {len} bytes: {decoded:?}"
                );
            }
        }
        for request in [GET_INFLIGHT_FD, SET_INFLIGHT_FD] {
            let right: Vec<usize> = (0..64)
                .filter(|len| decode(request, &vec![0; *len]).is_ok())
                .collect();
            assert_eq!(right, [20, 24], "request {request}");
        }
    }

    #[test]
    fn a_rings_addresses_come_in_the_order_of_the_wire() {
        let mut payload = pair(3, 0);
        payload.extend(words(&[0x1000, 0x3000, 0x2000, 0x9000]));
        let mut addresses = UserAddresses {
            desc: 0x1000,
            avail: 0x2000,
            used: 0x3000,
            log_used: None,
        };
        let expected = |addresses| Ok(Message::SetVringAddr { queue: 3, addresses });
        assert_eq!(decode(number::SET_VRING_ADDR, &payload), expected(addresses));
        payload[4] = 1;
        addresses.log_used = Some(0x9000);
        assert_eq!(decode(number::SET_VRING_ADDR, &payload), expected(addresses));
    }

    #[test]
    fn a_memory_table_holds_as_many_regions_as_it_says() {
        let region = words(&[0x10_0000, 0x20_0000, 0x7f00_0000_0000, 0x4000]);
        let table = |count: u32, present: usize| {
            let mut payload = pair(count, 0);
            (0..present).for_each(|_| payload.extend(&region));
            decode(number::SET_MEM_TABLE, &payload)
        };
        let Ok(Message::SetMemTable(regions)) = table(2, 2) else {
            panic!("two regions")
        };
        let first = &regions[0];
        assert_eq!(
            (first.guest, first.len, first.user, first.offset),
            (0x10_0000, 0x20_0000, 0x7f00_0000_0000, 0x4000)
        );
        assert!(Message::SetMemTable(regions).takes_descriptors(2));
        assert!(table(REGIONS_MAX as u32, REGIONS_MAX).is_ok());
        for (count, present) in [
            (2, 1),
            (1, 2),
            (u32::MAX, 2),
            (REGIONS_MAX as u32 + 1, REGIONS_MAX),
        ] {
            assert!(table(count, present).is_err(), "{count} said, {present} there");
        }
    }

    #[test]
    fn a_notifiers_message_may_come_without_one() {
        let kick = |value: u64| decode(number::SET_VRING_KICK, &words(&[value]));
        let with = Message::SetVringKick {
            queue: 5,
            has_fd: true,
        };
        let without = Message::SetVringKick {
            queue: 255,
            has_fd: false,
        };
        assert!(with.takes_descriptors(1) && !with.takes_descriptors(0) && !with.takes_descriptors(2));
        assert!(without.takes_descriptors(0) && !without.takes_descriptors(1));
        assert_eq!(kick(5), Ok(with));
        assert_eq!(kick(0x1ff), Ok(without));
        assert!(kick(0x200).is_err());
    }

    #[test]
    fn a_piece_of_configuration_lies_inside_it_and_is_as_long_as_it_says() {
        let piece = |offset: u32, len: u32, present: usize| {
            let mut payload = pair(offset, len);
            payload.extend(7u32.to_ne_bytes());
            payload.resize(12 + present, 0xab);
            (
                decode(number::GET_CONFIG, &payload),
                decode(number::SET_CONFIG, &payload),
            )
        };
        let (get, set) = piece(32, 1, 1);
        assert_eq!(
            get,
            Ok(Message::GetConfig {
                offset: 32,
                len: 1,
                flags: 7
            })
        );
        assert_eq!(
            set,
            Ok(Message::SetConfig {
                offset: 32,
                bytes: vec![0xab]
            })
        );
        assert!(piece(0, 256, 256).0.is_ok());
        for (offset, len, present) in [
            (0, 257, 257),
            (1, 256, 256),
            (u32::MAX, 1, 1),
            (0, u32::MAX, 4),
            (0, 8, 4),
        ] {
            let (get, set) = piece(offset, len, present);
            assert!(get.is_err() && set.is_err(), "{offset} {len} {present}");
        }
    }

    #[test]
    fn an_area_for_what_is_in_flight_is_told_in_the_size_it_was_asked_in() {
        let shape = InflightShape {
            len: 0x1234,
            offset: 0,
            queues: 4,
            queue_size: 128,
        };
        for payload_bytes in InflightShape::BYTES {
            let payload = shape.encode(payload_bytes);
            assert_eq!(payload.len(), payload_bytes);
            assert_eq!(
                decode(number::GET_INFLIGHT_FD, &payload),
                Ok(Message::GetInflightFd(shape))
            );
        }
    }

    #[test]
    fn replies_say_that_they_are() {
        assert_eq!(
            reply(1, &words(&[7])),
            [&header(1, VERSION | FLAG_REPLY, 8)[..], &words(&[7])].concat()
        );
        assert_eq!(config_has_changed(), header(2, VERSION, 0));
        assert_eq!(vring_base(2, 700).to_vec(), pair(2, 700));
        assert_eq!(config(8, 1, &[9; 4]).len(), 16);
    }
}
