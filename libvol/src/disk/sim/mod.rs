//! The simulated engine: disks in memory, time and chance from a seed.
//!
//! It runs the very code that production runs. Operations complete in a random order after a random virtual latency;
//! after a chosen number of disk calls the power goes and nothing completes any more. Nothing here reads the real clock,
//! so a seed replays exactly. Sockets are deliberately not simulated.
//!
//! A crash test: build a [`SimDriver`] over [`Media`], run work until it ends or [`SimDriver::until_cut`] resolves, drop
//! the runtime, take [`SimDriver::media_after_cut`], build the next driver over it, open, recover, check.

mod media;
mod rng;

pub use media::{Cut, Media};
pub use rng::Rng;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;

use crate::disk::DiskFile;
use crate::runtime::{Done, Driver, FileSlot, Op, OpKey, Unpark, Wait};

/// What a fault hook is asked about: the operation about to complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A read of `len` bytes at `at`.
    Read {
        /// Byte offset.
        at: u64,
        /// Bytes.
        len: usize,
    },
    /// A write of `len` bytes at `at`.
    Write {
        /// Byte offset.
        at: u64,
        /// Bytes.
        len: usize,
    },
    /// A sync.
    Sync,
}

/// Decides whether a call on a disk fails: `Some(errno)` makes it.
pub type FaultHook = Box<dyn FnMut(FileSlot, Call) -> Option<i32>>;

/// The engine.
pub struct SimDriver {
    state: RefCell<State>,
    cut: Cell<bool>,
    cut_waiters: RefCell<Vec<Waker>>,
}

struct State {
    rng: Rng,
    now: Duration,
    disks: Vec<Media>,
    ops: Slab<Pending>,
    due: BTreeMap<(Duration, u64), usize>,
    next_due: u64,
    calls: u64,
    cut_at_call: Option<u64>,
    fault: Option<FaultHook>,
}

struct Pending {
    op: Option<Op>,
    token: Token,
    done: Option<Done>,
    waker: Option<Waker>,
    forgotten: bool,
}

/// What the medium knows of an operation in flight.
enum Token {
    None,
    Write(u64),
    Sync(Vec<u64>),
}

struct NoUnpark;

impl Unpark for NoUnpark {
    fn unpark(&self) {}
}

impl SimDriver {
    /// An engine over `disks` (slots 0, 1, …), with time and chance from `seed`.
    pub fn new(seed: u64, disks: Vec<Media>) -> Rc<Self> {
        Rc::new(Self {
            state: RefCell::new(State {
                rng: Rng::new(seed),
                now: Duration::ZERO,
                disks,
                ops: Slab::new(),
                due: BTreeMap::new(),
                next_due: 0,
                calls: 0,
                cut_at_call: None,
                fault: None,
            }),
            cut: Cell::new(false),
            cut_waiters: RefCell::default(),
        })
    }

    /// A handle that a store can be formatted on or opened from.
    pub fn file(&self, slot: usize) -> DiskFile {
        let size = self.state.borrow().disks[slot].size_bytes();
        DiskFile::simulated(FileSlot(slot as u32), size)
    }

    /// The power goes when the `n`th disk call from now is submitted.
    pub fn cut_after_calls(&self, n: u64) {
        let mut state = self.state.borrow_mut();
        state.cut_at_call = Some(state.calls + n);
    }

    /// Disk calls submitted so far.
    pub fn calls(&self) -> u64 {
        self.state.borrow().calls
    }

    /// Whether the power is gone.
    pub fn is_cut(&self) -> bool {
        self.cut.get()
    }

    /// Resolves when the power goes.
    pub async fn until_cut(&self) {
        std::future::poll_fn(|cx| {
            if self.cut.get() {
                return Poll::Ready(());
            }
            self.cut_waiters.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The disks as the cut left them.
    pub fn media_after_cut(&self, cut: Cut) -> Vec<Media> {
        let mut state = self.state.borrow_mut();
        let State { rng, disks, .. } = &mut *state;
        disks.iter().map(|disk| disk.after_cut(cut, rng)).collect()
    }

    /// The disks as reads see them now (after a clean close).
    pub fn media(&self) -> Vec<Media> {
        self.state.borrow().disks.clone()
    }

    /// Looks at, or damages, a disk behind everybody's back.
    pub fn with_disk<T>(&self, slot: usize, look: impl FnOnce(&mut Media) -> T) -> T {
        look(&mut self.state.borrow_mut().disks[slot])
    }

    /// Asks `hook` about every call that completes from now on.
    pub fn set_fault(&self, hook: Option<FaultHook>) {
        self.state.borrow_mut().fault = hook;
    }

    fn power_off(&self) {
        self.cut.set(true);
        self.state.borrow_mut().due.clear();
        for waker in self.cut_waiters.take() {
            waker.wake();
        }
    }
}

impl State {
    fn latency(&mut self) -> Duration {
        let micros = match self.rng.below(16) {
            0 => 100 + self.rng.below(10_000),
            _ => 1 + self.rng.below(100),
        };
        Duration::from_micros(micros)
    }

    /// Ends one operation: the medium changes, the result is there.
    fn complete(&mut self, index: usize) -> Option<Waker> {
        let pending = &mut self.ops[index];
        let mut op = pending.op.take().expect("in flight");
        let token = std::mem::replace(&mut pending.token, Token::None);
        let (slot, call) = match &op {
            Op::Read { file, at, range, .. } => (
                *file,
                Call::Read {
                    at: *at,
                    len: range.len(),
                },
            ),
            Op::Write { file, at, range, .. } => (
                *file,
                Call::Write {
                    at: *at,
                    len: range.len(),
                },
            ),
            Op::Sync { file } => (*file, Call::Sync),
            _ => unreachable!("only disk operations are simulated"),
        };
        let fault = self.fault.as_mut().and_then(|hook| hook(slot, call));
        let disk = &mut self.disks[slot.0 as usize];
        let result = match fault {
            Some(errno) => {
                if let Token::Write(id) = token {
                    disk.fail_write(id, &mut self.rng);
                }
                Err(io::Error::from_raw_os_error(errno))
            }
            None => Ok(match (&mut op, token) {
                (Op::Read { at, buf, range, .. }, _) => {
                    let n = within(disk.size_bytes(), *at, range.len());
                    disk.read(*at, &mut buf[range.start..range.start + n]);
                    n
                }
                (Op::Write { at, range, .. }, Token::Write(id)) => {
                    disk.complete_write(id);
                    within(disk.size_bytes(), *at, range.len())
                }
                (Op::Sync { .. }, Token::Sync(covered)) => {
                    disk.complete_sync(&covered);
                    0
                }
                _ => unreachable!("token and operation go together"),
            }),
        };
        let pending = &mut self.ops[index];
        if pending.forgotten {
            self.ops.remove(index);
            return None;
        }
        pending.done = Some(Done { result, op });
        pending.waker.take()
    }
}

fn within(size_bytes: u64, at: u64, len: usize) -> usize {
    size_bytes.saturating_sub(at).min(len as u64) as usize
}

impl Driver for SimDriver {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn submit(&self, op: Op) -> OpKey {
        let mut state = self.state.borrow_mut();
        state.calls += 1;
        let cut_now = state.cut_at_call.is_some_and(|at| state.calls >= at) && !self.cut.get();
        let token = if self.cut.get() {
            Token::None
        } else {
            let disk_of = |file: &FileSlot| file.0 as usize;
            match &op {
                Op::Write { file, at, buf, range } => {
                    let n = within(state.disks[disk_of(file)].size_bytes(), *at, range.len());
                    let data = &buf[range.start..range.start + n];
                    Token::Write(state.disks[disk_of(file)].begin_write(*at, data))
                }
                Op::Sync { file } => Token::Sync(state.disks[disk_of(file)].begin_sync()),
                Op::Read { .. } => Token::None,
                _ => unreachable!("only disk operations are simulated"),
            }
        };
        let index = state.ops.insert(Pending {
            op: Some(op),
            token,
            done: None,
            waker: None,
            forgotten: false,
        });
        if !self.cut.get() && !cut_now {
            let at = state.now + state.latency();
            let id = state.next_due;
            state.next_due += 1;
            state.due.insert((at, id), index);
        }
        drop(state);
        if cut_now {
            self.power_off();
        }
        OpKey(index)
    }

    fn poll(&self, key: OpKey, cx: &mut Context<'_>) -> Poll<Done> {
        let mut state = self.state.borrow_mut();
        let pending = &mut state.ops[key.0];
        match pending.done.take() {
            Some(done) => {
                state.ops.remove(key.0);
                Poll::Ready(done)
            }
            None => {
                pending.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn forget(&self, key: OpKey) {
        let mut state = self.state.borrow_mut();
        let pending = &mut state.ops[key.0];
        pending.forgotten = true;
        let waker = pending.waker.take();
        let removed = pending.done.is_some().then(|| state.ops.remove(key.0));
        drop(state);
        drop((removed, waker));
    }

    fn turn(&self, wait: Wait) {
        let mut state = self.state.borrow_mut();
        let limit = match wait {
            Wait::No => state.now,
            Wait::AtMost(duration) => state.now + duration,
            Wait::Forever => Duration::MAX,
        };
        let Some((&(at, id), &index)) = state.due.first_key_value() else {
            assert!(
                limit != Duration::MAX || self.cut.get(),
                "deadlock: every task waits, and no operation or timer is left"
            );
            assert!(
                limit != Duration::MAX,
                "the power is gone and the test waits for something else"
            );
            state.now = limit;
            return;
        };
        if at > limit {
            state.now = limit;
            return;
        }
        state.now = state.now.max(at);
        state.due.remove(&(at, id));
        let waker = state.complete(index);
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn attach(&self, _file: Arc<OwnedFd>) -> io::Result<FileSlot> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn detach(&self, _slot: FileSlot) {}

    fn now(&self) -> Duration {
        self.state.borrow().now
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(NoUnpark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::Buf;
    use crate::disk::Disk;
    use crate::runtime::Runtime;

    fn write_and_cut(cut: Cut, sync: bool) -> Vec<u8> {
        let driver = SimDriver::new(7, vec![Media::zeroed(1 << 20)]);
        let runtime = Runtime::new(driver.clone());
        let file = driver.file(0);
        runtime.block_on(async move {
            let disk = Disk::attach(&file).unwrap();
            let mut buf = Buf::zeroed(4096);
            buf.fill(0xaa);
            disk.write(8192, Rc::new(buf), 0..4096).await.unwrap();
            if sync {
                disk.sync().await.unwrap();
            }
        });
        let mut out = vec![0; 4096];
        driver.media_after_cut(cut)[0].read(8192, &mut out);
        out
    }

    #[test]
    fn a_synced_write_survives_every_cut() {
        for cut in [Cut::KeepAll, Cut::DropAll, Cut::WholeWrites, Cut::TornSectors] {
            assert!(write_and_cut(cut, true).iter().all(|b| *b == 0xaa));
        }
    }

    #[test]
    fn an_unsynced_write_may_be_lost_or_torn_at_512_bytes() {
        assert!(write_and_cut(Cut::KeepAll, false).iter().all(|b| *b == 0xaa));
        assert!(write_and_cut(Cut::DropAll, false).iter().all(|b| *b == 0));
        let torn = write_and_cut(Cut::TornSectors, false);
        let mut sectors = torn.chunks(512).map(|s| (s[0], s.iter().all(|b| *b == s[0])));
        assert!(sectors.all(|(value, whole)| whole && (value == 0 || value == 0xaa)));
    }

    #[test]
    fn time_is_virtual_and_timers_fire_in_order() {
        let driver = SimDriver::new(1, vec![]);
        let runtime = Runtime::new(driver);
        let order = runtime.block_on(async {
            let log = Rc::new(RefCell::new(Vec::new()));
            let tasks: Vec<_> = [3000, 1000, 2000]
                .into_iter()
                .map(|seconds| {
                    let log = log.clone();
                    crate::runtime::spawn(async move {
                        crate::runtime::sleep(Duration::from_secs(seconds)).await;
                        log.borrow_mut().push(seconds);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            log.take()
        });
        assert_eq!(order, [1000, 2000, 3000]);
    }

    #[test]
    fn a_power_cut_stops_every_later_call() {
        let driver = SimDriver::new(3, vec![Media::zeroed(1 << 20)]);
        let runtime = Runtime::new(driver.clone());
        driver.cut_after_calls(3);
        let file = driver.file(0);
        let written = Rc::new(Cell::new(0));
        let counter = written.clone();
        let until = driver.clone();
        runtime.block_on(async move {
            let work = crate::runtime::spawn(async move {
                let disk = Disk::attach(&file).unwrap();
                loop {
                    disk.write(0, Rc::new(Buf::zeroed(512)), 0..512).await.unwrap();
                    counter.set(counter.get() + 1);
                }
            });
            until.until_cut().await;
            drop::<crate::runtime::Task<()>>(work);
        });
        assert!(driver.is_cut());
        assert_eq!(written.get(), 2);
    }
}
