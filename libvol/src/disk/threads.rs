//! The thread-pool engine, for where io_uring is refused.
//!
//! Every file has worker threads of its own, started as its queue grows, which run `pread`, `pwrite` and `fdatasync`: a
//! device that hangs stops its own workers and nobody else's. Sockets, listeners and eventfds stay on the runtime's
//! thread: they are tried without blocking at the next `turn`, and then waited for with `poll`.
//!
//! Invariants: an operation's memory stays in the table until its worker has ended, also when nobody waits for it and
//! when the engine is dropped; only queued transfers that no worker has begun may be given up, at drop.
//!
//! It deliberately does not batch or reorder: it is the engine that works everywhere, not the fast one.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use slab::Slab;

use super::message::Message;
use super::ops::{Ended, OpTable, file_of};
use super::wake::WakeFd;
use crate::limits::STORES_MAX;
use crate::runtime::{Done, Driver, FileSlot, Op, OpKey, Unpark, Wait};

/// Workers of one file: enough to keep a fast device busy from one shard (beyond 16 transfers at once the gain on NVMe
/// is small, and each costs a stack and a wake-up), and few enough that three replicas stay below fifty threads.
const WORKERS_PER_FILE: usize = 16;
/// A worker calls three system calls; it needs no deep stack.
const WORKER_STACK_BYTES: usize = 128 << 10;

/// See the module's text.
pub struct ThreadDriver {
    core: RefCell<Core>,
    results: Arc<Results>,
    origin: Instant,
}

struct Core {
    ops: OpTable<()>,
    files: Slab<Attached>,
    /// Socket operations not tried yet.
    fresh: Vec<OpKey>,
    /// Socket operations that wait for readiness.
    waiting: Vec<OpKey>,
    ended: Vec<Ended>,
    message: Box<Message>,
    poll_set: Vec<libc::pollfd>,
    /// Where in it each descriptor stands.
    poll_places: HashMap<RawFd, usize>,
    collected: Vec<(OpKey, io::Result<usize>)>,
}

/// A file and its workers, as the runtime's thread sees them.
struct Attached {
    pool: Arc<FilePool>,
    workers: Vec<JoinHandle<()>>,
    in_flight: usize,
    detached: bool,
}

/// What workers hand back.
struct Results {
    ended: Mutex<Vec<(OpKey, io::Result<usize>)>>,
    wake: WakeFd,
}

struct FilePool {
    file: Arc<OwnedFd>,
    results: Arc<Results>,
    queue: Mutex<Queue>,
    ready: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Workers that wait for a job.
    idle: usize,
    closed: bool,
}

struct Job {
    key: OpKey,
    transfer: Transfer,
}

enum Transfer {
    Read { to: *mut u8, len: usize, at: u64 },
    Write { from: *const u8, len: usize, at: u64 },
    Sync,
}

// SAFETY: the pointers lead into the buffer of an operation in the table, which nobody touches and which is not freed
// until the job's result has come back (or, at drop, until all workers have ended).
unsafe impl Send for Job {}

impl ThreadDriver {
    /// An engine without workers yet; they come with the files.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new() -> io::Result<Self> {
        let results = Results {
            ended: Mutex::default(),
            wake: WakeFd::new()?,
        };
        Ok(Self {
            core: RefCell::new(Core {
                ops: OpTable::new(),
                files: Slab::new(),
                fresh: Vec::new(),
                waiting: Vec::new(),
                ended: Vec::new(),
                message: Message::new(),
                poll_set: Vec::new(),
                poll_places: HashMap::new(),
                collected: Vec::new(),
            }),
            results: Arc::new(results),
            origin: Instant::now(),
        })
    }
}

impl Driver for ThreadDriver {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn submit(&self, op: Op) -> OpKey {
        let core = &mut *self.core.borrow_mut();
        let file = file_of(&op);
        let key = core.ops.insert(op, ());
        let Some(file) = file else {
            core.fresh.push(key);
            return key;
        };
        let transfer = match core.ops.get(key).0 {
            Op::Read { at, buf, range, .. } => {
                let part = &mut buf[range.clone()];
                Transfer::Read {
                    to: part.as_mut_ptr(),
                    len: part.len(),
                    at: *at,
                }
            }
            Op::Write { at, buf, range, .. } => {
                let part = &buf[range.clone()];
                Transfer::Write {
                    from: part.as_ptr(),
                    len: part.len(),
                    at: *at,
                }
            }
            Op::Sync { .. } => Transfer::Sync,
            _ => unreachable!("only disk operations have a file"),
        };
        core.files[file.0 as usize].enqueue(Job { key, transfer });
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
        let mut abandoned = None;
        if in_flight && file_of(core.ops.get(key).0).is_none() {
            core.fresh.retain(|other| *other != key);
            core.waiting.retain(|other| *other != key);
            abandoned = Some(core.ops.remove_idle(key));
        }
        drop(core);
        drop((remains, abandoned));
    }

    fn turn(&self, wait: Wait) {
        let mut ended = {
            let mut core = self.core.borrow_mut();
            core.collect(&self.results);
            core.try_fresh();
            core.wait(&self.results, wait);
            std::mem::take(&mut core.ended)
        };
        for ended in ended.drain(..) {
            ended.deliver();
        }
        self.core.borrow_mut().ended = ended;
    }

    fn attach(&self, file: Arc<OwnedFd>) -> io::Result<FileSlot> {
        let mut core = self.core.borrow_mut();
        if core.files.len() >= STORES_MAX {
            return Err(io::Error::other(format!(
                "all {STORES_MAX} places for files are taken"
            )));
        }
        let mut attached = Attached {
            pool: Arc::new(FilePool {
                file,
                results: self.results.clone(),
                queue: Mutex::default(),
                ready: Condvar::new(),
            }),
            workers: Vec::new(),
            in_flight: 0,
            detached: false,
        };
        // The first worker is certain, so that a later failure to start more only means less concurrency.
        attached.start_worker()?;
        Ok(FileSlot(core.files.insert(attached) as u32))
    }

    fn detach(&self, slot: FileSlot) {
        let mut core = self.core.borrow_mut();
        let attached = &mut core.files[slot.0 as usize];
        attached.detached = true;
        if attached.in_flight == 0 {
            core.files.remove(slot.0 as usize).stop();
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        self.results.clone()
    }
}

impl Drop for ThreadDriver {
    fn drop(&mut self) {
        let core = self.core.get_mut();
        for attached in core.files.drain() {
            attached.stop();
        }
    }
}

impl Unpark for Results {
    fn unpark(&self) {
        self.wake.unpark();
    }
}

impl Core {
    /// Takes over what workers have finished.
    fn collect(&mut self, results: &Results) {
        let mut collected = std::mem::take(&mut self.collected);
        std::mem::swap(&mut collected, &mut *lock(&results.ended));
        for (key, result) in collected.drain(..) {
            let file = file_of(self.ops.get(key).0)
                .expect("workers do disk operations")
                .0 as usize;
            let attached = &mut self.files[file];
            attached.in_flight -= 1;
            if attached.detached && attached.in_flight == 0 {
                self.files.remove(file).stop();
            }
            self.end(key, result);
        }
        self.collected = collected;
    }

    fn try_fresh(&mut self) {
        let mut fresh = std::mem::take(&mut self.fresh);
        for key in fresh.drain(..) {
            match self.attempt(key, 0) {
                Some(result) => self.end(key, result),
                None => self.waiting.push(key),
            }
        }
        self.fresh = fresh;
    }

    /// Waits for workers, sockets and other threads, and tries the sockets that are ready.
    fn wait(&mut self, results: &Results, wait: Wait) {
        let wait = if self.ended.is_empty() { wait } else { Wait::No };
        let limit = match wait {
            Wait::Forever => None,
            Wait::AtMost(limit) => Some(limit),
            Wait::No if self.waiting.is_empty() => return,
            Wait::No => Some(Duration::ZERO),
        };
        self.poll_set.clear();
        self.poll_set
            .push(poll_entry(results.wake.as_raw_fd(), libc::POLLIN));
        self.poll_places.clear();
        for key in &self.waiting {
            let (fd, events) = awaited(self.ops.get(*key).0);
            let place = *self.poll_places.entry(fd).or_insert_with(|| {
                self.poll_set.push(poll_entry(fd, 0));
                self.poll_set.len() - 1
            });
            self.poll_set[place].events |= events;
        }
        if !poll_descriptors(&mut self.poll_set, limit) {
            return;
        }
        let poll_set = std::mem::take(&mut self.poll_set);
        let waiting = std::mem::take(&mut self.waiting);
        for key in waiting {
            let (fd, events) = awaited(self.ops.get(key).0);
            let reported = poll_set[self.poll_places[&fd]].revents;
            let attempted = match reported & (events | ALWAYS_REPORTED) {
                0 => None,
                events => self.attempt(key, events),
            };
            match attempted {
                Some(result) => self.end(key, result),
                None => self.waiting.push(key),
            }
        }
        if poll_set[0].revents != 0 {
            // First the descriptor, then the queue: a result that comes in between wakes the next turn.
            results.wake.drain();
            self.collect(results);
        }
        self.poll_set = poll_set;
    }

    /// One non-blocking try, after `poll` has reported `events` (0: not asked yet). `None`: wait for readiness.
    fn attempt(&mut self, key: OpKey, events: i16) -> Option<io::Result<usize>> {
        let message = &mut self.message;
        let op = self.ops.get(key).0;
        loop {
            let result = match op {
                Op::Readable { .. } | Op::HangUp { .. } if events == 0 => return None,
                Op::Readable { .. } | Op::HangUp { .. } => return Some(Ok(events as usize)),
                Op::Accept { socket } => {
                    // SAFETY: no address is asked for, so nothing is written; the op owns the socket.
                    let fd = unsafe {
                        libc::accept4(
                            socket.as_raw_fd(),
                            std::ptr::null_mut(),
                            std::ptr::null_mut(),
                            libc::SOCK_CLOEXEC,
                        )
                    };
                    i64::from(fd)
                }
                Op::Recv { socket, buf, range } => {
                    let part = &mut buf[range.clone()];
                    // SAFETY: writes at most part.len() bytes into part, which is borrowed exclusively.
                    let n = unsafe {
                        libc::recv(
                            socket.as_raw_fd(),
                            part.as_mut_ptr().cast(),
                            part.len(),
                            libc::MSG_DONTWAIT,
                        )
                    };
                    n as i64
                }
                Op::Send { socket, parts, skip } => {
                    let header = message.point_at(parts, *skip);
                    // SAFETY: the header points into parts, which the op owns and nobody changes meanwhile.
                    let n = unsafe {
                        libc::sendmsg(
                            socket.as_raw_fd(),
                            header,
                            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                        )
                    };
                    n as i64
                }
                Op::Read { .. } | Op::Write { .. } | Op::Sync { .. } => unreachable!("disks have workers"),
            };
            if result >= 0 {
                return Some(Ok(result as usize));
            }
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => continue,
                // A listener that was shut down polls as ready for ever, while its accept says "nothing yet".
                io::ErrorKind::WouldBlock
                    if matches!(op, Op::Accept { .. }) && events & (libc::POLLHUP | libc::POLLERR) != 0 =>
                {
                    Some(Err(io::Error::from_raw_os_error(libc::EINVAL)))
                }
                io::ErrorKind::WouldBlock => None,
                _ => Some(Err(error)),
            };
        }
    }

    fn end(&mut self, key: OpKey, result: io::Result<usize>) {
        let ended = self.ops.end(key, result);
        self.ended.push(ended);
    }
}

impl Attached {
    fn enqueue(&mut self, job: Job) {
        assert!(!self.detached, "an operation on a file that was given back");
        self.in_flight += 1;
        let mut queue = lock(&self.pool.queue);
        queue.jobs.push_back(job);
        let busy = queue.jobs.len() > queue.idle;
        drop(queue);
        if busy && self.workers.len() < WORKERS_PER_FILE {
            // Without another worker the job waits for one of those that are there.
            let _ = self.start_worker();
        }
        self.pool.ready.notify_one();
    }

    fn start_worker(&mut self) -> io::Result<()> {
        let pool = self.pool.clone();
        let worker = std::thread::Builder::new()
            .name("disk-io".into())
            .stack_size(WORKER_STACK_BYTES)
            .spawn(move || pool.work())?;
        self.workers.push(worker);
        Ok(())
    }

    /// Lets running transfers end, gives up those not begun, and closes the file.
    fn stop(self) {
        let mut queue = lock(&self.pool.queue);
        queue.closed = true;
        queue.jobs.clear();
        drop(queue);
        self.pool.ready.notify_all();
        for worker in self.workers {
            worker.join().expect("workers do not panic");
        }
    }
}

impl FilePool {
    fn work(&self) {
        while let Some(job) = self.next_job() {
            let result = run(self.file.as_raw_fd(), &job.transfer);
            let mut ended = lock(&self.results.ended);
            let first = ended.is_empty();
            ended.push((job.key, result));
            drop(ended);
            if first {
                self.results.wake.unpark();
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

fn run(file: RawFd, transfer: &Transfer) -> io::Result<usize> {
    loop {
        let moved = match *transfer {
            // SAFETY: the operation in the table owns these len bytes, and nobody else touches them until this job has
            // reported; see `Job`.
            Transfer::Read { to, len, at } => unsafe { libc::pread(file, to.cast(), len, at.cast_signed()) },
            // SAFETY: as above.
            Transfer::Write { from, len, at } => unsafe {
                libc::pwrite(file, from.cast(), len, at.cast_signed())
            },
            // SAFETY: touches no memory.
            Transfer::Sync => unsafe { libc::fdatasync(file) as isize },
        };
        if moved >= 0 {
            return Ok(moved.cast_unsigned());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What `poll` tells of a descriptor without being asked.
const ALWAYS_REPORTED: i16 = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;

/// The descriptor that an operation waits for, and for what. Several may wait for one descriptor, and it stands in the set
/// once: `poll` takes no more entries than the process may have descriptors.
fn awaited(op: &Op) -> (RawFd, i16) {
    match op {
        Op::Accept { socket } | Op::Recv { socket, .. } => (socket.as_raw_fd(), libc::POLLIN),
        Op::Send { socket, .. } => (socket.as_raw_fd(), libc::POLLOUT),
        Op::Readable { fd } => (fd.as_raw_fd(), libc::POLLIN),
        Op::HangUp { socket } => (socket.as_raw_fd(), libc::POLLRDHUP),
        Op::Read { .. } | Op::Write { .. } | Op::Sync { .. } => {
            unreachable!("disks do not wait here")
        }
    }
}

fn poll_entry(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits for any of `set`; whether there may be one.
fn poll_descriptors(set: &mut [libc::pollfd], limit: Option<Duration>) -> bool {
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: set is a valid array of that many entries, limit is null or valid, and the signal mask stays as it is.
    let ready = unsafe {
        libc::ppoll(
            set.as_mut_ptr(),
            set.len() as libc::nfds_t,
            limit,
            std::ptr::null(),
        )
    };
    if ready < 0 {
        let error = io::Error::last_os_error();
        // A signal, or no memory just now: the caller turns again.
        assert!(
            matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::EAGAIN | libc::ENOMEM)
            ),
            "poll cannot fail like this: {error}"
        );
    }
    ready > 0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
