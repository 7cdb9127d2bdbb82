//! One front-end's messages: what it asks, in order, and what each does to its device.
//!
//! Every message is answered before the next is read. One that cannot be carried out is answered with an error when the
//! front-end waits for an answer, and ends the conversation when it does not: it would go on under a wrong idea of its
//! device. A queue begins when it has a kick and is enabled, and ends with GET_VRING_BASE or a reset, which are answered
//! after its last request has been; so is what disables it, where none may be left. Queues that run keep their place: of what describes them, only the log may change.
//!
//! GET_VRING_BASE_SKIP_DRAIN is answered at once, with requests in flight left in the area for that. No queue of its front-end starts
//! again before what such a queue still had at the device has ended.
//!
//! The guest's memory and the cache's mode outlive a reset, for front-ends tell only what has changed of them.
//!
//! Source: QEMU docs/interop/vhost-user, "Communication", "Front-end message types".

use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::{Either, select};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use libvol::limits::{VHOST_QUEUE_SIZE_MAX, VHOST_QUEUES_MAX};
use libvol::runtime::sync::InFlight;
use libvol::runtime::{spawn, yield_now};

use super::Export;
use super::cache_mode::CacheMode;
use super::channel::{Channel, End, Received};
use super::config::{WRITEBACK_AT, feature, offered, protocol, space};
use super::fault::BadMemory;
use super::front::Front;
use super::inflight::{self, InflightArea};
use super::mapping::Account;
use super::memory::{DirtyLog, GuestMemory, REGIONS_MAX, Region};
use super::message::{self, InflightShape, Message, UserAddresses};
use super::notify::{Call, Kick, Signals};
use super::queue::{CallPlace, Setup, Started, TOO_SLOW};
use super::ring::RingAddresses;
use super::sessions::{Member, Seat, Sessions};
use crate::device::Device;
use crate::leavings::{Incoming, Leavings};

/// Serves until the front-end leaves or is cut off, then until the last of its requests has ended.
pub(super) async fn run<D: Device>(incoming: Incoming, export: Export<D>, seat: Seat) {
    let leavings = seat.leavings();
    let stream = incoming.stream().clone();
    let signals = match Signals::of_thread() {
        Ok(signals) => signals,
        Err(e) => return tracing::error!(volume = export.name, "vhost-user: guests cannot be called: {e}"),
    };
    let front = Front::new(export, stream.clone(), seat.meter());
    seat.introduce(front.clone());
    let watcher = spawn({
        let (front, stream) = (front.clone(), stream.clone());
        async move {
            stream.hung_up().await;
            front.cut_off();
        }
    });
    let session = Session {
        channel: Channel::new(stream, seat.meter()),
        front: front.clone(),
        sessions: seat.sessions(),
        signals,
        leavings: leavings.clone(),
        account: seat.account(),
        memory_files: Vec::new(),
        cache_mode: None,
        protocol: 0,
        status: 0,
        queues: Vec::new(),
        suspended: Vec::new(),
    };
    let memory_files = session.converse_to_the_end().await;
    drop(watcher);
    front.all_ended().await;
    seat.requests_ended();
    // Unmapped before the files go: giving a guest's memory back is for the other thread.
    leavings.put_all(front.set_backend_channel(None));
    front.set_log(None);
    front.set_memory(GuestMemory::empty());
    drop(front);
    leavings.put_all(memory_files.into_iter().map(|(_, file)| file));
    incoming.alone().await;
    drop(incoming);
    leavings.all_closed().await;
}

struct Session<D> {
    channel: Channel,
    front: Rc<Front<D>>,
    sessions: Rc<Sessions>,
    signals: Rc<Signals>,
    leavings: Rc<Leavings>,
    account: Arc<Account>,
    /// The files of the guest's memory as it is now, kept so that none is let go by unmapping it.
    memory_files: Vec<(Region, OwnedFd)>,
    /// Where the cache's mode is noted.
    cache_mode: Option<CacheMode>,
    /// Agreed protocol features.
    protocol: u64,
    status: u64,
    queues: Vec<Place<D>>,
    /// What suspended queues still have at the device.
    suspended: Vec<Rc<InFlight>>,
}

/// A queue as the messages have described it so far.
struct Place<D> {
    size: u16,
    addresses: Option<UserAddresses>,
    base: u16,
    enabled: bool,
    kick: Option<Kick>,
    call: CallPlace,
    faults: CallPlace,
    area: Option<InflightArea>,
    started: Option<Started<D>>,
}

impl<D> Default for Place<D> {
    fn default() -> Self {
        Self {
            size: VHOST_QUEUE_SIZE_MAX,
            addresses: None,
            base: 0,
            enabled: false,
            kick: None,
            call: CallPlace::default(),
            faults: CallPlace::default(),
            area: None,
            started: None,
        }
    }
}

/// What is answered.
enum Answer {
    /// It is done.
    Done,
    /// This is what was asked for.
    Reply(Vec<u8>),
    /// This, and a descriptor.
    ReplyWith(Vec<u8>, OwnedFd),
}

/// Why something is not done.
#[derive(Debug)]
struct Refused(String);

impl From<&str> for Refused {
    fn from(why: &str) -> Self {
        Self(why.to_owned())
    }
}

impl From<BadMemory> for Refused {
    fn from(why: BadMemory) -> Self {
        Self(why.to_string())
    }
}

impl From<std::io::Error> for Refused {
    fn from(why: std::io::Error) -> Self {
        Self(why.to_string())
    }
}

impl<D: Device> Session<D> {
    /// All of it. Its queues go, and the files of the guest's memory are left.
    async fn converse_to_the_end(mut self) -> Vec<(Region, OwnedFd)> {
        let end = self.converse().await;
        match &end {
            End::Gone => tracing::debug!(volume = self.front.name(), "vhost-user: the front-end has gone"),
            end => self.front.fail(end),
        }
        self.front.cut_off();
        self.memory_files
    }

    async fn converse(&mut self) -> End {
        loop {
            // (One whose descriptors are never closed is cut off all the same.)
            select(pin!(self.leavings.room()), pin!(self.front.cut())).await;
            if self.front.is_cut() {
                return End::Gone;
            }
            let received = match self.channel.receive(&self.leavings).await {
                Ok(received) => received,
                Err(end) => return end,
            };
            if let Err(end) = self.answer(received).await {
                return end;
            }
            if !self.front.meter().is_bearable() {
                return End::Violation(TOO_SLOW);
            }
            yield_now().await;
        }
    }

    async fn answer(&mut self, received: Received) -> Result<(), End> {
        let Received {
            header,
            payload,
            descriptors,
        } = received;
        let message = match Message::decode(&header, &payload) {
            Ok(message) if message.takes_descriptors(descriptors.len()) => message,
            wrong => {
                self.leavings.put_all(descriptors);
                wrong?;
                return Err(End::Violation(
                    "another number of descriptors than a message takes",
                ));
            }
        };
        let has_reply = message.has_reply();
        let needs_ack = header.need_reply && self.protocol & protocol::REPLY_ACK != 0;
        let answer = match message {
            Message::GetConfig { offset, len, flags } => self.get_config(offset, len, flags),
            Message::GetInflightFd(shape) => self.new_inflight_area(shape, payload.len()),
            message => self.carry_out(message, descriptors).await,
        };
        match answer {
            Ok(Answer::Reply(payload)) => self.channel.send(&message::reply(header.request, &payload), None),
            Ok(Answer::ReplyWith(payload, descriptor)) => {
                let reply = message::reply(header.request, &payload);
                self.channel.send(&reply, Some(descriptor.as_fd()))
            }
            Ok(Answer::Done) if needs_ack => self.acknowledge(header.request, 0),
            Ok(Answer::Done) => Ok(()),
            Err(Refused(why)) if needs_ack && !has_reply => {
                tracing::debug!(
                    volume = self.front.name(),
                    "vhost-user: message {number} refused: {why}",
                    number = header.request
                );
                self.acknowledge(header.request, 1)
            }
            Err(Refused(why)) => Err(End::Refused(why)),
        }
    }

    fn acknowledge(&self, request: u32, result: u64) -> Result<(), End> {
        self.channel
            .send(&message::reply(request, &result.to_ne_bytes()), None)
    }

    async fn carry_out(&mut self, message: Message, descriptors: Vec<OwnedFd>) -> Result<Answer, Refused> {
        let number = |number: u64| Ok(Answer::Reply(number.to_ne_bytes().to_vec()));
        let mut descriptors = descriptors.into_iter();
        let descriptor = |descriptors: &mut std::vec::IntoIter<OwnedFd>| descriptors.next();
        match message {
            Message::GetFeatures => return number(offered(self.front.read_only())),
            Message::GetProtocolFeatures => return number(protocol::OFFERED),
            Message::GetQueueNum => return number(VHOST_QUEUES_MAX.into()),
            Message::GetMaxMemSlots => return number(REGIONS_MAX as u64),
            Message::GetStatus => return number(self.status),
            Message::SetFeatures(features) => self.set_features(features)?,
            Message::SetProtocolFeatures(features) if !protocol::agrees(features) => {
                return Err("protocol features that are not offered, or not without others".into());
            }
            Message::SetProtocolFeatures(features) => self.protocol = features,
            // Who owns the device is who is connected.
            Message::SetOwner | Message::ResetOwner => {}
            Message::SetMemTable(regions) => self.set_memory(regions, descriptors)?,
            Message::AddMemReg(region) => {
                let file = descriptor(&mut descriptors).ok_or("no file for a memory region")?;
                self.add_memory(region, file)?;
            }
            Message::RemMemReg(region) => {
                self.leavings.put_all(descriptors);
                self.remove_memory(&region)?;
            }
            Message::SetLogBase { len, offset } => {
                let file = descriptor(&mut descriptors).ok_or("no file for the log")?;
                let log = usize::try_from(len)
                    .map_err(|_| BadMemory::Refused("a log that is too long"))
                    .and_then(|len| DirtyLog::new(&self.account, &file, offset, len));
                self.leavings.put(file);
                self.front.set_log(Some(log?));
                return number(0);
            }
            // It would be told that there is something new in the log, which nobody waits for.
            Message::SetLogFd => self.leavings.put_all(descriptors),
            Message::SetBackendReqFd => {
                let socket = descriptor(&mut descriptors).ok_or("no socket")?;
                self.set_backend_channel(socket)?;
            }
            Message::SetInflightFd(shape) => {
                let file = descriptor(&mut descriptors).ok_or("no file for the inflight area")?;
                let adopted = self.adopt_inflight_area(shape, &file);
                self.leavings.put(file);
                adopted?;
            }
            Message::SetConfig { offset, bytes } => self.set_config(offset, &bytes)?,
            Message::SetStatus(status) => {
                self.status = status;
                if status == 0 {
                    self.reset().await;
                }
            }
            Message::ResetDevice => {
                self.reset().await;
                self.forget_left().await?;
            }
            Message::SetVringNum { queue, size } => {
                let size = u16::try_from(size).map_err(|_| "a queue that is too large")?;
                self.stopped(queue)?.size = size;
            }
            Message::SetVringBase { queue, base } => {
                let base = u16::try_from(base).map_err(|_| "an index that no split queue has")?;
                self.stopped(queue)?.base = base;
            }
            Message::SetVringAddr { queue, addresses } => self.set_addresses(queue, addresses)?,
            Message::GetVringBase { skip_drain: true, .. } if !self.may_suspend() => {
                return Err("a queue that is to leave what is in flight, which was not agreed on".into());
            }
            Message::GetVringBase { queue, skip_drain } => {
                let place = self.place(queue)?;
                let has_area = place.started.as_ref().is_some_and(Started::can_suspend);
                let base = match skip_drain && has_area {
                    true => self.suspend(queue as usize),
                    // Without an area there is nowhere to leave anything.
                    false => self.stop(queue as usize).await,
                };
                return Ok(Answer::Reply(message::vring_base(queue, base).to_vec()));
            }
            Message::SetVringKick { queue, .. } => {
                let kick = self.event(descriptor(&mut descriptors), "kick", |event| {
                    Kick::new(event, &self.signals, &self.leavings)
                })?;
                let kick = kick.ok_or("a queue without a kick would have to be polled")?;
                let enabled = self.starts_enabled();
                let place = self.stopped(queue)?;
                place.kick = Some(kick);
                place.enabled |= enabled;
                self.start(queue).await?;
            }
            Message::SetVringCall { queue, .. } => {
                let call = self.event(descriptor(&mut descriptors), "call", |event| {
                    Call::new(event, &self.signals, &self.leavings)
                })?;
                let earlier = self.place(queue)?.call.replace(call);
                drop(earlier);
            }
            Message::SetVringErr { queue, .. } => {
                let faults = self.event(descriptor(&mut descriptors), "fault", |event| {
                    Call::silent(event, &self.signals, &self.leavings)
                });
                // One that cannot be told of faults is served all the same.
                let earlier = self.place(queue)?.faults.replace(faults.unwrap_or_default());
                drop(earlier);
            }
            Message::SetVringEnable { queue, on } => {
                let may_suspend = self.may_suspend();
                let place = self.place(queue)?;
                place.enabled = on;
                match &place.started {
                    None => self.start(queue).await?,
                    Some(started) if on => started.enable(),
                    // QEMU's word before it stops it; whether that waits for what is in flight, the next message says.
                    Some(started) if may_suspend && started.can_suspend() => started.pause(),
                    // For some front-ends that is all of a pause.
                    Some(started) => started.disable().await,
                }
            }
            Message::Unknown(_) => {
                self.leavings.put_all(descriptors);
                return Err("a message that is not known".into());
            }
            Message::GetConfig { .. } | Message::GetInflightFd(_) => {
                unreachable!("answered where the payload is")
            }
        }
        Ok(Answer::Done)
    }

    /// Without protocol features there is no message that enables a queue.
    fn starts_enabled(&self) -> bool {
        self.front.features() & feature::PROTOCOL_FEATURES == 0
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        if features & !offered(self.front.read_only()) != 0 {
            return Err("features that are not offered".into());
        }
        let changed = features ^ self.front.features();
        let running = self.queues.iter().any(|place| place.started.is_some());
        if running && changed & !feature::LOG_ALL != 0 {
            return Err("other features while a queue runs".into());
        }
        self.front.agree(features);
        Ok(())
    }

    fn set_memory(
        &mut self,
        regions: Vec<Region>,
        files: impl Iterator<Item = OwnedFd>,
    ) -> Result<(), Refused> {
        let files: Vec<(Region, OwnedFd)> = regions.into_iter().zip(files).collect();
        let copies = files
            .iter()
            .map(|(region, file)| Ok((*region, file.try_clone()?)));
        let memory = copies
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(Refused::from)
            .and_then(|copies| Ok(GuestMemory::set(&self.account, copies)?));
        let (outcome, gone) = match memory {
            Ok(memory) => {
                self.front.set_memory(memory);
                (Ok(()), std::mem::replace(&mut self.memory_files, files))
            }
            Err(why) => (Err(why), files),
        };
        self.leavings.put_all(gone.into_iter().map(|(_, file)| file));
        outcome
    }

    fn add_memory(&mut self, region: Region, file: OwnedFd) -> Result<(), Refused> {
        let memory = file
            .try_clone()
            .map_err(Refused::from)
            .and_then(|copy| Ok(self.front.memory().with(&self.account, region, copy)?));
        match memory {
            Ok(memory) => {
                self.front.set_memory(memory);
                self.memory_files.push((region, file));
                Ok(())
            }
            Err(why) => {
                self.leavings.put(file);
                Err(why)
            }
        }
    }

    fn remove_memory(&mut self, region: &Region) -> Result<(), Refused> {
        let memory = self.front.memory().without(region)?;
        self.front.set_memory(memory);
        let same =
            |other: &Region| (other.guest, other.user, other.len) == (region.guest, region.user, region.len);
        let (gone, kept) = std::mem::take(&mut self.memory_files)
            .into_iter()
            .partition(|(other, _)| same(other));
        self.memory_files = kept;
        let gone: Vec<(Region, OwnedFd)> = gone;
        self.leavings.put_all(gone.into_iter().map(|(_, file)| file));
        Ok(())
    }

    fn set_backend_channel(&self, socket: OwnedFd) -> Result<(), Refused> {
        let is_stream = socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && socket_type(&socket) == Ok(SocketType::STREAM);
        match is_stream {
            true => {
                self.leavings
                    .put_all(self.front.set_backend_channel(Some(socket)));
                Ok(())
            }
            false => {
                self.leavings.put(socket);
                Err("a channel for the back-end that is no Unix stream".into())
            }
        }
    }

    fn new_inflight_area(&self, shape: InflightShape, payload_bytes: usize) -> Result<Answer, Refused> {
        let (file, len) = inflight::create(shape.queues, shape.queue_size)?;
        let shape = InflightShape {
            len,
            offset: 0,
            ..shape
        };
        Ok(Answer::ReplyWith(shape.encode(payload_bytes), file))
    }

    fn adopt_inflight_area(&mut self, shape: InflightShape, file: &OwnedFd) -> Result<(), Refused> {
        if self.queues.iter().any(|place| place.started.is_some()) {
            return Err("another inflight area while a queue runs".into());
        }
        let InflightShape {
            len,
            offset,
            queues,
            queue_size,
        } = shape;
        let areas = InflightArea::adopt(&self.account, file, offset, len, queues, queue_size)?;
        for place in &mut self.queues {
            place.area = None;
        }
        for (queue, area) in areas.into_iter().enumerate() {
            self.place(queue as u32)?.area = Some(area);
        }
        self.cache_mode = CacheMode::behind(&self.account, file, offset, len, queues, queue_size);
        if let (Some(mode), false) = (&self.cache_mode, self.sessions.is_to_take_over()) {
            match mode.noted() {
                Some(back) => self.front.set_writeback(back),
                None => mode.note(self.front.writeback()),
            }
        }
        Ok(())
    }

    fn get_config(&self, offset: u32, len: u32, flags: u32) -> Result<Answer, Refused> {
        let front = &self.front;
        let space = space(
            front.device().size_bytes(),
            front.read_only(),
            front.writeback_in_space(),
        );
        let piece = space
            .get(offset as usize..)
            .and_then(|rest| rest.get(..len as usize))
            .ok_or("a piece of configuration outside of it")?;
        Ok(Answer::Reply(message::config(offset, flags, piece)))
    }

    /// Only the cache's mode may be set; a front-end that writes more of the space back must have read it.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), Refused> {
        let front = &self.front;
        let space = space(
            front.device().size_bytes(),
            front.read_only(),
            front.writeback_in_space(),
        );
        let mut writeback = front.writeback();
        for (at, byte) in (offset..).zip(bytes) {
            match (at, byte) {
                (WRITEBACK_AT, 0 | 1) => writeback = *byte == 1,
                (at, byte) if space.get(at as usize) == Some(byte) => {}
                _ => return Err("a change of configuration that is not the guest's to make".into()),
            }
        }
        if writeback == front.writeback() {
            return Ok(());
        }
        if self.sessions.is_to_take_over() {
            return Err("a change of configuration before the volume is taken over".into());
        }
        front.set_writeback(writeback);
        if let Some(mode) = &self.cache_mode {
            mode.note(writeback);
        }
        Ok(())
    }

    fn set_addresses(&mut self, queue: u32, addresses: UserAddresses) -> Result<(), Refused> {
        let place = self.place(queue)?;
        if let Some(started) = &place.started {
            let without_log = |addresses: UserAddresses| UserAddresses {
                log_used: None,
                ..addresses
            };
            if place.addresses.map(without_log) != Some(without_log(addresses)) {
                return Err("another place for a queue that runs".into());
            }
            started.log_used_at(addresses.log_used);
        }
        place.addresses = Some(addresses);
        Ok(())
    }

    /// A queue by its number.
    fn place(&mut self, queue: u32) -> Result<&mut Place<D>, Refused> {
        if queue >= VHOST_QUEUES_MAX.into() {
            return Err("a queue that there is not".into());
        }
        let index = queue as usize;
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, Place::default);
        }
        Ok(&mut self.queues[index])
    }

    /// One that does not run.
    fn stopped(&mut self, queue: u32) -> Result<&mut Place<D>, Refused> {
        let place = self.place(queue)?;
        match place.started {
            None => Ok(place),
            Some(_) => Err("a change of a queue that runs".into()),
        }
    }

    /// Starts a queue that has all it needs, once the device may start.
    async fn start(&mut self, queue: u32) -> Result<(), Refused> {
        let front = self.front.clone();
        let place = self.stopped(queue)?;
        if !place.enabled || place.kick.is_none() {
            return Ok(());
        }
        let allowed = match select(pin!(self.sessions.may_start()), pin!(front.cut())).await {
            Either::Left((allowed, _)) => allowed,
            Either::Right(_) => return Err("the attachment has ended, or the front-end has gone".into()),
        };
        let has_moved = allowed.map_err(|why| Refused(format!("the volume is not taken over: {why}")))?;
        front.settle_writeback(has_moved);
        if let (Some(mode), true) = (&self.cache_mode, has_moved) {
            mode.note(front.writeback());
        }
        self.suspended_ended().await?;
        let memory = front.memory();
        let place = self.stopped(queue)?;
        let addresses = place.addresses.ok_or("a queue that is nowhere")?;
        let guest = |user| memory.guest_of_user(user).ok_or("a queue outside of the memory");
        let addresses = RingAddresses {
            desc: guest(addresses.desc)?,
            avail: guest(addresses.avail)?,
            used: guest(addresses.used)?,
            log_used: addresses.log_used,
        };
        let kick = place.kick.take().ok_or("a queue without a kick")?;
        let setup = Setup {
            size: place.size,
            addresses,
            base: place.base,
            area: place.area.take(),
            kick,
            call: place.call.clone(),
            faults: place.faults.clone(),
        };
        let is_first = front.queues().count() == 0;
        match Started::new(&front, setup) {
            Ok(started) => place.started = Some(started),
            Err(why) => {
                // What it was to be started with is gone.
                front.fail_ring(&place.faults, &why);
                return Err(why.into());
            }
        }
        if is_first {
            // The volume may have grown while nobody was there to tell, or listened: one that comes back does not look.
            front.configuration_changed();
        }
        Ok(())
    }

    /// Stops a queue, if it runs. Gives where it stands.
    async fn stop(&mut self, index: usize) -> u16 {
        if let Some(started) = self.queues[index].started.take() {
            let (base, area) = started.stop().await;
            let place = &mut self.queues[index];
            place.base = base;
            place.area = area;
        }
        let place = &mut self.queues[index];
        place.kick = None;
        place.base
    }

    /// What an eventfd serves as, if one came. Anything else is put aside.
    fn event<T>(
        &self,
        came: Option<OwnedFd>,
        what: &str,
        make: impl FnOnce(OwnedFd) -> Result<T, OwnedFd>,
    ) -> Result<Option<T>, Refused> {
        let Some(event) = came else { return Ok(None) };
        self.front
            .meter()
            .spend(|| make(event))
            .map(Some)
            .map_err(|other| {
                self.leavings.put(other);
                Refused(format!("a {what} that is no eventfd"))
            })
    }

    /// Whether a queue may be stopped with what it has in flight left for later.
    fn may_suspend(&self) -> bool {
        self.protocol & protocol::GET_VRING_BASE_SKIP_DRAIN != 0
    }

    /// Stops a queue that runs, at once. Gives where it stands.
    fn suspend(&mut self, index: usize) -> u16 {
        let place = &mut self.queues[index];
        if let Some(started) = place.started.take() {
            let (base, area, in_flight) = started.suspend();
            (place.base, place.area) = (base, area);
            self.suspended.retain(|earlier| earlier.count() > 0);
            self.suspended.push(in_flight);
        }
        let place = &mut self.queues[index];
        place.kick = None;
        place.base
    }

    /// Waits until nothing of suspended queues is at the device: what is done for the guest from now on comes after it (I3).
    async fn suspended_ended(&mut self) -> Result<(), Refused> {
        let front = self.front.clone();
        for in_flight in std::mem::take(&mut self.suspended) {
            select(pin!(in_flight.idle()), pin!(front.cut())).await;
        }
        match front.is_cut() {
            true => Err("the attachment has ended, or the front-end has gone".into()),
            false => Ok(()),
        }
    }

    /// The guest, whose queues are stopped, asks for nothing any more of what was left in flight, here or over an earlier connection.
    async fn forget_left(&mut self) -> Result<(), Refused> {
        self.suspended_ended().await?;
        for area in self.queues.iter().filter_map(|place| place.area.as_ref()) {
            area.forget()?;
            yield_now().await;
        }
        Ok(())
    }

    /// Every queue is stopped, disabled, and begins at its first entry again; the status is none. All else stays until it is
    /// told anew.
    async fn reset(&mut self) {
        for index in 0..self.queues.len() {
            self.stop(index).await;
            let place = &mut self.queues[index];
            (place.enabled, place.base) = (false, 0);
        }
        self.status = 0;
    }
}
