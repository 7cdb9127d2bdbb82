//! The io_uring engine: one ring a thread for disks, sockets and wake-ups.
//!
//! `submit` writes an entry into the shared queue and makes no system call; `turn` makes one, which submits
//! everything queued, waits and collects. Files of stores are registered with the ring, so that a transfer neither
//! looks up nor counts references of its file.
//!
//! Invariants: an operation's memory stays in the table until its completion has been collected, also when nobody
//! waits for it and when the engine is dropped; a forgotten disk operation runs to its end, a forgotten socket
//! operation is cancelled; a file stays registered, and so locked, until no operation uses it.
//!
//! It deliberately uses no polling thread, no registered buffers and no multishot operations: buffers belong to the
//! volumes and go back to them with every result.

use std::cell::{RefCell, UnsafeCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use slab::Slab;

use super::busy::BusyPoll;
use super::message::Message;
use super::ops::{Ended, OpTable, file_of};
use super::wake::WakeFd;
use crate::limits::STORES_MAX;
use crate::runtime::{Done, Driver, FileSlot, Op, OpKey, Unpark, Wait};

/// Entries that wait for one system call. More than that are submitted early.
const SUBMISSIONS: u32 = 512;
/// Completions that wait to be collected: eight full submission queues. Beyond that the kernel keeps them in a list.
const COMPLETIONS: u32 = 8 * SUBMISSIONS;
/// Completions delivered with one turn, at most. Taking all there are puts server and client into lockstep: one works on a
/// long batch while the other, and then the disk, has nothing to do. Measured with fio at depth 32 on two cores, random
/// reads: 4 gives 72,000 a second, 2 and 8 give 65,000, no limit 61,000.
const COMPLETIONS_A_TURN: usize = 4;
/// Message headers kept for reuse: one for each of many connections, 16 KiB of pieces each at most.
const SPARE_MESSAGES: usize = 64;
/// An operation that the kernel turned away for the moment is started again this often before its task is told.
const RETRIES: u8 = 16;

/// Completion of the read of the wake-up descriptor.
const WAKE: u64 = u64::MAX;
/// Completion of a cancellation, which nobody waits for. All others carry their [`OpKey`].
const CANCEL: u64 = u64::MAX - 1;

/// See the module's text.
pub struct UringDriver {
    core: RefCell<Core>,
    wake: Arc<WakeFd>,
    origin: Instant,
}

struct Core {
    ring: IoUring,
    ops: OpTable<Extra>,
    files: Slab<Attached>,
    /// Collected, but not delivered yet.
    ended: Vec<Ended>,
    /// Collected, but not finished: to be started again.
    again: Vec<OpKey>,
    #[expect(clippy::vec_box, reason = "the kernel holds the address of the header")]
    spare_messages: Vec<Box<Message>>,
    wake: Arc<WakeFd>,
    /// Where the kernel writes the wake-up count; on the heap, since the read is always pending.
    wake_count: Box<UnsafeCell<u64>>,
    wake_armed: bool,
    closing: bool,
    /// Operations on files that the kernel has.
    transfers: usize,
    busy: BusyPoll,
}

/// What the ring keeps beside an operation.
#[derive(Default)]
struct Extra {
    message: Option<Box<Message>>,
    /// The entry in flight waits for readiness (a non-blocking socket had nothing); the operation itself follows.
    polling: bool,
    retries: u8,
}

struct Attached {
    /// Keeps the open file description, and with it the lock, for as long as the slot is in use.
    _file: Arc<OwnedFd>,
    in_flight: usize,
    detached: bool,
}

impl UringDriver {
    /// Sets up a ring for the current thread. Before it sleeps with transfers in flight it looks for completions for at
    /// most `busy_poll`, where that pays; zero: never.
    ///
    /// # Errors
    /// When the kernel, or a sandbox, refuses io_uring, or lacks a part that is needed; the text says which.
    pub fn new(busy_poll: Duration) -> io::Result<Self> {
        Self::on(set_up(0)?, busy_poll)
    }

    fn on(ring: IoUring, busy_poll: Duration) -> io::Result<Self> {
        require(&ring)?;
        let empty = [-1; STORES_MAX];
        ring.submitter().register_files(&empty).map_err(|e| {
            io::Error::new(
                e.kind(),
                format!("the table of {STORES_MAX} files is refused ({e})"),
            )
        })?;
        let wake = Arc::new(WakeFd::new()?);
        let mut core = Core {
            ring,
            ops: OpTable::new(),
            files: Slab::with_capacity(STORES_MAX),
            ended: Vec::new(),
            again: Vec::new(),
            spare_messages: Vec::new(),
            wake: wake.clone(),
            wake_count: Box::new(UnsafeCell::new(0)),
            wake_armed: false,
            closing: false,
            transfers: 0,
            busy: BusyPoll::new(busy_poll),
        };
        core.arm_wake();
        Ok(Self {
            core: RefCell::new(core),
            wake,
            origin: Instant::now(),
        })
    }
}

impl Driver for UringDriver {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn submit(&self, op: Op) -> OpKey {
        let core = &mut *self.core.borrow_mut();
        if let Some(file) = file_of(&op) {
            let attached = &mut core.files[file.0 as usize];
            assert!(!attached.detached, "an operation on a file that was given back");
            attached.in_flight += 1;
            core.transfers += 1;
        }
        let key = core.ops.insert(op, Extra::default());
        core.start(key);
        key
    }

    fn poll(&self, key: OpKey, cx: &mut Context<'_>) -> Poll<Done> {
        let (poll, replaced) = self.core.borrow_mut().ops.poll(key, cx);
        drop(replaced);
        poll
    }

    fn forget(&self, key: OpKey) {
        let mut core = self.core.borrow_mut();
        let (in_flight, remains) = core.ops.forget(key);
        if in_flight && file_of(core.ops.get(key).0).is_none() {
            core.cancel(key.0 as u64);
        }
        drop(core);
        drop(remains);
    }

    fn turn(&self, wait: Wait) {
        let mut ended = {
            let mut core = self.core.borrow_mut();
            if let Err(e) = core.enter(wait) {
                panic!("io_uring_enter cannot fail like this: {e}");
            }
            core.collect();
            std::mem::take(&mut core.ended)
        };
        for ended in ended.drain(..) {
            ended.deliver();
        }
        // Keep the allocation, unless delivering has led to an early submission that collected more.
        let mut core = self.core.borrow_mut();
        if core.ended.is_empty() {
            core.ended = ended;
        }
    }

    fn attach(&self, file: Arc<OwnedFd>) -> io::Result<FileSlot> {
        let mut core = self.core.borrow_mut();
        let slot = core.files.vacant_key();
        if slot >= STORES_MAX {
            return Err(io::Error::other(format!(
                "all {STORES_MAX} places for files are taken"
            )));
        }
        let slot = slot as u32;
        core.ring
            .submitter()
            .register_files_update(slot, &[file.as_raw_fd()])?;
        core.files.insert(Attached {
            _file: file,
            in_flight: 0,
            detached: false,
        });
        Ok(FileSlot(slot))
    }

    fn detach(&self, slot: FileSlot) {
        let mut core = self.core.borrow_mut();
        let attached = &mut core.files[slot.0 as usize];
        attached.detached = true;
        if attached.in_flight == 0 {
            core.release(slot);
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        self.wake.clone()
    }
}

impl Drop for UringDriver {
    fn drop(&mut self) {
        let core = self.core.get_mut();
        core.closing = true;
        for key in core.ops.keys_in_flight() {
            if file_of(core.ops.get(key).0).is_none() {
                core.cancel(key.0 as u64);
            }
        }
        if core.wake_armed {
            core.cancel(WAKE);
        }
        while core.ops.in_flight() > 0 || core.wake_armed {
            if let Err(e) = core.enter(Wait::Forever) {
                // The kernel may still write to this memory: better lost than reused.
                tracing::error!("io_uring_enter: {e}; memory of transfers in flight is abandoned");
                std::mem::forget(std::mem::replace(&mut core.ops, OpTable::new()));
                std::mem::forget(std::mem::take(&mut core.wake_count));
                return;
            }
            core.collect();
            for ended in std::mem::take(&mut core.ended) {
                ended.deliver();
            }
        }
        // Closing the ring would give the files back some time later; this does it now, so that locks go at once.
        let _ = core.ring.submitter().unregister_files();
    }
}

impl Core {
    /// Queues the entry of an operation in the table.
    fn start(&mut self, key: OpKey) {
        let (op, extra) = self.ops.get(key);
        extra.polling = false;
        let entry = match op {
            Op::Read { file, at, buf, range } => {
                let part = &mut buf[range.clone()];
                opcode::Read::new(types::Fixed(file.0), part.as_mut_ptr(), length(part.len()))
                    .offset(*at)
                    .build()
            }
            Op::Write { file, at, buf, range } => {
                let part = &buf[range.clone()];
                opcode::Write::new(types::Fixed(file.0), part.as_ptr(), length(part.len()))
                    .offset(*at)
                    .build()
            }
            Op::Sync { file } => opcode::Fsync::new(types::Fixed(file.0))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Op::Accept { socket } => opcode::Accept::new(
                types::Fd(socket.as_raw_fd()),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
            .flags(libc::SOCK_CLOEXEC)
            .build(),
            Op::Recv { socket, buf, range } => {
                let part = &mut buf[range.clone()];
                opcode::Recv::new(
                    types::Fd(socket.as_raw_fd()),
                    part.as_mut_ptr(),
                    length(part.len()),
                )
                .build()
            }
            Op::Send { socket, parts, skip } => {
                let message = extra
                    .message
                    .get_or_insert_with(|| self.spare_messages.pop().unwrap_or_else(Message::new));
                let header = message.point_at(parts, *skip);
                opcode::SendMsg::new(types::Fd(socket.as_raw_fd()), header)
                    .flags(libc::MSG_NOSIGNAL as u32)
                    .build()
            }
            Op::Readable { fd } => {
                opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).build()
            }
            // An end of everything, and an error, are always reported.
            Op::HangUp { socket } => {
                opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), libc::POLLRDHUP as u32).build()
            }
        };
        self.push(&entry.user_data(key.0 as u64));
    }

    /// Queues a wait for readiness in place of a socket operation that had nothing to do yet.
    fn wait_until_ready(&mut self, key: OpKey) {
        let (op, extra) = self.ops.get(key);
        extra.polling = true;
        let (socket, events) = match op {
            Op::Accept { socket } | Op::Recv { socket, .. } => (socket, libc::POLLIN),
            Op::Send { socket, .. } => (socket, libc::POLLOUT),
            _ => unreachable!("only sockets wait for readiness"),
        };
        let entry = opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), events as u32).build();
        self.push(&entry.user_data(key.0 as u64));
    }

    fn cancel(&mut self, user_data: u64) {
        self.push(&opcode::AsyncCancel::new(user_data).build().user_data(CANCEL));
    }

    fn arm_wake(&mut self) {
        let count = self.wake_count.get().cast::<u8>();
        let entry =
            opcode::Read::new(types::Fd(self.wake.as_raw_fd()), count, size_of::<u64>() as u32).build();
        self.push(&entry.user_data(WAKE));
        self.wake_armed = true;
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: everything that an entry points to belongs to an operation in `ops`, which keeps it in place on
            // the heap until its completion is collected (or to `wake_count`, kept until its read has ended); `Drop`
            // waits for both.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            if let Err(e) = self.enter(Wait::No) {
                panic!("io_uring_enter cannot fail like this: {e}");
            }
            // A kernel that takes nothing new wants its completions collected first.
            if self.ring.submission().is_full() {
                self.collect_only();
            }
        }
    }

    /// One system call: submit, wait, run deferred completions. None if there is nothing to do.
    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        // An early submission may have collected completions; what they mean comes before any waiting.
        let attended = self.ended.is_empty() && self.again.is_empty() && (self.wake_armed || self.closing);
        let wait = if attended { wait } else { Wait::No };
        let wait = match wait {
            Wait::No => Wait::No,
            Wait::Forever | Wait::AtMost(_) => match self.look(wait) {
                Some(rest) => rest,
                None => return Ok(()),
            },
        };
        let submitter = self.ring.submitter();
        let entered = match wait {
            Wait::Forever => submitter.submit_and_wait(1),
            Wait::AtMost(limit) if !limit.is_zero() => {
                let limit = types::Timespec::from(limit);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
            }
            Wait::No | Wait::AtMost(_) => {
                let queue = self.ring.submission();
                if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                    return Ok(());
                }
                drop(queue);
                self.ring.submitter().submit()
            }
        };
        match entered.map_err(|e| (e.raw_os_error(), e)) {
            // ETIME: waited long enough. EINTR: a signal; the caller turns again. EBUSY: completions must be collected
            // first, which comes next.
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR | libc::EBUSY), _)) => Ok(()),
            // No memory for requests just now.
            Err((Some(libc::EAGAIN | libc::ENOMEM), _)) => {
                std::thread::yield_now();
                Ok(())
            }
            Err((_, e)) => Err(e),
        }
    }

    /// Looks for completions for a while, where that is likely to be cheaper than a sleep. Gives what is left to wait, or
    /// nothing when there are some to collect and all is submitted.
    fn look(&mut self, wait: Wait) -> Option<Wait> {
        let Some(limit) = self.busy.before_sleep(self.transfers) else {
            return Some(wait);
        };
        let at_most = match wait {
            Wait::AtMost(at_most) => at_most,
            _ => Duration::MAX,
        };
        // Also runs what has been deferred, if there is any. What it says when it fails, the entry that follows says again.
        let submitted = self.ring.submitter().submit().is_ok();
        let start = Instant::now();
        let took = loop {
            let ready = !self.ring.completion().is_empty();
            let found = ready || self.ring.submission().taskrun();
            let took = start.elapsed();
            if found || took >= limit {
                self.busy.ended(found, took);
                if ready && submitted {
                    return None;
                }
                break took;
            }
            // A timer is due, which tells nothing of completions.
            if took >= at_most {
                break took;
            }
            std::hint::spin_loop();
        };
        Some(match wait {
            Wait::AtMost(at_most) => Wait::AtMost(at_most.saturating_sub(took)),
            other => other,
        })
    }

    /// Takes the next completions, and starts again what the kernel turned away. Those left over end the next wait at once.
    fn collect(&mut self) {
        self.collect_only();
        while let Some(key) = self.again.pop() {
            if self.ops.get(key).1.polling {
                self.wait_until_ready(key);
            } else {
                self.start(key);
            }
        }
        if !self.wake_armed && !self.closing {
            self.arm_wake();
        }
    }

    fn collect_only(&mut self) {
        let Self {
            ring,
            ops,
            files,
            ended,
            again,
            spare_messages,
            wake_armed,
            transfers,
            ..
        } = self;
        let mut idle_files = Vec::new();
        for completion in ring.completion().take(COMPLETIONS_A_TURN) {
            let result = completion.result();
            let key = match completion.user_data() {
                CANCEL => continue,
                WAKE => {
                    *wake_armed = false;
                    continue;
                }
                key => OpKey(key as usize),
            };
            let forgotten = ops.is_forgotten(key);
            let (op, extra) = ops.get(key);
            let result = match next(op, extra, result) {
                Next::Again if !forgotten => {
                    again.push(key);
                    continue;
                }
                Next::Again => Err(io::ErrorKind::Interrupted.into()),
                Next::End(result) => result,
            };
            if let Some(message) = extra.message.take()
                && spare_messages.len() < SPARE_MESSAGES
            {
                spare_messages.push(message);
            }
            if let Some(file) = file_of(op) {
                let attached = &mut files[file.0 as usize];
                attached.in_flight -= 1;
                *transfers -= 1;
                if attached.detached && attached.in_flight == 0 {
                    idle_files.push(file);
                }
            }
            match ops.end(key, result) {
                Ended::Nobody => {}
                other => ended.push(other),
            }
        }
        for file in idle_files {
            self.release(file);
        }
    }

    /// Gives a file back that nothing uses.
    fn release(&mut self, slot: FileSlot) {
        // Cannot fail for a slot within the table; if it did, the slot would stay unusable until it is filled again.
        let _ = self.ring.submitter().register_files_update(slot.0, &[-1]);
        self.files.remove(slot.0 as usize);
    }
}

/// What a completion means for its operation.
enum Next {
    /// It is not over: wait for readiness (if `polling` was set), or start it again.
    Again,
    End(io::Result<usize>),
}

fn next(op: &Op, extra: &mut Extra, result: i32) -> Next {
    let polled = std::mem::take(&mut extra.polling);
    if polled && result >= 0 {
        // A listener that was shut down polls as ready for ever, while its accept says "nothing yet".
        let hung_up = result & i32::from(libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0;
        return match op {
            Op::Accept { .. } if hung_up => Next::End(Err(io::Error::from_raw_os_error(libc::EINVAL))),
            _ => Next::Again,
        };
    }
    match -result {
        libc::EAGAIN if matches!(op, Op::Accept { .. } | Op::Recv { .. } | Op::Send { .. }) => {
            extra.polling = true;
            Next::Again
        }
        libc::EAGAIN | libc::EINTR if extra.retries < RETRIES => {
            extra.retries += 1;
            Next::Again
        }
        errno if errno > 0 => Next::End(Err(io::Error::from_raw_os_error(errno))),
        _ => Next::End(Ok(result as usize)),
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("transfers are far below 4 GiB")
}

/// Kinds of rings, from the best to what every kernel has.
const SET_UPS: usize = 3;

/// The best ring that this kernel gives, beginning with the given kind.
fn set_up(first: usize) -> io::Result<IoUring> {
    let mut refusal = None;
    for attempt in first..SET_UPS {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(COMPLETIONS).setup_clamp();
        match attempt {
            // Linux 6.1: completions run when this thread asks for them, never in between.
            0 => {
                builder
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_coop_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all();
            }
            // Linux 5.19: at least no interrupts between processors.
            1 => {
                builder
                    .setup_coop_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all();
            }
            _ => {}
        }
        match builder.build(SUBMISSIONS) {
            Ok(ring) => return Ok(ring),
            Err(e) => {
                let why = match e.raw_os_error() {
                    Some(libc::EINVAL) => {
                        refusal = Some(e);
                        continue;
                    }
                    Some(libc::ENOSYS) => "this kernel has no io_uring",
                    Some(libc::EPERM | libc::EACCES) => {
                        "forbidden by a sandbox, or by the sysctl kernel.io_uring_disabled"
                    }
                    Some(libc::ENOMEM) => "no memory for it; raise the limit of locked memory",
                    _ => return Err(e),
                };
                return Err(io::Error::new(e.kind(), why));
            }
        }
    }
    Err(refusal.expect("every attempt failed"))
}

/// Everything that the engine relies on, or the name of what is missing.
fn require(ring: &IoUring) -> io::Result<()> {
    let missing =
        |what: &str| io::Error::new(io::ErrorKind::Unsupported, format!("this kernel lacks {what}"));
    let features = ring.params();
    if !features.is_feature_nodrop() || !features.is_feature_fast_poll() || !features.is_feature_ext_arg() {
        return Err(missing("waiting with a time limit (Linux 5.11)"));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("FSYNC", opcode::Fsync::CODE),
        ("ACCEPT", opcode::Accept::CODE),
        ("RECV", opcode::Recv::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("POLL_ADD", opcode::PollAdd::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
    ];
    for (name, code) in needed {
        if !probe.is_supported(code) {
            return Err(missing(&format!("the operation {name}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use crate::buf::Buf;
    use crate::disk::{Disk, DiskFile};
    use crate::limits::BUSY_POLL_DEFAULT;
    use crate::runtime::net::Stream;
    use crate::runtime::{Runtime, SendPart, sleep, spawn};

    #[test]
    fn rings_as_older_kernels_give_them_do_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let file = DiskFile::create(&dir.path().join("disk"), 1 << 20, true).unwrap();
        for first in 0..SET_UPS {
            let driver = UringDriver::on(set_up(first).unwrap(), BUSY_POLL_DEFAULT).unwrap();
            let runtime = Runtime::new(Rc::new(driver));
            let file = file.clone();
            let remote = runtime.remote();
            let elsewhere = std::thread::spawn(move || remote.post(|| ()));
            runtime.block_on(async move {
                let disk = Rc::new(Disk::attach(&file).unwrap());
                let (ours, theirs) = UnixStream::pair().unwrap();
                let (ours, theirs) = (Stream::new(ours.into()), Stream::new(theirs.into()));
                let received = spawn(async move { theirs.recv(Buf::zeroed(4096), 0..4096).await });
                for i in 0..100u8 {
                    let at = u64::from(i) * 4096;
                    disk.write(at, Rc::new(Buf::copy_of(&[i; 4096])), 0..4096)
                        .await
                        .unwrap();
                    let (result, buf) = disk.read(at, Buf::zeroed(4096), 0..4096).await;
                    result.unwrap();
                    assert!(buf.iter().all(|byte| *byte == i));
                }
                disk.sync().await.unwrap();
                sleep(Duration::from_millis(1)).await;
                ours.send(vec![SendPart::inline(b"hello")]).await.unwrap();
                let (result, buf) = received.await;
                assert_eq!(&buf[..result.unwrap()], b"hello");
            });
            elsewhere.join().unwrap().unwrap();
        }
    }
}
