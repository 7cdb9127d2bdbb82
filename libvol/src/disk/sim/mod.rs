//! The simulated engine: disks in memory, time and chance from a seed.
//!
//! It runs the very code that production runs. Operations complete in a random order after a random virtual latency;
//! after a chosen number of disk calls the power goes and nothing completes any more; a disk with a [`FaultPlan`] fails,
//! lies, hangs or goes away. Nothing here reads the real clock, so a seed replays exactly, and [`SimDriver::trace_hash`]
//! says whether it did. Sockets are deliberately not simulated.
//!
//! A crash test: build a [`SimDriver`] over [`Media`], run work until it ends or [`SimDriver::until_cut`] resolves, drop
//! the runtime, take [`SimDriver::media_after_cut`], build the next driver over it, open, recover, check.

mod faults;
mod file;
mod media;
mod rng;
#[cfg(test)]
mod tests;
mod trace;

pub use faults::{AllowHook, FaultPlan, Silent};
pub use file::SimFile;
pub use media::{Cut, Media};
pub use rng::Rng;
pub use trace::{Event, Outcome, What};

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;

use faults::Faults;
use trace::Trace;

use crate::disk::DiskFile;
use crate::limits::{BLOCK, BLOCK_SIZE};
use crate::runtime::{Done, Driver, FileSlot, Op, OpKey, Unpark, Wait};

/// What a fault hook is asked about: the operation about to complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// Looks at every write as it is submitted: disk, byte offset, bytes.
pub type WriteWatch = Box<dyn FnMut(FileSlot, u64, &[u8])>;

const EIO: i32 = 5;
const ENODEV: i32 = 19;

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
    plans: Vec<DiskState>,
    allow: Option<AllowHook>,
    watch: Option<WriteWatch>,
    trace: Trace,
}

/// What goes wrong with one disk.
#[derive(Default)]
struct DiskState {
    faults: Option<Faults>,
    /// It is away until then.
    away_until: Option<Duration>,
    /// How often it has gone away: what was opened before then is dead.
    gone: u32,
    /// Calls that hang, since it last went away.
    hung: u32,
    /// It stops answering after so many calls.
    hang_after: Option<u64>,
}

/// Bits of a file's slot that say which disk; the others count how often that had gone away when the file was made.
const DISK_BITS: u32 = 8;

fn disk_of(slot: FileSlot) -> (usize, u32) {
    ((slot.0 & ((1 << DISK_BITS) - 1)) as usize, slot.0 >> DISK_BITS)
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
        let mut plans = Vec::new();
        plans.resize_with(disks.len(), DiskState::default);
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
                plans,
                allow: None,
                watch: None,
                trace: Trace::default(),
            }),
            cut: Cell::new(false),
            cut_waiters: RefCell::default(),
        })
    }

    /// A handle that a store can be formatted on or opened from. It is dead for good once the disk goes away.
    pub fn file(&self, slot: usize) -> DiskFile {
        let state = self.state.borrow();
        let number = slot as u32 | state.plans[slot].gone << DISK_BITS;
        DiskFile::simulated(FileSlot(number), state.disks[slot].size_bytes())
    }

    /// Whether a call on the disk hangs: it may still land.
    pub fn hangs(&self, slot: usize) -> bool {
        self.state.borrow().plans[slot].hung > 0
    }

    /// The power goes when the `n`th disk call from now is submitted.
    pub fn cut_after_calls(&self, n: u64) {
        let mut state = self.state.borrow_mut();
        state.cut_at_call = Some(state.calls + n);
    }

    /// The power goes now.
    pub fn cut_now(&self) {
        if !self.is_cut() {
            self.power_off();
        }
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
        self.media_after_cuts(|_| cut)
    }

    /// The same, each disk with a cut of its own.
    pub fn media_after_cuts(&self, cut: impl Fn(usize) -> Cut) -> Vec<Media> {
        let mut state = self.state.borrow_mut();
        let State { rng, disks, .. } = &mut *state;
        let disks = disks.iter().enumerate();
        disks.map(|(slot, disk)| disk.after_cut(cut(slot), rng)).collect()
    }

    /// The disks as reads see them now (after a clean close).
    pub fn media(&self) -> Vec<Media> {
        self.state.borrow().disks.clone()
    }

    /// The disks when the process has ended and the machine goes on: what was under way has landed or not.
    pub fn media_after_exit(&self) -> Vec<Media> {
        let mut state = self.state.borrow_mut();
        let State { rng, disks, .. } = &mut *state;
        disks.iter_mut().for_each(|disk| disk.end_writes(rng));
        disks.clone()
    }

    /// Looks at, or damages, a disk behind everybody's back.
    pub fn with_disk<T>(&self, slot: usize, look: impl FnOnce(&mut Media) -> T) -> T {
        look(&mut self.state.borrow_mut().disks[slot])
    }

    /// Asks `hook` about every call that completes from now on.
    pub fn set_fault(&self, hook: Option<FaultHook>) {
        self.state.borrow_mut().fault = hook;
    }

    /// From now on the disk behaves as planned; its chances come from `seed`.
    pub fn plan_faults(&self, slot: usize, plan: FaultPlan, seed: u64) {
        let mut state = self.state.borrow_mut();
        state.plans[slot].faults = Some(Faults::new(plan, seed));
    }

    /// After so many more calls of the disk, none ends any more.
    pub fn hang_after(&self, slot: usize, calls: u64) {
        self.state.borrow_mut().plans[slot].hang_after = Some(calls);
    }

    /// Asks `hook` before any silent damage is done. Without one, none is.
    pub fn allow_silent(&self, hook: Option<AllowHook>) {
        self.state.borrow_mut().allow = hook;
    }

    /// Shows every write to `watch`.
    pub fn watch_writes(&self, watch: Option<WriteWatch>) {
        self.state.borrow_mut().watch = watch;
    }

    /// The disk goes away: every call gets ENODEV until [`SimDriver::bring_back`], and for ever through files made before.
    pub fn vanish(&self, slot: usize) {
        let mut state = self.state.borrow_mut();
        let mut rng = state.rng.clone();
        state.go_away(slot, Duration::MAX, &mut rng);
        state.rng = rng;
    }

    /// The disk is back, as it was, or with other (older) contents.
    pub fn bring_back(&self, slot: usize, contents: Option<Media>) {
        let mut state = self.state.borrow_mut();
        state.plans[slot].away_until = None;
        state.note(What::Returned(slot as u32, contents.is_some()));
        if let Some(contents) = contents {
            state.disks[slot] = contents;
        }
    }

    /// Keeps every event from now on, for [`SimDriver::trace`].
    pub fn keep_trace(&self) {
        self.state.borrow_mut().trace.keep();
    }

    /// The events kept so far, once.
    pub fn trace(&self) -> Vec<Event> {
        self.state.borrow_mut().trace.take()
    }

    /// A hash of all that happened: equal for equal histories.
    pub fn trace_hash(&self) -> u64 {
        self.state.borrow().trace.hash()
    }

    /// Adds a line of the world's own to the trace, if it is kept.
    pub fn note(&self, text: impl FnOnce() -> String) {
        let mut state = self.state.borrow_mut();
        if state.trace.is_kept() {
            state.note(What::Note(text()));
        }
    }

    fn power_off(&self) {
        self.cut.set(true);
        let mut state = self.state.borrow_mut();
        state.due.clear();
        state.note(What::Cut);
        drop(state);
        for waker in self.cut_waiters.take() {
            waker.wake();
        }
    }
}

impl State {
    fn note(&mut self, what: What) {
        self.trace.add(self.now, what);
    }

    fn latency(&mut self, disk: usize) -> Duration {
        let micros = match self.rng.below(16) {
            0 => 100 + self.rng.below(10_000),
            _ => 1 + self.rng.below(100),
        };
        let faults = self.plans[disk].faults.as_ref();
        let factor = faults.map_or(1, |faults| faults.plan.slowness.max(1));
        Duration::from_micros(micros) * factor
    }

    /// Whether this call never ends.
    fn hangs(&mut self, disk: usize) -> bool {
        let state = &mut self.plans[disk];
        if let Some(left) = &mut state.hang_after {
            let hangs = *left == 0;
            *left = left.saturating_sub(1);
            state.hung += u32::from(hangs);
            return hangs;
        }
        let Some(faults) = &mut state.faults else {
            return false;
        };
        let hangs = state.away_until.is_none() && faults.strikes(faults.plan.hangs);
        if hangs {
            faults.spend();
            state.hung += 1;
        }
        hangs
    }

    /// What was not synced is as after a power cut of this disk alone.
    fn go_away(&mut self, disk: usize, until: Duration, rng: &mut Rng) {
        let cut = Cut::random(rng);
        self.disks[disk] = self.disks[disk].after_cut(cut, rng);
        let state = &mut self.plans[disk];
        state.away_until = Some(until);
        state.gone += 1;
        state.hung = 0;
        self.note(What::Vanished(disk as u32));
    }

    /// What a disk does by itself whenever it is called: comes back, goes away, rots.
    fn live(&mut self, disk: usize) {
        let state = &mut self.plans[disk];
        if state.away_until.is_some_and(|until| until <= self.now) {
            state.away_until = None;
            self.note(What::Returned(disk as u32, false));
        }
        let state = &mut self.plans[disk];
        let Some(faults) = &mut state.faults else { return };
        if state.away_until.is_none() && faults.strikes(faults.plan.vanishings) {
            faults.spend();
            let until = self.now + faults.plan.away;
            let mut rng = faults.rng.clone();
            self.go_away(disk, until, &mut rng);
        }
        let Some(faults) = &mut self.plans[disk].faults else {
            return;
        };
        if faults.strikes(faults.plan.bit_flips)
            && let Some(block) = self.disks[disk].any_block(&mut faults.rng)
        {
            let at = block + faults.rng.below(BLOCK);
            let bit = faults.rng.below(8) as u8;
            let mut allow = self.allow.as_mut();
            if allow.as_mut().is_some_and(|allow| {
                allow(FileSlot(disk as u32), Silent::Flip { at }, &self.disks[disk], &[])
            }) {
                faults.spend();
                self.disks[disk].flip_bit(at, bit);
                self.trace.add(
                    self.now,
                    What::Flip {
                        disk: disk as u32,
                        at,
                    },
                );
            }
        }
    }

    /// How a call that is about to complete ends.
    fn outcome(&mut self, slot: FileSlot, call: Call, data: &[u8]) -> Outcome {
        let (disk, made) = disk_of(slot);
        let slot = FileSlot(disk as u32);
        if let Some(errno) = self.fault.as_mut().and_then(|hook| hook(slot, call)) {
            return Outcome::Failed(errno);
        }
        if self.plans[disk].faults.is_some() || self.plans[disk].away_until.is_some() {
            self.live(disk);
        }
        let state = &mut self.plans[disk];
        if state.away_until.is_some() || state.gone != made {
            return Outcome::Failed(ENODEV);
        }
        let Some(faults) = &mut state.faults else {
            return Outcome::Done;
        };
        let plan = faults.plan;
        let errors = match call {
            Call::Read { .. } => plan.read_errors,
            Call::Write { .. } => plan.write_errors,
            Call::Sync => plan.sync_errors,
        };
        if faults.strikes(errors) {
            faults.spend();
            return Outcome::Failed(EIO);
        }
        let Call::Write { at, len } = call else {
            return Outcome::Done;
        };
        let media = &self.disks[disk];
        let mut allowed = |silent| {
            let allow = self.allow.as_mut();
            allow.is_some_and(|allow| allow(slot, silent, media, data))
        };
        if faults.strikes(plan.lost_writes) && allowed(Silent::Lost { at, len }) {
            faults.spend();
            return Outcome::Lost;
        }
        if faults.strikes(plan.misdirected_writes) {
            let blocks = (media.size_bytes() - len as u64) / BLOCK_SIZE as u64;
            // A neighbour more often than any place: that is where such writes go.
            let to = match faults.rng.one_in(2) {
                true => at.saturating_sub(BLOCK * faults.rng.below(4)) + BLOCK * faults.rng.below(4),
                false => faults.rng.below(blocks + 1) * BLOCK,
            };
            if to != at && to <= blocks * BLOCK && allowed(Silent::Misdirected { at, len, to }) {
                faults.spend();
                return Outcome::Misdirected(to);
            }
        }
        Outcome::Done
    }

    /// Ends one operation: the medium changes, the result is there.
    fn complete(&mut self, index: usize) -> Option<Waker> {
        let pending = &mut self.ops[index];
        let mut op = pending.op.take().expect("in flight");
        let token = std::mem::replace(&mut pending.token, Token::None);
        let (slot, call) = call_of(&op);
        let data = match &op {
            Op::Write { buf, range, .. } => &buf[range.clone()],
            _ => &[],
        };
        let outcome = self.outcome(slot, call, data);
        let (disk, _) = disk_of(slot);
        self.note(What::Call {
            disk: disk as u32,
            call,
            outcome,
        });
        let disk = &mut self.disks[disk];
        let result = match (&mut op, token, outcome) {
            (_, token, Outcome::Failed(errno)) => {
                match token {
                    Token::Write(id) => disk.fail_write(id, &mut self.rng),
                    Token::Sync(covered) => disk.fail_sync(&covered, &mut self.rng),
                    Token::None => {}
                }
                Err(io::Error::from_raw_os_error(errno))
            }
            (Op::Read { at, buf, range, .. }, _, _) => {
                let n = within(disk.size_bytes(), *at, range.len());
                disk.read(*at, &mut buf[range.start..range.start + n]);
                Ok(n)
            }
            (Op::Write { at, range, .. }, Token::Write(id), outcome) => {
                match outcome {
                    Outcome::Lost => disk.lose_write(id),
                    Outcome::Misdirected(to) => {
                        disk.misdirect_write(id, to);
                        disk.complete_write(id);
                    }
                    _ => disk.complete_write(id),
                }
                Ok(within(disk.size_bytes(), *at, range.len()))
            }
            (Op::Sync { .. }, Token::Sync(covered), _) => {
                disk.complete_sync(&covered);
                Ok(0)
            }
            _ => unreachable!("token and operation go together"),
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

fn call_of(op: &Op) -> (FileSlot, Call) {
    match op {
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
        let (slot, call) = call_of(&op);
        let (disk, made) = disk_of(slot);
        let dead = state.plans[disk].gone != made;
        let token = match &op {
            _ if self.cut.get() || dead => Token::None,
            Op::Write { at, buf, range, .. } => {
                let n = within(state.disks[disk].size_bytes(), *at, range.len());
                let data = &buf[range.start..range.start + n];
                if let Some(watch) = &mut state.watch {
                    watch(FileSlot(disk as u32), *at, data);
                }
                Token::Write(state.disks[disk].begin_write(*at, data))
            }
            Op::Sync { .. } => Token::Sync(state.disks[disk].begin_sync()),
            _ => Token::None,
        };
        let index = state.ops.insert(Pending {
            op: Some(op),
            token,
            done: None,
            waker: None,
            forgotten: false,
        });
        if self.cut.get() || cut_now {
            // It never completes.
        } else if !dead && state.hangs(disk) {
            state.note(What::Call {
                disk: disk as u32,
                call,
                outcome: Outcome::Hung,
            });
        } else {
            let at = state.now + state.latency(disk);
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
                "deadlock: every task waits, and no operation or timer is left ({} calls hang)",
                state.plans.iter().map(|state| state.hung).sum::<u32>()
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
