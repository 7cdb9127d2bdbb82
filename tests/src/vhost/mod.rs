//! A vhost-user-blk front-end for tests, made from the specifications alone: QEMU's docs/interop/vhost-user.rst, and VIRTIO
//! 1.2, 2.7 (split virtqueues) and 5.2 (block device).
//!
//! It exists because the suites must do what ordinary clients do not: send any bytes with any descriptors, lay chains as no
//! driver may, take memory away under a running request, and outlive the daemon with the inflight area in its hand.
//!
//! | file | job |
//! |---|---|
//! | `wire` | messages and descriptors over the socket |
//! | `memory` | the guest's memory, a memfd |
//! | `queue` | the driver's side of a split virtqueue |
//! | `load` | a driver under load that knows what its volume has to hold |

mod load;
mod memory;
mod queue;
mod wire;

pub use load::Load;
pub use memory::{GUEST, Memory, USER};
pub use queue::{INDIRECT, NEXT, Part, Queue, Used, WRITE, new_eventfd};
pub use wire::*;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use crate::wait_for;

/// VIRTIO_BLK_F_RO.
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// VIRTIO_BLK_T_IN.
pub const T_IN: u32 = 0;
/// VIRTIO_BLK_T_OUT.
pub const T_OUT: u32 = 1;
/// VIRTIO_BLK_T_FLUSH.
pub const T_FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID.
pub const T_GET_ID: u32 = 8;
/// VIRTIO_BLK_T_DISCARD.
pub const T_DISCARD: u32 = 11;
/// VIRTIO_BLK_T_WRITE_ZEROES.
pub const T_WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_S_OK.
pub const S_OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const S_IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const S_UNSUPP: u8 = 2;
/// What a request's status is before the device says something.
pub const UNANSWERED: u8 = 0xee;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Most data of a request of [`FrontEnd::submit`].
pub const DATA_MAX: u64 = 128 << 10;
/// A request's header, its status and then its data, apart from each other.
const SLOT: u64 = 8192 + DATA_MAX;
const STATUS_AT: u64 = 64;
const DATA_AT: u64 = 4096;
/// Room for what a test lays by hand.
const SPARE: u64 = 4 << 20;

/// How a front-end is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Virtqueues.
    pub queues: u16,
    /// Descriptors of each.
    pub size: u16,
    /// Device features to take if they are there.
    pub features: u64,
    /// Protocol features to take if they are there.
    pub protocol: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            queues: 1,
            size: 64,
            features: F_VERSION_1
                | F_PROTOCOL_FEATURES
                | F_INDIRECT_DESC
                | F_EVENT_IDX
                | F_MQ
                | F_FLUSH
                | F_DISCARD
                | F_WRITE_ZEROES
                | F_RO,
            protocol: PF_MQ
                | PF_REPLY_ACK
                | PF_CONFIG
                | PF_INFLIGHT_SHMFD
                | PF_CONFIGURE_MEM_SLOTS
                | PF_BACKEND_REQ
                | PF_LOG_SHMFD
                | PF_RESET_DEVICE,
        }
    }
}

/// The area in which a back-end notes what is in flight, in a descriptor that outlives it.
pub struct Inflight {
    /// The area.
    pub descriptor: OwnedFd,
    /// The description that goes with it.
    pub payload: Vec<u8>,
}

/// One request that is in flight.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Its chain.
    pub descriptors: Vec<u16>,
    /// Where its status is.
    pub status: u64,
    /// Where its data is.
    pub data: u64,
    /// How much the device writes there.
    pub read: usize,
}

/// A finished request.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    /// The head of its chain.
    pub head: u16,
    /// VIRTIO_BLK_S_*.
    pub status: u8,
    /// Bytes that the device says it wrote.
    pub len: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// A front-end: connection, memory, queues.
pub struct FrontEnd {
    /// The connection.
    pub wire: Wire,
    /// The guest's memory.
    pub memory: Memory,
    /// The virtqueues.
    pub queues: Vec<Queue>,
    /// Requests in flight, by queue and head.
    pub pending: HashMap<(usize, u16), Pending>,
    /// Where a test may lay things by hand, and how much room is there.
    pub spare: (u64, u64),
    /// The inflight area, once there is one.
    pub inflight: Option<Inflight>,
    /// Device features that were agreed on.
    pub features: u64,
    /// Protocol features that were agreed on.
    pub protocol: u64,
    shape: Shape,
    slots: Vec<u64>,
}

impl FrontEnd {
    /// Connects as [`Shape::default`] and starts all queues; waits while the device has another front-end.
    ///
    /// # Panics
    /// When it is refused.
    pub fn connect(socket: &Path) -> Self {
        Self::connect_as(socket, Shape::default())
    }

    /// The same in another shape.
    ///
    /// # Panics
    /// When it is refused.
    pub fn connect_as(socket: &Path, shape: Shape) -> Self {
        let mut front_end = Self::greeted(socket, shape);
        front_end.start().expect("the back-end serves");
        front_end
    }

    /// Connects and agrees on features; no memory is shared yet, and no queue started.
    ///
    /// # Panics
    /// When it is refused.
    pub fn greeted(socket: &Path, shape: Shape) -> Self {
        let (wire, features, protocol) = greet_patiently(socket, &shape);
        let event_idx = features & F_EVENT_IDX != 0;
        let (queues, size) = (u64::from(shape.queues), u64::from(shape.size));
        let rings = queues * (size * 26 + 4096);
        let len = (SPARE + rings + queues * size * SLOT).next_multiple_of(4096);
        let mut memory = Memory::new(len);
        // (The rings first, the spare room last: a test that cuts the end off takes neither rings nor slots.)
        let made = (0..u32::from(shape.queues))
            .map(|index| Queue::new(&mut memory, index, shape.size, event_idx))
            .collect();
        let slots = (0..shape.queues)
            .map(|_| memory.room(size * SLOT, 4096))
            .collect();
        let spare = memory.room(SPARE - (64 << 10), 4096);
        let left = memory.end() - spare;
        Self {
            wire,
            memory,
            queues: made,
            pending: HashMap::new(),
            spare: (spare, left),
            inflight: None,
            features,
            protocol,
            shape,
            slots,
        }
    }

    /// Shares memory and inflight area, and starts all queues.
    ///
    /// # Errors
    /// The socket's.
    pub fn start(&mut self) -> io::Result<()> {
        self.set_features(self.features)?;
        self.share_memory()?;
        if self.protocol & PF_INFLIGHT_SHMFD != 0 {
            if self.inflight.is_none() {
                self.take_inflight()?;
            }
            self.give_inflight()?;
        }
        for index in 0..self.queues.len() {
            self.start_queue(index)?;
        }
        Ok(())
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// The socket's.
    pub fn set_features(&self, features: u64) -> io::Result<()> {
        self.wire.done(SET_FEATURES, &features.to_le_bytes(), &[])
    }

    /// SET_MEM_TABLE with all memory as one region.
    ///
    /// # Errors
    /// The socket's.
    pub fn share_memory(&self) -> io::Result<()> {
        let table = memory_table(&[self.memory.region()]);
        self.wire.done(SET_MEM_TABLE, &table, &[self.memory.as_fd()])
    }

    /// GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// When no descriptor comes.
    pub fn take_inflight(&mut self) -> io::Result<()> {
        let wanted = inflight_payload(0, 0, self.shape.queues, self.shape.size);
        let mut reply = self.wire.ask(GET_INFLIGHT_FD, &wanted, &[])?;
        assert_eq!(reply.payload.len(), wanted.len(), "{reply:?}");
        self.inflight = Some(Inflight {
            descriptor: reply.descriptors.pop().expect("an inflight area"),
            payload: reply.payload,
        });
        Ok(())
    }

    /// SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// When there is no area yet.
    pub fn give_inflight(&self) -> io::Result<()> {
        let area = self.inflight.as_ref().expect("an inflight area");
        self.wire
            .done(SET_INFLIGHT_FD, &area.payload, &[area.descriptor.as_fd()])
    }

    /// Starts a queue where the used ring says that it stands.
    ///
    /// # Errors
    /// The socket's.
    pub fn start_queue(&self, index: usize) -> io::Result<()> {
        let queue = &self.queues[index];
        let base = queue.used_index(&self.memory);
        self.prepare_queue(index, base)?;
        let number = u64::from(queue.index).to_le_bytes();
        self.wire
            .done(SET_VRING_KICK, &number, &[queue.kick_descriptor().as_fd()])?;
        self.wire
            .done(SET_VRING_CALL, &number, &[queue.call_descriptor().as_fd()])?;
        self.enable_queue(index, true)
    }

    /// Starts a queue, which the back-end may refuse at any step; says whether it did.
    pub fn start_queue_is_refused(&self, index: usize) -> bool {
        let queue = &self.queues[index];
        let state = |number: u16| vring_state(queue.index, u32::from(number));
        let base = queue.used_index(&self.memory);
        let number = u64::from(queue.index).to_le_bytes();
        let (kick, call) = (queue.kick_descriptor(), queue.call_descriptor());
        let wire = &self.wire;
        wire.refuses(SET_VRING_NUM, &state(queue.size), &[])
            || wire.refuses(SET_VRING_BASE, &state(base), &[])
            || wire.refuses(SET_VRING_ADDR, &self.vring_addresses(index), &[])
            || wire.refuses(SET_VRING_KICK, &number, &[kick.as_fd()])
            || wire.refuses(SET_VRING_CALL, &number, &[call.as_fd()])
            || wire.refuses(SET_VRING_ENABLE, &state(1), &[])
    }

    /// All that [`Self::start_queue`] says before the descriptors.
    ///
    /// # Errors
    /// The socket's.
    pub fn prepare_queue(&self, index: usize, base: u16) -> io::Result<()> {
        let queue = &self.queues[index];
        let state = |number: u16| vring_state(queue.index, u32::from(number));
        self.wire.done(SET_VRING_NUM, &state(queue.size), &[])?;
        self.wire.done(SET_VRING_BASE, &state(base), &[])?;
        self.wire.done(SET_VRING_ADDR, &self.vring_addresses(index), &[])
    }

    /// Payload of SET_VRING_ADDR.
    pub fn vring_addresses(&self, index: usize) -> Vec<u8> {
        let queue = &self.queues[index];
        let mut bytes = vring_state(queue.index, 0).to_vec();
        for at in [queue.descriptors, queue.used, queue.available] {
            bytes.extend(self.memory.user(at).to_le_bytes());
        }
        bytes.extend([0; 8]);
        bytes
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// The socket's.
    pub fn enable_queue(&self, index: usize, on: bool) -> io::Result<()> {
        let state = vring_state(index as u32, u32::from(on));
        self.wire.done(SET_VRING_ENABLE, &state, &[])
    }

    /// GET_VRING_BASE, which stops a queue; gives where it stopped.
    ///
    /// # Errors
    /// The socket's.
    pub fn stop_queue(&self, index: usize) -> io::Result<u32> {
        self.stop_queue_by(GET_VRING_BASE, index)
    }

    /// GET_VRING_BASE_SKIP_DRAIN, which leaves what is in flight to later; gives where the queue stopped.
    ///
    /// # Errors
    /// The socket's.
    pub fn suspend_queue(&self, index: usize) -> io::Result<u32> {
        self.stop_queue_by(GET_VRING_BASE_SKIP_DRAIN, index)
    }

    fn stop_queue_by(&self, message: u32, index: usize) -> io::Result<u32> {
        let state = vring_state(index as u32, 0);
        let payload = self.wire.ask(message, &state, &[])?.payload;
        Ok(u32::from_le_bytes(payload[4..8].try_into().expect("4 bytes")))
    }

    /// A part of the configuration space.
    ///
    /// # Errors
    /// The socket's.
    pub fn config(&self, offset: u32, len: u32) -> io::Result<Vec<u8>> {
        let mut payload = Vec::new();
        for word in [offset, len, 0] {
            payload.extend(word.to_le_bytes());
        }
        payload.extend(vec![0; len as usize]);
        let reply = self.wire.ask(GET_CONFIG, &payload, &[])?.payload;
        Ok(reply.get(12..).unwrap_or_default().to_vec())
    }

    /// Whether the back-end lets this be written to the configuration space.
    pub fn sets_config(&self, offset: u32, bytes: &[u8]) -> bool {
        let mut payload = Vec::new();
        for word in [offset, bytes.len() as u32, 0] {
            payload.extend(word.to_le_bytes());
        }
        payload.extend(bytes);
        !self.wire.refuses(SET_CONFIG, &payload, &[])
    }

    /// Size of the device.
    ///
    /// # Panics
    /// When the back-end does not tell it.
    pub fn capacity(&self) -> u64 {
        let config = self.config(0, 8).expect("the back-end answers");
        u64::from_le_bytes(config.try_into().expect("8 bytes")) * SECTOR
    }

    /// Ends the connection.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn hang_up(&self) {
        rustix::net::shutdown(&self.wire, rustix::net::Shutdown::Both).expect("a socket");
    }

    /// A new connection to a back-end that has forgotten all; memory, queues and what is in flight are as they were.
    ///
    /// # Panics
    /// When it is refused.
    pub fn reconnect(&mut self, socket: &Path) {
        let (wire, features, protocol) = greet_patiently(socket, &self.shape);
        assert_eq!(
            (features, protocol),
            (self.features, self.protocol),
            "the back-end is the same"
        );
        self.wire = wire;
        self.start().expect("the back-end serves");
    }

    /// Where a chain with this head has its header, its status and its data.
    pub fn slot(&self, queue: usize, head: u16) -> (u64, u64, u64) {
        let slot = self.slots[queue] + u64::from(head) * SLOT;
        (slot, slot + STATUS_AT, slot + DATA_AT)
    }

    /// Writes a request's header.
    pub fn write_header(&self, at: u64, kind: u32, sector: u64) {
        let mut header = u64::from(kind).to_le_bytes().to_vec();
        header.extend(sector.to_le_bytes());
        self.memory.write(at, &header);
    }

    /// Offers a request as drivers do it: header, data, status. `out` goes to the device, `read` bytes come from it. Gives
    /// its head; the device is told by [`Self::notify`].
    ///
    /// # Panics
    /// When there are no descriptors for it.
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, out: &[u8], read: usize) -> u16 {
        assert!((out.len() + read) as u64 <= DATA_MAX && (out.is_empty() || read == 0));
        let (header, status, data) = self.slot(queue, self.queues[queue].next_head());
        let mut chain = vec![Part::readable(header, 16)];
        if !out.is_empty() {
            chain.push(Part::readable(data, out.len() as u32));
        }
        if read > 0 {
            chain.push(Part::writable(data, read as u32));
        }
        chain.push(Part::writable(status, 1));
        self.write_header(header, kind, sector);
        self.memory.write(data, out);
        self.memory
            .write(data + out.len() as u64, &vec![UNANSWERED; read]);
        self.memory.write(status, &[UNANSWERED]);
        let descriptors = self.queues[queue].chain(&self.memory, &chain);
        let head = descriptors[0];
        self.queues[queue].offer(&self.memory, head);
        let pending = Pending {
            descriptors,
            status,
            data,
            read,
        };
        let before = self.pending.insert((queue, head), pending);
        assert!(before.is_none(), "head {head} is in flight already");
        head
    }

    /// Tells the device of what was offered.
    pub fn notify(&mut self, queue: usize) {
        self.queues[queue].notify(&self.memory);
    }

    /// The next answer of a queue.
    ///
    /// # Panics
    /// When none comes, or something is answered that is not in flight.
    pub fn complete(&mut self, queue: usize) -> Done {
        let used = self.queues[queue].wait_used(&self.memory);
        self.finish(queue, used)
    }

    /// The same, unless the connection ends before.
    ///
    /// # Panics
    /// When neither comes, or something is answered that is not in flight.
    pub fn complete_or_end(&mut self, queue: usize) -> Option<Done> {
        let wire = &self.wire;
        let used = self.queues[queue].used_before(&self.memory, || wire.has_ended());
        match used {
            Some(used) => Some(self.finish(queue, used)),
            None => {
                assert!(self.wire.has_ended(), "neither an answer nor the end came");
                None
            }
        }
    }

    /// What is answered by now.
    pub fn finished(&mut self, queue: usize) -> Option<Done> {
        let used = self.queues[queue].take_used(&self.memory)?;
        Some(self.finish(queue, used))
    }

    fn finish(&mut self, queue: usize, used: Used) -> Done {
        let pending = self
            .pending
            .remove(&(queue, used.head))
            .unwrap_or_else(|| panic!("queue {queue}: {used:?} is not in flight"));
        let status = self.memory.read(pending.status, 1)[0];
        let data = self.memory.read(pending.data, pending.read);
        self.queues[queue].release(pending.descriptors);
        Done {
            head: used.head,
            status,
            len: used.len,
            data,
        }
    }

    /// One request, alone in its queue.
    ///
    /// # Panics
    /// When no answer comes.
    pub fn call(&mut self, kind: u32, sector: u64, out: &[u8], read: usize) -> Done {
        self.submit(0, kind, sector, out, read);
        self.notify(0);
        self.complete(0)
    }

    /// Reads.
    ///
    /// # Errors
    /// The request's status.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, u8> {
        let done = self.call(T_IN, offset / SECTOR, &[], len);
        if done.status == S_OK {
            assert_eq!(done.len as usize, len + 1, "data and status were written");
            Ok(done.data)
        } else {
            Err(done.status)
        }
    }

    /// Writes.
    ///
    /// # Errors
    /// The request's status.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u8> {
        let done = self.call(T_OUT, offset / SECTOR, data, 0);
        if done.status == S_OK {
            Ok(())
        } else {
            Err(done.status)
        }
    }

    /// A request that lies in the descriptor table already, by its head: the driver's own part of it is the status at
    /// `status`. Offers it, kicks, and gives the status or `None` when the device hung up.
    ///
    /// # Panics
    /// When neither comes.
    pub fn judge(&mut self, descriptors: Vec<u16>, status: u64) -> Option<u8> {
        let head = descriptors[0];
        self.memory.write(status, &[UNANSWERED]);
        let pending = Pending {
            descriptors,
            status,
            data: GUEST,
            read: 0,
        };
        self.pending.insert((0, head), pending);
        self.queues[0].offer(&self.memory, head);
        self.queues[0].kick();
        self.complete_or_end(0).map(|done| done.status)
    }
}

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.
pub fn inflight_payload(len: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend(offset.to_le_bytes());
    bytes.extend(queues.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    // QEMU sends what its compiler makes of the structure, and wants as much back.
    bytes.extend([0; 4]);
    bytes
}

/// A segment of DISCARD or WRITE_ZEROES.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Connects and agrees on features. A device that has another front-end, or is about to let one go, hangs up: then again.
fn greet_patiently(socket: &Path, shape: &Shape) -> (Wire, u64, u64) {
    wait_for("the back-end takes a front-end", || match greet(socket, shape) {
        Ok(agreed) => Some(agreed),
        Err(e) => {
            println!("not served yet: {e}");
            None
        }
    })
}

/// Connects once.
///
/// # Errors
/// The socket's; a back-end that hangs up.
pub fn greet(socket: &Path, shape: &Shape) -> io::Result<(Wire, u64, u64)> {
    let wire = Wire::connect(socket)?;
    let offered = wire.number(GET_FEATURES)?;
    assert_ne!(offered & F_PROTOCOL_FEATURES, 0, "protocol features are offered");
    let features = offered & shape.features;
    let protocol = wire.number(GET_PROTOCOL_FEATURES)? & shape.protocol;
    assert_ne!(protocol & PF_REPLY_ACK, 0, "REPLY_ACK is offered");
    wire.send(SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
    wire.done(SET_OWNER, &[], &[])?;
    if protocol & PF_MQ != 0 {
        let queues = wire.number(GET_QUEUE_NUM)?;
        assert!(u64::from(shape.queues) <= queues, "{queues} queues are offered");
    }
    Ok((wire, features, protocol))
}
