//! The front-end's and the guest's side. Every request has a place in the guest's memory that its head says, three descriptors
//! and 16 KiB: header, data, and the status at the end of the header's page.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use libvol::runtime::net::Stream;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::vhost::channel::{receive_now, send_now};
use crate::vhost::config::{feature, protocol};
use crate::vhost::guest::{DATA, END, Guest, QUEUE, USER};
use crate::vhost::message::{InflightShape, number, reply};
use crate::vhost::meter::Meter;
use crate::vhost::notify::{Kick, Signals};

/// Entries of the one queue.
pub(super) const ENTRIES: u16 = 256;
/// What a guest of today asks for.
pub(super) const FEATURES: u64 = feature::VERSION_1
    | feature::PROTOCOL_FEATURES
    | feature::RING_EVENT_IDX
    | feature::BLK_FLUSH
    | feature::BLK_DISCARD
    | feature::BLK_WRITE_ZEROES;
/// Bytes of a request's place.
const PLACE: u64 = 0x4000;

pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const ZERO: u32 = 13;
/// A status that no device writes.
pub(super) const UNTOUCHED: u8 = 0xee;

pub(super) struct FrontEnd {
    pub(super) stream: Stream,
    pub(super) guest: Guest,
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
    calls: Kick,
    pub(super) need_reply: bool,
    /// Entries that it says its queue has.
    pub(super) entries: u16,
}

/// What came back: its number, its payload, what came with it.
pub(super) type Reply = (u32, Vec<u8>, Vec<OwnedFd>);

impl FrontEnd {
    pub(super) fn new(stream: Stream) -> Self {
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let call = event();
        let signals: Rc<Signals> = Signals::of_thread().unwrap();
        Self {
            stream,
            guest: Guest::simple(),
            kick: event(),
            calls: Kick::new(call.try_clone().unwrap(), &signals, &Rc::default())
                .ok()
                .unwrap(),
            call,
            need_reply: false,
            entries: ENTRIES,
        }
    }

    /// Sends a message.
    pub(super) fn send(&self, request: u32, payload: &[u8], descriptor: Option<BorrowedFd<'_>>) {
        let mut bytes = reply(request, payload);
        let flags: u32 = if self.need_reply { 1 | 1 << 3 } else { 1 };
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        // The other side may have gone already; the next reply tells.
        let _ = send_now(self.stream.socket().as_fd(), &bytes, descriptor);
    }

    /// The next reply; `None` when the conversation has ended.
    pub(super) async fn reply(&self) -> Option<Reply> {
        let mut descriptors = Vec::new();
        let mut header = [0; 12];
        self.fill(&mut header, &mut descriptors).await?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 0b101, "the flags of a reply");
        let mut payload = vec![0; word(8) as usize];
        self.fill(&mut payload, &mut descriptors).await?;
        Some((word(0), payload, descriptors))
    }

    async fn fill(&self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Option<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match receive_now(self.stream.socket().as_fd(), &mut bytes[filled..], descriptors) {
                Ok(0) | Err(Errno::CONNRESET) => return None,
                Ok(count) => filled += count,
                Err(Errno::AGAIN) => self.stream.readable().await,
                Err(e) => panic!("{e}"),
            }
        }
        Some(())
    }

    /// Whether the back-end has ended the conversation, with nothing more to say.
    pub(super) async fn is_cut(&self) -> bool {
        self.reply().await.is_none()
    }

    /// Asks for a number.
    pub(super) async fn number(&self, request: u32) -> u64 {
        self.send(request, &[], None);
        let (answered, payload, _) = self.reply().await.unwrap();
        assert_eq!(answered, request);
        u64::from_ne_bytes(payload.try_into().unwrap())
    }

    /// A message of words of 64 bits, and whether it was accepted, when a reply is asked for.
    pub(super) async fn tell(&self, request: u32, words: &[u64]) -> bool {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.ask(request, &payload, None).await
    }

    /// A message about a queue with a number.
    pub(super) async fn tell_queue(&self, request: u32, queue: u32, number: u32) -> bool {
        let payload = [queue.to_ne_bytes(), number.to_ne_bytes()].concat();
        self.ask(request, &payload, None).await
    }

    pub(super) async fn ask(&self, request: u32, payload: &[u8], descriptor: Option<BorrowedFd<'_>>) -> bool {
        self.send(request, payload, descriptor);
        if !self.need_reply {
            return true;
        }
        let (answered, payload, _) = self.reply().await.expect("an answer");
        assert_eq!(answered, request);
        payload == 0u64.to_ne_bytes()
    }

    /// Agrees on features and on replies to all that follows.
    pub(super) async fn agree(&mut self, features: u64) {
        self.agree_on(features, protocol::OFFERED).await;
    }

    /// The same, with these protocol features.
    pub(super) async fn agree_on(&mut self, features: u64, protocol: u64) {
        self.tell(number::SET_PROTOCOL_FEATURES, &[protocol]).await;
        self.need_reply = true;
        assert!(self.tell(number::SET_FEATURES, &[features]).await);
    }

    /// Passes the guest's memory.
    pub(super) async fn pass_memory(&self) -> bool {
        let mut payload = 1u64.to_ne_bytes().to_vec();
        [0, END, USER, 0]
            .iter()
            .for_each(|word| payload.extend(word.to_ne_bytes()));
        self.ask(number::SET_MEM_TABLE, &payload, Some(self.guest.fd.as_fd()))
            .await
    }

    pub(super) async fn set_addresses(&self, log_used: Option<u64>) -> bool {
        let mut payload = [0u32.to_ne_bytes(), u32::from(log_used.is_some()).to_ne_bytes()].concat();
        for word in [
            QUEUE.desc + USER,
            QUEUE.used + USER,
            QUEUE.avail + USER,
            log_used.unwrap_or(0),
        ] {
            payload.extend(word.to_ne_bytes());
        }
        self.ask(number::SET_VRING_ADDR, &payload, None).await
    }

    /// Describes the queue and starts it.
    pub(super) async fn start_queue(&self, base: u16) -> bool {
        self.describe_queue(base).await && self.tell_queue(number::SET_VRING_ENABLE, 0, 1).await
    }

    /// Describes the queue, which ends the conversation when it is started.
    pub(super) async fn starting_queue_is_the_end(&self, base: u16) -> bool {
        let enable = [0u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
        let described = self.describe_queue(base).await;
        self.send(number::SET_VRING_ENABLE, &enable, None);
        described && self.is_cut().await
    }

    /// All that a queue needs but to be enabled.
    async fn describe_queue(&self, base: u16) -> bool {
        let described = self
            .tell_queue(number::SET_VRING_NUM, 0, self.entries.into())
            .await
            && self.tell_queue(number::SET_VRING_BASE, 0, base.into()).await
            && self.set_addresses(None).await;
        let zero = 0u64.to_ne_bytes();
        described
            && self
                .ask(number::SET_VRING_CALL, &zero, Some(self.call.as_fd()))
                .await
            && self
                .ask(number::SET_VRING_KICK, &zero, Some(self.kick.as_fd()))
                .await
    }

    /// From nothing to a queue that runs.
    pub(super) async fn start(&mut self) {
        self.agree(FEATURES).await;
        assert!(self.pass_memory().await && self.start_queue(0).await);
    }

    /// Stops the queue. Gives where it stood.
    pub(super) async fn stop_queue(&self) -> Option<u32> {
        self.stop_queue_by(number::GET_VRING_BASE).await
    }

    /// Stops the queue, with what is in flight left to later.
    pub(super) async fn suspend_queue(&self) -> Option<u32> {
        self.stop_queue_by(number::GET_VRING_BASE_SKIP_DRAIN).await
    }

    async fn stop_queue_by(&self, message: u32) -> Option<u32> {
        self.send(message, &[0; 8], None);
        let (_, payload, _) = self.reply().await?;
        Some(u32::from_ne_bytes(payload[4..].try_into().unwrap()))
    }

    /// A new area for what is in flight.
    pub(super) async fn inflight_area(&self) -> (OwnedFd, Vec<u8>) {
        self.inflight_area_of(ENTRIES).await
    }

    /// The same, for a queue of so many entries.
    pub(super) async fn inflight_area_of(&self, entries: u16) -> (OwnedFd, Vec<u8>) {
        let shape = InflightShape {
            len: 0,
            offset: 0,
            queues: 1,
            queue_size: entries,
        };
        self.send(number::GET_INFLIGHT_FD, &shape.encode(24), None);
        let (_, payload, mut descriptors) = self.reply().await.unwrap();
        (descriptors.pop().expect("an area"), payload)
    }

    pub(super) async fn use_area(&self, (area, shape): &(OwnedFd, Vec<u8>)) -> bool {
        self.ask(number::SET_INFLIGHT_FD, shape, Some(area.as_fd())).await
    }

    /// Where a request's header is.
    fn place(head: u16) -> u64 {
        DATA + PLACE * u64::from(head / 3)
    }

    /// Where its data is.
    pub(super) fn data(head: u16) -> u64 {
        Self::place(head) + 0x1000
    }

    /// Lays a request out. Heads are multiples of three.
    pub(super) fn lay(&self, head: u16, kind: u32, sector: u64, len: u32) {
        let at = Self::place(head);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.guest.put(at, &header);
        self.guest.put(at + 0xfff, &[UNTOUCHED]);
        let writable = matches!(kind, READ | GET_ID);
        let data = (Self::data(head), len, writable);
        let (header, status) = ((at, 16, false), (at + 0xfff, 1, true));
        match len {
            0 => self.guest.chain(QUEUE.desc, head, &[header, status]),
            _ => self.guest.chain(QUEUE.desc, head, &[header, data, status]),
        }
    }

    /// Makes a request available and kicks.
    pub(super) fn offer(&mut self, head: u16) {
        self.guest.offer(ENTRIES, head);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    pub(super) fn status(&self, head: u16) -> u8 {
        self.guest.get(Self::place(head) + 0xfff, 1)[0]
    }

    pub(super) fn used_index(&self) -> u16 {
        self.guest.get_u16(QUEUE.used + 2)
    }

    /// Heads in the used ring, from the first on.
    pub(super) fn used_heads(&self) -> Vec<u16> {
        let entry = |index: u16| self.guest.get_u16(QUEUE.used + 4 + 8 * u64::from(index));
        (0..self.used_index()).map(entry).collect()
    }

    /// Waits to be called until so many have been given back.
    pub(super) async fn called_for(&self, used: u16) {
        // By the event index: whoever comes next is worth a call.
        while self.used_index() < used {
            self.guest
                .put_u16(QUEUE.avail + 4 + 2 * u64::from(ENTRIES), self.used_index());
            if self.used_index() < used {
                self.calls.wait(&Meter::new()).await;
            }
        }
    }

    /// Carries one request out and gives its status.
    pub(super) async fn carry_out(&mut self, head: u16, kind: u32, sector: u64, len: u32) -> u8 {
        let before = self.used_index();
        self.lay(head, kind, sector, len);
        self.offer(head);
        self.called_for(before + 1).await;
        self.status(head)
    }

    /// Has nothing more to say, and waits until the back-end has noticed and ends the conversation.
    pub(super) async fn hang_up(&self) {
        rustix::net::shutdown(self.stream.socket(), rustix::net::Shutdown::Write).unwrap();
        assert!(self.is_cut().await);
    }
}
